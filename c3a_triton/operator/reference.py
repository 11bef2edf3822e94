"""The dense definition of the block-circulant product, in plain torch.

This is the truth that every other backend is compared with, and the backend `"reference"`: slow, obvious, any floating
dtype. It has no hand-written backward rule of its own beyond the two products below.
"""

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["circulant_matrix", "product", "routed_product", "routed_weight_grad", "weight_grad"]


def circulant_matrix(w: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """ΔW[M·b + j, N·b + p] = scale · w[M, N, (p − j) mod b].

    Args:
        w: first rows of the circulant blocks, `(out_blocks, in_blocks, b)`, any floating dtype.
        scale: factor of every element, applied in w's dtype before the one rounding to `dtype`.
        dtype: dtype of the result; w's own by default.

    Returns:
        `(out_blocks * b, in_blocks * b)`, contiguous.
    """
    b = w.shape[2]
    row = (w * scale).to(dtype or w.dtype)
    doubled = torch.cat([row, row], dim=-1)
    # Row j of a block is its first row shifted right by j: a window of the doubled row. Stacking windows writes the
    # result once, in order; gathering with an index tensor is four times slower.
    rows = [doubled[..., b - j : 2 * b - j] for j in range(b)]
    return rearrange(torch.stack(rows, dim=1), "M j N p -> (M j) (N p)")


def product(
    x: Tensor,
    w: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x ΔWᵀ, or x ΔW with `transpose`, through the dense matrix. See `fourier.product` for the arguments."""
    compute_dtype = compute_dtype_of(x, w)
    delta_weight = circulant_matrix(w.to(compute_dtype), scale)
    y = x.to(compute_dtype) @ (delta_weight if transpose else delta_weight.T)
    if bias is not None:
        y += bias
    return y.to(x.dtype) if out is None else out.add_(y)


def weight_grad(dy: Tensor, x: Tensor, block_size: int, *, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """dw[M, N, q] = scale · Σ_t Σ_j dy[t, M·b + j] · x[t, N·b + (j + q) mod b], through the dense gradient dyᵀ x.

    See `fourier.weight_grad` for the arguments.
    """
    compute_dtype = torch.promote_types(torch.promote_types(dy.dtype, torch.float32), dtype)
    dense = (dy.to(compute_dtype).T @ x.to(compute_dtype)).mul_(scale)
    blocks = rearrange(dense, "(M j) (N p) -> j M N p", j=block_size, p=block_size)
    # Sum each circulant diagonal: row j of a block, rotated left by j, lies over the first row.
    rows = [row.roll(-j, dims=-1) for j, row in enumerate(blocks)]
    return torch.stack(rows).sum(0).to(dtype)


def routed_product(
    x: Tensor, w: Tensor, offsets: Tensor, *, scale: float, transpose: bool = False, out: Tensor | None = None
) -> Tensor:
    """x_s ΔW_gᵀ for each row s and its group g, one group after the other. See `fourier_routed.product`."""
    features = w.shape[2 if transpose else 1] * w.shape[3]
    out = x.new_zeros(x.shape[0], features) if out is None else out
    for w_g, (first, last) in zip(w, pairwise(offsets.tolist()), strict=True):
        product(x[first:last], w_g, scale=scale, transpose=transpose, out=out[first:last])
    return out


def routed_weight_grad(
    dy: Tensor, x: Tensor, block_size: int, offsets: Tensor, *, scale: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """dw of each group from its own rows. See `fourier_routed.weight_grad`."""
    rows = [slice(first, last) for first, last in pairwise(offsets.tolist())]
    return torch.stack([weight_grad(dy[of], x[of], block_size, scale=scale, dtype=dtype) for of in rows])


def compute_dtype_of(x: Tensor, w: Tensor) -> torch.dtype:
    """At least float32; float64 where an operand has it."""
    return torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
