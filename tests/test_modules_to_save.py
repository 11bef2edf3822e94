"""Modules that are trained whole: one copy per adapter, of which one computes."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import c3a_triton
from c3a_triton import C3AConfig
from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.adapters.modules_to_save import ModulesToSave
from c3a_triton.errors import AdapterStateError, ConfigError, ShapeError


def make() -> ModulesToSave:
    """A head with the copies "a" (twice the original) and "b" (three times)."""
    wrapper = ModulesToSave(nn.Sequential(nn.Linear(4, 3, bias=False)), "head")
    for name, factor in (("a", 2.0), ("b", 3.0)):
        module = wrapper.new_copy()
        module[0].weight.data.mul_(factor)
        wrapper.install(name, module)
    return wrapper


def test_the_active_copy_computes_and_is_trained() -> None:
    head, x = make(), torch.randn(5, 4)
    base = head.original_module(x)
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert torch.equal(head(x), base)
    head.set_adapter(["b", "of another module"])
    torch.testing.assert_close(head(x), 3 * base)
    assert [name for name, p in head.named_parameters() if p.requires_grad] == ["modules_to_save.b.0.weight"]
    head.enable_adapters(False)
    assert torch.equal(head(x), base)
    assert not any(parameter.requires_grad for parameter in head.parameters())
    head.enable_adapters(True)
    torch.testing.assert_close(head(x), 3 * base)
    head.set_adapter(["a"], inference_mode=True)
    torch.testing.assert_close(head(x), 2 * base)
    assert not any(parameter.requires_grad for parameter in head.parameters())
    with pytest.raises(AdapterStateError, match="head: 'a' and 'b' each have a copy"):
        head.set_adapter(["a", "b"])
    torch.testing.assert_close(head(x), 2 * base)


def test_it_passes_for_what_it_wraps() -> None:
    linear = ModulesToSave(nn.Linear(4, 3), "fc")
    linear.install("a", linear.new_copy())
    linear.set_adapter(["a"])
    assert linear.weight is linear.modules_to_save["a"].weight
    linear.enable_adapters(False)
    assert linear.weight is linear.original_module.weight
    assert linear.in_features == 4
    with pytest.raises(AttributeError, match="bogus"):
        _ = linear.bogus


def test_rows() -> None:
    head, x = make(), torch.randn(3, 2, 4)
    base = head.original_module(x)
    with head._scope.bound(names=("b", "__base__", "a")):
        torch.testing.assert_close(head(x), base * torch.tensor([3.0, 1.0, 2.0])[:, None, None])
        with pytest.raises(ShapeError):
            head(torch.randn(4, 4))
    assert torch.equal(head(x), base)


def test_deleting_renaming_copying() -> None:
    head, x = make(), torch.randn(5, 4)
    base = head.original_module(x)
    head.set_adapter(["a"])
    head.rename_adapter("a", "c")
    assert list(head.modules_to_save) == ["c", "b"]
    for other in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        torch.testing.assert_close(other(x), 2 * base)
    head.delete_adapter("b")
    torch.testing.assert_close(head(x), 2 * base)
    head.delete_adapter("c")
    assert torch.equal(head(x), base)


def test_what_cannot_be_trained_whole() -> None:
    layer = C3ALinear(nn.Linear(4, 4), "default", 2)
    for module, message in (
        (nn.ModuleList([nn.Linear(4, 4)]), "head is a ModuleList"),
        (layer, "layers in head"),
        (nn.Sequential(layer), "layers in head"),
        (nn.Sequential(make()), "layers in head"),
    ):
        with pytest.raises(ConfigError, match=message):
            ModulesToSave(module, "head")


def test_merging_others_than_the_active_ones_says_whose_copies_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["0"], modules_to_save=["1"]))
    model.c3a.add_adapter("other", C3AConfig(block_size=4, target_modules=["0"]))
    alike = copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match=r"1 \(modules_to_save\) stay as .*\['default'\].*set_adapter\(\['other'\]\) first"
    ):
        model.c3a.merge_and_unload(adapter_names="other")
    alike.c3a.set_adapter("other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alike.c3a.merge_and_unload(adapter_names=["other"])
