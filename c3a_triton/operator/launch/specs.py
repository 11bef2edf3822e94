"""The tensors that kernels take: what plans know of them, whether they fit together, where they can be computed.

Tensors are on an NVIDIA GPU, or on the CPU under Triton's interpreter (`TRITON_INTERPRET=1` before triton is imported).
Shapes: w is [m, n, b] float32, with ΔW[M·b + j, N·b + p] = scale · w[M, N, (p − j) mod b], out_features = m·b and
in_features = n·b. Products accumulate in float32. With 16-bit x, w is rounded to x's dtype before it is multiplied
and `scale` is applied to the float32 sum: float16 keeps |w| between about 1e-5 and 65504 to its usual precision, less
below that, and nothing below 3e-8; bfloat16 and float32 have no such limits.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...errors import BackendError, ShapeError
from . import plans
from .tiles import generation

__all__ = [
    "DTYPES",
    "Spec",
    "card_of",
    "check_available",
    "check_rows",
    "check_w",
    "new_or_given",
    "on_device",
    "on_device_of",
    "precision",
    "product_shape",
    "scratch_bytes",
    "spec",
    "unavailable_reason",
    "weight_grad_shape",
    "with_contiguous_rows",
]

# Elements between rows: a tile of 256 rows, the next one included, stays within 32 bits.
MAX_ROW_STRIDE = 2**22

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PACKAGE = str(__package__).rpartition(".operator")[0]


class Spec(NamedTuple):
    """What of a tensor plans are made from and looked up by."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def card_of(device: torch.device) -> str:
    """The card generation whose tiles serve `device`; the interpreter takes those of the smallest card."""
    return generation(torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm_80"


@functools.cache
def scratch_bytes(device: torch.device) -> int:
    """How many bytes the spectra of one chunk of tokens may take; 0 for any number.

    256 MiB bound memory at few launches. Half of the L2 cache instead keeps them out of memory altogether, which pays
    where L2 is many times faster than memory: on cards with GDDR and a cache of tens of megabytes, as an L40S has (6.5
    times; an H200 2.3 times, an A100 3.1 times).
    """
    if device.type == "cuda" and card_of(device) == "sm_86":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        if cache >= 32 << 20:
            return cache // 2
    return 256 << 20


@functools.cache
def _cuda_reason(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"


def unavailable_reason(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on tensors of `device`; None when they can.

    Raises:
        BackendError: the kernels themselves are missing, which is a broken installation and not a property of the
            machine.
    """
    if not _installed(f"{_PACKAGE}.kernels"):
        raise BackendError(
            "c3a_triton.kernels is missing: c3a_triton is imported from a checkout that is not installed. "
            "Install it with `pip install -e .` in the repository root."
        )
    if not _installed("triton"):
        return "triton is not installed (`pip install triton`)"
    if device.type == "cuda":
        return _cuda_reason(device)
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return (
            "Triton kernels run on CPU tensors only in its interpreter (TRITON_INTERPRET=1 before triton is imported)"
        )
    return f"Triton kernels do not run on {device.type} tensors"


def precision(dtype: torch.dtype, of_others: str = "tf32x3") -> str:
    """How float32 operands are multiplied: as three TF32 products, or as one where torch's own switch allows that.

    Kernels without float32 operands ignore it, so that for other dtypes it need not follow the switch.

    Args:
        dtype: of the tensors that come in.
        of_others: the answer where that is not float32.
    """
    if dtype != torch.float32:
        return of_others
    # torch.backends.cuda.matmul.fp32_precision, whose Python compares six names before this one.
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "tf32x3"


def new_or_given(shape: tuple[int, int], x: Tensor, out: Tensor | None) -> Tensor:
    """`out`, if its rows are contiguous, or a new tensor of x's dtype."""
    if out is None:
        return x.new_empty(*shape)
    if out.stride(1) != 1 and shape[1] > 1:
        raise ShapeError(f"out has strides {out.stride()}: its rows must be contiguous")
    return out


@plans.planned
def product_shape(x: Spec, w: Spec, out: Spec | None, bias: Spec | None, transpose: bool) -> tuple[int, int]:
    """The shape of a product, of operands that all fit."""
    check_w(w)
    check_rows("x", x)
    (n_tokens, features), dtype, device = x
    if device != w.device:
        raise ShapeError(f"x is on {device}, w on {w.device}: they must be on the same device")
    check_available(device)
    m, n, b = w.shape
    row_blocks, col_blocks = (n, m) if transpose else (m, n)
    if features != col_blocks * b:
        raise ShapeError(
            f"x has {features} features, w {tuple(w.shape)} takes {col_blocks} · {b} = {col_blocks * b}"
            + (" transposed" if transpose else "")
        )
    shape = n_tokens, row_blocks * b
    if bias is not None and (bias.shape != shape[1:] or bias.device != device):
        raise ShapeError(f"bias {tuple(bias.shape)} on {bias.device}: the product needs ({shape[1]},) on {device}")
    if out is not None and out != (shape, dtype, device):
        raise ShapeError(
            f"out {tuple(out.shape)} {out.dtype} on {out.device}: the product is {shape} {dtype} on {device}"
        )
    return shape


@plans.planned
def weight_grad_shape(dy: Spec, x: Spec, b: int) -> tuple[int, int, int]:
    """The shape of dw, of operands that fit."""
    check_rows("x", x)
    check_rows("dy", dy)
    check_available(x.device)
    if (dy.shape[0], *dy[1:]) != (x.shape[0], *x[1:]):
        raise ShapeError(
            f"dy {tuple(dy.shape)} {dy.dtype} on {dy.device} and x {tuple(x.shape)} {x.dtype} on {x.device} must agree "
            "in tokens, dtype and device"
        )
    out_features, in_features = dy.shape[1], x.shape[1]
    if b < 1 or out_features % b or in_features % b:
        raise ShapeError(f"block_size {b} does not divide both widths, {out_features} (dy) and {in_features} (x)")
    return out_features // b, in_features // b, b


def check_w(w: Spec) -> None:
    """Raise `ShapeError` unless it is [m, n, b] float32."""
    shape, dtype, _ = w
    if len(shape) != 3 or dtype != torch.float32 or 0 in shape:
        raise ShapeError(f"w {tuple(shape)} {dtype}: the kernels take [m, n, b] float32, none of them 0")


def check_rows(name: str, tensor: Spec) -> None:
    """Raise `ShapeError` unless it is [tokens, features] in one of `DTYPES`."""
    shape, dtype, _ = tensor
    if len(shape) != 2 or dtype not in DTYPES:
        raise ShapeError(
            f"{name} {tuple(shape)} {dtype}: the kernels take [tokens, features] in float32, float16 or bfloat16"
        )


def check_available(device: torch.device) -> None:
    """Raise `BackendError` where the kernels cannot run."""
    reason = unavailable_reason(device)
    if reason is not None:
        raise BackendError(f"the Triton kernels cannot run here: {reason}")


def spec(tensor: Tensor) -> Spec:
    """What plans know of a tensor."""
    # As the constructor does, in one frame.
    return tuple.__new__(Spec, (tensor.shape, tensor.dtype, tensor.device))


def with_contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy of it where kernels could not read its rows."""
    # A kernel counts from row to row of a tile in 32 bits. Rows too far apart for that (one token out of each of many
    # long sequences) are few enough to copy.
    row, column = x.stride()
    fits = row <= MAX_ROW_STRIDE or x.shape[0] == 1
    return x if fits and (column == 1 or x.shape[1] == 1) else x.contiguous()


_Result = TypeVar("_Result")


def on_device(device: torch.device, run: Callable[..., _Result]) -> Callable[..., _Result]:
    """`run` with this device as the current one, on which Triton launches: for plans, each of which is for one device.

    What can be asked once is asked here: a process that sees one device pays nothing in a call.
    """
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return run

    def run_there(*args: Any) -> _Result:
        if torch.cuda.current_device() == device.index:
            return run(*args)
        with torch.cuda.device(device):
            return run(*args)

    return run_there


_HERE = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current CUDA device: make it the tensor's where it is not."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device_of(tensor)
    return _HERE
