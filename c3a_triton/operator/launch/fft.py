"""Host side of `kernels/fft.py`: the product by transforms of blocks.

    analysis    x [T, n·b] → spectrum [SLOTS, T, 2n]       a product with the b × b basis, or two levels
    mix         per slot [T, 2n] · [2n, 2m]                → spectrum [SLOTS, T, 2m]
    synthesis   the transpose of the analysis, with the epilogue

Tokens are worked off in chunks that use the same scratch memory (`tiles.SCRATCH_BYTES`); x is analysed whole where its
spectrum takes no more than half of that. How blocks of each size and dtype are transformed, `fft_bases.py` says.

The spectrum of w is computed in float32 in every call, because w may have changed, and rounded once to the dtype of
the other spectra. Whole spectra of x, and those of frozen w, may outlive a call: `spectra.py` decides.

What a call launches depends on sizes and dtypes alone. It is decided once, as launches that lack nothing but the call's
tensors, so that a repeated call finds grids, strides, tiles and constants by one look-up.
"""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import spectra
from . import fft_bases, specs
from .fft_bases import PAD, Memory, Transform
from .plans import Launch, bound, cdiv, kernels, planned, round_up, split
from .tiles import SCRATCH_BYTES, mix_tile, outer_tile, transform_tile, two_level_tile

__all__ = ["fft_backward", "fft_product", "fft_weight_grad"]


# How float32 operands that stand for 16-bit tensors are multiplied.
_OF_16BIT = "tf32"
# Rows in one chunk, whatever the scratch: kernels count them in 32 bits.
_MOST_ROWS = 2**29


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
    bias_spec, out_spec = None if bias is None else specs.spec(bias), None if out is None else specs.spec(out)
    shape = specs.product_shape(specs.spec(x), specs.spec(w), out_spec, bias_spec, transpose)
    result = specs.new_or_given(shape, x, out)
    if x.shape[0] == 0:
        return result
    x = specs.with_contiguous_rows(x)
    bias = None if bias is None else bias.contiguous()
    plan = _product_plan(
        x.device,
        x.dtype,
        specs.precision(x.dtype, _OF_16BIT),
        x.shape[0],
        w.shape,
        transpose,
        bias is not None,
        out is not None,
    )
    scale *= plan.gain
    with specs.on_device_of(x):
        blocks = _weight_blocks(plan.blocks, w)
        whole = _whole_spectrum(plan.whole, x, source)
        z = None if plan.z is None else plan.z.allocate()
        y = plan.y.allocate()
        for chunk in plan.chunks:
            if chunk.analyse is not None:
                chunk.analyse(x_ptr=chunk.tokens.of(x), z_ptr=z, stride_x_t=x.stride(0))
            chunk.mix(z_ptr=z if whole is None else chunk.tokens.of_spectrum(whole), blocks_ptr=blocks, y_ptr=y)
            chunk.synthesise(
                y_ptr=y, bias_ptr=bias, out_ptr=chunk.tokens.of(result), scale=scale, stride_out_t=result.stride(0)
            )
    return result


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
    specs.check_weight_grad(dy, x, block_size)
    shape = dy.shape[1] // block_size, x.shape[1] // block_size, block_size
    dw = _gradients(dy, x, shape, scale=scale, source=source)
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
    out_spec = None if out is None else specs.spec(out)
    shape = specs.product_shape(specs.spec(dy), specs.spec(w), out_spec, None, transpose=True)
    dx = specs.new_or_given(shape, dy, out)
    specs.check_weight_grad(dy, x, w.shape[2])
    return dx, _gradients(dy, x, w.shape, scale=scale, source=source, w=w, dx=dx, accumulate=out is not None)


def _gradients(
    dy: Tensor,
    x: Tensor,
    shape: tuple[int, ...],
    *,
    scale: float,
    source: spectra.Source | None,
    w: Tensor | None = None,
    dx: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """dw of this shape; with w, `dx` is written too, or added to."""
    dw = torch.empty(shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0 or dy.numel() == 0:
        return dw.zero_()
    dy, x = specs.with_contiguous_rows(dy), specs.with_contiguous_rows(x)
    plan = _gradient_plan(
        x.device, x.dtype, specs.precision(x.dtype, _OF_16BIT), x.shape[0], shape, w is not None, accumulate
    )
    scale *= plan.gain
    with specs.on_device_of(x):
        blocks = None if w is None else _weight_blocks(plan.blocks, w)
        whole = _whole_spectrum(plan.whole, x, source)
        g = plan.g.allocate()
        z = None if plan.z is None else plan.z.allocate()  # the spectrum of dx, and when that is written out, of x
        sums = plan.sums.allocate()
        for chunk in plan.chunks:
            chunk.analyse_dy(x_ptr=chunk.tokens.of(dy), z_ptr=g, stride_x_t=dy.stride(0))
            if dx is not None:
                chunk.mix(z_ptr=g, blocks_ptr=blocks, y_ptr=z)
                chunk.synthesise(
                    y_ptr=z, bias_ptr=None, out_ptr=chunk.tokens.of(dx), scale=scale, stride_out_t=dx.stride(0)
                )
            if chunk.analyse is not None:
                chunk.analyse(x_ptr=chunk.tokens.of(x), z_ptr=z, stride_x_t=x.stride(0))
            chunk.add_outer(g_ptr=g, z_ptr=z if whole is None else chunk.tokens.of_spectrum(whole), sums_ptr=sums)
        spectrum = plan.spectrum.allocate()
        plan.fold(sums_ptr=sums, p_ptr=spectrum)
        plan.synthesise_dw(y_ptr=spectrum, bias_ptr=None, out_ptr=dw, scale=scale, stride_out_t=shape[2])
    return dw


def _weight_blocks(analysis: "_Analysis", w: Tensor) -> Tensor:
    """The matrices [slots, 2 · row_blocks, 2 · col_blocks] that `mix` multiplies by, from w in float32."""

    def compute(blocks: Tensor) -> None:
        analysis.launch(x_ptr=w.contiguous(), z_ptr=blocks, stride_x_t=w.shape[2])

    return spectra.of_weight(w, analysis.what, analysis.memory.allocate, compute)


def _whole_spectrum(analysis: "_Analysis | None", x: Tensor, source: spectra.Source | None) -> Tensor | None:
    """The spectrum of all of x, which is not to be written to; None where chunks have their own."""
    if analysis is None:
        return None

    def compute() -> Tensor:
        z = analysis.memory.allocate()
        analysis.launch(x_ptr=x, z_ptr=z, stride_x_t=x.stride(0))
        return z

    return spectra.of_input(source, analysis.what, compute)


class _Analysis(NamedTuple):
    """The spectrum of a whole tensor."""

    memory: Memory
    launch: Launch
    what: Hashable  # everything but the tensor that decides on the values


class _Tokens(NamedTuple):
    """The tokens of a chunk."""

    rows: slice | None  # None for all of them
    n_tokens: int
    start: int  # of their part of a whole spectrum

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows]

    def of_spectrum(self, whole: Tensor) -> Tensor:
        return whole if self.rows is None else whole[:, self.start :]


class _ProductChunk(NamedTuple):
    tokens: _Tokens
    analyse: Launch | None  # None where there is a whole spectrum
    mix: Launch
    synthesise: Launch


class _ProductPlan(NamedTuple):
    gain: float
    blocks: _Analysis
    whole: _Analysis | None
    z: Memory | None
    y: Memory
    chunks: tuple[_ProductChunk, ...]


class _GradientChunk(NamedTuple):
    tokens: _Tokens
    analyse_dy: Launch
    mix: Launch
    synthesise: Launch
    analyse: Launch | None
    add_outer: Launch


class _GradientPlan(NamedTuple):
    gain: float
    blocks: _Analysis
    whole: _Analysis | None
    g: Memory
    z: Memory | None
    sums: Memory
    chunks: tuple[_GradientChunk, ...]
    spectrum: Memory
    fold: Launch
    synthesise_dw: Launch


@planned
def _product_plan(
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    n_tokens: int,
    shape: tuple[int, int, int],
    transpose: bool,
    has_bias: bool,
    accumulate: bool,
) -> _ProductPlan:
    m, n, b = shape
    rows, cols = (n, m) if transpose else (m, n)
    transform = fft_bases.transform(device, dtype, b, precision)
    whole = _whole_analysis(transform, dtype, n_tokens, cols)
    step = _chunk_tokens(transform, n_tokens, max(rows, cols), rows + cols if whole is None else rows, whole)
    y = transform.memory(step * rows)
    z = transform.memory(step * cols)
    stride_z = z.stride if whole is None else whole.memory.stride
    chunks = tuple(
        _ProductChunk(
            tokens,
            analyse=_analysis(transform, tokens.n_tokens, cols, z) if whole is None else None,
            mix=_mix(transform, tokens.n_tokens, stride_z, y.stride, rows, cols),
            synthesise=_synthesis(transform, tokens.n_tokens, rows, y, has_bias, accumulate),
        )
        for tokens in _cut(n_tokens, step, cols)
    )
    blocks = _weight_analysis(transform, shape, transpose)
    return _ProductPlan(transform.basis.gain, blocks, whole, z if whole is None else None, y, chunks)


@planned
def _gradient_plan(
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    n_tokens: int,
    shape: tuple[int, int, int],
    with_dx: bool,
    accumulate: bool,
) -> _GradientPlan:
    m, n, b = shape
    transform = fft_bases.transform(device, dtype, b, precision)
    whole = _whole_analysis(transform, dtype, n_tokens, n)
    step = _chunk_tokens(transform, n_tokens, max(m, n), m + n, whole)
    g = transform.memory(step * m)
    z = transform.memory(step * n)
    stride_z = z.stride if whole is None else whole.memory.stride
    tile = outer_tile(transform.card, transform.scratch.itemsize, 2 * m, 2 * n)
    tiles = cdiv(2 * m, tile.block_o) * cdiv(2 * n, tile.block_i)
    # As many splits of a chunk as fill a card.
    tokens_per_split, n_splits = split(step, tile.block_t, tiles * transform.slots, least=8)
    add_outer = bound(
        # One program per tile of a slot's matrix, slot and split of the tokens.
        kernels().fft.outer_kernel,
        (tiles, transform.slots, n_splits),
        tile,
        tokens_per_split=tokens_per_split,
        stride_g_f=g.stride,
        stride_z_f=stride_z,
        out_blocks=m,
        in_blocks=n,
        PRECISION=precision,
        BLOCK_O=tile.block_o,
        BLOCK_I=tile.block_i,
        BLOCK_T=tile.block_t,
    )
    chunks = tuple(
        _GradientChunk(
            tokens,
            analyse_dy=_analysis(transform, tokens.n_tokens, m, g),
            mix=_mix(transform, tokens.n_tokens, g.stride, z.stride, n, m),
            synthesise=_synthesis(transform, tokens.n_tokens, n, z, False, accumulate),
            analyse=_analysis(transform, tokens.n_tokens, n, z) if whole is None else None,
            add_outer=functools.partial(add_outer, n_tokens=tokens.n_tokens, ACCUMULATE=tokens.start > 0),
        )
        for tokens in _cut(n_tokens, step, n)
    )
    exact = fft_bases.exact_transform(device, b)
    spectrum = exact.memory(m * n)
    fold = bound(
        # One program per slot and BLOCK pairs of blocks.
        kernels().fft.fold_spectrum_kernel,
        (cdiv(m * n, PAD), exact.slots, 1),
        n_splits=n_splits,
        stride_p_f=spectrum.stride,
        out_blocks=m,
        in_blocks=n,
        b=b,
        BLOCK=PAD,
        num_warps=4,
    )
    return _GradientPlan(
        transform.basis.gain,
        _weight_analysis(transform, shape, transpose=True),
        whole,
        g,
        z if with_dx or whole is None else None,
        Memory((n_splits, transform.slots, 2 * m, 2 * n), torch.float32, device),
        chunks,
        spectrum,
        fold,
        _synthesis(exact, m * n, 1, spectrum, False, False),
    )


def _whole_analysis(transform: Transform, dtype: torch.dtype, n_tokens: int, blocks: int) -> _Analysis | None:
    """Of all of x at once, if its spectrum takes no more than half of the scratch."""
    memory = transform.memory(n_tokens * blocks)
    scratch = SCRATCH_BYTES[transform.card]
    if n_tokens * blocks > _MOST_ROWS or (scratch and 2 * memory.n_bytes > scratch):
        return None
    what = (dtype, transform.precision, transform.b, n_tokens, blocks)
    return _Analysis(memory, _analysis(transform, n_tokens, blocks, memory), what)


def _weight_analysis(transform: Transform, shape: tuple[int, int, int], transpose: bool) -> _Analysis:
    m, n, b = shape
    rows, cols = (n, m) if transpose else (m, n)
    device = transform.basis.matrices[0].device
    memory = Memory((transform.slots, 2 * rows, 2 * cols), transform.scratch, device)
    exact = fft_bases.exact_transform(device, b)
    analyse = _analysis(exact, m * n, 1, memory, (m, n), transpose, transform.precision)
    return _Analysis(memory, analyse, (transform.scratch, transform.precision, transpose))


def _chunk_tokens(transform: Transform, n_tokens: int, widest: int, blocks: int, whole: _Analysis | None = None) -> int:
    """Tokens of a chunk: chunks of equal size, a multiple of 128, that fit what `whole` leaves of the scratch."""
    limit = _MOST_ROWS // widest
    scratch = SCRATCH_BYTES[transform.card]
    if scratch:
        scratch -= 0 if whole is None else whole.memory.n_bytes
        limit = min(limit, scratch // (2 * transform.slots * blocks * transform.scratch.itemsize))
    chunks = cdiv(n_tokens, max(limit, 128))
    return round_up(cdiv(n_tokens, chunks), 128)


def _cut(n_tokens: int, step: int, blocks: int) -> list[_Tokens]:
    """Chunks of `step` tokens, whose blocks lie side by side in a whole spectrum."""
    if step >= n_tokens:
        return [_Tokens(None, n_tokens, 0)]
    starts = range(0, n_tokens, step)
    return [_Tokens(slice(i, i + step), min(step, n_tokens - i), 2 * i * blocks) for i in starts]


def _analysis(
    transform: Transform,
    n_tokens: int,
    blocks: int,
    z: Memory,
    weight_blocks: tuple[int, int] = (0, 0),
    transpose: bool = False,
    precision: str | None = None,
) -> Launch:
    """z = the spectrum of x's blocks; with `weight_blocks` (m, n), of w's, as matrices for products in `precision`."""
    fft = kernels().fft
    out_blocks, in_blocks = weight_blocks
    return _transform_launch(
        transform,
        (fft.analysis_kernel, fft.two_level_analysis_kernel),
        n_tokens * blocks,
        2 * transform.slots,
        transform.b,
        transform.basis.matrices[1],
        stride_z_f=z.stride,
        blocks=blocks,
        OUT_BLOCKS=out_blocks,
        IN_BLOCKS=in_blocks,
        TRANSPOSE=transpose,
        PRECISION=precision or transform.precision,
    )


def _synthesis(transform: Transform, n_tokens: int, blocks: int, y: Memory, has_bias: bool, accumulate: bool) -> Launch:
    """out = scale · the inverse of the analysis (+ bias) (+ out)."""
    fft = kernels().fft
    return _transform_launch(
        transform,
        (fft.synthesis_kernel, fft.two_level_synthesis_kernel),
        n_tokens * blocks,
        transform.b,
        2 * transform.slots,
        transform.basis.matrices[0],
        stride_y_f=y.stride,
        blocks=blocks,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
    )


def _transform_launch(
    transform: Transform,
    kernels: tuple[Any, Any],
    n_rows: int,
    columns: int,
    inner: int,
    basis: Tensor,
    **arguments: Any,
) -> Launch:
    """One of the kernels for one and for two levels, which turns rows of `inner` values into rows of `columns`."""
    one_level, two_levels = kernels
    p, q = transform.basis.factors
    if p > 1:
        tile = two_level_tile(transform.card, transform.b, transform.precision)
        first, second, twiddle = transform.basis.matrices
        return bound(
            two_levels,
            (cdiv(n_rows, tile.block_t), 1, 1),
            tile,
            **arguments,
            first_ptr=first,
            second_ptr=second,
            twiddle_ptr=twiddle,
            n_rows=n_rows,
            P=p,
            Q=q,
            DOT=transform.precision,
            BLOCK_R=tile.block_t,
        )
    tile = transform_tile(transform.card, basis.itemsize, columns, inner)
    return bound(
        # One program per tile of rows and columns.
        one_level,
        (cdiv(n_rows, tile.block_t) * cdiv(columns, tile.block_o), 1, 1),
        tile,
        **arguments,
        basis_ptr=basis,
        n_rows=n_rows,
        b=transform.b,
        DOT=transform.precision,
        BLOCK_R=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
    )


def _mix(transform: Transform, n_tokens: int, stride_z: int, stride_y: int, rows: int, cols: int) -> Launch:
    """y = z · blocksᵀ, slot by slot."""
    tile = mix_tile(transform.card, transform.scratch.itemsize, n_tokens, 2 * rows, 2 * cols)
    tiles = cdiv(n_tokens, tile.block_t) * cdiv(2 * rows, tile.block_o)
    return bound(
        # One program per tile of tokens and columns, and per slot.
        kernels().fft.mix_kernel,
        (tiles, transform.slots, 1),
        tile,
        n_tokens=n_tokens,
        stride_z_f=stride_z,
        stride_y_f=stride_y,
        row_blocks=rows,
        col_blocks=cols,
        PRECISION=transform.precision,
        BLOCK_T=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
    )
