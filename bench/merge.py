"""Merging adapters into the base weights, ours against PEFT's: `python -m bench.merge --out DIR`.

One layer, and `merge_and_unload` of a Llama-3.2-3B-shaped model with adapters on all linear layers (one decoder layer
of it on a CPU). Time includes Python; on a GPU also the most that was allocated meanwhile.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from c3a_triton.benchmark import cases, gate, models, peers, timing
from c3a_triton.operator import dense, reference

from . import plots, report, runs

__all__ = ["SUBJECT", "goals", "main", "tables", "tasks"]

MODEL_KEY = "model, all linear"
METHODS = ("peft_c3a", "ours:auto")


def tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    """One per layer, then the model."""
    on_cpu = setting.device.type == "cpu"
    layers: tuple[cases.LayerCase, ...] = cases.MERGE_CPU if on_cpu else cases.MERGE
    if setting.tiny:
        layers = cases.MERGE_TINY
    for i, case in enumerate(layers):
        yield runs.Task(f"{case.label} b={case.b}", 0 if i == 0 else 1, partial(_layer, case, setting), 10.0)
    yield runs.Task(MODEL_KEY, 1, partial(_model, setting), 45.0)


def _calls(setting: runs.Setting) -> dict[str, Callable[[Any], object]]:
    """How each method merges a layer for good."""
    calls: dict[str, Callable[[Any], object]] = {
        "peft_c3a": lambda layer: layer.merge(),
        "ours:auto": lambda layer: layer.merge(keep_base=None),
    }
    return {method: calls[method] for method in METHODS if method in setting.methods}


def _layer(case: cases.LayerCase, setting: runs.Setting, record: runs.Record) -> None:
    record["case"] = asdict(case)
    torch.manual_seed(0)
    w = peers.kernel_values(case, setting.device)
    weight = peers.frozen_base(case, setting.device).weight.detach()

    def fresh(method: str) -> Any:
        base = peers.frozen_base(case, setting.device)
        base.weight.copy_(weight)
        return peers.build(method, base, case, w)

    calls = _calls(setting)
    truth = weight.double() + reference.circulant_matrix(w.double(), 1.0 / case.in_features)
    for method, call in calls.items():
        built = fresh(method)
        call(built)
        gate.check(f"the merged weight of {method}", built.base_layer.weight, truth, weight.dtype)
    del truth, built
    # The work on the device alone: adding ΔW without the layers' bookkeeping.
    theirs = fresh("peft_c3a") if "peft_c3a" in calls else None
    target = weight.clone()
    steps: dict[str, Callable[[], object]] = {"ours:auto": lambda: dense.add_circulant_(target, [w])}
    if theirs is not None:
        steps["peft_c3a"] = lambda: target.add_(theirs.get_delta_weight("default"))
    with torch.no_grad():
        record["adding"] = {method: asdict(setting.timer.measure(step)) for method, step in steps.items()}
    timings = timing.in_turn(
        {method: (partial(fresh, method), call) for method, call in calls.items()},
        setting.device,
        seconds=0.0 if setting.tiny else 4.0,
    )
    record["times"] = {method: asdict(found) for method, found in timings.items()}


def _model(setting: runs.Setting, record: runs.Record) -> None:
    if setting.device.type == "cpu" and not setting.tiny and setting.n_layers is None:
        setting = replace(setting, n_layers=1)
    case = replace(cases.MODELS_TINY[-1] if setting.tiny else cases.MODELS[-1], targets=cases.ALL_LINEAR)
    base = models.llama(setting.device, tiny=setting.tiny, n_layers=setting.n_layers)
    record |= {"case": asdict(case), "n_layers": base.config.num_hidden_layers}
    calls: dict[str, Callable[[Any], object]] = {
        "peft_c3a": lambda model: model.merge_and_unload(),
        "ours:auto": lambda model: model.c3a.merge_and_unload(),
    }
    timings = timing.in_turn(
        {
            method: (partial(models.adapted, method, base, case), call)
            for method, call in calls.items()
            if method in setting.methods
        },
        setting.device,
        seconds=0.0,
    )
    record["times"] = {method: asdict(found) for method, found in timings.items()}


def _ratio(record: runs.Record, kind: str = "times") -> float | None:
    ours, theirs = (record.get(kind, {}).get(method, {}).get("median") for method in ("ours:auto", "peft_c3a"))
    return theirs / ours if ours and theirs else None


def tables(records: runs.Records) -> list[str]:
    """The lines of a markdown report: a row per layer or model."""

    def cell(record: runs.Record, method: str, kind: str = "times") -> str:
        found = record.get(kind, {}).get(method)
        if found is None:
            return "-" if record["status"] == "ok" else record["status"]
        extra = "" if found["peak_bytes"] is None else f"; {report.format_bytes(found['peak_bytes'])}"
        return report.format_seconds(found["median"]) + extra

    rows = [
        [
            key if "n_layers" not in record else f"{key}, {record['n_layers']} decoder layers",
            *(cell(record, method) for method in METHODS),
            "-" if (ratio := _ratio(record)) is None else f"{ratio:.2f}",
            *(cell(record, method, "adding") for method in METHODS),
            "-" if (ratio := _ratio(record, "adding")) is None else f"{ratio:.2f}",
        ]
        for key, record in records.items()
    ]
    lines = [
        "",
        "Wall time, median of merges in turn, and the memory allocated meanwhile on a GPU; then the device time of",
    ]
    lines += ["adding ΔW alone, without the layers' bookkeeping.", ""]
    headers = ["what", *METHODS, "PEFT / ours", *(f"adding: {method}" for method in METHODS), "PEFT / ours"]
    return [*lines, report.format_table(headers, rows)]


def goals(records: runs.Records) -> list[report.Goal]:
    """The goals for merging, on a GPU."""
    case = cases.MERGE[0]
    record = records.get(f"{case.label} b={case.b}", {})
    peak = records.get(MODEL_KEY, {}).get("times", {}).get("ours:auto", {}).get("peak_bytes")
    return [
        report.at_least(f"merge {case.label}, b={case.b}: PEFT / ours", 25, _ratio(record)),
        report.at_least("the same, device time of adding ΔW alone", 25, _ratio(record, "adding")),
        report.at_most("extra memory of merge_and_unload", 0, peak, unit=" B"),
    ]


def plot(records: runs.Records, path: Path) -> None:
    """Milliseconds: a panel per layer or model, a bar per method."""
    panels = {
        key: {method: found["median"] * 1e3 for method, found in record["times"].items()}
        for key, record in records.items()
        if record.get("times")
    }
    if panels:
        plots.bars(panels, path, y="ms")


SUBJECT = runs.Subject("merge", "Merging adapters", tasks, tables, goals, plot, on_cpu=True)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    return runs.command(SUBJECT, argv)


if __name__ == "__main__":
    sys.exit(main())
