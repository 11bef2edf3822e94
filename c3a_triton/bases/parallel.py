"""Layers of which each process computes a part: what the plan does with them, and where an adapter's part joins."""

from collections.abc import Iterator
from types import CellType
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["meshes", "parallel_mesh"]


def _functions(module: nn.Module) -> Iterator[Any]:
    """What a plan may have put into a module: transformers a forward, torch's `parallelize_module` hooks."""
    yield module.__dict__.get("forward")
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def _closure(function: Any) -> dict[str, Any]:
    """The variables around a nested function that have a value; of anything else none."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = function.__closure__ if names else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True) if cell != CellType()}


def parallel_mesh(module: nn.Module) -> DeviceMesh | None:
    """The mesh over which a plan spreads one module, or None.

    A plan is one of transformers (`DistributedConfig`, styles of tensor and of expert parallelism) or what torch's
    `parallelize_module` was given. Neither library notes the mesh on the module, but what they put there has it in its
    closure. FSDP2's meshes are none of a plan.
    """
    found = (value for function in _functions(module) for value in _closure(function).values())
    return next((value for value in found if isinstance(value, DeviceMesh)), None)


def meshes(model: nn.Module) -> list[DeviceMesh]:
    """The distinct meshes over which a plan spreads modules of a model, in the order of `modules()`."""
    found = (parallel_mesh(module) for module in model.modules())
    return list(dict.fromkeys(mesh for mesh in found if mesh is not None))
