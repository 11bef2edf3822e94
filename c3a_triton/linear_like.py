"""What a base layer is: its widths, whether the fused step may read its weight, and how its weight is merged into.

Four kinds are told apart. *Plain*: an `nn.Linear` with an ordinary weight, the only kind whose weight the fused step
reads. *Transposed*: transformers' `Conv1D`, whose weight is [in, out]. *Offloaded*: either of them while accelerate
keeps the weight elsewhere and leaves an empty one on meta. *Foreign*: anything else with an input and an output width,
quantized layers among them, which only its own forward can compute.
"""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import Parameter

from .errors import AdapterStateError

__all__ = [
    "WeightAccess",
    "fingerprint",
    "gathered",
    "is_plain",
    "is_sharded",
    "is_transposed",
    "kernel_device",
    "linear_widths",
    "rounding_dtype",
    "stored_tensor",
    "weight_access",
]

_ORDINARY = (Parameter, Tensor)
# Elements that a fingerprint multiplies at a time: the product should stay in a processor's cache.
_FINGERPRINT_ELEMENTS = 2**18


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, told by its class's origin so that transformers is not imported."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear-like module, or None where it is none."""
    if is_transposed(module):
        weight = module.weight
        return (weight.shape[0], weight.shape[1]) if isinstance(weight, Tensor) and weight.dim() == 2 else None
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        widths = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(width, int) and width > 0 for width in widths):
            return widths  # type: ignore[return-value]
    return None


def is_plain(base: nn.Module, x: Tensor) -> bool:
    """Whether base(x) is provably x Wᵀ + bias of the layer's own tensors, so that the fused step may compute it.

    Asked at every forward, because hooks and offloading come and go. Parametrized layers are of another class.
    """
    if type(base) is not nn.Linear:
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return False
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return False
    # accelerate replaces `forward` on the instance, as anyone may, and puts the method itself there when it is done.
    forward = base.__dict__.get("forward")
    if "_hf_hook" in base.__dict__ or not (forward is None or getattr(forward, "__func__", None) is nn.Linear.forward):
        return False
    weight = base._parameters.get("weight")
    return (type(weight) is Parameter or type(weight) is Tensor) and weight.device == x.device


def _offload_hook(module: nn.Module) -> Any:
    """accelerate's hook that brings the module's tensors for each forward, or None."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "offload", False) and getattr(part, "weights_map", None) is not None:
            return part
    return None


def stored_tensor(module: nn.Module, name: str) -> Tensor:
    """A module's tensor; where accelerate has offloaded it, the one that it keeps."""
    tensor = getattr(module, name)
    if tensor.is_meta and (hook := _offload_hook(module)) is not None:
        return hook.weights_map[name]
    return tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is torch's DTensor, of which each process holds a part. Its module is not imported for that."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, for which every process has to ask; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _first_tensor(base: nn.Module) -> Tensor | None:
    """A base layer's weight, or what stands in its place."""
    for name in ("weight", "qweight", "W_q"):
        tensor = getattr(base, name, None)
        if isinstance(tensor, Tensor):
            return tensor
    return next(base.parameters(), None)


def kernel_device(base: nn.Module) -> torch.device:
    """Where a base layer computes, and so where its adapters belong; meta for a layer that really is on meta."""
    hook = _offload_hook(base)
    if hook is not None and hook.execution_device is not None:
        device = hook.execution_device
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    tensor = _first_tensor(base)
    return torch.device("cpu") if tensor is None else tensor.device


def rounding_dtype(base: nn.Module) -> torch.dtype | None:
    """The 16-bit dtype of a base layer, or None.

    PEFT passes fresh adapters through it on their way to float32, which decides their initial values.
    """
    tensor = _first_tensor(base)
    dtype = getattr(base, "compute_dtype", None) or (None if tensor is None else tensor.dtype)
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


class WeightAccess(Protocol):
    """A base layer's weight as a matrix [out, in] that can be read, replaced, kept and brought back."""

    in_place: bool
    """Whether what `read` returns is the weight's own storage."""

    def read(self) -> Tensor:
        """The weight, [out, in]."""

    def write(self, weight: Tensor) -> None:
        """Replace the weight's values."""

    def keep(self, where: str) -> Tensor | nn.Module:
        """What `restore` needs to bring the present weight back bit for bit, on `"cpu"` or the weight's `"device"`."""

    def restore(self, kept: Tensor | nn.Module) -> None:
        """Bring back the weight that was kept."""


class _PlainWeight:
    in_place = True

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._transposed = is_transposed(base)

    def read(self) -> Tensor:
        weight = self._base._parameters["weight"].detach()  # type: ignore[union-attr]
        return weight.t() if self._transposed else weight

    def write(self, weight: Tensor) -> None:
        self.read().copy_(weight)

    def keep(self, where: str) -> Tensor:
        weight = self.read()
        return weight.to("cpu", copy=True) if where == "cpu" else weight.clone()

    def restore(self, kept: Tensor | nn.Module) -> None:
        assert isinstance(kept, Tensor)
        self.write(kept)


class _OffloadedWeight:
    """The weight in accelerate's map. It is replaced there, not changed: others may hold the tensor, or a file."""

    in_place = False

    def __init__(self, base: nn.Module, weights: Any) -> None:
        self._weights = weights
        self._transposed = is_transposed(base)

    def read(self) -> Tensor:
        weight = self._weights["weight"]
        return weight.t() if self._transposed else weight

    def write(self, weight: Tensor) -> None:
        weights, key = self._weights, "weight"
        while hasattr(weights, "prefix") and hasattr(weights, "dataset"):
            weights, key = weights.dataset, weights.prefix + key
        # A loader looks at its tensors in memory before its files, which are the user's and stay as they are.
        weights = weights.state_dict if hasattr(weights, "index") else weights
        weights[key] = (weight.t() if self._transposed else weight).contiguous()

    def keep(self, where: str) -> Tensor:
        return self.read()

    def restore(self, kept: Tensor | nn.Module) -> None:
        assert isinstance(kept, Tensor)
        self.write(kept)


class _QuantizedWeight:
    """A quantized weight, through PEFT's knowledge of its library. What is kept is a copy of the whole base layer."""

    in_place = False

    def __init__(self, owner: Any, backend: Any) -> None:
        self._owner = owner
        self._backend = backend

    def read(self) -> Tensor:
        return self._backend.get_base_weight(self._owner.get_base_layer()).detach()

    def write(self, weight: Tensor) -> None:
        self._backend.set_base_weight(self._owner, weight)

    def keep(self, where: str) -> nn.Module:
        return copy.deepcopy(self._owner.get_base_layer())

    def restore(self, kept: Tensor | nn.Module) -> None:
        assert isinstance(kept, nn.Module)
        self._owner.base_layer = kept


def _quantization_backend(base: nn.Module) -> Any:
    """PEFT's way to change this kind of quantized layer; None where there is none, or no PEFT of 0.20 or later."""
    try:
        from peft.utils.quantization_utils import resolve_quantization_backend
    except ImportError:
        return None
    try:
        return resolve_quantization_backend(base)
    except ValueError:
        return None


def weight_access(owner: Any) -> WeightAccess:
    """How the weight under an adapter layer is merged into.

    Args:
        owner: a layer with `base_layer` and `get_base_layer()`.

    Raises:
        AdapterStateError: it cannot be; the message says why.
    """
    base = owner.get_base_layer()
    weight = base._parameters.get("weight")
    hook = _offload_hook(base)
    widths = linear_widths(base)
    expected = None if widths is None else widths if is_transposed(base) else widths[::-1]
    if weight is None:
        reason = "its weight is not a parameter of its own"
    elif type(weight) not in _ORDINARY or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        reason = f"its weight is a {type(weight).__name__} of {weight.dtype}, not an ordinary floating-point matrix"
    elif not (is_transposed(base) or type(base).forward is nn.Linear.forward):
        reason = "its class computes a forward of its own, which need not be a product with its weight"
    elif tuple(weight.shape) != expected:
        reason = f"its weight has shape {tuple(weight.shape)} instead of {expected}, as a sharded one has"
    elif hook is not None:
        return _OffloadedWeight(base, hook.weights_map)
    elif weight.is_meta:
        reason = "its weight is on the meta device and holds no values"
    else:
        return _PlainWeight(base)
    backend = _quantization_backend(base)
    if backend is not None and backend.supports_merge:
        return _QuantizedWeight(owner, backend)
    raise AdapterStateError(
        f"nothing can be merged into this {type(base).__name__}: {reason}. Keep the adapter unmerged, or load the base "
        "model in 16 or 32 bits"
    )


def fingerprint(weight: Tensor) -> int:
    """A 64-bit hash of a matrix's bits that depends on their positions, equal on all devices.

    A change of one element always shows, any other with probability 1 − 2⁻⁶⁴ or so. It reads the matrix once.
    """
    rows = weight.detach()
    rows = rows.t() if rows.t().is_contiguous() and not rows.is_contiguous() else rows.contiguous()
    if rows.shape[1] * rows.dtype.itemsize % 8 == 0:
        # Eight bytes at a time: cheaper on a CPU than widening each element.
        rows = (
            rows if rows.data_ptr() % 8 == 0 and rows.storage_offset() * rows.dtype.itemsize % 8 == 0 else rows.clone()
        )
        bits = rows.view(torch.int64)
    else:
        bits = rows.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.dtype.itemsize])
    n_rows, n_columns = bits.shape
    row_keys, column_keys = _odd_keys(n_rows, bits.device), _odd_keys(n_columns, bits.device)
    step = max(1, _FINGERPRINT_ELEMENTS // max(n_columns, 1))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part, keys in zip(bits.split(step), row_keys.split(step), strict=True):
        total += ((part.to(torch.int64) * column_keys).sum(dim=1) * keys).sum()
    return int(total)


def _odd_keys(count: int, device: torch.device) -> Tensor:
    """Scattered odd int64 numbers: multiplying by one modulo 2⁶⁴ loses nothing."""
    keys = torch.arange(1, count + 1, dtype=torch.int64, device=device) * -7046029254386353131
    keys = (keys ^ (keys >> 30)) * -4658895280553007687
    keys = (keys ^ (keys >> 27)) * -7723592293110705685
    return (keys ^ (keys >> 31)) | 1
