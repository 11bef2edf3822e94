"""Bases of the spectral kernels: matrices of the orthogonal DFT, what they are of, and the dtypes of spectra.

By dtype of x:

    bfloat16    bfloat16 spectra and basis, from b = 32; below 32 as float16, because so few values do not average out
                five roundings
    float16     float32 spectra rounded to TF32, TF32 products: float16 would lose spectra of large x (above 65504) and
                of small gradients (below 6e-5)
    float32     float32 spectra, three TF32 products (one where torch's own switch allows that)
"""

import functools
from collections.abc import Callable
from math import log2, pi, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import spectra
from . import specs
from .plans import round_up

__all__ = [
    "PAD",
    "Allocation",
    "Memory",
    "Transform",
    "spectrum_itemsize",
    "taken_apart",
    "transform",
]


# The longest block that is not taken apart, where it can be: one tile of columns, so that x is read once.
_LONGEST = 128
# A tile has the rows of whole blocks; the smallest of `tiles.transform_tile` has so many.
_MOST_APART = 64
# Generations that have programmatic dependent launch. Graphs take it as well: captured, it becomes an edge.
_DEPENDENT_LAUNCHES = ("sm_90", "sm_100")
# Rows of a basis matrix and of a spectrum are padded to a multiple of this (`PAD` in kernels/fft.py).
PAD = 128
# From this block size on, spectra of bfloat16 tensors are bfloat16.
_SMALLEST_16BIT = 32


def spectrum_itemsize(dtype: torch.dtype, b: int) -> int:
    """Bytes per real of the spectra of a tensor of `dtype`."""
    return 2 if dtype == torch.bfloat16 and b >= _SMALLEST_16BIT else 4


def taken_apart(b: int) -> tuple[int, int]:
    """(S, Q) with b = S·Q: a block of b is computed as S × S blocks of Q (see kernels/fft.py), S a power of two.

    S is as small as brings Q down to `_LONGEST`, or as large as b has factors of two; no more than `_MOST_APART`.
    """
    s = 1
    while b // s > _LONGEST and b % (2 * s) == 0 and 2 * s <= _MOST_APART:
        s *= 2
    return s, b // s


class _Basis(NamedTuple):
    """The matrix of the orthogonal DFT of Q reals as the kernels read it, so that each product reads rows."""

    inverse: Tensor
    """O [Q, 2·SLOTS], padded."""
    forward: Tensor
    """Oᵀ [2·SLOTS, Q], padded."""
    gain: float
    """What a transform and its inverse must be multiplied by; 1 for an orthogonal basis."""


Allocation = Callable[[], Tensor]


class Memory(NamedTuple):
    """A tensor to be allocated."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def allocation(self) -> Allocation:
        """What allocates it, without values."""
        return functools.partial(torch.empty, *self.shape, dtype=self.dtype, device=self.device)

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

    device: torch.device
    card: str
    apart: int
    """S: how many blocks of Q one block is taken apart into."""
    size: int
    """Q, the length of the transform."""
    basis: _Basis
    exact: _Basis
    """In float32, for what is small and read or written in float32: w and dw."""
    scratch: torch.dtype
    precision: str
    """How float32 operands are multiplied."""

    @property
    def slots(self) -> int:
        """Pairs of reals that the spectrum of Q values has."""
        return (self.size + 1) // 2

    def memory(self, n_tokens: int, blocks: int) -> Memory:
        """Of the spectrum of tokens of so many blocks: [slots, 2 · rows padded to whole tiles]."""
        rows = round_up(n_tokens * blocks * self.apart, PAD)
        return Memory((self.slots, 2 * rows), self.scratch, self.device)

    def matrices(self, row_blocks: int, col_blocks: int) -> Memory:
        """Of the spectrum of w: [slots, 2 · S · row_blocks, 2 · S · col_blocks]."""
        return Memory((self.slots, 2 * self.apart * row_blocks, 2 * self.apart * col_blocks), self.scratch, self.device)

    @property
    def options(self) -> dict[str, Any]:
        """What all launches of a card have in common: whether they are set up while the one before drains."""
        return {"PDL": True, "launch_pdl": True} if self.card in _DEPENDENT_LAUNCHES else {"PDL": False}


def transform(device: torch.device, dtype: torch.dtype, b: int, precision: str) -> Transform:
    """For blocks of b values of `dtype`."""
    scratch = torch.bfloat16 if spectrum_itemsize(dtype, b) == 2 else torch.float32
    s, q = taken_apart(b)
    basis, exact = _basis(q, scratch, precision == "tf32", device), _basis(q, torch.float32, False, device)
    return Transform(device, specs.card_of(device), s, q, basis, exact, scratch, precision)


@functools.cache
def _basis(q: int, dtype: torch.dtype, tf32: bool, device: torch.device) -> _Basis:
    """Computed in float64, rounded once to `dtype` or to TF32, and kept for good: it depends on nothing else, and
    captured graphs read it.

    Raises:
        BackendError: a CUDA graph is being captured.
    """
    return spectra.lasting(lambda: _computed_basis(q, dtype, tf32, device), device, f"the DFT basis of length {q}")


def _computed_basis(q: int, dtype: torch.dtype, tf32: bool, device: torch.device) -> _Basis:
    """`_basis`, anew."""
    slots = (q + 1) // 2
    r, c = (torch.arange(size, dtype=torch.float64, device="cpu") for size in (q, slots))
    angle = (r[:, None] * c[None, :]).remainder_(q).mul_(2 * pi / q)  # of an exact remainder
    amplitude = (2 / q) ** 0.5
    if dtype == torch.bfloat16:
        # Most cosines lie near ±1, where those of an amplitude of 2^k have the smallest relative rounding error.
        amplitude = 2.0 ** round(log2(amplitude))
    matrix = torch.zeros(round_up(q, PAD), round_up(2 * slots, PAD), dtype=torch.float64, device="cpu")
    matrix[:q, 0 : 2 * slots : 2] = angle.cos() * amplitude
    matrix[:q, 1 : 2 * slots : 2] = -angle.sin() * amplitude
    matrix[:q, 0] = amplitude * 0.5**0.5
    matrix[0:q:2, 1] = amplitude * 0.5**0.5 if q % 2 == 0 else 0.0
    matrix[1:q:2, 1] = -matrix[0, 1]

    def placed(matrix: Tensor) -> Tensor:
        matrix = matrix.to(dtype)
        return (_to_tf32(matrix) if tf32 and dtype == torch.float32 else matrix).contiguous().to(device)

    return _Basis(placed(matrix), placed(matrix.T), 2 / q / amplitude**2)


def _to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to the ten bits that a TF32 product reads; hardware would cut the others off."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
