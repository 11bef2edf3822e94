"""Names that transformers has changed between releases: its own conversion mapping, for model folders and adapters."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from c3a_triton.errors import CheckpointError
from c3a_triton.files.checkpoint import KERNEL_SUFFIX, AdapterFile

from .targets import base_module_names, base_name, unwrapped_name

__all__ = ["renaming_of", "with_names_of"]


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


def with_names_of(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """An adapter file whose tensors have the names of this model, where another release of transformers gave others.

    Names that the model has stay as they are, and so do those that mean nothing to transformers either.

    Raises:
        CheckpointError: layers of the file are experts, which this transformers keeps in stacked tensors.
    """
    known = {unwrapped_name(name) for name in base_module_names(model)}
    if file.block_sizes.keys() <= known or not _is_of_transformers(model):
        return file
    rename = renaming_of(model)
    parameters = {base_name(unwrapped_name(name)): parameter for name, parameter in model.named_parameters()}
    names: dict[str, str] = {}
    for name in file.block_sizes.keys() - known:
        new, converted = rename(f"{name}.weight")
        _refuse_expert(file, name, new if converted else None, parameters)
        new = new.removesuffix(".weight")
        if new in known:
            names[name] = new

    def renamed(key: str) -> str:
        if key.endswith(KERNEL_SUFFIX):
            name = key.removesuffix(KERNEL_SUFFIX)
            return names.get(name, name) + KERNEL_SUFFIX
        # What is trained whole, biases and embeddings.
        new, converted = rename(base_name(key))
        return key if converted or key.rpartition(".")[0] in known or new.rpartition(".")[0] not in known else new

    tensors = {renamed(key): tensor for key, tensor in file.tensors.items()}
    if len(tensors) < len(file.tensors):
        return file
    sizes = {names.get(name, name): size for name, size in file.block_sizes.items()}
    entries = file.config.modules_to_save
    if entries is not None:
        entries = [renamed(f"{entry}.weight").removesuffix(".weight") for entry in entries]
    return replace(file, tensors=tensors, block_sizes=sizes, config=replace(file.config, modules_to_save=entries))


def _is_of_transformers(model: nn.Module) -> bool:
    return any(cls.__module__ == "transformers.modeling_utils" for cls in type(model).__mro__)


def _refuse_expert(file: AdapterFile, name: str, stacked: str | None, parameters: dict[str, nn.Parameter]) -> None:
    """Refuse a layer that was an expert of its own, where the model holds all experts of a layer in one tensor."""
    experts, found, _ = name.rpartition(".experts.")
    if stacked is None and found:
        start = f"{experts}.experts."
        stacked = next((key for key in parameters if key.startswith(start) and "." not in key[len(start) :]), None)
    if stacked in parameters and parameters[stacked].dim() == 3:
        raise CheckpointError(
            f"the adapter in {file.path} does not fit this model: it adapts {name}, an expert that is a layer of its "
            f"own, as transformers 4 builds it. This model holds all experts of a layer in one tensor ({stacked}), "
            "which is no linear layer. Load it under transformers 4 and merge it there (c3a-triton merge), or train an "
            "adapter that leaves the experts out"
        )
