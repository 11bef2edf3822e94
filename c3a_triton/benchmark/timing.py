"""Time and memory of one call: CPU time of one thread, or CUDA events with a cold cache.

Every figure is a median. Claims compare medians of one run, so peers are measured alternately where the clock is
shared with other work (CPU), and one after another where the device is ours (GPU).
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks

__all__ = [
    "CpuTimer",
    "CudaTimer",
    "SavedBytes",
    "Timer",
    "Timing",
    "alternate",
    "geometric_mean",
    "graphed",
    "in_turn",
    "peak_bytes",
    "saved_bytes",
    "within",
]

T = TypeVar("T")

FLUSH_BYTES = 128 << 20  # at least; also long enough on a device to be timed


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over `repeats` samples; `wall` is a call's share of back-to-back calls, Python included."""

    median: float
    p20: float
    p80: float
    repeats: int
    wall: float | None = None
    peak_bytes: int | None = None  # allocated at the highest, beyond what was allocated before the call

    @classmethod
    def of(cls, samples: list[float], *, wall: float | None = None, peak_bytes: int | None = None) -> "Timing":
        """The summary of `samples` (at least one)."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            median=statistics.median(ordered),
            p20=ordered[round(0.2 * last)],
            p80=ordered[round(0.8 * last)],
            repeats=len(ordered),
            wall=wall,
            peak_bytes=peak_bytes,
        )

    def divided(self, number: int) -> "Timing":
        """The timing of one of `number` equal parts."""
        wall = None if self.wall is None else self.wall / number
        return replace(self, median=self.median / number, p20=self.p20 / number, p80=self.p80 / number, wall=wall)


def geometric_mean(values: list[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def alternate(
    calls: Mapping[str, Callable[[], object]], *, seconds: float = 4.0, sample_seconds: float = 2e-3
) -> dict[str, Timing]:
    """CPU time of the calling thread for each of several calls, sampled in turn.

    Sampling in turn, in the opposite order every other round, spreads a change of clock speed or a noisy neighbour
    over all of them. Only this thread's time counts, so torch should be limited to one thread.

    Args:
        calls: name to function of no arguments.
        seconds: time to spend in all.
        sample_seconds: a sample repeats its call until it takes about this long, the clock being coarse.

    Returns:
        name to `Timing`, in seconds of one call.
    """
    numbers = {}
    for name, call in calls.items():
        call()
        start = time.thread_time()
        call()
        numbers[name] = max(1, round(sample_seconds / max(time.thread_time() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(samples[names[0]]) < 5:
        for name in names:
            call, number = calls[name], numbers[name]
            start = time.thread_time()
            for _ in range(number):
                call()
            samples[name].append((time.thread_time() - start) / number)
        names.reverse()
    return {name: Timing.of(samples[name]) for name in calls}


def in_turn(
    calls: Mapping[str, tuple[Callable[[], Any], Callable[[Any], object]]],
    device: torch.device,
    *,
    seconds: float = 4.0,
    warm_up: int = 1,
) -> dict[str, Timing]:
    """Wall time of several calls that take long, or that each need something fresh, sampled in turn.

    Python and the device's work count, the device being waited for before and after.

    Args:
        calls: name to (what makes the call's argument, not timed; the call).
        device: where they compute.
        seconds: time to spend in all, with at least three samples of each.
        warm_up: rounds that do not count.

    Returns:
        name to `Timing`, with the peak memory of a call on a GPU.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, int | None] = dict.fromkeys(calls)
    names = list(calls)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < warm_up + 3 or time.perf_counter() < deadline:
        for name in names:
            prepare, call = calls[name]
            argument = prepare()
            before = _start_peak(device)
            start = time.perf_counter()
            result = call(argument)
            _synchronize(device)
            elapsed = time.perf_counter() - start
            if rounds >= warm_up:
                samples[name].append(elapsed)
                peaks[name] = _end_peak(device, before)
            del argument, result
        names.reverse()
        rounds += 1
    return {name: Timing.of(samples[name], peak_bytes=peaks[name]) for name in calls}


def peak_bytes(call: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What `call` returns, and the most it had allocated at a time, its result included; None on a CPU."""
    before = _start_peak(device)
    result = call()
    return result, _end_peak(device, before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _end_peak(device: torch.device, before: int) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Timer(Protocol):
    """Measures one call; what the GPU job asks of a device."""

    def measure(self, call: Callable[[], object]) -> Timing:
        """Warm up, then time `call`."""
        ...


class CpuTimer:
    """Wall time on a CPU: lets the GPU job's own code run, and be tested, without a GPU."""

    def __init__(self, repeats: int = 3) -> None:
        self.repeats = repeats

    def measure(self, call: Callable[[], object]) -> Timing:
        """Time `call` after one warm-up."""
        call()
        samples = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        return Timing.of(samples, wall=statistics.median(samples))


class CudaTimer:
    """Device time of a call on a GPU: events around it, L2 emptied before it, its launches queued ahead of it.

    The buffer that empties the cache is written as often as it takes to keep the device busy while Python queues the
    call, so that the events see the device's work and not the gaps between launches. Those show in `wall`, the time of
    a call among back-to-back calls with a warm cache.
    """

    def __init__(self, device: torch.device, *, seconds: float = 0.25, max_repeats: int = 50) -> None:
        self.device = device
        self.seconds = seconds
        self.max_repeats = max_repeats
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self._flush = torch.empty(max(4 * l2_bytes, FLUSH_BYTES), dtype=torch.int8, device=device)
        self._flush.zero_()
        self._flush_seconds = min(self._between(self._flush.zero_) for _ in range(5))

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _between(self, call: Callable[[], object]) -> float:
        start, end = self._events()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3

    def measure(self, call: Callable[[], object]) -> Timing:
        """Time `call`; compilation and first allocations happen in the warm-up."""
        for _ in range(3):
            call()
        torch.cuda.synchronize(self.device)

        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        call()
        queueing = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        once = time.perf_counter() - start
        peak_bytes = torch.cuda.max_memory_allocated(self.device) - before

        repeats = max(5, min(self.max_repeats, int(self.seconds / once)))
        fills = min(200, 1 + math.ceil(1.5 * queueing / self._flush_seconds))
        pairs = [self._events() for _ in range(repeats)]
        for begin, end in pairs:
            for _ in range(fills):
                self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        samples = [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize(self.device)
        return Timing.of(samples, wall=(time.perf_counter() - start) / repeats, peak_bytes=peak_bytes)


def within(timer: Timer, seconds: float) -> Timer:
    """`timer` with at most so many seconds of samples for one measurement, where it is one that takes its time."""
    if not isinstance(timer, CudaTimer):
        return timer
    shorter = copy.copy(timer)
    shorter.seconds = min(timer.seconds, seconds)
    return shorter


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """`call` captured in a CUDA graph, after calls that make what a capture must not make."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@dataclass(frozen=True)
class SavedBytes:
    """What a forward keeps for its backward, in bytes; parameters are alive anyway and counted apart."""

    activations: int
    parameters: int


def saved_bytes(layer: torch.nn.Module, x: torch.Tensor) -> SavedBytes:
    """Bytes that one call `layer(x)` saves for backward, each storage counted once and whole."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The output is held while counting: freed storages would give their addresses to others.
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    parameters = sum(size for address, size in saved.items() if address in owned)
    activations = sum(size for address, size in saved.items() if address not in owned)
    del output
    return SavedBytes(activations=activations, parameters=parameters)
