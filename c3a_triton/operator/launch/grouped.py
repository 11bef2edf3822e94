"""Host side of `kernels/grouped.py`: the product where every row of a batch has an adapter of its own.

Torch tensors in and out, nothing here knows about autograd. What tells a kernel which row has which
adapter is computed on the host from a list of integers, and copied to the device once per list: no call waits for the
GPU, and a captured CUDA graph finds what was copied before. Or it is on the device already, as indices of a stack of
adapters (`indexed_product`, `tiled_product`): then a graph computes with those that it finds when it is replayed.
"""

import functools
import os
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...errors import ShapeError
from .. import spectra
from . import plans, specs
from .plans import Launch, bound, cdiv, planned, split, summation
from .specs import Spec
from .tiles import SMALL_T, TileConfig, grouped_tile, hankel_tile

__all__ = ["Segments", "grouped_product", "indexed_product", "on_device", "runs_on", "segments", "tiled_product"]

# So many lists of integers are kept on devices before all but those of captured graphs are dropped.
_MOST_TABLES = 4096
_ALIGNMENT = 16  # bytes

# Of launches in which addresses say which w a row has.
_ADDRESSES = {"w_ptr": None, "n_groups": 0, "stride_w_group": 0}

# run(x, one table of integers for each launch, bias, scale)
_Product = Callable[[Tensor, Sequence[Tensor], Tensor | None, float], Tensor]


class Segments(NamedTuple):
    """The rows of a batch, ordered so that those of one adapter follow each other."""

    order: tuple[int, ...]  # place → row
    inverse: tuple[int, ...]  # row → place
    runs: tuple[tuple[int, int], ...]  # (adapter, number of rows), by adapter; −1, no adapter, comes first


@functools.lru_cache(maxsize=1024)
def segments(rows: tuple[int, ...]) -> Segments:
    """Order the rows of a batch by adapter, given each row's adapter."""
    order = sorted(range(len(rows)), key=rows.__getitem__)
    inverse = sorted(range(len(rows)), key=order.__getitem__)
    runs = tuple((adapter, len(list(run))) for adapter, run in groupby(rows[row] for row in order))
    return Segments(tuple(order), tuple(inverse), runs)


def runs_on(device: torch.device) -> bool:
    """Whether kernels can follow addresses here: Triton's interpreter moves GPU tensors, and addresses stay behind."""
    return device.type != "cuda" or os.environ.get("TRITON_INTERPRET") != "1"


def grouped_product(
    x: Tensor,
    kernels: Sequence[Tensor],
    rows: Sequence[int],
    *,
    scale: float,
    transpose: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """x ΔWᵀ (or x ΔW), each row of the batch with a ΔW of its own: one launch per distinct block size.

    A second one adds the parts of split sums where the tokens are too few to fill a card.

    Args:
        x: [R·t, in_features] (or [R·t, out_features] with `transpose`): t tokens of row 0, t of row 1, and so on;
            float32, float16 or bfloat16.
        kernels: w [m, n, b] of each adapter, all of the same m·b and n·b: float32, or 16 bits, which are copied.
        rows: for each of the R rows an index into `kernels`, or −1 for none: such rows are zero, but for `bias`.
        scale: multiplies ΔW.
        transpose: multiply by ΔW instead of its transpose, as the gradient of x does.
        bias: [out_features] (or [in_features]), added to every row.

    Returns:
        [R·t, out_features] (or [R·t, in_features]) in x's dtype.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device, or a CUDA graph is being captured and the same call was
            never made before.
    """
    # Held until the launches are queued: kernels see addresses only.
    kernels = [_readable(w) for w in kernels]
    out_features = _check(x, kernels, rows, transpose, bias)
    n_tokens, n_rows, rows = x.shape[0], len(rows), tuple(rows)
    if n_tokens == 0:
        return torch.empty(0, out_features, dtype=x.dtype, device=x.device)
    x = specs.with_contiguous_rows(x)
    bias = None if bias is None else bias.contiguous()
    groups = _by_block_size(kernels, rows)
    sizes = tuple(b for b, _ in groups)
    described = (out_features, transpose, bias is not None, specs.precision(x.dtype))
    with specs.on_device_of(x):
        if n_tokens <= SMALL_T * len(set(rows)):
            run = _hankel_plan(specs.spec(x), n_rows, sizes, *described)
            tables = [addresses for _, addresses in groups]
        else:
            block_t = grouped_tile(x.element_size()).block_t
            tiles = [_token_tiles(addresses, rows, n_tokens // n_rows, block_t) for _, addresses in groups]
            counts = tuple(len(of_group) // 3 for of_group in tiles)
            run = _tiled_plan(specs.spec(x), n_rows, tuple(zip(sizes, counts, strict=True)), *described)
            tables = [(*of_group, *segments(rows).order) for of_group in tiles]
        return run(x, [on_device(table, x.device) for table in tables], bias, scale)


@planned
def _hankel_plan(
    x: Spec, n_rows: int, sizes: tuple[int, ...], out_features: int, transpose: bool, has_bias: bool, precision: str
) -> _Product:
    """The product of few tokens by adapters of these block sizes."""
    (n_tokens, in_features), dtype, device = x
    tiles = {b: hankel_tile(dtype.itemsize, b) for b in sizes}
    programs = {
        b: cdiv(out_features // b, tile.block_t) * cdiv(b, tile.block_o) * n_tokens for b, tile in tiles.items()
    }
    # Splits as in `direct_product`; the same for every block size, so that one launch adds them all.
    step = max(tile.block_i for tile in tiles.values())
    split_length, n_splits = split(in_features, step, min(programs.values()), least=2)
    final = n_splits == 1
    launches = [
        _hankel_launch(
            (n_tokens, in_features, out_features, b),
            tile,
            (programs[b], n_splits, 1),
            transpose,
            tokens_per_row=n_tokens // n_rows,
            split_length=split_length,
            HAS_BIAS=final and has_bias,
            ACCUMULATE=False,
            PRECISION=precision,
            **_ADDRESSES,
            stride_rows=1,
        )
        for b, tile in tiles.items()
    ]
    add_up = summation((n_splits, n_tokens, out_features), has_bias)

    def run(x: Tensor, tables: Sequence[Tensor], bias: Tensor | None, scale: float) -> Tensor:
        out = torch.empty(n_tokens, out_features, dtype=dtype, device=device)
        target = out if final else torch.empty(n_splits, *out.shape, dtype=torch.float32, device=device)
        for launch, addresses in zip(launches, tables, strict=True):
            launch(
                x_ptr=x,
                rows_ptr=addresses,
                bias_ptr=bias if final else None,
                out_ptr=target,
                scale=scale if final else 1.0,
                stride_x_t=x.stride(0),
                stride_out_t=out_features,
            )
        if not final:
            add_up(partials_ptr=target, bias_ptr=bias, out_ptr=out, scale=scale, stride_out_row=out_features)
        return out

    return run


def _hankel_launch(
    sizes: tuple[int, int, int, int], tile: TileConfig, grid: tuple[int, int, int], transpose: bool, **constants: Any
) -> Launch:
    """A launch for (tokens, in_features, out_features, b): a program per token, tile of outputs and split of a sum."""
    n_tokens, in_features, out_features, b = sizes
    return bound(
        plans.kernels().grouped.grouped_hankel_kernel,
        grid,
        tile,
        n_tokens=n_tokens,
        row_blocks=out_features // b,
        col_blocks=in_features // b,
        b=b,
        TRANSPOSE=transpose,
        EVEN_K=in_features % tile.block_i == 0,
        BLOCK_M=tile.block_t,
        BLOCK_J=tile.block_o,
        BLOCK_K=tile.block_i,
        **_w_strides(in_features, b, out_features, transpose),
        **constants,
    )


@planned
def _tiled_plan(
    x: Spec,
    n_rows: int,
    groups: tuple[tuple[int, int], ...],
    out_features: int,
    transpose: bool,
    has_bias: bool,
    precision: str,
) -> _Product:
    """The product of many tokens by adapters of these block sizes, each with so many tiles of tokens."""
    (n_tokens, in_features), dtype, device = x
    launches = [
        _tiled_launch(
            (n_tiles, in_features, out_features, b),
            dtype,
            transpose,
            tokens_per_row=n_tokens // n_rows,
            HAS_BIAS=has_bias,
            ACCUMULATE=False,
            PRECISION=precision,
            **_ADDRESSES,
        )
        for b, n_tiles in groups
    ]

    def run(x: Tensor, tables: Sequence[Tensor], bias: Tensor | None, scale: float) -> Tensor:
        out = torch.empty(n_tokens, out_features, dtype=dtype, device=device)
        for launch, table in zip(launches, tables, strict=True):
            launch(
                x_ptr=x,
                table_ptr=table,
                bias_ptr=bias,
                out_ptr=out,
                scale=scale,
                stride_x_t=x.stride(0),
                stride_out_t=out_features,
            )
        return out

    return run


def _tiled_launch(sizes: tuple[int, int, int, int], dtype: torch.dtype, transpose: bool, **constants: Any) -> Launch:
    """A launch for (tiles, in_features, out_features, b): a program per tile of tokens of one w and tile of outputs."""
    n_tiles, in_features, out_features, b = sizes
    tile = grouped_tile(dtype.itemsize)
    return bound(
        plans.kernels().grouped.grouped_product_kernel,
        (n_tiles * cdiv(out_features, tile.block_o), 1, 1),
        tile,
        n_tiles=n_tiles,
        out_features=out_features,
        in_features=in_features,
        b=b,
        TRANSPOSE=transpose,
        EVEN_K=in_features % tile.block_i == 0,
        BLOCK_T=tile.block_t,
        BLOCK_O=tile.block_o,
        BLOCK_I=tile.block_i,
        **_w_strides(in_features, b, out_features, transpose),
        **constants,
    )


def indexed_product(
    x: Tensor,
    w: Tensor,
    indices: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x_t ΔW_gᵀ (or x_t ΔW_g) of few rows in any order, each with the w of a stack that its index on the device names.

    Args:
        x: `(n_rows, in_features)`, or transposed `(n_rows, out_features)`; float32, float16 or bfloat16.
        w: `(n_groups, m, n, b)` float32.
        indices: `(n_rows,)`, or `(n_rows, *)` of which the first is taken; integers on x's device. A row of any other
            number than 0 to n_groups − 1 has no w.
        scale: multiplies ΔW.
        transpose: multiply by ΔW instead of its transpose.
        out: added to, in x's dtype.

    Returns:
        `(n_rows, out_features)`, or transposed `(n_rows, in_features)`, in x's dtype: `out`, or what is new. Rows
        without a w are 0, or what `out` held.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    if indices.shape[:1] != x.shape[:1] or indices.device != x.device or indices.is_floating_point():
        raise ShapeError(
            f"indices {tuple(indices.shape)} {indices.dtype} on {indices.device} for x {tuple(x.shape)} on {x.device}: "
            "each row takes an integer on its device"
        )
    shape = specs.product_shape(specs.spec(x), _one(w), None if out is None else specs.spec(out), None, transpose)
    accumulate = out is not None
    out = specs.new_or_given(shape, x, out)
    if x.shape[0]:
        run = _indexed_plan(specs.spec(x), specs.spec(w), transpose, accumulate, specs.precision(x.dtype))
        run(specs.with_contiguous_rows(x), w.contiguous(), indices, out, scale)
    return out


@planned
def _indexed_plan(x: Spec, w: Spec, transpose: bool, accumulate: bool, precision: str) -> Callable[..., None]:
    """What writes an `indexed_product`."""
    (n_tokens, in_features), dtype, device = x
    n_groups, m, n, b = w.shape
    out_features = (n if transpose else m) * b
    tile = hankel_tile(dtype.itemsize, b)
    programs = cdiv(out_features // b, tile.block_t) * cdiv(b, tile.block_o) * n_tokens
    split_length, n_splits = split(in_features, tile.block_i, programs, least=2)
    final = n_splits == 1
    launch = _hankel_launch(
        (n_tokens, in_features, out_features, b),
        tile,
        (programs, n_splits, 1),
        transpose,
        n_groups=n_groups,
        tokens_per_row=1,
        split_length=split_length,
        stride_w_group=m * n * b,
        bias_ptr=None,
        HAS_BIAS=False,
        ACCUMULATE=final and accumulate,
        PRECISION=precision,
    )
    add_up = summation((n_splits, n_tokens, out_features), accumulate=accumulate)

    def run(x: Tensor, w: Tensor, indices: Tensor, out: Tensor, scale: float) -> None:
        target = out if final else torch.empty(n_splits, *out.shape, dtype=torch.float32, device=device)
        launch(
            x_ptr=x,
            w_ptr=w,
            rows_ptr=indices,
            out_ptr=target,
            scale=scale if final else 1.0,
            stride_rows=indices.stride(0),
            stride_x_t=x.stride(0),
            stride_out_t=target.stride(-2),
        )
        if not final:
            add_up(partials_ptr=target, bias_ptr=None, out_ptr=out, scale=scale, stride_out_row=out.stride(0))

    return specs.on_device(device, run)


def tiled_product(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    *,
    scale: float,
    transpose: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`indexed_product` of many rows, sorted by index: a tile of them has one w.

    Args:
        x: as there.
        w: as there.
        table: `(n_tiles, 3)` int32 of up to `grouped_tile`'s block_t rows each, as `routes.tile_table` makes it, that
            cover every row.
        scale: as there.
        transpose: as there.
        out: as there.

    Raises:
        ShapeError: sizes, dtypes or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    shape = specs.product_shape(specs.spec(x), _one(w), None if out is None else specs.spec(out), None, transpose)
    accumulate = out is not None
    out = specs.new_or_given(shape, x, out)
    if x.shape[0]:
        described = specs.precision(x.dtype), table.shape[0]
        run = _stacked_plan(specs.spec(x), specs.spec(w), transpose, accumulate, *described)
        run(specs.with_contiguous_rows(x), w.contiguous(), table, out, scale)
    return out


@planned
def _stacked_plan(
    x: Spec, w: Spec, transpose: bool, accumulate: bool, precision: str, n_tiles: int
) -> Callable[..., None]:
    """What writes a `tiled_product`."""
    (_, in_features), dtype, device = x
    n_groups, m, n, b = w.shape
    launch = _tiled_launch(
        (n_tiles, in_features, (n if transpose else m) * b, b),
        dtype,
        transpose,
        n_groups=n_groups,
        tokens_per_row=1,
        stride_w_group=m * n * b,
        bias_ptr=None,
        HAS_BIAS=False,
        ACCUMULATE=accumulate,
        PRECISION=precision,
    )

    def run(x: Tensor, w: Tensor, table: Tensor, out: Tensor, scale: float) -> None:
        strides = {"stride_x_t": x.stride(0), "stride_out_t": out.stride(0)}
        launch(x_ptr=x, w_ptr=w, table_ptr=table, out_ptr=out, scale=scale, **strides)

    return specs.on_device(device, run)


def _one(w: Tensor) -> Spec:
    """One w of a stack."""
    if w.dim() != 4 or not len(w):
        raise ShapeError(f"w {tuple(w.shape)}: a stack is [groups, m, n, b], none of them 0")
    return Spec(w.shape[1:], w.dtype, w.device)


def _token_tiles(addresses: tuple[int, ...], rows: tuple[int, ...], tokens_per_row: int, block_t: int) -> list[int]:
    """(address, first place, number of places) of every tile of tokens, one after another; tiles of −1 are left out."""
    order, _, runs = segments(rows)
    tiles: list[int] = []
    first = 0
    for _, count in runs:
        address = addresses[order[first // tokens_per_row]]
        end = first + count * tokens_per_row
        if address >= 0:
            for start in range(first, end, block_t):
                tiles += (address, start, min(block_t, end - start))
        first = end
    return tiles


def _by_block_size(kernels: Sequence[Tensor], rows: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """(b, address for each row) of every launch: −1 for rows of another one, 0 for rows of none, in the first."""
    sizes = dict.fromkeys(kernels[adapter].shape[2] for adapter in rows if adapter >= 0)
    groups = []
    for place, b in enumerate(sizes):
        addresses = [w.data_ptr() if w.shape[2] == b else -1 for w in kernels]
        addresses.append(0 if place == 0 else -1)  # what row −1 finds
        groups.append((b, tuple(addresses[adapter] for adapter in rows)))
    return groups


class _Table(NamedTuple):
    values: Tensor
    stream: torch.cuda.Stream


_tables: dict[tuple[tuple[int, ...], torch.device], _Table] = {}
_captured: dict[tuple[tuple[int, ...], torch.device], _Table] = {}


def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers as an int64 tensor on a device, copied there by the first call that asks for them.

    Raises:
        BackendError: a CUDA graph is being captured, and no call has asked for them before.
    """
    if not spectra.captures(device):
        return torch.tensor(values, dtype=torch.int64, device=device)
    key = (values, device)
    capturing = torch.cuda.is_current_stream_capturing()
    table = _tables.get(key)
    if table is None:
        if len(_tables) >= _MOST_TABLES and not capturing:
            torch.cuda.synchronize(device)  # kernels that read them may still be queued, on any stream
            _tables.clear()
            _tables.update(_captured)
        host = torch.tensor(values, dtype=torch.int64, device="cpu")
        copied = spectra.lasting(
            lambda: host.pin_memory().to(device, non_blocking=True), device, "a mixed batch's table"
        )
        table = _tables[key] = _Table(copied, torch.cuda.current_stream(device))
    elif capturing:
        _captured[key] = table  # the graph will read it whenever it is replayed
    elif table.stream != (stream := torch.cuda.current_stream(device)):
        stream.wait_stream(table.stream)
    return table.values


def _w_strides(in_features: int, b: int, out_features: int, transpose: bool) -> dict[str, int]:
    """From row block to row block and from column block to column block of the product, in w."""
    row, col = (b, out_features) if transpose else (in_features, b)
    return {"stride_w_row": row, "stride_w_col": col}


# w that kernels cannot read where it lies → its copy.
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _readable(w: Tensor) -> Tensor:
    """w itself if it is float32, contiguous and aligned, else a copy.

    w may have changed, so each call copies its values; but to the same place, where a captured graph finds and renews
    them.
    """
    if w.dtype not in specs.DTYPES or w.device.type == "meta":
        return w  # and is refused
    if w.dtype == torch.float32 and w.is_contiguous() and w.data_ptr() % _ALIGNMENT == 0:
        return w
    copy: Tensor | None = _copies.get(w)
    if copy is None or copy.shape != w.shape or copy.device != w.device:
        copy = spectra.lasting(
            lambda: torch.empty(w.shape, dtype=torch.float32, device=w.device), w.device, "the copy of a kernel"
        )
        _copies[w] = copy
    return copy.copy_(w.detach())


def _check(x: Tensor, kernels: Sequence[Tensor], rows: Sequence[int], transpose: bool, bias: Tensor | None) -> int:
    """The product's width, if all operands fit."""
    specs.check_rows("x", specs.spec(x))
    specs.check_available(x.device)
    if not rows or x.shape[0] % len(rows):
        raise ShapeError(f"x has {x.shape[0]} tokens for {len(rows)} rows: each row must have the same number")
    if not -1 <= min(rows) <= max(rows) < len(kernels) or max(rows) < 0:
        raise ShapeError(
            f"rows from {min(rows)} to {max(rows)} for {len(kernels)} adapters: give an index or −1, and not −1 alone"
        )
    widths = set()
    for w in kernels:
        specs.check_w(specs.spec(w))
        if w.device != x.device:
            raise ShapeError(f"x is on {x.device}, w on {w.device}: they must be on the same device")
        m, n, b = w.shape
        widths.add((m * b, n * b) if transpose else (n * b, m * b))
    ((in_features, out_features), *others) = widths
    if others or in_features != x.shape[1]:
        raise ShapeError(f"x has {x.shape[1]} features, the adapters take and give {sorted(widths)}")
    if bias is not None and (bias.shape != (out_features,) or bias.device != x.device):
        raise ShapeError(
            f"bias {tuple(bias.shape)} on {bias.device}: the product needs ({out_features},) on {x.device}"
        )
    return out_features
