"""Host side of `kernels/direct.py`: the product by circulant indexing."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import specs
from .expand import Expansion, expansion
from .plans import bound, cdiv, kernels, planned, round_up, split, summation
from .specs import Spec
from .tiles import SMALL_T, hankel_tile, inner_block, product_tile
from .weight_grad import weight_grad_plan

__all__ = ["direct_backward", "direct_product", "planned_backward", "planned_product"]

# run(x, w, bias, out, scale)
_Product = Callable[[Tensor, Tensor, Tensor | None, Tensor, float], None]


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
    run = planned_product(
        specs.spec(x),
        specs.spec(w),
        None if out is None else specs.spec(out),
        None if bias is None else specs.spec(bias),
        transpose,
        specs.precision(x.dtype),
    )
    return run(x, w, bias, out, scale)


def direct_backward(
    dy: Tensor, x: Tensor, w: Tensor, *, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both gradients of `direct_product(x, w)`: dx, added to a given `out`, and dw [m, n, b] float32.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    run = planned_backward(
        specs.spec(dy),
        specs.spec(x),
        specs.spec(w),
        None if out is None else specs.spec(out),
        specs.precision(dy.dtype),
    )
    return run(dy, x, w, out, scale)


@planned
def planned_product(
    x: Spec, w: Spec, out: Spec | None, bias: Spec | None, transpose: bool, precision: str, shares: bool = False
) -> Callable[..., Tensor]:
    """What computes `direct_product` of such operands; there is nothing to share."""
    shape, write = _product_plan(x, w, out, bias, transpose, precision)

    def run(
        x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor | None, scale: float, source: object = None
    ) -> Tensor:
        out = specs.new_or_given(shape, x, out)
        if bias is not None:
            bias = bias.contiguous()
        write(specs.with_contiguous_rows(x), w.contiguous(), bias, out, scale)
        return out

    return run


@planned
def planned_backward(
    dy: Spec, x: Spec, w: Spec, out: Spec | None, precision: str, shares: bool = False
) -> Callable[..., tuple[Tensor, Tensor]]:
    """What computes `direct_backward` of such operands; there is nothing to share."""
    shape, multiply = _product_plan(dy, w, out, None, True, precision)
    dw_shape, correlate = weight_grad_plan(dy, x, w.shape[2], precision)

    def run(
        dy: Tensor, x: Tensor, w: Tensor, out: Tensor | None, scale: float, source: object = None
    ) -> tuple[Tensor, Tensor]:
        dx, dw = specs.new_or_given(shape, dy, out), w.new_empty(*dw_shape)
        dy = specs.with_contiguous_rows(dy)
        multiply(dy, w.contiguous(), None, dx, scale)
        correlate(dy, specs.with_contiguous_rows(x), dw, scale)
        return dx, dw

    return run


def _product_plan(
    x: Spec, w: Spec, out: Spec | None, bias: Spec | None, transpose: bool, precision: str
) -> tuple[tuple[int, int], _Product]:
    """The shape of `direct_product`'s result, and what writes it."""
    shape = specs.product_shape(x, w, out, bias, transpose)
    if shape[0] == 0:
        return shape, lambda x, w, bias, out, scale: None
    plan = _hankel_product if shape[0] <= SMALL_T else _table_product
    run = plan(shape, x, w.shape, transpose, bias is not None, out is not None, precision)
    return shape, specs.on_device(x.device, run)


def _table_product(
    shape: tuple[int, int],
    x: Spec,
    w_shape: torch.Size,
    transpose: bool,
    has_bias: bool,
    accumulate: bool,
    precision: str,
) -> _Product:
    n_tokens, out_features = shape
    dtype, device = x.dtype, x.device
    tile = product_tile(specs.card_of(device), dtype.itemsize, n_tokens)
    table = _table(w_shape, dtype, tile.block_i, transpose)
    # One program per [block_t, block_o] tile of the output.
    multiply = bound(
        kernels().direct.table_product_kernel,
        (cdiv(n_tokens, tile.block_t) * cdiv(out_features, tile.block_o), 1, 1),
        tile,
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
    write: Expansion
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
    origin = round_up(b, phases)
    length = round_up(origin + round_up(b, step), 8)
    # With b odd, say, blocks of x begin anywhere, and a dense row lets whole rows of x be read 16 bytes at a time.
    unaligned = b % phases != 0 and cols * b % phases == 0
    if phases * length >= b * b or unaligned:
        length = round_up(cols * b, inner_block(cols * b, block_i))
        write = expansion((rows * b, length), (length, 1), w_shape, transpose, add=False)
        return _Table((rows * b, length), write, length, 1, cols * b, 1, 0, length, phases)
    stride_row, stride_col = (b, n * b) if transpose else (n * b, b)
    block = 1024
    launch = bound(
        kernels().direct.table_kernel,
        (rows * cols, cdiv(phases * length, block), 1),
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
    x: Spec,
    w_shape: torch.Size,
    transpose: bool,
    has_bias: bool,
    accumulate: bool,
    precision: str,
) -> _Product:
    m, n, b = w_shape
    n_tokens, out_features = shape
    rows, cols = (n, m) if transpose else (m, n)
    tile = hankel_tile(x.dtype.itemsize, b)
    tiles = cdiv(rows, tile.block_t) * cdiv(b, tile.block_o)
    # Programs for one token are few: the sum is split until they fill a card.
    split_length, n_splits = split(cols * b, tile.block_i, tiles * n_tokens, least=2)
    final = n_splits == 1
    multiply = bound(
        kernels().direct.hankel_kernel,
        (tiles, n_tokens, n_splits),
        tile,
        row_blocks=rows,
        col_blocks=cols,
        split_length=split_length,
        stride_w_row=b if transpose else n * b,
        stride_w_col=n * b if transpose else b,
        stride_out_s=n_tokens * out_features,
        b=b,
        TRANSPOSE=transpose,
        HAS_BIAS=final and has_bias,
        ACCUMULATE=final and accumulate,
        EVEN_K=cols * b % tile.block_i == 0,
        PRECISION=precision,
        BLOCK_M=tile.block_t,
        BLOCK_J=tile.block_o,
        BLOCK_K=tile.block_i,
    )
    add_up = summation((n_splits, *shape), has_bias, accumulate)

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
