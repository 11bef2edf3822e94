"""The GPU job: `python -m bench.gpu --out DIR [--resume]`, from the repository root, in under ten minutes.

First every test, natively on the GPU; then every kernel at small and odd sizes, between guards and, where it is found
and allowed, under compute-sanitizer; then all benchmarks, the measurements that are worth most first. It needs torch,
triton and this repository; PEFT's rows, the models, the tests and the plots appear where PEFT, transformers, pytest and
matplotlib are installed. On smaller cards, what does not fit is recorded as such; `--layers N` makes the models
smaller. `DIR/results.json` is rewritten after every measurement, so a run that is cut short loses nothing and
`--resume` goes on from there; `DIR/summary.md` is written last and ends with the goals. The checks of memory take three
times as long where they are alone: `--only guards --only sanitizer`.
"""

import argparse
import faulthandler
import importlib.util
import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ROOT, checks, memory, merge, model, op, overhead, processes, runs

__all__ = ["SUBJECTS", "main", "run_tests"]

SUBJECTS = (op.SUBJECT, model.SUBJECT, merge.SUBJECT, memory.SUBJECT, overhead.SUBJECT)  # in the order of the goals
PARTS = ("tests", *checks.NAMES, *(subject.name for subject in SUBJECTS))

# What a run is worth without the rest comes first: the numbers of every path, then what a user sees.
FIRST_TESTS = ("test_kernels.py", "test_guards.py", "test_ops.py", "test_layer.py", "test_manager.py", "test_peft.py")
TESTS_SHARE = 0.45  # of the budget, at most; a fresh machine compiles every kernel it tests
CHECK_SHARE = 0.1  # of each check of memory, of which there are three
CHECK_SHARE_ALONE = 0.32


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
    # On a GPU nothing runs in the interpreter. Interrupted, pytest still writes its report.
    ended = processes.run(command, log=out / "tests.log", limit=limit, env=processes.natively())
    result: dict[str, Any] = {"seconds": ended.seconds, "exit_code": ended.exit_code}
    if xml.exists():
        result |= _read_junit(xml)
    if ended.interrupted:
        return {"status": f"interrupted after {limit:.0f} s"} | result
    if ended.exit_code == 0:
        return {"status": "passed"} | result
    return {"status": "failed" if ended.exit_code == 1 else f"pytest stopped with {ended.exit_code}"} | result


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


# The job


def _tests_lines(tests: dict[str, Any] | None) -> list[str]:
    if tests is None:
        return ["- Tests: not run."]
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped") if name in tests)
    line = f"- Tests: {tests['status']}" + (f"; {counts}" if counts else "") + "."
    return [line, *(f"  - failed: {name}" for name in tests.get("failures", []))]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs.add_options(parser)
    parser.add_argument("--only", choices=PARTS, action="append", help="only these parts of the job")
    parser.add_argument(
        "--workers", type=int, help="test processes; the guarded cases take twice as many (default: up to 6)"
    )
    return parser.parse_args(argv)


def _workers() -> int:
    return max(1, min(6, (os.cpu_count() or 2) // 2))


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status: 0 only if every test that ran passed and every result is right."""
    args = _parse(argv)
    job = runs.open_job("python -m bench.gpu", args, on_cpu=False)
    if isinstance(job, int):
        return job
    results = job.results
    parts = args.only or PARTS
    workers = _workers() if args.workers is None else args.workers
    share = CHECK_SHARE_ALONE if set(parts) <= set(checks.NAMES) else CHECK_SHARE
    # Most of their time is compilation.
    checked = checks.subjects(args.out, limit=share * args.budget_s, workers=max(1, 2 * workers))
    subjects = [subject for subject in (*checked, *SUBJECTS) if subject.name in parts]
    try:
        if "tests" in parts and results.tests is None:
            print("tests ...", flush=True)
            results.tests = run_tests(
                args.out,
                _test_paths(),
                limit=min(TESTS_SHARE * args.budget_s, job.deadline - time.monotonic()),
                workers=workers if importlib.util.find_spec("xdist") is not None else 0,
            )
            results.save()
            print("\n".join(_tests_lines(results.tests)), flush=True)
        runs.measure(job, subjects)
    except runs.DeviceLostError as error:
        return runs.start_again("bench.gpu", str(error), argv, job.deadline - time.monotonic())
    finally:
        faulthandler.cancel_dump_traceback_later()
    head = ["# C3A on a GPU, against its peers", "", *runs.where(results), *_tests_lines(results.tests)]
    status = runs.write(job, subjects, head)
    return 3 if results.tests is not None and results.tests["status"] != "passed" else status


if __name__ == "__main__":
    sys.exit(main())
