"""Measured tiles: what replaces a committed one, what a search keeps, and when none of it is used."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, replace
from unittest import mock

import bench_package  # noqa: F401
import pytest
import torch

from bench import kernel_cases, overhead
from c3a_triton import ConfigError, autotune, circulant_linear
from c3a_triton.benchmark import gate
from c3a_triton.operator import dispatch, tuned
from c3a_triton.operator.cost_model import Sizes
from c3a_triton.operator.launch import plans, tiles
from c3a_triton.operator.launch.tiles import TileConfig
from c3a_triton.tuning import tile_search
from c3a_triton.tuning.costs import Case, Setting

MACHINE = ("NVIDIA Test", "9.0", "2.13.0", "3.9.0")
LOOKUP = ("product_tile", ("sm_90", 2, 8192))


@pytest.fixture(autouse=True)
def _committed_tiles(tmp_path, monkeypatch):
    monkeypatch.setenv("C3A_TRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("C3A_TRITON_BACKEND", raising=False)
    dispatch.refresh()
    yield
    tiles.override({})
    plans.clear_plans()
    dispatch.refresh()


def test_an_override_holds_for_a_power_of_two_of_tokens():
    committed = tiles.product_tile("sm_90", 2, 8192)
    other = replace(committed, num_stages=committed.num_stages + 1)
    assert tiles.override({LOOKUP: other})
    assert not tiles.override({LOOKUP: other})
    assert tiles.product_tile("sm_90", 2, 8192) == tiles.product_tile("sm_90", 2, 4097) == other
    assert tiles.product_tile("sm_90", 2, 4096) == committed
    assert tiles.product_tile("sm_90", 4, 8192) != other
    assert tiles.override({})
    assert tiles.product_tile("sm_90", 2, 8192) == committed


def test_what_is_asked_for_is_recorded():
    with tiles.recorded() as asked:
        tiles.product_tile("sm_90", 2, 5000)
        tiles.decode_tile(3, 256)
        tiles.mix_tile("sm_90", 2, 100, 64, 64)
    tiles.outer_tile("sm_90", 2, 64, 64)
    assert asked == {LOOKUP, ("decode_tile", (4, 256)), ("mix_tile", ("sm_90", 2, 128, 64, 64))}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as the choice can tell."""
    monkeypatch.setattr(dispatch, "why_not", lambda *args: None)
    monkeypatch.setattr(dispatch, "_machine", lambda device: MACHINE)


def choose(device="cuda"):
    dispatch.choose("auto", Sizes(8192, 4096, 4096, 256, torch.bfloat16, torch.device(device)))
    return tiles.product_tile("sm_90", 2, 8192)


def test_the_tuned_table_s_tiles_are_used_but_not_under_deterministic_algorithms(gpu, deterministic, monkeypatch):
    committed = tiles.product_tile("sm_90", 2, 8192)
    other = replace(committed, num_warps=2)
    tuned.add({}, {tuned.TileKey(*MACHINE, *LOOKUP): astuple(other)})
    tuned.add({}, {tuned.TileKey("another", *MACHINE[1:], *LOOKUP): astuple(replace(committed, num_warps=1))})
    cleared = []
    monkeypatch.setattr(plans, "clear_plans", lambda: cleared.append(True))
    assert choose() == committed
    assert not cleared
    torch.use_deterministic_algorithms(False)
    assert choose("cpu") == committed
    assert choose() == choose() == other
    assert len(cleared) == 1
    torch.use_deterministic_algorithms(True)
    assert choose() == committed
    assert len(cleared) == 2


def test_threads_that_begin_on_several_devices_at_once_wait_for_the_table(gpu, monkeypatch):
    """As those of a DataParallel do: the first of them reads the table, which takes a while."""
    committed = tiles.product_tile("sm_90", 2, 8192)
    other = replace(committed, num_warps=2)
    tuned.add({}, {tuned.TileKey(*MACHINE, *LOOKUP): astuple(other)})
    reading, go_on = threading.Event(), threading.Event()
    load = tuned.load

    def slow():
        reading.set()
        go_on.wait(10)
        return load()

    monkeypatch.setattr(tuned, "load", slow)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(choose, "cuda:0")]
        reading.wait(10)
        found += [pool.submit(choose, f"cuda:{i}") for i in (0, 1, 2)]
        threading.Timer(0.1, go_on.set).start()
        assert [one.result() for one in found] == [other] * 4


@pytest.mark.parametrize("other_card", [False, True])
def test_all_devices_follow_the_switch_to_deterministic_algorithms(other_card, gpu, deterministic, monkeypatch):
    cards = {0: MACHINE, 1: ("another", *MACHINE[1:]) if other_card else MACHINE}
    monkeypatch.setattr(dispatch, "_machine", lambda device: cards[device.index])
    committed = tiles.product_tile("sm_90", 2, 8192)
    other = replace(committed, num_warps=2)
    tuned.add({}, {tuned.TileKey(*MACHINE, *LOOKUP): astuple(other)})
    torch.use_deterministic_algorithms(False)
    assert choose("cuda:0") == other
    both = committed if other_card else other
    assert choose("cuda:1") == choose("cuda:0") == both
    for first, second in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")):
        torch.use_deterministic_algorithms(True)
        assert choose(first) == choose(second) == committed
        torch.use_deterministic_algorithms(False)
        assert choose(second) == choose(first) == both


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_plans_that_are_cleared_ask_for_tiles_again_and_take_others(backend, device):
    """In the forward and in the backward, so that a search measures what it means to measure."""
    x = torch.randn(20, 24, device=device, requires_grad=True)
    w = torch.randn(2, 3, 8, device=device, requires_grad=True)
    family = "transform_tile" if backend == "fft" else "product_tile"

    def forward():
        return circulant_linear(x, w, backend=backend)

    y = forward()
    for call in (forward, lambda: torch.autograd.grad(y, (x, w), y, retain_graph=True)):
        call()
        with tiles.recorded() as asked:
            call()
        assert not asked  # plans are kept
        plans.clear_plans()
        with tiles.recorded() as asked:
            call()
        (lookup, *_) = sorted(lookup for lookup in asked if lookup[0] == family)
        for field in ("block_t", "block_o"):
            tile = next(tiles.candidates(lookup, varied=(field,)))
            tiles.override({lookup: tile})
            plans.clear_plans()
            with launch_arguments() as given:
                call()
            assert tile.block_t in {found.get("BLOCK_R", found.get("BLOCK_T")) for found in given}
            assert tile.block_o in {found.get("BLOCK_C", found.get("BLOCK_O")) for found in given}
        tiles.override({})
        plans.clear_plans()


@contextmanager
def launch_arguments():
    """The keyword arguments of launches made meanwhile."""
    given = []

    def noting(run):
        return lambda kernel, *args, **kwargs: (given.append(kwargs), run(kernel, *args, **kwargs))[1]

    kernel_class = type(plans.kernels().direct.table_kernel)
    with mock.patch.object(kernel_class, "run", noting(kernel_class.run)):
        yield given


def test_cards_that_were_tuned_differently_take_committed_tiles(gpu, monkeypatch):
    other = replace(tiles.product_tile("sm_90", 2, 8192), num_warps=2)
    machines = {0: MACHINE, 1: MACHINE, 2: ("another", *MACHINE[1:])}
    monkeypatch.setattr(dispatch, "_machine", lambda device: machines[device.index])
    committed = tiles.product_tile("sm_90", 2, 8192)
    tuned.add({}, {tuned.TileKey(*MACHINE, *LOOKUP): astuple(other)})
    assert [choose(f"cuda:{i}") for i in (0, 1, 0, 2, 0, 1)] == [other] * 3 + [committed] * 3


# Every candidate of every lookup, between guards


def lookups(case, device):
    plans.clear_plans()
    with tiles.recorded() as asked:
        kernel_cases.check(case, device)
    return sorted(asked, key=str)


def check_candidates(case, device, *, families=tuple(tiles._committed), extremes=False):
    """Check a case with every candidate of what it asks for; with `extremes` the least and the most of each extent."""
    for lookup in lookups(case, device):
        name, sizes = lookup
        if name not in families:
            continue
        committed = getattr(tiles, name)(*sizes)
        too_large = pytest.importorskip("triton.runtime.errors").OutOfResources
        # Warps and stages mean nothing to the interpreter.
        for field in tiles.FIELDS if device.type == "cuda" else tiles.FIELDS[:3]:
            found = sorted(tiles.candidates(lookup, varied=(field,)), key=astuple)
            for tile in dict.fromkeys((found[0], found[-1])) if extremes and found else found:
                tiles.override({lookup: tile})
                assert getattr(tiles, name)(*sizes) == tile != committed
                plans.clear_plans()
                try:
                    kernel_cases.check(case, device)
                except gate.GateError as error:
                    raise AssertionError(f"{lookup} {tile}: {error}") from error
                except too_large:
                    assert device.type == "cuda"  # refused before it ran
        tiles.override({})
        plans.clear_plans()


def case(operator, *sizes, dtype="float32", options=""):
    return kernel_cases.Case(operator, *sizes, dtype, frozenset(options.split()))


# Together every function of the table, and each of its kernels. Results are right, and so is what lies around them.
SMALL = (
    ("product_tile", case("direct", 18, 2, 1, 24, options="bias")),
    ("product_tile", case("direct", 18, 3, 2, 5, dtype="bfloat16")),
    ("hankel_tile", case("direct", 3, 2, 5, 24, options="bias")),
    ("hankel_tile", case("rows", 2, 3, 2, 5, dtype="float16")),
    ("weight_grad_tile", case("weight_grad", 17, 2, 1, 5)),
    ("diagonal_tile", case("weight_grad", 17, 1, 1, 72, dtype="float16")),
    ("diagonal_tile", case("weight_grad", 17, 1, 1, 128)),
    ("decode_tile", case("decode", 3, 1, 2, 16, dtype="bfloat16")),
    ("decode_tile", case("decode", 3, 2, 3, 5, dtype="float16")),
    ("transform_tile", case("fft", 3, 1, 2, 18, options="bias")),
    ("mix_tile", case("fft", 3, 20, 33, 1)),
    ("outer_tile", case("fft_weight_grad", 3, 20, 33, 2)),
    ("mix_outer_tile", case("fft_backward", 19, 3, 2, 32, dtype="bfloat16")),
)


@pytest.mark.parametrize(("family", "case"), SMALL, ids=lambda value: getattr(value, "key", value))
def test_candidates_are_right_and_stay_in_their_tensors(family, case, device, monkeypatch):
    check_candidates(case, device, families=(family,), extremes=True)


def test_small_cases_ask_for_their_tiles(monkeypatch):
    pytest.importorskip("triton")
    for family, one in SMALL:
        plans.clear_plans()
        nothing_computed = pytest.raises(gate.GateError)
        with tiles.recorded() as asked, overhead.stubbed_launches(), nothing_computed:
            kernel_cases.check(one, torch.device("cpu"))
        assert family in {name for name, _ in asked}
    assert {family for family, _ in SMALL} == set(tiles._committed)


@pytest.mark.nightly
@pytest.mark.parametrize("case", kernel_cases.CASES, ids=lambda case: case.key)
def test_every_candidate_of_every_case(case, device):
    check_candidates(case, device)


def test_candidates():
    """One change each: an extent within the bounds, the warps or the stages; as many as a search has time for."""
    examples = [
        ("product_tile", ("sm_90", 2, 8192)),
        ("hankel_tile", (2, 128)),
        ("decode_tile", (4, 256)),
        ("decode_tile", (16, 25)),
        ("diagonal_tile", ("sm_90", 2, 256)),
        ("weight_grad_tile", ("sm_90", 4)),
        ("transform_tile", ("sm_90", 2, 128, 2)),
        ("mix_tile", ("sm_90", 2, 8192, 64, 64)),
        ("outer_tile", ("sm_90", 4, 64, 64)),
        ("mix_outer_tile", ("sm_90", 2, 64, 64)),
    ]
    assert {name for name, _ in examples} == set(tiles._committed)
    for lookup in examples:
        committed = getattr(tiles, lookup[0])(*lookup[1])
        found = list(tiles.candidates(lookup))
        assert 5 <= len(found) == len(set(found)) <= 20, lookup
        for tile in found:
            changed = {name for name in tiles.FIELDS if getattr(tile, name) != getattr(committed, name)}
            assert len(changed) == 1 or (changed == {"block_o", "block_i"} and tile.block_o == tile.block_i)
            assert tiles._fits(lookup, tile)
        assert set(found) == {t for name in tiles.FIELDS for t in tiles.candidates(lookup, varied=(name,))}
    tile = TileConfig(64, 32, 32, 4, 3)
    found = list(tiles.candidates(examples[0], tile, ("block_t", "num_warps")))
    assert [t.block_t for t in found] == [16, 32, 128, 256, 64, 64]
    assert {t.block_o for t in found} == {32}


def test_a_tile_outside_of_its_bounds_is_not_taken():
    """Whoever wrote the table: a damaged file or an older version's must not make kernels write past their tensors."""
    for lookup, changes in (
        (("transform_tile", ("sm_90", 2, 128, 2)), {"block_t": 256}),
        (("transform_tile", ("sm_90", 2, 128, 2)), {"block_o": 256}),
        (("product_tile", ("sm_90", 2, 8192)), {"block_o": 96}),
        (("diagonal_tile", ("sm_90", 2, 256)), {"block_i": 64}),
        (("weight_grad_tile", ("sm_90", 2)), {"block_o": 32, "block_i": 32}),
        (("decode_tile", (4, 256)), {"block_t": 2}),
        (("transform_tile", ("sm_90", 2, 128, 64)), {"block_t": 32}),
        (("mix_outer_tile", ("sm_90", 2, 96, 64)), {"block_o": 64}),
    ):
        name, sizes = lookup
        tiles.override({})
        committed = getattr(tiles, name)(*sizes)
        tiles.override({lookup: replace(committed, **changes)})
        assert getattr(tiles, name)(*sizes) == committed, lookup
        tiles.override({lookup: replace(committed, num_warps=16)})
        assert getattr(tiles, name)(*sizes).num_warps == 16


def searched(timer, device):
    setting = Setting(device, torch.float32, 17, False)
    return tile_search.measure_tiles([Case(16, 16, 8, "direct")], setting, timer)


def in_use(device):
    with tiles.recorded() as asked:
        plans.clear_plans()
        circulant_linear(torch.randn(17, 16, device=device), torch.randn(2, 2, 8, device=device), backend="direct")
    ((name, sizes),) = asked
    return (name, sizes), getattr(tiles, name)(*sizes)


def test_a_search_keeps_the_fastest_and_is_not_repeated(device):
    lookup, committed = in_use(device)

    def timer(call):
        call()
        tile = in_use(device)[1]
        return 1.0 + abs(tile.num_stages - 5) + abs(tile.num_warps - 8)

    assert searched(timer, device) == 1
    best = replace(committed, num_stages=5, num_warps=8)
    assert {key[4:]: tile for key, tile in tuned.load().tiles.items()} == {lookup: astuple(best)}
    assert in_use(device)[1] == best
    assert searched(lambda call: pytest.fail("measured again"), device) == 0


def constants(launch):
    """What of a launch is decided by its tile: constants of the kernel, warps, stages."""
    return tuple((name, launch[name]) for name in sorted(launch) if name.isupper() or name.startswith("num_"))


def test_a_search_over_spectra_times_another_launch_each_time(device, monkeypatch):
    """A plan that outlived the tile it was made from would be timed over and over. Launches do nothing here."""
    monkeypatch.setattr(tile_search, "_same", lambda *args: True)
    given, timed = [], []

    def timer(call):
        given.clear()
        call()
        timed.append(tuple(map(constants, given)))
        return float(len(timed))  # slower and slower: variants are of the committed tile

    setting = Setting(device, torch.float32, 32, True)
    with overhead.stubbed_launches(lambda kernel, *args, **kwargs: given.append(kwargs)):
        n_lookups = tile_search.measure_tiles([Case(64, 64, 32, "fft")], setting, timer)
    assert n_lookups == 3  # transforms, products and sums per frequency
    # Every lookup begins with the committed tiles, of the forward or of the backward.
    assert len(set(timed)) == len(timed) - n_lookups + 2 > 20


@pytest.mark.parametrize("backend", ["direct", "fft", "expand"])
def test_deterministic_algorithms_drop_tuned_tiles_of_every_backend(backend, gpu, device, deterministic):
    x = torch.randn(20, 24, device=device, requires_grad=True)
    w = torch.randn(2, 3, 8, device=device, requires_grad=True)
    cuda = Sizes(20, 24, 16, 8, torch.float32, torch.device("cuda"))

    def launched():
        dispatch.choose("auto", cuda)  # by which tiles follow the switch
        given.clear()
        y = circulant_linear(x, w, backend=backend)
        torch.autograd.grad(y.sum(), (x, w))
        return [constants(one) for one in given]

    plans.clear_plans()
    with launch_arguments() as given:
        with tiles.recorded() as asked:
            committed = launched()
        measured = {lookup: next(tiles.candidates(lookup, varied=("num_warps",))) for lookup in asked}
        tuned.add({}, {tuned.TileKey(*MACHINE, *lookup): astuple(tile) for lookup, tile in measured.items()})
        dispatch.refresh()
        torch.use_deterministic_algorithms(False)
        others = launched()
        assert len(asked) >= (1 if backend == "expand" else 2)
        assert sum(one != other for one, other in zip(committed, others, strict=True)) >= len(asked)
        torch.use_deterministic_algorithms(True)
        assert launched() == committed


def test_equally_fast_and_failing_and_wrong_tiles_are_not_taken(device, monkeypatch):
    _, committed = in_use(device)
    assert searched(lambda call: 1.0, device) == 1
    assert tuple(tuned.load().tiles.values()) == (astuple(committed),)
    tuned.clear()
    dispatch.refresh()

    def timer(call):
        if in_use(device)[1].num_warps != committed.num_warps:
            raise RuntimeError("out of resources")
        return 1.0

    with pytest.warns(UserWarning, match="cannot be used: RuntimeError"):
        searched(timer, device)
    assert tuple(tuned.load().tiles.values()) == (astuple(committed),)
    tuned.clear()
    dispatch.refresh()
    monkeypatch.setattr(tile_search, "_same", lambda *args: False)
    with pytest.warns(UserWarning, match="gives other results"):
        searched(lambda call: 0.5 if in_use(device)[1] != committed else 1.0, device)
    assert tuple(tuned.load().tiles.values()) == (astuple(committed),)


def test_results_are_compared():
    one = (torch.tensor([1.0, 2.0]),)
    assert tile_search._same(one, (torch.tensor([1.0, 2.00001]),), 1e-4)
    assert not tile_search._same((torch.tensor([1.0, 2.01]),), one, 1e-4)
    assert not tile_search._same((torch.tensor([1.0, float("nan")]),), one, 1e-4)


def test_tiles_are_not_predicted():
    with pytest.raises(ConfigError, match="on a GPU"):
        autotune(torch.nn.Sequential(torch.nn.Linear(8, 8)), 64, target_modules="all-linear", measure=False, tiles=True)
