"""`C3AParameters`: a module whose parameters are adapted by themselves, and which computes with W + ΔW written out."""

from typing import Any

from torch import Tensor

from c3a_triton._public import public
from c3a_triton.bases.experts import base_forward

from .names import uncompiled
from .parts import Holder, Part

__all__ = ["C3AParameter", "C3AParameters"]


class C3AParameter(Part):
    """One parameter, W [out, in] or a stack of such matrices [stack, out, in], with adapters: W + Σ ΔW_a.

    An adapter's `c3a_kernel` is [out / b, in / b, b], or [stack, out / b, in / b, b]; ΔW is the linear layer's.
    """

    kind = "parameter"
    has_backends = False
    rows_problem = "has no adapters of its own in a module that computes with one weight for all"

    def forward(self) -> Tensor:  # type: ignore[override]
        """The parameter's value for this call, in its dtype, as many bytes as the parameter.

        Raises:
            ShapeError: rows of the batch have different adapters.
            AdapterStateError: names of rows, or the base alone, while adapters are merged.
        """
        kind = self._scope.kind() if self._scope.watched else "active"
        weight = self.weight
        kernels = self._kernels_of_call(kind, weight.device, weight.shape)
        deltas = (self._stacked(kernel, weight.dtype) for kernel in kernels)
        return sum(deltas, start=weight)


@public
class C3AParameters(Holder):
    """A module of which parameters have adapters, in that module's place: it computes with W + ΔW in place of W.

    W + ΔW is written densely for each call, of experts that `C3AExperts` does not know for all of them. The module's
    own forward runs on a shallow copy of it that has these values, so that threads which call it do not meet.

    Args:
        base_layer: the module.

    Attributes:
        base_layer: the module.
    """

    @uncompiled
    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward."""
        base = self.base_layer
        values = {name: part() for name, part in self.parts_in_force().items()}
        changed = {"_parameters": {**base._parameters, **values}, **values}
        twin = base.__new__(type(base))
        twin.__dict__.update(base.__dict__ | changed)
        y = base_forward(base)(twin, *args, **kwargs)
        for key, value in twin.__dict__.items():
            if key not in changed and base.__dict__.get(key, twin) is not value:  # what the forward notes on its module
                base.__dict__[key] = value
        return y
