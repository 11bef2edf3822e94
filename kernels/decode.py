"""A linear layer and its adapter for a few tokens: x (W + ΔW)ᵀ in one pass over W, whose read hides everything else.

No tile of ΔW is written out where 16 divides b. A circulant block in pieces of 16 is, for one token,

    delta[16·J + j] = Σ_c G[c, c + j],        G[c, s] = Σ_α w[16·(α − J) + c] · x[16·α + s],  s = 0..31,

sums over the diagonals of a product of w and x exactly as they lie in memory. With s in two halves, of which the second
is the first of the next piece α + 1, both come from the same x: rows (α − J) and (α − J − 1) of w, one tile of x, one
product, and one diagonal sum after the loop. Other b gather the tile of ΔW from w, value by value.
"""

import triton
import triton.language as tl

from .indexing import mma, rounded, store_product


@triton.jit
def decode_kernel(
    x_ptr,  # [n_tokens, in_features], rows stride_x_t apart
    weight_ptr,  # [out_features, in_features], rows stride_weight_row apart
    w_ptr,  # [m, n, b] float32
    bias_ptr,  # [out_features], read where HAS_BIAS
    out_ptr,  # [n_splits, n_tokens, out_features]
    scale,
    n_tokens,
    out_features,
    in_features,
    split_length,  # how much of the sum one split takes, a multiple of BLOCK_K
    stride_x_t,
    stride_weight_row,
    stride_out_s,
    stride_out_t,
    b: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides in_features
    BLOCK_T: tl.constexpr,  # at least n_tokens, up to 16
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[t, o] = Σ_i x[t, i] · (W[o, i] + scale · ΔW[o, i]) (+ bias[o]), BLOCK_O outputs and one split per program.

    The two products have accumulators of their own, so that w is rounded to x's dtype, its scaled sum is not, and W is
    never rounded again.
    """
    PIECE: tl.constexpr = 16
    IN_PIECES: tl.constexpr = b % PIECE == 0
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
    offs_k = tl.arange(0, BLOCK_K)
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
    else:
        w_ptrs = w_ptr + (rows // b).to(tl.int64)[:, None] * in_features
        j = (rows % b)[:, None]
        sums = tl.zeros([16, BLOCK_O], dtype=tl.float32)

    start = split * split_length
    end = tl.minimum(start + split_length, in_features)
    acc = tl.zeros([16, BLOCK_O], dtype=tl.float32)
    for k0 in range(start, end, BLOCK_K):
        if EVEN_K:
            weight = tl.load(weight_ptrs + k0)
            x = tl.load(x_ptrs + k0, mask=x_mask, other=0.0)
        else:
            inside = (k0 + offs_k < end)[None, :]
            weight = tl.load(weight_ptrs + k0, mask=inside, other=0.0)
            x = tl.load(x_ptrs + k0, mask=x_mask & inside, other=0.0)
        acc = mma(x, tl.trans(weight), acc, "tf32x3")
        if IN_PIECES:
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
            k = k0 + offs_k
            p = k % b
            shift = p[None, :] - j
            shift = tl.where(shift < 0, shift + b, shift)
            w = tl.load(w_ptrs + ((k - p)[None, :] + shift), mask=(k < end)[None, :], other=0.0)
            sums = mma(x, tl.trans(rounded(w, x_dtype)), sums, "tf32x3")

    if IN_PIECES:
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

    offs_t = tl.arange(0, BLOCK_T)
    mask = (offs_t < n_tokens)[:, None] & (offs_o < out_features)[None, :]
    out_ptrs = out_ptr + split.to(tl.int64) * stride_out_s + offs_t.to(tl.int64)[:, None] * stride_out_t + offs_o
    store_product(acc + scale * delta, 1.0, bias_ptr, offs_o[None, :], out_ptrs, mask, HAS_BIAS, ACCUMULATE=False)
