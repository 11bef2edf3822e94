"""Bases of the spectral kernels: matrices of the orthogonal DFT, in one level or two, and the dtypes of spectra.

By dtype of x:

    bfloat16    bfloat16 spectra and basis, from b = 32; two-level transforms multiply in TF32, because two roundings of
                their matrices to bfloat16 are more than the error bound leaves; below 32 as float16, because so few
                values do not average out five roundings
    float16     float32 spectra rounded to TF32, TF32 products: float16 would lose spectra of large x (above 65504) and
                of small gradients (below 6e-5)
    float32     float32 spectra, three TF32 products (one where torch's own switch allows that)
"""

import functools
from math import log2, pi, prod
from typing import NamedTuple

import torch
from torch import Tensor

from .. import spectra
from . import specs
from .plans import round_up

__all__ = [
    "PAD",
    "TWO_LEVEL",
    "Memory",
    "Transform",
    "exact_transform",
    "spectrum_itemsize",
    "transform",
    "transform_flops",
]


# Block sizes of two-level transforms: powers of two, whose factors are sizes of tiles. Below, one level moves as many
# bytes and its operations hide behind them.
TWO_LEVEL = (512, 1024, 2048, 4096)
# Rows of a basis matrix and of a spectrum are padded to a multiple of this (`PAD` in kernels/fft.py).
PAD = 128
# From this block size on, spectra of bfloat16 tensors are bfloat16.
_SMALLEST_16BIT = 32


def spectrum_itemsize(dtype: torch.dtype, b: int) -> int:
    """Bytes per real of the spectra of a tensor of `dtype`."""
    return 2 if dtype == torch.bfloat16 and b >= _SMALLEST_16BIT else 4


def transform_flops(b: int) -> int:
    """Operations per value of one transform: a product with the basis, or two levels of P and Q columns of pairs."""
    if b not in TWO_LEVEL:
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


class Memory(NamedTuple):
    """A tensor to be allocated."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def allocate(self) -> Tensor:
        """The tensor, without values."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    @property
    def stride(self) -> int:
        """From slot to slot of a spectrum."""
        return self.shape[1]

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


class Transform(NamedTuple):
    """How blocks of one size and dtype are transformed."""

    card: str
    b: int
    basis: _Basis
    scratch: torch.dtype
    precision: str  # how float32 operands are multiplied

    @property
    def slots(self) -> int:
        """Pairs of reals that a block's spectrum has."""
        return (self.b + 1) // 2

    def memory(self, rows: int) -> Memory:
        """Of the spectrum of so many rows: [slots, 2 · rows padded to whole tiles]."""
        return Memory((self.slots, 2 * round_up(rows, PAD)), self.scratch, self.basis.matrices[0].device)


def transform(device: torch.device, dtype: torch.dtype, b: int, precision: str) -> Transform:
    """For blocks of b values of `dtype`."""
    scratch = torch.bfloat16 if spectrum_itemsize(dtype, b) == 2 else torch.float32
    card = specs.card_of(device)
    basis = _basis(b, scratch, precision == "tf32", takes_two_levels(card, b, precision), device)
    return Transform(card, b, basis, scratch, precision)


def exact_transform(device: torch.device, b: int) -> Transform:
    """For what is small and read or written in float32: w and dw."""
    card = specs.card_of(device)
    basis = _basis(b, torch.float32, False, takes_two_levels(card, b, "tf32x3"), device)
    return Transform(card, b, basis, torch.float32, "tf32x3")


def takes_two_levels(card: str, b: int, precision: str) -> bool:
    """Whether a transform has two levels. Three TF32 products of the largest factors spill registers before sm_90."""
    return b in TWO_LEVEL and (precision == "tf32" or b <= 1024 or card in ("sm_90", "sm_100"))


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
    if b in TWO_LEVEL:  # the order of slots that two levels have: spectra are exchanged with them
        p, q = _factors(b)
        order = (torch.arange(p, device="cpu")[:, None] + p * torch.arange(q // 2, device="cpu")[None, :]).flatten()
        cos, sin = cos[:, order], sin[:, order]
    amplitude = (2 / b) ** 0.5
    if dtype == torch.bfloat16:
        # Most cosines lie near ±1, where those of an amplitude of 2^k have the smallest relative rounding error.
        amplitude = 2.0 ** round(log2(amplitude))
    matrix = torch.zeros(round_up(b, PAD), round_up(2 * slots, PAD), dtype=torch.float64, device="cpu")
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
