"""The correctness gate: nothing is timed that does not compute what it should."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from c3a_triton import reference

__all__ = ["TOLERANCES", "GateError", "Truth", "check_layer", "relative_error"]

# Of a whole layer: the base product, the adapter's and their sum each round once. The operator's own, tighter bounds
# are held by tests/test_ops.py.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1e-2}


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
    def of(cls, weight: Tensor, w: Tensor, x: Tensor, dy: Tensor, *, scale: float | None = None) -> "Truth":
        """From the base weight `(out, in)`, the circulant `w`, the input `(T, in)` and the gradient `(T, out)`.

        `scale=None` means 1 / in_features.
        """
        w = w.detach().double().requires_grad_()
        x, dy = x.detach().double(), dy.double()
        delta = reference.circulant_matrix(w, 1.0 / x.shape[1] if scale is None else scale)
        dense = weight.double() + delta.detach()
        (dw,) = torch.autograd.grad(delta, w, dy.T @ x)
        return cls(y=x @ dense.T, dx=dy @ dense, dw=dw)


def check_layer(
    layer: nn.Module, kernel: Tensor, x: Tensor, dy: Tensor, truth: Truth, *, check_dx: bool = True
) -> None:
    """Hold one forward and backward of `layer` against `truth`.

    Args:
        layer: the layer; `kernel` is its trainable circulant.
        x: `(T, in)`, requiring its gradient.
        dy: `(T, out)`.
        check_dx: False for PEFT, whose input gradient is known to be wrong (README).

    Raises:
        GateError: naming the quantity and its relative error.
    """
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, kernel), dy)
    results = {"y": (y.detach(), truth.y), "dw": (dw, truth.dw)} | ({"dx": (dx, truth.dx)} if check_dx else {})
    for name, (value, expected) in results.items():
        error = relative_error(value, expected)
        tolerance = TOLERANCES[x.dtype]
        if not error <= tolerance:
            raise GateError(f"{name} is wrong: relative error {error:.2g}, allowed in {x.dtype}: {tolerance:.2g}")
