"""Which modules a configuration means, and with which block size: strings in, decisions out.

Patterns may come from a stranger's file. They are matched by the `regex` package, which follows `re` here and can be
stopped: all slow matches of one pattern together get `TIME_LIMIT_S` of processor time, and all matches for one
configuration `TOTAL_TIME_LIMIT_S`.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import regex

from c3a_triton.errors import ConfigError

from .config import (
    BLOCK_SIZE_KEY_FORM,
    LAYERS_PATTERN_FORM,
    MAX_PATTERNS,
    MODULES_TO_SAVE_FORM,
    C3AConfig,
    check_re_syntax,
    compile_pattern,
    shown,
)

__all__ = [
    "TIME_LIMIT_S",
    "TOTAL_TIME_LIMIT_S",
    "block_size_for",
    "match_target",
    "peft_block_size_for",
    "peft_safe_pattern",
    "peft_safe_targets",
    "target_rule",
    "unmatched_keys",
]

TIME_LIMIT_S = 1.0
TOTAL_TIME_LIMIT_S = 30.0
# Module names are short: a match that takes longer than this counts against the pattern's limit.
_SLOW_MATCH_S = 0.005

# PEFT's way to find a layer's index where `layers_pattern` names nothing: the first numbered part after two others.
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."
# PEFT's way to complete a key of `block_size_pattern`: ungrouped, and only after a dot.
_PEFT_KEY_FORM = r".*\.{}$"
# With more keys than this the cache of `re` is no help to PEFT: it compiles every key again for every module.
_MOST_FULL_NAMES = 256
# From this many names on PEFT shortens a list of targets, and may then count layers where it did not before.
_PEFT_SHORTENS_FROM = 20


class _Matcher:
    """A compiled pattern with a limit on the processor time that its slow matches may take together."""

    def __init__(self, pattern: str, form: str) -> None:
        self.pattern = pattern
        self._compiled = compile_pattern(pattern, form)
        self._seconds_left = TIME_LIMIT_S

    def match(self, name: str) -> "regex.Match[str] | None":
        """As `re.match`: from the start of the name."""
        return self._timed(self._compiled.match, name)

    def fullmatch(self, name: str) -> "regex.Match[str] | None":
        """As `re.fullmatch`: the whole name."""
        return self._timed(self._compiled.fullmatch, name)

    def _timed(self, match: Callable[..., "regex.Match[str] | None"], name: str) -> "regex.Match[str] | None":
        if self._seconds_left > 0:
            start = time.thread_time()
            try:
                found = match(name, timeout=self._seconds_left)
            except (TimeoutError, MemoryError):
                self._seconds_left = 0.0
            else:
                seconds = time.thread_time() - start
                if seconds > _SLOW_MATCH_S:
                    self._seconds_left -= seconds
                return found
        raise ConfigError(
            f"the pattern {shown(self.pattern)} takes too long to match module names (more than {TIME_LIMIT_S} s, "
            f"at {name!r}): write it without nested repetitions"
        )


@lru_cache(maxsize=4 * MAX_PATTERNS)
def _matcher(pattern: str, form: str = "{}") -> _Matcher:
    return _Matcher(pattern, form)


class _Matching:
    """Matches for one configuration, whose many patterns may each be quick enough and together take too long."""

    def __init__(self) -> None:
        self._seconds_left = TOTAL_TIME_LIMIT_S

    def match(self, pattern: str, form: str, name: str) -> "regex.Match[str] | None":
        """As `re.match`: from the start of the name."""
        return self._timed(_matcher(pattern, form).match, name)

    def fullmatch(self, pattern: str, form: str, name: str) -> "regex.Match[str] | None":
        """As `re.fullmatch`: the whole name."""
        return self._timed(_matcher(pattern, form).fullmatch, name)

    def _timed(self, match: Callable[[str], "regex.Match[str] | None"], name: str) -> "regex.Match[str] | None":
        start = time.thread_time()
        found = match(name)
        self._seconds_left -= time.thread_time() - start
        if self._seconds_left < 0:
            raise ConfigError(
                f"the patterns of this configuration take more than {TOTAL_TIME_LIMIT_S} s to match module names "
                f"(at {name!r}): write fewer and simpler ones"
            )
        return found


def _matching(config: C3AConfig) -> _Matching:
    """The matching of this very object: no field of it, so that neither copies by `replace` nor files have it."""
    return vars(config).setdefault("_matching", _Matching())


def _endings(name: str) -> set[str]:
    """The name, and what follows each dot in it: a list of names means a module when one of these is in it."""
    return {name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))}


def match_target(config: C3AConfig, name: str) -> bool:
    """Whether a module is a target of the configuration, by PEFT's rule (`check_target_module_exists`).

    In this order: excluded modules and `modules_to_save` (with all that lies in them) are no targets; a regular
    expression has to match the whole name; a name in the list is a target whatever its layer; a name that ends with "."
    and an entry is one if its layer's index is among `layers_to_transform`, where that is set. The nameless root is
    never a target.

    Raises:
        ConfigError: `target_modules` is None or "all-linear", which only a model can resolve, or a pattern takes too
            long.
    """
    return target_rule(config)(name)


def target_rule(config: C3AConfig) -> Callable[[str], bool]:
    """`match_target` as a function of the name alone, for many names: lists become sets once.

    Raises:
        ConfigError: as `match_target`; a pattern that takes too long, when the function is called.
    """
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        raise ConfigError(
            f"target_modules={targets!r} has to be resolved into names for a model before it can be matched"
        )
    excluded = config.exclude_modules or []
    target_set = frozenset([] if isinstance(targets, str) else targets)
    excluded_set = frozenset([] if isinstance(excluded, str) else excluded)
    layers = config.layers_to_transform
    layer_set = frozenset([layers] if isinstance(layers, int) else layers or ())
    matching = _matching(config)

    def is_target(name: str) -> bool:
        endings = _endings(name)
        if not name or not excluded_set.isdisjoint(endings):
            return False
        if isinstance(excluded, str) and matching.fullmatch(excluded, "{}", name):
            return False
        if any(matching.match(module, MODULES_TO_SAVE_FORM, name) for module in config.modules_to_save or ()):
            return False
        if isinstance(targets, str):
            return matching.fullmatch(targets, "{}", name) is not None
        return name in target_set or (not target_set.isdisjoint(endings) and _is_in_layers(config, layer_set, name))

    return is_target


def _is_in_layers(config: C3AConfig, layers: frozenset[int], name: str) -> bool:
    if not layers:
        return True
    matching = _matching(config)
    if config.layers_pattern:
        patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
        matches = (matching.match(pattern, LAYERS_PATTERN_FORM, name) for pattern in patterns)
        found = next((match for match in matches if match is not None), None)
    else:
        found = matching.match(_ANY_LAYER, "{}", name)
    return found is not None and int(found["idx"]) in layers


def block_size_for(config: C3AConfig, name: str) -> tuple[int | str, str | None]:
    """A module's block size (or "auto") and the key of `block_size_pattern` that decided, None where none did.

    A key matches when the whole name matches `(?:.*\\.)?(?:key)`; the first key that matches wins.

    Raises:
        ConfigError: a pattern takes too long.
    """
    matching = _matching(config)
    for key, size in config.block_size_pattern.items():
        if matching.fullmatch(key, BLOCK_SIZE_KEY_FORM, name):
            return size, key
    return config.block_size, None


def unmatched_keys(config: C3AConfig, names: Iterable[str]) -> list[str]:
    """The keys of `block_size_pattern` that match none of these module names.

    A key that matches but never decides, because another one comes before it, is not among them.

    Raises:
        ConfigError: a pattern takes too long.
    """
    names = list(names)
    matching = _matching(config)
    return [
        key
        for key in config.block_size_pattern
        if not any(matching.fullmatch(key, BLOCK_SIZE_KEY_FORM, name) for name in names)
    ]


@lru_cache(maxsize=4096)
def _is_valid_for_re(pattern: str) -> bool:
    """Whether PEFT can use a pattern in the form into which it puts it."""
    try:
        check_re_syntax(pattern)
    except ConfigError:
        return False
    return True


def peft_block_size_for(pattern: Mapping[str, int], default: int, name: str) -> int:
    """The block size that PEFT's C3A gives a module, which is not always the one that `block_size_for` gives.

    PEFT takes the first key for which `re.match(rf".*\\.{key}$", name)` holds: only after a dot, and ungrouped, so that
    `a|b` means `.*\\.a` or `b$`. Where no key matches so, it looks the whole name up as a key. PEFT sorts keys when it
    saves, so they are taken in sorted order here: what is right in that order stays right.

    Raises:
        ConfigError: PEFT could not match a key at all: it is not valid for `re` in this place, or takes too long.
    """
    for key in sorted(pattern):
        if not _is_valid_for_re(_PEFT_KEY_FORM.replace("{}", key)):
            raise ConfigError(f"PEFT cannot use the block_size_pattern key {key!r}")
        if _matcher(key, _PEFT_KEY_FORM).match(name):
            return pattern[key]
    return pattern.get(name, default)


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
        return all(peft_block_size_for(pattern, default, name) == size for name, size in resolved.items())

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
    pattern |= {
        _exactly([name]): size for name, size in resolved.items() if peft_block_size_for(pattern, default, name) != size
    }
    if not is_right(default, pattern):
        raise ConfigError(f"no block_size_pattern makes PEFT use these block sizes: {dict(resolved)}")
    return default, dict(sorted(pattern.items()))


def _peft_reads_alike(config: C3AConfig) -> bool:
    """Whether PEFT is bound to read targets and layers as `match_target` does, `exclude_modules` apart."""
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
        adapted: the names of the adapted modules, at least one.
        config: the configuration they were resolved from.
        module_names: the names of all modules of the model, the adapted ones among them.

    Raises:
        ConfigError: an adapted module is not among `module_names`, or lies in one of `modules_to_save`.
    """
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
