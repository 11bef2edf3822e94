"""A kernel that is wrong on purpose: who looks for writes out of bounds has to find this one, or sees nothing."""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["SHAPE", "overrun"]

_BLOCK = 128
# What there is room for.
SHAPE = (_BLOCK - 1,)


@triton.jit
def overrun_kernel(out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i] = 1 for i < BLOCK; a mask is missing."""
    tl.store(out_ptr + tl.arange(0, BLOCK), 1.0)


def overrun(out: Tensor) -> None:
    """Write one element more than `out` has, float32 of `SHAPE`."""
    overrun_kernel[1, 1, 1](out_ptr=out, BLOCK=_BLOCK, num_warps=4)
