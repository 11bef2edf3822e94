"""What other libraries make of a model's names: what transformers has changed, and parts that wrappers put in."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Place", "expert_places", "renaming_of", "transposing_of", "unwrapped_name"]

_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def unwrapped_name(name: str) -> str:
    """A name without the parts that wrappers put into it: FSDP1, torch's activation checkpointing, torch.compile."""
    return _WRAPPERS.sub("", name)


class Place(NamedTuple):
    """Where a tensor that some checkpoint has of one expert lies in the model, which has all experts' in one tensor.

    Attributes:
        stacked: the name of the model's tensor, [n_experts, rows, columns].
        expert: the index of the expert.
        part: which of the `n_parts` equal parts of an expert's rows it is: the gate comes before up.
        n_parts: how many layers of an expert share its rows.
    """

    stacked: str
    expert: int
    part: int
    n_parts: int


def renaming_of(model: Any) -> Callable[[str], tuple[str, bool]]:
    """A tensor's name in some checkpoint → its name in the model, and whether transformers makes another tensor of it.

    Args:
        model: a model of transformers; or its structure, on the meta device.
    """
    try:
        from transformers.core_model_loading import rename_source_key
    except ModuleNotFoundError:  # transformers 4: patterns of the model's class, the first found counts
        patterns: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", {})

        def by_pattern(key: str) -> tuple[str, bool]:
            found = next((pattern for pattern in patterns if re.search(pattern, key)), None)
            return key if found is None else re.sub(found, patterns[found], key), False

        return by_pattern

    renamings, converters = _conversions(model)

    def by_transforms(key: str) -> tuple[str, bool]:
        name, converted = rename_source_key(key, renamings, converters)
        return name, converted is not None

    return by_transforms


def expert_places(model: Any) -> Callable[[str], Place | None]:
    """A tensor's name in some checkpoint → its place among the model's stacked experts, or None where it has none.

    None too where transformers does more to the tensors than to concatenate the parts of each expert and to stack the
    experts, so that it is not known what becomes of one of them.

    Args:
        model: a model of transformers; or its structure, on the meta device.
    """
    converted_from = _conversion_of(model)

    def place_of(key: str) -> Place | None:
        if (found := converted_from(key)) is None or not _stacks(found.converter):
            return None
        expert = re.search(found.pattern.replace("*", r"(?P<expert>\d+)"), found.renamed)
        patterns = found.converter.source_patterns
        return expert and Place(found.name, int(expert["expert"]), patterns.index(found.pattern), len(patterns))

    return place_of


def transposing_of(model: Any) -> Callable[[str], tuple[str, bool] | None]:
    """A tensor's name in some checkpoint → its name in the model, which has the last two of its dimensions exchanged.

    With it goes whether they are exchanged always, or only where the tensor's shape is not the model's. None for a
    tensor to which transformers does nothing, or something else.

    Args:
        model: a model of transformers; or its structure, on the meta device.
    """
    converted_from = _conversion_of(model)

    def name_of(key: str) -> tuple[str, bool] | None:
        found = converted_from(key)
        steps = [] if found is None else found.converter.operations
        if found is None or [type(step).__name__ for step in steps] != ["Transpose"]:
            return None
        return (found.name, not steps[0].check_dims) if {steps[0].dim0, steps[0].dim1} == {1, 2} else None

    return name_of


class _Conversion(NamedTuple):
    renamed: str  # a checkpoint's name of a tensor, after the renamings
    name: str  # the model's name of what the tensor goes into
    pattern: str  # the converter's pattern that has matched
    converter: Any


def _conversion_of(model: Any) -> Callable[[str], _Conversion | None]:
    """A tensor's name in some checkpoint → what transformers makes of it, or None where it takes it as it is."""
    try:
        from transformers.core_model_loading import rename_source_key
    except ModuleNotFoundError:  # transformers 4 converts nothing
        return lambda key: None

    renamings, converters = _conversions(model)

    def converted_from(key: str) -> _Conversion | None:
        renamed, _ = rename_source_key(key, renamings, [])
        for converter in converters:
            name, pattern = converter.rename_source_key(renamed)
            if pattern is not None:  # the first that matches is the one that counts
                return _Conversion(renamed, name, pattern, converter)
        return None

    return converted_from


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """What transformers 5 does to a model's checkpoint: renamings, and then at most one of the converters."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    return [transform for transform in transforms if not isinstance(transform, WeightConverter)], converters


def _stacks(converter: Any) -> bool:
    """Whether a converter stacks the tensors that each of its patterns has found, and concatenates these stacks."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    wanted = [("MergeModulelist", 0)] + [("Concatenate", 1)] * (len(converter.source_patterns) > 1)
    return steps == wanted and len(converter.target_patterns) == 1
