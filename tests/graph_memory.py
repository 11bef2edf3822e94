"""A stand-in for the memory of CUDA graphs, on tensors of a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from c3a_triton.operator import spectra


class GraphMemory(TorchDispatchMode):
    """Has what the thread that enters it allocates, and only that: so do the graphs' pools of torch filter."""

    def __init__(self) -> None:
        super().__init__()
        self._allocated: dict[int | None, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = set(map(_address, tree_leaves((args, kwargs))))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in known:
                self._allocated[_address(tensor)] = tensor.untyped_storage()
        return result

    def __contains__(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._allocated


def _address(value: Any) -> int | None:
    storage = value.untyped_storage() if isinstance(value, Tensor) else value
    return storage.data_ptr() if isinstance(storage, torch.UntypedStorage) else None


class Capturing:
    """Whether a graph is being captured, as far as the package can tell."""

    on = False


@contextmanager
def on_cpu() -> Iterator[Capturing]:
    """Within it the package takes the CPU for a device whose calls can be captured."""
    capturing, stream = Capturing(), SimpleNamespace(cuda_stream=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "captures", lambda device: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.on)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        patch.setattr(torch.cuda, "stream", lambda entered: nullcontext(_expect(entered is stream)))
        patch.setattr(Tensor, "pin_memory", lambda self: self.clone())
        yield capturing


def _expect(condition: bool) -> None:
    assert condition
