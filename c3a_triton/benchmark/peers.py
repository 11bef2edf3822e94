"""The layers that are measured side by side: ours, PEFT's C3A and LoRA, a dense ΔW, the frozen base alone.

Each is built over the same frozen `nn.Linear`. PEFT is optional: `why_no_peft` says why its rows are missing.
"""

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.operator import reference

from .cases import LORA_RANK, LayerCase

__all__ = [
    "DenseDelta",
    "build",
    "frozen_base",
    "is_c3a",
    "kernel_values",
    "methods",
    "peft_c3a",
    "peft_lora",
    "trained",
    "why_no_peft",
]


def why_no_peft() -> str | None:
    """None where PEFT (with C3A) can be imported, otherwise the reason for which its rows are missing."""
    try:
        importlib.import_module("peft.tuners.c3a")
    # Whatever an installed but broken PEFT raises is the reason, and it is printed with the results.
    except Exception as error:
        return f"PEFT is not measured: {type(error).__name__}: {error}"
    return None


def frozen_base(case: LayerCase, device: torch.device) -> nn.Linear:
    """The base layer of `case`, without bias and without gradients."""
    base = nn.Linear(case.in_features, case.out_features, bias=False, device=device, dtype=getattr(torch, case.dtype))
    return base.requires_grad_(False)


def kernel_values(case: LayerCase, device: torch.device) -> Tensor:
    """Random values for `case`'s trainable tensor, such that ΔW is about as large as the base weight.

    Then a layer that computed its adapter wrongly, or not at all, could not pass the gate.
    """
    w = torch.randn(case.out_features // case.b, case.in_features // case.b, case.b, device=device)
    return w * math.sqrt(case.in_features / 3)


def _adapted_by_peft(base: nn.Linear, config: object) -> Any:
    peft = importlib.import_module("peft")
    return peft.get_peft_model(nn.ModuleDict({"proj": base}), config).base_model.model["proj"]


def peft_c3a(base: nn.Linear, b: int) -> Any:
    """PEFT's C3A layer over `base`."""
    peft = importlib.import_module("peft")
    return _adapted_by_peft(base, peft.C3AConfig(block_size=b, target_modules=["proj"]))


def peft_lora(base: nn.Linear, rank: int = LORA_RANK) -> Any:
    """PEFT's LoRA layer over `base` in its default form: adapter weights in float32 also over a 16-bit base."""
    peft = importlib.import_module("peft")
    layer = _adapted_by_peft(base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["proj"]))
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)  # zeros multiply faster than numbers do
    return layer


class DenseDelta(nn.Module):
    """The base layer and a dense trainable ΔW of its dtype: what cuBLAS makes of the adapter's definition.

    Its gradient is that of the dense matrix, not of a circulant.
    """

    def __init__(self, base: nn.Linear, delta_weight: Tensor) -> None:
        super().__init__()
        self.base_layer = base
        self.delta_weight = nn.Parameter(delta_weight)

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus x ΔWᵀ."""
        return self.base_layer(x) + nn.functional.linear(x, self.delta_weight)


def methods(backends: tuple[str, ...], *, with_peft: bool) -> tuple[str, ...]:
    """Names for `build`, the cheapest peers first."""
    peers = ("peft_lora", "peft_c3a") if with_peft else ()
    return ("base", *peers, "dense", *(f"ours:{backend}" for backend in backends))


def is_c3a(method: str) -> bool:
    """Whether `method` depends on the block size."""
    return method == "peft_c3a" or method.startswith("ours:")


def build(method: str, base: nn.Linear, case: LayerCase, w: Tensor) -> Any:
    """The layer named `method` over `base`, its circulant filled with `w`.

    Beside the names of `methods`, "peft_lora32", say, is PEFT's LoRA of rank 32.
    """
    if method == "base":
        return base
    if method.startswith("peft_lora"):
        return peft_lora(base, int(method.removeprefix("peft_lora") or LORA_RANK))
    if method == "dense":
        return DenseDelta(base, reference.circulant_matrix(w, 1.0 / case.in_features, base.weight.dtype))
    if method == "peft_c3a":
        layer = peft_c3a(base, case.b)
    else:
        layer = C3ALinear(base, block_size=case.b)
        layer.backend = method.removeprefix("ours:")
    with torch.no_grad():
        next(p for p in layer.parameters() if p.requires_grad).copy_(w)
    return layer


def trained(layer: nn.Module) -> tuple[Tensor, ...]:
    """The adapter's parameters."""
    return tuple(parameter for parameter in layer.parameters() if parameter.requires_grad)
