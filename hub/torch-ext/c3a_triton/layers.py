"""Layers whose `forward` the `kernels` package gives to other layers: no state, no methods of their own."""

from typing import Any

from torch import Tensor, nn

from .operator.calls import circulant_linear

__all__ = ["C3ALinear"]


class C3ALinear(nn.Module):
    """The forward of PEFT's `C3ALinear`: base layer plus the active adapters, each of the layer's own input.

    Unlike PEFT's, the gradient of x is right, and a second adapter does not read the first one's output.
    """

    can_torch_compile: bool = True
    has_backward: bool = True

    base_layer: nn.Module
    c3a_kernel: nn.ParameterDict
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in_features] to [..., out_features] in x's dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()  # type: ignore[operator]
        y = self.base_layer(x, *args, **kwargs)
        if not (self.disable_adapters or self.merged):
            for name in self.active_adapters:
                if name in self.c3a_kernel:
                    y = y + circulant_linear(x, self.c3a_kernel[name].float()).to(y.dtype)
        return y.to(x.dtype)
