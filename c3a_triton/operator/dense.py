"""ΔW written out as a matrix: by itself, added to a weight in place (merging) or as a new tensor (`"fold"`)."""

from collections.abc import Sequence
from math import lcm

import torch
from torch import Tensor

from .._public import public
from ..errors import ShapeError
from . import arguments, dispatch, reference, traced
from .launch import expand

__all__ = ["add_circulant_", "circulant_matrix", "folded_weight", "written_by_triton"]

# Rows of W that a merge without Triton works on at a time, in elements: bounds its float32 temporaries to 16 MiB each.
MERGE_CHUNK_ELEMENTS = 2**22


@public
def circulant_matrix(w: Tensor, *, scale: float | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The dense ΔW of `circulant_linear`.

    Args:
        w: `(out_blocks, in_blocks, b)`.
        scale: factor of ΔW; None means 1 / in_features.
        dtype: dtype of the result, rounded once from float32 (float64 for a float64 w); None means w's.

    Returns:
        `(out_blocks * b, in_blocks * b)`, differentiable in w.
    """
    if traced.is_tracing():
        return traced.circulant_matrix(arguments.at_least_float32(w), scale, dtype or w.dtype)
    arguments.check_kernel(w)
    scale = 1.0 / (w.shape[1] * w.shape[2]) if scale is None else scale
    dtype = dtype or w.dtype
    wide = arguments.at_least_float32(w)
    differentiable = torch.is_grad_enabled() and w.requires_grad
    if differentiable or not arguments.is_plain(w) or not written_by_triton(wide, dtype):
        return reference.circulant_matrix(wide, scale, dtype)
    return expand.expand_weight(wide, scale=scale, dtype=dtype)


@torch.no_grad()
def add_circulant_(weight: Tensor, kernels: Sequence[Tensor], *, scale: float | None = None) -> None:
    """weight += Σ_a ΔW_a in place, summed in float32 (float64 for a float64 operand) and rounded once.

    Args:
        weight: `(out_features, in_features)`, floating, any strides: a transposed layer passes `weight.t()`.
        kernels: as in `c3a_linear`.
        scale: factor of each ΔW; None means 1 / in_features.
    """
    out_features, in_features = weight.shape
    for w in kernels:
        arguments.check_kernel(w)
        if (w.shape[0] * w.shape[2], w.shape[1] * w.shape[2]) != (out_features, in_features):
            raise ShapeError(f"w of shape {tuple(w.shape)} does not fit a weight of shape {tuple(weight.shape)}")
    scale = 1.0 / in_features if scale is None else scale
    _add_circulant(weight, [w for w, _ in arguments.summed(kernels)], scale)


def _add_circulant(weight: Tensor, summed: Sequence[Tensor], scale: float) -> None:
    out_features, in_features = weight.shape
    if len(summed) == 1 and written_by_triton(summed[0], weight.dtype):
        expand.add_expanded_(weight, summed[0], scale=scale)
        return
    rows = lcm(*(w.shape[2] for w in summed))
    rows *= max(1, MERGE_CHUNK_ELEMENTS // (rows * in_features))
    for start in range(0, out_features, rows):
        chunk = weight[start : start + rows]
        total = chunk.to(torch.promote_types(weight.dtype, summed[0].dtype))
        for w in summed:
            b = w.shape[2]
            total = total + reference.circulant_matrix(w[start // b : (start + rows) // b], scale)
        chunk.copy_(total)


def folded_weight(weight: Tensor, kernels: Sequence[Tensor], scale: float) -> Tensor:
    """weight + Σ_a ΔW_a as a new tensor, summed and rounded as `add_circulant_` does; weight itself without kernels."""
    if not kernels:
        return weight
    summed = [w for w, _ in arguments.summed(kernels)]
    if len(summed) == 1 and written_by_triton(summed[0], weight.dtype):
        return expand.folded_weight(weight, summed[0], scale=scale)
    folded = weight.clone()
    _add_circulant(folded, summed, scale)
    return folded


def written_by_triton(w: Tensor, dtype: torch.dtype) -> bool:
    """Whether the dense matrix of w in `dtype` is written by Triton: on GPUs, not in its interpreter."""
    return w.device.type == "cuda" and w.dtype == torch.float32 and dispatch.why_not("expand", w.device, dtype) is None
