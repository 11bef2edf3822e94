"""Host functions of the spectral kernels: `launch.py`'s second part, with its shapes, checks and conventions.

    analysis    x [T, n·b] → spectrum [SLOTS, T, 2n]       a product with the b × b basis, or two levels
    mix         per slot [T, 2n] · [2n, 2m]                → spectrum [SLOTS, T, 2m]
    synthesis   the transpose of the analysis, with the epilogue

Tokens are worked off in chunks that use the same scratch memory (`tiles.SCRATCH_BYTES`); x is analysed whole where its
spectrum takes no more than half of that. By dtype of x:

    bfloat16    bfloat16 spectra and basis, from b = 32; two-level transforms multiply in TF32, because two roundings of
                their matrices to bfloat16 are more than the error bound leaves; below 32 as float16, because so few
                values do not average out five roundings
    float16     float32 spectra rounded to TF32, TF32 products: float16 would lose spectra of large x (above 65504) and
                of small gradients (below 6e-5)
    float32     float32 spectra, three TF32 products (one where torch's own switch allows that)

The spectrum of w is computed in float32 in every call, because w may have changed, and rounded once to the dtype of
the other spectra. Whole spectra of x, and those of frozen w, may outlive a call: `spectra.py` decides.

What a call launches depends on sizes and dtypes alone. It is decided once, as launches that lack nothing but the call's
tensors, so that a repeated call finds grids, strides, tiles and constants by one look-up.
"""

import functools
from collections.abc import Callable, Hashable
from math import log2, pi, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch, spectra
from .tiles import SCRATCH_BYTES, mix_tile, outer_tile, transform_tile, two_level_tile

__all__ = ["fft_backward", "fft_product", "fft_weight_grad", "spectrum_itemsize", "transform_flops"]

# Block sizes of two-level transforms: powers of two, whose factors are sizes of tiles. Below, one level moves as many
# bytes and its operations hide behind them.
_TWO_LEVEL = (512, 1024, 2048, 4096)
# Rows of a basis matrix and of a spectrum are padded to a multiple of this (`PAD` in kernels/fft.py).
_PAD = 128
# From this block size on, spectra of bfloat16 tensors are bfloat16.
_SMALLEST_16BIT = 32
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
    """x ΔWᵀ (or x ΔW) by transforms of blocks; arguments, result and errors are those of `launch.direct_product`.

    With `source`, which says whose rows x has, its spectrum may be shared with other calls.
    """
    result = launch._product_output(x, w, transpose, out, bias)
    if x.shape[0] == 0:
        return result
    x = launch._with_contiguous_rows(x)
    bias = None if bias is None else bias.contiguous()
    plan = _product_plan(
        x.device, x.dtype, _precision(x.dtype), x.shape[0], w.shape, transpose, bias is not None, out is not None
    )
    scale *= plan.gain
    with launch._on(x):
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
    dy: Tensor, x: Tensor, block_size: int, *, scale: float, source: spectra.Source | None = None
) -> Tensor:
    """dw [m, n, b] float32 from the spectra of dy and x; arguments and errors are those of `launch.weight_grad`.

    The same from run to run: tokens are summed in an order that depends on shapes only. `source` as in `fft_product`.
    """
    launch._check_weight_grad(dy, x, block_size)
    shape = dy.shape[1] // block_size, x.shape[1] // block_size, block_size
    return _gradients(dy, x, shape, scale=scale, source=source)


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
    dx = launch._product_output(dy, w, True, out, None)
    launch._check_weight_grad(dy, x, w.shape[2])
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
    dy, x = launch._with_contiguous_rows(dy), launch._with_contiguous_rows(x)
    plan = _gradient_plan(x.device, x.dtype, _precision(x.dtype), x.shape[0], shape, w is not None, accumulate)
    scale *= plan.gain
    with launch._on(x):
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


def spectrum_itemsize(dtype: torch.dtype, b: int) -> int:
    """Bytes per real of the spectra of a tensor of `dtype`."""
    return 2 if dtype == torch.bfloat16 and b >= _SMALLEST_16BIT else 4


def transform_flops(b: int) -> int:
    """Operations per value of one transform: a product with the basis, or two levels of P and Q columns of pairs."""
    if b not in _TWO_LEVEL:
        return 2 * b
    p, q = _factors(b)
    return 4 * (p + q)


# Bases and dtypes


class _Basis(NamedTuple):
    """Matrices of the orthogonal DFT of b reals, as the kernels read them."""

    # One level: O [b, 2·SLOTS] and its transpose, both padded, so that each product reads rows along its inner axis.
    matrices: tuple[Tensor, ...]
    # Two levels: b = P·Q, and `matrices` are the two steps and the factors between them; (1, b) for one level.
    factors: tuple[int, int]
    # What a transform and its inverse must be multiplied by; 1 for an orthogonal basis.
    gain: float


class _Transform(NamedTuple):
    """How blocks of one size and dtype are transformed."""

    card: str
    b: int
    basis: _Basis
    scratch: torch.dtype
    precision: str  # how float32 operands are multiplied

    @property
    def slots(self) -> int:
        return (self.b + 1) // 2

    def memory(self, rows: int) -> "_Memory":
        """Of the spectrum of so many rows: [slots, 2 · rows padded to whole tiles]."""
        return _Memory((self.slots, 2 * launch._round_up(rows, _PAD)), self.scratch, self.basis.matrices[0].device)


def _precision(dtype: torch.dtype) -> str:
    return launch._precision() if dtype == torch.float32 else "tf32"


def _transform(device: torch.device, dtype: torch.dtype, b: int, precision: str) -> _Transform:
    scratch = torch.bfloat16 if spectrum_itemsize(dtype, b) == 2 else torch.float32
    card = launch._generation(device)
    basis = _basis(b, scratch, precision == "tf32", _takes_two_levels(card, b, precision), device)
    return _Transform(card, b, basis, scratch, precision)


def _exact_transform(device: torch.device, b: int) -> _Transform:
    """For what is small and read or written in float32: w and dw."""
    card = launch._generation(device)
    basis = _basis(b, torch.float32, False, _takes_two_levels(card, b, "tf32x3"), device)
    return _Transform(card, b, basis, torch.float32, "tf32x3")


def _takes_two_levels(card: str, b: int, precision: str) -> bool:
    """Whether a transform has two levels. Three TF32 products of the largest factors spill registers before sm_90."""
    return b in _TWO_LEVEL and (precision == "tf32" or b <= 1024 or card in ("sm_90", "sm_100"))


@functools.cache
def _basis(b: int, dtype: torch.dtype, tf32: bool, two_level: bool, device: torch.device) -> _Basis:
    """Computed in float64, rounded once to `dtype` (one level; two have float32) or to TF32, and kept for good: it
    depends on nothing else, and captured graphs read it.

    Raises:
        BackendError: a CUDA graph is being captured.
    """
    return spectra.lasting(
        lambda: _computed_basis(b, dtype, tf32, two_level, device), device, f"the basis of block size {b}"
    )


def _computed_basis(b: int, dtype: torch.dtype, tf32: bool, two_level: bool, device: torch.device) -> _Basis:
    """`_basis`, anew."""

    def turns(rows: int, columns: int, period: int) -> tuple[Tensor, Tensor]:
        """cos and −sin of 2π·r·c / period, of an exact remainder."""
        r, c = (torch.arange(size, dtype=torch.float64, device="cpu") for size in (rows, columns))
        angle = (r[:, None] * c[None, :]).remainder_(period).mul_(2 * pi / period)
        return angle.cos(), angle.sin().neg_()

    def placed(matrix: Tensor) -> Tensor:
        matrix = matrix.to(torch.float32 if two_level else dtype)
        return (_to_tf32(matrix) if tf32 and matrix.dtype == torch.float32 else matrix).contiguous().to(device)

    if two_level:
        p, q = _factors(b)
        first = torch.stack(turns(p, p, p), dim=-1).view(p, 2 * p)
        cos, sin = turns(q, q // 2, q)
        second = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], dim=1).view(2 * q, q)
        cos, sin = turns(q, p, b)
        factors = torch.stack([cos, -sin], dim=-1).float().contiguous().to(device)
        return _Basis((placed(first), placed(second * (2 / b) ** 0.5), factors), (p, q), 1.0)

    slots = (b + 1) // 2
    cos, sin = turns(b, slots, b)
    if b in _TWO_LEVEL:  # the order of slots that two levels have: spectra are exchanged with them
        p, q = _factors(b)
        order = (torch.arange(p, device="cpu")[:, None] + p * torch.arange(q // 2, device="cpu")[None, :]).flatten()
        cos, sin = cos[:, order], sin[:, order]
    amplitude = (2 / b) ** 0.5
    if dtype == torch.bfloat16:
        # Most cosines lie near ±1, where those of an amplitude of 2^k have the smallest relative rounding error.
        amplitude = 2.0 ** round(log2(amplitude))
    matrix = torch.zeros(
        launch._round_up(b, _PAD), launch._round_up(2 * slots, _PAD), dtype=torch.float64, device="cpu"
    )
    matrix[:b, 0 : 2 * slots : 2] = cos * amplitude
    matrix[:b, 1 : 2 * slots : 2] = sin * amplitude
    matrix[:b, 0] = amplitude * 0.5**0.5
    matrix[0:b:2, 1] = amplitude * 0.5**0.5 if b % 2 == 0 else 0.0
    matrix[1:b:2, 1] = -matrix[0, 1]
    return _Basis((placed(matrix), placed(matrix.T)), (1, b), 2 / b / amplitude**2)


def _factors(b: int) -> tuple[int, int]:
    """P and Q of a two-level transform, the smaller first."""
    p = 1 << (b.bit_length() - 1) // 2
    return p, b // p


def _to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to the ten bits that a TF32 product reads; hardware would cut the others off."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


# Plans: what a call allocates and launches

# A kernel with its grid and all arguments but the tensors of a call, their strides and its scale.
_Launch = Callable[..., Any]


class _Memory(NamedTuple):
    """A tensor to be allocated."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def allocate(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    @property
    def stride(self) -> int:
        """From slot to slot of a spectrum."""
        return self.shape[1]

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class _Analysis(NamedTuple):
    """The spectrum of a whole tensor."""

    memory: _Memory
    launch: _Launch
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
    analyse: _Launch | None  # None where there is a whole spectrum
    mix: _Launch
    synthesise: _Launch


class _ProductPlan(NamedTuple):
    gain: float
    blocks: _Analysis
    whole: _Analysis | None
    z: _Memory | None
    y: _Memory
    chunks: tuple[_ProductChunk, ...]


class _GradientChunk(NamedTuple):
    tokens: _Tokens
    analyse_dy: _Launch
    mix: _Launch
    synthesise: _Launch
    analyse: _Launch | None
    add_outer: _Launch


class _GradientPlan(NamedTuple):
    gain: float
    blocks: _Analysis
    whole: _Analysis | None
    g: _Memory
    z: _Memory | None
    sums: _Memory
    chunks: tuple[_GradientChunk, ...]
    spectrum: _Memory
    fold: _Launch
    synthesise_dw: _Launch


@launch._planned
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
    transform = _transform(device, dtype, b, precision)
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


@launch._planned
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
    transform = _transform(device, dtype, b, precision)
    whole = _whole_analysis(transform, dtype, n_tokens, n)
    step = _chunk_tokens(transform, n_tokens, max(m, n), m + n, whole)
    g = transform.memory(step * m)
    z = transform.memory(step * n)
    stride_z = z.stride if whole is None else whole.memory.stride
    tile = outer_tile(transform.card, transform.scratch.itemsize, 2 * m, 2 * n)
    tiles = launch._cdiv(2 * m, tile.block_o) * launch._cdiv(2 * n, tile.block_i)
    # As many splits of a chunk as fill a card.
    tokens_per_split, n_splits = launch._split_tokens(step, tiles * transform.slots, tile.block_t)
    add_outer = functools.partial(
        # One program per tile of a slot's matrix, slot and split of the tokens.
        launch._kernels().fft.outer_kernel[tiles, transform.slots, n_splits],
        tokens_per_split=tokens_per_split,
        stride_g_f=g.stride,
        stride_z_f=stride_z,
        out_blocks=m,
        in_blocks=n,
        PRECISION=precision,
        BLOCK_O=tile.block_o,
        BLOCK_I=tile.block_i,
        BLOCK_T=tile.block_t,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
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
    exact = _exact_transform(device, b)
    spectrum = exact.memory(m * n)
    fold = functools.partial(
        # One program per slot and BLOCK pairs of blocks.
        launch._kernels().fft.fold_spectrum_kernel[launch._cdiv(m * n, _PAD), exact.slots, 1],
        n_splits=n_splits,
        stride_p_f=spectrum.stride,
        out_blocks=m,
        in_blocks=n,
        b=b,
        BLOCK=_PAD,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return _GradientPlan(
        transform.basis.gain,
        _weight_analysis(transform, shape, transpose=True),
        whole,
        g,
        z if with_dx or whole is None else None,
        _Memory((n_splits, transform.slots, 2 * m, 2 * n), torch.float32, device),
        chunks,
        spectrum,
        fold,
        _synthesis(exact, m * n, 1, spectrum, False, False),
    )


def _whole_analysis(transform: _Transform, dtype: torch.dtype, n_tokens: int, blocks: int) -> _Analysis | None:
    """Of all of x at once, if its spectrum takes no more than half of the scratch."""
    memory = transform.memory(n_tokens * blocks)
    scratch = SCRATCH_BYTES[transform.card]
    if n_tokens * blocks > _MOST_ROWS or (scratch and 2 * memory.n_bytes > scratch):
        return None
    what = (dtype, transform.precision, transform.b, n_tokens, blocks)
    return _Analysis(memory, _analysis(transform, n_tokens, blocks, memory), what)


def _weight_analysis(transform: _Transform, shape: tuple[int, int, int], transpose: bool) -> _Analysis:
    m, n, b = shape
    rows, cols = (n, m) if transpose else (m, n)
    device = transform.basis.matrices[0].device
    memory = _Memory((transform.slots, 2 * rows, 2 * cols), transform.scratch, device)
    exact = _exact_transform(device, b)
    analyse = _analysis(exact, m * n, 1, memory, (m, n), transpose, transform.precision)
    return _Analysis(memory, analyse, (transform.scratch, transform.precision, transpose))


def _chunk_tokens(
    transform: _Transform, n_tokens: int, widest: int, blocks: int, whole: _Analysis | None = None
) -> int:
    """Tokens of a chunk: chunks of equal size, a multiple of 128, that fit what `whole` leaves of the scratch."""
    limit = _MOST_ROWS // widest
    scratch = SCRATCH_BYTES[transform.card]
    if scratch:
        scratch -= 0 if whole is None else whole.memory.n_bytes
        limit = min(limit, scratch // (2 * transform.slots * blocks * transform.scratch.itemsize))
    chunks = launch._cdiv(n_tokens, max(limit, 128))
    return launch._round_up(launch._cdiv(n_tokens, chunks), 128)


def _cut(n_tokens: int, step: int, blocks: int) -> list[_Tokens]:
    """Chunks of `step` tokens, whose blocks lie side by side in a whole spectrum."""
    if step >= n_tokens:
        return [_Tokens(None, n_tokens, 0)]
    starts = range(0, n_tokens, step)
    return [_Tokens(slice(i, i + step), min(step, n_tokens - i), 2 * i * blocks) for i in starts]


def _analysis(
    transform: _Transform,
    n_tokens: int,
    blocks: int,
    z: _Memory,
    weight_blocks: tuple[int, int] = (0, 0),
    transpose: bool = False,
    precision: str | None = None,
) -> _Launch:
    """z = the spectrum of x's blocks; with `weight_blocks` (m, n), of w's, as matrices for products in `precision`."""
    fft = launch._kernels().fft
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


def _synthesis(
    transform: _Transform, n_tokens: int, blocks: int, y: _Memory, has_bias: bool, accumulate: bool
) -> _Launch:
    """out = scale · the inverse of the analysis (+ bias) (+ out)."""
    fft = launch._kernels().fft
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
    transform: _Transform,
    kernels: tuple[Any, Any],
    n_rows: int,
    columns: int,
    inner: int,
    basis: Tensor,
    **arguments: Any,
) -> _Launch:
    """One of the kernels for one and for two levels, which turns rows of `inner` values into rows of `columns`."""
    one_level, two_levels = kernels
    p, q = transform.basis.factors
    if p > 1:
        tile = two_level_tile(transform.card, transform.b, transform.precision)
        first, second, twiddle = transform.basis.matrices
        return functools.partial(
            two_levels[launch._cdiv(n_rows, tile.block_t), 1, 1],
            **arguments,
            first_ptr=first,
            second_ptr=second,
            twiddle_ptr=twiddle,
            n_rows=n_rows,
            P=p,
            Q=q,
            DOT=transform.precision,
            BLOCK_R=tile.block_t,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
        )
    tile = transform_tile(transform.card, basis.itemsize, columns, inner)
    return functools.partial(
        # One program per tile of rows and columns.
        one_level[launch._cdiv(n_rows, tile.block_t) * launch._cdiv(columns, tile.block_o), 1, 1],
        **arguments,
        basis_ptr=basis,
        n_rows=n_rows,
        b=transform.b,
        DOT=transform.precision,
        BLOCK_R=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )


def _mix(transform: _Transform, n_tokens: int, stride_z: int, stride_y: int, rows: int, cols: int) -> _Launch:
    """y = z · blocksᵀ, slot by slot."""
    tile = mix_tile(transform.card, transform.scratch.itemsize, n_tokens, 2 * rows, 2 * cols)
    tiles = launch._cdiv(n_tokens, tile.block_t) * launch._cdiv(2 * rows, tile.block_o)
    return functools.partial(
        # One program per tile of tokens and columns, and per slot.
        launch._kernels().fft.mix_kernel[tiles, transform.slots, 1],
        n_tokens=n_tokens,
        stride_z_f=stride_z,
        stride_y_f=stride_y,
        row_blocks=rows,
        col_blocks=cols,
        PRECISION=transform.precision,
        BLOCK_T=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )
