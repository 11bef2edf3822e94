"""The product as ordinary torch operations, for tracers that record those alone: TorchScript's, and ONNX's exporters.

A tracer takes sizes for tensors and knows neither `autograd.Function`s nor this library's ops. What is recorded here is
the dense product, with ΔW built from w by one gather: right for other numbers of tokens than the traced one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import compute_dtype_of

__all__ = ["circulant_matrix", "is_tracing", "linear"]


def is_tracing() -> bool:
    """Whether torch.jit.trace, or an exporter to ONNX, records what is computed."""
    return torch._C._get_tracing_state() is not None or torch.onnx.is_in_onnx_export()


def circulant_matrix(w: Tensor, scale: float | None, dtype: torch.dtype | None = None) -> Tensor:
    """ΔW of `reference.circulant_matrix`; a scale of None is 1 / in_features."""
    with _unrecorded():
        # Of a parameter, which no input changes: numbers, and a constant.
        out_blocks, in_blocks, b = w.shape
        index = torch.tensor([(p - j) % b for j in range(b) for p in range(b)], device=w.device)
    scale = 1.0 / (in_blocks * b) if scale is None else scale
    blocks = w.index_select(2, index).view(out_blocks, in_blocks, b, b)
    matrix = (blocks * scale).permute(0, 2, 1, 3).reshape(out_blocks * b, in_blocks * b)
    return matrix if dtype is None else matrix.to(dtype)


def linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kernels: Sequence[Tensor], scale: float | None
) -> Tensor:
    """x Wᵀ + bias + Σ_a x ΔW_aᵀ, as `ops.c3a_linear`, in x's dtype."""
    y = None if weight is None else F.linear(x, weight, bias)
    for w in kernels:
        dtype = compute_dtype_of(x, w)
        delta = F.linear(x.to(dtype), circulant_matrix(w.to(dtype), scale))
        y = delta if y is None else y.to(dtype) + delta
    assert y is not None, "neither a weight nor a kernel"
    return y.to(x.dtype)


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Within the context torch.jit.trace records nothing, and sizes are the numbers that they are."""
    state = torch._C._get_tracing_state()
    set_state: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        yield
    finally:
        set_state(state)
