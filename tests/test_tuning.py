"""Choosing block sizes: the solver against brute force, patterns that mean what was chosen, measuring, the report."""

import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import MLP, gpt2, llama, llama_classifier
from torch import nn

import c3a_triton
from c3a_triton import BackendError, C3AConfig, CheckpointError, ConfigError, valid_block_sizes
from c3a_triton.files.patterns import block_size_rule
from c3a_triton.files.peft_rules import peft_block_size_rule
from c3a_triton.operator import bounds, cost_model, dispatch, tuned
from c3a_triton.operator.cost_model import Sizes
from c3a_triton.operator.tuned import Times
from c3a_triton.tuning import costs, goal, groups, measurement, outcome, solver
from c3a_triton.tuning import settings as tuned_settings
from c3a_triton.tuning.solver import LATENCY_TOLERANCE, Choice


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("C3A_TRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("C3A_TRITON_BACKEND", raising=False)
    dispatch.refresh()
    yield
    dispatch.refresh()


def on_meta(model):
    return model.to("meta")


# The solver


@st.composite
def problems(draw):
    """Groups as layers make them, and a budget that some selection meets."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        width_in, width_out, layers = draw(
            st.tuples(st.sampled_from([96, 128, 192, 3072]), st.sampled_from([64, 96, 1024]), st.integers(1, 28))
        )
        sizes = draw(
            st.lists(st.sampled_from(valid_block_sizes(width_in, width_out)), min_size=1, max_size=5, unique=True)
        )
        found.append(
            [
                Choice(
                    layers * width_in * width_out // b,
                    draw(st.sampled_from([1e-6, 1.001e-6, 1.02e-6, 2e-6, 1e-4])) * layers,
                    draw(st.floats(0, 5, allow_subnormal=False)),
                )
                for b in sizes
            ]
        )
    totals = sorted({sum(choice.parameters for choice in pick) for pick in itertools.product(*found)})
    return found, draw(st.sampled_from(totals)) + draw(st.sampled_from([0, 1]))


def total(found, picked, name):
    return sum(getattr(group[i], name) for group, i in zip(found, picked, strict=True))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_the_solver_is_brute_force(problem):
    found, budget = problem
    every = list(itertools.product(*(range(len(group)) for group in found)))
    allowed = [pick for pick in every if total(found, pick, "parameters") <= budget]
    most = max(total(found, pick, "parameters") for pick in allowed)
    least = min(total(found, pick, "seconds") for pick in allowed)

    def balance(pick):
        return total(found, pick, "seconds") / least - total(found, pick, "parameters") / most

    def within(candidates, cost, tolerance):
        best = min(map(cost, candidates))
        return [pick for pick in candidates if cost(pick) <= best + tolerance * (1 + 1e-6)]

    largest = [pick for pick in allowed if total(found, pick, "parameters") == most]
    least_of_largest = min(total(found, pick, "seconds") for pick in largest)
    equal = {
        "latency": within(allowed, lambda pick: total(found, pick, "seconds") / least, LATENCY_TOLERANCE),
        "params": within(largest, lambda pick: total(found, pick, "seconds") / least_of_largest, LATENCY_TOLERANCE),
        "balanced": within(allowed, balance, LATENCY_TOLERANCE),
    }
    for objective, best in equal.items():
        picked = tuple(solver.solve(found, budget, objective))
        assert picked in best, objective
        nearest = min(total(found, pick, "distance") for pick in best)
        assert total(found, picked, "distance") == pytest.approx(nearest, abs=1e-5), objective


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_the_front_is_brute_force(problem):
    found, budget = problem
    every = [
        (total(found, pick, "parameters"), total(found, pick, "seconds"))
        for pick in itertools.product(*(range(len(group)) for group in found))
    ]
    allowed = [point for point in every if point[0] <= budget]
    front = [
        (total(found, pick, "parameters"), total(found, pick, "seconds"))
        for pick in solver.pareto_front(found, budget, n_points=8)
    ]
    assert front == sorted(set(front))
    for parameters, seconds in front:
        assert (parameters, seconds) in allowed
        assert seconds <= min(s for p, s in allowed if p >= parameters) * (1 + 1e-6)
    assert front[-1][0] == max(p for p, _ in allowed)


def test_equally_fast_choices_go_to_the_one_nearest_the_rule():
    found = [[Choice(100, 1.0, 3.0), Choice(50, 1.009, 0.5), Choice(25, 1.02, 0.0)]]
    assert solver.solve(found, 100, "latency") == [1]
    assert solver.solve(found, 100, "params") == [0]


@pytest.mark.parametrize(("seconds", "picked"), [(1.4, 1), (1.6, 0)])
def test_balanced_weighs_a_share_of_time_against_a_share_of_parameters(seconds, picked):
    # Half of the parameters more, for 40 % or 60 % of the time more.
    assert solver.solve([[Choice(100, 1.0), Choice(200, seconds)]], 200, "balanced") == [picked]


# Groups and budgets


def test_groups_are_roles_and_shapes():
    model = on_meta(llama(num_hidden_layers=3))
    found = groups.find_groups(model, C3AConfig(block_size=1, target_modules="all-linear"))
    assert [(group.label, group.shape, len(group.names)) for group in found] == [
        ("q_proj", (24, 24), 3),
        ("k_proj", (24, 12), 3),
        ("v_proj", (24, 12), 3),
        ("o_proj", (24, 24), 3),
        ("gate_proj", (24, 48), 3),
        ("up_proj", (24, 48), 3),
        ("down_proj", (48, 24), 3),
    ]
    two_shapes = nn.ModuleDict(
        {"a": nn.ModuleDict({"fc": nn.Linear(8, 4)}), "b": nn.ModuleDict({"fc": nn.Linear(4, 8)})}
    )
    found = groups.find_groups(two_shapes, C3AConfig(block_size=1, target_modules="all-linear"))
    assert [group.label for group in found] == ["fc 8→4", "fc 4→8"]


def test_a_conv1d_is_taken_the_right_way_round():
    found = groups.find_groups(on_meta(gpt2()), C3AConfig(block_size=1, target_modules=["c_attn"]))
    assert [group.shape for group in found] == [(24, 72)]


def test_as_many_parameters_as_lora():
    peft = pytest.importorskip("peft")
    found = groups.find_groups(on_meta(llama()), C3AConfig(block_size=1, target_modules=["q_proj", "down_proj"]))
    lora = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    expected = sum(p.numel() for name, p in lora.named_parameters() if "lora_" in name)
    budget = outcome.Budget.of(found, None, 3, None)
    assert (budget.max_params, budget.rank) == (expected, 3.0)


def test_the_rank_of_a_budget_is_that_at_which_the_rule_uses_it_up():
    found = groups.find_groups(on_meta(llama()), C3AConfig(block_size=1, target_modules="all-linear"))
    budget = outcome.Budget.of(found, 5000, None, None)
    by_rule = [len(g.names) * math.prod(g.shape) / groups.rule_block_size(g, budget.rank) for g in found]
    assert sum(by_rule) == pytest.approx(5000)


@pytest.mark.parametrize("megabytes", [0.012, 0.03])
def test_the_file_is_no_larger_than_asked_for(tmp_path, megabytes):
    model = llama()
    result = tune(model, None, max_adapter_mb=megabytes, objective="params")
    c3a_triton.apply(model, result.config).c3a.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= megabytes * 1e6


@pytest.mark.parametrize(
    ("text", "count"),
    [("500k", 500_000), ("2M", 2_000_000), ("1.5m", 1_500_000), ("1b", 10**9), ("1_000", 1000), ("12,345", 12345)],
)
def test_sizes_have_suffixes(text, count):
    assert goal.parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "-5", "2MM", "1e6", "0", "0.2", "nan", "inf"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="not a number of parameters"):
        goal.parse_count(text)


# Patterns


@pytest.mark.parametrize(
    ("sizes", "default", "keys"),
    [
        ({"m.0.q": 8, "m.1.q": 8, "m.0.v": 8}, 8, []),
        ({"m.0.q": 8, "m.1.q": 8, "m.0.v": 4, "m.1.v": 4, "m.0.k": 8}, 8, ["v"]),
        # One key for the v's, where the other way round q and k would need one each.
        ({"a.q": 8, "a.k": 8, "a.v": 4, "b.v": 4, "c.v": 4}, 8, ["v"]),
        ({"m.0.fc": 8, "m.1.fc": 4, "m.2.fc": 4, "m.3.fc": 8, "m.4.fc": 8}, 8, [r"(?:1|2)\.fc"]),
        ({"m.enc.0.fc": 8, "m.enc.1.fc": 8, "m.dec.0.fc": 4}, 8, [r"dec\.0\.fc"]),
        # Names of one part, which PEFT looks up instead of matching.
        ({"first": 4, "second": 8, "third": 8}, 8, ["first"]),
        # A name that ends like another one's whole name.
        ({"fc": 4, "block.fc": 8, "block.other": 8}, 8, None),
        # Names that are regular expressions of something else.
        ({"m.a+b": 4, "m.aab": 8, "m.(x)": 8}, 8, [r"a\+b"]),
        ({"m.a+b": 8, "m.aab": 4, "m.c": 8}, 8, ["aab"]),
        ({"a|b": 4, "c": 8, "d": 8, "b": 8}, 4, ["c", "d", "b"]),
    ],
)
def test_patterns_mean_the_sizes_to_us_and_to_peft(sizes, default, keys):
    block_size, pattern = tuned_settings.minimal_pattern(sizes)
    config = C3AConfig(block_size=block_size, block_size_pattern=pattern)
    for name, size in sizes.items():
        assert block_size_rule(config)(name)[0] == size
        assert peft_block_size_rule(pattern, block_size)(name) == size
    assert block_size == default
    if keys is not None:
        assert list(pattern) == keys


NAMES = st.lists(
    st.sampled_from(["m", "0", "1", "12", "q_proj", "v_proj", "fc", "a+b", "a.b", "x|y", "[z"]), min_size=1, max_size=4
).map(".".join)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(NAMES, st.sampled_from([4, 8, 16]), min_size=1, max_size=8))
def test_any_sizes_of_any_names_have_a_pattern(sizes):
    block_size, pattern = tuned_settings.minimal_pattern(sizes)
    config = C3AConfig(block_size=block_size, block_size_pattern=pattern)
    assert {name: block_size_rule(config)(name)[0] for name in sizes} == sizes
    assert {name: peft_block_size_rule(pattern, block_size)(name) for name in sizes} == sizes


# The whole, predicted


def tune(model=None, budget=3000, **options):
    """By predicted times, also where there is a GPU to measure on, unless a device is named."""
    options.setdefault("target_modules", "all-linear")
    options.setdefault("measure", "device" in options)
    return c3a_triton.autotune(on_meta(llama()) if model is None else model, budget, **options)


@pytest.mark.parametrize("objective", goal.OBJECTIVES)
@pytest.mark.parametrize("mode", goal.MODES)
def test_the_choice_is_within_the_budget_and_is_what_is_applied(objective, mode):
    result = tune(objective=objective, mode=mode)
    assert result.outcome.parameters <= 3000
    model = c3a_triton.apply(llama(), result.config)
    assert model.c3a.get_nb_trainable_parameters()[0] == result.outcome.parameters
    chosen = {name: b for row in result.outcome.rows for name in row.group.names for b in [row.b]}
    assert {name: layer.block_size["default"] for name, layer in model.c3a.layers()} == chosen
    assert sum(row.share for row in result.outcome.rows) == pytest.approx(1)


def test_the_choice_is_the_best_of_all_choices():
    """Against brute force over everything that the tiny model allows, from the cost model's own figures."""
    model, budget, tokens = on_meta(llama(num_hidden_layers=1)), 700, 64
    result = tune(model, budget, tokens=tokens, target_modules=["q_proj", "v_proj", "down_proj"], dtype="bfloat16")
    shapes = {"q_proj": (24, 24), "v_proj": (24, 12), "down_proj": (48, 24)}

    def seconds(shape, b):
        directions = ({"backward": False}, {"backward": True})
        parts = [
            min(
                cost_model.predicted_seconds(name, Sizes(tokens, *shape, b, torch.bfloat16), **way)
                for name in dispatch.AUTO_BACKENDS
            )
            for way in directions
        ]
        return sum(parts) + 2 * cost_model.base_seconds(Sizes(tokens, *shape, 0, torch.bfloat16))

    best = math.inf
    for sizes in itertools.product(*(valid_block_sizes(*shape) for shape in shapes.values())):
        pairs = list(zip(shapes.values(), sizes, strict=True))
        if sum(math.prod(shape) // b for shape, b in pairs) <= budget:
            best = min(best, sum(seconds(*pair) for pair in pairs))
    assert result.outcome.seconds <= best * (1 + LATENCY_TOLERANCE + 1e-6)
    assert result.outcome.seconds == pytest.approx(sum(seconds(row.group.shape, row.b) for row in result.outcome.rows))


def test_more_budget_is_used_by_params_and_never_slows_latency():
    parameters = [tune(budget=budget, objective="params").outcome.parameters for budget in (1000, 2000, 8000)]
    assert parameters == sorted(set(parameters))
    times = [tune(budget=budget).outcome.seconds for budget in (1000, 2000, 8000)]
    assert times[1] <= times[0] * (1 + LATENCY_TOLERANCE)
    assert times[2] <= times[1] * (1 + LATENCY_TOLERANCE)


def test_predictions_are_labelled_wherever_they_appear(tmp_path):
    result = tune(tokens=100)
    assert "time (predicted)" in result.table
    assert "predicted by the cost model; nothing was measured" in result.table
    assert "128, the next power of two" in result.table
    assert "measured" not in result.table.replace("nothing was measured", "")
    document = result.to_dict()
    assert (document["times"], document["timed_tokens"]) == ("predicted", 128)
    page, picture = result.report(tmp_path / "report.html")
    assert "time (predicted)" in page.read_text()
    assert "Times are predicted" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not tuned.path().exists()


def test_the_smallest_choice_over_the_budget_says_by_how_much():
    model = on_meta(llama())
    found = groups.find_groups(model, C3AConfig(block_size=1, target_modules="all-linear"))
    least = sum(group.parameters(valid_block_sizes(*group.shape)[-1]) for group in found)
    assert tune(model, least).outcome.parameters == least
    with pytest.raises(ConfigError, match=rf"still need {least}, 1 more"):
        tune(model, least - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": None}, "exactly one budget"),
        ({"like_lora_rank": 4}, "exactly one budget"),
        ({"budget": -1}, "positive"),
        ({"budget": "x"}, "500k"),
        ({"budget": None, "like_lora_rank": 2.5}, "whole number"),
        ({"budget": None, "max_adapter_mb": math.inf}, "positive"),
        ({"objective": "speed"}, "latency, params, balanced"),
        ({"mode": "test"}, "train, infer"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"dtype": torch.float64}, "dtype must be one of"),
        ({"device": "tpu"}, "choose cuda or cpu"),
        ({"device": "cpu", "measure": False}, "GPUs only"),
        ({"target_modules": ["q_prj"]}, "q_proj"),
        ({"model": 3}, "got int"),
    ],
)
def test_what_cannot_be_tuned_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        tune(**options)


def test_predictions_are_of_the_card_s_family_and_name_it(monkeypatch):
    found = {}
    for family, at in bounds.CARDS.items():
        monkeypatch.setattr(dispatch, "ceilings_of", lambda device, at=at: at)
        outcome = tune(measure=False).outcome
        assert outcome.environment["device"] == f"none: the cost model's {family}"
        found[family] = outcome.seconds
    assert len({*found.values()}) > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU to measure on")
def test_a_gpu_that_is_asked_for_and_not_there_is_named():
    with pytest.raises(ConfigError, match="torch sees 0 GPUs"):
        tune(device="cuda")
    assert tune(device="cuda", measure=False).to_dict()["times"] == "predicted"
    assert tune(measure=True).to_dict()["times"] == "predicted"


def test_a_configuration_of_transformers_is_enough():
    from transformers import LlamaConfig

    config = LlamaConfig(**llama().config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"})
    result = tune(config)
    assert result.to_dict()["dtype"] == "float16"
    assert result.config.task_type == "CAUSAL_LM"


def test_the_default_targets_are_the_model_type_s():
    assert [row.group.label for row in tune(target_modules=None).outcome.rows] == ["q_proj", "v_proj"]


def test_a_classifier_s_head_is_left_alone():
    result = tune(on_meta(llama_classifier()))
    assert result.config.task_type == "SEQ_CLS"
    assert "score" not in {row.group.label for row in result.outcome.rows}
    c3a_triton.apply(llama_classifier(), result.config)
    with pytest.warns(UserWarning, match="'score' select no module"):
        result = tune(on_meta(llama_classifier()), target_modules=["q_proj", "score"])
    assert [row.group.label for row in result.outcome.rows] == ["q_proj"]


@pytest.mark.parametrize(("rank", "b"), [(16, 256), (32, 128), (64, 64)])
def test_equally_fast_block_sizes_follow_the_rule(rank, b):
    # For many tokens the cost model's time hardly depends on b here, and √(4096·4096)/rank is a valid block size.
    model = nn.ModuleDict({"proj": nn.Linear(4096, 4096, device="meta")})
    result = tune(model, None, like_lora_rank=rank, tokens=8192, dtype="bfloat16")
    assert [row.b for row in result.outcome.rows] == [b]


def test_what_is_written_is_read_by_us_and_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    result = tune(exclude_modules=["o_proj"])
    chosen = {name: row.b for row in result.outcome.rows for name in row.group.names}
    assert not any("o_proj" in name for name in chosen)
    file, folder = tmp_path / "deep" / "c3a.json", tmp_path / "adapter"
    assert (result.save(file), result.save(folder)) == (file, folder / "adapter_config.json")
    for path in (file, folder):
        assert C3AConfig.from_pretrained(path) == result.config
        model = c3a_triton.apply(llama(), C3AConfig.from_pretrained(path))
        assert {name: layer.block_size["default"] for name, layer in model.c3a.layers()} == chosen
    for config in (peft.PeftConfig.from_pretrained(str(folder)), peft.C3AConfig(**json.loads(file.read_text()))):
        layers = peft.get_peft_model(llama(), config).base_model.model.named_modules()
        found = {name: m.block_size["default"] for name, m in layers if type(m).__name__ == "C3ALinear"}
        assert found == chosen


def test_a_result_without_transformers():
    result = tune(MLP(), 60)
    assert result.outcome.model == "MLP"
    assert {row.group.label for row in result.outcome.rows} == {"first", "second"}
    c3a_triton.apply(MLP(), result.config)


# Measuring


class FakeTimer:
    """Seconds that a rule gives; raises KeyboardInterrupt instead of the given call."""

    def __init__(self, interrupt_at=None):
        self.calls = 0
        self.interrupt_at = interrupt_at

    def __call__(self, call):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        call()
        return 1e-3


def on_cpu(timer, **options):
    options = {"device": "cpu", "tokens": 4, "target_modules": ["q_proj", "v_proj"], "budget": 100} | options
    return tune(timer=timer, **options)


def test_a_second_run_measures_only_what_is_missing():
    first = FakeTimer()
    result = on_cpu(first)
    # q 24→24: base and the sizes that leave room for v's smallest, v 24→12 likewise; forward and backward of each.
    sizes = sum(len(valid) for valid in result.outcome.sizes)
    assert first.calls == 2 * (2 + sizes)
    assert result.to_dict()["times"] == "measured"
    assert "time (measured)" in result.table
    assert len(tuned.load().times) == 2 + sizes
    again = FakeTimer()
    assert on_cpu(again).table == result.table
    assert again.calls == 0
    wider = FakeTimer()
    more = sum(len(valid) for valid in on_cpu(wider, budget=10_000).outcome.sizes)
    assert wider.calls == 2 * (more - sizes)
    other = FakeTimer()
    on_cpu(other, tokens=5)
    assert other.calls == first.calls


def test_an_interrupted_run_goes_on_where_it_was():
    whole = FakeTimer()
    on_cpu(whole)
    tuned.clear()
    interrupted = FakeTimer(interrupt_at=6)
    with pytest.raises(KeyboardInterrupt):
        on_cpu(interrupted)
    kept = len(tuned.load().times)
    assert kept == 2  # two cases of two calls each; the third was half done
    rest = FakeTimer()
    on_cpu(rest)
    assert rest.calls == whole.calls - 2 * kept


def test_forwards_alone_are_completed_for_training():
    forwards = FakeTimer()
    on_cpu(forwards, mode="infer")
    assert all(times.backward is None for times in tuned.load().times.values())
    both = FakeTimer()
    on_cpu(both)
    assert both.calls == 2 * forwards.calls


def test_the_fastest_measured_is_chosen(monkeypatch):
    """Times by case, not by the clock: the choice, its backend and the sums follow from them."""
    setting = costs.Setting(torch.device("cpu"), torch.float32, 4, True)
    monkeypatch.setattr(costs.Setting, "backends", property(lambda self: ("fft", "direct")))
    shape, cases = (24, 24), {}
    for b, (fft, direct) in {24: ((3.0, 3.0), (5.0, 1.0)), 12: ((1.0, 5.0), (2.0, 2.0))}.items():
        cases[costs.Case(*shape, b, "fft")] = Times(*fft)
        cases[costs.Case(*shape, b, "direct")] = Times(*direct)
    found = costs.Costs(setting, cases, measured=True)
    group = groups.Group("q_proj", *shape, ("a.q_proj",))
    assert found.fastest(group, 24) == ("fft/direct", 4.0)
    assert found.fastest(group, 12) == ("fft/direct", 3.0)
    assert found.fastest(group, 6) is None


def test_what_fails_is_left_out_and_named():
    class Failing(FakeTimer):
        def __call__(self, call):
            super().__call__(call)
            if self.calls == 3:
                raise RuntimeError("no such kernel\nwith details")
            return 1e-3

    with pytest.warns(UserWarning, match="not measured: .*no such kernel$"):
        result = on_cpu(Failing(), budget=300)
    assert result.outcome.parameters <= 300

    class Broken(FakeTimer):
        def __call__(self, call):
            raise RuntimeError("out of order")

    tuned.clear()
    with pytest.warns(UserWarning, match="not measured"), pytest.raises(BackendError, match="out of order"):
        on_cpu(Broken())


def test_measurements_that_cannot_be_kept_are_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("C3A_TRITON_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept") as caught:
        assert on_cpu(FakeTimer()).to_dict()["times"] == "measured"
    assert sum("not kept" in str(warning.message) for warning in caught) == 1


def test_every_call_computes_a_layer_of_its_backend():
    """What is timed is the layer: output and gradients are those of the dense definition."""
    results = []

    def timer(call):
        results.append(call())
        return 1.0

    setting = costs.Setting(torch.device("cpu"), torch.float32, 8, True)
    cases = [costs.Case(12, 6, 0, "base"), costs.Case(12, 6, 3, "torch")]
    assert measurement.measured(cases, setting, timer) == dict.fromkeys(cases, Times(1.0, 1.0))
    base, (base_dx,), adapted, (dx, dw) = results
    assert base.shape == adapted.shape == (8, 6)
    assert base_dx.shape == dx.shape == (8, 12)
    assert dw.shape == (2, 4, 3)
    assert not torch.allclose(base, adapted)


def test_peers_are_measured_for_comparison():
    pytest.importorskip("peft")
    alone = on_cpu(FakeTimer())
    assert alone.outcome.peers == []
    both = FakeTimer()
    result = on_cpu(both, compare=True)
    labels = [point.label for point in result.outcome.peers]
    assert labels == [*(f"LoRA r={rank}" for rank in costs.LORA_RANKS), "PEFT's C3A"]
    assert both.calls == 2 * 2 * (len(costs.LORA_RANKS) + 1)
    assert result.outcome.peers[-1].parameters == result.outcome.parameters


def test_the_clock_measures_on_the_cpu(monkeypatch):
    clock = itertools.count(0.0, 1.0).__next__  # a second for each look at it
    monkeypatch.setattr(measurement, "time", SimpleNamespace(perf_counter=clock))
    on_cpu(None)
    assert set(tuned.load().times.values()) == {Times(1.0, 1.0)}


def test_progress_is_told():
    told = []
    on_cpu(FakeTimer(), progress=lambda done, total, name: told.append((done, total, name)))
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert {total for _, total, _ in told} == {len(told) - 1}
    assert told[0][2] == "24→24 b=0 base"


@pytest.mark.parametrize(("package", "call"), [("scipy", tune), ("matplotlib", lambda: tune().plot())])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package, call):
    module = {"scipy": "scipy.optimize", "matplotlib": "matplotlib.figure"}[package]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(c3a_triton.C3AError, match=rf"{package}: pip install 'c3a_triton\[tune\]'"):
        call()


# The report


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.urls = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = {"src", "href", "xlink:href", "action", "data", "srcset", "poster"}
        self.urls += [value for name, value in attrs if name in names and not (value or "").startswith("#")]

    def handle_data(self, data):
        self.texts.append(data)


def hostile_result():
    """A model whose names are markup, and mathematics to matplotlib."""
    model = nn.Module()
    model.add_module("<b>$x^{$", nn.Linear(12, 24))
    model.add_module('"&amp;<script>alert(1)</script>', nn.Linear(24, 12))
    model.name_or_path = "</title><script>alert(2)</script>"
    return tune(model, 200)


def test_the_page_needs_no_network_and_escapes_names():
    text = c3a_triton.tuning.page.document(hostile_result().outcome)
    page = Page(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert all(url.startswith("data:image/png;base64,") for url in page.urls)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "<b>$x^{$" in page.texts
    assert page.tags.count("svg") == 2
    assert 'name="viewport"' in text
    assert "@media print" in text


def test_the_notebook_shows_the_same():
    result = tune()
    assert Page(result._repr_html_()).tags.count("svg") == 2
    assert str(result) == result.table
    assert result.plot().get_axes()


def test_a_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a folder"):
        tune().report(tmp_path / "file" / "report.html")


MEASURED_IN_A_FRAME = """<!DOCTYPE html><body>
<iframe width="390" height="800" style="border:0" srcdoc="{page}"></iframe>
<p id="found">nothing</p><script>
onload = () => {{
  const inner = document.querySelector("iframe").contentDocument;
  const box = (query) => inner.querySelector(query)?.getBoundingClientRect();
  document.querySelector("#found").textContent = JSON.stringify({{
    page: inner.documentElement.scrollWidth,
    pictures: [...inner.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().width),
    marks: [box("#chosen")?.width, box("#front")?.width, box("#chosen-sizes")?.width],
  }});
}};
</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_chromium_shows_the_charts_on_a_phone_s_width(tmp_path):
    page = c3a_triton.tuning.page.document(tune().outcome)
    (tmp_path / "frame.html").write_text(MEASURED_IN_A_FRAME.format(page=html.escape(page)))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", f"file://{tmp_path / 'frame.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=True)
    found = json.loads(html.unescape(re.search(r'<p id="found">(.*?)</p>', done.stdout)[1]))
    assert found["page"] <= 390
    assert len(found["pictures"]) == 2
    assert min(found["pictures"]) > 300
    assert min(found["marks"]) > 5
