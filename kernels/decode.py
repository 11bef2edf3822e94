"""A linear layer and its adapter for a few tokens: x (W + ΔW)ᵀ in one pass over W, whose read hides everything else.

No tile of ΔW is written out where 16 divides b. A circulant block in pieces of 16 is, for one token,

    delta[16·J + j] = Σ_c G[c, c + j],        G[c, s] = Σ_α w[16·(α − J) + c] · x[16·α + s],  s = 0..31,

sums over the diagonals of a product of w and x exactly as they lie in memory. With s in two halves, of which the second
is the first of the next piece α + 1, both come from the same x: rows (α − J) and (α − J − 1) of w, one tile of x, one
product, and one diagonal sum after the loop. Other b gather the tile of ΔW from w, value by value.

Where a layer has too few outputs to fill a card, programs share the sum of a tile, and the last of them to finish adds
their parts up.
"""

import triton
import triton.language as tl

from .indexing import helper, mma, rounded, store_product


@helper
def base_product(acc, x_ptrs, x_mask, weight_ptrs, inside, EVEN_K: tl.constexpr):
    """acc + x Wᵀ over some inner features, `inside` the sum but for EVEN_K; and the x that it has read."""
    if EVEN_K:
        weight = tl.load(weight_ptrs)
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
    else:
        weight = tl.load(weight_ptrs, mask=inside[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=x_mask & inside[None, :], other=0.0)
    return mma(x, tl.trans(weight), acc, "tf32x3"), x


@triton.jit
def decode_kernel(
    x_ptr,  # [n_tokens, in_features], rows stride_x_t apart
    weight_ptr,  # [out_features, in_features], rows stride_weight_row apart
    w_ptr,  # [m, n, b] float32
    bias_ptr,  # [out_features], read where HAS_BIAS
    out_ptr,  # [n_tokens, out_features]
    partials_ptr,  # [n_splits, n_tokens, out_features] float32, where SPLIT
    counters_ptr,  # [tiles] int32, where SPLIT: zero before and after
    scale,
    n_tokens,
    out_features,
    in_features,
    split_length,  # how much of the sum one split takes, a multiple of BLOCK_K
    stride_x_t,
    stride_weight_row,
    b: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides in_features
    SPLIT: tl.constexpr,  # programs share a sum
    BLOCK_T: tl.constexpr,  # at least n_tokens, up to 16
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[t, o] = Σ_i x[t, i] · (W[o, i] + scale · ΔW[o, i]) (+ bias[o]), BLOCK_O outputs and one split per program.

    The two products have accumulators of their own, so that w is rounded to x's dtype, its scaled sum is not, and W is
    never rounded again. Of the programs that share a sum none waits: the last to finish adds their parts in ascending
    order.
    """
    PIECE: tl.constexpr = 16
    IN_PIECES: tl.constexpr = b % PIECE == 0
    # W's share of a step is a chain of matrix instructions, each of which waits for the one before. In pieces nothing
    # else takes as long: two chains of half the length, with sums of their own, run side by side.
    CHAIN: tl.constexpr = BLOCK_K // 2 if IN_PIECES else BLOCK_K
    pid = tl.program_id(0)
    split = tl.program_id(1)
    x_dtype = x_ptr.dtype.element_ty
    offs_r = tl.arange(0, BLOCK_O)
    if IN_PIECES:
        # A tile is one piece of 16 rows out of each of several row blocks: they share the piece's place J.
        PIECES: tl.constexpr = b // PIECE
        GROUP: tl.constexpr = BLOCK_O // PIECE
        first_block = pid // PIECES * GROUP
        piece = pid % PIECES
        offs_o = (first_block + offs_r // PIECE) * b + piece * PIECE + offs_r % PIECE
    else:
        offs_o = pid * BLOCK_O + offs_r
    # Rows past the end repeat the last one: read, never stored. Tokens past the end are zero and cost no traffic.
    rows = tl.minimum(offs_o, out_features - 1)
    offs_k = tl.arange(0, CHAIN)
    offs_t = tl.arange(0, 16)
    weight_ptrs = weight_ptr + (rows.to(tl.int64) * stride_weight_row)[:, None] + offs_k[None, :]
    x_ptrs = x_ptr + (offs_t.to(tl.int64) * stride_x_t)[:, None] + offs_k[None, :]
    x_mask = (offs_t < n_tokens)[:, None]

    if IN_PIECES:
        offs_c = tl.arange(0, 2 * BLOCK_O)  # row block, half of s, c
        half = offs_c // PIECE % 2
        blocks = tl.minimum(first_block + offs_c // (2 * PIECE), out_features // b - 1)
        w_ptrs = w_ptr + (blocks.to(tl.int64) * in_features + offs_c % PIECE)[:, None]
        offs_s = tl.arange(0, BLOCK_T * PIECE)  # token, s
        offs_a = tl.arange(0, BLOCK_K // PIECE)
        piece_ptrs = (
            x_ptr + ((offs_s // PIECE).to(tl.int64) * stride_x_t + offs_s % PIECE)[None, :] + (offs_a * PIECE)[:, None]
        )
        piece_mask = (offs_s // PIECE < n_tokens)[None, :]
        sums = tl.zeros([2 * BLOCK_O, BLOCK_T * PIECE], dtype=tl.float32)
        acc_2 = tl.zeros([16, BLOCK_O], dtype=tl.float32)
    else:
        w_ptrs = w_ptr + (rows // b).to(tl.int64)[:, None] * in_features
        j = (rows % b)[:, None]
        sums = tl.zeros([16, BLOCK_O], dtype=tl.float32)

    start = split * split_length
    end = tl.minimum(start + split_length, in_features)
    acc = tl.zeros([16, BLOCK_O], dtype=tl.float32)
    for k0 in range(start, end, BLOCK_K):
        k = k0 + offs_k
        acc, x = base_product(acc, x_ptrs + k0, x_mask, weight_ptrs + k0, k < end, EVEN_K)
        if IN_PIECES:
            k_2 = k0 + CHAIN
            acc_2, _ = base_product(acc_2, x_ptrs + k_2, x_mask, weight_ptrs + k_2, k + CHAIN < end, EVEN_K)
            a = k0 // PIECE + offs_a
            shift = (a % PIECES)[None, :] - piece - half[:, None]
            shift = tl.where(shift < 0, shift + PIECES, shift)
            offs_w = (a // PIECES * b)[None, :] + shift * PIECE
            if EVEN_K:
                w = tl.load(w_ptrs + offs_w)
                x_pieces = tl.load(piece_ptrs + k0, mask=piece_mask, other=0.0)
            else:
                inside = a * PIECE < end
                w = tl.load(w_ptrs + offs_w, mask=inside[None, :], other=0.0)
                x_pieces = tl.load(piece_ptrs + k0, mask=piece_mask & inside[:, None], other=0.0)
            sums = mma(rounded(w, x_dtype), x_pieces, sums, "tf32x3")
        else:
            p = k % b
            shift = p[None, :] - j
            shift = tl.where(shift < 0, shift + b, shift)
            w = tl.load(w_ptrs + ((k - p)[None, :] + shift), mask=(k < end)[None, :], other=0.0)
            sums = mma(x, tl.trans(rounded(w, x_dtype)), sums, "tf32x3")

    if IN_PIECES:
        acc += acc_2
        # Turn row c by c inside each token; element j then belongs to the half that c + j lies in.
        place = (offs_c % PIECE)[:, None] + (offs_s % PIECE)[None, :]
        turned = tl.gather(sums, (offs_s // PIECE * PIECE)[None, :] + place % PIECE, axis=1)
        turned = tl.where(place // PIECE == half[:, None], turned, 0.0)
        delta = tl.sum(tl.reshape(turned, [GROUP, 2 * PIECE, BLOCK_T * PIECE]), axis=1)
        delta = tl.permute(tl.reshape(delta, [GROUP, BLOCK_T, PIECE]), (1, 0, 2))
        delta = tl.reshape(delta, [BLOCK_T, BLOCK_O])
    else:
        delta = tl.sum(tl.reshape(sums, [16 // BLOCK_T, BLOCK_T, BLOCK_O]), axis=0)
    # Rows of tokens that do not exist are zero: adding them up leaves the others, in BLOCK_T rows.
    acc = tl.sum(tl.reshape(acc, [16 // BLOCK_T, BLOCK_T, BLOCK_O]), axis=0)

    y = acc + scale * delta

    offs_t = tl.arange(0, BLOCK_T)
    mask = (offs_t < n_tokens)[:, None] & (offs_o < out_features)[None, :]
    offs = offs_t.to(tl.int64)[:, None] * out_features + offs_o
    if SPLIT:
        n_splits = tl.num_programs(1)
        stride_s = n_tokens * out_features
        tl.store(partials_ptr + split * stride_s + offs, y, mask=mask)
        # All threads' stores come before the count (release), which comes before what the last program reads (acquire).
        tl.debug_barrier()
        before = tl.atomic_add(counters_ptr + pid, 1, sem="acq_rel", scope="gpu")
        if before == n_splits - 1:
            y = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
            for s in range(n_splits):
                y += tl.load(partials_ptr + s * stride_s + offs, mask=mask, other=0.0)
            store_product(y, 1.0, bias_ptr, offs_o[None, :], out_ptr + offs, mask, HAS_BIAS, ACCUMULATE=False)
            tl.store(counters_ptr + pid, 0)
    else:
        store_product(y, 1.0, bias_ptr, offs_o[None, :], out_ptr + offs, mask, HAS_BIAS, ACCUMULATE=False)
