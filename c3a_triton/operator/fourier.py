"""The block-circulant product by real FFTs: backend `"torch"`, for CPUs and for GPUs without Triton.

A circulant block is diagonal in the Fourier basis, so with real-input DFTs of length b (design §2)

    y_hat[f, t, M]  = Σ_N  x_hat[f, t, N] · conj(w_hat[f, M, N])        forward
    dx_hat[f, t, N] = Σ_M dy_hat[f, t, M] · w_hat[f, M, N]              input gradient
    dw_hat[f, M, N] = Σ_t conj(dy_hat[f, t, M]) · x_hat[f, t, N]        weight gradient

each of them one batched complex product over the frequencies f. Nothing here is kept for a backward pass.
"""

import torch
from torch import Tensor

from .reference import compute_dtype_of

__all__ = ["backward", "chunk_tokens", "product", "spectrum", "weight_grad"]

# Tokens are worked off in chunks of about this many activation elements. On a CPU a chunk's spectrum then stays in one
# core's L2 cache through FFT, transposition, product and inverse: measured 1.2 to 1.9 times faster than one chunk. On a
# GPU the chunk only bounds the float32 and complex temporaries (2**26 elements: 256 MiB each).
CPU_CHUNK_ELEMENTS = 2**18
GPU_CHUNK_ELEMENTS = 2**26
# Below this the number of calls is the cost, and operands are left strided.
FEW_ELEMENTS = 1024


def product(
    x: Tensor,
    w: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x ΔWᵀ, or x ΔW with `transpose`.

    Args:
        x: `(n_tokens, in_features)`, or `(n_tokens, out_features)` with `transpose`; floating, any strides.
        w: `(out_blocks, in_blocks, b)`.
        scale: factor of ΔW.
        transpose: multiply by ΔW instead of its transpose: the input gradient of the forward product.
        bias: added to every row of the result, `(features of the result,)`.
        out: accumulate into this tensor instead of allocating one.

    Returns:
        `(n_tokens, out_features)`, or `(n_tokens, in_features)` with `transpose`, in x's dtype.
    """
    block_size = w.shape[2]
    w_hat = _weight_spectrum(w, compute_dtype_of(x, w), scale, transpose)
    features = w.shape[1 if transpose else 0] * block_size
    accumulate = out is not None
    n_tokens, step = x.shape[0], chunk_tokens(x, features)
    for start in range(0, n_tokens, step):
        x_hat = spectrum(x[start : start + step], block_size, w_hat.dtype.to_real())
        y = _inverse(torch.bmm(x_hat, w_hat), block_size, bias)
        out = _store(y, out, start, n_tokens, x.dtype, accumulate)
    return x.new_empty(0, features) if out is None else out


def weight_grad(dy: Tensor, x: Tensor, block_size: int, *, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradient of `product(x, w)` in w.

    Args:
        dy: gradient of the product, `(n_tokens, out_features)`.
        x: its input, `(n_tokens, in_features)`.
        block_size: b.
        scale: factor of ΔW.
        dtype: dtype of the result; products are summed in at least float32.

    Returns:
        `(out_blocks, in_blocks, b)`.
    """
    compute_dtype = torch.promote_types(torch.promote_types(dy.dtype, torch.float32), dtype)
    dw_hat = None
    step = chunk_tokens(x, dy.shape[1])
    for start in range(0, x.shape[0], step):
        dy_hat = spectrum(dy[start : start + step], block_size, compute_dtype)
        x_hat = spectrum(x[start : start + step], block_size, compute_dtype)
        dw_hat = _accumulate_outer(dw_hat, dy_hat, x_hat)
    if dw_hat is None:  # no tokens
        return x.new_zeros(dy.shape[1] // block_size, x.shape[1] // block_size, block_size, dtype=dtype)
    return _weight_from_spectrum(dw_hat, block_size, scale).to(dtype)


def backward(dy: Tensor, x: Tensor, w: Tensor, *, scale: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both gradients of `product(x, w)`, dy transformed once: dx (added to a given `out`) and dw in w's dtype."""
    block_size = w.shape[2]
    w_hat = _weight_spectrum(w, compute_dtype_of(dy, w), scale, transpose=True)
    compute_dtype = w_hat.dtype.to_real()
    accumulate = out is not None
    dw_hat = None
    n_tokens, step = x.shape[0], chunk_tokens(x, dy.shape[1])
    for start in range(0, n_tokens, step):
        dy_hat = spectrum(dy[start : start + step], block_size, compute_dtype)
        dx = _inverse(torch.bmm(dy_hat, w_hat), block_size, None)
        out = _store(dx, out, start, n_tokens, dy.dtype, accumulate)
        dw_hat = _accumulate_outer(dw_hat, dy_hat, spectrum(x[start : start + step], block_size, compute_dtype))
    out = dy.new_empty(x.shape) if out is None else out
    if dw_hat is None:  # no tokens
        return out, torch.zeros_like(w)
    return out, _weight_from_spectrum(dw_hat, block_size, scale).to(w.dtype)


def chunk_tokens(x: Tensor, other_features: int) -> int:
    """Tokens of a chunk: as many as give the wider side of the product about the chunk's number of elements."""
    elements = CPU_CHUNK_ELEMENTS * torch.get_num_threads() if x.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    return max(1, elements // max(x.shape[1], other_features))


def spectrum(x: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Spectra of the blocks of x, frequency first: `(n_freqs, n_tokens, blocks)`, contiguous if they are large.

    A plain two-dimensional transposition: torch has a blocked copy for it and not for a permutation of three axes, and
    `bmm` would make that copy itself, slowly.
    """
    n_tokens, features = x.shape
    blocks = features // block_size
    rows = torch.fft.rfft((x if x.dtype == dtype else x.to(dtype)).reshape(-1, block_size))
    if rows.numel() < FEW_ELEMENTS:
        return rows.view(n_tokens, blocks, -1).permute(2, 0, 1)
    return rows.T.contiguous().view(-1, n_tokens, blocks)


def _inverse(y_hat: Tensor, block_size: int, bias: Tensor | None) -> Tensor:
    """The inverse of `spectrum`, `(n_tokens, blocks * b)`, with `bias` added while it is in cache."""
    n_freqs, n_tokens, blocks = y_hat.shape
    rows = y_hat.permute(1, 2, 0) if y_hat.numel() < FEW_ELEMENTS else y_hat.view(n_freqs, -1).T.contiguous()
    y = torch.fft.irfft(rows, n=block_size).reshape(n_tokens, blocks * block_size)
    if bias is not None:
        y += bias
    return y


def _store(y: Tensor, out: Tensor | None, start: int, n_tokens: int, dtype: torch.dtype, accumulate: bool) -> Tensor:
    """`out` with a chunk's rows stored in it, or added; without one yet it is allocated, or is a chunk that is all."""
    if out is None:
        if y.shape[0] == n_tokens:
            return y.to(dtype)
        out = y.new_empty(n_tokens, y.shape[1], dtype=dtype)
    rows = out[start : start + y.shape[0]]
    if accumulate:
        rows += y
    else:
        rows.copy_(y)
    return out


def _weight_spectrum(w: Tensor, dtype: torch.dtype, scale: float, transpose: bool) -> Tensor:
    """Right operand of the batched product: conj(w_hat)ᵀ `(n_freqs, n, m)`, or w_hat `(n_freqs, m, n)` to transpose."""
    w_hat = torch.fft.rfft(w.to(dtype) * scale)
    return _laid_out(w_hat.permute(2, 0, 1)) if transpose else _laid_out(w_hat.permute(2, 1, 0)).conj_physical_()


def _laid_out(x: Tensor) -> Tensor:
    return x if x.numel() < FEW_ELEMENTS else x.contiguous()


def _accumulate_outer(dw_hat: Tensor | None, dy_hat: Tensor, x_hat: Tensor) -> Tensor:
    """dw_hat + dy_hatᴴ x_hat per frequency, in chunk order: the same bits on every run."""
    return torch.bmm(dy_hat.mH, x_hat) if dw_hat is None else dw_hat.baddbmm_(dy_hat.mH, x_hat)


def _weight_from_spectrum(dw_hat: Tensor, block_size: int, scale: float) -> Tensor:
    return torch.fft.irfft(_laid_out(dw_hat.permute(1, 2, 0)), n=block_size).mul_(scale)
