"""The Fourier path where each row has a w of its own out of a stack, as the tokens of experts have.

Rows lie in the order of their groups: those of group g are `offsets[g]` to `offsets[g + 1]`, int32 on the device, so
that which rows go where is never asked by the host. Rows before `offsets[0]` and from `offsets[n_groups]` on have no
group. Transforms know nothing of groups (`fft.py`: a stack of w's is one w of n_groups · m row blocks); what multiplies
spectra does.
"""

import triton
import triton.language as tl

from .fft import begin, narrowed
from .indexing import mma

# Arguments that kernels only compare, as in fft.py.
COUNTS = ("n_groups", "start", "count", "n_tiles")


@triton.jit(do_not_specialize=COUNTS)
def route_tiles_kernel(
    offsets_ptr,  # [n_groups + 1] int32
    table_ptr,  # [n_tiles, 3] int32: group (−1: none), first row, number of rows (0: the tile is not needed)
    n_groups,
    start,
    count,
    n_tiles,
    HAS_REST: tl.constexpr,  # rows may have no group
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles of up to BLOCK_T rows of one group each, of `count` rows from `start` on, relative to it; BLOCK_N tiles per
    program.

    Each program adds up the tiles of all groups, BLOCK_G at a time, and finds its own among them.
    """
    # The rows before all groups and behind them are two groups more.
    REST: tl.constexpr = 1 if HAS_REST else 0
    tile = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    offs_g = tl.arange(0, BLOCK_G)
    group = tl.full([BLOCK_N], -1, dtype=tl.int32)
    first = tl.zeros([BLOCK_N], dtype=tl.int32)
    n_rows = tl.zeros([BLOCK_N], dtype=tl.int32)
    before = 0
    for g0 in range(-REST, n_groups + REST, BLOCK_G):
        g = g0 + offs_g
        low = tl.load(offsets_ptr + g, mask=(g >= 0) & (g <= n_groups), other=0) - start
        high = tl.load(offsets_ptr + g + 1, mask=g < n_groups, other=0) - start
        high = tl.where(g == n_groups, count, high)
        low = tl.minimum(tl.maximum(low, 0), count)
        high = tl.minimum(tl.maximum(high, 0), count)
        rows = tl.where(g < n_groups + REST, high - low, 0)
        tiles = tl.cdiv(rows, BLOCK_T)
        behind = before + tl.cumsum(tiles, 0)
        within = (tile - (behind - tiles)[None, :]) * BLOCK_T
        own = (within >= 0) & (tile < behind[None, :])
        number = tl.where(g < n_groups, g + 1, 0)[None, :]
        group += tl.sum(tl.where(own, number, 0), 1)
        first += tl.sum(tl.where(own, low[None, :] + within, 0), 1)
        n_rows += tl.sum(tl.where(own, tl.minimum(rows[None, :] - within, BLOCK_T), 0), 1)
        before += tl.sum(tiles, 0)

    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < n_tiles
    tl.store(table_ptr + offs_n * 3, group, mask=mask)
    tl.store(table_ptr + offs_n * 3 + 1, first, mask=mask)
    tl.store(table_ptr + offs_n * 3 + 2, n_rows, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def routed_mix_kernel(
    z_ptr,  # [SLOTS, n_rows, 2·col_blocks]
    blocks_ptr,  # [SLOTS, stack · 2·row_blocks, 2·col_blocks]; transposed [SLOTS, 2·row_blocks, stack · 2·col_blocks]
    y_ptr,  # [SLOTS, n_rows, 2·row_blocks]
    table_ptr,  # as in route_tiles_kernel
    n_tiles,
    stride_z_f,
    stride_y_f,
    row_blocks: tl.constexpr,  # of Q, of one group
    col_blocks: tl.constexpr,
    stack: tl.constexpr,
    SLOTS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    POLICY: tl.constexpr,  # as in fft.py's mix_kernel
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = z blocksᵀ per slot with the blocks of each row's group, 0 without one; one program: one slot, a tile of rows,
    BLOCK_C reals of the result.

    All slots of the first rows first, those that were written last.
    """
    begin(PDL)
    COLS: tl.constexpr = 2 * row_blocks
    INNER: tl.constexpr = 2 * col_blocks
    TILES: tl.constexpr = (COLS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    start_c = pid % TILES * BLOCK_C
    slot = (pid // TILES % SLOTS).to(tl.int64)
    tile = pid // (TILES * SLOTS)
    # The grid is for as many tiles as there may be.
    count = tl.load(table_ptr + tile * 3 + 2, mask=tile < n_tiles, other=0)
    if count == 0:
        return
    group = tl.load(table_ptr + tile * 3)
    start_t = tl.load(table_ptr + tile * 3 + 1)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end repeat the last one: read without a mask, never stored.
    offs_t = tl.minimum(tl.arange(0, BLOCK_T), count - 1)
    offs_c = tl.minimum(tl.arange(0, BLOCK_C), COLS - 1 - start_c)
    z_ptrs = z_ptr + slot * stride_z_f + start_t.to(tl.int64) * INNER + ((offs_t * INNER)[:, None] + offs_k[None, :])
    # Transposed, the matrices of a slot lie side by side, otherwise one below the other.
    STRIDE_C: tl.constexpr = stack * INNER if TRANSPOSE else INNER
    STRIDE_G: tl.constexpr = INNER if TRANSPOSE else COLS * INNER
    blocks_ptr += slot * (stack * COLS * INNER) + tl.maximum(group, 0).to(tl.int64) * STRIDE_G
    blocks_ptr += start_c.to(tl.int64) * STRIDE_C
    block_ptrs = blocks_ptr + ((offs_c * STRIDE_C)[:, None] + offs_k[None, :])

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

    acc = tl.where(group < 0, 0.0, acc)
    offs_t = tl.arange(0, BLOCK_T)
    offs_c = start_c + tl.arange(0, BLOCK_C)
    mask = (offs_t < count)[:, None] & (offs_c < COLS)[None, :]
    y_ptrs = y_ptr + slot * stride_y_f + start_t.to(tl.int64) * COLS + ((offs_t * COLS)[:, None] + offs_c[None, :])
    tl.store(y_ptrs, narrowed(acc, y_ptr.dtype.element_ty, PRECISION), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def routed_outer_kernel(
    g_ptr,  # [SLOTS, n_rows, 2·out_blocks], the spectrum of dy
    z_ptr,  # [SLOTS, n_rows, 2·in_blocks], the spectrum of x
    sums_ptr,  # [n_splits, SLOTS, n_groups, 2·out_blocks, 2·in_blocks] float32
    offsets_ptr,  # [n_groups + 1] int32
    start,  # the first of `count` rows
    count,
    stride_g_f,
    stride_z_f,
    out_blocks: tl.constexpr,  # of Q, of one group
    in_blocks: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # add to what `sums` holds from rows before
    POLICY: tl.constexpr,  # of z, as in fft.py's mix_kernel
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """sums = gᵀ z per slot and group, over the group's rows, 0 where it has none; one program: one tile of the sums of
    one slot and group, one split of its rows.

    Where a split begins depends on the group's number of rows alone.
    """
    begin(PDL)
    ROWS: tl.constexpr = 2 * out_blocks
    COLS: tl.constexpr = 2 * in_blocks
    TILES_I: tl.constexpr = (COLS + BLOCK_I - 1) // BLOCK_I
    TILES: tl.constexpr = (ROWS + BLOCK_O - 1) // BLOCK_O * TILES_I
    group = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    slot = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    offs_o = tile // TILES_I * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tile % TILES_I * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_t = tl.arange(0, BLOCK_T)
    first = tl.minimum(tl.maximum(tl.load(offsets_ptr + group) - start, 0), count)
    behind = tl.minimum(tl.maximum(tl.load(offsets_ptr + group + 1) - start, 0), count)
    rows_per_split = tl.cdiv(tl.cdiv(behind - first, tl.num_programs(2)), BLOCK_T) * BLOCK_T
    start_t = first + split * rows_per_split
    n_rows = tl.minimum(rows_per_split, behind - start_t)
    # g is read transposed by its pointers: a transposed tile of float32 would keep the loads out of the pipeline.
    g_ptrs = g_ptr + slot * stride_g_f + start_t.to(tl.int64) * ROWS + (offs_o[:, None] + (offs_t * ROWS)[None, :])
    z_ptrs = z_ptr + slot * stride_z_f + start_t.to(tl.int64) * COLS + ((offs_t * COLS)[:, None] + offs_i[None, :])

    acc = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for t in range(0, n_rows, BLOCK_T):
        inside = offs_t < n_rows - t
        mask_g, mask_z = inside[None, :], inside[:, None]
        if ROWS % BLOCK_O != 0:
            mask_g = mask_g & (offs_o < ROWS)[:, None]
        if COLS % BLOCK_I != 0:
            mask_z = mask_z & (offs_i < COLS)[None, :]
        g = tl.load(g_ptrs, mask=mask_g, other=0.0, eviction_policy="evict_first")
        z = tl.load(z_ptrs, mask=mask_z, other=0.0, eviction_policy=POLICY)
        acc = mma(g, z, acc, PRECISION)
        g_ptrs += BLOCK_T * ROWS
        z_ptrs += BLOCK_T * COLS

    n_groups = tl.num_programs(0) // TILES
    sums_ptr += ((split.to(tl.int64) * tl.num_programs(1) + slot) * n_groups + group) * (ROWS * COLS)
    sums_ptrs = sums_ptr + offs_o.to(tl.int64)[:, None] * COLS + offs_i[None, :]
    # Sums to which there is nothing to add stay as they are.
    stored = tl.where(n_rows > 0, ROWS, 0) if ACCUMULATE else ROWS
    mask = (offs_o < stored)[:, None] & (offs_i < COLS)[None, :]
    if ACCUMULATE:
        acc += tl.load(sums_ptrs, mask=mask, other=0.0)
    tl.store(sums_ptrs, acc, mask=mask)
