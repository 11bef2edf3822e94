"""The product x ΔWᵀ (or x ΔW) by circulant indexing: the matrix is not written out, its tiles come from a small table.

`table_kernel` + `table_product_kernel`: every row of w stored once per alignment, so that a row of any tile of ΔW is a
contiguous run on a 16-byte boundary. The main loop is then that of a dense matrix product.
`hankel_kernel`: a few tokens, no table (`indexing.hankel_sum`).
"""

import triton
import triton.language as tl

from .indexing import hankel_sum, mma, rounded, store_product


@triton.jit
def table_kernel(
    w_ptr,  # [m, n, b] float32, addressed by (row block, column block) of the product
    table_ptr,  # [row_blocks, col_blocks, PHASES, LENGTH]
    col_blocks,
    stride_w_row,
    stride_w_col,
    b: tl.constexpr,
    ORIGIN: tl.constexpr,  # b rounded up to PHASES
    LENGTH: tl.constexpr,
    PHASES: tl.constexpr,
    TRANSPOSE: tl.constexpr,  # the table of ΔWᵀ: w'[q] = w[−q mod b]
    BLOCK: tl.constexpr,
):
    """table[M, N, r, s] = w[M, N, (s − ORIGIN − r) mod b]: row j of a block starts at phase j % PHASES.

    Element (j, p) of block (M, N) is table[M, N, j % PHASES, ORIGIN + p − PHASES · (j // PHASES)]. One program writes
    BLOCK values of one block's table.
    """
    pair = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    phase = offs // LENGTH
    shift = offs % LENGTH - ORIGIN - phase
    if TRANSPOSE:
        shift = -shift
    # |shift| < LENGTH + PHASES: a multiple of b above that makes it positive, so that % is the mathematical modulo.
    q = (shift + (LENGTH + PHASES + b - 1) // b * b) % b
    mask = offs < PHASES * LENGTH
    source = w_ptr + (pair // col_blocks).to(tl.int64) * stride_w_row + (pair % col_blocks).to(tl.int64) * stride_w_col
    values = tl.load(source + q, mask=mask, other=0.0)
    tl.store(
        table_ptr + pair.to(tl.int64) * (PHASES * LENGTH) + offs, rounded(values, table_ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def table_product_kernel(
    x_ptr,  # [n_tokens, col_blocks · col_block], rows stride_x_t apart
    table_ptr,  # [out_features / row_block, col_blocks, PHASES, LENGTH]
    bias_ptr,  # [out_features]
    out_ptr,  # [n_tokens, out_features], rows stride_out_t apart
    scale,
    n_tokens,
    out_features,
    col_blocks,
    stride_x_t,
    stride_out_t,
    stride_table_row,  # col_blocks · PHASES · LENGTH
    row_block: tl.constexpr,
    col_block: tl.constexpr,
    ORIGIN: tl.constexpr,
    LENGTH: tl.constexpr,
    PHASES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    """out[t, o] = scale · Σ_i x[t, i] · ΔW[o, i] (+ bias[o]) (+ out[t, o]), one [BLOCK_T, BLOCK_O] tile per program.

    A dense matrix [out_features, K] with rows of LENGTH ≥ K values is the table with row_block = 1, ORIGIN = 0, one
    column block of K values and PHASES = the alignment of its rows: small b use that.
    """
    # Programs walk GROUP_T token tiles before the next output tile, so that both operands are found in L2.
    tiles_t = tl.cdiv(n_tokens, BLOCK_T)
    tiles_o = tl.cdiv(out_features, BLOCK_O)
    pid = tl.program_id(0)
    first_t = pid // (GROUP_T * tiles_o) * GROUP_T
    group = tl.minimum(tiles_t - first_t, GROUP_T)
    pid_t = first_t + pid % (GROUP_T * tiles_o) % group
    pid_o = pid % (GROUP_T * tiles_o) // group

    # Rows and columns past the end repeat the last one: read without a mask, never stored.
    start_t = pid_t * BLOCK_T
    offs_t = tl.minimum(tl.arange(0, BLOCK_T), n_tokens - 1 - start_t)
    offs_i = tl.arange(0, BLOCK_I)
    x_ptrs = x_ptr + start_t.to(tl.int64) * stride_x_t + (offs_t[:, None] * stride_x_t + offs_i[None, :])

    start_o = pid_o * BLOCK_O
    offs_o = tl.minimum(start_o + tl.arange(0, BLOCK_O), out_features - 1)
    first_row = start_o // row_block
    j = offs_o % row_block
    run = (offs_o // row_block - first_row) * stride_table_row + ORIGIN + j % PHASES * LENGTH - j // PHASES * PHASES
    run = tl.multiple_of(run, PHASES)
    table_ptrs = table_ptr + first_row.to(tl.int64) * stride_table_row + (run[:, None] + offs_i[None, :])

    CHUNKS: tl.constexpr = (col_block + BLOCK_I - 1) // BLOCK_I
    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for k in range(col_blocks * CHUNKS):
        block = k // CHUNKS
        start_i = (k - block * CHUNKS) * BLOCK_I
        if col_block % BLOCK_I == 0:
            x = tl.load(x_ptrs + k * BLOCK_I)
        else:
            x = tl.load(x_ptrs + (block * col_block + start_i), mask=offs_i[None, :] < col_block - start_i, other=0.0)
        w = tl.load(table_ptrs + (block * (PHASES * LENGTH) + start_i))
        acc = mma(x, tl.trans(w), acc, PRECISION)

    offs_t = tl.arange(0, BLOCK_T)
    offs_o = start_o + tl.arange(0, BLOCK_O)
    mask = (offs_t < n_tokens - start_t)[:, None] & (offs_o < out_features)[None, :]
    out_ptrs = out_ptr + start_t.to(tl.int64) * stride_out_t + (offs_t[:, None] * stride_out_t + offs_o[None, :])
    store_product(acc, scale, bias_ptr, offs_o[None, :], out_ptrs, mask, HAS_BIAS, ACCUMULATE)


@triton.jit
def hankel_kernel(
    x_ptr,  # [n_tokens, col_blocks · b], rows stride_x_t apart
    w_ptr,  # [m, n, b] float32, addressed by (row block, column block) of the product
    bias_ptr,  # [row_blocks · b]
    out_ptr,  # [n_splits, n_tokens, row_blocks · b]
    scale,
    row_blocks,
    col_blocks,
    split_length,  # how much of the sum one split takes, a multiple of BLOCK_K
    stride_w_row,
    stride_w_col,
    stride_x_t,
    stride_out_s,
    stride_out_t,
    b: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides col_blocks · b
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[t, M·b + j] = scale · Σ_N Σ_q w[M, N, q] · x[t, N·b + (j + q) mod b]; (j − q) in the transposed product.

    One program: one token t, BLOCK_M row blocks, BLOCK_J positions j, one split of the sum over (N, q) = k.
    """
    tiles_j: tl.constexpr = (b + BLOCK_J - 1) // BLOCK_J
    token = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    offs_m = tl.program_id(0) // tiles_j * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_j = tl.program_id(0) % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J)

    w_rows = w_ptr + tl.minimum(offs_m, row_blocks - 1).to(tl.int64)[:, None] * stride_w_row
    x_row = x_ptr + token * stride_x_t
    j = tl.minimum(offs_j, b - 1)[None, :]
    start = split * split_length
    end = tl.minimum(start + split_length, col_blocks * b)

    acc = hankel_sum(
        w_rows, x_row, j, start, end, stride_w_col, b, TRANSPOSE, EVEN_K, PRECISION, BLOCK_M, BLOCK_J, BLOCK_K
    )

    mask = (offs_m < row_blocks)[:, None] & (offs_j < b)[None, :]
    offs_o = offs_m[:, None] * b + offs_j[None, :]
    out_ptrs = out_ptr + split.to(tl.int64) * stride_out_s + token * stride_out_t + offs_o
    store_product(acc, scale, bias_ptr, offs_o, out_ptrs, mask, HAS_BIAS, ACCUMULATE)
