"""The kernels that a layer computes with: those of its active adapters, each times its adapter's strength.

ΔW is linear in w, so that an adapter of strength s is exactly one with s · w. Parameters keep w: files, optimizers and
exchanged values know of no strength. Here, too, is what becomes of the tuple that the forward reads when parameters
are exchanged, and what is kept of frozen ones.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.bases.sharded import check_gathered
from c3a_triton.bases.weights import stored_tensor
from c3a_triton.errors import AdapterStateError, ConfigError
from c3a_triton.operator import spectra
from c3a_triton.operator.arguments import at_least_float32, is_plain

from .names import uncompiled
from .parameters import set_requires_grad

__all__ = ["AppliedKernels", "check_strength", "strengths_of", "times"]

_COMPUTED_DTYPES = (torch.float32, torch.float64)
# The one node of base and adapters widens 16-bit kernels itself.
_FUSED_DTYPES = (*_COMPUTED_DTYPES, torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max
# What captured graphs write into whenever they are replayed.
_of_graphs: list[Tensor] = []


def check_strength(value: Any, where: str) -> float:
    """An adapter's strength as a number.

    Args:
        value: what was given.
        where: of which adapter and layer, for the message.

    Raises:
        ConfigError: no number, or none that is finite in float32.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not abs(value) <= _LARGEST:  # type: ignore[operator]
        raise ConfigError(
            f"{where}: the strength must be a finite number (0.7, for instance; 1 is what was trained, 0 none of it), "
            f"got {value!r}"
        )
    return float(value)


def strengths_of(names: Sequence[str], weights: float | Sequence[float]) -> dict[str, float]:
    """Adapter name → strength.

    Args:
        names: the adapters.
        weights: a strength for each, or one for all.

    Raises:
        ConfigError: none that is a finite number, not as many as names, or a name twice.
    """
    # Arrays and tensors without dimensions say that they can be iterated over.
    is_one = not isinstance(weights, Iterable) or isinstance(weights, (str, bytes)) or getattr(weights, "ndim", 1) == 0
    each = [weights] * len(names) if is_one else list(weights)  # type: ignore[arg-type]
    if len(each) != len(names) or len(set(names)) != len(names):
        raise ConfigError(f"weights must be a strength for each adapter, named once, got {each} for {list(names)}")
    return {name: check_strength(value, f"adapter {name!r}") for name, value in zip(names, each, strict=True)}


class _Strength:
    """An adapter's strength in one layer: a number, and a tensor of it, in which graphs see it change.

    Attributes:
        value: the number.
    """

    def __init__(self, value: float) -> None:
        self.value = value
        with torch.inference_mode(False):
            self._factor = torch.tensor(value, dtype=torch.float32, device="cpu")
        self._product: Tensor | None = None  # s · w of calls without gradients: its address stays

    def __reduce__(self) -> Any:
        return _Strength, (self.value,)

    @torch.no_grad()
    def set(self, value: float) -> None:
        self.value = value
        self._factor.fill_(value)

    def fit(self, kernel: Tensor) -> None:
        """Have the tensor, which keeps its value, where a kernel is that is not on meta, in the dtype that computes."""
        dtype = torch.promote_types(kernel.dtype, torch.float32)
        device = self._factor.device if kernel.is_meta else kernel.device
        if (self._factor.device, self._factor.dtype) != (device, dtype):
            with torch.inference_mode(False):
                self._factor = torch.tensor(self.value, dtype=dtype, device=device)

    def times(self, kernel: Tensor) -> Tensor:
        """s · w in at least float32, differentiable in w."""
        w = at_least_float32(kernel)
        factor = self._factor
        if torch.is_grad_enabled() or factor.device != w.device or _is_looked_at(w):
            # A backward pass counts what held in its forward pass, whatever has been set since.
            return w * (factor.clone() if w.requires_grad else factor).to(w.device)
        product, is_unwritten, keep = spectra.of_weight(kernel, self, partial(self._place, w))
        if is_unwritten:
            torch.mul(w, factor, out=product)
        if keep is not None:
            spectra.freeze([product])
            keep(product)
        return product

    def _place(self, w: Tensor) -> Tensor:
        """Memory for s · w, which rows' tables of addresses and captured graphs find again."""
        held = self._product
        if held is None or (held.shape, held.dtype, held.device) != (w.shape, w.dtype, w.device):
            held = spectra.lasting(partial(torch.empty_like, w), w.device, "memory for a kernel times its strength")
            self._product = held
        if spectra.captures(w.device) and torch.cuda.is_current_stream_capturing():
            _of_graphs.append(held)
        return held


def _is_looked_at(w: Tensor) -> bool:
    """Whether someone (a compiler, functorch, a tracer) follows what is computed with w."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or not is_plain(w)
    )


def times(kernels: tuple[Tensor, ...], strengths: Sequence[_Strength | None] | None) -> tuple[Tensor, ...]:
    """Kernels, each times its adapter's strength where it has one."""
    if strengths is None:
        return kernels
    return tuple(w if s is None else s.times(w) for w, s in zip(kernels, strengths, strict=True))


class _Scaling(MutableMapping[str, float]):
    """Adapter name → strength, of all adapters of a layer, as PEFT's LoRA layers have it."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getitem__(self, adapter: str) -> float:
        if adapter not in self._layer.c3a_kernel:
            raise KeyError(adapter)
        strength = self._layer._strengths.get(adapter)
        return 1.0 if strength is None else strength.value

    def __setitem__(self, adapter: str, value: float) -> None:
        self._layer._check_known(adapter)
        self._layer._set_strengths({adapter: value})

    def __delitem__(self, adapter: str) -> None:
        self[adapter] = 1.0

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.c3a_kernel)

    def __len__(self) -> int:
        return len(self._layer.c3a_kernel)

    def copy(self) -> dict[str, float]:
        """As a dict of its own."""
        return dict(self)

    def __repr__(self) -> str:
        return repr(self.copy())


class AppliedKernels(nn.Module):
    """The part of `C3ALinear` that knows which kernels it computes with, and how strong its adapters are."""

    c3a_kernel: nn.ParameterDict
    merged_adapters: list[str]
    _active_adapters: list[str]
    _disable_adapters: bool
    layer_name: str
    _kernels: tuple[Tensor, ...] | None
    _applied_strengths: tuple[_Strength | None, ...] | None
    # Of those adapters that ever had another one than 1. Replaced and never changed: copies of a layer may share it.
    _strengths: Mapping[str, _Strength] = {}

    @property
    def _label(self) -> str:
        return self.layer_name or type(self).__name__

    # What the forward reads

    def _refresh(self) -> None:
        """Set the tuple of parameters that the forward applies; None sends it the general way, which looks names up.

        It is called whenever parameters are exchanged, moved or switched, so what was derived from them goes too.
        """
        spectra.drop(self._stored_kernels())
        parameters = self.c3a_kernel._parameters
        for name, strength in self._strengths.items():
            if (kernel := parameters.get(name)) is not None:
                strength.fit(kernel)
        names = self._applied_names()
        found = [parameters.get(name) for name in names]
        kernels = tuple(kernel for kernel in found if kernel is not None)
        usable = len(kernels) == len(names) and all(w.dtype in _FUSED_DTYPES and not w.is_meta for w in kernels)
        self._kernels = kernels if usable else None
        strengths = tuple(map(self._strengths.get, names))
        self._applied_strengths = strengths if any(strengths) else None

    def _stored_kernels(self) -> list[Tensor]:
        return [kernel for kernel in self.c3a_kernel._parameters.values() if kernel is not None]

    def _applied_names(self) -> list[str]:
        """The active adapters of this layer that are not merged; none while adapters are disabled."""
        if self._disable_adapters:
            return []
        return [name for name in self._active_adapters if name in self.c3a_kernel and name not in self.merged_adapters]

    def _kernels_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """What is applied, on a device, in a dtype to compute in. By the tuple where it can be, not by names: compiled
        code is not compiled again for another adapter."""
        kernels = self._kernels
        if kernels is None or any(w.device != device or w.dtype not in _COMPUTED_DTYPES for w in kernels):
            return tuple(self._kernel_on(name, device) for name in self._applied_names())
        return times(kernels, self._applied_strengths)

    def _kernel_on(self, name: str, device: torch.device | None = None) -> Tensor:
        """An adapter's w times its strength, on a device (None: where it is kept) in a dtype to compute in."""
        kernel = stored_tensor(self.c3a_kernel, name)
        check_gathered(kernel)
        strength = self._strengths.get(name)
        kernel = kernel if strength is None else strength.times(kernel)
        kernel = kernel if device is None else kernel.to(device)
        return kernel if kernel.dtype in _COMPUTED_DTYPES else kernel.float()

    def freeze_for_inference(self, frozen: bool = True) -> None:
        """Keep what is derived from the adapters' parameters (their spectra) from one call to the next, or end that.

        Otherwise it is computed in every call, because nothing tells for sure whether a parameter has changed. Values
        that torch's in-place operations, `load_state_dict` or this library's methods write are seen. After any other
        write (through `.data`, or by a kernel of one's own) call this again. A parameter that becomes trainable, or is
        exchanged for another one, is no longer frozen; nor are those of a copy of the layer. Nothing is kept of layers
        of which each process computes a part (tensor parallelism).

        Args:
            frozen: freeze all adapters of the layer, whose parameters then want no gradient; or let go of what is kept.
        """
        kernels = self._stored_kernels()
        if not frozen:
            products = (strength._product for strength in self._strengths.values())
            spectra.thaw([*kernels, *(product for product in products if product is not None)])
            return
        for kernel in kernels:
            set_requires_grad(kernel, False)
        spectra.freeze(kernels)

    # Strengths

    @property
    def scaling(self) -> MutableMapping[str, float]:
        """Adapter name → strength, the factor of its ΔW; 1 unless it was set. Read it, or set it by name or whole.

        No file holds it. What is trained beside the kernels (`modules_to_save`, biases) has none. A backward pass
        counts what held in its forward pass; but leave it as it is until then where layers are computed again (gradient
        checkpointing) or compiled.

        Raises:
            AdapterNotFoundError: a name is set that the layer does not have. As a whole: such names are passed over,
                and those that are missing get 1.
            AdapterStateError, ConfigError: as `set_scale`.
        """
        return _Scaling(self)

    @scaling.setter
    def scaling(self, strengths: Mapping[str, float]) -> None:
        if not isinstance(strengths, Mapping):
            raise ConfigError(f"{self._label}: scaling must be a dict, adapter name → strength, got {strengths!r}")
        self._set_strengths({name: strengths.get(name, 1.0) for name in self.c3a_kernel})

    def set_scale(self, adapter: str, scale: float) -> None:
        """Give an adapter this strength, as PEFT's LoRA does; one that the layer does not have is passed over.

        Args:
            adapter: its name.
            scale: the factor of its ΔW; 1 is what was trained.

        Raises:
            AdapterStateError: the adapter is merged, with another strength.
            ConfigError: no finite number. In either case nothing has changed.
        """
        self._set_strengths({adapter: scale})

    def scale_layer(self, scale: float) -> None:
        """Multiply the strengths of the active adapters by a factor, as PEFT's LoRA does.

        Raises:
            AdapterStateError, ConfigError: as `set_scale`.
        """
        check_strength(scale, self._label)
        strengths = self.scaling
        self._set_strengths({name: strengths[name] * scale for name in self._active_adapters if name in strengths})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strengths of the active adapters by a factor, as PEFT's LoRA does; None makes them 1.

        Raises:
            AdapterStateError, ConfigError: as `set_scale`; a factor of 0.
        """
        if scale is not None and not check_strength(scale, self._label):
            raise ConfigError(f"{self._label}: strengths cannot be divided by 0; unscale_layer() makes them 1 again")
        strengths = self.scaling
        names = [name for name in self._active_adapters if name in strengths]
        self._set_strengths({name: 1.0 if scale is None else strengths[name] / scale for name in names})

    def check_strengths(self, strengths: Mapping[str, float]) -> dict[str, float]:
        """Those of these strengths whose adapters the layer has, as numbers.

        Raises:
            AdapterStateError, ConfigError: as `set_scale`.
        """
        checked = {name: check_strength(value, f"{self._label}, {name!r}") for name, value in strengths.items()}
        present = self.scaling
        for name in self.merged_adapters:
            if name in checked and checked[name] != present[name]:
                raise AdapterStateError(
                    f"{self._label}: {name!r} is merged with the strength {present[name]:g} and cannot get "
                    f"{checked[name]:g}; unmerge it first"
                )
        return {name: value for name, value in checked.items() if name in present}

    @uncompiled
    def _set_strengths(self, strengths: Mapping[str, float]) -> None:
        for name, value in self.check_strengths(strengths).items():
            if name in self._strengths:
                self._strengths[name].set(value)
            elif value != 1.0:
                self._strengths = {**self._strengths, name: _Strength(value)}
        self._refresh()

    def _forget_strength(self, adapter: str) -> None:
        """An adapter that is gone, or comes anew, has none."""
        if adapter in self._strengths:
            self._strengths = {name: strength for name, strength in self._strengths.items() if name != adapter}
            self._refresh()

    def _strengths_repr(self) -> str:
        strengths = {name: value for name, value in self.scaling.items() if value != 1.0}
        return f", scaling={strengths}" if strengths else ""
