"""Which modules a configuration means, and with which block size: strings in, decisions out."""

import re
from collections.abc import Callable, Iterable

from c3a_triton.errors import ConfigError

from .config import BLOCK_SIZE_KEY_FORM, LAYERS_PATTERN_FORM, MODULES_TO_SAVE_FORM, C3AConfig
from .expressions import Matching

__all__ = ["block_size_for", "match_target", "target_rule", "unmatched_keys"]

# PEFT's way to find a layer's index where `layers_pattern` names nothing: the first numbered part after two others.
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


def _matching(config: C3AConfig) -> Matching:
    """The matching of this very object: no field of it, so that neither copies by `replace` nor files have it."""
    return vars(config).setdefault("_matching", Matching())


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
