"""Launchers whose rows have w's of their own out of a stack, against the dense definition: natively on a GPU, in
Triton's interpreter elsewhere.

Small and odd sizes in every dtype, empty groups and rows without a group among them, are those of
`bench/kernel_cases.py` (test_guards.py); here is what that table cannot show.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import bench_package  # noqa: F401
import oracle
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import launch_hooks, overhead
from c3a_triton.errors import ShapeError
from c3a_triton.operator import routes
from c3a_triton.operator.launch import fft_bases, grouped, plans, routed, routed_plans, specs

pytestmark = pytest.mark.usefixtures("nan_filled")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE = 0.37
BACKENDS: dict[str, Callable[..., Tensor]] = {"fft": routed.routed_product, "direct": routed.routed_direct}


class Work:
    """Sorted rows x and dy, each of a group in turn, and a stack of w's."""

    def __init__(self, device: torch.device, dtype: torch.dtype, stack: int, t: int, m: int, n: int, b: int) -> None:
        self.routes = routes.make(torch.randint(-1, stack + 1, (t, 1), device=device), stack, partial=True)
        self.x = torch.randn(t, n * b, device=device).to(dtype)
        self.dy = torch.randn(t, m * b, device=device).to(dtype)
        self.w = torch.randn(stack, m, n, b, device=device)
        bounds = self.routes.offsets.tolist()
        self.groups = [slice(*ends) for ends in pairwise(bounds)]

    def product(self, x: Tensor, of: Callable[..., Tensor] = oracle.product) -> Tensor:
        """Zeros, and where a row has a group what `of` makes of it."""
        width = self.w.shape[1 if of is oracle.product else 2] * self.w.shape[3]
        rows = torch.zeros(len(x), width, dtype=torch.float64)
        for w, own in zip(self.w, self.groups, strict=True):
            rows[own] = of(x[own], w, SCALE)
        return rows

    def weight_grad(self) -> Tensor:
        b = self.w.shape[3]
        return torch.stack([oracle.weight_grad(self.dy[own], self.x[own], b, SCALE) for own in self.groups])

    def call(self, function: Callable[..., Any], *operands: Any, **more: Any) -> Any:
        """A launcher with these routes."""
        return function(*operands, self.routes.offsets, scale=SCALE, tiles=self.routes.tiles, **more)


# Tables of tiles


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("stack", [1, 3, 130])  # of which a program compares 128 at a time
def test_tiles_are_those_of_the_definition(device: torch.device, stack: int, partial: bool) -> None:
    torch.manual_seed(stack)
    for n_tokens, top_k in ((1, 1), (7, 2), (40, 3)):
        ids = torch.randint(-2, stack + 2, (n_tokens, top_k)) if partial else torch.randint(0, stack, (n_tokens, top_k))
        offsets = routes.make(ids.to(device), stack, partial=partial).offsets
        n_rows = n_tokens * top_k
        for block_t, start, count in ((1, 0, n_rows), (16, 0, n_rows), (4, n_rows // 3, n_rows // 2)):
            expected = routes.tile_table(offsets, block_t, start, count, partial)
            found = routed_plans.route_tiles(offsets, block_t, start, count, partial)
            assert torch.equal(found, expected), (n_tokens, top_k, block_t)


def test_a_table_is_made_by_one_launch_and_once(device: torch.device) -> None:
    work = Work(device, FP32, 3, 9, 2, 3, 4)
    with launch_hooks.noted() as names:
        work.call(routed.routed_product, work.x, work.w)
        work.call(routed.routed_backward, work.dy, work.x, work.w)
    products = ["spectra_kernel", "routed_mix_kernel"]
    tables = ["spectra_kernel", "route_tiles_kernel", "routed_mix_kernel", "results_kernel"]
    assert names == [*tables, *products, "routed_outer_kernel", "results_kernel"]


# Products


# (w's, rows, m, n, b).
SHAPES = ((3, 40, 3, 2, 3), (8, 5, 2, 3, 1), (2, 18, 1, 3, 10), (4, 18, 2, 1, 7))
# Blocks that are taken apart.
LARGE = pytest.param(FP16, 2, 3, 1, 1, 130, marks=pytest.mark.slow)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "stack", "t", "m", "n", "b"), [*oracle.in_turn(SHAPES), LARGE])
def test_products_of_both_backends(
    device: torch.device, backend: str, dtype: torch.dtype, stack: int, t: int, m: int, n: int, b: int
) -> None:
    torch.manual_seed(0)
    work = Work(device, dtype, stack, t, m, n, b)
    y = work.call(BACKENDS[backend], work.x, work.w)
    oracle.assert_close(y, work.product(work.x), dtype)
    base = work.x.clone()
    dx = work.call(BACKENDS[backend], work.dy, work.w, transpose=True, out=base)
    assert dx is base
    truth = work.product(work.dy, oracle.input_grad) + work.x.cpu().double()
    oracle.assert_close(dx, truth, dtype)


@pytest.mark.parametrize(("dtype", "stack", "t", "m", "n", "b"), [*oracle.in_turn(SHAPES, (BF16, FP32, FP16)), LARGE])
def test_gradients(device: torch.device, dtype: torch.dtype, stack: int, t: int, m: int, n: int, b: int) -> None:
    torch.manual_seed(0)
    work = Work(device, dtype, stack, t, m, n, b)
    dx, dw = work.call(routed.routed_backward, work.dy, work.x, work.w)
    oracle.assert_close(dx, work.product(work.dy, oracle.input_grad), dtype)
    oracle.assert_close(dw, work.weight_grad(), FP32, bound=oracle.BOUNDS[dtype])
    assert torch.equal(work.call(routed.routed_weight_grad, work.dy, work.x, b), dw)  # and the same bits


@contextmanager
def small_scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Spectra of 128 rows at a time."""
    with monkeypatch.context() as patch:
        patch.setattr(specs, "scratch_bytes", lambda device: 1)
        plans.clear_plans()
        yield
    plans.clear_plans()


def test_chunks_cut_through_groups(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    work = Work(device, FP32, 2, 300, 1, 2, 3)
    whole = work.call(routed.routed_product, work.x, work.w)
    with small_scratch(monkeypatch):
        y = work.call(routed.routed_product, work.x, work.w)
        dx, dw = work.call(routed.routed_backward, work.dy, work.x, work.w)
    assert len({start for _, start, _ in work.routes.kept}) == 3
    torch.testing.assert_close(y, whole)
    oracle.assert_close(dx, work.product(work.dy, oracle.input_grad), FP32)
    oracle.assert_close(dw, work.weight_grad(), FP32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_group_reach_nothing(device: torch.device, backend: str) -> None:
    """What other processes' experts compute may be anything, NaN too."""
    index = torch.tensor([[-1], [0], [3], [1], [3]], device=device)
    work = Work(device, FP32, 3, 5, 2, 3, 4)
    work.routes = routes.make(index, 3, partial=True)
    valid = work.routes.valid()
    work.x[~valid] = work.dy[~valid] = torch.nan
    y = work.call(BACKENDS[backend], work.x, work.w)
    assert y[valid].isfinite().all()
    dx, dw = work.call(routed.routed_backward, work.dy, work.x, work.w)
    assert dx[valid].isfinite().all()
    assert dw.isfinite().all()
    assert not dw[2].any()  # it has no row
    for result in (y, dx):
        assert not result[~valid].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(device: torch.device, backend: str) -> None:
    work = Work(device, FP32, 3, 0, 2, 3, 4)
    assert work.call(BACKENDS[backend], work.x, work.w).shape == (0, 8)
    dx, dw = work.call(routed.routed_backward, work.dy, work.x, work.w)
    assert dx.shape == (0, 12)
    assert torch.equal(dw, torch.zeros_like(work.w))
    assert routed_plans.route_tiles(work.routes.offsets, 16, 0, 0, True).shape == (0, 3)


def test_rows_and_stacks_may_be_views(device: torch.device) -> None:
    torch.manual_seed(0)
    work = Work(device, FP32, 3, 6, 2, 3, 4)
    expected = work.product(work.x)
    x, w = work.x.t().contiguous().t(), work.w.transpose(0, 3).contiguous().transpose(0, 3)
    for product in BACKENDS.values():
        oracle.assert_close(work.call(product, x, w), expected, FP32)


# Indices of rows in any order


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_of_many_requests_name_their_adapters_on_the_device(device: torch.device, dtype: torch.dtype) -> None:
    """Not sorted, and changed between calls as before the replay of a graph: nothing but the launches reads them."""
    torch.manual_seed(0)
    x, w = torch.randn(6, 12, device=device), torch.randn(3, 2, 3, 4, device=device)
    indices = torch.tensor([2, -1, 0, 2, 3, 1], dtype=dtype, device=device)
    for _ in range(2):
        y = grouped.indexed_product(x, w, indices, scale=SCALE)
        for row, index in enumerate(indices.tolist()):
            if 0 <= index < 3:
                oracle.assert_close(y[row : row + 1], oracle.product(x[row : row + 1], w[index], SCALE), FP32)
            else:
                assert not y[row].any()
        indices.copy_(indices.flip(0))


# No call waits for the device


class _NoCopies(TorchDispatchMode):
    """Refuses what brings a value to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::_to_copy"), func
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_by_the_host() -> None:
    pytest.importorskip("triton")
    work = Work(torch.device("cpu"), BF16, 4, 80, 2, 3, 32)
    launched: list[str] = []
    with overhead.stubbed_launches(lambda kernel, **arguments: launched.append(kernel.__name__)):
        fft_bases.transform(work.x.device, BF16, 32, "tf32")  # is lasting, and computed on the host
        with _NoCopies():
            for product in BACKENDS.values():
                work.call(product, work.x, work.w)
            work.call(routed.routed_backward, work.dy, work.x, work.w)
    assert {"route_tiles_kernel", "routed_mix_kernel", "routed_outer_kernel"} <= set(launched)


# Bad input


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    work = Work(device, FP32, 3, 6, 2, 3, 4)
    tiles, offsets = work.routes.tiles, work.routes.offsets
    for product in BACKENDS.values():
        for wrong in (offsets.long(), offsets[1:]):
            with pytest.raises(ShapeError, match="int32 offsets"):
                product(work.x, work.w, wrong, scale=SCALE, tiles=tiles)
        with pytest.raises(ShapeError, match=r"\[groups, m, n, b\]"):
            product(work.x, work.w[0], offsets, scale=SCALE, tiles=tiles)
        with pytest.raises(ShapeError, match="x has 8 features"):
            product(work.dy, work.w, offsets, scale=SCALE, tiles=tiles)
    with pytest.raises(ShapeError, match="agree in tokens"):
        work.call(routed.routed_backward, work.dy[1:], work.x, work.w)
    with pytest.raises(ShapeError, match="indices"):
        grouped.indexed_product(work.x, work.w, torch.zeros(6, device=device), scale=SCALE)


def test_a_stack_of_more_blocks_than_kernels_count_is_refused() -> None:
    cpu = torch.device("cpu")
    for shape in ((256, 7168, 4096, 1), (2**15, 2**8, 1, 1)):
        offsets = specs.Spec(torch.Size((shape[0] + 1,)), torch.int32, cpu)
        with pytest.raises(ShapeError, match="more blocks than kernels count .* larger block size"):
            routed._one(specs.Spec(torch.Size(shape), FP32, cpu), offsets)
