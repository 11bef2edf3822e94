"""The benchmarks' own code: known clocks, failures that must be recorded, a GPU job that must run at first contact."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]


def _load_bench() -> ModuleType:
    """The package `bench` without the repository root on the path."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
    package = sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


_load_bench()
from bench import cases, gate, gpu, layer, peers, report, timing  # noqa: E402

CPU = torch.device("cpu")
CASE = cases.LayerCase(5, 12, 20, 4, "float32")
needs_peft = pytest.mark.skipif(peers.why_no_peft() is not None, reason="needs PEFT")


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


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
    gate.check_layer(built, peers.trained(built)[0], x, dy, gate.Truth.of(base.weight, w, x, dy), check_dx=check_dx)


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


# One layer: what goes wrong is recorded


class Failing:
    """A timer that meets an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def measure(self, call: object) -> timing.Timing:
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.cuda.OutOfMemoryError("no room"), "out of memory"), (RuntimeError("launch failed"), "error")],
    ids=["memory", "runtime"],
)
def test_a_failing_case_is_recorded(error: Exception, status: str) -> None:
    record = layer.measure(CASE, "ours:torch", Failing(error), CPU)
    assert record["status"] == status
    assert str(error) in record["message"]
    assert record["saved"]["activations"] > 0  # what was measured before stays
    json.dumps(record)


def test_a_wrong_case_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gate.TOLERANCES, torch.float32, 0.0)
    record = layer.measure(CASE, "ours:torch", timing.CpuTimer(), CPU)
    assert record["status"] == "wrong"
    assert record["times"] == {}


def test_a_dead_gpu_context_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def build(*args: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(layer.peers, "frozen_base", build)
    with pytest.raises(layer.DeviceLostError) as caught:
        layer.measure(CASE, "ours:torch", timing.CpuTimer(), torch.device("cuda"))
    assert caught.value.args[0]["status"] == "error"
    assert "illegal memory access" in caught.value.args[0]["message"]


def test_plan_measures_peers_without_block_size_once() -> None:
    layers = (cases.LayerCase(8, 16, 16, 4), cases.LayerCase(8, 16, 16, 8), cases.LayerCase(1, 16, 16, 4))
    planned = [(case.n_tokens, case.b, method) for _, case, method in layer.plan(layers, ("base", "ours:auto"))]
    assert planned == [(8, 4, "base"), (8, 4, "ours:auto"), (8, 8, "ours:auto"), (1, 4, "base"), (1, 4, "ours:auto")]


# The GPU job


def _job(out: Path, *more: str) -> int:
    return gpu.main(["--device", "cpu", "--tiny", "--only", "layers", "--out", str(out), *more])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "LAYERS_TINY", (CASE, cases.LayerCase(1, 12, 20, 2, "float32")))
    monkeypatch.setattr(gpu.dispatch, "BACKENDS", ("auto", "reference", "torch"))
    # The job's watchdog would outlive the test.
    monkeypatch.setattr(gpu.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("small")
def test_job_writes_as_it_goes_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = layer.measure
    counted: list[str] = []

    def measure_two(case: cases.LayerCase, method: str, *args: object) -> dict[str, object]:
        counted.append(method)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return measure(case, method, *args)

    monkeypatch.setattr(layer, "measure", measure_two)
    with pytest.raises(KeyboardInterrupt):
        _job(tmp_path)
    assert len(report.read_json(tmp_path / "results.json")["layers"]) == 2
    assert not (tmp_path / "summary.md").exists()

    assert _job(tmp_path) == 2  # not over results that are there
    assert _job(tmp_path, "--resume") == 0
    results = report.read_json(tmp_path / "results.json")
    n_planned = len(
        list(layer.plan(cases.LAYERS_TINY, list(dict.fromkeys(r["method"] for r in results["layers"].values()))))
    )
    assert len(results["layers"]) == n_planned
    assert len(counted) == n_planned + 1
    assert {record["status"] for record in results["layers"].values()} == {"ok"}
    for record in results["layers"].values():
        assert set(record["times"]) == {"forward", "backward", "both"}
        assert all(found["median"] > 0 for found in record["times"].values())
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "not measured" not in text
    assert "ours:auto" in text
    assert results["environment"]["versions"]["torch"] == torch.__version__

    monkeypatch.setitem(results["environment"], "commit", "another")
    report.write_json(tmp_path / "results.json", results)
    assert _job(tmp_path, "--resume") == 2  # figures of two commits do not mix


@pytest.mark.usefixtures("small")
def test_job_out_of_time_names_what_is_missing(tmp_path: Path) -> None:
    assert _job(tmp_path, "--budget-s", "-1") == 0
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "ours:auto T=5 12→20 b=4 float32: not measured" in text


@pytest.mark.usefixtures("small")
def test_job_reports_errors_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.timing, "CpuTimer", lambda: Failing(RuntimeError("launch failed")))
    assert _job(tmp_path) == 3
    assert "error: RuntimeError: launch failed" in (tmp_path / "summary.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("small")
def test_job_starts_again_after_a_dead_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def measure(case: cases.LayerCase, method: str, *args: object) -> dict[str, object]:
        raise layer.DeviceLostError({"case": {}, "method": method, "status": "error", "message": "gone", "times": {}})

    monkeypatch.setattr(layer, "measure", measure)
    monkeypatch.setattr(gpu.os, "execv", lambda path, command: started.append(command) or 0)
    monkeypatch.setattr(gpu.os, "chdir", lambda path: None)
    _job(tmp_path)
    assert started[0][1:3] == ["-m", "bench.gpu"]
    assert "--resume" in started[0]
    assert len(report.read_json(tmp_path / "results.json")["layers"]) == 1  # the case that did it is not tried again


def test_job_says_that_it_needs_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--device", "cpu"])


@pytest.mark.gpu
@pytest.mark.usefixtures("small")
def test_job_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(gpu.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)
    assert gpu.main(["--tiny", "--only", "layers", "--out", str(tmp_path)]) == 0
    results = report.read_json(tmp_path / "results.json")
    assert results["environment"]["gpu"]["name"] == torch.cuda.get_device_name()
    assert {record["status"] for record in results["layers"].values()} == {"ok"}


def test_run_tests_counts(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        textwrap.dedent(
            """
            import sys
            import pytest

            def test_good(): assert "" not in sys.path

            def test_bad(): assert False

            @pytest.mark.skip(reason="no such card")
            def test_skipped(): pass
            """
        )
    )
    found = gpu.run_tests(tmp_path, [tests], limit=120)
    assert found["status"] == "failed"
    assert [found[name] for name in ("passed", "failed", "skipped")] == [1, 1, 1]
    # Before the file's name may stand folders, by where pytest takes its root to be.
    assert [name.rpartition(".")[2] for name in found["failures"]] == ["test_some::test_bad"]
    assert found["reasons_to_skip"] == ["no such card"]
    assert "test_bad" in (tmp_path / "tests.log").read_text()


def test_run_tests_ends_in_time(tmp_path: Path) -> None:
    tests = tmp_path / "test_endless.py"
    tests.write_text("import time\n\ndef test_endless(): time.sleep(600)\n")
    found = gpu.run_tests(tmp_path, [tests], limit=3)
    assert found["status"] == "interrupted after 3 s"
    assert found["seconds"] < 60


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


def test_transformers_imports_from_the_root() -> None:
    pytest.importorskip("transformers")
    found = _python(
        """
        import bench, sys
        from transformers import LlamaForCausalLM
        from bench import peers
        kernels = sys.modules.get("kernels")
        assert kernels is None or bench.ROOT not in __import__("pathlib").Path(kernels.__file__).parents
        print(peers.why_no_peft())
        """
    )
    assert found.returncode == 0, found.stderr
    if peers.why_no_peft() is None:
        assert found.stdout.strip() == "None"


def test_commands_explain_themselves() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.cpu", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


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
