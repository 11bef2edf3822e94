"""The GPU job's checks of memory and of races: `kernel_cases` between guards, and under compute-sanitizer.

Both are recorded as they turn out, with what the tools say in their own words. What fails is reported and fails the
job, but for racecheck's hazards, which may be false alarms about asynchronous copies: those are for a reader.

    python -m bench.checks --out DIR        all of it: the guards, memcheck and racecheck of every case
"""

import argparse
import faulthandler
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import compute_sanitizer, kernel_cases, processes, report, runs, sanitize

__all__ = ["continued", "guarded", "main", "one_each", "sanitized", "verdict"]

LINES = 8  # of a report that are kept


def guarded(cases: str = "") -> runs.Subject:
    """Every kernel case whose key matches the regular expression, between guards, in `Setting.workers` processes.

    A rehearsal takes few of them.
    """

    def tasks(setting: runs.Setting) -> Iterator[runs.Task]:
        yield runs.Task("guards", 0, partial(_guards, setting, cases or (one_each() if setting.tiny else "")))

    return _subject("guards", "Every kernel at small and odd sizes, between guards", tasks, _guards_table)


def sanitized(tools: Sequence[str] = compute_sanitizer.TOOLS, cases: str | Callable[[], str] = "") -> runs.Subject:
    """The same cases under compute-sanitizer's tools, which share the time that is left."""

    def tasks(setting: runs.Setting) -> Iterator[runs.Task]:
        chosen = cases if isinstance(cases, str) else cases()
        for i, tool in enumerate(tools):
            yield runs.Task(tool, 0, partial(_sanitize, setting, tool, chosen, 1 / (len(tools) - i)))

    return _subject("sanitizer", "Kernels under compute-sanitizer", tasks, _sanitizer_table)


def one_each() -> str:
    """A regular expression for few of the cases that together launch every kernel."""
    left, chosen = set(kernel_cases.KERNELS), []
    for case, launched in kernel_cases.launched():
        if left & launched:
            left -= launched
            chosen.append(re.escape(case.key))
    return f"^(?:{'|'.join(chosen)})$"


def _command(device: torch.device, results: Path, cases: str, *more: str) -> list[str]:
    options = ["--out", str(results.resolve()), "--device", str(device), "--cases", cases, *more]
    return [*processes.python("bench.sanitize"), *options]


def _subject(
    name: str,
    about: str,
    tasks: Callable[[runs.Setting], Iterator[runs.Task]],
    tables: Callable[[runs.Records], list[str]],
) -> runs.Subject:
    return runs.Subject(name, about, tasks, tables, goals=lambda records: [], plot=lambda records, path: None)


def _environment(device: torch.device, **more: str) -> dict[str, str]:
    """One's own, but for the interpreter, and for threads: those of several processes wait for each other's."""
    inherited = dict(os.environ) | {"TRITON_INTERPRET": "1"} if device.type == "cpu" else processes.natively()
    return inherited | {"OMP_NUM_THREADS": "2"} | more


def _words(path: Path) -> list[str]:
    """The last lines of a log."""
    return path.read_text(errors="replace").strip().splitlines()[-LINES:] if path.exists() else []


# Between guards


def _guards(setting: runs.Setting, cases: str, record: runs.Record) -> None:
    folder = setting.scratch / "guards"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    with ThreadPoolExecutor(setting.workers) as pool:
        parts = list(pool.map(partial(_shard, setting, cases, folder), range(setting.workers)))
    found: dict[str, runs.Record] = {key: case for part in parts for key, case in part["cases"].items()}
    failed = _failed(found)
    missing = [case.key for case in sanitize.shard(0, 1, cases) if case.key not in found]
    record |= {
        "cases": len(found),
        "failed": failed,
        "missing": missing,
        "kernels": sorted({name for part in parts for name in part["kernels"]}),
        "overrun_found": all(part.get("overrun_found", False) for part in parts),
    }
    if failed:
        record |= {"status": "wrong", "message": "; ".join(f"{key}: {why}" for key, why in failed.items())}
    elif missing:
        words = " / ".join(line for index in range(setting.workers) for line in _words(folder / f"{index}.log")[-1:])
        status = "incomplete" if found else "error"
        record |= {"status": status, "message": f"{len(missing)} cases did not run; last words: {words}"}
    elif not record["overrun_found"]:
        record |= {"status": "wrong", "message": "a planted write out of bounds was not noticed"}
    elif not cases and (unseen := kernel_cases.KERNELS.difference(record["kernels"])):
        record |= {"status": "wrong", "message": f"no case launched {', '.join(sorted(unseen))}"}


def _failed(cases: dict[str, runs.Record]) -> dict[str, str]:
    return {key: f"{case['status']}: {case['message']}" for key, case in cases.items() if case["status"] != "ok"}


def _shard(setting: runs.Setting, cases: str, folder: Path, index: int) -> dict[str, Any]:
    """The results of one part of the cases."""
    path = folder / f"{index}.json"
    command = _command(setting.device, path, cases, "--shard", f"{index}/{setting.workers}")
    return continued(setting, command, path)


def continued(setting: runs.Setting, command: Sequence[str], path: Path, **environment: str) -> dict[str, Any]:
    """What `command` writes to `path`, case by case, as `bench.sanitize` does; its output goes beside it.

    Where its process dies, another goes on behind the case that did it.
    """
    results: dict[str, Any] = {"cases": {}, "kernels": [], "running": None, "done": False}
    reached, before = 0, -1
    while not results["done"] and reached > before and (left := setting.seconds_left()) > 0:
        more = _environment(setting.device, **environment)
        processes.run(command, log=path.with_suffix(".log"), limit=left, env=more, grace=1)
        results = report.read_json(path) if path.exists() else results
        reached, before = len(results["cases"]) + (results["running"] is not None), reached
    return results


def _guards_table(records: runs.Records) -> list[str]:
    rows = [
        [
            str(record["cases"]),
            str(len(record["failed"])),
            str(len(record["missing"])),
            f"{len(record['kernels'])} of {len(kernel_cases.KERNELS)}",
            "noticed" if record["overrun_found"] else "not reached" if record["missing"] else "not noticed",
        ]
        for record in records.values()
        if "cases" in record
    ]
    return ["", report.format_table(["cases run", "failed", "not run", "kernels launched", "planted overrun"], rows)]


# Under compute-sanitizer


def _sanitize(setting: runs.Setting, tool: str, cases: str, share: float, record: runs.Record) -> None:
    folder = setting.scratch / "sanitizer"
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + share * setting.seconds_left()
    record |= {"verdict": "not found", "words": [], "refusals": {}}
    for path in compute_sanitizer.candidates():
        left = deadline - time.monotonic()
        if left <= 0:
            break
        record |= {"path": str(path), "version": compute_sanitizer.version(path)}
        record |= _under(path, tool, setting.device, cases, folder, left)
        if record["verdict"] != "refused":
            break
        record["refusals"][str(path)] = record["words"]
    if record["verdict"] != "passed" and not (record["verdict"] == "errors" and tool == "racecheck"):
        status = "wrong" if record["verdict"] == "errors" else "unavailable"
        record |= {"status": status, "message": " / ".join([record["verdict"], *record["words"]])}


def _under(path: Path, tool: str, device: torch.device, cases: str, folder: Path, limit: float) -> dict[str, Any]:
    results, log, output = (folder / f"{tool}.{kind}" for kind in ("json", "txt", "log"))
    for old in (results, log):
        old.unlink(missing_ok=True)
    program = _command(device, results, cases, "--bare", *(["--overrun"] if tool == "memcheck" else []))
    command = compute_sanitizer.command(path, tool, log.resolve(), program)
    # Else one allocation holds many tensors, and what lies between them is allowed.
    environment = _environment(device, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    try:
        ended = processes.run(command, log=output, limit=limit, env=environment, grace=5)
    except OSError as error:
        return {"verdict": "refused", "words": [str(error)]}
    found = compute_sanitizer.read_log(log.read_text(errors="replace") if log.exists() else "")
    done: dict[str, Any] = report.read_json(results) if results.exists() else {"cases": {}, "done": False}
    said, words = verdict(tool, found, done, ended, _words(output))
    return {
        "verdict": said,
        "words": words[:LINES],
        "exit_code": ended.exit_code,
        "seconds": ended.seconds,
        "cases": len(done["cases"]),
        "failed": _failed(done["cases"]),
        "errors": found.count if found.count is None else found.count - len(found.about([sanitize.PLANTED])),
        "kernels": sorted({name for name in kernel_cases.KERNELS if found.about([name])}),
        "reports": [block[:LINES] for block in found.about(kernel_cases.KERNELS)[:5]],
    }


def verdict(
    tool: str, log: compute_sanitizer.Log, results: dict[str, Any], ended: processes.Ended, output: Sequence[str]
) -> tuple[str, list[str]]:
    """What a run under compute-sanitizer came to, and the words that say so.

    Args:
        tool: "memcheck", which has to report the planted overrun, or "racecheck".
        log: what compute-sanitizer wrote.
        results: what the process that it watched wrote (`bench.sanitize`).
        ended: how it ended.
        output: what either printed last.

    Returns:
        One of "passed", "errors" (about our kernels), "timed out", "refused" (no case has run), "incomplete" (some have
        not, or failed, or it says that it may have missed something) and "blind" (it missed the planted overrun).
    """
    ours, planted = log.about(kernel_cases.KERNELS), log.about([sanitize.PLANTED])
    others = [line for block in log.reports if block not in (*ours, *planted) for line in block]
    complaints = [line for block in log.complaints for line in block]
    failed = [f"{key}: {why}" for key, why in _failed(results["cases"]).items()]
    if ours:
        return "errors", ours[0]
    if ended.interrupted:
        return "timed out", [f"after {ended.seconds:.0f} s in {results.get('running')}", *complaints]
    if not any(case["status"] == "ok" for case in results["cases"].values()):
        return "refused", [*complaints, *failed[:1]] or list(output)
    if not results["done"] or log.count is None or failed or complaints or others:
        return "incomplete", [*complaints, *failed, *others] or list(output)
    if tool == "memcheck" and not planted:
        return "blind", ["a planted write out of bounds was not reported"]
    if tool != "memcheck" and (log.count or ended.exit_code):
        return "incomplete", [f"{log.count} errors and the exit code {ended.exit_code}, but no report"]
    return "passed", []


def _sanitizer_table(records: runs.Records) -> list[str]:
    rows = [
        [
            tool,
            record["verdict"],
            str(record.get("errors", "-")),
            str(record.get("cases", "-")),
            f"{record['seconds']:.0f}" if "seconds" in record else "-",
            record.get("version", "-"),
        ]
        for tool, record in records.items()
        if "verdict" in record
    ]
    lines = ["", report.format_table(["tool", "verdict", "errors", "cases", "s", "version"], rows)]
    for tool, record in records.items():
        for found in record.get("reports", []):
            lines += ["", f"- {tool}: {' / '.join(found)}"]
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run all checks on every case; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs.add_options(parser)
    args = parser.parse_args(argv)
    job = runs.open_job("python -m bench.checks", args, on_cpu=False)
    if isinstance(job, int):
        return job
    job.setting = replace(job.setting, scratch=args.out, workers=os.cpu_count() or 1)
    share = job.setting.seconds_left() / 3  # of the guards; the tools divide what is left
    subjects = [guarded(args.cases or ""), sanitized(cases=args.cases or "")]
    args.cases = None  # the checks are not to be chosen by them, too
    try:
        for subject, seconds in zip(subjects, (share, 2 * share), strict=True):
            runs.measure(job.until(time.monotonic() + seconds), [subject])
    finally:
        faulthandler.cancel_dump_traceback_later()
    return runs.write(job, subjects, ["# Checks of memory", "", *runs.where(job.results)])


if __name__ == "__main__":
    sys.exit(main())
