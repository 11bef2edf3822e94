"""What a base layer is: its widths, whether the fused step may read its weight, and how its weight is merged into.

Of linear layers four kinds are told apart. *Plain*: an `nn.Linear` with an ordinary weight, the only kind whose weight
the fused step reads. *Transposed*: transformers' `Conv1D`, whose weight is [in, out]. *Offloaded*: either of them while
accelerate keeps the weight elsewhere and leaves an empty one on meta. *Foreign*: anything else with an input and an
output width, quantized layers among them, which only its own forward can compute. Beside them there are `nn.Conv2d` and
`nn.Embedding`, whose weights are matrices too, in an order of their own.
"""

import importlib
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import Parameter

from c3a_triton.errors import AdapterStateError

from .probe import behaviour
from .quantized import quantized_weight, registered

__all__ = [
    "Geometry",
    "WeightAccess",
    "as_weight",
    "computes_its_weight",
    "fingerprint",
    "first_tensor",
    "gather_with",
    "gathered",
    "geometry",
    "is_linear",
    "is_partitioned",
    "is_plain",
    "is_sharded",
    "is_transposed",
    "kernel_device",
    "linear_widths",
    "rounding_dtype",
    "stored_tensor",
    "unfit_for_adapters",
    "unmergeable",
    "weight_access",
    "whole",
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
    known = registered(module)
    if known is not None and known.widths is not None:
        return known.widths(module)
    if is_transposed(module):
        weight = module.weight
        return (weight.shape[0], weight.shape[1]) if isinstance(weight, Tensor) and weight.dim() == 2 else None
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        widths = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(width, int) and width > 0 for width in widths):
            return widths  # type: ignore[return-value]
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether `"all-linear"` means a module: a linear layer of torch or transformers, registered, or quantized.

    GPTQ's, AWQ's and HQQ's layers are of many classes; what they share are the names of their packed weights.
    """
    if isinstance(module, nn.Linear) or is_transposed(module):
        return True
    packed = any(isinstance(getattr(module, name, None), Tensor) for name in ("qweight", "W_q"))
    return (packed or registered(module) is not None) and linear_widths(module) is not None


@dataclass(frozen=True)
class Geometry:
    """The matrix [out_features, in_features] that a layer's ΔW is added to, and what its blocks have to divide.

    Attributes:
        kind: `"linear"`, `"conv2d"` or `"embedding"`.
        in_features, out_features: the matrix's sizes; the kernel's are [⌈out_features / b⌉, in_features / b, b].
        divided: the two numbers that b has to divide.
        what: what they are, for messages, where they are not the two widths.
    """

    kind: str
    in_features: int
    out_features: int
    divided: tuple[int, int]
    what: str = ""

    def kernel_shape(self, block_size: int) -> tuple[int, int, int]:
        """The shape of w."""
        return -(-self.out_features // block_size), self.in_features // block_size, block_size


def geometry(module: nn.Module) -> Geometry | None:
    """The geometry of a module that can be adapted, or None for any other."""
    if isinstance(module, nn.Conv2d) and module.in_channels > 0:  # a lazy one does not know its channels yet
        channels = module.in_channels // module.groups, module.out_channels // module.groups
        taps = module.kernel_size[0] * module.kernel_size[1]
        what = " (channels of a group)" if module.groups > 1 else " (channels)"
        return Geometry("conv2d", taps * channels[0], module.out_channels, channels, what)
    if isinstance(module, nn.Embedding):
        width = module.embedding_dim
        return Geometry("embedding", width, module.num_embeddings, (width, width), " (embedding_dim)")
    widths = linear_widths(module)
    return None if widths is None else Geometry("linear", *widths, widths)


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
    """Whether each process holds a part of a tensor: a DTensor, whose module is not imported for that, or ZeRO-3's."""
    return hasattr(tensor, "full_tensor") or is_partitioned(tensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter in the care of DeepSpeed's ZeRO-3, which leaves it empty between uses."""
    return hasattr(tensor, "ds_id")


def _zero() -> Any:
    # Whoever has one of its parameters has DeepSpeed.
    return importlib.import_module("deepspeed").zero


@contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within it parameters that ZeRO-3 leaves empty are put together, for which every process has to enter."""
    parts = [parameter for parameter in parameters if is_partitioned(parameter) and not parameter.numel()]
    if not parts:
        yield
        return
    with _zero().GatheredParameters(parts):
        yield


def gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, for which every process has to ask; any other as it is."""
    if not is_partitioned(tensor):
        return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    with whole([tensor]):
        return tensor.detach().clone()


def gather_with(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Let ZeRO-3 put these parameters together now, in `module`'s forward, and before and after it from then on.

    By itself it does so for the parameters of each module that is called, which a container of parameters never is.
    """
    for parameter in parameters:
        if is_partitioned(parameter) and not parameter.numel():
            _zero().register_external_parameter(module, parameter)
            parameter.all_gather()  # type: ignore[attr-defined]


def first_tensor(base: nn.Module) -> Tensor | None:
    """A base layer's weight, or what stands in its place."""
    for name in ("weight", "qweight", "W_q"):
        tensor = getattr(base, name, None)
        if isinstance(tensor, Tensor):
            return tensor
    return next(chain(base.parameters(), base.buffers()), None)


def kernel_device(base: nn.Module) -> torch.device:
    """Where a base layer computes, and so where its adapters belong; meta for a layer that really is on meta."""
    hook = _offload_hook(base)
    if hook is not None and hook.execution_device is not None:
        device = hook.execution_device
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    tensor = first_tensor(base)
    return torch.device("cpu") if tensor is None else tensor.device


def rounding_dtype(base: nn.Module) -> torch.dtype | None:
    """The 16-bit dtype of a base layer, or None.

    PEFT passes fresh adapters through it on their way to float32, which decides their initial values.
    """
    tensor = first_tensor(base)
    dtype = getattr(base, "compute_dtype", None) or (None if tensor is None else tensor.dtype)
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


class WeightAccess(Protocol):
    """A base layer's weight as a matrix [out, in] that can be read, replaced, kept and brought back."""

    in_place: bool
    """Whether what `read` returns is the weight's own storage."""

    def place(self) -> Hashable | None:
        """Where the weight is in memory, equal for all layers that have this memory as their weight, if that counts."""

    def read(self) -> Tensor:
        """The weight, [out, in]."""

    def write(self, weight: Tensor) -> None:
        """Replace the weight's values."""

    def keep(self, where: str) -> Tensor | nn.Module:
        """What `restore` needs to bring the present weight back bit for bit, on `"cpu"` or the weight's `"device"`."""

    def restore(self, kept: Tensor | nn.Module) -> None:
        """Bring back the weight that was kept."""


def _as_matrix(base: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as [out, in]; a convolution's inputs are the channels of each tap, tap after tap."""
    if is_transposed(base):
        return weight.t()
    return weight.permute(0, 2, 3, 1).flatten(1) if isinstance(base, nn.Conv2d) else weight


def as_weight(base: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [out, in] in the order of its layer's weight."""
    if is_transposed(base):
        return matrix.t()
    if isinstance(base, nn.Conv2d):
        return matrix.unflatten(1, (*base.kernel_size, -1)).permute(0, 3, 1, 2)
    return matrix


class _PlainWeight:
    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self.in_place = not isinstance(base, nn.Conv2d)

    def _weight(self) -> Tensor:
        return self._base._parameters["weight"].detach()  # type: ignore[union-attr]

    def place(self) -> Hashable | None:
        weight = self._weight()
        return str(weight.device), weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride()

    def read(self) -> Tensor:
        return _as_matrix(self._base, self._weight())

    def write(self, weight: Tensor) -> None:
        self._weight().copy_(as_weight(self._base, weight))

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
        self._base = base
        self._weights = weights

    def place(self) -> Hashable | None:
        return None  # what is written replaces this layer's alone

    def read(self) -> Tensor:
        return _as_matrix(self._base, self._weights["weight"])

    def write(self, weight: Tensor) -> None:
        weights, key = self._weights, "weight"
        while hasattr(weights, "prefix") and hasattr(weights, "dataset"):
            weights, key = weights.dataset, weights.prefix + key
        # A loader looks at its tensors in memory before its files, which are the user's and stay as they are.
        weights = weights.state_dict if hasattr(weights, "index") else weights
        weights[key] = as_weight(self._base, weight).contiguous()

    def keep(self, where: str) -> Tensor:
        return self.read()

    def restore(self, kept: Tensor | nn.Module) -> None:
        assert isinstance(kept, Tensor)
        self.write(kept)


def computes_its_weight(base: nn.Module) -> bool:
    """Whether a layer computes the product with its weight, whatever that is multiplied by, and nothing else.

    A layer's values do not matter: one on meta is told as well.
    """
    return is_transposed(base) or behaviour(base).kind == "product"


def unfit_for_adapters(base: nn.Module) -> str | None:
    """Why nothing can be computed beside a layer (a router, an embedding of positions), as a sentence, or None."""
    reason = behaviour(base).reason
    return f"this {type(base).__name__} cannot be adapted: {reason}" if reason else None


def unmergeable(base: nn.Module) -> str | None:
    """Why nothing can be added to the weight of a layer like this, wherever the weight is, or None.

    The weight of what is found here is one that a checkpoint holds as it is.
    """
    weight = base._parameters.get("weight")
    sizes = geometry(base)
    expected = None if sizes is None else (sizes.out_features, sizes.in_features)
    if weight is None:
        return "its weight is not a parameter of its own"
    if type(weight) not in _ORDINARY or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not an ordinary floating-point matrix"
    if not computes_its_weight(base):
        return "its class computes a forward of its own, which is not the product with its weight"
    if weight.dim() != (4 if isinstance(base, nn.Conv2d) else 2) or _as_matrix(base, weight).shape != expected:
        return f"its weight has shape {tuple(weight.shape)}, which is not all of {expected}, as a sharded one has"
    return None


def weight_access(owner: Any) -> WeightAccess:
    """How the weight under an adapter layer is merged into.

    Args:
        owner: a layer with `base_layer` and `get_base_layer()`.

    Raises:
        AdapterStateError: it cannot be; the message says why.
    """
    base = owner.get_base_layer()
    hook = _offload_hook(base)
    reason = unmergeable(base)
    if reason is None:
        if not base._parameters["weight"].is_meta:
            return _PlainWeight(base)
        if hook is not None:  # while PEFT merges, it lends an offloaded layer its weight
            return _OffloadedWeight(base, hook.weights_map)
        reason = "its weight is on the meta device and holds no values"
    access = quantized_weight(owner)
    if not isinstance(access, str):
        return access
    raise AdapterStateError(
        f"nothing can be merged into this {type(base).__name__}: {reason}; {access}. Keep the adapter unmerged, or "
        "load the base model in 16 or 32 bits"
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
