"""What a card can do at most, and what a launch costs: `python -m bench.ceilings --out DIR`.

Copies in memory and in the L2, cuBLAS's products with and without a summand, our own products without what is launched
around them, and the cost of a launch on the host, on the device and within a CUDA graph. All operands are random: zeros
multiply faster than numbers do.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c3a_triton.benchmark import cases, layer, timing
from c3a_triton.errors import BackendError
from c3a_triton.operator.launch import direct, fft, plans, specs

from . import launch_hooks, plots, report, runs

__all__ = ["BANDWIDTH_KEY", "L2_KEY", "SUBJECT", "bandwidth", "for_fit", "launches", "main", "tables", "tasks"]

COPY_BYTES = 1 << 30  # of either side; less where the card is small
BANDWIDTH_KEY = "copy bandwidth"
L2_KEY = "copy in the L2"
SECONDS = 0.1  # of one timing
RESIDENT_REPEATS = 50  # copies in one launch: the first, from memory, is next to nothing
N_LAUNCHES = 1000  # without waiting: a stream takes as many
N_CALLS = 50  # of a layer, which launches more than ten kernels
N_ROUNDS = 3

SQUARE = cases.LayerCase(8192, 4096, 4096, 128)
TINY = cases.LayerCase(24, 64, 64, 32)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
# Kernels whose rates the cost model knows, by key: (launcher, kernel, dtype, block size). At b = 16 the product per
# frequency is bound by its operations, in TF32 where x is float16.
KERNELS: dict[str, tuple[Callable[..., Tensor], str, str, int]] = {
    "table product bfloat16": (direct.direct_product, "table_product_kernel", "bfloat16", 128),
    "table product float32": (direct.direct_product, "table_product_kernel", "float32", 128),
    "mix float16 b=16": (fft.fft_product, "mix_kernel", "float16", 16),
}
# As small as layers get: what a call costs beside its work.
LAYER = cases.LayerCase(32, 256, 256, 64)
LAYER_TINY = cases.LayerCase(3, 16, 16, 8, "float32")


def tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    """Memory, products, launches; each takes about a second."""
    yield from _memory(setting)
    yield from _products(setting)
    yield from _own_products(setting)
    for name, number, make in _launched(LAYER_TINY if setting.tiny else LAYER):
        yield runs.Task(f"launch: {name}", 0, partial(_launching, setting, 1 if setting.tiny else number, make), 1.5)


def for_fit(setting: runs.Setting) -> Iterator[runs.Task]:
    """Those of `tasks` that the constants of the cost model are read off (`token_sweep.fitted`)."""
    chosen = {BANDWIDTH_KEY, L2_KEY, "cuBLAS float32, beta 0", *KERNELS}
    return (task for task in tasks(setting) if task.key in chosen)


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """What launches Triton kernels here, by key, on operands of `device`."""
    for key, (product, _, dtype, b) in KERNELS.items():
        yield key, partial(_product_call, product, _sized(SQUARE, dtype, b), device)
    for name, _, make in _launched(LAYER):
        yield f"launch: {name}", partial(_made_and_called, make, device)
    yield L2_KEY, partial(_made_and_called, lambda device: _resident_copy(1 << 20, 1, device)[0], device)


def _made_and_called(make: Callable[[torch.device], Callable[[], object]], device: torch.device) -> None:
    make(device)()


def _needs_triton(device: torch.device) -> None:
    reason = specs.unavailable_reason(device)
    if reason is not None:
        raise BackendError(reason)


# Memory


def _memory(setting: runs.Setting) -> Iterator[runs.Task]:
    yield runs.Task(BANDWIDTH_KEY, 0, partial(bandwidth, setting), 1.0)
    yield runs.Task("read bandwidth", 0, partial(_one_way, setting, Tensor.sum), 1.0)
    yield runs.Task("write bandwidth", 0, partial(_one_way, setting, lambda values: values.fill_(1.0)), 1.0)
    yield runs.Task(L2_KEY, 0, partial(_resident, setting), 1.0)


def _values(setting: runs.Setting) -> Tensor:
    """Random values of 1 GiB, or of a quarter of the memory that is left."""
    n_bytes = 1 << 20 if setting.tiny else COPY_BYTES
    if setting.device.type == "cuda":
        n_bytes = min(n_bytes, torch.cuda.mem_get_info(setting.device)[0] // 4)
    return torch.randn(n_bytes // 4, device=setting.device)


def bandwidth(setting: runs.Setting, record: runs.Record) -> None:
    """Bytes that a large copy reads and writes per second."""
    source = _values(setting)
    target = torch.empty_like(source)
    found = timing.within(setting.timer, SECONDS).measure(lambda: target.copy_(source))
    record |= {"time": asdict(found), "bytes_per_second": 2 * source.nbytes / found.median}


def _one_way(setting: runs.Setting, call: Callable[[Tensor], object], record: runs.Record) -> None:
    values = _values(setting)
    found = timing.within(setting.timer, SECONDS).measure(partial(call, values))
    record |= {"time": asdict(found), "bytes_per_second": values.nbytes / found.median}


def _resident(setting: runs.Setting, record: runs.Record) -> None:
    """Copies in one launch; source and target together are no more than a quarter of the L2, or little more."""
    device = setting.device
    _needs_triton(device)
    l2_bytes, programs, repeats = 1 << 16, 2, 3
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        l2_bytes, repeats = properties.L2_cache_size, RESIDENT_REPEATS
        programs = 8 * properties.multi_processor_count  # some 32 KB on their way to each multiprocessor
    call, set_bytes = _resident_copy(l2_bytes // 4, programs, device, repeats)
    found = timing.within(setting.timer, SECONDS).measure(call)
    record |= {"time": asdict(found), "set_bytes": set_bytes, "bytes_per_second": repeats * set_bytes / found.median}


def _resident_copy(
    most_bytes: int, programs: int, device: torch.device, repeats: int = RESIDENT_REPEATS
) -> tuple[Callable[[], None], int]:
    """The copies, and the bytes of source and target: such that all programs have the same work."""
    from . import resident

    at_once = programs * resident.BLOCK
    source = torch.randn(max(1, most_bytes // (8 * at_once)) * at_once, device=device)
    call = partial(resident.copy_again, source, torch.empty_like(source), repeats=repeats, programs=programs)
    return call, 2 * source.nbytes


# Products


def _sized(case: cases.LayerCase, dtype: str, b: int) -> cases.LayerCase:
    return cases.LayerCase(case.n_tokens, case.in_features, case.out_features, b, dtype)


def _products(setting: runs.Setting) -> Iterator[runs.Task]:
    for name in DTYPES:
        for beta in (0, 1):
            yield runs.Task(f"cuBLAS {name}, beta {beta}", 0, partial(_cublas, setting, name, beta), 1.0)


@contextmanager
def _in_tf32() -> Iterator[None]:
    # By the switch that sets torch's older one too: some of torch asks the older one, and raises where they differ.
    matmul = torch.backends.cuda.matmul
    before, older = matmul.fp32_precision, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        matmul.fp32_precision = before


def _cublas(setting: runs.Setting, name: str, beta: int, record: runs.Record) -> None:
    """x Wᵀ as the base layer has it, or with beta = 1 added in place to what our kernels have written."""
    case = TINY if setting.tiny else SQUARE
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": DTYPES[name], "device": setting.device}
    x = torch.randn(case.n_tokens, case.in_features, **options)
    weight = torch.randn(case.out_features, case.in_features, **options).mul_(case.in_features**-0.5)
    y = torch.randn(case.n_tokens, case.out_features, **options)
    call = (lambda: y.addmm_(x, weight.t())) if beta else (lambda: torch.mm(x, weight.t(), out=y))
    with _in_tf32() if name == "tf32" else nullcontext():
        found = timing.within(setting.timer, SECONDS).measure(call)
    flops = 2 * case.n_tokens * case.in_features * case.out_features
    record |= {"time": asdict(found), "seconds": found.median, "flops_per_second": flops / found.median}


def _own_products(setting: runs.Setting) -> Iterator[runs.Task]:
    for key, (product, kernel, dtype, b) in KERNELS.items():
        case = _sized(TINY, dtype, min(b, TINY.b)) if setting.tiny else _sized(SQUARE, dtype, b)
        yield runs.Task(key, 0, partial(_own_product, setting, product, kernel, case), 2.0)


def _product_call(product: Callable[..., Tensor], case: cases.LayerCase, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(case.n_tokens, case.in_features, device=device, dtype=getattr(torch, case.dtype))
    w = torch.randn(case.out_features // case.b, case.in_features // case.b, case.b, device=device)
    return product(x, w, scale=1.0 / case.in_features)


def _launches_of(name: str, call: Callable[[], object]) -> list[Callable[[], object]]:
    """Every launch of a kernel that `call` makes, to be made again."""
    found: list[Callable[[], object]] = []

    def keeping(run: Callable[..., Any]) -> Callable[..., Any]:
        def kept_run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            if kernel.__name__ == name:
                found.append(partial(run, kernel, *args, **kwargs))
            return run(kernel, *args, **kwargs)

        return kept_run

    with launch_hooks.caught(keeping):
        call()
    return found


def _own_product(
    setting: runs.Setting, product: Callable[..., Tensor], kernel: str, case: cases.LayerCase, record: runs.Record
) -> None:
    """One kernel of a product alone, by the operations that the cost model counts for it."""
    record["case"] = asdict(case)
    _needs_triton(setting.device)
    again = _launches_of(kernel, partial(_product_call, product, case, setting.device))
    found = timing.within(setting.timer, SECONDS).measure(lambda: [call() for call in again])
    # Per frequency a complex product of blocks, which are b times fewer than features.
    flops = 2 * case.n_tokens * case.in_features * case.out_features * (2 / case.b if kernel == "mix_kernel" else 1)
    record |= {"time": asdict(found), "seconds": found.median, "flops_per_second": flops / found.median}


# Launches


def _sum_of_partials(device: torch.device) -> Callable[[], object]:
    """Our smallest kernel, launched as a plan does it."""
    _needs_triton(device)
    partials, out = torch.randn(1, 1, 256, device=device), torch.empty(1, 256, device=device)
    add_up = plans.summation((1, 1, 256), has_bias=False, accumulate=False)
    return partial(add_up, partials_ptr=partials, bias_ptr=None, out_ptr=out, scale=1.0, stride_out_row=256)


def _add(device: torch.device) -> Callable[[], object]:
    values = torch.randn(256, device=device)
    return partial(values.add_, 1.0)


def _launched(case: cases.LayerCase) -> list[tuple[str, int, Callable[[torch.device], Callable[[], object]]]]:
    """What is launched: its name, how often without waiting, what makes it for a device."""
    return [
        ("sum_partials_kernel", N_LAUNCHES, _sum_of_partials),
        ("add_", N_LAUNCHES, _add),
        ("fft layer, forward + backward", N_CALLS, lambda device: layer.Workload.of(case, "ours:fft", device).both),
    ]


def _launching(
    setting: runs.Setting, number: int, make: Callable[[torch.device], Callable[[], object]], record: runs.Record
) -> None:
    """Seconds of one call: of Python, which does not wait; of the device, queued and in a CUDA graph."""
    device, timer = setting.device, timing.within(setting.timer, SECONDS)
    call = make(device)
    record |= {"host_seconds": _host_seconds(call, number, device), "graph_seconds": None}
    n_queued = max(1, number // 5)

    def queue() -> None:
        for _ in range(n_queued):
            call()

    record["device_seconds"] = timer.measure(queue).median / n_queued
    if device.type == "cuda":
        record["graph_seconds"] = timer.measure(timing.graphed(queue)).median / n_queued


def _host_seconds(call: Callable[[], object], number: int, device: torch.device) -> float:
    """Of the fastest of some rounds of so many calls, none of which waits for the device."""
    best = math.inf
    call()
    for _ in range(N_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(number):
            call()
        best = min(best, time.perf_counter() - start)
    return best / number


# What is read off


def tables(records: runs.Records) -> list[str]:
    """The lines of a markdown report: rates, then launches."""
    rates, costs = [], []
    for key, record in records.items():
        if "bytes_per_second" in record:
            rates.append([key, f"{record['bytes_per_second'] / 1e12:.3g} TB/s", _time(record)])
        elif "flops_per_second" in record:
            rates.append([key, f"{record['flops_per_second'] / 1e12:.3g} TFLOP/s", _time(record)])
        elif "host_seconds" in record:
            kinds = ("host_seconds", "device_seconds", "graph_seconds")
            found = [record.get(kind) for kind in kinds]
            costs.append(
                [key.removeprefix("launch: "), *("-" if s is None else report.format_seconds(s) for s in found)]
            )
    lines = []
    if rates:
        lines += ["", report.format_table(["ceiling", "rate", "time"], rates)]
    if costs:
        headers = ["launched", "Python", "device, queued", "device, in a CUDA graph"]
        lines += ["", "One of many calls, of which none waits:", "", report.format_table(headers, costs)]
    return lines


def _time(record: runs.Record) -> str:
    return report.format_seconds(record["time"]["median"])


def plot(records: runs.Records, path: Path) -> None:
    """A panel of bandwidths and one of products."""
    kinds = {"TB/s": "bytes_per_second", "TFLOP/s": "flops_per_second"}
    panels: dict[str, dict[str, float]] = {
        unit: {key: record[kind] / 1e12 for key, record in records.items() if kind in record}
        for unit, kind in kinds.items()
    }
    if panels := {unit: panel for unit, panel in panels.items() if panel}:
        plots.bars(panels, path, y="rate")


SUBJECT = runs.Subject("ceilings", "What the card can do at most", tasks, tables, lambda records: [], plot)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    return runs.command(SUBJECT, argv)


if __name__ == "__main__":
    sys.exit(main())
