"""transformers' fine-grained FP8 layers: float8 codes, and a scale for each tile of them.

W = codes · scale of the tile, and a scale is what the largest magnitude of its tile is divided by to be the largest
code; or the next power of two ("ue8m0"), where the layer's scales are such. Tiles at the lower and right edge may be
smaller.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["dequantize", "is_fp8_linear", "is_grouped", "requantize", "unmergeable"]

_MODULE = "transformers.integrations.finegrained_fp8"
_CODES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
# torch 2.7 and later have it.
_POWERS_OF_TWO = getattr(torch, "float8_e8m0fnu", None)


def is_fp8_linear(module: nn.Module) -> bool:
    """Whether a module is transformers' `FP8Linear`, told by its class's origin so that nothing is imported."""
    return _is(module, "FP8Linear")


def is_grouped(module: nn.Module) -> bool:
    """Whether it is `FP8GroupedLinear`, whose inputs are the groups of a block-diagonal matrix."""
    return _is(module, "FP8GroupedLinear")


def _is(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__ == _MODULE for cls in type(module).__mro__)


def unmergeable(layer: Any) -> str | None:
    """Why an `FP8Linear` cannot be dequantized and quantized again here, or None."""
    weight, scales = layer.weight, layer.weight_scale_inv
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in (weight, scales)):
        return f"its codes are a {type(weight).__name__}, of which this process may have a part"
    if weight.is_meta:
        return "its codes are on the meta device (offloaded): keep it on a device"
    if weight.dtype not in _CODES:
        return f"its codes are {weight.dtype}, not float8"
    tiles = _tiles(weight, layer.block_size)
    if scales.numel() != tiles[0] * tiles[1]:
        return f"its scales are {list(scales.shape)}, not one for each of {list(tiles)} tiles {layer.block_size}"
    if scales.dtype not in (torch.float32, torch.bfloat16, _POWERS_OF_TWO):
        return f"its scales are {scales.dtype}, which are no numbers"
    return None


def _tiles(weight: Tensor, block_size: Any) -> tuple[int, int]:
    """How many tiles there are along each dimension; without a block size the whole matrix is one."""
    rows, columns = block_size or weight.shape
    return -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)


def dequantize(layer: Any) -> Tensor:
    """The weight of an `FP8Linear`, [out, in] in float32, in which it is exact."""
    weight, tiles = layer.weight.detach(), _tiles(layer.weight, layer.block_size)
    rows, columns = layer.block_size or weight.shape
    scales = layer.weight_scale_inv.detach().float().reshape(tiles)
    scales = scales.repeat_interleave(rows, dim=0)[: len(weight)]
    return weight.float() * scales.repeat_interleave(columns, dim=1)[:, : weight.shape[1]]


def requantize(layer: Any, weight: Tensor) -> nn.Module:
    """Give an `FP8Linear` another weight, with new scales of the same tiles and in the same form.

    It warns where most of the change is lost: codes lie at distances of 1/8 to 1/16 of their own magnitude, and what
    is less than half of that away from the weight that was there is rounded back to it (figures: docs/quantized.md).

    Args:
        layer: the layer. What its library keeps beside the weight (the scale of activations) stays as it is.
        weight: [out, in], float32.

    Returns:
        The layer.
    """
    old_weight, old_scales = layer.weight, layer.weight_scale_inv
    change = (weight - dequantize(layer)).norm()
    rows, columns = layer.block_size or weight.shape
    most_code = torch.finfo(old_weight.dtype).max
    padded = F.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = tiles.abs().amax(dim=(1, 3)) / most_code
    scales = torch.where(scales > 0, scales, 1.0).clamp(min=torch.finfo(torch.float32).tiny)
    if old_scales.dtype == _POWERS_OF_TWO:
        scales = scales.log2().ceil().exp2()
    scales = scales.to(old_scales.dtype)
    codes = (tiles / scales.float()[:, None, :, None]).clamp(-most_code, most_code).to(old_weight.dtype)
    codes = codes.flatten(2, 3).flatten(0, 1)[: weight.shape[0], : weight.shape[1]].contiguous()
    layer.weight = nn.Parameter(codes, requires_grad=old_weight.requires_grad)
    layer.weight_scale_inv = nn.Parameter(scales.reshape(old_scales.shape), requires_grad=old_scales.requires_grad)
    if (dequantize(layer) - weight).norm() > change / 2:
        warnings.warn(
            "most of what is merged into float8 weights is lost in their rounding, because it is small beside them: "
            "keep the adapter unmerged, or merge into the model loaded with dequantize=True in its "
            "quantization_config (docs/quantized.md)",
            stacklevel=2,
        )
    return layer
