"""A base layer's weight: where it is, how it is read, written, kept and brought back, and told from what it was.

Where accelerate keeps it elsewhere and leaves an empty one on meta, it is what accelerate keeps.
"""

from collections.abc import Hashable
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from c3a_triton.errors import AdapterStateError

from .experts import Spread, is_stored_transposed, parameter_geometry, spread
from .linear_like import computes_its_weight, geometry, is_transposed
from .parallel import Part, parallel_mesh, part_of
from .probe import is_ordinary
from .quantized import quantized_weight
from .sharded import is_partitioned, whole_shape

__all__ = [
    "WeightAccess",
    "as_weight",
    "fingerprint",
    "first_tensor",
    "kernel_device",
    "rounding_dtype",
    "stored_tensor",
    "unmergeable",
    "weight_access",
]

# Elements that a fingerprint multiplies at a time: the product should stay in a processor's cache.
_FINGERPRINT_ELEMENTS = 2**18


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


def first_tensor(base: nn.Module, parameter: str = "weight") -> Tensor | None:
    """A base layer's weight, or what stands in its place."""
    for name in (parameter, "qweight", "W_q"):
        tensor = getattr(base, name, None)
        if isinstance(tensor, Tensor):
            return tensor
    return next(chain(base.parameters(), base.buffers()), None)


def kernel_device(base: nn.Module, parameter: str = "weight") -> torch.device:
    """Where a base layer computes, and so where its adapters belong; meta for a layer that really is on meta."""
    hook = _offload_hook(base)
    if hook is not None and hook.execution_device is not None:
        device = hook.execution_device
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    tensor = first_tensor(base, parameter)
    return torch.device("cpu") if tensor is None else tensor.device


def rounding_dtype(base: nn.Module, parameter: str = "weight") -> torch.dtype | None:
    """The 16-bit dtype of a base layer, or None.

    PEFT passes fresh adapters through it on their way to float32, which decides their initial values.
    """
    tensor = first_tensor(base, parameter)
    dtype = getattr(base, "compute_dtype", None) or (None if tensor is None else tensor.dtype)
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


class WeightAccess(Protocol):
    """A base layer's weight as a matrix [out, in], or a stack of them, to be read, replaced, kept and brought back."""

    in_place: bool
    """Whether what `read` returns is the weight's own storage."""

    def place(self) -> Hashable | None:
        """Where the weight is in memory, equal for all layers that have this memory as their weight, if that counts."""

    def read(self) -> Tensor:
        """The weight, [out, in] or [stack, out, in]."""

    def write(self, weight: Tensor) -> None:
        """Replace the weight's values."""

    def keep(self, where: str) -> Tensor | nn.Module:
        """What `restore` needs to bring the present weight back bit for bit, on `"cpu"` or the weight's `"device"`."""

    def restore(self, kept: Tensor | nn.Module) -> None:
        """Bring back the weight that was kept."""


def _as_matrix(base: nn.Module, weight: Tensor, parameter: str = "") -> Tensor:
    """A layer's weight as [out, in]; a convolution's inputs are the channels of each tap, tap after tap."""
    if is_transposed(base) or (parameter and is_stored_transposed(base, parameter)):
        return weight.mT
    return weight.permute(0, 2, 3, 1).flatten(1) if isinstance(base, nn.Conv2d) else weight


def as_weight(base: nn.Module, matrix: Tensor, parameter: str = "") -> Tensor:
    """A matrix [out, in], or the stack of them that a parameter of this name is, in the order of its layer's weight."""
    if is_transposed(base) or (parameter and is_stored_transposed(base, parameter)):
        return matrix.mT
    if isinstance(base, nn.Conv2d):
        return matrix.unflatten(1, (*base.kernel_size, -1)).permute(0, 3, 1, 2)
    return matrix


class _PlainWeight:
    def __init__(self, base: nn.Module, parameter: str = "") -> None:
        self._base = base
        self._parameter = parameter
        self.in_place = not isinstance(base, nn.Conv2d)

    def _weight(self) -> Tensor:
        weight = self._base._parameters[self._parameter or "weight"].detach()  # type: ignore[union-attr]
        part = spread(self._base, self._parameter) if self._parameter else part_of(self._base)
        return part.of_weight(weight) if isinstance(part, (Part, Spread)) else weight

    def place(self) -> Hashable | None:
        weight = self._weight()
        return str(weight.device), weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride()

    def read(self) -> Tensor:
        return _as_matrix(self._base, self._weight(), self._parameter)

    def write(self, weight: Tensor) -> None:
        self._weight().copy_(as_weight(self._base, weight, self._parameter))

    def keep(self, where: str) -> Tensor:
        weight = self.read()
        return weight.to("cpu", copy=True) if where == "cpu" else weight.clone()

    def restore(self, kept: Tensor | nn.Module) -> None:
        assert isinstance(kept, Tensor)
        self.write(kept)


class _PartitionedWeight(_PlainWeight):
    """A weight that ZeRO-3 keeps in parts, and which has been put together when it is read, written, kept or restored.

    Of the original each process keeps a part: a whole one in each would be the model once for every process.
    """

    def place(self) -> Hashable | None:
        return "ZeRO-3", id(self._weight())  # in memory there are parts at most

    def _weight(self) -> Tensor:
        return self._base._parameters[self._parameter or "weight"]  # type: ignore[return-value]

    def _parts(self) -> tuple[Any, list[Tensor]]:
        """The group of the processes, and the part of each, as views of the weight."""
        weight = self._weight()
        group = weight.ds_process_group  # type: ignore[attr-defined]
        return group, list(weight.detach().view(-1).tensor_split(group.size()))

    def keep(self, where: str) -> Tensor:
        group, parts = self._parts()
        own = parts[group.rank()]
        return own.to("cpu", copy=True) if where == "cpu" else own.clone()

    def restore(self, kept: Tensor | nn.Module) -> None:
        assert isinstance(kept, Tensor)
        group, parts = self._parts()
        parts[group.rank()].copy_(kept)
        for rank, part in enumerate(parts):
            torch.distributed.broadcast(part, group=group, group_src=rank)


class _OffloadedWeight:
    """The weight in accelerate's map. It is replaced there, not changed: others may hold the tensor, or a file."""

    in_place = False

    def __init__(self, base: nn.Module, weights: Any, parameter: str = "") -> None:
        self._base = base
        self._weights = weights
        self._parameter = parameter

    def place(self) -> Hashable | None:
        return None  # what is written replaces this layer's alone

    def read(self) -> Tensor:
        return _as_matrix(self._base, self._weights[self._parameter or "weight"], self._parameter)

    def write(self, weight: Tensor) -> None:
        weights, key = self._weights, self._parameter or "weight"
        while hasattr(weights, "prefix") and hasattr(weights, "dataset"):
            weights, key = weights.dataset, weights.prefix + key
        # A loader looks at its tensors in memory before its files, which are the user's and stay as they are.
        weights = weights.state_dict if hasattr(weights, "index") else weights
        weights[key] = as_weight(self._base, weight, self._parameter).contiguous()

    def keep(self, where: str) -> Tensor:
        return self.read()

    def restore(self, kept: Tensor | nn.Module) -> None:
        assert isinstance(kept, Tensor)
        self.write(kept)


def unmergeable(base: nn.Module, parameter: str = "") -> str | None:
    """Why nothing can be added to the weight of a layer like this, wherever the weight is, or None.

    The weight of what is found here is one that a checkpoint holds as it is.

    Args:
        base: the base layer.
        parameter: the name of what is its weight, where a parameter is adapted by itself.
    """
    weight: Tensor | None = base._parameters.get(parameter or "weight")
    sizes = parameter_geometry(base, parameter) if parameter else geometry(base)
    expected: tuple[int, ...] | None = None if sizes is None else sizes.matrix_shape
    if weight is not None and is_partitioned(weight) and not weight.numel():
        weight = nn.Parameter(weight.new_empty(whole_shape(weight), device="meta"), requires_grad=False)
    part = spread(base, parameter) if parameter else part_of(base)
    if isinstance(part, (Part, Spread)) and weight is not None:
        weight, expected = part.of_weight(weight), part.shape
    if weight is None:
        return "its weight is not a parameter of its own"
    if not is_ordinary(weight):
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not an ordinary floating-point matrix"
    if not parameter and not computes_its_weight(base):
        return "its class computes a forward of its own, which is not the product with its weight"
    is_other = not parameter and weight.dim() != (4 if isinstance(base, nn.Conv2d) else 2)
    if is_other or _as_matrix(base, weight, parameter).shape != expected:
        return f"its weight has shape {tuple(weight.shape)}, which is not all of {expected}, as a sharded one has"
    return None


def weight_access(owner: Any) -> WeightAccess:
    """How the weight under an adapter layer is merged into.

    Args:
        owner: a layer with `base_layer`, `get_base_layer()` and `parameter`, the name of its weight where that is a
            parameter which is adapted by itself, or "".

    Raises:
        AdapterStateError: it cannot be; the message says why.
    """
    base = owner.get_base_layer()
    hook = _offload_hook(base)
    reason = unmergeable(base, owner.parameter)
    if reason is None:
        weight = base._parameters[owner.parameter or "weight"]
        if is_partitioned(weight):
            return _PartitionedWeight(base, owner.parameter)
        if not weight.is_meta:
            return _PlainWeight(base, owner.parameter)
        if hook is not None:  # while PEFT merges, it lends an offloaded layer its weight
            return _OffloadedWeight(base, hook.weights_map, owner.parameter)
        reason = "its weight is on the meta device and holds no values"
    weight = base._parameters.get(owner.parameter or "weight")
    if hasattr(weight, "full_tensor") and weight.device_mesh != parallel_mesh(base):
        raise AdapterStateError(
            f"nothing can be merged into this {type(base).__name__}: its weight is sharded (a DTensor with "
            f"{weight.placements}), as FSDP2 does it. Save the adapter, and merge it in a model that is not: "
            "load_adapter and merge_and_unload, or c3a-triton merge"
        )
    access: WeightAccess | str
    if any(map(is_partitioned, base.parameters())):
        access = "of parameters that ZeRO-3 keeps in parts only ordinary ones are merged into"
    elif not owner.parameter and part_of(base) is not None:
        access = "of a layer that is spread over processes only an ordinary weight is merged into"
    else:
        access = quantized_weight(owner)
    if not isinstance(access, str):
        return access
    raise AdapterStateError(
        f"nothing can be merged into this {type(base).__name__}: {reason}; {access}. Keep the adapter unmerged, or "
        "load the base model in 16 or 32 bits"
    )


def fingerprint(weight: Tensor) -> int:
    """A 64-bit hash of the bits of a matrix, or a stack of them, that depends on their positions, equal on all devices.

    A change of one element always shows, any other with probability 1 − 2⁻⁶⁴ or so. It reads the matrix once.
    """
    if not weight.numel():  # what a process has of a layer with fewer columns than there are processes
        return 0
    rows = weight.detach()
    rows = rows.mT if rows.mT.is_contiguous() and not rows.is_contiguous() else rows.contiguous()
    rows = rows.flatten(0, -2)
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
