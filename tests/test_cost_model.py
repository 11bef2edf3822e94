"""The cost model: bounds of launches, what backends are counted to move and compute, the ceilings of cards."""

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable

import bench_package  # noqa: F401
import pytest
import torch

from bench import launches as counted
from c3a_triton.benchmark.cases import LayerCase
from c3a_triton.errors import BackendError
from c3a_triton.operator import bounds, cost_model, dispatch, routes
from c3a_triton.operator.bounds import CARDS, CEILINGS, Launch
from c3a_triton.operator.cost_model import Sizes
from c3a_triton.operator.launch import routed

BF16 = torch.bfloat16
META = torch.device("meta")
NOTHING_KEPT = CEILINGS._replace(l2_bytes=0.0)
DIRECTIONS = [pytest.param(False, id="forward"), pytest.param(True, id="backward")]


# Bounds


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (Launch(4.2e6, 1e6, 1e5, 1e3, 1e12), 1e-6),
        (Launch(1e6, 9.5e6, 1e5, 1e3, 1e12), 1e-6),
        (Launch(1e6, 1e6, 3e6, 1e3, 1e12), 3e-6),
        (Launch(1e6, 1e6, 1e5, CEILINGS.instructions * 4e-6, 1e12), 4e-6),
        (Launch(1e6, 1e6, 1e5, 1e3, 1e12, chain=5e-6), 5e-6),
    ],
    ids=["memory", "L2", "FLOPs", "issue", "chain"],
)
def test_a_launch_takes_its_largest_bound(launch, expected):
    assert bounds.seconds([launch], CEILINGS) == pytest.approx(2.5e-6 + expected)
    later = launch._replace(overlaps=True)
    assert bounds.seconds([launch, later], CEILINGS) == pytest.approx(2.5e-6 + 1.5e-6 + 2 * expected)


def test_what_is_written_counts_for_more_in_the_l2_and_what_is_found_for_nothing_in_memory():
    launch = bounds.streamed(read=300.0, written=100.0, found=250.0)
    assert launch[:2] == (150.0, 300.0 + 1.73 * 100.0)


def test_cards_are_known_by_name_or_by_generation(monkeypatch):
    assert bounds.ceilings_of("NVIDIA H200", "sm_90") is bounds.ceilings_of("NVIDIA B200", "sm_100") is CEILINGS
    assert bounds.ceilings_of("NVIDIA H100 PCIe", "sm_90") is CARDS["H100 PCIe"]
    assert bounds.ceilings_of("NVIDIA A100-SXM4-80GB", "sm_80") is bounds.ceilings_of("Other", "sm_80") is CARDS["A100"]
    assert bounds.ceilings_of("NVIDIA L40S", "sm_86") is bounds.ceilings_of("NVIDIA GeForce", "sm_86") is CARDS["L40"]
    for card in CARDS.values():
        assert 2 < card.l2_bandwidth / card.bandwidth < 7
        assert card.triton_flops[4] < card.tf32_flops < card.triton_flops[2] < card.cublas_flops[2]

    cuda = torch.device("cuda")
    assert dispatch.ceilings_of(torch.device("cpu")) is CEILINGS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.ceilings_of(cuda) is CEILINGS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_machine", lambda device: ("NVIDIA L40S", "8.9", "", ""))
    assert dispatch.ceilings_of(cuda) is CARDS["L40"]


def test_the_choice_is_made_for_the_card(monkeypatch):
    """Memory of an L40S is so slow that what writes ΔW or spectra loses for longer, or wins for less."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choices = {}
    for name, capability in (("NVIDIA H200", "9.0"), ("NVIDIA L40S", "8.9")):
        monkeypatch.setattr(dispatch, "_machine", lambda device, card=(name, capability): (*card, "", ""))
        sizes = [Sizes(1 << bits, 4096, 4096, 128, BF16) for bits in range(15)]
        choices[name] = [dispatch.cheapest(size) for size in sizes]
        at = dispatch.ceilings_of(sizes[0].device)
        assert choices[name] == [dispatch.cheapest(size, ceilings=at) for size in sizes]
    assert choices["NVIDIA H200"] != choices["NVIDIA L40S"]


# What is counted


@pytest.mark.parametrize(
    ("backend", "backward"), [*itertools.product(("direct", "expand", "torch", "fft"), (False, True)), ("fold", False)]
)
@pytest.mark.parametrize(
    "case", [LayerCase(8192, 4096, 1024, 128), LayerCase(4096, 1024, 512, 64), LayerCase(64, 4096, 4096, 128)], ids=str
)
def test_bytes_and_launches_are_those_of_a_layer_that_is_run(backend, case, backward):
    """Against every launch of a layer, intercepted, less the base's product, which reads what it adds to."""
    pytest.importorskip("triton")
    found = counted.step(f"ours:{backend}", case)[backward]
    sizes = Sizes(case.n_tokens, case.in_features, case.out_features, case.b, BF16)
    launches = cost_model.launches(backend, sizes, backward=backward, ceilings=NOTHING_KEPT)
    t, n, m = case.n_tokens, *((case.out_features, case.in_features) if backward else sizes[1:3])
    base = 2 * (t * n + n * m + t * m) + (0 if backend == "fold" else 2 * t * m)
    sums_in_parts = found.names.count("sum_partials_kernel")  # as many as fill a card: the model has them in one
    assert len(launches) == len(found.names) - 1
    assert sum(launch.hbm_bytes for launch in launches) == pytest.approx(
        found.n_bytes - base, rel=0.15 if sums_in_parts else 0.05
    )


@pytest.mark.parametrize("n_tokens", [1, 16])
def test_decode_is_counted_as_it_is_run(n_tokens):
    pytest.importorskip("triton")
    found = counted.step("ours:direct", LayerCase(n_tokens, 4096, 4096, 128))[0]
    (launch,) = cost_model.launches("decode", Sizes(n_tokens, 4096, 4096, 128, BF16))
    assert found.names == ["decode_kernel"]
    assert launch.hbm_bytes == found.n_bytes


@pytest.mark.parametrize("rows", [64, 2048])
@pytest.mark.parametrize(("backend", "backward"), [*itertools.product(("direct", "fft"), (False, True))])
def test_rows_of_a_stack_are_counted_as_they_are_run(backend, backward, rows):
    pytest.importorskip("triton")
    stack, n, m, b = 16, 1024, 512, 64
    of = routes.uniform(stack, rows // stack, META)
    x, dy = (torch.empty(rows, width, dtype=BF16, device=META) for width in (n, m))
    w = torch.empty(stack, m // b, n // b, b, device=META)
    routing = {"scale": 1.0, "tiles": of.tiles}
    with counted._counted() as found:
        if not backward:
            (routed.routed_direct if backend == "direct" else routed.routed_product)(x, w, of.offsets, **routing)
        elif backend == "fft":
            routed.routed_backward(dy, x, w, of.offsets, **routing)
        else:
            routed.routed_direct(dy, w, of.offsets, transpose=True, **routing)
            routed.routed_weight_grad(dy, x, b, of.offsets, **routing)
    sizes = Sizes(rows // stack, n, m, b, BF16)
    launches = cost_model.routed_launches(backend, sizes, stack, rows, backward=backward, ceilings=NOTHING_KEPT)
    names = [name for name in found.names if name != "route_tiles_kernel"]
    assert len(launches) == len(names)
    assert sum(launch.hbm_bytes for launch in launches) == pytest.approx(found.n_bytes, rel=0.06)


@pytest.mark.parametrize("backward", DIRECTIONS)
def test_more_rows_of_a_stack_take_longer_and_few_take_the_direct_way(backward):
    of_one, stack = Sizes(0, 2048, 1536, 128, BF16), 128
    for backend in cost_model.ROUTED:
        times = [
            bounds.seconds(
                cost_model.routed_launches(
                    backend, of_one._replace(n_tokens=routes.share(stack, rows)), stack, rows, backward=backward
                ),
                CEILINGS,
            )
            for rows in (1, 8, 64, 512, 4096, 32768)
        ]
        assert times == sorted(times)
    chosen = [dispatch.cheapest_routed(of_one._replace(n_tokens=rows), stack, backward=backward) for rows in (8, 65536)]
    assert chosen == ["direct", "fft"]


def test_a_stack_of_one_is_one_w():
    sizes = Sizes(4096, 2048, 1024, 64, BF16)
    found = cost_model.routed_launches("fft", sizes, 1, 4096)
    for launch, expected in zip(found, cost_model.launches("fft", sizes), strict=True):
        assert (launch.hbm_bytes, launch.flops) == (expected.hbm_bytes, expected.flops)


def test_what_is_unknown_over_a_stack_is_refused():
    with pytest.raises(BackendError, match="no backend 'expand' over a stack: 'direct', 'fft'"):
        cost_model.routed_launches("expand", Sizes(8, 2048, 1536, 128, BF16), 128, 64)


def fft_launches(sizes, backward, q):
    """The path's launches by their tensors in memory and their matrix products, blocks being of q values."""
    t, n, m, b, dtype, _ = sizes

    def tensor(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device=META)

    x, y, w = tensor(t, n), tensor(t, m), tensor(m // b, n // b, b, dtype=torch.float32)
    z, y_hat = (tensor(q // 2, t, 2 * width // q) for width in (n, m))
    blocks = tensor(q // 2, 2 * m // q, 2 * n // q)
    transform_x, transform_y = ([(t * width // q, q, q)] for width in (n, m))
    mix = [(t, 2 * n // q, 2 * m // q)] * (q // 2)
    if not backward:
        return [([w, blocks, x, z], transform_x), ([z, y_hat], mix), ([y_hat, y], transform_y)]
    dx_hat = z
    return [
        ([w, blocks, y, y_hat, x, z], transform_x + transform_y),
        ([y_hat, z, dx_hat], 2 * mix),
        ([dx_hat, x, w], transform_x),
    ]


@pytest.mark.parametrize(
    ("b", "q"), [(64, 64), (128, 128), (256, 128), (1024, 128), (768, 96), (192, 96), (96, 96)], ids=str
)
@pytest.mark.parametrize("backward", DIRECTIONS)
def test_the_spectral_path_is_counted_in_three_launches(b, q, backward):
    sizes = Sizes(8192, 3072, 3072, b, BF16)
    launches = cost_model.launches("fft", sizes, backward=backward, ceilings=NOTHING_KEPT)
    expected = fft_launches(sizes, backward, q)
    assert len(launches) == 3
    for launch, (tensors, products) in zip(launches, expected, strict=True):
        # Without w's matrices read again, and the parts of the sums that become dw.
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        assert n_bytes <= launch.hbm_bytes < 1.06 * n_bytes
        assert launch.flops == pytest.approx(sum(2 * math.prod(sides) for sides in products))
        assert launch.overlaps
        assert launch.l2_bytes > launch.hbm_bytes


def test_where_one_kernel_has_no_room_both_products_are_launched_alone():
    fused = [
        len(cost_model.launches("fft", Sizes(8192, width, width, b, dtype), backward=True, ceilings=at))
        for at, width, b, dtype in (
            (CEILINGS, 4096, 64, BF16),
            (CEILINGS, 8192, 64, BF16),
            (CEILINGS, 4096, 64, torch.float32),
            (CARDS["A100"], 4096, 64, BF16),
            (CARDS["A100"], 4096, 128, BF16),
        )
    ]
    assert fused == [3, 4, 4, 4, 3]


@pytest.mark.parametrize("backward", DIRECTIONS)
def test_a_spectrum_that_is_there_is_not_computed(backward):
    sizes = Sizes(8192, 4096, 1024, 128, BF16)
    with_it, without = (
        cost_model.launches("fft", sizes, backward=backward, has_spectrum=has, ceilings=NOTHING_KEPT)
        for has in (True, False)
    )
    # x is read, its spectrum written; nothing else changes.
    spared = [a.hbm_bytes - b.hbm_bytes for a, b in zip(without, with_it, strict=True)]
    assert spared == [4 * 8192 * 4096, 0, 0]
    assert without[0].flops - with_it[0].flops == 2 * 128 * 8192 * 4096


def lru(n_bytes: float, streams: Iterable[list[tuple[str, bool, int]]]) -> float:
    """Bytes that memory moves behind an LRU cache of lines of 64 KB: (tensor, written, line), read lines leaving first.

    What is written is written back when it leaves.
    """
    first: OrderedDict[tuple[str, int], bool] = OrderedDict()
    rest: OrderedDict[tuple[str, int], bool] = OrderedDict()
    moved = 0
    for stream in streams:
        for name, written, line in stream:
            key = (name, line)
            held = next((queue for queue in (first, rest) if key in queue), None)
            dirty = held.pop(key) if held is not None else False
            moved += held is None and not written
            while len(first) + len(rest) >= n_bytes / 65536:
                moved += (first or rest).popitem(last=False)[1]
            (rest if written else first)[key] = dirty or written
    return moved * 65536.0


@pytest.mark.parametrize("l2_bytes", [24e6, 40e6])
@pytest.mark.parametrize("kept", [False, True], ids=["", "spectrum kept"])
def test_what_is_found_in_the_l2_is_about_what_an_lru_cache_holds(l2_bytes, kept):
    t, width = 8192, 4096
    lines = 2 * t * width // 65536
    up, down = range(lines), range(lines - 1, -1, -1)

    def walk(order, *tensors):
        return [(name.lower(), name.isupper(), line) for line in order for name in tensors]

    def interleaved(*tensors):
        """Four runs of tokens side by side."""
        order = (run * lines // 4 + i for i in range(lines // 4) for run in range(4))
        return walk(order, *tensors)

    other = walk(range(4 * lines), "O")
    forward = [walk(down, "x", "Z"), walk(up, "z", "Y"), walk(down, "y", "D")]
    spectra = walk(down, "g", "F") if kept else walk(down, "g", "F", "x", "Z")
    backward = [spectra, interleaved("f", "z", "E"), walk(down, "e", "H")]
    at = CEILINGS._replace(l2_bytes=l2_bytes)
    for streams, before, direction in ((forward, walk(up, "X"), False), (backward, walk(up, "G"), True)):
        expected = lru(l2_bytes, [other, before, *streams]) - lru(l2_bytes, [other, before])
        sizes = Sizes(t, width, width, 128, BF16)
        launches = cost_model.launches("fft", sizes, backward=direction, has_spectrum=kept and direction, ceilings=at)
        assert sum(launch.hbm_bytes for launch in launches) == pytest.approx(expected, rel=0.08)


def test_spectra_that_fit_stay_in_the_l2():
    small, large = (Sizes(n_tokens, 1024, 1024, 128, BF16) for n_tokens in (1024, 65536))
    x = 2 * 1024 * 1024
    _, mix, results = cost_model.launches("fft", small)
    assert (mix.hbm_bytes, results.hbm_bytes) == (0.0, x)
    # On an L40S, which computes in chunks for that, all of them do.
    card = CARDS["L40"]
    launches = cost_model.launches("fft", large, ceilings=card)
    assert len(launches) == 3 * math.ceil(2 * 64 * x / card.l2_bytes)
    blocks, w = 4 * 1024 * 1024 / 128, 4 * 1024 * 1024 / 128
    assert sum(launch.hbm_bytes for launch in launches) == pytest.approx(
        2 * 64 * x - card.l2_bytes + len(launches) // 3 * (blocks + w), rel=1e-6
    )


@pytest.mark.parametrize("family", CARDS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_more_tokens_take_no_less_time(family, dtype):
    at = CARDS[family]
    for shape, backward in itertools.product(((4096, 4096, 128), (3072, 1024, 64), (1024, 4096, 16)), (False, True)):
        for backend in dispatch.AUTO_BACKENDS:
            # From few to many tokens, direct changes its kernel.
            tokens = [17, 24, 100, 128, 129, 512, 848, 1000, 1465, 3072, 8192, 16000, 32768]
            sizes = [Sizes(n_tokens, *shape, dtype) for n_tokens in tokens]
            times = [cost_model.predicted_seconds(backend, size, backward=backward, ceilings=at) for size in sizes]
            assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(times)), (shape, backend, times)
            assert times[-1] > 2 * times[0]


def test_few_tokens_add_next_to_nothing_to_a_16_bit_layer():
    for n_tokens, width in ((1, 4096), (16, 8192)):
        sizes = Sizes(n_tokens, width, width, 128, BF16)
        assert 0 < cost_model.added_seconds("direct", sizes) < 0.02 * cost_model.base_seconds(sizes)
        for changed, backward in ((sizes, True), (sizes._replace(dtype=torch.float32), False)):
            alone = cost_model.predicted_seconds("direct", changed, backward=backward)
            assert cost_model.added_seconds("direct", changed, backward=backward) == alone > 2 * 2.5e-6


def test_unknown_backends_are_refused():
    sizes = Sizes(8, 64, 64, 8, BF16)
    with pytest.raises(BackendError, match="knows no backend 'reference'"):
        cost_model.launches("reference", sizes)
    with pytest.raises(BackendError, match="knows no backward of backend 'decode'"):
        cost_model.predicted_seconds("decode", sizes, backward=True)


# Python's time


@pytest.mark.parametrize(("per_launch", "changes"), [(3e-6, False), (10e-6, True)])
def test_python_s_time_per_launch_would_change_no_choice(per_launch, changes):
    """As docs/backends.md says: not where a compiled kernel is launched directly, only where Triton's own Python is."""

    def eager(name, sizes, backward):
        count = len(cost_model.launches(name, sizes, backward=backward)) + 1
        gpu = cost_model.base_seconds(sizes) + cost_model.predicted_seconds(name, sizes, backward=backward)
        return max(gpu, count * per_launch)

    shapes = ((1024, 1024, 128), (3072, 3072, 64), (3072, 1024, 64), (4096, 4096, 32), (4096, 4096, 128))
    differ = 0
    for shape, bits, backward in itertools.product(shapes, range(5, 14), (False, True)):
        sizes = Sizes(1 << bits, *shape, BF16)
        by_both = min(dispatch.AUTO_BACKENDS, key=lambda name: eager(name, sizes, backward))
        differ += by_both != dispatch.cheapest(sizes, backward=backward)
    assert (differ > 0) == changes
