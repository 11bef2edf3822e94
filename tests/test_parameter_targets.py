"""`target_parameters`: which parameters are meant, by PEFT's rule and beyond it, and what is refused with a reason."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from tiny_models import gpt_oss, llama, llama4, logits, mixtral, qwen3_moe
from torch import Tensor, nn

import c3a_triton
from c3a_triton import C3AConfig, ConfigError, ShapeError
from c3a_triton.adapters.experts import C3AStacked
from c3a_triton.adapters.plain_parameters import C3AParameter
from c3a_triton.adapters.targets import find_targets

needs_stacks = pytest.mark.skipif(
    not any("Experts" in type(module).__name__ for module in qwen3_moe().modules()),
    reason="transformers 4: experts are layers",
)
pytestmark = needs_stacks

UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


class Experts(nn.Module):
    """Experts of a class that nobody knows, beside a matrix of their own."""

    def __init__(self, n_experts: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(n_experts, 8, 4).to(dtype), requires_grad=False)
        self.table = nn.Parameter(torch.randn(8, 4))
        self.scale = nn.Parameter(torch.randn(8))
        self.deep = nn.Parameter(torch.randn(2, 2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("td,eod->to", x, self.wide) * self.scale + x @ self.table.T


class Model(nn.Module):
    def __init__(self, experts: nn.Module | None = None) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.randn(8, 4))
        self.first = nn.Linear(4, 4)
        self.experts = experts or Experts()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(self.first(x)))


def names(model: nn.Module, block_size: int | str = 4, **options: Any) -> list[str]:
    options = {"target_modules": []} | options
    return [target.name for target in find_targets(model, C3AConfig(block_size=block_size, **options))]


def refusal(model: nn.Module, *parameters: str, error: type[Exception] = ConfigError, **options: Any) -> str:
    """What `apply` says; the model is as it was."""
    before = [(name, id(module)) for name, module in model.named_modules()]
    config = C3AConfig(**({"block_size": 4, "target_modules": [], "target_parameters": list(parameters)} | options))
    with pytest.raises(error) as caught:
        c3a_triton.apply(model, config)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    return str(caught.value)


# What is meant


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        (["experts.gate_up_proj"], [UP]),
        (["gate_up_proj", "down_proj"], [UP, DOWN]),
        ([DOWN], [DOWN]),
        ("all-experts", [UP, DOWN]),
        ("ALL-EXPERTS", [UP, DOWN]),
    ],
)
def test_names_are_the_ends_of_full_names(parameters: Any, found: list[str]) -> None:
    assert names(qwen3_moe(), target_parameters=parameters) == found


def test_as_peft_finds_them() -> None:
    peft = pytest.importorskip("peft")
    for parameters in (["experts.gate_up_proj"], ["down_proj", "mlp.experts.gate_up_proj"], [DOWN]):
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(qwen3_moe(), config)
        theirs = set()
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "parameter_name"):
                theirs.add(f"{name.replace('.base_layer', '')}.{module.parameter_name}")
        assert theirs == set(names(qwen3_moe(), target_parameters=parameters))


def test_other_fields_mean_what_they_mean_for_modules() -> None:
    model = qwen3_moe(num_hidden_layers=3)

    def layers(**options: Any) -> list[str]:
        return [name.split(".")[2] for name in names(model, **({"target_parameters": ["down_proj"]} | options))]

    assert layers(layers_to_transform=[0, 2]) == ["0", "2"]
    assert layers(exclude_modules=["layers.1.mlp.experts"]) == ["0", "2"]
    assert layers(exclude_modules=r".*\.0\..*down_proj") == ["1", "2"]
    assert layers(modules_to_save=["layers.1.mlp"]) == ["0", "2"]
    targets = find_targets(
        model,
        C3AConfig(
            block_size=4,
            target_modules=[],
            target_parameters="all-experts",
            block_size_pattern={r"layers\.1\..*gate_up_proj": 8, r"layers\.2\..*": 2},
        ),
    )
    assert [target.block_size for target in targets] == [4, 4, 8, 4, 2, 2]
    assert targets[2].chosen_by == r"layers\.1\..*gate_up_proj"


def test_auto_takes_the_size_that_layers_of_their_own_would_get() -> None:
    targets = find_targets(
        qwen3_moe(), C3AConfig(block_size="auto", rank=4, target_modules=[], target_parameters="all-experts")
    )
    expected = c3a_triton.suggest_block_size(24, 16, rank=4)
    assert [target.block_size for target in targets] == [expected, expected]
    assert {target.chosen_by for target in targets} == {"auto"}


def test_modules_beside_them() -> None:
    assert (
        len(names(mixtral(), target_modules=None, target_parameters=["down_proj"])) == 1
    )  # not q_proj, v_proj, the default
    assert names(Model(), target_modules=None, target_parameters=["wide"]) == ["experts.wide"]
    found = names(qwen3_moe(), target_modules="all-linear", target_parameters="all-experts")
    assert found[-2:] == [UP, DOWN]
    assert len(found) == 6


def test_gpt_oss_takes_blocks_of_stored_rows_and_the_others_of_each_half() -> None:
    for build, size, fits in ((gpt_oss, 32, False), (qwen3_moe, 32, False), (gpt_oss, 8, True), (qwen3_moe, 8, True)):
        if fits:
            assert names(build(), size, target_parameters=["gate_up_proj"])
        else:
            assert str(size) in refusal(build(), "gate_up_proj", error=ShapeError, block_size=size)
    # 2 · 4 rows of gate and up together are no multiple of 8 rows each.
    odd = qwen3_moe(moe_intermediate_size=12)
    assert "gate and up each" in refusal(odd, "gate_up_proj", error=ShapeError, block_size=24)
    assert refusal(odd, "gate_up_proj", error=ShapeError, block_size=8).startswith(UP)


def test_kinds_of_adapters() -> None:
    for build, parameter, kind in (
        (qwen3_moe, "gate_up_proj", C3AStacked),
        (llama4, "down_proj", C3AStacked),
        (qwen3_moe, "gate.weight", C3AParameter),
    ):
        model = build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=[], target_parameters=[parameter]))
        assert {type(layer) for _, layer in model.c3a.layers()} == {kind}


# What is refused


def test_what_matches_nothing() -> None:
    model = qwen3_moe()
    assert "matches no parameter. Did you mean 'gate_up_proj'" in refusal(model, "gate_up_pro")
    assert "matches no parameter that is left by exclude_modules=['experts']" in refusal(
        model, "down_proj", exclude_modules=["experts"]
    )
    assert f"'mlp.experts' is a module: name parameters of it, {UP}, {DOWN}." in refusal(model, "mlp.experts")
    assert "the model has no stacked expert weights" in refusal(llama(), target_parameters="all-experts")
    with pytest.warns(UserWarning, match=r"target_parameters: 'up_proj' select no parameter\. Did you mean"):
        assert names(model, target_parameters=["down_proj", "up_proj"]) == [DOWN]


def test_what_cannot_be_adapted_by_itself() -> None:
    assert "root is a parameter of the model itself" in refusal(Model(), "root")
    assert "experts.scale has 1 dimensions" in refusal(Model(), "scale")
    assert "experts.deep has 4 dimensions" in refusal(Model(), "deep")
    assert (
        "first.weight belongs to first, a Linear that is adapted as a layer: name first in target_modules"
        in refusal(Model(), "first.weight")
    )
    both = refusal(Model(), "first.weight", target_modules=["first"])
    assert "first.weight belongs to first, which is adapted as a layer (target_modules)" in both
    holds = nn.Module()
    holds.bias, holds.inner = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)
    holds.forward = lambda x: holds.inner(x @ holds.bias)
    assert "holds layers (inner)" in refusal(Model(holds), "experts.bias")
    assert "does not read it in a forward of its own" in refusal(Model(nn.LSTM(4, 8)), "weight_ih_l0")
    assert "does not read it in a forward of its own" in refusal(
        Model(nn.ParameterList([torch.randn(4, 4)])), "experts.0"
    )
    assert "of this GptOssExperts only gate_up_proj and down_proj can be adapted" in refusal(
        gpt_oss(), "gate_up_proj_bias"
    )
    taken = Model()
    taken.experts.base_layer = nn.Parameter(torch.randn(4, 4))
    for parameter in ("table", "base_layer"):
        assert "this Experts has a base_layer of its own" in refusal(taken, f"experts.{parameter}")
    replaced = Model()
    replaced.experts.forward = replaced.experts.forward
    assert "forward of this Experts has been replaced" in refusal(replaced, "wide")


def test_a_parameter_of_a_layer_that_is_adapted_already() -> None:
    model = c3a_triton.apply(Model(), C3AConfig(block_size=4, target_modules=["first"]))
    with pytest.raises(ConfigError, match=r"first\.weight belongs to first, which is adapted as a layer"):
        model.c3a.add_adapter("two", C3AConfig(block_size=4, target_modules=[], target_parameters=["first.weight"]))


def test_values_that_are_not_floating() -> None:
    message = refusal(Model(Experts(dtype=torch.int8)), "wide")
    assert re.search(r"experts\.wide: its values in this Experts are torch\.int8 .*dequantize=True", message)
    assert "torch.float8_e4m3fn" in refusal(Model(Experts(dtype=torch.float8_e4m3fn)), "wide")
    parametrized = qwen3_moe()
    experts = parametrized.model.layers[0].mlp.experts
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    assert re.search(rf"{re.escape(DOWN)}: .*computes it from other tensors", refusal(parametrized, "down_proj"))
    # All that can be adapted is, and what cannot is named, once.
    told = rf"left out of target_parameters='all-experts': {re.escape(DOWN)}, because \w+ computes it from"
    with pytest.warns(UserWarning, match=told):
        assert names(parametrized, target_parameters="all-experts") == [UP]


def test_experts_that_share_their_memory() -> None:
    model = qwen3_moe(num_hidden_layers=2)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    message = refusal(model, "down_proj")
    assert message.startswith(f"{DOWN} has its memory in common with model.layers.1.mlp.experts.down_proj")
    second.down_proj = nn.Parameter(first.down_proj.detach()[:])
    assert "has its memory in common" in refusal(model, "down_proj")
    assert "has its memory in common" in refusal(model, target_parameters="all-experts")
    assert names(model, target_parameters=["gate_up_proj"])


def test_views_of_one_buffer_are_no_ties() -> None:
    model = qwen3_moe()
    expected = logits(model)
    flat, start = torch.empty(sum(parameter.numel() for parameter in model.parameters())), 0
    for parameter in model.parameters():
        view = flat[start : start + parameter.numel()].view_as(parameter)
        parameter.data, start = view.copy_(parameter.data), start + parameter.numel()
    config = C3AConfig(
        block_size=4, target_modules=["q_proj"], target_parameters="all-experts", init_weights="gaussian"
    )
    c3a_triton.apply(model, config)
    adapted = logits(model)
    assert not torch.allclose(adapted, expected)
    model.c3a.merge_adapter()
    torch.testing.assert_close(logits(model), adapted)
    model.c3a.unmerge_adapter()
    assert torch.equal(logits(model.c3a.unload()), expected)


def test_what_is_trained_whole() -> None:
    model = c3a_triton.apply(
        qwen3_moe(), C3AConfig(block_size=4, target_modules=["q_proj"], modules_to_save=["experts"])
    )
    with pytest.raises(ConfigError, match=r"another adapter trains as a whole \(modules_to_save\)"):
        model.c3a.add_adapter("two", C3AConfig(block_size=4, target_modules=[], target_parameters=["gate_up_proj"]))
    assert "'act_fn' is trained as a whole" in refusal(qwen3_moe(), "down_proj", modules_to_save=["act_fn"])


# What is told


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], None])
def test_stacked_experts_that_nothing_reaches_are_told_of(targets: Any) -> None:
    message = (
        rf"stacked expert weights are not adapted: 2 of them \({re.escape(UP)}, {re.escape(DOWN)}\) hold 4,608 of "
        r'[\d,]+ parameters\. target_parameters="all-experts"'
    )
    with pytest.warns(UserWarning, match=message) as caught:
        names(mixtral(), target_modules=targets)
    assert len([warning for warning in caught if "stacked expert" in str(warning.message)]) == 1


def test_and_once() -> None:
    config = C3AConfig(block_size=4, target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="stacked expert weights are not adapted"):
        model = c3a_triton.apply(mixtral(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.c3a.add_adapter("two", config)


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["experts"]},
        {"modules_to_save": ["experts"]},
        {"target_parameters": ["down_proj"]},
    ],
)
def test_and_not_where_the_configuration_has_dealt_with_them(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names(mixtral(), target_modules=["q_proj"], **options)
        names(llama(), target_modules=["q_proj"])


@pytest.mark.parametrize(
    "targets", [["gate_up_proj"], ["experts.down_proj"], r".*experts\.gate_up_proj", ["experts"], r".*experts"]
)
def test_stacked_experts_that_are_named_as_modules(targets: Any) -> None:
    with pytest.raises(ConfigError, match=r"stacked expert weights, which are parameters.*target_parameters"):
        names(qwen3_moe(), target_modules=targets)
    if isinstance(targets, list) and targets != ["experts"]:
        with pytest.warns(UserWarning, match=r"select no module.*stacked expert weights.*target_parameters"):
            names(qwen3_moe(), target_modules=["q_proj", *targets])


def test_what_written_out_weights_cost_is_said() -> None:
    with pytest.warns(UserWarning, match=r"experts\.wide, experts\.table: computed as W \+ ΔW, .*384 B in all"):
        assert names(Model(), target_parameters=["wide", "table"]) == ["experts.wide", "experts.table"]


def test_a_second_adapter_finds_what_the_first_one_found() -> None:
    model = qwen3_moe(num_hidden_layers=2)
    config = C3AConfig(block_size=4, target_modules=["q_proj"], target_parameters="all-experts")
    before = names(model, target_modules=["q_proj"], target_parameters="all-experts")
    c3a_triton.apply(model, config)
    assert names(model, target_modules=["q_proj"], target_parameters="all-experts") == before
    assert names(model, target_parameters=["experts.down_proj"]) == [name for name in before if "down_proj" in name]
    with pytest.raises(ConfigError, match="stacked expert weights, which are parameters"):
        names(model, target_modules=["down_proj"])
    once = copy.deepcopy(model)
    model.c3a.add_adapter("two", config)
    model.c3a.delete_adapter("two")
    assert torch.equal(logits(model), logits(once))
