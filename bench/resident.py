"""A kernel that copies the same values again and again: from the second time on out of a cache that holds them."""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK", "copy_again"]

BLOCK = 1024  # values that a program copies at once


@triton.jit
def copy_again_kernel(  # type: ignore[no-untyped-def]
    source_ptr,  # [length]
    target_ptr,  # [length]
    length,
    repeats,
    BLOCK: tl.constexpr,
):
    """target = source, `repeats` times; a program always copies the same part of it."""
    start = tl.program_id(0) * BLOCK
    stride = tl.num_programs(0) * BLOCK
    for _ in range(repeats):
        for first in range(start, length, stride):
            at = first + tl.arange(0, BLOCK)
            # Past the multiprocessor's own cache.
            values = tl.load(source_ptr + at, mask=at < length, cache_modifier=".cg")
            tl.store(target_ptr + at, values, mask=at < length, cache_modifier=".cg")


def copy_again(source: Tensor, target: Tensor, *, repeats: int, programs: int) -> None:
    """Copy `source` to `target` (contiguous, of one size below 2³¹ and one dtype) so often, in one launch.

    Programs have the same work where their number times `BLOCK` divides the size.
    """
    copy_again_kernel[programs, 1, 1](
        source_ptr=source, target_ptr=target, length=source.numel(), repeats=repeats, BLOCK=BLOCK, num_warps=4
    )
