"""Host functions of the spectral kernels: `launch.py`'s second part, with its shapes, checks and conventions.

    analysis    x [T, n·b] → spectrum [SLOTS, T, 2n]       a product with the b × b basis, or two levels
    mix         per slot [T, 2n] · [2n, 2m]                → spectrum [SLOTS, T, 2m]
    synthesis   the transpose of the analysis, with the epilogue

Tokens are worked off in chunks that use the same scratch memory (`tiles.SCRATCH_BYTES`). By dtype of x:

    bfloat16    bfloat16 spectra and basis, from b = 32; two-level transforms multiply in TF32, because two roundings of
                their matrices to bfloat16 are more than the error bound leaves; below 32 as float16, because so few
                values do not average out five roundings
    float16     float32 spectra rounded to TF32, TF32 products: float16 would lose spectra of large x (above 65504) and
                of small gradients (below 6e-5)
    float32     float32 spectra, three TF32 products (one where torch's own switch allows that)

The spectrum of w is computed in float32 in every call, because w may have changed, and rounded once to the dtype of
the other spectra.
"""

import functools
from math import log2, pi
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .tiles import SCRATCH_BYTES, mix_tile, outer_tile, transform_tile

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
) -> Tensor:
    """x ΔWᵀ (or x ΔW) by transforms of blocks; arguments, result and errors are those of `launch.direct_product`."""
    result = launch._product_output(x, w, transpose, out, bias)
    if x.shape[0] == 0:
        return result
    m, n, b = w.shape
    rows, cols = (n, m) if transpose else (m, n)
    x = launch._with_contiguous_rows(x)
    bias = None if bias is None else bias.contiguous()
    with launch._on(x):
        plan = _plan(x.device, x.dtype, b)
        step = _chunk_tokens(plan, x.shape[0], max(rows, cols), rows + cols)
        blocks = _weight_blocks(plan, w, transpose)
        z = _scratch(plan, step * cols)
        y = _scratch(plan, step * rows)
        for start in range(0, x.shape[0], step):
            piece, target = x[start : start + step], result[start : start + step]
            _analyse(plan, piece, z)
            _mix(plan, z, blocks, y, piece.shape[0])
            _synthesise(plan, y, target, bias, scale * plan.basis.gain, accumulate=out is not None)
    return result


def fft_weight_grad(dy: Tensor, x: Tensor, block_size: int, *, scale: float) -> Tensor:
    """dw [m, n, b] float32 from the spectra of dy and x; arguments and errors are those of `launch.weight_grad`.

    The same from run to run: tokens are summed in an order that depends on shapes only.
    """
    launch._check_weight_grad(dy, x, block_size)
    m, n = dy.shape[1] // block_size, x.shape[1] // block_size
    if x.numel() == 0 or dy.numel() == 0:
        return torch.zeros(m, n, block_size, dtype=torch.float32, device=x.device)
    dy, x = launch._with_contiguous_rows(dy), launch._with_contiguous_rows(x)
    with launch._on(x):
        plan = _plan(x.device, x.dtype, block_size)
        step = _chunk_tokens(plan, x.shape[0], max(m, n), m + n)
        g = _scratch(plan, step * m)
        z = _scratch(plan, step * n)
        sums = None
        for start in range(0, x.shape[0], step):
            piece = x[start : start + step]
            _analyse(plan, dy[start : start + step], g)
            _analyse(plan, piece, z)
            sums = _add_outer(plan, g, z, sums, m, n, piece.shape[0], step)
        assert sums is not None, "no tokens"
        return _weight_from_sums(sums, m, n, block_size, scale * plan.basis.gain)


def fft_backward(dy: Tensor, x: Tensor, w: Tensor, *, scale: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both gradients of `fft_product(x, w)`, dy transformed once: dx (added to a given `out`) and dw [m, n, b] float32.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    dx = launch._product_output(dy, w, True, out, None)
    m, n, b = w.shape
    launch._check_weight_grad(dy, x, b)
    if dy.shape[0] == 0:
        return dx, torch.zeros(m, n, b, dtype=torch.float32, device=w.device)
    dy, x = launch._with_contiguous_rows(dy), launch._with_contiguous_rows(x)
    with launch._on(x):
        plan = _plan(x.device, x.dtype, b)
        step = _chunk_tokens(plan, x.shape[0], max(m, n), m + n)
        blocks = _weight_blocks(plan, w, transpose=True)
        g = _scratch(plan, step * m)
        z = _scratch(plan, step * n)  # the spectrum of dx, and when that is written out, of x
        sums = None
        for start in range(0, x.shape[0], step):
            piece, target = x[start : start + step], dx[start : start + step]
            _analyse(plan, dy[start : start + step], g)
            _mix(plan, g, blocks, z, piece.shape[0])
            _synthesise(plan, z, target, None, scale * plan.basis.gain, accumulate=out is not None)
            _analyse(plan, piece, z)
            sums = _add_outer(plan, g, z, sums, m, n, piece.shape[0], step)
        assert sums is not None, "no tokens"
        return dx, _weight_from_sums(sums, m, n, b, scale * plan.basis.gain)


def spectrum_itemsize(dtype: torch.dtype, b: int) -> int:
    """Bytes per real of the spectra of a tensor of `dtype`."""
    return 2 if dtype == torch.bfloat16 and b >= _SMALLEST_16BIT else 4


def transform_flops(b: int) -> int:
    """Operations per value of one transform: a product with the basis, or two levels of P and Q columns of pairs."""
    if b not in _TWO_LEVEL:
        return 2 * b
    p, q = _factors(b)
    return 4 * (p + q)


class _Basis(NamedTuple):
    """Matrices of the orthogonal DFT of b reals, as the kernels read them."""

    # One level: O [b, 2·SLOTS] and its transpose, both padded, so that each product reads rows along its inner axis.
    matrices: tuple[Tensor, ...]
    # Two levels: b = P·Q, and `matrices` are the two steps and the factors between them; (1, b) for one level.
    factors: tuple[int, int]
    # What a transform and its inverse must be multiplied by; 1 for an orthogonal basis.
    gain: float


class _Plan(NamedTuple):
    """How one dtype and block size are computed."""

    card: str
    b: int
    basis: _Basis
    scratch: torch.dtype
    precision: str  # how float32 operands are multiplied

    @property
    def slots(self) -> int:
        return (self.b + 1) // 2


def _plan(device: torch.device, dtype: torch.dtype, b: int) -> _Plan:
    precision = launch._precision() if dtype == torch.float32 else "tf32"
    scratch = torch.bfloat16 if spectrum_itemsize(dtype, b) == 2 else torch.float32
    card = launch._generation(device)
    basis = _basis(b, scratch, precision == "tf32", _takes_two_levels(card, b, precision), device)
    return _Plan(card, b, basis, scratch, precision)


def _exact_plan(device: torch.device, b: int) -> _Plan:
    """For what is small and read or written in float32: the transforms of w and dw."""
    card = launch._generation(device)
    basis = _basis(b, torch.float32, False, _takes_two_levels(card, b, "tf32x3"), device)
    return _Plan(card, b, basis, torch.float32, "tf32x3")


def _takes_two_levels(card: str, b: int, precision: str) -> bool:
    """Whether a transform has two levels. Three TF32 products of the largest factors spill registers before sm_90."""
    return b in _TWO_LEVEL and (precision == "tf32" or b <= 1024 or card in ("sm_90", "sm_100"))


@functools.lru_cache(maxsize=64)
def _basis(b: int, dtype: torch.dtype, tf32: bool, two_level: bool, device: torch.device) -> _Basis:
    """Computed in float64, rounded once to `dtype` (one level; two have float32) or to TF32, and kept: it depends on
    nothing else."""

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


def _chunk_tokens(plan: _Plan, n_tokens: int, widest: int, blocks: int) -> int:
    """Tokens of a chunk: chunks of equal size, a multiple of 128, whose two spectra fit the scratch."""
    limit = _MOST_ROWS // widest
    scratch = SCRATCH_BYTES[plan.card]
    if scratch:
        limit = min(limit, scratch // (2 * plan.slots * blocks * plan.scratch.itemsize))
    chunks = launch._cdiv(n_tokens, max(limit, 128))
    return launch._round_up(launch._cdiv(n_tokens, chunks), 128)


def _scratch(plan: _Plan, rows: int) -> Tensor:
    """Memory for the spectrum of so many rows: [slots, 2 · rows padded to whole tiles]."""
    width = 2 * launch._round_up(rows, _PAD)
    return torch.empty(plan.slots, width, dtype=plan.scratch, device=plan.basis.matrices[0].device)


def _two_level_tile(b: int, precision: str) -> tuple[int, int]:
    """(rows of b values, warps) of one program: as many as registers hold, at most eight."""
    if b > 1024:
        return 2, 8
    # Three products keep three times the operands.
    return (8, b // 128) if precision == "tf32" else (4096 // b, 8)


def _weight_blocks(plan: _Plan, w: Tensor, transpose: bool) -> Tensor:
    """The matrices [slots, 2 · row_blocks, 2 · col_blocks] that `mix` multiplies by, from w in float32."""
    m, n, b = w.shape
    rows, cols = (n, m) if transpose else (m, n)
    blocks = torch.empty(plan.slots, 2 * rows, 2 * cols, dtype=plan.scratch, device=w.device)
    exact = _exact_plan(w.device, b)
    _analyse(exact, w.contiguous().view(m * n, b), blocks, (m, n), transpose, plan.precision)
    return blocks


def _analyse(
    plan: _Plan,
    x: Tensor,
    z: Tensor,
    weight_blocks: tuple[int, int] = (0, 0),
    transpose: bool = False,
    precision: str | None = None,
) -> None:
    """z = the spectrum of x's blocks; with `weight_blocks` (m, n), of w's, as matrices for products in `precision`."""
    b = plan.b
    blocks = x.shape[1] // b
    n_rows = x.shape[0] * blocks
    out_blocks, in_blocks = weight_blocks
    shared: dict[str, Any] = {
        "x_ptr": x,
        "z_ptr": z,
        "n_rows": n_rows,
        "stride_x_t": x.stride(0),
        "stride_z_f": z.stride(0),
        "blocks": blocks,
        "OUT_BLOCKS": out_blocks,
        "IN_BLOCKS": in_blocks,
        "TRANSPOSE": transpose,
        "DOT": plan.precision,
        "PRECISION": precision or plan.precision,
    }
    p, q = plan.basis.factors
    if p > 1:
        rows, num_warps = _two_level_tile(b, plan.precision)
        first, second, twiddle = plan.basis.matrices
        launch._kernels().fft.two_level_analysis_kernel[launch._cdiv(n_rows, rows), 1, 1](
            **shared,
            first_ptr=first,
            second_ptr=second,
            twiddle_ptr=twiddle,
            P=p,
            Q=q,
            BLOCK_R=rows,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
        return
    columns = 2 * plan.slots
    basis = plan.basis.matrices[1]
    tile = transform_tile(plan.card, basis.itemsize, columns, b)
    # One program per tile of rows and of the columns of the basis.
    grid = (launch._cdiv(n_rows, tile.block_t) * launch._cdiv(columns, tile.block_o), 1, 1)
    launch._kernels().fft.analysis_kernel[grid](
        **shared,
        basis_ptr=basis,
        b=b,
        BLOCK_R=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )


def _synthesise(
    plan: _Plan, y: Tensor, out: Tensor, bias: Tensor | None, scale: float, accumulate: bool = False
) -> None:
    """out = scale · the inverse of `_analyse` (+ bias) (+ out)."""
    b = plan.b
    blocks = out.shape[1] // b
    n_rows = out.shape[0] * blocks
    shared: dict[str, Any] = {
        "y_ptr": y,
        "bias_ptr": bias,
        "out_ptr": out,
        "scale": scale,
        "n_rows": n_rows,
        "stride_y_f": y.stride(0),
        "stride_out_t": out.stride(0),
        "blocks": blocks,
        "HAS_BIAS": bias is not None,
        "ACCUMULATE": accumulate,
        "DOT": plan.precision,
    }
    p, q = plan.basis.factors
    if p > 1:
        rows, num_warps = _two_level_tile(b, plan.precision)
        first, second, twiddle = plan.basis.matrices
        launch._kernels().fft.two_level_synthesis_kernel[launch._cdiv(n_rows, rows), 1, 1](
            **shared,
            first_ptr=first,
            second_ptr=second,
            twiddle_ptr=twiddle,
            P=p,
            Q=q,
            BLOCK_R=rows,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
        return
    basis = plan.basis.matrices[0]
    tile = transform_tile(plan.card, basis.itemsize, b, 2 * plan.slots)
    # One program per tile of rows and of positions inside a block.
    grid = (launch._cdiv(n_rows, tile.block_t) * launch._cdiv(b, tile.block_o), 1, 1)
    launch._kernels().fft.synthesis_kernel[grid](
        **shared,
        basis_ptr=basis,
        b=b,
        BLOCK_R=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )


def _mix(plan: _Plan, z: Tensor, blocks: Tensor, y: Tensor, n_tokens: int) -> None:
    """y = z · blocksᵀ, slot by slot."""
    slots, columns, inner = blocks.shape
    tile = mix_tile(plan.card, plan.scratch.itemsize, n_tokens, columns, inner)
    # One program per tile of tokens and columns, and per slot.
    grid = (launch._cdiv(n_tokens, tile.block_t) * launch._cdiv(columns, tile.block_o), slots, 1)
    launch._kernels().fft.mix_kernel[grid](
        z_ptr=z,
        blocks_ptr=blocks,
        y_ptr=y,
        n_tokens=n_tokens,
        stride_z_f=z.stride(0),
        stride_y_f=y.stride(0),
        row_blocks=columns // 2,
        col_blocks=inner // 2,
        PRECISION=plan.precision,
        BLOCK_T=tile.block_t,
        BLOCK_C=tile.block_o,
        BLOCK_K=tile.block_i,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )


def _add_outer(
    plan: _Plan, g: Tensor, z: Tensor, sums: Tensor | None, m: int, n: int, n_tokens: int, chunk_tokens: int
) -> Tensor:
    """sums (+)= gᵀ z, slot by slot, in as many splits of a chunk as fill a card."""
    tile = outer_tile(plan.card, plan.scratch.itemsize, 2 * m, 2 * n)
    tiles = launch._cdiv(2 * m, tile.block_o) * launch._cdiv(2 * n, tile.block_i)
    tokens_per_split, n_splits = launch._split_tokens(chunk_tokens, tiles * plan.slots, tile.block_t)
    accumulate = sums is not None
    if sums is None:
        sums = torch.empty(n_splits, plan.slots, 2 * m, 2 * n, dtype=torch.float32, device=g.device)
    # One program per tile of a slot's matrix, slot and split of the tokens.
    launch._kernels().fft.outer_kernel[tiles, plan.slots, n_splits](
        g_ptr=g,
        z_ptr=z,
        sums_ptr=sums,
        n_tokens=n_tokens,
        tokens_per_split=tokens_per_split,
        stride_g_f=g.stride(0),
        stride_z_f=z.stride(0),
        out_blocks=m,
        in_blocks=n,
        ACCUMULATE=accumulate,
        PRECISION=plan.precision,
        BLOCK_O=tile.block_o,
        BLOCK_I=tile.block_i,
        BLOCK_T=tile.block_t,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )
    return sums


def _weight_from_sums(sums: Tensor, m: int, n: int, b: int, scale: float) -> Tensor:
    """dw [m, n, b] from the sums of `_add_outer`."""
    plan = _exact_plan(sums.device, b)
    spectrum = _scratch(plan, m * n)
    block = _PAD
    # One program per slot and BLOCK pairs of blocks.
    launch._kernels().fft.fold_spectrum_kernel[launch._cdiv(m * n, block), plan.slots, 1](
        sums_ptr=sums,
        p_ptr=spectrum,
        n_splits=sums.shape[0],
        stride_p_f=spectrum.stride(0),
        out_blocks=m,
        in_blocks=n,
        b=b,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    dw = torch.empty(m, n, b, dtype=torch.float32, device=sums.device)
    _synthesise(plan, spectrum, dw.view(m * n, b), None, scale)
    return dw
