"""Helpers shared by the kernels: products and roundings that also hold in Triton's interpreter, epilogues, sums.

Names used in all kernels: w is [out_blocks m, in_blocks n, b]; a dense row or column index is split as (block, position
inside the block). A circulant block is named by a row block and a column block of the matrix being multiplied, which is
ΔW in the forward and ΔWᵀ in the backward.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def helper(function: Callable[..., Any]) -> Any:
    """`triton.jit` for what kernels call.

    In Triton 3.6 a kernel's key in the cache depends on whether the keys of the functions that it calls are known when
    its own is made (later versions make them first). Made here, at once, they are: otherwise a kernel would be compiled
    again where kernels are launched in another order.
    """
    jitted = triton.jit(function)
    getattr(jitted, "cache_key", None)  # the interpreter has none
    return jitted


# The interpreter multiplies the bit patterns of bfloat16 and truncates where the hardware rounds.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@helper
def mma(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; PRECISION says how float32 operands are multiplied ("tf32x3" or "tf32")."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@helper
def rounded(x, dtype: tl.constexpr):
    """x (float32) in `dtype`, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@helper
def store_product(
    acc,  # [rows, columns] float32
    scale,
    bias_ptr,  # [out_features], read where HAS_BIAS
    offs_o,  # output feature of each element, broadcastable to acc
    out_ptrs,  # where each element goes
    mask,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """The epilogue of every product: acc · scale (+ bias) (+ what `out_ptrs` holds), rounded once."""
    result = acc * scale
    if HAS_BIAS:
        result += tl.load(bias_ptr + offs_o, mask=mask, other=0.0).to(tl.float32)
    if ACCUMULATE:
        result += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, rounded(result, out_ptrs.dtype.element_ty), mask=mask)


@helper
def hankel_sum(
    w_rows,  # [BLOCK_M, 1]: where the first values of row blocks lie
    x_row,  # where a token's values lie
    j,  # [1, BLOCK_J], positions in a block
    start,
    end,
    stride_w_col,
    b: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides end − start
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ w[M, N, q] · x[N·b + (j + q) mod b] over (N, q) = k from start to end; (j − q) in the transposed product.

    w is the left operand as it is stored, and the right one, a Hankel matrix, is gathered from the token itself.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_J], dtype=tl.float32)
    for k0 in range(start, end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        block = k // b
        q = k % b
        w_ptrs = w_rows + (block.to(tl.int64) * stride_w_col + q)[None, :]
        if TRANSPOSE:
            p = j - q[:, None]
            p = tl.where(p < 0, p + b, p)
        else:
            p = j + q[:, None]
            p = tl.where(p >= b, p - b, p)
        x_ptrs = x_row + (block * b)[:, None] + p
        if EVEN_K:
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(k < end)[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=(k < end)[:, None], other=0.0)
        acc = mma(rounded(w, x.dtype), x, acc, PRECISION)
    return acc


@triton.jit
def sum_partials_kernel(
    partials_ptr,  # [n_splits, n_rows, n_columns] float32
    bias_ptr,  # [n_columns]
    out_ptr,  # [n_rows, n_columns], rows stride_out_row apart
    scale,
    n_splits,
    n_rows,
    n_columns,
    stride_out_row,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r, c] = scale · Σ_s partials[s, r, c] (+ bias[c]) (+ out[r, c]), s ascending; BLOCK columns per program."""
    row = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_columns
    partials_ptr += row * n_columns + offs
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(n_splits):
        acc += tl.load(partials_ptr, mask=mask, other=0.0)
        partials_ptr += n_rows * n_columns
    out_ptrs = out_ptr + row * stride_out_row + offs
    store_product(acc, scale, bias_ptr, offs, out_ptrs, mask, HAS_BIAS, ACCUMULATE)
