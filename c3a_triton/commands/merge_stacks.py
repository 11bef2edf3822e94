"""What a merge makes of stacked weights, as a model has them of its experts, and of what a folder has instead.

A folder may have every expert's matrices alone, gate and up too, as transformers 4 writes them and transformers 5 as
well; or the stack with its rows and columns exchanged.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from c3a_triton.adapters.targets import Target
from c3a_triton.bases.experts import is_stored_transposed
from c3a_triton.bases.model_names import Place, expert_places, transposing_of
from c3a_triton.errors import AdapterStateError, CheckpointError
from c3a_triton.files.checkpoint import KERNEL_SUFFIX, AdapterFile
from c3a_triton.operator.dense import add_circulant_

from .model_folder import ModelFolder, check_stored

__all__ = ["apart_changes", "merge_into_parameter"]

Change = Callable[[Tensor], None]


def merge_into_parameter(target: Target, adapter: AdapterFile, *, exchanged: bool = False) -> Change:
    """What merges a target's adapter into the parameter that it is, as `merge_and_unload` does.

    Args:
        target: a parameter that is adapted by itself.
        adapter: what is merged.
        exchanged: whether rows and columns of what is merged into are those of the parameter exchanged.
    """
    transposed = exchanged != is_stored_transposed(target.module, target.parameter)
    return partial(_add, name=target.name, kernels=adapter.tensors[target.name + KERNEL_SUFFIX], transposed=transposed)


def apart_changes(
    structure: Any,
    targets: Iterable[Target],
    adapter: AdapterFile,
    checkpoint: ModelFolder,
    named: Callable[[str], str | None],
) -> dict[str, Change]:
    """What is done to the tensors of a checkpoint from which transformers makes parameters that are adapted.

    Args:
        structure: the model, on the meta device.
        targets: parameters of which the checkpoint has none of the same name.
        adapter: what is merged.
        checkpoint: the model's weights.
        named: a name that transformers gives to a tensor → the name of this model's, or None where it has none.

    Returns:
        Key of the checkpoint → what is done to its tensor, in place.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or one is converted in a way that is not known here.
    """
    targets = list(targets)
    if not targets:
        return {}
    wanted = {target.name: target for target in targets}
    parts: dict[str, dict[Place, str]] = {}  # name of a parameter → which of its parts has which key
    changes: dict[str, Change] = {}
    place_of, exchanging = expert_places(structure), transposing_of(structure)
    for key in checkpoint.tensors:
        place, whole = place_of(key), exchanging(key)
        if place is not None and (name := named(place.stacked)) in wanted:
            parts.setdefault(name, {})[place] = key
        elif whole is not None and (name := named(whole[0])) in wanted:
            shape = tuple(structure.get_parameter(name).shape)
            exchanged = whole[1] or checkpoint.tensors[key].shape != shape
            check_stored(key, checkpoint, (*shape[:-2], shape[-1], shape[-2]) if exchanged else shape)
            changes[key] = merge_into_parameter(wanted.pop(name), adapter, exchanged=exchanged)
    for name, target in wanted.items():
        changes |= _of_parts(structure, target, adapter, checkpoint, parts.get(name, {}))
    return changes


def _of_parts(
    structure: Any, target: Target, adapter: AdapterFile, checkpoint: ModelFolder, keys: Mapping[Place, str]
) -> dict[str, Change]:
    n_parts = next((place.n_parts for place in keys), 1)
    shape = tuple(structure.get_parameter(target.name).shape)
    if len(keys) != target.sizes.stack * n_parts or is_stored_transposed(target.module, target.parameter):
        raise CheckpointError(
            f"{checkpoint.folder} has no tensor of its own for {target.name}, and not all of those from which "
            f"transformers builds it ({len(keys)} of {target.sizes.stack * n_parts} are known): merge this model in "
            "memory, with model.c3a.merge_and_unload()"
        )
    kernels = adapter.tensors[target.name + KERNEL_SUFFIX]
    changes: dict[str, Change] = {}
    for place, key in keys.items():
        check_stored(key, checkpoint, (shape[1] // n_parts, shape[2]))
        part = kernels[place.expert].chunk(n_parts)[place.part]
        changes[key] = partial(_add, name=f"{target.name} ({key})", kernels=part, transposed=False)
    return changes


def _add(weight: Tensor, *, name: str, kernels: Tensor, transposed: bool) -> None:
    """weight += ΔW, matrix by matrix."""
    matrices = weight.mT if transposed else weight
    if weight.dim() == 2:
        matrices, kernels = matrices[None], kernels[None]
    for matrix, w in zip(matrices, kernels, strict=True):
        add_circulant_(matrix, [w.to(matrix.device, torch.float32)])
    if not torch.isfinite(weight).all():
        raise AdapterStateError(f"{name}: merging gives a weight that is not finite; nothing was written")
