"""Where rows go when each has a group of its own, as the tokens of a mixture of experts have: sorted by group, once.

Everything is computed where the indices are. Nothing is copied to the host, so that a CUDA graph can hold it all.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ShapeError

__all__ = ["Routes", "make", "n_tiles", "share", "tile_table", "uniform"]


class Routes(NamedTuple):
    """Rows, one for each pair of a token and one of its choices, in the order of their groups.

    All tensors are on the device of the indices that they were made of. A compiler takes it as it takes any tuple.
    """

    order: Tensor
    """`(n_rows,)` int64: for each sorted row its pair, token · top_k + choice."""
    source: Tensor
    """`(n_rows,)` int64: for each sorted row its token."""
    inverse: Tensor
    """`(n_rows,)` int64: for each pair its sorted row."""
    groups: Tensor
    """`(n_rows,)` int64: for each sorted row its group, of one without a group the nearest: never out of bounds."""
    offsets: Tensor
    """`(n_groups + 1,)` int32: the rows of group g are `offsets[g]` to `offsets[g + 1]`. Rows before the first and from
    the last on have no group."""
    n_groups: int
    top_k: int
    partial: bool
    """Whether there may be rows without a group."""
    kept: dict[tuple[int, int, int], Tensor]
    """What `tiles` has made."""

    def valid(self) -> Tensor:
        """`(n_rows,)` bool: the sorted rows that have a group."""
        rows = torch.arange(self.order.shape[0], dtype=torch.int32, device=self.order.device)
        return (rows >= self.offsets[0]) & (rows < self.offsets[-1])

    def tiles(self, block_t: int, start: int, count: int, make: Callable[..., Tensor] | None = None) -> Tensor:
        """The table of `tile_table` for `count` rows from `start` on, made once: by `make`, which computes the same."""
        key = (block_t, start, count)
        if key not in self.kept:
            self.kept[key] = (make or tile_table)(self.offsets, block_t, start, count, self.partial)
        return self.kept[key]


def make(index: Tensor, n_groups: int, *, partial: bool = False) -> Routes:
    """Sort the pairs of tokens and groups by group; those of one group stay in their order.

    Args:
        index: `(n_tokens, top_k)` integers, the groups of each token.
        n_groups: groups are 0 to n_groups − 1.
        partial: whether an index may lie outside of them, as of experts that another process holds: such a row has no
            group. Without it there is no such index, which nothing checks.

    Raises:
        ShapeError: `index` is not two-dimensional, chooses nothing, or is not of integers.
    """
    if index.dim() != 2 or not index.shape[1] or index.is_floating_point() or index.is_complex():
        raise ShapeError(f"index is {index.dtype} of shape {tuple(index.shape)}: give integers, (n_tokens, top_k > 0)")
    top_k = index.shape[1]
    ids, order = torch.sort(index.reshape(-1), stable=True)
    pairs = torch.arange(order.shape[0], device=order.device)
    bounds = torch.arange(n_groups + 1, dtype=ids.dtype, device=ids.device)
    return Routes(
        order=order,
        source=order // top_k,
        inverse=torch.empty_like(order).scatter_(0, order, pairs),
        groups=ids.long().clamp(0, n_groups - 1),
        offsets=torch.searchsorted(ids, bounds, out_int32=True),
        n_groups=n_groups,
        top_k=top_k,
        partial=partial,
        kept={},
    )


def uniform(n_groups: int, rows_each: int, device: torch.device) -> Routes:
    """The routes of rows that lie in the order of their groups already, equally many in each."""
    rows = torch.arange(n_groups * rows_each, device=device)
    groups = torch.arange(n_groups, device=device).repeat_interleave(rows_each)
    offsets = torch.arange(n_groups + 1, dtype=torch.int32, device=device) * rows_each
    return Routes(rows, rows, rows, groups, offsets, n_groups, 1, False, {})


def share(n_groups: int, n_rows: int) -> int:
    """The rows of one group: on average, over as many groups as can have rows."""
    return -(-n_rows // max(1, min(n_groups, n_rows)))


def n_tiles(n_groups: int, n_rows: int, block_t: int, partial: bool) -> int:
    """How many tiles of up to `block_t` rows cover `n_rows` rows, however they are spread over the groups.

    A group of t > 0 rows has 1 + (t − 1) // block_t tiles; the sum over k groups is at most
    k + (n_rows − k) // block_t.
    With `partial` the rows before the first group and those after the last count as two groups more.
    """
    k = min(n_groups + (2 if partial else 0), n_rows)
    return k + (n_rows - k) // block_t


def tile_table(offsets: Tensor, block_t: int, start: int, count: int, partial: bool) -> Tensor:
    """Tiles of rows of one group each, for the rows `start` to `start + count`.

    Args:
        offsets: as in `Routes`.
        block_t: rows of a tile at most.
        start: the first row.
        count: number of rows.
        partial: whether rows may have no group: their tiles have the group −1.

    Returns:
        `(n_tiles, 3)` int32, on the device of `offsets`: group, first row counted from `start`, number of rows. Tiles
        that have rows come first, in the order of the rows; what is left of the bound is (−1, 0, 0).
    """
    n_groups = offsets.shape[0] - 1
    bounds = (offsets - start).clamp(0, count)
    groups = torch.arange(n_groups, dtype=torch.int32, device=offsets.device)
    if partial:
        bounds = pad(pad(bounds, (1, 0)), (0, 1), value=count)
        groups = pad(groups, (1, 1), value=-1)
    rows = bounds.diff()
    tiles = (rows + (block_t - 1)) // block_t
    behind = tiles.cumsum(0, dtype=torch.int32)
    tile = torch.arange(n_tiles(n_groups, count, block_t, partial), dtype=torch.int32, device=offsets.device)
    place = torch.searchsorted(behind, tile, right=True)
    used = place < groups.shape[0]
    place = place.clamp(max=groups.shape[0] - 1)
    within = (tile - (behind - tiles)[place]) * block_t
    counts = (rows[place] - within).clamp(max=block_t)
    columns = ((groups[place], -1), (bounds[place] + within, 0), (counts, 0))
    return torch.stack([column.masked_fill(~used, unused) for column, unused in columns], dim=1)
