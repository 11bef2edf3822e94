"""`C3ALinear`: a base layer and its C3A adapters, with the attributes and methods of PEFT's layer."""

import warnings
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton._public import public
from c3a_triton.bases.linear_like import Geometry, geometry, is_plain, unfit_for_adapters
from c3a_triton.bases.parallel import Part, entered, part_of
from c3a_triton.bases.partitioned import changed
from c3a_triton.bases.quantized import hold_layout, holds_values
from c3a_triton.bases.weights import first_tensor, weight_access
from c3a_triton.errors import AdapterNotFoundError, AdapterStateError, BackendError, ConfigError, ShapeError
from c3a_triton.files.block_sizes import check_block_size, suggest_block_size
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.values import plain
from c3a_triton.operator.calls import c3a_linear, circulant_linear
from c3a_triton.operator.dense import add_circulant_, circulant_matrix
from c3a_triton.operator.dispatch import check_backend

from . import merging
from .forward import general_forward
from .merge_state import MergeState, enter
from .names import Scope, uncompiled
from .parameters import check_adapter_name, initialise, new_kernel, set_requires_grad, watch
from .strength import AppliedKernels, times

__all__ = ["C3ALinear"]

_DEFAULT_BLOCK_SIZE = 256


@public
class C3ALinear(AppliedKernels):
    """A linear layer with C3A adapters: y = base(x) + Σ x ΔW_aᵀ over the active adapters, each of the same x.

    Args:
        base_layer: an `nn.Linear`, transformers' `Conv1D`, or any module with `in_features` and `out_features`.
        adapter_name: name of the first adapter, which becomes active.
        block_size: b, a common divisor of both widths; None means `config`'s, or 256 without one; `"auto"` the one that
            `suggest_block_size` gives.
        init_weights: as in `C3AConfig`; None means `config`'s, or `"xavier_uniform"` without one.
        config: in place of both, as in PEFT: a `C3AConfig`, a `peft.C3AConfig` or a dict.
        backend: how the adapters are computed, a name of `c3a_triton.operator.dispatch.BACKENDS`.

    Attributes:
        base_layer: the wrapped module.
        c3a_kernel: adapter name → w [out_features / b, in_features / b, b], float32.
        block_size: adapter name → b.
        merged_adapters: names of the adapters that are merged into the base weight.
        layer_name: its full name in the model, for messages.
        quantization_config: the torchao configuration by which a merged base weight is quantized again.

    Raises:
        ConfigError: a name or value that cannot be used, or a base layer that is not linear, or of whose class the
            forward is none that an adapter's part can be added to (a router's).
        ShapeError: a block size that does not divide both widths.
    """

    kind = "linear"
    """The kind of base layer, of those that `linear_like.geometry` tells apart."""
    save_spectrum = False
    """Whether x's spectrum is kept for the backward pass in place of x, where `c3a_linear` can."""
    has_backends = True
    """Whether there is a choice of how the adapters are computed."""
    is_part = False
    """Whether it adapts one parameter of a module (`parts`)."""
    parameter = ""
    """That parameter's name."""
    agreed = False  # whether processes over which a plan spreads the layer are known to have the same kernels

    adapter_layer_names = ("c3a_kernel",)
    other_param_names = ("block_size",)

    base_layer: nn.Module

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        block_size: int | str | None = None,
        init_weights: bool | str | None = None,
        *,
        config: Any = None,
        backend: str = "auto",
        layer_name: str = "",
    ) -> None:
        check_backend(backend)
        if backend != "auto" and not self.has_backends:
            raise BackendError(f"{layer_name or type(self).__name__} has no choice of backend, got {backend!r}")
        self._wrap(base_layer, [adapter_name], backend, layer_name)
        hold_layout(base_layer)
        if reason := unfit_for_adapters(self.get_base_layer()):
            raise ConfigError(f"{self._label}: {reason}")
        self.update_layer(adapter_name, block_size, init_weights, config=config)

    @classmethod
    def _around(
        cls, base_layer: nn.Module, sizes: Geometry, *, active: list[str], backend: str, layer_name: str
    ) -> "C3ALinear":
        """A layer without adapters around a base layer of which everything has been checked."""
        layer = cls.__new__(cls)
        layer._wrap(base_layer, active, backend, layer_name, sizes)
        return layer

    def _wrap(
        self, base_layer: nn.Module, active: list[str], backend: str, layer_name: str, sizes: Geometry | None = None
    ) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Module):
            raise ConfigError(f"{type(self).__name__} goes around a layer, such as nn.Linear(8, 8), got {base_layer!r}")
        self._hold(base_layer)
        self.c3a_kernel = nn.ParameterDict()
        self.block_size: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self.training = self.c3a_kernel.training = base_layer.training
        self._active_adapters = list(active)
        self._disable_adapters = False
        self._prepare(backend, layer_name, sizes)

    def _hold(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def _prepare(self, backend: str, layer_name: str, sizes: Geometry | None = None) -> None:
        """Set everything but PEFT's state, with which a layer of PEFT's becomes one of these (`integrations.peft`)."""
        self.backend = backend
        self.layer_name = layer_name
        self._scope = Scope()
        self._merge_state: MergeState | None = None
        self.quantization_config: Any = None
        sizes = sizes or geometry(self.get_base_layer())
        if sizes is None or sizes.kind != self.kind:
            raise ConfigError(
                f"{self._label}: {type(self.base_layer).__name__} is not of kind {self.kind}, of known widths"
            )
        self._geometry = sizes
        self.in_features, self.out_features = sizes.in_features, sizes.out_features
        self._watch()

    # What the forward reads

    def _watch(self) -> None:
        watch(self.c3a_kernel, self)
        self._refresh()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters', in x's dtype.

        Args:
            x: [..., in_features].
            adapter_names: keyword, one adapter name per row of x (`"__base__"` for none) in place of the active ones.
            args, kwargs: passed on to the base layer.

        Returns:
            [..., out_features].

        Raises:
            ShapeError: sizes, dtypes or devices that do not fit.
            BackendError: the layer's backend cannot run here.
        """
        kernels = self._kernels
        kind = self._scope.kind() if self._scope.watched else "active"
        if kernels and kind == "active" and not args and not kwargs:
            base = self._modules["base_layer"]
            if is_plain(base, x):  # type: ignore[arg-type]
                tensors = base._parameters  # type: ignore[union-attr]
                if self._applied_strengths is not None:  # asked here: a call costs more than most layers have to spare
                    kernels = times(kernels, self._applied_strengths)
                try:
                    y = c3a_linear(
                        x,
                        tensors["weight"],  # type: ignore[arg-type]
                        tensors["bias"],
                        kernels,
                        backend=self.backend,
                        save_spectrum=self.save_spectrum,
                    )
                except ShapeError as error:
                    raise ShapeError(f"{self._label}: {error}") from None
                return y if y.dtype == x.dtype else y.to(x.dtype)
        if kind == "ask":
            return self._uncompiled_forward(x, *args, **kwargs)
        return general_forward(self, kind, x, *args, **kwargs)

    @uncompiled
    def _uncompiled_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return C3ALinear.forward(self, *args, **kwargs)

    def _entered(self) -> bool:
        """Whether a plan spreads it; which it then has entered."""
        return entered(self)

    # What traces cannot look into closures. As torch.compiler.assume_constant_result, which would import the compiler
    # now; and of a method, because torch 2.11 takes no layer for the argument of such a function.
    _entered._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _delta(self, x: Tensor, kernel: Tensor, backend: str) -> Tensor:
        """What one adapter adds for x, on x's device."""
        return circulant_linear(
            x, kernel, scale=1.0 / self.in_features, backend=backend, save_spectrum=self.save_spectrum
        )

    @property
    def _row_adapters(self) -> tuple[str, ...] | None:
        """What a call would have now as names of its rows."""
        call = self._scope.present()
        return None if call is None else call.names

    # PEFT's attributes

    def get_base_layer(self) -> nn.Module:
        """The innermost wrapped module."""
        base: Any = self.base_layer
        while hasattr(base, "base_layer"):
            base = base.base_layer
        return base

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, or what a quantized one has in its place."""
        base: Any = self.get_base_layer()
        weight = base.qweight if hasattr(base, "qweight") else first_tensor(base)
        return base.weight if weight is None else weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.get_base_layer(), "bias", None)

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer computes its base alone, set by `enable_adapters`, or within `disable_adapter`."""
        return self._disable_adapters or (self._scope.watched and self._scope.kind() == "base")

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, those of other layers included; set by `set_adapter`."""
        return list(self._active_adapters)

    @property
    def active_adapter(self) -> list[str]:
        """As `active_adapters`."""
        return self.active_adapters

    # Adapters

    def update_layer(
        self,
        adapter_name: str,
        block_size: int | str | None = None,
        init_weights: bool | str | None = None,
        *,
        config: Any = None,
    ) -> None:
        """Add an adapter, or replace the one of that name. It is trainable if it is active and not for inference.

        Args:
            adapter_name: its name.
            block_size: as in the constructor.
            init_weights: as in the constructor.
            config: as in the constructor.

        Raises:
            ConfigError: a name or value that cannot be used.
            ShapeError: a block size that does not divide both widths.
            AdapterStateError: the adapter of that name is merged.
        """
        config = None if config is None else C3AConfig.from_any(config)
        check_adapter_name(adapter_name)
        if adapter_name in self.merged_adapters:
            raise AdapterStateError(f"{self._label}: adapter {adapter_name!r} is merged; unmerge before replacing it")
        if block_size is None:
            block_size = _DEFAULT_BLOCK_SIZE if config is None else config.block_size
        if init_weights is None:
            init_weights = "xavier_uniform" if config is None else config.init_weights
        if block_size == "auto":
            rank = None if config is None else config.rank
            block_size = suggest_block_size(*self._geometry.divided, rank=rank)
        b: int = plain(block_size)
        check_block_size(b, *self._geometry.divided, self._label + self._geometry.what)
        kernel = self._part_of(self._new_kernel(b, plain(init_weights)))
        self._install(adapter_name, kernel, trainable=config is None or not config.inference_mode)
        self.agreed = False

    def _new_kernel(self, block_size: int, init_weights: bool | str) -> nn.Parameter:
        """An initialised kernel that is not yet part of the layer, which stays as it is."""
        return new_kernel(
            self.get_base_layer(), self._geometry, block_size, init_weights, self._label, self.parameter or "weight"
        )

    def is_spread(self) -> bool:
        """Whether a plan spreads the layer's kernels over processes, each of which has those that it computes with."""
        return False

    def _part_of(self, kernel: nn.Parameter) -> nn.Parameter:
        """What the layer keeps of a whole new kernel: all of it, where processes do not divide it among them."""
        return kernel

    def _install(self, adapter_name: str, kernel: nn.Parameter, *, trainable: bool = True) -> None:
        kernel.requires_grad_(trainable and adapter_name in self._active_adapters and not self._disable_adapters)
        self._forget_strength(adapter_name)
        self.block_size[adapter_name] = kernel.shape[-1]
        self.c3a_kernel[adapter_name] = kernel

    def reset_c3a_parameters(self, adapter_name: str, init_weights: bool | str = "xavier_uniform") -> None:
        """Initialise an adapter afresh, in place, by PEFT's distributions; True means zeros.

        Raises:
            AdapterNotFoundError: this layer has no such adapter.
            AdapterStateError: the adapter is merged.
            ConfigError: an unknown `init_weights`.
        """
        self._check_known(adapter_name)
        if adapter_name in self.merged_adapters:
            raise AdapterStateError(f"{self._label}: adapter {adapter_name!r} is merged; unmerge before resetting it")
        with changed([self.c3a_kernel[adapter_name]], "reset_c3a_parameters"):
            initialise(self.c3a_kernel[adapter_name], init_weights, self._geometry, self._label)
        self.agreed = False
        self._refresh()

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self.c3a_kernel:
            raise AdapterNotFoundError(
                f"{self._label} has no adapter {adapter_name!r}; it has: {', '.join(self.c3a_kernel) or 'none'}"
            )

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter, [out, in] (a convolution's: as its weight), in W's dtype, or the kernel's if W is codes.

        Raises:
            AdapterNotFoundError: this layer has no such adapter.
            ShapeError: ZeRO-3 keeps its kernel in parts.
        """
        self._check_known(adapter)
        weight, kernel = self.weight, self._kernel_on(adapter)
        return self._delta_weight(kernel, weight.dtype if holds_values(weight) else kernel.dtype)

    def _delta_weight(self, kernel: Tensor, dtype: torch.dtype) -> Tensor:
        """ΔW of one kernel, in the shape of the base layer's weight."""
        return circulant_matrix(kernel, dtype=dtype)

    def _add_delta_(self, weight: Tensor, names: Iterable[str]) -> None:
        """Add adapters' ΔW to a weight as the matrix [out_features, in_features], in place."""
        kernels = [self._kernel_on(name, weight.device) for name in names]
        part = part_of(self.get_base_layer())
        if isinstance(part, Part):
            part.add_(weight, kernels, partial(add_circulant_, scale=1.0 / self.in_features))
        else:
            add_circulant_(weight, kernels)

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Activate these adapters and no others; names that other layers have are fine.

        The active ones become trainable, unless `inference_mode`, all others frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, kernel in self.c3a_kernel.items():
            set_requires_grad(kernel, name in names and not inference_mode)
        self._active_adapters = names
        self._refresh()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on, the active ones trainable, or off. Switching off unmerges first.

        Raises:
            AdapterStateError: adapters are merged and cannot be unmerged.
        """
        if enabled:
            self._disable_adapters = False
            self.set_adapter(self._active_adapters)
            return
        if self.merged:
            self.unmerge()
        for kernel in self.c3a_kernel.values():
            set_requires_grad(kernel, False)
        self._disable_adapters = True
        self._refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, if the layer has it. If no active one is left, the first remaining becomes active.

        Raises:
            AdapterStateError: the adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise AdapterStateError(f"{self._label}: adapter {adapter_name!r} is merged; unmerge before deleting it")
        if adapter_name in self.c3a_kernel:
            del self.c3a_kernel[adapter_name]
            del self.block_size[adapter_name]
        self._forget_strength(adapter_name)
        if adapter_name not in self._active_adapters:
            return
        remaining = [name for name in self._active_adapters if name != adapter_name]
        if not remaining and len(self.c3a_kernel):
            remaining = [min(self.c3a_kernel)]
            warnings.warn(
                f"{self._label}: the active adapter {adapter_name!r} is deleted; {remaining[0]!r} is active now",
                stacklevel=2,
            )
        self.set_adapter(remaining)

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name; its parameter stays the same object.

        Raises:
            ConfigError: a name that cannot be used.
            AdapterStateError: the name is taken.
        """
        check_adapter_name(new)
        if new in self.c3a_kernel:
            raise AdapterStateError(f"{self._label} has an adapter {new!r} already")

        def renamed(name: str) -> str:
            return new if name == old else name

        self._active_adapters = [renamed(name) for name in self._active_adapters]
        self.merged_adapters = [renamed(name) for name in self.merged_adapters]
        self.block_size = {renamed(name): b for name, b in self.block_size.items()}
        self._strengths = {renamed(name): strength for name, strength in self._strengths.items()}
        kernels = {renamed(name): kernel for name, kernel in self.c3a_kernel.items()}
        self.c3a_kernel.clear()
        for name, kernel in kernels.items():
            self.c3a_kernel[name] = kernel

    # Merging

    def merge(
        self, safe_merge: bool = False, adapter_names: Iterable[str] | None = None, *, keep_base: str | None = "cpu"
    ) -> None:
        """Add the adapters' ΔW, built in float32 and rounded once, to the base weight.

        Other active adapters stay applied. The original weight is kept for `unmerge`, and a fingerprint of the merged
        one, which takes another pass over it.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: which adapters; None means the active ones. Names that this layer lacks are passed over.
            keep_base: where the original is kept: `"cpu"`, `"device"`, or None, after which nothing can be unmerged.

        Raises:
            AdapterStateError: the base layer cannot be merged into or was changed since the last merge, adapters are
                disabled, or with `safe_merge` the result is not finite. The layer stays as it was.
        """
        if keep_base not in merging.KEEP_BASE:
            raise ConfigError(f"keep_base must be one of {merging.KEEP_BASE}, got {keep_base!r}")
        names = self.unmerged(adapter_names)
        if self.merged:
            what = f"merging {names} too" if names else "nothing to do"
            warnings.warn(f"{self._label}: {self.merged_adapters} are merged already; {what}", stacklevel=2)
        if names:
            merging.merge(self, names, keep_base, safe_merge)

    def unmerged(self, adapter_names: Iterable[str] | None = None) -> list[str]:
        """Those of these adapters (None: the active ones) that this layer has and that are not merged."""
        names = self._active_adapters if adapter_names is None else adapter_names
        names = [names] if isinstance(names, str) else names
        return [name for name in dict.fromkeys(names) if name in self.c3a_kernel and name not in self.merged_adapters]

    def check_merge(
        self,
        adapter_names: Iterable[str] | None = None,
        *,
        finite: bool = False,
        beside: Iterable[tuple["C3ALinear", list[str]]] = (),
    ) -> None:
        """Raise what `merge` would raise, and change nothing.

        Args:
            adapter_names: as in `merge`.
            finite: raise as `merge(safe_merge=True)`.
            beside: other layers of the same weight, with the adapters that are to be merged there too.

        Raises:
            AdapterStateError: as `merge`.
        """
        names = self.unmerged(adapter_names)
        if names:
            group = [(self, names), *beside]
            merging.check(group)
            if finite:
                merging.check_finite(group)

    def weight_place(self) -> Hashable | None:
        """What is equal for layers whose weight is the same memory, or None where that does not count."""
        try:
            return weight_access(self).place()
        except AdapterStateError:
            return None

    def unmerge(self) -> None:
        """Bring back the base weight as it was before anything was merged, bit for bit.

        Where other layers have merged adapters into the same weight (tied embeddings), those stay merged.

        Raises:
            AdapterStateError: it was not kept, or the merged weight was changed in between.
        """
        if not self.merged:
            warnings.warn(f"{self._label}: nothing is merged, so there is nothing to unmerge", stacklevel=2)
            return
        self.check_unmerge()
        merging.bring_back(self)

    def check_unmerge(self) -> None:
        """Raise what `unmerge` would raise, and change nothing.

        Raises:
            AdapterStateError: as `unmerge`.
        """
        if self.merged:
            merging.check_unmerge(self)

    # torch's hooks into a module

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Give the base layer another weight or bias, as who ties weights does; anything else is the layer's own."""
        if name in ("weight", "bias") and "base_layer" in self._modules:
            setattr(self.get_base_layer(), name, param)
        else:
            super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "C3ALinear":
        merging.move(self, fn, lambda: super(C3ALinear, self)._apply(fn, recurse))
        self._refresh()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch()
        if self._merge_state is not None:
            enter(self._merge_state, self)

    def _replicate_for_data_parallel(self) -> "C3ALinear":
        # A replica's parameters are attributes that are set later, on another device: it looks them up by name.
        replica = super()._replicate_for_data_parallel()
        replica._kernels = None
        return replica

    def extra_repr(self) -> str:
        """The widths, block sizes and backend, and strengths other than 1."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}, "
            f"backend={self.backend!r}" + self._strengths_repr()
        )
