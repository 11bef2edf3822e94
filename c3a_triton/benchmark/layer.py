"""Adapted linear layers ready to be called: one, or several that share inputs, by any method of `peers`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cases, gate, peers

__all__ = ["MODES", "Case", "Workload", "checked_rows", "key"]

Case = cases.LayerCase | cases.DecoderCase

MODES = ("forward", "backward", "both")
CHECKED_ROWS = 256  # at either end: a dense product in float64 of every row would take longer than all timings


def key(case: Case, method: str) -> str:
    """A measurement's name; peers that know no block size are measured once for all of them."""
    size = f" b={case.b}" if peers.is_c3a(method) else ""
    return f"{method} T={case.n_tokens} {case.label}{size} {case.dtype}"


def checked_rows(x: Tensor) -> Tensor:
    """The rows of x, or `CHECKED_ROWS` at either end, whose results are held against the truth."""
    rows = torch.arange(x.shape[0], device=x.device)
    return rows if len(rows) <= 2 * CHECKED_ROWS else torch.cat([rows[:CHECKED_ROWS], rows[-CHECKED_ROWS:]])


@dataclass
class Workload:
    """The layers of a case over frozen bases, their inputs (which require gradients) and output gradients."""

    case: Case
    method: str
    layers: list[Any]
    kernels: list[Tensor]  # values of the circulants
    inputs: list[Tensor]
    sources: list[int]  # which input is whose
    dys: list[Tensor]

    @classmethod
    def of(cls, case: Case, method: str, device: torch.device) -> "Workload":
        """The same random numbers for every method."""
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        inputs: dict[int, Tensor] = {}
        work = cls(case, method, [], [], [], [], [])
        bases = []
        for source, part in case.parts:
            bases.append(peers.frozen_base(part, device))
            work.kernels.append(peers.kernel_values(part, device))
            if source not in inputs:
                inputs[source] = torch.randn(part.n_tokens, part.in_features, device=device, dtype=dtype)
            work.dys.append(torch.randn(part.n_tokens, part.out_features, device=device, dtype=dtype))
            work.sources.append(source)
        # After all of them are drawn: some methods draw numbers of their own.
        for base, (_, part), w in zip(bases, case.parts, work.kernels, strict=True):
            work.layers.append(peers.build(method, base, part, w))
        work.inputs = [x.requires_grad_() for x in inputs.values()]
        return work

    def __post_init__(self) -> None:
        self._kept: tuple[Tensor, ...] | None = None

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """What gradients are asked for: the inputs and the adapters' parameters."""
        return (*self.inputs, *(parameter for layer in self.layers for parameter in peers.trained(layer)))

    def forward(self) -> tuple[Tensor, ...]:
        """Every layer's output."""
        return tuple(layer(self.inputs[i]) for layer, i in zip(self.layers, self.sources, strict=True))

    def backward(self) -> tuple[Tensor, ...]:
        """The gradients, of a forward that is computed once and kept."""
        if self._kept is None:
            self._kept = self.forward()
        return torch.autograd.grad(self._kept, self.wanted, self.dys, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and gradients."""
        return torch.autograd.grad(self.forward(), self.wanted, self.dys)

    def calls(self) -> dict[str, Callable[[], object]]:
        """The calls to time, by mode."""
        return {"forward": self.forward, "backward": self.backward, "both": self.both}

    def check(self, truths: gate.Truths | None = None) -> None:
        """Hold outputs and gradients against the dense definition; nothing to hold for layers without a circulant.

        Args:
            truths: where the truth may be known from another method.

        Raises:
            GateError: naming the quantity and its relative error.
        """
        for name, value, truth in self.results(gate.Truths() if truths is None else truths):
            gate.check(name, value, truth, self.inputs[0].dtype)

    def results(self, truths: gate.Truths) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(what it is, its value, the truth) of everything that `check` holds."""
        if not (peers.is_c3a(self.method) or self.method == "dense"):
            return
        outputs = self.forward()
        grads = torch.autograd.grad(outputs, self.wanted, self.dys)
        dxs, dws = grads[: len(self.inputs)], grads[len(self.inputs) :]
        rows = checked_rows(self.inputs[0])
        true_dxs: list[Tensor | None] = [None] * len(self.inputs)
        for i, source in enumerate(self.sources):
            weight = self.layers[i].base_layer.weight
            truth = truths.of(i, weight, self.kernels[i], self.inputs[source], self.dys[i], rows=rows)
            yield f"y of layer {i}", outputs[i][rows], truth.y
            if self.method != "dense":  # which has a gradient of another shape
                yield f"dw of layer {i}", dws[i], truth.dw
            known = true_dxs[source]
            true_dxs[source] = truth.dx if known is None else known + truth.dx
        for source, true_dx in enumerate(true_dxs):
            if self.method != "peft_c3a":  # whose input gradient is known to be wrong (docs/peft.md)
                assert true_dx is not None, "an input that no layer reads"
                yield f"dx of input {source}", dxs[source][rows], true_dx
