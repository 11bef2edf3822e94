"""Parity with PEFT's C3A: names, what is trained, initial values, outputs, dw, merged weights, a model's gradients.

PEFT's input gradient is wrong (see `test_the_input_gradient_of_peft_is_wrong`), so whole models are compared with
PEFT's convolution taken from the dense definition.
"""

import copy
import inspect
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from tiny_models import IDS, bert_classifier, llama, llama_classifier, logits
from torch import Tensor, nn
from versions import PEFT

from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.api import apply, load_adapter
from c3a_triton.operator.calls import circulant_linear
from c3a_triton.operator.reference import circulant_matrix

peft = pytest.importorskip("peft")
peft_layer = pytest.importorskip("peft.tuners.c3a.layer")

PREFIX = "base_model.model."
# Since 0.20 PEFT's layers take a configuration where they took initial values.
TAKES_CONFIG = "config" in inspect.signature(peft_layer.C3ALinear.__init__).parameters


def pair(model: nn.Module, **config: object) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and ours, from the same seed."""
    config = {"block_size": 4, "target_modules": ["q_proj", "v_proj", "query", "value"]} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.C3AConfig(**config))
        torch.manual_seed(5)
        ours = apply(copy.deepcopy(model), peft.C3AConfig(**config))
    return theirs.eval(), ours.eval()


def parameters(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
    return {name.removeprefix(PREFIX): (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}


class DenseConvolution:
    """In the place of PEFT's autograd function: the definition, differentiated by torch."""

    @staticmethod
    def apply(x: Tensor, w: Tensor) -> Tensor:
        return nn.functional.linear(x, circulant_matrix(w, 1.0))


CASES: dict[str, tuple[object, dict[str, object]]] = {
    "plain": (llama, {}),
    "regex": (llama, {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "default targets": (llama, {"target_modules": None}),
    "layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "pattern": (llama, {"block_size_pattern": {"q_proj": 12, "model.layers.0.self_attn.v_proj": 6}}),
    "biases of adapted layers": (bert_classifier, {"bias": "c3a_only"}),
    "all biases": (bert_classifier, {"bias": "all"}),
    "whole modules": (bert_classifier, {"modules_to_save": ["pooler"]}),
    "classifier": (llama_classifier, {"task_type": "SEQ_CLS"}),
    "classifier, all-linear": (bert_classifier, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "inference": (llama, {"inference_mode": True}),
    "tied": (lambda: llama(tied=True), {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_parameters_with_the_same_values_are_trained(case: str) -> None:
    build, config = CASES[case]
    theirs, ours = pair(build(), **config)  # type: ignore[operator]
    assert parameters(ours) == parameters(theirs)
    state = {name.removeprefix(PREFIX): value for name, value in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert ours.c3a.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    torch.testing.assert_close(logits(ours), logits(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("init_weights", ["gaussian", "kaiming_uniform", "xavier_uniform", False, True])
def test_the_same_seed_gives_the_same_kernels(init_weights: bool | str, dtype: torch.dtype) -> None:
    theirs, ours = pair(llama().to(dtype), init_weights=init_weights)
    state = {name.removeprefix(PREFIX): value for name, value in theirs.state_dict().items()}
    names = [name for name in state if "c3a_kernel" in name]
    assert len(names) == 4
    for name in names:
        assert torch.equal(ours.state_dict()[name], state[name])
        assert state[name].any() == (init_weights is not True)


def test_a_second_adapter_is_treated_alike() -> None:
    theirs, ours = pair(llama())
    second = {"block_size": 6, "target_modules": ["q_proj", "up_proj"]}
    torch.manual_seed(6)
    theirs.add_adapter("second", peft.C3AConfig(**second))
    torch.manual_seed(6)
    ours.c3a.add_adapter("second", peft.C3AConfig(**second))
    for name in (None, "second", "default"):
        if name is not None:
            theirs.set_adapter(name)
            ours.c3a.set_adapter(name)
        assert parameters(ours) == parameters(theirs)
        torch.testing.assert_close(logits(ours), logits(theirs))
    with theirs.disable_adapter(), ours.c3a.disable_adapter():  # ours is another thread's no concern: nothing is frozen
        torch.testing.assert_close(logits(ours), logits(theirs))
    if PEFT < (0, 18):  # its C3A models cannot delete an adapter
        return
    for manager in (theirs, ours.c3a):
        with pytest.warns(UserWarning, match="default.*deleted"):
            manager.delete_adapter("default")
    assert parameters(ours) == parameters(theirs)
    assert ours.c3a.active_adapters == theirs.active_adapters == ["second"]


def test_printing(capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = pair(llama())
    theirs.print_trainable_parameters()
    expected = capsys.readouterr().out
    ours.c3a.print_trainable_parameters()
    assert capsys.readouterr().out == expected


def layers(dtype: torch.dtype = torch.float32, b: int = 4) -> tuple[nn.Module, C3ALinear]:
    """PEFT's layer and ours, 24 → 36, with the same large kernel."""
    base = nn.Linear(24, 36).to(dtype)
    arguments = (peft.C3AConfig(block_size=b), b) if TAKES_CONFIG else (b, "xavier_uniform")
    theirs = peft_layer.C3ALinear(copy.deepcopy(base), "default", *arguments)
    ours = C3ALinear(base, "default", b)
    nn.init.normal_(ours.c3a_kernel["default"], std=4)
    theirs.c3a_kernel["default"].data = ours.c3a_kernel["default"].detach().clone()
    return theirs, ours


@pytest.mark.parametrize("b", [1, 2, 3, 4, 12])
def test_outputs_dw_and_merged_weights(b: int) -> None:
    theirs, ours = layers(b=b)
    x, dy = torch.randn(7, 24), torch.randn(7, 36)
    for layer in (theirs, ours):
        layer(x).backward(dy)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.c3a_kernel["default"].grad, theirs.c3a_kernel["default"].grad)
    torch.testing.assert_close(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
    before = ours.weight.detach().clone()
    for layer in (theirs, ours):
        layer.merge()
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert (ours.weight - before).abs().max() > 0.1
    for layer in (theirs, ours):
        layer.unmerge()
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert torch.equal(ours.weight, before)


def test_attributes_of_the_layer() -> None:
    theirs, ours = layers()
    for name in (
        "in_features",
        "out_features",
        "block_size",
        "active_adapters",
        "merged",
        "merged_adapters",
        "disable_adapters",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("weight", "bias"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.get_base_layer() is ours.base_layer
    assert isinstance(ours.c3a_kernel, nn.ParameterDict)
    config = peft.C3AConfig(block_size=6, init_weights=True)
    ours.update_layer("second", 6, config=config)
    theirs.update_layer("second", 6, **({"config": config} if TAKES_CONFIG else {"init_weights": True}))
    assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("enabled", [False, True], ids=["", "autocast"])
def test_the_dtype_that_comes_out(enabled: bool) -> None:
    theirs, ours = layers()
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert ours(x).dtype == theirs(x).dtype == torch.float32


def test_the_input_gradient_of_peft_is_wrong() -> None:
    # The proof that docs/peft.md tells of: with b >= 3 PEFT's backward disagrees with its own forward, ours does not.
    convolution = peft_layer.BlockCircularConvolution.apply
    for b in (1, 2, 3, 5, 8):
        x = torch.randn(3, 2 * b, dtype=torch.float64, requires_grad=True)
        w = torch.randn(3, 2, b, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(circulant_linear, (x, w))
        assert torch.autograd.gradcheck(convolution, (x.detach(), w))
        assert torch.autograd.gradcheck(convolution, (x, w.detach()), raise_exception=False) == (b <= 2)


def test_a_models_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(llama(), target_modules="all-linear", init_weights="gaussian")
    wrong = gradients(theirs)
    monkeypatch.setattr(peft_layer, "BlockCircularConvolution", DenseConvolution)
    expected, found = gradients(theirs), gradients(ours)
    assert found.keys() == expected.keys()
    assert len(found) == 14
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-3)
        oracle.assert_close(grad, expected[name].double(), torch.float32, bound=1e-4)
    # What the replacement is for: layers below an adapted one get a wrong gradient from PEFT's own function.
    first = "model.layers.0.self_attn.q_proj.c3a_kernel.default"
    assert (wrong[first] - expected[first]).norm() > 0.05 * expected[first].norm()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name.removeprefix(PREFIX): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_file_in_which_peft_put_the_output_embeddings(tmp_path: Path) -> None:
    # As it does where the output head is adapted.
    theirs, _ = pair(llama(), target_modules=["q_proj", "lm_head"], init_weights="gaussian")
    theirs.base_model.model.lm_head.base_layer.weight.data.add_(0.1)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    ours = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_unloading_a_model(safe: bool) -> None:
    theirs, ours = pair(llama(), target_modules="all-linear", init_weights="gaussian")
    y = logits(ours)
    merged, reference = ours.c3a.merge_and_unload(safe_merge=safe), theirs.merge_and_unload(safe_merge=safe)
    assert list(merged.state_dict()) == list(reference.state_dict())
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name])
    torch.testing.assert_close(logits(merged), y, atol=1e-5, rtol=1e-4)
