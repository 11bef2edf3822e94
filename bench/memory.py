"""What one layer keeps and takes: `python -m bench.memory --out DIR`.

Bytes saved for the backward pass, counted by autograd's hooks on any device; on a GPU also the most that forward and
backward have allocated at a time beyond what they return and keep.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from c3a_triton.benchmark import cases, layer, timing

from . import op, plots, report, runs

__all__ = ["SUBJECT", "goals", "main", "tables", "tasks"]


def tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    """One per case and method."""
    sizes = cases.MEMORY if setting.device.type == "cuda" else cases.MEMORY_CPU
    chosen = cases.MEMORY_TINY if setting.tiny else sizes
    for key, case, method in op.plan(chosen, setting.methods):
        worth = 0 if case == chosen[0] and method in op.FIRST_METHODS else 1
        yield runs.Task(key, worth, partial(_measure, case, method, setting.device))


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Memory of the tensors' storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _measure(case: layer.Case, method: str, device: torch.device, record: runs.Record) -> None:
    record |= {"case": asdict(case), "method": method}
    work = layer.Workload.of(case, method, device)
    work.check()
    x = work.inputs[0]
    saved = timing.saved_bytes(work.layers[0], x)
    kernel_bytes = work.kernels[0].nbytes
    record |= {"saved": asdict(saved), "x_bytes": x.nbytes, "kernel_bytes": kernel_bytes}
    outputs, forward = timing.peak_bytes(work.forward, device)
    grads, backward = timing.peak_bytes(lambda: torch.autograd.grad(outputs, work.wanted, work.dys), device)
    if forward is not None and backward is not None:
        kept = max(0, saved.activations - x.nbytes)
        record["transient"] = {
            "forward": forward - _bytes(outputs) - kept,
            # What the forward kept is freed on the way: the peak counts from after it was allocated.
            "backward": backward - _bytes(grads),
        }


def _beyond_x(record: runs.Record) -> int | None:
    """Bytes saved beyond the 16-bit input, which the layers that read it share."""
    return max(0, record["saved"]["activations"] - record["x_bytes"]) if "saved" in record else None


def tables(records: runs.Records) -> list[str]:
    """The lines of a markdown report: a row per case and method."""
    rows = []
    for record in records.values():
        if "case" not in record:
            continue
        case = cases.LayerCase(**record["case"])
        beyond, transient = _beyond_x(record), record.get("transient", {})
        rows.append(
            [case.n_tokens, case.label, case.b, record["method"]]
            + ([record["status"], "-"] if beyond is None else [_text(record["saved"]["activations"]), _text(beyond)])
            + [_text(transient.get("forward")), _text(transient.get("backward"))]
        )
    headers = ["T", "layer", "b", "method", "saved activations", "beyond x", "transient forward", "transient backward"]
    lines = [
        "",
        "Saved: whole storages, parameters apart. Transient: allocated at the highest, beyond what is returned",
    ]
    return [*lines, "and kept (on a GPU).", "", report.format_table(headers, rows)]


def _text(n_bytes: float | None) -> str:
    return "-" if n_bytes is None else report.format_bytes(n_bytes)


def goals(records: runs.Records) -> list[report.Goal]:
    """The goals for memory, on the cases of a GPU."""
    ours = [
        (cases.LayerCase(**r["case"]), r) for r in records.values() if r.get("method") == "ours:auto" and "saved" in r
    ]
    beyond = {f"T={case.n_tokens} {case.label} b={case.b}": _beyond_x(record) or 0 for case, record in ours}
    shares = {
        f"T={case.n_tokens} {case.label} b={case.b} {mode}": n_bytes
        / (2 * case.n_tokens * (case.in_features + case.out_features))
        for case, record in ours
        for mode, n_bytes in record.get("transient", {}).items()
    }
    return [
        _worst("bytes saved for backward beyond a shared 16-bit x", 0, {k: float(v) for k, v in beyond.items()}, " B"),
        _worst("transient bytes / 2·T·(in + out)", 1, shares, ""),
    ]


def _worst(case: str, limit: float, values: dict[str, float], unit: str) -> report.Goal:
    worst = max(values, key=lambda name: values[name], default="")
    return report.at_most(case, limit, values.get(worst), what=f"the worst of {len(values)}: {worst}", unit=unit)


def plot(records: runs.Records, path: Path) -> None:
    """Saved activations over x's bytes: a panel per case, a bar per method."""
    panels: dict[str, dict[str, float]] = {}
    for record in records.values():
        if "saved" in record:
            case = cases.LayerCase(**record["case"])
            panel = panels.setdefault(f"T={case.n_tokens}, {case.label}", {})
            panel.setdefault(record["method"], record["saved"]["activations"] / record["x_bytes"])
    if panels:
        plots.bars(panels, path, y="saved activations / bytes of x")


SUBJECT = runs.Subject("memory", "Memory of one layer", tasks, tables, goals, plot, on_cpu=True)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    return runs.command(SUBJECT, argv)


if __name__ == "__main__":
    sys.exit(main())
