"""Launches one by one, tiles one by one, Nsight Compute: with stand-ins for what only a GPU machine has."""

import json
import random
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bench_package  # noqa: F401
import pytest
import torch
from torch.autograd import DeviceType

from bench import gpu, kernel_cases, ncu, op, overhead, profiled, report, runs, tile_sweep
from c3a_triton.benchmark import cases, timing
from c3a_triton.operator.launch import direct, plans, specs, tiles

pytest.importorskip("triton")

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


@pytest.fixture(autouse=True)
def _committed_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which a rehearsal sets
    # The job's watchdog would outlive the test.
    monkeypatch.setattr(runs.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)
    yield
    tiles.override({})
    plans.clear_plans()


def _setting(tmp_path: Path, device: torch.device = CPU, **more: Any) -> runs.Setting:
    return runs.Setting(device, timing.CpuTimer(repeats=1), (), tiny=True, scratch=tmp_path, **more)


@contextmanager
def _on_sm_90(launched: Callable[..., None]) -> Iterator[None]:
    """What an H100 would launch, replaced: for calls on "meta"."""
    with (
        overhead.stubbed_launches(launched),
        mock.patch.object(specs, "card_of", return_value="sm_90"),
    ):
        yield


# Bytes


def _moved(case: profiled.Profiled) -> dict[str, list[tuple[str, int]]]:
    """(kernel, bytes) of every launch of each call, at full size."""
    found: dict[str, list[tuple[str, int]]] = {}

    def note(kernel: Any, **arguments: Any) -> None:
        found[name].append((kernel.__name__, profiled._bytes(kernel.__name__, arguments)))

    with _on_sm_90(note):
        for name, call in profiled.calls(case, META).items():
            found[name] = []
            call()
    return found


def test_bytes_of_launches_are_those_of_their_own_tokens() -> None:
    """4096→14336 is worked off in chunks, whose launches get the whole spectrum of x and read their part of it."""
    sizes = n_tokens, in_features, out_features, b = 8192, 4096, 14336, 128
    found = _moved(profiled.Profiled("fft", cases.LayerCase(*sizes)))["forward"]
    names = [name for name, _ in found]
    assert names == ["spectra_kernel"] + ["mix_kernel", "results_kernel"] * 2
    x, y, basis = 2 * n_tokens * in_features, 2 * n_tokens * out_features, 2 * 128 * 128
    w = in_features * out_features // b
    blocks = 2 * 4 * w // 2  # complex and so four reals for each of half the frequencies
    of_both, *chunks = (moved for _, moved in found)
    assert of_both == 4 * w + blocks + 2 * basis + 2 * x + basis
    assert sum(chunks[0::2]) == x + y + 2 * blocks
    assert sum(chunks[1::2]) == 2 * y + 2 * basis


def test_bytes_of_a_backward_pass() -> None:
    """dy's spectrum is read once, for dx and dw."""
    n_tokens, features, b = 8192, 4096, 256
    found = _moved(profiled.Profiled("fft", cases.LayerCase(n_tokens, features, features, b)))["backward"]
    assert [name for name, _ in found] == ["spectra_kernel", "outer_kernel", "results_kernel"]
    x, w = 2 * n_tokens * features, features**2 // b
    slots, rows, basis = 64, 2 * 16 * 2, 128 * 128  # 16 blocks of 256 are 32 of 128
    blocks, sums = slots * rows**2, 4 * slots * rows**2  # four splits of float32
    spectra, products, results = (moved for _, moved in found)
    assert spectra == 4 * w + 4 * basis + 2 * blocks + 2 * x + 2 * x + 2 * basis
    assert products == 3 * x + 2 * blocks + 4 * sums
    assert results == 2 * x + 2 * basis + 4 * sums + 4 * basis + 4 * w


def test_bytes_that_are_read_before_they_are_written_count_twice() -> None:
    out = torch.empty(4, 8, device=META)
    arguments = {"x_ptr": out, "bias_ptr": None, "out_ptr": out.half(), "n_tokens": 4}
    assert profiled._bytes("table_product_kernel", arguments) == 4 * 32 + 2 * 32
    assert profiled._bytes("table_product_kernel", arguments | {"ACCUMULATE": True}) == 4 * 32 + 4 * 32
    merge = _moved(profiled.Profiled("merge", cases.LayerCase(0, 512, 256, 128)))["merge"]
    assert merge == [("expand_kernel", 2 * 2 * 512 * 256 + 4 * 512 * 256 // 128)]


def test_the_cases_reach_what_is_worth_it() -> None:
    counts: Counter[str] = Counter()

    def note(kernel: Any, **arguments: Any) -> None:
        counts[kernel.__name__] += 1

    with _on_sm_90(note):
        for case in profiled.profiled_cases():
            for call in profiled.calls(case, META).values():
                if case.under_ncu:
                    call()
        under_ncu = sum(counts.values())
        for _, call in profiled.launches(META):
            call()
    assert 40 <= under_ncu <= 60
    assert set(profiled.MEMORY_BOUND) <= set(counts) <= set(kernel_cases.KERNELS)
    assert {"table_product_kernel", "grouped_hankel_kernel", "grouped_product_kernel"} <= set(counts)


# Times


def _event(name: str, start: float, microseconds: float, device_type: DeviceType = DeviceType.CUDA) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=device_type,
        time_range=SimpleNamespace(start=start, elapsed_us=lambda: microseconds),
    )


def test_events_are_joined_in_the_order_of_the_launches() -> None:
    events = [_event("a_kernel", 1, 5), _event("Memset", 2, 900), _event("b_kernel", 3, 6), _event("a_kernel", 4, 7)]
    events.append(_event("a_kernel", 2.5, 8, DeviceType.CPU))  # the launch on the host's side
    random.Random(0).shuffle(events)
    names = ["a_kernel", "b_kernel", "a_kernel"]
    assert profiled._joined(names, events) == pytest.approx([5e-6, 6e-6, 7e-6])
    with pytest.raises(ValueError, match="3 events for 4 launches"):
        profiled._joined([*names, "a_kernel"], events)
    with pytest.raises(ValueError, match="launch 1 is a_kernel, its event b_kernel"):
        profiled._joined(["a_kernel", "a_kernel", "b_kernel"], events)


class _Profile:
    """A profiler that has seen what it is given."""

    def __init__(self, events: list[SimpleNamespace]) -> None:
        self.events = lambda: events

    def __enter__(self) -> "_Profile":
        return self

    def __exit__(self, *exc: object) -> None: ...


@pytest.fixture
def two_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A call of two launches, timed seven times, which take 30 and 40 µs between events."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(profiled, "_repeated", lambda call, device: [3e-5, 4e-5] * profiled.REPEATS)
    return ["a_kernel", "a_kernel"]


def test_the_profiler_times_each_launch_by_its_place(two_launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both launches are of one kernel; the call before the timed ones, which is slow, does not count."""
    timed = [us for i in range(profiled.REPEATS) for us in (10 + i, 20 + i)]
    events = [_event("a_kernel", start, us) for start, us in enumerate([900, 900, *timed])]
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: _Profile(events))
    found = profiled._seconds(lambda: None, two_launches, CUDA)
    assert found == {"seconds": pytest.approx([13e-6, 23e-6]), "timed_by": "profiler"}


@pytest.mark.parametrize("missing", ["events", "profiler"])
def test_events_around_launches_serve_where_the_profiler_does_not(
    missing: str, two_launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def profile(activities: object) -> _Profile:
        if missing == "profiler":
            raise RuntimeError("CUPTI is in use")
        return _Profile([_event("a_kernel", 0, 1)])

    monkeypatch.setattr(torch.profiler, "profile", profile)
    found = profiled._seconds(lambda: None, two_launches, CUDA)
    assert found["seconds"] == pytest.approx([3e-5, 4e-5])
    assert found["timed_by"] == "events"
    assert ("1 events for 16 launches" if missing == "events" else "CUPTI") in found["mismatch"]


def test_a_dead_context_is_not_mistaken_for_a_missing_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*args: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    monkeypatch.setattr(profiled, "_repeated", dead)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: _Profile([]))
    with pytest.raises(RuntimeError, match="illegal"):
        profiled._seconds(lambda: None, ["a_kernel"], CUDA)


# Tables and the goal


def _launch(kernel: str, n_bytes: int, seconds: float, **more: Any) -> profiled.Launch:
    code = {"registers": 168, "spills": 0, "shared": 73728, "warps": 8, "stages": 3}
    shape = {"grid": [64, 2, 1], "tile": {"BLOCK_R": 128, "BLOCK_C": 64}}
    return {"kernel": kernel, "bytes": n_bytes, "seconds": seconds, **code, **shape, **more}


def _record(dtype: str, *found: profiled.Launch, **more: Any) -> runs.Record:
    case = vars(cases.LayerCase(8192, 4096, 4096, 128, dtype))
    return {"status": "ok", "case": case, "kind": "fft", "calls": {"forward": {"launches": list(found), **more}}}


def test_launches_are_listed_with_their_share_of_the_bandwidth_and_the_worst_meets_the_goal_or_not() -> None:
    small = _launch("spectra_kernel", 10**6, 1e-5)  # its bytes take less than a launch
    product = _launch("table_product_kernel", 10**8, 1e-3)  # operations, not bytes
    good, bad = _launch("mix_kernel", 10**8, 4e-5), _launch("results_kernel", 10**8, 5e-5)
    copy = {"status": "ok", "bytes_per_second": 2.5e12}
    records = {op.BANDWIDTH_KEY: copy, "fft": _record("bfloat16", small, product, good)}
    (goal,) = profiled._goals(records)
    assert goal.reached
    assert goal.measured == "1 (the worst of 1: mix_kernel in fft forward)"
    records["more"] = _record("bfloat16", good, bad, timed_by="events", mismatch="3 events for 2 launches")
    records["exact"] = _record("float32", _launch("mix_kernel", 10**8, 1.0))
    assert profiled._goals(records)[0].measured.startswith("0.8 (the worst of 3: results_kernel in more")
    records["worse"] = _record("bfloat16", _launch("outer_kernel", 10**8, 6e-5))
    assert profiled._goals(records)[0].reached is False
    assert profiled._goals({})[0].reached is None
    lines = profiled._tables(records)
    (row,) = [line for line in "\n".join(lines).splitlines() if "results_kernel" in line]
    cells = ["forward", "1", "results_kernel", "50 µs", "95.4 MiB", "2.00", "80%", "168", "0", "73728", "8", "3"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [*cells, "R128 C64", "64×2×1"]
    assert any("3 events for 2 launches" in line for line in lines)


# A rehearsal


def _job(name: str, out: Path, *only: str) -> int:
    options = ["--device", "cpu", "--tiny", "--out", str(out), "--scratch", str(out / "scratch")]
    return gpu.main([name, *options, *(word for part in only for word in ("--only", part))])


@pytest.mark.interpreter
def test_a_rehearsal_describes_every_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [case for case in profiled._TINY if case.kind in ("direct", "merge")]
    monkeypatch.setattr(profiled, "_TINY", tuple(chosen))
    assert _job("right", tmp_path, "profile") == 0
    records = report.read_json(tmp_path / "right.json")["records"]["profile"]
    assert list(records) == [op.BANDWIDTH_KEY, *(case.key for case in chosen)]
    calls = records[chosen[0].key]["calls"]
    assert {name: [one["kernel"] for one in found["launches"]] for name, found in calls.items()} == {
        "forward": ["expand_kernel", "table_product_kernel"],
        "dx": ["expand_kernel", "table_product_kernel"],
        "dw": ["block_sums_kernel"],
    }
    (one,) = records[chosen[1].key]["calls"]["merge"]["launches"]
    assert one["seconds"] > 0
    assert one["bytes"] == 2 * 2 * 16 * 16 + 4 * 16 * 16 // 4
    assert one["tile"] == {"BLOCK_ROWS": 32, "BLOCK_COLS": 256}
    assert "expand_kernel" in (tmp_path / "right.md").read_text(encoding="utf-8")


# Tiles

LOOKUP = ("product_tile", ("sm_80", 4, 32))


@pytest.fixture
def direct_case() -> tuple[profiled.Profiled, str]:
    return next(case for case in profiled._TINY if case.kind == "direct"), "forward"


def _swept(tmp_path: Path, direct_case: tuple[profiled.Profiled, str]) -> runs.Record:
    return runs.attempt(runs.Task("a", 0, partial(tile_sweep._measure, _setting(tmp_path), *direct_case, LOOKUP)), CPU)


def _committed() -> tiles.TileConfig:
    return tiles.product_tile("sm_80", 4, 32)


@pytest.mark.interpreter
def test_candidates_are_timed_and_the_committed_tiles_come_back(
    tmp_path: Path, direct_case: tuple[profiled.Profiled, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    committed, used = _committed(), []
    other = replace(committed, block_t=32)
    monkeypatch.setattr(tile_sweep, "candidates", lambda lookup: [committed, other])
    timer = SimpleNamespace(measure=lambda call: (call(), used.append(_committed()), timing.Timing.of([1.0]))[2])
    monkeypatch.setattr(tile_sweep, "_timer", lambda setting: timer)
    record = _swept(tmp_path, direct_case)
    assert record["status"] == "ok"
    assert [found["tile"] for found in record["candidates"]] == [list(astuple(tile)) for tile in (committed, other)]
    assert {found["status"] for found in record["candidates"]} == {"ok"}
    assert used == [committed, other]
    assert _committed() == committed
    json.dumps(record)


@pytest.mark.interpreter
def test_candidates_that_fail_or_are_wrong_are_recorded_and_end_nothing(
    tmp_path: Path, direct_case: tuple[profiled.Profiled, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = _committed()
    wrong, failing = replace(committed, num_warps=2), replace(committed, num_stages=5)
    monkeypatch.setattr(tile_sweep, "_chosen", lambda lookup, tiny: [committed, wrong, failing, committed])
    product = direct.direct_product

    def product_by_tile(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _committed() == failing:
            raise RuntimeError("out of resource: shared memory")
        return product(*args, **kwargs) * (1.1 if _committed() == wrong else 1.0)

    monkeypatch.setattr(direct, "direct_product", product_by_tile)
    record = _swept(tmp_path, direct_case)
    assert record["status"] == "ok"
    assert [found["status"] for found in record["candidates"]] == ["ok", "wrong", "failed", "ok"]
    assert [("seconds" in found) for found in record["candidates"]] == [True, False, False, True]
    assert _committed() == committed
    lines = tile_sweep._tables({"call | look-up": record})
    assert lines[1] == "### Other results than with the committed tile"  # before any time
    assert "2 warps" in lines[3]
    assert "5 stages: RuntimeError: out of resource: shared memory" in lines[-1]


@pytest.mark.interpreter
def test_a_sweep_ends_when_the_time_is_up(tmp_path: Path, direct_case: tuple[profiled.Profiled, str]) -> None:
    setting = replace(_setting(tmp_path), tiny=False, deadline=time.monotonic() - 1)
    record = runs.attempt(runs.Task("a", 0, partial(tile_sweep._measure, setting, *direct_case, LOOKUP)), CPU)
    n_candidates = len(tile_sweep.candidates(LOOKUP))
    assert n_candidates > 1
    assert (record["status"], record["message"]) == ("incomplete", f"the time was up: 1 of {n_candidates} candidates")
    assert [found["status"] for found in record["candidates"]] == ["ok"]


@pytest.mark.interpreter
def test_an_interrupted_sweep_leaves_committed_tiles(
    tmp_path: Path, direct_case: tuple[profiled.Profiled, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(call: object) -> None:
        raise KeyboardInterrupt

    committed = _committed()
    monkeypatch.setattr(tile_sweep, "_timer", lambda setting: SimpleNamespace(measure=interrupt))
    monkeypatch.setattr(tile_sweep, "_chosen", lambda lookup, tiny: [replace(committed, num_warps=2)] * 2)
    with pytest.raises(KeyboardInterrupt):
        _swept(tmp_path, direct_case)
    assert _committed() == committed


def test_a_candidate_that_kills_the_context_is_the_last(
    tmp_path: Path, direct_case: tuple[profiled.Profiled, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process goes on with `--resume` behind the task, whose candidates so far are kept."""
    dying = [False]

    def synchronize(device: object = None) -> None:
        if dying[0]:
            raise RuntimeError("an illegal memory access was encountered")

    def measure(call: object) -> timing.Timing:
        if _committed() != committed:
            dying[0] = True
            synchronize()
        return timing.Timing.of([1.0])

    committed = _committed()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(tile_sweep, "_timer", lambda setting: SimpleNamespace(measure=measure))
    monkeypatch.setattr(tile_sweep, "_chosen", lambda lookup, tiny: [committed, replace(committed, num_warps=2)] * 2)
    result = torch.ones(2)
    monkeypatch.setattr(profiled, "calls", lambda case, device: {"forward": lambda: result})
    task = runs.Task("a", 0, partial(tile_sweep._measure, _setting(tmp_path, CUDA), *direct_case, LOOKUP))
    with pytest.raises(runs.DeviceLostError) as lost:
        runs.attempt(task, CUDA)
    assert [found["status"] for found in lost.value.args[0]["candidates"]] == ["ok", "failed"]
    assert _committed() == committed


def test_tasks_are_a_call_and_a_lookup_and_new_lookups_come_first(tmp_path: Path) -> None:
    setting = replace(_setting(tmp_path), tiny=False)
    with mock.patch.object(specs, "card_of", return_value="sm_90"):
        tasks = list(tile_sweep._tasks(setting))
    keys = [task.key for task in tasks]
    assert len(set(keys)) == len(keys)
    lookups = {task.key.partition(" | ")[2] for task in tasks}
    assert len([task for task in tasks if task.worth == 0]) == len(lookups) < len(tasks)
    assert "direct T=8192 4096→4096 b=128 bfloat16 forward | product_tile sm_90 2 8192" in keys
    assert {"decode_tile", "diagonal_tile", "product_tile"} <= {lookup.split()[0] for lookup in lookups}


def test_every_candidate_can_be_recorded_without_a_device() -> None:
    """And is launched with its own tile: that which its name says."""
    sizes = {"decode_kernel": ("BLOCK_T", "BLOCK_O", "BLOCK_K"), "mix_kernel": ("BLOCK_T", "BLOCK_C", "BLOCK_K")}
    sizes["routed_mix_kernel"] = sizes["mix_kernel"]
    launched: list[str] = []

    def note(kernel: Any, **arguments: Any) -> None:
        if names := sizes.get(kernel.__name__):
            tile = "×".join(str(arguments[name]) for name in names)
            launched.append(f"{tile}, {arguments['num_warps']} warps, {arguments['num_stages']} stages")

    with _on_sm_90(note):
        found: list[str] = []
        for name, call in tile_sweep.launches(META, tiny=True):
            if "decode_tile" in name or "mix_tile" in name:
                launched.clear()
                call()
                assert name.endswith(f"| {launched[0]}")
                found += launched
    # Two of each look-up: decode; forward and backward, of a layer and of experts, which have the same tiles.
    assert (len(found), len(set(found))) == (10, 4)


def test_candidates_begin_with_the_committed_tile_and_differ() -> None:
    for lookup in (LOOKUP, ("mix_tile", ("sm_90", 2, 8192, 64, 64)), ("decode_tile", (1, 128))):
        found = tile_sweep.candidates(lookup)
        assert found[0] == getattr(tiles, lookup[0])(*lookup[1])
        assert len(set(found)) == len(found) >= 5


# Nsight Compute

CSV = """==PROF== Connected to process 12
"ID","Process ID","Kernel Name","Grid Size","dram__bytes_read.sum","dram__bytes_write.sum",\
"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum","launch__registers_per_thread",\
"sm__warps_active.avg.pct_of_peak_sustained_active","breakdown: gpu__time_duration.sum"
"","","","","Mbyte","byte","%","us","register/thread","%","us"
"1","12","b_kernel","(64, 2, 1)","1,234.50","512","71.5","1,020.25","168","n/a","1"
"0","12","a_kernel(float*, int)","(1, 1, 1)","1.00","0","9.1","2.50","32","12.5","1"
"2","12","void at::elementwise_kernel<4, Fill>(int)","(9, 1, 1)","1","1","1","1","1","1","1"
"""


def _made(*kernels: str) -> list[profiled.Launch]:
    return [_launch(kernel, 1000, 1.0) | {"case": "fft", "call": "f", "place": i} for i, kernel in enumerate(kernels)]


def test_metrics_are_read_in_si_units_and_in_order() -> None:
    a, b, other = ncu.read_metrics(CSV)
    assert (a["kernel"], b["kernel"], other["kernel"]) == ("a_kernel", "b_kernel", "void at::elementwise_kernel")
    assert b["dram_bytes"] == pytest.approx(1234.5e6 + 512)
    assert b["seconds"] == pytest.approx(1020.25e-6)
    assert (b["dram_percent"], b["registers"]) == (71.5, 168)
    assert "occupancy_percent" not in b
    assert a["occupancy_percent"] == 12.5


@pytest.mark.parametrize("unit", ["us", "usecond"])
def test_other_versions_say_less_and_otherwise(unit: str) -> None:
    text = (
        f'"ID","Kernel Name","Duration","dram__bytes.sum.per_second"\n,,{unit},Gbyte/s\n"0","a_kernel","10","2,000"\n'
    )
    assert ncu.read_metrics(text)[0]["dram_bytes"] == pytest.approx(2e12 * 1e-5)
    assert ncu.read_metrics('"ID","Kernel Name","more"\n"0","a_kernel","1"\n') == [{"kernel": "a_kernel"}]
    assert ncu.read_metrics("==ERROR== no report\n") == []


def test_metrics_are_joined_as_far_as_both_lists_agree() -> None:
    made = _made("a_kernel", "b_kernel")
    assert ncu.joined(made, ncu.read_metrics(CSV)) is None  # of torch's own launches nobody asks
    assert made[1]["metrics"]["seconds"] == pytest.approx(1020.25e-6)
    (row,) = [line for line in "\n".join(ncu._tables({"a": {"launches": made}})).splitlines() if "b_kernel" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")][3:7] == ["1.02 ms", "1e+03 B", "1.15 GiB", "72"]
    more = _made("a_kernel", "b_kernel", "a_kernel")
    assert ncu.joined(more, ncu.read_metrics(CSV)) == "2 launches in the report, 3 were made"
    assert ["metrics" in one for one in more] == [True, True, False]
    other = _made("b_kernel", "a_kernel")
    assert ncu.joined(other, ncu.read_metrics(CSV)) == "launch 0 is b_kernel, in the report a_kernel"
    assert not any("metrics" in one for one in other)


def _standing_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """An `ncu` of a few lines, first on the path."""
    program = tmp_path / "bin" / "ncu"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport json, pathlib, sys\nargv = sys.argv\n" + textwrap.dedent(code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def test_a_report_is_made_read_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.csv").write_text(CSV)
    (tmp_path / "launches.json").write_text(json.dumps(_made("a_kernel", "b_kernel")))
    _standing_in(
        tmp_path,
        monkeypatch,
        f"""
        folder = pathlib.Path({str(tmp_path)!r})
        if "--import" in argv:
            assert pathlib.Path(argv[argv.index("--import") + 1]).read_text() == "report"
            print((folder / "report.csv").read_text())
        else:
            module = argv.index("-m")
            assert argv[module + 1] == "bench.profiled" and argv.index("-k") < module
            assert float(argv[argv.index("--until") + 1]) > {time.time()}
            pathlib.Path(argv[argv.index("-o") + 1] + ".ncu-rep").write_text("report")
            pathlib.Path(argv[argv.index("--ncu") + 1]).write_text((folder / "launches.json").read_text())
        """,
    )
    setting = _setting(tmp_path, CUDA, deadline=time.monotonic() + 60)
    record: runs.Record = {"status": "ok"}
    ncu._measure(setting, record)
    assert record["status"] == "ok", record
    assert record["launches"][0]["metrics"]["seconds"] == pytest.approx(2.5e-6)
    assert (tmp_path / "kernels.ncu-rep").exists()
    assert "b_kernel" in (tmp_path / "ncu.csv").read_text()


def test_a_refusal_is_recorded_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels.ncu-rep").write_text("of another run")
    _standing_in(tmp_path, monkeypatch, 'print("==ERROR== ERR_NVGPUCTRPERM")\nprint("more")\nsys.exit(1)')
    record: runs.Record = {"status": "ok"}
    ncu._measure(_setting(tmp_path, CUDA, deadline=time.monotonic() + 60), record)
    assert record["status"] == "unavailable"
    assert record["message"] == "no report: ==ERROR== ERR_NVGPUCTRPERM"
    monkeypatch.setattr(ncu, "_program", lambda: None)
    ncu._measure(_setting(tmp_path, CUDA, deadline=time.monotonic() + 60), record)
    assert record["message"] == "ncu was not found"


@pytest.mark.interpreter
def test_a_rehearsal_lists_what_would_be_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _job("tune", tmp_path, "ncu") == 0
    (record,) = report.read_json(tmp_path / "tune.json")["records"]["ncu"].values()
    listed = [(one["call"], one["kernel"]) for one in record["launches"]]
    assert listed == [
        ("with the base", "decode_kernel"),
        ("adapter alone", "hankel_kernel"),
        ("merge", "expand_kernel"),
    ]
    first, _, *rows = (tmp_path / "ncu.csv").read_text(encoding="utf-8").splitlines()
    assert first == ncu.DRY
    assert len(rows) == len(listed)


def test_no_call_is_begun_after_the_time_is_up(tmp_path: Path) -> None:
    listed = tmp_path / "launches.json"
    assert profiled.main(["--ncu", str(listed), "--device", "cpu", "--tiny", "--until", "0"]) == 0
    assert not listed.exists()


def test_the_job_has_these_parts() -> None:
    assert profiled.SUBJECT in [part.subject for part in gpu.RIGHT]
    assert {tile_sweep.SUBJECT, ncu.SUBJECT} <= {part.subject for part in gpu.TUNE}
