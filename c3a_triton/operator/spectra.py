"""What outlives a call: the spectrum of x, for the next layer that reads the same x, and what is derived from frozen w.

Nothing here is needed for a right result: what is not found is computed. Two rules decide on what may be found.

*x.* Of `LEAST_SHARED` bytes or more, or where it is kept for a backward pass. One slot per device and stream: a
spectrum is written and read in the order of one queue. It serves the very tensor object that it was computed from, at
the same version and in the same memory, and each w once. Versions do not tell of writes through `.data`, by other
libraries' kernels or by a replayed graph; but a loop that refills its input in such a way comes back to a w that has
read it, and there everything begins anew. What remains is such a write between two layers that read the same x: tensors
that autograd has saved do not survive that either. x is held weakly. A slot is emptied by the next spectrum, by the
death of x, and at the end of a backward pass that used it.

*w.* Versions and addresses do not tell whether it has changed: FSDP2 and `.data` writes leave both as they are. So what
is derived from it is kept only for tensors declared frozen (`freeze`), until they want a gradient.

Neither is used while a CUDA graph is captured, which would keep the address and not the memory; while compiling; or for
tensors of inference mode, which have no version. Entries are replaced and never changed, so that threads need no lock.

What is kept for longer than a pass, here and by the launchers, is made by `lasting`.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import BackendError

__all__ = [
    "LEAST_SHARED",
    "Source",
    "captures",
    "drop",
    "freeze",
    "kept_input",
    "lasting",
    "of_input",
    "of_weight",
    "thaw",
]


Source = tuple[Tensor, Tensor]
"""Where the rows of a product come from: x, the tensor that the caller has, because what is a view of it, or a cast, is
another object in every call; and the kernel on whose behalf it is read."""

LEAST_SHARED = 1 << 20
"""Bytes of an x whose spectrum is worth keeping for others: to read it again and write its spectrum takes a GPU half a
microsecond then, where Python needs several to keep it and to find it."""


class _Entry(NamedTuple):
    x: "weakref.ref[Tensor]"  # whose death empties the slot: until then no other tensor has x's id
    state: Hashable
    readers: set[int]  # ids of the w's that it has served
    spectrum: Tensor


_Slot = tuple[int, int]  # of a GPU and a stream
_ON_CPU = -1, 0
_slots: dict[_Slot, _Entry] = {}
# Of each slot, the last backward pass that is going to empty it.
_emptied_by: dict[_Slot, int] = {}
# Frozen w → (what is derived, slot) → (state of w, value).
_frozen: WeakIdKeyDictionary = WeakIdKeyDictionary()

_Made = TypeVar("_Made")


def captures(device: torch.device) -> bool:
    """Whether calls on this device can be captured in graphs."""
    return device.type == "cuda"


def lasting(make: Callable[[], _Made], device: torch.device, what: str) -> _Made:
    """What `make` returns, ordinary tensors in memory that no CUDA graph owns, for whoever keeps it beyond the call.

    While compiled code is warmed up for its graphs (`mode="reduce-overhead"`), all that its thread allocates lies in
    the graphs' memory, where torch takes whatever it does not know for an error. Only that thread's: so another one
    makes it, on the current stream.

    Args:
        make: allocates on the current stream of `device`; it must launch no kernel of ours.
        device: where the tensors are.
        what: names them in the error, "the DFT basis of length 64" for instance.

    Raises:
        BackendError: a CUDA graph is being captured, whose memory it would be.
    """

    def made() -> _Made:
        with torch.inference_mode(False), torch.no_grad():
            return make()

    if not captures(device):
        return made()
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            f"a CUDA graph is being captured, and {what} is missing, which outlives it: make the same call once before "
            "(the same sizes, dtypes and adapter names), then capture"
        )
    stream = torch.cuda.current_stream(device)

    def on_stream() -> _Made:
        with torch.cuda.stream(stream):
            return made()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_stream).result()


def of_input(source: Source, what: Hashable) -> tuple[Tensor | None, Callable[[Tensor], None] | None]:
    """The spectrum of `source.x`, which is not to be written to, or what keeps it for others that read the same x.

    Args:
        source: whose spectrum, and who asks.
        what: everything but x that decides on the spectrum.

    Returns:
        One of both, or neither where nothing is kept.
    """
    x, w = source
    slot = _slot(x)
    if slot is None:
        return None, None
    task = torch._C._current_graph_task_id()
    if task != -1 and _emptied_by.get(slot) != task:
        _empty_after_backward(slot, task)
    state, reader = (what, id(x), _state(x)), id(w)
    entry = _slots.get(slot)
    if entry is not None:
        if entry.state == state and reader not in entry.readers:
            entry.readers.add(reader)
            return entry.spectrum, None
        del entry
        _slots.pop(slot, None)  # before memory for the next spectrum is asked for
    return None, functools.partial(_keep, slot, x, state, reader)


def _keep(slot: _Slot, x: Tensor, state: Hashable, reader: int, spectrum: Tensor) -> None:
    # As the constructor does, in one frame less.
    entry = tuple.__new__(_Entry, (weakref.ref(x, functools.partial(_empty, slot)), state, {reader}, spectrum))
    _slots[slot] = entry


def kept_input(x: Tensor, what: Hashable) -> Tensor | None:
    """The spectrum of x if it is the one that is kept, whoever has read it."""
    slot = _slot(x)
    entry = None if slot is None else _slots.get(slot)
    return entry.spectrum if entry is not None and entry.state == (what, id(x), _state(x)) else None


def of_weight(
    w: Tensor, what: Hashable, allocate: Callable[[], Tensor]
) -> tuple[Tensor, bool, Callable[[Tensor], None] | None]:
    """Memory for what is derived from w, whether it is to be written, and what keeps it then, if w is frozen.

    Args:
        w: the kernel.
        what: everything but w that decides on the result.
        allocate: makes the tensor, on w's device.
    """
    kept = _frozen.get(w) if len(_frozen.data) else None
    if kept is None:
        return allocate(), True, None
    if w.requires_grad:
        thaw((w,))
        return allocate(), True, None
    slot = _slot(w)
    if slot is None:
        return allocate(), True, None
    state = _state(w)
    known = kept.get((what, slot))
    if known is not None and known[0] == state:
        return known[1], False, None

    def keep(derived: Tensor) -> None:
        kept[what, slot] = (state, derived)

    return lasting(allocate, w.device, "a frozen spectrum"), True, keep


def freeze(kernels: Iterable[Tensor]) -> None:
    """Declare that these tensors change only through torch's in-place operations, or `drop` is called."""
    for w in kernels:
        _frozen[w] = {}


def thaw(kernels: Iterable[Tensor]) -> None:
    """Take `freeze` back."""
    for w in kernels:
        _frozen.pop(w, None)


def drop(kernels: Iterable[Tensor]) -> None:
    """Forget what was derived from those of these tensors that are frozen; they stay so."""
    if len(_frozen.data):
        freeze(w for w in kernels if w in _frozen)


def _slot(tensor: Tensor) -> _Slot | None:
    """Where something made of `tensor` may be kept; None where it may not."""
    if tensor.is_inference() or torch.compiler.is_compiling():
        return None
    if not tensor.is_cuda:
        return _ON_CPU
    if torch.cuda.is_current_stream_capturing():
        return None
    # As `torch.cuda.current_stream(device).cuda_stream`, without making an object of it.
    index = tensor.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def _empty(slot: _Slot, dead: "weakref.ref[Tensor] | None" = None) -> None:
    _slots.pop(slot, None)


def _state(tensor: Tensor) -> tuple[Hashable, ...]:
    # An assignment to `.data` changes memory and strides, but not the version.
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride()


def _empty_after_backward(slot: _Slot, task: int) -> None:
    """Have the present backward pass empty the slot when it is done. One that fails does not."""
    _emptied_by[slot] = task
    Variable._execution_engine.queue_callback(functools.partial(_empty, slot))
