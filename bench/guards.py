"""Memory in which a kernel cannot reach past its tensors unnoticed.

A guarded tensor lies in the middle of a larger buffer that is filled with 0xFF bytes, which are NaN in every floating
dtype. What a kernel reads beyond the tensor, or before somebody has written it, shows in its results; what it writes
there changes the filling. Allocators are replaced where the package looks them up, not by a mode of torch: modes do not
reach into custom ops, nor into the threads in which CUDA's backward passes run.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ["GUARD", "Memory", "guarded"]

# Bytes before and behind a tensor: whole tiles of the kernels' rows, and a multiple of the 512 on which torch's
# allocations begin, so that a guarded tensor is aligned as any other.
GUARD = 1 << 16
_FILLING = 0xFF
_PACKAGE = "c3a_triton"
# What allocates in the package, and what copies there: kernels read copies, too.
_ALLOCATORS: tuple[tuple[Any, str], ...] = (
    *((torch, name) for name in ("empty", "empty_like", "empty_strided")),
    (torch.Tensor, "new_empty"),
)
_COPIERS: tuple[tuple[Any, str], ...] = tuple((torch.Tensor, name) for name in ("contiguous", "clone", "to"))


@dataclass(frozen=True)
class _Buffer:
    """The bytes around one tensor."""

    what: str
    filled: Tensor
    start: int  # of the tensor, in bytes
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def tensor(self, filled: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor's elements in `filled`: not a view, which autograd would follow."""
        empty = torch.tensor([], dtype=dtype, device=filled.device)
        return empty.set_(filled.untyped_storage(), self.start // dtype.itemsize, self.shape, self.stride)

    def damage(self) -> str | None:
        """The first byte outside the tensor's elements, between its rows too, that is not as it was filled."""
        after = self.filled.clone()
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.dtype.itemsize]
        self.tensor(after, bits).fill_(_FILLING if bits == torch.uint8 else -1)
        changed = (after != _FILLING).nonzero().flatten()
        if not len(changed):
            return None
        extent = _extent(self.shape, self.stride) * self.dtype.itemsize
        first = int(changed[0]) - self.start
        if first < 0:
            place = f"{-first} before it"
        else:
            place = f"{first - extent} behind its end" if first >= extent else "between its rows"
        return f"{len(changed)} bytes written outside of {self.what}, the first {place}"


class Memory:
    """Tensors, each with a guard around it."""

    def __init__(self, guard: int = GUARD) -> None:
        """With a guard of 0 bytes a tensor has an allocation of exactly its size, whose ends other tools watch."""
        self._guard = guard
        self._buffers: list[_Buffer] = []

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        what: str,
        *,
        stride: Sequence[int] | None = None,
        skip: int = 0,
    ) -> Tensor:
        """A tensor filled with NaN.

        Args:
            shape: of the tensor.
            dtype: of the tensor.
            device: of the tensor.
            what: its name, for what `damage` says.
            stride: in elements; contiguous by default. What lies between rows is guarded.
            skip: elements from an aligned address to the tensor.
        """
        shape = torch.Size(shape)
        stride = tuple(torch.empty(shape, device="meta").stride() if stride is None else stride)
        start = self._guard + skip * dtype.itemsize
        n_bytes = start + _extent(shape, stride) * dtype.itemsize + self._guard
        filled = torch.full((n_bytes,), _FILLING, dtype=torch.uint8, device=device)
        buffer = _Buffer(f"{what} {list(shape)} {dtype}", filled, start, dtype, shape, stride)
        self._buffers.append(buffer)
        tensor = buffer.tensor(filled, dtype)
        # Another NaN than the filling: a CPU hands its bits on to what is computed from it and written outside.
        return tensor.fill_(torch.nan) if dtype.is_floating_point else tensor

    def like(self, tensor: Tensor, what: str) -> Tensor:
        """`empty` of a tensor's shape, dtype, device and strides."""
        return self.empty(tensor.shape, tensor.dtype, tensor.device, what, stride=tensor.stride())

    def damage(self) -> list[str]:
        """What was written outside of the tensors made so far, a line for each of them that it befell."""
        return [found for buffer in self._buffers if (found := buffer.damage()) is not None]


def _extent(shape: torch.Size, stride: Sequence[int]) -> int:
    """Elements from the first to behind the last."""
    return 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


@contextmanager
def guarded(memory: Memory) -> Iterator[None]:
    """Within it, what the package allocates or copies lies in `memory`."""
    with ExitStack() as stack:
        for owner, name in (*_ALLOCATORS, *_COPIERS):
            replacement = _between_guards(memory, getattr(owner, name), name, copies=(owner, name) in _COPIERS)
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _between_guards(
    memory: Memory, function: Callable[..., Tensor], name: str, *, copies: bool
) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def replacement(*args: Any, **kwargs: Any) -> Tensor:
        tensor = function(*args, **kwargs)
        caller = sys._getframe(1)
        kept = copies and tensor is args[0]
        if kept or tensor.is_meta or not caller.f_globals.get("__name__", "").startswith(_PACKAGE + "."):
            return tensor
        result = memory.like(tensor, f"what {caller.f_code.co_name} has from {name}:")
        return result.copy_(tensor) if copies else result

    return replacement
