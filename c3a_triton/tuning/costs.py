"""What a layer costs with a backend: cases as data, and the cost model's answer for each; peers too."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from c3a_triton.operator import bounds, cost_model, dispatch
from c3a_triton.operator.cost_model import Sizes
from c3a_triton.operator.routes import share
from c3a_triton.operator.tuned import Key, Times

from .groups import Group

__all__ = ["LORA_RANKS", "PEFT_C3A", "PEFT_LORA", "Case", "Costs", "Setting", "layer_cases", "predicted_times"]

# Names of peers in the tuned table; of LoRA b is the rank.
PEFT_LORA = "peft_lora"
PEFT_C3A = "peft_c3a"
LORA_RANKS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share. `n_tokens` is a power of two, the bucket for which `"auto"` decides."""

    device: torch.device
    dtype: torch.dtype
    n_tokens: int
    train: bool

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that `"auto"` can choose here; on a GPU that is not there, all of them."""
        if self.device.type != "cuda":
            return ("torch",)
        if not torch.cuda.is_available():
            return dispatch.AUTO_BACKENDS
        names = dispatch.AUTO_BACKENDS
        return tuple(name for name in names if dispatch.why_not(name, self.device, self.dtype) is None)

    def backends_of(self, stack: int) -> tuple[str, ...]:
        """Those of them that compute so many stacked experts; 0: a layer."""
        return tuple(name for name in self.backends if name in cost_model.ROUTED) if stack else self.backends


class Case(NamedTuple):
    """One layer: a backend's or peer's name and block size; of the base alone b is 0, of LoRA it is the rank.

    Of stacked experts, which are predicted and never measured, there are `stack` of these sizes.
    """

    in_features: int
    out_features: int
    b: int
    backend: str
    stack: int = 0
    rows_per_token: int = 1

    @classmethod
    def of(cls, group: Group, b: int, backend: str) -> "Case":
        """A layer of a group."""
        return cls(*group.shape, b, backend, group.stack, group.rows_per_token)

    def key(self, setting: Setting) -> Key:
        """Where the tuned table holds it."""
        return dispatch.tuned_key(self.backend, self.sizes(setting))

    def sizes(self, setting: Setting) -> Sizes:
        """What a call of it is as far as times depend on it."""
        shape = (self.in_features, self.out_features, self.b)
        return Sizes(setting.n_tokens * self.rows_per_token, *shape, setting.dtype, setting.device)


def layer_cases(groups: Sequence[Group], sizes: Sequence[Iterable[int]], setting: Setting) -> list[Case]:
    """The cases that a choice of block sizes depends on, shape by shape, what the cost model favours first.

    A run that is interrupted has then measured what matters most of each shape that it came to.
    """
    of_shape: dict[Case, set[int]] = {}
    for group, valid in zip(groups, sizes, strict=True):
        of_shape.setdefault(Case.of(group, 0, dispatch.BASE), set()).update(valid)
    cases = []
    for base, valid_sizes in of_shape.items():
        cases.append(base)
        names = setting.backends_of(base.stack)
        adapted = [base._replace(b=b, backend=backend) for b in valid_sizes for backend in names]
        cases += sorted(adapted, key=lambda case: (_total(predicted_times(case, setting)), case))
    return cases


def predicted_times(case: Case, setting: Setting, ceilings: bounds.Ceilings | None = None) -> Times:
    """The cost model's prediction of a whole layer, base included, on a GPU. Nothing is measured.

    The gradients are those of x (of the base and of the adapter) and of the adapter's parameters. Peers are bounded
    launch by launch like our own backends, counted from PEFT's code over a bfloat16 base and from what torch launches
    for it.

    Args:
        case: the layer; of LoRA its b is the rank.
        setting: the run's.
        ceilings: of the card; by default those of the setting's device.
    """
    at = dispatch.ceilings_of(setting.device) if ceilings is None else ceilings
    sizes, name = case.sizes(setting), case.backend
    if case.stack:
        return _stacked_times(name, sizes, case.stack, at)
    base = cost_model.base_seconds(sizes, ceilings=at)
    if name == dispatch.BASE:
        return Times(base, base)
    if name in _PEERS:
        forward, backward = (bounds.seconds(launches, at) for launches in _PEERS[name](sizes, at))
    else:
        forward, backward = (
            cost_model.added_seconds(name, sizes, backward=backward, ceilings=at) for backward in (False, True)
        )
    return Times(base + forward, base + backward)


def _stacked_times(name: str, sizes: Sizes, stack: int, at: bounds.Ceilings) -> Times:
    """Of experts with so many rows in all, spread evenly; the base is a grouped product of those that have rows."""
    t, n, m, _, dtype, _ = sizes
    i = dtype.itemsize
    weights = min(stack, t) * n * m
    grouped = bounds.streamed(i * (weights + t * n), i * t * m, 2 * t * n * m, at.cublas_flops[i])
    base = bounds.seconds([grouped], at)
    if name == dispatch.BASE:
        return Times(base, base)

    of_one = sizes._replace(n_tokens=share(stack, t))
    forward, backward = (
        bounds.seconds(cost_model.routed_launches(name, of_one, stack, t, backward=backward, ceilings=at), at)
        for backward in (False, True)
    )
    return Times(base + forward, base + backward)


_Launches = list[bounds.Launch]


def _peft_lora(sizes: Sizes, at: bounds.Ceilings) -> tuple[_Launches, _Launches]:
    """LoRA in its default form: x cast to float32, both factors multiplied in float32, the result scaled and added."""
    t, n, m, rank, *_ = sizes
    x, y = t * n, t * m

    def moved(n_bytes: float, flops: float = 0.0) -> bounds.Launch:
        return _float32(n_bytes, flops, at)

    into, out = (4 * x, 2 * rank * x), (4 * y, 2 * rank * y)  # from x to the rank and from there to y, or back
    forward = [moved(6 * x), moved(*into), moved(*out), moved(8 * y), moved(10 * y), moved(6 * y)]
    backward = [moved(6 * y), moved(6 * y), moved(8 * y), moved(*out), moved(*out)]
    return forward, [*backward, moved(*into), moved(*into), moved(6 * x), moved(6 * x)]


def _peft_c3a(sizes: Sizes, at: bounds.Ceilings) -> tuple[_Launches, _Launches]:
    """C3A: whole complex spectra in float32, filled by conjugation, and copies of them that `bmm` makes."""
    t, n, m, b, *_ = sizes
    x, y, w = t * n, t * m, n * m / b
    flops = 8 * t * n * m / b

    def moved(n_bytes: float, flops: float = 0.0) -> bounds.Launch:
        return _float32(n_bytes, flops, at)

    spectrum_of_x = [moved(8 * x)] * 3  # transformed, scaled, the other half filled
    of_w = [moved(8 * w)] * 2
    copies = [moved(16 * x), moved(16 * w)]
    product = moved(8 * (x + y + w), flops)
    forward = [moved(6 * x), *spectrum_of_x, *of_w, *copies, product]
    forward += [moved(16 * y), moved(12 * y), moved(6 * y), moved(6 * y)]
    dx = [moved(6 * y), *[moved(8 * y)] * 3, *of_w, moved(8 * w), moved(16 * y), moved(16 * w), product]
    dw = [moved(16 * x), *spectrum_of_x, moved(16 * y), moved(16 * x), product, moved(16 * w), moved(12 * w)]
    return forward, [*dx, *dw, moved(10 * x), moved(6 * x)]


_PEERS = {PEFT_LORA: _peft_lora, PEFT_C3A: _peft_c3a}


def _float32(n_bytes: float, flops: float, at: bounds.Ceilings) -> bounds.Launch:
    """A launch on CUDA cores; that its bytes cross the L2 too bounds nothing."""
    return bounds.Launch(n_bytes, n_bytes, flops, rate=at.cublas_flops[4])


def _total(times: Times) -> float:
    return times.forward + (times.backward or 0.0)


class Costs:
    """Times of cases, all measured or all predicted, and what is read off them."""

    def __init__(self, setting: Setting, times: dict[Case, Times], *, measured: bool) -> None:
        self.setting = setting
        self.times = times
        self.measured = measured

    @property
    def label(self) -> str:
        """Where the times come from, in a word."""
        return "measured" if self.measured else "predicted"

    def fastest(self, group: Group, b: int) -> tuple[str, float] | None:
        """(backend or "forward/backward", seconds) of a layer as `"auto"` computes it; None where nothing is known."""
        names = self.setting.backends_of(group.stack)
        found = {name: self.times.get(Case.of(group, b, name)) for name in names}
        known = {name: times for name, times in found.items() if times is not None}
        if not known:
            return None
        forward = min(known, key=lambda name: known[name].forward)
        if not self.setting.train:
            return forward, known[forward].forward
        gradients = {name: times.backward for name, times in known.items() if times.backward is not None}
        backward = min(gradients, key=gradients.__getitem__)
        seconds = known[forward].forward + gradients[backward]
        return forward if forward == backward else f"{forward}/{backward}", seconds

    def seconds(self, case: Case) -> float | None:
        """Seconds of one case in the run's mode; None where it is not known."""
        times = self.times.get(case)
        if times is None:
            return None
        return _total(times) if self.setting.train else times.forward

    def total(self, groups: Sequence[Group], cases: Iterable[Case]) -> float | None:
        """Seconds of all layers of the groups, each group's of its own case; None where one is not known."""
        total = 0.0
        for group, case in zip(groups, cases, strict=True):
            seconds = self.seconds(case)
            if seconds is None:
                return None
            total += len(group.names) * seconds
        return total
