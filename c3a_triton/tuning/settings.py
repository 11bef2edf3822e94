"""The adapter configuration that gives each layer its chosen block size, here and in PEFT."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from c3a_triton.errors import ConfigError
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.patterns import block_size_rule
from c3a_triton.files.peft_rules import peft_block_size_rule, peft_safe_targets

__all__ = ["chosen_config", "minimal_pattern"]


def chosen_config(
    config: C3AConfig, sizes: Mapping[str, int], module_names: Sequence[str], parameters: Sequence[str] = ()
) -> C3AConfig:
    """`config` with these block sizes, by `block_size` and a minimal `block_size_pattern`.

    Targets are written as names, which this library and PEFT resolve to exactly these layers.

    Args:
        config: what the layers were found by.
        sizes: name → block size, of every layer and parameter.
        module_names: the names of all modules of the model.
        parameters: which of the names are parameters'.
    """
    modules = [name for name in sizes if name not in parameters]
    targets, layers, layers_pattern = peft_safe_targets(modules, config, module_names)
    default, pattern = minimal_pattern(sizes)
    return replace(
        config,
        block_size=default,
        block_size_pattern=pattern,
        rank=None,
        target_modules=targets,
        exclude_modules=None,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
        target_parameters=list(parameters) or None,
    )


def minimal_pattern(sizes: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """(block_size, block_size_pattern) from which every layer gets its size, by this library's rule and by PEFT's.

    A key for each role (last part of the name) whose layers have another size than the default, which is chosen so that
    the keys are few; where a role has several sizes, keys that tell its layers apart. Keys are escaped, and the outcome
    is checked layer by layer; what does not pass gives way to a key for each layer.
    """
    counts = Counter(sizes.values())
    defaults = sorted(counts, key=lambda size: (-counts[size], -size))
    candidates = [(default, _keys(sizes, default)) for default in defaults]
    for default, pattern in sorted(candidates, key=lambda candidate: len(candidate[1])):  # stable: then the most layers
        if _is_right(sizes, default, pattern):
            return default, pattern
    # Never, or exactly this name: PEFT reads the keys so, being ungrouped. To us a key also means names that end with
    # its own, so that longer names come first.
    longest_first = sorted(sizes, key=len, reverse=True)
    return defaults[0], {f"(?!)|(?:{re.escape(name)})": sizes[name] for name in longest_first}


def _is_right(sizes: Mapping[str, int], default: int, pattern: dict[str, int]) -> bool:
    config = C3AConfig(block_size=default, block_size_pattern=pattern)
    ours, pefts = block_size_rule(config), peft_block_size_rule(pattern, default)
    try:
        return all(ours(name)[0] == size == pefts(name) for name, size in sizes.items())
    except ConfigError:  # a key that PEFT could not use
        return False


def _keys(sizes: Mapping[str, int], default: int) -> dict[str, int]:
    roles: dict[str, dict[int, list[str]]] = {}
    for name, size in sizes.items():
        roles.setdefault(name.rpartition(".")[2], {}).setdefault(size, []).append(name)
    keys: dict[str, int] = {}
    for role, names_of_size in roles.items():
        for size, names in names_of_size.items():
            if size != default:
                alone = len(names_of_size) == 1
                keys |= dict.fromkeys([re.escape(role)] if alone else _telling(names), size)
    return keys


def _telling(names: Sequence[str]) -> list[str]:
    """Keys for exactly these names: one where they differ in a single part, as by the layer's index.

    The first part is left out, because a key of PEFT's means what follows a dot.
    """
    parts = [name.split(".") for name in names]
    differing = [i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1]
    if len({len(split) for split in parts}) > 1 or len(differing) != 1 or differing[0] == 0:
        return [r"\.".join(map(re.escape, split[1:] or split)) for split in parts]
    alternatives = "|".join(re.escape(split[differing[0]]) for split in parts)
    key = [re.escape(part) for part in parts[0]]
    key[differing[0]] = f"(?:{alternatives})"
    return [r"\.".join(key[1:])]
