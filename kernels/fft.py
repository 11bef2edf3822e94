"""The product in the Fourier domain: DFT of every block (analysis), a small product per frequency (mix), inverse DFT.

A block of b reals becomes SLOTS = ceil(b / 2) slots of two reals: slot 0 is (DC, Nyquist), or (DC, 0) for odd b, every
other slot is (Re, Im) of one frequency. With slot 0 weighted 1/√b and the others √(2/b) the basis O [b, 2·SLOTS] is
orthogonal: the inverse DFT is multiplication by Oᵀ, and spectra have the magnitude of what they are spectra of.

Spectra are stored frequency first, [SLOTS, rows, 2] with rows = (token, block): per slot a matrix [tokens, 2·blocks].
`stride_*_f`, from slot to slot, is 2·rows rounded up to whole tiles, so that tiles of a spectrum need no mask along its
contiguous axis; rows past the end hold copies or nothing, and are never summed or stored.

With a + ic the plain DFT of w[M, N], X_N · conj(W_MN) is a real 2 × 2 block acting on (Re, Im); slot 0 is diagonal. The
blocks of one slot form a matrix [2·row_blocks, 2·col_blocks]; that of the transposed product is its transpose.

`two_level_*` are the same transforms for b = P·Q, with 4·(P + Q) instead of 2·b operations per value. Slot
k1·(Q/2) + k2 then holds the frequency k1 + P·k2, an order that only has to be the same everywhere.
"""

import triton
import triton.language as tl

from .indexing import helper, mma, rounded, store_product

# Rows and columns of a basis matrix are padded with zeros to a multiple of this, and so are the rows of a spectrum.
PAD: tl.constexpr = tl.constexpr(128)


@helper
def narrowed(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x (float32) in `dtype`; float32 that one TF32 product will read is rounded to TF32, which hardware truncates."""
    if dtype == tl.float32 and PRECISION == "tf32":
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0xFFF + ((bits >> 13) & 1)
        return tl.where(x == x, (bits & 0xFFFFE000).to(tl.float32, bitcast=True), x)
    return rounded(x, dtype)


@helper
def store_spectrum(
    z, slot, start_row, z_ptr, stride_z_f, SLOTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Store z [slots, 2·BLOCK_R], the spectrum of consecutive rows, where slot < SLOTS."""
    z_ptrs = z_ptr + start_row.to(tl.int64) * 2 + slot.to(tl.int64)[:, None] * stride_z_f
    z_ptrs += tl.arange(0, 2 * BLOCK_R)[None, :]
    tl.store(z_ptrs, narrowed(z, z_ptr.dtype.element_ty, PRECISION), mask=(slot < SLOTS)[:, None])


@helper
def store_blocks(
    re,  # orthogonal spectrum of rows (M, N) of w, float32
    im,
    slot,  # of each element, broadcastable to re's shape
    row,
    blocks_ptr,  # [SLOTS, 2·row_blocks, 2·col_blocks]
    mask,
    out_blocks: tl.constexpr,
    in_blocks: tl.constexpr,
    b: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the 2 × 2 blocks that multiply (Re, Im) of x by conj(W), or by W in the transposed product."""
    first = slot == 0
    weight = tl.where(first, float(b) ** 0.5, (b / 2) ** 0.5)  # from the orthogonal to the plain DFT
    re = re * weight
    im = im * weight
    turn = tl.where(first, 0.0, -im if TRANSPOSE else im)
    same = tl.where(first, im, re)
    if TRANSPOSE:
        row_block = row % in_blocks
        col_block = row // in_blocks
        COLS: tl.constexpr = 2 * out_blocks
    else:
        row_block = row // in_blocks
        col_block = row % in_blocks
        COLS: tl.constexpr = 2 * in_blocks
    ptrs = blocks_ptr + slot.to(tl.int64) * (4 * out_blocks * in_blocks)
    ptrs += row_block.to(tl.int64) * (2 * COLS) + col_block * 2
    dtype = blocks_ptr.dtype.element_ty
    tl.store(ptrs, narrowed(re, dtype, PRECISION), mask=mask)
    tl.store(ptrs + 1, narrowed(turn, dtype, PRECISION), mask=mask)
    tl.store(ptrs + COLS, narrowed(-turn, dtype, PRECISION), mask=mask)
    tl.store(ptrs + (COLS + 1), narrowed(same, dtype, PRECISION), mask=mask)


@triton.jit
def analysis_kernel(
    x_ptr,  # [n_tokens, blocks · b], tokens stride_x_t apart; or w as [out_blocks · in_blocks, b]
    basis_ptr,  # Oᵀ [2·SLOTS, b], padded
    z_ptr,  # [SLOTS, n_rows, 2], or the blocks of w (see store_blocks)
    n_rows,  # n_tokens · blocks
    stride_x_t,
    stride_z_f,
    blocks: tl.constexpr,
    b: tl.constexpr,
    IN_BLOCKS: tl.constexpr,  # of w, whose blocks are to be stored; 0 stores a spectrum
    OUT_BLOCKS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    DOT: tl.constexpr,  # how float32 operands are multiplied here
    PRECISION: tl.constexpr,  # and by those who read the result
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z = x O by rows of b values: one tile of BLOCK_R rows and BLOCK_C / 2 slots per program."""
    SLOTS: tl.constexpr = (b + 1) // 2
    TILES: tl.constexpr = (2 * SLOTS + BLOCK_C - 1) // BLOCK_C
    WIDTH: tl.constexpr = (b + PAD - 1) // PAD * PAD
    # Tiles of the same rows run side by side, so that x comes from memory once.
    start_c = tl.program_id(0) % TILES * BLOCK_C
    start_row = tl.program_id(0) // TILES * BLOCK_R
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one.
    row = tl.minimum(start_row + tl.arange(0, BLOCK_R), n_rows - 1)
    token = start_row // blocks
    x_ptrs = x_ptr + token.to(tl.int64) * stride_x_t
    x_ptrs += ((row // blocks - token) * stride_x_t + row % blocks * b)[:, None] + offs_k[None, :]
    basis_ptrs = basis_ptr + ((start_c + tl.arange(0, BLOCK_C)) * WIDTH)[:, None] + offs_k[None, :]

    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for k in range(0, b, BLOCK_K):
        if b % BLOCK_K == 0:
            x = tl.load(x_ptrs + k)
        else:
            inside = offs_k[None, :] < b - k
            x = tl.load(x_ptrs + k, mask=inside, other=0.0)
        basis = tl.load(basis_ptrs + k)
        acc = mma(x.to(basis.dtype), tl.trans(basis), acc, DOT)

    slot = start_c // 2 + tl.arange(0, BLOCK_C // 2)
    pairs = tl.reshape(acc, (BLOCK_R, BLOCK_C // 2, 2))
    if IN_BLOCKS > 0:
        re, im = tl.split(pairs)
        row = start_row + tl.arange(0, BLOCK_R)
        mask = (row < n_rows)[:, None] & (slot < SLOTS)[None, :]
        store_blocks(re, im, slot[None, :], row[:, None], z_ptr, mask, OUT_BLOCKS, IN_BLOCKS, b, TRANSPOSE, PRECISION)
    else:
        z = tl.reshape(tl.permute(pairs, (1, 0, 2)), (BLOCK_C // 2, 2 * BLOCK_R))
        store_spectrum(z, slot, start_row, z_ptr, stride_z_f, SLOTS, PRECISION, BLOCK_R)


@triton.jit
def synthesis_kernel(
    y_ptr,  # [SLOTS, n_rows, 2]
    basis_ptr,  # O [b, 2·SLOTS], padded
    bias_ptr,  # [blocks · b]
    out_ptr,  # [n_tokens, blocks · b], tokens stride_out_t apart
    scale,
    n_rows,  # n_tokens · blocks
    stride_y_f,
    stride_out_t,
    blocks: tl.constexpr,
    b: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = scale · y Oᵀ (+ bias) (+ out) by rows: one tile of BLOCK_R rows and BLOCK_C positions per program."""
    SLOTS: tl.constexpr = (b + 1) // 2
    TILES: tl.constexpr = (b + BLOCK_C - 1) // BLOCK_C
    WIDTH: tl.constexpr = (2 * SLOTS + PAD - 1) // PAD * PAD
    start_p = tl.program_id(0) % TILES * BLOCK_C
    start_row = tl.program_id(0) // TILES * BLOCK_R
    offs_f = tl.arange(0, BLOCK_K // 2)
    offs_p = start_p + tl.arange(0, BLOCK_C)
    y_ptrs = y_ptr + start_row.to(tl.int64) * 2
    y_ptrs += offs_f.to(tl.int64)[:, None] * stride_y_f + tl.arange(0, 2 * BLOCK_R)[None, :]
    basis_ptrs = basis_ptr + (offs_p * WIDTH)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    step = tl.full([], BLOCK_K // 2, tl.int64) * stride_y_f

    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for k in range(0, 2 * SLOTS, BLOCK_K):
        if 2 * SLOTS % BLOCK_K == 0:
            y = tl.load(y_ptrs)
        else:
            y = tl.load(y_ptrs, mask=(offs_f < SLOTS - k // 2)[:, None], other=0.0)
        basis = tl.load(basis_ptrs + k)
        y = tl.permute(tl.reshape(y, (BLOCK_K // 2, BLOCK_R, 2)), (1, 0, 2))
        acc = mma(tl.reshape(y, (BLOCK_R, BLOCK_K)).to(basis.dtype), tl.trans(basis), acc, DOT)
        y_ptrs += step

    row = start_row + tl.arange(0, BLOCK_R)
    token = start_row // blocks
    offs_o = (row % blocks * b)[:, None] + offs_p[None, :]
    out_ptrs = out_ptr + token.to(tl.int64) * stride_out_t
    out_ptrs += ((row // blocks - token) * stride_out_t)[:, None] + offs_o
    mask = (row < n_rows)[:, None] & (offs_p < b)[None, :]
    store_product(acc, scale, bias_ptr, offs_o, out_ptrs, mask, HAS_BIAS, ACCUMULATE)


@triton.jit
def two_level_analysis_kernel(
    x_ptr,  # as in analysis_kernel
    first_ptr,  # [P, 2P] float32: column (k1, re/im) is cos, −sin of 2π·a·k1 / P
    second_ptr,  # [2Q, Q] float32: row (c, re/im), column (k2, re/im), the complex factor e^(−2πi·c·k2 / Q)·√(2/b)
    twiddle_ptr,  # [Q, P, 2] float32: cos, sin of 2π·c·k1 / b
    z_ptr,
    n_rows,
    stride_x_t,
    stride_z_f,
    blocks: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
    OUT_BLOCKS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """z = x O for b = P·Q, position Q·a + c: DFTs of length P over a, twiddle factors, DFTs of length Q over c.

    One program: BLOCK_R whole rows, all their slots.
    """
    b: tl.constexpr = P * Q
    start_row = tl.program_id(0) * BLOCK_R
    token = start_row // blocks
    rc = tl.arange(0, BLOCK_R * Q)
    c = rc % Q
    row = tl.minimum(start_row + rc // Q, n_rows - 1)
    offs_p = tl.arange(0, P)
    x_ptrs = x_ptr + token.to(tl.int64) * stride_x_t
    x_ptrs += ((row // blocks - token) * stride_x_t + row % blocks * b + c)[:, None] + (offs_p * Q)[None, :]
    x = tl.load(x_ptrs).to(tl.float32)
    signed = tl.sum(tl.where((c % 2 == 0)[:, None], x, -x), axis=1)
    nyquist = tl.sum(tl.reshape(signed, (BLOCK_R, Q)), axis=1) * (b**-0.5)

    first = tl.load(first_ptr + (offs_p * (2 * P))[:, None] + tl.arange(0, 2 * P)[None, :])
    s = mma(x, first, tl.zeros([BLOCK_R * Q, 2 * P], dtype=tl.float32), DOT)
    s_re, s_im = tl.split(tl.reshape(s, (BLOCK_R * Q, P, 2)))
    twiddle_ptrs = twiddle_ptr + (c * (2 * P))[:, None] + (offs_p * 2)[None, :]
    cos = tl.load(twiddle_ptrs)
    sin = tl.load(twiddle_ptrs + 1)
    u = tl.join(s_re * cos + s_im * sin, s_im * cos - s_re * sin)
    u = tl.permute(tl.reshape(u, (BLOCK_R, Q, P, 2)), (0, 2, 1, 3))
    u = narrowed(tl.reshape(u, (BLOCK_R * P, 2 * Q)), tl.float32, DOT)
    second = tl.load(second_ptr + (tl.arange(0, 2 * Q) * Q)[:, None] + tl.arange(0, Q)[None, :])
    z = mma(u, second, tl.zeros([BLOCK_R * P, Q], dtype=tl.float32), DOT)

    z = tl.reshape(z, (BLOCK_R, P, Q))
    k1 = tl.arange(0, P)[None, :, None]
    column = tl.arange(0, Q)[None, None, :]
    z = tl.where((k1 == 0) & (column == 0), z * 0.5**0.5, z)
    z = tl.where((k1 == 0) & (column == 1), nyquist[:, None, None], z)
    if IN_BLOCKS > 0:
        re, im = tl.split(tl.reshape(z, (BLOCK_R * P, Q // 2, 2)))
        rk = tl.arange(0, BLOCK_R * P)
        row = (start_row + rk // P)[:, None]
        slot = (rk % P * (Q // 2))[:, None] + tl.arange(0, Q // 2)[None, :]
        store_blocks(re, im, slot, row, z_ptr, row < n_rows, OUT_BLOCKS, IN_BLOCKS, b, TRANSPOSE, PRECISION)
    else:
        z = tl.permute(tl.reshape(z, (BLOCK_R, b // 2, 2)), (1, 0, 2))
        z = tl.reshape(z, (b // 2, 2 * BLOCK_R))
        store_spectrum(z, tl.arange(0, b // 2), start_row, z_ptr, stride_z_f, b // 2, PRECISION, BLOCK_R)


@triton.jit
def two_level_synthesis_kernel(
    y_ptr,  # as in synthesis_kernel
    first_ptr,  # as in two_level_analysis_kernel
    second_ptr,
    twiddle_ptr,
    bias_ptr,
    out_ptr,
    scale,
    n_rows,
    stride_y_f,
    stride_out_t,
    blocks: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = scale · y Oᵀ (+ bias) (+ out) for b = P·Q: the transpose of the analysis, step by step.

    One program: BLOCK_R whole rows.
    """
    b: tl.constexpr = P * Q
    start_row = tl.program_id(0) * BLOCK_R
    slot = tl.arange(0, b // 2)
    y_ptrs = y_ptr + start_row.to(tl.int64) * 2
    y_ptrs += slot.to(tl.int64)[:, None] * stride_y_f + tl.arange(0, 2 * BLOCK_R)[None, :]
    y = tl.permute(tl.reshape(tl.load(y_ptrs), (b // 2, BLOCK_R, 2)), (1, 0, 2))
    y = tl.reshape(y, (BLOCK_R, P, Q)).to(tl.float32)
    k1 = tl.arange(0, P)[None, :, None]
    column = tl.arange(0, Q)[None, None, :]
    at_nyquist = (k1 == 0) & (column == 1)
    nyquist = tl.sum(tl.sum(tl.where(at_nyquist, y, 0.0), axis=2), axis=1) * (b**-0.5)
    y = tl.where(at_nyquist, 0.0, y)
    y = tl.where((k1 == 0) & (column == 0), y * 0.5**0.5, y)
    y = narrowed(tl.reshape(y, (BLOCK_R * P, Q)), tl.float32, DOT)

    second = tl.load(second_ptr + (tl.arange(0, 2 * Q) * Q)[None, :] + tl.arange(0, Q)[:, None])
    u = mma(y, second, tl.zeros([BLOCK_R * P, 2 * Q], dtype=tl.float32), DOT)
    u = tl.permute(tl.reshape(u, (BLOCK_R, P, Q, 2)), (0, 2, 1, 3))
    u_re, u_im = tl.split(tl.reshape(u, (BLOCK_R * Q, P, 2)))
    rc = tl.arange(0, BLOCK_R * Q)
    c = rc % Q
    offs_p = tl.arange(0, P)
    twiddle_ptrs = twiddle_ptr + (c * (2 * P))[:, None] + (offs_p * 2)[None, :]
    cos = tl.load(twiddle_ptrs)
    sin = tl.load(twiddle_ptrs + 1)
    s = tl.join(u_re * cos - u_im * sin, u_re * sin + u_im * cos)
    s = narrowed(tl.reshape(s, (BLOCK_R * Q, 2 * P)), tl.float32, DOT)
    first = tl.load(first_ptr + (offs_p * (2 * P))[None, :] + tl.arange(0, 2 * P)[:, None])
    acc = mma(s, first, tl.zeros([BLOCK_R * Q, P], dtype=tl.float32), DOT)
    sign = tl.where(tl.arange(0, Q) % 2 == 0, 1.0, -1.0)
    acc += tl.reshape(nyquist[:, None] * sign[None, :], (BLOCK_R * Q, 1))

    row = start_row + rc // Q
    token = start_row // blocks
    offs_o = (row % blocks * b + c)[:, None] + (offs_p * Q)[None, :]
    out_ptrs = out_ptr + token.to(tl.int64) * stride_out_t
    out_ptrs += ((row // blocks - token) * stride_out_t)[:, None] + offs_o
    mask = tl.broadcast_to((row < n_rows)[:, None], (BLOCK_R * Q, P))
    store_product(acc, scale, bias_ptr, offs_o, out_ptrs, mask, HAS_BIAS, ACCUMULATE)


@triton.jit
def mix_kernel(
    z_ptr,  # [SLOTS, n_tokens, 2·col_blocks]
    blocks_ptr,  # [SLOTS, 2·row_blocks, 2·col_blocks]
    y_ptr,  # [SLOTS, n_tokens, 2·row_blocks]
    n_tokens,
    stride_z_f,
    stride_y_f,
    row_blocks: tl.constexpr,
    col_blocks: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = z blocksᵀ per slot; one program: one slot, BLOCK_T tokens, BLOCK_C reals of the result."""
    COLS: tl.constexpr = 2 * row_blocks
    INNER: tl.constexpr = 2 * col_blocks
    TILES: tl.constexpr = (COLS + BLOCK_C - 1) // BLOCK_C
    start_c = tl.program_id(0) % TILES * BLOCK_C
    start_t = tl.program_id(0) // TILES * BLOCK_T
    slot = tl.program_id(1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    # Tokens and columns past the end repeat the last one: read without a mask, never stored.
    offs_t = tl.minimum(tl.arange(0, BLOCK_T), n_tokens - 1 - start_t)
    offs_c = tl.minimum(tl.arange(0, BLOCK_C), COLS - 1 - start_c)
    z_ptrs = z_ptr + slot * stride_z_f + start_t.to(tl.int64) * INNER + ((offs_t * INNER)[:, None] + offs_k[None, :])
    block_ptrs = blocks_ptr + (slot * COLS + start_c) * INNER + ((offs_c * INNER)[:, None] + offs_k[None, :])

    acc = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for k in range(0, INNER, BLOCK_K):
        if INNER % BLOCK_K == 0:
            z = tl.load(z_ptrs + k)
            block = tl.load(block_ptrs + k)
        else:
            inside = offs_k[None, :] < INNER - k
            z = tl.load(z_ptrs + k, mask=inside, other=0.0)
            block = tl.load(block_ptrs + k, mask=inside, other=0.0)
        acc = mma(z, tl.trans(block), acc, PRECISION)

    offs_t = tl.arange(0, BLOCK_T)
    offs_c = start_c + tl.arange(0, BLOCK_C)
    mask = (offs_t < n_tokens - start_t)[:, None] & (offs_c < COLS)[None, :]
    y_ptrs = y_ptr + slot * stride_y_f + start_t.to(tl.int64) * COLS + ((offs_t * COLS)[:, None] + offs_c[None, :])
    tl.store(y_ptrs, narrowed(acc, y_ptr.dtype.element_ty, PRECISION), mask=mask)


@triton.jit
def outer_kernel(
    g_ptr,  # [SLOTS, n_tokens, 2·out_blocks], the spectrum of dy
    z_ptr,  # [SLOTS, n_tokens, 2·in_blocks], the spectrum of x
    sums_ptr,  # [n_splits, SLOTS, 2·out_blocks, 2·in_blocks] float32
    n_tokens,
    tokens_per_split,
    stride_g_f,
    stride_z_f,
    out_blocks: tl.constexpr,
    in_blocks: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # add to what `sums` holds from tokens before
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """sums = gᵀ z per slot and split of the tokens; one program: one tile of one slot, one split."""
    ROWS: tl.constexpr = 2 * out_blocks
    COLS: tl.constexpr = 2 * in_blocks
    TILES: tl.constexpr = (COLS + BLOCK_I - 1) // BLOCK_I
    offs_o = tl.program_id(0) // TILES * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tl.program_id(0) % TILES * BLOCK_I + tl.arange(0, BLOCK_I)
    slot = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    start_t = split * tokens_per_split
    count = tl.minimum(tokens_per_split, n_tokens - start_t)
    offs_t = tl.arange(0, BLOCK_T)
    # g is read transposed by its pointers: a transposed tile in registers would keep the loads out of the pipeline.
    g_ptrs = g_ptr + slot * stride_g_f + start_t.to(tl.int64) * ROWS + (offs_o[:, None] + (offs_t * ROWS)[None, :])
    z_ptrs = z_ptr + slot * stride_z_f + start_t.to(tl.int64) * COLS + ((offs_t * COLS)[:, None] + offs_i[None, :])

    acc = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for t in range(0, count, BLOCK_T):
        mask_g = (offs_t < count - t)[None, :]
        mask_z = (offs_t < count - t)[:, None]
        if ROWS % BLOCK_O != 0:
            mask_g = mask_g & (offs_o < ROWS)[:, None]
        if COLS % BLOCK_I != 0:
            mask_z = mask_z & (offs_i < COLS)[None, :]
        g = tl.load(g_ptrs, mask=mask_g, other=0.0)
        z = tl.load(z_ptrs, mask=mask_z, other=0.0)
        acc = mma(g, z, acc, PRECISION)
        g_ptrs += BLOCK_T * ROWS
        z_ptrs += BLOCK_T * COLS

    sums_ptr += (split.to(tl.int64) * tl.num_programs(1) + slot) * (ROWS * COLS)
    sums_ptrs = sums_ptr + offs_o.to(tl.int64)[:, None] * COLS + offs_i[None, :]
    mask = (offs_o < ROWS)[:, None] & (offs_i < COLS)[None, :]
    if ACCUMULATE:
        acc += tl.load(sums_ptrs, mask=mask, other=0.0)
    tl.store(sums_ptrs, acc, mask=mask)


@triton.jit
def fold_spectrum_kernel(
    sums_ptr,  # [n_splits, SLOTS, 2·out_blocks, 2·in_blocks] float32, from outer_kernel
    p_ptr,  # [SLOTS, out_blocks · in_blocks, 2] float32
    n_splits,
    stride_p_f,
    out_blocks: tl.constexpr,
    in_blocks: tl.constexpr,
    b: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p = conj(dy_hat) · x_hat summed over splits in ascending order, weighted so that p Oᵀ is the gradient of w.

    One program: BLOCK pairs of blocks (M, N) of one slot.
    """
    ROWS: tl.constexpr = 2 * out_blocks
    COLS: tl.constexpr = 2 * in_blocks
    start = tl.program_id(0) * BLOCK
    pair = start + tl.arange(0, BLOCK)
    slot = tl.program_id(1).to(tl.int64)
    mask = pair < out_blocks * in_blocks
    ptrs = sums_ptr + slot * (ROWS * COLS) + (pair // in_blocks).to(tl.int64) * (2 * COLS) + pair % in_blocks * 2
    re_re = tl.zeros([BLOCK], dtype=tl.float32)
    re_im = tl.zeros([BLOCK], dtype=tl.float32)
    im_re = tl.zeros([BLOCK], dtype=tl.float32)
    im_im = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(n_splits):
        re_re += tl.load(ptrs, mask=mask, other=0.0)
        re_im += tl.load(ptrs + 1, mask=mask, other=0.0)
        im_re += tl.load(ptrs + COLS, mask=mask, other=0.0)
        im_im += tl.load(ptrs + COLS + 1, mask=mask, other=0.0)
        ptrs += tl.num_programs(1).to(tl.int64) * (ROWS * COLS)
    weight = tl.where(slot == 0, float(b) ** 0.5, (b / 2) ** 0.5)
    re = tl.where(slot == 0, re_re, re_re + im_im) * weight
    im = tl.where(slot == 0, im_im, re_im - im_re) * weight
    p_ptrs = p_ptr + slot * stride_p_f + start * 2 + tl.arange(0, 2 * BLOCK)
    # The padding of a spectrum takes what lies past the last pair.
    tl.store(p_ptrs, tl.reshape(tl.join(re, im), (2 * BLOCK,)))
