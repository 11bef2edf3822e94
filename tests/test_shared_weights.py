"""Several adapted layers of one weight: it is merged and brought back as one, whichever layer is asked."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig
from c3a_triton.adapters import layer, merging

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Tied(nn.Module):
    """Two layers of one weight, and one of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(8, 8, dtype=dtype) for _ in range(3))
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(torch.tanh(self.a(x))))


class OneMemory(Tied):
    """As `Tied`, but of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = nn.Parameter(self.a.weight.data)


class Tokens(nn.Module):
    """An embedding and the output layer tied to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Embedding(16, 8, padding_idx=3), nn.Linear(8, 16, bias=False)
        self.b.weight = self.a.weight


BUILDS = [Tied, OneMemory, Tokens]


def adapted(build=Tied, names=("default",), **options) -> nn.Module:
    model = build(**options)
    for name in names:
        config = C3AConfig(block_size=4, target_modules=["a", "b"])
        if name == names[0]:
            model = c3a_triton.apply(model, config, adapter_name=name)
        else:
            model.c3a.add_adapter(name, config)
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for _, adapted_layer in model.c3a.layers():
            for kernel in adapted_layer.c3a_kernel.values():
                kernel.normal_()


def bits(model: nn.Module) -> torch.Tensor:
    return model.a.weight.detach().clone()


def summed(model: nn.Module, *layers: str, adapter: str = "default") -> torch.Tensor:
    return bits(model) + sum(model.get_submodule(name).get_delta_weight(adapter) for name in layers)


@pytest.mark.parametrize("build", BUILDS)
def test_both_updates_are_added_once_and_taken_back(build):
    model = adapted(build)
    before, expected = bits(model), summed(model, "a", "b")
    for verb in ("unmerge_adapter", "set_adapter", "disable_adapter", "unmerge_adapter"):
        model.c3a.merge_adapter()
        torch.testing.assert_close(bits(model), expected)
        assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
        if verb == "disable_adapter":
            with model.c3a.disable_adapter():
                assert torch.equal(bits(model), before)
        else:
            getattr(model.c3a, verb)(*(["default"] if verb == "set_adapter" else []))
        assert torch.equal(bits(model), before)
        assert not model.a.merged
        assert not model.b.merged
    model.c3a.merge_adapter()
    model.c3a.unload()
    assert torch.equal(bits(model), before)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("order", list(itertools.permutations("ab")), ids="".join)
def test_layers_one_by_one(build, order):
    """As PEFT asks them: what one takes back leaves the other merged."""
    model = adapted(build)
    before = bits(model)
    first, second = (model.get_submodule(name) for name in order)
    alone = {name: summed(model, name) for name in "ab"}
    model.a.merge()
    model.b.merge(keep_base=None)  # the original is kept already
    first.unmerge()
    torch.testing.assert_close(bits(model), alone[order[1]])
    first.merge()
    first.unmerge()
    second.enable_adapters(False)
    assert torch.equal(bits(model), before)


def test_parts_of_the_adapters():
    model = adapted(names=("one", "two"))
    before = bits(model)
    one = summed(model, "a", "b", adapter="one")
    both = one + model.a.get_delta_weight("two") + model.b.get_delta_weight("two")
    model.c3a.merge_adapter(["one"])
    torch.testing.assert_close(bits(model), one)
    model.c3a.merge_adapter(["two"])
    torch.testing.assert_close(bits(model), both)
    model.a.unmerge()
    model.c3a.merge_adapter(["two"])
    assert model.a.merged_adapters == ["two"]
    model.c3a.set_adapter("two")
    assert torch.equal(bits(model), before)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("build", [Tied, Tokens])
def test_copies(copied, build):
    model = adapted(build)
    before = bits(model)
    model.c3a.merge_adapter()
    merged = bits(model)
    other = copied(model)
    other.a.unmerge()
    other.b.unmerge()
    assert torch.equal(bits(other), before)
    assert torch.equal(bits(model), merged)
    model.c3a.unmerge_adapter()
    assert torch.equal(bits(model), before)


@pytest.mark.parametrize("build", BUILDS)
def test_a_cast_while_they_are_merged(build):
    model = adapted(build)
    before = bits(model)
    model.c3a.merge_adapter()
    model.to(torch.float64)
    model.c3a.unmerge_adapter()
    assert torch.equal(model.a.weight, before.double())
    assert torch.equal(model.b.weight, before.double())


def test_a_change_in_between_is_seen_by_both():
    model = adapted()
    model.c3a.merge_adapter()
    with torch.no_grad():
        model.a.weight[0, 0] += 1
    for call in (model.c3a.unmerge_adapter, model.a.unmerge, model.b.unmerge):
        with pytest.raises(AdapterStateError, match=r"was changed after \['default'\]"):
            call()
    model = adapted()
    model.a.merge()
    model.a.weight.data.add_(1)
    with pytest.raises(AdapterStateError, match=r"was changed after \['default'\]"):
        model.b.merge()


def test_updates_that_are_finite_alone():
    model = adapted(dtype=torch.float16)
    with torch.no_grad():
        for _, adapted_layer in model.c3a.layers():
            adapted_layer.c3a_kernel["default"].fill_(8 * 40000.0)
    before = bits(model)
    model.a.check_merge(finite=True)
    with pytest.raises(AdapterStateError, match="not finite"):
        model.c3a.merge_adapter(safe_merge=True)
    assert torch.equal(bits(model), before)


def test_the_warning_about_it(recwarn):
    adapted().c3a.merge_adapter()
    said = [str(warning.message) for warning in recwarn if "merging changes both" in str(warning.message)]
    assert len(said) == 2
    assert all("Where that is not meant, leave it unmerged" in message for message in said)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_weight_that_one_layer_transposes(order):
    """A `Conv1D` multiplies by what a linear layer multiplies by the transpose of."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Square(Tied):
        def __init__(self):
            super().__init__()
            self.b = conv1d(8, 8)
            self.b.weight = self.a.weight

    model = adapted(Square)
    before = bits(model)
    deltas = {"a": model.a.get_delta_weight("default"), "b": model.b.get_delta_weight("default").t()}
    model.c3a.merge_adapter(safe_merge=True)
    torch.testing.assert_close(bits(model), before + deltas["a"] + deltas["b"])
    model.c3a.unmerge_adapter()
    for first in "ab":
        model.get_submodule(first).merge()
        model.get_submodule("ab".replace(first, "")).merge()
        model.get_submodule(order[0]).unmerge()
        torch.testing.assert_close(bits(model), before + deltas[order[1]])
        model.get_submodule(order[1]).unmerge()
        assert torch.equal(bits(model), before)


def test_without_the_original():
    model = adapted()
    expected = summed(model, "a", "b")
    model.c3a.merge_adapter(keep_base=None)
    torch.testing.assert_close(bits(model), expected)
    with pytest.raises(AdapterStateError, match="keep_base=None"):
        model.c3a.unmerge_adapter()
    model = adapted()
    torch.testing.assert_close(bits(model.c3a.merge_and_unload()), expected)


def test_a_weight_that_took_anothers_place():
    """Memory is used again; a weight that lies where a merged one was is no part of that merge."""
    model = adapted()
    model.a.merge()
    place = model.a.weight_place()
    model.a.base_layer.weight = nn.Parameter(torch.zeros(8, 8))
    assert model.b.weight_place() == place
    before = model.b.weight.detach().clone()
    model.b.merge()
    model.b.unmerge()
    assert torch.equal(model.b.weight, before)


def test_layers_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        Tied(), peft.C3AConfig(block_size=4, target_modules=["a", "b"], init_weights="gaussian")
    )
    c3a_triton.apply(model)
    inner = model.base_model.model
    before, expected = bits(inner), summed(inner, "a", "b")
    model.merge_adapter()
    torch.testing.assert_close(bits(inner), expected)
    with model.disable_adapter():
        assert torch.equal(bits(inner), before)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(bits(inner), before)
    torch.testing.assert_close(bits(model.merge_and_unload()), expected)


def fingerprints(monkeypatch):
    """Addresses of the weights whose fingerprint is computed from now on."""
    read = []
    fingerprint = merging.fingerprint
    monkeypatch.setattr(merging, "fingerprint", lambda weight: read.append(weight.data_ptr()) or fingerprint(weight))
    return read


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("adapted_in_two", [True, False], ids=["tied", "one by one"])
def test_a_fingerprint_is_computed_once_for_what_a_weight_is(monkeypatch, adapted_in_two, safe_merge):
    """Of each weight: as it is once merged, as it is found by the next merge and left by it, and by unmerging."""
    read = fingerprints(monkeypatch)
    config = C3AConfig(block_size=4, target_modules=["a", "b", "c"] if adapted_in_two else ["a", "c"])
    model = c3a_triton.apply(Tied(), config)
    model.c3a.add_adapter("other", config)
    weights = sorted({layer.weight.data_ptr() for _, layer in model.c3a.layers()})
    assert len(weights) == 2
    steps = [
        (1, lambda: model.c3a.merge_adapter(safe_merge=safe_merge)),
        (2, lambda: model.c3a.merge_adapter("other", safe_merge=safe_merge)),
        (1, model.c3a.unmerge_adapter),
        (0, lambda: model.c3a.merge_adapter(keep_base=None)),
    ]
    for times, step in steps:
        step()
        assert sorted(read) == sorted(weights * times)
        read.clear()


@pytest.mark.parametrize("ask", ["manager", "layers", "disable"])
def test_unmerging_reads_each_weight_once(monkeypatch, ask):
    model = c3a_triton.apply(Tied(), C3AConfig(block_size=4, target_modules=["a", "b", "c"]))
    if ask == "layers":
        model = c3a_triton.apply(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), C3AConfig(block_size=4, target_modules=".*")
        )
    model.c3a.merge_adapter()
    read = fingerprints(monkeypatch)
    if ask == "manager":
        model.c3a.unmerge_adapter()
    elif ask == "layers":
        for _, adapted_layer in model.c3a.layers():
            adapted_layer.unmerge()
    else:
        with model.c3a.disable_adapter():
            pass
    assert len(read) == 2
    assert len(set(read)) == 2


@pytest.mark.parametrize("then", ["unmerge", "merge"])
def test_a_failure_between_two_layers_of_one_weight(monkeypatch, then):
    model = adapted()
    before, expected = bits(model), summed(model, "a", "b")
    add = layer.add_circulant_
    left = iter([add])

    def add_once(weight, kernels):
        next(left)(weight, kernels)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "add_circulant_", add_once)
        with pytest.raises(StopIteration):
            model.c3a.merge_adapter()
    assert model.a.merged
    assert not model.b.merged
    if then == "merge":
        model.c3a.merge_adapter()
        torch.testing.assert_close(bits(model), expected)
    model.c3a.unmerge_adapter()
    assert torch.equal(bits(model), before)


def test_a_layer_that_kept_nothing_beside_one_that_did():
    model = adapted()
    model.b.merge(keep_base=None)
    merged = bits(model)
    model.a.merge()
    with pytest.raises(AdapterStateError, match="keep_base=None"):
        model.c3a.unmerge_adapter()
    model.a.unmerge()
    assert torch.equal(bits(model), merged)
