"""Modules of which parameters are adapted by themselves: what stands in such a module's place, and what it consists of.

The place is a `Holder`'s; it has the module as `base_layer`, and beside it a part for each adapted parameter, under the
parameter's name. So a part's name in the model is that of its parameter, and to whoever goes through a model's adapted
layers a part is one of them.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from c3a_triton.bases.experts import dispatch, is_stored_transposed, undispatch
from c3a_triton.bases.linear_like import Geometry, is_of_peft
from c3a_triton.bases.parallel import parallel_mesh
from c3a_triton.bases.sharded import gather_with
from c3a_triton.errors import AdapterStateError, ConfigError
from c3a_triton.operator.dense import add_circulant_, circulant_matrix

from . import merging
from .forward import check_base, check_rows
from .layer import C3ALinear

__all__ = ["SPREAD_LATE", "Holder", "Part"]


SPREAD_LATE = (
    "a plan has spread the model over processes after it was adapted, where these parameters had other names, or "
    "kernels that were not spread with them. Spread the model first (from_pretrained with a DistributedConfig), and "
    "adapt it then"
)


class Part(C3ALinear):
    """The adapters of one parameter of a module. It is no layer that can stand in a model by itself.

    Attributes:
        base_layer: the module that has the parameter, which is the holder's: no child of this one.
        parameter: the parameter's name.
        transposed: whether the parameter is [n_experts, in, out].
        was_reached: whether the module has computed without this part because no adapter was in force.
    """

    is_part = True

    # What one name for each row of the batch meets, in messages.
    rows_problem: ClassVar[str]

    def _wrap(
        self, base_layer: nn.Module, active: list[str], backend: str, layer_name: str, sizes: Geometry | None = None
    ) -> None:
        super()._wrap(base_layer, active, backend, layer_name, sizes)
        self.parameter = layer_name.rpartition(".")[2]
        self.transposed = is_stored_transposed(base_layer, self.parameter)
        self.was_reached = False

    def _hold(self, base_layer: nn.Module) -> None:
        self.__dict__["base_layer"] = base_layer

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        return getattr(self.base_layer, self.parameter)

    @property
    def bias(self) -> Tensor | None:
        """What the module adds to the product with the parameter, where its name says so."""
        return getattr(self.base_layer, f"{self.parameter}_bias", None)

    # Which adapters

    def takes_part(self) -> bool:
        """Whether this call needs more than the module computes by itself."""
        kind = self._scope.kind() if self._scope.watched else "active"
        if kind == "base":
            return self.merged  # which is refused
        if kind == "tokens":
            check_rows(self)
            return self._scope.local.tokens.has(self)
        # By the tuple, not by names: compiled code is not compiled again for another adapter.
        return kind != "active" or self._kernels is None or len(self._kernels) > 0

    def _kernels_of_call(self, kind: str, device: torch.device, shape: Iterable[int]) -> tuple[Tensor, ...]:
        """The kernels that a call computes with, on a device, in a dtype to compute in.

        Args:
            kind: what the call computes, of `Scope.kind`.
            device: where.
            shape: of the input, for messages.

        Raises:
            AdapterStateError: names of rows, or the base alone, while adapters are merged.
            ShapeError: rows of the batch have different adapters.
        """
        if kind == "base":
            check_base(self)
        if kind in ("probe", "rows"):
            self._scope.layouts[self._label] = self.rows_problem
        if self._disable_adapters or kind in ("base", "probe"):
            return ()
        if kind == "active":
            return self._kernels_on(device)
        return tuple(self._kernel_on(name, device) for name in self._names_of_rows(shape))

    def _names_of_rows(self, shape: Iterable[int]) -> list[str]:
        check_rows(self)
        call = self._scope.present()
        assert call is not None
        assert call.names is not None
        self._scope.check_layout(self._label, torch.empty(tuple(shape), device="meta"), call)
        return [name for name in dict.fromkeys(call.names) if name in self.c3a_kernel]

    # Merging

    def _delta_weight(self, kernel: Tensor, dtype: torch.dtype) -> Tensor:
        matrix = self._stacked(kernel, dtype)
        return matrix.mT if self.transposed else matrix

    def _stacked(self, kernel: Tensor, dtype: torch.dtype) -> Tensor:
        """ΔW of one kernel, [out, in] or [stack, out, in]."""
        if kernel.dim() == 3:
            return circulant_matrix(kernel, dtype=dtype)
        # A stack of block-circulant matrices is a taller one, of the same width and scale.
        return circulant_matrix(kernel.flatten(0, 1), dtype=dtype).unflatten(0, (kernel.shape[0], -1))

    def _add_delta_(self, weight: Tensor, names: Iterable[str]) -> None:
        kernels = [self._kernel_on(name, weight.device) for name in names]
        if weight.dim() == 2:
            add_circulant_(weight, kernels)
            return
        for index, matrix in enumerate(weight):
            add_circulant_(matrix, [kernel[index] for kernel in kernels])

    # torch's hooks into a module

    def extra_repr(self) -> str:
        """The widths, of how many matrices, block sizes and backend."""
        stack = self._geometry.stack
        return f"stack={stack}, {super().extra_repr()}" if stack else super().extra_repr()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            raise AttributeError(self._misread(f"reads its {name!r}")) from error

    def __getitem__(self, index: Any) -> Any:
        raise ConfigError(self._misread("reads an element of it"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Who computes with a part takes it for the parameter. (Operators make something else of a `TypeError`.)"""
        part = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Part))
        raise ConfigError(part._misread(f"computes {torch.overrides.resolve_name(func)} with it"))

    def _misread(self, what: str) -> str:
        return (
            f"{self._label} is an adapted parameter, and what {what} here is not the forward of the module that has "
            "it: it cannot be adapted by itself. Leave it out of target_parameters"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Part":
        nn.Module._apply(self, fn, recurse)  # the holder sees to what is merged
        self._refresh()
        return self


class Holder(nn.Module):
    """What stands in the place of a module of which parameters are adapted.

    The module goes on computing with its own hooks and its own names; only in the innermost place of its forward there
    is `compute`. What this one lacks as an attribute is the module's, to read and to set.

    Args:
        base_layer: the module.

    Attributes:
        base_layer: the module.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.attach()

    def attach(self) -> None:
        """Compute in the module's place, as it does from the start."""
        dispatch(self.base_layer, self)

    def release(self) -> None:
        """Let the module compute by itself again."""
        undispatch(self.base_layer)

    def parts(self) -> dict[str, Any]:
        """Parameter name → part."""
        return {name: part for name, part in self._modules.items() if isinstance(part, Part)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, with the adapters' parts."""
        if not self.__dict__.get("_is_replica"):
            return self.base_layer(*args, **kwargs)
        # DataParallel's replicas of the module, which know of no other holder than the first one.
        for part in self.parts().values():
            part.__dict__["base_layer"] = self.base_layer
        return self.compute(*args, **kwargs)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """What is computed in the innermost place of the module's forward."""
        raise NotImplementedError

    def parts_in_force(self) -> dict[str, Any]:
        """Parameter name → part of those that this call needs; all of them, or none."""
        parts, compiles = self.parts(), torch.compiler.is_compiling()
        if "forward" in self.__dict__ and not compiles and parallel_mesh(self) is not None:
            raise ConfigError(f"{', '.join(part._label for part in parts.values())}: {SPREAD_LATE}")
        if not compiles:  # which would keep whose kernels they are
            for part in parts.values():
                # All kernels, whichever this call applies: DeepSpeed expects each call to fetch the same parameters.
                gather_with(self, part._stored_kernels())
        if any(part.takes_part() for part in parts.values()):
            return parts
        if not compiles:
            for part in parts.values():
                part.was_reached = True
        return {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is not None and name == "base_layer" and is_of_peft(value):
            raise AdapterStateError(
                f"{', '.join(part._label for part in self.parts().values())}: adapted parameters, and no layer of PEFT "
                f"({type(value).__name__}) can take the place of the module that has them. Merge one of the two first, "
                "by model.c3a.merge_and_unload() or PEFT's"
            )
        is_own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if is_own or not hasattr(base, name) or isinstance(value, Part):
            super().__setattr__(name, value)
            return
        setattr(base, name, value)
        if name == "config":
            self.attach()  # which the former one did

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Holder":
        def move() -> Any:
            return super(Holder, self)._apply(fn, recurse)

        for part in self.parts().values():
            move = _moving(part, fn, move)
        move()
        return self


def _moving(part: Part, fn: Callable[[Tensor], Tensor], move: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: merging.move(part, fn, move)
