"""Every backend's product alone, by tokens: `python -m bench.token_sweep --out DIR`.

What the constants of the cost model in `c3a_triton.operator.bounds` are fitted from: device time of x ΔWᵀ and of both
its gradients, of the base layer's own product and its gradient of x, beside what the model predicts; and the few
ceilings of the same card. The table ends with the fitted constants.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from c3a_triton import circulant_linear
from c3a_triton.benchmark import cases, gate, layer, peers, timing
from c3a_triton.operator import bounds, cost_model, dispatch
from c3a_triton.operator.cost_model import Ceilings
from c3a_triton.operator.launch import tiles

from . import ceilings, plots, report, runs

__all__ = ["SUBJECT", "fitted", "host_seconds", "launches", "main", "tables", "tasks"]

SECONDS = 0.04  # of one timing
# The ends and the middle first, should the time not suffice.
TOKENS = (8192, 1, 1024, 16, 32768, 256, 64, 4)
SHAPES = ((4096, 4096, 128), (3072, 3072, 64))
BACKENDS = (dispatch.BASE, "direct", "fft", "expand")
TORCH_TOKENS = (16, 1024, 8192)
DIRECTIONS = ("forward", "backward")
FLOATS = {2: "bfloat16", 4: "float32"}  # by bytes


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


def _predicted(record: runs.Record, direction: str, at: Ceilings = cost_model.CEILINGS) -> float:
    case = cases.LayerCase(**record["case"])
    sizes = cost_model.Sizes(case.n_tokens, case.in_features, case.out_features, case.b, getattr(torch, case.dtype))
    if record["backend"] == dispatch.BASE:
        return cost_model.base_seconds(sizes, ceilings=at)
    return cost_model.predicted_seconds(record["backend"], sizes, backward=direction == "backward", ceilings=at)


def _launch_count(record: runs.Record, direction: str) -> float:
    """How many launches the model counts."""
    none, one = (cost_model.CEILINGS._replace(launch_seconds=seconds) for seconds in (0.0, 1.0))
    return _predicted(record, direction, one) - _predicted(record, direction, none)


def fitted(records: runs.Records, before: Ceilings = cost_model.CEILINGS) -> Ceilings:
    """The cost model's ceilings as a card has measured them.

    Args:
        records: of `bench.ceilings` and of this benchmark, measured on one card.
        before: what stays of what it has not measured.

    Returns:
        The bandwidths of the large copy and of copies within the L2; cuBLAS's rates, in 16 bits the base product's at
        its fastest where that was swept; Triton's from the product by a table, in TF32 from float16's product per
        frequency; and per launch the median over few tokens of what is left of device time.
    """

    def rate(key: str, name: str, default: float) -> float:
        return records.get(key, {}).get(name, default)

    def flops(key: str, default: float) -> float:
        return rate(key, "flops_per_second", default)

    cublas = {2: flops("cuBLAS bfloat16, beta 0", before.cublas_flops[2])}
    cublas[4] = flops("cuBLAS float32, beta 0", before.cublas_flops[4])
    swept = _swept(records)
    for itemsize in cublas:
        base = [
            _base_rate(record)
            for record in swept
            if record["backend"] == dispatch.BASE and getattr(torch, record["case"]["dtype"]).itemsize == itemsize
        ]
        cublas[itemsize] = max(base, default=cublas[itemsize])
    triton = {size: flops(f"table product {name}", before.triton_flops[size]) for size, name in FLOATS.items()}
    # A copy writes as many bytes as it reads.
    l2_copy = before.l2_bandwidth * 2 / (1 + bounds.WRITTEN)
    l2_share = rate(ceilings.L2_KEY, "bytes_per_second", l2_copy) / l2_copy
    found = before._replace(
        bandwidth=rate(ceilings.BANDWIDTH_KEY, "bytes_per_second", before.bandwidth),
        l2_bandwidth=before.l2_bandwidth * l2_share,
        cublas_flops=cublas,
        triton_flops=triton,
        tf32_flops=flops("mix float16 b=16", before.tf32_flops),
        launch_seconds=0.0,
    )
    left = [
        (record["times"][at]["median"] - _predicted(record, at, found)) / _launch_count(record, at)
        for record, at in _few_tokens(swept)
    ]
    return found._replace(launch_seconds=statistics.median(left) if left else before.launch_seconds)


def host_seconds(records: runs.Records) -> float | None:
    """What back-to-back calls of ours with few tokens take beyond device time, by launch: the model has none of it."""
    waited = [
        (record["times"][at]["wall"] - record["times"][at]["median"]) / _launch_count(record, at)
        for record, at in _few_tokens(_swept(records))
        if record["backend"] != dispatch.BASE
    ]
    return statistics.median(waited) if waited else None


def _swept(records: runs.Records) -> list[runs.Record]:
    return [record for record in records.values() if "backend" in record and len(record["times"]) == len(DIRECTIONS)]


def _few_tokens(swept: list[runs.Record]) -> list[tuple[runs.Record, str]]:
    return [(r, direction) for r in swept if r["case"]["n_tokens"] <= tiles.SMALL_T for direction in DIRECTIONS]


def _base_rate(record: runs.Record) -> float:
    case = cases.LayerCase(**record["case"])
    return 2 * case.n_tokens * case.in_features * case.out_features / record["times"]["forward"]["median"]


def _constants(found: Ceilings) -> dict[str, float]:
    """Every number of it, by name."""
    return {
        f"{name}[{size}]" if size else name: number
        for name, value in found._asdict().items()
        for size, number in (value.items() if isinstance(value, Mapping) else [(None, value)])
    }


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
    committed = _constants(cost_model.CEILINGS)
    rows = [
        [name, f"{committed[name]:.3g}", f"{value:.3g}"]
        for name, value in _constants(fit).items()
        if value != committed[name]
    ]
    host = host_seconds(records)
    if host is not None:
        rows.append(["Python's and the driver's seconds per launch", "-", f"{host:.3g}"])
    if rows:
        lines += ["", "### The cost model's constants", ""]
        lines.append(report.format_table(["c3a_triton.operator.bounds.CEILINGS", "committed", "fitted"], rows))
    return lines


def _cell(record: runs.Record, direction: str, fit: Ceilings) -> str:
    found = record.get("times", {}).get(direction)
    if found is None:
        return record["status"]
    predicted = _predicted(record, direction), _predicted(record, direction, fit)
    shown = (report.format_seconds(seconds) for seconds in (found["median"], *predicted))
    return "{} ({}; {})".format(*shown)


def plot(records: runs.Records, path: Path) -> None:
    """Time by tokens: a panel per shape and direction, a line per backend."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in sorted(_swept(records), key=lambda record: record["case"]["n_tokens"]):
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
