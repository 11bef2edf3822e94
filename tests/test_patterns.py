import contextlib
import dataclasses
import itertools
import pickle
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from versions import PEFT

import c3a_triton
from c3a_triton.adapters.targets import find_targets
from c3a_triton.errors import ConfigError
from c3a_triton.files import expressions
from c3a_triton.files.config import C3AConfig
from c3a_triton.files.patterns import block_size_rule, parameter_rule, target_rule, unmatched_keys
from c3a_triton.files.peft_rules import peft_block_size_rule, peft_safe_pattern, peft_safe_targets

peft = pytest.importorskip("peft")

LLAMA = [
    f"model.layers.{layer}.{module}"
    for layer in range(12)
    for module in ("self_attn", "self_attn.q_proj", "self_attn.v_proj", "mlp", "mlp.up_proj", "mlp.down_proj")
]

# Few words, so that drawn names, entries and patterns meet often.
WORDS = st.sampled_from(["q", "v", "lin", "mlp", "layers", "h", "0", "1", "12", "q_proj"])
NAMES = st.lists(WORDS, min_size=1, max_size=6).map(".".join)
EXPRESSIONS = st.one_of(
    NAMES,
    st.sampled_from(
        [
            r".*q.*",
            r"q|v",
            r"(q|v)$",
            r".*\.[01]\..*",
            r"layers\.\d+\.q",
            r"^q",
            r"lin[01]?",
            r".*",
            r"q_proj|mlp.*",
            r"\w+",
        ]
    ),
)


@st.composite
def peft_configs(draw: st.DrawFn) -> dict:
    fields: dict = {"modules_to_save": draw(st.one_of(st.none(), st.lists(EXPRESSIONS, max_size=2, unique=True)))}
    fields["exclude_modules"] = draw(st.one_of(st.none(), EXPRESSIONS, st.lists(NAMES, max_size=2, unique=True)))
    if draw(st.booleans()):
        fields["target_modules"] = draw(EXPRESSIONS)
        return fields
    fields["target_modules"] = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    fields["layers_to_transform"] = draw(
        st.one_of(st.none(), st.integers(0, 12), st.lists(st.integers(0, 12), max_size=3))
    )
    fields["layers_pattern"] = draw(
        st.one_of(st.none(), st.sampled_from(["layers", "h", "", "la.*"]), st.lists(WORDS, max_size=2, unique=True))
    )
    return fields


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(peft_configs(), st.lists(NAMES, min_size=1, max_size=6))
# A module named in full is a target whatever its layer, and of two numbers in a name the first is the layer's.
@example(
    {"target_modules": ["m.layers.1.q", "v"], "exclude_modules": None, "layers_to_transform": [0]},
    ["m.layers.0.q", "m.layers.1.q", "m.layers.1.v", "m.layers.0.v"],
)
@example(
    {"target_modules": ["q"], "exclude_modules": None, "layers_to_transform": 1},
    ["m.layers.0.h.1.q", "m.layers.1.h.0.q", "layers.1.q", "q"],
)
@example(
    {"target_modules": ["q"], "exclude_modules": None, "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
    ["m.layers.0.h.1.q", "m.layers.1.h.0.q", "layers.1.q", "h.1.q"],
)
def test_targets_are_pefts(fields, names):
    from peft.tuners.tuners_utils import check_target_module_exists

    ours = C3AConfig(**fields)
    excluded = fields.pop("exclude_modules")
    theirs = peft.C3AConfig(**fields)
    # PEFT's matching reads the field of any configuration that has one; its C3A configuration merely lacks it.
    theirs.exclude_modules = excluded
    if PEFT < (0, 20) and fields.get("layers_to_transform") is not None:
        return  # it took the index of a layer from another place of the name
    for name in names:
        assert target_rule(ours)(name) == bool(check_target_module_exists(theirs, name)), name


class Parameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.proj_up = (nn.Parameter(torch.zeros(2, 4, 4)) for _ in range(3))


@pytest.mark.parametrize(
    "targets",
    [["up"], ["mlp.up"], ["layers.0.mlp.up"], ["ayers.0.mlp.up"], ["mlp"], [".up"], ["0.mlp.down", "1.mlp.up"], [".*"]],
)
def test_parameters_are_pefts(targets):
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"mlp": Parameters()}) for _ in range(2))
    is_target = parameter_rule(C3AConfig(target_parameters=targets))
    ours = {name for name, _ in model.named_parameters() if is_target(name)}
    theirs = set()
    if ours:  # PEFT refuses what matches nothing
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=targets, r=1))
        theirs = set(adapted.base_model.targeted_parameter_names)
    else:
        with pytest.raises(ValueError, match="target_parameters|not found"):
            peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=targets, r=1))
    assert ours == theirs


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({}, {"0.up", "0.down", "1.up", "1.down"}),
        ({"exclude_modules": ["down"]}, {"0.up", "1.up"}),
        ({"exclude_modules": ["1.experts"]}, {"0.up", "0.down"}),
        ({"exclude_modules": r".*0\.experts"}, {"1.up", "1.down"}),
        ({"exclude_modules": r".*0\.experts\.up"}, {"0.down", "1.up", "1.down"}),
        ({"modules_to_save": ["layers.1"]}, {"0.up", "0.down"}),
        ({"layers_to_transform": 1}, {"1.up", "1.down"}),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {"0.up", "0.down"}),
    ],
)
@pytest.mark.parametrize("targets", ["all-experts", ["experts.up", "down"]])
def test_what_other_fields_leave_of_parameters(targets, fields, left):
    is_target = parameter_rule(C3AConfig(target_modules=[], target_parameters=targets, **fields))
    names = [f"m.layers.{layer}.experts.{name}" for layer in range(2) for name in ("up", "down")]
    assert {name.removeprefix("m.layers.").replace("experts.", "") for name in names if is_target(name)} == left


def test_parameters_named_in_full_or_not_at_all():
    is_target = parameter_rule(C3AConfig(target_parameters=["h.0.experts.up"], layers_to_transform=1))
    assert is_target("h.0.experts.up")
    assert not is_target("m.h.0.experts.up")
    assert not parameter_rule(C3AConfig())("h.0.experts.up")


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_targets_that_need_a_model_are_refused(targets):
    with pytest.raises(ConfigError, match="has to be resolved"):
        target_rule(C3AConfig(target_modules=targets))("q_proj")


def test_the_root_is_no_target():
    assert not target_rule(C3AConfig(target_modules=".*"))("")


@pytest.mark.parametrize(
    ("key", "matching", "other"),
    [
        ("q_proj", ["q_proj", "model.layers.0.q_proj"], ["model.xq_proj", "q_proj.lora", "q_proj_2"]),
        (
            "model.layers.0.*",
            ["model.layers.0.self_attn.q_proj", "x.model.layers.0."],
            ["model.layers.10.q", "layers.0.q"],
        ),
        ("q_proj|v_proj", ["a.q_proj", "a.v_proj", "v_proj"], ["a.k_proj"]),
        ("lin[01]", ["lin0", "a.lin1"], ["lin2", "alin0"]),
        (".*mlp.*", ["a.mlp.up", "mlp"], ["a.attn"]),
        (r"self_attn\.q_proj", ["a.self_attn.q_proj", "self_attn.q_proj"], ["a.mlp.q_proj"]),
    ],
)
def test_block_size_key_matches_the_whole_name_or_all_after_a_dot(key, matching, other):
    config = C3AConfig(block_size=8, block_size_pattern={key: 4})
    for name in matching:
        assert block_size_rule(config)(name) == (4, key)
    for name in other:
        assert block_size_rule(config)(name) == (8, None)


def test_first_key_wins():
    config = C3AConfig(block_size="auto", block_size_pattern={"q_proj": 128, "model.layers.0.*": 64})
    assert block_size_rule(config)("model.layers.0.self_attn.q_proj") == (128, "q_proj")
    assert block_size_rule(config)("model.layers.0.self_attn.v_proj") == (64, "model.layers.0.*")
    assert block_size_rule(config)("model.layers.1.self_attn.v_proj") == ("auto", None)
    config = C3AConfig(block_size_pattern={"model.layers.0.*": 64, "q_proj": 128})
    assert block_size_rule(config)("model.layers.0.self_attn.q_proj") == (64, "model.layers.0.*")


def test_unmatched_keys_are_those_that_match_nothing():
    config = C3AConfig(block_size_pattern={".*proj": 4, "q_proj": 8, "k_proj": 8, "layers.99.*": 16})
    assert unmatched_keys(config, LLAMA) == ["k_proj", "layers.99.*"]


@pytest.mark.parametrize(
    "use",
    [
        lambda bad, name: target_rule(C3AConfig(target_modules=bad))(name),
        lambda bad, name: target_rule(C3AConfig(target_modules=["q"], exclude_modules=bad))(name),
        lambda bad, name: target_rule(C3AConfig(target_modules=["q"], modules_to_save=[bad]))(name),
        lambda bad, name: target_rule(C3AConfig(target_modules=["aa"], layers_to_transform=1, layers_pattern=bad))(
            name + ".aa"
        ),
        lambda bad, name: block_size_rule(C3AConfig(block_size_pattern={bad: 4}))(name),
        lambda bad, name: unmatched_keys(C3AConfig(block_size_pattern={bad: 4}), [name]),
        lambda bad, name: peft_block_size_rule({bad: 4}, 8)("x." + name),
    ],
    ids=["targets", "excluded", "saved", "layers", "block size", "unmatched", "peft"],
)
def test_a_catastrophic_pattern_ends_in_an_error(monkeypatch, use):
    monkeypatch.setattr(expressions, "TIME_LIMIT_S", 0.2)
    expressions.compile_pattern.cache_clear()
    bad = "(?:a|aa)+b|(?:a|aa)+c"
    with pytest.raises(ConfigError, match=re.escape(repr(bad)) + ".*too long"):
        use(bad, "a" * 60)  # without a limit for years
    expressions.compile_pattern.cache_clear()


def test_many_matches_that_are_merely_slow_share_the_limit(monkeypatch):
    # By a clock of which a match takes one second.
    monkeypatch.setattr(expressions, "time", SimpleNamespace(thread_time=itertools.count().__next__))
    monkeypatch.setattr(expressions, "TIME_LIMIT_S", 4.5)
    expressions.compile_pattern.cache_clear()
    config = C3AConfig(target_modules=".*b")
    assert not any(target_rule(config)("a") for _ in range(5))
    with pytest.raises(ConfigError, match="too long"):
        target_rule(config)("a")
    expressions.compile_pattern.cache_clear()


def test_all_that_a_configuration_is_asked_about_a_model_shares_a_limit(monkeypatch):
    # By a clock of which a match takes 3 s: four names for targets, two for block sizes, one for idle keys are 21 s.
    config = C3AConfig(target_modules="[ab]", block_size=4, block_size_pattern={"[ab]": 8})
    monkeypatch.setattr(expressions, "time", SimpleNamespace(thread_time=itertools.count().__next__))
    monkeypatch.setattr(expressions, "TIME_LIMIT_S", 1000.0)
    expressions.compile_pattern.cache_clear()
    for limit, message in ((24.5, None), (20.5, r"more than 20\.5 s"), (14.5, "more than 14")):
        monkeypatch.setattr(expressions, "TOTAL_TIME_LIMIT_S", limit)
        with contextlib.nullcontext() if message is None else pytest.raises(ConfigError, match=message):
            find_targets(model_of(["a", "b", "c", "d"]), config)
    expressions.compile_pattern.cache_clear()


def test_a_configuration_holds_its_fields_alone():
    """What matching takes along is neither copied nor pickled with it."""
    config = C3AConfig(target_modules=".*q", block_size=4, block_size_pattern={"a.*": 8})
    model = model_of(["a.q", "b.q", "b.v"])
    assert len(find_targets(model, config)) == 2
    assert vars(config).keys() == {item.name for item in dataclasses.fields(C3AConfig)}
    assert b"c3a_triton.files" not in pickle.dumps(c3a_triton.apply(model, config))


class Leaf(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 16, bias=False)


def model_of(names: list[str]) -> nn.Module:
    """Modules of these full names, linear ones of width 16 where nothing lies inside them."""
    root = nn.Module()
    for name in sorted(names):
        parent = root
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        if last not in parent._modules:
            parent.add_module(last, Leaf())
    return root


def leaves(names: list[str]) -> list[str]:
    return [name for name in sorted(set(names)) if not any(other.startswith(name + ".") for other in names)]


def peft_block_sizes(model: nn.Module, config: object) -> dict[str, int]:
    """What PEFT itself makes of a configuration: adapted module → block size."""
    adapted = peft.get_peft_model(model, config)
    return {
        name.removeprefix("base_model.model."): module.block_size["default"]
        for name, module in adapted.named_modules()
        if type(module).__name__ == "C3ALinear"
    }


SIZES = st.sampled_from([1, 2, 4, 8, 16])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(NAMES, min_size=1, max_size=7, unique=True).map(leaves),
    st.dictionaries(EXPRESSIONS, SIZES, max_size=3),
    SIZES,
)
def test_simulated_block_sizes_are_pefts(names, pattern, default):
    pattern = dict(sorted(pattern.items()))
    model = model_of(names)
    config = peft.C3AConfig(
        block_size=default, block_size_pattern=pattern, target_modules="|".join(map(re.escape, names))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert peft_block_sizes(model, config) == {name: peft_block_size_rule(pattern, default)(name) for name in names}


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(NAMES, min_size=1, max_size=7, unique=True).map(leaves),
    st.dictionaries(EXPRESSIONS, SIZES, max_size=3),
    SIZES,
    peft_configs(),
)
def test_what_is_written_for_peft_means_the_same_to_it(names, pattern, default, fields):
    config = C3AConfig(block_size=default, block_size_pattern=pattern, **fields | {"modules_to_save": None})
    model = model_of(names)
    module_names = [name for name, _ in model.named_modules()]
    resolved = {name: block_size_rule(config)(name)[0] for name in names if target_rule(config)(name)}
    if not resolved:
        return
    block_size, safe_pattern = peft_safe_pattern(resolved, config)
    targets, layers, layers_pattern = peft_safe_targets(list(resolved), config, module_names)
    theirs = peft.C3AConfig(
        block_size=block_size,
        block_size_pattern=safe_pattern,
        target_modules=targets,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert peft_block_sizes(model, theirs) == resolved


def test_a_pattern_that_peft_reads_alike_is_kept():
    config = C3AConfig(block_size=64, block_size_pattern={"v_proj": 32, ".*mlp.*": 16})
    resolved = {name: block_size_rule(config)(name)[0] for name in LLAMA}
    assert peft_safe_pattern(resolved, config) == (64, {".*mlp.*": 16, "v_proj": 32})


def test_documented_example_is_written_with_full_names():
    config = C3AConfig(block_size=64, block_size_pattern={"q_proj": 32, "model.layers.0.*": 16})
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qv"]
    resolved = {name: block_size_rule(config)(name)[0] for name in names}
    assert peft_safe_pattern(resolved, config) == (
        64,
        {
            "model.layers.0.self_attn.q_proj": 32,
            "model.layers.0.self_attn.v_proj": 16,
            "model.layers.1.self_attn.q_proj": 32,
        },
    )


def test_keys_whose_order_decides_survive_pefts_sorting():
    # As given, "q" comes first; PEFT would sort "a.*" before it.
    config = C3AConfig(block_size=64, block_size_pattern={"q": 32, "a.*": 16})
    assert block_size_rule(config)("x.a.q") == (32, "q")
    _, pattern = peft_safe_pattern({"x.a.q": 32, "x.a.v": 16}, config)
    assert [peft_block_size_rule(pattern, 64)(name) for name in ("x.a.q", "x.a.v")] == [32, 16]


def test_names_that_take_in_each_other_are_told_apart():
    resolved = {"lin": 32, "x.lin": 64, "y.x.lin": 256, "z.lin": 256, "lin(": 16, "x.lin(": 8}
    default, pattern = peft_safe_pattern(resolved, C3AConfig(block_size=256))
    assert default == 256
    assert {name: peft_block_size_rule(pattern, default)(name) for name in resolved} == resolved
    for name, size in resolved.items():
        key = next(filter(lambda key: re.match(rf".*\.{key}$", name), sorted(pattern)), name)
        assert pattern.get(key, default) == size


def test_automatic_sizes_become_a_number_and_full_names():
    resolved = {"a.q": 8, "a.v": 8, "b.q": 16}
    assert peft_safe_pattern(resolved, C3AConfig(block_size="auto")) == (8, {"b.q": 16})


def test_patterns_that_peft_cannot_use_where_it_puts_them_are_not_written():
    # A flag has to stand at the start of an expression, and PEFT puts something before it.
    config = C3AConfig(block_size=64, block_size_pattern={"(?i)Q_PROJ": 32})
    assert block_size_rule(config)("a.q_proj") == (32, "(?i)Q_PROJ")
    with pytest.raises(ConfigError, match="PEFT cannot use"):
        peft_block_size_rule(config.block_size_pattern, 64)("a.q_proj")
    assert peft_safe_pattern({"a.q_proj": 32, "b": 64}, config) == (64, {"a.q_proj": 32})
    config = C3AConfig(target_modules=["q"], layers_to_transform=0, layers_pattern="(?i)H")
    assert target_rule(config)("h.0.q")
    assert peft_safe_targets(["h.0.q"], config, ["", "h", "h.0", "h.0.q", "q"]) == (["h.0.q"], None, None)


def test_very_many_full_names_share_keys():
    names = [f"layers.{index}.q" for index in range(600)]
    resolved = {name: 8 if index < 280 else 4 if index < 300 else 16 for index, name in enumerate(names)}
    default, pattern = peft_safe_pattern(resolved, C3AConfig(block_size="auto"))
    assert len(pattern) == 2
    assert {name: peft_block_size_rule(pattern, default)(name) for name in names} == resolved


@pytest.mark.parametrize(
    ("fields", "adapted", "written"),
    [
        # Kept as it is, also where modules are excluded that were no targets anyway.
        ({"target_modules": ["q_proj"]}, "q_proj$", (["q_proj"], None, None)),
        ({"target_modules": ["q_proj"], "exclude_modules": ["lm_head"]}, "q_proj$", (["q_proj"], None, None)),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
            r"layers\.[01]\..*q_proj$",
            (["q_proj"], [0, 1], "layers"),
        ),
        ({"target_modules": r".*\.q_proj"}, "q_proj$", (r".*\.q_proj", None, None)),
        # Nothing PEFT could resolve without the model: the shortest list.
        ({"target_modules": None}, "(q|v)_proj$", (["q_proj", "v_proj"], None, None)),
        (
            {"target_modules": "all-linear"},
            "(q|v|up|down)_proj$",
            (["down_proj", "q_proj", "up_proj", "v_proj"], None, None),
        ),
        # An exclusion that matters, and layers that PEFT would count otherwise: full names.
        (
            {"target_modules": ["q_proj"], "exclude_modules": r".*\.([2-9]|1\d)\..*"},
            r"layers\.[01]\..*q_proj$",
            ([f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)], None, None),
        ),
    ],
)
def test_targets_written_for_peft(fields, adapted, written):
    names = [name for name in LLAMA if re.search(adapted, name)]
    assert peft_safe_targets(names, C3AConfig(**fields), ["", "model", "lm_head", *LLAMA]) == written


def test_layers_are_not_written_beside_a_list_that_peft_shortens():
    # Named in full, every one of these is a target whatever its layer. PEFT turns 20 names or more into "q_proj" and
    # "v_proj" first, and would then count layers.
    names = [name for name in LLAMA if name.endswith(("q_proj", "v_proj"))]
    config = C3AConfig(target_modules=names, layers_to_transform=[0], block_size=8)
    assert all(target_rule(config)(name) for name in names)
    model = model_of(names)
    targets, layers, _ = peft_safe_targets(names, config, [name for name, _ in model.named_modules()])
    theirs = peft.C3AConfig(target_modules=targets, layers_to_transform=layers, block_size=8)
    assert peft_block_sizes(model, theirs) == dict.fromkeys(names, 8)


def test_a_full_name_that_others_end_with_is_written_as_an_expression():
    module_names = ["", "lin", "block", "block.lin"]
    config = C3AConfig(target_modules=["lin"], exclude_modules=["block.lin"])
    targets, layers, layers_pattern = peft_safe_targets(["lin"], config, module_names)
    assert (targets, layers, layers_pattern) == ("lin", None, None)
    assert [name for name in module_names if re.fullmatch(targets, name)] == ["lin"]


def test_targets_that_cannot_be_written_are_refused():
    with pytest.raises(ConfigError, match="not in the model: b"):
        peft_safe_targets(["a", "b"], C3AConfig(target_modules=["a"]), ["a"])
    with pytest.raises(ConfigError, match="modules_to_save"):
        peft_safe_targets(["a"], C3AConfig(target_modules=["a"], modules_to_save=["a"]), ["a"])
