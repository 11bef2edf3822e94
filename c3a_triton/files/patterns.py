"""Which modules and parameters a configuration means, and with which block size: strings in, decisions out."""

import re
from collections.abc import Callable, Iterable

from c3a_triton.errors import ConfigError

from .config import BLOCK_SIZE_KEY_FORM, LAYERS_PATTERN_FORM, MODULES_TO_SAVE_FORM, C3AConfig
from .expressions import Matching

__all__ = ["block_size_rule", "parameter_rule", "target_rule", "unmatched_keys"]

# PEFT's way to find a layer's index where `layers_pattern` names nothing: the first numbered part after two others.
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


def _endings(name: str) -> set[str]:
    """The name, and what follows each dot in it: a list of names means a module when one of these is in it."""
    return {name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))}


def target_rule(config: C3AConfig, matching: Matching | None = None) -> Callable[[str], bool]:
    """Whether a module of some name is a target, by PEFT's rule (`check_target_module_exists`), as a function of names.

    In this order: excluded modules and `modules_to_save` (with all that lies in them) are no targets; a regular
    expression has to match the whole name; a name in the list is a target whatever its layer; a name that ends with "."
    and an entry is one if its layer's index is among `layers_to_transform`, where that is set. The nameless root is
    never a target.

    Args:
        config: the configuration.
        matching: where the time of its matches is counted; None for one of this rule's own.

    Raises:
        ConfigError: `target_modules` is None or "all-linear", which only a model can resolve; a pattern that takes too
            long, when the function is called.
    """
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        raise ConfigError(
            f"target_modules={targets!r} has to be resolved into names for a model before it can be matched"
        )
    target_set = frozenset([] if isinstance(targets, str) else targets)
    matching = matching or Matching()
    is_left_out, is_in_layers = _exclusion_rule(config, matching), _layer_rule(config, matching)

    def is_target(name: str) -> bool:
        if not name or is_left_out(name):
            return False
        if isinstance(targets, str):
            return matching.fullmatch(targets, "{}", name) is not None
        return name in target_set or (not target_set.isdisjoint(_endings(name)) and is_in_layers(name))

    return is_target


def parameter_rule(config: C3AConfig, matching: Matching | None = None) -> Callable[[str], bool]:
    """Whether a parameter of some name is a target, by PEFT's rule for `target_parameters`, as a function of names.

    A parameter is a target when its name is in the list, or ends with "." and an entry. PEFT asks no more; here the
    other fields mean what they mean for modules: what `exclude_modules` names, by the parameter's name or by that of
    its module, and what lies in `modules_to_save` is no target, and a name that only ends with an entry has to lie in
    one of `layers_to_transform`, where that is set.

    Args:
        config: the configuration. Where its `target_parameters` is None, no parameter is a target; where it is
            "all-experts", every one is that these other fields leave, and only stacked experts are to be asked about.
        matching: where the time of its matches is counted; None for one of this rule's own.

    Raises:
        ConfigError: a pattern takes too long, when the function is called.
    """
    matching = matching or Matching()
    is_left_out, is_in_layers = _exclusion_rule(config, matching), _layer_rule(config, matching)
    everything = config.target_parameters == "all-experts"
    target_set = frozenset([] if everything else config.target_parameters or ())

    def is_target(name: str) -> bool:
        if not everything and target_set.isdisjoint(_endings(name)):
            return False
        if is_left_out(name) or is_left_out(name.rpartition(".")[0]):
            return False
        return name in target_set or is_in_layers(name)

    return is_target


def _exclusion_rule(config: C3AConfig, matching: Matching) -> Callable[[str], bool]:
    """Whether a name is left out whatever is targeted: excluded, or trained whole (and with it all that lies there)."""
    excluded = config.exclude_modules or []
    excluded_set = frozenset([] if isinstance(excluded, str) else excluded)

    def is_left_out(name: str) -> bool:
        if not excluded_set.isdisjoint(_endings(name)):
            return True
        if isinstance(excluded, str) and matching.fullmatch(excluded, "{}", name):
            return True
        return any(matching.match(module, MODULES_TO_SAVE_FORM, name) for module in config.modules_to_save or ())

    return is_left_out


def _layer_rule(config: C3AConfig, matching: Matching) -> Callable[[str], bool]:
    """Whether the layer of a name is one of those that the configuration transforms."""
    layers, names = config.layers_to_transform, config.layers_pattern
    layer_set = frozenset([layers] if isinstance(layers, int) else layers or ())
    forms = [(_ANY_LAYER, "{}")]
    if names:
        forms = [(name, LAYERS_PATTERN_FORM) for name in ([names] if isinstance(names, str) else names)]

    def is_in_layers(name: str) -> bool:
        if not layer_set:
            return True
        matches = (matching.match(pattern, form, name) for pattern, form in forms)
        found = next((match for match in matches if match is not None), None)
        return found is not None and int(found["idx"]) in layer_set

    return is_in_layers


def block_size_rule(
    config: C3AConfig, matching: Matching | None = None
) -> Callable[[str], tuple[int | str, str | None]]:
    """A module's block size (or "auto") and the key of `block_size_pattern` that decided (or None), by its name.

    A key matches when the whole name matches `(?:.*\\.)?(?:key)`; the first key that matches wins.

    Args:
        config: the configuration.
        matching: where the time of its matches is counted; None for one of this rule's own.

    Raises:
        ConfigError: a pattern takes too long, when the function is called.
    """
    matching = matching or Matching()

    def block_size_of(name: str) -> tuple[int | str, str | None]:
        for key, size in config.block_size_pattern.items():
            if matching.fullmatch(key, BLOCK_SIZE_KEY_FORM, name):
                return size, key
        return config.block_size, None

    return block_size_of


def unmatched_keys(config: C3AConfig, names: Iterable[str], matching: Matching | None = None) -> list[str]:
    """The keys of `block_size_pattern` that match none of these module names.

    A key that matches but never decides, because another one comes before it, is not among them.

    Raises:
        ConfigError: a pattern takes too long.
    """
    names, matching = list(names), matching or Matching()
    return [
        key
        for key in config.block_size_pattern
        if not any(matching.fullmatch(key, BLOCK_SIZE_KEY_FORM, name) for name in names)
    ]
