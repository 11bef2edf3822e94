"""PEFT's rules where they are weaker than this library's, for files that mean the same to both."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from c3a_triton.errors import ConfigError

from .config import LAYERS_PATTERN_FORM, C3AConfig
from .expressions import check_re_syntax, compile_pattern
from .patterns import target_rule

__all__ = ["peft_block_size_rule", "peft_safe_pattern", "peft_safe_targets"]

# PEFT's way to complete a key of `block_size_pattern`: ungrouped, and only after a dot.
_PEFT_KEY_FORM = r".*\.{}$"
# With more keys than this the cache of `re` is no help to PEFT: it compiles every key again for every module.
_MOST_FULL_NAMES = 256
# From this many names on PEFT shortens a list of targets, and may then count layers where it did not before.
_PEFT_SHORTENS_FROM = 20


@lru_cache(maxsize=4096)
def _is_valid_for_re(pattern: str) -> bool:
    """Whether PEFT can use a pattern in the form into which it puts it."""
    try:
        check_re_syntax(pattern)
    except ConfigError:
        return False
    return True


def peft_block_size_rule(pattern: Mapping[str, int], default: int) -> Callable[[str], int]:
    """The block size that PEFT's C3A gives a module, by its name: not always the one that `block_size_rule` gives.

    PEFT takes the first key for which `re.match(rf".*\\.{key}$", name)` holds: only after a dot, and ungrouped, so that
    `a|b` means `.*\\.a` or `b$`. Where no key matches so, it looks the whole name up as a key. PEFT sorts keys when it
    saves, so they are taken in sorted order here: what is right in that order stays right.

    Raises:
        ConfigError: PEFT could not match a key at all: it is not valid for `re` in this place, or takes too long; when
            the function is called.
    """
    keys = sorted(pattern)

    def block_size_of(name: str) -> int:
        for key in keys:
            if not _is_valid_for_re(_PEFT_KEY_FORM.replace("{}", key)):
                raise ConfigError(f"PEFT cannot use the block_size_pattern key {key!r}")
            if compile_pattern(key, _PEFT_KEY_FORM).match(name, whole=False):
                return pattern[key]
        return pattern.get(name, default)

    return block_size_of


def _exactly(names: Iterable[str]) -> str:
    """A key of `block_size_pattern` that means these names to PEFT, and no other."""
    return f"(?!)|(?:{'|'.join(map(re.escape, names))})"


def peft_safe_pattern(resolved: Mapping[str, int], config: C3AConfig) -> tuple[int, dict[str, int]]:
    """A `block_size` and `block_size_pattern` from which PEFT gets the given block size for every given module.

    The configuration's own where PEFT's rule gives the same, which is checked module by module. Otherwise every module
    whose size is not the default (with "auto", the most frequent size) is written with its full name, which PEFT
    honours. A full name is a pattern to PEFT as well, and can take in another module (`fc` takes in `block.fc`): such a
    module gets a key for it alone, which PEFT's ungrouped rule reads as "never, or exactly this name", and which sorts
    before the names. Where there would be more than 256 full names, one such key per block size takes their place.

    Args:
        resolved: module name → block size, at least one.
        config: the configuration the sizes were resolved from.

    Raises:
        ConfigError: there is no such pattern. (Only for module names that no Python identifier could be part of.)
    """

    def is_right(default: int, pattern: dict[str, int]) -> bool:
        block_size_of = peft_block_size_rule(pattern, default)
        return all(block_size_of(name) == size for name, size in resolved.items())

    if isinstance(config.block_size, int):
        default = config.block_size
        try:
            if is_right(default, config.block_size_pattern):
                return default, dict(sorted(config.block_size_pattern.items()))
        except ConfigError:
            pass  # PEFT could not use these patterns: full names, then
    else:
        counts = Counter(resolved.values())
        default = max(counts, key=lambda size: (counts[size], size))
    full_names = {name: size for name, size in resolved.items() if size != default}
    if len(full_names) > _MOST_FULL_NAMES:
        names_of_size: dict[int, list[str]] = {}
        for name, size in full_names.items():
            names_of_size.setdefault(size, []).append(name)
        return default, {_exactly(names): size for size, names in names_of_size.items()}
    pattern = {name: size for name, size in full_names.items() if _is_valid_for_re(_PEFT_KEY_FORM.replace("{}", name))}
    by_names = peft_block_size_rule(pattern, default)
    pattern |= {_exactly([name]): size for name, size in resolved.items() if by_names(name) != size}
    if not is_right(default, pattern):
        raise ConfigError(f"no block_size_pattern makes PEFT use these block sizes: {dict(resolved)}")
    return default, dict(sorted(pattern.items()))


def _peft_reads_alike(config: C3AConfig) -> bool:
    """Whether PEFT is bound to read targets and layers as `target_rule` does, `exclude_modules` apart."""
    if isinstance(config.target_modules, str):
        return True
    layers_pattern = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    return all(_is_valid_for_re(LAYERS_PATTERN_FORM.replace("{}", pattern)) for pattern in layers_pattern) and (
        config.layers_to_transform is None or len(config.target_modules or ()) < _PEFT_SHORTENS_FROM
    )


def peft_safe_targets(
    adapted: Sequence[str], config: C3AConfig, module_names: Sequence[str]
) -> tuple[list[str] | str, list[int] | int | None, list[str] | str | None]:
    """`target_modules`, `layers_to_transform` and `layers_pattern` by which PEFT adapts exactly the given modules.

    PEFT's C3A knows no `exclude_modules`. The configuration's own fields are kept where they come to the same without
    it. Otherwise the first of these that does: a list of the names' last parts, of full names, or, because a name in a
    list also means every module whose name ends with it, one regular expression of full names.

    Args:
        adapted: the names of the adapted modules; where there are none, because parameters alone are adapted, the
            targets are an empty list.
        config: the configuration they were resolved from.
        module_names: the names of all modules of the model, the adapted ones among them.

    Raises:
        ConfigError: an adapted module is not among `module_names`, or lies in one of `modules_to_save`.
    """
    if not adapted:
        return [], None, None
    wanted = set(adapted)
    if missing := sorted(wanted.difference(module_names)):
        raise ConfigError(f"these adapted modules are not in the model: {', '.join(missing)}")

    def selects_the_same(candidate: C3AConfig) -> bool:
        is_target = target_rule(candidate)
        return all(is_target(name) == (name in wanted) for name in module_names)

    own = config.target_modules
    if (
        own is not None
        and own != "all-linear"
        and _peft_reads_alike(config)
        and selects_the_same(replace(config, exclude_modules=None))
    ):
        return own, config.layers_to_transform, config.layers_pattern
    everywhere = replace(config, exclude_modules=None, layers_to_transform=None, layers_pattern=None)
    for targets in (
        sorted({name.rpartition(".")[2] for name in wanted}),
        sorted(wanted),
        "|".join(map(re.escape, sorted(wanted))),
    ):
        if selects_the_same(replace(everywhere, target_modules=targets)):
            return targets, None, None
    raise ConfigError("an adapted module lies in one of modules_to_save: PEFT never adapts these")
