"""Measuring tiles: for the cases that were chosen, variants of each tile that their kernels ask for."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from c3a_triton.operator import dispatch, tuned
from c3a_triton.operator.launch import plans, tiles
from c3a_triton.operator.launch.tiles import Lookup, TileConfig

from .costs import Case, Setting
from .measurement import Operands, Progress, Timer, default_timer

__all__ = ["measure_tiles"]

# A variant has to be faster by more than measurements scatter.
LEAST_GAIN = 0.01
# What results may differ by between tiles, which add in other orders: relative, by bytes per value.
TOLERANCE = {2: 2e-2, 4: 1e-4}


def measure_tiles(
    cases: Sequence[Case], setting: Setting, timer: Timer | None = None, progress: Progress | None = None
) -> int:
    """Find the fastest tile for each lookup that the cases make and that the tuned table lacks; returns how many.

    One lookup after the other, one property of the tile after the other. A variant counts only where the results stay
    the same up to rounding. The table gets each lookup as it is done, and the process uses it from then on.

    Raises:
        OSError: the table cannot be written.
    """
    timer = timer or default_timer(setting.device)
    dispatch.refresh()
    best = dispatch.tiles_of(setting.device)
    done = 0
    try:
        for i, case in enumerate(cases):
            operands = Operands(case[:2], setting)
            for call in operands.calls(case):
                for lookup in _lookups(call, best):
                    if progress is not None:
                        name, sizes = lookup
                        progress(i, len(cases), f"tiles: {name} {' '.join(map(str, sizes))}")
                    best[lookup] = _fastest(call, lookup, best, timer, setting.dtype.itemsize)
                    found = best[lookup]
                    shape = (found.block_t, found.block_o, found.block_i, found.num_warps, found.num_stages)
                    tuned.add({}, {dispatch.tile_key(setting.device, lookup): shape})
                    done += 1
    finally:
        _use(best)
        dispatch.refresh()
    return done


def _lookups(call: Callable[[], Any], best: dict[Lookup, TileConfig]) -> list[Lookup]:
    """What a call asks for and the table lacks."""
    _use(best)
    plans.clear_plans()
    with tiles.recorded() as asked:
        call()
    return sorted(asked - best.keys(), key=str)


def _use(found: dict[Lookup, TileConfig]) -> None:
    if tiles.override(found):
        plans.clear_plans()


def _fastest(
    call: Callable[[], Any], lookup: Lookup, best: dict[Lookup, TileConfig], timer: Timer, itemsize: int
) -> TileConfig:
    _use(best)
    name, sizes = lookup
    committed = getattr(tiles, name)(*sizes)
    expected, seconds, fastest = _tensors(call()), timer(call), committed
    for field in tiles.FIELDS:
        for tile in tiles.candidates(lookup, fastest, (field,)):
            _use(best | {lookup: tile})
            # A tile may ask for more than the card has: shared memory, registers, threads.
            try:
                if not _same(_tensors(call()), expected, TOLERANCE[itemsize]):
                    warnings.warn(f"{tile} for {lookup} gives other results, and is left out", stacklevel=2)
                    continue
                found = timer(call)
            except Exception as error:
                warnings.warn(f"{tile} for {lookup} cannot be used: {type(error).__name__}", stacklevel=2)
                continue
            if found < seconds * (1 - LEAST_GAIN):
                fastest, seconds = tile, found
    return fastest


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> bool:
    return all(
        bool(
            torch.linalg.vector_norm(one.float() - other.float()) <= tolerance * torch.linalg.vector_norm(other.float())
        )
        for one, other in zip(found, expected, strict=True)
    )
