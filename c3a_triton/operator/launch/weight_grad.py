"""Host side of `kernels/weight_grad.py`: dw by circulant indexing."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import specs
from .plans import bound, cdiv, kernels, planned, split, summation
from .specs import Spec
from .tiles import diagonal_tile, weight_grad_tile

__all__ = ["WeightGrad", "weight_grad", "weight_grad_plan"]

# run(dy, x, dw, scale)
WeightGrad = Callable[[Tensor, Tensor, Tensor, float], object]


def weight_grad(dy: Tensor, x: Tensor, block_size: int, *, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """dw[M, N, q] = scale · Σ_t Σ_j dy[t, M·b + j] · x[t, N·b + (j + q) mod b], the same from run to run.

    Args:
        dy: [T, m·b] float32, float16 or bfloat16.
        x: [T, n·b] of dy's dtype.
        block_size: b, any common divisor of both widths.
        scale: multiplies the result.
        dtype: dtype of the result, rounded from float32.

    Returns:
        [m, n, b].

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    shape, run = weight_grad_plan(specs.spec(dy), specs.spec(x), block_size, specs.precision(x.dtype))
    dw = torch.empty(*shape, dtype=torch.float32, device=x.device)
    run(specs.with_contiguous_rows(dy), specs.with_contiguous_rows(x), dw, scale)
    return dw if dtype == torch.float32 else dw.to(dtype)


@planned
def weight_grad_plan(dy: Spec, x: Spec, b: int, precision: str) -> tuple[tuple[int, int, int], WeightGrad]:
    """The shape of `weight_grad`'s result, and what writes it."""
    shape = specs.weight_grad_shape(dy, x, b)
    if 0 in shape or x.shape[0] == 0:
        return shape, lambda dy, x, dw, scale: dw.zero_()
    run = (_block_sums if b <= 64 else _diagonal_sums)(shape, x, precision)
    return shape, specs.on_device(x.device, run)


def _diagonal_sums(shape: tuple[int, int, int], x: Spec, precision: str) -> WeightGrad:
    m, n, b = shape
    (n_tokens, _), dtype, device = x
    tile = diagonal_tile(specs.card_of(device), dtype.itemsize, b)
    side = tile.block_o
    tiles = cdiv(b, side)
    offsets = tiles if b % side == 0 else 2 * tiles - 1
    tokens_per_split, n_splits = split(n_tokens, tile.block_t, m * n * offsets, least=8)
    # One program per block, offset between tiles and split of the tokens.
    multiply = bound(
        kernels().weight_grad.diagonal_sums_kernel,
        (m * n * offsets, n_splits, 1),
        tile,
        n_tokens=n_tokens,
        n_pairs=m * n,
        in_blocks=n,
        tokens_per_split=tokens_per_split,
        b=b,
        PRECISION=precision,
        BLOCK_Q=side,
        BLOCK_T=tile.block_t,
    )
    block = 128
    fold = bound(
        kernels().weight_grad.fold_sums_kernel,
        (m * n, cdiv(b, block), 1),
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


def _block_sums(shape: tuple[int, int, int], x: Spec, precision: str) -> WeightGrad:
    m, n, b = shape
    (n_tokens, _), dtype, device = x
    tile = weight_grad_tile(specs.card_of(device), dtype.itemsize)
    blocks = tile.block_o // b
    tiles = cdiv(m, blocks) * cdiv(n, blocks)
    tokens_per_split, n_splits = split(n_tokens, tile.block_t, tiles, least=8)
    final = n_splits == 1
    # One program per tile of whole blocks and split of the tokens.
    multiply = bound(
        kernels().weight_grad.block_sums_kernel,
        (tiles, n_splits, 1),
        tile,
        n_tokens=n_tokens,
        out_features=m * b,
        in_features=n * b,
        tokens_per_split=tokens_per_split,
        b=b,
        PRECISION=precision,
        BLOCK=tile.block_o,
        BLOCK_T=tile.block_t,
    )
    add_up = summation((n_splits, m, n * b))

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
