"""PEFT's own API with its C3A layers computed by this library: every verb of a tuner's life, outputs and gradients.

What a model computes is compared with the dense definition in float64: outputs, the gradient of the input and those of
the kernels. `"peft"` runs the same test on PEFT's own layers wherever they are right: with one active adapter, without
the input gradient.
"""

import copy
import inspect
import io
import json
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from tiny_models import IDS, MLP, llama, llama_classifier, logits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from versions import PEFT

import c3a_triton
from c3a_triton.errors import AdapterNotFoundError, AdapterStateError, BackendError, ConfigError

peft = pytest.importorskip("peft")
integration = pytest.importorskip("c3a_triton.integrations.peft")
hotswap = pytest.importorskip("peft.utils.hotswap")
safetensors_torch = pytest.importorskip("safetensors.torch")
from peft.tuners.c3a.layer import C3ALinear as PeftsLayer  # noqa: E402

# PEFT 0.17's tuner has fewer verbs: it neither deletes an adapter nor sets one for inference.
RECENT = "inference_mode" in inspect.signature(peft.C3AModel.set_adapter).parameters
OURS = ["patched", "applied"]
KINDS = ["peft", *OURS]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    integration.unpatch_peft()


def config(**changes: object) -> Any:
    return peft.C3AConfig(**({"block_size": 4, "target_modules": TARGETS, "init_weights": "gaussian"} | changes))


def under(kind: str, build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes with PEFT, computed by whom `kind` says."""
    if kind == "patched":
        integration.patch_peft()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
    return c3a_triton.apply(model) if kind == "applied" else model


def adapted(kind: str, base: nn.Module | None = None, **changes: object) -> Any:
    base = llama() if base is None else base
    return under(kind, lambda: peft.get_peft_model(base, config(**changes))).eval()


def layers(model: nn.Module) -> dict[str, Any]:
    """Name in the base model → layer of PEFT's kind."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, PeftsLayer)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def check(model: Any, adapters: list[str], *, exact: bool = True, base: Callable[[], Any] = llama) -> None:
    """The model computes what `base()` does with Σ ΔW added to its weights; with `exact`, so do its gradients."""
    truth = base().double().requires_grad_(False)
    changed = {}
    for name, layer in layers(model).items():
        own = [adapter for adapter in adapters if adapter in layer.c3a_kernel]
        weight = truth.get_submodule(name).weight
        weight += sum(oracle.dense(layer.c3a_kernel[adapter]) for adapter in own)
        changed |= {(name, adapter): weight.requires_grad_() for adapter in own}
    embeddings = 5 * torch.randn(2, 6, 24)
    dy = torch.randn(2, 6, 32)

    def run(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = embeddings.to(dtype, copy=True).requires_grad_()
        y = model(inputs_embeds=x).logits
        y.backward(dy.to(y.dtype))
        return y.detach(), x.grad

    model.zero_grad()
    y, dx = run(model, torch.float32)
    true_y, true_dx = run(truth, torch.float64)
    oracle.assert_close(y, true_y, torch.float32, bound=2e-5)
    if not exact:
        return
    oracle.assert_close(dx, true_dx, torch.float32, bound=5e-5)
    for (name, adapter), weight in changed.items():
        kernel = layers(model)[name].c3a_kernel[adapter]
        if kernel.requires_grad:
            dw = oracle.weight_grad(torch.eye(len(weight)), weight.grad, kernel.shape[-1])
            oracle.assert_close(kernel.grad, dw, torch.float32, bound=5e-5)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that PEFT's users see, but for what it computes."""
    return {
        "parameters": {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()},
        "keys": list(model.state_dict()),
        "layers": {
            name: (layer.active_adapter, layer.active_adapters, layer.merged_adapters, layer.disable_adapters)
            for name, layer in layers(model).items()
        },
    }


def saved(model: Any, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    model.save_pretrained(folder)
    return (
        json.loads((folder / "adapter_config.json").read_text()),
        safetensors_torch.load_file(folder / "adapter_model.safetensors"),
    )


# Patching and applying


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_computes(kind: str) -> None:
    model = adapted(kind, target_modules="all-linear")
    assert len(layers(model)) == 14
    assert all(isinstance(layer, integration.C3ALinear) == (kind != "peft") for layer in layers(model).values())
    check(model, ["default"], exact=kind != "peft")


def test_pefts_input_gradient_is_not_what_is_compared_with() -> None:
    with pytest.raises(AssertionError, match="relative error"):
        check(adapted("peft"), ["default"])


def test_patching_is_idempotent_and_ends() -> None:
    places = [(peft.C3AModel, "_create_and_replace"), (peft.PeftModel, "active_peft_config")]
    places += [(hotswap, "hotswap_adapter_from_state_dict"), (hotswap, "CONFIG_KEYS_TO_CHECK")]
    own = [vars(owner)[name] for owner, name in places]
    for _ in range(2):
        assert integration.patch_peft() is None
    assert not any(vars(owner)[name] is value for (owner, name), value in zip(places, own, strict=True))
    assert {type(layer) for layer in layers(adapted("patched")).values()} == {integration.C3ALinear}
    for _ in range(2):
        assert integration.unpatch_peft() is None
    assert all(vars(owner)[name] is value for (owner, name), value in zip(places, own, strict=True))
    assert {type(layer) for layer in layers(adapted("peft")).values()} == {PeftsLayer}


def test_models_that_were_built_while_patched_stay_so() -> None:
    model = adapted("patched")
    integration.unpatch_peft()
    check(model, ["default"])
    model.add_adapter("second", config(block_size=6, target_modules=["k_proj"]))
    assert {type(layer) for layer in layers(model).values()} == {integration.C3ALinear}
    model.base_model.set_adapter(["default", "second"])
    check(model, ["default", "second"])


def test_patching_after_a_model_was_built() -> None:
    model = adapted("peft")
    integration.patch_peft()
    assert {type(layer) for layer in layers(model).values()} == {PeftsLayer}
    model.add_adapter("second", config(target_modules=["q_proj", "k_proj"]))
    new = {name.rpartition(".")[2] for name, layer in layers(model).items() if type(layer) is integration.C3ALinear}
    assert new == {"q_proj", "k_proj"}
    c3a_triton.apply(model)
    model.base_model.set_adapter(["default", "second"])
    check(model, ["default", "second"])


def test_what_peft_has_merged_stays_pefts() -> None:
    model = adapted("peft", target_modules=["q_proj"])
    y = logits(model)
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(AdapterStateError, match=r"self_attn\.q_proj.*unmerge_adapter"):
        c3a_triton.apply(model)
    assert snapshot(model) == before
    assert {type(layer) for layer in layers(model).values()} == {PeftsLayer}
    integration.patch_peft()
    model.add_adapter("second", config(target_modules=["q_proj", "k_proj"]))
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-4)
    c3a_triton.apply(model)
    check(model, ["default"])


def test_applying_keeps_the_objects() -> None:
    model = adapted("peft", bias="c3a_only")
    before, parameters = snapshot(model), list(model.parameters())
    modules = list(model.modules())
    assert c3a_triton.apply(model) is model
    assert snapshot(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not hasattr(model, "c3a")
    assert isinstance(model.base_model, peft.C3AModel)
    assert repr(layers(model)["model.layers.0.mlp.down_proj"]).startswith("c3a.C3ALinear(")


def test_applying_again_sets_the_backend() -> None:
    model = adapted("peft")
    c3a_triton.apply(model, backend="torch")
    check(model, ["default"])
    c3a_triton.apply(model, backend="reference")
    model.add_adapter("second", config(target_modules=["k_proj"]))
    assert {layer.backend for layer in layers(model).values()} == {"reference"}
    check(model, ["default"])
    with pytest.raises(BackendError, match="'nonsense'"):
        c3a_triton.apply(model, backend="nonsense")
    assert {layer.backend for layer in layers(model).values()} == {"reference"}


def test_what_apply_refuses() -> None:
    lora = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"PeftModel.*unload"):
        c3a_triton.apply(lora)
    with pytest.raises(ConfigError, match="no C3A layer"):
        integration.convert(lora)
    for model in (adapted("peft"), adapted("applied")):
        with pytest.raises(ConfigError, match="leave cfg out"):
            c3a_triton.apply(model, config())
        with pytest.raises(ConfigError, match=r"has C3A layers of PEFT.*PEFT's verbs"):
            c3a_triton.load_adapter(model.get_base_model(), "anywhere")


def test_layers_that_somebody_derived_are_left_alone() -> None:
    class Derived(PeftsLayer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = adapted("peft")
    one = layers(model)["model.layers.0.self_attn.q_proj"]
    one.__class__ = Derived
    y = logits(model)
    c3a_triton.apply(model)
    assert type(one) is Derived
    torch.testing.assert_close(logits(model), y)


# The life of adapters


@pytest.mark.parametrize("kind", OURS)
def test_several_adapters_of_different_block_sizes(kind: str) -> None:
    model = adapted(kind)
    model.add_adapter("second", config(block_size=6, target_modules=["q_proj", "k_proj"]))
    check(model, ["default"])
    model.set_adapter("second")
    check(model, ["second"])
    model.base_model.set_adapter(["default", "second"])
    check(model, ["default", "second"])
    if RECENT:
        model.base_model.set_adapter(["second", "default"], inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())
        check(model, ["default", "second"])


STEPS: dict[str, Callable[[Any], Any]] = {
    "add": lambda model: model.add_adapter("second", config(block_size=6, target_modules=["q_proj", "k_proj"])),
    "set": lambda model: model.set_adapter("second"),
    "set for inference": lambda model: model.base_model.set_adapter("default", inference_mode=True),
    "train again": lambda model: model.set_adapter("default"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "set while disabled": lambda model: model.set_adapter("second"),
    "enable": lambda model: model.base_model.enable_adapter_layers(),
    "merge": lambda model: model.merge_adapter(),
    "merge again": lambda model: model.merge_adapter(),
    "set while merged": lambda model: model.set_adapter("default"),
    "merge one": lambda model: model.merge_adapter(["second"]),
    "unmerge": lambda model: model.unmerge_adapter(),
    "unmerge again": lambda model: model.unmerge_adapter(),
    "freeze": lambda model: model.set_requires_grad("default", False),
    "delete": lambda model: model.delete_adapter("default"),
    "add again": lambda model: model.add_adapter("default", config()),
    "delete the other": lambda model: model.delete_adapter("second"),
}
NEEDS_RECENT = {"set for inference", "freeze", "delete", "add again", "delete the other"}


@pytest.mark.parametrize("kind", OURS)
def test_the_same_life_as_in_peft(kind: str) -> None:
    theirs = adapted("peft", llama_classifier(), task_type="SEQ_CLS")
    ours = adapted(kind, llama_classifier(), task_type="SEQ_CLS")
    integration.unpatch_peft()
    for step, act in STEPS.items():
        if step in NEEDS_RECENT and not RECENT:
            continue
        for model in (theirs, ours):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(6)
                act(model)
        assert snapshot(ours) == snapshot(theirs), step
        assert ours.active_adapters == theirs.active_adapters, step
        assert ours.get_model_status() == theirs.get_model_status(), step
        assert ours.get_layer_status() == theirs.get_layer_status(), step
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters(), step
        torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4, msg=step)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, msg=f"{step}: {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_disabling(kind: str) -> None:
    model, y = adapted(kind), logits(llama())
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), y, atol=0, rtol=0)
        check(model, [], exact=False)
    check(model, ["default"], exact=kind != "peft")
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), y, atol=1e-5 * (kind == "peft"), rtol=0)
    check(model, ["default"], exact=kind != "peft")


def test_disabling_does_not_leave_the_work_to_the_forward() -> None:
    model = adapted("applied")
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    assert not any(layer.merged for layer in layers(model).values())


@pytest.mark.skipif(not RECENT, reason="PEFT 0.17 cannot delete a C3A adapter")
@pytest.mark.parametrize("kind", KINDS)
def test_deleting(kind: str) -> None:
    model = adapted(kind)
    model.add_adapter("second", config(block_size=6))
    model.merge_adapter(["second"])
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("second")
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match=r"default.*deleted"):
        model.delete_adapter("default")
    assert not any(key.endswith(".default") for key in model.state_dict())
    check(model, ["second"], exact=kind != "peft")
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")


# Merging


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_unloading(kind: str, safe_merge: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, base = adapted(kind), llama()
    kernels = {name: layer.c3a_kernel["default"].detach().clone() for name, layer in layers(model).items()}
    merged = model.merge_and_unload(progressbar=True, safe_merge=safe_merge)
    assert "Unloading and merging" in capsys.readouterr().err
    assert type(merged) is type(base)
    assert list(merged.state_dict()) == list(base.state_dict())
    for name, weight in merged.state_dict().items():
        truth = base.state_dict()[name].double()
        if name.removesuffix(".weight") in kernels:
            truth += oracle.dense(kernels[name.removesuffix(".weight")])
        oracle.assert_close(weight, truth, torch.float32, bound=1e-6)


@pytest.mark.parametrize("kind", OURS)
def test_what_was_merged_for_good_is_the_base_of_what_is_merged_next(kind: str) -> None:
    model = adapted(kind)
    held = layers(model)  # which were taken out
    model.merge_adapter()
    merged = model.merge_and_unload()
    base = copy.deepcopy(merged.state_dict())
    c3a_triton.apply(merged, c3a_triton.C3AConfig(block_size=4, target_modules="all-linear", init_weights="gaussian"))
    merged.c3a.merge_adapter()
    merged.c3a.unmerge_adapter()
    assert held
    assert all(map(torch.equal, merged.c3a.unload().state_dict().values(), base.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", OURS)
def test_merging_rounds_once_and_unmerging_is_exact(kind: str, dtype: torch.dtype) -> None:
    base = llama().to(dtype)
    before = copy.deepcopy(base.state_dict())
    model = adapted(kind, base)
    y = logits(model)
    model.merge_adapter(safe_merge=True)
    for name, layer in layers(model).items():
        truth = before[f"{name}.weight"].double() + oracle.dense(layer.c3a_kernel["default"])
        oracle.assert_close(layer.weight, truth, dtype, bound=max(torch.finfo(dtype).eps, 1e-6))
        assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(logits(model), y, atol=0.02 if dtype.itemsize == 2 else 1e-5, rtol=0.02)
    model.unmerge_adapter()
    state = model.get_base_model().state_dict()
    assert all(
        torch.equal(
            state[name.replace("proj.weight", "proj.base_layer.weight")]
            if name.replace("proj.weight", "proj.base_layer.weight") in state
            else state[name],
            value,
        )
        for name, value in before.items()
    )
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_adapter_is_not_merged_safely(kind: str) -> None:
    model = adapted(kind, target_modules=["q_proj"])
    layers(model)["model.layers.0.self_attn.q_proj"].c3a_kernel["default"].data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN|finite"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="NaN|finite"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.isfinite(layer.weight).all() for layer in layers(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_unloading(kind: str) -> None:
    base = llama()
    y = logits(base)
    assert torch.equal(logits(adapted(kind, base).unload()), y)


@pytest.mark.skipif(not RECENT, reason="PEFT 0.17 does not say that it merges for good")
def test_merging_for_good_copies_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(*args: object) -> None:
        raise AssertionError("a weight that nobody will ask for was kept")

    monkeypatch.setattr("c3a_triton.bases.weights._PlainWeight.keep", keep)
    adapted("applied").merge_and_unload()


def test_messages_have_the_layers_name() -> None:
    for kind in OURS:
        model = adapted(kind, target_modules=["q_proj"])
        model.merge_adapter()
        layers(model)["model.layers.1.self_attn.q_proj"].weight.data.add_(1)
        with pytest.raises(AdapterStateError, match=r"layers\.1\.self_attn\.q_proj: the base weight was changed"):
            model.unmerge_adapter()
        integration.unpatch_peft()


# Files and states


@pytest.mark.parametrize("kind", OURS)
def test_files_are_pefts(kind: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"block_size_pattern": {"v_proj": 6, "down_proj": 12}, "modules_to_save": ["norm"]}
    theirs = saved(adapted("peft", **changes), tmp_path / "theirs")
    model = adapted(kind, **changes)
    ours = saved(model, tmp_path / "ours")
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(value, theirs[1][key]) for key, value in ours[1].items())
    y = logits(model)
    for build in (
        lambda: under("peft", lambda: peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")),
        lambda: under(kind, lambda: peft.PeftModel.from_pretrained(llama(), tmp_path / "theirs")),
        lambda: under(kind, lambda: peft.PeftModel.from_pretrained(llama(), tmp_path / "ours", low_cpu_mem_usage=True)),
        lambda: c3a_triton.load_adapter(llama(), tmp_path / "ours"),
    ):
        torch.testing.assert_close(logits(build()), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loading_a_further_adapter(kind: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    adapted("peft", block_size=6, target_modules=["q_proj", "k_proj"]).save_pretrained(tmp_path)
    model = adapted(kind)
    model.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("loaded")
    check(model, ["loaded"], exact=kind != "peft")
    if kind != "peft":
        model.base_model.set_adapter(["default", "loaded"])
        check(model, ["default", "loaded"])


@pytest.mark.parametrize("kind", OURS)
def test_a_reference_adapter_has_the_values_of_the_one_it_stands_for(kind: str) -> None:
    """What the trainers of TRL do with a PeftModel, in its words; C3A's names do not hold ".default."."""
    model = adapted(kind, modules_to_save=["lm_head"])
    expected = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("default" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(1)  # training
    assert not torch.allclose(logits(model), expected)
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("kind", OURS)
def test_other_adapters_of_the_same_configuration_are_initialised(kind: str) -> None:
    model = adapted(kind)
    model.add_adapter("other", model.peft_config["default"])
    model.add_adapter("ref", config())
    for layer in layers(model).values():
        for name in ("other", "ref"):
            assert not torch.equal(layer.c3a_kernel[name], layer.c3a_kernel["default"])


def of_other_values(folder: Path, **changes: object) -> Path:
    """A folder with an adapter like `adapted`'s, of other values."""
    model = adapted("peft", **changes)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    return under("peft", lambda: peft.PeftModel.from_pretrained(llama(), folder))


@pytest.mark.parametrize("kind", KINDS)
def test_loading_under_a_name_that_is_taken(kind: str, tmp_path: Path) -> None:
    of_other_values(tmp_path)
    model = adapted(kind)
    parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    y = logits(model)
    model.load_adapter(tmp_path, "default")
    assert all((p, p.data_ptr()) == parameters[name] for name, p in model.named_parameters())
    assert (logits(model) - y).norm() > 0.1 * y.norm()
    torch.testing.assert_close(logits(model), logits(loaded(tmp_path)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", OURS)
def test_hot_swapping(kind: str, tmp_path: Path) -> None:
    of_other_values(tmp_path)
    model = adapted(kind)
    state, y = snapshot(model), logits(model)
    parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    hotswap.hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    torch.testing.assert_close(logits(model), logits(loaded(tmp_path)), atol=1e-5, rtol=1e-4)
    assert (logits(model) - y).norm() > 0.1 * y.norm()
    assert snapshot(model) == state
    assert all((p, p.data_ptr()) == parameters[name] for name, p in model.named_parameters())
    check(model, ["default"])


def test_hot_swapping_a_compiled_model_compiles_nothing_again(tmp_path: Path) -> None:
    base, changes = MLP(), {"target_modules": "all-linear", "block_size": 6}
    other, model = adapted("peft", copy.deepcopy(base), **changes), adapted("patched", base, **changes)
    for layer in layers(other).values():
        layer.c3a_kernel["default"].data.normal_()
    other.save_pretrained(tmp_path)
    torch._dynamo.reset()
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(5, 12)
    compiled(x).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        hotswap.hotswap_adapter(compiled, str(tmp_path), "default", torch_device="cpu")
        torch.testing.assert_close(compiled(x), other(x))


def test_hot_swapping_an_adapter_that_is_not_active_or_frozen(tmp_path: Path) -> None:
    model = adapted("patched")
    model.add_adapter("second", config())
    of_other_values(tmp_path)
    y = logits(model)
    hotswap.hotswap_adapter(model, str(tmp_path), "second", torch_device="cpu")
    assert torch.equal(logits(model), y)
    model.set_adapter("second")
    for layer in layers(model).values():
        layer.freeze_for_inference()  # what is kept of its parameters must not outlive them
    torch.testing.assert_close(logits(model), logits(loaded(tmp_path)), atol=1e-5, rtol=1e-4)
    of_other_values(tmp_path)
    hotswap.hotswap_adapter(model, str(tmp_path), "second", torch_device="cpu")
    torch.testing.assert_close(logits(model), logits(loaded(tmp_path)), atol=1e-5, rtol=1e-4)


def test_hot_swapping_pefts_own_layers_and_lora(tmp_path: Path) -> None:
    model = adapted("peft")
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap.hotswap_adapter(model, str(of_other_values(tmp_path)), "default", torch_device="cpu")
    integration.patch_peft()
    hotswap.hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    torch.testing.assert_close(logits(model), logits(loaded(tmp_path)), atol=1e-5, rtol=1e-4)
    lora = [
        peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
        for _ in range(2)
    ]
    lora[0].base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data.mul_(3)
    lora[0].save_pretrained(tmp_path / "lora")
    hotswap.hotswap_adapter(lora[1], str(tmp_path / "lora"), "default", torch_device="cpu")
    torch.testing.assert_close(logits(lora[1]), logits(lora[0]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_size": 6}, r"q_proj\.c3a_kernel\.default has shape \[4, 4, 6\], in the model \[6, 6, 4\]"),
        ({"target_modules": TARGETS[:2]}, r"it has no .*down_proj\.c3a_kernel\.default"),
        ({"target_modules": [*TARGETS, "k_proj"]}, r"no kernel takes .*k_proj\.c3a_kernel\.default"),
        ({"modules_to_save": ["lm_head"]}, "incompatible: for modules_to_save"),
        ({"bias": "c3a_only"}, "incompatible: for bias"),
    ],
    ids=str,
)
def test_what_hot_swapping_refuses(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder, model = of_other_values(tmp_path, **changes), adapted("patched")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        hotswap.hotswap_adapter(model, str(folder), "default", torch_device="cpu")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_states_in_which_hot_swapping_refuses(tmp_path: Path) -> None:
    like, other = of_other_values(tmp_path / "like", modules_to_save=["lm_head"]), of_other_values(tmp_path / "other")
    with_head, plain = adapted("patched", modules_to_save=["lm_head"]), adapted("patched")
    merged = adapted("patched")
    merged.merge_adapter()
    for model, folder, name, said in (
        (with_head, like, "default", r"no kernel takes .*lm_head.*load_adapter"),
        (plain, other, "third", "no adapter 'third'"),
        (merged, other, "default", r"q_proj.*merged.*unmerge_adapter"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises((AdapterStateError, AdapterNotFoundError), match=said):
            hotswap.hotswap_adapter(model, str(folder), name, torch_device="cpu")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    merged.unmerge_adapter()
    hotswap.hotswap_adapter(merged, str(other), "default", torch_device="cpu")
    torch.testing.assert_close(logits(merged), logits(loaded(other)), atol=1e-5, rtol=1e-4)


def test_what_modules_to_save_keep_from_hot_swapping_is_loaded_in_place(tmp_path: Path) -> None:
    """As the error says: under the name that is taken."""
    folder, model = (
        of_other_values(tmp_path, modules_to_save=["lm_head"]),
        adapted("patched", modules_to_save=["lm_head"]),
    )
    parameters = list(model.parameters())
    model.load_adapter(folder, "default")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(logits(model), logits(loaded(folder)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_of_an_adapter(kind: str) -> None:
    model, other = adapted(kind, bias="none"), adapted("peft", init_weights=True)
    state = peft.get_peft_model_state_dict(model)
    assert {key.rpartition(".")[2] for key in state} == {"c3a_kernel"}
    result = peft.set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(logits(other), logits(model), atol=1e-5, rtol=1e-4)
    peft.set_peft_model_state_dict(model, {key: torch.zeros_like(value) for key, value in state.items()})
    check(model, [], exact=False)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_injecting_into_a_bare_model(kind: str, low_cpu_mem_usage: bool) -> None:
    model: Any = under(
        kind, lambda: peft.inject_adapter_in_model(config(), llama(), "mine", low_cpu_mem_usage=low_cpu_mem_usage)
    )
    if low_cpu_mem_usage:
        state = peft.get_peft_model_state_dict(adapted("peft").base_model.model, adapter_name="default")
        state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        peft.set_peft_model_state_dict(model, state, "mine", low_cpu_mem_usage=True)
    check(model, ["mine"], exact=kind != "peft")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_verbs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers 5.24 refuses every PEFT that is out; what it does then is the same.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.17.0")
    model = llama()
    base = logits(model)

    def build() -> nn.Module:
        model.add_adapter(config(), "first")
        return model

    under(kind, build)
    check(model, ["first"], exact=kind != "peft")
    y = logits(model)
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), y)
    model.add_adapter(config(block_size=6), "second")
    if kind == "applied":
        c3a_triton.apply(model)
    assert model.active_adapters() == ["second"]
    check(model, ["second"], exact=kind != "peft")
    model.set_adapter("first")
    check(model, ["first"], exact=kind != "peft")
    model.delete_adapter("second")
    assert not any(key.endswith(".second") for key in model.state_dict())
    fresh = llama()

    def load() -> nn.Module:
        fresh.load_adapter(str(tmp_path))
        return fresh

    torch.testing.assert_close(logits(under(kind, load)), y, atol=1e-5, rtol=1e-4)


def test_models_of_mixed_methods_do_not_take_c3a() -> None:
    integration.patch_peft()
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(llama(), config(), mixed=True)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_trained_whole(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, llama_classifier(), task_type="SEQ_CLS")
    model.base_model.model.score.modules_to_save["default"].weight.data.mul_(3)
    y = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama_classifier()))
    model.save_pretrained(tmp_path)
    loaded = under(kind, lambda: peft.PeftModel.from_pretrained(llama_classifier(), tmp_path))
    torch.testing.assert_close(logits(loaded), y, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", OURS)
def test_copies(kind: str, copied: str) -> None:
    model = adapted(kind)
    model.add_adapter("second", config(block_size=6))
    model.base_model.set_adapter(["default", "second"])
    integration.unpatch_peft()
    if copied == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    twin.base_model.set_adapter(["second"])
    check(twin, ["second"])
    if RECENT:
        twin.delete_adapter("default")
    twin.merge_adapter()
    check(model, ["default", "second"])


@pytest.mark.parametrize("init_weights", ["gaussian", "kaiming_uniform", "xavier_uniform", False, True])
def test_the_same_seed_gives_the_same_kernels(init_weights: bool | str) -> None:
    states = [adapted(kind, llama().bfloat16(), init_weights=init_weights).state_dict() for kind in ("peft", "patched")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 5},
        {"block_size": 0},
        {"block_size_pattern": {"q_proj": 7}},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["nothing"]},
    ],
    ids=str,
)
def test_pefts_refusals_stay(changes: dict[str, Any]) -> None:
    errors: list[tuple[type, str] | None] = []
    for kind in ("peft", "patched"):
        model = adapted(kind)
        for act in (
            lambda: peft.get_peft_model(llama(), config(**changes)),
            lambda model=model: model.add_adapter("second", config(**changes)),  # PEFT 0.17 takes what matches nothing
        ):
            try:
                act()
                errors.append(None)
            except Exception as error:
                errors.append((type(error), str(error)))
    assert errors[0] is not None
    assert None not in errors or not RECENT
    assert errors[:2] == errors[2:]


# What the layer computes on


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models(dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    base = nn.Sequential(nn.Linear(24, 24)).to(dtype)
    model = peft.get_peft_model(base, config(target_modules=["0"]), autocast_adapter_dtype=autocast_adapter_dtype)
    c3a_triton.apply(model)
    (layer,) = layers(model).values()
    kernel = layer.c3a_kernel["default"]
    assert kernel.dtype == (torch.float32 if autocast_adapter_dtype else dtype)
    x, dy = torch.randn(50, 24, dtype=dtype, requires_grad=True), torch.randn(50, 24, dtype=dtype)
    y = model(x)
    y.backward(dy)
    weight = base[0].base_layer.weight.double() + oracle.dense(kernel)
    oracle.assert_close(y, x.double() @ weight.T + base[0].base_layer.bias.double(), dtype)
    oracle.assert_close(x.grad, dy.double() @ weight, dtype)
    bound = 1e-5 if autocast_adapter_dtype else oracle.BOUNDS[dtype]
    oracle.assert_close(kernel.grad, oracle.weight_grad(dy, x, 4), kernel.dtype, bound=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activations_saved_for_backward(dtype: torch.dtype) -> None:
    def saved_bytes(kind: str) -> int:
        model = adapted(kind, nn.Sequential(nn.Linear(64, 64)).to(dtype), target_modules=["0"], block_size=16)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(512, 64, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        y.sum().backward()
        return sum(found.values())

    assert saved_bytes("applied") <= 0.5 * saved_bytes("peft")


def test_autocast() -> None:
    model = adapted("applied", MLP(), target_modules="all-linear", block_size=6)
    x = torch.randn(7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_layer_with_a_hook(kind: str) -> None:
    model = adapted(kind)
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    check(model, ["default"], exact=kind != "peft")
    assert len(seen) == 1


@pytest.mark.parametrize("kind", OURS)
def test_an_offloaded_base(kind: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = adapted(kind)
    y, before = logits(model), copy.deepcopy(model.state_dict())
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert layers(model)["model.layers.0.self_attn.q_proj"].weight.is_meta
    torch.testing.assert_close(logits(model), y)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-4)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), y)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_8_bit_base_is_merged_by_its_own_library() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft.utils.quantization_utils")
    base = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)).requires_grad_(False).to("cpu")
    model = adapted("applied", base, target_modules=["0"], block_size=16)
    (layer,) = layers(model).values()
    layer.c3a_kernel["default"].data.mul_(10)
    x = torch.randn(40, 64)
    plain = base[0].base_layer(x)
    y = model(x)
    assert (y - plain).norm() > 0.2 * plain.norm()
    model.merge_adapter()
    assert layer.weight.dtype == torch.int8
    assert (model(x) - y).norm() < 0.05 * y.norm()
    model.unmerge_adapter()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("way", ["applied", "patched"])
def test_layers_of_a_4_bit_base_that_are_not_adapted_are_not_repacked_either(way: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(*(bnb.nn.Linear4bit(64, 64, bias=False) for _ in range(3))).requires_grad_(False).to("cpu")
    for module in base:
        module.support_avx512bf16_for_cpu = True  # as on a processor that has it
    model = adapted(way, base, target_modules=["0"], block_size=16).eval()
    with torch.no_grad():
        model(torch.randn(4, 64))
    model(torch.randn(4, 64)).sum().backward()
    (layer,) = layers(model).values()
    assert layer.c3a_kernel["default"].grad.norm() > 0


def test_gradient_checkpointing() -> None:
    grads = []
    for reentrant in (None, False, True):
        model = adapted("applied").train()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert len(grads[0]) == 6
    for others in grads[1:]:
        torch.testing.assert_close(others[: len(grads[0])], grads[0])


def test_compiling_without_graph_breaks() -> None:
    model = adapted("patched", MLP(), target_modules="all-linear", block_size=6)
    x = torch.randn(7, 12)
    y = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    with model.disable_adapter():
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize("kind", OURS)
def test_switching_adapters_compiles_nothing_again(kind: str) -> None:
    """Of the model as PEFT hands it out, whose forward looks the active adapter's configuration up by its name."""
    model = adapted(kind, MLP(), target_modules="all-linear", block_size=6)
    other = config(target_modules="all-linear", block_size=6)
    model.add_adapter("second", other)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def run(name: str, n_tokens: int = 5) -> None:
        model.set_adapter(name)
        assert model.active_peft_config is model.peft_config[name]
        x = torch.randn(n_tokens, 12)
        torch.testing.assert_close(compiled(x), model(x))

    run("default")
    assert counter.frame_count == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        run("second")
        model.add_adapter("third", other)
        run("third")
        run("default")
    run("second", 7)  # the length becomes a symbol
    with torch.compiler.set_stance("fail_on_recompile"):
        run("third", 11)
        run("default", 9)
    with model.disable_adapter():
        run("default")
    assert counter.frame_count == 3


def test_a_language_models_wrapper_compiles_once() -> None:
    model = adapted("patched", llama(num_hidden_layers=1), task_type="CAUSAL_LM")
    model.add_adapter("second", config(task_type="CAUSAL_LM"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    y = logits(compiled)
    model.set_adapter("second")
    with torch.compiler.set_stance("fail_on_recompile"):
        assert (logits(compiled) - y).norm() > 0.01 * y.norm()
    torch.testing.assert_close(logits(compiled), logits(model))


def test_what_the_wrapper_calls_is_compiled_in_place() -> None:
    """Without anything replaced in the wrapper."""
    model = adapted("applied", MLP(), target_modules="all-linear", block_size=6)
    integration.unpatch_peft()
    model.add_adapter("second", config(target_modules="all-linear", block_size=6))
    x, expected = torch.randn(5, 12), {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = model(x)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.get_base_model().compile(backend=counter, fullgraph=True)
    for name in ("default", "second"):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), expected[name])
    assert counter.frame_count == 1


def test_compiling_other_methods_models_while_patched() -> None:
    integration.patch_peft()
    lora = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    model, x = peft.get_peft_model(MLP(), lora).eval(), torch.randn(5, 12)
    assert model.active_peft_config is lora
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


# Rows with adapters of their own


@pytest.mark.parametrize("kind", OURS)
def test_each_row_with_its_adapter(kind: str) -> None:
    model = adapted(kind)
    model.add_adapter("second", config(block_size=6, target_modules=["q_proj", "k_proj"]))
    expected = []
    for row, name in enumerate(["second", "default"]):
        model.set_adapter(name)
        expected.append(logits(model, IDS[row : row + 1]))
    with model.disable_adapter():
        expected.append(logits(model, IDS[2:]))
    model.base_model.set_adapter(["default", "second"])
    y = logits(model)
    with torch.no_grad():
        rows = model(input_ids=IDS, adapter_names=["second", "default", "__base__"]).logits
    torch.testing.assert_close(rows, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(model), y)


def test_rows_with_heads_and_beams() -> None:
    model = adapted("patched", llama_classifier(), task_type="SEQ_CLS")
    model.base_model.model.score.modules_to_save["default"].weight.data.mul_(3)
    y = logits(model)
    with torch.no_grad():
        rows = model(input_ids=IDS, adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(rows[::2], y[::2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rows[1:2], logits(llama_classifier(), IDS[1:2]), atol=1e-5, rtol=1e-4)

    model = adapted("patched", modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    head.data = head.data.flip(0)
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 4}
    expected = model.generate(input_ids=IDS[:1], **options)
    with model.disable_adapter():
        plain = model.generate(input_ids=IDS[:1], **options)
    rows = model.generate(input_ids=IDS[[0, 0]], adapter_names=["default", "__base__"], **options)
    assert not torch.equal(expected, plain)
    torch.testing.assert_close(rows, torch.cat([expected, plain]))


def test_what_rows_refuse() -> None:
    model = adapted("applied")
    with pytest.raises(AdapterNotFoundError, match="'third'; there are: default"):
        model(input_ids=IDS, adapter_names=["default", "third", "default"])
    with pytest.raises(ValueError, match="2 adapter names for a batch of 3"):
        model(input_ids=IDS, adapter_names=["default", "default"])
    model.train()
    with pytest.raises(AdapterStateError, match="eval"):
        model(input_ids=IDS, adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(AdapterStateError, match="merged"):
        model(input_ids=IDS, adapter_names=["default"] * 3)
    model.unmerge_adapter()
    check(model, ["default"])


class _Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.head = (
            nn.Linear(12, 24),
            nn.Sequential(nn.Linear(24, 24), nn.ReLU()),
            nn.Linear(24, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.first(x))
        return self.head(input=x) if PEFT >= (0, 20) else self.head(x)  # older wrappers want it by its place


def test_modules_that_are_trained_whole_in_threads() -> None:
    """What holds for a call is written into no wrapper, of whatever class the module is."""
    torch.manual_seed(0)
    whole = config(block_size=6, target_modules=["first"], modules_to_save=["mid", "head"])
    model = peft.get_peft_model(_Headed(), whole, "one")
    model.add_adapter("two", whole)
    model.add_adapter("bare", config(block_size=6, target_modules=["first"]))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(2 + ("two" in name))
    c3a_triton.apply(model)
    x = torch.randn(4, 12)
    names = ["one", "two", "bare", "__base__"]

    def disabled(meanwhile: Callable[[], object]) -> Tensor:
        with torch.no_grad(), model.eval().disable_adapter():
            meanwhile()
            return model(x)

    with torch.no_grad():
        single = []
        for name in names[:3]:
            model.eval().set_adapter(name)
            single.append(model(x))
        for active in ("bare", "one"):
            model.set_adapter(active)
            base = disabled(lambda: None)
            rows = torch.stack([y[row] for row, y in enumerate([*single, base])])
            torch.testing.assert_close(model(x, adapter_names=names), rows)
        model.base_model.disable_adapter_layers()
        torch.testing.assert_close(model(x, adapter_names=names), base)
        model.base_model.enable_adapter_layers()
        # Two threads that enter in one order and leave in the same; a third that names its adapters meanwhile.
        begun, left = threading.Event(), threading.Event()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(disabled, lambda: begun.wait(60))

            def second() -> Tensor:
                def meanwhile() -> None:
                    begun.set()
                    left.wait(60)

                return disabled(meanwhile)

            later = pool.submit(second)
            torch.testing.assert_close(first.result(), base)
            torch.testing.assert_close(model(x, adapter_names=names), rows)
            left.set()
            torch.testing.assert_close(later.result(), base)
        torch.testing.assert_close(model(x), single[0])
        with model.disable_adapter():
            copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(x), single[0])


def test_an_adapter_is_not_deleted_from_under_its_rows() -> None:
    model = peft.get_peft_model(_Headed(), config(block_size=6, target_modules=["first"]), "one").eval()
    model.add_adapter("two", config(block_size=6, target_modules=["first"]))
    c3a_triton.apply(model)
    x, seen = torch.randn(3, 12), []
    handle = model.base_model.model.first.register_forward_pre_hook(lambda *_: seen.append(model.delete_adapter("two")))
    with pytest.raises(AdapterStateError, match="rows are computed with the adapter 'two'"):
        model(x, adapter_names=["two"] * 3)
    handle.remove()
    assert "two" in model.peft_config
    if RECENT:
        model.delete_adapter("two")


# Layers that are never called, and what is left of a model


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.called(x), self.read.weight)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("training", [True, False])
def test_layers_that_are_never_called_are_told_of_once(training: bool, kind: str) -> None:
    model = adapted(kind, Reading(), target_modules=["called", "read"]).train(training)
    model = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.randn(2, 8)).sum().backward()
    assert len(said) == 1
    assert re.search(r"never called by a forward of Reading.*: \S*read\. .*PEFT merges it", str(said[0].message))


@pytest.mark.parametrize("verb", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("kind", OURS)
def test_nothing_is_left_on_the_model(kind: str, verb: str) -> None:
    model = getattr(adapted(kind), verb)()
    assert not [name for name, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]
    y = logits(model)
    c3a_triton.apply(model, {"block_size": 4, "target_modules": TARGETS, "init_weights": "gaussian"})
    assert not torch.allclose(logits(model), y)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS, adapter_names=["__base__"] * len(IDS)).logits, y)
