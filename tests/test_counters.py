"""Launches that add up their own partial sums: nothing is left behind for the next, and none meets another."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import bench_package  # noqa: F401
import graph_memory
import oracle
import pytest
import torch
from torch import Tensor

from bench import launch_hooks
from c3a_triton.operator.launch import counters, decode

pytestmark = pytest.mark.usefixtures("nan_filled")

CPU = torch.device("cpu")
# (tokens, m, n, b) of layers whose sums are split, in pieces of 16 and value by value; no step divides the first ones.
LAYERS = ((5, 1, 81, 16), (3, 9, 130, 5), (9, 3, 40, 32), (16, 2, 256, 4))


def operands(device: torch.device, t: int, m: int, n: int, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, w, bias."""
    values = (torch.randn(*shape, device=device) for shape in ((t, n * b), (m * b, n * b), (m, n, b), (m * b,)))
    return tuple(v if v.dim() == 3 else v.bfloat16() for v in values)


def idle() -> list[Tensor]:
    return [found for stack in counters._idle.values() for found in stack]


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_kept", [])
    monkeypatch.setattr(counters, "_fresh", {})
    monkeypatch.setattr(counters, "_idle", defaultdict(list))


def test_every_launch_finds_zeros_and_leaves_them(device: torch.device, deterministic: None) -> None:
    layers = [operands(device, *sizes) for sizes in LAYERS]
    results: list[list[Tensor]] = [[] for _ in layers]
    with launch_hooks.noted() as names:
        for _ in range(3):
            for found, (x, weight, w, bias) in zip(results, layers, strict=True):
                found.append(decode.decode_linear(x, weight, w, bias, scale=0.37))
                (left,) = idle()
                assert not left.any()
    assert names == ["decode_kernel"] * 3 * len(layers)
    for (first, *others), (x, weight, w, bias) in zip(results, layers, strict=True):
        expected = x.cpu().double() @ (weight.cpu().double() + oracle.dense(w, 0.37)).T + bias.cpu().double()
        oracle.assert_close(first, expected, torch.bfloat16, bound=2.1e-3)
        assert all(torch.equal(other, first) for other in others)


def test_a_launch_that_failed_leaves_nothing_to_the_next(device: torch.device) -> None:
    x, weight, w, bias = operands(device, *LAYERS[0])
    expected = decode.decode_linear(x, weight, w, bias, scale=0.37)

    def broken_off(run: Any) -> Any:
        def count_and_fail(kernel: Any, *, counters_ptr: Tensor, **arguments: Any) -> None:
            counters_ptr += 1
            raise KeyboardInterrupt

        return count_and_fail

    with launch_hooks.caught(broken_off), pytest.raises(KeyboardInterrupt):
        decode.decode_linear(x, weight, w, bias, scale=0.37)
    assert torch.equal(decode.decode_linear(x, weight, w, bias, scale=0.37), expected)


def test_launches_that_may_run_at_once_have_counters_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_LAUNCHES", 5)
    taken: list[Tensor] = []

    def take(*, held: bool = False) -> Tensor:
        found, stack = counters.take(CPU)
        assert found.shape == (counters.LENGTH,)
        assert found.dtype == torch.int32
        assert not found.any()
        assert found.data_ptr() % 16 == 0
        if not held:
            stack.append(found)
        taken.append(found)
        return found

    with graph_memory.on_cpu() as capturing, graph_memory.GraphMemory() as memory:
        stream = torch.cuda.current_stream()
        capturing.on = True
        assert take() in memory  # no call came before
        capturing.on = False
        first = take()
        assert take(held=True) is first  # whose launch is ahead in the queue
        second = take()  # another thread's, meanwhile
        stream.cuda_stream += 1
        other = take()
        capturing.on = True
        captured = [take() for _ in range(3)]
        assert [one in memory for one in (first, second, other, *captured)] == [False] * 5 + [True]
        capturing.on = False
        assert take() is other
        assert take(held=True) is other
        anew = take()
        assert anew not in memory
        # What graphs write to stays, and what threads may still launch on.
        storages = [rows.untyped_storage().data_ptr() for rows in counters._kept]
        lasting = (first, second, other, *captured[:2])
        assert {one.untyped_storage().data_ptr() for one in lasting} == {storages[0]}
        assert anew.untyped_storage().data_ptr() == storages[1]
    assert len({one.data_ptr() for one in taken}) == len(taken) - 3


@pytest.mark.gpu
def test_graphs_captured_on_one_stream_run_side_by_side(device: torch.device) -> None:
    x, weight, w, bias = operands(device, 4, 8, 32, 128)
    expected = decode.decode_linear(x, weight, w, bias, scale=0.37)
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = [decode.decode_linear(x, weight, w, bias, scale=0.37) for _ in range(16)]
        graphs.append(SimpleNamespace(graph=graph, y=y, stream=torch.cuda.Stream()))
    for _ in range(20):
        for one in graphs:
            with torch.cuda.stream(one.stream):
                one.graph.replay()
        decode.decode_linear(x, weight, w, bias, scale=0.37)
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for one in graphs for y in one.y)
