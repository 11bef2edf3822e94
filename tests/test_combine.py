"""Weighted combinations of adapters: exact where they are linear, PEFT's where kernels are pruned; in the manager."""

import sys
from pathlib import Path

import oracle
import pytest
import torch
from tiny_models import llama, llama_classifier, logits
from torch import Tensor

from c3a_triton import C3AConfig, apply, load_adapter
from c3a_triton.adapters.combine import combination
from c3a_triton.errors import AdapterNotFoundError, AdapterStateError, ConfigError, ShapeError

PRUNING = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]


def kernels(count: int = 3) -> list[Tensor]:
    return [torch.randn(2, 3, 4) for _ in range(count)]


def config(**changes: object) -> C3AConfig:
    values = {"block_size": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": "gaussian"}
    return C3AConfig(**(values | changes))  # type: ignore[arg-type]


def model_with(*configs: C3AConfig, build: object = llama) -> object:
    model = build()  # type: ignore[operator]
    for name, one in zip("abc", configs, strict=False):
        apply(model, one, name)
    return model


def test_linear_is_the_weighted_sum_of_the_dense_updates() -> None:
    ws, weights = kernels(), [0.5, -2.0, 1.5]
    found = combination("linear")(ws, weights)
    truth = sum(weight * oracle.dense(w) for weight, w in zip(weights, ws, strict=True))
    oracle.assert_close(torch.as_tensor(oracle.dense(found)).float(), truth, torch.float32, bound=1e-6)


def test_one_adapter_is_scaled() -> None:
    (w,) = kernels(1)
    assert torch.equal(combination("linear")([w], [3]), 3 * w)


def test_ties_by_hand() -> None:
    pytest.importorskip("peft")
    # Half of each is kept: 4, -3 and 5, 2. Signs elected by the sum of what is kept: +, -, +, ...
    a = torch.tensor([[[4.0, -3.0, 1.0, 0.5]]])
    b = torch.tensor([[[5.0, 2.0, -1.0, 0.1]]])
    found = combination("ties", 0.5)([a, b], [1.0, 2.0])
    # 0: both agree, (4 + 2·5) / 2. 1: -3 + 2 < 0, so only a counts. The others were pruned.
    assert torch.equal(found, torch.tensor([[[7.0, -3.0, 0.0, 0.0]]]))


def test_elections_by_total_and_by_frequency() -> None:
    pytest.importorskip("peft")
    ws = [torch.tensor([[[value, 1.0]]]) for value in (5.0, -1.0, -1.0)]
    total, frequency = (combination("ties", 1.0, method)(ws, [1, 1, 1]) for method in ("total", "frequency"))
    assert total[0, 0, 0] == 5
    assert frequency[0, 0, 0] == -1


def test_pruning_by_magnitude_keeps_the_largest() -> None:
    pytest.importorskip("peft")
    w = torch.tensor([[[1.0, -4.0, 2.0, 3.0]]])
    assert torch.equal(combination("magnitude_prune", 0.5)([w], [2]), torch.tensor([[[0.0, -8.0, 0.0, 6.0]]]))


def test_dare_drops_at_random_and_keeps_the_expectation() -> None:
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    w = torch.ones(50, 50, 4)
    kept = float(merge_utils.random_pruning(w, 0.25, rescale=True).max())  # 4, but 1 before PEFT 0.18
    found = combination("dare_linear", 0.25)([w], [1.0])
    assert set(found.unique().tolist()) == {0.0, kept}
    assert abs(found.mean() - kept / 4) < 0.1
    assert combination("dare_ties", 0.25)([w, w], [1.0, 1.0]).unique().tolist() == [0.0, kept]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("svd",), "'svd'"),
        (("ties",), "density"),
        (("ties", 0.0), r"\(0, 1\], got 0.0"),
        (("dare_linear", 1.5), "got 1.5"),
        (("linear", 0.5), "leave density=0.5 out"),
        (("ties", 0.5, "loudest"), "'loudest'"),
    ],
)
def test_values_that_cannot_be_used(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combination(*arguments)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e39, "1", None])
def test_weights_that_are_no_numbers(weight: object) -> None:
    with pytest.raises(ConfigError, match="finite"):
        combination("linear")(kernels(1), [weight])  # type: ignore[list-item]


def test_without_peft_only_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.utils", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    combination("linear")
    with pytest.raises(ConfigError, match=r"pip install peft.*'linear'"):
        combination("ties", 0.5)


# The manager's verb


def test_a_combination_in_a_model(tmp_path: Path) -> None:
    model = model_with(config(), config(target_modules=["q_proj", "up_proj"]))
    model.c3a.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum")
    assert model.c3a.active_adapters == ["a"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".sum"))
    expected = {}
    for name, layer in model.c3a.layers():
        known = {"a": 0.5, "b": -2.0}
        expected[name] = sum(f * layer.c3a_kernel[a].detach() for a, f in known.items() if a in layer.c3a_kernel)
        torch.testing.assert_close(layer.c3a_kernel["sum"].detach(), expected[name])
    assert {name.rpartition(".")[2] for name in expected} == {"q_proj", "v_proj", "up_proj"}
    model.c3a.set_adapter("sum")
    y = logits(model)
    assert "linear" in model.c3a.summary()
    model.c3a.save_pretrained(tmp_path, "sum")
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path)), y)
    for name in ("a", "b"):
        model.c3a.delete_adapter(name)
    torch.testing.assert_close(logits(model), y)


def test_peft_loads_a_combination(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = model_with(
        config(block_size_pattern={"q_proj": 6}), config(target_modules=["q_proj", "up_proj"], block_size=6)
    )
    model.c3a.add_weighted_adapter(["a", "b"], [1, 1], "sum")
    model.c3a.set_adapter("sum")
    model.c3a.save_pretrained(tmp_path, "sum")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("combination_type", PRUNING)
def test_pruned_combinations_in_a_model(combination_type: str) -> None:
    pytest.importorskip("peft")
    model = model_with(config(), config())
    torch.manual_seed(3)
    model.c3a.add_weighted_adapter(["a", "b"], [1.0, 0.5], "mix", combination_type, density=0.5)
    torch.manual_seed(3)
    combine = combination(combination_type, 0.5)
    for _, layer in model.c3a.layers():
        both = [layer.c3a_kernel[name].detach() for name in ("a", "b")]
        assert torch.equal(layer.c3a_kernel["mix"].detach(), combine(both, [1.0, 0.5]))


def test_a_combination_is_trained_once_it_is_set() -> None:
    model = model_with(config(inference_mode=True))
    model.c3a.add_weighted_adapter(["a"], [2.0], "twice")
    assert not model.c3a.adapters["twice"].inference_mode
    model.c3a.set_adapter("twice")
    assert model.c3a.get_nb_trainable_parameters()[0] > 0


def test_what_a_combination_refuses_changes_nothing() -> None:
    model = model_with(config(), config(block_size=6))
    state = list(model.state_dict())
    refusals = [
        (ShapeError, r"layers\.0\.self_attn\.q_proj.*'a': 4, 'b': 6.*set_adapter", (["a", "b"], [1, 1], "new")),
        (AdapterNotFoundError, "'z'", (["a", "z"], [1, 1], "new")),
        (AdapterStateError, "'b' already", (["a"], [1], "b")),
        (ConfigError, "weight for each", (["a", "b"], [1], "new")),
        (ConfigError, "weight for each", (["a", "a"], [1, 1], "new")),
        (ConfigError, "weight for each", ([], [], "new")),
        (ConfigError, "weight for each", ("a", [1], "new")),
        (ConfigError, "finite", (["a"], [float("nan")], "new")),
        (ConfigError, "finite", (["a"], [1e39], "new")),
        (ConfigError, "finite", (["a"], ["x"], "new")),
        (ConfigError, "dot", (["a"], [1], "new.one")),
    ]
    for error, message, arguments in refusals:
        with pytest.raises(error, match=message):
            model.c3a.add_weighted_adapter(*arguments)
        assert list(model.state_dict()) == state
        assert list(model.c3a.adapters) == ["a", "b"]


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"task_type": "SEQ_CLS"}], ids=str)
def test_what_is_trained_whole_is_not_combined(changes: dict) -> None:
    model = model_with(config(**changes), build=llama_classifier)
    with pytest.raises(ConfigError, match="'a' also trains"):
        model.c3a.add_weighted_adapter(["a"], [1.0], "new")
