"""Every backend's product alone, by tokens: `python -m bench.token_sweep --out DIR`.

What the constants of the cost model in `c3a_triton.dispatch` are fitted from: device time of x ΔWᵀ and of both its
gradients, of the base layer's own product and its gradient of x, beside what the model predicts; and the few ceilings
of the same card. The table ends with the fitted constants.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from c3a_triton import circulant_linear, dispatch, launch
from c3a_triton.benchmark import cases, gate, layer, peers, timing

from . import ceilings, plots, report, runs

__all__ = ["SUBJECT", "fitted", "launches", "main", "tables", "tasks"]

SECONDS = 0.04  # of one timing
# The ends and the middle first, should the time not suffice.
TOKENS = (8192, 1, 1024, 16, 32768, 256, 64, 4)
SHAPES = ((4096, 4096, 128), (3072, 3072, 64))
BACKENDS = (dispatch.BASE, "direct", "fft", "expand")
TORCH_TOKENS = (16, 1024, 8192)
DIRECTIONS = ("forward", "backward")


def tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    """The ceilings that the fit needs, then every case."""
    yield from ceilings.for_fit(setting)
    truths, timer = gate.Truths(), timing.within(setting.timer, SECONDS)
    for case, backend in _cases(setting.tiny):
        yield runs.Task(_key(case, backend), 1, partial(_measure, case, backend, timer, setting.device, truths), 0.5)


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every case that launches Triton kernels, by key, on operands of `device`."""
    for case, backend in _cases():
        if backend in dispatch.TRITON_BACKENDS:
            yield _key(case, backend), partial(_run, case, backend, device)


def _cases(tiny: bool = False) -> Iterator[tuple[cases.LayerCase, str]]:
    if tiny:
        sizes = [cases.LayerCase(n_tokens, 16, 16, 8, "float32") for n_tokens in (1, 20)]
    else:
        sizes = [cases.LayerCase(n_tokens, *shape) for n_tokens in TOKENS for shape in SHAPES]
    for case in sizes:
        for backend in (*BACKENDS, *(["torch"] if tiny or case.n_tokens in TORCH_TOKENS else [])):
            yield case, backend


def _key(case: cases.LayerCase, backend: str) -> str:
    return f"{backend} T={case.n_tokens} {case.label} b={case.b} {case.dtype}"


@dataclass
class _Product:
    """x times a weight or a circulant, x and the circulant requiring gradients."""

    x: Tensor
    w: Tensor
    dy: Tensor
    product: Callable[[Tensor], Tensor]
    wanted: tuple[Tensor, ...]

    @classmethod
    def of(cls, case: cases.LayerCase, backend: str, device: torch.device) -> "_Product":
        torch.manual_seed(0)
        options = {"device": device, "dtype": getattr(torch, case.dtype)}
        x = torch.randn(case.n_tokens, case.in_features, **options).requires_grad_()
        dy = torch.randn(case.n_tokens, case.out_features, **options)
        w = peers.kernel_values(case, device).requires_grad_()
        if backend == dispatch.BASE:
            return cls(x, w, dy, peers.frozen_base(case, device), (x,))
        return cls(x, w, dy, partial(circulant_linear, w=w, backend=backend), (x, w))

    def forward(self) -> Tensor:
        return self.product(self.x)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.wanted, self.dy, retain_graph=True)

    def check(self, truths: gate.Truths) -> None:
        """Hold the product and its gradients against the dense definition: as a layer's over a weight of zeros."""
        y = self.forward()
        dx, dw = self.backward(y)
        rows = layer.checked_rows(y)
        zeros = torch.zeros(y.shape[1], dx.shape[1], dtype=y.dtype, device=y.device)
        truth = truths.of("product", zeros, self.w, self.x, self.dy, rows=rows)
        found = (("y", y[rows], truth.y), ("dx", dx[rows], truth.dx), ("dw", dw, truth.dw))
        for name, value, true in found:
            gate.check(name, value, true, y.dtype)


def _run(case: cases.LayerCase, backend: str, device: torch.device) -> None:
    work = _Product.of(case, backend, device)
    work.backward(work.forward())


def _measure(
    case: cases.LayerCase,
    backend: str,
    timer: timing.Timer,
    device: torch.device,
    truths: gate.Truths,
    record: runs.Record,
) -> None:
    record |= {"case": asdict(case), "backend": backend, "times": {}}
    work = _Product.of(case, backend, device)
    if backend != dispatch.BASE:
        work.check(truths)
    record["times"]["forward"] = asdict(timer.measure(work.forward))
    record["times"]["backward"] = asdict(timer.measure(partial(work.backward, work.forward())))


# What the cost model says of it


def _predicted(record: runs.Record, direction: str) -> float:
    case = cases.LayerCase(**record["case"])
    sizes, dtype = (case.n_tokens, case.in_features, case.out_features), getattr(torch, case.dtype)
    if record["backend"] == dispatch.BASE:
        return dispatch.base_seconds(*sizes, dtype)
    return dispatch.predicted_seconds(record["backend"], *sizes, case.b, dtype, backward=direction == "backward")


@contextmanager
def _constants(values: Mapping[str, float]) -> Iterator[None]:
    """Within it the cost model computes with these, named as in `fitted`."""
    changed: dict[str, float | dict[int, float]] = {}
    for name, value in values.items():
        constant, _, itemsize = name.rstrip("]").partition("[")
        if itemsize:
            by_size = changed.setdefault(constant, dict(getattr(dispatch, constant)))
            assert isinstance(by_size, dict)
            by_size[int(itemsize)] = value
        elif hasattr(dispatch, constant):
            changed[constant] = value
    with ExitStack() as stack:
        for constant, of_all_sizes in changed.items():
            stack.enter_context(mock.patch.object(dispatch, constant, of_all_sizes))
        yield


def _launch_count(record: runs.Record, direction: str) -> float:
    """How many launches the model counts."""
    with _constants({"LAUNCH_SECONDS": 1.0}):
        one = _predicted(record, direction)
    with _constants({"LAUNCH_SECONDS": 0.0}):
        return one - _predicted(record, direction)


def fitted(records: runs.Records) -> dict[str, float]:
    """The constants of `c3a_triton.dispatch` that follow from measurements; those without a measurement are missing.

    Args:
        records: of `bench.ceilings` and of this benchmark, measured on one card.

    Returns:
        BANDWIDTH by the large copy, CUBLAS_FLOPS by bytes per element from the base product at its fastest and from
        cuBLAS's float32, TRITON_FLOPS from the product by a table, TF32_FLOPS from float16's product per frequency;
        LAUNCH_SECONDS, the median over few tokens of what is left of device time by launch; and HOST_SECONDS, of which
        the model has none yet: what back-to-back calls with few tokens take beyond device time, by launch.
    """
    found: dict[str, float] = {}
    sources = {
        "BANDWIDTH": (ceilings.BANDWIDTH_KEY, "bytes_per_second"),
        "CUBLAS_FLOPS[4]": ("cuBLAS float32, beta 0", "flops_per_second"),
        "TRITON_FLOPS[2]": ("table product bfloat16", "flops_per_second"),
        "TRITON_FLOPS[4]": ("table product float32", "flops_per_second"),
        "TF32_FLOPS": ("mix float16 b=16", "flops_per_second"),
    }
    for name, (key, rate) in sources.items():
        if rate in records.get(key, {}):
            found[name] = records[key][rate]
    swept = [record for record in records.values() if len(record.get("times", {})) == len(DIRECTIONS)]
    for record in swept:
        if record["backend"] == dispatch.BASE:
            name = f"CUBLAS_FLOPS[{getattr(torch, record['case']['dtype']).itemsize}]"
            found[name] = max(found.get(name, 0.0), _base_rate(record))
    few = [(r, direction) for r in swept if r["case"]["n_tokens"] <= launch.SMALL_T for direction in DIRECTIONS]
    if few:
        with _constants(found | {"LAUNCH_SECONDS": 0.0}):
            left = [record["times"][at]["median"] - _predicted(record, at) for record, at in few]
        counts = [_launch_count(record, at) for record, at in few]
        found["LAUNCH_SECONDS"] = statistics.median(s / n for s, n in zip(left, counts, strict=True))
        waited = [record["times"][at]["wall"] - record["times"][at]["median"] for record, at in few]
        ours = [s / n for s, n, (r, _) in zip(waited, counts, few, strict=True) if r["backend"] != dispatch.BASE]
        if ours:
            found["HOST_SECONDS"] = statistics.median(ours)
    return found


def _base_rate(record: runs.Record) -> float:
    case = cases.LayerCase(**record["case"])
    return 2 * case.n_tokens * case.in_features * case.out_features / record["times"]["forward"]["median"]


def _committed(name: str) -> float | None:
    constant, _, itemsize = name.rstrip("]").partition("[")
    value = getattr(dispatch, constant, None)
    return value[int(itemsize)] if itemsize and value is not None else value


def tables(records: runs.Records) -> list[str]:
    """The lines of a markdown report: times beside predicted ones, the ceilings, the fitted constants."""
    lines: list[str] = []
    swept = {key: record for key, record in records.items() if "backend" in record}
    shapes = dict.fromkeys(
        (r["case"]["in_features"], r["case"]["out_features"], r["case"]["b"]) for r in swept.values()
    )
    fit = fitted(records)
    for shape in shapes:
        some = [r for r in swept.values() if tuple(r["case"][n] for n in ("in_features", "out_features", "b")) == shape]
        backends = list(dict.fromkeys(record["backend"] for record in some))
        for direction in DIRECTIONS:
            title = f"### {shape[0]}→{shape[1]}, b={shape[2]}: {direction} of the product alone"
            lines += ["", title, "", "Device time, cold cache, median (as predicted; as predicted with the fit).", ""]
            rows = []
            for n_tokens in sorted({record["case"]["n_tokens"] for record in some}):
                cells = {r["backend"]: _cell(r, direction, fit) for r in some if r["case"]["n_tokens"] == n_tokens}
                rows.append([n_tokens, *(cells.get(backend, "-") for backend in backends)])
            lines.append(report.format_table(["T", *backends], rows))
    lines += ceilings.tables({key: record for key, record in records.items() if "backend" not in record})
    if fit:
        rows = []
        for name, value in fit.items():
            committed = _committed(name)
            rows.append([name, "-" if committed is None else f"{committed:.3g}", f"{value:.3g}"])
        lines += ["", "### The cost model's constants", ""]
        lines.append(report.format_table(["in c3a_triton/dispatch.py", "committed", "fitted"], rows))
    return lines


def _cell(record: runs.Record, direction: str, fit: Mapping[str, float]) -> str:
    found = record.get("times", {}).get(direction)
    if found is None:
        return record["status"]
    committed = _predicted(record, direction)
    with _constants(fit):
        by_fit = _predicted(record, direction)
    shown = (report.format_seconds(seconds) for seconds in (found["median"], committed, by_fit))
    return "{} ({}; {})".format(*shown)


def plot(records: runs.Records, path: Path) -> None:
    """Time by tokens: a panel per shape and direction, a line per backend."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    swept = [record for record in records.values() if len(record.get("times", {})) == len(DIRECTIONS)]
    for record in sorted(swept, key=lambda record: record["case"]["n_tokens"]):
        case = cases.LayerCase(**record["case"])
        for direction in DIRECTIONS:
            panel = panels.setdefault(f"{case.label}, b={case.b}: {direction}", {})
            point = (case.n_tokens, record["times"][direction]["median"] * 1e6)
            panel.setdefault(record["backend"], []).append(point)
    if panels:
        plots.lines(panels, path, x="tokens", y="µs")


SUBJECT = runs.Subject("tokens", "Products by tokens, and the cost model", tasks, tables, lambda records: [], plot)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    return runs.command(SUBJECT, argv)


if __name__ == "__main__":
    sys.exit(main())
