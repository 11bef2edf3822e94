"""FP8 checkpoints of transformers without their Triton kernels: codes, scales, and the same products in torch."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations import finegrained_fp8
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

MOST = 448.0


def tiled(weight: Tensor, block: tuple[int, int] | None, powers_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix as FP8 checkpoints have them, tile by tile."""
    rows, columns = block or weight.shape
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            tile = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale = weight[tile].float().abs().max() / MOST
            scales[i, j] = 2.0 ** scale.log2().ceil() if powers_of_two else scale
            codes[tile] = (weight[tile].float() / scales[i, j]).to(torch.float8_e4m3fn)
    scales = scales.to(torch.float8_e8m0fnu) if powers_of_two else scales
    return codes, scales if block else scales[0, 0]


def weight_of(layer: Any, codes: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """W of an FP8 layer in float64, element by element."""
    codes = layer.weight if codes is None else codes
    scales = layer.weight_scale_inv if scales is None else scales
    rows, columns = layer.block_size or codes.shape[-2:]
    i, j = torch.arange(codes.shape[-2])[:, None] // rows, torch.arange(codes.shape[-1]) // columns
    scales = scales.detach().double().reshape(-1, -(-codes.shape[-1] // columns))
    return codes.detach().double() * scales[i, j]


def exact(
    x: Tensor, codes: Tensor, scales: Tensor, block: Any, dtype: torch.dtype, activation_scale: Any = None
) -> Tensor:
    """The product with the dequantized weight, activations as they are."""
    layer = SimpleNamespace(block_size=block, weight=codes, weight_scale_inv=scales)
    return (x.double() @ weight_of(layer).T).to(dtype)


def grouped(
    x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, tokens_per_expert: Tensor, block_size: Any
) -> Tensor:
    """`exact` for rows that are sorted by expert; rows of no expert stay as they happen to be."""
    assert torch.equal(tokens_per_expert.cumsum(0), offsets)
    y = torch.full((len(x), codes.shape[1]), torch.nan)
    for i, (start, end) in enumerate(zip([0, *offsets.tolist()], offsets.tolist(), strict=False)):
        y[start:end] = exact(x[start:end], codes[i], scales[i], block_size, x.dtype)
    return y


def matmul(
    x: Tensor, codes: Tensor, scales: Tensor, block: Any, dtype: torch.dtype, activation_scale: Tensor | None = None
) -> Tensor:
    """What the kernel of transformers computes: x quantized (to each token's blocks, or by a given scale), times W."""
    width = x.shape[-1] if block is None else block[1]
    groups = nn.functional.pad(x.float(), (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
    most = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10)
    scale = most / MOST if activation_scale is None else activation_scale
    quantized = (groups / scale).clamp(-MOST, MOST).to(torch.float8_e4m3fn).float() * scale
    layer = SimpleNamespace(block_size=block, weight=codes, weight_scale_inv=scales)
    return (quantized.flatten(-2)[..., : x.shape[-1]] @ weight_of(layer).float().T).to(dtype)


def checkpoint(model: Any, path: Path, block: int = 128, of: str = "proj.weight", **quantization: Any) -> Path:
    """As FP8 checkpoints are: codes and `weight_scale_inv` of weights whose name has `of`, the rest in bfloat16."""
    model.bfloat16().save_pretrained(path)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(path / "model.safetensors").items():
        tensors[name] = value
        if of in name:
            tensors[name], tensors[f"{name}_scale_inv"] = tiled(value, (block, block))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [block, block],
        "activation_scheme": "dynamic",
        **quantization,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def install(monkeypatch: Any, matmul: Any = matmul, grouped: Any = None) -> None:
    """Let transformers compute FP8 layers, and experts where `grouped` is given, on CPUs as well."""
    kernels = finegrained_fp8.FineGrainedFP8(matmul=matmul, batched_matmul=None, grouped_matmul=grouped)
    monkeypatch.setattr(finegrained_fp8, "_FINEGRAINED_FP8", kernels)
    # It asks for a GPU, and dequantizes where there is none.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
