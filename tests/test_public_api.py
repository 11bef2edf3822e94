"""The names users' scripts rely on, pinned."""

import ast
import importlib.util
import inspect
import pickle
from pathlib import Path

import pytest

import c3a_triton


def test_public_names():
    assert sorted(c3a_triton.__all__) == [
        "AdapterManager",
        "AdapterNotFoundError",
        "AdapterStateError",
        "BackendError",
        "C3AConfig",
        "C3AConv2d",
        "C3AEmbedding",
        "C3AError",
        "C3AExperts",
        "C3ALinear",
        "C3AParameters",
        "CheckpointError",
        "ConfigError",
        "ShapeError",
        "apply",
        "autotune",
        "c3a_linear",
        "circulant_linear",
        "circulant_matrix",
        "explain",
        "load_adapter",
        "param_groups",
        "register_linear_like",
        "suggest_block_size",
        "valid_block_sizes",
    ]
    offered = {name for name in dir(c3a_triton) if not name.startswith("_")}
    assert offered == set(c3a_triton.__all__)


def test_type_checkers_are_told_the_same_names():
    """Of the same modules, under their own names: what the table says, which type checkers do not read."""
    block = next(node for node in ast.parse(Path(c3a_triton.__file__).read_text()).body if isinstance(node, ast.If))
    told = [(alias.name, alias.asname, f"c3a_triton.{node.module}") for node in block.body for alias in node.names]
    assert sorted(told) == [(name, name, f"c3a_triton.{home}") for name, home in sorted(c3a_triton._HOMES.items())]


def test_names_are_imported_when_they_are_asked_for():
    module = importlib.util.module_from_spec(c3a_triton.__spec__)
    c3a_triton.__spec__.loader.exec_module(module)
    assert "apply" not in vars(module)
    assert module.apply is vars(module)["apply"] is c3a_triton.apply
    names: dict[str, object] = {}
    exec("from c3a_triton import *", names)
    assert {*names} - {"__builtins__"} == {*c3a_triton.__all__}
    with pytest.raises(AttributeError, match="module 'c3a_triton' has no attribute 'adapt'"):
        _ = c3a_triton.adapt


def test_public_names_do_not_tell_where_they_live():
    """A pickle names `c3a_triton.C3ALinear`, which stays when a file moves."""
    for name in c3a_triton.__all__:
        thing = getattr(c3a_triton, name)
        assert (thing.__module__, thing.__qualname__) == ("c3a_triton", name)
        assert pickle.loads(pickle.dumps(thing)) is thing


def parameters(function):
    return [
        name if p.default is p.empty else f"{name}={p.default!r}"
        for name, p in inspect.signature(function).parameters.items()
    ]


def test_signatures():
    assert parameters(c3a_triton.circulant_linear) == ["x", "w", "scale=None", "backend='auto'", "save_spectrum=False"]
    assert parameters(c3a_triton.c3a_linear) == [
        *("x", "weight", "bias", "kernels"),
        *("backend='auto'", "save_spectrum=False"),
    ]
    assert parameters(c3a_triton.circulant_matrix) == ["w", "scale=None", "dtype=None"]
    assert parameters(c3a_triton.apply) == ["model", "cfg=None", "adapter_name='default'", "backend='auto'"]
    assert parameters(c3a_triton.load_adapter)[:3] == ["model", "directory", "adapter_name='default'"]
    assert parameters(c3a_triton.explain)[:2] == ["layer_or_shapes", "tokens=(1, 1024, 8192)"]
    assert parameters(c3a_triton.param_groups)[:3] == ["model", "lr=0.1", "weight_decay=0.0"]
    assert parameters(c3a_triton.suggest_block_size) == ["in_features", "out_features", "rank=None", "max_params=None"]


def test_members_of_layer_manager_and_config():
    layer = (
        "active_adapters bias delete_adapter disable_adapters enable_adapters forward get_base_layer get_delta_weight "
        "merge merged reset_c3a_parameters save_spectrum set_adapter unmerge update_layer weight"
    )
    manager = (
        "active_adapters adapters add_adapter add_weighted_adapter delete_adapter disable_adapter "
        "get_nb_trainable_parameters hotswap_adapter layers load_adapter merge_adapter merge_and_unload "
        "print_trainable_parameters rename_adapter save_pretrained save_spectra set_adapter set_backend state_dict "
        "summary unload unmerge_adapter using"
    )
    config = "from_dict from_pretrained save_pretrained to_dict"
    for cls, names in (
        (c3a_triton.C3ALinear, layer),
        (c3a_triton.AdapterManager, manager),
        (c3a_triton.C3AConfig, config),
    ):
        assert [name for name in names.split() if not hasattr(cls, name)] == []


def test_errors_are_also_the_built_in_ones():
    for name, builtin in {
        "ConfigError": ValueError,
        "ShapeError": ValueError,
        "BackendError": RuntimeError,
        "AdapterStateError": ValueError,
        "AdapterNotFoundError": KeyError,
        "CheckpointError": OSError,
    }.items():
        error = getattr(c3a_triton, name)
        assert issubclass(error, c3a_triton.C3AError)
        assert issubclass(error, builtin)
    assert str(c3a_triton.AdapterNotFoundError("no adapter 'a'")) == "no adapter 'a'"
