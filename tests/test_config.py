import collections
import collections.abc
import enum
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from versions import PEFT

import c3a_triton
from c3a_triton.errors import CheckpointError, ConfigError
from c3a_triton.files.block_sizes import suggest_block_size, valid_block_sizes
from c3a_triton.files.config import CONFIG_NAME, DEFAULT_TARGET_MODULES, C3AConfig

peft = pytest.importorskip("peft")

FULL = {
    "block_size": "auto",
    "rank": 8,
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["model.layers.0"],
    "block_size_pattern": {"z.*": 64, "a.*": 128},
    "init_weights": True,
    "bias": "c3a_only",
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [3, 1],
    "layers_pattern": "layers",
    "inference_mode": True,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "a/model",
    "revision": "main",
    "auto_mapping": {"base_model_class": "M", "parent_library": "lib"},
    "peft_version": "0.17.0",
    "target_parameters": ["mlp.experts.gate_up_proj", "scale"],
}


def test_defaults_are_pefts():
    ours, theirs = C3AConfig().to_dict(), peft.C3AConfig().to_dict()
    theirs.pop("peft_version", None)  # written since 0.18
    assert ours == theirs


def test_default_targets_are_pefts():
    from peft.utils import TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING

    theirs = TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING
    assert {name: DEFAULT_TARGET_MODULES[name] for name in theirs} == theirs
    if PEFT >= (0, 21):  # older ones know fewer models
        assert DEFAULT_TARGET_MODULES.keys() == theirs.keys()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_size", 0, "positive integer"),
        ("block_size", -4, "positive integer"),
        ("block_size", True, "positive integer"),
        ("block_size", 64.0, "positive integer"),
        ("block_size", "64", "positive integer"),
        ("block_size", None, "positive integer"),
        ("rank", 8, 'set block_size="auto"'),
        ("rank", True, "rank must be"),
        ("target_modules", "layers.(", r"'layers\.\(' is not a valid regular expression"),
        # The package `regex` takes these two, `re` and so PEFT does not; the second could fill the memory.
        ("target_modules", r"\p{L}+_proj", "is not a valid"),
        ("block_size_pattern", {"(?R)": 4}, "is not a valid"),
        ("target_modules", ["q_proj", 3], "list of non-empty names"),
        ("target_modules", [""], "list of non-empty names"),
        ("target_modules", [], "target_modules is empty"),
        ("target_modules", "", "target_modules is empty"),
        ("target_modules", 7, "list of non-empty names"),
        ("target_parameters", "experts.*", r"a list of names, \"all-experts\" or None, got 'experts\.\*'"),
        ("target_parameters", "", "a list of names"),
        ("target_parameters", [], "target_parameters is empty"),
        ("target_parameters", ["a", 3], "target_parameters must be a list of non-empty names, .* int and str"),
        ("target_parameters", ["all-experts"], "stands alone, as a string"),
        ("target_parameters", 7, "target_parameters must be a list of non-empty names"),
        ("exclude_modules", "[a", r"'\[a' is not a valid"),
        ("exclude_modules", {"a": 1}, "list of non-empty names"),
        ("block_size_pattern", {"*": 4}, r"'\*' is not a valid"),
        # Valid alone, but it would comment out the end of the rule it is put into.
        ("block_size_pattern", {"(?x)q # v": 4}, "is not a valid"),
        ("block_size_pattern", {"a": True}, r"block_size_pattern\['a'\] must be a positive integer"),
        ("block_size_pattern", {"a": "auto"}, r"block_size_pattern\['a'\] must be a positive integer"),
        ("block_size_pattern", {"a": 0}, r"block_size_pattern\['a'\] must be a positive integer"),
        ("block_size_pattern", {"": 4}, "non-empty regular expression"),
        ("block_size_pattern", [("a", 4)], "must be a dict"),
        ("init_weights", "zeros", "init_weights must be"),
        ("init_weights", None, "init_weights must be"),
        ("init_weights", 1, "init_weights must be"),
        ("bias", "lora_only", "bias must be one of"),
        ("modules_to_save", ["head("], r"'head\(' is not a valid"),
        ("modules_to_save", 3, "list of non-empty names"),
        ("layers_to_transform", "0", "layer index"),
        ("layers_to_transform", [0, True], "layer index"),
        ("layers_pattern", ["h["], r"'h\[' is not a valid"),
        ("inference_mode", "yes", "inference_mode"),
        ("task_type", 3, "task_type"),
        ("auto_mapping", "x", "auto_mapping"),
    ],
)
def test_bad_values_are_refused_by_name(field, value, message):
    with pytest.raises(ConfigError, match=message):
        C3AConfig(**{field: value})


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_layers_need_a_list_of_targets_as_in_peft(field):
    value = {"layers_to_transform": 0, "layers_pattern": "layers"}[field]
    with pytest.raises(ConfigError, match=f"{field} works only with a list"):
        C3AConfig(target_modules="all-linear", **{field: value})
    with pytest.raises(ValueError, match=field):
        peft.C3AConfig(target_modules="all-linear", **{field: value})


def test_lists_are_normalised():
    config = C3AConfig(
        target_modules={"v", "q"},
        exclude_modules=("b", "a", "b"),
        modules_to_save="lm_head",
        layers_to_transform=range(2),
        block_size_pattern=None,
    )
    assert config.target_modules == ["q", "v"]
    assert config.exclude_modules == ["b", "a"]
    assert config.modules_to_save == ["lm_head"]
    assert config.layers_to_transform == [0, 1]
    assert config.block_size_pattern == {}
    assert C3AConfig(target_modules="ALL-LINEAR").target_modules == "all-linear"


def test_parameters_are_named_alone_or_beside_modules():
    assert C3AConfig(target_parameters="ALL-Experts").target_parameters == "all-experts"
    config = C3AConfig(target_modules=[], target_parameters={"b", "a"})
    assert (config.target_modules, config.target_parameters) == ([], ["a", "b"])
    assert "target_parameters" not in C3AConfig().to_dict()
    with pytest.raises(ConfigError, match="target_modules is empty"):
        C3AConfig(target_modules="", target_parameters=["a"])


class Task(str, enum.Enum):
    LM = "CAUSAL_LM"


class Width(enum.IntEnum):
    WIDE = 8


class Name(str):
    """A string of somebody's own, as numpy and YAML readers have them."""


class ListLike(collections.abc.Sequence):
    """A list that is none, as OmegaConf's."""

    def __init__(self, *items: object) -> None:
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


PLAIN = {
    "block_size": 8,
    "target_modules": ["q_proj", "v_proj"],
    "block_size_pattern": {"a": 4},
    "layers_to_transform": [0, 1],
    "layers_pattern": ["layers"],
    "modules_to_save": ["head"],
    "init_weights": True,
    "inference_mode": False,
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"a": [1, {"b": "c"}]},
}


def numpys():
    return {
        "block_size": np.int64(8),
        "target_modules": np.array(["q_proj", "v_proj"]),
        "block_size_pattern": {np.str_("a"): np.int32(4)},
        "layers_to_transform": np.arange(2),
        "layers_pattern": [np.str_("layers")],
        "modules_to_save": (np.str_("head"),),
        "init_weights": np.bool_(True),
        "inference_mode": np.bool_(False),
        "task_type": np.str_("CAUSAL_LM"),
        "auto_mapping": {"a": (np.int64(1), {"b": np.str_("c")})},
    }


def containers():
    return {
        "block_size": Width.WIDE,
        "target_modules": frozenset({"v_proj", "q_proj"}),
        "block_size_pattern": collections.UserDict({Name("a"): 4}),
        "layers_to_transform": ListLike(0, np.int64(1)),
        "layers_pattern": ListLike(Name("layers")),
        "modules_to_save": collections.UserList(["head"]),
        "task_type": Task.LM,
        "init_weights": True,
        "auto_mapping": collections.OrderedDict(a=ListLike(1, collections.ChainMap({"b": Name("c")}))),
    }


def omegaconfs():
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create(PLAIN | {"block_size": "${width}", "width": 8})
    return {name: config[name] for name in PLAIN}


@pytest.mark.parametrize("values", [numpys, containers, omegaconfs])
def test_what_stands_for_plain_values_is_taken(values, tmp_path):
    values = values()
    for config in (C3AConfig(**values), C3AConfig.from_dict(values), C3AConfig.from_any(peft.C3AConfig(**values))):
        found = json.loads(config.to_json())  # JSON takes nothing but plain ones
        assert {name: found[name] for name in PLAIN} == PLAIN
        for name in PLAIN:
            assert repr(getattr(config, name)) == repr(PLAIN[name])
    model = c3a_triton.apply(
        nn.ModuleDict({"q_proj": nn.Linear(8, 8), "a": nn.Linear(8, 8)}),
        {
            "block_size": values["block_size"],
            "target_modules": ["q_proj", "a"],
            "block_size_pattern": values["block_size_pattern"],
        },
    )
    model.c3a.save_pretrained(tmp_path)
    assert c3a_triton.load_adapter(nn.ModuleDict({"q_proj": nn.Linear(8, 8), "a": nn.Linear(8, 8)}), tmp_path)


def test_layers_and_rules_take_numpys_numbers():
    layer = c3a_triton.C3ALinear(nn.Linear(8, 8), block_size=np.int64(4), init_weights=np.bool_(True))
    assert repr(layer.block_size) == "{'default': 4}"
    assert not layer.c3a_kernel["default"].any()
    assert repr(suggest_block_size(np.int64(64), np.int32(64), rank=np.int64(4))) == repr(
        suggest_block_size(64, 64, rank=4)
    )
    assert repr(valid_block_sizes(np.int64(8), np.int64(4))) == "[1, 2, 4]"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_size", np.bool_(True), 'positive integer or "auto", got True, a bool'),
        ("block_size", np.float64(8), "got 8.0, a float"),
        ("block_size", "8", "got '8', a str"),
        ("block_size_pattern", {"a": np.bool_(True)}, "got True, a bool"),
        ("layers_to_transform", np.array([True]), "got \\[True\\], a list of bool"),
        ("target_modules", ["q_proj", np.int64(3)], r"got \['q_proj', 3\], a list of int and str"),
        ("target_modules", (name for name in "ab"), "a generator"),
        ("target_modules", b"q_proj", "a bytes"),
        ("init_weights", np.int64(1), "got 1, a int"),
    ],
)
def test_errors_name_the_type(field, value, message):
    with pytest.raises(ConfigError, match=message):
        C3AConfig(**{field: value})


def test_paths_and_what_json_cannot_hold():
    config = C3AConfig(base_model_name_or_path=Path("a/b"), auto_mapping={"c": [Path("d")]})
    assert json.loads(config.to_json())["auto_mapping"] == {"c": ["d"]}
    assert C3AConfig(target_modules=collections.UserString("all-linear")).target_modules == "all-linear"
    with pytest.raises(ConfigError, match="auto_mapping has to be written as JSON: Object of type dtype"):
        C3AConfig(auto_mapping={"dtype": torch.float16})


def test_sets_are_ordered():
    layers = C3AConfig(target_modules={"b", "a", "c"}, layers_to_transform={10, 9, 2})
    assert (layers.target_modules, layers.layers_to_transform) == (["a", "b", "c"], [2, 9, 10])


def test_what_is_nested_too_deeply():
    value = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ConfigError, match="auto_mapping is nested too deeply"):
        C3AConfig(auto_mapping={"a": value})


def test_dict_round_trip_keeps_every_field_and_the_order_of_patterns():
    config = C3AConfig(**FULL)
    values = config.to_dict()
    assert values == {"peft_type": "C3A", **FULL}
    assert C3AConfig.from_dict(values) == config
    values["target_modules"].append("x")
    values["block_size_pattern"]["b"] = 1
    assert config == C3AConfig(**FULL)


def test_file_round_trip(tmp_path):
    config = C3AConfig(**FULL)
    config.save_pretrained(tmp_path / "new" / "folder")
    back = C3AConfig.from_pretrained(tmp_path / "new" / "folder")
    assert back == config
    assert list(back.block_size_pattern) == ["z.*", "a.*"]
    assert os.listdir(tmp_path / "new" / "folder") == [CONFIG_NAME]


def test_peft_reads_our_file_without_a_warning(tmp_path):
    config = C3AConfig(block_size=64, target_modules=["q", "v"], block_size_pattern={"q": 32}, init_weights=False)
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.C3AConfig.from_pretrained(tmp_path)
    assert theirs.target_modules == {"q", "v"}
    assert (theirs.block_size, theirs.block_size_pattern, theirs.init_weights) == (64, {"q": 32}, False)


def test_peft_reads_our_extras_with_a_warning_that_names_them(tmp_path):
    config = C3AConfig(target_modules=["q"], exclude_modules=["v"], block_size="auto", rank=4, target_parameters=["p"])
    config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"\['exclude_modules', 'rank', 'target_parameters'\]"):
        assert peft.C3AConfig.from_pretrained(tmp_path).target_modules == {"q"}


def test_we_read_pefts_file(tmp_path):
    theirs = peft.C3AConfig(
        block_size=64,
        target_modules=["v", "q"],
        block_size_pattern={"z": 8, "a": 16},
        task_type=peft.TaskType.CAUSAL_LM,
    )
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = C3AConfig.from_pretrained(tmp_path)
    assert set(ours.target_modules) == {"q", "v"}
    assert ours.task_type == "CAUSAL_LM"
    assert ours.peft_version == (peft.__version__ if PEFT >= (0, 18) else None)
    from_object = C3AConfig.from_any(theirs)
    assert from_object.target_modules == ["q", "v"]
    assert from_object.task_type == "CAUSAL_LM"
    assert type(from_object.task_type) is str
    assert list(from_object.block_size_pattern) == ["z", "a"]


def test_unknown_fields_are_named_in_a_warning():
    with pytest.warns(UserWarning, match="ignores them: alpha, beta"):
        config = C3AConfig.from_dict({"peft_type": "C3A", "block_size": 8, "beta": 1, "alpha": 2})
    assert config.block_size == 8


def test_other_methods_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'LORA'"):
        C3AConfig.from_any(peft.LoraConfig())
    peft.LoraConfig(target_modules=["q"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"{CONFIG_NAME}.*'LORA'"):
        C3AConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"C3AConfig, a peft\.C3AConfig or a dict, got int"):
        C3AConfig.from_any(3)


def test_from_any_copies_and_checks_again():
    config = C3AConfig(target_modules=["q"])
    copy = C3AConfig.from_any(config)
    assert copy == config
    assert copy is not config
    assert copy.target_modules is not config.target_modules
    config.block_size = 0
    with pytest.raises(ConfigError):
        C3AConfig.from_any(config)
    assert C3AConfig.from_any({"block_size": 8}).block_size == 8


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", CheckpointError, "not valid JSON"),
        (b'{"peft_type": "C3A"', CheckpointError, "not valid JSON"),
        (b"\xff\xfe\x00", CheckpointError, "not valid JSON"),
        (b"[" * 100_000, CheckpointError, "not valid JSON"),
        (b"[1]", CheckpointError, "must hold a JSON object"),
        (b" " * (2**24 + 1), CheckpointError, "larger than"),
        (b"{}", ConfigError, "no peft_type"),
        (b'{"peft_type": "C3A", "block_size": -1}', ConfigError, f"{CONFIG_NAME}: block_size must be"),
    ],
    ids=["empty", "truncated", "binary", "deep", "list", "large", "no type", "bad value"],
)
def test_bad_files_are_refused(tmp_path, content, error, message):
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(error, match=message):
        C3AConfig.from_pretrained(tmp_path)


def test_missing_folder_file_for_folder_and_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        C3AConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=f"has no {CONFIG_NAME}"):
        C3AConfig.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is not valid JSON"):
        C3AConfig.from_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot write"):
        C3AConfig().save_pretrained(tmp_path / "file")


def test_a_file_is_read_as_a_folder_s_is(tmp_path):
    config = C3AConfig(block_size=8, block_size_pattern={"v": 4, "a": 2})
    (tmp_path / "c3a.json").write_bytes(config.to_json())
    assert C3AConfig.from_pretrained(tmp_path / "c3a.json") == config
    (tmp_path / "other.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="other.json: .*LORA"):
        C3AConfig.from_pretrained(tmp_path / "other.json")


def test_a_failed_save_leaves_the_former_file(tmp_path, monkeypatch):
    C3AConfig(block_size=8).save_pretrained(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CheckpointError, match="disk full"):
        C3AConfig(block_size=16).save_pretrained(tmp_path)
    assert C3AConfig.from_pretrained(tmp_path).block_size == 8
    assert os.listdir(tmp_path) == [CONFIG_NAME]
