"""Merging into a folder: bit for bit what `merge_and_unload` gives, whole or not at all, in little memory."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import tiny_models
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig, CheckpointError, ConfigError
from c3a_triton.commands import folder_merge
from c3a_triton.commands.folder_merge import merge_folder
from c3a_triton.commands.model_folder import INDEX_NAME, SINGLE_NAME

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

QV = ["q_proj", "v_proj"]
needs_stacks = pytest.mark.skipif(
    importlib.util.find_spec("transformers.integrations.moe") is None, reason="transformers 4: experts are layers"
)
TRANSFORMERS_5 = hasattr(transformers.PreTrainedModel, "get_expanded_tied_weights_keys")


def adapter_of(model, path: Path, **config) -> Path:
    """Save an adapter of random values for a copy of the model."""
    model = c3a_triton.apply(model, C3AConfig(**({"block_size": 4, "target_modules": QV} | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.c3a.save_pretrained(path)
    return path


def state(model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def load(folder: Path, cls, **options):
    """In the dtype of its files, which is transformers 5's default."""
    return cls.from_pretrained(folder, dtype="auto", **options)


def merged_in_memory(folder: Path, adapter: Path, cls):
    return c3a_triton.load_adapter(load(folder, cls), adapter).c3a.merge_and_unload()


def check(tmp_path: Path, folder: Path, adapter: Path, cls=transformers.AutoModelForCausalLM, **options):
    """Merge both ways and hold them against each other, and against the base."""
    result = merge_folder(folder, adapter, tmp_path / "merged", **options)
    expected = merged_in_memory(folder, adapter, cls)
    loaded, info = load(tmp_path / "merged", cls, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(state(loaded), state(expected))
    assert any(not torch.equal(state(loaded)[k], v) for k, v in state(load(folder, cls)).items())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return result


@pytest.fixture
def llama_folder(tmp_path):
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "one-file"])
def test_equals_merging_in_memory(tmp_path, dtype, sharded):
    model = tiny_models.llama().to(dtype)
    model.save_pretrained(tmp_path / "model", max_shard_size="8KB" if sharded else "1GB")
    assert (tmp_path / "model" / INDEX_NAME).exists() == sharded
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=[*QV, "down_proj"])
    result = check(tmp_path, tmp_path / "model", adapter)
    assert result.layers == 6
    assert sorted(result.changed) == sorted(
        f"model.layers.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    )


def test_files_keep_their_names_headers_and_neighbours(tmp_path, llama_folder):
    (llama_folder / "tokenizer.json").write_text("{}")
    (llama_folder / "training_args.bin").write_text("pickle")
    (llama_folder / ".hidden").write_text("")
    adapter = adapter_of(transformers.AutoModelForCausalLM.from_pretrained(llama_folder), tmp_path / "adapter")
    merge_folder(llama_folder, adapter, tmp_path / "merged")
    names = {path.name for path in llama_folder.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names - {"training_args.bin", ".hidden"}
    shards = sorted(tmp_path.glob("merged/*.safetensors"))
    assert len(shards) > 3
    for name in ("config.json", INDEX_NAME, "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (llama_folder / name).read_bytes()
    for shard in shards:
        before = (llama_folder / shard.name).read_bytes()
        length = 8 + int.from_bytes(before[:8], "little")
        assert shard.read_bytes()[:length] == before[:length]
        assert shard.stat().st_size == len(before)
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_file_system_without_modes_and_times(tmp_path, llama_folder, monkeypatch):
    """As mounted object stores and network drives: templates in a folder of their own are copied all the same."""

    def forbidden(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    templates = llama_folder / "additional_chat_templates" / "nested"
    templates.mkdir(parents=True)
    (templates / "tools.jinja").write_text("x")
    adapter = adapter_of(transformers.AutoModelForCausalLM.from_pretrained(llama_folder), tmp_path / "adapter")
    for name in ("chmod", "fchmod", "chown", "utime", "setxattr"):
        monkeypatch.setattr(os, name, forbidden, raising=False)
    merge_folder(llama_folder, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "additional_chat_templates" / "nested" / "tools.jinja").read_text() == "x"


def test_transposed_weights_tied_embeddings(tmp_path):
    model = tiny_models.gpt2()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=["c_attn", "mlp.c_proj"])
    check(tmp_path, tmp_path / "model", adapter)


@pytest.mark.parametrize("model_class", ["GPT2LMHeadModel", "GPT2Model"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_the_base_models_prefix_may_be_there_or_not(tmp_path, model_class, prefixed):
    model = tiny_models.gpt2()
    model = model if model_class == "GPT2LMHeadModel" else model.transformer
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / SINGLE_NAME
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    prefix = "transformer." if prefixed else ""
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=["c_attn"])
    check(tmp_path, tmp_path / "model", adapter, getattr(transformers, model_class))


def test_a_model_whose_checkpoint_has_other_names(tmp_path):
    """transformers renames the keys of some models when it loads and saves them: here those of the language model."""
    text = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 4, "patch_size": 2}  # fmt: skip
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text}, vision_config={"model_type": "clip_vision_model", **vision}
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "model")
    adapter = adapter_of(model, tmp_path / "adapter")
    keys, names = load_file(tmp_path / "model" / SINGLE_NAME).keys(), model.c3a.merge_and_unload().state_dict().keys()
    assert not keys >= names, "the case is pointless: this model's keys are its names"
    check(tmp_path, tmp_path / "model", adapter, transformers.LlavaForConditionalGeneration)


@pytest.mark.parametrize("bias", ["all", "c3a_only"])
def test_biases(tmp_path, bias):
    model = tiny_models.bert_classifier()
    model.save_pretrained(tmp_path / "model")
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=["query"], bias=bias, task_type="SEQ_CLS")
    result = check(tmp_path, tmp_path / "model", adapter, transformers.AutoModelForSequenceClassification)
    assert any(key.endswith("bias") and "classifier" not in key for key in result.changed)
    assert "classifier.weight" in result.changed


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="+".join)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "8KB"])
def test_modules_trained_whole(tmp_path, saved, tied, max_shard_size):
    model = tiny_models.llama(tied=tied)
    model.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
    adapter = adapter_of(model, tmp_path / "adapter", modules_to_save=saved)
    result = check(tmp_path, tmp_path / "model", adapter)
    assert result.untied == tied
    assert result.added == (("lm_head.weight",) if tied else ())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_a_tied_head_that_is_adapted_beside_embeddings_that_are_trained_whole(tmp_path):
    model = tiny_models.llama(tied=True)
    model.save_pretrained(tmp_path / "model")
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=["lm_head"], modules_to_save=["embed_tokens"])
    check(tmp_path, tmp_path / "model", adapter)


def test_a_tied_head_takes_the_embeddings_along(tmp_path):
    model = tiny_models.llama(tied=True)
    model.save_pretrained(tmp_path / "model")
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.warns(UserWarning, match="merging changes both"):
        assert check(tmp_path, tmp_path / "model", adapter).changed == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("equal", [True, False])
def test_both_names_of_a_tied_tensor_in_the_file(tmp_path, equal):
    model = tiny_models.llama(tied=True)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / SINGLE_NAME
    tensors = load_file(path)
    other = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors | {"lm_head.weight": other.clone()}, path, metadata={"format": "pt"})
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=["lm_head"])
    if equal or TRANSFORMERS_5:  # which does not tie what differs
        result = check(tmp_path, tmp_path / "model", adapter)
        assert len(result.changed) == (2 if equal else 1)
    else:
        with pytest.raises(CheckpointError, match=r"different values.*tie_word_embeddings"):
            merge_folder(tmp_path / "model", adapter, tmp_path / "merged")


def falcon():
    config = transformers.FalconConfig(vocab_size=32, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    return transformers.FalconForCausalLM(config)


def gemma():
    values = tiny_models.llama().config.to_dict()
    config = transformers.GemmaConfig(**{k: values[k] for k in tiny_models._LLAMA}, head_dim=12)
    return transformers.GemmaForCausalLM(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


KINDS = {
    "padding, a vocabulary of no multiple of b": (tiny_models.bert_classifier, ["word_embeddings"], 12),
    "positions": (tiny_models.gpt2, ["wpe"], 12),
    "tied embeddings": (tiny_models.gpt2, ["wte"], 12),
    "embeddings and the head tied to them": (tiny_models.gpt2, ["wte", "lm_head"], 8),
    "patches": (tiny_models.vit, ["patch_embeddings.projection"], 3),
    "convolutions": (resnet, ["layer.0.convolution"], 8),
    "Conv1D": (tiny_models.gpt2, ["c_attn"], 12),
    "a forward of its own": (falcon, ["query_key_value"], 12),
    "scaled embeddings": (gemma, ["embed_tokens"], 12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind(tmp_path, kind):
    """Merged as in memory."""
    build, targets, b = KINDS[kind]
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "model")
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=targets, block_size=b)
    check(tmp_path, tmp_path / "model", adapter, type(model))


def qwen3_vl_moe():
    text = tiny_models._MOE | {"moe_intermediate_size": 16, "num_experts": 3, "head_dim": 12}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 24}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    config = transformers.Qwen3VLMoeConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen3VLMoeForConditionalGeneration(config).eval()


MIXTURES = {
    "experts apart": lambda: tiny_models.qwen3_moe(num_hidden_layers=2),
    "experts apart, other names": tiny_models.mixtral,
    "beside layers": tiny_models.deepseek_v3,
    "stacked, [in, out], by turns": tiny_models.gpt_oss,
    "stacked, [in, out]": tiny_models.llama4,
}


@needs_stacks
@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stacked_experts(tmp_path, kind, dtype, recwarn):
    model = MIXTURES[kind]().to(dtype)
    model.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    experts = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=["o_proj"], target_parameters="all-experts")
    result = check(tmp_path, tmp_path / "model", adapter)
    assert result.layers == len(experts) + model.config.num_hidden_layers
    n_files = len(experts) if kind.startswith("stacked") else len(experts) // 2 * 3 * 4
    assert len([name for name in result.changed if ".experts." in name]) == n_files
    assert not [warning for warning in recwarn if "cannot be seen" in str(warning.message)]


@needs_stacks
@pytest.mark.parametrize("exchanged", [True, False])
def test_stacks_with_rows_and_columns_exchanged(tmp_path, exchanged):
    """As the hub has Qwen3-VL-MoE; transformers tells by the shape."""
    model = qwen3_vl_moe()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tensors = {
        name: tensor.mT.contiguous() if exchanged and ".experts." in name else tensor
        for name, tensor in load_file(folder / SINGLE_NAME).items()
    }
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=[], target_parameters="all-experts")
    result = check(tmp_path, folder, adapter, type(model))
    assert len(result.changed) == 2


@needs_stacks
def test_a_parameter_that_is_no_expert_s(tmp_path):
    model = tiny_models.qwen3_moe()
    model.save_pretrained(tmp_path / "model")
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=[], target_parameters=["mlp.gate.weight"])
    result = check(tmp_path, tmp_path / "model", adapter)
    assert result.changed == ("model.layers.0.mlp.gate.weight",)


@needs_stacks
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (None, r"no tensor of its own for .*gate_up_proj, and not all .* \(7 of 8 are known\).*merge_and_unload"),
        (torch.zeros(24, 16), r"0\.up_proj\.weight has shape \[24, 16\], the model's configuration says \[16, 24\]"),
        (torch.zeros(16, 24, dtype=torch.int8), r"0\.up_proj\.weight is stored as I8"),
        (torch.full((16, 24), torch.inf), r"gate_up_proj \(.*0\.up_proj\.weight\): merging gives .* not finite"),
    ],
)
def test_refuses_experts_that_do_not_fit(tmp_path, change, match):
    model = tiny_models.qwen3_moe()
    model.save_pretrained(tmp_path / "model")
    adapter_of(model, tmp_path / "adapter", target_modules=[], target_parameters=["experts.gate_up_proj"])
    file = tmp_path / "model" / SINGLE_NAME
    tensors = load_file(file) | {"model.layers.0.mlp.experts.0.up_proj.weight": change}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    refused(tmp_path, (CheckpointError, AdapterStateError), match)


def test_what_is_no_product_with_its_weight_is_refused_as_in_memory(tmp_path, monkeypatch):
    linear = transformers.models.falcon.modeling_falcon.FalconLinear
    monkeypatch.setattr(linear, "forward", lambda self, x: torch.tanh(x @ self.weight.T))
    model = falcon()
    model.save_pretrained(tmp_path / "model")
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=["query_key_value"], block_size=12)
    with pytest.raises(AdapterStateError, match="forward of its own"):
        merged_in_memory(tmp_path / "model", adapter, type(model))
    with pytest.raises(AdapterStateError, match="forward of its own"):
        merge_folder(tmp_path / "model", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_layers_that_are_never_called_are_left_out_as_in_memory(tmp_path):
    pytest.importorskip("transformers", minversion="5", reason="transformers 4 calls Mamba's dt_proj on a CPU")
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=24, state_size=4, num_hidden_layers=1, time_step_rank=4
    )
    model = transformers.MambaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    options = {"target_modules": ["dt_proj", "in_proj"], "block_size": 4, "init_weights": False}
    adapter = adapter_of(model, tmp_path / "adapter", **options)
    with pytest.warns(UserWarning, match="left out of the merge: backbone.layers.0.mixer.dt_proj"):
        merged = merge_folder(tmp_path / "model", adapter, tmp_path / "merged")
    assert merged.changed == ("backbone.layers.0.mixer.in_proj.weight",)
    merged = merge_folder(tmp_path / "model", adapter, tmp_path / "all", merge_uncalled=True)
    assert len(merged.changed) == 2


def test_where_it_cannot_be_seen_which_layers_are_called_it_is_said(tmp_path, monkeypatch):
    llama = transformers.models.llama.modeling_llama.LlamaMLP
    forward = llama.forward
    monkeypatch.setattr(llama, "forward", lambda self, x: forward(self, x) if x.sum() != 0 else x)
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "model")
    adapter = adapter_of(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="cannot be seen whether this LlamaForCausalLM calls all"):
        merge_folder(tmp_path / "model", adapter, tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_folder(tmp_path / "model", adapter, tmp_path / "checked", verify=lambda folder: None)


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    wrapped = peft.get_peft_model(model, peft.C3AConfig(block_size=4, target_modules=QV, init_weights="gaussian"))
    wrapped.save_pretrained(tmp_path / "adapter")
    check(tmp_path, tmp_path / "model", tmp_path / "adapter")


# Refusals: nothing is there afterwards that was not there before


@pytest.fixture
def ready(tmp_path, llama_folder):
    adapter_of(transformers.AutoModelForCausalLM.from_pretrained(llama_folder), tmp_path / "adapter")
    return tmp_path


def refused(where: Path, error, match: str, **options) -> None:
    before = sorted(where.iterdir())
    output = options.pop("output", where / "merged")
    with pytest.raises(error, match=match):
        merge_folder(where / "model", where / "adapter", output, **options)
    assert sorted(where.iterdir()) == before


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_refuses_quantized_models(ready):
    edit_json(ready / "model" / "config.json", quantization_config={"quant_method": "fp8"})
    refused(ready, ConfigError, r"quantized \(fp8\).*original model in 16 or 32 bits")


def test_refuses_pickles(ready):
    for path in ready.glob("model/*safetensors*"):
        path.unlink()
    refused(ready, CheckpointError, "neither model.safetensors nor")
    (ready / "model" / "pytorch_model.bin").write_bytes(b"")
    refused(ready, CheckpointError, "pytorch_model.bin, a pickle.*save_pretrained")


def test_refuses_a_truncated_shard(ready):
    shard = min(ready.glob("model/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    refused(ready, CheckpointError, f"{shard.name}, it may be damaged")


def test_refuses_a_missing_shard(ready):
    min(ready.glob("model/*.safetensors")).unlink()
    refused(ready, CheckpointError, "cannot read")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x"}}'])
def test_refuses_a_broken_index(ready, content):
    (ready / "model" / INDEX_NAME).write_text(content)
    refused(ready, CheckpointError, INDEX_NAME)


def test_refuses_an_index_that_lies(ready):
    path = ready / "model" / INDEX_NAME
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | {"model.norm.weight": weight_map["model.embed_tokens.weight"]})
    refused(ready, CheckpointError, "model.norm.weight is not in")


def test_refuses_a_checkpoint_without_the_weight(ready):
    path = ready / "model" / INDEX_NAME
    weight_map = json.loads(path.read_text())["weight_map"]
    key = "model.layers.1.self_attn.q_proj.weight"
    shard = ready / "model" / weight_map[key]
    save_file({k: v for k, v in load_file(shard).items() if k != key} | {"x": torch.zeros(1)}, shard)
    del weight_map[key]
    edit_json(path, weight_map=weight_map)
    refused(ready, CheckpointError, f"no tensor of its own for {key}.*merge_and_unload")


@pytest.mark.parametrize(("tensor", "match"), [
    (torch.zeros(24, 12), r"has shape \[24, 12\].*says \[24, 24\]"),
    (torch.zeros(24, 24, dtype=torch.float8_e4m3fn), "stored as F8_E4M3"),
    (torch.full((24, 24), float("inf")), "not finite"),
])  # fmt: skip
def test_refuses_weights_that_do_not_fit(ready, tensor, match):
    key = "model.layers.1.self_attn.q_proj.weight"
    shard = ready / "model" / json.loads((ready / "model" / INDEX_NAME).read_text())["weight_map"][key]
    save_file(load_file(shard) | {key: tensor}, shard)
    refused(ready, (CheckpointError, AdapterStateError), match)


def test_refuses_an_adapter_for_another_model(ready):
    tiny_models.llama(hidden_size=48).save_pretrained(ready / "model")
    refused(ready, CheckpointError, "does not fit this model")


def test_refuses_outputs_that_would_destroy_something(ready):
    refused(ready, CheckpointError, "which is read", output=ready / "model", force=True)
    refused(ready, CheckpointError, "which is read", output=ready / "adapter" / ".", force=True)
    refused(ready, CheckpointError, "which is read", output=ready, force=True)
    (ready / "file").write_text("")
    refused(ready, CheckpointError, "is a file", output=ready / "file")
    (ready / "precious").mkdir()
    (ready / "precious" / "thesis.txt").write_text("")
    refused(ready, CheckpointError, "not empty", output=ready / "precious")
    refused(ready, CheckpointError, "no model's folder", output=ready / "precious", force=True)
    assert (ready / "precious" / "thesis.txt").exists()


def test_refuses_a_full_disk(ready, monkeypatch):
    monkeypatch.setattr(folder_merge.shutil, "disk_usage", lambda path: os.statvfs_result([0] * 10) and Usage)
    refused(ready, CheckpointError, "1 KiB of free space; the merged weights need")


class Usage:
    free = 1024


def test_force_replaces_a_model(ready):
    output = ready / "merged"
    merge_folder(ready / "model", ready / "adapter", output)
    (output / "stale.json").write_text("{}")
    expected = {path.name for path in output.iterdir()} - {"stale.json"}
    refused(ready, CheckpointError, "--force")
    merge_folder(ready / "model", ready / "adapter", output, force=True)
    assert {path.name for path in output.iterdir()} == expected
    assert {path.name for path in ready.iterdir()} == {"model", "adapter", "merged"}


def test_what_a_kill_between_two_names_has_left_is_not_lost(ready):
    for name in ("merged", ".merged.former"):
        (ready / name).mkdir()
        (ready / name / "config.json").write_text("{}")
    refused(ready, CheckpointError, r"\.merged\.former is what was here before", force=True)


def test_a_failed_replacement_brings_the_former_folder_back(ready, monkeypatch):
    (ready / "merged").mkdir()
    (ready / "merged" / "config.json").write_text("former")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if ".tmp" in Path(source).name:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(folder_merge.os, "rename", fail)
    refused(ready, OSError, "no", force=True)
    assert (ready / "merged" / "config.json").read_text() == "former"


def test_an_empty_folder_is_filled(ready):
    (ready / "merged").mkdir()
    merge_folder(ready / "model", ready / "adapter", ready / "merged")
    assert (ready / "merged" / "config.json").exists()


def test_a_failed_verification_leaves_nothing(ready):
    def fail(folder: Path) -> None:
        assert (folder / "config.json").exists()
        raise CheckpointError("no")

    refused(ready, CheckpointError, "no", verify=fail)


def test_leftovers_of_killed_merges_go_when_they_are_old(ready):
    for name, age in (("old", 7200), ("new", 60)):
        folder = ready / f".merged.{name}.tmp"
        folder.mkdir()
        (folder / "shard").write_text("")
        for path in (folder / "shard", folder):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    merge_folder(ready / "model", ready / "adapter", ready / "merged")
    assert [path.name for path in ready.glob(".*")] == [".merged.new.tmp"]


# In a process of its own


KILLS = 10


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> tuple[Path, int]:
    """Merges in another process: a tiny model, then a large one, whose share of the peak memory is returned (bytes);
    then one of many shards, again and again, killed when it opens the 1st, 4th, 7th, ... file of what it writes."""
    folder = tmp_path_factory.mktemp("elsewhere")
    large = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 6}
    for name, sizes in (("tiny", {}), ("large", large), ("many", {"hidden_size": 512, "num_hidden_layers": 4})):
        torch.manual_seed(0)
        model = tiny_models.llama(**sizes)
        model.save_pretrained(folder / name, max_shard_size="1MB" if name == "many" else "60MB")
        adapter_of(model, folder / f"{name}-adapter", block_size=4 if name == "tiny" else 128)
    script = f"""
    import os, re, signal, sys
    from pathlib import Path
    from c3a_triton.commands.folder_merge import merge_folder
    folder, peaks = Path(sys.argv[1]), []
    def merge(name, output):
        merge_folder(folder / name, folder / (name + "-adapter"), folder / output)
        # Not ru_maxrss: there a process starts with what the one that started it has.
        peaks.append(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]))
    for name, output in (("tiny", "tiny-merged"), ("large", "large-merged"), ("many", "whole")):
        merge(name, output)
    print(peaks[1] - peaks[0], flush=True)
    for i in range({KILLS}):
        child = os.fork()
        if child == 0:
            opened = []
            def kill(event, arguments):
                if event == "open" and f"/.killed{{i}}." in str(arguments[0]):
                    opened.append(arguments)
                    if len(opened) == 3 * i + 1:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(kill)
            merge("many", f"killed{{i}}")
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), f"it opened fewer than {{3 * i + 1}} files"
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder, int(done.stdout) * 1024


def test_memory_is_that_of_one_tensor(elsewhere):
    """A model of 108 MiB in shards of 54 MiB, of which no tensor has more than 4 MiB."""
    folder, added = elsewhere
    sizes = [path.stat().st_size for path in (folder / "large-merged").glob("*.safetensors")]
    assert max(sizes) > 50e6
    assert sum(sizes) > 100e6
    assert added < 48e6, f"{added / 2**20:.0f} MiB"


def test_a_killed_merge_leaves_nothing(elsewhere):
    """However far it was: the output is absent, and the next merge writes what an undisturbed one does."""
    folder, _ = elsewhere

    def content(output: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in output.iterdir()}

    whole = content(folder / "whole")
    assert len(whole) > 10
    assert len(list(folder.glob(".killed*.tmp"))) == KILLS
    assert not list(folder.glob("killed*"))
    merge_folder(folder / "many", folder / "many-adapter", folder / "killed0")
    assert content(folder / "killed0") == whole
