"""What other libraries make of a model's names: what transformers has changed, and parts that wrappers put in."""

import re
from collections.abc import Callable
from typing import Any

__all__ = ["renaming_of", "unwrapped_name"]

_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def unwrapped_name(name: str) -> str:
    """A name without the parts that wrappers put into it: FSDP1, torch's activation checkpointing, torch.compile."""
    return _WRAPPERS.sub("", name)


def renaming_of(model: Any) -> Callable[[str], tuple[str, bool]]:
    """A tensor's name in some checkpoint → its name in the model, and whether transformers makes another tensor of it.

    Args:
        model: a model of transformers; or its structure, on the meta device.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ModuleNotFoundError:  # transformers 4: patterns of the model's class, the first found counts
        patterns: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", {})

        def by_pattern(key: str) -> tuple[str, bool]:
            found = next((pattern for pattern in patterns if re.search(pattern, key)), None)
            return key if found is None else re.sub(found, patterns[found], key), False

        return by_pattern

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]

    def by_transforms(key: str) -> tuple[str, bool]:
        name, converted = rename_source_key(key, renamings, converters)
        return name, converted is not None

    return by_transforms
