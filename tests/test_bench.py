"""The benchmarks' own code: known clocks, failures that must be recorded, a GPU job that must run at first contact."""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
import torch
from bench_package import ROOT
from clock import Clock
from torch import nn

from bench import (
    gpu,
    launches,
    memory,
    merge,
    model,
    native_tests,
    op,
    overhead,
    plots,
    predicted,
    report,
    runs,
)
from c3a_triton.benchmark import cases, gate, layer, models, peers, timing

CPU = torch.device("cpu")
CASE = cases.LayerCase(5, 12, 20, 4, "float32")
needs_peft = pytest.mark.skipif(peers.why_no_peft() is not None, reason="needs PEFT")


# Clocks


def test_timing_summarises_samples() -> None:
    found = timing.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (found.median, found.p20, found.p80, found.repeats) == (3.5, 2.0, 5.0, 6)
    assert timing.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_alternate_takes_turns_and_divides_by_the_calls_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(), []
    monkeypatch.setattr(timing.time, "thread_time", clock)
    monkeypatch.setattr(timing.time, "perf_counter", clock)

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock.spend(seconds)

    found = timing.alternate(
        {"fast": lambda: call("fast", 1e-4), "slow": lambda: call("slow", 3e-3)}, seconds=0.1, sample_seconds=1e-3
    )
    assert found["fast"].median == pytest.approx(1e-4)
    assert found["slow"].median == pytest.approx(3e-3)
    assert order[:4] == ["fast", "fast", "slow", "slow"]  # warm-up and calibration
    assert order[4:15] == ["fast"] * 10 + ["slow"]  # a millisecond of each
    assert order[15:26] == ["slow"] + ["fast"] * 10  # and back
    assert found["fast"].repeats == found["slow"].repeats >= 5


def test_cuda_timer_reads_events_peak_and_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer's logic with a device that is a clock: 2 ms of device time and 1000 bytes a call."""
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, end: "Event") -> float:
            return (end.at - self.at) * 1e3

    fakes = {
        "Event": Event,
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=256),
        "memory_allocated": lambda device: 500,
        "max_memory_allocated": lambda device: 1500,
        "reset_peak_memory_stats": lambda device: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    flushed = []
    empty = torch.empty

    def buffer(*args: object, **kwargs: object) -> object:
        size = empty(*args, **kwargs).numel()
        return SimpleNamespace(zero_=lambda: (flushed.append(size), clock.spend(1e-4)))

    monkeypatch.setattr(torch, "empty", buffer)
    timer = timing.CudaTimer(CPU, seconds=0.02, max_repeats=50)
    flushed.clear()
    found = timer.measure(lambda: clock.spend(2e-3))
    assert found.median == pytest.approx(2e-3)
    assert found.wall == pytest.approx(2e-3)
    assert found.peak_bytes == 1000
    assert found.repeats == 10
    assert set(flushed) == {1024}  # four times the L2
    # While Python takes 2 ms to queue a call, the device is kept busy for 3 ms by fills of 0.1 ms.
    assert len(flushed) / 10 == pytest.approx(31, abs=1)


@pytest.mark.gpu
def test_cuda_timer_measures_device_work() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    timer = timing.CudaTimer(device, seconds=0.05)
    large, small = (torch.randn(n, n, device=device) for n in (4096, 256))
    slow, fast = timer.measure(lambda: large @ large), timer.measure(lambda: small @ small)
    assert slow.median > 3 * fast.median
    assert slow.peak_bytes >= large.nbytes > fast.peak_bytes
    assert fast.p20 <= fast.median <= fast.p80


# What is saved for backward


def test_saved_bytes_counts_each_storage_once_and_parameters_apart() -> None:
    linear = nn.Linear(6, 10, bias=False).requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    assert timing.saved_bytes(linear, x) == timing.SavedBytes(activations=0, parameters=6 * 10 * 4)
    assert timing.saved_bytes(nn.Sequential(linear, nn.GELU()), x).activations == 4 * 10 * 4

    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x[:]  # the same storage twice

    assert timing.saved_bytes(Square(), x).activations == x.nbytes


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_layer_saves_its_16_bit_input_and_kernel_only(backend: str) -> None:
    case = cases.LayerCase(32, 64, 48, 16, "bfloat16")
    base, w = peers.frozen_base(case, CPU), peers.kernel_values(case, CPU)
    x = torch.randn(case.n_tokens, case.in_features, dtype=torch.bfloat16, requires_grad=True)
    saved = timing.saved_bytes(peers.build(f"ours:{backend}", base, case, w), x)
    assert saved.activations <= x.nbytes
    assert saved.parameters <= base.weight.nbytes + w.nbytes


# The gate


def _gated(method: str, *, check_dx: bool = True) -> None:
    torch.manual_seed(0)
    base, w = peers.frozen_base(CASE, CPU), peers.kernel_values(CASE, CPU)
    x = torch.randn(CASE.n_tokens, CASE.in_features, requires_grad=True)
    dy = torch.randn(CASE.n_tokens, CASE.out_features)
    built = peers.build(method, base, CASE, w)
    only = ("y", "dx", "dw") if check_dx else ("y", "dw")
    gate.check_layer(built, peers.trained(built)[0], x, dy, gate.Truth.of(base.weight, w, x, dy), only=only)


@pytest.mark.parametrize("method", ["ours:auto", "ours:torch", "ours:reference"])
def test_gate_lets_ours_through(method: str) -> None:
    _gated(method)


@needs_peft
def test_gate_lets_peft_through_but_for_its_input_gradient() -> None:
    _gated("peft_c3a", check_dx=False)
    with pytest.raises(gate.GateError, match="dx is wrong"):
        _gated("peft_c3a")


def test_gate_stops_an_adapter_that_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        peers.C3ALinear, "forward", lambda self, x: self.base_layer(x) + 0 * self.c3a_kernel["default"].sum()
    )
    with pytest.raises(gate.GateError, match="y is wrong"):
        _gated("ours:auto")


def test_gate_stops_nan() -> None:
    truth = gate.Truth(*(torch.ones(2, 2, dtype=torch.float64) for _ in range(3)))
    broken = nn.Linear(2, 2)
    with torch.no_grad():
        broken.weight.fill_(float("nan"))
    with pytest.raises(gate.GateError, match="relative error nan"):
        gate.check_layer(broken, broken.weight, torch.ones(2, 2, requires_grad=True), torch.ones(2, 2), truth)


@pytest.mark.parametrize("case", [CASE, cases.DecoderCase(700, 12, 8, 20, 4, "float32")], ids=["one", "seven"])
@pytest.mark.parametrize("method", ["ours:torch", "dense", pytest.param("peft_c3a", marks=needs_peft)])
def test_workloads_pass_the_gate_and_wrong_ones_do_not(case: layer.Case, method: str) -> None:
    work = layer.Workload.of(case, method, CPU)
    work.check()
    assert [y.shape[1] for y in work.forward()] == [part.out_features for _, part in case.parts]
    assert len(work.both()) == len(work.wanted) == len(work.inputs) + len(case.parts)
    work.kernels[-1] = work.kernels[-1].flip(-1)  # the last layer alone
    with pytest.raises(gate.GateError, match=f"y of layer {len(case.parts) - 1}"):
        work.check()


def test_gate_sees_one_layer_missing_in_the_gradient_of_a_shared_input(monkeypatch: pytest.MonkeyPatch) -> None:
    work = layer.Workload.of(cases.DecoderCase(5, 12, 8, 20, 4, "float32"), "ours:torch", CPU)
    forward = work.layers[1].forward
    monkeypatch.setattr(work.layers[1], "forward", lambda x: forward(x.detach()))
    with pytest.raises(gate.GateError, match="dx of input 0"):
        work.check()


def test_truth_of_some_rows_and_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, w = torch.randn(20, 12), torch.randn(5, 3, 4)
    x, dy = torch.randn(11, 12), torch.randn(11, 20)
    whole = gate.Truth.of(weight, w, x, dy)
    monkeypatch.setattr(gate, "TOKENS_AT_ONCE", 4)
    some = gate.Truth.of(weight, w, x, dy, rows=torch.tensor([0, 10]))
    torch.testing.assert_close(some.dw, whole.dw)
    torch.testing.assert_close(some.y, whole.y[[0, 10]])
    torch.testing.assert_close(some.dx, whole.dx[[0, 10]])


# One measurement: what goes wrong is recorded


class Failing:
    """A timer that meets an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def measure(self, call: object) -> timing.Timing:
        raise self.error


def _setting(timer: timing.Timer | None = None, device: torch.device = CPU) -> runs.Setting:
    methods = peers.methods(("auto", "torch"), with_peft=peers.why_no_peft() is None)
    return runs.Setting(device, timer or timing.CpuTimer(repeats=1), methods, tiny=True)


def _task(setting: runs.Setting, key: str) -> runs.Task:
    return next(task for task in op.tasks(setting) if task.key == key)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "LAYERS_TINY", (CASE, cases.LayerCase(1, 12, 20, 2, "float32")))
    monkeypatch.setattr(cases, "DECODERS_TINY", (cases.DecoderCase(3, 12, 8, 20, 4, "float32"),))
    monkeypatch.setattr(cases, "DECODING_TINY", (cases.LayerCase(1, 12, 20, 4, "float32"),))
    monkeypatch.setattr(runs.dispatch, "BACKENDS", ("auto", "reference", "torch"))
    # The job's watchdog would outlive the test.
    monkeypatch.setattr(runs.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)


OURS = "ours:torch T=5 12→20 b=4 float32"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.cuda.OutOfMemoryError("no room"), "out of memory"), (RuntimeError("launch failed"), "error")],
    ids=["memory", "runtime"],
)
def test_a_failing_case_is_recorded(error: Exception, status: str) -> None:
    record = runs.attempt(_task(_setting(Failing(error)), OURS), CPU)
    assert record["status"] == status
    assert str(error) in record["message"]
    assert record["method"] == "ours:torch"  # what was known before stays
    json.dumps(record)


@pytest.mark.usefixtures("small")
def test_a_wrong_case_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gate.TOLERANCES, torch.float32, 0.0)
    record = runs.attempt(_task(_setting(), OURS), CPU)
    assert record["status"] == "wrong"
    assert record["times"] == {}


@pytest.mark.parametrize(("name", "status"), [("transformers", "unavailable"), ("c3a_triton.gone", "error")])
def test_a_package_that_is_not_installed_is_no_error_of_ours(name: str, status: str) -> None:
    def fail(record: runs.Record) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    assert runs.attempt(runs.Task("a", 0, fail), CPU)["status"] == status


def test_a_dead_gpu_context_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(runs.DeviceLostError) as caught:
        runs.attempt(runs.Task("a", 0, fail), torch.device("cuda"))
    assert caught.value.args[0]["status"] == "error"
    assert "illegal memory access" in caught.value.args[0]["message"]


def test_plan_measures_peers_without_block_size_once() -> None:
    layers = (cases.LayerCase(8, 16, 16, 4), cases.LayerCase(8, 16, 16, 8), cases.LayerCase(1, 16, 16, 4))
    planned = [(case.n_tokens, case.b, method) for _, case, method in op.plan(layers, ("base", "ours:auto"))]
    assert planned == [(8, 4, "base"), (8, 4, "ours:auto"), (8, 8, "ours:auto"), (1, 4, "base"), (1, 4, "ours:auto")]


def test_the_grid_is_the_issues_and_the_goals_cases_come_first() -> None:
    """On a GPU everything that a goal needs has a record before the rest of the grid."""
    assert {case.n_tokens for case in cases.LAYERS} == {1, 16, 1024, 8192, 32768}
    assert {case.b for case in cases.LAYERS} == {32, 64, 128, 256, 512, 1024}
    sizes = {(3072, 3072), (3072, 1024), (4096, 4096), (4096, 14336), (8192, 28672)}
    assert {(case.in_features, case.out_features) for case in cases.LAYERS} == sizes
    assert all(case.in_features % case.b == case.out_features % case.b == 0 for case in cases.LAYERS)
    methods = peers.methods(("auto", "direct"), with_peft=True)
    planned = {task.key: task.worth for task in op.tasks(runs.Setting(CPU, timing.CpuTimer(), methods))}
    for b in (64, 128, 256, 1024):
        assert planned[f"ours:auto T=8192 4096→4096 b={b} bfloat16"] == 0
        assert planned[f"ours:direct T=8192 4096→4096 b={b} bfloat16"] == 1
    assert planned["base T=8192 4096→4096 bfloat16"] == planned["peft_lora T=8192 4096→4096 bfloat16"] == 0
    assert planned["decode ours:auto T=1 4096→4096 b=128 bfloat16"] == 0
    assert planned["ours:auto T=1024 8192→28672 b=128 bfloat16"] == 1
    assert planned["ours:auto T=1 8192→28672 b=32 bfloat16"] == 2


@pytest.mark.parametrize("mode", layer.MODES)
def test_floor_counts_what_an_adapter_must_move(mode: str) -> None:
    x, y, w = 2 * 5 * 12, 2 * 5 * 20, 4 * 12 * 20 // 4
    expected = {"forward": x + y + w, "backward": y + x + x + 2 * w}
    expected["both"] = sum(expected.values())
    assert op.floor_bytes(cases.LayerCase(5, 12, 20, 4), mode) == expected[mode]


def test_decoding_replays_a_graph_of_layers_that_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.LayerCase(1, 12, 20, 4, "float32")
    built: list[str] = []
    workload = layer.Workload.of
    monkeypatch.setattr(
        layer.Workload, "of", lambda case, method, device: (built.append(method), workload(case, method, CPU))[1]
    )
    monkeypatch.setattr(timing, "graphed", lambda step: step)
    monkeypatch.setattr(op, "DECODE_BYTES", 10 * 4 * 12 * 20)
    record: runs.Record = {}
    timer = SimpleNamespace(measure=lambda call: (call(), timing.Timing.of([1.0]))[1])
    op._decode(case, "base", timer, torch.device("cuda"), record)
    assert (record["n_layers"], len(built), record["seconds"]) == (10, 10, 0.1)


# The goals, from results that are made up


def _timed(case: layer.Case, method: str, seconds: float) -> runs.Record:
    times = {mode: {"median": seconds, "wall": seconds} for mode in layer.MODES}
    return {"status": "ok", "case": vars(case), "method": method, "times": times}


def test_goals_of_one_layer() -> None:
    square, wide = cases.LayerCase(8192, 4096, 4096, 128), cases.LayerCase(8192, 4096, 14336, 128)
    seconds = {"base": 1.0, "peft_lora": 2.0, "peft_c3a": 4.0, "ours:auto": 1.4}
    records = {layer.key(square, method): _timed(square, method, s) for method, s in seconds.items()}
    records |= {layer.key(wide, method): _timed(wide, method, s) for method, s in (("base", 1.0), ("ours:auto", 1.5))}
    decode = cases.DECODING[0]
    records |= {f"decode {layer.key(decode, m)}": {"seconds": s} for m, s in (("base", 1e-5), ("ours:auto", 1.2e-5))}
    found = {goal.case: goal for goal in op.goals(records)}

    def check(case: str, measured: str | None, reached: bool | None) -> None:
        goal = next(goal for name, goal in found.items() if case in name)
        assert goal.reached is reached, goal
        assert (goal.measured is None) if measured is None else goal.measured.startswith(measured), goal

    check("4096→4096, b=128: ours / base", "1.4", True)
    check("4096→4096, b=64: ours / base", None, None)
    check("4096→14336", "1.5", False)
    check("b=128: PEFT C3A / ours", "7.5", False)
    check("ours / PEFT LoRA", "0.7 (the worst of 1: T=8192 4096→4096 b=128)", True)
    check("decode T=1,", "1.2", False)
    assert {goal.reached for goal in op.goals({})} == {None}


def test_goals_of_the_model_merging_memory_and_overhead() -> None:
    case = cases.MODELS[0]
    times = {method: {"median": s} for method, s in (("peft_lora", 1.0), ("peft_c3a", 1.5), ("ours:auto", 1.1))}
    step = {"case": json.loads(json.dumps(vars(case))), "n_layers": 28, "times": times}
    assert [goal.reached for goal in model.goals({"a": step})] == [False, True, None, None]
    assert {goal.reached for goal in model.goals({"a": step | {"n_layers": 2}})} == {None}  # not the model of the goal

    both = {method: {"median": s, "peak_bytes": 5} for method, s in (("peft_c3a", 26.0), ("ours:auto", 1.0))}
    records = {"4096→4096 b=128": {"times": both, "adding": both}, merge.MODEL_KEY: {"times": both}}
    assert [goal.reached for goal in merge.goals(records)] == [True, True, False]

    kept = {"status": "ok", "case": vars(cases.MEMORY[0]), "method": "ours:auto", "x_bytes": 10}
    kept |= {"saved": {"activations": 10, "parameters": 0}, "transient": {"forward": 8192 * 2 * 8192, "backward": 0}}
    assert [goal.reached for goal in memory.goals({"a": kept})] == [True, True]
    assert [g.reached for g in memory.goals({"a": kept | {"x_bytes": 9}})] == [False, True]

    medians = {"ours:direct": 5.5e-5, "ours:fft": 7e-5, "peft_lora": 6e-5, "base": 1.0}
    spent = {mode: {method: {"median": s} for method, s in medians.items()} for mode in ("forward", "backward")}
    found = overhead.goals({"T=1": {"times": spent, "stubbed": ["ours:direct", "ours:fft"]}})
    # The others, "direct", and both against LoRA, in each direction.
    assert [goal.reached for goal in found] == [False, False, False, True, True, False]
    assert {goal.reached for goal in overhead.goals({})} == {None}
    assert "| no " in report.goals_table(found)


# The jobs


def _job(out: Path, *more: str) -> int:
    return op.main(["--device", "cpu", "--tiny", "--budget-s", "9999", "--out", str(out), *more])


@pytest.mark.usefixtures("small")
def test_job_writes_as_it_goes_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = runs.attempt
    counted: list[str] = []

    def attempt_two(task: runs.Task, device: torch.device) -> runs.Record:
        counted.append(task.key)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return attempt(task, device)

    monkeypatch.setattr(runs, "attempt", attempt_two)
    with pytest.raises(KeyboardInterrupt):
        _job(tmp_path)
    assert len(report.read_json(tmp_path / "results.json")["records"]["op"]) == 2
    assert not (tmp_path / "summary.md").exists()

    assert _job(tmp_path) == 2  # not over results that are there
    assert _job(tmp_path, "--resume") == 0
    results = report.read_json(tmp_path / "results.json")
    records = results["records"]["op"]
    assert len(counted) == len(records) + 1
    assert {record["status"] for record in records.values()} == {"ok"}
    for key, record in records.items():
        if "times" in record:
            assert set(record["times"]) == {"forward", "backward", "both"}
            assert all(found["median"] > 0 for found in record["times"].values())
        else:
            assert record["time"]["median"] > 0, key
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "not measured" not in text
    assert "ours:auto" in text
    assert "Goals" not in text  # tiny layers are nobody's goal
    assert "none of these figures says how fast anything is" in text
    assert results["environment"]["versions"]["torch"] == torch.__version__

    # Figures of two commits do not mix, and none is lost.
    monkeypatch.setitem(results["environment"], "commit", "another")
    report.write_json(tmp_path / "results.json", results)
    assert _job(tmp_path, "--resume", "--quick") == 0
    assert report.read_json(tmp_path / "results-1.json") == results
    found = report.read_json(tmp_path / "results.json")
    assert len(found["records"]["op"]) < len(records)
    assert "results-1.json was measured with commit another" in found["notes"][0]


@pytest.mark.usefixtures("small")
def test_job_measures_by_worth_and_chooses_cases(tmp_path: Path) -> None:
    assert _job(tmp_path / "quick", "--quick") == 0
    quick = report.read_json(tmp_path / "quick" / "results.json")["records"]["op"]
    assert [key.split()[0] for key in quick] == ["copy", "base", "ours:auto", "decode", "decode"]
    assert _job(tmp_path / "some", "--cases", "ours:torch .*b=2") == 0
    some = report.read_json(tmp_path / "some" / "results.json")["records"]["op"]
    assert list(some) == ["ours:torch T=1 12→20 b=2 float32"]


def test_job_leaves_out_what_does_not_fit_in_the_time_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs.time, "monotonic", clock := Clock())
    sizes = {"a": 3.0, "b": 30.0, "c": 3.0}
    tasks = [runs.Task(key, 0, lambda record: clock.spend(3.0), seconds) for key, seconds in sizes.items()]
    subject = runs.Subject("some", "Some", lambda setting: iter(tasks), lambda r: [], lambda r: [], lambda r, p: None)
    args = argparse.Namespace(cases=None, quick=False)
    job = runs.Job(args, runs.Results(tmp_path / "results.json", {}), dataclasses.replace(_setting(), deadline=20.0))
    runs.measure(job, [subject])
    assert list(job.results.records["some"]) == ["a", "c"]
    assert job.results.notes == [f"some: {runs.OUT_OF_TIME}: b"]
    another = dataclasses.replace(subject, name="another")
    runs.measure(job.until(7.0), [another])
    assert job.results.notes == [f"some: {runs.OUT_OF_TIME}: b", f"another: {runs.OUT_OF_TIME}: a; b; c"]


@pytest.mark.usefixtures("small")
def test_job_out_of_time_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(runs.time, "monotonic", clock)
    attempt = runs.attempt
    monkeypatch.setattr(runs, "attempt", lambda *args: (clock.spend(10), attempt(*args))[1])
    assert _job(tmp_path, "--budget-s", "25") == 0
    results = report.read_json(tmp_path / "results.json")
    assert len(results["records"]["op"]) == 3  # the third began before the time was up
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert f"op: {runs.OUT_OF_TIME}: decode base T=1 12→20 float32" in text
    assert _job(tmp_path, "--resume") == 0
    assert f"and {len(report.read_json(tmp_path / 'results.json')['records']['op']) - 6} more" in text
    assert runs.OUT_OF_TIME not in (tmp_path / "summary.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("small")
def test_job_reports_errors_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CpuTimer", lambda: Failing(RuntimeError("launch failed")))
    assert _job(tmp_path / "a") == 3
    assert "error: RuntimeError: launch failed" in (tmp_path / "a" / "summary.md").read_text(encoding="utf-8")
    assert _job(tmp_path / "b", "--cases", "^peft_c3a") == 0  # a peer's failure is a finding


@pytest.mark.usefixtures("small")
def test_job_starts_again_after_a_dead_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def attempt(task: runs.Task, device: torch.device) -> runs.Record:
        raise runs.DeviceLostError({"status": "error", "message": "gone"})

    monkeypatch.setattr(runs, "attempt", attempt)
    monkeypatch.setattr(runs.os, "execv", lambda path, command: started.append(command) or 0)
    monkeypatch.setattr(runs.os, "chdir", lambda path: None)
    _job(tmp_path)
    assert started[0][1:3] == ["-m", "bench.op"]
    assert "--resume" in started[0]
    # The case that did it is not tried again.
    assert list(report.read_json(tmp_path / "results.json")["records"]["op"]) == [op.BANDWIDTH_KEY]


@pytest.mark.parametrize(
    "main", [lambda options: gpu.main(["right", *options]), op.main, model.main], ids=["gpu", "op", "model"]
)
def test_job_says_that_it_needs_a_gpu(
    main: Callable[[list[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
    assert main(["--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "--tiny" in capsys.readouterr().err


SUBJECTS = (op.SUBJECT, model.SUBJECT, merge.SUBJECT, memory.SUBJECT, overhead.SUBJECT)


@needs_peft
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_subject_runs_and_plots(subject: runs.Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(runs.dispatch, "BACKENDS", ("auto", "reference", "torch", "direct", "expand"))
    options = ["--device", "cpu", "--tiny", "--budget-s", "9999", "--out", str(tmp_path)]
    options += ["--cases", "^(?!ours:(direct|expand))"]
    assert runs.command(subject, options) == 0
    records = report.read_json(tmp_path / "results.json")["records"][subject.name]
    assert {key: record for key, record in records.items() if record["status"] != "ok"} == {}
    if subject is overhead.SUBJECT:
        assert records["T=32"]["stubbed"] == ["ours:direct", "ours:expand"]
        assert set(records["T=32"]["profile"]["ours:direct"]) == {"forward", "backward"}
    assert "not measured" not in (tmp_path / "summary.md").read_text(encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / f"{subject.name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("subject", [op.SUBJECT, memory.SUBJECT, merge.SUBJECT], ids=lambda subject: subject.name)
def test_subjects_on_the_gpu(subject: runs.Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(runs.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)
    assert runs.command(subject, ["--tiny", "--out", str(tmp_path)]) == 0
    results = report.read_json(tmp_path / "results.json")
    assert results["environment"]["gpu"]["name"] == torch.cuda.get_device_name()
    ours = {key: record["status"] for key, record in results["records"][subject.name].items() if "ours" in key}
    assert set(ours.values()) <= {"ok"}, ours


# The models, Python's time, memory


def test_copies_of_a_model_share_its_tensors_and_nothing_else() -> None:
    pytest.importorskip("transformers")
    base = models.llama(CPU, tiny=True)
    names = [name for name, _ in base.named_modules()]
    adapted = models.adapted("ours:torch", base, cases.MODELS_TINY[0])
    assert [name for name, _ in base.named_modules()] == names
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    frozen = {parameter.data_ptr() for parameter in adapted.parameters() if not parameter.requires_grad}
    assert frozen == shared
    assert len(peers.trained(adapted)) == 4  # q and v of two layers


@needs_peft
def test_models_gate_compares_adapted_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    base, case = models.llama(CPU, tiny=True), cases.MODELS_TINY[1]
    built = {method: models.adapted(method, base, case) for method in ("base", "peft_c3a", "ours:torch")}
    ids = torch.arange(5)[None]
    models.check(built, ids)
    with torch.no_grad():
        next(p for p in built["ours:torch"].parameters() if p.requires_grad).mul_(1.5)
    with pytest.raises(gate.GateError, match="hidden states of ours:torch are wrong"):
        models.check(built, ids)
    for method in ("peft_c3a", "ours:torch"):
        for parameter in peers.trained(built[method]):
            nn.init.zeros_(parameter)
    with pytest.raises(gate.GateError, match="do not show"):
        models.check(built, ids)


def test_launches_are_stubbed_and_come_back() -> None:
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    before = (JITFunction.run, InterpretedFunction.run, overhead.specs.unavailable_reason)
    work = layer.Workload.of(cases.LayerCase(32, 64, 64, 64, "float32"), "ours:direct", CPU)
    with overhead.stubbed_launches():
        assert [grad.shape for grad in work.both()] == [(32, 64), (1, 1, 64)]
        with pytest.raises(gate.GateError):
            work.check()  # the kernels did nothing
    assert before == (JITFunction.run, InterpretedFunction.run, overhead.specs.unavailable_reason)


@pytest.mark.parametrize("backend", ["direct", "fft", "expand", "fold"])
def test_launches_end_at_the_driver(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Natively, in whatever way kernels were defined, and each as often as it is launched otherwise."""
    pytest.importorskip("triton")
    monkeypatch.setenv("C3A_TRITON_BACKEND", "direct")
    work = layer.Workload.of(cases.LayerCase(32, 64, 64, 64, "float32"), f"ours:{backend}", CPU)
    names, called = [], []
    with overhead.stubbed_launches(lambda kernel, **arguments: names.append(kernel.__name__)):
        work.both()
    with overhead.uncomputed_launches(lambda *arguments: called.append(arguments[4])) as driver:
        for _ in range(2):
            called.clear()
            assert [grad.shape for grad in work.both()] == [(32, 64), (1, 1, 64)]
            assert [driver.loaded[function - 1].src.fn.__name__ for function in called] == names


@pytest.mark.parametrize(
    ("method", "n_tokens", "forward", "backward"),
    [
        ("ours:direct", 32, 23, 22),
        ("ours:fft", 32, 25, 23),
        ("ours:expand", 32, 23, 27),
        ("ours:fold", 32, 20, 34),
        ("ours:direct", 1, 25, 21),
    ],
)
def test_python_calls_of_a_layer_stay_few(
    monkeypatch: pytest.MonkeyPatch, method: str, n_tokens: int, forward: int, backward: int
) -> None:
    """What does not depend on the machine: how many of the library's own functions one call of a layer enters."""
    pytest.importorskip("triton")
    monkeypatch.setenv("C3A_TRITON_BACKEND", "direct")
    work = layer.Workload.of(cases.LayerCase(n_tokens, 64, 64, 64, "float32"), method, CPU)
    entered: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("c3a_triton") and "benchmark" not in module:
            entered.append(frame.f_code.co_name)

    with overhead.stubbed_launches():
        for call, limit in ((work.forward, forward), (work.backward, backward)):
            call()  # decides what is decided once
            sys.setprofile(note)
            try:
                call()
            finally:
                sys.setprofile(None)
            assert len(entered) <= limit, entered
            # Tiles, grids and availability are looked up, not computed again.
            assert not {name for name in entered if name.endswith(("_tile", "_plan", "_bound", "unavailable_reason"))}
            entered.clear()


def test_documented_launches_and_bytes_are_those_that_are_counted() -> None:
    pytest.importorskip("triton")
    documented = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    methods = ("ours:direct", "ours:fft", "ours:expand", "ours:fold", "base")
    for counted in launches.table(methods).splitlines()[2:]:
        cells = [cell.strip() for cell in counted.strip("|").split("|")]
        assert re.search(r"^\| *" + r" *\| *".join(map(re.escape, cells)) + r" *\|$", documented, re.MULTILINE), counted
    assert launches.experts_table() in documented


def test_tables_of_tiles_are_made_once_for_all_that_have_the_same_rows() -> None:
    pytest.importorskip("triton")
    few = launches.Experts(64)
    forward, backward = launches.experts_step("fft", few)
    assert forward.names.count("route_tiles_kernel") == 1
    assert "route_tiles_kernel" not in backward.names
    assert forward.names.count("routed_mix_kernel") == backward.names.count("routed_outer_kernel") == 2
    single, _ = launches.experts_step("direct", launches.EXPERTS[1])
    assert [name for name in single.names if "route" in name or "grouped" in name] == [
        "_grouped_mm",
        "route_tiles_kernel",
        "grouped_hankel_kernel",
        "_grouped_mm",
        "grouped_hankel_kernel",
    ]


def test_the_base_product_comes_last_and_adds_the_adapters_in_its_epilogue() -> None:
    pytest.importorskip("triton")
    case = cases.LayerCase(64, 512, 256, 128)
    for method in ("ours:direct", "ours:fft", "ours:expand"):
        for count in launches.step(method, case):
            assert count.names[-1] == "addmm_"
            assert not {"add", "add_", "mm", "copy_", "_to_copy", "zero_", "fill_"} & set(count.names), count.names
    folded, _ = launches.step("ours:fold", case)
    assert folded.names == ["expand_kernel", "mm"]
    few, _ = launches.step("ours:direct", cases.LayerCase(4, 4096, 4096, 128))
    assert few.names == ["decode_kernel"]
    split, _ = launches.step("ours:direct", cases.LayerCase(4, 4096, 1024, 128))
    assert split.names == ["decode_kernel"]


def test_bytes_are_what_a_launch_reads_and_writes() -> None:
    pytest.importorskip("triton")
    forward, backward = launches.step("base", cases.LayerCase(10, 30, 70, 10, "float32"))
    assert (forward.names, backward.names) == (["mm"], ["mm"])
    assert forward.n_bytes == backward.n_bytes == 4 * (10 * 30 + 30 * 70 + 10 * 70)
    # w and the dense matrix; x, the matrix, the product; x, W and the product that is read and written.
    expand, _ = launches.step("ours:expand", cases.LayerCase(20, 40, 60, 20, "float32"))
    w, x, dense, y = 3 * 2 * 20, 20 * 40, 40 * 60, 20 * 60
    assert expand.n_bytes == 4 * (w + dense + (x + dense + y) + (x + dense + 2 * y))


def test_in_turn_times_fresh_arguments_alternately(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(), []
    monkeypatch.setattr(timing.time, "perf_counter", clock)

    def prepare(name: str) -> str:
        clock.spend(100)  # not timed
        return name

    def call(name: str) -> None:
        order.append(name)
        clock.spend({"a": 1.0, "b": 2.0}[name])

    calls = {name: ((lambda name=name: prepare(name)), call) for name in ("a", "b")}
    found = timing.in_turn(calls, CPU, seconds=0.0)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert (found["a"].median, found["b"].median, found["a"].repeats) == (1.0, 2.0, 3)
    assert found["a"].peak_bytes is None


def test_peak_and_transient_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device whose memory is a script: 100 allocated before, 1000 at the highest."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    assert timing.peak_bytes(lambda: "result", torch.device("cuda")) == ("result", 900)
    assert timing.peak_bytes(lambda: "result", CPU) == ("result", None)

    monkeypatch.setattr(memory.timing, "peak_bytes", lambda call, device: (call(), 900))
    record: runs.Record = {}
    memory._measure(cases.LayerCase(5, 12, 20, 4, "float32"), "ours:torch", CPU, record)
    outputs, grads = 4 * 5 * 20, 4 * 5 * 12 + 4 * 5 * 3 * 4
    assert record["saved"]["activations"] == record["x_bytes"] == 4 * 5 * 12
    assert record["transient"] == {"forward": 900 - outputs, "backward": 900 - grads}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_plots_of_several_panels(tmp_path: Path) -> None:
    points = [(1.0, 2.0), (8.0, 1.5)]
    plots.lines({str(i): {"a": points, "b": points[i % 2 :]} for i in range(4)}, tmp_path / "lines.png", x="x", y="y")
    plots.bars({"one": {"a": 1.0, "b": 2.0}}, tmp_path / "bars.png", y="y")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("lines.png", "bars.png"))


# The tests that the job runs

# Hypothesis's plugin takes every process of pytest two seconds to import.
QUICK = ("-p", "no:hypothesispytest")


def test_run_tests_counts(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        textwrap.dedent(
            """
            import sys
            import pytest

            pytestmark = pytest.mark.native

            def test_good(): assert "" not in sys.path

            def test_bad(): assert False

            @pytest.mark.skip(reason="no such card")
            def test_skipped(): pass

            def test_subjects_on_the_gpu(): assert False, "the job does this itself"

            @pytest.mark.nightly
            def test_long(): assert False
            """
        )
    )
    assert test_subjects_on_the_gpu.__name__ == native_tests.LEFT_OUT
    options = native_tests._arguments(tiny=False)
    chosen = options[: options.index(next(option for option in options if option.endswith(".py")))]
    found = native_tests.run_tests(tmp_path, [*QUICK, *chosen, str(tests)], limit=1800)
    assert found["outcome"] == "failed"
    assert [found[name] for name in ("passed", "failed", "skipped")] == [1, 1, 1]
    # Before the file's name may stand folders, by where pytest takes its root to be.
    assert {name.rpartition(".")[2]: why for name, why in found["failures"].items()} == {
        "test_some::test_bad": "assert False"
    }
    assert found["reasons_to_skip"] == ["no such card"]
    assert "test_bad" in (tmp_path / "tests.log").read_text()


def test_run_tests_ends_in_time(tmp_path: Path) -> None:
    tests = tmp_path / "test_endless.py"
    tests.write_text("import time\n\ndef test_endless(): time.sleep(600)\n")
    found = native_tests.run_tests(tmp_path, [*QUICK, str(tests)], limit=3)
    assert found["outcome"] == "interrupted after 3 s"
    assert found["seconds"] < 600


def test_an_interrupted_run_does_not_wait_for_its_processes_until_it_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    told = tmp_path / "seconds"
    (tmp_path / "test_some.py").write_text("def test_some(): pass\n")
    (tmp_path / "conftest.py").write_text(
        "from xdist.workermanage import NodeManager\n\n"
        f"def pytest_unconfigure(): open({str(told)!r}, 'w').write(str(NodeManager.EXIT_TIMEOUT))\n"
    )
    assert native_tests.run_tests(tmp_path, [*QUICK, str(tmp_path)], limit=1800, workers=1)["outcome"] == "passed"
    assert int(told.read_text()) < native_tests.GRACE


def test_what_runs_on_a_device_is_native(request: pytest.FixtureRequest, device: torch.device) -> None:
    assert request.node.get_closest_marker("native")


def test_a_dead_context_costs_one_test(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    # In place of torch, which every process would take seconds to import.
    (tmp_path / "torch.py").write_text(
        textwrap.dedent(
            """
            from types import SimpleNamespace

            Tensor = device = None
            manual_seed = int
            cuda = SimpleNamespace(is_available=lambda: False, is_initialized=lambda: False)
            """
        )
    )
    (tmp_path / "test_some.py").write_text(
        textwrap.dedent(
            """
            import pytest, torch

            def dead(): raise RuntimeError("CUDA error: an illegal memory access was encountered")

            @pytest.mark.parametrize("i", range(20))
            def test_some(i):
                if i == 3:
                    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, dead
                if torch.cuda.is_initialized():
                    dead()
            """
        )
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = native_tests.run_tests(
        tmp_path, [*QUICK, str(tmp_path)], limit=1800, workers=2, variables={"PYTHONPATH": path}
    )
    assert found["passed"] == 19
    assert list(found["failures"].values()) == ["RuntimeError: CUDA error: an illegal memory access was encountered"]
    assert "crashed while running" in (tmp_path / "tests.log").read_text()


# From the repository root


def _python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_our_folder_does_not_shadow_the_published_kernels(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("published = True\n")
    found = _python(
        """
        import importlib.util
        before = importlib.util.find_spec("kernels").origin
        import bench
        import kernels
        print(before, kernels.published)
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert found.stdout.split() == [str(ROOT / "kernels" / "__init__.py"), "True"], found.stderr


@pytest.mark.parametrize(("subject", "option"), [("cpu", "--json"), ("gpu", "--budget-s")])
def test_commands_explain_themselves(
    subject: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [subject, "--help"])
    monkeypatch.delitem(sys.modules, f"bench.{subject}", raising=False)
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module(f"bench.{subject}", run_name="__main__", alter_sys=True)
    assert option in capsys.readouterr().out


def test_bench_runs_where_the_package_is_not_installed() -> None:
    found = _python(
        """
        import sys, importlib.util
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
        sys.path_importer_cache.clear()
        del sys.path[0]
        if importlib.util.find_spec("c3a_triton") is not None:
            print("installed")
            sys.exit()
        sys.path.insert(0, "")
        import bench
        import c3a_triton
        import c3a_triton.kernels
        from pathlib import Path
        import os
        assert Path(c3a_triton.kernels.__file__).resolve() == bench.ROOT / "kernels" / "__init__.py"
        assert Path(c3a_triton.__file__).resolve() == bench.ROOT / "c3a_triton" / "__init__.py"
        assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(bench.ROOT / "out" / "site")
        """
    )
    assert found.returncode == 0, found.stderr
    if found.stdout.strip() == "installed":
        pytest.skip("the package is installed other than as editable")


# What the cost model predicts of the goals


def test_predictions_are_written_between_the_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"above\n{predicted.BEGIN}\nold\n{predicted.END}\nbelow\n")
    assert predicted.main(document) == 0
    text = document.read_text()
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert predicted.table() in text
    assert "old" not in text
    document.write_text("no markers")
    assert predicted.main(document) == 1
    assert "lacks the markers" in capsys.readouterr().err
    assert document.read_text() == "no markers"


def test_layers_that_share_their_input_are_predicted_to_share_its_spectrum() -> None:
    decoder = cases.DECODERS[0]
    alone = sum(predicted._both(part, "ours:auto") for _, part in decoder.parts)
    shared = predicted._both(decoder, "ours:auto")
    # Two of q, k, v and one of gate and up: 4 bytes a value (x read, its spectrum written), forward and backward, but
    # for what was found of x in the forward pass, and of its spectrum in both.
    most = 3 * 2 * 4 * 8192 * 4096 / 4.2e12
    assert most - 3 * 3 * 24e6 / 4.2e12 <= alone - shared < most
    assert sum(predicted._both(part, "base") for _, part in decoder.parts) == predicted._both(decoder, "base")
