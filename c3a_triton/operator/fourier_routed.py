"""The block-circulant product by real FFTs where each row has a w of its group: `fourier` over a stack of w's.

Rows are transformed as there, chunk by chunk and whatever their groups; between the transforms each group that has rows
in a chunk has one batched complex product. Groups without rows cost nothing, and no dense weight is written. Where the
groups begin is read on the host, which a GPU waits for.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import fourier
from .reference import compute_dtype_of

__all__ = ["backward", "product", "weight_grad"]


def product(
    x: Tensor, w: Tensor, offsets: Tensor, *, scale: float, transpose: bool = False, out: Tensor | None = None
) -> Tensor:
    """x_s ΔW_gᵀ for each row s and its group g, or x_s ΔW_g with `transpose`.

    Args:
        x: `(n_rows, in_features)` in the order of the groups, or `(n_rows, out_features)` with `transpose`; floating,
            any strides.
        w: `(n_groups, out_blocks, in_blocks, b)`.
        offsets: `(n_groups + 1,)` integers: the rows of group g are `offsets[g]` to `offsets[g + 1]`.
        scale: factor of ΔW.
        transpose: multiply by ΔW instead of its transpose: the input gradient of the forward product.
        out: accumulate into this tensor instead of allocating one.

    Returns:
        `(n_rows, out_features)`, or `(n_rows, in_features)` with `transpose`, in x's dtype. Rows without a group are 0,
        or as they are in `out`.
    """
    runs = _Runs.of(offsets)
    b, features = w.shape[3], w.shape[2 if transpose else 1] * w.shape[3]
    accumulate = out is not None
    out = runs.rows_like(x, features) if out is None else out
    if not runs.groups:
        return out
    w_hat = _weight_spectra(w, runs, compute_dtype_of(x, w), scale, transpose)
    for rows, pieces in runs.chunks(fourier.chunk_tokens(x, features)):
        x_hat = fourier.spectrum(x[rows], b, w_hat.dtype.to_real())
        _store(_mixed(x_hat, w_hat, pieces), b, out[rows], accumulate)
    return out


def weight_grad(
    dy: Tensor, x: Tensor, block_size: int, offsets: Tensor, *, scale: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Gradient of `product(x, w, offsets)` in w.

    Args:
        dy: gradient of the product, `(n_rows, out_features)`.
        x: its input, `(n_rows, in_features)`.
        block_size: b.
        offsets: as in `product`.
        scale: factor of ΔW.
        dtype: dtype of the result; products are summed in at least float32.

    Returns:
        `(n_groups, out_blocks, in_blocks, b)`; 0 for groups without rows.
    """
    runs = _Runs.of(offsets)
    if not runs.groups:
        blocks = dy.shape[1] // block_size, x.shape[1] // block_size
        return x.new_zeros(runs.n_groups, *blocks, block_size, dtype=dtype)
    compute_dtype = torch.promote_types(torch.promote_types(dy.dtype, torch.float32), dtype)
    sums = _sums(dy, x, block_size, runs, compute_dtype)
    for rows, pieces in runs.chunks(fourier.chunk_tokens(x, dy.shape[1])):
        dy_hat = fourier.spectrum(dy[rows], block_size, compute_dtype)
        _accumulate_outer(sums, dy_hat, fourier.spectrum(x[rows], block_size, compute_dtype), pieces)
    return _weights_from(sums, block_size, runs, scale, dtype)


def backward(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, *, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both gradients of `product(x, w, offsets)`, dy transformed once: dx (added to `out`), and dw in w's dtype."""
    runs = _Runs.of(offsets)
    b = w.shape[3]
    accumulate = out is not None
    out = runs.rows_like(dy, x.shape[1]) if out is None else out
    if not runs.groups:
        return out, torch.zeros_like(w)
    w_hat = _weight_spectra(w, runs, compute_dtype_of(dy, w), scale, transpose=True)
    compute_dtype = w_hat.dtype.to_real()
    sums = _sums(dy, x, b, runs, compute_dtype)
    for rows, pieces in runs.chunks(fourier.chunk_tokens(x, dy.shape[1])):
        dy_hat = fourier.spectrum(dy[rows], b, compute_dtype)
        _store(_mixed(dy_hat, w_hat, pieces), b, out[rows], accumulate)
        _accumulate_outer(sums, dy_hat, fourier.spectrum(x[rows], b, compute_dtype), pieces)
    return out, _weights_from(sums, b, runs, scale, w.dtype)


# The groups of a chunk: place among those that have rows, first and last row of the chunk's.
_Pieces = list[tuple[int, int, int]]


class _Runs(NamedTuple):
    """Groups that have rows, in their order: their rows lie behind each other."""

    n_groups: int
    groups: list[int]
    bounds: list[int]
    """The i-th of `groups` has the rows `bounds[i]` to `bounds[i + 1]`."""

    @classmethod
    def of(cls, offsets: Tensor) -> "_Runs":
        bounds = offsets.tolist()
        groups = [g for g, (first, last) in enumerate(pairwise(bounds)) if first < last]
        return cls(len(bounds) - 1, groups, [*(bounds[g] for g in groups), bounds[-1]])

    def rows_like(self, x: Tensor, features: int) -> Tensor:
        """Rows for all of x's, zero where there is no group and without values elsewhere."""
        rows = x.new_empty(x.shape[0], features)
        rows[: self.bounds[0]] = 0
        rows[self.bounds[-1] :] = 0
        return rows

    def chunks(self, n_rows: int) -> Iterator[tuple[slice, _Pieces]]:
        """Up to `n_rows` rows at a time, and their groups."""
        for start in range(self.bounds[0], self.bounds[-1], n_rows):
            stop = min(start + n_rows, self.bounds[-1])
            pieces = [
                (i, max(first, start) - start, min(last, stop) - start)
                for i, (first, last) in enumerate(pairwise(self.bounds))
                if first < stop and start < last
            ]
            yield slice(start, stop), pieces


def _weight_spectra(w: Tensor, runs: _Runs, dtype: torch.dtype, scale: float, transpose: bool) -> Tensor:
    """Right operands of the batched products as in `fourier`, `(groups that have rows, n_freqs, n, m)`, or m, n."""
    if len(runs.groups) < runs.n_groups:
        w = w[runs.groups]
    w_hat = torch.fft.rfft(w.to(dtype) * scale)
    if transpose:
        return w_hat.permute(0, 3, 1, 2).contiguous()
    return w_hat.permute(0, 3, 2, 1).contiguous().conj_physical_()


def _mixed(x_hat: Tensor, w_hat: Tensor, pieces: _Pieces) -> Tensor:
    """The spectra of the result, of each row's blocks one after the other: `(n_rows · blocks, n_freqs)`."""
    n_freqs, n_rows, _ = x_hat.shape
    blocks = w_hat.shape[3]
    y_hat = x_hat.new_empty(n_rows * blocks, n_freqs)
    for i, first, last in pieces:
        product = torch.bmm(x_hat[:, first:last], w_hat[i])
        # Transposed while it is in cache.
        y_hat[first * blocks : last * blocks] = product.view(n_freqs, -1).T
    return y_hat


def _store(y_hat: Tensor, block_size: int, rows: Tensor, accumulate: bool) -> None:
    y = torch.fft.irfft(y_hat, n=block_size).view(rows.shape)
    if accumulate:
        rows += y
    else:
        rows.copy_(y)


def _sums(dy: Tensor, x: Tensor, block_size: int, runs: _Runs, dtype: torch.dtype) -> Tensor:
    """Zeros to add the conjugate spectrum of each dw to: `(groups that have rows, n_freqs, m, n)`."""
    blocks = dy.shape[1] // block_size, x.shape[1] // block_size
    return dy.new_zeros(len(runs.groups), block_size // 2 + 1, *blocks, dtype=dtype.to_complex())


def _accumulate_outer(sums: Tensor, dy_hat: Tensor, x_hat: Tensor, pieces: _Pieces) -> None:
    """conj(dw_hat) + dy_hatᵀ conj(x_hat) per group and frequency, in chunk order: the same bits on every run.

    All of x_hat is conjugated, in place: `baddbmm` would copy each operand that is to be.
    """
    x_hat = x_hat.conj_physical_()
    for i, first, last in pieces:
        sums[i].baddbmm_(dy_hat[:, first:last].mT, x_hat[:, first:last])


def _weights_from(sums: Tensor, block_size: int, runs: _Runs, scale: float, dtype: torch.dtype) -> Tensor:
    dw_hat = sums.permute(0, 2, 3, 1).conj().resolve_conj()
    dw = torch.fft.irfft(dw_hat, n=block_size).mul_(scale).to(dtype)
    if len(runs.groups) == runs.n_groups:
        return dw
    all_groups = dw.new_zeros(runs.n_groups, *dw.shape[1:])
    all_groups[runs.groups] = dw
    return all_groups
