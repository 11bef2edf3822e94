"""Every launch of our forwards and backwards, one by one: its time, the bytes it must move, what its code needs.

Launches are told apart by their place in a call, not by their kernel's name: a kernel may be launched more than once.
Their times are those that torch.profiler reads from the device, joined to the launches in the order in which they were
made: events around each launch would add microseconds, as much as the small ones take. Such events are recorded all the
same, and serve where the profiler's list does not match (`timed_by` says which it was, `mismatch` why). What a launch
that begins within the one before waits for that one is in its time.

    python -m bench.profiled --ncu FILE     each launch of some cases once, for a profiler to watch: see `bench.ncu`
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import DeviceType

from c3a_triton.benchmark import cases
from c3a_triton.operator import routes
from c3a_triton.operator.launch import decode, direct, expand, fft, grouped, routed, weight_grad

from . import launch_hooks, op, report, runs

__all__ = ["SUBJECT", "Profiled", "calls", "described", "launches", "main", "profiled_cases"]

REPEATS = 7
FLUSH_BYTES = 128 << 20  # several times an L2
# So often, which keeps a device busy for a millisecond: while Python queues the launches of a call.
FLUSHES = 32
ADAPTERS = (0, 1, 2, 2)  # of the rows of a mixed batch
# Kernels whose operations hide behind their bytes in 16 bits, and what one of their launches must at least move to be
# held against the goal: ten microseconds' worth, beside which it does not matter that a launch takes time by itself.
MEMORY_BOUND = (
    "decode_kernel",
    "expand_kernel",
    "mix_kernel",
    "outer_kernel",
    "results_kernel",
    "spectra_kernel",
)
LEAST_BYTES = 32 * 10**6
GOAL = 0.75

Launch = dict[str, Any]  # what `described` says of one
Call = Callable[[], object]


@dataclass(frozen=True)
class Profiled:
    """A layer and what is called on it: "fft", "direct", "decode", "grouped" or "merge" (which has no tokens).

    Or "experts": so many of them, whose tokens are rows of the layer, drawn at random.
    """

    kind: str
    layer: cases.LayerCase
    under_ncu: bool = False
    stack: int = 0

    @property
    def key(self) -> str:
        """Its name in results."""
        tokens = f"T={self.layer.n_tokens} " if self.layer.n_tokens else ""
        experts = f"E={self.stack} " if self.stack else ""
        return f"{self.kind} {experts}{tokens}{self.layer.label} b={self.layer.b} {self.layer.dtype}"

    @property
    def bytes_by_address(self) -> int:
        """Bytes of the adapters that the kernels of a mixed batch find by their addresses."""
        return len(set(ADAPTERS)) * 4 * self.layer.in_features * self.layer.out_features // self.layer.b


def profiled_cases(*, tiny: bool = False) -> tuple[Profiled, ...]:
    """What is profiled, the worthiest first."""
    return _TINY if tiny else _CASES


_layer = cases.LayerCase
_CASES = (
    Profiled("fft", _layer(8192, 4096, 4096, 128), under_ncu=True),
    Profiled("fft", _layer(8192, 4096, 4096, 1024), under_ncu=True),
    Profiled("fft", _layer(848, 3072, 3072, 64), under_ncu=True),
    Profiled("decode", _layer(1, 4096, 4096, 128), under_ncu=True),
    Profiled("direct", _layer(8192, 4096, 4096, 128), under_ncu=True),
    Profiled("merge", _layer(0, 4096, 14336, 128), under_ncu=True),
    Profiled("fft", _layer(8192, 4096, 4096, 64), under_ncu=True),
    Profiled("fft", _layer(8192, 4096, 4096, 256), under_ncu=True),
    Profiled("fft", _layer(8192, 4096, 14336, 128)),
    Profiled("fft", _layer(848, 3072, 1024, 64)),
    Profiled("direct", _layer(256, 4096, 4096, 128)),
    Profiled("decode", _layer(1, 3072, 3072, 64), under_ncu=True),
    Profiled("decode", _layer(4, 4096, 4096, 128)),
    Profiled("decode", _layer(16, 4096, 4096, 128)),
    Profiled("grouped", _layer(4, 4096, 4096, 128), under_ncu=True),
    Profiled("grouped", _layer(256, 4096, 4096, 128)),
    Profiled("fft", _layer(8192, 4096, 4096, 128, "float16")),
    Profiled("fft", _layer(8192, 4096, 4096, 128, "float32")),
    # Qwen3-30B-A3B, of whose experts each token has eight: 8192 tokens, and one.
    *(
        Profiled("experts", _layer(8 * n_tokens, *widths, 128), stack=128)
        for n_tokens in (8192, 1)
        for widths in ((2048, 1536), (768, 2048))
    ),
)
_TINY = (
    Profiled("fft", _layer(5, 8, 12, 4)),
    Profiled("direct", _layer(20, 8, 8, 4, "float32")),
    Profiled("decode", _layer(2, 16, 16, 4), under_ncu=True),
    Profiled("grouped", _layer(4, 16, 16, 8)),
    Profiled("merge", _layer(0, 16, 16, 4), under_ncu=True),
    Profiled("experts", _layer(8, 8, 12, 4), stack=3),
)


def calls(case: Profiled, device: torch.device) -> dict[str, Call]:
    """The calls of a case by name, on random operands of their own on `device`, which may be "meta"."""
    n_tokens, in_features, out_features, b = astuple(case.layer)[:4]
    dtype, scale = getattr(torch, case.layer.dtype), 1 / in_features

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def adapter() -> Tensor:
        return normal(out_features // b, in_features // b, b, dtype=torch.float32)

    if case.kind == "merge":
        return {"merge": partial(expand.add_expanded_, normal(out_features, in_features), adapter(), scale=scale)}
    x = normal(n_tokens, in_features)
    if case.kind == "grouped":
        adapters = [adapter() for _ in range(1 + max(ADAPTERS))]
        return {"forward": partial(grouped.grouped_product, x, adapters, ADAPTERS, scale=scale)}
    if case.kind == "experts":
        w = normal(case.stack, out_features // b, in_features // b, b, dtype=torch.float32)
        offsets = routes.make(torch.randint(case.stack, (n_tokens, 1), device=device), case.stack).offsets

        def tiles(*where: int, make: Callable[..., Tensor]) -> Tensor:
            """Nothing kept from call to call, so that each launches the same."""
            return make(offsets, *where, False)

        dy, rest = normal(n_tokens, out_features), {"scale": scale, "tiles": tiles}
        return {
            "direct": partial(routed.routed_direct, x, w, offsets, **rest),
            "forward": partial(routed.routed_product, x, w, offsets, **rest),
            "backward": partial(routed.routed_backward, dy, x, w, offsets, **rest),
        }
    w = adapter()
    if case.kind == "decode":
        weight = normal(out_features, in_features)
        return {
            "with the base": partial(decode.decode_linear, x, weight, w, None, scale=scale),
            "adapter alone": partial(direct.direct_product, x, w, scale=scale),
        }
    dy = normal(n_tokens, out_features)
    if case.kind == "fft":
        return {
            "forward": partial(fft.fft_product, x, w, scale=scale),
            "backward": partial(fft.fft_backward, dy, x, w, scale=scale),
        }
    return {
        "forward": partial(direct.direct_product, x, w, scale=scale),
        "dx": partial(direct.direct_product, dy, w, scale=scale, transpose=True),
        "dw": partial(weight_grad.weight_grad, dy, x, b, scale=scale),
    }


def launches(device: torch.device, *, tiny: bool = False) -> Iterator[tuple[str, Call]]:
    """Every call that is profiled, by name: for those who record what they launch, on "meta" too."""
    for case in profiled_cases(tiny=tiny):
        for name, call in calls(case, device).items():
            yield f"{case.key} {name}", call


# What a launch is


# Spectra: [slots, their columns], of which a launch touches so many rows of two reals: a product of its arguments.
_SPECTRA: dict[str, dict[str, tuple[str, ...]]] = {
    "spectra_kernel": {"z_ptr": ("x_rows",), "other_z_ptr": ("other_rows",)},
    "mix_kernel": {"z_ptr": ("n_tokens", "col_blocks"), "y_ptr": ("n_tokens", "row_blocks")},
    "outer_kernel": {
        "g_ptr": ("n_tokens", "out_blocks"),
        "z_ptr": ("n_tokens", "in_blocks"),
        "y_ptr": ("n_tokens", "in_blocks"),
    },
    "results_kernel": {"y_ptr": ("n_rows",)},
    "routed_outer_kernel": {"g_ptr": ("count", "out_blocks"), "z_ptr": ("count", "in_blocks")},
}


@contextmanager
def described(bytes_by_address: int = 0) -> Iterator[list[Launch]]:
    """What is launched meanwhile, in order: kernel, grid, tile, bytes, and what a compiled kernel says of itself.

    Args:
        bytes_by_address: what the kernels of a mixed batch read beside their arguments.
    """
    found: list[Launch] = []

    def describing(run: Callable[..., Any]) -> Callable[..., Any]:
        def describe(kernel: Any, *args: Any, **arguments: Any) -> Any:
            compiled = run(kernel, *args, **arguments)
            name = kernel.__name__
            found.append(
                {
                    "kernel": name,
                    "grid": list(arguments["grid"]),
                    "tile": {key: size for key, size in arguments.items() if key.startswith("BLOCK")},
                    "warps": arguments.get("num_warps"),
                    "stages": arguments.get("num_stages"),
                    # The interpreter has no compiled kernel; a native one is loaded by now.
                    "registers": getattr(compiled, "n_regs", None),
                    "spills": getattr(compiled, "n_spills", None),
                    "shared": getattr(getattr(compiled, "metadata", None), "shared", None),
                    "bytes": _bytes(name, arguments) + (bytes_by_address if name.startswith("grouped_") else 0),
                }
            )
            return compiled

        return describe

    with launch_hooks.caught(describing):
        yield found


def _bytes(kernel: str, arguments: dict[str, Any]) -> int:
    """What a launch must move: its tensors once, and again what it reads before it writes it."""
    tensors = {name: value for name, value in arguments.items() if name.endswith("_ptr") and value is not None}
    sizes = {name: min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for name, t in tensors.items()}
    for name, rows in _SPECTRA.get(kernel, {}).items():
        if name in tensors:
            count = math.prod(arguments[argument] for argument in rows)
            sizes[name] = tensors[name].shape[0] * 2 * count * tensors[name].itemsize
    if arguments.get("ACCUMULATE"):
        return sum(sizes.values()) + sizes["out_ptr" if "out_ptr" in sizes else "sums_ptr"]
    return sum(sizes.values())


# How long it takes


class _Event(Protocol):
    def record(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


class _Moment:
    """In a rehearsal on a CPU, in place of a CUDA event."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "_Moment") -> float:
        return 1e3 * (end.at - self.at)


@contextmanager
def _between_events(device: torch.device) -> Iterator[list[tuple[_Event, _Event]]]:
    """Events before and after each launch made meanwhile."""
    found: list[tuple[_Event, _Event]] = []

    def event() -> _Event:
        return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else _Moment()

    def timing(run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(kernel: Any, *args: Any, **arguments: Any) -> Any:
            before, after = event(), event()
            before.record()
            compiled = run(kernel, *args, **arguments)
            after.record()
            found.append((before, after))
            return compiled

        return timed

    with launch_hooks.caught(timing):
        yield found


def _repeated(call: Call, device: torch.device) -> list[float]:
    """Seconds of every launch of several calls by events around it, the L2 emptied before each call."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    with _between_events(device) as events:
        call()  # its plans are made anew
        events.clear()
        for _ in range(1 if flush is None else REPEATS):
            if flush is not None:
                for _ in range(FLUSHES):
                    flush.zero_()
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def _seconds(call: Call, names: Sequence[str], device: torch.device) -> dict[str, Any]:
    """The median `seconds` of each launch of a call, which launches these kernels, and how they were found."""
    if device.type != "cuda":
        return {"seconds": _medians(_repeated(call, device), len(names)), "timed_by": "events"}
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            _repeated(call, device)
        found = _joined(list(names) * (1 + REPEATS), profile.events())[len(names) :]  # without the first call
        return {"seconds": _medians(found, len(names)), "timed_by": "profiler"}
    except (AssertionError, RuntimeError, ValueError) as error:  # no profiler here, or another list
        torch.cuda.synchronize(device)
        seconds = _medians(_repeated(call, device), len(names))
        return {"seconds": seconds, "timed_by": "events", "mismatch": str(error)}


def _joined(names: Sequence[str], events: Iterable[Any]) -> list[float]:
    """Seconds of launches of these kernels, in order, from a profiler's events.

    Raises:
        ValueError: the events are not those of the launches.
    """
    kernels = set(names)
    ours = [event for event in events if event.device_type == DeviceType.CUDA and event.name in kernels]
    ours.sort(key=lambda event: event.time_range.start)
    if [event.name for event in ours] != list(names):
        pairs = enumerate(zip(names, (event.name for event in ours), strict=False))
        where = next((f"; launch {i} is {ours}, its event {found}" for i, (ours, found) in pairs if ours != found), "")
        raise ValueError(f"{len(ours)} events for {len(names)} launches{where}")
    return [event.time_range.elapsed_us() / 1e6 for event in ours]


def _medians(samples: Sequence[float], n_launches: int) -> list[float]:
    """By the place in a call."""
    return [statistics.median(samples[place::n_launches]) for place in range(n_launches)]


def _measure(case: Profiled, device: torch.device, record: runs.Record) -> None:
    record |= {"case": asdict(case.layer), "kind": case.kind, "calls": {}}
    torch.manual_seed(0)
    for name, call in calls(case, device).items():
        call()  # compiles
        with described(case.bytes_by_address) as found:
            call()
        timed = _seconds(call, [one["kernel"] for one in found], device)
        for one, seconds in zip(found, timed.pop("seconds"), strict=True):
            one["seconds"] = seconds
        record["calls"][name] = {"launches": found, **timed}


def _tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    yield runs.Task(op.BANDWIDTH_KEY, 0, partial(op.bandwidth, setting), 1.0)
    for case in profiled_cases(tiny=setting.tiny):
        yield runs.Task(case.key, 0, partial(_measure, case, setting.device), 2.0)


# What is read off


def _shares(records: runs.Records) -> Iterator[tuple[str, str, int, Launch, float | None]]:
    """(case, call, place in it, launch, its rate over the measured copy bandwidth)."""
    bandwidth = records.get(op.BANDWIDTH_KEY, {}).get("bytes_per_second")
    for key, record in records.items():
        for call, found in record.get("calls", {}).items():
            for place, one in enumerate(found["launches"]):
                share = one["bytes"] / one["seconds"] / bandwidth if bandwidth and one.get("seconds") else None
                yield key, call, place, one, share


_OF_CODE = ("registers", "spills", "shared", "warps", "stages")
_HEADERS = ("call", "#", "kernel", "time", "bytes", "TB/s", "of the copy", *_OF_CODE, "tile", "grid")


def _tables(records: runs.Records) -> list[str]:
    lines: list[str] = []
    if bandwidth := records.get(op.BANDWIDTH_KEY, {}).get("bytes_per_second"):
        lines += ["", f"Measured copy bandwidth: {bandwidth / 1e12:.3g} TB/s. Bytes are what a launch must move, some"]
        lines += ["of which it may find in the L2, where the launch before has left them."]
    rows: dict[str, list[list[object]]] = {}
    for key, call, place, one, share in _shares(records):
        seconds = one.get("seconds")
        rows.setdefault(key, []).append(
            [
                call,
                place,
                one["kernel"],
                "-" if seconds is None else report.format_seconds(seconds),
                report.format_bytes(one["bytes"]),
                "-" if seconds is None else f"{one['bytes'] / seconds / 1e12:.2f}",
                "-" if share is None else f"{share:.0%}",
                *("-" if one[name] is None else one[name] for name in _OF_CODE),
                " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in one["tile"].items()),
                "×".join(map(str, one["grid"])),
            ]
        )
    for key, found in rows.items():
        lines += ["", f"### {key}", ""]
        for call, timed in records[key]["calls"].items():
            if "mismatch" in timed:
                said = f"{call}: timed by events around each launch, some microseconds too long ({timed['mismatch']})."
                lines += [said, ""]
        lines.append(report.format_table(_HEADERS, found))
    return lines


def _goals(records: runs.Records) -> list[report.Goal]:
    reached = {
        f"{one['kernel']} in {key} {call}": share
        for key, call, _, one, share in _shares(records)
        if share is not None
        and one["kernel"] in MEMORY_BOUND
        and one["bytes"] >= LEAST_BYTES
        and records[key]["case"]["dtype"] == "bfloat16"
    }
    worst = min(reached, key=lambda name: reached[name], default="")
    what = f"each memory-bound launch of {LEAST_BYTES // 10**6} MB or more, bfloat16: bytes / time / copy bandwidth"
    return [report.at_least(what, GOAL, reached.get(worst), what=f"the worst of {len(reached)}: {worst}")]


SUBJECT = runs.Subject("profile", "Every launch", _tasks, _tables, _goals, plot=lambda records, path: None)


# Once each, for another profiler to watch


def main(argv: Sequence[str] | None = None) -> int:
    """Launch everything once between the starts and the stops of CUDA's profiler; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.profiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ncu", type=Path, required=True, metavar="FILE", help="where to list the launches, in order")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the code itself")
    parser.add_argument("--until", type=float, default=float("inf"), help="no call is begun after this (Unix time)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    listed: list[Launch] = []
    for case in profiled_cases(tiny=args.tiny):
        if not case.under_ncu:
            continue
        for name, call in calls(case, device).items():
            if time.time() > args.until:
                return 0
            with described(case.bytes_by_address) as found:
                call()  # compiles, and makes plans
                found.clear()
                _watched(call, device)
            listed += [{"case": case.key, "call": name, "place": i, **one} for i, one in enumerate(found)]
            report.write_json(args.ncu, listed)
    return 0


def _watched(call: Call, device: torch.device) -> None:
    if device.type != "cuda":
        call()
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize(device)
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    sys.exit(main())
