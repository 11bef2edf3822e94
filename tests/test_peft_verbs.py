"""PEFT's verbs around an adapter: status, model card, dropout, casts of the input; ours, and PEFT's on our layers."""

import dataclasses
import json

import peft
import pytest
import tiny_models
import torch
from peft import peft_model
from peft.helpers import disable_input_dtype_casting
from tiny_models import IDS
from versions import PEFT

import c3a_triton
from c3a_triton import C3AConfig, ConfigError

NAME = "someone/base"


def config(**changes):
    return C3AConfig(**({"block_size": 8, "target_modules": ["q_proj", "o_proj"]} | changes))


def adapted(*, tied=False, **changes):
    return c3a_triton.apply(tiny_models.llama(tied=tied).eval(), config(**changes))


def of_peft():
    model = tiny_models.llama().eval()
    return peft.get_peft_model(model, peft.C3AConfig(block_size=24, target_modules=["q_proj", "o_proj"]))


# Status

YOUNGER = set() if PEFT >= (0, 20) else {"quantization_backend"}  # fields that an older PEFT lacks


def fields_of(status):
    return {name: value for name, value in dataclasses.asdict(status).items() if name not in YOUNGER}


def test_a_status_has_peft_s_fields():
    layers, model = adapted().c3a.get_layer_status(), adapted().c3a.get_model_status()
    for ours, theirs in ((layers[0], peft_model.TunerLayerStatus), (model, peft_model.TunerModelStatus)):
        assert list(fields_of(ours)) == [item.name for item in dataclasses.fields(theirs)]


def test_layers_say_how_they_are():
    model = adapted(tied=True, trainable_token_indices=[3])
    model.c3a.add_adapter("other", config(target_modules=["q_proj"], modules_to_save=["norm"]))
    status = {layer.name: layer for layer in model.c3a.get_layer_status()}
    q_proj, o_proj = (status[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "o_proj"))
    tokens, norm = status["model.embed_tokens.token_adapter"], status["model.norm"]
    assert len(status) == 2 * 2 + 1 + 5
    assert q_proj.available_adapters == ["default", "other"]
    assert o_proj.available_adapters == tokens.available_adapters == ["default"]
    assert norm.available_adapters == ["other"]
    assert (q_proj.module_type, tokens.module_type, norm.module_type) == ("C3ALinear", "TokenRows", "ModulesToSave")
    assert q_proj.requires_grad == {"default": True, "other": False}
    assert tokens.requires_grad == {"default": True}
    assert all(layer.active_adapters == ["default"] for layer in status.values())
    assert all(layer.enabled and not layer.merged_adapters for layer in status.values())
    assert q_proj.devices == {"default": ["cpu"], "other": ["cpu"]}
    with model.c3a.disable_adapter():
        assert not any(layer.enabled for layer in model.c3a.get_layer_status())
        assert model.c3a.get_model_status().enabled is False


def test_a_model_says_how_it_is():
    model = adapted(tied=True, trainable_token_indices=[3])
    status = model.c3a.get_model_status()
    assert (status.base_model_type, status.peft_types) == ("LlamaForCausalLM", {"default": "C3A"})
    assert (status.trainable_params, status.total_params) == model.c3a.get_nb_trainable_parameters()
    assert (status.num_adapter_layers, status.enabled, status.active_adapters) == (5, True, ["default"])
    assert (status.merged_adapters, status.requires_grad) == ([], {"default": True})
    model.c3a.merge_adapter()
    assert model.c3a.get_model_status().merged_adapters == ["default"]
    model.model.layers[0].self_attn.q_proj.unmerge()
    assert model.c3a.get_model_status().merged_adapters == "irregular"
    model.c3a.unmerge_adapter()
    model.model.layers[0].self_attn.q_proj.c3a_kernel["default"].requires_grad_(False)
    assert model.c3a.get_model_status().requires_grad == {"default": "irregular"}
    model.model.layers[0].self_attn.q_proj.enable_adapters(False)
    model.model.layers[1].self_attn.q_proj.set_adapter([])
    status = model.c3a.get_model_status()
    assert (status.enabled, status.active_adapters) == ("irregular", "irregular")


def test_a_model_without_adapters_says_so():
    status = c3a_triton.AdapterManager(tiny_models.llama()).get_model_status()
    assert (status.num_adapter_layers, status.enabled, status.quantization_backend) == (0, False, None)
    assert not [*status.active_adapters, *status.merged_adapters, *status.available_adapters]


def test_the_status_is_peft_s_own():
    """What PEFT says of the same adapter, but for the names that it puts before those of the model."""
    theirs, ours = of_peft(), adapted(block_size=24, target_modules=["q_proj", "o_proj"])
    for layer, other in zip(peft.get_layer_status(theirs), ours.c3a.get_layer_status(), strict=True):
        said = dataclasses.asdict(layer) | {"name": layer.name.removeprefix("model."), "module_type": "C3ALinear"}
        assert said == fields_of(other)
    whole, other = peft.get_model_status(theirs), ours.c3a.get_model_status()
    assert dataclasses.asdict(whole) | {"adapter_model_type": "AdapterManager"} == fields_of(other)


def test_peft_s_status_of_a_peft_model_with_our_layers():
    plain, model = of_peft(), c3a_triton.apply(of_peft())
    before, after = peft.get_model_status(plain), peft.get_model_status(model)
    assert dataclasses.replace(after, adapter_model_type=before.adapter_model_type) == before
    for one, other in zip(peft.get_layer_status(plain), peft.get_layer_status(model), strict=True):
        assert dataclasses.replace(other, module_type=one.module_type) == one
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    with model.disable_adapter():
        assert not any(layer.enabled for layer in model.get_layer_status())


# Model card


def named(model):
    model.name_or_path = model.config.name_or_path = NAME
    return model


def test_a_card_is_written_as_peft_writes_it(tmp_path):
    model = c3a_triton.apply(named(tiny_models.llama()), config(task_type="CAUSAL_LM"))
    model.c3a.save_pretrained(tmp_path / "ours")
    theirs = peft.C3AConfig(block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(named(tiny_models.llama()), theirs).save_pretrained(tmp_path / "theirs")
    from huggingface_hub import ModelCard

    ours, others = (ModelCard.load(tmp_path / name / "README.md") for name in ("ours", "theirs"))
    for field in ("library_name", "base_model", "pipeline_tag"):
        assert ours.data[field] == others.data[field], field
    assert {*others.data["tags"]} | {"c3a", "c3a_triton"} == {*ours.data["tags"]}
    assert f"- c3a_triton {c3a_triton.__version__}" in ours.text


def test_a_card_that_is_there_is_brought_up_to_date(tmp_path):
    model = c3a_triton.apply(named(tiny_models.llama()), config())
    card = tmp_path / "README.md"
    card.write_text(
        "---\nlicense: mit\ntags:\n- mine\npipeline_tag: translation\n---\n# My adapter\n\nHow it was trained.\n\n"
        "### Framework versions\n\n- PyTorch 2.0\n"
    )
    model.c3a.save_pretrained(tmp_path)
    text = card.read_text()
    for part in ("license: mit", "- mine", "pipeline_tag: translation", "# My adapter", "How it was trained."):
        assert part in text
    assert "library_name: peft" in text
    assert f"### Framework versions\n\n- c3a_triton {c3a_triton.__version__}\n- PyTorch 2.0" in text
    stamp = card.stat().st_mtime_ns
    model.c3a.save_pretrained(tmp_path)
    assert card.read_text() == text
    assert card.stat().st_mtime_ns == stamp


def test_lines_of_a_card_end_as_they_did(tmp_path):
    model, card = adapted(), tmp_path / "README.md"
    card.write_bytes(b"---\r\nlicense: mit\r\n---\r\n# Mine\r\ntext\r\n")
    model.c3a.create_or_update_model_card(tmp_path)
    written = card.read_bytes()
    assert written.count(b"\n") == written.count(b"\r\n")
    model.c3a.create_or_update_model_card(tmp_path)
    assert card.read_bytes() == written


@pytest.mark.parametrize("head", ["- a list: [", "tags:\n- 1\n- x", "tags:\n- [x]"])
def test_a_card_that_is_none_is_left(tmp_path, head):
    card = tmp_path / "README.md"
    card.write_text(text := f"---\n{head}\n---\ntext\n")
    with pytest.warns(UserWarning, match=r"README\.md is no model card and is left as it is"):
        adapted().c3a.save_pretrained(tmp_path)
    assert card.read_text() == text
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_folder_of_this_machine_is_no_base_model_for_others(tmp_path):
    model = adapted(base_model_name_or_path=str(tmp_path), trainable_token_indices=[3])
    model.c3a.create_or_update_model_card(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "library_name: c3a_triton" in text  # tokens are beyond PEFT's C3A


def test_a_card_needs_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    adapted().c3a.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "C3A"


# Dropout


@pytest.mark.parametrize("name", ["lora_dropout", "dropout", "c3a_dropout", "module_dropout"])
def test_dropout_is_no_part_of_c3a(name):
    values = {"block_size": 8, "target_modules": ["q_proj"], name: 0.1}
    with pytest.raises(
        ConfigError, match=rf"{name}=0\.1: dropout on an adapter's input is no part of C3A.*Leave {name} out"
    ):
        C3AConfig.from_dict(values)
    model = tiny_models.llama()
    with pytest.raises(ConfigError, match="dropout"):
        c3a_triton.apply(model, values)
    assert not hasattr(model, "c3a")
    with pytest.warns(UserWarning, match=f"does not know these fields and ignores them: {name}"):
        C3AConfig.from_dict(values | {name: 0.0})


# Casts of the input


def test_no_input_is_cast_whatever_peft_is_told():
    model = c3a_triton.apply(of_peft().to(torch.bfloat16))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.no_grad():
        expected = model(IDS).logits
        with disable_input_dtype_casting(model):
            assert model(IDS).logits.equal(expected)
        assert model(IDS).logits.equal(expected)
    assert set(seen) == {torch.bfloat16}


def test_a_model_adapted_in_place_casts_none_either():
    """Weights in another dtype than x, cast by hooks as diffusers' layerwise casting does it, meet x as it is."""
    base = torch.nn.Linear(16, 16, dtype=torch.float16)
    layer = c3a_triton.C3ALinear(base, block_size=8)
    base.register_forward_pre_hook(lambda module, args: module.to(torch.bfloat16) and None)
    base.register_forward_hook(lambda module, args, y: module.to(torch.float16) and None)
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    with torch.no_grad(), disable_input_dtype_casting(layer):
        y = layer(x)
        expected = torch.nn.functional.linear(x, base.weight.bfloat16(), base.bias.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), (expected + x @ layer.get_delta_weight("default").bfloat16().T).float(), atol=0.05, rtol=0.02
    )
