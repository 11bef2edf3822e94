"""`C3AParameters`: a module whose parameters are adapted by themselves, and which computes with W + ΔW written out."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

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

    def forward(self, value: Tensor | None = None) -> Tensor:
        """The parameter's value for this call, as its module reads it: `value`, or else what `value()` gives."""
        return self.value() if value is None else value

    def value(self) -> Tensor:
        """The parameter's value for this call, in its dtype, as many bytes as the parameter.

        Raises:
            ShapeError: rows of the batch have different adapters.
            AdapterStateError: names of rows, or the base alone, while adapters are merged.
        """
        kind = self._scope.kind() if self._scope.watched else "active"
        if kind == "ask" or (kind == "rows" and torch.compiler.is_compiling()):
            return self._uncompiled_value()
        weight = self.weight
        kernels = self._kernels_of_call(kind, weight.device, weight.shape)
        deltas = (self._delta_weight(kernel, weight.dtype) for kernel in kernels)
        return sum(deltas, start=weight)

    @uncompiled
    def _uncompiled_value(self) -> Tensor:
        return self.value()


class _Parameters(dict[str, Any]):
    """A module's parameters for one call. A part is called when its value is first read, which tells that it is.

    Args:
        parameters: name → value. Those of parts were made before, as the forward may read them in a checkpoint.
        parts: name → part.
    """

    def __init__(self, parameters: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self._unread = dict(parts)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if name in self._unread:
            value = self[name] = self._unread.pop(name)(value)
            if not isinstance(value, nn.Parameter):
                value._is_param = True  # to `isinstance`, which get_parameter asks
        return value

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]


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

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward."""
        return self._call(base_forward(self.base_layer), *args, **kwargs)

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a method of the module's class computes."""
        base, parts = self.base_layer, self.parts_in_force()
        if not parts:
            return method(base, *args, **kwargs)
        values = {name: part.value() for name, part in parts.items()}
        parameters: dict[str, Any] = {**base._parameters, **values}
        if not torch.compiler.is_compiling():
            parameters = _Parameters(parameters, parts)
        twin = object.__new__(type(base))
        # A replica of `DataParallel` has its parameters as attributes, which come first.
        own = {key: value for key, value in base.__dict__.items() if key not in values}
        twin.__dict__.update(own | {"_parameters": parameters})
        y = method(twin, *args, **kwargs)
        for key, value in twin.__dict__.items():
            if key != "_parameters" and own.get(key, twin) is not value:  # what the forward notes on its module
                base.__dict__[key] = value
        return y

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        # Who calls another method of the module gets what it computes with the adapters.
        if isinstance(value, MethodType) and value.__self__ is self.base_layer and not name.startswith("_"):
            return partial(self._call, value.__func__)
        return value
