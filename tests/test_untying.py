"""Tied tensors that differ once they are merged: saved and loaded again they are what they were in memory."""

import copy
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import tiny_models
import transformers as tf
from torch import nn

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig
from c3a_triton.adapters import untying
from c3a_triton.adapters.samples import output_of, sample_inputs
from c3a_triton.commands.folder_merge import merge_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(
        not hasattr(tf.PreTrainedModel, "get_expanded_tied_weights_keys"), reason="as transformers 5 ties"
    ),
]

SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
# class of models → (class of configurations, its values, layers to adapt)
MODELS = {
    "BartForConditionalGeneration": ("BartConfig", SEQ2SEQ, ["q_proj"]),
    "MBartForConditionalGeneration": ("MBartConfig", SEQ2SEQ, ["q_proj"]),
    "M2M100ForConditionalGeneration": ("M2M100Config", SEQ2SEQ, ["q_proj"]),
    "PegasusForConditionalGeneration": ("PegasusConfig", SEQ2SEQ, ["q_proj"]),
    "T5ForConditionalGeneration": ("T5Config", T5, ["q"]),
    "UMT5ForConditionalGeneration": ("UMT5Config", T5, ["q"]),
    "MT5ForConditionalGeneration": ("MT5Config", T5, ["q"]),
    "LongT5ForConditionalGeneration": ("LongT5Config", T5, ["q"]),
    "SwitchTransformersForConditionalGeneration": ("SwitchTransformersConfig", T5 | {"num_experts": 2}, ["q"]),
    "BertForMaskedLM": ("BertConfig", BERT, ["query"]),
}
# In which model tie_word_embeddings has to stay true, because it is more than that.
KEPT = {"T5", "UMT5", "MT5", "LongT5", "SwitchTransformers"}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, values, _ = MODELS[name]
    return getattr(tf, name)(getattr(tf, config)(**copy.deepcopy(values))).eval()


def adapted(model: nn.Module, targets: list[str], saved: list[str]) -> nn.Module:
    """With an adapter of random values."""
    model = c3a_triton.apply(model, C3AConfig(block_size=16, target_modules=targets, modules_to_save=saved))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def output(model: nn.Module) -> torch.Tensor:
    return output_of(model, sample_inputs(model)[0])


CASES = [(name, ["lm_head"]) for name in MODELS if name != "BertForMaskedLM"]
CASES += [
    ("BartForConditionalGeneration", ["shared"]),
    ("BartForConditionalGeneration", ["encoder.embed_tokens"]),
    ("MBartForConditionalGeneration", ["embed_tokens"]),
    ("T5ForConditionalGeneration", ["shared"]),
    ("UMT5ForConditionalGeneration", ["embed_tokens"]),
    ("UMT5ForConditionalGeneration", ["encoder.embed_tokens", "lm_head"]),
    ("BertForMaskedLM", ["cls"]),
    ("BertForMaskedLM", ["word_embeddings"]),
]


@pytest.mark.parametrize(
    ("name", "saved"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_saved_and_loaded_it_computes_the_same(tmp_path: Path, name: str, saved: list[str]) -> None:
    model = built(name)
    model.save_pretrained(tmp_path / "base")
    model = adapted(model, MODELS[name][2], saved)
    expected = output(model)
    model.c3a.save_pretrained(tmp_path / "adapter")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "folder")
    merged = model.c3a.merge_and_unload()
    assert torch.allclose(output(merged), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    merged.save_pretrained(tmp_path / "memory")
    in_memory = output(merged)
    for folder in ("memory", "folder"):
        loaded, info = type(merged).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"], folder
        torch.testing.assert_close(output(loaded.eval()), in_memory)
        for key, tensor in merged.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), (folder, key)
    kept = name.removesuffix("ForConditionalGeneration") in KEPT
    assert merged.config.tie_word_embeddings == kept
    assert json.loads((tmp_path / "folder" / "config.json").read_text()).get("tie_word_embeddings", True) == kept


def test_a_folder_that_says_nothing_of_its_flags(tmp_path: Path) -> None:
    """As the hub's t5-small: transformers 5 reads from a missing flag that the output is scaled."""
    for name in ("T5ForConditionalGeneration", "UMT5ForConditionalGeneration"):
        built(name).save_pretrained(tmp_path / name)
        path = tmp_path / name / "config.json"
        values = json.loads(path.read_text())
        for key in ("scale_decoder_outputs", "tie_word_embeddings"):
            values.pop(key, None)
        path.write_text(json.dumps(values))
        model = adapted(type(built(name)).from_pretrained(tmp_path / name).eval(), ["q"], ["lm_head"])
        expected = output(model)
        model.c3a.save_pretrained(tmp_path / "adapter")
        merge_folder(tmp_path / name, tmp_path / "adapter", tmp_path / f"{name} merged")
        loaded = type(model).from_pretrained(tmp_path / f"{name} merged").eval()
        torch.testing.assert_close(output(loaded), expected)


def test_a_second_adapter_on_what_was_untied(tmp_path: Path) -> None:
    """A folder whose flag stays true though its tensors differ is a base as any other."""
    name = "UMT5ForConditionalGeneration"
    model = adapted(built(name), ["q"], ["lm_head"])
    model.c3a.merge_and_unload().save_pretrained(tmp_path / "base")
    for saved in (["lm_head"], ["shared"]):
        model = adapted(type(model).from_pretrained(tmp_path / "base"), ["q"], saved)
        model.c3a.save_pretrained(tmp_path / "adapter")
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", force=True)
        merged = model.c3a.merge_and_unload()
        merged.save_pretrained(tmp_path / "memory")
        for folder in ("merged", "memory"):
            loaded = type(merged).from_pretrained(tmp_path / folder).eval()
            assert torch.equal(output(loaded), output(merged)), (saved, folder)


def test_blocks_that_the_flag_ties_stay_tied() -> None:
    """Zamba2 ties whole blocks by the flag: untying its head must not save each of them several times."""
    config = tf.Zamba2Config(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_ngroups=1,
        n_mamba_heads=8,
        mamba_headdim=16,
        intermediate_size=64,
        num_attention_heads=4,
        num_mem_blocks=1,
        adapter_rank=8,
        hybrid_layer_ids=[1, 3],
    )
    with torch.device("meta"):
        model = tf.Zamba2ForCausalLM(config)
    before = {name: id(tensor) for name, tensor in untying.tensors_by_name(model)}
    found = untying.plan_untying(model, before, before | {"lm_head.weight": 0}, untying.homes_of(model))
    assert found == untying.Untying((), ())


def test_the_flag_in_a_part_of_the_configuration(tmp_path: Path) -> None:
    text = dict(tiny_models.llama().config.to_dict(), tie_word_embeddings=True)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=31, tie_word_embeddings=True)
    model = tf.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    model = c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    model.c3a.save_pretrained(tmp_path / "adapter")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = model.c3a.merge_and_unload()
    values = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert [values["tie_word_embeddings"], values["text_config"]["tie_word_embeddings"]] == [False, False]
    assert [merged.config.tie_word_embeddings, merged.config.text_config.tie_word_embeddings] == [False, False]
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded.lm_head.weight, merged.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


def test_a_model_within_another(tmp_path: Path) -> None:
    model = nn.ModuleDict({"text": built("BartForConditionalGeneration"), "head": nn.Linear(32, 32)})
    model = adapted(model, ["q_proj", "head"], ["lm_head"])
    expected = output(model["text"])
    text = model.c3a.merge_and_unload()["text"]
    torch.testing.assert_close(output(text), expected)
    text.save_pretrained(tmp_path / "text")
    loaded, info = type(text).from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(output(loaded), output(text))


def test_a_module_that_is_used_under_two_names() -> None:
    """Transformers 4 and models of one's own have such: only one use is trained, and a saved model has but one."""
    model = built("BartForConditionalGeneration")
    model.model.encoder.embed_tokens = model.model.decoder.embed_tokens = model.model.shared
    model = adapted(model, ["q_proj"], ["model.shared"])
    expected = output(model)
    with pytest.raises(AdapterStateError, match=r"belong to one module.*Keep the adapter unmerged"):
        model.c3a.merge_and_unload()
    assert torch.equal(output(model), expected)


def test_a_model_that_computes_by_the_flag_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its code can be read or not: a forward before and after shows it."""
    monkeypatch.setattr(untying, "_reads_flag", lambda model: False)
    model = adapted(built("SwitchTransformersForConditionalGeneration"), ["q"], ["lm_head"])
    expected = output(model)
    with pytest.warns(UserWarning, match="tie_word_embeddings stays true"):
        merged = model.c3a.merge_and_unload()
    assert merged.config.tie_word_embeddings is True
    torch.testing.assert_close(output(merged), expected)


def test_transformers_4_cannot_save_such_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ties by the flag, whatever is saved: refused before anything is changed."""
    model = adapted(built("UMT5ForConditionalGeneration"), ["q"], ["lm_head"])
    bart = adapted(built("BartForConditionalGeneration"), ["q_proj"], ["lm_head"])
    monkeypatch.delattr(tf.PreTrainedModel, "get_expanded_tied_weights_keys")
    expected = output(model)
    with pytest.raises(AdapterStateError, match=r"merge with transformers 5, or keep the adapter unmerged"):
        model.c3a.merge_and_unload()
    assert torch.equal(output(model), expected)
    assert bart.c3a.merge_and_unload().config.tie_word_embeddings is False
    weights = [bart.model.shared.weight, bart.model.encoder.embed_tokens.weight, bart.lm_head.weight]
    assert len({weight.data_ptr() for weight in weights}) == 3
