"""Plans: what a launch is, and everything about one that sizes, dtypes and devices decide, kept from call to call.

Values, addresses, strides and the scale are those of each call.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from .tiles import TileConfig

__all__ = ["PROGRAMS", "Launch", "bound", "cdiv", "clear_plans", "kernels", "planned", "round_up", "split", "summation"]

# Sums are split until about this many programs run: enough to fill any card, and the same on all of them, so that
# results do not depend on the card's number of multiprocessors.
PROGRAMS = 264

# A launch that lacks its tensors, strides and scale: the keyword arguments of a call.
Launch = Callable[..., None]

_Plan = TypeVar("_Plan")
# Plans kept of each kind, one for each set of sizes: where sequences vary, for each number of tokens.
_PLANS = 1024
_forget: list[Callable[[], None]] = []


def planned(plan: Callable[..., _Plan]) -> "functools._lru_cache_wrapper[_Plan]":
    """Keep what a function of sizes, dtypes and devices returns, until `clear_plans`."""
    kept = functools.lru_cache(maxsize=_PLANS)(plan)
    _forget.append(kept.cache_clear)
    return kept


def clear_plans() -> None:
    """Forget every plan of every kernel: for those who replace what plans are made from, as tiles are."""
    for forget in _forget:
        forget()


class _Kernels(NamedTuple):
    decode: ModuleType
    direct: ModuleType
    expand: ModuleType
    fft: ModuleType
    grouped: ModuleType
    indexing: ModuleType
    routed: ModuleType
    weight_grad: ModuleType


@functools.cache
def kernels() -> _Kernels:
    """The kernel modules; their import is what imports triton."""
    from ...kernels import decode, direct, expand, fft, grouped, indexing, routed, weight_grad

    return _Kernels(decode, direct, expand, fft, grouped, indexing, routed, weight_grad)


def bound(kernel: Any, grid: tuple[int, int, int], tile: TileConfig | None = None, **constants: Any) -> Launch:
    """A launch of which everything is decided but what is passed to it; compiled kernels are found by `compiled`.

    Args:
        kernel: a function of `kernels()`.
        grid: programs along three axes.
        tile: gives the warps and the stages; without one `constants` name the warps.
        constants: arguments of the kernel that calls do not change.
    """
    if tile is not None:
        constants |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    launch = functools.partial(kernel.run, grid=grid, warmup=False, enable_fp_fusion=True, **constants)
    from . import compiled  # which imports triton

    return compiled.launch(kernel, launch, grid) if compiled.keeps(kernel) else launch


def summation(partials: tuple[int, int, int], has_bias: bool = False, accumulate: bool = False) -> Launch:
    """out [rows, columns] = scale · partials [splits, rows, columns] summed over splits (+ bias) (+ out)."""
    n_splits, n_rows, n_columns = partials
    block = 256
    return bound(
        kernels().indexing.sum_partials_kernel,
        (cdiv(n_columns, block), n_rows, 1),
        n_splits=n_splits,
        n_rows=n_rows,
        n_columns=n_columns,
        HAS_BIAS=has_bias,
        ACCUMULATE=accumulate,
        BLOCK=block,
        num_warps=4,
    )


def split(length: int, step: int, programs: int, least: int) -> tuple[int, int]:
    """(length of a split, number of splits) of a sum that `programs` programs would have, worked off in steps.

    More splits where programs are few, of at least so many steps each.
    """
    steps = cdiv(length, step)
    # Not more programs than run at once: a few that are left over would take as long as all the others.
    split_steps = max(least, cdiv(steps, max(1, PROGRAMS // programs)))
    return split_steps * step, cdiv(steps, split_steps)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The least multiple of b that is not below a."""
    return cdiv(a, b) * b
