"""Every case of `kernel_cases` in a process of its own: `python -m bench.sanitize --out FILE`.

In a process of its own, because what it looks for may end it, and because compute-sanitizer watches whole processes.
FILE is rewritten before and after every case; a second call goes on behind the case that ended the first.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import guards, kernel_cases, launch_hooks, report, runs

__all__ = ["PLANTED", "main", "opened", "shard"]

PLANTED = "overrun_kernel"  # of `overrun`, which imports Triton


def shard(index: int, count: int, pattern: str = "") -> tuple[kernel_cases.Case, ...]:
    """Every `count`-th of the cases whose key matches, from `index` on."""
    return tuple(case for case in kernel_cases.CASES if re.search(pattern, case.key))[index::count]


def opened(path: Path) -> dict[str, Any]:
    """Results so far; the case that a process did not come back from has failed."""
    results = report.read_json(path) if path.exists() else {"cases": {}, "kernels": [], "running": None, "done": False}
    if results["running"] is not None:
        results["cases"][results["running"]] = {"status": "error", "message": "the process ended in this case"}
        results["running"] = None
    return results


def _run(args: argparse.Namespace, device: torch.device) -> int:
    results = opened(args.out)
    guard = 0 if args.bare else guards.GUARD
    with launch_hooks.noted() as launched:
        index, count = args.shard
        for case in shard(index, count, args.cases):
            if case.key in results["cases"]:
                continue
            results["running"] = case.key
            report.write_json(args.out, results)
            start, lost = time.perf_counter(), False
            try:
                record = runs.attempt(_task(case, device, guard), device)
            except runs.DeviceLostError as error:
                record, lost = error.args[0], True
            results["cases"][case.key] = record | {"seconds": time.perf_counter() - start}
            results["running"] = None
            results["kernels"] = sorted({*results["kernels"], *launched})
            report.write_json(args.out, results)
            print(f"{case.key}: {record['status']} {record.get('message', '')}", flush=True)
            if lost:
                return 1
    if not args.bare:
        results["overrun_found"] = _finds_overrun(device)
    results["done"] = True
    report.write_json(args.out, results)
    if args.overrun:
        _overrun(guards.Memory(0), device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 0


def _task(case: kernel_cases.Case, device: torch.device, guard: int) -> runs.Task:
    return runs.Task(case.key, 0, lambda record: kernel_cases.check(case, device, guard=guard))


def _finds_overrun(device: torch.device) -> bool:
    memory = guards.Memory()
    _overrun(memory, device)
    return len(memory.damage()) == 1


def _overrun(memory: guards.Memory, device: torch.device) -> None:
    from . import overrun

    overrun.overrun(memory.empty(overrun.SHAPE, torch.float32, device, "out"))


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    return int(index), int(count)


def main(argv: list[str] | None = None) -> int:
    """Run the cases; returns the exit status, which says nothing of their results."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file for the results")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1 (default: %(default)s)")
    parser.add_argument("--bare", action="store_true", help="no guards: every tensor in an allocation of its size")
    parser.add_argument("--overrun", action="store_true", help="end with a write out of bounds, for who watches them")
    parser.add_argument("--shard", type=_part, default=(0, 1), metavar="I/N", help="only part I of N, from 0 on")
    parser.add_argument("--cases", metavar="REGEX", default="", help="only cases whose key matches")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("torch sees no GPU in this process", file=sys.stderr)
            return 1
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return _run(args, device)


if __name__ == "__main__":
    sys.exit(main())
