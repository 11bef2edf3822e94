"""Host side of `kernels/expand.py`: ΔW written out, alone or added to a weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import ShapeError
from . import specs
from .plans import bound, cdiv, kernels, planned
from .specs import Spec

__all__ = ["Expansion", "add_expanded_", "expand_product", "expand_weight", "expansion", "folded_weight"]

# run(matrix, w, base, scale)
Expansion = Callable[[Tensor, Tensor, Tensor | None, float], None]


def expand_product(
    x: Tensor,
    w: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The product through a dense ΔW in x's dtype and cuBLAS; arguments and result as `direct.direct_product`'s.

    The scale is left to the GEMM: scaled down by 1 / in_features, the elements of ΔW would be subnormal in float16.

    Raises:
        ShapeError: sizes or dtypes do not fit.
        BackendError: the kernels cannot run on w's device.
    """
    delta_weight = expand_weight(w, scale=1.0, dtype=x.dtype)
    matrix = delta_weight if transpose else delta_weight.t()
    if bias is not None and out is None:
        return torch.addmm(bias, x, matrix, alpha=scale)
    beta = 1
    if out is None:
        out, beta = torch.empty(x.shape[0], matrix.shape[1], dtype=x.dtype, device=x.device), 0
    return out.addmm_(x, matrix, beta=beta, alpha=scale)


def expand_weight(w: Tensor, *, scale: float, dtype: torch.dtype, transpose: bool = False) -> Tensor:
    """ΔW [m·b, n·b], or ΔWᵀ [n·b, m·b] with `transpose`, contiguous; computed in float32 and rounded to `dtype` once.

    Raises:
        ShapeError: w is no [m, n, b] float32 tensor, or `dtype` is not one of float32, float16, bfloat16.
        BackendError: the kernels cannot run on w's device.
    """
    shape, run = _expand_plan(specs.spec(w), dtype, transpose)
    matrix = torch.empty(*shape, dtype=dtype, device=w.device)
    run(matrix, w.contiguous(), None, scale)
    return matrix


def add_expanded_(weight: Tensor, w: Tensor, *, scale: float) -> None:
    """weight += ΔW in place: the sum is formed in float32 and rounded once.

    Args:
        weight: [m·b, n·b] float32, float16 or bfloat16, of any strides (a transposed view is written coalesced too).
        w: [m, n, b] float32.
        scale: multiplies ΔW.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit, or elements of `weight` share memory.
        BackendError: the kernels cannot run on weight's device.
    """
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        raise ShapeError(f"weight has strides {weight.stride()}: an expanded tensor cannot be written in place")
    run = _sum_plan(specs.spec(weight), weight.stride(), specs.spec(w))
    run(weight, w.contiguous(), weight, scale)


def folded_weight(weight: Tensor, w: Tensor, *, scale: float) -> Tensor:
    """W + ΔW as a new tensor of weight's dtype and, where it is dense, of its strides: `add_expanded_` out of place.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on weight's device.
    """
    folded = torch.empty_like(weight)
    base = weight if weight.stride() == folded.stride() else weight.contiguous()
    run = _sum_plan(specs.spec(weight), folded.stride(), specs.spec(w))
    run(folded, w.contiguous(), base, scale)
    return folded


@planned
def _expand_plan(w: Spec, dtype: torch.dtype, transpose: bool) -> tuple[tuple[int, int], Expansion]:
    """The shape of `expand_weight`'s result, and what writes it."""
    specs.check_w(w)
    specs.check_available(w.device)
    if dtype not in specs.DTYPES:
        raise ShapeError(f"dtype {dtype}: the kernels write float32, float16 and bfloat16")
    m, n, b = w.shape
    shape = (n * b, m * b) if transpose else (m * b, n * b)
    return shape, specs.on_device(w.device, expansion(shape, (shape[1], 1), w.shape, transpose, add=False))


@planned
def _sum_plan(weight: Spec, stride: tuple[int, ...], w: Spec) -> Expansion:
    """What writes weight + scale · ΔW with these strides."""
    specs.check_w(w)
    specs.check_available(w.device)
    m, n, b = w.shape
    shape, dtype, device = weight
    if shape != (m * b, n * b) or dtype not in specs.DTYPES or device != w.device:
        raise ShapeError(
            f"weight {tuple(shape)} {dtype} on {device}: w {tuple(w.shape)} on {w.device} is added to "
            f"({m * b}, {n * b}) float32, float16 or bfloat16 on the same device"
        )
    return specs.on_device(device, expansion(shape, stride, w.shape, transpose=False, add=True))


def expansion(
    shape: tuple[int, ...], stride: tuple[int, ...], w_shape: torch.Size, transpose: bool, add: bool
) -> Expansion:
    """Write scale · ΔW or ΔWᵀ (+ a base of the same strides); columns of the matrix past the last of ΔW become zero."""
    m, n, b = w_shape
    # A tile is long in the direction in which the matrix is contiguous.
    block_rows, block_cols = (256, 32) if stride[0] == 1 and stride[1] != 1 else (32, 256)
    launch = bound(
        kernels().expand.expand_kernel,
        (cdiv(shape[0], block_rows), cdiv(shape[1], block_cols), 1),
        n_rows=shape[0],
        n_columns=shape[1],
        width=(m if transpose else n) * b,
        stride_w_row=b if transpose else n * b,
        stride_w_col=n * b if transpose else b,
        stride_out_row=stride[0],
        stride_out_col=stride[1],
        b=b,
        TRANSPOSE=transpose,
        ADD=add,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=8,
    )

    def run(matrix: Tensor, w: Tensor, base: Tensor | None, scale: float) -> None:
        launch(w_ptr=w, base_ptr=base, out_ptr=matrix, scale=scale)

    return run
