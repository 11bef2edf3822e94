"""The cost model: what a product takes on a GPU, predicted from the launches of each backend (`bounds.py`)."""

from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple

import torch

from ..errors import BackendError
from .bounds import CEILINGS, WRITTEN, Ceilings, Launch, seconds, streamed
from .launch.fft_bases import spectrum_itemsize, taken_apart
from .launch.plans import PROGRAMS, split
from .launch.tiles import ROUTED_ROWS, SMALL_T, grouped_tile, hankel_tile, padded_block

__all__ = [
    "CEILINGS",
    "ROUTED",
    "Ceilings",
    "Sizes",
    "added_seconds",
    "base_seconds",
    "launches",
    "predicted_seconds",
    "routed_launches",
]


class Sizes(NamedTuple):
    """A layer and a call of it, as far as times depend on them."""

    n_tokens: int
    in_features: int
    out_features: int
    b: int
    """The block size; 0 of a layer without adapters."""
    dtype: torch.dtype
    """The widest among the operands."""
    device: torch.device = torch.device("cuda")


# What computes over a stack of w's on a GPU.
ROUTED = ("direct", "fft")

# From this ratio of bandwidths on, tokens are cut into chunks whose spectra stay in the L2.
_L2_PAYS = 5.0

# Of the spectral kernels, most of it from their SASS on sm_90: tokens, rows or columns of a tile, bytes of a
# transform's columns; warp instructions per transformed value, of a warp's tile of mix
# and of each step of it, of each tile and element of outer for 64 tokens; seconds of one program's dependent steps.
_TILE, _COLUMN_BYTES = 128, 256
_PER_VALUE, _MIX_TILE, _MIX_STEP, _OUTER_TILE, _OUTER_ELEMENT = 0.25, 260, 80, 300, 0.037
_CHAIN = 2.5e-6
_ANY = 1 << 62
# Warp instructions (or as many clocks of the path to shared memory) per element of ΔW that is gathered from w.
_PER_GATHERED = 0.5


def predicted_seconds(
    backend: str,
    sizes: Sizes,
    *,
    backward: bool = False,
    has_spectrum: bool = False,
    ceilings: Ceilings = CEILINGS,
) -> float:
    """Predicted GPU time of one product x ΔWᵀ, or of both its gradients (dx and dw) with `backward`.

    A model, not a measurement; `launches` says what is counted.

    Raises:
        BackendError: a backend, or a direction of it, that the model does not know.
    """
    return seconds(launches(backend, sizes, backward=backward, has_spectrum=has_spectrum, ceilings=ceilings), ceilings)


def added_seconds(
    backend: str, sizes: Sizes, *, backward: bool = False, has_spectrum: bool = False, ceilings: Ceilings = CEILINGS
) -> float:
    """Predicted GPU time that an adapter adds to its layer.

    That of the product; by direct, for few tokens of a 16-bit layer, what one kernel for both takes more than the base.
    """
    if backend == "direct" and not backward and sizes.n_tokens <= SMALL_T and sizes.dtype.itemsize == 2:
        return predicted_seconds("decode", sizes, ceilings=ceilings) - base_seconds(sizes, ceilings=ceilings)
    return predicted_seconds(backend, sizes, backward=backward, has_spectrum=has_spectrum, ceilings=ceilings)


def base_seconds(sizes: Sizes, *, ceilings: Ceilings = CEILINGS) -> float:
    """Predicted GPU time of the base layer's own product x Wᵀ in the same model; of the gradient of x too."""
    return seconds([_gemm(sizes, ceilings)], ceilings)


def launches(
    backend: str,
    sizes: Sizes,
    *,
    backward: bool = False,
    has_spectrum: bool = False,
    ceilings: Ceilings = CEILINGS,
) -> list[Launch]:
    """What a backend launches for one product, or for both its gradients with `backward`.

    - direct: the table of shifted rows (none with up to `SMALL_T` tokens), and a product that reads it or w. Backward:
      the same for dx; for dw a dense product of dy and x, and the sum of its parts.
    - expand: ΔW written densely, and cuBLAS's product. Backward: the same for dx, direct's dw.
    - fft: spectra of w and x, their products per frequency, the results; backward: spectra of w, dy and x, products for
      dx and dw, both results. Spectra stay in the L2 where all of them fit. Otherwise a launch finds the last
      `l2_bytes` that the one before wrote, because it begins with them, and half of it in the backward pass, where two
      spectra are written side by side. x and dy are found likewise.
    - torch: each aten call reads its operands and writes its result once.
    - fold: reads W, writes W + ΔW; the product is the base layer's own. Never chosen, only told, and only forward.
    - decode: base layer and adapter in one kernel for up to `SMALL_T` tokens. Never chosen, only forward.

    Args:
        backend: the name.
        sizes: of the layer and the call.
        backward: whether the call computes gradients.
        has_spectrum: whether x's spectrum is there already, from the forward pass or from another layer (fft alone).
        ceilings: of the card.

    Raises:
        BackendError: a backend, or a direction of it, that the model does not know.
    """
    if backend == "fft":
        return _spectral(sizes, backward, has_spectrum, ceilings)
    known = _BACKWARD if backward else _FORWARD
    if backend not in known:
        raise BackendError(f"the cost model knows no {'backward of ' if backward else ''}backend {backend!r}")
    return known[backend](sizes, ceilings)


def routed_launches(
    backend: str, sizes: Sizes, stack: int, rows: int, *, backward: bool = False, ceilings: Ceilings = CEILINGS
) -> list[Launch]:
    """What a backend launches for rows that have w's of their own out of a stack; the base's grouped product is beside.

    - fft: as `launches`, with the spectra of all w's, and tiles of rows that end where a group does. The table of
      these tiles, one small launch for all calls with the same rows, is left out.
    - direct: each row reads its w; with more than `SMALL_T` rows to a w, tiles of rows gather ΔW. Backward: the same
      for dx, and fft's dw.

    Args:
        backend: "direct" or "fft".
        sizes: of one w and its share of the rows.
        stack: how many w's there are.
        rows: how many rows in all.
        backward: whether the call computes gradients.
        ceilings: of the card.

    Raises:
        BackendError: another backend.
    """
    if backend not in ROUTED:
        raise BackendError(f"the cost model knows no backend {backend!r} over a stack: {', '.join(map(repr, ROUTED))}")
    all_rows = sizes._replace(n_tokens=rows)
    if backend == "fft":
        return _spectral(all_rows, backward, False, ceilings, stack)
    if not backward:
        return _routed_direct(sizes, stack, rows, ceilings)
    dw = _spectral(all_rows, True, False, ceilings, stack, with_dx=False)
    return _routed_direct(_transposed(sizes), stack, rows, ceilings) + dw


def _routed_direct(sizes: Sizes, stack: int, rows: int, at: Ceilings) -> list[Launch]:
    share, n, m, b, dtype, _ = sizes
    i, w, hit = dtype.itemsize, 4 * n * m / b, min(stack, rows)
    if share <= SMALL_T:
        # Programs of 16 row blocks and 64 positions each read their rows of w and a token, as in `_direct`.
        read, written = rows * ceil(b / 64) * (w + ceil(m / b / 16) * i * n), i * rows * m
        few = hankel_tile(i, b)
        programs = rows * ceil(m / b / few.block_t) * ceil(b / few.block_o)
        n_splits = split(n, few.block_i, programs, least=2)[1]
        sums = n_splits * 4 * rows * m if n_splits > 1 else written
        product = Launch(hit * w + i * rows * n + sums, read + WRITTEN * sums)
        return [product, streamed(sums, written)] if n_splits > 1 else [product]
    tile = grouped_tile(i)
    tiles = _tiles(rows, hit, tile.block_t)
    # Each tile of outputs reads its rows again, and each tile of rows gathers a whole ΔW.
    read = ceil(m / tile.block_o) * i * rows * n + tiles * 4 * n * m
    flops, instructions = 2 * tiles * tile.block_t * n * m, _PER_GATHERED * tiles * n * m
    hbm_bytes = hit * w + i * rows * (n + m)
    return [Launch(hbm_bytes, read + WRITTEN * i * rows * m, flops, instructions, at.triton_flops[i])]


def _tiles(rows: float, groups: int, block_t: int) -> int:
    """At most so many tiles have rows of one group each."""
    return groups - 1 + ceil((rows - groups + 1) / block_t)


def _gemm(sizes: Sizes, at: Ceilings, found: float = 0.0) -> Launch:
    """cuBLAS's dense product."""
    t, n, m, _, dtype, _ = sizes
    i = dtype.itemsize
    return streamed(i * (n * m + t * n), i * t * m, 2 * t * n * m, at.cublas_flops[i], found)


def _direct(sizes: Sizes, at: Ceilings) -> list[Launch]:
    t, n, m, b, dtype, _ = sizes
    i, w = dtype.itemsize, 4 * n * m / b
    table = min(8 * w, i * n * m)  # eight shifts of doubled rows, or dense where that is not larger
    if t <= SMALL_T:
        # Programs of 16 row blocks and 64 positions each read their rows of w and a token.
        read = t * ceil(b / 64) * (w + ceil(m / b / 16) * i * n)
        return [Launch(w + i * t * n, read), streamed(0.0, i * t * m)]
    product = streamed(
        i * t * n + table, i * t * m, 2 * t * n * m, at.triton_flops[i], found=_if_fits(table, at.l2_bytes)
    )
    return [streamed(w, table), product]


def _expand(sizes: Sizes, at: Ceilings) -> list[Launch]:
    dense = sizes.dtype.itemsize * sizes.in_features * sizes.out_features
    return [_expansion(sizes), _gemm(sizes, at, found=_if_fits(dense, at.l2_bytes))]


def _expansion(sizes: Sizes, base: float = 0.0) -> Launch:
    """ΔW written densely, or added to a base of so many bytes."""
    _, n, m, b, dtype, _ = sizes
    return streamed(4 * n * m / b + base, dtype.itemsize * n * m)._replace(instructions=_PER_GATHERED * n * m)


def _fold(sizes: Sizes, at: Ceilings) -> list[Launch]:
    return [_expansion(sizes, sizes.dtype.itemsize * sizes.in_features * sizes.out_features)]


def _decode(sizes: Sizes, at: Ceilings) -> list[Launch]:
    t, n, m, b, dtype, _ = sizes
    i, w = dtype.itemsize, 4 * n * m / b
    # Tiles of 16 rows of W read their row of w and the one before; those of more than 4 tokens have 32 rows.
    tiles = m / (16 if t <= 4 else 32)
    read = i * n * m + m / 16 * 2 * 4 * n + tiles * 2 * i * t * n
    return [Launch(i * (n * m + t * (n + m)) + w, read + WRITTEN * i * t * m, 2 * t * n * m, rate=at.triton_flops[i])]


def _torch(sizes: Sizes, at: Ceilings) -> list[Launch]:
    t, n, m, b, dtype, _ = sizes
    w, x, y = 4 * n * m / b, 4 * t * n, 4 * t * m  # float32; half a complex spectrum has as many bytes
    product = streamed(w + x, y, 8 * t * (b // 2 + 1) * n * m / b**2, at.cublas_flops[4])
    return [*[streamed(w, w)] * 4, *_there(x, dtype), product, *_there(y, dtype)]


def _torch_backward(sizes: Sizes, at: Ceilings) -> list[Launch]:
    t, n, m, b, dtype, _ = sizes
    w, x, y = 4 * n * m / b, 4 * t * n, 4 * t * m
    flops = 8 * t * (b // 2 + 1) * n * m / b**2
    products = [streamed(w + y, x, flops, at.cublas_flops[4]), streamed(x + y, w, flops, at.cublas_flops[4])]
    return [*[streamed(w, w)] * 6, *_there(y, dtype), *_there(x, dtype) * 2, *products]


def _there(n_bytes: float, dtype: torch.dtype) -> list[Launch]:
    """A cast, a transform and a transposition of so many bytes in float32, there or back."""
    cast = [streamed(dtype.itemsize / 4 * n_bytes, n_bytes)] if dtype.itemsize < 4 else []
    return [*cast, *[streamed(n_bytes, n_bytes)] * 2]


def _direct_weight_grad(sizes: Sizes, at: Ceilings) -> list[Launch]:
    t, n, m, b, dtype, _ = sizes
    i, w = dtype.itemsize, 4 * n * m / b
    sums = w if b <= 64 else 2 * w  # diagonals that wrap are kept apart
    return [streamed(i * t * (n + m), sums, 2 * t * n * m, at.triton_flops[i]), streamed(sums, w)]


def _if_fits(n_bytes: float, l2_bytes: float) -> float:
    """What a launch finds that begins with the bytes written first: all or nothing."""
    return n_bytes if n_bytes <= l2_bytes else 0.0


_FORWARD: Mapping[str, Callable[[Sizes, Ceilings], list[Launch]]] = {
    "direct": _direct,
    "expand": _expand,
    "torch": _torch,
    "fold": _fold,
    "decode": _decode,
}
_BACKWARD: Mapping[str, Callable[[Sizes, Ceilings], list[Launch]]] = {
    "direct": lambda sizes, at: _direct(_transposed(sizes), at) + _direct_weight_grad(sizes, at),
    "expand": lambda sizes, at: _expand(_transposed(sizes), at) + _direct_weight_grad(sizes, at),
    "torch": _torch_backward,
}


def _transposed(sizes: Sizes) -> Sizes:
    return sizes._replace(in_features=sizes.out_features, out_features=sizes.in_features)


def _spectral(
    sizes: Sizes, backward: bool, has_spectrum: bool, at: Ceilings, stack: int = 0, *, with_dx: bool = True
) -> list[Launch]:
    """The launches of fft; what only the first or the last chunk of tokens has, w and dw, is counted with each.

    With a stack, w is one of so many, and the tokens are those of all.
    """
    _, n, m, b, dtype, _ = sizes
    q = taken_apart(b)[1]
    i, real = dtype.itemsize, spectrum_itemsize(dtype, q)
    spectra = real * sizes.n_tokens * (n + m + n * backward)
    n_chunks = max(1, ceil(spectra / at.l2_bytes)) if at.l2_bandwidth >= _L2_PAYS * at.bandwidth else 1
    resident = spectra / n_chunks <= at.l2_bytes
    t = sizes.n_tokens / n_chunks
    rows, cols = 2 * m / q, 2 * n / q  # of the matrix that w is in each of q / 2 slots
    rate = at.tf32_flops if real > i else at.triton_flops[i]
    product_flops = q * t * max(rows, 16.0) * max(cols, 16.0)
    n_w = max(1, stack)
    w, blocks = n_w * 4 * n * m / b, n_w * real * q / 2 * rows * cols
    hit = max(1, min(n_w, int(t)))  # that have tokens
    most = min(ROUTED_ROWS if stack else _TILE, max(16, 1 << (ceil(t / hit) - 1).bit_length()))
    t_tiles = _tiles(t, hit, most)

    def together(*parts: Launch) -> Launch:
        """One launch of parts in one grid."""
        hbm_bytes, l2_bytes, flops, instructions = (sum(counts) for counts in zip(*(p[:4] for p in parts), strict=True))
        return Launch(hbm_bytes, l2_bytes, flops, instructions, rate, _CHAIN, overlaps=True)

    def kept(width: int, found: float = 0.0) -> float:
        """Bytes that memory writes of a spectrum, or reads where so many are found."""
        return 0.0 if resident else max(real * t * width - found, 0.0)

    def transform(width: int, source: int, target: int, hbm_bytes: float) -> Launch:
        """Of values of so many bytes to others."""
        values = t * width
        read = ceil(real * q / _COLUMN_BYTES) * source * values + ceil(values / q / _TILE) * real * q**2
        instructions = _PER_VALUE * values * max(1.0, q / 128)
        return Launch(hbm_bytes, read + WRITTEN * target * values, 2 * q * values, instructions)

    def mix(width: int, inner: float, columns: float, hbm_bytes: float) -> Launch:
        """From the spectrum of so many features to that of others."""
        read = ceil(columns / _TILE) * real * t * width + t_tiles * blocks / n_w
        instructions = t_tiles * q / 2 * columns / 16 * (_MIX_TILE + _MIX_STEP * ceil(inner / 64))
        return Launch(hbm_bytes, read + WRITTEN * real * t * q / 2 * columns, product_flops, instructions)

    l2 = at.l2_bytes
    blocks_again = blocks - _if_fits(blocks, l2)
    of_w = Launch(w + blocks, n_w * (4 * n * m / q + n * m / 8) + WRITTEN * blocks)
    if not backward:
        of_x = transform(n, i, real, max(i * t * n - l2 / n_chunks, 0.0) + kept(n))
        z = real * t * n if has_spectrum else kept(n, found=l2)
        return n_chunks * [
            together(of_w) if has_spectrum else together(of_w, of_x),
            together(mix(n, cols, rows, z + kept(m) + blocks_again)),
            together(transform(m, real, i, kept(m, found=l2) + i * t * m)),
        ]

    half = l2 / 2
    of_dy = transform(m, i, real, max(i * t * m - (l2 if has_spectrum else half) / n_chunks, 0.0) + kept(m))
    of_x = transform(n, i, real, i * t * n + kept(n))
    spectra_of = together(of_w, of_dy) if has_spectrum else together(of_w, of_dy, of_x)

    tiles = ceil(rows / _TILE) * ceil(cols / _TILE)
    matrix = padded_block(ceil(rows), _ANY) * padded_block(ceil(cols), _ANY)
    fuses = real == 2 and matrix <= at.fused_reals and not stack
    programs = n_w * q / 2 * (1 if fuses else tiles) * (2 if fuses and matrix > 64 * 64 else 1)
    n_splits = max(1, min(int(PROGRAMS / programs), ceil(t / n_w / 512)))
    sums = n_splits * n_w * 4 * q / 2 * rows * cols
    z_and_g = kept(m, found=half) + real * t * n if has_spectrum else kept(m + n, found=half)
    read = real * t * (ceil(rows / _TILE) * n + ceil(cols / _TILE) * m)
    # Warp instructions of each step of 64 tokens: of a tile, and of its elements.
    instructions = q / 2 * (t / 64 + hit - 1) * (_OUTER_TILE * tiles + _OUTER_ELEMENT * rows * cols)
    outer = Launch(z_and_g + sums, read + WRITTEN * sums, product_flops, instructions)
    if fuses:
        # The spectrum of dy is read once for both.
        also = Launch(kept(n) + blocks_again, n_splits * blocks + WRITTEN * real * t * n, product_flops, instructions)
        products = [together(outer, also)]
    else:
        products = [together(outer), together(mix(m, rows, cols, kept(m) + kept(n) + blocks_again))]
    dx = transform(n, real, i, kept(n, found=half) + i * t * n)
    dw = Launch(w + sums - _if_fits(sums, l2), sums + WRITTEN * w)
    if not with_dx:
        return n_chunks * [together(of_dy, of_x), together(outer), together(dw)]
    return n_chunks * [spectra_of, *products, together(dx, dw)]
