"""Tensors of which each process holds a part: FSDP's and tensor parallelism's DTensors, DeepSpeed's ZeRO-3."""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from c3a_triton.errors import ShapeError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "check_gathered",
    "gather_with",
    "gathered",
    "is_partitioned",
    "is_sharded",
    "local",
    "own_part",
    "partitioned_over",
    "put_values",
    "whole",
    "whole_shape",
    "zero",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor: a DTensor, whose module is not imported for that, or ZeRO-3's."""
    return hasattr(tensor, "full_tensor") or is_partitioned(tensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter in the care of DeepSpeed's ZeRO-3, which leaves it empty between uses."""
    return hasattr(tensor, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, which may be ZeRO-3's and empty now."""
    return getattr(parameter, "ds_shape", parameter.shape)


def partitioned_over(parameters: Iterable[Tensor]) -> list["DeviceMesh"]:
    """The distinct groups of processes that hold ZeRO-3's parts of these parameters, each as a mesh."""
    from torch.distributed.device_mesh import DeviceMesh  # not in every build of torch

    groups: dict[Any, str] = {p.ds_process_group: p.device.type for p in parameters if is_partitioned(p)}  # type: ignore[attr-defined]
    return [DeviceMesh.from_group(group, device_type) for group, device_type in groups.items()]


def check_gathered(w: Tensor) -> None:
    """Refuse a kernel that ZeRO-3 has left empty, before an operator says less about it.

    Raises:
        ShapeError: it is one.
    """
    if is_partitioned(w) and not w.numel():
        raise ShapeError(
            f"w has the shape {tuple(w.shape)}: it must be (out_blocks, in_blocks, block_size). DeepSpeed's ZeRO-3 "
            "keeps it in parts: put it together with deepspeed.zero.GatheredParameters"
        )


def zero() -> Any:
    """`deepspeed.zero`, which whoever has one of its parameters has."""
    return importlib.import_module("deepspeed").zero


@contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within it parameters that ZeRO-3 leaves empty are put together, for which every process has to enter."""
    parts = [parameter for parameter in parameters if is_partitioned(parameter) and not parameter.numel()]
    if not parts:
        yield
        return
    with zero().GatheredParameters(parts):
        yield


def gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, for which every process has to ask; any other as it is."""
    if not is_partitioned(tensor):
        return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    with whole([tensor]):
        return tensor.detach().clone()


def own_part(tensor: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What this process holds of a tensor, and of whole values for it; nothing is sent."""
    held: Any = tensor
    if not hasattr(held, "full_tensor"):
        return tensor, values
    from torch.distributed.tensor import distribute_tensor

    own = distribute_tensor(values.to(held.device), held.device_mesh, held.placements, src_data_rank=None)
    return held.to_local(), own.to_local()


def put_values(tensor: Tensor, values: Tensor) -> None:
    """Replace a tensor's values by whole ones, of which this process may hold a part (a DTensor), in place."""
    held, own = own_part(tensor, values)
    held.copy_(own)


def local(tensor: Tensor) -> Tensor:
    """What of a DTensor this process has, with its gradient; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gather_with(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Let ZeRO-3 put these parameters together now, in `module`'s forward, and before and after it from then on.

    By itself it does so for the parameters of each module that is called, which a container of parameters never is.
    """
    for parameter in parameters:
        if is_partitioned(parameter) and not parameter.numel():
            zero().register_external_parameter(module, parameter)
            parameter.all_gather()  # type: ignore[attr-defined]
