"""The backends, each with the functions that compute by it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import fourier, fourier_routed, reference
from .launch import direct, expand, fft, routed, weight_grad

__all__ = ["BY_NAME", "ROUTED", "Backend"]


class Backend(NamedTuple):
    """One way of computing the product and its gradients; the arguments are those of `fourier`'s functions.

    Those of a backend that shares spectra have one more, `source`, which says whose rows they get.
    """

    product: Callable[..., Tensor]
    weight_grad: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor]] | None = None
    """Both gradients in one call, where they share work."""
    shares_spectra: bool = False
    by_triton: bool = True
    planned_product: Callable[..., Callable[..., Tensor]] | None = None
    """(x, w, out, bias, transpose, precision, shares) as specs → run(x, w, bias, out, scale, source), which `product`
    runs too: for those who keep it."""
    planned_backward: Callable[..., Callable[..., tuple[Tensor, Tensor]]] | None = None
    """(dy, x, w, out, precision, shares) as specs → run(dy, x, w, out, scale, source)."""


BY_NAME = {
    "reference": Backend(reference.product, reference.weight_grad, by_triton=False),
    "torch": Backend(fourier.product, fourier.weight_grad, fourier.backward, by_triton=False),
    "direct": Backend(
        direct.direct_product,
        weight_grad.weight_grad,
        direct.direct_backward,
        planned_product=direct.planned_product,
        planned_backward=direct.planned_backward,
    ),
    "fft": Backend(
        fft.fft_product,
        fft.fft_weight_grad,
        fft.fft_backward,
        shares_spectra=True,
        planned_product=fft.planned_product,
        planned_backward=fft.planned_backward,
    ),
    "expand": Backend(expand.expand_product, weight_grad.weight_grad),
}

# The same over a stack of w's, of which each row has one: the arguments are those of `fourier_routed`'s functions, and
# Triton's have one more, `tiles`: `Routes.tiles`.
ROUTED = {
    "reference": Backend(reference.routed_product, reference.routed_weight_grad, by_triton=False),
    "torch": Backend(fourier_routed.product, fourier_routed.weight_grad, fourier_routed.backward, by_triton=False),
    # Its dw is that of fft: nobody needs it for so few rows.
    "direct": Backend(routed.routed_direct, routed.routed_weight_grad),
    "fft": Backend(routed.routed_product, routed.routed_weight_grad, routed.routed_backward),
}
