"""Measured tiles: what replaces a committed one, what a search keeps, and when none of it is used."""

from dataclasses import astuple, replace

import pytest
import torch

from c3a_triton import ConfigError, autotune, circulant_linear, dispatch, launch, tiles, tuned
from c3a_triton.tiles import TileConfig
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
    launch.clear_plans()
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
    dispatch.choose("auto", torch.device(device), torch.bfloat16, 8192, 4096, 4096, 256)
    return tiles.product_tile("sm_90", 2, 8192)


def test_the_tuned_table_s_tiles_are_used_but_not_under_deterministic_algorithms(gpu, deterministic, monkeypatch):
    committed = tiles.product_tile("sm_90", 2, 8192)
    other = replace(committed, num_warps=2)
    tuned.add({}, {tuned.TileKey(*MACHINE, *LOOKUP): astuple(other)})
    tuned.add({}, {tuned.TileKey("another", *MACHINE[1:], *LOOKUP): astuple(replace(committed, num_warps=1))})
    cleared = []
    monkeypatch.setattr(launch, "clear_plans", lambda: cleared.append(True))
    assert choose() == committed
    assert not cleared
    torch.use_deterministic_algorithms(False)
    assert choose("cpu") == committed
    assert choose() == choose() == other
    assert len(cleared) == 1
    torch.use_deterministic_algorithms(True)
    assert choose() == committed
    assert len(cleared) == 2


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_other_tiles_compute_the_same(backend, device):
    """Whatever a search may try gives the same product, in the interpreter as on a GPU."""
    x, w = torch.randn(40, 96, device=device), torch.randn(2, 3, 32, device=device)
    launch.clear_plans()
    with tiles.recorded() as asked:
        expected = circulant_linear(x, w, backend=backend)
    assert asked
    for lookup in sorted(asked, key=str):
        name, sizes = lookup
        committed = getattr(tiles, name)(*sizes)
        changed = {change(committed) for change in tile_search.variants(lookup, committed)} - {committed}
        for tile in sorted(changed, key=astuple):
            if tile.block_t == committed.block_t and device.type == "cpu":
                continue  # warps and stages mean nothing to the interpreter
            tiles.override({lookup: tile})
            launch.clear_plans()
            torch.testing.assert_close(circulant_linear(x, w, backend=backend), expected, rtol=1e-4, atol=1e-5)


def searched(timer, device):
    setting = Setting(device, torch.float32, 32, False)
    return tile_search.measure_tiles([Case(64, 64, 32, "direct")], setting, timer)


def in_use(device):
    with tiles.recorded() as asked:
        launch.clear_plans()
        circulant_linear(torch.randn(32, 64, device=device), torch.randn(2, 2, 32, device=device), backend="direct")
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


def test_variants_change_one_property_each():
    tile = TileConfig(64, 128, 64, 4, 3)
    for change in tile_search.variants(LOOKUP, tile):
        differing = sum(a != b for a, b in zip(astuple(change(tile)), astuple(tile), strict=True))
        assert differing <= 1
    assert {change(tile).block_t for change in tile_search.variants(LOOKUP, tile)} == {32, 64, 128}
    decode = {change(tile).block_t for change in tile_search.variants(("decode_tile", (4, 256)), tile)}
    assert decode == {64}
