"""Python time of one eager layer call: `python -m bench.overhead --out DIR`.

A layer's share of eight in a row, on tiny CPU tensors, with launches that end where Triton would call the driver: what
is left are this library's own frames, Triton's, autograd, allocations and a tiny base product. The backends that need
no Triton, the frozen base and PEFT's layers run as they are: what one of torch's own launches costs in C++ is in their
times as it is in ours. CPU time of one thread, calls alternating, medians; shares by cProfile, which makes small
functions look larger than they are.
"""

import cProfile
import os
import pstats
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from c3a_triton.benchmark import cases, layer, peers, timing
from c3a_triton.operator import dense
from c3a_triton.operator.launch import plans, specs

from . import launch_hooks, plots, report, runs, uncomputed

__all__ = ["SUBJECT", "goals", "main", "stubbed_launches", "tables", "tasks", "uncomputed_launches"]

CPU = torch.device("cpu")
LIMITS = {"forward": 60e-6, "backward": 80e-6}
# Of the backend that is meant for few tokens, where Python is what a call waits for.
DIRECT_LIMITS = {"forward": 50e-6, "backward": 60e-6}
N_LAYERS = 8
PROFILED_CALLS = 100
PROFILED_LINES = 12
PROFILED_FILES = 8


def tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    """One per case: the methods alternate inside."""
    methods = [method for method in setting.methods if method not in ("ours:auto", "dense")]
    seconds = 0.1 if setting.tiny else 2.0
    for case in cases.OVERHEAD:
        yield runs.Task(f"T={case.n_tokens}", 0, partial(_measure, case, methods, seconds), 12.0)


def _nothing(kernel: Any, **arguments: Any) -> None:
    """In place of a launch."""


@contextmanager
def stubbed_launches(launched: Callable[..., None] = _nothing) -> Iterator[None]:
    """Within it Triton's backends run on CPU tensors, but their kernels compute nothing.

    Args:
        launched: called in place of each launch, with the kernel and the launch's keyword arguments.

    Raises:
        ImportError: Triton is not installed.
    """
    with launch_hooks.caught(lambda run: launched), _as_on_a_gpu():
        yield


@contextmanager
def uncomputed_launches(called: Callable[..., None] = uncomputed.nothing) -> Iterator[uncomputed.Driver]:
    """As `stubbed_launches`, but launches end where Triton would call the driver.

    Args:
        called: as of `uncomputed.Driver`, which is what the context gives.

    Raises:
        ImportError: Triton is not installed.
    """
    driver = uncomputed.Driver(called)
    with uncomputed.launches(driver), _as_on_a_gpu():
        yield driver


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    with (
        mock.patch.object(specs, "unavailable_reason", _no_reason),
        mock.patch.object(dense, "written_by_triton", _expands),
    ):
        # What was decided for these sizes before and what is decided now are not the same.
        plans.clear_plans()
        try:
            yield
        finally:
            plans.clear_plans()


def _no_reason(device: torch.device) -> None:
    """In place of `specs.unavailable_reason`; a mock's own call would cost as much as a layer's."""


def _expands(w: torch.Tensor, dtype: torch.dtype) -> bool:
    """In place of `dense.written_by_triton`, as on a GPU: `fold` adds its kernels by a launch."""
    return True


def _needs_triton(method: str) -> bool:
    return method.startswith("ours:") and method != "ours:torch"


def _measure(case: cases.LayerCase, methods: list[str], seconds: float, record: runs.Record) -> None:
    record |= {"case": asdict(case), "times": {}, "profile": {}, "stubbed": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # What stubbed kernels leave unwritten may be subnormal numbers, which a CPU adds a hundred times slower.
    torch.set_flush_denormal(True)
    try:
        # What the gradient of w under `fold` takes, as on a GPU with so few tokens.
        with uncomputed_launches(), mock.patch.dict(os.environ, {"C3A_TRITON_BACKEND": "direct"}):
            works = {method: [layer.Workload.of(case, method, CPU) for _ in range(N_LAYERS)] for method in methods}
            record["stubbed"] = [method for method in methods if _needs_triton(method)]
            for mode in ("forward", "forward, no grad", "backward"):
                calls = {method: _call(work, mode) for method, work in works.items()}
                timings = timing.alternate(calls, seconds=seconds, sample_seconds=1e-3)
                record["times"][mode] = {method: asdict(found.divided(N_LAYERS)) for method, found in timings.items()}
            for method in record["stubbed"]:
                record["profile"][method] = {mode: _profile(_call(works[method], mode)) for mode in LIMITS}
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def _call(works: list[layer.Workload], mode: str) -> Callable[[], object]:
    """A call of the layers one after another, as in a model: entering autograd's engine once is not a layer's cost."""
    layers, x, dy = [work.layers[0] for work in works], works[0].inputs[0], works[0].dys[0]

    def forward() -> torch.Tensor:
        y = x
        for one in layers:
            y = one(y)
        return y

    if mode == "backward":
        y, wanted = forward(), (x, *(parameter for one in layers for parameter in peers.trained(one)))
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)
    if mode == "forward":
        return forward

    def without_grad() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    return without_grad


def _profile(call: Callable[[], object]) -> dict[str, Any]:
    """Where a call's time goes: the functions that take most (calls per call, share), and the share of each file."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(PROFILED_CALLS):
        call()
    profile.disable()
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in stats.values())
    found = sorted(stats.items(), key=lambda item: -item[1][2])[:PROFILED_LINES]
    files: dict[str, float] = {}
    for (file, line, _), (_, _, own, _, _) in stats.items():
        name = Path(file).name if line else "built-in functions"
        files[name] = files.get(name, 0.0) + own / total
    functions = [
        {
            "function": f"{Path(file).name}:{line} {name}" if line else name,
            "calls": n_calls / (PROFILED_CALLS * N_LAYERS),
            "share": own / total,
        }
        for (file, line, name), (_, n_calls, own, _, _) in found
    ]
    return {"functions": functions, "files": dict(sorted(files.items(), key=lambda item: -item[1])[:PROFILED_FILES])}


def tables(records: runs.Records) -> list[str]:
    """The lines of a markdown report: times by method, and where they go."""
    rows = []
    for key, record in records.items():
        times = record.get("times", {})
        for method in times.get("backward", {}):
            shown = [report.format_seconds(times[mode][method]["median"]) for mode in times]
            rows.append([key, method, "not launched" if method in record["stubbed"] else "computing", *shown])
    lines = ["", report.format_table(["case", "method", "kernels", "forward", "forward, no grad", "backward"], rows)]
    for key, record in records.items():
        for method, modes in record.get("profile", {}).items():
            for mode, found in modes.items():
                files = ", ".join(f"{name} {share:.0%}" for name, share in found["files"].items())
                lines += ["", f"### {key}, {method}: {mode}", "", f"Own time by file: {files}.", ""]
                rows = [[f["function"], f"{f['calls']:.3g}", f"{f['share']:.1%}"] for f in found["functions"]]
                lines.append(report.format_table(["function", "calls", "share of own time"], rows))
    return lines


def goals(records: runs.Records) -> list[report.Goal]:
    """The goals for Python's time, each by the slowest of the backends and cases that it is for."""
    found = []
    for mode in LIMITS:
        values: dict[str, dict[str, float]] = {"others": {}, "direct": {}, "LoRA": {}}
        for key, record in records.items():
            times = {method: timing["median"] for method, timing in record.get("times", {}).get(mode, {}).items()}
            for method in times.keys() & record.get("stubbed", []):
                values["direct" if method == "ours:direct" else "others"][f"{method}, {key}"] = times[method] * 1e6
                if "peft_lora" in times:
                    values["LoRA"][f"{method}, {key}"] = times[method] / times["peft_lora"]
        case = f"Python time of one eager layer call, {mode}"
        for what, name, limit, unit in (
            ("others", f"{case}, Triton's part included", LIMITS[mode] * 1e6, " µs"),
            ("direct", f"{case}, `direct`", DIRECT_LIMITS[mode] * 1e6, " µs"),
            ("LoRA", f"{case} / PEFT LoRA's", 1.0, ""),
        ):
            worst = max(values[what], key=values[what].__getitem__, default="")
            found.append(report.at_most(name, limit, values[what].get(worst), what=worst, unit=unit))
    return found


def plot(records: runs.Records, path: Path) -> None:
    """Microseconds: a panel per case and mode, a bar per method."""
    panels = {
        f"{key}: {mode}": {method: found["median"] * 1e6 for method, found in record["times"][mode].items()}
        for key, record in records.items()
        for mode in LIMITS
        if mode in record.get("times", {})
    }
    if panels:
        plots.bars(panels, path, y="µs")


SUBJECT = runs.Subject("overhead", "Python time of one layer call", tasks, tables, goals, plot, on_cpu=True)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    return runs.command(SUBJECT, argv)


if __name__ == "__main__":
    sys.exit(main())
