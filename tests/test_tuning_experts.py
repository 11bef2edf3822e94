"""Block sizes chosen for stacked experts: counted with all experts, priced by the cost model, never measured."""

import copy

import pytest
import torch
from tiny_models import deepseek_v3, gpt_oss, llama4, qwen3_moe
from torch import nn

pytest.importorskip("transformers.integrations.moe", reason="transformers 4: experts are layers")

import c3a_triton
from c3a_triton import C3AConfig, ConfigError
from c3a_triton.bases.experts import rows_per_token
from c3a_triton.operator import bounds, cost_model, dispatch
from c3a_triton.operator.cost_model import Sizes
from c3a_triton.tuning import costs, groups, tuner

EXPERTS = {"target_modules": [], "target_parameters": "all-experts"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("C3A_TRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("C3A_TRITON_BACKEND", raising=False)
    dispatch.refresh()
    yield
    dispatch.refresh()


def tune(model, budget, **options):
    options = EXPERTS | {"measure": False, "tokens": 64, "dtype": "bfloat16"} | options
    return c3a_triton.autotune(copy.deepcopy(model).to("meta"), budget, **options)


def test_groups_of_experts():
    model = deepseek_v3().to("meta")
    config = C3AConfig(block_size=1, target_modules=["down_proj"], target_parameters=["gate_up_proj", "down_proj"])
    layer, up, down = groups.find_groups(model, config)
    assert (layer.label, layer.shape, layer.stack, layer.n_matrices) == ("down_proj 16→24", (16, 24), 0, 1)
    assert (down.label, down.shape, down.stack, down.n_matrices) == ("down_proj 16→4 × 24", (16, 24), 4, 4)
    assert (up.label, up.shape, up.stack, up.rows_per_token) == ("gate_up_proj", (24, 32), 4, 2)
    assert up.block_sizes == [1, 2, 4, 8]  # of 24 and of gate and up, 16 each
    assert up.parameters(8) == 4 * 24 * 32 // 8
    assert groups.lora_params([up, layer], 3) == 3 * (4 * (24 + 32) + 16 + 24)


@pytest.mark.parametrize(("build", "rows"), [(qwen3_moe, 2), (gpt_oss, 2), (llama4, 3)])
def test_rows_of_a_token(build, rows):
    model = build()
    experts = next(module for module in model.modules() if type(module).__name__.endswith("Experts"))
    assert rows_per_token(experts) == rows
    assert rows_per_token(nn.Linear(2, 2)) == 1


def test_the_choice_is_what_apply_makes_of_it_and_within_the_budget():
    model = qwen3_moe(num_hidden_layers=2)
    result = tune(model, 1200, target_modules=["q_proj"], objective="params")
    rows = {row.group.label: row for row in result.outcome.rows}
    assert rows.keys() == {"q_proj", "gate_up_proj", "down_proj"}
    adapted = c3a_triton.apply(model, result.config)
    assert {name.rpartition(".")[2]: layer.block_size["default"] for name, layer in adapted.c3a.layers()} == {
        label: row.b for label, row in rows.items()
    }
    assert adapted.c3a.get_nb_trainable_parameters()[0] == result.outcome.parameters <= 1200
    assert sorted(result.config.target_parameters) == sorted(
        name for name, layer in adapted.c3a.layers() if ".experts." in name
    )
    assert "4 × 32" in result.table
    stacks = {group["group"]: group["stack"] for group in result.to_dict()["groups"]}
    assert stacks == {"q_proj": 0, "gate_up_proj": 4, "down_proj": 4}
    with pytest.raises(ConfigError, match="largest block sizes of these 4 layers still need"):
        tune(model, 10)


def test_times_are_the_cost_models_of_all_rows():
    (row,) = tune(qwen3_moe(), 400, target_parameters=["gate_up_proj"]).outcome.rows
    sizes = Sizes(64 * 2, 24, 32, row.b, torch.bfloat16)
    of_one = sizes._replace(n_tokens=64 * 2 // 4)
    at = bounds.CEILINGS
    added = [
        min(
            bounds.seconds(cost_model.routed_launches(name, of_one, 4, 128, backward=backward), at)
            for name in cost_model.ROUTED
        )
        for backward in (False, True)
    ]
    weights = bounds.streamed(2 * (4 * 24 * 32 + 128 * 24), 2 * 128 * 32, 2 * 128 * 24 * 32, at.cublas_flops[2])
    assert row.seconds == pytest.approx(sum(added) + 2 * bounds.seconds([weights], at))
    more = tune(qwen3_moe(num_experts_per_tok=4), 400, target_parameters=["gate_up_proj"], tokens=1 << 16)
    fewer = tune(qwen3_moe(), 400, target_parameters=["gate_up_proj"], tokens=1 << 16)
    assert more.outcome.seconds > 1.5 * fewer.outcome.seconds


def test_beside_measured_layers_experts_are_predicted():
    setting = costs.Setting(torch.device("cpu"), torch.float32, 4, True)
    layer = costs.Case(8, 8, 4, "torch")
    experts = costs.Case(8, 8, 4, "fft", 3, 2)
    found = tuner._costs([layer, experts], setting, True, lambda call: 7.0, None)
    assert found.times[layer].forward == 7.0
    assert 0 < found.times[experts].forward < 1e-3
    result = tune(qwen3_moe(), 600)
    assert result.table.endswith("Times are predicted by the cost model; nothing was measured.")
    result.outcome.costs.measured = True
    assert result.table.endswith("; those of stacked experts are predicted by the cost model.")


def test_what_has_no_price_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"experts\.gate_up_proj: the times of stacked experts are predicted .* GPUs"):
        tune(qwen3_moe(), 400, device="cpu", measure=True)
    with (
        pytest.warns(UserWarning, match="computed as W"),
        pytest.raises(ConfigError, match=r"mlp\.gate\.weight: autotune knows .* no other parameter"),
    ):
        tune(qwen3_moe(), 400, target_parameters=["mlp.gate.weight"])
    with pytest.raises(ConfigError, match="embed_tokens: autotune knows .* no Embedding"):
        tune(qwen3_moe(), 400, target_modules=["embed_tokens"])
