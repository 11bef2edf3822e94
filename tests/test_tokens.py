"""`trainable_token_indices`: rows of tokens beside an adapter, with PEFT's LoRA as the reference of behaviour."""

import copy
import json
import pickle
import warnings
from types import SimpleNamespace

import accelerate
import peft
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tiny_models import IDS
from torch import nn
from versions import PEFT

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig, CheckpointError, ConfigError
from c3a_triton.commands.folder_merge import merge_folder

TOKENS = [9, 3]
ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"


def config(**changes):
    plain = {"block_size": 8, "target_modules": ["q_proj"], "init_weights": True, "trainable_token_indices": TOKENS}
    return C3AConfig(**(plain | changes))


def adapted(*, tied=True, adapter_name="default", model=None, **changes):
    return c3a_triton.apply(
        tiny_models.llama(tied=tied).eval() if model is None else model, config(**changes), adapter_name
    )


def rows_of(model, adapter="default", module="model.embed_tokens"):
    return model.get_submodule(module).token_adapter.trainable_tokens_delta[adapter]


@torch.no_grad()
def train(model, adapter="default", seed=1, module="model.embed_tokens"):
    """Other rows, and other kernels, as after training."""
    generator = torch.Generator().manual_seed(seed)
    rows = rows_of(model, adapter, module)
    rows += torch.randn(rows.shape, generator=generator) * 0.3
    for _, layer in model.c3a.layers():
        kernel = layer.c3a_kernel[adapter]
        kernel += torch.randn(kernel.shape, generator=generator) * 0.3
    return rows


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


# PEFT's LoRA is the reference


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "tokens", [TOKENS, {"embed_tokens": TOKENS}, {"lm_head": [4]}, {"embed_tokens": [3], "lm_head": [3]}]
)
def test_rows_are_trained_as_peft_trains_them(tied, tokens):
    if PEFT < (0, 19) and "lm_head" in tokens:
        pytest.skip("PEFT 0.17 trains rows of embeddings alone, 0.18 gives a tied head rows of its own")
    ours = adapted(tied=tied, trainable_token_indices=tokens)
    lora = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny_models.llama(tied=tied).eval(), lora)
    mine = {name.removesuffix(".default"): p for name, p in ours.named_parameters() if "token_adapter" in name}
    others = {
        name.removeprefix("base_model.model.").removesuffix(".default"): p
        for name, p in theirs.named_parameters()
        if "trainable_tokens_delta" in name
    }
    assert mine.keys() == others.keys()
    close(logits(ours), logits(tiny_models.llama(tied=tied)))
    for seed, name in enumerate(mine):
        assert mine[name].shape == others[name].shape
        assert mine[name].equal(others[name])
        assert mine[name].requires_grad
        values = torch.randn(mine[name].shape, generator=torch.Generator().manual_seed(seed))
        mine[name].data.copy_(values)
        others[name].data.copy_(values)
    close(logits(ours), logits(theirs))
    ours(IDS, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS).loss.backward()
    for name in mine:
        assert mine[name].grad.abs().sum() > 0
        close(mine[name].grad, others[name].grad)


def test_counts_are_those_of_the_rows_and_the_summary_names_them(capsys):
    model = adapted()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kernels = {f"model.layers.{i}.self_attn.q_proj.c3a_kernel.default" for i in range(2)}
    assert trained == {f"{ROWS}.default", *kernels}
    n_rows, n_kernels = 2 * 24, 2 * 24 * 24 // 8
    assert model.c3a.get_nb_trainable_parameters()[0] == n_rows + n_kernels
    model.c3a.print_trainable_parameters()
    assert f"trainable params: {n_rows + n_kernels:,d} " in capsys.readouterr().out
    line = next(line for line in model.c3a.summary().splitlines() if line.startswith("model.embed_tokens"))
    assert line.split() == ["model.embed_tokens", "default", "2", "tokens", "48", "active"]
    assert f"{n_rows + n_kernels} parameters" in model.c3a.summary()


def test_rows_are_float32_over_a_base_in_bfloat16():
    model = c3a_triton.apply(tiny_models.llama(tied=True).to(torch.bfloat16), config())
    theirs = peft.get_peft_model(
        tiny_models.llama(tied=True).to(torch.bfloat16),
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS),
    )
    assert rows_of(model).dtype == torch.float32
    values = torch.randn(2, 24)
    with torch.no_grad():
        rows_of(model).copy_(values)
        next(p for name, p in theirs.named_parameters() if "tokens_delta" in name).copy_(values)
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), logits(theirs))


def test_an_embedding_that_scales_scales_the_rows():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    def gemma():
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
        return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads)).eval()

    model, base = c3a_triton.apply(gemma(), config()), gemma()
    with torch.no_grad():
        rows_of(model).add_(1)
        base.model.embed_tokens.weight[TOKENS] += 1
    close(logits(model), logits(base))


def test_an_encoder_and_a_decoder_that_are_tied_follow():
    model, base = tiny_models.t5(), tiny_models.t5()
    model = c3a_triton.apply(model, config(target_modules=["q"]))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "token_adapter" in name).add_(1)
        base.shared.weight[TOKENS] += 1
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    close(model(**inputs).logits, base(**inputs).logits)


def test_a_plain_module_names_its_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    with pytest.raises(ConfigError, match=r"does not tell its input embeddings.*name the embedding"):
        c3a_triton.apply(model, config(target_modules=["1"]))
    c3a_triton.apply(model, config(target_modules=["1"], trainable_token_indices={"0": [2]}))
    with torch.no_grad():
        rows_of(model, module="0").fill_(1)
    assert model[0](torch.tensor([2])).eq(1).all()
    assert not model[0](torch.tensor([3])).eq(1).any()


# Calls


def test_without_adapters_the_base_computes():
    model = adapted()
    train(model)
    with model.c3a.disable_adapter():
        assert logits(model).equal(logits(tiny_models.llama(tied=True)))
    assert not torch.allclose(logits(model), logits(tiny_models.llama(tied=True)))


def two_adapters(**second):
    model = adapted()
    model.c3a.add_adapter("other", config(**({"trainable_token_indices": [5, 7, 0]} | second)))
    train(model)
    train(model, "other", seed=2)
    return model


def test_adapters_have_tokens_of_their_own():
    model = two_adapters()
    alone = {}
    for name in ("default", "other"):
        model.c3a.set_adapter(name)
        alone[name] = logits(model)
        assert rows_of(model, name).requires_grad
        assert [rows_of(model, other).requires_grad for other in ("default", "other")].count(True) == 1
    names = ["other", "__base__", "default"]
    rows = logits(model, adapter_names=names)
    base = logits(tiny_models.llama(tied=True))
    for i, expected in enumerate((alone["other"], base, alone["default"])):
        close(rows[i], expected[i])
    with model.c3a.using(names):
        close(logits(model), rows)
    model.c3a.set_adapter(["default", "other"])
    both = logits(model)
    model.c3a.merge_adapter()
    close(logits(model), both)


def test_two_rows_for_one_token_cannot_both_compute():
    model = two_adapters(trainable_token_indices=[3, 5])
    before = logits(model)
    with pytest.raises(AdapterStateError, match=r"'default' and 'other'.*tokens 3 .*set one of them"):
        model.c3a.set_adapter(["default", "other"])
    with pytest.raises(AdapterStateError, match="tokens 3 "):
        model.c3a.merge_adapter(["default", "other"])
    assert model.c3a.active_adapters == ["default"]
    assert logits(model).equal(before)
    model.c3a.merge_adapter("default")
    with pytest.raises(AdapterStateError, match="tokens 3 "):
        model.c3a.merge_adapter("other")


def test_deleted_and_renamed():
    model = two_adapters()
    model.c3a.set_adapter("other")
    expected, parameter = logits(model), rows_of(model, "other")
    weight = model.model.embed_tokens.weight.clone()
    model.c3a.merge_adapter()
    model.c3a.rename_adapter("other", "new")
    model.c3a.unmerge_adapter()
    assert model.model.embed_tokens.weight.equal(weight)
    assert rows_of(model, "new") is parameter
    assert logits(model).equal(expected)
    model.c3a.delete_adapter("default")
    assert list(model.model.embed_tokens.token_adapter.indices) == ["new"]
    assert logits(model).equal(expected)
    model.c3a.add_adapter("plain", config(trainable_token_indices=None))
    model.c3a.set_adapter("plain")
    model.c3a.delete_adapter("new")
    assert not any("token" in name.rpartition(".")[2] for name, _ in model.named_modules() if "token_adapter" in name)
    assert not model.lm_head._forward_hooks
    close(logits(model), logits(tiny_models.llama(tied=True)))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_rows_of_their_own(again):
    model = adapted()
    train(model)
    expected = logits(model)
    other = again(model)
    assert logits(other).equal(expected)
    with torch.no_grad():
        rows_of(other).add_(1)
    assert not torch.allclose(logits(other), expected)
    assert logits(model).equal(expected)


def test_compiled_whole():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False))
    model[2].weight = model[0].weight
    model.get_input_embeddings = lambda: model[0]
    c3a_triton.apply(model, config(target_modules=["1"], trainable_token_indices=[2, 5]))
    train(model, module="0")
    ids = torch.tensor([[1, 5, 2], [5, 5, 0]])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(ids).equal(model(ids))
        with model.c3a.using(["default", "__base__"]):
            assert compiled(ids).equal(model(ids))


# Merging


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keep_base", ["cpu", "device"])
def test_merged_and_brought_back_bit_for_bit(tied, keep_base):
    model = adapted(tied=tied)
    train(model)
    expected, weight = logits(model), model.model.embed_tokens.weight.clone()
    model.c3a.merge_adapter(keep_base=keep_base)
    assert model.model.embed_tokens.weight[TOKENS].equal(rows_of(model))
    close(logits(model), expected)
    with pytest.warns(UserWarning, match="merged already"):
        model.c3a.merge_adapter()
    model.c3a.unmerge_adapter()
    assert model.model.embed_tokens.weight.equal(weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight or not tied
    assert logits(model).equal(expected)


def test_merged_rows_that_cannot_be_brought_back():
    model = adapted()
    train(model)
    model.c3a.merge_adapter()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    with pytest.raises(AdapterStateError, match=r"model\.embed_tokens.*changed after they were merged"):
        model.c3a.unmerge_adapter()
    model = adapted()
    model.c3a.merge_adapter(keep_base=None)
    with pytest.raises(AdapterStateError, match="not kept"):
        model.c3a.unmerge_adapter()
    model = adapted()
    with torch.no_grad():
        rows_of(model)[0, 0] = float("nan")
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(AdapterStateError, match="'default' has for its tokens are not finite"):
        model.c3a.merge_adapter(safe_merge=True)
    assert model.model.embed_tokens.weight.equal(before)
    model.c3a.merge_adapter()
    model.c3a.unmerge_adapter()
    assert model.model.embed_tokens.weight.equal(before)


@pytest.mark.parametrize("tokens", [{"lm_head": [4]}, {"embed_tokens": [3, 4], "lm_head": [4, 3]}])
def test_rows_that_tied_modules_do_not_share_are_not_merged(tokens, tmp_path):
    """One weight cannot have both, and a merged model would compute something else."""
    model = adapted(trainable_token_indices=tokens)
    expected = logits(model)
    for merge in (model.c3a.merge_adapter, model.c3a.merge_and_unload):
        with pytest.raises(AdapterStateError, match=r"is that of (lm_head|model\.embed_tokens) \(tied\).*other tokens"):
            merge()
    assert logits(model).equal(expected)
    tiny_models.llama(tied=True).save_pretrained(tmp_path / "model")
    model.c3a.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterStateError, match="other tokens"):
        merge_folder(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")


def test_an_embedding_that_is_offloaded():
    model = tiny_models.llama()
    model.model.embed_tokens.to("meta")
    with pytest.raises(ConfigError, match=r"model\.embed_tokens is offloaded, or on the meta device"):
        c3a_triton.apply(model, config())
    model = adapted(tied=False)
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.to("meta"), requires_grad=False)
    with pytest.raises(AdapterStateError, match=r"model\.embed_tokens: no rows can be merged .*offloaded"):
        model.c3a.merge_adapter()
    assert not model.c3a.get_model_status().merged_adapters


@torch.no_grad()
def test_rows_that_are_offloaded_with_the_model(tmp_path):
    model = adapted(tied=False, trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS})
    train(model)
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert rows_of(model).is_meta
    assert logits(model).equal(expected)
    model.c3a.save_pretrained(tmp_path)
    assert logits(c3a_triton.load_adapter(tiny_models.llama(), tmp_path)).equal(expected)
    with pytest.raises(AdapterStateError, match="is offloaded: delete the adapter"):
        model.c3a.hotswap_adapter(tmp_path)


def test_setting_another_adapter_brings_back_the_rows():
    model = two_adapters()
    weight = model.model.embed_tokens.weight.clone()
    model.c3a.merge_adapter()
    with pytest.raises(AdapterStateError, match="merged"):
        model.c3a.delete_adapter("default")
    with pytest.warns(UserWarning, match="unmerged"):
        model.c3a.set_adapter("other")
    assert model.model.embed_tokens.weight.equal(weight)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_for_good(tied, tmp_path):
    model = adapted(tied=tied)
    train(model)
    expected = logits(model)
    plain = model.c3a.merge_and_unload()
    close(logits(plain), expected)
    assert [name for name, _ in plain.named_modules()] == [
        name for name, _ in tiny_models.llama(tied=tied).named_modules()
    ]
    assert not any(module._forward_hooks for module in plain.modules())
    assert plain.config.tie_word_embeddings == tied
    plain.save_pretrained(tmp_path)
    close(logits(type(plain).from_pretrained(tmp_path)), expected)


def test_unloaded_the_base_is_back():
    model = adapted()
    train(model)
    model.c3a.merge_adapter()
    plain = model.c3a.unload()
    assert logits(plain).equal(logits(tiny_models.llama(tied=True)))
    assert plain.state_dict().keys() == tiny_models.llama(tied=True).state_dict().keys()


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_merged_as_in_memory(tied, tmp_path):
    tiny_models.llama(tied=tied).save_pretrained(tmp_path / "model")
    model = adapted(tied=tied)
    train(model)
    model.c3a.save_pretrained(tmp_path / "adapter")
    merge_folder(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    plain = model.c3a.merge_and_unload()
    merged = type(plain).from_pretrained(tmp_path / "merged")
    for name, tensor in plain.state_dict().items():
        assert merged.state_dict()[name].equal(tensor), name


# Files


def test_a_file_brings_the_rows_back(tmp_path):
    model = adapted()
    train(model)
    with pytest.warns(UserWarning, match=r"PEFT's C3A trains no tokens.*rows of model\.embed_tokens"):
        model.c3a.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored[f"base_model.model.{ROWS}"].equal(rows_of(model))
    assert f"base_model.model.{ROWS}" in {f"base_model.model.{name}" for name in model.c3a.state_dict()}
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["trainable_token_indices"] == {"model.embed_tokens": TOKENS}
    other = c3a_triton.load_adapter(tiny_models.llama(tied=True), tmp_path)
    assert other.c3a.adapters["default"].trainable_token_indices == TOKENS
    assert other.c3a.adapters["default"].target_modules == ["q_proj"]
    assert logits(other).equal(logits(model))
    assert not rows_of(other).requires_grad
    refusal = "Embedding" if PEFT >= (0, 19) else "new_module"  # before, a variable that was never set
    with pytest.raises((TypeError, ValueError, UnboundLocalError), match=refusal):
        peft.PeftModel.from_pretrained(tiny_models.llama(tied=True), tmp_path)


def test_a_file_without_our_notes_says_the_same(tmp_path):
    from safetensors.torch import save_file

    model = adapted()
    train(model)
    model.c3a.save_pretrained(tmp_path)
    save_file(
        load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors", {"format": "pt"}
    )
    assert logits(c3a_triton.load_adapter(tiny_models.llama(tied=True), tmp_path)).equal(logits(model))


def test_files_of_plain_adapters_do_not_mention_tokens(tmp_path):
    adapted(trainable_token_indices=None).c3a.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert "token" not in text
    assert "tying" not in text


def test_the_state_dict_of_others_is_saved_from(tmp_path):
    """As FSDP, DeepSpeed and accelerate put it together."""
    model = adapted()
    train(model)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    with torch.no_grad():
        rows_of(model).zero_()
    model.c3a.save_pretrained(tmp_path, state_dict=whole)
    close(logits(c3a_triton.load_adapter(tiny_models.llama(tied=True), tmp_path)), expected)
    assert not model.load_state_dict(whole).missing_keys
    assert logits(model).equal(expected)


def test_hot_swapped(tmp_path):
    model = adapted()
    train(model, seed=5)
    expected = logits(model)
    model.c3a.save_pretrained(tmp_path)
    live = adapted()
    parameter = rows_of(live)
    live.c3a.hotswap_adapter(tmp_path)
    assert rows_of(live) is parameter
    assert logits(live).equal(expected)
    others = adapted(trainable_token_indices=[3, 9])
    before = logits(others)
    with pytest.raises(CheckpointError, match=r"trains other tokens.*\[9, 3\].*\[3, 9\].*another adapter"):
        others.c3a.hotswap_adapter(tmp_path)
    assert logits(others).equal(before)


def test_a_file_for_another_vocabulary(tmp_path):
    adapted().c3a.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 8 rows, and no token 9"):
        c3a_triton.load_adapter(tiny_models.llama(tied=True, vocab_size=8), tmp_path)
    model = tiny_models.llama(tied=True, hidden_size=48)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        c3a_triton.load_adapter(model, tmp_path)
    assert not hasattr(model.model.embed_tokens, "token_adapter")


def test_resized_afterwards(tmp_path):
    for tied in (True, False):
        model = adapted(tied=tied, trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS})
        train(model)
        if not tied:
            with torch.no_grad():
                rows_of(model, module="lm_head").add_(0.5)
        expected = logits(model)
        model.resize_token_embeddings(40)
        close(logits(model)[..., :32], expected)
        assert logits(model).shape[-1] == 40
        with pytest.raises(AdapterStateError, match=r"resize_token_embeddings.*tokens 9.*8 tokens do not reach"):
            model.resize_token_embeddings(8)
        assert logits(model).shape[-1] == 40
    model.c3a.save_pretrained(tmp_path, save_embedding_layers=True)
    larger = tiny_models.llama()
    larger.resize_token_embeddings(40)
    close(logits(c3a_triton.load_adapter(larger, tmp_path)), logits(model))


def test_new_tokens_are_trained_alone(tmp_path):
    """What the field is for: two tokens are added, and their rows learned and saved without the embedding."""
    model = tiny_models.llama(tied=True)
    model.resize_token_embeddings(34)
    frozen = model.model.embed_tokens.weight.clone()
    c3a_triton.apply(model, config(trainable_token_indices=[32, 33]))
    ids = torch.tensor([[1, 32, 5, 33, 2, 32]])
    optimizer = torch.optim.AdamW(c3a_triton.param_groups(model, head_lr=1e-2))
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.model.embed_tokens.weight.equal(frozen)
    model.c3a.save_pretrained(tmp_path, save_embedding_layers=False)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) == 2 * 24 + 2 * 72


# What is refused, and leaves the model as it was


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([-1], r"-1 is no token.*from 0"),
        ([3, 3], "token 3 is named more than once"),
        ([], "must be a list of token indices, got \\[\\]"),
        ({}, "must be a list of token indices, or a dict"),
        ([True], "must be a list of token indices"),
        ([1.5], "must be a list of token indices"),
        ("3", "must be a list of token indices"),
        ({"embed_tokens": [-2]}, r"\['embed_tokens'\]: -2 is no token"),
        ({"embed_tokens": 3}, r"\['embed_tokens'\] must be a list"),
        ({1: [3]}, "dict of names"),
    ],
)
def test_a_bad_value_is_refused_by_the_configuration(tokens, words):
    with pytest.raises(ConfigError, match=words):
        C3AConfig(trainable_token_indices=tokens)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"trainable_token_indices": [3, 32]},
            r"model\.embed_tokens has 32 rows, and no token 32.*resize_token_embeddings",
        ),
        ({"trainable_token_indices": {"embed_token": [3]}}, r"no module 'embed_token'.*Did you mean 'embed_tokens'"),
        ({"trainable_token_indices": {"norm": [3]}}, r"model\.norm is a LlamaRMSNorm"),
        (
            {"modules_to_save": ["embed_tokens"]},
            r"rows of model\.embed_tokens, which modules_to_save=\['embed_tokens'\]",
        ),
        ({"modules_to_save": ["lm_head"]}, r"rows of lm_head \(tied to model\.embed_tokens\), which modules_to_save"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            r"model\.embed_tokens, which target_modules=.*exclude_modules",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head \(tied to model\.embed_tokens\), which target_modules"),
        (
            {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}, "ensure_weight_tying": True},
            r"other tokens for model\.embed_tokens \(\[3\]\) than for lm_head \(\[4\]\).*ensure_weight_tying",
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [3], "model.embed_tokens": [4]}},
            r"model\.embed_tokens is named twice",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(changes, words):
    model = tiny_models.llama(tied=True)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=words):
        c3a_triton.apply(model, config(**changes))
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"trainable_token_indices": None, "modules_to_save": ["embed_tokens"]}),
        ({}, {"trainable_token_indices": None, "target_modules": ["q_proj", "embed_tokens"]}),
        ({}, {"trainable_token_indices": None, "target_modules": ["q_proj", "lm_head"]}),
        ({"trainable_token_indices": None, "modules_to_save": ["embed_tokens"]}, {}),
        ({"trainable_token_indices": None, "target_modules": ["q_proj", "embed_tokens"]}, {}),
        ({}, {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}),
    ],
)
def test_what_another_adapter_has_is_refused(first, second):
    model = adapted(**first)
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match="another adapter"):
        model.c3a.add_adapter("other", config(**second))
    assert [name for name, _ in model.named_parameters()] == before
    assert list(model.c3a.adapters) == ["default"]


def test_no_weighted_sum_of_rows():
    model = two_adapters()
    with pytest.raises(ConfigError, match="whole modules or tokens"):
        model.c3a.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


def test_a_saved_embedding_must_not_be_merged(tmp_path):
    model = adapted()
    model.c3a.merge_adapter()
    with pytest.raises(AdapterStateError, match=r"have tokens merged into it: unmerge"):
        model.c3a.save_pretrained(tmp_path, save_embedding_layers=True)


def test_requests_of_continuous_batching(monkeypatch):
    """All with the active adapter's rows, or each with an adapter of its own that has none."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    from transformers.generation.continuous_batching import continuous_api

    monkeypatch.setattr(continuous_api, "gc", SimpleNamespace(collect=lambda: 0))  # which takes longer than the rest
    model = adapted(model=tiny_models.llama(pad_token_id=None).eval())
    train(model)
    model.c3a.add_adapter("plain", config(trainable_token_indices=None, init_weights="gaussian"))
    settings = {
        "generation_config": transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1),
        "continuous_batching_config": transformers.ContinuousBatchingConfig(
            num_blocks=16, max_batch_tokens=32, page_size=8
        ),
    }
    prompts = [[1, 9, 3, 4], [3, 5, 9]]

    def expected(name, prompt):
        ids = torch.tensor([prompt])
        for _ in range(4):
            ids = torch.cat([ids, logits(model, ids, adapter_names=[name])[:, -1:].argmax(-1)], 1)
        return ids[0, len(prompt) :].tolist()

    found = [output.generated_tokens for output in model.generate_batch(prompts, **settings).values()]
    assert found == [expected("default", prompt) for prompt in prompts]
    outputs = list(model.c3a.generate_batch(prompts, adapter_names=["default", "plain"], **settings).values())
    assert "it has rows of its own for tokens" in outputs[0].error
    assert outputs[1].error is None
    assert outputs[1].generated_tokens == expected("plain", prompts[1])
