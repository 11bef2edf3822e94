"""The catalogue of bad inputs: what each public call says to them, and that it changes nothing.

Each row is a call on an adapted model, the error and what its message has to hold: the value, the layer or file, the
remedy. Files that are damaged or hostile are in test_bad_files.py, the command's refusals in test_cli.py beside these.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import MLP
from torch import nn

import c3a_triton
from c3a_triton import (
    AdapterNotFoundError,
    AdapterStateError,
    BackendError,
    C3AConfig,
    C3ALinear,
    CheckpointError,
    ConfigError,
    ShapeError,
    c3a_linear,
    circulant_linear,
    circulant_matrix,
    suggest_block_size,
    valid_block_sizes,
)
from c3a_triton.cli import main

Call = Callable[[nn.Module], object]
Row = tuple[Call, type[Exception], str]

GOOD = {"block_size": 6, "target_modules": ["first"]}
W = torch.zeros(2, 3, 4)
X = torch.zeros(5, 12)


def config(**changes: object) -> Call:
    """A configuration alone."""
    return lambda model: C3AConfig(**(GOOD | changes))


def added(**changes: object) -> Call:
    """A configuration that is good in itself, for this model."""
    return lambda model: model.c3a.add_adapter("new", C3AConfig(**(GOOD | changes)))


def layer(**arguments: object) -> Call:
    return lambda model: C3ALinear(**({"base_layer": nn.Linear(12, 24), "block_size": 4} | arguments))


def verb(name: str, *arguments: object, **more: object) -> Call:
    return lambda model: getattr(model.c3a, name)(*arguments, **more)


def wrong_forward(model: nn.Module) -> object:
    return model(torch.zeros(2, 13))


CONFIGURATIONS: dict[str, Row] = {
    "block_size zero": (config(block_size=0), ConfigError, r'block_size must be a positive integer or "auto", got 0'),
    "block_size negative": (config(block_size=-4), ConfigError, "positive integer.*got -4"),
    "block_size a float": (config(block_size=4.0), ConfigError, r"positive integer.*got 4\.0"),
    "block_size NaN": (config(block_size=float("nan")), ConfigError, "positive integer.*got nan"),
    "block_size infinite": (config(block_size=float("inf")), ConfigError, "positive integer.*got inf"),
    "block_size a bool": (config(block_size=True), ConfigError, "positive integer.*got True"),
    "block_size None": (config(block_size=None), ConfigError, "positive integer.*got None"),
    "block_size text": (config(block_size="4"), ConfigError, "positive integer.*got '4'"),
    "block_size a list": (config(block_size=[4]), ConfigError, r"positive integer.*got \[4\]"),
    "rank zero": (config(block_size="auto", rank=0), ConfigError, "rank must be a positive integer or None, got 0"),
    "rank a bool": (config(block_size="auto", rank=True), ConfigError, "rank must.*got True"),
    "rank beside a size": (
        config(rank=8),
        ConfigError,
        'rank=8 has no meaning beside block_size=6: set block_size="auto"',
    ),
    "pattern a list": (config(block_size_pattern=["a"]), ConfigError, r"block_size_pattern must be a dict.*\['a'\]"),
    "pattern key empty": (config(block_size_pattern={"": 4}), ConfigError, "non-empty regular expression, got ''"),
    "pattern key a number": (config(block_size_pattern={1: 4}), ConfigError, "non-empty regular expression, got 1"),
    "pattern size zero": (config(block_size_pattern={"a": 0}), ConfigError, r"block_size_pattern\['a'\] must.*got 0"),
    "pattern size a bool": (config(block_size_pattern={"a": True}), ConfigError, r"\['a'\] must.*got True"),
    "pattern size NaN": (config(block_size_pattern={"a": float("nan")}), ConfigError, r"\['a'\] must.*got nan"),
    "pattern no expression": (config(block_size_pattern={"(": 4}), ConfigError, r"'\(' is not a valid regular"),
    "pattern for regex alone": (
        config(block_size_pattern={"(?R)": 4}),
        ConfigError,
        r"'\(\?R\)' is not a valid regular",
    ),
    "targets empty": (config(target_modules=[]), ConfigError, "target_modules is empty: name modules"),
    "targets empty text": (config(target_modules=""), ConfigError, "target_modules is empty: name modules"),
    "targets a number": (
        config(target_modules=3),
        ConfigError,
        "target_modules must be a list of non-empty names, got 3",
    ),
    "targets with an empty name": (config(target_modules=["a", ""]), ConfigError, r"non-empty names, got \['a', ''\]"),
    "targets with a number": (config(target_modules=["a", 1]), ConfigError, r"non-empty names, got \['a', 1\]"),
    "targets no expression": (config(target_modules="*"), ConfigError, r"'\*' is not a valid regular expression"),
    "excluded no expression": (config(exclude_modules="["), ConfigError, r"'\[' is not a valid regular expression"),
    "saved with None": (config(modules_to_save=[None]), ConfigError, r"modules_to_save must.*got \[None\]"),
    "layers of text": (config(layers_to_transform=["1"]), ConfigError, r"layer index or a list of them, got \['1'\]"),
    "layers a bool": (config(layers_to_transform=True), ConfigError, "layer index or a list of them, got True"),
    "layers beside an expression": (
        config(target_modules="first", layers_to_transform=[0]),
        ConfigError,
        "layers_to_transform works only with a list.*put the layers into the regular expression",
    ),
    "layers_pattern no expression": (config(layers_pattern=["("]), ConfigError, r"'\(' is not a valid regular"),
    "unknown init": (config(init_weights="zeros"), ConfigError, "init_weights must be True, False or one of.*'zeros'"),
    "init a number": (config(init_weights=1), ConfigError, "init_weights must be.*got 1"),
    "unknown bias": (config(bias="some"), ConfigError, "bias must be one of.*got 'some'"),
    "inference_mode a number": (config(inference_mode=1), ConfigError, "inference_mode must be True or False, got 1"),
    "revision a number": (config(revision=1), ConfigError, "revision must be a string or None, got 1"),
    "auto_mapping a list": (config(auto_mapping=[]), ConfigError, r"auto_mapping must be a dict or None, got \[\]"),
    "not a dict": (lambda model: C3AConfig.from_dict([1]), ConfigError, "must be a dict, got list"),
    "another method": (
        lambda model: C3AConfig.from_dict({"peft_type": "LORA"}),
        ConfigError,
        "configuration of a 'LORA' adapter; only 'C3A'",
    ),
}

MODELS: dict[str, Row] = {
    "no module": (lambda model: c3a_triton.apply([model], GOOD), ConfigError, "torch module to adapt, got list"),
    "no configuration": (lambda model: c3a_triton.apply(MLP(), 7), ConfigError, "C3AConfig.*or a dict, got int"),
    "no default targets": (lambda model: c3a_triton.apply(MLP()), ConfigError, "target_modules"),
    "a size that does not divide": (
        added(block_size=5),
        ShapeError,
        "first: block_size=5 does not divide.*valid sizes",
    ),
    "a size for terabytes": (
        added(block_size=2**50),
        ShapeError,
        f"first: block_size={2**50} does not divide.*largest is 12",
    ),
    "a size too long to print": (added(block_size=10**4000), ShapeError, "first: block_size=1000.*does not divide"),
    "a norm": (added(target_modules=["norm"]), ConfigError, "norm.*LayerNorm"),
    "no such module": (added(target_modules=["frist"]), ConfigError, "matches no module.*Did you mean 'first'"),
    "all excluded": (added(exclude_modules=["first"]), ConfigError, r"left by exclude_modules=\['first'\]"),
    "taken name": (verb("add_adapter", "default", GOOD), AdapterStateError, "'default' already: choose another name"),
    "name with a dot": (verb("add_adapter", "a.b", GOOD), ConfigError, "'a.b' has a dot.*leave it out"),
    "empty name": (verb("add_adapter", "", GOOD), ConfigError, "non-empty string, got ''"),
    "name a number": (verb("add_adapter", 3, GOOD), ConfigError, "non-empty string, got 3"),
    "reserved name": (verb("add_adapter", "keys", GOOD), ConfigError, "'keys' is reserved: choose another"),
    "unknown backend": (lambda model: c3a_triton.apply(MLP(), GOOD, backend="cuda"), BackendError, "'cuda'"),
    "another backend unasked": (
        lambda model: c3a_triton.apply(model, GOOD, "new", backend="torch"),
        AdapterStateError,
        r"set_backend\('torch'\)",
    ),
    "no folder": (
        lambda model: c3a_triton.load_adapter(model, "nowhere", "new"),
        CheckpointError,
        "no folder nowhere.*snapshot_download",
    ),
    "loading a taken name": (verb("load_adapter", "nowhere"), AdapterStateError, "'default' already"),
}

VERBS: dict[str, Row] = {
    "set an unknown one": (verb("set_adapter", "nope"), AdapterNotFoundError, "no adapter 'nope'; there are: 'def"),
    "set one of two": (verb("set_adapter", ["default", "nope"]), AdapterNotFoundError, "no adapter 'nope'"),
    "delete an unknown one": (verb("delete_adapter", "nope"), AdapterNotFoundError, "no adapter 'nope'"),
    "rename an unknown one": (verb("rename_adapter", "nope", "x"), AdapterNotFoundError, "no adapter 'nope'"),
    "rename to a taken name": (verb("rename_adapter", "default", "other"), AdapterStateError, "'other' already"),
    "rename to a dot": (verb("rename_adapter", "default", "a.b"), ConfigError, "'a.b' has a dot"),
    "merge an unknown one": (verb("merge_adapter", ["nope"]), AdapterNotFoundError, "no adapter 'nope'"),
    "merge and keep elsewhere": (
        verb("merge_adapter", keep_base="disk"),
        ConfigError,
        "keep_base must be one of.*'disk'",
    ),
    "save an unknown one": (verb("save_pretrained", "out", "nope"), AdapterNotFoundError, "no adapter 'nope'"),
    "save into a device": (verb("save_pretrained", "/dev/null/adapter"), CheckpointError, "cannot write /dev/null"),
    "state of an unknown one": (verb("state_dict", "nope"), AdapterNotFoundError, "no adapter 'nope'"),
    "swap an unknown one": (verb("hotswap_adapter", "nowhere", "nope"), AdapterNotFoundError, "no adapter 'nope'"),
    "swap from nowhere": (verb("hotswap_adapter", "nowhere"), CheckpointError, "no folder nowhere"),
    "unknown backend": (verb("set_backend", "fast"), BackendError, "'fast'"),
    "backend of no layer": (verb("set_backend", "torch", layers=["third"]), ConfigError, "third"),
    "sum of no adapters": (verb("add_weighted_adapter", [], [], "sum"), ConfigError, r"each adapter once.*got \[\]"),
    "sum with too few weights": (
        verb("add_weighted_adapter", ["default", "other"], [1.0], "sum"),
        ConfigError,
        r"a weight for each.*\[1\.0\]",
    ),
    "sum of an unknown one": (verb("add_weighted_adapter", ["nope"], [1.0], "sum"), AdapterNotFoundError, "'nope'"),
    "sum of different sizes": (
        verb("add_weighted_adapter", ["default", "other"], [1.0, 1.0], "sum"),
        ShapeError,
        "first: the adapters' block sizes differ.*set_adapter",
    ),
    "sum by another rule": (
        verb("add_weighted_adapter", ["default"], [1.0], "sum", "svd"),
        ConfigError,
        "combination_type.*'svd'",
    ),
    "a forward of another width": (wrong_forward, ShapeError, "first: x has 13 features"),
}

FUNCTIONS: dict[str, Row] = {
    "w of two dimensions": (lambda m: circulant_linear(X, W[0]), ShapeError, r"w has the shape \(3, 4\).*out_blocks"),
    "w of integers": (lambda m: circulant_linear(X, W.int()), ShapeError, "w is torch.int32: it must be a floating"),
    "x of another width": (lambda m: circulant_linear(X[:, :11], W), ShapeError, "x has 11 features.*= 12"),
    "x of integers": (lambda m: circulant_linear(X.long(), W), ShapeError, "x is torch.int64.*must be floating"),
    "x a number": (lambda m: circulant_linear(torch.tensor(1.0), W), ShapeError, r"x is .* of shape \(\)"),
    "backend for layers": (lambda m: circulant_linear(X, W, backend="fold"), BackendError, "use c3a_linear, or 'auto'"),
    "backend unknown": (lambda m: circulant_linear(X, W, backend="magic"), BackendError, "'magic'"),
    "w on another device": (lambda m: circulant_linear(X, W.to("meta")), ShapeError, "x is on cpu and w on meta: move"),
    "matrix of two dimensions": (lambda m: circulant_matrix(W[0]), ShapeError, r"w has the shape \(3, 4\)"),
    "weight of another width": (
        lambda m: c3a_linear(X, torch.zeros(8, 11), None, [W]),
        ShapeError,
        r"x has 12 features, but the weight has the shape \(8, 11\)",
    ),
    "weight of other rows": (lambda m: c3a_linear(X, torch.zeros(9, 12), None, [W]), ShapeError, "9 rows.* = 8"),
    "weight of another dtype": (
        lambda m: c3a_linear(X, torch.zeros(8, 12).half(), None, [W]),
        ShapeError,
        "weight torch.float16.*must be the same",
    ),
    "bias of another size": (
        lambda m: c3a_linear(X, torch.zeros(8, 12), torch.zeros(7), [W]),
        ShapeError,
        r"bias has the shape \(7,\): it must be \(8,\)",
    ),
    "layer: size does not divide": (layer(block_size=5), ShapeError, "block_size=5 does not divide"),
    "layer: size negative": (layer(block_size=-1), ConfigError, "positive integer, got -1"),
    "layer: size a bool": (layer(block_size=True), ConfigError, "positive integer, got True"),
    "layer: base a norm": (layer(base_layer=nn.LayerNorm(12)), ConfigError, "LayerNorm"),
    "layer: name with a dot": (layer(adapter_name="a.b"), ConfigError, "'a.b' has a dot"),
    "layer: unknown init": (layer(init_weights="ones"), ConfigError, "init_weights must be.*got 'ones'"),
    "widths of nothing": (lambda m: valid_block_sizes(0, 8), ShapeError, "positive integers, got in_features=0"),
    "widths of text": (lambda m: valid_block_sizes("8", 8), ShapeError, "positive integers, got in_features='8'"),
    "rank of nothing": (lambda m: suggest_block_size(8, 8, rank=0), ConfigError, "rank must.*got 0"),
    "budget too small": (lambda m: suggest_block_size(8, 8, max_params=1), ConfigError, "needs at least 8 parameters"),
}

TUNER: dict[str, Row] = {
    "no budget": (lambda m: c3a_triton.autotune(MLP(), target_modules=["first"]), ConfigError, "budget"),
    "two budgets": (
        lambda m: c3a_triton.autotune(MLP(), 1000, like_lora_rank=4, target_modules=["first"]),
        ConfigError,
        "budget",
    ),
    "budget of words": (lambda m: c3a_triton.autotune(MLP(), "lots", target_modules=["first"]), ConfigError, "'lots'"),
    "budget negative": (lambda m: c3a_triton.autotune(MLP(), -5, target_modules=["first"]), ConfigError, "-5"),
    "no tokens": (lambda m: c3a_triton.autotune(MLP(), 1000, 0, target_modules=["first"]), ConfigError, "tokens.*0"),
    "objective": (
        lambda m: c3a_triton.autotune(MLP(), 1000, objective="speed", target_modules=["first"]),
        ConfigError,
        "objective.*'speed'",
    ),
    "mode": (
        lambda m: c3a_triton.autotune(MLP(), 1000, mode="test", target_modules=["first"]),
        ConfigError,
        "mode.*'test'",
    ),
    "no model": (lambda m: c3a_triton.autotune(5, 1000), ConfigError, "got int"),
}

ROWS = {
    f"{title}: {name}": row
    for title, rows in (
        ("config", CONFIGURATIONS),
        ("model", MODELS),
        ("verb", VERBS),
        ("function", FUNCTIONS),
        ("tuner", TUNER),
    )
    for name, row in rows.items()
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("C3A_TRITON_CACHE", str(tmp_path / "cache"))
    yield
    assert list(tmp_path.iterdir()) == []


def two_adapters() -> nn.Module:
    model = c3a_triton.apply(MLP(), GOOD)
    model.c3a.add_adapter("other", C3AConfig(block_size=4, target_modules=["first"]))
    return model


def described(model: nn.Module) -> list[tuple[object, ...]]:
    """What a call could change: classes, values, what is trained, what is active."""
    manager = model.c3a
    return [
        *((name, type(module), module.training) for name, module in model.named_modules()),
        *((name, parameter.requires_grad) for name, parameter in model.named_parameters()),
        *((name, value.clone().numpy().tobytes()) for name, value in model.state_dict().items()),
        (manager.active_adapters, {name: config.to_dict() for name, config in manager.adapters.items()}),
        *((name, layer.merged_adapters, layer.backend) for name, layer in manager.layers()),
    ]


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_input_is_refused_and_changes_nothing(name: str) -> None:
    call, error, message = ROWS[name]
    model = two_adapters()
    before = described(model)
    with pytest.raises(error, match=f"(?s){message}") as caught:
        call(model)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 5000
    assert described(model) == before


def test_there_are_enough() -> None:
    assert len(ROWS) >= 60


COMMANDS = {
    "no model's folder": ("inspect ./nowhere", "no folder"),
    "inspect a negative size": ("inspect . --block-size -4", "-4"),
    "merge without a model": ("merge --model ./a --adapter ./b --output ./c", "no folder"),
    "bench a size that does not divide": ("bench --in 12 --out 12 --block-size 5 --tokens 4 --device cpu", "5"),
    "tune without a model": ("autotune ./nowhere --max-params 1000", "no folder"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_command_line_is_a_message(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, message = COMMANDS[name]
    assert main(arguments.split()) in (1, 2)
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
