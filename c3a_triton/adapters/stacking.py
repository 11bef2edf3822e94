"""Adapters of layers, as adapters of the parameters that a model has in their place: of experts, and of routers."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.bases.linear_like import geometry, is_linear
from c3a_triton.bases.model_names import Place, unwrapped_name
from c3a_triton.errors import CheckpointError
from c3a_triton.files.checkpoint import KERNEL_SUFFIX, AdapterFile
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.patterns import block_size_rule, target_rule, unmatched_keys

from .base_model import base_name
from .parameter_targets import parameter_places

__all__ = ["stacked_file", "with_parameters_for_layers"]


def with_parameters_for_layers(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """An adapter file whose kernels of layers are those of the weights, where the model has no layer in such a place.

    So it is with routers: linear layers in transformers 4, and in 5 modules that have the same weight and do more.

    Args:
        model: the model.
        file: the adapter file.
    """
    places = parameter_places(model)
    names = {}
    for name in file.block_sizes:
        place = places.get(f"{name}.weight")
        if place is None or is_linear(place.module) or geometry(place.module) is not None:
            continue
        if place.sizes is not None and not place.sizes.stack:
            names[name] = f"{name}.weight"
    if not names:
        return file
    kernels = {name + KERNEL_SUFFIX: new + KERNEL_SUFFIX for name, new in names.items()}
    tensors = {kernels.get(key, key): tensor for key, tensor in file.tensors.items()}
    sizes = {names.get(name, name): size for name, size in file.block_sizes.items()}
    config = _config(file.config, sizes, list(names.values()), places)
    return replace(file, tensors=tensors, block_sizes=sizes, config=config)


def stacked_file(model: nn.Module, file: AdapterFile, places: Callable[[str], Place | None]) -> AdapterFile:
    """An adapter file whose kernels of single experts, as transformers 4 has them, are those of the model's stacks.

    Exact: ΔW of an expert's rows is the same matrix, and so is its scale, 1 / in_features. Where gate and up share the
    rows of a stack, their kernels are concatenated, [2·m, n, b]; the experts' are stacked, [n_experts, m, n, b]. What
    the configuration leaves out gets zeros, which change nothing. Configured targets and block sizes follow.

    Args:
        model: the model.
        file: the adapter file; what is no expert's in it stays.
        places: where a tensor of an expert lies in the model (`expert_places`).

    Raises:
        CheckpointError: kernels that become one have other shapes, two are for one place, or the file has other experts
            than the model.
    """
    parameters = {base_name(unwrapped_name(name)): parameter for name, parameter in model.named_parameters()}
    layers: dict[str, dict[Place, str]] = {}  # name of a stack → which of its parts was which layer
    for name in file.block_sizes:
        place = places(f"{name}.weight")
        if place is None or place.stacked not in parameters:
            continue
        former = layers.setdefault(place.stacked, {}).setdefault(place, name)
        if former != name or place.stacked in file.block_sizes:
            raise _misfit(
                file, f"{former if former != name else place.stacked} and {name} are for one place in {place.stacked}"
            )
    if not layers:
        return file
    experts = {name for of_stack in layers.values() for name in of_stack.values()}
    tensors = {key: tensor for key, tensor in file.tensors.items() if key.removesuffix(KERNEL_SUFFIX) not in experts}
    sizes = {name: size for name, size in file.block_sizes.items() if name not in experts}
    for stacked, of_stack in layers.items():
        kernels = {place: file.tensors[name + KERNEL_SUFFIX] for place, name in of_stack.items()}
        _check(file, stacked, of_stack, kernels, len(parameters[stacked]))
        # Experts that compute nothing (LongCat-Flash) have rows in some of the stacks, and no layers.
        owner = stacked.rpartition(".")[0]
        siblings = [p for name, p in parameters.items() if name.rpartition(".")[0] == owner and p.dim() == 3]
        _check_complete(file, stacked, of_stack, min(map(len, siblings)))
        tensors[stacked + KERNEL_SUFFIX] = _stack(kernels, len(parameters[stacked]))
        sizes[stacked] = file.block_sizes[next(iter(of_stack.values()))]
    config = _config(file.config, sizes, list(layers), parameters)
    return replace(file, tensors=tensors, block_sizes=sizes, config=config)


def _check(
    file: AdapterFile, stacked: str, layers: Mapping[Place, str], kernels: Mapping[Place, Tensor], n_experts: int
) -> None:
    first = next(iter(kernels))
    for place, kernel in kernels.items():
        if place.expert >= n_experts:
            raise _misfit(file, f"it adapts {layers[place]}, and {stacked} has {n_experts} experts, counted from 0")
        if kernel.shape != kernels[first].shape:
            raise _misfit(
                file,
                f"{layers[first]} and {layers[place]} have kernels of shapes {list(kernels[first].shape)} and "
                f"{list(kernel.shape)}, block size last, and become one tensor in this model ({stacked}): a circulant "
                "block of one size is none of another. Merge the adapter under transformers 4 (c3a-triton merge)",
            )


def _check_complete(file: AdapterFile, stacked: str, layers: Mapping[Place, str], n_experts: int) -> None:
    """Refuse a file that has no kernel for an expert, where its configuration does not leave that one out."""
    config = file.config
    if config.target_modules is None:
        return
    is_target = target_rule(replace(config, target_modules=".*") if config.target_modules == "all-linear" else config)
    for part, (place, name) in {place.part: (place, name) for place, name in layers.items()}.items():
        before, _, after = name.rpartition(f".{place.expert}.")
        for expert in range(n_experts):
            other = f"{before}.{expert}.{after}"
            if Place(stacked, expert, part, place.n_parts) not in layers and is_target(other):
                raise _misfit(
                    file,
                    f"its configuration targets {other}, for which it has no kernel: {stacked} has {n_experts} experts",
                )


def _stack(kernels: Mapping[Place, Tensor], n_experts: int) -> Tensor:
    place, kernel = next(iter(kernels.items()))
    dtype = functools.reduce(torch.promote_types, (kernel.dtype for kernel in kernels.values()))
    stack = torch.zeros(n_experts, place.n_parts, *kernel.shape, dtype=dtype, device=kernel.device)
    for place, kernel in kernels.items():
        stack[place.expert, place.part] = kernel
    return stack.flatten(1, 2)


def _config(config: C3AConfig, sizes: Mapping[str, int], new: list[str], parameters: Collection[str]) -> C3AConfig:
    """The configuration of an adapter that has these parameters now in the place of layers.

    Args:
        config: of the file.
        sizes: name → block size of what the adapter has now.
        new: those of the names that are new.
        parameters: the names of all parameters of the model.
    """
    layers = [name for name in sizes if name not in parameters]
    modules: Any = config.target_modules
    if not layers:
        modules = []
    elif isinstance(modules, list):
        modules = [entry for entry in modules if any(f".{name}".endswith(f".{entry}") for name in layers)]
    named = config.target_parameters
    if not isinstance(named, list):
        named = [name for name in sizes if name in parameters and name not in new]
    block_size_of = block_size_rule(config)
    idle = unmatched_keys(config, sizes)
    pattern = {key: size for key, size in config.block_size_pattern.items() if key not in idle}
    own = {re.escape(name): sizes[name] for name in new if block_size_of(name)[0] not in (sizes[name], "auto")}
    return replace(
        config,
        target_modules=modules,
        target_parameters=[*named, *new],
        block_size_pattern=own | pattern,
    )


def _misfit(file: AdapterFile, problem: str) -> CheckpointError:
    return CheckpointError(f"the adapter in {file.path} does not fit this model: {problem}")
