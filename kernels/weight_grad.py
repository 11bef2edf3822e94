"""dw: the entries of dyᵀ x summed along the circulant diagonals. Deterministic, without atomics.

    dw[M, N, q] = scale · Σ_t Σ_j dy[t, M·b + j] · x[t, N·b + (j + q) mod b]

Large blocks: `diagonal_sums_kernel` cuts a block into tiles of BLOCK_Q, accumulates all tiles of one offset together
and sums the diagonals of the accumulator once; `fold_sums_kernel` puts the pieces together. Small blocks:
`block_sums_kernel` accumulates a tile of several whole blocks and sums the circulant diagonals of each.
"""

import triton
import triton.language as tl

from .indexing import mma


@triton.jit
def diagonal_sums_kernel(
    dy_ptr,  # [n_tokens, out_blocks · b], rows stride_dy_t apart
    x_ptr,  # [n_tokens, in_blocks · b], rows stride_x_t apart
    sums_ptr,  # [n_splits, out_blocks · in_blocks, n_offsets, 2, BLOCK_Q] float32
    n_tokens,
    n_pairs,  # out_blocks · in_blocks
    in_blocks,
    tokens_per_split,
    stride_dy_t,
    stride_x_t,
    b: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: one block (M, N), one offset between tiles, one split of the tokens.

    acc[j, p] = Σ_t Σ_J dy[t, M·b + J·BLOCK_Q + j] · x[t, N·b + P·BLOCK_Q + p] over the tile pairs (J, P) of the offset;
    sums[0, d] = Σ_j acc[j, j + d], sums[1, d] = Σ_j acc[j, j + d − BLOCK_Q], each over the j that stay inside the tile.
    Where BLOCK_Q divides b, the offset is P − J modulo the number of tiles. Otherwise the last tile is padded with
    zeros and the offset is P − J itself, because a step around the block is then no whole number of tiles.
    """
    TILES: tl.constexpr = (b + BLOCK_Q - 1) // BLOCK_Q
    CIRCULAR: tl.constexpr = b % BLOCK_Q == 0
    OFFSETS: tl.constexpr = TILES if CIRCULAR else 2 * TILES - 1
    pid = tl.program_id(0)
    pair = pid // OFFSETS
    split = tl.program_id(1)
    if CIRCULAR:
        offset = pid % OFFSETS
        first = 0
        count = TILES
    else:
        offset = pid % OFFSETS - (TILES - 1)
        first = tl.maximum(0, -offset)
        count = TILES - tl.maximum(offset, -offset)

    start_t = split * tokens_per_split
    end_t = tl.minimum(start_t + tokens_per_split, n_tokens)
    offs_t = tl.arange(0, BLOCK_T)
    offs_q = tl.arange(0, BLOCK_Q)
    # dy is read transposed by its pointers: a transposed tile in registers would keep the loads out of the pipeline.
    dy_ptrs = dy_ptr + pair // in_blocks * b + (offs_q[:, None] + offs_t[None, :] * stride_dy_t)
    x_ptrs = x_ptr + pair % in_blocks * b + (offs_t[:, None] * stride_x_t + offs_q[None, :])

    acc = tl.zeros([BLOCK_Q, BLOCK_Q], dtype=tl.float32)
    for k in range(tl.cdiv(end_t - start_t, BLOCK_T) * count):
        t = start_t + k // count * BLOCK_T
        tile_j = first + k % count
        tile_p = tile_j + offset
        if CIRCULAR:
            tile_p = tl.where(tile_p >= TILES, tile_p - TILES, tile_p)
        mask_dy = (offs_t < end_t - t)[None, :]
        mask_x = (offs_t < end_t - t)[:, None]
        if not CIRCULAR:
            mask_dy = mask_dy & (offs_q < b - tile_j * BLOCK_Q)[:, None]
            mask_x = mask_x & (offs_q < b - tile_p * BLOCK_Q)[None, :]
        dy = tl.load(dy_ptrs + (t.to(tl.int64) * stride_dy_t + tile_j * BLOCK_Q), mask=mask_dy, other=0.0)
        x = tl.load(x_ptrs + (t.to(tl.int64) * stride_x_t + tile_p * BLOCK_Q), mask=mask_x, other=0.0)
        acc = mma(dy, x, acc, PRECISION)

    # Row j turned left by j: column d then holds the diagonal p − j = d, or d − BLOCK_Q where j + d left the tile.
    column = offs_q[:, None] + offs_q[None, :]
    turned = tl.gather(acc, column % BLOCK_Q, axis=1)
    sums_ptr += (split.to(tl.int64) * n_pairs * OFFSETS + pid) * (2 * BLOCK_Q)
    tl.store(sums_ptr + offs_q, tl.sum(tl.where(column < BLOCK_Q, turned, 0.0), axis=0))
    tl.store(sums_ptr + BLOCK_Q + offs_q, tl.sum(tl.where(column < BLOCK_Q, 0.0, turned), axis=0))


@triton.jit
def fold_sums_kernel(
    sums_ptr,  # [n_splits, n_pairs, n_offsets, 2, BLOCK_Q] float32, from diagonal_sums_kernel
    dw_ptr,  # [n_pairs, b] float32
    scale,
    n_splits,
    n_pairs,
    b: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dw[pair, q] = scale · Σ of the two or four sums that hold the diagonals ≡ q (mod b), splits in ascending order.

    A diagonal e = p − j lies in sums[0] of the tile offset ⌊e / BLOCK_Q⌋ and in sums[1] of the next one. One program:
    BLOCK values of one pair (M, N).
    """
    TILES: tl.constexpr = (b + BLOCK_Q - 1) // BLOCK_Q
    CIRCULAR: tl.constexpr = b % BLOCK_Q == 0
    OFFSETS: tl.constexpr = TILES if CIRCULAR else 2 * TILES - 1
    pair = tl.program_id(0)
    q = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = sums_ptr + pair.to(tl.int64) * (OFFSETS * 2 * BLOCK_Q)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(n_splits):
        if CIRCULAR:
            upper = q // BLOCK_Q
            d = q % BLOCK_Q
            acc += tl.load(sums + upper * 2 * BLOCK_Q + d, mask=q < b, other=0.0)
            acc += tl.load(sums + (upper + 1) % TILES * 2 * BLOCK_Q + BLOCK_Q + d, mask=q < b, other=0.0)
        else:
            for turn in tl.static_range(2):
                e = q + (TILES * BLOCK_Q - turn * b)
                upper = e // BLOCK_Q - 1
                d = e % BLOCK_Q
                acc += tl.load(sums + upper * 2 * BLOCK_Q + d, mask=(q < b) & (upper >= 0), other=0.0)
                inside = (q < b) & (upper + 1 < OFFSETS)
                acc += tl.load(sums + (upper + 1) * 2 * BLOCK_Q + BLOCK_Q + d, mask=inside, other=0.0)
        sums += n_pairs * (OFFSETS * 2 * BLOCK_Q)
    tl.store(dw_ptr + pair.to(tl.int64) * b + q, acc * scale, mask=q < b)


@triton.jit
def block_sums_kernel(
    dy_ptr,  # [n_tokens, out_features], rows stride_dy_t apart
    x_ptr,  # [n_tokens, in_features], rows stride_x_t apart
    dw_ptr,  # [n_splits, out_features / b, in_features] float32: in_features = (in_blocks, b)
    scale,
    n_tokens,
    out_features,
    in_features,
    tokens_per_split,
    stride_dy_t,
    stride_x_t,
    b: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: BLOCK // b blocks a side (b ≤ BLOCK) and one split of the tokens.

    acc[r, c] = Σ_t dy[t, o + r] · x[t, i + c]; then every row turned left inside its blocks by its own position j, and
    the rows of each block summed, by a product with a 0/1 matrix.
    """
    SIDE: tl.constexpr = BLOCK // b * b
    tiles_i = tl.cdiv(in_features, SIDE)
    start_o = tl.program_id(0) // tiles_i * SIDE
    start_i = tl.program_id(0) % tiles_i * SIDE
    split = tl.program_id(1)
    start_t = split * tokens_per_split
    end_t = tl.minimum(start_t + tokens_per_split, n_tokens)
    offs = tl.arange(0, BLOCK)
    offs_t = tl.arange(0, BLOCK_T)
    dy_ptr += start_t.to(tl.int64) * stride_dy_t + start_o
    x_ptr += start_t.to(tl.int64) * stride_x_t + start_i
    dy_ptrs = dy_ptr + (offs[:, None] + offs_t[None, :] * stride_dy_t)
    x_ptrs = x_ptr + (offs_t[:, None] * stride_x_t + offs[None, :])
    inside_o = (offs < SIDE) & (offs < out_features - start_o)
    inside_i = (offs < SIDE) & (offs < in_features - start_i)

    acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for t in range(start_t, end_t, BLOCK_T):
        inside_t = offs_t < end_t - t
        dy = tl.load(dy_ptrs, mask=inside_o[:, None] & inside_t[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=inside_t[:, None] & inside_i[None, :], other=0.0)
        acc = mma(dy, x, acc, PRECISION)
        dy_ptrs += BLOCK_T * stride_dy_t
        x_ptrs += BLOCK_T * stride_x_t

    # Columns past the last whole block keep their place: their values are zero.
    turned = (offs // b * b)[None, :] + ((offs % b)[:, None] + (offs % b)[None, :]) % b
    turned = tl.where((offs < SIDE)[None, :], turned, offs[None, :])
    acc = tl.gather(acc, turned, axis=1)
    rows_of_block = ((offs // b)[None, :] == offs[:, None]).to(tl.float32)
    sums = tl.dot(rows_of_block, acc, input_precision="tf32x3") * scale

    offs_m = start_o // b + offs
    mask = ((offs < BLOCK // b) & (offs_m < out_features // b))[:, None] & inside_i[None, :]
    dw_ptr += split.to(tl.int64) * (out_features // b) * in_features
    dw_ptrs = dw_ptr + offs_m.to(tl.int64)[:, None] * in_features + (start_i + offs)[None, :]
    tl.store(dw_ptrs, sums, mask=mask)
