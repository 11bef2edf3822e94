"""One adapted layer against its peers: forward, backward and both, with the memory they take."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from c3a_triton.errors import BackendError

from . import cases, gate, peers, report, timing

__all__ = ["DeviceLostError", "Records", "measure", "plan", "tables"]

MODES = ("forward", "backward", "both")

Records = dict[str, dict[str, Any]]  # key of `plan` to what `measure` returned


class DeviceLostError(RuntimeError):
    """The process can no longer use its GPU, as after an illegal memory access; a new process can."""


def plan(layers: Iterable[cases.LayerCase], methods: Sequence[str]) -> Iterator[tuple[str, cases.LayerCase, str]]:
    """Every (key, case, method), peers that know no block size once per number of tokens."""
    seen = set()
    for case in layers:
        for method in methods:
            key = _key(case, method)
            if key not in seen:
                seen.add(key)
                yield key, case, method


def _key(case: cases.LayerCase, method: str) -> str:
    size = f" b={case.b}" if peers.is_c3a(method) else ""
    return f"{method} T={case.n_tokens} {case.in_features}→{case.out_features}{size} {case.dtype}"


def measure(case: cases.LayerCase, method: str, timer: timing.Timer, device: torch.device) -> dict[str, Any]:
    """Gate and time one layer; whatever goes wrong is recorded under `status` and `message`, beside what was measured.

    Raises:
        DeviceLostError: the GPU does not answer this process any more; its `args[0]` is the record so far.
    """
    record: dict[str, Any] = {"case": asdict(case), "method": method, "status": "ok", "times": {}}
    try:
        _measure(case, method, timer, device, record)
    except torch.cuda.OutOfMemoryError as error:
        record |= {"status": "out of memory", "message": str(error)}
    except gate.GateError as error:
        record |= {"status": "wrong", "message": str(error)}
    except BackendError as error:
        record |= {"status": "unavailable", "message": str(error)}
    except Exception as error:
        record |= {
            "status": "error",
            "message": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLostError(record) from error
    return record


def _measure(
    case: cases.LayerCase, method: str, timer: timing.Timer, device: torch.device, record: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    base, w = peers.frozen_base(case, device), peers.kernel_values(case, device)
    x = torch.randn(case.n_tokens, case.in_features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(case.n_tokens, case.out_features, device=device, dtype=dtype)
    layer = peers.build(method, base, case, w)
    inputs = (x, *peers.trained(layer))
    if peers.is_c3a(method):
        truth = gate.Truth.of(base.weight, w, x, dy)
        gate.check_layer(layer, inputs[1], x, dy, truth, check_dx=method != "peft_c3a")
        del truth
    record["saved"] = asdict(timing.saved_bytes(layer, x))
    y = layer(x)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: layer(x),
        "backward": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True),
        "both": lambda: torch.autograd.grad(layer(x), inputs, dy),
    }
    for mode in MODES:
        record["times"][mode] = asdict(timer.measure(calls[mode]))


def _median(records: Records, case: cases.LayerCase, method: str, mode: str, kind: str = "median") -> float | None:
    return records.get(_key(case, method), {}).get("times", {}).get(mode, {}).get(kind)


def _cell(records: Records, case: cases.LayerCase, method: str, mode: str, kind: str) -> str:
    record = records.get(_key(case, method))
    if record is None:
        return "not measured"
    seconds, base = _median(records, case, method, mode, kind), _median(records, case, "base", mode, kind)
    if seconds is None:
        return record["status"]
    return report.format_seconds(seconds) + (f" ({seconds / base:.2f})" if base and method != "base" else "")


def _ratio(records: Records, case: cases.LayerCase, over: str, mode: str, kind: str) -> str:
    over_seconds, ours = (_median(records, case, method, mode, kind) for method in (over, "ours:auto"))
    return f"{over_seconds / ours:.2f}" if over_seconds and ours else "-"


def _time_table(
    records: Records, layers: Sequence[cases.LayerCase], methods: Sequence[str], mode: str, kind: str
) -> str:
    over = [method for method in ("peft_lora", "peft_c3a") if method in methods]
    rows = [
        [case.n_tokens, case.b]
        + [_cell(records, case, method, mode, kind) for method in methods]
        + [_ratio(records, case, method, mode, kind) for method in over]
        for case in layers
    ]
    return report.format_table(["T", "b", *methods, *(f"{method} / ours:auto" for method in over)], rows)


def _memory_table(records: Records, layers: Sequence[cases.LayerCase], methods: Sequence[str]) -> str:
    def cell(case: cases.LayerCase, method: str) -> str:
        record = records.get(_key(case, method), {})
        peak = record.get("times", {}).get("both", {}).get("peak_bytes")
        if "saved" not in record:
            return record.get("status", "not measured")
        saved = report.format_bytes(record["saved"]["activations"])
        return f"{saved}; {report.format_bytes(peak)}" if peak is not None else saved

    rows = [[case.n_tokens, case.b, *(cell(case, method) for method in methods)] for case in layers]
    return report.format_table(["T", "b", *methods], rows)


def tables(records: Records, layers: Sequence[cases.LayerCase], methods: Sequence[str]) -> list[str]:
    """The lines of a markdown report: times per mode, memory, and everything that went wrong or is missing."""
    lines: list[str] = []
    sizes = sorted({(case.in_features, case.out_features, case.dtype) for case in layers})
    for size in sizes:
        rows = [case for case in layers if (case.in_features, case.out_features, case.dtype) == size]
        title = f"{size[0]}→{size[1]}, {size[2]}"
        for mode in MODES:
            lines += ["", f"## {title}: {mode}", "", "Device time, cold cache, median (over the frozen base's)."]
            lines += ["", _time_table(records, rows, methods, mode, "median")]
        lines += ["", f"## {title}: both, Python included", "", "A call among back-to-back calls (over the base's)."]
        lines += ["", _time_table(records, rows, methods, "both", "wall")]
        lines += ["", f"## {title}: memory", "", "Activations saved for backward; peak of forward and backward."]
        lines += ["", _memory_table(records, rows, methods)]
    problems = [
        f"- {key}: {record['status']}: {record['message']}"
        for key, record in records.items()
        if record["status"] != "ok"
    ]
    missing = [f"- {key}: not measured" for key, _, _ in plan(layers, methods) if key not in records]
    if problems or missing:
        lines += ["", "## What went wrong or is missing", "", *problems, *missing]
    return lines
