"""The GPU job: `python -m bench.gpu --out DIR [--resume]`, from the repository root, in under ten minutes.

First every test, natively on the GPU; then one layer's forward, backward and both against its peers, in bfloat16. It
needs torch, triton and this repository; PEFT's rows and the tests appear where PEFT and pytest are installed.
`DIR/results.json` is rewritten after every measurement, so a run that is cut short loses nothing and `--resume`
goes on from there; `DIR/summary.md` is written last.
"""

import argparse
import faulthandler
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from c3a_triton import dispatch

from . import ROOT, cases, layer, peers, report, timing

__all__ = ["Results", "main", "run_tests", "summary"]

# What a run is worth without the rest comes first: the numbers of every path, then what a user sees.
FIRST_TESTS = ("test_kernels.py", "test_ops.py", "test_layer.py", "test_manager.py", "test_peft.py")
TESTS_SHARE = 0.5  # of the budget, at most; a fresh machine compiles every kernel it tests


@dataclass
class Results:
    """What has been measured, on disk after every addition."""

    path: Path
    environment: dict[str, Any]
    tests: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    layers: layer.Records = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, environment: dict[str, Any], *, resume: bool) -> "Results":
        """New results, or with `resume` those in `path`.

        Raises:
            FileExistsError: there are results already, and `resume` is False.
            ValueError: those in `path` are of another device, commit or set of versions.
        """
        if not path.exists():
            return cls(path, environment)
        if not resume:
            raise FileExistsError(f"{path} exists: go on from it with --resume, or choose another --out")
        found = report.read_json(path)
        for key in ("device", "gpu", "commit", "versions"):
            before, now = found["environment"][key], environment[key]
            if key == "gpu" and before is not None and now is not None:
                before, now = before["name"], now["name"]  # clocks differ from minute to minute
            if before != now:
                raise ValueError(f"{path} was measured with {key} {before}, this is {now}: choose another --out")
        return cls(path, found["environment"], found["tests"], found["notes"], found["layers"])

    def save(self) -> None:
        """Write everything."""
        content = {"environment": self.environment, "tests": self.tests, "notes": self.notes, "layers": self.layers}
        report.write_json(self.path, content)


# The tests


def run_tests(out: Path, paths: Sequence[Path], *, limit: float, workers: int = 0) -> dict[str, Any]:
    """Run pytest on `paths` in a process of its own and read its counts.

    Args:
        out: folder for `tests.log` and `tests.xml`.
        limit: seconds after which the run is interrupted; what had finished by then is counted.
        workers: processes of pytest-xdist; 0 for none.

    Returns:
        `status` ("passed", "failed", "interrupted" or why it did not run), counts, seconds, and the failures' names.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"status": "not run: pytest is not installed"}
    xml = out / "tests.xml"
    xml.unlink(missing_ok=True)
    # Not `python -m pytest`: that would put the root on the path (see bench/__init__.py).
    start_pytest = "import sys; del sys.path[0]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", start_pytest, "-v", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    command += ["-n", str(workers)] if workers else []
    command += [str(path) for path in paths]
    # On a GPU nothing runs in the interpreter.
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.perf_counter()
    with (out / "tests.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            interrupted = not _wait(process, limit)
            if interrupted:
                process.send_signal(signal.SIGINT)  # pytest then still writes its report
                _wait(process, 20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its workers, which are in its session
                process.wait()
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "exit_code": process.returncode}
    if xml.exists():
        result |= _read_junit(xml)
    if interrupted:
        return {"status": f"interrupted after {limit:.0f} s"} | result
    if process.returncode == 0:
        return {"status": "passed"} | result
    return {"status": "failed" if process.returncode == 1 else f"pytest stopped with {process.returncode}"} | result


def _wait(process: subprocess.Popen[Any], seconds: float) -> bool:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _read_junit(path: Path) -> dict[str, Any]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, skips = [], set()
    for test in ElementTree.parse(path).iter("testcase"):
        name = f"{test.get('classname')}::{test.get('name')}"
        skipped = test.find("skipped")
        if test.find("failure") is not None or test.find("error") is not None:
            counts["failed"] += 1
            failures.append(name)
        elif skipped is not None:
            counts["skipped"] += 1
            skips.add(str(skipped.get("message")))
        else:
            counts["passed"] += 1
    return counts | {"failures": failures, "reasons_to_skip": sorted(skips)}


def _test_paths() -> list[Path]:
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return sorted(
        files, key=lambda file: FIRST_TESTS.index(file.name) if file.name in FIRST_TESTS else len(FIRST_TESTS)
    )


# The report


def _tests_line(tests: dict[str, Any] | None) -> str:
    if tests is None:
        return "Tests: not run."
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped") if name in tests)
    return f"Tests: {tests['status']}" + (f"; {counts}" if counts else "") + "."


def summary(results: Results, layers: Sequence[cases.LayerCase], methods: Sequence[str]) -> str:
    """The markdown report: where, the tests, times per mode, memory, and everything that went wrong or is missing."""
    where = results.environment
    gpu = where["gpu"] or {"name": "no GPU: this run only proves the job's code; its times mean nothing"}
    lines = ["# One C3A layer against its peers", ""]
    lines += [f"- {key}: {value}" for key, value in gpu.items()]
    lines += [f"- {name}: {version}" for name, version in where["versions"].items() if version is not None]
    lines += [f"- commit: {where['commit']}", f"- {_tests_line(results.tests)}"]
    lines += [f"  - failed: {name}" for name in (results.tests or {}).get("failures", [])]
    lines += [f"- {note}" for note in results.notes]
    lines += layer.tables(results.layers, layers, methods)
    return "\n".join(lines) + "\n"


# The job


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results, logs and tables")
    parser.add_argument("--resume", action="store_true", help="go on from the results in DIR")
    parser.add_argument("--budget-s", type=float, default=570, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--only", choices=("tests", "layers"), help="only one part of the job")
    parser.add_argument("--workers", type=int, help="test processes (default: up to 6 where pytest-xdist is installed)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu only together with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, to try the job itself")
    args = parser.parse_args(argv)
    if torch.device(args.device).type == "cpu" and not args.tiny:
        parser.error("--device cpu only tries the job's code: give --tiny too")
    return args


def _workers() -> int:
    if importlib.util.find_spec("xdist") is None:
        return 0
    return max(1, min(6, (os.cpu_count() or 2) // 2))


def _measure_layers(
    results: Results,
    layers: Sequence[cases.LayerCase],
    methods: Sequence[str],
    timer: timing.Timer,
    device: torch.device,
    deadline: float,
) -> None:
    for key, case, method in layer.plan(layers, methods):
        if key in results.layers:
            continue
        if time.monotonic() > deadline:
            print("the budget is spent: the rest is not measured (go on with --resume)", flush=True)
            return
        try:
            record = layer.measure(case, method, timer, device)
        except layer.DeviceLostError as error:
            results.layers[key] = error.args[0]
            results.save()
            raise
        results.layers[key] = record
        results.save()
        times = ", ".join(f"{mode} {report.format_seconds(t['median'])}" for mode, t in record["times"].items())
        print(
            f"{key}: {times if record['status'] == 'ok' else record['status'] + ': ' + record['message']}", flush=True
        )


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status: 0 only if every test that ran passed and every result is right."""
    args = _parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu needs an NVIDIA GPU, and torch sees none on this machine. CPU figures: python -m bench.cpu")
        return 1
    deadline = time.monotonic() + args.budget_s
    # A kernel that never ends cannot be interrupted; the results on disk survive this exit.
    faulthandler.dump_traceback_later(args.budget_s + 25, exit=True)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    layers = cases.LAYERS_TINY if args.tiny else cases.LAYERS
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        results = Results.open(args.out / "results.json", report.environment(device), resume=args.resume)
    except (FileExistsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    missing = peers.why_no_peft()
    if missing is not None and missing not in results.notes:
        results.notes.append(missing)
    backends = ("auto", *(name for name in dispatch.BACKENDS if name not in ("auto", "reference")))
    methods = peers.methods(backends, with_peft=missing is None)
    results.save()

    if args.only != "layers" and results.tests is None:
        print("tests ...", flush=True)
        workers = _workers() if args.workers is None else args.workers
        results.tests = run_tests(
            args.out,
            _test_paths(),
            limit=min(TESTS_SHARE * args.budget_s, deadline - time.monotonic()),
            workers=workers,
        )
        results.save()
        print(_tests_line(results.tests), flush=True)
    if args.only != "tests":
        timer = timing.CudaTimer(device) if device.type == "cuda" else timing.CpuTimer()
        try:
            _measure_layers(results, layers, methods, timer, device, deadline)
        except layer.DeviceLostError as error:
            return _start_again(error.args[0], argv, deadline - time.monotonic())

    text = summary(results, () if args.only == "tests" else layers, methods)
    (args.out / "summary.md").write_text(text, encoding="utf-8")
    print("\n" + text + f"\nwritten: {results.path}, {args.out / 'summary.md'}")
    bad_tests = results.tests is not None and results.tests["status"] != "passed"
    bad_layers = any(record["status"] in ("wrong", "error") for record in results.layers.values())
    return 3 if bad_tests or bad_layers else 0


def _start_again(record: dict[str, Any], argv: list[str] | None, seconds_left: float) -> int:
    """Replace this process, whose GPU context is dead, by one that goes on after the case that killed it."""
    print(f"the GPU context died in {record['case']} {record['method']}: {record.get('message')}", flush=True)
    arguments = [*(sys.argv[1:] if argv is None else argv), "--resume", f"--budget-s={max(seconds_left, 30):.0f}"]
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    print("starting again:", shlex.join(command), flush=True)
    os.chdir(ROOT)
    os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main())
