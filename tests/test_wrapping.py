"""`apply` and `load_adapter` of wrapped models: one manager, files without the wrapper's names, or a refusal."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from tiny_models import MLP
from torch import nn

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig, ConfigError, param_groups

CONFIG = C3AConfig(block_size=4, target_modules="all-linear", init_weights="gaussian")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path) -> Iterator[None]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def ddp(model: nn.Module, **options: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model, **options)


WRAPPERS = {
    "ddp": ddp,
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled ddp": lambda model: torch.compile(ddp(model)),
    "ddp of compiled": lambda model: ddp(torch.compile(model)),
}


@pytest.mark.parametrize("way", WRAPPERS)
def test_the_model_in_a_wrapper_is_adapted(way: str, tmp_path: Path) -> None:
    model = build()
    wrapper = WRAPPERS[way](model)
    assert c3a_triton.apply(wrapper, CONFIG) is wrapper
    assert wrapper.c3a is model.c3a
    assert wrapper.c3a.model is model
    model.c3a.save_pretrained(tmp_path)
    bare = c3a_triton.load_adapter(build(), tmp_path)
    loaded = c3a_triton.load_adapter(WRAPPERS[way](build()), tmp_path, is_trainable=True)
    if "compiled" not in way:  # dynamo's backends are not what is tried here
        torch.testing.assert_close(wrapper(X), bare(X), rtol=0, atol=0)
        torch.testing.assert_close(loaded(X), bare(X), rtol=0, atol=0)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in param_groups(wrapper) for p in group["params"]} == trained
    c3a_triton.apply(wrapper, CONFIG, "second")
    assert list(model.c3a.adapters) == ["default", "second"]
    model.c3a.unload()
    assert "c3a" not in wrapper.__dict__
    torch.testing.assert_close(model(X), build()(X), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
def test_what_a_ddp_was_told_and_given_stays() -> None:
    wrapper = ddp(
        build(), find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=3, broadcast_buffers=False
    )
    calls: list[int] = []
    wrapper.register_forward_hook(lambda *args: calls.append(1))
    wrapper.label = "mine"
    wrapper.eval()
    before = dict(wrapper.__dict__)
    c3a_triton.apply(wrapper, CONFIG)
    for name in ("find_unused_parameters", "gradient_as_bucket_view", "bucket_bytes_cap", "process_group", "dim"):
        assert getattr(wrapper, name) == before[name], name
    assert wrapper.find_unused_parameters
    assert not wrapper.training
    assert wrapper.label == "mine"
    assert not getattr(wrapper, "forward_sync_buffers", getattr(wrapper, "broadcast_buffers", None))
    wrapper(X)
    assert calls == [1]


def test_an_adapter_that_a_ddp_cannot_take_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = build()
    wrapper = ddp(model)
    names, flags = list(dict(model.named_modules())), [p.requires_grad for p in model.parameters()]
    c3a_triton.apply(build(), CONFIG).c3a.save_pretrained(tmp_path)
    with pytest.raises(AdapterStateError, match=r"is_trainable=True"):
        c3a_triton.load_adapter(wrapper, tmp_path)
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_ddp_init_helper", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        c3a_triton.apply(wrapper, CONFIG)
    assert list(dict(model.named_modules())) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "c3a")
    assert "c3a" not in wrapper.__dict__
    monkeypatch.undo()
    wrapper(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_hook_that_came_later_is_seen_before_anything_changes() -> None:
    wrapper = c3a_triton.apply(ddp(build()), CONFIG)
    c3a_triton.apply(wrapper, CONFIG, "second")
    wrapper.register_comm_hook(None, lambda state, bucket: torch.futures.Future())
    with pytest.raises(AdapterStateError, match="communication hook"):
        wrapper.c3a.set_adapter("second")
    assert wrapper.c3a.active_adapters == ["default"]


@pytest.mark.parametrize("around", [lambda model: model, nn.Sequential], ids=["the model", "a model around it"])
def test_an_adapter_that_a_ddp_of_ones_own_does_not_reduce_is_not_trained(around: Any) -> None:
    model: Any = c3a_triton.apply(build(), CONFIG)
    wrapper = ddp(around(model), find_unused_parameters=True)
    wrapper(X).sum().backward()
    model.c3a.add_adapter("second", CONFIG)
    wrapper(X).sum().backward()
    for names in ("second", ["default", "second"]):
        model.c3a.set_adapter(names)
        with pytest.raises(
            AdapterStateError, match=r"0\.c3a_kernel\.second and 1 more would be trained in each process"
        ):
            wrapper(X)
        with torch.no_grad():
            wrapper(X)
        wrapper.eval()(X)
        wrapper.train()
    ddp(around(model))(X).sum().backward()
    model.c3a.set_adapter("default")
    wrapper(X).sum().backward()
    assert pickle.loads(pickle.dumps(wrapper))(X).shape == (3, 4)
    model.c3a.unload()
    assert not model._forward_pre_hooks


def test_copies_and_pickles_have_wrappers_of_their_own() -> None:
    wrapper = c3a_triton.apply(ddp(build()), CONFIG)
    for model in (copy.deepcopy(wrapper.module), pickle.loads(pickle.dumps(wrapper.module))):
        torch.testing.assert_close(model(X), wrapper(X), rtol=0, atol=0)
        reducer = wrapper.reducer
        model.c3a.set_adapter("default")
        assert wrapper.reducer is reducer
        assert model.c3a.model is model


def test_models_of_peft() -> None:
    """Adapters are PEFT's to add; letting those that there are compute through this library changes no parameter."""
    model = peft.get_peft_model(MLP(), peft.C3AConfig(block_size=6, target_modules=["first"]))
    for wrapper in (ddp(model), nn.DataParallel(model)):
        with pytest.raises(ConfigError, match="PeftModel is PEFT's wrapper"):
            c3a_triton.apply(wrapper, CONFIG)
        parameters = list(map(id, wrapper.parameters()))
        c3a_triton.apply(wrapper)
        assert list(map(id, wrapper.parameters())) == parameters


@pytest.mark.parametrize("wrap", [ddp, lambda model: model], ids=["ddp", "plain"])
def test_what_accelerate_has_prepared_is_refused(wrap: Any) -> None:
    model = build()
    wrapper = accelerate.Accelerator(cpu=True).prepare(wrap(model))
    with pytest.raises(ConfigError, match=r"prepared by accelerate .*before accelerator\.prepare"):
        c3a_triton.apply(wrapper, CONFIG)
    assert not hasattr(model, "c3a")
    del wrapper._is_accelerate_prepared
    c3a_triton.apply(wrapper, CONFIG)


def test_a_prepared_model_that_is_adapted_takes_more() -> None:
    model = accelerate.Accelerator(cpu=True).prepare(c3a_triton.apply(build(), CONFIG))
    c3a_triton.apply(model, CONFIG, "second")
    assert list(model.c3a.adapters) == ["default", "second"]


def test_deepspeed_engines_are_refused() -> None:
    engine: Any = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = build()
    with pytest.raises(ConfigError, match=r"wrapped in DeepSpeedEngine.*Adapt the model first"):
        c3a_triton.apply(engine, CONFIG)
