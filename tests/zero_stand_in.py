"""A stand-in for DeepSpeed's ZeRO-3, which has no wheels: parameters in parts, put together where DeepSpeed would.

What the library asks of it is what it asks of DeepSpeed 0.19.8, by the same names. It trains nothing.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_external: dict[nn.Module, list[Any]] = {}
_ids = itertools.count()
most_gathered = 0
"""The most elements that `GatheredParameters` has had together at a time, since this was set to 0."""


def _all_gather(parameters: Iterable[Any]) -> None:
    for parameter in parameters:
        if parameter.numel():
            continue
        parts = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, parameter.ds_tensor)
        parameter.data = torch.cat(parts)[: parameter.ds_shape.numel()].view(parameter.ds_shape)


def _partition(parameters: Iterable[Any], has_been_updated: bool = False) -> None:
    for parameter in parameters:
        if not parameter.numel():
            continue
        if has_been_updated:
            _own_part(parameter, parameter.ds_tensor)
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def _own_part(parameter: Any, part: torch.Tensor) -> None:
    padded = torch.zeros(part.numel() * dist.get_world_size(), dtype=part.dtype)
    padded[: parameter.numel()] = parameter.data.reshape(-1)
    part.copy_(padded.chunk(dist.get_world_size())[dist.get_rank()])


@contextmanager
def gathered_parameters(parameters: Iterable[Any], modifier_rank: int | None = None) -> Iterator[None]:
    """As `deepspeed.zero.GatheredParameters`: without the rank whose values count, changes are lost."""
    global most_gathered
    parameters = sorted({p for p in parameters if hasattr(p, "ds_id")}, key=lambda p: p.ds_id)
    assert not any(hasattr(p, "is_claimed") for p in parameters), "DeepSpeed's contexts cannot overlap"
    _all_gather(parameters)
    for parameter in parameters:
        parameter.is_claimed = True
    most_gathered = max(most_gathered, sum(p.numel() for p in parameters))
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter.is_claimed
            if modifier_rank is not None:
                dist.broadcast(parameter.data, modifier_rank)
        _partition(parameters, modifier_rank is not None)


def install() -> None:
    """Be what `import deepspeed` gives."""
    zero = SimpleNamespace(
        GatheredParameters=gathered_parameters,
        register_external_parameter=lambda module, parameter: _external.setdefault(module, []).append(parameter),
    )
    sys.modules["deepspeed"] = SimpleNamespace(zero=zero)  # type: ignore[assignment]


def put_in_parts(model: nn.Module) -> nn.Module:
    """Leave a model's parameters empty, each with its part and what DeepSpeed notes on it, as `deepspeed.zero.Init`."""
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            _put_in_parts(parameter)
    return model


def _put_in_parts(parameter: Any) -> None:
    size = -(-parameter.numel() // dist.get_world_size())
    parameter.ds_id, parameter.ds_shape = next(_ids), parameter.shape
    parameter.ds_process_group = dist.group.WORLD
    parameter.ds_tensor = torch.empty(size, dtype=parameter.dtype)
    parameter.all_gather = lambda param_list=None: _all_gather(param_list or [parameter])
    parameter.partition = lambda param_list=None, **options: _partition(param_list or [parameter], **options)
    _own_part(parameter, parameter.ds_tensor)
    parameter.data = torch.empty(0, dtype=parameter.dtype)


def initialize(model: nn.Module) -> None:
    """Keep a model's parameters in parts, each put together while a module that has it as its own computes."""
    put_in_parts(model)

    def own(module: nn.Module) -> list[Any]:
        parameters = [*module.parameters(recurse=False), *_external.get(module, ())]
        return [parameter for parameter in parameters if hasattr(parameter, "ds_id")]

    for i, module in enumerate(model.modules()):
        module.ds_id = i  # type: ignore[assignment]
        module.register_forward_pre_hook(lambda module, _: _all_gather(own(module)))
        module.register_forward_hook(lambda module, *_: _partition(own(module)))
