"""What a configuration means for a model, and what it says about one that does not fit."""

import warnings

import pytest
import torch
from tiny_models import MLP, bert_classifier, gpt2, llama, llama_classifier
from torch import nn

import c3a_triton
from c3a_triton.adapters.base_model import base_module_names, base_modules, embeddings_of
from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.adapters.modules_to_save import ModulesToSave
from c3a_triton.adapters.targets import find_modules_to_save, find_targets, with_task_heads
from c3a_triton.errors import ConfigError, ShapeError
from c3a_triton.files.config import C3AConfig


@pytest.fixture(autouse=True)
def _no_surprises() -> None:
    warnings.simplefilter("error")


def names(model: nn.Module, **config: object) -> list[str]:
    return [target.name for target in find_targets(model, C3AConfig(**({"block_size": 2} | config)))]


def test_names_regex_and_defaults() -> None:
    model = llama()
    q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    v = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    assert names(model, target_modules=["q_proj"]) == q
    assert names(model, target_modules=["layers.1.self_attn.q_proj"]) == q[1:]
    assert names(model, target_modules=r".*\.1\.self_attn\.[qv]_proj") == [q[1], v[1]]
    assert names(model) == [q[0], v[0], q[1], v[1]]
    assert names(model, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"]) == [
        v[0],
        q[1],
        v[1],
    ]
    assert names(model, target_modules=["q_proj"], layers_to_transform=[1]) == q[1:]


def test_all_linear_leaves_the_output_head_out() -> None:
    model = llama()
    found = names(model, target_modules="all-linear")
    assert len(found) == 14
    assert not any("lm_head" in name for name in found)
    assert names(model, target_modules="all-linear", exclude_modules=r".*mlp.*") == [
        name for name in found if "mlp" not in name
    ]
    classifier = llama_classifier()
    assert "score" in names(classifier, target_modules="all-linear", block_size=1)
    assert "score" not in names(classifier, target_modules="all-linear", block_size=1, task_type="SEQ_CLS")
    assert names(gpt2(), target_modules="all-linear") == [
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert names(MLP(), target_modules="all-linear") == ["first", "second"]


def test_wrappers_stand_for_what_they_wrap() -> None:
    model = MLP()
    before = [name for name, _ in model.named_modules()]
    model.first = C3ALinear(model.first, "default", 2)
    model.second = ModulesToSave(model.second, "second")
    model.second.install("default", model.second.new_copy())
    assert [name for name, _ in base_modules(model)] == before
    assert base_module_names(model) == before
    assert names(model, target_modules="all-linear") == ["first"]


def test_what_decides_on_the_block_size() -> None:
    config = C3AConfig(
        block_size=12, block_size_pattern={"q_proj": 4, "model.layers.0.*": 6}, target_modules=["q_proj", "o_proj"]
    )
    found = {target.name: (target.block_size, target.chosen_by) for target in find_targets(llama(), config)}
    assert found == {
        "model.layers.0.self_attn.q_proj": (4, "q_proj"),
        "model.layers.0.self_attn.o_proj": (6, "model.layers.0.*"),
        "model.layers.1.self_attn.q_proj": (4, "q_proj"),
        "model.layers.1.self_attn.o_proj": (12, "block_size"),
    }
    found = find_targets(llama(), C3AConfig(block_size="auto", rank=3, target_modules=["q_proj"]))
    assert {(target.block_size, target.chosen_by) for target in found} == {(8, "auto")}


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (llama, {"target_modules": ["q_porj"]}, "'q_porj'.*matches no module.*Did you mean 'q_proj'"),
        (llama, {"target_modules": ["self_attn"]}, r"layers\.0\.self_attn is a LlamaAttention"),
        (llama, {"target_modules": ["norm"]}, "model.norm is a LlamaRMSNorm"),
        (llama, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "left by exclude_modules"),
        (llama, {"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform=\[7\]"),
        (llama, {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        (MLP, {}, "no config.model_type"),
        (lambda: nn.Linear(4, 4), {"target_modules": "all-linear"}, "matches no module"),
    ],
)
def test_what_cannot_be_adapted(model: object, config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        names(model(), **config)  # type: ignore[operator]


def test_a_model_type_without_default() -> None:
    model = llama()
    model.config.model_type = "unheard_of"
    with pytest.raises(ConfigError, match="'unheard_of'"):
        names(model)


def test_a_block_size_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(ShapeError, match=r"model\.layers\.0\.self_attn\.q_proj: block_size=16.*24.*nearby: 8, 12"):
        names(llama(), block_size=16)


def test_what_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"block_size_pattern.*'k_proj'"):
        names(llama(), block_size_pattern={"k_proj": 4, "q_proj": 4})
    with pytest.warns(UserWarning, match=r"'v_porj' select no module.*'v_proj'"):
        names(llama(), target_modules=["q_proj", "v_porj"])
    with pytest.warns(UserWarning, match=r"exclude_modules=\['x'\] matches no module"):
        names(llama(), exclude_modules=["x"])
    with pytest.warns(UserWarning, match=r"lm_head.weight is one tensor with model.embed_tokens.weight"):
        names(llama(tied=True), target_modules=["q_proj", "lm_head"])
    model = MLP()
    model.third = model.second
    with pytest.warns(UserWarning, match="second and third are one module"):
        names(model, target_modules=["second"])


def test_a_block_that_is_used_several_times_is_adapted_in_every_use() -> None:
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([MLP()] * 3), "last": nn.ModuleList([nn.ModuleList([MLP()] * 2)] * 2)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        c3a_triton.apply(model, C3AConfig(block_size=2, target_modules=["second"], modules_to_save=["first"]))
    for block in (*model["layers"], *(inner for outer in model["last"] for inner in outer)):
        assert isinstance(block.second, C3ALinear)
        assert isinstance(block.first, ModulesToSave)
    # Two blocks of one layer: only the first is another afterwards.
    for config in ({"target_modules": ["second"]}, {"target_modules": ["first"], "modules_to_save": ["second"]}):
        model = nn.ModuleList([MLP(), MLP()])
        model[1].second = model[0].second
        how = "trained whole" if "modules_to_save" in config else "adapted"
        with pytest.warns(UserWarning, match=f"0.second and 1.second are .* as 0.second is {how}"):
            c3a_triton.apply(model, C3AConfig(block_size=2, **config))
        assert type(model[1].second) is nn.Linear


def test_attention_that_never_calls_its_projection() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ConfigError, match=r"self_attn.out_proj.*never calls it"):
        names(encoder, target_modules=["out_proj"])
    with pytest.warns(UserWarning, match="out_proj is left out"):
        assert names(encoder, target_modules="all-linear") == ["linear1", "linear2"]


def test_a_peft_model_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"is a layer of PEFT.*unload"):
        names(model, target_modules=["v_proj"])


def test_modules_to_save() -> None:
    model = llama_classifier()
    found = find_modules_to_save(model, C3AConfig(modules_to_save=["score"]))
    assert [name for name, _ in found] == ["score"]
    with pytest.warns(UserWarning, match="'scroe' match no module.*'score'"):
        assert not find_modules_to_save(model, C3AConfig(modules_to_save=["scroe"]))
    with pytest.warns(UserWarning, match="tied"):
        find_modules_to_save(llama(tied=True), C3AConfig(modules_to_save=["lm_head"]))
    # A part of a module that is saved whole belongs to it.
    found = find_modules_to_save(llama(), C3AConfig(modules_to_save=["mlp", "up_proj"]))
    assert [name for name, _ in found] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_heads_that_a_task_trains() -> None:
    assert with_task_heads(llama_classifier(), C3AConfig(task_type="SEQ_CLS")).modules_to_save == ["score"]
    assert with_task_heads(bert_classifier(), C3AConfig(task_type="TOKEN_CLS")).modules_to_save == ["classifier"]
    config = C3AConfig(task_type="SEQ_CLS", modules_to_save=["score", "norm"])
    assert with_task_heads(llama_classifier(), config).modules_to_save == ["score", "norm"]
    assert with_task_heads(llama(), C3AConfig(task_type="CAUSAL_LM")).modules_to_save is None


def test_embeddings_that_a_model_has_or_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    assert embeddings_of(model) == (model.model.embed_tokens, model.lm_head)
    assert embeddings_of(model.model) == (model.model.embed_tokens, None)
    assert embeddings_of(MLP()) == (None, None)

    class Own(MLP):
        def get_input_embeddings(self) -> nn.Module:
            return self.frist

    with pytest.raises(AttributeError, match="frist"):
        embeddings_of(Own())
    # As transformers' own do, of backbones without such a part.
    monkeypatch.setattr(Own.get_input_embeddings, "__module__", "transformers.models.own")
    assert embeddings_of(Own()) == (None, None)


def test_all_linear_takes_a_model_whose_output_embeddings_are_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backbone(MLP):
        def get_output_embeddings(self) -> nn.Module:
            return self.head

    monkeypatch.setattr(Backbone.get_output_embeddings, "__module__", "transformers.models.own")
    assert names(Backbone(), target_modules="all-linear") == names(MLP(), target_modules="all-linear") != []


def test_nothing_is_changed() -> None:
    model = llama()
    before = [(name, id(module)) for name, module in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names(model, target_modules="all-linear")
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
