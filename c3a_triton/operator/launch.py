"""One host function per Triton kernel: checks, allocation, strides, grid and tile.

Torch tensors in, torch tensors out; nothing here knows about autograd. Triton is imported with the first launch.
Tensors are on an NVIDIA GPU, or on the CPU under Triton's interpreter (`TRITON_INTERPRET=1` before triton is imported).

What shapes, dtypes and devices decide (checks, tiles, grids, constants of kernels) is decided once and kept as a plan:
a function of the tensors, which allocates and launches. Values, addresses and the scale are those of each call.

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
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import BackendError, ShapeError
from .tiles import TileConfig, decode_tile, diagonal_tile, generation, inner_block, product_tile, weight_grad_tile

__all__ = [
    "SMALL_T",
    "TileConfig",
    "add_expanded_",
    "clear_plans",
    "decode_linear",
    "decodes",
    "direct_product",
    "expand_weight",
    "folded_weight",
    "unavailable_reason",
    "weight_grad",
]

# Up to so many tokens, `direct_product` takes the Hankel kernel, and a whole layer is one kernel (`decode_linear`).
SMALL_T = 16
# Sums are split until about this many programs run: enough to fill any card, and the same on all of them, so that
# results do not depend on the card's number of multiprocessors.
_PROGRAMS = 264
# Elements between rows: a tile of 256 rows, the next one included, stays within 32 bits.
_MAX_ROW_STRIDE = 2**22

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Spec(NamedTuple):
    """What of a tensor plans are made from and looked up by."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


# A launch that lacks its tensors, strides and scale: the keyword arguments of a call.
_Launch = Callable[..., None]
# run(x, w, bias, out, scale)
_Product = Callable[[Tensor, Tensor, Tensor | None, Tensor, float], None]
# run(dy, x, dw, scale)
_WeightGrad = Callable[[Tensor, Tensor, Tensor, float], object]
# run(x, weight, w, bias, out, scale)
_Decode = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, float], None]
# run(matrix, w, base, scale)
_Expansion = Callable[[Tensor, Tensor, Tensor | None, float], None]

_Plan = TypeVar("_Plan")
# Plans kept, one for each set of sizes: where sequences vary, for each number of tokens.
_PLANS = 1024
_forget: list[Callable[[], None]] = []


def _planned(plan: Callable[..., _Plan]) -> "functools._lru_cache_wrapper[_Plan]":
    """Keep what a function of sizes, dtypes and devices returns, until `clear_plans`."""
    kept = functools.lru_cache(maxsize=_PLANS)(plan)
    _forget.append(kept.cache_clear)
    return kept


class _Kernels(NamedTuple):
    decode: ModuleType
    direct: ModuleType
    expand: ModuleType
    fft: ModuleType
    indexing: ModuleType
    weight_grad: ModuleType


@functools.cache
def _kernels() -> _Kernels:
    """The kernel modules; their import is what imports triton."""
    from ..kernels import decode, direct, expand, fft, indexing, weight_grad

    return _Kernels(decode, direct, expand, fft, indexing, weight_grad)


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _generation(device: torch.device) -> str:
    """The card generation whose tiles serve `device`; the interpreter takes those of the smallest card."""
    return generation(torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm_80"


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
    if not _installed(f"{__package__.rpartition('.')[0]}.kernels"):
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


def direct_product(
    x: Tensor,
    w: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x ΔWᵀ (or x ΔW), computed by circulant indexing without writing ΔW out.

    Args:
        x: [T, n·b], or [T, m·b] with `transpose`; float32, float16 or bfloat16.
        w: [m, n, b] float32.
        scale: multiplies ΔW.
        transpose: multiply by ΔW instead of its transpose, as the gradient of x does.
        out: [T, m·b] (or [T, n·b]) of x's dtype with contiguous rows: the product is added to it, in float32 and
            rounded once, and it is returned.
        bias: [m·b] (or [n·b]), added to every row.

    Returns:
        [T, m·b] (or [T, n·b]) in x's dtype.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    shape, run = _product_plan(
        _spec(x),
        _spec(w),
        None if out is None else _spec(out),
        None if bias is None else _spec(bias),
        transpose,
        _precision(x.dtype),
    )
    out = _new_or_given(shape, x, out)
    if bias is not None:
        bias = bias.contiguous()
    with _on(x):
        run(_with_contiguous_rows(x), w.contiguous(), bias, out, scale)
    return out


def decodes(x: Tensor, weight: Tensor) -> bool:
    """Whether `decode_linear` takes these operands: few tokens, and a 16-bit weight of contiguous rows."""
    return x.shape[0] <= SMALL_T and _decodes(_spec(x), _spec(weight), weight.stride())


def _decodes(x: _Spec, weight: _Spec, weight_stride: tuple[int, ...]) -> bool:
    return (
        0 < x.shape[0] <= SMALL_T
        and weight.dtype in _DTYPES[1:]
        and weight.dtype == x.dtype
        and weight_stride[1] == 1
        and weight_stride[0] >= weight.shape[1]
    )


def decode_linear(x: Tensor, weight: Tensor, w: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    """x (W + ΔW)ᵀ + bias for up to `SMALL_T` tokens, in one pass over W; summed in float32 and rounded once.

    One launch, or two where the layer has so few outputs that its sum is split over programs.

    Args:
        x: [T, n·b], float16 or bfloat16, 1 to `SMALL_T` tokens.
        weight: [m·b, n·b] of x's dtype, its rows contiguous.
        w: [m, n, b] float32.
        bias: [m·b], or None.
        scale: multiplies ΔW.

    Returns:
        [T, m·b] in x's dtype.

    Raises:
        ShapeError: sizes, dtypes, strides or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    shape, run = _decode_plan(_spec(x), _spec(weight), weight.stride(), _spec(w), None if bias is None else _spec(bias))
    out = torch.empty(*shape, dtype=x.dtype, device=x.device)
    if bias is not None:
        bias = bias.contiguous()
    with _on(x):
        run(_with_contiguous_rows(x), weight, w.contiguous(), bias, out, scale)
    return out


def expand_weight(w: Tensor, *, scale: float, dtype: torch.dtype, transpose: bool = False) -> Tensor:
    """ΔW [m·b, n·b], or ΔWᵀ [n·b, m·b] with `transpose`, contiguous; computed in float32 and rounded to `dtype` once.

    Raises:
        ShapeError: w is no [m, n, b] float32 tensor, or `dtype` is not one of float32, float16, bfloat16.
        BackendError: the kernels cannot run on w's device.
    """
    shape, run = _expand_plan(_spec(w), dtype, transpose)
    matrix = torch.empty(*shape, dtype=dtype, device=w.device)
    with _on(w):
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
    run = _sum_plan(_spec(weight), weight.stride(), _spec(w))
    with _on(w):
        run(weight, w.contiguous(), weight, scale)


def folded_weight(weight: Tensor, w: Tensor, *, scale: float) -> Tensor:
    """W + ΔW as a new tensor of weight's dtype and, where it is dense, of its strides: `add_expanded_` out of place.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on weight's device.
    """
    folded = torch.empty_like(weight)
    base = weight if weight.stride() == folded.stride() else weight.contiguous()
    run = _sum_plan(_spec(weight), folded.stride(), _spec(w))
    with _on(w):
        run(folded, w.contiguous(), base, scale)
    return folded


def weight_grad(dy: Tensor, x: Tensor, block_size: int, *, scale: float) -> Tensor:
    """dw[M, N, q] = scale · Σ_t Σ_j dy[t, M·b + j] · x[t, N·b + (j + q) mod b], the same from run to run.

    Args:
        dy: [T, m·b] float32, float16 or bfloat16.
        x: [T, n·b] of dy's dtype.
        block_size: b, any common divisor of both widths.
        scale: multiplies the result.

    Returns:
        [m, n, b] float32.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    shape, run = _weight_grad_plan(_spec(dy), _spec(x), block_size, _precision(x.dtype))
    dw = torch.empty(*shape, dtype=torch.float32, device=x.device)
    with _on(x):
        run(_with_contiguous_rows(dy), _with_contiguous_rows(x), dw, scale)
    return dw


def clear_plans() -> None:
    """Forget every plan, those of `launch_fft` too: for those who replace what plans are made from, as tiles are."""
    for forget in _forget:
        forget()


# Plans


@_planned
def _product_plan(
    x: _Spec, w: _Spec, out: _Spec | None, bias: _Spec | None, transpose: bool, precision: str
) -> tuple[tuple[int, int], _Product]:
    """The shape of `direct_product`'s result, and what writes it."""
    shape = _product_shape(x, w, out, bias, transpose)
    if shape[0] == 0:
        return shape, lambda x, w, bias, out, scale: None
    plan = _hankel_product if shape[0] <= SMALL_T else _table_product
    return shape, plan(shape, x, w.shape, transpose, bias is not None, out is not None, precision)


def _table_product(
    shape: tuple[int, int],
    x: _Spec,
    w_shape: torch.Size,
    transpose: bool,
    has_bias: bool,
    accumulate: bool,
    precision: str,
) -> _Product:
    n_tokens, out_features = shape
    dtype, device = x.dtype, x.device
    tile = product_tile(_generation(device), dtype.itemsize, n_tokens)
    table = _table(w_shape, dtype, tile.block_i, transpose)
    # One program per [block_t, block_o] tile of the output.
    multiply = _bound(
        _kernels().direct.table_product_kernel,
        (_cdiv(n_tokens, tile.block_t) * _cdiv(out_features, tile.block_o), 1, 1),
        n_tokens=n_tokens,
        out_features=out_features,
        col_blocks=table.col_blocks,
        stride_table_row=table.stride_row,
        row_block=table.row_block,
        col_block=table.col_block,
        ORIGIN=table.origin,
        LENGTH=table.length,
        PHASES=table.phases,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
        PRECISION=precision,
        BLOCK_T=tile.block_t,
        BLOCK_O=tile.block_o,
        BLOCK_I=inner_block(table.col_block, tile.block_i),
        GROUP_T=8,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )

    def run(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, scale: float) -> None:
        values = torch.empty(*table.shape, dtype=dtype, device=device)
        table.write(values, w, None, 1.0)
        multiply(
            x_ptr=x,
            table_ptr=values,
            bias_ptr=bias,
            out_ptr=out,
            scale=scale,
            stride_x_t=x.stride(0),
            stride_out_t=out.stride(0),
        )

    return run


class _Table(NamedTuple):
    """A matrix in the form that `table_product_kernel` reads; from the third on its arguments of those names."""

    shape: tuple[int, ...]
    write: _Expansion
    stride_row: int
    row_block: int
    col_block: int
    col_blocks: int
    origin: int
    length: int
    phases: int


def _table(w_shape: torch.Size, dtype: torch.dtype, block_i: int, transpose: bool) -> _Table:
    """ΔW / scale (or its transpose) in `dtype`: a table of shifted rows or, where that is not smaller, dense."""
    m, n, b = w_shape
    rows, cols = (n, m) if transpose else (m, n)
    # So many values are 16 bytes: rows of tiles begin on such a boundary.
    phases = 16 // dtype.itemsize
    step = inner_block(b, block_i)
    origin = _round_up(b, phases)
    length = _round_up(origin + _round_up(b, step), 8)
    # With b odd, say, blocks of x begin anywhere, and a dense row lets whole rows of x be read 16 bytes at a time.
    unaligned = b % phases != 0 and cols * b % phases == 0
    if phases * length >= b * b or unaligned:
        length = _round_up(cols * b, inner_block(cols * b, block_i))
        write = _expansion((rows * b, length), (length, 1), w_shape, transpose, add=False)
        return _Table((rows * b, length), write, length, 1, cols * b, 1, 0, length, phases)
    stride_row, stride_col = (b, n * b) if transpose else (n * b, b)
    block = 1024
    launch = _bound(
        _kernels().direct.table_kernel,
        (rows * cols, _cdiv(phases * length, block), 1),
        col_blocks=cols,
        stride_w_row=stride_row,
        stride_w_col=stride_col,
        b=b,
        ORIGIN=origin,
        LENGTH=length,
        PHASES=phases,
        TRANSPOSE=transpose,
        BLOCK=block,
        num_warps=4,
    )

    def write_shifted(values: Tensor, w: Tensor, base: Tensor | None, scale: float) -> None:
        launch(w_ptr=w, table_ptr=values)

    return _Table(
        (rows, cols, phases, length), write_shifted, cols * phases * length, b, b, cols, origin, length, phases
    )


def _hankel_product(
    shape: tuple[int, int],
    x: _Spec,
    w_shape: torch.Size,
    transpose: bool,
    has_bias: bool,
    accumulate: bool,
    precision: str,
) -> _Product:
    m, n, b = w_shape
    n_tokens, out_features = shape
    rows, cols = (n, m) if transpose else (m, n)
    block_m, block_k = 16, 64
    block_j = min(64, max(16, 1 << (b - 1).bit_length()))
    tiles = _cdiv(rows, block_m) * _cdiv(b, block_j)
    # Programs for one token are few: the sum is split until they fill a card, in steps of at least two tiles.
    steps = _cdiv(cols * b, block_k)
    split_steps = max(2, _cdiv(steps, _cdiv(_PROGRAMS, tiles * n_tokens)))
    n_splits = _cdiv(steps, split_steps)
    final = n_splits == 1
    multiply = _bound(
        _kernels().direct.hankel_kernel,
        (tiles, n_tokens, n_splits),
        row_blocks=rows,
        col_blocks=cols,
        split_length=split_steps * block_k,
        stride_w_row=b if transpose else n * b,
        stride_w_col=n * b if transpose else b,
        stride_out_s=n_tokens * out_features,
        b=b,
        TRANSPOSE=transpose,
        HAS_BIAS=final and has_bias,
        ACCUMULATE=final and accumulate,
        PRECISION=precision,
        BLOCK_M=block_m,
        BLOCK_J=block_j,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    add_up = _sum_of_partials((n_splits, *shape), has_bias, accumulate)

    def run(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, scale: float) -> None:
        target = out if final else torch.empty(n_splits, *shape, dtype=torch.float32, device=out.device)
        multiply(
            x_ptr=x,
            w_ptr=w,
            bias_ptr=bias if final else None,
            out_ptr=target,
            scale=scale if final else 1.0,
            stride_x_t=x.stride(0),
            stride_out_t=target.stride(-2),
        )
        if not final:
            add_up(partials_ptr=target, bias_ptr=bias, out_ptr=out, scale=scale, stride_out_row=out.stride(0))

    return run


@_planned
def _decode_plan(
    x: _Spec, weight: _Spec, weight_stride: tuple[int, ...], w: _Spec, bias: _Spec | None
) -> tuple[tuple[int, int], _Decode]:
    """The shape of `decode_linear`'s result, and what writes it."""
    shape = _check_decode(x, weight, weight_stride, w, bias)
    n_tokens, out_features = shape
    m, n, b = w.shape
    in_features = n * b
    tile = decode_tile(n_tokens, b)
    in_pieces = b % 16 == 0
    tiles = _cdiv(m, tile.block_o // 16) * (b // 16) if in_pieces else _cdiv(out_features, tile.block_o)
    steps = _cdiv(in_features, tile.block_i)
    # A second launch to add the parts of a split sum costs more than what half a card has left to gain.
    n_splits = 1 if tiles >= _PROGRAMS // 4 else min(_cdiv(_PROGRAMS, tiles), _cdiv(steps, 2))
    split_steps = _cdiv(steps, n_splits)
    n_splits = _cdiv(steps, split_steps)
    final = n_splits == 1
    # One program per tile of outputs and split of the sum over in_features.
    multiply = _bound(
        _kernels().decode.decode_kernel,
        (tiles, n_splits, 1),
        n_tokens=n_tokens,
        out_features=out_features,
        in_features=in_features,
        split_length=split_steps * tile.block_i,
        stride_weight_row=weight_stride[0],
        stride_out_s=n_tokens * out_features,
        stride_out_t=out_features,
        b=b,
        HAS_BIAS=final and bias is not None,
        EVEN_K=in_features % tile.block_i == 0,
        BLOCK_T=tile.block_t,
        BLOCK_O=tile.block_o,
        BLOCK_K=tile.block_i,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    add_up = _sum_of_partials((n_splits, *shape), bias is not None, accumulate=False)

    def run(x: Tensor, weight: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, scale: float) -> None:
        target = out if final else torch.empty(n_splits, *shape, dtype=torch.float32, device=out.device)
        multiply(
            x_ptr=x,
            weight_ptr=weight,
            w_ptr=w,
            bias_ptr=bias if final else None,
            out_ptr=target,
            scale=scale,
            stride_x_t=x.stride(0),
        )
        if not final:
            add_up(partials_ptr=target, bias_ptr=bias, out_ptr=out, scale=1.0, stride_out_row=out_features)

    return shape, run


def _sum_of_partials(partials: tuple[int, int, int], has_bias: bool, accumulate: bool) -> _Launch:
    """out [rows, columns] = scale · partials [splits, rows, columns] summed over splits (+ bias) (+ out)."""
    n_splits, n_rows, n_columns = partials
    block = 256
    return _bound(
        _kernels().indexing.sum_partials_kernel,
        (_cdiv(n_columns, block), n_rows, 1),
        n_splits=n_splits,
        n_rows=n_rows,
        n_columns=n_columns,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
        BLOCK=block,
        num_warps=4,
    )


@_planned
def _expand_plan(w: _Spec, dtype: torch.dtype, transpose: bool) -> tuple[tuple[int, int], _Expansion]:
    """The shape of `expand_weight`'s result, and what writes it."""
    _check_w(w)
    _check_available(w.device)
    if dtype not in _DTYPES:
        raise ShapeError(f"dtype {dtype}: the kernels write float32, float16 and bfloat16")
    m, n, b = w.shape
    shape = (n * b, m * b) if transpose else (m * b, n * b)
    return shape, _expansion(shape, (shape[1], 1), w.shape, transpose, add=False)


@_planned
def _sum_plan(weight: _Spec, stride: tuple[int, ...], w: _Spec) -> _Expansion:
    """What writes weight + scale · ΔW with these strides."""
    _check_w(w)
    _check_available(w.device)
    m, n, b = w.shape
    shape, dtype, device = weight
    if shape != (m * b, n * b) or dtype not in _DTYPES or device != w.device:
        raise ShapeError(
            f"weight {tuple(shape)} {dtype} on {device}: w {tuple(w.shape)} on {w.device} is added to "
            f"({m * b}, {n * b}) float32, float16 or bfloat16 on the same device"
        )
    return _expansion(shape, stride, w.shape, transpose=False, add=True)


def _expansion(
    shape: tuple[int, ...], stride: tuple[int, ...], w_shape: torch.Size, transpose: bool, add: bool
) -> _Expansion:
    """Write scale · ΔW or ΔWᵀ (+ a base of the same strides); columns of the matrix past the last of ΔW become zero."""
    m, n, b = w_shape
    # A tile is long in the direction in which the matrix is contiguous.
    block_rows, block_cols = (256, 32) if stride[0] == 1 and stride[1] != 1 else (32, 256)
    launch = _bound(
        _kernels().expand.expand_kernel,
        (_cdiv(shape[0], block_rows), _cdiv(shape[1], block_cols), 1),
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


@_planned
def _weight_grad_plan(dy: _Spec, x: _Spec, b: int, precision: str) -> tuple[tuple[int, int, int], _WeightGrad]:
    """The shape of `weight_grad`'s result, and what writes it."""
    shape = _weight_grad_shape(dy, x, b)
    if 0 in shape or x.shape[0] == 0:
        return shape, lambda dy, x, dw, scale: dw.zero_()
    return shape, (_block_sums if b <= 64 else _diagonal_sums)(shape, x, precision)


def _diagonal_sums(shape: tuple[int, int, int], x: _Spec, precision: str) -> _WeightGrad:
    m, n, b = shape
    (n_tokens, _), dtype, device = x
    tile = diagonal_tile(_generation(device), dtype.itemsize, b)
    side = tile.block_o
    tiles = _cdiv(b, side)
    offsets = tiles if b % side == 0 else 2 * tiles - 1
    tokens_per_split, n_splits = _split_tokens(n_tokens, m * n * offsets, tile.block_t)
    # One program per block, offset between tiles and split of the tokens.
    multiply = _bound(
        _kernels().weight_grad.diagonal_sums_kernel,
        (m * n * offsets, n_splits, 1),
        n_tokens=n_tokens,
        n_pairs=m * n,
        in_blocks=n,
        tokens_per_split=tokens_per_split,
        b=b,
        PRECISION=precision,
        BLOCK_Q=side,
        BLOCK_T=tile.block_t,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    block = 128
    fold = _bound(
        _kernels().weight_grad.fold_sums_kernel,
        (m * n, _cdiv(b, block), 1),
        n_splits=n_splits,
        n_pairs=m * n,
        b=b,
        BLOCK_Q=side,
        BLOCK=block,
        num_warps=4,
    )

    def run(dy: Tensor, x: Tensor, dw: Tensor, scale: float) -> None:
        sums = torch.empty(n_splits, m * n, offsets, 2, side, dtype=torch.float32, device=device)
        multiply(dy_ptr=dy, x_ptr=x, sums_ptr=sums, stride_dy_t=dy.stride(0), stride_x_t=x.stride(0))
        fold(sums_ptr=sums, dw_ptr=dw, scale=scale)

    return run


def _block_sums(shape: tuple[int, int, int], x: _Spec, precision: str) -> _WeightGrad:
    m, n, b = shape
    (n_tokens, _), dtype, device = x
    tile = weight_grad_tile(_generation(device), dtype.itemsize)
    blocks = tile.block_o // b
    tiles = _cdiv(m, blocks) * _cdiv(n, blocks)
    tokens_per_split, n_splits = _split_tokens(n_tokens, tiles, tile.block_t)
    final = n_splits == 1
    # One program per tile of whole blocks and split of the tokens.
    multiply = _bound(
        _kernels().weight_grad.block_sums_kernel,
        (tiles, n_splits, 1),
        n_tokens=n_tokens,
        out_features=m * b,
        in_features=n * b,
        tokens_per_split=tokens_per_split,
        b=b,
        PRECISION=precision,
        BLOCK=tile.block_o,
        BLOCK_T=tile.block_t,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    add_up = _sum_of_partials((n_splits, m, n * b), has_bias=False, accumulate=False)

    def run(dy: Tensor, x: Tensor, dw: Tensor, scale: float) -> None:
        target = dw if final else torch.empty(n_splits, *shape, dtype=torch.float32, device=device)
        multiply(
            dy_ptr=dy,
            x_ptr=x,
            dw_ptr=target,
            scale=scale if final else 1.0,
            stride_dy_t=dy.stride(0),
            stride_x_t=x.stride(0),
        )
        if not final:
            add_up(partials_ptr=target, bias_ptr=None, out_ptr=dw, scale=scale, stride_out_row=n * b)

    return run


def _bound(kernel: Any, grid: tuple[int, int, int], **constants: Any) -> _Launch:
    """A launch of which everything is decided but what is passed to it; `kernel[grid]` would cost each call a frame."""
    return functools.partial(kernel.run, grid=grid, warmup=False, enable_fp_fusion=True, **constants)


def _split_tokens(n_tokens: int, programs: int, block_t: int) -> tuple[int, int]:
    """(tokens per split, number of splits): more programs where there are few, at least eight steps in each."""
    steps = _cdiv(n_tokens, block_t)
    split_steps = max(8, _cdiv(steps, _cdiv(_PROGRAMS, programs)))
    return split_steps * block_t, _cdiv(steps, split_steps)


def _precision(dtype: torch.dtype = torch.float32) -> str:
    """How float32 operands are multiplied: as three TF32 products, or as one where torch's own switch allows that.

    Kernels without float32 operands ignore it, so that for other dtypes it need not follow the switch.
    """
    if dtype != torch.float32:
        return "tf32x3"
    matmul = torch.backends.cuda.matmul
    return "tf32" if matmul.fp32_precision == "tf32" else "tf32x3"


# Checks


def _product_output(x: Tensor, w: Tensor, transpose: bool, out: Tensor | None, bias: Tensor | None) -> Tensor:
    """What a product writes to, `out` or a new tensor, after checking that all of its operands fit."""
    out_spec, bias_spec = None if out is None else _spec(out), None if bias is None else _spec(bias)
    return _new_or_given(_product_shape(_spec(x), _spec(w), out_spec, bias_spec, transpose), x, out)


def _new_or_given(shape: tuple[int, int], x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(*shape, dtype=x.dtype, device=x.device)
    if out.stride(1) != 1 and shape[1] > 1:
        raise ShapeError(f"out has strides {out.stride()}: its rows must be contiguous")
    return out


@_planned
def _product_shape(x: _Spec, w: _Spec, out: _Spec | None, bias: _Spec | None, transpose: bool) -> tuple[int, int]:
    """The shape of a product, of operands that all fit."""
    _check_w(w)
    _check_rows("x", x)
    (n_tokens, features), dtype, device = x
    if device != w.device:
        raise ShapeError(f"x is on {device}, w on {w.device}: they must be on the same device")
    _check_available(device)
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


def _check_decode(
    x: _Spec, weight: _Spec, weight_stride: tuple[int, ...], w: _Spec, bias: _Spec | None
) -> tuple[int, int]:
    """The shape of a layer's result, of operands that all fit."""
    _check_w(w)
    _check_rows("x", x)
    (n_tokens, features), dtype, device = x
    _check_available(device)
    m, n, b = w.shape
    in_features, out_features = n * b, m * b
    if not _decodes(x, weight, weight_stride):
        raise ShapeError(
            f"x {tuple(x.shape)} {dtype}, weight {tuple(weight.shape)} {weight.dtype} of strides {weight_stride}: "
            f"this kernel takes 1 to {SMALL_T} tokens and a weight of contiguous rows in x's dtype, float16 or bfloat16"
        )
    if features != in_features or weight.shape != (out_features, in_features):
        raise ShapeError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit w {tuple(w.shape)}: it takes "
            f"{in_features} features to {out_features}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ShapeError(f"bias {tuple(bias.shape)}: the layer needs ({out_features},)")
    if any(other.device != device for other in (weight, w, bias) if other is not None):
        raise ShapeError(f"x is on {device}: weight, w and bias must be on the same device")
    return n_tokens, out_features


def _check_weight_grad(dy: Tensor, x: Tensor, b: int) -> None:
    _weight_grad_shape(_spec(dy), _spec(x), b)


@_planned
def _weight_grad_shape(dy: _Spec, x: _Spec, b: int) -> tuple[int, int, int]:
    """The shape of dw, of operands that fit."""
    _check_rows("x", x)
    _check_rows("dy", dy)
    _check_available(x.device)
    if (dy.shape[0], *dy[1:]) != (x.shape[0], *x[1:]):
        raise ShapeError(
            f"dy {tuple(dy.shape)} {dy.dtype} on {dy.device} and x {tuple(x.shape)} {x.dtype} on {x.device} must agree "
            "in tokens, dtype and device"
        )
    out_features, in_features = dy.shape[1], x.shape[1]
    if b < 1 or out_features % b or in_features % b:
        raise ShapeError(f"block_size {b} does not divide both widths, {out_features} (dy) and {in_features} (x)")
    return out_features // b, in_features // b, b


def _check_w(w: _Spec) -> None:
    shape, dtype, _ = w
    if len(shape) != 3 or dtype != torch.float32 or 0 in shape:
        raise ShapeError(f"w {tuple(shape)} {dtype}: the kernels take [m, n, b] float32, none of them 0")


def _check_rows(name: str, tensor: _Spec) -> None:
    shape, dtype, _ = tensor
    if len(shape) != 2 or dtype not in _DTYPES:
        raise ShapeError(
            f"{name} {tuple(shape)} {dtype}: the kernels take [tokens, features] in float32, float16 or bfloat16"
        )


def _check_available(device: torch.device) -> None:
    reason = unavailable_reason(device)
    if reason is not None:
        raise BackendError(f"the Triton kernels cannot run here: {reason}")


def _spec(tensor: Tensor) -> _Spec:
    # As its constructor does, in one frame.
    return tuple.__new__(_Spec, (tensor.shape, tensor.dtype, tensor.device))


def _with_contiguous_rows(x: Tensor) -> Tensor:
    # A kernel counts from row to row of a tile in 32 bits. Rows too far apart for that (one token out of each of many
    # long sequences) are few enough to copy.
    fits = x.stride(0) <= _MAX_ROW_STRIDE or x.shape[0] == 1
    return x if fits and (x.stride(1) == 1 or x.shape[1] == 1) else x.contiguous()


_HERE = nullcontext()


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current CUDA device: make it the tensor's where it is not."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device_of(tensor)
    return _HERE


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _cdiv(a, b) * b
