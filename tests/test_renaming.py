"""Adapters whose layers have the names of another release of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from safetensors.torch import load_file, save_file
from tiny_models import llama, logits

import c3a_triton
from c3a_triton import C3AConfig, CheckpointError, load_adapter
from c3a_triton.commands.folder_merge import merge_folder
from c3a_triton.files.checkpoint import WEIGHTS_NAME

TEXT = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
NEW, OLD = "model.language_model.", "language_model.model."
CONFIG = C3AConfig(
    block_size=4,
    target_modules=r".*language_model.*\.(q_proj|v_proj)",
    modules_to_save=["lm_head"],
    init_weights="gaussian",
)


def llava() -> Any:
    torch.manual_seed(0)
    text = {"model_type": "llama", **TEXT}
    vision = {"model_type": "clip_vision_model", "patch_size": 4, **VISION}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=31)
    return transformers.LlavaForConditionalGeneration(config).eval()


def trained() -> Any:
    model = c3a_triton.apply(llava(), CONFIG)
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.add_(0.5)
    return model


def as_saved_by_transformers_4(model: Any, folder: Path) -> Path:
    """The adapter with the names that its layers had, in a file as PEFT writes it."""
    model.c3a.save_pretrained(folder)
    file = folder / WEIGHTS_NAME
    tensors = {
        key.replace(NEW, OLD).replace("base_model.model.lm_head", "base_model.model.language_model.lm_head"): value
        for key, value in load_file(file).items()
    }
    assert any(OLD in key for key in tensors)
    assert any("language_model.lm_head" in key for key in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_names_of_transformers_4_are_loaded_swapped_and_saved_anew(tmp_path: Path) -> None:
    model = trained()
    old = as_saved_by_transformers_4(model, tmp_path / "old")
    loaded = load_adapter(llava(), old)
    assert loaded.c3a.state_dict().keys() == model.c3a.state_dict().keys()
    assert torch.equal(logits(loaded), logits(model))
    loaded.c3a.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(load_adapter(llava(), tmp_path / "new")), logits(model))
    # Into a model with another adapter, and in the place of another's values.
    other = c3a_triton.apply(llava(), C3AConfig(block_size=8, target_modules=["fc1"]))
    load_adapter(other, old, "old")
    other.c3a.set_adapter("old")
    torch.testing.assert_close(logits(other), logits(model))
    with torch.no_grad():
        for _, layer in loaded.c3a.layers():
            layer.c3a_kernel["default"].zero_()
    loaded.c3a.hotswap_adapter(old)
    assert torch.equal(logits(loaded), logits(model))


def test_names_of_transformers_4_are_merged_into_a_folder(tmp_path: Path) -> None:
    model = trained()
    old = as_saved_by_transformers_4(model, tmp_path / "old")
    llava().save_pretrained(tmp_path / "base")
    merge_folder(tmp_path / "base", old, tmp_path / "merged")
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)


def test_names_that_mean_nothing_are_refused_as_before(tmp_path: Path) -> None:
    c3a_triton.apply(nn.Sequential(nn.Linear(4, 4)), C3AConfig(block_size=2, target_modules=["0"])).c3a.save_pretrained(
        tmp_path
    )
    for model in (llava(), llama(), nn.Linear(4, 4)):
        with pytest.raises(CheckpointError, match="the model has no 0"):
            load_adapter(model, tmp_path)


class Experts(nn.Module):
    """Mixtral's blocks as transformers 4 builds them: every expert's layers are modules."""

    def __init__(self, names: tuple[str, ...], place: str) -> None:
        super().__init__()
        config = moe().config
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module()])
        block = nn.Module()
        setattr(self.model.layers[0], place, block)
        sizes = {"w2": (48, 24), "down_proj": (48, 24)}
        block.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*sizes.get(name, (24, 48)), bias=False) for name in names})
            for _ in range(config.num_local_experts)
        )


def moe() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


def layers_of_experts(names: tuple[str, ...], place: str, folder: Path) -> Experts:
    """Adapted, and saved."""
    old = c3a_triton.apply(Experts(names, place), C3AConfig(block_size=4, target_modules=list(names)))
    old.c3a.save_pretrained(folder)
    return old


def test_experts_that_were_layers_of_their_own(tmp_path: Path) -> None:
    model = moe()
    if not any(parameter.dim() == 3 for parameter in model.parameters()):
        pytest.skip("transformers 4: experts are layers")
    old = layers_of_experts(("w1", "w2", "w3"), "block_sparse_moe", tmp_path / "old")
    model.save_pretrained(tmp_path / "base")
    load_adapter(model, tmp_path / "old")
    found = {name.rpartition(".")[2]: layer for name, layer in model.c3a.layers()}
    for expert, layers in enumerate(old.model.layers[0].block_sparse_moe.experts):
        w1, w2, w3 = (layers[name].get_delta_weight("default") for name in ("w1", "w2", "w3"))
        assert torch.equal(found["gate_up_proj"].get_delta_weight("default")[expert], torch.cat([w1, w3]))
        assert torch.equal(found["down_proj"].get_delta_weight("default")[expert], w2)
    model.c3a.save_pretrained(tmp_path / "new")
    again = load_adapter(moe(), tmp_path / "new")
    assert torch.equal(logits(again), logits(model))
    with torch.no_grad():
        for _, layer in again.c3a.layers():
            layer.c3a_kernel["default"].zero_()
    again.c3a.hotswap_adapter(tmp_path / "old")
    assert torch.equal(logits(again), logits(model))
    merge_folder(tmp_path / "base", tmp_path / "old", tmp_path / "merged")
    merged = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    in_memory = model.c3a.merge_and_unload().state_dict()
    assert merged.keys() == in_memory.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in in_memory.items())


def test_experts_of_names_that_transformers_does_not_know_are_refused(tmp_path: Path) -> None:
    model = moe()
    if not any(parameter.dim() == 3 for parameter in model.parameters()):
        pytest.skip("transformers 4: experts are layers")
    before = {name: id(module) for name, module in model.named_modules()}
    layers_of_experts(("gate_proj", "up_proj", "down_proj"), "mlp", tmp_path / "old")
    message = r"experts\.\d\.\w+, an expert .* as transformers 4 builds it.*in one tensor .*experts\.\w+.*merge it"
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, tmp_path / "old")
    assert {name: id(module) for name, module in model.named_modules()} == before
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="an expert that is a layer of its own"):
        merge_folder(tmp_path / "base", tmp_path / "old", tmp_path / "merged")
