"""Rows sorted by group, and tiles of such rows, against plain loops."""

import pytest
import torch

from c3a_triton.errors import ShapeError
from c3a_triton.operator import routes

# (groups of each token, number of groups): groups without rows, all rows of one group, no rows, one choice, and indices
# of groups that are not here.
WHOLE = {
    "spread": ([[2, 0], [1, 2], [2, 4], [0, 4]], 5),
    "all to one": ([[1], [1], [1]], 3),
    "one group": ([[0, 0], [0, 0]], 1),
    "no rows": ([], 4),
    "more groups than rows": ([[7]], 9),
}
PARTIAL = {
    "sentinels": ([[0, 3], [3, 3], [2, 0]], 3),
    "negative": ([[-1, 1], [0, -2]], 2),
    "both ends": ([[-1, 5], [1, 1], [4, 0]], 2),
    "none here": ([[-1, 3]], 3),
}
CASES = [
    *(pytest.param(*case, False, id=name) for name, case in WHOLE.items()),
    *(pytest.param(*case, True, id=name) for name, case in PARTIAL.items()),
]


def made(index: list[list[int]], n_groups: int, partial: bool) -> routes.Routes:
    top_k = len(index[0]) if index else 2
    return routes.make(torch.tensor(index, dtype=torch.int64).view(-1, top_k), n_groups, partial=partial)


@pytest.mark.parametrize(("index", "n_groups", "partial"), CASES)
def test_rows_are_sorted_by_group(index: list[list[int]], n_groups: int, partial: bool) -> None:
    r = made(index, n_groups, partial)
    ids = [i for row in index for i in row]
    order = sorted(range(len(ids)), key=ids.__getitem__)  # as stable as the sort that it stands for
    assert r.order.tolist() == order
    assert r.source.tolist() == [pair // r.top_k for pair in order]
    assert [order[row] for row in r.inverse.tolist()] == list(range(len(ids)))
    assert r.groups.tolist() == [min(max(ids[pair], 0), n_groups - 1) for pair in order]
    assert r.offsets.tolist() == [sum(i < g for i in ids) for g in range(n_groups + 1)]
    assert r.offsets.dtype == torch.int32
    assert r.valid().tolist() == [0 <= ids[pair] < n_groups for pair in order]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_of_any_integers(dtype: torch.dtype) -> None:
    r = routes.make(torch.tensor([[1, 0]], dtype=dtype), 2)
    assert (r.order.dtype, r.groups.dtype, r.offsets.dtype) == (torch.int64, torch.int64, torch.int32)
    assert r.offsets.tolist() == [0, 1, 2]


@pytest.mark.parametrize("index", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2)], ids=["1-D", "floating"])
def test_indices_that_are_none_are_refused(index: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"index is torch\.\w+ of shape"):
        routes.make(index, 4)


def test_uniform_rows_are_in_order() -> None:
    r = routes.uniform(3, 2, torch.device("cpu"))
    same = routes.make(torch.tensor([[0], [0], [1], [1], [2], [2]]), 3)
    for ours, theirs in zip(r[:5], same[:5], strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert r[5:] == same[5:]


def tiles_by_loop(offsets: list[int], block_t: int, start: int, count: int, partial: bool) -> list[list[int]]:
    runs = [(g, offsets[g], offsets[g + 1]) for g in range(len(offsets) - 1)]
    if partial:
        runs = [(-1, 0, offsets[0]), *runs, (-1, offsets[-1], start + count)]
    found = []
    for group, first, last in runs:
        first, last = (min(max(at - start, 0), count) for at in (first, last))
        found += [[group, at, min(block_t, last - at)] for at in range(first, last, block_t)]
    return found


@pytest.mark.parametrize(("index", "n_groups", "partial"), CASES)
def test_tiles(index: list[list[int]], n_groups: int, partial: bool) -> None:
    r = made(index, n_groups, partial)
    n_rows = r.order.shape[0]
    for block_t in (1, 2, 16):
        for start in range(n_rows + 1):
            for count in {n_rows - start, (n_rows - start) // 2}:
                table = r.tiles(block_t, start, count)
                expected = tiles_by_loop(r.offsets.tolist(), block_t, start, count, partial)
                assert table.dtype == torch.int32
                assert table.shape == (routes.n_tiles(n_groups, count, block_t, partial), 3)
                assert table[: len(expected)].tolist() == expected
                assert all(row == [-1, 0, 0] for row in table[len(expected) :].tolist())


def test_many_tiles() -> None:
    index = torch.randint(-1, 18, (300, 3))
    r = routes.make(index, 17, partial=True)
    assert r.tiles(8, 100, 700)[:, 2].sum() == 700
    expected = tiles_by_loop(r.offsets.tolist(), 8, 100, 700, True)
    assert r.tiles(8, 100, 700)[: len(expected)].tolist() == expected


def test_the_bound_of_tiles_is_met_and_never_exceeded() -> None:
    """Over all ways to spread some rows over groups."""
    for n_groups, n_rows, block_t in ((3, 7, 2), (2, 5, 3), (4, 3, 2)):
        spreads = torch.cartesian_prod(*[torch.arange(n_rows + 1)] * n_groups)
        spreads = spreads[spreads.sum(1) == n_rows]
        needed = ((spreads + block_t - 1) // block_t).sum(1)
        assert needed.max() == routes.n_tiles(n_groups, n_rows, block_t, False)


def test_tables_are_made_once() -> None:
    r = made(*WHOLE["spread"], False)
    made_by = []

    def make(*args: object) -> torch.Tensor:
        made_by.append(args)
        return routes.tile_table(*args)

    assert r.tiles(2, 0, 8, make=make) is r.tiles(2, 0, 8, make=make)
    assert r.tiles(2, 0, 4, make=make) is not r.tiles(2, 0, 8, make=make)
    assert [args[1:] for args in made_by] == [(2, 0, 8, False), (2, 0, 4, False)]
