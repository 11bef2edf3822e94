"""What multiplies spectra where rows have w's of their own out of a stack (`kernels/routed.py`), for `fft_plans.py`.

Both launches take, besides what those of one w take, the offsets of the groups and `tiles`, which gives the table of
tiles of some rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..routes import n_tiles, share
from .fft_bases import Memory, Transform
from .fft_plans import Outer, Products, policy
from .plans import Launch, bound, cdiv, kernels, planned, split
from .tiles import ROUTED_ROWS, mix_tile, outer_tile

__all__ = ["Tiles", "products", "route_tiles"]

# tiles(rows of a tile at most, first row, number of rows, make=what makes it where it is not there)
Tiles = Callable[..., Tensor]

# Groups that a program of `route_tiles_kernel` compares with its tiles at a time, and tiles of a program.
_GROUPS, _TILES = 128, 32


def products(stack: int, n_rows: int, transpose: bool) -> Products:
    """Those of `fft_plans` with a stack of w's, of so many rows in all."""
    each = share(stack, n_rows)
    return Products(stack, functools.partial(_mix, stack, each, transpose), functools.partial(_outer, stack, each))


def _mix(
    stack: int,
    each: int,
    transpose: bool,
    of: Transform,
    rows: slice,
    cols: int,
    out: int,
    z: Memory,
    y: Memory,
    *,
    read_again: bool,
) -> Launch:
    """y = z · blocksᵀ with the blocks of each row's group, slot by slot: of `cols` blocks of b to `out` of them."""
    cols, out = 2 * cols * of.apart, 2 * out * of.apart  # reals of a slot
    tile = mix_tile(of.card, of.scratch.itemsize, min(each, ROUTED_ROWS), out, cols)
    count = rows.stop - rows.start
    launch = bound(
        # One program per tile of rows and columns, and per slot; rows may have no group.
        kernels().routed.routed_mix_kernel,
        (n_tiles(stack, count, tile.block_t, True) * cdiv(out, tile.block_o) * of.slots, 1, 1),
        tile,
        stride_z_f=z.stride,
        stride_y_f=y.stride,
        row_blocks=out // 2,
        col_blocks=cols // 2,
        stack=stack,
        SLOTS=of.slots,
        TRANSPOSE=transpose,
        POLICY=policy(read_again),
        PRECISION=of.precision,
        BLOCK_T=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
        **of.options,
    )

    def mix(*, tiles: Tiles, offsets: Tensor, **operands: Any) -> None:
        table = tiles(tile.block_t, rows.start, count, make=route_tiles)
        launch(table_ptr=table, n_tiles=table.shape[0], **operands)

    return mix


def _outer(
    stack: int,
    each: int,
    of: Transform,
    step: int,
    m: int,
    n: int,
    g: Memory,
    z: Memory,
    y: Memory,
    *,
    with_dx: bool,
    read_again: bool,
) -> Outer:
    """sums = gᵀ z over the rows of each group, slot by slot, of up to `step` rows at a time."""
    rows, columns = 2 * m * of.apart, 2 * n * of.apart
    tile = outer_tile(of.card, of.scratch.itemsize, rows, columns)
    tiles = cdiv(rows, tile.block_o) * cdiv(columns, tile.block_i) * stack
    _, n_splits = split(min(each, step), tile.block_t, tiles * of.slots, least=8)

    def launch(tokens: slice) -> Launch:
        launch = bound(
            # One program per tile of a group's matrix, slot and split of the group's rows.
            kernels().routed.routed_outer_kernel,
            (tiles, of.slots, n_splits),
            tile,
            start=tokens.start,
            count=tokens.stop - tokens.start,
            stride_g_f=g.stride,
            stride_z_f=z.stride,
            out_blocks=m * of.apart,
            in_blocks=n * of.apart,
            ACCUMULATE=tokens.start > 0,
            POLICY=policy(read_again),
            PRECISION=of.precision,
            BLOCK_O=tile.block_o,
            BLOCK_I=tile.block_i,
            BLOCK_T=tile.block_t,
            **of.options,
        )

        def outer(*, tiles: Tiles, offsets: Tensor, blocks_ptr: None, y_ptr: None, **operands: Any) -> None:
            launch(offsets_ptr=offsets, **operands)

        return outer

    return Outer(launch, n_splits, mixes=False)


def route_tiles(offsets: Tensor, block_t: int, start: int, count: int, partial: bool) -> Tensor:
    """What `routes.tile_table` returns, in one launch; `offsets` contiguous."""
    n = n_tiles(offsets.shape[0] - 1, count, block_t, partial)
    table = torch.empty(n, 3, dtype=torch.int32, device=offsets.device)
    if n:
        _table_launch(offsets.shape[0] - 1, block_t, start, count, n, partial)(offsets_ptr=offsets, table_ptr=table)
    return table


@planned
def _table_launch(n_groups: int, block_t: int, start: int, count: int, n_tiles: int, partial: bool) -> Launch:
    return bound(
        # One program per `_TILES` tiles.
        kernels().routed.route_tiles_kernel,
        (cdiv(n_tiles, _TILES), 1, 1),
        n_groups=n_groups,
        start=start,
        count=count,
        n_tiles=n_tiles,
        HAS_REST=partial,
        BLOCK_T=block_t,
        BLOCK_G=_GROUPS,
        BLOCK_N=_TILES,
        num_warps=4,
    )
