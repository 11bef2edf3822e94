"""The GPU job's tests: those marked `native`, in processes of their own, and what became of them."""

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import ROOT, processes, report, runs

__all__ = ["SUBJECT", "run_tests"]

TEST_SECONDS = 60  # of one test
GRACE = 8  # seconds that an interrupted run has to write its report
WORKERS_GRACE = 3  # of them, for tests that are running
# What a run is worth without the rest comes first: the numbers of every path, then what a user sees.
FIRST = ("test_kernels.py", "test_fft.py", "test_ops.py", "test_layer.py", "test_manager.py", "test_compile.py")
TINY = ("test_numbers.py",)
# What the job does itself, at its own sizes; tiny ones are not among the kernels compiled ahead of time.
LEFT_OUT = "test_subjects_on_the_gpu"


def run_tests(
    out: Path, arguments: Sequence[str], *, limit: float, workers: int = 0, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run pytest in a process of its own and read its counts.

    Args:
        out: folder for `tests.log` and `tests.xml`.
        arguments: files, and options of pytest.
        limit: seconds after which the run is interrupted; what had finished by then is counted.
        workers: processes of pytest-xdist, where it is installed; 0 for none.
        variables: of its environment, beside this process's own.

    Returns:
        `outcome` ("passed", "failed", "interrupted" or why it did not run), counts, seconds, and the failures' names.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"outcome": "not run: pytest is not installed"}
    xml = out / "tests.xml"
    xml.unlink(missing_ok=True)
    # Not `python -m pytest`: that would put the root on the path (see bench/__init__.py).
    start_pytest = "import sys; del sys.path[0]; import pytest; {}sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-v", "-p", "no:cacheprovider", f"--junitxml={xml.resolve()}"]
    with_xdist = workers and importlib.util.find_spec("xdist") is not None
    if with_xdist:
        options += ["-n", str(workers), "--dist", "load"]  # in their order: the first are worth most
    # An interrupted run waits so long for its processes, which may be in a test, before it writes its report.
    patience = f"import xdist.workermanage as m; m.NodeManager.EXIT_TIMEOUT = {WORKERS_GRACE}; " if with_xdist else ""
    command = [sys.executable, "-c", start_pytest.format(patience), *options]
    if importlib.util.find_spec("pytest_timeout") is not None:
        # A kernel that never ends ends its process; the others go on.
        command += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    # On a GPU nothing runs in the interpreter; more threads than one or two would wait for each other, and so would
    # the processes in which torch.compile compiles, one for each core by default.
    threads = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = processes.natively() | threads | dict(variables or {})
    log = out / "tests.log"
    ended = processes.run([*command, *arguments], log=log, limit=limit, env=environment, grace=GRACE)
    result: dict[str, Any] = {"seconds": ended.seconds, "exit_code": ended.exit_code}
    if xml.exists():
        result |= _read_junit(xml)
    if ended.interrupted:
        return {"outcome": f"interrupted after {limit:.0f} s"} | result
    if ended.exit_code == 0:
        return {"outcome": "passed"} | result
    return {"outcome": "failed" if ended.exit_code == 1 else f"pytest stopped with {ended.exit_code}"} | result


def _read_junit(path: Path) -> dict[str, Any]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: dict[str, str] = {}
    skips, slowest = set(), []
    for test in ElementTree.parse(path).iter("testcase"):
        name = f"{test.get('classname')}::{test.get('name')}"
        slowest.append((float(test.get("time", 0)), name))
        skipped = test.find("skipped")
        wrong = next((found for kind in ("failure", "error") if (found := test.find(kind)) is not None), None)
        if wrong is not None:
            counts["failed"] += 1
            # The first is its own; a second says that it ended its process.
            failures.setdefault(name, str(wrong.get("message")).partition("\n")[0][:300])
        elif skipped is not None:
            counts["skipped"] += 1
            skips.add(str(skipped.get("message")))
        else:
            counts["passed"] += 1
    longest = {name: seconds for seconds, name in sorted(slowest, reverse=True)[:5]}
    return counts | {"failures": failures, "reasons_to_skip": sorted(skips), "longest": longest}


def _arguments(tiny: bool) -> list[str]:
    """The native tests; in a rehearsal a few of them."""
    folder = ROOT / "tests"
    names = sorted(path.name for path in folder.glob("test_*.py"))
    chosen = TINY if tiny else sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    return ["-m", "native and not nightly", "-k", f"not {LEFT_OUT}", *(str(folder / name) for name in chosen)]


def _tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    yield runs.Task("native", 0, partial(_run, setting))


def _run(setting: runs.Setting, record: runs.Record) -> None:
    limit = max(1.0, setting.seconds_left() - GRACE)
    record |= run_tests(setting.scratch, _arguments(setting.tiny), limit=limit, workers=setting.workers)
    if record["outcome"] != "passed":
        # An interrupted run without failures has shown nothing wrong.
        wrong = record.get("failed") or record["outcome"].startswith("pytest stopped")
        record |= {"status": "wrong" if wrong else "incomplete", "message": record["outcome"]}


def _tables(records: runs.Records) -> list[str]:
    lines = [""]
    for record in records.values():
        counts = ", ".join(f"{record[name]} {name}" for name in ("passed", "failed", "skipped") if name in record)
        spent = f" in {report.format_seconds(record['seconds'])}" if "seconds" in record else ""
        lines.append(f"{record.get('outcome', record['status'])}{spent}; {counts}.")
        lines += [f"- failed: {name}: {message}" for name, message in record.get("failures", {}).items()]
        slow = (f"{name} {report.format_seconds(seconds)}" for name, seconds in record.get("longest", {}).items())
        lines += ["", f"Longest: {', '.join(slow)}."]
    return lines


SUBJECT = runs.Subject(
    "tests", "Tests that touch the device", _tasks, _tables, goals=lambda records: [], plot=lambda records, path: None
)
