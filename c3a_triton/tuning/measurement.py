"""Measuring cases: a layer's forward and gradients, timed, kept in the tuned table as they come."""

import functools
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from c3a_triton.benchmark import peers
from c3a_triton.errors import BackendError
from c3a_triton.operator import dispatch, tuned
from c3a_triton.operator.calls import c3a_linear
from c3a_triton.operator.tuned import Times

from .costs import PEFT_C3A, PEFT_LORA, Case, Setting

__all__ = ["Operands", "Progress", "Timer", "default_timer", "measured"]

CPU_SECONDS = 0.2
CPU_REPEATS = 3
# Of `do_bench`: a median of some dozens of calls is enough to tell backends apart.
GPU_WARMUP_MS = 10
GPU_REPEAT_MS = 50

Progress = Callable[[int, int, str], None]  # cases done, cases in all, what is measured now


class Timer(Protocol):
    """Median seconds of a call, after a warm-up."""

    def __call__(self, call: Callable[[], object]) -> float:
        """Time `call`."""
        ...


def default_timer(device: torch.device) -> Timer:
    """`triton.testing.do_bench` on a GPU (events, L2 emptied before each call), the wall clock on a CPU."""
    return _gpu_seconds if device.type == "cuda" else _cpu_seconds


def _gpu_seconds(call: Callable[[], object]) -> float:
    testing = importlib.import_module("triton.testing")
    return testing.do_bench(call, warmup=GPU_WARMUP_MS, rep=GPU_REPEAT_MS, return_mode="median") / 1e3


def _cpu_seconds(call: Callable[[], object]) -> float:
    call()
    samples: list[float] = []
    while len(samples) < CPU_REPEATS or sum(samples) < CPU_SECONDS:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def measured(
    cases: Sequence[Case],
    setting: Setting,
    timer: Timer | None = None,
    progress: Progress | None = None,
    *,
    again: bool = False,
) -> dict[Case, Times]:
    """The times of the cases: those of the tuned table, and the others measured now and added to it one by one.

    A case that cannot be measured (out of memory, say) is left out, with a warning.

    Args:
        cases: what to measure, in this order; cases of one shape should lie together.
        setting: what they share. Without `train` only forwards are measured.
        timer: how a call is timed; None means `default_timer`.
        progress: told before each measurement.
        again: measure those of the table too.

    Raises:
        BackendError: no case at all could be measured; the message is the first failure's.
    """
    timer = timer or default_timer(setting.device)
    table = {} if again else tuned.load().times
    found = {case: times for case in cases if (times := _known(table, case, setting)) is not None}
    missing = [case for case in cases if case not in found]
    failures: list[str] = []
    keeper = _Keeper(setting)
    operands = None
    try:
        for i, case in enumerate(missing):
            if progress is not None:
                progress(i, len(missing), f"{case.in_features}→{case.out_features} b={case.b} {case.backend}")
            if operands is None or operands.shape != case[:2]:
                operands = Operands(case[:2], setting)
            # Whatever a kernel raises on a machine nobody has tried is a fact about this case, and no reason to lose
            # the others.
            try:
                times = Times(*map(timer, operands.calls(case)))
            except Exception as error:
                failures.append(f"{case}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
                warnings.warn(f"not measured: {failures[-1]}", stacklevel=2)
                continue
            found[case] = times
            keeper.keep(case, times)
        if progress is not None and missing:
            progress(len(missing), len(missing), "")
    finally:
        dispatch.refresh()
    if not found and failures:
        raise BackendError(f"nothing could be measured on {setting.device}; the first failure is {failures[0]}")
    return found


def _known(table: dict[tuned.Key, Times], case: Case, setting: Setting) -> Times | None:
    times = table.get(case.key(setting))
    return None if times is None or (setting.train and times.backward is None) else times


class _Keeper:
    """Adds measurements to the tuned table; says once where that is not possible."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._refused = False

    def keep(self, case: Case, times: Times) -> None:
        if self._refused:
            return
        try:
            tuned.add({case.key(self._setting): times})
        except OSError as error:
            self._refused = True
            warnings.warn(f"measurements are not kept: {error}", stacklevel=2)


# What is timed


class Operands:
    """The tensors that all cases of one shape share, allocated by the first."""

    def __init__(self, shape: tuple[int, int], setting: Setting) -> None:
        self.shape = shape
        self._setting = setting

    @functools.cached_property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, x and dy."""
        n_in, n_out = self.shape
        device, n_tokens = self._setting.device, self._setting.n_tokens
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=self._setting.dtype, generator=generator)

        x = normal(n_tokens, n_in).requires_grad_(self._setting.train)
        return normal(n_out, n_in) / n_in**0.5, x, normal(n_tokens, n_out)

    def calls(self, case: Case) -> list[Callable[[], Any]]:
        """The forward, and for training what computes the gradients."""
        weight, x, dy = self._tensors
        layer, parameters = _layer(case, weight)

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(x)

        if not self._setting.train:
            return [forward]
        y = layer(x)
        return [forward, lambda: torch.autograd.grad(y, (x, *parameters), dy, retain_graph=True)]


def _layer(case: Case, weight: Tensor) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]:
    """A function of x, and the adapter's parameters."""
    n_in, n_out, b, name = case[:4]
    if name == dispatch.BASE:
        return lambda x: nn.functional.linear(x, weight), ()
    if name in (PEFT_LORA, PEFT_C3A):
        base = nn.Linear(n_in, n_out, bias=False, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
        layer = peers.peft_lora(base, b) if name == PEFT_LORA else peers.peft_c3a(base, b)
        return layer, peers.trained(layer)
    w = torch.randn(n_out // b, n_in // b, b, device=weight.device).requires_grad_()
    return lambda x: c3a_linear(x, weight, None, (w,), backend=name), (w,)
