"""The dense definition, written out as plainly as possible, and the one comparison every test uses.

    ΔW[M·b + j, N·b + p] = scale · w[M, N, (p − j) mod b]

Everything here is float64 and knows nothing of the library.
"""

from collections.abc import Iterable
from itertools import cycle
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

# Relative error ‖out − ref‖ / ‖ref‖ that each dtype must keep on random normal data.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}


def in_turn(
    rows: Iterable[tuple[int | str, ...]],
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
) -> list[Any]:
    """Rows of parameters, each with one of the dtypes before it: that every kernel is right in all of them is what
    `bench/kernel_cases.py` shows.
    """
    return [
        pytest.param(dtype, *row, id="-".join(map(str, (str(dtype).removeprefix("torch."), *row))))
        for row, dtype in zip(rows, cycle(dtypes), strict=False)
    ]


def dense(w: Tensor, scale: float | None = None) -> Tensor:
    """ΔW [m·b, n·b] in float64 of w [m, n, b]; `scale=None` means 1 / (n·b)."""
    _, n, b = w.shape
    w = w.detach().to("cpu", torch.float64)
    j, p = torch.arange(b)[:, None], torch.arange(b)
    return rearrange(w[:, :, (p - j) % b], "M N j p -> (M j) (N p)") * (1 / (n * b) if scale is None else scale)


def product(x: Tensor, w: Tensor, scale: float | None = None) -> Tensor:
    """x ΔWᵀ in float64, for x [..., n·b]."""
    return x.detach().to("cpu", torch.float64) @ dense(w, scale).T


def input_grad(dy: Tensor, w: Tensor, scale: float | None = None) -> Tensor:
    """dy ΔW in float64, for dy [..., m·b]."""
    return dy.detach().to("cpu", torch.float64) @ dense(w, scale)


def weight_grad(dy: Tensor, x: Tensor, b: int, scale: float | None = None) -> Tensor:
    """dw [m, n, b] in float64: entries of dyᵀ x summed along circulant diagonals, for dy [..., m·b], x [..., n·b]."""
    dy, x = (rearrange(rows.detach().to("cpu", torch.float64), "... width -> (...) width") for rows in (dy, x))
    blocks = rearrange(dy.T @ x, "(M j) (N p) -> j M N p", j=b, p=b)
    q = torch.arange(b)
    dw = sum(blocks[j][:, :, (j + q) % b] for j in range(b))
    return dw * (1 / x.shape[1] if scale is None else scale)


def assert_close(out: Tensor, ref: Tensor, dtype: torch.dtype, *, bound: float | None = None) -> None:
    """Assert that `out` has `ref`'s shape, the given dtype, and `ref`'s values within design §5's bound for the dtype.

    The error is measured over the whole tensor, relative to ‖ref‖, and at the worst element, relative to the root mean
    square of `ref`. A reference without values of its own (all zero, or so small that zeros would do) is refused:
    every comparison here is one that an all-zero output fails.

    Args:
        out: what is tested, on any device.
        ref: the float64 truth.
        dtype: the dtype that `out` must have; it also picks the bound.
        bound: in place of the dtype's bound, where the output's dtype is not what limits the precision.
    """
    assert out.dtype == dtype, f"dtype {out.dtype}, expected {dtype}"
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    if ref.numel() == 0:
        return
    bound = BOUNDS[dtype] if bound is None else bound
    out, ref = out.detach().to("cpu", torch.float64), ref.detach().to("cpu", torch.float64)
    rms = ref.square().mean().sqrt()
    assert torch.isfinite(ref).all(), "the reference is not finite: the comparison means nothing"
    assert rms > 0, "the reference is all zero: the comparison means nothing"
    error = (out - ref).abs()
    # An output value is rounded in proportion to itself, the sum behind it in proportion to the others.
    worst = error / torch.maximum(rms, ref.abs())
    relative = float(error.norm() / ref.norm())
    position = tuple(int(i) for i in torch.unravel_index(worst.nan_to_num(nan=torch.inf).argmax(), ref.shape))
    where = f"worst at {position}: {float(out[position]):.6g}, expected {float(ref[position]):.6g}"
    assert relative <= bound, f"relative error {relative:.3g} over {bound:.3g}; {where}"
    # The largest of many rounding errors is a few times their root mean square.
    assert float(worst.max()) <= 8 * bound, (
        f"error {float(worst.max()):.3g} at one element over {8 * bound:.3g}; {where}"
    )
