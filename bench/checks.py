"""The GPU job's checks of memory and of races: `kernel_cases` between guards, and under compute-sanitizer.

Both are recorded as they turn out, with what the tools say in their own words. What fails is reported and fails the
job, but for racecheck's hazards, which may be false alarms about asynchronous copies: those are for a reader.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import compute_sanitizer, kernel_cases, processes, report, runs, sanitize

__all__ = ["NAMES", "subjects", "verdict"]

NAMES = ("guards", "sanitizer")
LINES = 8  # of a report that are kept


@dataclass(frozen=True)
class _Run:
    """What all checks of a job share."""

    out: Path  # folder for logs
    limit: float  # seconds for each
    workers: int  # processes that compile at the same time
    cases: str  # regular expression for the keys of cases

    def command(self, device: torch.device, results: Path, *more: str) -> list[str]:
        options = ["--out", str(results.resolve()), "--device", str(device), "--cases", self.cases, *more]
        return [*processes.python("bench.sanitize"), *options]


def subjects(out: Path, *, limit: float, workers: int, cases: str = "") -> tuple[runs.Subject, ...]:
    """The checks as parts of a job.

    Args:
        out: folder for their logs.
        limit: seconds that each of them may take: the guards, memcheck, racecheck.
        workers: processes among which the guarded cases are divided, because most of the time is compilation.
        cases: only cases whose key matches this regular expression.
    """
    run = _Run(out, limit, workers, cases)

    def guarded(setting: runs.Setting) -> Iterator[runs.Task]:
        yield runs.Task("guards", 0, partial(_guards, run, setting.device), limit)

    def sanitized(setting: runs.Setting) -> Iterator[runs.Task]:
        for tool in compute_sanitizer.TOOLS:
            yield runs.Task(tool, 0, partial(_sanitize, run, tool, setting.device), limit)

    return (
        _subject(NAMES[0], "Every kernel at small and odd sizes, between guards", guarded, _guards_table),
        _subject(NAMES[1], "Every kernel under compute-sanitizer", sanitized, _sanitizer_table),
    )


def _subject(
    name: str,
    about: str,
    tasks: Callable[[runs.Setting], Iterator[runs.Task]],
    tables: Callable[[runs.Records], list[str]],
) -> runs.Subject:
    return runs.Subject(name, about, tasks, tables, goals=lambda records: [], plot=lambda records, path: None)


def _environment(device: torch.device, **more: str) -> dict[str, str]:
    return (dict(os.environ) | {"TRITON_INTERPRET": "1"} if device.type == "cpu" else processes.natively()) | more


def _words(path: Path) -> list[str]:
    """The last lines of a log."""
    return path.read_text(errors="replace").strip().splitlines()[-LINES:] if path.exists() else []


# Between guards


def _guards(run: _Run, device: torch.device, record: runs.Record) -> None:
    folder = run.out / NAMES[0]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    deadline = time.monotonic() + run.limit
    shard = partial(_shard, run, device, folder, deadline)
    with ThreadPoolExecutor(run.workers) as pool:
        parts = list(pool.map(shard, range(run.workers)))
    found: dict[str, runs.Record] = {key: case for part in parts for key, case in part["cases"].items()}
    failed = _failed(found)
    missing = [case.key for case in sanitize.shard(0, 1, run.cases) if case.key not in found]
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
        words = " / ".join(line for index in range(run.workers) for line in _words(folder / f"{index}.log")[-1:])
        status = "incomplete" if found else "error"
        record |= {"status": status, "message": f"{len(missing)} cases did not run; last words: {words}"}
    elif not record["overrun_found"]:
        record |= {"status": "wrong", "message": "a planted write out of bounds was not noticed"}
    elif not run.cases and (unseen := kernel_cases.KERNELS.difference(record["kernels"])):
        record |= {"status": "wrong", "message": f"no case launched {', '.join(sorted(unseen))}"}


def _failed(cases: dict[str, runs.Record]) -> dict[str, str]:
    return {key: f"{case['status']}: {case['message']}" for key, case in cases.items() if case["status"] != "ok"}


def _shard(run: _Run, device: torch.device, folder: Path, deadline: float, index: int) -> dict[str, Any]:
    """The results of one part of the cases; where its process dies, another goes on behind the case that did it."""
    path = folder / f"{index}.json"
    command = run.command(device, path, "--shard", f"{index}/{run.workers}")
    results: dict[str, Any] = {"cases": {}, "kernels": [], "running": None, "done": False}
    reached, before = 0, -1
    while not results["done"] and reached > before and (left := deadline - time.monotonic()) > 0:
        processes.run(command, log=folder / f"{index}.log", limit=left, env=_environment(device), grace=1)
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
            "noticed" if record["overrun_found"] else "not noticed",
        ]
        for record in records.values()
        if "cases" in record
    ]
    return ["", report.format_table(["cases run", "failed", "not run", "kernels launched", "planted overrun"], rows)]


# Under compute-sanitizer


def _sanitize(run: _Run, tool: str, device: torch.device, record: runs.Record) -> None:
    folder = run.out / NAMES[1]
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + run.limit
    record |= {"verdict": "not found", "words": [], "refusals": {}}
    for path in compute_sanitizer.candidates():
        left = deadline - time.monotonic()
        if left <= 0:
            break
        record |= {"path": str(path), "version": compute_sanitizer.version(path)}
        record |= _under(path, run, tool, device, folder, left)
        if record["verdict"] != "refused":
            break
        record["refusals"][str(path)] = record["words"]
    if record["verdict"] != "passed" and not (record["verdict"] == "errors" and tool == "racecheck"):
        status = "wrong" if record["verdict"] == "errors" else "unavailable"
        record |= {"status": status, "message": " / ".join([record["verdict"], *record["words"]])}


def _under(path: Path, run: _Run, tool: str, device: torch.device, folder: Path, limit: float) -> dict[str, Any]:
    results, log, output = (folder / f"{tool}.{kind}" for kind in ("json", "txt", "log"))
    for old in (results, log):
        old.unlink(missing_ok=True)
    program = run.command(device, results, "--bare", *(["--overrun"] if tool == "memcheck" else []))
    command = compute_sanitizer.command(path, tool, log.resolve(), program)
    # Else one allocation holds many tensors, and what lies between them is allowed.
    environment = _environment(device, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    try:
        ended = processes.run(command, log=output, limit=limit, env=environment, grace=5)
    except OSError as error:
        return {"verdict": "refused", "words": [str(error)]}
    found = compute_sanitizer.read_log(log.read_text(errors="replace") if log.exists() else "")
    cases: dict[str, Any] = report.read_json(results) if results.exists() else {"cases": {}, "done": False}
    said, words = verdict(tool, found, cases, ended, _words(output))
    return {
        "verdict": said,
        "words": words[:LINES],
        "exit_code": ended.exit_code,
        "seconds": ended.seconds,
        "cases": len(cases["cases"]),
        "failed": _failed(cases["cases"]),
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
