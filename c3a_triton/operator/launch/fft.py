"""Host side of `kernels/fft.py`: the product by transforms of blocks, in three launches a direction.

    forward     spectra (w ‖ x)       → mix            → results (out)
    backward    spectra (w ‖ dy ‖ x)  → mix and outer  → results (dw ‖ dx)

spectra    w as matrices, x [T, n·b] as [SLOTS, T, 2·S·n]: products with the basis of Q values, b = S·Q
mix        per slot [T, 2·S·n] · [2·S·n, 2·S·m]; outer sums dyᵀx, per slot [2·S·m, T] · [T, 2·S·n]
results    the transposes of the transforms, with the epilogue

Mix and outer are two launches where one would spill registers (`tiles.mixes_and_sums`). Tokens are worked off in chunks
that use the same scratch memory (`specs.scratch_bytes`); x is transformed whole where its spectrum takes no more than
half of that. How blocks of each size and dtype are transformed, `fft_bases.py` says.

The spectrum of w is computed in float32 in every call, because w may have changed, and rounded once to the dtype of
the other spectra. Whole spectra of x, and those of frozen w, may outlive a call: `spectra.py` decides.

What a call launches depends on sizes and dtypes alone. It is decided once, as launches that lack nothing but the call's
tensors, so that a repeated call finds grids, strides, tiles and constants by one look-up.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import spectra
from . import fft_bases, specs
from .fft_bases import Allocation, Memory, Transform
from .plans import Launch, bound, cdiv, kernels, planned, round_up, split
from .specs import Spec
from .tiles import mix_outer_tile, mix_tile, mixes_and_sums, outer_tile, transform_tile

__all__ = ["fft_backward", "fft_backward_of_spectrum", "fft_product", "fft_weight_grad", "kept_spectrum"]


# How float32 operands that stand for 16-bit tensors are multiplied.
_OF_16BIT = "tf32"
# Rows in one chunk, whatever the scratch: kernels count them in 32 bits.
_MOST_ROWS = 2**29
# Columns of a tile of w or dw (`WIDE` in kernels/fft.py).
_WIDE = 32


def fft_product(
    x: Tensor,
    w: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    source: spectra.Source | None = None,
) -> Tensor:
    """x ΔWᵀ (or x ΔW) by transforms of blocks; arguments, result and errors are those of `direct.direct_product`.

    With `source`, which says whose rows x has, its spectrum may be shared with other calls.
    """
    shape, run = _product_plan(
        specs.spec(x),
        specs.spec(w),
        None if out is None else specs.spec(out),
        None if bias is None else specs.spec(bias),
        transpose,
        specs.precision(x.dtype, _OF_16BIT),
        source is not None,
    )
    out = specs.new_or_given(shape, x, out)
    run(specs.with_contiguous_rows(x), w, None if bias is None else bias.contiguous(), out, scale, source)
    return out


def fft_weight_grad(
    dy: Tensor,
    x: Tensor,
    block_size: int,
    *,
    scale: float,
    dtype: torch.dtype = torch.float32,
    source: spectra.Source | None = None,
) -> Tensor:
    """dw [m, n, b] from the spectra of dy and x; arguments and errors are those of `weight_grad.weight_grad`.

    The same from run to run: tokens are summed in an order that depends on shapes only. `source` as in `fft_product`.
    """
    precision = specs.precision(x.dtype, _OF_16BIT)
    _, shape, run = _gradient_plan(specs.spec(dy), specs.spec(x), None, None, block_size, precision, source is not None)
    dw = torch.empty(shape, dtype=torch.float32, device=x.device)
    run(specs.with_contiguous_rows(dy), specs.with_contiguous_rows(x), None, None, dw, scale, source)
    return dw if dtype == torch.float32 else dw.to(dtype)


def fft_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    source: spectra.Source | None = None,
) -> tuple[Tensor, Tensor]:
    """Both gradients of `fft_product(x, w)`, dy transformed once: dx (added to a given `out`) and dw [m, n, b] float32.

    `source` as in `fft_product`.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    shape, dw_shape, run = _gradient_plan(
        specs.spec(dy),
        specs.spec(x),
        specs.spec(w),
        None if out is None else specs.spec(out),
        w.shape[2],
        specs.precision(x.dtype, _OF_16BIT),
        source is not None,
    )
    dx = specs.new_or_given(shape, dy, out)
    dw = torch.empty(dw_shape, dtype=torch.float32, device=dy.device)
    run(specs.with_contiguous_rows(dy), specs.with_contiguous_rows(x), w, dx, dw, scale, source)
    return dx, dw


def kept_spectrum(x: Tensor, block_size: int) -> Tensor | None:
    """The spectrum of x [*, features] that `fft_product` has left for others, if it is whole and takes x's bytes."""
    if fft_bases.spectrum_itemsize(x.dtype, block_size) != 2:  # float32 ones of 16-bit x would be twice as large
        return None
    features = x.shape[-1]
    return spectra.kept_input(x, _x_what(x.dtype, _OF_16BIT, block_size, x.numel() // features, features // block_size))


def fft_backward_of_spectrum(
    dy: Tensor, spectrum: Tensor, w: Tensor, *, scale: float, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """dx (None unless `needs_x`) and dw [m, n, b] float32 from what `kept_spectrum` returned in place of x."""
    _, n, b = w.shape
    shape, dw_shape, run = _gradient_plan(
        specs.spec(dy),
        Spec(torch.Size((dy.shape[0], n * b)), dy.dtype, dy.device),
        specs.spec(w) if needs_x else None,
        None,
        b,
        specs.precision(dy.dtype, _OF_16BIT),
        True,
    )
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device) if needs_x else None
    dw = torch.empty(dw_shape, dtype=torch.float32, device=dy.device)
    run(specs.with_contiguous_rows(dy), spectrum, w if needs_x else None, dx, dw, scale, None, True)
    return dx, dw


def _multiply(
    plan: "_Plan",
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scale: float,
    source: spectra.Source | None,
) -> None:
    """Write a product, as planned."""
    blocks, z = _first_spectra(plan, w, None, None, x, source)
    y = plan.y()
    for chunk in plan.chunks:
        rows = chunk.rows
        if chunk.spectra:
            _launch_spectra(chunk.spectra, None, None, None, None, x[rows], z)
        chunk.mix(z_ptr=z[:, chunk.start :] if chunk.start else z, blocks_ptr=blocks, y_ptr=y)
        chunk.results(
            y_ptr=y,
            bias_ptr=bias,
            out_ptr=out if rows is None else out[rows],
            sums_ptr=None,
            dw_ptr=None,
            scale=scale * plan.gain,
            stride_out_t=out.stride(0),
        )


def _correlate(
    plan: "_Plan",
    of_dy: "_OfGradient",
    dy: Tensor,
    x: Tensor,
    w: Tensor | None,
    dx: Tensor | None,
    dw: Tensor,
    scale: float,
    source: spectra.Source | None,
    x_is_spectrum: bool = False,
) -> None:
    """Write dw and, with w, dx, as planned."""
    g = of_dy.g()
    blocks, z = _first_spectra(plan, w, dy, g, x, source, x_is_spectrum)
    y = None if dx is None else plan.y()
    sums = of_dy.sums()
    for chunk in plan.chunks:
        rows = chunk.rows
        if chunk.spectra:
            _launch_spectra(chunk.spectra, None, None, dy[rows], g, None if plan.whole else x[rows], z)
        chunk.mix(z_ptr=g, blocks_ptr=blocks, y_ptr=y)
        chunk.outer(
            g_ptr=g,
            z_ptr=z[:, chunk.start :] if chunk.start else z,
            sums_ptr=sums,
            blocks_ptr=blocks if of_dy.mixes else None,
            y_ptr=y if of_dy.mixes else None,
        )
        chunk.results(
            y_ptr=y,
            bias_ptr=None,
            out_ptr=dx if dx is None or rows is None else dx[rows],
            sums_ptr=sums if chunk.is_last else None,
            dw_ptr=dw if chunk.is_last else None,
            scale=scale * plan.gain,
            stride_out_t=0 if dx is None else dx.stride(0),
        )


def _first_spectra(
    plan: "_Plan",
    w: Tensor | None,
    dy: Tensor | None,
    g: Tensor | None,
    x: Tensor,
    source: spectra.Source | None,
    x_is_spectrum: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """w's matrices and the spectrum of x, whole or of the first chunk; that of the first chunk of dy is written to g.

    What is known is not computed again, and the rest is computed in one launch.
    """
    blocks = new_w = keep_w = place = new_x = None
    z = x if x_is_spectrum else None
    if w is not None:
        blocks, is_new, keep_w = spectra.of_weight(w, plan.w_what, plan.blocks)
        new_w = w.contiguous() if is_new else None
    if plan.whole and source is not None:
        z, place = spectra.of_input(source, plan.x_what)
    rows = plan.chunks[0].rows
    if z is None:
        z = plan.z()
        new_x = x if plan.whole or rows is None else x[rows]
    if dy is not None and rows is not None:
        dy = dy[rows]
    if new_w is not None or dy is not None or new_x is not None:
        _launch_spectra(plan.spectra, new_w, blocks, dy, g, new_x, z)
    if keep_w is not None and blocks is not None:
        keep_w(blocks)
    if place is not None and new_x is not None:
        spectra.keep_input(place, z)
    return blocks, z


def _launch_spectra(
    launches: "_SpectraLaunches",
    w: Tensor | None,
    blocks: Tensor | None,
    dy: Tensor | None,
    g: Tensor | None,
    x: Tensor | None,
    z: Tensor,
) -> None:
    """The spectra of those that are there."""
    first, first_z, other, other_z = (x, z, None, None) if dy is None else (dy, g, x, z)
    launches[w is not None, x is not None](
        w_ptr=w,
        blocks_ptr=None if w is None else blocks,
        x_ptr=first,
        z_ptr=None if first is None else first_z,
        stride_x_t=0 if first is None else first.stride(0),
        other_ptr=other,
        other_z_ptr=None if other is None else other_z,
        stride_other_t=0 if other is None else other.stride(0),
    )


# By whether w is there, and x.
_SpectraLaunches = Mapping[tuple[bool, bool], Launch]


def _nothing(*operands: object, **arguments: object) -> None:
    """In the place of a launch that is not needed."""


class _Chunk(NamedTuple):
    """Some of the tokens."""

    rows: slice | None
    """None for all of them."""
    start: int
    """Of their part of a whole spectrum of x."""
    is_last: bool
    spectra: _SpectraLaunches
    """Empty where the first launch of all has computed them."""
    mix: Launch
    outer: Launch
    results: Launch


class _Plan(NamedTuple):
    gain: float
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
    spectra: _SpectraLaunches
    chunks: tuple[_Chunk, ...]


class _OfGradient(NamedTuple):
    """What a plan has besides where dy is correlated with x."""

    g: Allocation
    """Of the spectrum of dy."""
    sums: Allocation
    mixes: bool
    """Whether `outer` multiplies too."""


class _Rows(NamedTuple):
    """What is transformed: tokens of so many blocks, from or to a spectrum whose slots lie so far apart."""

    n_tokens: int
    blocks: int
    stride: int


_NO_ROWS = _Rows(0, 0, 0)


@planned
def _product_plan(
    x: Spec, w: Spec, out: Spec | None, bias: Spec | None, transpose: bool, precision: str, shares: bool
) -> tuple[tuple[int, int], Callable[..., None]]:
    """The shape of `fft_product`'s result, and what writes it."""
    out_shape = specs.product_shape(x, w, out, bias, transpose)
    (n_tokens, _), dtype, device = x
    if n_tokens == 0:
        return out_shape, _nothing
    m, n, b = shape = w.shape
    rows, cols = (n, m) if transpose else (m, n)
    of = fft_bases.transform(device, dtype, b, precision)
    whole, step = _cut(of, n_tokens, cols, rows)
    z, y = of.memory(n_tokens if whole else step, cols), of.memory(step, rows)

    def chunk(start: int, count: int) -> _Chunk:
        return _Chunk(
            *_place(start, count, n_tokens, cols * of.apart if whole else 0),
            {} if whole or start == 0 else _spectra_launches(of, shape, transpose, _Rows(count, cols, z.stride)),
            mix=_mix(of, count, cols, rows, z, y, read_again=whole and shares),
            outer=_nothing,
            results=_results(
                of, shape, _Rows(count, rows, y.stride), has_bias=bias is not None, accumulate=out is not None
            ),
        )

    plan = _Plan(
        of.basis.gain,
        (of.scratch, precision, transpose),
        _x_what(dtype, precision, b, n_tokens, cols),
        of.matrices(rows, cols).allocation,
        z.allocation,
        y.allocation,
        whole,
        _spectra_launches(of, shape, transpose, _Rows(n_tokens if whole else step, cols, z.stride)),
        tuple(chunk(start, min(step, n_tokens - start)) for start in range(0, n_tokens, step)),
    )
    return out_shape, specs.on_device(device, functools.partial(_multiply, plan))


@planned
def _gradient_plan(
    dy: Spec, x: Spec, w: Spec | None, out: Spec | None, b: int, precision: str, shares: bool
) -> tuple[tuple[int, int], tuple[int, int, int], Callable[..., object]]:
    """The shapes of dx (where w is given) and dw, and what writes them."""
    dx_shape = (0, 0) if w is None else specs.product_shape(dy, w, out, None, transpose=True)
    m, n, _ = shape = specs.weight_grad_shape(dy, x, b)
    (n_tokens, _), dtype, device = x
    if n_tokens == 0 or 0 in shape:
        return dx_shape, shape, lambda dy, x, w, dx, dw, *rest: dw.zero_()
    with_dx = w is not None
    of = fft_bases.transform(device, dtype, b, precision)
    whole, step = _cut(of, n_tokens, n, m + n * with_dx)
    g, z, y = of.memory(step, m), of.memory(n_tokens if whole else step, n), of.memory(step, n)
    rows, columns = 2 * m * of.apart, 2 * n * of.apart
    together = with_dx and mixes_and_sums(of.card, of.scratch.itemsize, rows, columns)
    tile = (mix_outer_tile if together else outer_tile)(of.card, of.scratch.itemsize, rows, columns)
    tiles = cdiv(rows, tile.block_o) * cdiv(columns, tile.block_i)
    # As many splits of a chunk as fill a card; a program of eight warps that multiplies too fills a multiprocessor.
    programs = tiles * of.slots * (2 if together and tile.num_warps == 8 else 1)
    tokens_per_split, n_splits = split(step, tile.block_t, programs, least=8)
    outer = functools.partial(
        bound,
        # One program per tile of a slot's matrix, slot and split of the tokens.
        kernels().fft.outer_kernel,
        (tiles, of.slots, n_splits),
        tile,
        tokens_per_split=tokens_per_split,
        stride_g_f=g.stride,
        stride_z_f=z.stride,
        stride_y_f=y.stride,
        out_blocks=m * of.apart,
        in_blocks=n * of.apart,
        POLICY=_policy(whole and shares),
        PRECISION=precision,
        BLOCK_O=tile.block_o,
        BLOCK_I=tile.block_i,
        BLOCK_T=tile.block_t,
        **of.options,
    )

    def chunk(start: int, count: int) -> _Chunk:
        is_last = start + count == n_tokens
        dx, dw = _Rows(count, n, y.stride) if with_dx else _NO_ROWS, n_splits if is_last else 0
        own_rows = (_Rows(count, m, g.stride), _NO_ROWS if whole else _Rows(count, n, z.stride))
        return _Chunk(
            *_place(start, count, n_tokens, n * of.apart if whole else 0),
            {} if start == 0 else _spectra_launches(of, shape, True, *own_rows),
            mix=_mix(of, count, m, n, g, y, read_again=True) if with_dx and not together else _nothing,
            outer=outer(n_tokens=count, ACCUMULATE=start > 0),
            results=_results(of, shape, dx, dw, accumulate=out is not None) if with_dx or is_last else _nothing,
        )

    first_rows = (_Rows(step, m, g.stride), _Rows(n_tokens if whole else step, n, z.stride))
    plan = _Plan(
        of.basis.gain,
        (of.scratch, precision, True),
        _x_what(dtype, precision, b, n_tokens, n),
        of.matrices(n, m).allocation,
        z.allocation,
        y.allocation,
        whole,
        _spectra_launches(of, shape, True, *first_rows),
        tuple(chunk(start, min(step, n_tokens - start)) for start in range(0, n_tokens, step)),
    )
    sums = Memory((n_splits, of.slots, rows, columns), torch.float32, device)
    of_dy = _OfGradient(g.allocation, sums.allocation, together)
    return dx_shape, shape, specs.on_device(device, functools.partial(_correlate, plan, of_dy))


def _x_what(dtype: torch.dtype, precision: str, b: int, n_tokens: int, blocks: int) -> Hashable:
    """Everything but x that decides on the values of its spectrum."""
    return dtype, precision, b, n_tokens, blocks


def _place(start: int, count: int, n_tokens: int, blocks: int) -> tuple[slice | None, int, bool]:
    """The first fields of a chunk; `blocks` of Q lie side by side in a whole spectrum."""
    rows = None if count == n_tokens else slice(start, start + count)
    return rows, 2 * start * blocks, start + count == n_tokens


def _policy(read_again: bool) -> str:
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


def _spectra_launches(of: Transform, shape: Sequence[int], transpose: bool, *rows: _Rows) -> _SpectraLaunches:
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
        S=of.apart,
        Q=of.size,
        TRANSPOSE=transpose,
        PRECISION=of.precision,
        BLOCK_R=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
        BLOCK_W=_WIDE,
        **of.options,
    )


def _mix(of: Transform, n_tokens: int, cols: int, rows: int, z: Memory, y: Memory, *, read_again: bool) -> Launch:
    """y = z · blocksᵀ, slot by slot."""
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
        POLICY=_policy(read_again),
        PRECISION=of.precision,
        BLOCK_T=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
        **of.options,
    )


def _results(
    of: Transform,
    shape: Sequence[int],
    out: _Rows,
    n_splits: int = 0,
    *,
    has_bias: bool = False,
    accumulate: bool = False,
) -> Launch:
    """out = scale · the inverse transform (+ bias) (+ out), and dw from the sums of so many splits, either of them."""
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
        S=of.apart,
        Q=of.size,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
        PRECISION=of.precision,
        BLOCK_R=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
        BLOCK_W=w_rows,
        **of.options,
    )
