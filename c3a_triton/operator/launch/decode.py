"""Host side of `kernels/decode.py`: base layer and adapter together, for a few tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import ShapeError
from . import counters, specs
from .plans import PROGRAMS, bound, cdiv, kernels, planned, split
from .specs import Spec
from .tiles import SMALL_T, decode_tile

__all__ = ["decode_linear", "decodes"]

# run(x, weight, w, bias, out, scale)
_Decode = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, float], None]


def decodes(x: Tensor, weight: Tensor) -> bool:
    """Whether `decode_linear` takes these operands: few tokens, and a 16-bit weight of contiguous rows."""
    return x.shape[0] <= SMALL_T and _decodes(specs.spec(x), specs.spec(weight), weight.stride())


def _decodes(x: Spec, weight: Spec, weight_stride: tuple[int, ...]) -> bool:
    return (
        0 < x.shape[0] <= SMALL_T
        and weight.dtype in specs.DTYPES[1:]
        and weight.dtype == x.dtype
        and weight_stride[1] == 1
        and weight_stride[0] >= weight.shape[1]
    )


def decode_linear(x: Tensor, weight: Tensor, w: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    """x (W + ΔW)ᵀ + bias for up to `SMALL_T` tokens, in one launch and one pass over W.

    Summed in float32, in an order that sizes decide, and rounded once.

    Args:
        x: [T, n·b], float16 or bfloat16, 1 to `SMALL_T` tokens.
        weight: [m·b, n·b] of x's dtype, its rows contiguous.
        w: [m, n, b] float32.
        bias: [m·b], or None.
        scale: multiplies ΔW.

    Returns:
        [T, m·b] in x's dtype.

    Raises:
        ShapeError: sizes, dtypes, strides or devices do not fit.
        BackendError: the kernels cannot run on x's device.
    """
    shape, run = _decode_plan(
        specs.spec(x),
        specs.spec(weight),
        weight.stride(),
        specs.spec(w),
        None if bias is None else specs.spec(bias),
    )
    out = torch.empty(*shape, dtype=x.dtype, device=x.device)
    if bias is not None:
        bias = bias.contiguous()
    run(specs.with_contiguous_rows(x), weight, w.contiguous(), bias, out, scale)
    return out


@planned
def _decode_plan(
    x: Spec, weight: Spec, weight_stride: tuple[int, ...], w: Spec, bias: Spec | None
) -> tuple[tuple[int, int], _Decode]:
    """The shape of `decode_linear`'s result, and what writes it."""
    shape = _check_decode(x, weight, weight_stride, w, bias)
    n_tokens, out_features = shape
    m, n, b = w.shape
    in_features = n * b
    tile = decode_tile(n_tokens, b)
    in_pieces = b % 16 == 0
    tiles = cdiv(m, tile.block_o // 16) * (b // 16) if in_pieces else cdiv(out_features, tile.block_o)
    # Partial sums go to memory and back: that costs more than what half a card has left to gain.
    programs = PROGRAMS if tiles >= PROGRAMS // 4 else tiles
    split_length, n_splits = split(in_features, tile.block_i, programs, least=2)
    is_split = n_splits > 1
    # One program per tile of outputs and split of the sum over in_features.
    multiply = bound(
        kernels().decode.decode_kernel,
        (tiles, n_splits, 1),
        tile,
        n_tokens=n_tokens,
        out_features=out_features,
        in_features=in_features,
        split_length=split_length,
        stride_weight_row=weight_stride[0],
        b=b,
        HAS_BIAS=bias is not None,
        EVEN_K=in_features % tile.block_i == 0,
        SPLIT=is_split,
        BLOCK_T=tile.block_t,
        BLOCK_O=tile.block_o,
        BLOCK_K=tile.block_i,
    )

    def run(x: Tensor, weight: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, scale: float) -> None:
        partials = counted = None
        if is_split:
            partials = torch.empty(n_splits, *shape, dtype=torch.float32, device=out.device)
            counted, idle = counters.take(out.device)
        multiply(
            x_ptr=x,
            weight_ptr=weight,
            w_ptr=w,
            bias_ptr=bias,
            out_ptr=out,
            partials_ptr=partials,
            counters_ptr=counted,
            scale=scale,
            stride_x_t=x.stride(0),
        )
        if counted is not None:
            idle.append(counted)

    return shape, specs.on_device(x.device, run)


def _check_decode(x: Spec, weight: Spec, weight_stride: tuple[int, ...], w: Spec, bias: Spec | None) -> tuple[int, int]:
    """The shape of a layer's result, of operands that all fit."""
    specs.check_w(w)
    specs.check_rows("x", x)
    (n_tokens, features), dtype, device = x
    specs.check_available(device)
    m, n, b = w.shape
    in_features, out_features = n * b, m * b
    if not _decodes(x, weight, weight_stride):
        raise ShapeError(
            f"x {tuple(x.shape)} {dtype}, weight {tuple(weight.shape)} {weight.dtype} of strides {weight_stride}: "
            f"this kernel takes 1 to {SMALL_T} tokens and a weight of contiguous rows in x's dtype, float16 or bfloat16"
        )
    if features != in_features or weight.shape != (out_features, in_features):
        raise ShapeError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit w {tuple(w.shape)}: it takes "
            f"{in_features} features to {out_features}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ShapeError(f"bias {tuple(bias.shape)}: the layer needs ({out_features},)")
    if any(other.device != device for other in (weight, w, bias) if other is not None):
        raise ShapeError(f"x is on {device}: weight, w and bias must be on the same device")
    return n_tokens, out_features
