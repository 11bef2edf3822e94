"""The product in the Fourier domain: DFT of every block (spectra), a small product per frequency (mix), inverse DFT.

A block of b = S·Q values is taken apart into S × S blocks of Q, of the positions S·a + c with the same c: the element
in row (M, S·a' + c') and column (N, S·a + c) of ΔW,

    w[M, N, (S·(a − a') + c − c') mod b] = w'[(M, c'), (N, c), (a − a') mod Q],

depends on a − a' modulo Q alone. (Decimation, the index split of Cooley and Tukey's FFT, 1965, without its second
level: the S × S small circulant blocks take the place of twiddle factors.) So one basis of Q serves any b, and what
follows speaks of blocks of Q, of which a matrix has S · out_blocks by S · in_blocks.

A block of Q reals becomes SLOTS = ceil(Q / 2) slots of two reals: slot 0 is (DC, Nyquist), or (DC, 0) for odd Q, every
other slot is (Re, Im) of one frequency. With slot 0 weighted 1/√Q and the others √(2/Q) the basis O [Q, 2·SLOTS] is
orthogonal: the inverse DFT is multiplication by Oᵀ, and spectra have the magnitude of what they are spectra of.

Spectra are stored frequency first, [SLOTS, rows, 2] with rows = (token, block, c): per slot a matrix [tokens,
2·S·blocks]. `stride_*_f`, from slot to slot, is 2·rows rounded up to whole tiles, so that tiles of a spectrum need no
mask along its contiguous axis; rows past the end hold copies or nothing, and are never summed or stored.

With a + ic the plain DFT of w'[(M, c'), (N, c)], X · conj(W) is a real 2 × 2 block acting on (Re, Im); slot 0 is
diagonal. The blocks of one slot form a matrix [2·S·row_blocks, 2·S·col_blocks]; that of the transposed product is its
transpose.

Launches that follow each other walk over tokens in opposite directions: what one wrote last, the next finds in the L2
cache. What is read for the last time is marked `evict_first`, so that it does not push out what will be read again.
"""

import triton
import triton.language as tl

from .indexing import INTERPRETED, helper, mma, rounded, store_product

# Rows and columns of a basis matrix are padded with zeros to a multiple of this, and so are the rows of a spectrum.
PAD: tl.constexpr = tl.constexpr(128)
# Arguments that kernels only compare and divide: specialised, each would be compiled several times.
COUNTS = ("w_tiles", "x_tiles", "other_tiles", "tiles", "x_rows", "other_rows", "n_rows", "n_splits")
# Columns and steps of the tiles of w and dw, which are few and small.
WIDE: tl.constexpr = tl.constexpr(32)


@helper
def begin(PDL: tl.constexpr):
    """Wait for the launches before, once, before anything is read or written; and let the next one be set up.

    With PDL (programmatic dependent launch, from sm_90 on) a grid starts while the one before drains.
    """
    if PDL and not INTERPRETED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@helper
def narrowed(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x (float32) in `dtype`; float32 that one TF32 product will read is rounded to TF32, which hardware truncates."""
    if dtype == tl.float32 and PRECISION == "tf32":
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0xFFF + ((bits >> 13) & 1)
        return tl.where(x == x, (bits & 0xFFFFE000).to(tl.float32, bitcast=True), x)
    return rounded(x, dtype)


@helper
def transform_weight(
    w_ptr,  # [out_blocks, in_blocks, S·Q] float32
    basis_ptr,  # Oᵀ [2·SLOTS, Q] float32, padded
    blocks_ptr,  # [SLOTS, 2·S·row_blocks, 2·S·col_blocks]
    tile,
    out_blocks: tl.constexpr,
    in_blocks: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PRECISION: tl.constexpr,  # of those who multiply by the blocks
    BLOCK_R: tl.constexpr,
):
    """The 2 × 2 blocks that multiply (Re, Im) of x by conj(W), or by W in the transposed product, exact but for a last
    rounding: BLOCK_R rows ((M, c'), (N, c)) of w' and WIDE / 2 slots.
    """
    SLOTS: tl.constexpr = (Q + 1) // 2
    TILES: tl.constexpr = (2 * SLOTS + WIDE - 1) // WIDE
    WIDTH: tl.constexpr = (Q + PAD - 1) // PAD * PAD
    ROWS: tl.constexpr = S * out_blocks
    COLS: tl.constexpr = S * in_blocks
    start_c = tile % TILES * WIDE
    row = tile // TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < ROWS * COLS
    row = tl.minimum(row, ROWS * COLS - 1)
    out_block = row // COLS
    in_block = row % COLS
    shift = in_block % S - out_block % S
    w_ptrs = w_ptr + (out_block // S * in_blocks + in_block // S).to(tl.int64)[:, None] * (S * Q)
    offs_k = tl.arange(0, WIDE)
    basis_ptrs = basis_ptr + ((start_c + tl.arange(0, WIDE)) * WIDTH)[:, None] + offs_k[None, :]

    acc = tl.zeros([BLOCK_R, WIDE], dtype=tl.float32)
    for k in range(0, Q, WIDE):
        q = (k + offs_k)[None, :] * S + shift[:, None]
        q = tl.where(q < 0, q + S * Q, q)
        w = tl.load(w_ptrs + q, mask=(offs_k < Q - k)[None, :], other=0.0)
        acc = mma(w, tl.trans(tl.load(basis_ptrs + k)), acc, "tf32x3")

    slot = (start_c // 2 + tl.arange(0, WIDE // 2))[None, :]
    first = slot == 0
    acc_re, acc_im = tl.split(tl.reshape(acc, (BLOCK_R, WIDE // 2, 2)))
    weight = tl.where(first, float(Q) ** 0.5, (Q / 2) ** 0.5)  # from the orthogonal to the plain DFT
    re = acc_re * weight
    im = acc_im * weight
    turn = tl.where(first, 0.0, -im if TRANSPOSE else im)
    same = tl.where(first, im, re)
    if TRANSPOSE:
        place = in_block.to(tl.int64) * (4 * ROWS) + out_block * 2
        STRIDE: tl.constexpr = 2 * ROWS
    else:
        place = out_block.to(tl.int64) * (4 * COLS) + in_block * 2
        STRIDE: tl.constexpr = 2 * COLS
    ptrs = blocks_ptr + slot.to(tl.int64) * (4 * ROWS * COLS) + place[:, None]
    mask = inside[:, None] & (slot < SLOTS)
    dtype = blocks_ptr.dtype.element_ty
    tl.store(ptrs, narrowed(re, dtype, PRECISION), mask=mask)
    tl.store(ptrs + 1, narrowed(turn, dtype, PRECISION), mask=mask)
    tl.store(ptrs + STRIDE, narrowed(-turn, dtype, PRECISION), mask=mask)
    tl.store(ptrs + (STRIDE + 1), narrowed(same, dtype, PRECISION), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def spectra_kernel(
    w_ptr,  # [out_blocks, in_blocks, S·Q] float32, or None
    exact_ptr,  # Oᵀ in float32
    blocks_ptr,  # written from w
    x_ptr,  # [tokens, x_blocks · S · Q], or None
    z_ptr,
    other_ptr,  # [tokens, other_blocks · S · Q], or None
    other_z_ptr,
    basis_ptr,  # Oᵀ in the dtype of spectra
    w_tiles,
    x_tiles,
    other_tiles,
    x_rows,  # tokens · x_blocks · S
    other_rows,
    stride_x_t,
    stride_z_f,
    stride_other_t,
    stride_other_z_f,
    out_blocks: tl.constexpr,
    in_blocks: tl.constexpr,
    x_blocks: tl.constexpr,
    other_blocks: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Spectra of w, of one tensor and of another in one grid: a tile of one of them per program.

    w first, whose few tiles take longest; of tensors the last tokens first.
    """
    begin(PDL)
    tile = tl.program_id(0) - w_tiles
    if tile < 0:
        if w_ptr is not None:
            transform_weight(
                w_ptr, exact_ptr, blocks_ptr, tile + w_tiles, out_blocks, in_blocks, S, Q, TRANSPOSE, PRECISION, BLOCK_W
            )
    elif x_ptr is not None:
        # Names of their own: a stride of 1 is a constant, which a branch cannot make a number of.
        blocks, stride_t, stride_f = x_blocks, stride_x_t, stride_z_f
        if other_ptr is not None:
            is_x = tile < x_tiles
            x_ptr = tl.where(is_x, x_ptr, other_ptr)
            z_ptr = tl.where(is_x, z_ptr, other_z_ptr)
            x_rows = tl.where(is_x, x_rows, other_rows)
            stride_t = tl.where(is_x, stride_x_t, stride_other_t)
            stride_f = tl.where(is_x, stride_z_f, stride_other_z_f)
            x_tiles = tl.where(is_x, x_tiles, x_tiles + other_tiles)
            blocks = x_blocks if x_blocks == other_blocks else tl.where(is_x, x_blocks, other_blocks)
        tile = x_tiles - 1 - tile
        SLOTS: tl.constexpr = (Q + 1) // 2
        TILES: tl.constexpr = (2 * SLOTS + BLOCK_C - 1) // BLOCK_C
        WIDTH: tl.constexpr = (Q + PAD - 1) // PAD * PAD
        WHOLE: tl.constexpr = BLOCK_R // S  # blocks of S·Q values, read whole and taken apart in registers
        # Tiles of the same rows run side by side, so that x comes from memory once.
        start_c = tile % TILES * BLOCK_C
        start_row = tile // TILES * BLOCK_R
        offs_k = tl.arange(0, BLOCK_K)
        offs_x = tl.arange(0, BLOCK_K * S)
        # Rows past the end repeat the last one.
        start = start_row // S
        row = tl.minimum(start + tl.arange(0, WHOLE), x_rows // S - 1)
        token = start // blocks
        x_ptrs = x_ptr + token.to(tl.int64) * stride_t
        x_ptrs += ((row // blocks - token) * stride_t + row % blocks * (S * Q))[:, None] + offs_x[None, :]
        basis_ptrs = basis_ptr + ((start_c + tl.arange(0, BLOCK_C)) * WIDTH)[:, None] + offs_k[None, :]

        acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
        for k in range(0, Q, BLOCK_K):
            if Q % BLOCK_K == 0:
                x = tl.load(x_ptrs + k * S, eviction_policy="evict_first")
            else:
                inside = offs_x[None, :] < (Q - k) * S
                x = tl.load(x_ptrs + k * S, mask=inside, other=0.0, eviction_policy="evict_first")
            if S > 1:
                x = tl.permute(tl.reshape(x, (WHOLE, BLOCK_K, S)), (0, 2, 1))
                x = tl.reshape(x, (BLOCK_R, BLOCK_K))
            basis = tl.load(basis_ptrs + k)
            acc = mma(x.to(basis.dtype), tl.trans(basis), acc, PRECISION)

        slot = start_c // 2 + tl.arange(0, BLOCK_C // 2)
        z = tl.permute(tl.reshape(acc, (BLOCK_R, BLOCK_C // 2, 2)), (1, 0, 2))
        z = tl.reshape(z, (BLOCK_C // 2, 2 * BLOCK_R))
        z_ptrs = z_ptr + start_row.to(tl.int64) * 2 + slot.to(tl.int64)[:, None] * stride_f
        z_ptrs += tl.arange(0, 2 * BLOCK_R)[None, :]
        tl.store(z_ptrs, narrowed(z, z_ptr.dtype.element_ty, PRECISION), mask=(slot < SLOTS)[:, None])


@triton.jit
def mix_kernel(
    z_ptr,  # [SLOTS, n_tokens, 2·col_blocks]
    blocks_ptr,  # [SLOTS, 2·row_blocks, 2·col_blocks]
    y_ptr,  # [SLOTS, n_tokens, 2·row_blocks]
    n_tokens,
    stride_z_f,
    stride_y_f,
    row_blocks: tl.constexpr,  # of Q
    col_blocks: tl.constexpr,
    SLOTS: tl.constexpr,
    POLICY: tl.constexpr,  # what becomes of z in the cache: "evict_first" where nobody reads it again
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = z blocksᵀ per slot; one program: one slot, BLOCK_T tokens, BLOCK_C reals of the result.

    All slots of the first tokens first, those that were written last.
    """
    begin(PDL)
    COLS: tl.constexpr = 2 * row_blocks
    INNER: tl.constexpr = 2 * col_blocks
    TILES: tl.constexpr = (COLS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    start_c = pid % TILES * BLOCK_C
    slot = (pid // TILES % SLOTS).to(tl.int64)
    start_t = pid // (TILES * SLOTS) * BLOCK_T
    offs_k = tl.arange(0, BLOCK_K)
    # Tokens and columns past the end repeat the last one: read without a mask, never stored.
    offs_t = tl.minimum(tl.arange(0, BLOCK_T), n_tokens - 1 - start_t)
    offs_c = tl.minimum(tl.arange(0, BLOCK_C), COLS - 1 - start_c)
    z_ptrs = z_ptr + slot * stride_z_f + start_t.to(tl.int64) * INNER + ((offs_t * INNER)[:, None] + offs_k[None, :])
    block_ptrs = blocks_ptr + (slot * COLS + start_c) * INNER + ((offs_c * INNER)[:, None] + offs_k[None, :])

    acc = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for k in range(0, INNER, BLOCK_K):
        if INNER % BLOCK_K == 0:
            z = tl.load(z_ptrs + k, eviction_policy=POLICY)
            block = tl.load(block_ptrs + k)
        else:
            inside = offs_k[None, :] < INNER - k
            z = tl.load(z_ptrs + k, mask=inside, other=0.0, eviction_policy=POLICY)
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
    blocks_ptr,  # [SLOTS, 2·in_blocks, 2·out_blocks], or None
    y_ptr,  # [SLOTS, n_tokens, 2·in_blocks], or None: the spectrum of dx in the same pass, where one tile is a slot
    n_tokens,
    tokens_per_split,
    stride_g_f,
    stride_z_f,
    stride_y_f,
    out_blocks: tl.constexpr,  # of Q
    in_blocks: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # add to what `sums` holds from tokens before
    POLICY: tl.constexpr,  # of z, as in mix_kernel
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """sums = gᵀ z (and y = g blocksᵀ) per slot; one program: one tile of one slot's sums, one split of the tokens."""
    begin(PDL)
    ROWS: tl.constexpr = 2 * out_blocks
    COLS: tl.constexpr = 2 * in_blocks
    TILES: tl.constexpr = (COLS + BLOCK_I - 1) // BLOCK_I
    offs_o = tl.arange(0, BLOCK_O)
    offs_i = tl.arange(0, BLOCK_I)
    if y_ptr is None:
        offs_o += tl.program_id(0) // TILES * BLOCK_O
        offs_i += tl.program_id(0) % TILES * BLOCK_I
    slot = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    start_t = split * tokens_per_split
    count = tl.minimum(tokens_per_split, n_tokens - start_t)
    offs_t = tl.arange(0, BLOCK_T)
    offs_z = (offs_t * COLS)[:, None] + offs_i[None, :]
    z_ptrs = z_ptr + slot * stride_z_f + start_t.to(tl.int64) * COLS + offs_z
    g_ptrs = g_ptr + slot * stride_g_f + start_t.to(tl.int64) * ROWS
    if y_ptr is None:
        # Read transposed by its pointers: a transposed tile of float32 would keep the loads out of the pipeline.
        g_ptrs += offs_o[:, None] + (offs_t * ROWS)[None, :]
    else:
        g_ptrs += (offs_t * ROWS)[:, None] + offs_o[None, :]
        y_ptrs = y_ptr + slot * stride_y_f + start_t.to(tl.int64) * COLS + offs_z
        block_ptrs = blocks_ptr + slot * (ROWS * COLS) + ((offs_i * ROWS)[:, None] + offs_o[None, :])
        mask = (offs_i < COLS)[:, None] & (offs_o < ROWS)[None, :]
        block = tl.trans(tl.load(block_ptrs, mask=mask, other=0.0))

    acc = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for t in range(0, count, BLOCK_T):
        inside = offs_t < count - t
        mask_g = inside[None, :] if y_ptr is None else inside[:, None]
        mask_z = inside[:, None]
        if ROWS % BLOCK_O != 0:
            mask_g = mask_g & ((offs_o < ROWS)[:, None] if y_ptr is None else (offs_o < ROWS)[None, :])
        if COLS % BLOCK_I != 0:
            mask_z = mask_z & (offs_i < COLS)[None, :]
        g = tl.load(g_ptrs, mask=mask_g, other=0.0, eviction_policy="evict_first")
        z = tl.load(z_ptrs, mask=mask_z, other=0.0, eviction_policy=POLICY)
        if y_ptr is None:
            acc = mma(g, z, acc, PRECISION)
        else:
            y = mma(g, block, tl.zeros([BLOCK_T, BLOCK_I], dtype=tl.float32), PRECISION)
            acc = mma(tl.trans(g), z, acc, PRECISION)
            tl.store(y_ptrs, narrowed(y, y_ptr.dtype.element_ty, PRECISION), mask=mask_z)
            y_ptrs += BLOCK_T * COLS
        g_ptrs += BLOCK_T * ROWS
        z_ptrs += BLOCK_T * COLS

    sums_ptr += (split.to(tl.int64) * tl.num_programs(1) + slot) * (ROWS * COLS)
    sums_ptrs = sums_ptr + offs_o.to(tl.int64)[:, None] * COLS + offs_i[None, :]
    mask = (offs_o < ROWS)[:, None] & (offs_i < COLS)[None, :]
    if ACCUMULATE:
        acc += tl.load(sums_ptrs, mask=mask, other=0.0)
    tl.store(sums_ptrs, acc, mask=mask)


@helper
def inverse_weight(
    sums_ptr,  # [n_splits, SLOTS, 2·S·out_blocks, 2·S·in_blocks] float32
    basis_ptr,  # O [Q, 2·SLOTS] float32, padded
    dw_ptr,  # [out_blocks, in_blocks, S·Q] float32
    tile,
    scale,
    n_splits,
    out_blocks: tl.constexpr,
    in_blocks: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dw = scale · the inverse DFT of conj(dy_hat) · x_hat: BLOCK_R rows (M, N, e) and WIDE values S·d + e of each.

    Values S·d + e of w stand in the blocks (c', c' + e) of w', and where c' + e ≥ S in (c', c' + e − S) at d + 1, a
    turn by e^(2πi·f / Q) in their spectra. Summed over splits and c' in ascending order.
    """
    SLOTS: tl.constexpr = (Q + 1) // 2
    TILES: tl.constexpr = (Q + WIDE - 1) // WIDE
    WIDTH: tl.constexpr = (2 * SLOTS + PAD - 1) // PAD * PAD
    ROWS: tl.constexpr = 2 * S * out_blocks
    COLS: tl.constexpr = 2 * S * in_blocks
    # So many of the c' at once: their reads are under way together.
    TOGETHER: tl.constexpr = min(S, 4)
    offs_p = tile % TILES * WIDE + tl.arange(0, WIDE)
    row = tile // TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < out_blocks * in_blocks * S
    row = tl.minimum(row, out_blocks * in_blocks * S - 1)
    e = row % S
    pair = row // S
    first_ptrs = sums_ptr + ((pair // in_blocks).to(tl.int64) * (2 * S * COLS) + pair % in_blocks * (2 * S))[:, None]
    basis_ptrs = basis_ptr + (offs_p * WIDTH)[:, None] + tl.arange(0, WIDE)[None, :]

    acc = tl.zeros([BLOCK_R, WIDE], dtype=tl.float32)
    for k in range(0, 2 * SLOTS, WIDE):
        slot = k // 2 + tl.arange(0, WIDE // 2)
        mask = (slot < SLOTS)[None, :]
        first = (slot == 0)[None, :]
        if S > 1:
            # Row 1 of the basis holds cos and −sin of 2π·f / Q, times √(2/Q). Slot 0 has two real values instead, of
            # which Nyquist's changes its sign.
            cos = tl.load(basis_ptr + WIDTH + 2 * slot, mask=slot < SLOTS, other=0.0)[None, :] * (Q / 2) ** 0.5
            sin = tl.load(basis_ptr + WIDTH + 2 * slot + 1, mask=slot < SLOTS, other=0.0)[None, :] * -((Q / 2) ** 0.5)
        re = tl.zeros([BLOCK_R, WIDE // 2], dtype=tl.float32)
        im = tl.zeros([BLOCK_R, WIDE // 2], dtype=tl.float32)
        ptrs = first_ptrs + slot.to(tl.int64)[None, :] * (ROWS * COLS)
        for _ in range(n_splits):
            for start in range(0, S, TOGETHER):
                for i in tl.static_range(TOGETHER):
                    c_out = start + i
                    c_in = c_out + e
                    around = (c_in >= S)[:, None]
                    c_in = tl.where(c_in >= S, c_in - S, c_in)
                    block_ptrs = ptrs + (c_out * (2 * COLS) + c_in * 2)[:, None]
                    re_re = tl.load(block_ptrs, mask=mask, other=0.0)
                    re_im = tl.load(block_ptrs + 1, mask=mask, other=0.0)
                    im_re = tl.load(block_ptrs + COLS, mask=mask, other=0.0)
                    im_im = tl.load(block_ptrs + (COLS + 1), mask=mask, other=0.0)
                    p_re = tl.where(first, re_re, re_re + im_im)
                    p_im = tl.where(first, im_im, re_im - im_re)
                    if S > 1:
                        turned_re = tl.where(first, p_re, p_re * cos - p_im * sin)
                        turned_im = tl.where(first, -p_im, p_re * sin + p_im * cos)
                        p_re = tl.where(around, turned_re, p_re)
                        p_im = tl.where(around, turned_im, p_im)
                    re += p_re
                    im += p_im
            ptrs += tl.full([], SLOTS, tl.int64) * (ROWS * COLS)
        weight = tl.where(first, float(Q) ** 0.5, (Q / 2) ** 0.5)
        p = tl.reshape(tl.join(re * weight, im * weight), (BLOCK_R, WIDE))
        acc = mma(p, tl.trans(tl.load(basis_ptrs + k)), acc, "tf32x3")

    dw_ptrs = dw_ptr + (pair.to(tl.int64) * (S * Q) + e)[:, None] + (offs_p * S)[None, :]
    tl.store(dw_ptrs, acc * scale, mask=inside[:, None] & (offs_p < Q)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def results_kernel(
    y_ptr,  # [SLOTS, n_rows, 2]
    basis_ptr,  # O in the dtype of spectra
    bias_ptr,
    out_ptr,  # [tokens, blocks · S · Q], or None
    sums_ptr,  # as in inverse_weight
    exact_ptr,  # O in float32
    dw_ptr,  # [out_blocks, in_blocks, S·Q] float32, or None
    scale,
    w_tiles,
    tiles,
    n_rows,  # tokens · blocks · S
    n_splits,
    stride_y_f,
    stride_out_t,
    out_blocks: tl.constexpr,
    in_blocks: tl.constexpr,
    blocks: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The inverse DFTs of dw and of out in one grid: a tile of one of them per program.

    Of out the last tokens first.
    """
    begin(PDL)
    tile = tl.program_id(0) - w_tiles
    if tile < 0:
        if dw_ptr is not None:
            inverse_weight(
                sums_ptr, exact_ptr, dw_ptr, tile + w_tiles, scale, n_splits, out_blocks, in_blocks, S, Q, BLOCK_W
            )
    elif out_ptr is not None:
        tile = tiles - 1 - tile
        SLOTS: tl.constexpr = (Q + 1) // 2
        TILES: tl.constexpr = (Q + BLOCK_C - 1) // BLOCK_C
        WIDTH: tl.constexpr = (2 * SLOTS + PAD - 1) // PAD * PAD
        WHOLE: tl.constexpr = BLOCK_R // S
        start_p = tile % TILES * BLOCK_C
        start_row = tile // TILES * BLOCK_R
        offs_f = tl.arange(0, BLOCK_K // 2)
        y_ptrs = y_ptr + start_row.to(tl.int64) * 2
        y_ptrs += offs_f.to(tl.int64)[:, None] * stride_y_f + tl.arange(0, 2 * BLOCK_R)[None, :]
        basis_ptrs = basis_ptr + ((start_p + tl.arange(0, BLOCK_C)) * WIDTH)[:, None] + tl.arange(0, BLOCK_K)[None, :]
        step = tl.full([], BLOCK_K // 2, tl.int64) * stride_y_f

        acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
        for k in range(0, 2 * SLOTS, BLOCK_K):
            if 2 * SLOTS % BLOCK_K == 0:
                y = tl.load(y_ptrs, eviction_policy="evict_first")
            else:
                inside = (offs_f < SLOTS - k // 2)[:, None]
                y = tl.load(y_ptrs, mask=inside, other=0.0, eviction_policy="evict_first")
            basis = tl.load(basis_ptrs + k)
            y = tl.permute(tl.reshape(y, (BLOCK_K // 2, BLOCK_R, 2)), (1, 0, 2))
            acc = mma(tl.reshape(y, (BLOCK_R, BLOCK_K)).to(basis.dtype), tl.trans(basis), acc, PRECISION)
            y_ptrs += step

        if S > 1:  # put together again
            acc = tl.permute(tl.reshape(acc, (WHOLE, S, BLOCK_C)), (0, 2, 1))
            acc = tl.reshape(acc, (WHOLE, S * BLOCK_C))
        start = start_row // S
        row = start + tl.arange(0, WHOLE)
        token = start // blocks
        offs_p = start_p * S + tl.arange(0, S * BLOCK_C)
        offs_o = (row % blocks * (S * Q))[:, None] + offs_p[None, :]
        out_ptrs = out_ptr + token.to(tl.int64) * stride_out_t
        out_ptrs += ((row // blocks - token) * stride_out_t)[:, None] + offs_o
        mask = (row < n_rows // S)[:, None] & (offs_p < S * Q)[None, :]
        store_product(acc, scale, bias_ptr, offs_o, out_ptrs, mask, HAS_BIAS, ACCUMULATE)
