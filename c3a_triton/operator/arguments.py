"""Arguments of the public calls: whether they fit together, autocast, kernels summed before they are applied."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ShapeError
from .routes import Routes

__all__ = [
    "at_least_float32",
    "autocast",
    "autocasts",
    "check",
    "check_kernel",
    "check_routed",
    "is_plain",
    "summed",
    "without_autocast",
]

_T = TypeVar("_T")


def without_autocast(function: Callable[..., _T]) -> Callable[..., _T]:
    """`function`, of a tensor and more, with autocast off: what it calls has its dtypes from its operands."""

    @functools.wraps(function)
    def run(x: Tensor, *args: Any) -> _T:
        if not autocasts(x):
            return function(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return run


def at_least_float32(w: Tensor) -> Tensor:
    """w in float32, or in float64 if it has that."""
    return w if w.dtype == torch.float32 else w.to(torch.promote_types(w.dtype, torch.float32))


def is_plain(x: Tensor) -> bool:
    """A real tensor of torch's own: no subclass, not fake, not on the meta device."""
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    # Asked for all devices first, which is a fraction of the time.
    return torch._C._is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Tensors, or None, in the autocast dtype of their device; float64 and integers are left alone, as torch does."""
    return tuple(
        x
        if x is None or not x.is_floating_point() or x.dtype == torch.float64
        else x.to(torch.get_autocast_dtype(x.device.type))
        for x in tensors
    )


def check_kernel(w: Tensor) -> None:
    """Raise `ShapeError` unless w is (out_blocks, in_blocks, b), floating."""
    if w.dim() != 3:
        raise ShapeError(f"w has the shape {tuple(w.shape)}: it must be (out_blocks, in_blocks, block_size)")
    if not w.is_floating_point():
        raise ShapeError(f"w is {w.dtype}: it must be a floating dtype, float32 as a rule")


def check(x: Tensor, weight: Tensor | None, bias: Tensor | None, kernels: Sequence[Tensor]) -> None:
    """Raise `ShapeError` for operands that do not fit together. The messages are built only on failure."""
    in_features = x.shape[-1] if x.dim() else 0
    shape = None if weight is None else weight.shape
    out_features = None if shape is None else shape[0]
    dtype, device = x.dtype, x.device
    if not x.is_floating_point() or not in_features:
        raise ShapeError(f"x is {x.dtype} of shape {tuple(x.shape)}: it must be floating, (*, in_features)")
    if hasattr(x, "placements"):
        raise ShapeError(
            "x is a DTensor, where this operator takes tensors of one process: a plan has to spread the base layer "
            "('<name>.base_layer') and not the adapted one around it"
        )
    for w in kernels:
        check_kernel(w)
        out_blocks, in_blocks, b = w.shape
        if in_blocks * b != in_features:
            raise ShapeError(
                f"x has {in_features} features, but w of shape {tuple(w.shape)} takes in_blocks * b = {in_blocks * b}"
            )
        if out_features is not None and out_blocks * b != out_features:
            raise ShapeError(
                f"the weight has {out_features} rows, but w of shape {tuple(w.shape)} gives out_blocks * b = "
                f"{out_blocks * b}"
            )
        if w.device != device:
            raise ShapeError(f"x is on {x.device} and w on {w.device}: move one of them")
    if weight is None:
        return
    if shape != (out_features, in_features):
        raise ShapeError(f"x has {in_features} features, but the weight has the shape {tuple(weight.shape)}")
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        dtypes = f"x is {x.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise ShapeError(f"{dtypes}: they must be the same, as for torch.nn.functional.linear")
    if weight.device != device or (bias is not None and bias.device != device):
        raise ShapeError(f"x is on {x.device} and the weight on {weight.device}: move one of them")
    if bias is not None and bias.shape != (out_features,):
        raise ShapeError(f"the bias has the shape {tuple(bias.shape)}: it must be ({weight.shape[0]},)")


def check_routed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    routes: Routes,
    gather: bool,
    transposed: bool,
) -> None:
    """Raise `ShapeError` for operands of `routed.c3a_routed` that do not fit together."""
    if x.dim() != 2 or not x.is_floating_point() or not x.shape[1]:
        raise ShapeError(f"x is {x.dtype} of shape {tuple(x.shape)}: it must be floating, (n_rows, in_features)")
    n_rows, in_features = x.shape
    routed = routes.order.shape[0] // routes.top_k if gather else routes.order.shape[0]
    if n_rows != routed:
        what = "tokens" if gather else "rows"
        raise ShapeError(f"x has {n_rows} {what}, and the routes are of {routed}: give one row for each")
    if not kernels:
        raise ShapeError("no kernels: give one stack of w's or more")
    out_features = None
    for w in kernels:
        if w.dim() != 4 or w.shape[0] != routes.n_groups or not w.is_floating_point():
            raise ShapeError(
                f"w is {w.dtype} of shape {tuple(w.shape)}: it must be floating, "
                f"(n_groups, out_blocks, in_blocks, block_size), here of {routes.n_groups} groups"
            )
        _, out_blocks, in_blocks, b = w.shape
        if in_blocks * b != in_features:
            raise ShapeError(
                f"x has {in_features} features, but w of shape {tuple(w.shape)} takes in_blocks * b = {in_blocks * b}"
            )
        out_features = out_blocks * b if out_features is None else out_features
        if out_blocks * b != out_features:
            raise ShapeError(
                f"the result has {out_features} features, but w of shape {tuple(w.shape)} gives out_blocks * b = "
                f"{out_blocks * b}"
            )
    shape = (routes.n_groups, in_features, out_features) if transposed else (routes.n_groups, out_features, in_features)
    if weight is not None and (tuple(weight.shape) != shape or weight.dtype != x.dtype):
        raise ShapeError(
            f"the weight is {weight.dtype} of shape {tuple(weight.shape)}: it must be {x.dtype} as x is, {shape}"
        )
    if bias is not None and (tuple(bias.shape) != (routes.n_groups, out_features) or bias.dtype != x.dtype):
        raise ShapeError(
            f"the bias is {bias.dtype} of shape {tuple(bias.shape)}: it must be {x.dtype} as x is, "
            f"{(routes.n_groups, out_features)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("routes", routes.offsets), *(("w", w) for w in kernels)):
        if tensor is not None and tensor.device != x.device:
            raise ShapeError(f"x is on {x.device} and {name} on {tensor.device}: move one of them")


def summed(kernels: Sequence[Tensor]) -> list[tuple[Tensor, list[int]]]:
    """Kernels of equal block size as one sum each, in at least float32, with the positions of its members."""
    if len(kernels) == 1:  # nearly every call
        return [(at_least_float32(kernels[0]), [0])]
    groups: dict[int, list[int]] = {}
    for i, w in enumerate(kernels):
        groups.setdefault(w.shape[-1], []).append(i)
    summed = []
    for members in groups.values():
        total = at_least_float32(kernels[members[0]])
        for i in members[1:]:
            total = total + kernels[i]
        summed.append((total, members))
    return summed
