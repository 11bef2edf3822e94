"""transformers' fine-grained FP8: layers and experts whose weights are float8 codes, with a scale for each tile.

W = codes · scale of the tile, and a scale is what the largest magnitude of its tile is divided by to be the largest
code; or the next power of two ("ue8m0"), where the scales are such. Tiles at the lower and right edge may be smaller.
The products are computed by transformers' kernels; of gradients its layers pass on that of the dequantized weight.
"""

import warnings
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from c3a_triton.errors import AdapterStateError

__all__ = [
    "TiledWeight",
    "is_experts",
    "is_grouped",
    "is_linear",
    "stacked_product",
    "unmergeable",
    "unwatch_gradients",
    "watch_gradients",
]

_MODULE = "transformers.integrations.finegrained_fp8"
_CODES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
# Experts' implementations by whose kernels only the router's gradient passes.
_NO_BACKWARD = ("batched_mm", "deepgemm")
# torch 2.7 and later have it.
_POWERS_OF_TWO = getattr(torch, "float8_e8m0fnu", None)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is transformers' `FP8Linear`, told by its class's origin so that nothing is imported."""
    return _is_of(module, "FP8Linear")


def is_grouped(module: nn.Module) -> bool:
    """Whether it is `FP8GroupedLinear`, whose inputs are the groups of a block-diagonal matrix."""
    return _is_of(module, "FP8GroupedLinear")


def is_experts(module: nn.Module) -> bool:
    """Whether it is `FP8Experts`, which have stacks of such weights."""
    return _is_of(module, "FP8Experts")


def _is_of(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__ == _MODULE for cls in type(module).__mro__)


# Merging


def unmergeable(base: Any, name: str) -> str | None:
    """Why a weight of an `FP8Linear` or of `FP8Experts` cannot be dequantized and quantized again here, or None."""
    codes, scales = getattr(base, name), getattr(base, f"{name}_scale_inv")
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in (codes, scales)):
        return f"its codes are a {type(codes).__name__}, of which this process may have a part"
    if codes.is_meta:
        return "its codes are on the meta device (offloaded): keep them on a device"
    if codes.dtype not in _CODES:
        return f"its codes are {codes.dtype}, not float8"
    tiles = _n_tiles(codes, base.block_size)
    if scales.numel() != tiles.numel():
        return f"its scales are {list(scales.shape)}, not one for each of {list(tiles)} tiles {base.block_size}"
    if scales.dtype not in (torch.float32, torch.bfloat16, _POWERS_OF_TWO):
        return f"its scales are {scales.dtype}, which are no numbers"
    return None


def _n_tiles(codes: Tensor, block_size: Any) -> torch.Size:
    """How many tiles there are along each dimension; without a block size a whole matrix is one."""
    *stack, out_features, in_features = codes.shape
    rows, columns = block_size or (out_features, in_features)
    return torch.Size([*stack, -(-out_features // rows), -(-in_features // columns)])


class TiledWeight:
    """A weight of an `FP8Linear` or of `FP8Experts` as a `WeightAccess`. Kept are its codes and scales.

    Args:
        base: the layer, or the experts.
        name: the weight's parameter there; the scales are `<name>_scale_inv`.
    """

    in_place = False

    def __init__(self, base: Any, name: str) -> None:
        self._codes = getattr(base, name).detach()
        self._scales = getattr(base, f"{name}_scale_inv").detach()
        *_, out_features, in_features = self._codes.shape
        self._tile = tuple(base.block_size or (out_features, in_features))

    def place(self) -> Hashable | None:
        """Where the codes are."""
        codes = self._codes
        return str(codes.device), codes.data_ptr(), codes.dtype, tuple(codes.shape), codes.stride()

    def read(self) -> Tensor:
        """The weight, [out, in] or [stack, out, in] in float32, in which it is exact."""
        codes, (rows, columns) = self._codes, self._tile
        scales = self._scales.float().reshape(_n_tiles(codes, self._tile)).repeat_interleave(rows, dim=-2)
        scales = scales[..., : codes.shape[-2], :].repeat_interleave(columns, dim=-1)[..., : codes.shape[-1]]
        return codes.float() * scales

    def write(self, weight: Tensor) -> None:
        """Quantize a weight, with scales of its own for the same tiles, in the same form.

        It warns where most of the change is lost: codes lie at distances of 1/16 to 1/8 of their own magnitude, and
        what is less than half of that away from the weight that was there is rounded back to it (figures:
        docs/quantized.md).
        """
        (rows, columns), most = self._tile, torch.finfo(self._codes.dtype).max
        change = (weight - self.read()).norm()
        padded = F.pad(weight, (0, -weight.shape[-1] % columns, 0, -weight.shape[-2] % rows))
        tiles = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # [..., i, row, j, column]
        scales = tiles.abs().amax(dim=(-3, -1)) / most
        scales = torch.where(scales > 0, scales, 1.0).clamp(min=torch.finfo(torch.float32).tiny)
        if self._scales.dtype == _POWERS_OF_TWO:
            scales = scales.log2().ceil().exp2()
        self._scales.copy_(scales.reshape(self._scales.shape))
        scales = scales.to(self._scales.dtype).float()  # as they are stored
        codes = (tiles / scales[..., :, None, :, None]).clamp(-most, most).flatten(-2).flatten(-3, -2)
        self._codes.copy_(codes[..., : weight.shape[-2], : weight.shape[-1]])
        if (self.read() - weight).norm() > change / 2:
            warnings.warn(
                "most of what is merged into float8 weights is lost in their rounding, because it is small beside "
                "them: keep the adapter unmerged, or merge into the model loaded with dequantize=True in its "
                "quantization_config (docs/quantized.md)",
                stacklevel=2,
            )

    def keep(self, where: str) -> nn.Module:
        """A copy of codes and scales."""
        kept = {"codes": self._codes, "scales": self._scales}
        copies = {name: value.to("cpu", copy=True) if where == "cpu" else value.clone() for name, value in kept.items()}
        return nn.ParameterDict({name: nn.Parameter(value, requires_grad=False) for name, value in copies.items()})

    def restore(self, kept: Tensor | nn.Module) -> None:
        """Bring back codes and scales."""
        assert isinstance(kept, nn.ParameterDict)
        self._codes.copy_(kept["codes"])
        self._scales.copy_(kept["scales"])


# Experts


def watch_gradients(model: nn.Module) -> None:
    """Refuse calls of a model's FP8 experts that would cut a gradient without a word, until `unwatch_gradients`."""
    for module in model.modules():
        if is_experts(module) and _check_backward not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_check_backward)


def unwatch_gradients(model: nn.Module) -> None:
    """Undo `watch_gradients`."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _check_backward:
                del module._forward_pre_hooks[key]


def _check_backward(experts: Any, args: Any) -> None:
    implementation = experts.config._experts_implementation
    if implementation in _NO_BACKWARD and torch.is_grad_enabled() and any(x.requires_grad for x in args[:1]):
        raise AdapterStateError(
            f"FP8 experts have no backward pass with experts_implementation={implementation!r}, and layers below them "
            'would be trained on wrong gradients: call model.set_experts_implementation("grouped_mm")'
        )


def stacked_product(experts: Any, name: str, x: Tensor, ends: Tensor, implementation: Any) -> Tensor:
    """One projection of `FP8Experts`, by their own kernels.

    Args:
        experts: the experts.
        name: the projection's parameter.
        x: [n_rows, in], in the order of the experts.
        ends: [n_experts], where each expert's rows end, int32; rows behind the last are of no expert.
        implementation: what the experts' configuration names: `"eager"` computes one expert after another, as the
            experts do with static scales of activations, anything else all in one launch.

    Returns:
        [n_rows, out]; of rows without an expert nobody knows what.
    """
    codes, scales = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
    if implementation != "eager" and experts.activation_scheme != "static":
        from transformers.integrations import finegrained_fp8 as own

        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        return own._apply_if_grad(
            own.FP8GroupedMatmulFunction,
            own.fp8_grouped_matmul,
            x,
            codes,
            scales,
            ends,
            counts,
            experts.block_size,
        )
    fixed = None
    if experts.activation_scheme == "static":  # of experts without a gate, too, under these names
        fixed = experts.down_proj_activation_scale if name == "down_proj" else experts.gate_up_proj_activation_scale
    *rows, rest = x.tensor_split(ends.tolist())
    parts = [
        experts.linear(own_rows, codes[i], scales[i], activation_scale=None if fixed is None else fixed[i])
        for i, own_rows in enumerate(rows)
        if len(own_rows)
    ]
    return torch.cat([*parts, x.new_zeros(len(rest), codes.shape[1])])
