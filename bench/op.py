"""One adapted layer against its peers: `python -m bench.op --out DIR`.

Forward, backward and both by PEFT's C3A and LoRA, a dense ΔW through cuBLAS, each of our backends, the frozen base
alone and the memory floor; the seven linears of a decoder layer that share inputs; decoding under a CUDA graph.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from c3a_triton.benchmark import cases, gate, layer, peers, timing

from . import plots, report, runs, specialisations
from .ceilings import BANDWIDTH_KEY, bandwidth

__all__ = [
    "BANDWIDTH_KEY",
    "HEADLINE",
    "SUBJECT",
    "bandwidth",
    "both_tables",
    "floor_bytes",
    "goals",
    "headline",
    "launches",
    "main",
    "plan",
    "squares",
    "tables",
    "wide",
]

FIRST_METHODS = ("base", "peft_lora", "peft_c3a", "ours:auto")
DECODE_METHODS = ("base", "peft_lora", "peft_c3a", "ours:auto")
# Of the samples of one timing where all of the headline has to fit into the GPU job's share.
HEADLINE_SECONDS = 0.1
LATER_METHODS = ("ours:expand", "ours:fold", "peft_lora32")
LAST_METHODS = ("dense", "ours:torch")
# What the goals over the frozen base were set for: an H200's copy of memory and its product in 16 bits, per second.
GOALS_BANDWIDTH, GOALS_FLOPS = 4.3e12, 790e12
DECODE_BYTES = 256 << 20  # of the weights in one graph, several times an L2


def floor_bytes(case: layer.Case, mode: str) -> int:
    """Bytes that the adapter of a case must move beyond its base, whatever computes it.

    Forward: x, the delta it writes, w. Backward: dy, x, the delta of dx, w and dw.
    """
    itemsize = getattr(torch, case.dtype).itemsize
    total = 0
    for _, part in case.parts:
        x, y = itemsize * part.n_tokens * part.in_features, itemsize * part.n_tokens * part.out_features
        w = 4 * part.in_features * part.out_features // part.b
        total += {"forward": x + y + w, "backward": 2 * x + y + 2 * w, "both": 3 * x + 2 * y + 3 * w}[mode]
    return total


# What is measured


def plan(layers: Iterable[layer.Case], methods: Sequence[str]) -> Iterator[tuple[str, layer.Case, str]]:
    """Every (key, case, method), peers that know no block size once for all of them."""
    seen = set()
    for case in layers:
        for method in methods:
            key = layer.key(case, method)
            if key not in seen:
                seen.add(key)
                yield key, case, method


def _worth(case: layer.Case, method: str) -> int:
    """0: the goals' own cases, 1: their other methods, and the shapes that a goal speaks of in general, 2: the rest."""
    first = method in FIRST_METHODS
    if isinstance(case, cases.DecoderCase):
        return 0 if method in ("base", "ours:auto") else 1
    if case in squares() or case == wide():
        return 0 if first else 1
    in_general = case in cases.COMPARISON or (case.n_tokens in (1024, 8192) and case.b == 128)
    return 1 if first and in_general else 2


def _headline_worth(case: layer.Case, method: str) -> int:
    """0: what goals compare, 1: peers' other cases and the backends that "auto" takes, then the other methods."""
    if method in FIRST_METHODS:
        return int(method == "peft_c3a" and case not in squares())
    return 3 if method in LAST_METHODS else 2 if method in LATER_METHODS else 1


def tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    """The copy bandwidth, the layers, the decoder layer, decoding."""
    layers = cases.LAYERS_TINY if setting.tiny else (*cases.LAYERS, *cases.COMPARISON)
    decoders = cases.DECODERS_TINY if setting.tiny else cases.DECODERS
    # In the order of worth: the square layer in every block size before other shapes in any.
    yield from _layer_tasks((*layers, *decoders), setting.methods, _worth, setting, setting.timer, 5.0)


def headline(setting: runs.Setting) -> Iterator[runs.Task]:
    """The part of `tasks` that goals and PEFT's own comparison name, with short timings."""
    tiny: tuple[layer.Case, ...] = (*cases.LAYERS_TINY, *cases.DECODERS_TINY)
    layers = tiny if setting.tiny else _headline_layers()
    methods = (*setting.methods, "peft_lora32") if setting.with_peft else setting.methods
    timer = timing.within(setting.timer, HEADLINE_SECONDS)
    yield from _layer_tasks(layers, methods, _headline_worth, setting, timer, 1.5)


def _headline_layers() -> tuple[layer.Case, ...]:
    return (*squares(), wide(), *cases.DECODERS, cases.LayerCase(1024, 4096, 4096, 128), *cases.COMPARISON)


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """What the headline launches; see `specialisations`."""
    return specialisations.of_layers((*_headline_layers(), *cases.DECODING), device)


def _layer_tasks(
    layers: Iterable[layer.Case],
    methods: Sequence[str],
    worth: Callable[[layer.Case, str], int],
    setting: runs.Setting,
    timer: timing.Timer,
    seconds: float,
) -> Iterator[runs.Task]:
    """The copy bandwidth, these layers, decoding; about so many seconds each."""
    device, truths = setting.device, gate.Truths()
    yield runs.Task(BANDWIDTH_KEY, 0, partial(bandwidth, setting), 1.0)
    for key, case, method in plan(layers, methods):
        measure = partial(_measure, case, method, timer, device, truths=truths)
        yield runs.Task(key, worth(case, method), measure, seconds)
    decoding = cases.DECODING_TINY if setting.tiny else cases.DECODING
    for key, case, method in plan(decoding, [method for method in methods if method in DECODE_METHODS]):
        first = 0 if case.label == decoding[0].label and not method.startswith("peft") else 1
        yield runs.Task(f"decode {key}", first, partial(_decode, case, method, timer, device), seconds)


def _measure(
    case: layer.Case,
    method: str,
    timer: timing.Timer,
    device: torch.device,
    record: runs.Record,
    *,
    truths: gate.Truths | None = None,
) -> None:
    record |= {"case": asdict(case), "method": method, "times": {}}
    work = layer.Workload.of(case, method, device)
    work.check(truths)
    for mode, call in work.calls().items():
        record["times"][mode] = asdict(timer.measure(call))


def _decode(case: layer.Case, method: str, timer: timing.Timer, device: torch.device, record: runs.Record) -> None:
    """One call of a layer among calls of others like it, so that weights come from memory, in one CUDA graph."""
    record |= {"case": asdict(case), "method": method}
    works = [layer.Workload.of(case, method, device)]
    works[0].check()
    weight_bytes = sum(p.nbytes for p in works[0].layers[0].parameters())
    n_layers = 2 if device.type == "cpu" else max(4, min(64, DECODE_BYTES // weight_bytes))
    works += [layer.Workload.of(case, method, device) for _ in range(n_layers - 1)]

    @torch.no_grad()
    def step() -> None:
        for work in works:
            work.forward()

    found = timer.measure(step if device.type == "cpu" else timing.graphed(step))
    record |= {"n_layers": n_layers, "time": asdict(found), "seconds": found.median / n_layers}


# What is read off


def _median(records: runs.Records, case: layer.Case, method: str, mode: str, kind: str = "median") -> float | None:
    return records.get(layer.key(case, method), {}).get("times", {}).get(mode, {}).get(kind)


def _floor(records: runs.Records, case: layer.Case, mode: str) -> float | None:
    """Seconds in which the adapter's bytes can be moved at the measured copy bandwidth."""
    bandwidth = records.get(BANDWIDTH_KEY, {}).get("bytes_per_second")
    return floor_bytes(case, mode) / bandwidth if bandwidth else None


def _measured(records: runs.Records) -> tuple[list[layer.Case], list[str]]:
    """Cases and methods in the order in which they were measured."""
    layers: list[layer.Case] = []
    methods: list[str] = []
    for record in records.values():
        if "times" not in record:
            continue
        kind = cases.DecoderCase if "hidden" in record["case"] else cases.LayerCase
        case = kind(**record["case"])
        # A peer that knows no block size was measured with one all the same.
        if case not in layers and (peers.is_c3a(record["method"]) or not _same_but_for_b(case, layers)):
            layers.append(case)
        if record["method"] not in methods:
            methods.append(record["method"])
    return layers, sorted(methods, key=lambda method: method.startswith("ours:"))  # peers first


def _same_but_for_b(case: layer.Case, layers: Sequence[layer.Case]) -> bool:
    return any(
        (found.n_tokens, found.label, found.dtype) == (case.n_tokens, case.label, case.dtype) for found in layers
    )


def _cell(records: runs.Records, case: layer.Case, method: str, mode: str, kind: str) -> str:
    record = records.get(layer.key(case, method))
    if record is None:
        return "not measured"
    seconds, base = _median(records, case, method, mode, kind), _median(records, case, "base", mode, kind)
    if seconds is None:
        return record["status"]
    return report.format_seconds(seconds) + (f" ({seconds / base:.2f})" if base and method != "base" else "")


def _ratio(
    records: runs.Records, case: layer.Case, over: str, mode: str = "both", kind: str = "median", *, extra: bool = False
) -> float | None:
    """Time of the method `over` / ours; with `extra`, of what either adds to the base."""
    over_seconds, ours = (_median(records, case, method, mode, kind) for method in (over, "ours:auto"))
    base = _median(records, case, "base", mode, kind) if extra else 0.0
    if over_seconds is None or ours is None or base is None or ours <= base:
        return None
    return (over_seconds - base) / (ours - base)


def _time_table(
    records: runs.Records, layers: Sequence[layer.Case], methods: Sequence[str], mode: str, kind: str
) -> str:
    over = [method for method in ("peft_lora", "peft_c3a") if method in methods]
    rows = []
    for case in layers:
        floor = _floor(records, case, mode)
        ratios = [_ratio(records, case, method, mode, kind) for method in over]
        rows.append(
            [case.n_tokens, case.b]
            + [_cell(records, case, method, mode, kind) for method in methods]
            + ["-" if floor is None else report.format_seconds(floor)]
            + ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        )
    headers = ["T", "b", *methods, "floor of the extra", *(f"{method} / ours:auto" for method in over)]
    return report.format_table(headers, rows)


def both_tables(records: runs.Records) -> list[str]:
    """The lines of a short report: forward and backward together, per shape."""
    layers, methods = _measured(records)
    lines: list[str] = []
    for (label, dtype), rows in _by_shape(layers).items():
        lines += ["", f"{label}, {dtype}, forward + backward, device time (over the frozen base's):", ""]
        lines.append(_time_table(records, rows, methods, "both", "median"))
    return lines


def _by_shape(layers: Sequence[layer.Case]) -> dict[tuple[str, str], list[layer.Case]]:
    shapes: dict[tuple[str, str], list[layer.Case]] = {}
    for case in sorted(layers, key=lambda case: (case.n_tokens, case.b)):
        shapes.setdefault((case.label, case.dtype), []).append(case)
    return shapes


def tables(records: runs.Records) -> list[str]:
    """The lines of a markdown report: times per shape and mode, decoding."""
    layers, methods = _measured(records)
    lines: list[str] = []
    bandwidth = records.get(BANDWIDTH_KEY, {}).get("bytes_per_second")
    if bandwidth:
        lines += ["", f"Measured copy bandwidth: {bandwidth / 1e12:.3g} TB/s. The floor is the time in which the"]
        lines += ["adapter's own bytes (x, dy, the deltas, w, dw) move at that rate."]
    for (label, dtype), rows in _by_shape(layers).items():
        title = f"{label}, {dtype}"
        for mode in layer.MODES:
            lines += ["", f"### {title}: {mode}", "", "Device time, cold cache, median (over the frozen base's).", ""]
            lines.append(_time_table(records, rows, methods, mode, "median"))
        lines += ["", f"### {title}: both, Python included", "", "A call among back-to-back calls (over the base's)."]
        lines += ["", _time_table(records, rows, methods, "both", "wall")]
    return lines + _decode_table(records)


def _decode_seconds(records: runs.Records, case: layer.Case, method: str) -> float | None:
    return records.get(f"decode {layer.key(case, method)}", {}).get("seconds")


def _decode_table(records: runs.Records) -> list[str]:
    found = [record for key, record in records.items() if key.startswith("decode ") and "case" in record]
    decoding = list(dict.fromkeys(cases.LayerCase(**record["case"]) for record in found))
    methods = list(dict.fromkeys(record["method"] for record in found))
    if not decoding:
        return []

    def cell(case: layer.Case, method: str) -> str:
        seconds, base = (_decode_seconds(records, case, name) for name in (method, "base"))
        if seconds is None:
            return records.get(f"decode {layer.key(case, method)}", {}).get("status", "not measured")
        return report.format_seconds(seconds) + (f" ({seconds / base:.2f})" if base and method != "base" else "")

    rows = [[case.label, case.n_tokens, case.b, *(cell(case, method) for method in methods)] for case in decoding]
    lines = [
        "",
        "### Decoding (on a GPU, in a CUDA graph)",
        "",
        "Time of one layer among others (over the frozen base's).",
        "",
    ]
    return [*lines, report.format_table(["layer", "T", "b", *methods], rows)]


# The goals


def squares() -> list[cases.LayerCase]:
    """The square layers that the goals name."""
    return [cases.LayerCase(8192, 4096, 4096, b) for b in (64, 128, 256, 1024)]


def wide() -> cases.LayerCase:
    """The wide layer that the goals name."""
    return cases.LayerCase(8192, 4096, 14336, 128)


def _over_base(records: runs.Records, case: layer.Case) -> float | None:
    ours, base = (_median(records, case, method, "both") for method in ("ours:auto", "base"))
    return ours / base if ours and base else None


def _over_base_goal(records: runs.Records, name: str, limit: float, case: layer.Case) -> report.Goal:
    """A goal that was set for an H200, scaled to what the card has been measured to do.

    What an adapter adds is bound by bytes, and the base product by FLOPs: the former counts for more on a card that
    moves fewer bytes in the time of a FLOP.
    """
    bandwidth = records.get(BANDWIDTH_KEY, {}).get("bytes_per_second")
    square = squares()[0]
    base = _median(records, square, "base", "both")
    said = f"{name}: ours / base"
    if bandwidth and base:
        flops = 4 * square.n_tokens * square.in_features * square.out_features / base
        scaled = 1 + (limit - 1) * (flops / bandwidth) / (GOALS_FLOPS / GOALS_BANDWIDTH)
        if round(scaled, 2) != limit:
            said += f" ({limit} on an H200)"
            limit = round(scaled, 2)
    return report.at_most(said, limit, _over_base(records, case))


def goals(records: runs.Records) -> list[report.Goal]:
    """The goals for one layer, by device time of forward and backward."""
    found = [
        _over_base_goal(records, f"forward + backward, T=8192, 4096→4096, b={case.b}", 1.45, case) for case in squares()
    ]
    for name, case in (("4096→14336, b=128", wide()), ("seven linears of an 8B layer, b=128", cases.DECODERS[0])):
        found.append(_over_base_goal(records, f"the same, {name}", 1.28, case))
    for case in squares():
        value = _ratio(records, case, "peft_c3a", extra=True)
        found.append(report.at_least(f"extra time, 4096→4096, b={case.b}: PEFT C3A / ours", 8, value))
    compared = {
        f"T={case.n_tokens} {case.label} b={case.b}": 1 / ratio
        for case in cases.LAYERS
        if case.n_tokens >= 1024 and case.b <= 256 and (ratio := _ratio(records, case, "peft_lora"))
    }
    worst = max(compared, key=lambda name: compared[name], default="")
    of = f"the worst of {len(compared)}: {worst}"
    found.append(
        report.at_most("every shape, T ≥ 1024, b ≤ 256: ours / PEFT LoRA r=16", 0.9, compared.get(worst), what=of)
    )
    for case in cases.DECODING[:3]:
        ours, base = (_decode_seconds(records, case, method) for method in ("ours:auto", "base"))
        value = ours / base if ours and base else None
        found.append(
            report.at_most(f"decode T={case.n_tokens}, {case.label}, CUDA graph: unmerged / base", 1.15, value)
        )
    return found


# The plot


def plot(records: runs.Records, path: Path) -> None:
    """Forward and backward over the frozen base's, by tokens: a panel per shape, at the block size measured most."""
    layers, methods = _measured(records)
    single = [case for case in layers if isinstance(case, cases.LayerCase)]
    if not single:
        return
    sizes = [case.b for case in single]
    b = 128 if 128 in sizes else max(sizes, key=sizes.count)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for case in sorted((case for case in single if case.b == b), key=lambda case: case.n_tokens):
        base = _median(records, case, "base", "both")
        panel = panels.setdefault(f"{case.label}, b={b}", {})
        for method in methods:
            seconds = _median(records, case, method, "both")
            if base and seconds and method != "base":
                panel.setdefault(method, []).append((case.n_tokens, seconds / base))
        floor = _floor(records, case, "both")
        if base and floor:
            panel.setdefault("memory floor", []).append((case.n_tokens, 1 + floor / base))
    panels = {title: panel for title, panel in panels.items() if panel}
    if panels:
        plots.lines(panels, path, x="tokens", y="forward + backward / frozen base")


SUBJECT = runs.Subject("op", "One C3A layer against its peers", tasks, tables, goals, plot)
HEADLINE = replace(SUBJECT, tasks=headline)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    return runs.command(SUBJECT, argv)


if __name__ == "__main__":
    sys.exit(main())
