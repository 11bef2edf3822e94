"""Tiles of the Triton kernels: a committed table per card generation and shape family.

Nothing here depends on timing, but measured tiles may be put in the place of committed ones (`override`); the dispatch
does so with those of the tuned table. Which tiles the kernels of a lookup can take at all is part of the table
(`bounds`, `candidates`). The committed entries are starting points taken from compiled code (registers, shared memory,
tensor-core instructions; see docs/kernels.md), not from measurements on each card.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

__all__ = [
    "GENERATIONS",
    "ROUTED_ROWS",
    "SHARED_MEMORY",
    "SMALL_T",
    "Lookup",
    "TileConfig",
    "bounds",
    "candidates",
    "decode_tile",
    "diagonal_tile",
    "generation",
    "grouped_tile",
    "hankel_tile",
    "inner_block",
    "mix_outer_tile",
    "mix_tile",
    "mixes_and_sums",
    "outer_tile",
    "override",
    "product_tile",
    "recorded",
    "transform_tile",
    "weight_grad_tile",
]


# Up to so many tokens, `direct_product` takes the Hankel kernel, and a whole layer is one kernel (`decode_linear`).
SMALL_T = 16
# Rows of a tile of `routed_mix_kernel` at most: the last tile of a group is half empty on average. With 128 of them and
# few columns, the compiler spills some registers on sm_80 for the sake of more programs at a time.
ROUTED_ROWS = 64


@dataclass(frozen=True)
class TileConfig:
    """What one launch decides: tile extents in tokens, output features and inner features, warps, pipeline stages."""

    block_t: int
    block_o: int
    block_i: int
    num_warps: int
    num_stages: int


# Shared memory that one program may use, in bytes. sm_86 stands for the small cards of Ampere, Ada and Blackwell.
SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448}
GENERATIONS = tuple(SHARED_MEMORY)

# Rows (largest number of tokens, tile), in ascending order; the last row serves everything above. block_i is the most
# that is taken: `inner_block` fits it to the circulant size.
_Rows = tuple[tuple[int, TileConfig], ...]
_ANY = 1 << 62

_PRODUCT_16BIT: dict[str, _Rows] = {
    "sm_80": (
        (63, TileConfig(32, 128, 64, 4, 4)),
        (1023, TileConfig(64, 128, 64, 4, 3)),
        (_ANY, TileConfig(128, 128, 32, 8, 4)),
    ),
    "sm_86": (
        (63, TileConfig(32, 128, 64, 4, 3)),
        (1023, TileConfig(64, 128, 64, 4, 3)),
        (_ANY, TileConfig(128, 128, 32, 8, 4)),
    ),
    "sm_90": (
        (63, TileConfig(32, 128, 64, 4, 4)),
        (1023, TileConfig(64, 128, 64, 4, 4)),
        (_ANY, TileConfig(128, 128, 64, 8, 3)),
    ),
    "sm_100": (
        (63, TileConfig(32, 128, 64, 4, 4)),
        (1023, TileConfig(64, 128, 64, 4, 4)),
        (_ANY, TileConfig(128, 128, 64, 8, 3)),
    ),
}
# float32 as three TF32 products needs twice the registers: 128 by 128 spills on sm_80.
_PRODUCT_32BIT: dict[str, _Rows] = {
    "sm_80": ((_ANY, TileConfig(64, 64, 32, 4, 3)),),
    "sm_86": ((_ANY, TileConfig(64, 64, 32, 4, 3)),),
    "sm_90": ((1023, TileConfig(64, 64, 32, 4, 3)), (_ANY, TileConfig(128, 128, 32, 8, 3))),
    "sm_100": ((1023, TileConfig(64, 64, 32, 4, 3)), (_ANY, TileConfig(128, 128, 32, 8, 3))),
}

# Weight gradient, blocks cut into tiles: block_o = block_i is the most that a tile takes of a block.
_DIAGONAL_16BIT = {
    "sm_80": TileConfig(32, 128, 128, 8, 3),
    "sm_86": TileConfig(32, 128, 128, 8, 3),
    "sm_90": TileConfig(64, 128, 128, 8, 3),
    "sm_100": TileConfig(64, 128, 128, 8, 3),
}
_DIAGONAL_32BIT = {name: TileConfig(32, 64, 64, 4, 3) for name in GENERATIONS}

# Weight gradient, several whole blocks to a tile.
_BLOCKS_16BIT = {name: TileConfig(64, 64, 64, 4, 3) for name in GENERATIONS}
_BLOCKS_32BIT = {name: TileConfig(32, 64, 64, 8, 3) for name in GENERATIONS}

# Rows with adapters of their own, by bytes per element: block_t tokens of one adapter.
_GROUPED = {2: TileConfig(64, 64, 64, 4, 3), 4: TileConfig(64, 32, 32, 4, 3)}

# Spectral path, transforms: block_t rows of b values, at most block_o columns and block_i inner values. float32 here is
# also what float16 x is transformed in.
_TRANSFORM_16BIT = {name: TileConfig(128, 128, 64, 8, 3) for name in GENERATIONS}
_TRANSFORM_32BIT = {
    # Of 128 rows and eight warps, the compiler spills some for the sake of more programs at a time.
    "sm_80": TileConfig(64, 64, 32, 4, 3),
    "sm_86": TileConfig(64, 64, 32, 4, 3),
    "sm_90": TileConfig(128, 64, 32, 8, 3),
    "sm_100": TileConfig(128, 64, 32, 8, 3),
}
# Product per frequency: block_t tokens, at most block_o columns, at most block_i inner values.
_MIX_16BIT = {name: TileConfig(128, 128, 64, 8, 3) for name in GENERATIONS}
_MIX_32BIT = {name: TileConfig(64, 64, 32, 4, 3) for name in GENERATIONS}
# Gradient per frequency: at most block_o by block_i of one slot's matrix, block_t tokens in a step.
_OUTER_16BIT = {name: TileConfig(64, 128, 128, 8, 3) for name in GENERATIONS}
_OUTER_32BIT = {name: TileConfig(32, 64, 64, 4, 3) for name in GENERATIONS}
# With the product in the same pass, 16-bit spectra only: a slot's whole matrix, of so many reals before registers spill
# or, on sm_86, shared memory runs out.
_MIX_OUTER = TileConfig(64, 128, 128, 8, 2)
_MOST_OF_A_SLOT = {"sm_80": 8192, "sm_86": 8192, "sm_90": 16384, "sm_100": 16384}

# A whole layer for a few tokens, by the most that each takes. Narrow tiles are programs enough without splitting sums;
# with more tokens x would be read too often. The stages keep some 32 KB of W per multiprocessor on their way.
_DECODE = (TileConfig(4, 16, 256, 2, 4), TileConfig(8, 32, 256, 4, 3), TileConfig(16, 32, 256, 8, 3))


def generation(capability: tuple[int, int]) -> str:
    """The row of the tables that serves a card: by compute capability (major, minor)."""
    major, minor = capability
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


# A function below and its arguments, the number of tokens as its power of two.
Lookup = tuple[str, tuple[int | str, ...]]
_measured: dict[Lookup, TileConfig] = {}
_recorders: list[set[Lookup]] = []
_committed: dict[str, Callable[..., TileConfig]] = {}


def override(tiles: Mapping[Lookup, TileConfig]) -> bool:
    """Take these tiles in the place of committed ones, and no others; whether that changes anything.

    Those outside of their `bounds` are not taken. Who has kept what the functions below return, as plans do, has to ask
    again.
    """
    changes = _measured != tiles
    _measured.clear()
    _measured.update(tiles)
    return changes


@contextmanager
def recorded() -> Iterator[set[Lookup]]:
    """The tiles that are asked for meanwhile."""
    asked: set[Lookup] = set()
    _recorders.append(asked)
    try:
        yield asked
    finally:
        _recorders[:] = [other for other in _recorders if other is not asked]  # sets of equal content are equal


def _tunable(tokens_at: int | None = None) -> Callable[[Callable[..., TileConfig]], Callable[..., TileConfig]]:
    """A function of the table that `override` reaches; `tokens_at` is the position of its number of tokens."""

    def decorated(committed: Callable[..., TileConfig]) -> Callable[..., TileConfig]:
        _committed[committed.__name__] = committed

        @functools.wraps(committed)
        def tile(*arguments: int | str) -> TileConfig:
            if not _measured and not _recorders:  # nearly every call
                return committed(*arguments)
            sizes = list(arguments)
            if tokens_at is not None:
                n_tokens = sizes[tokens_at]
                assert isinstance(n_tokens, int)
                sizes[tokens_at] = 1 << (n_tokens - 1).bit_length()
            lookup = (committed.__name__, tuple(sizes))
            for asked in _recorders:
                asked.add(lookup)
            measured = _measured.get(lookup)
            return committed(*arguments) if measured is None or not _fits(lookup, measured) else measured

        return tile

    return decorated


# What of a tile varies in a search, in this order.
FIELDS = tuple(field.name for field in fields(TileConfig))
# From where to where the extents of a function's tiles may lie, in powers of two, for its kernels to be right. Products
# of matrices take no fewer than 16 values along each axis, and rows up to 256 are counted in 32 bits. Beyond that:
_BOUNDS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    # `inner_block` knows steps up to 128.
    "product_tile": ((16, 256), (16, 256), (16, 128)),
    # The Hankel kernels mask or repeat everything.
    "hankel_tile": ((16, 64), (16, 128), (16, 128)),
    # One side for both, which holds a whole block of up to 64. 256 tokens a step take minutes to compile.
    "weight_grad_tile": ((16, 128), (64, 128), (64, 128)),
    "diagonal_tile": ((16, 128), (32, 128), (32, 128)),
    # Everything is masked, or repeats the last row.
    "mix_tile": ((16, 256), (16, 256), (16, 128)),
    "outer_tile": ((16, 256), (16, 256), (16, 256)),
}
# Functions whose block_o and block_i are the same.
_SQUARE = ("weight_grad_tile", "diagonal_tile")
_STEPS = {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5)}


def bounds(lookup: Lookup) -> tuple[tuple[int, int], ...]:
    """The least and the most of block_t, block_o and block_i with which the kernels of a lookup are right.

    Every power of two between them is; where the table has one side for both, block_o and block_i must be equal.
    """
    name, sizes = lookup
    if name == "decode_tile":
        n_tokens, b = map(int, sizes)
        # Blocks in pieces of 16 multiply one value of each piece of a step, and no fewer than 16. Others gather a step
        # value by value, and more than 256 take minutes to compile.
        return (n_tokens, n_tokens), (16, 64), (256, 512) if b % 16 == 0 else (16, 256)
    if name == "transform_tile":
        # Rows of spectra and both sides of a basis are padded to 128, and read and written up to there without a mask;
        # a tile holds whole blocks, of S rows each.
        return (max(16, int(sizes[3])), 128), (16, 128), (16, 128)
    if name == "mix_outer_tile":
        # A program has a slot's whole matrix.
        side_o, side_i = (padded_block(int(size), 1 << 62) for size in sizes[2:])
        return (16, 128), (side_o, side_o), (side_i, side_i)
    return _BOUNDS[name]


def candidates(
    lookup: Lookup, tile: TileConfig | None = None, varied: tuple[str, ...] = FIELDS
) -> Iterator[TileConfig]:
    """Tiles to try for a lookup, each of which computes the same up to rounding, if the card has room for it.

    They differ from `tile` in one respect: an extent up to four times smaller or larger, the warps, or the stages.

    Args:
        lookup: a function of this table and its arguments.
        tile: where to start from; by default the committed tile.
        varied: the fields of a tile to vary. Where the table has one side for both, "block_o" is both.
    """
    name, sizes = lookup
    tile = tile or _committed[name](*sizes)
    extents = dict(zip(FIELDS, bounds(lookup), strict=False))
    for field in varied:
        size = getattr(tile, field)
        if field in extents:
            least, most = extents[field]
            values = [value for value in (size // 4, size // 2, 2 * size, 4 * size) if least <= value <= most]
        else:
            values = [value for value in _STEPS[field] if value != size]
        changes = [{field: value} for value in values]
        if name in _SQUARE and field in ("block_o", "block_i"):
            changes = [{"block_o": value, "block_i": value} for value in values if field == "block_o"]
        yield from (replace(tile, **change) for change in changes)


def _fits(lookup: Lookup, tile: TileConfig) -> bool:
    """Whether a tile lies within its bounds: a tuned table may be another version's, or damaged."""
    sizes = (tile.block_t, tile.block_o, tile.block_i)
    within = all(
        least <= size <= most and size & (size - 1) == 0
        for size, (least, most) in zip(sizes, bounds(lookup), strict=True)
    )
    return within and (lookup[0] not in _SQUARE or tile.block_o == tile.block_i)


@_tunable(tokens_at=2)
def product_tile(card: str, itemsize: int, n_tokens: int) -> TileConfig:
    """The tile of `table_product_kernel` for a card generation, bytes per value and a number of tokens."""
    rows = (_PRODUCT_32BIT if itemsize == 4 else _PRODUCT_16BIT)[card]
    return next(tile for limit, tile in rows if n_tokens <= limit)


@_tunable(tokens_at=0)
def decode_tile(n_tokens: int, block_size: int) -> TileConfig:
    """The tile of `decode_kernel` for 1 to 16 tokens, the same on every card: block_t is the power of two above them.

    Where 16 does not divide the circulant size, ΔW is gathered value by value, and half the step keeps it in registers.
    """
    block_t = 1 << (n_tokens - 1).bit_length()
    tile = next(tile for tile in _DECODE if block_t <= tile.block_t)
    return replace(tile, block_t=block_t, block_i=tile.block_i if block_size % 16 == 0 else tile.block_i // 2)


@_tunable()
def hankel_tile(itemsize: int, block_size: int) -> TileConfig:
    """The tile of `hankel_kernel` and `grouped_hankel_kernel`, the same on every card.

    Of one token: block_t row blocks of ΔW by block_o positions within a block, block_i values of the sum at a time.
    """
    return TileConfig(16, min(64, max(16, 1 << (block_size - 1).bit_length())), 64, 4, 3)


def grouped_tile(itemsize: int) -> TileConfig:
    """The tile of `grouped_product_kernel`, the same on every card."""
    return _GROUPED[itemsize]


def inner_block(length: int, most: int) -> int:
    """How many inner features one step takes: a power of two from 16 to `most` that wastes little of a block.

    The largest that divides `length`, from 32 up; otherwise the largest whose padding stays within a quarter more than
    steps of 16 would need.
    """
    sizes = [size for size in (128, 64, 32, 16) if size <= most]
    for size in sizes[:-1]:
        if length % size == 0:
            return size
    return next(size for size in sizes if -(-length // size) * size <= 1.25 * (-(-length // 16) * 16))


@_tunable()
def diagonal_tile(card: str, itemsize: int, block_size: int) -> TileConfig:
    """The tile of `diagonal_sums_kernel`, its side fitted to the circulant size (more than 64)."""
    tile = (_DIAGONAL_32BIT if itemsize == 4 else _DIAGONAL_16BIT)[card]
    side = next((size for size in (128, 64, 32) if size <= tile.block_o and block_size % size == 0), 0)
    if not side:
        # The last tile of a block is padded, so that smaller tiles may waste less, but they also reuse less.
        side = 64 if -(-block_size // 64) * 64 <= 1.2 * (-(-block_size // 32) * 32) else 32
    num_warps = tile.num_warps if side == 128 else 4
    return TileConfig(tile.block_t, side, side, num_warps, tile.num_stages)


@_tunable()
def weight_grad_tile(card: str, itemsize: int) -> TileConfig:
    """The tile of `block_sums_kernel`."""
    return (_BLOCKS_32BIT if itemsize == 4 else _BLOCKS_16BIT)[card]


def padded_block(length: int, most: int) -> int:
    """How many output features one tile takes: few wide tiles, because each reads the whole other operand again.

    Padding is only multiplied, never read or stored.
    """
    return min(most, max(16, 1 << (length - 1).bit_length()))


@_tunable()
def transform_tile(card: str, itemsize: int, size: int, apart: int) -> TileConfig:
    """The tile of `spectra_kernel` and `results_kernel`: rows of `size` values, `apart` of them from one block."""
    return _fitted((_TRANSFORM_32BIT if itemsize == 4 else _TRANSFORM_16BIT)[card], size, size)


@_tunable(tokens_at=2)
def mix_tile(card: str, itemsize: int, n_tokens: int, columns: int, inner: int) -> TileConfig:
    """The tile of `mix_kernel`: per slot, tokens of `inner` reals to tokens of `columns` reals."""
    tile = (_MIX_32BIT if itemsize == 4 else _MIX_16BIT)[card]
    block_t = min(tile.block_t, max(16, 1 << (n_tokens - 1).bit_length()))
    return _fitted(replace(tile, block_t=block_t), columns, inner)


@_tunable()
def outer_tile(card: str, itemsize: int, rows: int, columns: int) -> TileConfig:
    """The tile of `outer_kernel`: per slot, a matrix of `rows` by `columns` reals."""
    tile = (_OUTER_32BIT if itemsize == 4 else _OUTER_16BIT)[card]
    return _sides(tile, padded_block(rows, tile.block_o), padded_block(columns, tile.block_i))


def mixes_and_sums(card: str, itemsize: int, rows: int, columns: int) -> bool:
    """Whether one program holds a slot's matrix and the sums of its gradient, of `rows` by `columns` reals."""
    return itemsize == 2 and padded_block(rows, _ANY) * padded_block(columns, _ANY) <= _MOST_OF_A_SLOT[card]


@_tunable()
def mix_outer_tile(card: str, itemsize: int, rows: int, columns: int) -> TileConfig:
    """The tile of `outer_kernel` where `mixes_and_sums`: a slot's whole matrix, block_t tokens in a step."""
    return _sides(_MIX_OUTER, padded_block(rows, _ANY), padded_block(columns, _ANY))


def _sides(tile: TileConfig, block_o: int, block_i: int) -> TileConfig:
    """`tile` with these sides; with a small product, eight warps would split it too fine."""
    num_warps = tile.num_warps if block_o * block_i > 64 * 64 else 4
    return replace(tile, block_o=block_o, block_i=block_i, num_warps=num_warps)


def _fitted(tile: TileConfig, columns: int, inner: int) -> TileConfig:
    """`tile` fitted to a problem; with half the columns or fewer, eight warps would split it too fine."""
    block_o, block_i = padded_block(columns, tile.block_o), inner_block(inner, tile.block_i)
    num_warps = tile.num_warps if block_o == tile.block_o else 4
    return replace(tile, block_o=block_o, block_i=block_i, num_warps=num_warps)
