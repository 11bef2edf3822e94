"""What a layer costs with a backend: cases as data, and the cost model's answer for each; peers too."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from c3a_triton.operator import cost_model, dispatch
from c3a_triton.operator.cost_model import Sizes
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


class Case(NamedTuple):
    """One layer: a backend's or peer's name and block size; of the base alone b is 0, of LoRA it is the rank."""

    in_features: int
    out_features: int
    b: int
    backend: str

    def key(self, setting: Setting) -> Key:
        """Where the tuned table holds it."""
        return dispatch.tuned_key(self.backend, self.sizes(setting))

    def sizes(self, setting: Setting) -> Sizes:
        """What a call of it is as far as times depend on it."""
        shape = (self.in_features, self.out_features, self.b)
        return Sizes(setting.n_tokens, *shape, setting.dtype, setting.device)


def layer_cases(groups: Sequence[Group], sizes: Sequence[Iterable[int]], setting: Setting) -> list[Case]:
    """The cases that a choice of block sizes depends on, shape by shape, what the cost model favours first.

    A run that is interrupted has then measured what matters most of each shape that it came to.
    """
    of_shape: dict[tuple[int, int], set[int]] = {}
    for group, valid in zip(groups, sizes, strict=True):
        of_shape.setdefault(group.shape, set()).update(valid)
    cases = []
    for shape, valid_sizes in of_shape.items():
        cases.append(Case(*shape, 0, dispatch.BASE))
        adapted = [Case(*shape, b, backend) for b in valid_sizes for backend in setting.backends]
        cases += sorted(adapted, key=lambda case: (_total(predicted_times(case, setting)), case))
    return cases


def predicted_times(case: Case, setting: Setting, ceilings: cost_model.Ceilings = cost_model.CEILINGS) -> Times:
    """The cost model's prediction of a whole layer, base included, on a GPU. Nothing is measured.

    The gradients are those of x (of the base and of the adapter) and of the adapter's parameters. Peers are counted
    from PEFT's code over a bfloat16 base, forward and backward:

    - LoRA in its default form: 6 and 9 launches, 10·in + 28·out and 20·in + 28·out bytes a token in float32 copies and
      products, 2 and 4 times r·(in + out) FLOPs a token.
    - C3A: 13 and 21 launches, 142·in + 126·out bytes a token for both, divided as the launches are, and 8 and 16 times
      in·out / b FLOPs a token.
    """
    n_tokens = setting.n_tokens
    n_in, n_out, b, name = case
    sizes = case.sizes(setting)
    base = cost_model.base_seconds(sizes, ceilings=ceilings)
    if name == dispatch.BASE:
        added = Times(0.0, 0.0)
    elif name == PEFT_LORA:
        flops: float = 2 * n_tokens * b * (n_in + n_out)
        added = Times(
            _float32_seconds(ceilings, 6, n_tokens * (10 * n_in + 28 * n_out), flops),
            _float32_seconds(ceilings, 9, n_tokens * (20 * n_in + 28 * n_out), 2 * flops),
        )
    elif name == PEFT_C3A:
        n_bytes = n_tokens * (142 * n_in + 126 * n_out) / 34
        flops = 8 * n_tokens * n_in * n_out / b
        added = Times(
            _float32_seconds(ceilings, 13, 13 * n_bytes, flops), _float32_seconds(ceilings, 21, 21 * n_bytes, 2 * flops)
        )
    else:
        added = Times(
            *(
                cost_model.predicted_seconds(name, sizes, backward=backward, ceilings=ceilings)
                for backward in (False, True)
            )
        )
    assert added.backward is not None
    return Times(base + added.forward, base + added.backward)


def _float32_seconds(ceilings: cost_model.Ceilings, launches: int, n_bytes: float, flops: float) -> float:
    return launches * ceilings.launch_seconds + max(n_bytes / ceilings.bandwidth, flops / ceilings.cublas_flops[4])


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

    def fastest(self, shape: tuple[int, int], b: int) -> tuple[str, float] | None:
        """(backend or "forward/backward", seconds) of a layer as `"auto"` computes it; None where nothing is known."""
        found = {name: self.times.get(Case(*shape, b, name)) for name in self.setting.backends}
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
