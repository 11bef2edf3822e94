"""`C3AConv2d`: a convolution and its C3A adapters, circulant over channels, every tap with kernels of its own."""

import math
from typing import Any

import torch
from torch import Tensor

from c3a_triton._public import public
from c3a_triton.bases.weights import as_weight
from c3a_triton.operator.dense import circulant_matrix

from .layer import C3ALinear

__all__ = ["C3AConv2d"]


@public
class C3AConv2d(C3ALinear):
    """An `nn.Conv2d` with C3A adapters: y = conv(x, W) + Σ conv(x, ΔW_a), with the base's padding, stride and groups.

    With W reordered to the matrix [out_channels, kh · kw · in_channels / groups], input channels innermost, ΔW is the
    block-circulant matrix of the linear layer: `c3a_kernel` is [out_channels / b, kh · kw · in_channels / (groups · b),
    b], scale = groups / (kh · kw · in_channels), and b divides the input and the output channels of a group. A 1 × 1
    convolution is so adapted as the linear layer that it is.

    ΔW is written densely for each call (as many bytes as the base weight, in x's dtype) and goes through torch's own
    convolution: unfolding x instead would multiply the activations that are saved by kh · kw. There is no choice of
    backend, and PEFT has no such layer: it cannot load these adapters.

    Args, attributes and errors are those of `C3ALinear`; in_features is kh · kw · in_channels / groups.
    """

    kind = "conv2d"
    has_backends = False

    def _delta(self, x: Tensor, kernel: Tensor, backend: str) -> Tensor:
        base: Any = self.get_base_layer()
        scale = 1.0 / self.in_features
        device = x.device.type
        computed_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        # float16 has few digits left for a ΔW that is so small: the output takes half of the scale's orders.
        rest = math.sqrt(scale) if computed_in == torch.float16 else 1.0
        matrix = circulant_matrix(kernel, scale=scale / rest, dtype=x.dtype)
        delta = base._conv_forward(x, as_weight(base, matrix), None)
        return delta if rest == 1.0 else delta * rest

    def _delta_weight(self, kernel: Tensor, dtype: torch.dtype) -> Tensor:
        return as_weight(self.get_base_layer(), super()._delta_weight(kernel, dtype))
