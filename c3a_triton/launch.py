"""One host function per Triton kernel: checks, allocation, strides, grid and tile.

Torch tensors in, torch tensors out; nothing here knows about autograd. Triton is imported with the first launch.
Tensors are on an NVIDIA GPU, or on the CPU under Triton's interpreter (`TRITON_INTERPRET=1` before triton is imported).

Shapes: w is [m, n, b] float32, with ΔW[M·b + j, N·b + p] = scale · w[M, N, (p − j) mod b], out_features = m·b and
in_features = n·b. Products accumulate in float32. With 16-bit x, w is rounded to x's dtype before it is multiplied
and `scale` is applied to the float32 sum: float16 keeps |w| between about 1e-5 and 65504 to its usual precision, less
below that, and nothing below 3e-8; bfloat16 and float32 have no such limits.
"""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import BackendError, ShapeError
from .tiles import TileConfig, decode_tile, diagonal_tile, generation, inner_block, product_tile, weight_grad_tile

__all__ = [
    "SMALL_T",
    "TileConfig",
    "add_expanded_",
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

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    from .kernels import decode, direct, expand, fft, indexing, weight_grad

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
    if not _installed(f"{__package__}.kernels"):
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
    result = _product_output(x, w, transpose, out, bias)
    if x.shape[0] == 0:
        return result

    x = _with_contiguous_rows(x)
    w = w.contiguous()
    bias = None if bias is None else bias.contiguous()
    product = _hankel_product if x.shape[0] <= SMALL_T else _table_product
    with _on(x):
        product(x, w, result, bias, scale, transpose, accumulate=out is not None)
    return result


def decodes(x: Tensor, weight: Tensor) -> bool:
    """Whether `decode_linear` takes these operands: few tokens, and a 16-bit weight of contiguous rows."""
    return (
        0 < x.shape[0] <= SMALL_T
        and weight.dtype in _DTYPES[1:]
        and weight.dtype == x.dtype
        and weight.stride(1) == 1
        and weight.stride(0) >= weight.shape[1]
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
    _check_w(w)
    _check_rows("x", x)
    _check_available(x.device)
    m, n, b = w.shape
    n_tokens, in_features, out_features = x.shape[0], n * b, m * b
    if not decodes(x, weight):
        raise ShapeError(
            f"x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype} of strides {weight.stride()}: "
            f"this kernel takes 1 to {SMALL_T} tokens and a weight of contiguous rows in x's dtype, float16 or bfloat16"
        )
    if x.shape[1] != in_features or weight.shape != (out_features, in_features):
        raise ShapeError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit w {tuple(w.shape)}: it takes "
            f"{in_features} features to {out_features}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ShapeError(f"bias {tuple(bias.shape)}: the layer needs ({out_features},)")
    if any(other.device != x.device for other in (weight, w, bias) if other is not None):
        raise ShapeError(f"x is on {x.device}: weight, w and bias must be on the same device")
    out = torch.empty(n_tokens, out_features, dtype=x.dtype, device=x.device)
    with _on(x):
        _decode(_with_contiguous_rows(x), weight, w.contiguous(), bias, out, scale)
    return out


def expand_weight(w: Tensor, *, scale: float, dtype: torch.dtype, transpose: bool = False) -> Tensor:
    """ΔW [m·b, n·b], or ΔWᵀ [n·b, m·b] with `transpose`, contiguous; computed in float32 and rounded to `dtype` once.

    Raises:
        ShapeError: w is no [m, n, b] float32 tensor, or `dtype` is not one of float32, float16, bfloat16.
        BackendError: the kernels cannot run on w's device.
    """
    _check_w(w)
    _check_available(w.device)
    if dtype not in _DTYPES:
        raise ShapeError(f"dtype {dtype}: the kernels write float32, float16 and bfloat16")
    m, n, b = w.shape
    row_blocks, col_blocks = (n, m) if transpose else (m, n)
    matrix = torch.empty(row_blocks * b, col_blocks * b, dtype=dtype, device=w.device)
    with _on(w):
        _expand(matrix, w.contiguous(), scale, transpose=transpose)
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
    _check_sum(weight, w)
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        raise ShapeError(f"weight has strides {weight.stride()}: an expanded tensor cannot be written in place")
    with _on(w):
        _expand(weight, w.contiguous(), scale, base=weight)


def folded_weight(weight: Tensor, w: Tensor, *, scale: float) -> Tensor:
    """W + ΔW as a new tensor of weight's dtype and, where it is dense, of its strides: `add_expanded_` out of place.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on weight's device.
    """
    _check_sum(weight, w)
    folded = torch.empty_like(weight)
    base = weight if weight.stride() == folded.stride() else weight.contiguous()
    with _on(w):
        _expand(folded, w.contiguous(), scale, base=base)
    return folded


def _check_sum(weight: Tensor, w: Tensor) -> None:
    _check_w(w)
    _check_available(w.device)
    m, n, b = w.shape
    if weight.shape != (m * b, n * b) or weight.dtype not in _DTYPES or weight.device != w.device:
        raise ShapeError(
            f"weight {tuple(weight.shape)} {weight.dtype} on {weight.device}: w {tuple(w.shape)} on {w.device} is "
            f"added to ({m * b}, {n * b}) float32, float16 or bfloat16 on the same device"
        )


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
    _check_weight_grad(dy, x, block_size)
    b = block_size
    m, n = dy.shape[1] // b, x.shape[1] // b
    if x.numel() == 0 or dy.numel() == 0:
        return torch.zeros(m, n, b, dtype=torch.float32, device=x.device)
    dw = torch.empty(m, n, b, dtype=torch.float32, device=x.device)
    dy, x = _with_contiguous_rows(dy), _with_contiguous_rows(x)
    with _on(x):
        (_block_sums if b <= 64 else _diagonal_sums)(dy, x, dw, scale)
    return dw


class _Table(NamedTuple):
    """A matrix in the form that `table_product_kernel` reads; the fields are its arguments of the same names."""

    values: Tensor
    stride_row: int
    row_block: int
    col_block: int
    col_blocks: int
    origin: int
    length: int
    phases: int


def _build_table(w: Tensor, dtype: torch.dtype, block_i: int, transpose: bool) -> _Table:
    """ΔW / scale (or its transpose) in `dtype`: a table of shifted rows or, where that is not smaller, dense."""
    m, n, b = w.shape
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
        values = torch.empty(rows * b, length, dtype=dtype, device=w.device)
        _expand(values, w, 1.0, transpose=transpose)
        return _Table(values, length, 1, cols * b, 1, 0, length, phases)
    values = torch.empty(rows, cols, phases, length, dtype=dtype, device=w.device)
    stride_row, stride_col = (b, n * b) if transpose else (n * b, b)
    block = 1024
    _kernels().direct.table_kernel[rows * cols, _cdiv(phases * length, block), 1](
        w_ptr=w,
        table_ptr=values,
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
        enable_fp_fusion=True,
    )
    return _Table(values, cols * phases * length, b, b, cols, origin, length, phases)


def _table_product(
    x: Tensor, w: Tensor, out: Tensor, bias: Tensor | None, scale: float, transpose: bool, accumulate: bool
) -> None:
    n_tokens, out_features = out.shape
    tile = product_tile(_generation(x.device), x.element_size(), n_tokens)
    table = _build_table(w, x.dtype, tile.block_i, transpose)
    # One program per [block_t, block_o] tile of the output.
    grid = (_cdiv(n_tokens, tile.block_t) * _cdiv(out_features, tile.block_o), 1, 1)
    _kernels().direct.table_product_kernel[grid](
        x_ptr=x,
        table_ptr=table.values,
        bias_ptr=bias,
        out_ptr=out,
        scale=scale,
        n_tokens=n_tokens,
        out_features=out_features,
        col_blocks=table.col_blocks,
        stride_x_t=x.stride(0),
        stride_out_t=out.stride(0),
        stride_table_row=table.stride_row,
        row_block=table.row_block,
        col_block=table.col_block,
        ORIGIN=table.origin,
        LENGTH=table.length,
        PHASES=table.phases,
        HAS_BIAS=bias is not None,
        ACCUMULATE=accumulate,
        PRECISION=_precision(),
        BLOCK_T=tile.block_t,
        BLOCK_O=tile.block_o,
        BLOCK_I=inner_block(table.col_block, tile.block_i),
        GROUP_T=8,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )


def _hankel_product(
    x: Tensor, w: Tensor, out: Tensor, bias: Tensor | None, scale: float, transpose: bool, accumulate: bool
) -> None:
    m, n, b = w.shape
    n_tokens = out.shape[0]
    rows, cols = (n, m) if transpose else (m, n)
    block_m, block_k = 16, 64
    block_j = min(64, max(16, 1 << (b - 1).bit_length()))
    tiles = _cdiv(rows, block_m) * _cdiv(b, block_j)
    # Programs for one token are few: the sum is split until they fill a card, in steps of at least two tiles.
    steps = _cdiv(cols * b, block_k)
    split_steps = max(2, _cdiv(steps, _cdiv(_PROGRAMS, tiles * n_tokens)))
    n_splits = _cdiv(steps, split_steps)
    partials = out[None] if n_splits == 1 else torch.empty(n_splits, *out.shape, dtype=torch.float32, device=out.device)
    final = n_splits == 1
    _kernels().direct.hankel_kernel[tiles, n_tokens, n_splits](
        x_ptr=x,
        w_ptr=w,
        bias_ptr=bias if final else None,
        out_ptr=partials,
        scale=scale if final else 1.0,
        row_blocks=rows,
        col_blocks=cols,
        split_length=split_steps * block_k,
        stride_w_row=b if transpose else n * b,
        stride_w_col=n * b if transpose else b,
        stride_x_t=x.stride(0),
        stride_out_s=partials.stride(0),
        stride_out_t=partials.stride(1),
        b=b,
        TRANSPOSE=transpose,
        HAS_BIAS=final and bias is not None,
        ACCUMULATE=final and accumulate,
        PRECISION=_precision(),
        BLOCK_M=block_m,
        BLOCK_J=block_j,
        BLOCK_K=block_k,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=3,
    )
    if not final:
        _sum_partials(partials, out, scale, bias, accumulate)


def _decode(x: Tensor, weight: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, scale: float) -> None:
    m, n, b = w.shape
    n_tokens, out_features = out.shape
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
    partials = out[None] if final else torch.empty(n_splits, *out.shape, dtype=torch.float32, device=out.device)
    bias = None if bias is None else bias.contiguous()
    # One program per tile of outputs and split of the sum over in_features.
    _kernels().decode.decode_kernel[tiles, n_splits, 1](
        x_ptr=x,
        weight_ptr=weight,
        w_ptr=w,
        bias_ptr=bias if final else None,
        out_ptr=partials,
        scale=scale,
        n_tokens=n_tokens,
        out_features=out_features,
        in_features=in_features,
        split_length=split_steps * tile.block_i,
        stride_x_t=x.stride(0),
        stride_weight_row=weight.stride(0),
        stride_out_s=partials.stride(0),
        stride_out_t=partials.stride(1),
        b=b,
        HAS_BIAS=final and bias is not None,
        EVEN_K=in_features % tile.block_i == 0,
        BLOCK_T=tile.block_t,
        BLOCK_O=tile.block_o,
        BLOCK_K=tile.block_i,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )
    if not final:
        _sum_partials(partials, out, 1.0, bias, accumulate=False)


def _sum_partials(partials: Tensor, out: Tensor, scale: float, bias: Tensor | None, accumulate: bool) -> None:
    """out [rows, columns] = scale · partials [splits, rows, columns] summed over splits (+ bias) (+ out)."""
    n_splits, n_rows, n_columns = partials.shape
    block = 256
    _kernels().indexing.sum_partials_kernel[_cdiv(n_columns, block), n_rows, 1](
        partials_ptr=partials,
        bias_ptr=bias,
        out_ptr=out,
        scale=scale,
        n_splits=n_splits,
        n_rows=n_rows,
        n_columns=n_columns,
        stride_out_row=out.stride(0),
        HAS_BIAS=bias is not None,
        ACCUMULATE=accumulate,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _expand(matrix: Tensor, w: Tensor, scale: float, *, transpose: bool = False, base: Tensor | None = None) -> None:
    """Write scale · ΔW or ΔWᵀ (+ `base`, of matrix's strides); columns of `matrix` past the last of ΔW become zero."""
    m, n, b = w.shape
    # A tile is long in the direction in which the matrix is contiguous.
    block_rows, block_cols = (256, 32) if matrix.stride(0) == 1 and matrix.stride(1) != 1 else (32, 256)
    grid = (_cdiv(matrix.shape[0], block_rows), _cdiv(matrix.shape[1], block_cols), 1)
    _kernels().expand.expand_kernel[grid](
        w_ptr=w,
        base_ptr=base,
        out_ptr=matrix,
        scale=scale,
        n_rows=matrix.shape[0],
        n_columns=matrix.shape[1],
        width=(m if transpose else n) * b,
        stride_w_row=b if transpose else n * b,
        stride_w_col=n * b if transpose else b,
        stride_out_row=matrix.stride(0),
        stride_out_col=matrix.stride(1),
        b=b,
        TRANSPOSE=transpose,
        ADD=base is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=8,
        enable_fp_fusion=True,
    )


def _diagonal_sums(dy: Tensor, x: Tensor, dw: Tensor, scale: float) -> None:
    m, n, b = dw.shape
    n_tokens = x.shape[0]
    tile = diagonal_tile(_generation(x.device), x.element_size(), b)
    side = tile.block_o
    tiles = _cdiv(b, side)
    offsets = tiles if b % side == 0 else 2 * tiles - 1
    tokens_per_split, n_splits = _split_tokens(n_tokens, m * n * offsets, tile.block_t)
    sums = torch.empty(n_splits, m * n, offsets, 2, side, dtype=torch.float32, device=x.device)
    # One program per block, offset between tiles and split of the tokens.
    _kernels().weight_grad.diagonal_sums_kernel[m * n * offsets, n_splits, 1](
        dy_ptr=dy,
        x_ptr=x,
        sums_ptr=sums,
        n_tokens=n_tokens,
        n_pairs=m * n,
        in_blocks=n,
        tokens_per_split=tokens_per_split,
        stride_dy_t=dy.stride(0),
        stride_x_t=x.stride(0),
        b=b,
        PRECISION=_precision(),
        BLOCK_Q=side,
        BLOCK_T=tile.block_t,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )
    block = 128
    _kernels().weight_grad.fold_sums_kernel[m * n, _cdiv(b, block), 1](
        sums_ptr=sums,
        dw_ptr=dw,
        scale=scale,
        n_splits=n_splits,
        n_pairs=m * n,
        b=b,
        BLOCK_Q=side,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _block_sums(dy: Tensor, x: Tensor, dw: Tensor, scale: float) -> None:
    m, n, b = dw.shape
    n_tokens = x.shape[0]
    tile = weight_grad_tile(_generation(x.device), x.element_size())
    blocks = tile.block_o // b
    tiles = _cdiv(m, blocks) * _cdiv(n, blocks)
    tokens_per_split, n_splits = _split_tokens(n_tokens, tiles, tile.block_t)
    flat = dw.view(m, n * b)
    partials = flat[None] if n_splits == 1 else torch.empty(n_splits, *flat.shape, dtype=dw.dtype, device=dw.device)
    # One program per tile of whole blocks and split of the tokens.
    _kernels().weight_grad.block_sums_kernel[tiles, n_splits, 1](
        dy_ptr=dy,
        x_ptr=x,
        dw_ptr=partials,
        scale=scale if n_splits == 1 else 1.0,
        n_tokens=n_tokens,
        out_features=m * b,
        in_features=n * b,
        tokens_per_split=tokens_per_split,
        stride_dy_t=dy.stride(0),
        stride_x_t=x.stride(0),
        b=b,
        PRECISION=_precision(),
        BLOCK=tile.block_o,
        BLOCK_T=tile.block_t,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )
    if n_splits > 1:
        _sum_partials(partials, flat, scale, None, accumulate=False)


def _split_tokens(n_tokens: int, programs: int, block_t: int) -> tuple[int, int]:
    """(tokens per split, number of splits): more programs where there are few, at least eight steps in each."""
    steps = _cdiv(n_tokens, block_t)
    split_steps = max(8, _cdiv(steps, _cdiv(_PROGRAMS, programs)))
    return split_steps * block_t, _cdiv(steps, split_steps)


def _precision() -> str:
    """How float32 operands are multiplied: as three TF32 products, or as one where torch's own switch allows that."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 this attribute answers for every way of setting the switch; before, there was one way only.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "tf32x3"


def _product_output(x: Tensor, w: Tensor, transpose: bool, out: Tensor | None, bias: Tensor | None) -> Tensor:
    """What a product writes to, `out` or a new tensor, after checking that all of its operands fit."""
    _check_w(w)
    _check_rows("x", x)
    if x.device != w.device:
        raise ShapeError(f"x is on {x.device}, w on {w.device}: they must be on the same device")
    _check_available(x.device)
    m, n, b = w.shape
    row_blocks, col_blocks = (n, m) if transpose else (m, n)
    out_features = row_blocks * b
    if x.shape[1] != col_blocks * b:
        raise ShapeError(
            f"x has {x.shape[1]} features, w {tuple(w.shape)} takes {col_blocks} · {b} = {col_blocks * b}"
            + (" transposed" if transpose else "")
        )
    n_tokens = x.shape[0]
    if bias is not None and (bias.shape != (out_features,) or bias.device != x.device):
        raise ShapeError(
            f"bias {tuple(bias.shape)} on {bias.device}: the product needs ({out_features},) on {x.device}"
        )
    if out is not None:
        if out.shape != (n_tokens, out_features) or out.dtype != x.dtype or out.device != x.device:
            raise ShapeError(
                f"out {tuple(out.shape)} {out.dtype} on {out.device}: the product is ({n_tokens}, {out_features}) "
                f"{x.dtype} on {x.device}"
            )
        if out.stride(1) != 1 and out_features > 1:
            raise ShapeError(f"out has strides {out.stride()}: its rows must be contiguous")
    return torch.empty(n_tokens, out_features, dtype=x.dtype, device=x.device) if out is None else out


def _check_weight_grad(dy: Tensor, x: Tensor, b: int) -> None:
    _check_rows("x", x)
    _check_rows("dy", dy)
    _check_available(x.device)
    if dy.shape[0] != x.shape[0] or dy.dtype != x.dtype or dy.device != x.device:
        raise ShapeError(
            f"dy {tuple(dy.shape)} {dy.dtype} on {dy.device} and x {tuple(x.shape)} {x.dtype} on {x.device} must agree "
            "in tokens, dtype and device"
        )
    if b < 1 or dy.shape[1] % b or x.shape[1] % b:
        raise ShapeError(f"block_size {b} does not divide both widths, {dy.shape[1]} (dy) and {x.shape[1]} (x)")


def _check_w(w: Tensor) -> None:
    if w.dim() != 3 or w.dtype != torch.float32 or w.numel() == 0:
        raise ShapeError(f"w {tuple(w.shape)} {w.dtype}: the kernels take [m, n, b] float32, none of them 0")


def _check_rows(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or tensor.dtype not in _DTYPES:
        raise ShapeError(
            f"{name} {tuple(tensor.shape)} {tensor.dtype}: the kernels take [tokens, features] in float32, float16 or "
            "bfloat16"
        )


def _check_available(device: torch.device) -> None:
    reason = unavailable_reason(device)
    if reason is not None:
        raise BackendError(f"the Triton kernels cannot run here: {reason}")


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current CUDA device: make it the tensor's where it is not."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device_of(tensor)
    return nullcontext()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _cdiv(a, b) * b
