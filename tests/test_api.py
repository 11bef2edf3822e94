"""`apply` and `load_adapter`: what they take, what they bind, what they refuse."""

import pytest
import torch
from tiny_models import MLP, llama, logits
from torch import nn

from c3a_triton.adapters.manager import AdapterManager
from c3a_triton.api import apply, load_adapter
from c3a_triton.errors import AdapterStateError, ConfigError
from c3a_triton.files.config import C3AConfig

CONFIG = C3AConfig(block_size=4, target_modules=["q_proj", "v_proj"])


def test_three_kinds_of_configuration() -> None:
    peft = pytest.importorskip("peft")
    models = [
        apply(llama(), CONFIG),
        apply(llama(), {"block_size": 4, "target_modules": ["q_proj", "v_proj"]}),
        apply(llama(), peft.C3AConfig(block_size=4, target_modules=["q_proj", "v_proj"])),
    ]
    names = [list(model.state_dict()) for model in models]
    assert names[0] == names[1] == names[2]
    with pytest.raises(ConfigError, match="int"):
        apply(llama(), 4)
    with pytest.raises(ConfigError, match="'LORA'"):
        apply(llama(), peft.LoraConfig(r=2))


def test_it_returns_the_model_and_leaves_the_configuration_alone() -> None:
    model = llama()
    before = CONFIG.to_dict()
    assert apply(model, CONFIG) is model
    assert CONFIG.to_dict() == before
    assert model.c3a.adapters["default"] is not CONFIG
    manager = model.c3a
    assert apply(model, CONFIG, "second") is model
    assert model.c3a is manager
    assert list(manager.adapters) == ["default", "second"]


def test_the_default_configuration() -> None:
    model = llama(hidden_size=256, num_attention_heads=1, intermediate_size=256)
    apply(model)
    assert [layer.block_size["default"] for _, layer in model.c3a.layers()] == [256] * 4


def test_loading_onto_a_bare_and_an_adapted_model(tmp_path: object) -> None:
    model = apply(llama(), C3AConfig(block_size=4, init_weights="gaussian"))
    model.c3a.save_pretrained(tmp_path)
    bare = llama()
    assert load_adapter(bare, tmp_path, backend="torch") is bare
    assert {layer.backend for _, layer in bare.c3a.layers()} == {"torch"}
    torch.testing.assert_close(logits(bare), logits(model))
    load_adapter(bare, tmp_path, "second")
    assert bare.c3a.active_adapters == ["default"]
    with pytest.raises(AdapterStateError, match="'second' already"):
        load_adapter(bare, tmp_path, "second")


def test_what_cannot_be_adapted() -> None:
    with pytest.raises(ConfigError, match="str"):
        apply("meta-llama/Llama-3.2-3B", CONFIG)  # type: ignore[type-var]
    model = llama()
    model.c3a = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="c3a of its own"):
        apply(model, CONFIG)


def test_a_peft_model_is_refused_with_the_way_out() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.C3AConfig(block_size=4, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"PeftModel.*unload"):
        apply(model, CONFIG)
    apply(model.unload(), CONFIG)


def test_a_second_call_does_not_change_the_backend_unasked() -> None:
    model = apply(llama(), CONFIG, backend="torch")
    with pytest.raises(AdapterStateError, match="set_backend"):
        apply(model, CONFIG, "second", backend="reference")
    apply(model, CONFIG, "second")
    assert model.c3a.backend == "torch"


def test_a_compiled_model() -> None:
    model = MLP()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 12)
    compiled(x)
    assert apply(compiled, C3AConfig(block_size=2, target_modules="all-linear", init_weights="gaussian")) is compiled
    assert isinstance(compiled.c3a, AdapterManager)
    assert compiled.c3a is model.c3a
    y = compiled(x)
    torch.testing.assert_close(y, model(x))
    with compiled.c3a.disable_adapter():
        assert (compiled(x) - y).abs().max() > 0.01
    compiled.c3a.merge_and_unload()
    torch.testing.assert_close(compiled(x), y)
