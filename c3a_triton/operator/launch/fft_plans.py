"""What a product by transforms of blocks launches (`fft.py`): decided by sizes, dtypes and devices alone.

Launches that lack nothing but a call's tensors, chunk by chunk, with the tiles, grids, strides and constants of each.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import fft_bases, specs
from .fft_bases import Allocation, Memory, Transform
from .plans import Launch, bound, cdiv, kernels, round_up, split
from .tiles import TileConfig, mix_outer_tile, mix_tile, mixes_and_sums, outer_tile, transform_tile

__all__ = [
    "PLAIN",
    "GradientPlan",
    "Outer",
    "Plan",
    "Products",
    "SpectraLaunches",
    "gradient_plan",
    "policy",
    "product_plan",
    "x_what",
]


# Rows in one chunk, whatever the scratch: kernels count them in 32 bits.
_MOST_ROWS = 2**29
# Columns of a tile of w or dw (`WIDE` in kernels/fft.py).
_WIDE = 32


# By whether w is there, and x.
SpectraLaunches = Mapping[tuple[bool, bool], Launch]


def _nothing(*operands: object, **arguments: object) -> None:
    """In the place of a launch that is not needed."""


class Chunk(NamedTuple):
    """Some of the tokens."""

    rows: slice | None
    """None for all of them."""
    start: int
    """Of their part of a whole spectrum of x."""
    is_last: bool
    """Whose results include dw."""
    spectra: SpectraLaunches
    """Empty where the first launch of all has computed them."""
    mix: Launch
    outer: Launch
    results: Launch


class Plan(NamedTuple):
    """The launches of a product or its gradients, and the memory that they share."""

    gain: float
    """What a result is to be multiplied by, beside its scale."""
    w_what: Hashable
    """Everything but w that decides on the values of its matrices."""
    x_what: Hashable
    """Everything but x that decides on the values of its spectrum."""
    blocks: Allocation
    """Of the matrices [slots, 2 · rows, 2 · columns] that `mix` multiplies by."""
    z: Allocation
    """Of the spectrum of x."""
    y: Allocation
    """Of the spectrum of the product."""
    whole: bool
    """Whether x is transformed at once, so that its spectrum may be kept."""
    spectra: SpectraLaunches
    chunks: tuple[Chunk, ...]


class GradientPlan(NamedTuple):
    """A plan, and what it has besides where dy is correlated with x."""

    plan: Plan
    g: Allocation
    """Of the spectrum of dy."""
    sums: Allocation
    mixes: bool
    """Whether `outer` multiplies too."""


class Outer(NamedTuple):
    """The sums of dyᵀx."""

    launch: Callable[[slice], Launch]
    """Of these tokens, added to those of the tokens before."""
    n_splits: int
    mixes: bool
    """Whether it multiplies too."""


class Products(NamedTuple):
    """What is done with spectra between the transforms: once for all tokens, or with a w for each group of them."""

    stack: int
    """How many w's there are."""
    mix: Callable[..., Launch]
    outer: Callable[..., Outer]


class _Rows(NamedTuple):
    """What is transformed: tokens of so many blocks, from or to a spectrum whose slots lie so far apart."""

    n_tokens: int
    blocks: int
    stride: int


_NO_ROWS = _Rows(0, 0, 0)


def product_plan(
    device: torch.device,
    dtype: torch.dtype,
    n_tokens: int,
    shape: Sequence[int],
    transpose: bool,
    has_bias: bool,
    accumulate: bool,
    precision: str,
    shares: bool,
    products: Products | None = None,
) -> Plan:
    """The launches of a product with w of this shape; with `shares`, other calls may read the spectrum of x.

    By default with `PLAIN` products.
    """
    m, n, b = shape
    products = products or PLAIN
    stacked = (m * products.stack, n, b)
    rows, cols = (n, m) if transpose else (m, n)
    of = fft_bases.transform(device, dtype, b, precision)
    whole, step = _cut(of, n_tokens, cols, rows)
    z, y = of.memory(n_tokens if whole else step, cols), of.memory(step, rows)

    def chunk(start: int, count: int) -> Chunk:
        return Chunk(
            *_place(start, count, n_tokens, cols * of.apart if whole else 0),
            {} if whole or start == 0 else _spectra_launches(of, stacked, transpose, _Rows(count, cols, z.stride)),
            mix=products.mix(of, slice(start, start + count), cols, rows, z, y, read_again=whole and shares),
            outer=_nothing,
            results=_results(
                of,
                stacked,
                _Rows(count, rows, y.stride),
                has_bias=has_bias,
                accumulate=accumulate,
                sums_ptr=None,
                dw_ptr=None,
            ),
        )

    return Plan(
        of.basis.gain,
        (of.scratch, precision, transpose),
        x_what(dtype, precision, b, n_tokens, cols),
        of.matrices(*((n, stacked[0]) if transpose else (stacked[0], n))).allocation,
        z.allocation,
        y.allocation,
        whole,
        _spectra_launches(of, stacked, transpose, _Rows(n_tokens if whole else step, cols, z.stride)),
        tuple(chunk(start, min(step, n_tokens - start)) for start in range(0, n_tokens, step)),
    )


def gradient_plan(
    device: torch.device,
    dtype: torch.dtype,
    n_tokens: int,
    shape: Sequence[int],
    with_dx: bool,
    accumulate: bool,
    precision: str,
    shares: bool,
    products: Products | None = None,
) -> GradientPlan:
    """The launches of dw of this shape and, if wanted, dx; `shares` and `products` as in `product_plan`."""
    m, n, b = shape
    products = products or PLAIN
    stacked = (m * products.stack, n, b)
    of = fft_bases.transform(device, dtype, b, precision)
    whole, step = _cut(of, n_tokens, n, m + n * with_dx)
    g, z, y = of.memory(step, m), of.memory(n_tokens if whole else step, n), of.memory(step, n)
    outer = products.outer(of, step, m, n, g, z, y, with_dx=with_dx, read_again=whole and shares)

    def chunk(start: int, count: int) -> Chunk:
        is_last = start + count == n_tokens
        tokens = slice(start, start + count)
        dx, dw = _Rows(count, n, y.stride) if with_dx else _NO_ROWS, outer.n_splits if is_last else 0
        own_rows = (_Rows(count, m, g.stride), _NO_ROWS if whole else _Rows(count, n, z.stride))
        return Chunk(
            *_place(start, count, n_tokens, n * of.apart if whole else 0),
            {} if start == 0 else _spectra_launches(of, stacked, True, *own_rows),
            mix=products.mix(of, tokens, m, n, g, y, read_again=True) if with_dx and not outer.mixes else _nothing,
            outer=outer.launch(tokens),
            results=_results(of, stacked, dx, dw, accumulate=accumulate, bias_ptr=None)
            if with_dx or is_last
            else _nothing,
        )

    first_rows = (_Rows(step, m, g.stride), _Rows(n_tokens if whole else step, n, z.stride))
    plan = Plan(
        of.basis.gain,
        (of.scratch, precision, True),
        x_what(dtype, precision, b, n_tokens, n),
        of.matrices(n, stacked[0]).allocation,
        z.allocation,
        y.allocation,
        whole,
        _spectra_launches(of, stacked, True, *first_rows),
        tuple(chunk(start, min(step, n_tokens - start)) for start in range(0, n_tokens, step)),
    )
    sums = Memory((outer.n_splits, *of.matrices(stacked[0], n).shape), torch.float32, device)
    return GradientPlan(plan, g.allocation, sums.allocation, outer.mixes)


def x_what(dtype: torch.dtype, precision: str, b: int, n_tokens: int, blocks: int) -> Hashable:
    """Everything but x that decides on the values of its spectrum."""
    return dtype, precision, b, n_tokens, blocks


def _place(start: int, count: int, n_tokens: int, blocks: int) -> tuple[slice | None, int, bool]:
    """The first fields of a chunk; `blocks` of Q lie side by side in a whole spectrum."""
    rows = None if count == n_tokens else slice(start, start + count)
    return rows, 2 * start * blocks, start + count == n_tokens


def policy(read_again: bool) -> str:
    """What becomes in the cache of what a launch has read."""
    return "" if read_again else "evict_first"


def _cut(of: Transform, n_tokens: int, x_blocks: int, other_blocks: int) -> tuple[bool, int]:
    """Whether x is transformed whole, and the tokens of a chunk: all, or chunks of equal size, a multiple of 128.

    Whole, the spectrum of x takes no more than half of the scratch, and chunks of the others fit what it leaves.
    """
    scratch = specs.scratch_bytes(of.device)
    spectrum = of.memory(n_tokens, x_blocks).n_bytes
    whole = n_tokens * x_blocks * of.apart <= _MOST_ROWS and (not scratch or 2 * spectrum <= scratch)
    limit = _MOST_ROWS // (max(x_blocks, other_blocks) * of.apart)
    if scratch:
        scratch -= spectrum if whole else 0
        blocks = other_blocks if whole else x_blocks + other_blocks
        limit = min(limit, scratch // (2 * of.slots * of.apart * blocks * of.scratch.itemsize))
    chunks = cdiv(n_tokens, max(limit, 128))
    return whole, min(round_up(cdiv(n_tokens, chunks), 128), n_tokens)


def _spectra_launches(of: Transform, shape: Sequence[int], transpose: bool, *rows: _Rows) -> SpectraLaunches:
    """Each launch that a call may need: with w and without, of all the rows and without the last, those of x."""
    some = {(with_w, with_x): rows if with_x else rows[:-1] for with_w in (True, False) for with_x in (True, False)}
    return {key: _spectra(of, shape, transpose, key[0], *parts) for key, parts in some.items() if key[0] or parts}


def _spectra(
    of: Transform,
    shape: Sequence[int],
    transpose: bool,
    with_w: bool,
    x: _Rows = _NO_ROWS,
    other: _Rows = _NO_ROWS,
) -> Launch:
    """The spectra of w as matrices, of one tensor and of another, those that there are, in one launch."""
    m, n, _ = shape
    tile = transform_tile(of.card, of.scratch.itemsize, of.size, of.apart)
    x_rows, other_rows = (rows.n_tokens * rows.blocks * of.apart for rows in (x, other))
    x_tiles, other_tiles = (
        cdiv(rows, tile.block_t) * cdiv(2 * of.slots, tile.block_o) for rows in (x_rows, other_rows)
    )
    w_tiles = cdiv(m * n * of.apart**2, _WIDE) * cdiv(2 * of.slots, _WIDE) if with_w else 0
    return bound(
        # One program per tile of rows and columns.
        kernels().fft.spectra_kernel,
        (w_tiles + x_tiles + other_tiles, 1, 1),
        tile,
        exact_ptr=of.exact.forward if with_w else None,
        basis_ptr=of.basis.forward if x_tiles else None,
        w_tiles=w_tiles,
        x_tiles=x_tiles,
        other_tiles=other_tiles,
        x_rows=x_rows,
        other_rows=other_rows,
        stride_z_f=x.stride,
        stride_other_z_f=other.stride,
        out_blocks=m,
        in_blocks=n,
        x_blocks=x.blocks,
        other_blocks=other.blocks,
        TRANSPOSE=transpose,
        BLOCK_W=_WIDE,
        **_transforming(of, tile),
    )


def _mix(of: Transform, tokens: slice, cols: int, rows: int, z: Memory, y: Memory, *, read_again: bool) -> Launch:
    """y = z · blocksᵀ, slot by slot."""
    n_tokens = tokens.stop - tokens.start
    rows, cols = rows * of.apart, cols * of.apart
    tile = mix_tile(of.card, of.scratch.itemsize, n_tokens, 2 * rows, 2 * cols)
    return bound(
        # One program per tile of tokens and columns, and per slot.
        kernels().fft.mix_kernel,
        (cdiv(n_tokens, tile.block_t) * cdiv(2 * rows, tile.block_o) * of.slots, 1, 1),
        tile,
        n_tokens=n_tokens,
        stride_z_f=z.stride,
        stride_y_f=y.stride,
        row_blocks=rows,
        col_blocks=cols,
        SLOTS=of.slots,
        POLICY=policy(read_again),
        PRECISION=of.precision,
        BLOCK_T=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
        **of.options,
    )


def _outer(
    of: Transform, step: int, m: int, n: int, g: Memory, z: Memory, y: Memory, *, with_dx: bool, read_again: bool
) -> Outer:
    """sums = gᵀ z, slot by slot, of up to `step` tokens at a time; y = g · blocksᵀ too, where one program can."""
    rows, columns = 2 * m * of.apart, 2 * n * of.apart
    together = with_dx and mixes_and_sums(of.card, of.scratch.itemsize, rows, columns)
    tile = (mix_outer_tile if together else outer_tile)(of.card, of.scratch.itemsize, rows, columns)
    tiles = cdiv(rows, tile.block_o) * cdiv(columns, tile.block_i)
    # As many splits of a chunk as fill a card; a program of eight warps that multiplies too fills a multiprocessor.
    programs = tiles * of.slots * (2 if together and tile.num_warps == 8 else 1)
    tokens_per_split, n_splits = split(step, tile.block_t, programs, least=8)

    def launch(tokens: slice) -> Launch:
        return bound(
            # One program per tile of a slot's matrix, slot and split of the tokens.
            kernels().fft.outer_kernel,
            (tiles, of.slots, n_splits),
            tile,
            n_tokens=tokens.stop - tokens.start,
            tokens_per_split=tokens_per_split,
            stride_g_f=g.stride,
            stride_z_f=z.stride,
            stride_y_f=y.stride,
            out_blocks=m * of.apart,
            in_blocks=n * of.apart,
            ACCUMULATE=tokens.start > 0,
            POLICY=policy(read_again),
            PRECISION=of.precision,
            BLOCK_O=tile.block_o,
            BLOCK_I=tile.block_i,
            BLOCK_T=tile.block_t,
            **of.options,
        )

    return Outer(launch, n_splits, together)


# With one w.
PLAIN = Products(1, _mix, _outer)


def _results(
    of: Transform,
    shape: Sequence[int],
    out: _Rows,
    n_splits: int = 0,
    *,
    has_bias: bool = False,
    accumulate: bool = False,
    **absent: None,
) -> Launch:
    """out = scale · the inverse transform (+ bias) (+ out), and dw from the sums of so many splits, either of them.

    `absent` names the operands that no call has.
    """
    m, n, _ = shape
    tile = transform_tile(of.card, of.scratch.itemsize, of.size, of.apart)
    # A row of dw is summed over S pairs of blocks: fewer rows keep them in registers.
    w_rows = 16 if of.apart >= 4 else _WIDE
    w_tiles = cdiv(m * n * of.apart, w_rows) * cdiv(of.size, _WIDE) if n_splits else 0
    n_rows = out.n_tokens * out.blocks * of.apart
    tiles = cdiv(n_rows, tile.block_t) * cdiv(of.size, tile.block_o)
    return bound(
        # One program per tile of rows and columns.
        kernels().fft.results_kernel,
        (w_tiles + tiles, 1, 1),
        tile,
        basis_ptr=of.basis.inverse if tiles else None,
        exact_ptr=of.exact.inverse if w_tiles else None,
        w_tiles=w_tiles,
        tiles=tiles,
        n_rows=n_rows,
        n_splits=n_splits,
        stride_y_f=out.stride,
        out_blocks=m,
        in_blocks=n,
        blocks=out.blocks,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
        BLOCK_W=w_rows,
        **_transforming(of, tile),
        **absent,
    )


def _transforming(of: Transform, tile: TileConfig) -> dict[str, Any]:
    """Constants of the kernels that transform, one way or the other."""
    return {
        "S": of.apart,
        "Q": of.size,
        "PRECISION": of.precision,
        "BLOCK_R": tile.block_t,
        "BLOCK_C": tile.block_o,
        "BLOCK_K": tile.block_i,
        **of.options,
    }
