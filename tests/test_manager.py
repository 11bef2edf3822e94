"""`AdapterManager` on whole models: injection, activation, merging, saving, removal, and failures without a trace."""

import copy
import io
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import accelerate
import oracle
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from safetensors.torch import load_file, save_file
from tiny_models import IDS, MLP, bert_classifier, gpt2, llama, llama_classifier, logits
from torch import Tensor, nn

from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.adapters.manager import AdapterManager
from c3a_triton.api import apply, load_adapter
from c3a_triton.bases.linear_like import geometry
from c3a_triton.errors import (
    AdapterNotFoundError,
    AdapterStateError,
    BackendError,
    C3AError,
    CheckpointError,
    ConfigError,
    ShapeError,
)
from c3a_triton.files.block_sizes import check_block_size
from c3a_triton.files.config import C3AConfig

QV = C3AConfig(block_size=4, target_modules=["q_proj", "v_proj"])
ALL = C3AConfig(block_size=2, target_modules="all-linear")


def adapted(model: nn.Module | None = None, config: C3AConfig = QV, **others: C3AConfig) -> nn.Module:
    """A model with an adapter "default", and others, of kernels large enough to show."""
    model = apply(llama() if model is None else model, config)
    for name, other in others.items():
        model.c3a.add_adapter(name, other)
    torch.manual_seed(1)
    for _, layer in model.c3a.layers():
        for kernel in layer.c3a_kernel.values():
            nn.init.normal_(kernel)
    return model


def dense(model: nn.Module, *names: str) -> nn.Module:
    """A copy with these adapters in its weights, by the dense definition, and without this library."""
    model = copy.deepcopy(model)
    for name, layer in list(model.c3a.layers()):
        parent, _, child = name.rpartition(".")
        base = layer.base_layer
        with torch.no_grad():
            for adapter in names:
                if adapter in layer.c3a_kernel:
                    update = oracle.dense(layer.c3a_kernel[adapter]).to(base.weight.dtype)
                    base.weight += (
                        update.T if base.weight.shape != update.shape or type(base).__name__ == "Conv1D" else update
                    )
        setattr(model.get_submodule(parent), child, base)
    return model


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that a failed call must leave as it was."""
    manager = model.__dict__.get("c3a")
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "manager": manager
        and (id(manager), manager.adapters, manager.active_adapters, manager.backend, manager.summary()),
        "active": [
            (m.active_adapters, m.merged_adapters, m._kernels) for m in model.modules() if isinstance(m, C3ALinear)
        ],
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    values, values_before = after.pop("values"), before.pop("values")
    assert after == before
    assert values.keys() == values_before.keys()
    assert all(torch.equal(values[name], values_before[name]) for name in values)


# Injection


def test_applying_freezes_all_but_the_adapter_and_computes_the_dense_update() -> None:
    model = adapted()
    names = [f"model.layers.{i}.self_attn.{name}.c3a_kernel.default" for i in range(2) for name in ("q_proj", "v_proj")]
    assert trainable(model) == names
    assert isinstance(model.c3a, AdapterManager)
    assert not any("c3a." in name for name in model.state_dict())
    torch.testing.assert_close(logits(model), logits(dense(model, "default")))
    assert (logits(model) - logits(dense(model))).abs().max() > 0.01


def test_conv1d_models() -> None:
    model = adapted(gpt2(), C3AConfig(block_size=4, target_modules="all-linear"))
    assert len(list(model.c3a.layers())) == 8
    torch.testing.assert_close(logits(model), logits(dense(model, "default")))


def test_training_moves_only_the_adapter() -> None:
    model = apply(llama(), C3AConfig(block_size=4, target_modules=r".*(proj|lm_head)", init_weights=True))
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "c3a_kernel" not in name}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())


def test_a_model_stays_in_the_mode_it_was_in() -> None:
    for training in (True, False):
        model = llama_classifier().train(training)
        apply(model, C3AConfig(block_size=4, task_type="SEQ_CLS"))
        assert {module.training for module in model.modules()} == {training}


def test_the_example_of_pefts_documentation() -> None:
    # Two keys match layer 0's q_proj: the first one decides, so that the order of the keys does.
    sizes = {}
    for pattern in ({"q_proj": 12, "model.layers.0.*": 6}, {"model.layers.0.*": 6, "q_proj": 12}):
        config = C3AConfig(block_size=4, target_modules=["q_proj", "v_proj"], block_size_pattern=pattern)
        model = apply(llama(), config)
        sizes[next(iter(pattern))] = {
            name[13:].replace(".self_attn", ""): layer.block_size["default"] for name, layer in model.c3a.layers()
        }
        q_row = next(line for line in model.c3a.summary().splitlines() if "layers.0.self_attn.q_proj" in line)
        assert f"{sizes[next(iter(pattern))]['0.q_proj']}  {next(iter(pattern))}" in q_row
    assert sizes == {
        "q_proj": {"0.q_proj": 12, "0.v_proj": 6, "1.q_proj": 12, "1.v_proj": 4},
        "model.layers.0.*": {"0.q_proj": 6, "0.v_proj": 6, "1.q_proj": 12, "1.v_proj": 4},
    }


def _add(**config: object) -> Callable[[nn.Module], object]:
    return lambda model: apply(model, C3AConfig(**({"block_size": 4, "target_modules": ["q_proj"]} | config)), "new")


FAILURES: dict[str, tuple[type[C3AError], str, Callable[[nn.Module], object]]] = {
    "block size of a late layer": (
        ShapeError,
        "mlp.gate_proj: block_size=5",
        _add(target_modules="all-linear", block_size_pattern={"gate_proj": 5}),
    ),
    "not linear": (ConfigError, "LlamaMLP", _add(target_modules=["q_proj", "mlp"])),
    "no target": (ConfigError, "matches no module", _add(target_modules=["nope"])),
    "a name with a dot": (ConfigError, "dot", lambda model: apply(model, QV, "a.b")),
    "a reserved name": (ConfigError, "reserved", lambda model: apply(model, QV, "items")),
    "unknown backend": (BackendError, "bogus", lambda model: apply(model, QV, "new", backend="bogus")),
    "a list trained whole": (
        ConfigError,
        "layers is a ModuleList",
        _add(target_modules=["lm_head"], modules_to_save=["layers"]),
    ),
    "another method": (ConfigError, "LORA", lambda model: apply(model, {"peft_type": "LORA", "r": 8}, "new")),
    "no folder": (CheckpointError, "no folder", lambda model: load_adapter(model, "/nowhere", "new")),
}


@pytest.mark.parametrize("start", ["bare", "adapted"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_the_model_as_it_was(failure: str, start: str) -> None:
    error, message, call = FAILURES[failure]
    model = llama() if start == "bare" else adapted()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert_unchanged(model, before)
    assert ("c3a" in model.__dict__) == (start == "adapted")


def test_a_failure_while_layers_are_built_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    uniform, left = nn.init.uniform_, iter(range(2))

    def uniform_twice(*args: object) -> None:
        if next(left, None) is None:
            raise MemoryError
        uniform(*args)

    monkeypatch.setattr(nn.init, "uniform_", uniform_twice)
    model = llama()
    before = snapshot(model)
    with pytest.raises(MemoryError):
        apply(model, QV)
    assert_unchanged(model, before)


@pytest.mark.parametrize("how", ["apply", "a further one", "load"])
def test_a_layer_is_looked_at_once(tmp_path: Path, how: str) -> None:
    """Its widths are found once on the way from the configuration to the adapted layer, and b is held against them."""
    model = adapted() if how == "a further one" else llama()
    adapted().c3a.save_pretrained(tmp_path)
    calls = {
        "apply": lambda: apply(model, QV),
        "a further one": lambda: model.c3a.add_adapter("other", QV),
        "load": lambda: load_adapter(model, tmp_path),
    }
    looked_at: list[nn.Module] = []
    checked: list[int] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is geometry.__code__:
            looked_at.append(frame.f_locals["module"])
        elif event == "call" and frame.f_code is check_block_size.__code__:
            checked.append(frame.f_locals["block_size"])

    sys.setprofile(note)
    try:
        calls[how]()
    finally:
        sys.setprofile(None)
    layers = [layer for _, layer in model.c3a.layers()]
    assert len(layers) == 4
    assert all(sum(module is layer.base_layer for module in looked_at) == 1 for layer in layers)
    assert checked == ([] if how == "load" else [4] * 4)  # a file's sizes have been held against its tensors


def test_warnings_that_are_errors_leave_the_model_as_it_was() -> None:
    model = llama()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="k_proj"):
            apply(model, C3AConfig(block_size=4, block_size_pattern={"k_proj": 2}))
    assert_unchanged(model, before)


def test_a_taken_name() -> None:
    model = adapted()
    for call in (lambda: model.c3a.add_adapter("default", QV), lambda: model.c3a.load_adapter("/nowhere", "default")):
        with pytest.raises(AdapterStateError, match="'default' already"):
            call()


# Several adapters


def test_a_second_adapter_waits_until_it_is_set() -> None:
    model = adapted()
    before, names = logits(model), trainable(model)
    model.c3a.add_adapter("all", ALL)
    assert torch.equal(logits(model), before)
    assert trainable(model) == names
    assert model.c3a.active_adapters == ["default"]
    model.c3a.set_adapter("all")
    assert len(trainable(model)) == 14
    assert all(name.endswith(".all") for name in trainable(model))
    torch.testing.assert_close(logits(model), logits(dense(model, "all")))
    model.c3a.set_adapter(["default", "all"])
    assert len(trainable(model)) == 18
    torch.testing.assert_close(logits(model), logits(dense(model, "default", "all")))
    assert (logits(model) - before).abs().max() > 0.01
    model.c3a.set_adapter("default", inference_mode=True)
    assert trainable(model) == []
    assert torch.equal(logits(model), before)


def test_unknown_names_list_the_known() -> None:
    model = adapted(two=ALL)
    calls: list[Callable[[], object]] = [
        lambda: model.c3a.set_adapter("typo"),
        lambda: model.c3a.set_adapter(["two", "typo"]),
        lambda: model.c3a.delete_adapter("typo"),
        lambda: model.c3a.rename_adapter("typo", "new"),
        lambda: model.c3a.merge_adapter(["typo"]),
        lambda: model.c3a.merge_and_unload(adapter_names=["typo"]),
        lambda: model.c3a.state_dict("typo"),
        lambda: model.c3a.save_pretrained("/nowhere", "typo"),
        lambda: model.c3a.using(["two", "typo"]).__enter__(),
    ]
    before = snapshot(model)
    for call in calls:
        with pytest.raises(AdapterNotFoundError, match="no adapter 'typo'; there are: 'default', 'two'"):
            call()
    assert_unchanged(model, before)


def test_deleting() -> None:
    model = adapted(b=ALL, c=QV)
    base = logits(dense(model))
    model.c3a.delete_adapter("b")
    assert list(model.c3a.adapters) == ["default", "c"]
    assert model.c3a.active_adapters == ["default"]
    assert not any(name.endswith(".b") for name in model.state_dict())
    with pytest.warns(UserWarning, match="'c' is active now"):
        model.c3a.delete_adapter("default")
    assert all(name.endswith(".c") for name in trainable(model))
    torch.testing.assert_close(logits(model), logits(dense(model, "c")))
    model.c3a.merge_adapter()
    with pytest.raises(AdapterStateError, match="'c' is merged"):
        model.c3a.delete_adapter("c")
    model.c3a.unmerge_adapter()
    model.c3a.delete_adapter("c")
    assert torch.equal(logits(model), base)
    assert trainable(model) == model.c3a.active_adapters == []
    model.c3a.add_adapter("again", QV)
    assert model.c3a.active_adapters == ["again"]
    assert len(trainable(model)) == 4


def test_deleting_one_of_two_leaves_the_other_trained(tmp_path: Path) -> None:
    adapted().c3a.save_pretrained(tmp_path)
    model = adapted(two=QV)
    model.c3a.load_adapter(tmp_path, "loaded")
    model.c3a.set_adapter(["loaded", "two"])
    model.c3a.delete_adapter("two")
    assert len(trainable(model)) == len(list(model.c3a.layers()))
    model.c3a.set_adapter(["loaded", "default"], inference_mode=True)
    model.c3a.delete_adapter("loaded")
    assert trainable(model) == []


def test_renaming() -> None:
    model = adapted(llama_classifier(), C3AConfig(block_size=4, modules_to_save=["score"]), two=QV)
    parameters, before = [id(p) for p in model.parameters() if p.requires_grad], logits(model)
    model.c3a.rename_adapter("default", "new")
    assert list(model.c3a.adapters) == ["new", "two"]
    assert model.c3a.active_adapters == ["new"]
    assert {name.partition(".new")[1] for name in trainable(model)} == {".new"}
    assert [id(p) for p in model.parameters() if p.requires_grad] == parameters
    assert torch.equal(logits(model), before)
    with pytest.raises(AdapterStateError, match="'two' already"):
        model.c3a.rename_adapter("new", "two")


def test_disabling() -> None:
    model = adapted(two=ALL)
    model.c3a.set_adapter("two", inference_mode=True)
    y, base, names = logits(model), logits(dense(model)), trainable(model)
    with model.c3a.disable_adapter():
        assert torch.equal(logits(model), base)
        with model.c3a.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), y)
    assert trainable(model) == names == []
    model.c3a.set_adapter("two")
    names = trainable(model)
    with model.c3a.disable_adapter():
        model.c3a.set_adapter("default")
    assert trainable(model) == trainable(adapted())
    model.c3a.set_adapter("two")
    with pytest.raises(ZeroDivisionError), model.c3a.disable_adapter():
        _ = 1 / 0
    assert torch.equal(logits(model), y)
    assert trainable(model) == names


def test_what_is_set_while_disabled_holds_afterwards() -> None:
    model = adapted(two=ALL)
    model.c3a.freeze_for_inference()
    with model.c3a.disable_adapter():
        model.c3a.set_adapter("default")
    assert trainable(model) == trainable(adapted())
    with model.c3a.disable_adapter():
        model.c3a.set_adapter("two", inference_mode=True)
    assert trainable(model) == []
    with model.c3a.disable_adapter():
        model.c3a.rename_adapter("two", "new")
    assert trainable(model) == []


def test_what_is_added_while_disabled_is_disabled() -> None:
    model = adapted()
    base = logits(dense(model))
    model.c3a.delete_adapter("default")
    with model.c3a.disable_adapter():
        with model.c3a.disable_adapter():
            model.c3a.add_adapter("more", ALL)
        assert torch.equal(logits(model), base)
    assert all("more" in layer.active_adapters and not layer.disable_adapters for _, layer in model.c3a.layers())
    assert not torch.equal(logits(model), base)
    assert len(trainable(model)) == len(list(model.c3a.layers()))


def test_freezing_for_inference_freezes_all_that_adapters_train() -> None:
    bert = C3AConfig(block_size=4, target_modules=["query"], modules_to_save=["classifier"], bias="all")
    model = adapted(bert_classifier(), bert, two=C3AConfig(block_size=4, target_modules=["query"]))
    model.c3a.set_adapter(["default", "two"])
    names = trainable(model)
    assert {name.rpartition(".")[2] for name in names} == {"default", "two", "weight", "bias"}
    model.c3a.freeze_for_inference(False)
    assert trainable(model) == names
    with model.c3a.disable_adapter():
        model.c3a.freeze_for_inference()
    assert trainable(model) == []
    model.c3a.delete_adapter("two")
    assert trainable(model) == []


@pytest.mark.parametrize("names", [["default", "later", "default"], ["later", "default", "later"]], ids="-".join)
def test_adapters_added_after_a_cast_share_a_batch_and_are_combined(names: list[str]) -> None:
    config = C3AConfig(block_size=4, target_modules=["embed_tokens", "q_proj"], init_weights="gaussian")
    model = adapted(llama(), config).double()
    model.c3a.add_adapter("later", config)
    assert {w.dtype for _, layer in model.c3a.layers() for w in layer.c3a_kernel.values()} == {
        torch.float32,
        torch.float64,
    }
    alone = {}
    for name in ("default", "later"):
        model.c3a.set_adapter(name)
        alone[name] = logits(model)
    ids = IDS[:1].expand(3, -1)
    with model.c3a.using(names):
        rows = logits(model, ids)
    for row, name in enumerate(names):
        torch.testing.assert_close(rows[row], alone[name][0])
    model.c3a.add_weighted_adapter(names[:2], [1.0, 1.0], "sum")
    model.c3a.set_adapter(["default", "later"])
    both = logits(model)
    model.c3a.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)


def test_a_combination_is_summed_in_float32() -> None:
    model = adapted(two=QV).bfloat16()
    model.c3a.add_weighted_adapter(["default", "two"], [0.5, -2.0], "sum")
    for _, layer in model.c3a.layers():
        a, b, total = (layer.c3a_kernel[name].detach().float() for name in ("default", "two", "sum"))
        torch.testing.assert_close(total, 0.5 * a - 2.0 * b)


def test_rows_of_a_batch() -> None:
    model = adapted(two=ALL)
    single = {"__base__": dense(model), "default": dense(model, "default"), "two": dense(model, "two")}
    names = ["two", "__base__", "default"]
    with model.c3a.using(names):
        y = logits(model)
        doubled = logits(model, IDS.repeat_interleave(2, dim=0))
        four = IDS[[0, 0, 1, 2]]
        with pytest.raises(ShapeError, match=r"3 adapter names for a batch of 4 rows"):
            logits(model, four)
    for row, name in enumerate(names):
        torch.testing.assert_close(y[row : row + 1], logits(single[name], IDS[row : row + 1]))
    torch.testing.assert_close(doubled[1::2], y)
    torch.testing.assert_close(logits(model), logits(single["default"]))
    with model.c3a.using(names):
        text = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, num_beams=2)
    for row, name in enumerate(names):
        alone = single[name].generate(input_ids=IDS[row : row + 1], max_new_tokens=4, do_sample=False, num_beams=2)
        assert torch.equal(text[row : row + 1], alone)
    model.c3a.merge_adapter()
    with pytest.raises(AdapterStateError, match=r"\['default'\] are merged"), model.c3a.using(names):
        pass
    with pytest.raises(ConfigError), model.c3a.using("two"):
        pass


def test_rows_through_modules_trained_whole() -> None:
    model = adapted(
        bert_classifier(),
        C3AConfig(block_size=4, task_type="SEQ_CLS"),
        two=C3AConfig(block_size=4, task_type="SEQ_CLS"),
    )
    for factor, copies in enumerate(model.classifier.modules_to_save.values(), start=2):
        copies.weight.data.mul_(factor)
    with model.c3a.using(["two", "default", "__base__"]):
        y = logits(model)
    for row, name in enumerate(["two", "default"]):
        model.c3a.set_adapter(name)
        torch.testing.assert_close(y[row], logits(model)[row])
    with model.c3a.disable_adapter():
        torch.testing.assert_close(y[2], logits(model)[2])


# Biases, whole modules, tied weights


def test_biases() -> None:
    kernels = ["first.c3a_kernel.default", "second.c3a_kernel.default"]
    config = {"block_size": 2, "target_modules": "all-linear"}
    assert trainable(apply(MLP(), C3AConfig(**config, bias="c3a_only"))) == [
        "first.base_layer.bias",
        kernels[0],
        "second.base_layer.bias",
        kernels[1],
    ]
    model = apply(MLP(), C3AConfig(**config, bias="all"))
    assert "norm.bias" in trainable(model)
    assert "norm.weight" not in trainable(model)
    assert len(trainable(model)) == 5
    with pytest.raises(ConfigError, match="'default' trains biases"):
        model.c3a.add_adapter("b", C3AConfig(**config, bias="c3a_only"))
    model.c3a.add_adapter("b", C3AConfig(**config))
    model.c3a.set_adapter("b")
    assert trainable(model) == ["first.c3a_kernel.b", "second.c3a_kernel.b"]
    model.c3a.set_adapter("default")
    assert len(trainable(model)) == 5
    with pytest.warns(UserWarning, match="biases"), model.c3a.disable_adapter():
        pass
    assert len(trainable(model)) == 5
    # A module that is trained whole has its bias in its copy.
    model = apply(MLP(), C3AConfig(block_size=2, target_modules=["first"], modules_to_save=["second"], bias="all"))
    assert [name for name in trainable(model) if "second" in name] == [
        "second.modules_to_save.default.weight",
        "second.modules_to_save.default.bias",
    ]


def test_modules_trained_whole() -> None:
    model = adapted(llama_classifier(), C3AConfig(block_size=4, task_type="SEQ_CLS"), two=QV)
    assert model.c3a.adapters["default"].modules_to_save == ["score"]
    assert trainable(model)[-1] == "score.modules_to_save.default.weight"
    base = logits(dense(model, "default"))
    model.score.modules_to_save["default"].weight.data.mul_(2)
    torch.testing.assert_close(logits(model), 2 * base)
    model.c3a.set_adapter("two")
    assert not any("score" in name for name in trainable(model))
    with model.c3a.disable_adapter():
        torch.testing.assert_close(logits(model), logits(dense(model)))
    model.c3a.add_adapter("three", C3AConfig(block_size=4, task_type="SEQ_CLS"))
    before = snapshot(model)
    with pytest.raises(AdapterStateError, match="'default' and 'three' each have a copy"):
        model.c3a.set_adapter(["default", "three"])
    assert_unchanged(model, before)


def test_tied_embeddings_are_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"lm_head.weight is one tensor with model.embed_tokens.weight \(tied\)"):
        model = adapted(llama(tied=True), C3AConfig(block_size=4, target_modules=["lm_head", "q_proj"]))
    embeddings = model.model.embed_tokens.weight.detach().clone()
    with pytest.warns(UserWarning, match="tied.*merging changes both"):
        model.c3a.merge_adapter()
    assert not torch.equal(model.model.embed_tokens.weight, embeddings)
    model.c3a.unmerge_adapter()
    assert torch.equal(model.model.embed_tokens.weight, embeddings)


def test_torchs_fused_encoder_layer_does_not_bypass_the_adapter() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        base = encoder(x)
        apply(encoder, C3AConfig(block_size=4, target_modules=["linear1", "linear2"]))
        for _, layer in encoder.c3a.layers():
            nn.init.normal_(layer.c3a_kernel["default"], std=3)
        y = encoder(x)
        torch.testing.assert_close(y, dense(encoder, "default")(x), atol=1e-5, rtol=1e-5)
    assert (y - base).abs().max() > 0.01


def test_a_module_is_adapted_or_trained_whole() -> None:
    model = adapted(llama_classifier(), C3AConfig(block_size=4, task_type="SEQ_CLS"))
    before = snapshot(model)
    with pytest.raises(ConfigError, match="score cannot be adapted: another adapter trains it"):
        model.c3a.add_adapter("new", C3AConfig(block_size=1, target_modules=["score"]))
    with pytest.raises(ConfigError, match=r"another adapter has layers in model\.layers\.0\.self_attn"):
        model.c3a.add_adapter("new", C3AConfig(block_size=4, target_modules=["up_proj"], modules_to_save=["self_attn"]))
    assert_unchanged(model, before)


# Merging and removal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_a_model(dtype: torch.dtype) -> None:
    model = adapted(llama().to(dtype), two=ALL)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(dense(model, "default", "two"))
    model.c3a.set_adapter(["default", "two"])
    y = logits(model)
    model.c3a.merge_adapter(["default"])
    with pytest.warns(UserWarning, match=r"\['default'\] are merged already; merging the others too"):
        model.c3a.merge_adapter()
    tolerance = {"atol": 0.05, "rtol": 0.05} if dtype.itemsize == 2 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(logits(model), y, **tolerance)
    torch.testing.assert_close(logits(model), expected, **tolerance)
    with pytest.warns(UserWarning, match="nothing to do"):
        model.c3a.merge_adapter()
    model.c3a.unmerge_adapter()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match="nothing is merged"):
        model.c3a.unmerge_adapter()


def test_setting_or_disabling_while_merged_unmerges() -> None:
    model = adapted(two=ALL)
    base, two = logits(dense(model)), logits(dense(model, "two"))
    model.c3a.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        model.c3a.set_adapter("two")
    torch.testing.assert_close(logits(model), two)
    model.c3a.merge_adapter()
    with model.c3a.disable_adapter():
        assert torch.equal(logits(model), base)
    torch.testing.assert_close(logits(model), two)
    model.c3a.merge_adapter(keep_base=None)
    before = snapshot(model)
    for call in (lambda: model.c3a.set_adapter("default"), model.c3a.unmerge_adapter, model.c3a.unload):
        with pytest.raises(AdapterStateError, match=r"model\.layers\.0.*keep_base=None"):
            call()
    assert_unchanged(model, before)


def test_a_merge_that_one_layer_refuses_changes_no_layer() -> None:
    model = adapted()
    layers = dict(model.c3a.layers())
    layers["model.layers.1.self_attn.v_proj"].c3a_kernel["default"].data[0, 0, 0] = float("nan")
    before = snapshot(model)
    before["values"].pop("model.layers.1.self_attn.v_proj.c3a_kernel.default")
    for call in (model.c3a.merge_adapter, model.c3a.merge_and_unload):
        with pytest.raises(AdapterStateError, match=r"layers\.1\.self_attn\.v_proj.*not finite"):
            call(safe_merge=True)
    after = snapshot(model)
    after["values"].pop("model.layers.1.self_attn.v_proj.c3a_kernel.default")
    assert all(torch.equal(after["values"][name], value) for name, value in before["values"].items())
    assert not any(layer.merged for layer in layers.values())
    model.c3a.set_adapter([])
    layers["model.layers.1.self_attn.v_proj"].c3a_kernel["default"].data.zero_()
    model.c3a.merge_adapter("default")
    layers["model.layers.1.self_attn.v_proj"].base_layer.weight.data.add_(1)
    with pytest.raises(AdapterStateError, match=r"layers\.1\.self_attn\.v_proj.*changed after"):
        model.c3a.unmerge_adapter()
    assert all(layer.merged for layer in layers.values())


def test_merge_and_unload(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(two=ALL)
    names = set(llama().state_dict())
    expected = logits(dense(model, "two"))
    manager = model.c3a
    merged = manager.merge_and_unload(progressbar=True, adapter_names=["two"])
    assert "merging 14/14" in capsys.readouterr().err
    assert merged is model
    torch.testing.assert_close(logits(model), expected)
    assert not hasattr(model, "c3a")
    assert set(model.state_dict()) == names
    assert not any(isinstance(module, C3ALinear) for module in model.modules())
    assert manager.adapters == {}
    apply(model, QV)


def test_what_was_merged_for_good_is_the_base_of_what_is_merged_next() -> None:
    """Also where somebody still holds the layers that were taken out, and where another model has the same weight."""
    model, other = llama(), llama()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            other.get_submodule(name).weight = module.weight
    apply(model, QV)
    held = dict(model.c3a.layers())
    model.c3a.merge_adapter()
    model.c3a.merge_and_unload()
    base = copy.deepcopy(model.state_dict())
    for first, second in ((model, other), (other, model)):
        apply(first, QV)
        first.c3a.merge_adapter()
        first.c3a.unmerge_adapter()
        assert all(map(torch.equal, first.c3a.unload().state_dict().values(), base.values()))
        apply(first, QV).c3a.merge_adapter()
        apply(second, QV).c3a.merge_and_unload()
        with pytest.raises(AdapterStateError, match=r"or others for good \(merge_and_unload\) into the same weight"):
            first.c3a.unmerge_adapter()
        first.c3a.merge_and_unload()
        base = copy.deepcopy(first.state_dict())
    with pytest.raises(AdapterStateError, match="the base weight is gone"):
        next(iter(held.values())).unmerge()


def test_merge_and_unload_keeps_what_was_trained_whole() -> None:
    model = adapted(llama_classifier(), C3AConfig(block_size=4, task_type="SEQ_CLS"))
    model.score.modules_to_save["default"].weight.data.mul_(2)
    y = logits(model)
    model.c3a.merge_and_unload()
    torch.testing.assert_close(logits(model), y)
    assert type(model.score) is nn.Linear


def test_embeddings_that_are_no_longer_tied() -> None:
    with pytest.warns(UserWarning, match="copy of its own"):
        model = adapted(llama(tied=True), C3AConfig(block_size=4, modules_to_save=["lm_head"]))
    with pytest.warns(UserWarning, match="tie_word_embeddings=False"):
        model.c3a.merge_and_unload()
    assert model.config.tie_word_embeddings is False
    model = adapted(llama(tied=True))
    model.c3a.merge_and_unload()
    assert model.config.tie_word_embeddings is True


def test_unload_gives_the_base_back() -> None:
    bare = llama_classifier()
    model = adapted(copy.deepcopy(bare), C3AConfig(block_size=4, task_type="SEQ_CLS"))
    model.score.modules_to_save["default"].weight.data.mul_(2)
    model.c3a.merge_adapter()
    assert model.c3a.unload() is model
    assert not hasattr(model, "c3a")
    assert list(model.state_dict()) == list(bare.state_dict())
    assert all(torch.equal(value, bare.state_dict()[name]) for name, value in model.state_dict().items())


def test_layers_under_two_names_are_unloaded_everywhere() -> None:
    model = MLP()
    model.second = nn.Linear(24, 24)
    model.third = model.second
    with pytest.warns(UserWarning, match="second and third are one module"):
        apply(model, C3AConfig(block_size=2, target_modules=["second"]))
    model.third = model.second
    model.c3a.unload()
    assert model.third is model.second
    assert type(model.third) is nn.Linear


# Copies and files


def _through_a_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _through_a_file])
def test_a_copys_manager_drives_the_copy(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted(two=ALL)
    model.c3a.merge_adapter()
    y, default = logits(model), logits(dense(model))
    other = duplicate(model)
    assert other.c3a.model is other
    other.c3a.unmerge_adapter()
    other.c3a.set_adapter("two")
    assert (logits(other) - y).abs().max() > 0.01
    assert torch.equal(logits(model), y)
    assert model.c3a.active_adapters == ["default"]
    other.c3a.unload()
    assert hasattr(model, "c3a")
    assert torch.equal(logits(model), default)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter with a head and biases, of a classifier."""
    config = C3AConfig(
        block_size=4,
        task_type="SEQ_CLS",
        bias="c3a_only",
        block_size_pattern={"layer.0.*key": 8},
        target_modules=["query", "key"],
    )
    model = adapted(bert_classifier(), config)
    model.classifier.modules_to_save["default"].weight.data.mul_(2)
    model.bert.encoder.layer[0].attention.self.query.base_layer.bias.data.add_(0.5)
    model.c3a.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits.pt")
    return tmp_path / "adapter"


def test_saving_and_loading(folder: Path) -> None:
    bare, random = bert_classifier(), torch.get_rng_state()
    model = load_adapter(bare, folder)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(logits(model), torch.load(folder.parent / "logits.pt"))
    assert trainable(model) == []
    assert model.c3a.adapters["default"].block_size_pattern == {"layer.0.*key": 8}
    assert "layer.0.*key" in model.c3a.summary()
    assert model.c3a.active_adapters == ["default"]
    assert set(model.c3a.state_dict()) == {
        *(f"bert.encoder.layer.0.attention.self.{name}.c3a_kernel" for name in ("query", "key")),
        *(f"bert.encoder.layer.0.attention.self.{name}.base_layer.bias" for name in ("query", "key")),
        "classifier.weight",
        "classifier.bias",
    }
    model = load_adapter(bert_classifier(), folder, is_trainable=True)
    assert len(trainable(model)) == 6
    model = apply(bert_classifier(), C3AConfig(block_size=2))
    names = trainable(model)
    load_adapter(model, folder, "second")
    assert trainable(model) == names
    model.c3a.set_adapter("second")
    torch.testing.assert_close(logits(model), torch.load(folder.parent / "logits.pt"))


class Foreign(nn.Module):
    """A linear layer of somebody's own class."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 4
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class OwnLinear(nn.Linear):
    """PEFT takes it, as every nn.Linear."""


@pytest.mark.parametrize(
    ("model", "target", "named"),
    [
        (gpt2, "c_attn", r"2 others \(transformer.h.0.attn.c_attn, transformer.h.1.attn.c_attn\)"),
        (lambda: nn.Sequential(Foreign()), "0", r"1 others \(0\)"),
        (lambda: nn.Sequential(OwnLinear(4, 4)), "0", None),
    ],
    ids=["Conv1D", "foreign", "subclass"],
)
def test_files_that_peft_cannot_load_are_told(
    tmp_path: Path, model: Callable[[], nn.Module], target: str, named: str | None
) -> None:
    model = apply(model(), C3AConfig(block_size=2, target_modules=[target]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.c3a.save_pretrained(tmp_path)
    assert len(told) == (named is not None)
    for warning in told:
        assert re.search(f"PEFT adapts linear layers alone.*{named}", str(warning.message))


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change an adapter's tensors and take its metadata away, as a stranger's tool may."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


PREFIX = "base_model.model."
ATTENTION = "bert.encoder.layer.0.attention.self"
KEY = f"{ATTENTION}.key.c3a_kernel"


def _put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({PREFIX + name: torch.zeros(shape)})


MISFITS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object]]] = {
    "a kernel is missing": (f"targets {ATTENTION}.key, for which", lambda t: t.pop(PREFIX + KEY)),
    "a kernel of another width": (r"in_features=16.*in_features=24", _put(KEY, 3, 2, 8)),
    "a layer that is not there": ("no bert.nope", _put("bert.nope.c3a_kernel", 3, 3, 8)),
    "a layer that is not linear": ("LayerNorm", _put("bert.embeddings.LayerNorm.c3a_kernel", 3, 3, 8)),
    "part of the head is missing": ("no classifier.bias", lambda t: t.pop(PREFIX + "classifier.bias")),
    "a head of another size": (r"classifier.weight has shape \[5, 24\]", _put("classifier.weight", 5, 24)),
    "an unknown tensor": ("takes bert.pooler.dense.weight", _put("bert.pooler.dense.weight", 24, 24)),
    "a bias of another size": (r"query.base_layer.bias has shape \[5\]", _put(f"{ATTENTION}.query.base_layer.bias", 5)),
}


@pytest.mark.parametrize("start", ["bare", "adapted"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_file_that_does_not_fit_changes_nothing(misfit: str, start: str, folder: Path) -> None:
    message, change = MISFITS[misfit]
    _edit(folder, change)
    model = bert_classifier() if start == "bare" else adapted(bert_classifier(), C3AConfig(block_size=4))
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, folder, "new")
    assert_unchanged(model, before)


def test_an_adapter_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit this model.*no bert\.encoder"):
        load_adapter(llama(), folder)


# Swapping the values of an adapter


def test_swapping_an_adapters_values_in_place(folder: Path) -> None:
    model = load_adapter(bert_classifier(), folder, is_trainable=True)
    own = model.c3a.state_dict()
    model.c3a.add_adapter("other", C3AConfig(block_size=2))
    for value in own.values():
        value.mul_(-1)

    def objects() -> list[tuple[object, ...]]:
        return [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()]

    before, config = objects(), model.c3a.adapters["default"]
    model.c3a.hotswap_adapter(folder)
    assert objects() == before
    assert model.c3a.adapters["default"] is config
    assert torch.equal(logits(model), torch.load(folder.parent / "logits.pt"))


def test_a_swap_needs_no_compilation(tmp_path: Path) -> None:
    model, other = adapted(), adapted(llama())
    for value in other.c3a.state_dict().values():
        value.mul_(2)
    other.c3a.save_pretrained(tmp_path)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    logits(compiled)
    compiled_before = len(graphs)
    compiled.c3a.hotswap_adapter(tmp_path)
    torch.testing.assert_close(logits(compiled), logits(other))
    assert len(graphs) == compiled_before


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_swap_that_does_not_fit_changes_nothing(misfit: str, folder: Path) -> None:
    model = load_adapter(bert_classifier(), folder)
    _edit(folder, MISFITS[misfit][1])
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="does not fit"):
        model.c3a.hotswap_adapter(folder)
    assert_unchanged(model, before)


def test_a_swap_of_what_is_merged_or_unknown_or_offloaded(tmp_path: Path) -> None:
    model = adapted()
    model.c3a.save_pretrained(tmp_path)
    with pytest.raises(AdapterNotFoundError, match="'other'"):
        model.c3a.hotswap_adapter(tmp_path, "other")
    model.c3a.merge_adapter()
    before = snapshot(model)
    with pytest.raises(AdapterStateError, match="merged"):
        model.c3a.hotswap_adapter(tmp_path)
    assert_unchanged(model, before)
    model.c3a.unmerge_adapter()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(AdapterStateError, match="offloaded: delete"):
        model.c3a.hotswap_adapter(tmp_path)


# Meta device and offloading


def test_a_model_on_meta() -> None:
    with torch.device("meta"):
        model = apply(llama(), C3AConfig(block_size=4))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    state = adapted().state_dict()
    model.to_empty(device="cpu").load_state_dict(state)
    model.model.rotary_emb = llama().model.rotary_emb
    assert torch.equal(logits(model), logits(adapted()))
    for _, layer in model.c3a.layers():
        layer.reset_c3a_parameters("default", "gaussian")
    assert not torch.equal(logits(model), logits(adapted()))


def test_loading_onto_meta_is_refused(tmp_path: Path) -> None:
    adapted().c3a.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = llama()
    with pytest.raises(CheckpointError, match="meta device"):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "c3a")


@pytest.fixture(params=["disk", "cpu"])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Offloads the first block of a Llama, and its head, as accelerate does for a GPU that is too small."""

    def offloaded(model: nn.Module) -> nn.Module:
        kept = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb")
        moved = ("model.layers.0", "lm_head")
        if request.param == "disk":
            device_map = dict.fromkeys(kept, "cpu") | dict.fromkeys(moved, "disk")
            model = dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        else:
            for name in moved:
                accelerate.cpu_offload(model.get_submodule(name), execution_device="cpu")
        assert model.model.layers[0].self_attn.q_proj.weight.is_meta
        return model

    return offloaded


OFFLOADED = C3AConfig(block_size=4, target_modules=["q_proj", "up_proj", "lm_head"])


def test_offloaded_before_it_is_adapted(offload: Callable[[nn.Module], nn.Module]) -> None:
    reference = adapted(config=OFFLOADED)
    model = apply(offload(llama()), OFFLOADED)
    assert not any(layer.c3a_kernel["default"].is_meta for _, layer in model.c3a.layers())
    for (_, layer), (_, other) in zip(model.c3a.layers(), reference.c3a.layers(), strict=True):
        layer.c3a_kernel["default"].data.copy_(other.c3a_kernel["default"])
    assert torch.equal(logits(model), logits(reference))
    model(input_ids=IDS, labels=IDS).loss.backward()
    reference(input_ids=IDS, labels=IDS).loss.backward()
    for (_, layer), (_, other) in zip(model.c3a.layers(), reference.c3a.layers(), strict=True):
        torch.testing.assert_close(layer.c3a_kernel["default"].grad, other.c3a_kernel["default"].grad)


def test_adapted_before_it_is_offloaded(offload: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    reference = adapted(config=OFFLOADED)
    model = offload(adapted(config=OFFLOADED))
    assert any(layer.c3a_kernel["default"].is_meta for _, layer in model.c3a.layers())
    assert torch.equal(logits(model), logits(reference))
    model.c3a.save_pretrained(tmp_path / "saved")
    other = load_adapter(llama(), tmp_path / "saved")
    assert torch.equal(logits(other), logits(reference))


@pytest.mark.parametrize("keep_base", ["cpu", "device"])
def test_merging_an_offloaded_model(offload: Callable[[nn.Module], nn.Module], keep_base: str) -> None:
    reference, model = adapted(config=OFFLOADED), adapted(offload(llama()), OFFLOADED)
    y, base = logits(model), logits(dense(reference))
    assert torch.equal(y, logits(reference))
    for other in (model, reference):
        other.c3a.merge_adapter(keep_base=keep_base)
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert torch.equal(logits(model), logits(reference))
    assert not torch.equal(logits(model), y)
    model.c3a.unmerge_adapter()
    assert torch.equal(logits(model), y)
    model.c3a.merge_and_unload()
    assert torch.equal(logits(model), logits(reference))
    reference.c3a.unmerge_adapter()
    with reference.c3a.disable_adapter():
        assert torch.equal(logits(reference), base)


def test_hooks_may_be_removed_again(offload: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted(offload(llama()), OFFLOADED)
    y = logits(model)
    remove_hook_from_module(model.model.layers[1], recurse=True)
    assert torch.equal(logits(model), y)


def test_what_is_offloaded_cannot_be_trained_whole(offload: Callable[[nn.Module], nn.Module]) -> None:
    model = offload(llama())
    with pytest.raises(ConfigError, match="lm_head is offloaded"):
        apply(model, C3AConfig(block_size=4, modules_to_save=["lm_head"]))
    assert not hasattr(model, "c3a")


# What it looks like


def test_backends() -> None:
    model = apply(llama(), QV, backend="torch")
    assert {layer.backend for _, layer in model.c3a.layers()} == {"torch"}
    y = logits(model)
    model.c3a.set_backend("reference", layers=["q_proj", "model.layers.1.self_attn.v_proj"])
    chosen = [name for name, layer in model.c3a.layers() if layer.backend == "reference"]
    assert chosen == [
        f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.v_proj")
    ]
    torch.testing.assert_close(logits(model), y)
    model.c3a.set_backend("reference")
    model.c3a.add_adapter("two", ALL)
    assert {layer.backend for _, layer in model.c3a.layers()} == {"reference"}
    with pytest.raises(BackendError, match="bogus"):
        model.c3a.set_backend("bogus")
    with pytest.raises(ConfigError, match=r"no adapted layer is named 'q_prj'.*'q_proj'"):
        model.c3a.set_backend("torch", layers="q_prj")


def test_summary_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(
        llama_classifier(),
        C3AConfig(block_size=4, block_size_pattern={"v_proj": 6}, task_type="SEQ_CLS"),
        two=C3AConfig(block_size="auto", rank=2),
    )
    lines = model.c3a.summary().splitlines()
    assert lines[0].split() == ["layer", "adapter", "in", "out", "b", "chosen", "by", "parameters", "backend", "state"]
    assert lines[1].split() == [
        "model.layers.0.self_attn.q_proj",
        "default",
        "24",
        "24",
        "4",
        "block_size",
        "144",
        "auto",
        "active",
    ]
    assert lines[2].split() == ["model.layers.0.self_attn.q_proj", "two", "24", "24", "12", "auto", "48", "auto"]
    assert lines[3].split() == [
        "model.layers.0.self_attn.v_proj",
        "default",
        "24",
        "12",
        "6",
        "v_proj",
        "48",
        "auto",
        "active",
    ]
    assert lines[-2].split() == ["score", "default", "modules_to_save", "72", "active"]
    count = sum(p.numel() for p in model.parameters())
    assert model.c3a.get_nb_trainable_parameters() == (2 * 144 + 2 * 48 + 72, count)
    model.c3a.print_trainable_parameters()
    share = 100 * (2 * 144 + 2 * 48 + 72) / count
    assert capsys.readouterr().out == f"trainable params: 456 || all params: {count:,d} || trainable%: {share:.4f}\n"
    model.c3a.merge_adapter()
    assert model.c3a.summary().count("merged") == 4
