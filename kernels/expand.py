"""ΔW written out densely: for merging, for small blocks, and for products where many tokens pay for it."""

import triton
import triton.language as tl

from .indexing import rounded


@triton.jit
def expand_kernel(
    w_ptr,  # [m, n, b] float32, addressed by (row block, column block) of the matrix written
    base_ptr,  # what is added to where ADD: [n_rows, n_columns] of out's strides, perhaps out itself
    out_ptr,  # [n_rows, n_columns], any strides
    scale,
    n_rows,
    n_columns,
    width,  # columns of the matrix itself; those from here to n_columns are zero
    stride_w_row,
    stride_w_col,
    stride_out_row,
    stride_out_col,
    b: tl.constexpr,
    TRANSPOSE: tl.constexpr,  # write ΔWᵀ
    ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """out[M·b + j, N·b + p] = scale · w[M, N, (p − j) mod b] (+ base), in float32, rounded once; a tile per program."""
    # 64-bit up to the tile, 32-bit inside it.
    start_row = tl.program_id(0) * BLOCK_ROWS
    start_col = tl.program_id(1) * BLOCK_COLS
    offs_row = tl.arange(0, BLOCK_ROWS)
    offs_col = tl.arange(0, BLOCK_COLS)
    rows = start_row + offs_row
    cols = start_col + offs_col
    q = (cols % b)[None, :] - (rows % b)[:, None]
    if TRANSPOSE:
        q = -q
    q = tl.where(q < 0, q + b, q)
    w_ptr += (start_row // b).to(tl.int64) * stride_w_row + (start_col // b).to(tl.int64) * stride_w_col
    block_row = (rows // b - start_row // b) * stride_w_row
    block_col = (cols // b - start_col // b) * stride_w_col
    inside = (rows < n_rows)[:, None]
    mask = inside & (cols < width)[None, :]
    values = tl.load(w_ptr + (block_row[:, None] + block_col[None, :] + q), mask=mask, other=0.0) * scale

    start = start_row.to(tl.int64) * stride_out_row + start_col.to(tl.int64) * stride_out_col
    offs = offs_row[:, None] * stride_out_row + offs_col[None, :] * stride_out_col
    mask = inside & (cols < n_columns)[None, :]
    if ADD:
        values += tl.load(base_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + offs, rounded(values, out_ptr.dtype.element_ty), mask=mask)
