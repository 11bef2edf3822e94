"""Adapters that transformers 4 has of each expert alone, in models that hold all experts of a layer in one tensor."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers.integrations.moe", reason="transformers 4: experts are layers")

import transformers
from transformers.core_model_loading import revert_weight_conversion

import c3a_triton
from c3a_triton.adapters.stacking import stacked_file
from c3a_triton.bases.model_names import Place, expert_places
from c3a_triton.errors import CheckpointError
from c3a_triton.files.checkpoint import AdapterFile
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.patterns import block_size_rule

SIZES = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
ROUTED = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
CONFIGS = {
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **ROUTED, num_experts=3, head_dim=12),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=3),
    "deepseek_v3": transformers.DeepseekV3Config(**SIZES, **ROUTED, **LATENT, **GROUPS),
    "nemotron_h": transformers.NemotronHConfig(
        **SIZES | {"num_hidden_layers": None}, **ROUTED, n_routed_experts=3, layers_block_type=["moe", "attention"]
    ),
}
PROJECTION = {"gate_proj": 8, "up_proj": 8, "down_proj": 4, "w1": 8, "w3": 8, "w2": 4}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def as_in_transformers_4(model: Any) -> dict[str, torch.Tensor]:
    """The weights of single experts, under the names and with the shapes that they have in transformers 4."""
    tensors = revert_weight_conversion(model, model.state_dict())
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if ".experts." in name and name.rsplit(".", 2)[1] in PROJECTION
    }


def file_for(weights: dict[str, torch.Tensor], **fields: Any) -> AdapterFile:
    """An adapter of these layers with random kernels."""
    sizes = {name: PROJECTION[name.rpartition(".")[2]] for name in weights}
    tensors = {
        f"{name}.c3a_kernel": torch.randn(weight.shape[0] // sizes[name], weight.shape[1] // sizes[name], sizes[name])
        for name, weight in weights.items()
    }
    fields = {"block_size": 8, "block_size_pattern": {"down_proj|w2": 4}, "target_modules": list(PROJECTION)} | fields
    return AdapterFile(C3AConfig(**fields), tensors, sizes, Path("adapter"))


def stacked_by_transformers(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of single experts' tensors when it loads a checkpoint that has these."""
    model.save_pretrained(folder, state_dict=model.state_dict() | {})
    tensors = {name: tensor for name, tensor in safetensors_of(folder).items() if tensor.dtype == torch.float32}
    write_safetensors(folder, tensors | {f"{name}.weight": weight for name, weight in weights.items()})
    return dict(type(model).from_pretrained(folder).named_parameters())


def safetensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def write_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("left_out", [(), ("0.gate_proj", "0.w1", "1.up_proj", "2.down_proj")], ids=["all", "some"])
def test_each_expert_s_update_is_where_transformers_puts_its_weight(tmp_path, name, left_out):
    model = build(name)
    weights = as_in_transformers_4(model)
    adapted = {layer: weight for layer, weight in weights.items() if not layer.endswith(left_out)} if left_out else weights
    file = file_for(adapted)
    stacked = stacked_file(model, file, expert_places(model))
    updates = {layer: torch.zeros_like(weight) for layer, weight in weights.items()}
    updates |= {layer: c3a_triton.circulant_matrix(file.tensors[f"{layer}.c3a_kernel"]) for layer in adapted}
    expected = stacked_by_transformers(model, updates, tmp_path)
    parameters = {parameter for parameter in expected if parameter.rpartition(".")[0].endswith("experts")}
    assert stacked.block_sizes == {parameter: 4 if "down" in parameter else 8 for parameter in parameters}
    assert stacked.tensors.keys() == {f"{parameter}.c3a_kernel" for parameter in parameters}
    for parameter in parameters:
        found = torch.stack([c3a_triton.circulant_matrix(w) for w in stacked.tensors[f"{parameter}.c3a_kernel"]])
        assert torch.equal(found, expected[parameter])
        assert found.any()
    assert stacked.config.target_modules == []
    assert set(stacked.config.target_parameters) == parameters
    size_of = block_size_rule(stacked.config)
    assert {parameter: size_of(parameter)[0] for parameter in parameters} == stacked.block_sizes
