"""`C3ALinear`: a base layer and its C3A adapters, with the attributes and methods of PEFT's layer."""

import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton._public import public
from c3a_triton.bases.linear_like import geometry, is_plain, is_transposed, unfit_for_adapters
from c3a_triton.bases.quantized import hold_layout
from c3a_triton.bases.sharded import gather_with
from c3a_triton.bases.weights import (
    WeightAccess,
    fingerprint,
    first_tensor,
    kernel_device,
    rounding_dtype,
    stored_tensor,
    weight_access,
)
from c3a_triton.errors import AdapterNotFoundError, AdapterStateError, BackendError, ConfigError, ShapeError
from c3a_triton.files.block_sizes import check_block_size, suggest_block_size
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.values import plain
from c3a_triton.operator import spectra
from c3a_triton.operator.dispatch import check_backend
from c3a_triton.operator.ops import add_circulant_, c3a_linear, circulant_linear, circulant_matrix
from c3a_triton.operator.ops_rows import c3a_linear_rows

from .merge_state import MergeState, enter, find
from .names import BASE_ROW, Scope, expand_rows, row_indices, uncompiled

__all__ = ["C3ALinear", "check_adapter_name"]

KEEP_BASE = ("cpu", "device", None)
_DEFAULT_BLOCK_SIZE = 256
_COMPUTED_DTYPES = (torch.float32, torch.float64)
# The one node of base and adapters widens 16-bit kernels itself.
_FUSED_DTYPES = (*_COMPUTED_DTYPES, torch.bfloat16, torch.float16)
_RESERVED_NAMES = frozenset(dir(nn.ParameterDict())) | frozenset(dir(nn.ModuleDict()))


def check_adapter_name(name: str) -> None:
    """Refuse a name that torch's containers cannot hold, or that means something else.

    Raises:
        ConfigError: the name is no string, empty, has a dot, or is taken by torch or by this library.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"an adapter's name must be a non-empty string, got {name!r}")
    if "." in name:
        raise ConfigError(f"the adapter name {name!r} has a dot, by which torch separates modules: leave it out")
    if name == BASE_ROW or name in _RESERVED_NAMES:
        raise ConfigError(f"the adapter name {name!r} is reserved: choose another one")


class _WatchedParameters(dict[str, Any]):
    """A ParameterDict's `_parameters` that tells its layer, and shallow copies of it, of every exchange.

    torch replaces parameters behind a module's back: `functional_call`, `load_state_dict(assign=True)`, moves from
    meta, FSDP. All of them write into this dictionary, so the layer's tuple of active parameters follows.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.layers: weakref.WeakSet[C3ALinear] = weakref.WeakSet()

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._tell()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._tell()

    def pop(self, *args: Any) -> Any:
        value = super().pop(*args)
        self._tell()
        return value

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self._tell()

    def clear(self) -> None:
        super().clear()
        self._tell()

    def _tell(self) -> None:
        for layer in self.layers:
            layer._refresh()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are plain; the copied layer watches its own.
        return dict, (dict(self),)


@public
class C3ALinear(nn.Module):
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
    has_backends = True
    """Whether there is a choice of how the adapters are computed."""

    adapter_layer_names = ("c3a_kernel",)
    other_param_names = ("block_size",)

    base_layer: nn.Module
    c3a_kernel: nn.ParameterDict
    _kernels: tuple[Tensor, ...] | None

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
        super().__init__()
        check_backend(backend)
        if backend != "auto" and not self.has_backends:
            raise BackendError(f"{layer_name or type(self).__name__} has no choice of backend, got {backend!r}")
        self.base_layer = base_layer
        self.c3a_kernel = nn.ParameterDict()
        self.block_size: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self.training = self.c3a_kernel.training = base_layer.training
        self._active_adapters = [adapter_name]
        self._disable_adapters = False
        self._prepare(backend, layer_name)
        if reason := unfit_for_adapters(self.get_base_layer()):
            raise ConfigError(f"{self._label}: {reason}")
        self.update_layer(adapter_name, block_size, init_weights, config=config)

    # What the forward reads

    def _prepare(self, backend: str, layer_name: str) -> None:
        """Set everything but PEFT's state, with which a layer of PEFT's becomes one of these (`integrations.peft`)."""
        self.backend = backend
        self.layer_name = layer_name
        self._scope = Scope()
        self._merge_state: MergeState | None = None
        self.quantization_config: Any = None
        sizes = geometry(self.get_base_layer())
        if sizes is None or sizes.kind != self.kind:
            raise ConfigError(
                f"{self._label}: {type(self.base_layer).__name__} is not of kind {self.kind}, of known widths"
            )
        self._geometry = sizes
        self.in_features, self.out_features = sizes.in_features, sizes.out_features
        hold_layout(self.base_layer)
        self._watch()

    def _watch(self) -> None:
        watched = self.c3a_kernel._parameters
        if not isinstance(watched, _WatchedParameters):
            watched = _WatchedParameters(watched)
            self.c3a_kernel.__dict__["_parameters"] = watched
        watched.layers.add(self)
        self._refresh()

    def _refresh(self) -> None:
        """Set the tuple of parameters that the forward applies; None sends it the general way, which looks names up.

        It is called whenever parameters are exchanged, moved or switched, so what was derived from them goes too.
        """
        spectra.drop(self._stored_kernels())
        names = self._applied_names()
        found = [self.c3a_kernel._parameters.get(name) for name in names]
        kernels = tuple(kernel for kernel in found if kernel is not None)
        usable = len(kernels) == len(names) and all(w.dtype in _FUSED_DTYPES and not w.is_meta for w in kernels)
        self._kernels = kernels if usable else None

    def _stored_kernels(self) -> list[Tensor]:
        return [kernel for kernel in self.c3a_kernel._parameters.values() if kernel is not None]

    def _applied_names(self) -> list[str]:
        """The active adapters of this layer that are not merged; none while adapters are disabled."""
        if self._disable_adapters:
            return []
        return [name for name in self._active_adapters if name in self.c3a_kernel and name not in self.merged_adapters]

    def _kernel_on(self, name: str, device: torch.device) -> Tensor:
        """An adapter's w on a device in a dtype to compute in, wherever it is kept."""
        kernel = stored_tensor(self.c3a_kernel, name).to(device)
        return kernel if kernel.dtype in _COMPUTED_DTYPES else kernel.float()

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
                try:
                    y = c3a_linear(x, tensors["weight"], tensors["bias"], kernels, backend=self.backend)  # type: ignore[arg-type]
                except ShapeError as error:
                    raise ShapeError(f"{self._label}: {error}") from None
                return y if y.dtype == x.dtype else y.to(x.dtype)
        if kind == "ask":
            return self._uncompiled_forward(x, *args, **kwargs)
        return self._general_forward(kind, x, *args, **kwargs)

    @uncompiled
    def _uncompiled_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return C3ALinear.forward(self, *args, **kwargs)

    def _general_forward(
        self, kind: str, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        # All of them, whichever this call applies: DeepSpeed expects each call to fetch the same parameters.
        gather_with(self, self._stored_kernels())
        if kind == "probe":
            self._scope.note(self._label, x)
        if kind == "base" and self.merged_adapters:
            raise AdapterStateError(
                f"{self._label}: {self.merged_adapters} were merged while adapters are disabled (disable_adapter) in a "
                "thread, which cannot compute the base alone any more: unmerge them first"
            )
        if self._disable_adapters or kind == "probe":
            kind = "base"
        elif adapter_names is not None and kind != "base":
            names = expand_rows(adapter_names, x.shape[0], exact=True)
            present = tuple(name for name in dict.fromkeys(names) if name in self.c3a_kernel)
            index = {name: i for i, name in enumerate(present)}
            rows = torch.tensor([index.get(name, -1) for name in names], device="cpu")
            return self._forward_rows(present, rows, x, *args, **kwargs)
        if kind == "rows":
            if x.dim() == 1 and self.kind == "linear":  # a single vector, which is no batch
                return self._forward_rows(*self._rows_of_call(x[None]), x[None], *args, **kwargs)[0]
            return self._forward_rows(*self._rows_of_call(x), x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        dtype = x.dtype if x.is_floating_point() else y.dtype
        if kind == "base":
            return y.to(dtype)
        # With offloading or several devices the base layer's hook decides where it computes.
        x = x.to(y.device)
        kernels = self._kernels
        if kernels is None or any(w.device != x.device or w.dtype not in _COMPUTED_DTYPES for w in kernels):
            kernels = tuple(self._kernel_on(name, x.device) for name in self._applied_names())
        if kernels and torch._C._get_tracing_state() is None:
            self._check_base_output(x, y)
        for kernel in _sums_by_block_size(kernels):
            y = y + self._delta(x, kernel, self._exact_backend).to(y.dtype)
        return y.to(dtype)

    def _rows_of_call(self, x: Tensor) -> tuple[tuple[str, ...], Tensor]:
        """Adapters of this layer, and for each of x's rows the index of its own among them (−1 for none)."""
        if torch.compiler.is_compiling():
            present = tuple(self.c3a_kernel)  # which of them the rows have is known when the graph runs
            return present, row_indices(self._scope, x, self._label, present)
        call = self._scope.present()
        assert call is not None
        assert call.names is not None
        present = tuple(name for name in dict.fromkeys(call.names) if name in self.c3a_kernel)
        self._scope.check_layout(self._label, x, call)
        return present, call.rows(present, x.shape[0])

    def _check_base_output(self, x: Tensor, y: Tensor) -> None:
        """Refuse a base layer whose output an adapter's part cannot be added to."""
        fits = (x.shape[-1:], y.shape[-1:]) == ((self.in_features,), (self.out_features,))
        if self.kind == "linear" and not fits:
            raise ShapeError(
                f"{self._label}: x has the shape {tuple(x.shape)} and the base layer gives {tuple(y.shape)}, where "
                f"in_features={self.in_features} and out_features={self.out_features}. A tensor-parallel base "
                "layer, of which each process computes a part, cannot be adapted: leave it out of the plan, or "
                "shard with FSDP2 (fully_shard), which puts weights together"
            )
        if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
            # The adapter's part alone would pass one on, a wrong one.
            raise AdapterStateError(
                f"{self._label}: this {type(self.get_base_layer()).__name__} passes no gradient on to its input, "
                "as some quantized layers do not (torchao's with quantized activations): layers below it cannot be "
                "trained. Load the base model in another format, or adapt no layer below this one"
            )

    def _delta(self, x: Tensor, kernel: Tensor, backend: str) -> Tensor:
        """What one adapter adds for x, on x's device."""
        return circulant_linear(x, kernel, backend=backend)

    def _forward_rows(self, present: tuple[str, ...], rows: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus, for each row, that of the adapter of its index among these, if it has one."""
        if self.merged_adapters:
            raise AdapterStateError(
                f"{self._label}: rows cannot have adapters of their own while {self.merged_adapters} are merged; "
                "unmerge them first"
            )
        base: Any = self.base_layer
        if present and self.kind == "linear" and not args and not kwargs and is_plain(base, x):
            return self._delta_rows(x, base.weight, base.bias, present, rows).to(x.dtype)
        y = base(x, *args, **kwargs)
        dtype = x.dtype if x.is_floating_point() else y.dtype
        if present:
            x = x.to(y.device)
            self._check_base_output(x, y)
            y = y + self._delta_rows(x, None, None, present, rows).to(y.dtype)
        return y.to(dtype)

    def _delta_rows(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, names: tuple[str, ...], rows: Tensor
    ) -> Tensor:
        """What the adapters add for x, each row by that of its index into `names` (−1 for none), and x Wᵀ + bias."""
        kernels = [self._kernel_on(name, x.device) for name in names]
        if self.kind != "linear":
            return self._delta_by_adapter(x, kernels, rows)
        try:
            return c3a_linear_rows(x, weight, bias, kernels, rows, backend=self._exact_backend)
        except ShapeError as error:
            raise ShapeError(f"{self._label}: {error}") from None

    def _delta_by_adapter(self, x: Tensor, kernels: list[Tensor], rows: Tensor) -> Tensor:
        """The adapters' part of `_delta_rows`, one adapter after another: of layers that have no kernels for rows."""
        total: Tensor | None = None
        for i, kernel in enumerate(kernels):
            # A graph cannot depend on how many rows an adapter has: there each adapter computes them all.
            chosen = None if torch.compiler.is_compiling() else (rows == i).nonzero().squeeze(1).to(x.device)
            part = self._delta(x if chosen is None else x.index_select(0, chosen), kernel, self._exact_backend)
            if total is None:
                total = part.new_zeros(x.shape[0], *part.shape[1:])
            # An adapter that was added after a cast to float64 is in float32 beside the others.
            dtype = torch.promote_types(total.dtype, part.dtype)
            total, part = total.to(dtype), part.to(dtype)
            if chosen is None:
                mine = (rows == i).to(x.device).view(-1, *(1,) * (part.dim() - 1))
                total = torch.where(mine, part, total)
            else:
                total = total.index_add(0, chosen, part)
        assert total is not None, "no adapter for any row"
        return total

    @property
    def _exact_backend(self) -> str:
        """The backend of adapters that are computed beside the base layer."""
        if self.backend != "auto" and not self.has_backends:
            raise BackendError(
                f"{self._label}: backend {self.backend!r} is for linear layers; a {self.kind} layer has no choice of "
                "backend: leave it at 'auto'"
            )
        if self.backend == "fold":
            raise BackendError(
                f"{self._label}: backend 'fold' adds the adapters to the weight of a plain nn.Linear. Here they are "
                "computed beside the base layer: it is of another kind, hooked, offloaded or called with more than x, "
                "the adapters are on another device or of 8 bits, or each row of the batch has its "
                "own. Choose another backend for this layer, such as 'auto'"
            )
        return self.backend

    @property
    def _row_adapters(self) -> tuple[str, ...] | None:
        """What a call would have now as names of its rows."""
        call = self._scope.present()
        return None if call is None else call.names

    # PEFT's attributes

    @property
    def _label(self) -> str:
        return self.layer_name or type(self).__name__

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
        kernel = self._new_kernel(adapter_name, block_size, init_weights, config)
        self._install(adapter_name, kernel, trainable=config is None or not config.inference_mode)

    @torch.inference_mode(False)  # a parameter that is made in inference mode can never be trained
    def _new_kernel(
        self,
        adapter_name: str,
        block_size: int | str | None = None,
        init_weights: bool | str | None = None,
        config: C3AConfig | None = None,
    ) -> nn.Parameter:
        """An initialised kernel that is not yet part of the layer, which stays as it is."""
        check_adapter_name(adapter_name)
        if adapter_name in self.merged_adapters:
            raise AdapterStateError(f"{self._label}: adapter {adapter_name!r} is merged; unmerge before replacing it")
        if block_size is None:
            block_size = _DEFAULT_BLOCK_SIZE if config is None else config.block_size
        if init_weights is None:
            init_weights = "xavier_uniform" if config is None else config.init_weights
        init_weights = plain(init_weights)
        if block_size == "auto":
            rank = None if config is None else config.rank
            block_size = suggest_block_size(*self._geometry.divided, rank=rank)
        b: int = plain(block_size)
        check_block_size(b, *self._geometry.divided, self._label + self._geometry.what)
        base = self.get_base_layer()
        shape = self._geometry.kernel_shape(b)
        kernel = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=kernel_device(base)))
        self._initialise(kernel, init_weights)
        dtype = rounding_dtype(base)
        if dtype is not None and init_weights is not True:
            kernel.data = kernel.data.to(dtype).float()
        return kernel

    def _install(self, adapter_name: str, kernel: nn.Parameter, *, trainable: bool = True) -> None:
        kernel.requires_grad_(trainable and adapter_name in self._active_adapters and not self._disable_adapters)
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
        self._initialise(self.c3a_kernel[adapter_name], init_weights)
        self._refresh()

    def _initialise(self, kernel: Tensor, init_weights: bool | str) -> None:
        if init_weights is True:
            nn.init.zeros_(kernel)
        elif init_weights == "gaussian":
            nn.init.normal_(kernel)
        elif init_weights is False or init_weights == "xavier_uniform":
            bound = math.sqrt(3.0) * math.sqrt(2.0 / (self.in_features + self.out_features))
            nn.init.uniform_(kernel, -bound, bound)
        elif init_weights == "kaiming_uniform":
            bound = math.sqrt(1.0 / self.in_features)
            nn.init.uniform_(kernel, -bound, bound)
        else:
            raise ConfigError(
                f"{self._label}: init_weights must be True, False, 'gaussian', 'kaiming_uniform' or 'xavier_uniform', "
                f"got {init_weights!r}"
            )

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self.c3a_kernel:
            raise AdapterNotFoundError(
                f"{self._label} has no adapter {adapter_name!r}; it has: {', '.join(self.c3a_kernel) or 'none'}"
            )

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter, [out_features, in_features] (a convolution's: as its weight) in the base weight's dtype.

        Raises:
            AdapterNotFoundError: this layer has no such adapter.
        """
        self._check_known(adapter)
        dtype = self.weight.dtype
        kernel = stored_tensor(self.c3a_kernel, adapter)
        kernel = kernel if kernel.dtype in _COMPUTED_DTYPES else kernel.float()
        return self._delta_weight(kernel, dtype if dtype.is_floating_point else kernel.dtype)

    def _delta_weight(self, kernel: Tensor, dtype: torch.dtype) -> Tensor:
        """ΔW of one kernel, in the shape of the base layer's weight."""
        return circulant_matrix(kernel, dtype=dtype)

    def _add_delta_(self, weight: Tensor, names: Iterable[str]) -> None:
        """Add adapters' ΔW to a weight as the matrix [out_features, in_features], in place."""
        add_circulant_(weight, [self._kernel_on(name, weight.device) for name in names])

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Activate these adapters and no others; names that other layers have are fine.

        The active ones become trainable, unless `inference_mode`, all others frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, kernel in self.c3a_kernel.items():
            _set_requires_grad(kernel, name in names and not inference_mode)
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
            _set_requires_grad(kernel, False)
        self._disable_adapters = True
        self._refresh()

    def freeze_for_inference(self, frozen: bool = True) -> None:
        """Keep what is derived from the adapters' parameters (their spectra) from one call to the next, or end that.

        Otherwise it is computed in every call, because nothing tells for sure whether a parameter has changed. Values
        that torch's in-place operations, `load_state_dict` or this library's methods write are seen. After any other
        write (through `.data`, or by a kernel of one's own) call this again. A parameter that becomes trainable, or is
        exchanged for another one, is no longer frozen; nor are those of a copy of the layer.

        Args:
            frozen: freeze all adapters of the layer, whose parameters then want no gradient; or let go of what is kept.
        """
        kernels = self._stored_kernels()
        if not frozen:
            spectra.thaw(kernels)
            return
        for kernel in kernels:
            _set_requires_grad(kernel, False)
        spectra.freeze(kernels)

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
        if keep_base not in KEEP_BASE:
            raise ConfigError(f"keep_base must be one of {KEEP_BASE}, got {keep_base!r}")
        names = self.unmerged(adapter_names)
        if self.merged:
            what = f"merging {names} too" if names else "nothing to do"
            warnings.warn(f"{self._label}: {self.merged_adapters} are merged already; {what}", stacklevel=2)
        if names:
            self._merge(names, keep_base, safe_merge)

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
            _, weight = self._read_unchanged()
            if finite:
                self._finite_sum(weight, names, beside)

    @torch.no_grad()
    def _merge(self, names: list[str], keep_base: str | None, safe_merge: bool = False) -> None:
        access, weight = self._read_unchanged()
        merged = self._finite_sum(weight, names) if safe_merge else None
        state = self._merge_state or find(access.place())
        if state is None:
            state = MergeState(None if keep_base is None else access.keep(keep_base), keep_base, self._is_transposed)
        if merged is None:
            merged = weight if access.in_place else weight.clone()
            self._add_delta_(merged, names)
        if merged is not weight:
            self._write(access, merged)
        if state.kept is not None:  # otherwise nothing can be brought back, and there is nothing to guard
            state.mark = fingerprint(access.read())
        self._merge_state = state
        self.merged_adapters.extend(names)
        enter(state, self)
        self._refresh()

    @property
    def _is_transposed(self) -> bool:
        return is_transposed(self.get_base_layer())

    def weight_place(self) -> Hashable | None:
        """What is equal for layers whose weight is the same memory, or None where that does not count."""
        try:
            return weight_access(self).place()
        except AdapterStateError:
            return None

    def _write(self, access: WeightAccess, weight: Tensor) -> None:
        try:
            access.write(weight)
        except AdapterStateError as error:
            raise AdapterStateError(f"{self._label}: {error}") from error

    def _read_unchanged(self) -> tuple[WeightAccess, Tensor]:
        """The base weight and the way to change it, if it is what it was after the last merge."""
        if self.disable_adapters:
            raise AdapterStateError(f"{self._label}: adapters are disabled; enable them before merging")
        try:
            access = weight_access(self)
            weight = access.read()
        except AdapterStateError as error:
            raise AdapterStateError(f"{self._label}: {error}") from None
        state = self._merge_state or find(access.place())
        if state is not None and state.kept is not None and (state.mark is None or fingerprint(weight) != state.mark):
            raise AdapterStateError(
                f"{self._label}: the base weight was changed after {state.merged_adapters} were merged into it, so "
                "that bringing back the original would undo that change. Load the base weight again, or keep the "
                "merged one (merge_and_unload)"
            )
        return access, weight

    @torch.no_grad()
    def _finite_sum(
        self, weight: Tensor, names: list[str], beside: Iterable[tuple["C3ALinear", list[str]]] = ()
    ) -> Tensor:
        merged = weight.clone()
        self._add_delta_(merged, names)
        for other, its_names in beside:
            same_order = other._is_transposed == self._is_transposed
            other._add_delta_(merged if same_order else merged.t(), its_names)
        if not torch.isfinite(merged).all():
            raise AdapterStateError(
                f"{self._label}: merging {names} gives a weight that is not finite; nothing was merged"
            )
        return merged

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
        self._bring_back()

    @torch.no_grad()
    def _bring_back(self, *, everyone: bool = False) -> None:
        """Unmerge, without a check, this layer or every one of its weight."""
        state = self._merge_state
        assert state is not None
        assert state.kept is not None
        others = state.others(self)
        # Another layer may have kept it, in the order of a `Conv1D`.
        same_order = isinstance(state.kept, nn.Module) or state.transposed == self._is_transposed
        weight_access(self).restore(state.kept if same_order else state.kept.t())  # type: ignore[operator]
        for layer in [self, *others] if everyone else [self]:
            layer._merge_state = None
            layer.merged_adapters.clear()
            layer._refresh()
        left = [other for other in others if other.merged]
        for other in left:
            access = weight_access(other)
            weight = access.read()
            other._add_delta_(weight, other.merged_adapters)
            if not access.in_place:
                other._write(access, weight)
        if left:
            state.mark = fingerprint(weight_access(left[-1]).read())

    def check_unmerge(self) -> None:
        """Raise what `unmerge` would raise, and change nothing.

        Raises:
            AdapterStateError: as `unmerge`.
        """
        if not self.merged:
            return
        if self._merge_state is None or self._merge_state.kept is None:
            raise AdapterStateError(
                f"{self._label}: {self.merged_adapters} were merged with keep_base=None, so the base weight is gone; "
                'load the base model again, or merge with keep_base="cpu"'
            )
        self._read_unchanged()

    # torch's hooks into a module

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Give the base layer another weight or bias, as who ties weights does; anything else is the layer's own."""
        if name in ("weight", "bias") and "base_layer" in self._modules:
            setattr(self.get_base_layer(), name, param)
        else:
            super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "C3ALinear":
        state = self._merge_state
        if state is None or state.kept is None:
            super()._apply(fn, recurse)
        else:
            # The kept original follows the weight's move or cast; a change made before it must not be forgotten.
            changed = state.mark is None or fingerprint(weight_access(self).read()) != state.mark
            others = state.others(self)
            super()._apply(fn, recurse)
            state = state.split(self, others)
            if isinstance(state.kept, nn.Module):
                state.kept._apply(fn)
            elif state.kept is not None:
                moved = fn(state.kept)
                state.kept = moved.to("cpu") if state.where == "cpu" and not moved.is_meta else moved
            lost = changed or self.weight.is_meta
            state.mark = None if lost else fingerprint(weight_access(self).read())
            enter(state, self)
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
        """The widths, block sizes and backend."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}, "
            f"backend={self.backend!r}"
        )


def _sums_by_block_size(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Kernels of equal block size summed: the product is linear in them."""
    sums: dict[int, Tensor] = {}
    for kernel in kernels:
        b = kernel.shape[-1]
        sums[b] = sums[b] + kernel if b in sums else kernel
    return list(sums.values())


def _set_requires_grad(tensor: Tensor, requires_grad: bool) -> None:
    # Sharding libraries put tensors that are no leaves in a parameter's place; their flag cannot be set.
    if tensor.is_leaf:
        tensor.requires_grad_(requires_grad)
