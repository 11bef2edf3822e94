"""The correctness gate: nothing is timed that does not compute what it should."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from c3a_triton.operator import reference

__all__ = ["TOLERANCES", "GateError", "Truth", "Truths", "check", "check_layer", "relative_error"]

# Of a whole layer: the base product, the adapter's and their sum each round once. The operator's own, tighter bounds
# are held by tests/test_ops.py.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1e-2}


TOKENS_AT_ONCE = 4096  # in float64: bounds what the truth takes of a card's memory


class GateError(AssertionError):
    """A result further from the dense float64 definition than its dtype explains."""


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in float64; NaN stays NaN."""
    return float((value.detach().double() - truth.detach()).norm() / truth.detach().norm())


@dataclass(frozen=True)
class Truth:
    """Output and gradients of one C3A layer by the dense definition, in float64."""

    y: Tensor
    dx: Tensor
    dw: Tensor

    @classmethod
    def of(
        cls,
        weight: Tensor,
        w: Tensor,
        x: Tensor,
        dy: Tensor,
        *,
        scale: float | None = None,
        rows: slice | Tensor = slice(None),
    ) -> "Truth":
        """From the base weight `(out, in)`, the circulant `w`, the input `(T, in)` and the gradient `(T, out)`.

        `scale=None` means 1 / in_features. y and dx are of these `rows` only; dw is of all.
        """
        w = w.detach().double().requires_grad_()
        x = x.detach()
        delta = reference.circulant_matrix(w, 1.0 / x.shape[1] if scale is None else scale)
        dense = weight.double() + delta.detach()
        ddelta = torch.zeros_like(dense)
        for some_x, some_dy in zip(x.split(TOKENS_AT_ONCE), dy.split(TOKENS_AT_ONCE), strict=True):
            ddelta.addmm_(some_dy.double().T, some_x.double())
        (dw,) = torch.autograd.grad(delta, w, ddelta)
        return cls(y=x[rows].double() @ dense.T, dx=dy[rows].double() @ dense, dw=dw)


class Truths:
    """`Truth.of`, computed again only for other operands than the last: those of one case serve all of its methods."""

    def __init__(self) -> None:
        self._last: dict[object, tuple[tuple[Tensor, ...], Truth]] = {}

    def of(self, name: object, weight: Tensor, w: Tensor, x: Tensor, dy: Tensor, *, rows: Tensor) -> Truth:
        """As `Truth.of`; `name` says which operands of a case these are."""
        operands = (weight, w, x, dy, rows)
        known, truth = self._last.get(name, ((), None))
        if truth is None or not all(map(_same, operands, known)):
            self._last.pop(name, None)  # before the next one takes its memory
            truth = Truth.of(weight, w, x, dy, rows=rows)
            self._last[name] = tuple(operand.detach() for operand in operands), truth
        return truth


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def check(name: str, value: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Hold one result of a layer that computes in `dtype` against the truth.

    Raises:
        GateError: naming the quantity and its relative error.
    """
    error, tolerance = relative_error(value, truth), TOLERANCES[dtype]
    if not error <= tolerance:
        raise GateError(f"{name} is wrong: relative error {error:.2g}, allowed in {dtype}: {tolerance:.2g}")


def check_layer(
    layer: nn.Module, kernel: Tensor, x: Tensor, dy: Tensor, truth: Truth, *, only: Collection[str] = ("y", "dx", "dw")
) -> None:
    """Hold one forward and backward of `layer` against `truth`.

    Args:
        layer: the layer; `kernel` is its trainable circulant.
        x: `(T, in)`, requiring its gradient.
        dy: `(T, out)`.
        only: what to check: not dx of PEFT, whose input gradient is known to be wrong (docs/peft.md).

    Raises:
        GateError: naming the quantity and its relative error.
    """
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, kernel), dy)
    for name, value in (("y", y), ("dx", dx), ("dw", dw)):
        if name in only:
            check(name, value, getattr(truth, name), x.dtype)
