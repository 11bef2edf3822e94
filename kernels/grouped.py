"""The product where every row of a batch has an adapter of its own: one launch for any number of adapters of one b.

What says which w a row has is read on the device, in either of two forms:

- Its address, so that nothing is copied or stacked: 0 stands for a row without an adapter, which gets zeros, and less
  than 0 for one that another launch computes.
- Its index in a stack `w_ptr` [n_groups, ...]: rows of any other number get zeros. A captured graph computes with the
  indices that it finds: experts of tokens, or adapters of requests.

`grouped_hankel_kernel`: few tokens per adapter, as in decoding. w is read as it is stored, once per token.
`grouped_product_kernel`: many tokens per adapter. A tile of tokens never spans two adapters, and a tile of ΔW is
gathered from w value by value.
"""

import triton
import triton.language as tl

from .indexing import hankel_sum, helper, mma, rounded, store_product


@helper
def pointer_to_w(address):
    """Where w lies; the host has made sure of 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)


@helper
def found_w(w_ptr, said, n_groups, stride_w_group):
    """(where a row's w lies, whether it has one) by what is said of it: its index in the stack, or its address."""
    if w_ptr is None:
        has_w = said != 0
        first_w = pointer_to_w(said)
    else:
        has_w = (said >= 0) & (said < n_groups)
        first_w = w_ptr + tl.where(has_w, said, 0).to(tl.int64) * stride_w_group
    return first_w, has_w


@triton.jit
def grouped_hankel_kernel(
    x_ptr,  # [n_tokens, col_blocks · b], rows stride_x_t apart
    w_ptr,  # a stack of w's, stride_w_group apart, or None
    rows_ptr,  # [n_tokens / tokens_per_row], stride_rows apart: what says which w a row has
    bias_ptr,  # [row_blocks · b]
    out_ptr,  # [n_splits, n_tokens, row_blocks · b], rows stride_out_t apart
    scale,
    n_tokens,
    n_groups,
    tokens_per_row,
    stride_rows,
    stride_w_group,
    row_blocks,
    col_blocks,
    split_length,  # how much of the sum one split takes, a multiple of BLOCK_K
    stride_w_row,
    stride_w_col,
    stride_x_t,
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
    TILES_J: tl.constexpr = (b + BLOCK_J - 1) // BLOCK_J
    tiles = tl.cdiv(row_blocks, BLOCK_M) * TILES_J
    token = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    split = tl.program_id(1)
    said = tl.load(rows_ptr + token // tokens_per_row * stride_rows)
    if (said < 0) & (w_ptr is None):
        return
    first_w, has_w = found_w(w_ptr, said, n_groups, stride_w_group)
    token = token.to(tl.int64)
    offs_m = tile // TILES_J * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_j = tile % TILES_J * BLOCK_J + tl.arange(0, BLOCK_J)

    w_rows = first_w + tl.minimum(offs_m, row_blocks - 1).to(tl.int64)[:, None] * stride_w_row
    x_row = x_ptr + token * stride_x_t
    j = tl.minimum(offs_j, b - 1)[None, :]
    start = split * split_length
    end = tl.minimum(start + split_length, col_blocks * b)
    end = tl.where(has_w, end, start)

    acc = hankel_sum(
        w_rows, x_row, j, start, end, stride_w_col, b, TRANSPOSE, EVEN_K, PRECISION, BLOCK_M, BLOCK_J, BLOCK_K
    )

    mask = (offs_m < row_blocks)[:, None] & (offs_j < b)[None, :]
    offs_o = offs_m[:, None] * b + offs_j[None, :]
    out_ptrs = out_ptr + (split.to(tl.int64) * n_tokens + token) * stride_out_t + offs_o
    store_product(acc, scale, bias_ptr, offs_o, out_ptrs, mask, HAS_BIAS, ACCUMULATE)


@triton.jit
def grouped_product_kernel(
    x_ptr,  # [n_tokens, in_features], rows stride_x_t apart
    w_ptr,  # a stack of w's, stride_w_group apart, or None
    table_ptr,  # per tile of tokens (what says which w it has, first place, number of places); then, without a stack,
    # the rows in their order
    bias_ptr,  # [out_features]
    out_ptr,  # [n_tokens, out_features], rows stride_out_t apart
    scale,
    n_tiles,
    n_groups,
    tokens_per_row,
    stride_w_group,
    out_features,
    in_features,
    stride_w_row,
    stride_w_col,
    stride_x_t,
    stride_out_t,
    b: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_I divides in_features
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out[t, o] = scale · Σ_i x[t, i] · ΔW[o, i] (+ bias[o]) with the ΔW of t's row; a tile per program.

    Rows are put in an order in which those of one adapter follow each other, and their tokens are numbered by places in
    that order. With a stack tokens lie in that order already, and a tile may have none.
    """
    x_dtype = x_ptr.dtype.element_ty
    tiles_o = tl.cdiv(out_features, BLOCK_O)
    pid_t = tl.program_id(0) // tiles_o
    pid_o = tl.program_id(0) % tiles_o
    first_w, has_w = found_w(w_ptr, tl.load(table_ptr + pid_t * 3), n_groups, stride_w_group)
    first = tl.load(table_ptr + pid_t * 3 + 1)
    count = tl.load(table_ptr + pid_t * 3 + 2)
    if count == 0:
        return

    # Places and outputs past the end repeat the last one: read, never stored.
    offs_t = tl.arange(0, BLOCK_T)
    place = first + tl.minimum(offs_t, count - 1)
    token = place.to(tl.int64)
    if w_ptr is None:
        row = tl.load(table_ptr + n_tiles * 3 + place // tokens_per_row)
        token = row * tokens_per_row + place % tokens_per_row
    offs_i = tl.arange(0, BLOCK_I)
    x_ptrs = x_ptr + (token * stride_x_t)[:, None] + offs_i[None, :]

    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o = tl.minimum(offs_o, out_features - 1)
    j = (o % b)[:, None]
    w_rows = first_w + ((o // b).to(tl.int64) * stride_w_row)[:, None]
    end = tl.where(has_w, in_features, 0)

    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for k0 in range(0, end, BLOCK_I):
        k = k0 + offs_i
        p = k % b
        shift = p[None, :] - j
        if TRANSPOSE:
            shift = -shift
        shift = tl.where(shift < 0, shift + b, shift)
        w_ptrs = w_rows + ((k // b).to(tl.int64) * stride_w_col)[None, :] + shift
        if EVEN_K:
            x = tl.load(x_ptrs + k0)
            w = tl.load(w_ptrs)
        else:
            inside = (k < in_features)[None, :]
            x = tl.load(x_ptrs + k0, mask=inside, other=0.0)
            w = tl.load(w_ptrs, mask=inside, other=0.0)
        acc = mma(x, tl.trans(rounded(w, x_dtype)), acc, PRECISION)

    mask = (offs_t < count)[:, None] & (offs_o < out_features)[None, :]
    out_ptrs = out_ptr + (token * stride_out_t)[:, None] + offs_o[None, :]
    store_product(acc, scale, bias_ptr, offs_o[None, :], out_ptrs, mask, HAS_BIAS, ACCUMULATE)
