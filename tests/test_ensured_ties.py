"""`ensure_weight_tying`: input embeddings that are trained whole, and the output layer that has the same weight."""

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import IDS

import c3a_triton
from c3a_triton import C3AConfig, CheckpointError, ConfigError
from c3a_triton.commands.folder_merge import merge_folder


def config(**changes):
    plain = {"block_size": 8, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    return C3AConfig(**(plain | {"ensure_weight_tying": True} | changes))


def adapted(*, tied=True, **changes):
    return c3a_triton.apply(tiny_models.llama(tied=tied).eval(), config(**changes))


def copies(model, adapter="default"):
    return [module.modules_to_save[adapter].weight for module in (model.model.embed_tokens, model.lm_head)]


@torch.no_grad()
def train(model):
    copies(model)[0].add_(torch.randn(32, 24, generator=torch.Generator().manual_seed(0)) * 0.1)
    return logits(model)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("entry", ["embed_tokens", "lm_head"])
def test_copies_of_tied_modules_are_one_tensor(entry):
    model = adapted(modules_to_save=[entry])
    embedding, head = copies(model)
    assert embedding is head
    assert embedding.requires_grad
    n_kernels = 2 * 24 * 24 // 8
    assert model.c3a.get_nb_trainable_parameters()[0] == n_kernels + 32 * 24
    apart = c3a_triton.apply(tiny_models.llama(tied=True).eval(), config(ensure_weight_tying=False))
    assert not hasattr(apart.lm_head, "modules_to_save")


def test_they_are_so_again_from_a_file(tmp_path):
    model = adapted()
    expected = train(model)
    model.c3a.save_pretrained(tmp_path)
    other = c3a_triton.load_adapter(tiny_models.llama(tied=True), tmp_path)
    assert other.c3a.adapters["default"].ensure_weight_tying
    embedding, head = copies(other)
    assert embedding is head
    assert logits(other).equal(expected)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"ties model\.embed_tokens and lm_head .*different values"):
        c3a_triton.load_adapter(tiny_models.llama(tied=True), tmp_path)


def test_merged_for_good_the_model_is_tied(tmp_path):
    tiny_models.llama(tied=True).save_pretrained(tmp_path / "model")
    model = adapted()
    expected = train(model)
    model.c3a.save_pretrained(tmp_path / "adapter")
    merge_folder(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    plain = model.c3a.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings
    torch.testing.assert_close(logits(plain), expected)
    merged = type(plain).from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings
    assert logits(merged).equal(logits(plain))


def test_a_trainer_resumes_from_it(tmp_path):
    model = adapted()
    expected = train(model)
    with pytest.warns(UserWarning, match="under names that from_pretrained does not know"):
        model.save_pretrained(tmp_path)
    other = adapted()
    stored = load_file(tmp_path / "model.safetensors")
    missing = other.load_state_dict({k: v for k, v in stored.items() if v.numel()}, strict=False).missing_keys
    assert not [name for name in missing if "embed_tokens" in name]
    assert logits(other).equal(expected)


def test_where_it_has_no_effect_it_says_so():
    with pytest.warns(UserWarning, match="no effect: nothing is tied to this LlamaForCausalLM's input embeddings"):
        model = adapted(tied=False)
    assert not hasattr(model.lm_head, "modules_to_save")
    with pytest.warns(UserWarning, match=r"no effect: none of model\.embed_tokens, lm_head is in modules_to_save"):
        adapted(modules_to_save=None)


def test_adapters_of_tied_layers_cannot_be_one():
    model = tiny_models.llama(tied=True)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=r"model\.embed_tokens is adapted .*cannot be one.*trainable_token_indices"):
        c3a_triton.apply(model, config(target_modules=["q_proj", "embed_tokens"], modules_to_save=None))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(ConfigError, match="ensure_weight_tying must be True or False"):
        C3AConfig(ensure_weight_tying=value)
