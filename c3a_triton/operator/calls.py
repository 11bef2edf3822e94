"""The block-circulant operator's public calls."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._public import public
from ..errors import BackendError
from . import arguments, autograd, traced

__all__ = ["c3a_linear", "circulant_linear"]


@public
def circulant_linear(
    x: Tensor, w: Tensor, *, scale: float | None = None, backend: str = "auto", save_spectrum: bool = False
) -> Tensor:
    """x ΔWᵀ with the block-circulant ΔW[M·b + j, N·b + p] = scale · w[M, N, (p − j) mod b] (C3A, arXiv 2407.19342).

    Differentiable, twice and more, in x and w. Under autocast it computes in the autocast dtype, as `F.linear` does.

    Args:
        x: `(*, in_blocks * b)`, floating; float64 on the backends `"reference"` and `"torch"`.
        w: `(out_blocks, in_blocks, b)`, float32 as a rule; its gradient has its dtype.
        scale: factor of ΔW; None means 1 / in_features, PEFT's convention.
        backend: a name of `c3a_triton.operator.dispatch.BACKENDS`, but not `"fold"`.
        save_spectrum: as in `c3a_linear`.

    Returns:
        `(*, out_blocks * b)` in x's dtype (the autocast dtype under autocast).

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
        BackendError: an unknown backend, or one that cannot run here.
    """
    if backend == "fold":
        raise BackendError(
            "backend 'fold' adds ΔW to a layer's weight, and circulant_linear has none: use c3a_linear, or 'auto'"
        )
    if arguments.autocasts(x):
        (x,) = arguments.autocast(x)
        with torch.autocast(x.device.type, enabled=False):
            return circulant_linear(x, w, scale=scale, backend=backend, save_spectrum=save_spectrum)
    if torch._C._get_tracing_state() is not None:
        return traced.linear(x, None, None, (w,), scale)
    kernels = (w,)
    arguments.check(x, None, None, kernels)
    scale = 1.0 / x.shape[-1] if scale is None else scale
    return autograd.apply(x, None, None, kernels, scale, backend, save_spectrum)


@public
def c3a_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernels: Sequence[Tensor],
    *,
    backend: str = "auto",
    save_spectrum: bool = False,
) -> Tensor:
    """x Wᵀ + bias + Σ_a x ΔW_aᵀ: a linear layer and its C3A adapters in one autograd node.

    No sum over activations is launched beside the products, forward or backward. Adapters of equal block size are
    summed as kernels. For the backward pass only x (or its spectrum) is kept, if a kernel or the weight wants a
    gradient. Differentiable in x, every kernel, bias and, where it requires a gradient, weight. Under autocast it
    computes in the autocast dtype.

    Args:
        x: `(*, in_features)`.
        weight: `(out_features, in_features)`, any strides, x's dtype.
        bias: `(out_features,)` in x's dtype, or None.
        kernels: one w of shape `(out_features / b, in_features / b, b)` per adapter; block sizes may differ. ΔW has the
            scale 1 / in_features.
        backend: how the adapters' part is computed, a name of `c3a_triton.operator.dispatch.BACKENDS`. `"fold"`:
            forward and gradient of x with W + Σ ΔW_a rounded to weight's dtype, as a merged model computes; the
            kernels' gradients are exact, as if nothing had been rounded.
        save_spectrum: keep x's spectrum for the backward pass in place of x: of x's bytes but for padding, and x is not
            transformed again. Where `"fft"` computes bfloat16 x in eager code, its spectrum (16-bit from b = 32 on)
            takes no more than half of the scratch, all adapters have one block size and the weight wants no gradient;
            elsewhere x is kept as always. A second derivative needs x, and is refused.

    Returns:
        `(*, out_features)` in x's dtype (the autocast dtype under autocast).

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
        BackendError: an unknown backend, or one that cannot run here.
    """
    if arguments.autocasts(x):
        x, weight, bias = arguments.autocast(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return c3a_linear(x, weight, bias, kernels, backend=backend, save_spectrum=save_spectrum)
    if torch._C._get_tracing_state() is not None:
        return traced.linear(x, weight, bias, kernels, None)
    arguments.check(x, weight, bias, kernels)
    return autograd.apply(x, weight, bias, kernels, 1.0 / x.shape[-1], backend, save_spectrum)
