"""Random sequences of manager operations against a dense model of what each adapter is.

`Sequences` drives an adapted model and, beside it, `Expected`: plain tensors and lists of names. After every operation
the outputs, the adapters' values and the base weights have to agree. Whether an operation is allowed is predicted too:
a legal one must not fail, an illegal one must raise this library's own error and leave everything as it was.
"""

import contextlib
import copy
import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import c3a_triton
from c3a_triton.errors import C3AError
from c3a_triton.layer import C3ALinear

LAYERS = ("embed", "first", "conv1d", "conv2d", "last")
NAMES = st.sampled_from(["a", "a", "b", "b", "c"])
TARGETS = st.sampled_from([LAYERS, ("first", "last"), ("conv1d", "conv2d"), ("embed", "last"), ("first",)])
BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2}
IDS = torch.tensor([[1, 5, 9, 2], [3, 0, 8, 1], [4, 6, 2, 9]])


class Net(nn.Module):
    """One layer of every kind that can be adapted, small, with rows of the batch that do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=0)
        self.first = nn.Linear(8, 12)
        self.conv1d = Conv1D(8, 12)
        self.conv2d = nn.Conv2d(4, 8, (1, 3))
        self.last = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv1d(torch.tanh(self.first(self.embed(ids)))))
        x = torch.tanh(self.conv2d(x.transpose(1, 2).reshape(len(ids), 4, 2, 4)))
        return self.last(x.mean(dim=(2, 3)))


def dense_update(layer: str, w: Tensor) -> Tensor:
    """ΔW in the shape of the layer's weight, float64."""
    matrix = oracle.dense(w)
    if layer == "conv1d":
        return matrix.T
    if layer == "conv2d":
        return matrix.view(8, 1, 3, 4).permute(0, 3, 1, 2)
    if layer == "embed":
        matrix = matrix[:10].clone()
        matrix[0] = 0
    return matrix


@dataclass
class Expected:
    """What the model has to be: base tensors, adapters as plain kernels, and names."""

    base: dict[str, Tensor]
    dtype: torch.dtype = torch.float32
    bound: float = BOUNDS[torch.float32]  # of the output: a merged weight keeps the rounding of an earlier dtype
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # name → layer → w
    for_inference: set[str] = field(default_factory=set)  # loaded to be frozen until they are set
    frozen: set[str] = field(default_factory=set)
    active: list[str] = field(default_factory=list)
    merged: dict[str, list[str]] = field(default_factory=dict)  # layer → names
    lost: set[str] = field(default_factory=set)  # layers whose original weight was not kept

    def merged_names(self) -> set[str]:
        return {name for names in self.merged.values() for name in names}

    def output(self, applied: list[str] | None = None, ids: Tensor = IDS) -> Tensor:
        """In float64, with these adapters, or the active and the merged ones."""
        tensors = {name: tensor.double() for name, tensor in self.base.items()}
        for layer in LAYERS:
            names = [*self.active, *self.merged.get(layer, [])] if applied is None else applied
            for name in dict.fromkeys(names):
                if layer in self.adapters.get(name, {}):
                    key = f"{layer}.weight"
                    tensors[key] = tensors[key] + dense_update(layer, self.adapters[name][layer])
        return torch.func.functional_call(DENSE, tensors, (ids,))


DENSE = Net().double()


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Sequences(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model: Any = Net().requires_grad_(True)
        self.expected = Expected({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.saved: dict[str, dict[str, Tensor]] = {}
        self.disabled = False
        self.catch = warnings.catch_warnings()
        self.catch.__enter__()
        warnings.simplefilter("ignore")

    def teardown(self) -> None:
        self.catch.__exit__(None, None, None)
        self.folder.cleanup()

    # What is common to the operations

    @property
    def is_adapted(self) -> bool:
        return hasattr(self.model, "c3a")

    def snapshot(self) -> dict[str, Any]:
        manager = self.model.__dict__.get("c3a")
        return {
            "modules": [(name, id(module)) for name, module in self.model.named_modules()],
            "parameters": [(name, id(p), p.requires_grad) for name, p in self.model.named_parameters()],
            "bits": {name: value.clone() for name, value in self.model.state_dict().items()},
            "manager": manager and (manager.adapters, manager.active_adapters, manager.summary()),
            "layers": [
                (m.active_adapters, list(m.merged_adapters), dict(m.block_size), m.disable_adapters)
                for m in self.model.modules()
                if isinstance(m, C3ALinear)
            ],
        }

    @contextlib.contextmanager
    def attempt(self, allowed: bool) -> Iterator[None]:
        """Run an operation that has to succeed, or to raise one of this library's errors and change nothing."""
        if allowed:
            yield
            return
        before = self.snapshot()
        with pytest.raises(C3AError):
            yield
        after = self.snapshot()
        bits, bits_before = after.pop("bits"), before.pop("bits")
        assert after == before
        assert all(torch.equal(bits[name], bits_before[name]) for name in bits_before)

    def kernels(self, name: str) -> dict[str, Tensor]:
        """An adapter's values as the model has them now."""
        return {
            layer: module.c3a_kernel[name].detach().clone()
            for layer, module in self.model.c3a.layers()
            if name in module.c3a_kernel
        }

    def noted(self, name: str, kernels: dict[str, Tensor], *, frozen: bool = False) -> None:
        """Enter a new adapter."""
        is_first = not self.expected.adapters
        self.expected.adapters[name] = kernels
        if frozen:
            self.expected.frozen.add(name)
            self.expected.for_inference.add(name)
        if is_first:
            self.expected.active = [name]

    def is_unmergeable(self) -> bool:
        return not self.expected.lost

    def note_unmerged(self) -> None:
        self.expected.merged.clear()
        self.expected.bound = BOUNDS[self.expected.dtype]

    # Operations

    @initialize(layers=TARGETS, merged=st.sampled_from([None, "a", "b"]))
    def start(self, layers: tuple[str, ...], merged: str | None) -> None:
        """Two adapters, one of them perhaps merged: from a bare model few sequences would come that far."""
        self.add("a", LAYERS, 2, None)
        self.add("b", layers, 4, None)
        self.save("a", "x")
        if merged is not None:
            self.merge([merged], False, "cpu")

    @rule(
        name=NAMES,
        layers=TARGETS,
        block_size=st.sampled_from([1, 2, 2, 4, 4, 3]),
        first=st.sampled_from([None, None, 1, 2]),
    )
    def add(self, name: str, layers: tuple[str, ...], block_size: int, first: int | None) -> None:
        pattern = {} if first is None else {"first": first}
        config = c3a_triton.C3AConfig(
            block_size=block_size, target_modules=list(layers), block_size_pattern=pattern, init_weights="gaussian"
        )
        sizes = {layer: pattern.get(layer, block_size) for layer in layers}
        fits = all(size != 3 for size in sizes.values())
        allowed = fits and name not in self.expected.adapters
        with self.attempt(allowed):
            if self.is_adapted:
                self.model.c3a.add_adapter(name, config)
            else:
                c3a_triton.apply(self.model, config, name)
        if allowed:
            kernels = self.kernels(name)
            assert {layer: w.shape[-1] for layer, w in kernels.items()} == sizes
            self.noted(name, kernels)

    @precondition(lambda self: self.is_adapted)
    @rule(names=st.lists(NAMES, max_size=3), inference=st.booleans())
    def activate(self, names: list[str], inference: bool) -> None:
        allowed = all(name in self.expected.adapters for name in names) and self.is_unmergeable()
        with self.attempt(allowed):
            self.model.c3a.set_adapter(names, inference_mode=inference)
        if allowed:
            self.note_unmerged()
            self.expected.active = list(dict.fromkeys(names))
            (self.expected.frozen.update if inference else self.expected.frozen.difference_update)(names)

    @precondition(lambda self: self.is_adapted)
    @rule(
        names=st.one_of(st.none(), st.lists(NAMES, min_size=1, max_size=2)),
        safe=st.booleans(),
        keep=st.sampled_from(["cpu", "cpu", "device", None]),
    )
    def merge(self, names: list[str] | None, safe: bool, keep: str | None) -> None:
        allowed = names is None or all(name in self.expected.adapters for name in names)
        chosen = self.expected.active if names is None else list(dict.fromkeys(names))
        work = {
            layer: left
            for layer in LAYERS
            if (
                left := [
                    name
                    for name in chosen
                    if layer in self.expected.adapters.get(name, {}) and name not in self.expected.merged.get(layer, [])
                ]
            )
        }
        allowed = allowed and not (work and self.disabled)
        with self.attempt(allowed):
            self.model.c3a.merge_adapter(names, safe_merge=safe, keep_base=keep)
        if allowed:
            for layer, left in work.items():
                if keep is None and layer not in self.expected.merged:
                    self.expected.lost.add(layer)
                self.expected.merged.setdefault(layer, []).extend(left)

    @precondition(lambda self: self.is_adapted)
    @rule()
    def unmerge(self) -> None:
        with self.attempt(self.is_unmergeable()):
            self.model.c3a.unmerge_adapter()
        if self.is_unmergeable():
            self.note_unmerged()

    @precondition(lambda self: self.is_adapted and not self.disabled)
    @rule(
        inner=st.sampled_from(["nothing", "raise", "add", "set", "delete", "rename", "merge", "copy", "disable"]),
        name=NAMES,
        other=NAMES,
    )
    def disable(self, inner: str, name: str, other: str) -> None:
        """Disable the adapters, do something meanwhile, and enable them again."""
        if not self.is_unmergeable():
            with self.attempt(False), self.model.c3a.disable_adapter():
                pass
            return
        steps: dict[str, Callable[[], object]] = {
            "add": lambda: self.add(name, LAYERS, 2, None),
            "set": lambda: self.activate([name], False),
            "delete": lambda: self.delete(name),
            "rename": lambda: self.rename(name, other),
            "merge": lambda: self.merge(None, False, "cpu"),
        }
        with contextlib.suppress(ZeroDivisionError), self.model.c3a.disable_adapter():
            self.note_unmerged()
            self.disabled = True
            try:
                if inner == "raise":
                    raise ZeroDivisionError
                if inner == "copy":
                    self.assert_output([], copy.deepcopy(self.model))
                if inner == "disable":
                    with self.model.c3a.disable_adapter():
                        self.assert_output([])
                steps.get(inner, lambda: None)()
                self.assert_output([])
            finally:
                self.disabled = False

    @precondition(lambda self: self.is_adapted)
    @rule(rows=st.lists(st.sampled_from(["a", "b", "c", "__base__"]), min_size=3, max_size=3))
    def rows(self, rows: list[str]) -> None:
        known = all(name in self.expected.adapters for name in rows if name != "__base__")
        with self.attempt(known and not self.expected.merged), self.model.c3a.using(rows):
            for row, name in enumerate(rows):
                names = [] if name == "__base__" else [name]
                self.assert_close(self.compute()[row : row + 1], self.expected.output(names, IDS[row : row + 1]))

    @precondition(lambda self: self.is_adapted)
    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        allowed = name in self.expected.adapters and name not in self.expected.merged_names()
        with self.attempt(allowed):
            self.model.c3a.delete_adapter(name)
        if allowed:
            del self.expected.adapters[name]
            self.expected.frozen.discard(name)
            self.expected.for_inference.discard(name)
            was_active = name in self.expected.active
            self.expected.active = [other for other in self.expected.active if other != name]
            if was_active and not self.expected.active and self.expected.adapters:
                promoted = min(self.expected.adapters)
                self.expected.active = [promoted]
                self.expected.frozen.discard(promoted)
                self.expected.frozen |= self.expected.for_inference & {promoted}

    @precondition(lambda self: self.is_adapted)
    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        expected = self.expected
        allowed = old in expected.adapters and new not in expected.adapters
        with self.attempt(allowed):
            self.model.c3a.rename_adapter(old, new)
        if allowed:

            def renamed(name: str) -> str:
                return new if name == old else name

            expected.adapters = {renamed(name): kernels for name, kernels in expected.adapters.items()}
            expected.frozen = {renamed(name) for name in expected.frozen}
            expected.for_inference = {renamed(name) for name in expected.for_inference}
            expected.active = [renamed(name) for name in expected.active]
            expected.merged = {layer: [renamed(name) for name in names] for layer, names in expected.merged.items()}

    @precondition(lambda self: self.is_adapted)
    @rule(name=NAMES, slot=st.sampled_from(["x", "y"]))
    def save(self, name: str, slot: str) -> None:
        allowed = name in self.expected.adapters
        with self.attempt(allowed):
            self.model.c3a.save_pretrained(Path(self.folder.name) / slot, name)
        if allowed:
            self.saved[slot] = {layer: w.clone() for layer, w in self.expected.adapters[name].items()}

    @precondition(lambda self: self.saved or self.is_adapted)
    @rule(name=NAMES, slot=st.sampled_from(["x", "y"]), trainable=st.booleans())
    def load(self, name: str, slot: str, trainable: bool) -> None:
        allowed = slot in self.saved and name not in self.expected.adapters
        with self.attempt(allowed):
            c3a_triton.load_adapter(self.model, Path(self.folder.name) / slot, name, is_trainable=trainable)
        if allowed:
            self.noted(name, {layer: w.float() for layer, w in self.saved[slot].items()}, frozen=not trainable)

    @precondition(lambda self: self.is_adapted)
    @rule(name=NAMES, slot=st.sampled_from(["x", "y"]))
    def hotswap(self, name: str, slot: str) -> None:
        present, saved = self.expected.adapters.get(name), self.saved.get(slot)
        allowed = (
            present is not None
            and saved is not None
            and name not in self.expected.merged_names()
            and {layer: w.shape for layer, w in present.items()} == {layer: w.shape for layer, w in saved.items()}
        )
        with self.attempt(allowed):
            self.model.c3a.hotswap_adapter(Path(self.folder.name) / slot, name)
        if allowed:
            self.expected.adapters[name] = {layer: saved[layer].to(w.dtype) for layer, w in present.items()}

    @precondition(lambda self: self.is_adapted)
    @rule(names=st.lists(NAMES, min_size=1, max_size=2), new=NAMES)
    def combine(self, names: list[str], new: str) -> None:
        expected = self.expected
        weights = [0.5, -2.0][: len(names)]
        allowed = len(set(names)) == len(names) and all(name in expected.adapters for name in names)
        allowed = allowed and new not in expected.adapters
        summed: dict[str, Tensor] = {}
        for layer in LAYERS:
            pairs = zip(names, weights, strict=True)
            parts = [(expected.adapters[n][layer], f) for n, f in pairs if layer in expected.adapters.get(n, {})]
            allowed = allowed and len({w.shape for w, _ in parts}) <= 1
            if parts and allowed:
                summed[layer] = sum(factor * w.double() for w, factor in parts)
        with self.attempt(allowed):
            self.model.c3a.add_weighted_adapter(names, weights, new)
        if allowed:
            kernels = self.kernels(new)
            assert kernels.keys() == summed.keys()
            for layer, w in kernels.items():
                torch.testing.assert_close(w.double(), summed[layer], rtol=1e-5, atol=1e-5)
            self.noted(new, kernels)

    @rule(dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.expected.dtype = dtype
        self.expected.bound = max(BOUNDS[dtype], self.expected.bound if self.expected.merged else 0.0)
        self.expected.base = {name: tensor.to(dtype) for name, tensor in self.expected.base.items()}
        for kernels in self.expected.adapters.values():
            for layer, w in kernels.items():
                kernels[layer] = w.to(dtype)

    @rule(duplicate=st.sampled_from([copy.deepcopy, through_pickle, through_torch_save]))
    def move(self, duplicate: Callable[[nn.Module], nn.Module]) -> None:
        """Go on with a copy; the original has nothing in common with it."""
        original, before = self.model, self.compute()
        self.model = duplicate(original)
        assert torch.equal(self.compute(), before)
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.zero_()

    @precondition(lambda self: self.is_adapted)
    @rule(frozen=st.booleans())
    def freeze(self, frozen: bool) -> None:
        self.model.c3a.freeze_for_inference(frozen)
        if frozen:
            self.expected.frozen.update(self.expected.adapters)

    @precondition(lambda self: self.is_adapted)
    @rule(backend=st.sampled_from(["torch", "reference", "auto", "nonsense"]))
    def backend(self, backend: str) -> None:
        with self.attempt(backend != "nonsense"):
            self.model.c3a.set_backend(backend)

    @precondition(lambda self: self.is_adapted)
    @rule(name=NAMES)
    def train(self, name: str) -> None:
        """Change an adapter's values in place, as an optimizer does. What is merged keeps its values here."""
        if name in self.expected.adapters and name not in self.expected.merged_names():
            for layer, module in self.model.c3a.layers():
                if name in module.c3a_kernel:
                    with torch.no_grad():
                        module.c3a_kernel[name].mul_(-0.5).add_(0.25)
                    self.expected.adapters[name][layer].mul_(-0.5).add_(0.25)

    @precondition(lambda self: self.is_adapted)
    @rule(names=st.one_of(st.none(), st.lists(NAMES, min_size=1, max_size=2)), safe=st.booleans())
    def merge_and_unload(self, names: list[str] | None, safe: bool) -> None:
        expected = self.expected
        allowed = names is None or all(name in expected.adapters for name in names)
        with self.attempt(allowed):
            self.model.c3a.merge_and_unload(safe_merge=safe, adapter_names=names)
        if allowed:
            expected.active = expected.active if names is None else names
            self.assert_output()
            expected.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.unloaded()

    @precondition(lambda self: self.is_adapted)
    @rule()
    def unload(self) -> None:
        allowed = self.is_unmergeable()
        with self.attempt(allowed):
            self.model.c3a.unload()
        if allowed:
            self.unloaded()

    def unloaded(self) -> None:
        assert not self.is_adapted
        assert [type(module) for module in self.model.modules()] == [type(module) for module in DENSE.modules()]
        assert "c3a" not in self.model.__dict__
        self.expected = Expected(self.expected.base, self.expected.dtype, BOUNDS[self.expected.dtype])

    # What holds after every operation

    def compute(self, model: Any = None) -> Tensor:
        with torch.no_grad():
            return (self.model if model is None else model)(IDS)

    def assert_close(self, out: Tensor, ref: Tensor) -> None:
        assert out.dtype == self.expected.dtype
        error = float((out.double() - ref).norm() / ref.norm())
        assert error <= self.expected.bound, f"relative error {error:.3g}"

    def assert_output(self, applied: list[str] | None = None, model: Any = None) -> None:
        self.assert_close(self.compute(model), self.expected.output(applied))

    @invariant()
    def outputs_agree(self) -> None:
        self.assert_output()

    @invariant()
    def values_agree(self) -> None:
        expected = self.expected
        modules = dict(self.model.named_modules())
        for layer in LAYERS:
            module = modules[layer]
            base = module.get_base_layer() if isinstance(module, C3ALinear) else module
            if hasattr(base, "bias"):
                assert torch.equal(base.bias, expected.base[f"{layer}.bias"])
            if layer not in expected.merged:
                assert base.weight.dtype == expected.dtype
                assert torch.equal(base.weight, expected.base[f"{layer}.weight"]), f"{layer}: the base has changed"
        if not self.is_adapted:
            return
        manager = self.model.c3a
        assert manager.model is self.model
        assert list(manager.adapters) == list(expected.adapters)
        assert manager.active_adapters == expected.active
        for name, kernels in expected.adapters.items():
            present = self.kernels(name)
            assert present.keys() == kernels.keys()
            for layer, w in kernels.items():
                assert present[layer].dtype == w.dtype
                assert torch.equal(present[layer], w), f"{layer}: {name} has changed"
        for layer, module in manager.layers():
            assert module.merged_adapters == expected.merged.get(layer, [])

    @invariant()
    def only_active_adapters_are_trained(self) -> None:
        if not self.is_adapted:
            return
        trained = {name for name in self.expected.active if name not in self.expected.frozen}
        for name, parameter in self.model.named_parameters():
            owner = name.rpartition(".")[2] if ".c3a_kernel." in name else None
            assert parameter.requires_grad == (owner in trained), name


def run_sequences(count: int, steps: int, *, repeatable: bool) -> None:
    run_state_machine_as_test(
        Sequences,
        settings=settings(
            max_examples=count,
            stateful_step_count=steps,
            deadline=None,
            derandomize=repeatable,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
        ),
    )


def test_sequences_of_operations() -> None:
    run_sequences(200, 12, repeatable=True)


@pytest.mark.nightly
def test_many_sequences_of_operations() -> None:
    run_sequences(5000, 25, repeatable=False)
