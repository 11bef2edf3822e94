"""What was wrong is run again, and the report points at what was planted."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_package  # noqa: F401
import pytest
import torch
from torch import Tensor

from bench import diagnosis, gpu, kernel_cases, native_tests, processes, report, runs
from c3a_triton.benchmark import cases, layer, timing
from c3a_triton.operator import backends
from c3a_triton.operator.launch import direct, plans, tiles

CPU = torch.device("cpu")
TOLERANCE = 2e-5


def _key(start: str) -> str:
    return next(case.key for case in kernel_cases.CASES if case.key.startswith(start))


BIAS = _key("direct T=3 w=5×3×7")
TABLE = _key("direct T=20 w=5×3×5")
EXPAND = _key("expand T=0 w=5×3×7")


# What was wrong, read off the results of `right`


def test_what_is_wrong_is_read_off_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    some = [case for case in kernel_cases.CASES if case.key == BIAS or case.operator in ("expand", "add", "decode")]
    monkeypatch.setattr(kernel_cases, "CASES", some)
    ok, wrong = {"status": "ok"}, {"status": "wrong", "message": "m"}
    square = {"case": vars(cases.LayerCase(4, 8, 8, 4)), "method": "ours:fft"}
    records: dict[str, runs.Records] = {
        "guards": {"guards": wrong | {"failed": {BIAS: "wrong: m", "a case of another commit": "wrong: m"}}},
        "sanitizer": {"memcheck": wrong | {"verdict": "errors", "kernels": ["expand_kernel"], "failed": {}}},
        "tests": {"native": wrong | {"failures": {"tests.test_kernels::test_a[1-x]": "m", "gone.test_gone::t": "m"}}},
        "op": {"a": wrong | square, "b": ok | square, "peft": wrong | square | {"method": "peft_c3a"}},
        "ceilings": {"copy": {"status": "error", "message": "m"}},
    }
    found = diagnosis.wrong(records)
    assert found.cases[0] == BIAS
    assert list(found.cases[1:]) == [case.key for case in some if case.operator in ("expand", "add")]
    assert found.tests == ("tests/test_kernels.py::test_a[1-x]",)
    assert [record["key"] for record in found.layers] == ["a"]
    clean = {"guards": {"guards": ok | {"failed": {}}}, "tests": {"native": ok | {"failures": {}}}, "op": {"b": ok}}
    assert not diagnosis.wrong(clean)


# Where a result is wrong


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ((slice(None), slice(None)), "everywhere"),
        ((slice(16, 32), slice(None)), "rows 16–31 of 48"),
        ((slice(None), slice(8, 16)), "columns 8–15 of 24"),
        ((slice(None), slice(3, None, 8)), "columns 3 mod 8"),
        ((slice(40, None), [7, 15, 23]), "rows 40–47 of 48, columns 7 mod 8"),
        (([0, 2, 4, 6, 8, 10, 12], [5]), "rows 0, 2, 4, 6, 8, 10, … (7 in all) of 48, columns 5 of 24"),
    ],
    ids=["all", "tile of rows", "a block", "a phase", "the last rows of a phase", "some rows of a column"],
)
def test_the_pattern_of_wrong_elements_is_told(wrong: Any, where: str) -> None:
    truth = torch.randn(48, 24, dtype=torch.float64)
    value = truth.clone()
    if isinstance(wrong[0], list) or isinstance(wrong[1], list):
        rows = torch.arange(48)[wrong[0]]
        value[rows[:, None], torch.tensor(range(24))[wrong[1]]] += 9.0
    else:
        value[wrong] += 9.0
    found = diagnosis.pattern(value, truth, 8, TOLERANCE)
    assert found["where"] == where
    assert found["wrong"] == int((value != truth).sum())
    row, column = found["worst"][0]["at"]
    assert value[row, column] != truth[row, column]


def test_the_worst_element_and_its_neighbours_are_told() -> None:
    truth = torch.arange(12, dtype=torch.float64).view(2, 1, 6) + 1.0
    value = truth.clone()
    value[1, 0, 5], value[0, 0, 2] = torch.nan, 6.0
    found = diagnosis.pattern(value, truth, 6, TOLERANCE)
    assert (found["wrong"], found["of"], found["not_finite"], found["rows"]) == (2, 12, 1, "0–1")
    worst, second = found["worst"][:2]
    assert (worst["at"], worst["expected"], worst["expected_around"]) == ([1, 5], 12.0, [11.0, 12.0])
    assert (second["at"], second["got"], second["got_around"]) == ([0, 2], 6.0, [2.0, 6.0, 4.0])
    assert found["where"] == "columns 2, 5 mod 6, 50.0% of them"
    slightly = diagnosis.pattern(truth * 1.0001, truth, 6, TOLERANCE)  # no element alone is out of bounds
    assert (slightly["where"], slightly["ratio"]) == ("everywhere", pytest.approx(1.0001))


# A case in variants


def _child(tmp_path: Path, *options: str) -> dict[str, runs.Record]:
    path = tmp_path / "found.json"
    assert diagnosis.main(["--out", str(path), "--device", "cpu", *options]) == 0
    return report.read_json(path)["cases"]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Plants a bug in what `direct_product` returns: a function of its result, x and options."""
    pytest.importorskip("triton")
    right = direct.direct_product

    def plant(bug: Callable[..., None]) -> None:
        def direct_product(x: Tensor, w: Tensor, **options: Any) -> Tensor:
            y = right(x, w, **options)
            bug(y, x, w, **options)
            return y

        monkeypatch.setattr(direct, "direct_product", direct_product)

    return plant


@pytest.mark.interpreter
def test_variants_point_at_a_bias_that_is_added_twice(tmp_path: Path, planted: Any) -> None:
    planted(lambda y, x, w, bias, **options: None if bias is None else y.add_(bias))
    found = _child(tmp_path, "--case", BIAS)
    assert [name for name, record in found.items() if record["status"] == "ok"] == ["without bias"]
    assert found.keys() == {
        *("as it was", "once more", "with unaligned", "with apart", "without bias", "with out", "in float16"),
        *("in bfloat16", "one stage", "four warps", "without guards"),
    }
    first = found["as it was"]
    assert first["bits"] == found["once more"]["bits"]
    assert first["operands"]["x"]["shape"] == [3, 21]
    assert first["results"]["y"]["where"] == "everywhere"


@pytest.mark.interpreter
def test_variants_point_at_rows_of_unaligned_float16(tmp_path: Path, planted: Any) -> None:
    def bug(y: Tensor, x: Tensor, w: Tensor, **options: Any) -> None:
        if x.data_ptr() % 16 and x.dtype == torch.float16:
            y[16:] = 0

    planted(bug)
    found = _child(tmp_path, "--case", TABLE)
    right = {name for name, record in found.items() if record["status"] == "ok"}
    assert right == {"without unaligned", "in float32", "in bfloat16"}
    assert found["as it was"]["results"]["y"]["where"] == "rows 16–19 of 20"
    assert "16 tokens a tile" in found


@pytest.mark.interpreter
def test_launches_of_variants_are_changed(tmp_path: Path, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bug sees of the kernel's launch: tiles and launches really change, and come back."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: list[tuple[int, int, int]] = []
    run = InterpretedFunction.run

    def noting(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel.__name__ == "table_product_kernel":
            seen.append((kwargs["BLOCK_T"], kwargs["num_stages"], kwargs["num_warps"]))
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", noting)
    _child(tmp_path, "--case", TABLE)
    committed = tiles.product_tile("sm_80", 2, 20)
    as_it_was = (committed.block_t, committed.num_stages, committed.num_warps)
    assert seen[0] == as_it_was
    assert {(16, *as_it_was[1:]), (as_it_was[0], 1, as_it_was[2]), (*as_it_was[:2], 4)} <= set(seen)
    assert seen[-1] == as_it_was  # without guards, after the others


@pytest.mark.interpreter
def test_a_case_goes_on_behind_the_variant_that_ended_the_process(
    tmp_path: Path, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(task: runs.Task, device: torch.device) -> runs.Record:
        raise runs.DeviceLostError({"status": "error", "message": "an illegal memory access was encountered"})

    with monkeypatch.context() as patched:
        patched.setattr(runs, "attempt", attempt)
        with pytest.raises(SystemExit):
            _child(tmp_path, "--case", EXPAND)
    found = _child(tmp_path, "--case", EXPAND)
    assert found["as it was"]["message"] == "an illegal memory access was encountered"
    assert {record["status"] for name, record in found.items() if name != "as it was"} == {"ok"}


@pytest.mark.interpreter
def test_a_layer_is_computed_by_all_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(diagnosis, "LAYER_BACKENDS", ("direct", "torch"))
    right = backends.BY_NAME["direct"]

    def rolled(*args: Any, **kwargs: Any) -> Any:
        dx, dw = right.backward(*args, **kwargs)
        return dx, dw.roll(1, dims=0)

    wrong = right._replace(backward=rolled, planned_backward=None)
    monkeypatch.setitem(backends.BY_NAME, "direct", wrong)
    plans.clear_plans()
    case = cases.LayerCase(20, 16, 24, 8, "bfloat16")
    found = _child(tmp_path, "--layer", json.dumps(vars(case)))
    assert {name: record["status"] for name, record in found.items()} == {
        "direct in bfloat16": "wrong",
        "torch in bfloat16": "ok",
        "direct in float32": "wrong",
        "torch in float32": "ok",
    }
    assert found["direct in float32"]["results"].keys() == {"dw of layer 0"}
    work = layer.Workload.of(cases.DECODERS_TINY[0], "ours:torch", CPU)
    assert diagnosis._layer_case(vars(work.case)) == work.case


# The job


def _rehearsed(tmp_path: Path, records: dict[str, runs.Records], *more: str) -> tuple[int, str, dict[str, Any]]:
    right = tmp_path / "right.json"
    report.write_json(right, {"environment": {"commit": "abc"}, "records": records})
    out = tmp_path / "out"
    options = ["--device", "cpu", "--tiny", "--out", str(out), "--right", str(right), "--workers", "4"]
    code = gpu.main(["tune", *options, "--scratch", str(tmp_path / "scratch"), *more])
    return code, (out / "tune.md").read_text(encoding="utf-8"), report.read_json(out / "tune.json")


@pytest.fixture(autouse=True)
def _a_light_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """No watchdog, which would outlive the test, and no peers, whose import takes longer than all else."""
    monkeypatch.setattr(runs.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)
    monkeypatch.setattr(runs.peers, "why_no_peft", lambda: "PEFT takes no part here")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Children are calls here, so that they meet what is planted here."""
    started: list[tuple[list[str], dict[str, str]]] = []
    one_at_a_time = threading.Lock()

    def run(command: list[str], *, log: Path, limit: float, env: dict[str, str], grace: float) -> processes.Ended:
        started.append((command, env))
        with one_at_a_time:  # processes replace launches each for itself
            diagnosis.main(command[3:])
        return processes.Ended(0, False, 1.0)

    monkeypatch.setattr(processes, "run", run)
    return started


@pytest.mark.interpreter
def test_the_job_explains_what_was_wrong_instead_of_tuning(
    tmp_path: Path, planted: Any, in_this_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(lambda y, x, w, bias, **options: None if bias is None else y.add_(bias))
    monkeypatch.setattr(diagnosis, "LAYER_BACKENDS", ("torch",))
    tests: list[tuple[list[str], Any]] = []

    def run_tests(out: Path, arguments: list[str], *, limit: float, variables: Any) -> dict[str, Any]:
        tests.append((arguments, variables))
        (out / "tests.log").write_text("E   assert 1 == 2\nsome\n")
        return {"outcome": "passed" if variables else "failed"}

    monkeypatch.setattr(native_tests, "run_tests", run_tests)
    wrong = {"status": "wrong", "message": "m"}
    layer_case = vars(cases.LayerCase(4, 8, 8, 4, "float32"))
    records: dict[str, runs.Records] = {
        "guards": {"guards": wrong | {"failed": {BIAS: "wrong: m"}}},
        "tests": {"native": wrong | {"failures": {"tests.test_kernels::test_a": "m"}}},
        "op": {"ours:auto T=4": wrong | {"case": layer_case, "method": "ours:auto"}},
    }
    code, text, results = _rehearsed(tmp_path, records, "--only", "again")
    assert code == 3  # wrong again
    assert results["records"].keys() - {"cache"} == {"again"}
    assert "shows what is wrong (cases of kernels: 1, tests: 1, layers: 1)" in results["notes"][-1]
    section = text.partition(f"### {BIAS}")[2]
    assert section.strip().startswith("Right: without bias.\n\nTwice the same bits.")
    assert "| synchronously" in section
    assert "- as it was: failed\n- once more: failed\n- synchronously: passed" in text
    assert "assert 1 == 2" in text
    assert "Right: torch in float32." in text
    blocking = [env.get("CUDA_LAUNCH_BLOCKING") for command, env in in_this_process if "--case" in command]
    assert sorted(blocking, key=str) == ["1", None]
    assert len(tests) == 3
    assert tests[0][0][0].endswith("tests/test_kernels.py::test_a")


def test_the_failed_cases_come_under_the_sanitizer_too(tmp_path: Path) -> None:
    found = diagnosis.Wrong(cases=(BIAS, EXPAND))
    under = diagnosis.sanitized(found)
    assert under is not None
    setting = runs.Setting(CPU, timing.CpuTimer(), (), tiny=True, scratch=tmp_path)
    keys = [task.key for task in under.tasks(setting)]
    assert keys == ["memcheck", "racecheck"]
    assert diagnosis.sanitized(diagnosis.Wrong(tests=("a",))) is None


def test_the_job_tunes_where_nothing_was_wrong(tmp_path: Path) -> None:
    code, text, _ = _rehearsed(
        tmp_path, {"op": {"a": {"status": "ok"}}}, "--only", "tokens", "--cases", "copy bandwidth|^base"
    )
    assert code == 0
    assert "shows nothing wrong that can be run again" in text
    assert "### The cost model's constants" in text


def test_results_of_right_are_for_tuning_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["right", "--out", str(tmp_path), "--right", str(tmp_path / "right.json")])
    assert "--right FILE is for `tune`" in capsys.readouterr().err


def test_a_failed_test_runs_with_the_variables_that_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments: list[dict[str, str]] = []

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> processes.Ended:
        environments.append(env)
        return processes.Ended(0, False, 1.0)

    monkeypatch.setattr(processes, "run", run)
    for variables in (None, diagnosis.BLOCKING):
        native_tests.run_tests(tmp_path, ["a"], limit=1, variables=variables)
    assert [env.get("CUDA_LAUNCH_BLOCKING") for env in environments] == [None, "1"]
