"""Host side of `kernels/routed.py`: products whose rows have w's of their own out of a stack, sorted by group.

By transforms of blocks as `fft.py` has them, with its chunks and launches but for what multiplies spectra
(`routed_plans.py`), and for few rows by circulant indexing (`grouped.py`). Which rows belong to which w is read from
`offsets` on the device: no call waits for it, and a captured CUDA graph computes with those that it then finds.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ShapeError
from ..routes import share
from . import fft, fft_plans, grouped, routed_plans, specs
from .fft_bases import taken_apart
from .fft_plans import GradientPlan, Plan
from .plans import planned
from .routed_plans import Tiles, route_tiles
from .specs import Spec
from .tiles import SMALL_T, grouped_tile

__all__ = ["routed_backward", "routed_direct", "routed_product", "routed_weight_grad"]

# Blocks of a stack that are transformed: kernels count them in 32 bits, and a tile of 256 rows of them, two reals wide.
_MOST_BLOCKS, _MOST_ROWS = 2**31 - 2**8, 2**22


def routed_product(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    out: Tensor | None = None,
    tiles: Tiles,
) -> Tensor:
    """x_s ΔW_gᵀ (or x_s ΔW_g) for every row s and its group g, by transforms of blocks.

    Args:
        x: `(n_rows, in_features)`, or transposed `(n_rows, out_features)`, sorted by group; float32, float16, bfloat16.
        w: `(n_groups, m, n, b)` float32.
        offsets: `(n_groups + 1,)` int32: the rows of group g are `offsets[g]` to `offsets[g + 1]`.
        scale: multiplies ΔW.
        transpose: multiply by ΔW instead of its transpose, as the gradient of x does.
        out: added to, in x's dtype.
        tiles: `Routes.tiles` of these offsets.

    Returns:
        `(n_rows, out_features)`, or transposed `(n_rows, in_features)`, in x's dtype: `out`, or what is new. Rows
        without a group are 0, or what `out` held.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    shape, run = _product_plan(
        specs.spec(x),
        specs.spec(w),
        specs.spec(offsets),
        None if out is None else specs.spec(out),
        transpose,
        specs.precision(x.dtype, fft.OF_16BIT),
    )
    out = specs.new_or_given(shape, x, out)
    run(tiles, offsets.contiguous(), specs.with_contiguous_rows(x), w, None, out, scale, None)
    return out


def routed_direct(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    out: Tensor | None = None,
    tiles: Tiles,
) -> Tensor:
    """`routed_product` by circulant indexing; arguments, result and errors are the same."""
    _one(specs.spec(w), specs.spec(offsets))
    n_rows = x.shape[0]
    few = share(w.shape[0], n_rows) <= SMALL_T
    # Tiles of one row are the group of each row.
    table = tiles(1 if few else grouped_tile(x.element_size()).block_t, 0, n_rows, make=route_tiles)
    product = grouped.indexed_product if few else grouped.tiled_product
    return product(x, w, table, scale=scale, transpose=transpose, out=out)


def routed_weight_grad(
    dy: Tensor,
    x: Tensor,
    block_size: int,
    offsets: Tensor,
    *,
    scale: float,
    dtype: torch.dtype = torch.float32,
    tiles: Tiles,
) -> Tensor:
    """dw `(n_groups, m, n, b)`, that of each group from its own rows, of 0 rows 0; the same from run to run.

    Arguments and errors as of `routed_product`; dy is `(n_rows, m·b)` as x is `(n_rows, n·b)`.
    """
    _, shape, run = _gradient_plan(
        specs.spec(dy),
        specs.spec(x),
        None,
        specs.spec(offsets),
        None,
        block_size,
        specs.precision(x.dtype, fft.OF_16BIT),
    )
    dw = torch.empty(shape, dtype=torch.float32, device=x.device)
    rows = specs.with_contiguous_rows(dy), specs.with_contiguous_rows(x)
    run(tiles, offsets.contiguous(), *rows, None, None, dw, scale, None)
    return dw if dtype == torch.float32 else dw.to(dtype)


def routed_backward(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, *, scale: float, out: Tensor | None = None, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Both gradients of `routed_product(x, w, offsets)`, dy transformed once: dx, added to a given `out`, and dw.

    Arguments and errors as of `routed_product` and `routed_weight_grad`.
    """
    shape, dw_shape, run = _gradient_plan(
        specs.spec(dy),
        specs.spec(x),
        specs.spec(w),
        specs.spec(offsets),
        None if out is None else specs.spec(out),
        w.shape[-1],
        specs.precision(x.dtype, fft.OF_16BIT),
    )
    dx = specs.new_or_given(shape, dy, out)
    dw = torch.empty(dw_shape, dtype=torch.float32, device=dy.device)
    rows = specs.with_contiguous_rows(dy), specs.with_contiguous_rows(x)
    run(tiles, offsets.contiguous(), *rows, w, dx, dw, scale, None)
    return dx, dw


@planned
def _product_plan(
    x: Spec, w: Spec, offsets: Spec, out: Spec | None, transpose: bool, precision: str
) -> tuple[tuple[int, int], Callable[..., None]]:
    """The shape of `routed_product`'s result, and what writes it."""
    shape = specs.product_shape(x, _one(w, offsets), out, None, transpose)
    (n_rows, _), dtype, device = x
    if n_rows == 0:
        return shape, lambda *operands: None
    stack, *of_one = w.shape
    products = routed_plans.products(stack, n_rows, transpose)
    plan = fft_plans.product_plan(
        device, dtype, n_rows, of_one, transpose, False, out is not None, precision, False, products
    )
    return shape, specs.on_device(device, functools.partial(_multiply, plan))


@planned
def _gradient_plan(
    dy: Spec, x: Spec, w: Spec | None, offsets: Spec, out: Spec | None, b: int, precision: str
) -> tuple[tuple[int, int], tuple[int, ...], Callable[..., object]]:
    """The shapes of dx (where w is given) and dw, and what writes them."""
    dx_shape = (0, 0) if w is None else specs.product_shape(dy, _one(w, offsets), out, None, transpose=True)
    of_one = specs.weight_grad_shape(dy, x, b)
    stack = offsets.shape[0] - 1
    _one(Spec(torch.Size((stack, *of_one)), torch.float32, x.device), offsets)
    (n_rows, _), dtype, device = x
    if n_rows == 0 or 0 in of_one:
        return dx_shape, (stack, *of_one), lambda tiles, offsets, dy, x, w, dx, dw, *rest: dw.zero_()
    products = routed_plans.products(stack, n_rows, transpose=True)
    plan = fft_plans.gradient_plan(
        device, dtype, n_rows, of_one, w is not None, out is not None, precision, False, products
    )
    return dx_shape, (stack, *of_one), specs.on_device(device, functools.partial(_correlate, plan))


def _multiply(plan: Plan, tiles: Tiles, offsets: Tensor, *operands: Any) -> None:
    fft.multiply(_routed(plan, tiles, offsets), *operands)


def _correlate(of_dy: GradientPlan, tiles: Tiles, offsets: Tensor, *operands: Any) -> None:
    fft.correlate(of_dy._replace(plan=_routed(of_dy.plan, tiles, offsets)), *operands)


def _routed(plan: Plan, tiles: Tiles, offsets: Tensor) -> Plan:
    """The plan for one call: its products of spectra have these routes, which other calls have none of."""
    routes = {"tiles": tiles, "offsets": offsets}
    bound = functools.partial
    chunks = (c._replace(mix=bound(c.mix, **routes), outer=bound(c.outer, **routes)) for c in plan.chunks)
    return plan._replace(chunks=tuple(chunks))


def _one(w: Spec, offsets: Spec) -> Spec:
    """One w of a stack that fits its offsets."""
    shape, dtype, device = w
    if len(shape) != 4 or 0 in shape or offsets != ((shape[0] + 1,), torch.int32, device):
        raise ShapeError(
            f"w {tuple(shape)} on {device} with offsets {tuple(offsets.shape)} {offsets.dtype} on {offsets.device}: "
            "the kernels take [groups, m, n, b], none of them 0, and as many int32 offsets and one more, on one device"
        )
    apart = taken_apart(shape[3])[0]
    rows = shape[0] * shape[1] * apart
    if rows > _MOST_ROWS or rows * shape[2] * apart > _MOST_BLOCKS:
        raise ShapeError(
            f"w {tuple(shape)} has more blocks than kernels count ({_MOST_ROWS} rows of them, {_MOST_BLOCKS} in all): "
            "take a larger block size, or fewer groups at a time"
        )
    return Spec(torch.Size(shape[1:]), dtype, device)
