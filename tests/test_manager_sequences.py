"""Random sequences of manager operations against a dense model of what each adapter is.

A `Sequence` drives an adapted model and, beside it, `Expected`: plain tensors and lists of names. After every operation
the outputs, the adapters' values, the base weights and what is trained have to agree. Whether an operation is allowed
is predicted too: a legal one must not fail, an illegal one must raise this library's own error and leave everything as
it was.

Operations are drawn from a seed, with arguments that fit the state more often than not. hypothesis' state machine was
tried first: four in ten of its sequences ended within four steps, and few of the rest stayed merged for long. A
sequence that fails is played again without each of its steps; the message has those that the failure needs, for `play`.
"""

import contextlib
import copy
import io
import math
import os
import pickle
import random
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import c3a_triton
from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.errors import C3AError
from c3a_triton.operator.dispatch import TRITON_BACKENDS

LAYERS = ("embed", "first", "conv1d", "conv2d", "last")
TARGETS = (LAYERS, LAYERS, ("first", "last"), ("conv1d", "conv2d"), ("embed", "last"), ("first",))
FOLDED = ("first", "last")  # the plain linear layers, which can fold adapters into their weight
BIASED = ("first", "conv1d", "conv2d", "last")
BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2}
IDS = torch.tensor([[1, 5, 9, 2], [3, 0, 8, 1], [4, 6, 2, 9]])
NAMES = "abcde"
SLOTS = ("x", "y")
BACKENDS = ("auto", "torch", "reference")
CPU = torch.device("cpu")


class Net(nn.Module):
    """One layer of every kind that can be adapted, small, with rows of the batch that do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=0)
        self.first = nn.Linear(8, 12)
        self.conv1d = Conv1D(8, 12)
        self.conv2d = nn.Conv2d(4, 8, (1, 3))
        self.norm = nn.LayerNorm(8, bias=False)  # trained whole
        self.last = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv1d(torch.tanh(self.first(self.embed(ids)))))
        x = torch.tanh(self.conv2d(x.transpose(1, 2).reshape(len(ids), 4, 2, 4)))
        return self.last(self.norm(x.mean(dim=(2, 3))))


DENSE = Net().double()
DENSE_PARAMETERS = dict(DENSE.named_parameters())  # given the values of one state after another, on their device


def dense_update(layer: str, w: Tensor) -> Tensor:
    """ΔW in the shape of the layer's weight, float64, on w's device."""
    matrix = oracle.dense(w).to(w.device)
    if layer == "conv1d":
        return matrix.T
    if layer == "conv2d":
        return matrix.view(8, 1, 3, 4).permute(0, 3, 1, 2)
    if layer == "embed":
        matrix = matrix[:10].clone()
        matrix[0] = 0
    return matrix


@dataclass
class Adapter:
    values: dict[str, Tensor]  # "<layer>.c3a_kernel" and, where it is trained whole, "norm.weight"
    bias: str = "none"
    for_inference: bool = False  # loaded to be frozen until it is set
    frozen: bool = False
    strength: float = 1.0

    def kernel(self, layer: str) -> Tensor | None:
        return self.values.get(f"{layer}.c3a_kernel")

    def biases(self) -> list[str]:
        chosen = {"none": (), "all": BIASED, "c3a_only": [x for x in BIASED if self.kernel(x) is not None]}[self.bias]
        return [f"{layer}.bias" for layer in chosen]


@dataclass
class Expected:
    """What the model has to be: base tensors, adapters as plain kernels, and names."""

    base: dict[str, Tensor]
    dtype: torch.dtype = torch.float32
    bound: float = BOUNDS[torch.float32]  # of the output: a merged weight keeps the rounding of an earlier dtype
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: dict[str, list[str]] = field(default_factory=dict)  # layer → names
    lost: set[str] = field(default_factory=set)  # layers whose original weight was not kept
    backend: str = "auto"
    folded: set[str] = field(default_factory=set)  # layers whose backend is "fold"
    disabled: int = 0  # contexts within each other

    def merged_names(self) -> set[str]:
        return {name for names in self.merged.values() for name in names}

    def all_known(self, names: list[str]) -> bool:
        return all(name in self.adapters for name in names)

    def trained_whole(self, names: list[str]) -> list[str]:
        return [name for name in names if "norm.weight" in self.adapters[name].values]

    def state(self, name: str) -> dict[str, Tensor]:
        """What a file of the adapter holds."""
        adapter = self.adapters[name]
        return adapter.values | {key: self.base[key] for key in adapter.biases()}

    def applied(self, layer: str) -> list[str]:
        """The adapters that are computed beside the base layer."""
        merged = self.merged.get(layer, [])
        names = [] if self.disabled else self.active
        return [name for name in names if name not in merged and self.adapters[name].kernel(layer) is not None]

    def output(self, only: list[str] | None = None, ids: Tensor = IDS) -> Tensor:
        """In float64, with the active and the merged adapters, or with these alone."""
        tensors = {name: tensor.double() for name, tensor in self.base.items()}
        for layer in LAYERS:
            for name in [*self.applied(layer), *self.merged.get(layer, [])] if only is None else only:
                w = self.adapters[name].kernel(layer)
                if w is not None:
                    delta = self.adapters[name].strength * dense_update(layer, w)
                    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] + delta
        computing = only if only is not None else [] if self.disabled else self.active
        for name in self.trained_whole(computing):
            tensors["norm.weight"] = self.adapters[name].values["norm.weight"].double()
        for name, parameter in DENSE_PARAMETERS.items():
            parameter.data = tensors[name]
        with torch.no_grad():
            return DENSE(ids.to(tensors["norm.weight"].device))


# How arguments are drawn

Draw = Callable[[random.Random, "Sequence"], Any]
OPERATIONS: dict[str, tuple[int, Callable[["Sequence"], bool], dict[str, Draw]]] = {}


def is_adapted(sequence: "Sequence") -> bool:
    return hasattr(sequence.model, "c3a")


def operation(
    weight: int, *, when: Callable[["Sequence"], bool] = is_adapted, **arguments: Draw
) -> Callable[[Any], Any]:
    """Let a method be drawn, with these arguments, as often as its weight says."""

    def enter(method: Any) -> Any:
        OPERATIONS[method.__name__] = (weight, when, arguments)
        return method

    return enter


def one_of(*values: Any) -> Draw:
    return lambda draw, sequence: draw.choice(values)


def known(draw: random.Random, sequence: "Sequence") -> str:
    """The name of an adapter; now and then any name."""
    there = sorted(sequence.expected.adapters)
    return draw.choice(there) if there and draw.random() < 0.9 else draw.choice(NAMES)


def free(draw: random.Random, sequence: "Sequence") -> str:
    """A name that no adapter has; now and then any name."""
    left = [name for name in NAMES if name not in sequence.expected.adapters]
    return draw.choice(left) if left and draw.random() < 0.9 else draw.choice(NAMES)


def several(least: int, most: int) -> Draw:
    return lambda draw, sequence: [known(draw, sequence) for _ in range(draw.randint(least, most))]


def active_or(others: Draw) -> Draw:
    return lambda draw, sequence: None if draw.random() < 0.4 else others(draw, sequence)


def row_names(draw: random.Random, sequence: "Sequence") -> list[str]:
    return ["__base__" if draw.random() < 0.2 else known(draw, sequence) for _ in IDS]


def dtypes(draw: random.Random, sequence: "Sequence") -> torch.dtype:
    wide = torch.float32 if set(sequence.backends).intersection(TRITON_BACKENDS) else torch.float64
    return draw.choice([torch.float32, torch.float32, torch.bfloat16, wide])


# Copies of a model


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch.save": through_torch_save}


class Sequence:
    """A model and what it has to be. Each method that is marked `operation` is a step."""

    def __init__(self, folder: str, backends: tuple[str, ...], device: torch.device) -> None:
        torch.manual_seed(0)
        self.backends = backends
        self.ids = IDS.to(device)
        self.model: Any = Net().requires_grad_(True).to(device)
        self.expected = Expected({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        self.folder = Path(folder)
        self.saved: dict[str, tuple[Adapter, dict[str, Tensor]]] = {}  # slot → adapter, its file's tensors
        self.contexts: list[contextlib.ExitStack] = []
        self.was_refused = False

    # What is common to the operations

    def snapshot(self) -> dict[str, Any]:
        manager = self.model.__dict__.get("c3a")
        return {
            "modules": [(name, id(module)) for name, module in self.model.named_modules()],
            "parameters": [(name, id(p), p.requires_grad) for name, p in self.model.named_parameters()],
            "bits": {name: value.clone() for name, value in self.model.state_dict().items()},
            "manager": manager and (manager.adapters, manager.active_adapters, manager.summary()),
            "layers": [
                (m.active_adapters, list(m.merged_adapters), dict(m.block_size), m.disable_adapters, m.backend)
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
        self.was_refused = True
        before = self.snapshot()
        with pytest.raises(C3AError):
            yield
        after = self.snapshot()
        bits, bits_before = after.pop("bits"), before.pop("bits")
        assert after == before
        assert all(torch.equal(bits[name], bits_before[name]) for name in bits_before)

    def noted(self, name: str, adapter: Adapter) -> None:
        """Enter a new adapter."""
        is_first = not self.expected.adapters
        self.expected.adapters[name] = adapter
        if is_first:
            self.expected.active = [name]

    def present(self, name: str) -> dict[str, Tensor]:
        """An adapter's own values as the model has them."""
        kernels = {layer: getattr(self.model.get_submodule(layer), "c3a_kernel", {}) for layer in LAYERS}
        values = {f"{layer}.c3a_kernel": ws[name] for layer, ws in kernels.items() if name in ws}
        copies = getattr(self.model.norm, "modules_to_save", {})
        return values | ({"norm.weight": copies[name].weight} if name in copies else {})

    def own_values(self, name: str) -> dict[str, Tensor]:
        """A new adapter's values, of which the model decides."""
        return {key: w.detach().clone() for key, w in self.present(name).items()}

    def is_unmergeable(self) -> bool:
        return not self.expected.lost

    def note_unmerged(self) -> None:
        self.expected.merged.clear()
        self.expected.bound = BOUNDS[self.expected.dtype]

    def has_biased(self) -> bool:
        return any(adapter.bias != "none" for adapter in self.expected.adapters.values())

    # Operations

    def start(self, layers: list[tuple[str, ...]], block_sizes: list[int], whole: list[bool], bias: str) -> None:
        """Two adapters, one of them saved and trained on: from a bare model few sequences would come that far."""
        self.add("a", layers[0], block_sizes[0], None, bias, whole[0])
        self.add("b", layers[1], block_sizes[1], None, "none", whole[1])
        self.save("a", "x")
        self.train("a")
        self.set_backend(self.backends[0])

    @operation(
        5,
        when=lambda sequence: True,
        name=free,
        layers=one_of(*TARGETS),
        block_size=one_of(1, 2, 2, 2, 4, 4, 4, 3),
        first=one_of(None, None, None, 1),
        bias=one_of("none", "none", "all", "c3a_only"),
        whole=one_of(False, False, True),
    )
    def add(
        self, name: str, layers: tuple[str, ...], block_size: int, first: int | None, bias: str, whole: bool
    ) -> None:
        pattern = {} if first is None else {"first": first}
        config = c3a_triton.C3AConfig(
            block_size=block_size,
            target_modules=list(layers),
            block_size_pattern=pattern,
            init_weights="gaussian",
            bias=bias,
            modules_to_save=["norm"] if whole else None,
        )
        sizes = {layer: pattern.get(layer, block_size) for layer in layers}
        allowed = all(size != 3 for size in sizes.values()) and name not in self.expected.adapters
        allowed = allowed and not (bias != "none" and self.has_biased())
        with self.attempt(allowed):
            if is_adapted(self):
                self.model.c3a.add_adapter(name, config)
            else:
                c3a_triton.apply(self.model, config, name)
        if allowed:
            adapter = Adapter(self.own_values(name), bias)
            norm = adapter.values.get("norm.weight")
            assert (norm is not None) == whole
            assert norm is None or torch.equal(norm, self.expected.base["norm.weight"])
            assert {x: w.shape[-1] for x in LAYERS if (w := adapter.kernel(x)) is not None} == sizes
            self.noted(name, adapter)
            if whole:
                self.train(name)  # until then it is a copy of the original

    @operation(
        5, names=several(0, 3), inference=one_of(False, False, True), weights=one_of(None, None, None, -0.7, math.inf)
    )
    def activate(self, names: list[str], inference: bool, weights: float | None) -> None:
        expected = self.expected
        names = list(dict.fromkeys(names))
        allowed = expected.all_known(names) and len(expected.trained_whole(names)) <= 1 and self.is_unmergeable()
        allowed = allowed and (not names or weights != math.inf)
        with self.attempt(allowed):
            self.model.c3a.set_adapter(names, inference_mode=inference, weights=weights)
        if allowed:
            self.note_unmerged()
            expected.active = names
            for name in names:
                expected.adapters[name].frozen = inference
                if weights is not None:
                    expected.adapters[name].strength = weights

    @operation(5, name=known, scale=one_of(0.5, -1.5, 1.0, 1.0, 0.0, math.nan))
    def strengthen(self, name: str, scale: float) -> None:
        expected = self.expected
        allowed = name in expected.adapters and math.isfinite(scale)
        allowed = allowed and (name not in expected.merged_names() or scale == expected.adapters[name].strength)
        with self.attempt(allowed):
            self.model.c3a.set_scale(name, scale)
        if allowed:
            expected.adapters[name].strength = scale

    @operation(
        12,
        names=active_or(several(1, 2)),
        safe=one_of(False, False, True),
        keep=one_of(*["cpu"] * 8, *["device"] * 5, None, "nowhere"),
    )
    def merge(self, names: list[str] | None, safe: bool, keep: str | None) -> None:
        expected = self.expected
        allowed = (names is None or expected.all_known(names)) and keep != "nowhere"
        work = self.unmerged(names) if allowed else {}
        allowed = allowed and not (work and expected.disabled)
        with self.attempt(allowed):
            self.model.c3a.merge_adapter(names, safe_merge=safe, keep_base=keep)
        if allowed:
            for layer, left in work.items():
                if keep is None and layer not in expected.merged:
                    expected.lost.add(layer)
                expected.merged.setdefault(layer, []).extend(left)

    def unmerged(self, names: list[str] | None) -> dict[str, list[str]]:
        """Layer → those of these adapters that are to be merged there."""
        chosen = self.expected.active if names is None else dict.fromkeys(names)
        work = {}
        for layer in LAYERS:
            merged = self.expected.merged.get(layer, [])
            has_it = [name for name in chosen if self.expected.adapters[name].kernel(layer) is not None]
            if left := [name for name in has_it if name not in merged]:
                work[layer] = left
        return work

    @operation(1, name=known)
    def merge_infinity(self, name: str) -> None:
        """A safe merge of an adapter whose last kernel is not finite changes no layer."""
        if name not in self.expected.adapters or name in self.expected.merged_names():
            return
        *_, kernel = (m.c3a_kernel[name].detach() for _, m in self.model.c3a.layers() if name in m.c3a_kernel)
        finite = kernel.clone()
        kernel.fill_(torch.inf)
        with self.attempt(False):
            self.model.c3a.merge_adapter([name], safe_merge=True)
        kernel.copy_(finite)

    @operation(4)
    def unmerge(self) -> None:
        allowed = self.is_unmergeable()
        with self.attempt(allowed):
            self.model.c3a.unmerge_adapter()
        if allowed:
            self.note_unmerged()

    @operation(3)
    def disable(self) -> None:
        """Enter a context in which adapters are disabled; other operations follow within it."""
        allowed = self.is_unmergeable()
        context = contextlib.ExitStack()
        with self.attempt(allowed):
            context.enter_context(self.model.c3a.disable_adapter())
        if allowed:
            self.note_unmerged()
            self.contexts.append(context)
            self.expected.disabled += 1

    @operation(10, when=lambda sequence: sequence.expected.disabled > 0, raising=one_of(False, True))
    def enable(self, raising: bool) -> None:
        """Leave the context, perhaps by an exception."""
        if not self.contexts:  # played without the step that entered it
            return
        with contextlib.suppress(ZeroDivisionError), self.contexts.pop():
            if raising:
                raise ZeroDivisionError
        self.expected.disabled -= 1

    @operation(3, rows=row_names)
    def use_rows(self, rows: list[str]) -> None:
        expected = self.expected
        allowed = expected.all_known([name for name in rows if name != "__base__"]) and not expected.merged
        with self.attempt(allowed), self.model.c3a.using(rows):
            if not allowed or (expected.folded and not expected.disabled):  # fold refuses rows
                return
            for row, name in enumerate(rows):
                names = [] if name == "__base__" or expected.disabled else [name]
                self.assert_close(self.compute()[row : row + 1], expected.output(names, IDS[row : row + 1]))

    @operation(5, name=known)
    def delete(self, name: str) -> None:
        expected = self.expected
        allowed = name in expected.adapters and name not in expected.merged_names()
        with self.attempt(allowed):
            self.model.c3a.delete_adapter(name)
        if allowed:
            del expected.adapters[name]
            was_active = name in expected.active
            expected.active = [other for other in expected.active if other != name]
            if was_active and not expected.active and expected.adapters:
                promoted = min(expected.adapters)
                expected.active = [promoted]
                expected.adapters[promoted].frozen = expected.adapters[promoted].for_inference

    @operation(6, old=known, new=free)
    def rename(self, old: str, new: str) -> None:
        expected = self.expected
        allowed = old in expected.adapters and new not in expected.adapters
        with self.attempt(allowed):
            self.model.c3a.rename_adapter(old, new)
        if allowed:

            def renamed(name: str) -> str:
                return new if name == old else name

            expected.adapters = {renamed(name): adapter for name, adapter in expected.adapters.items()}
            expected.active = [renamed(name) for name in expected.active]
            expected.merged = {layer: [renamed(name) for name in names] for layer, names in expected.merged.items()}

    @operation(3, name=known, slot=one_of(*SLOTS))
    def save(self, name: str, slot: str) -> None:
        allowed = name in self.expected.adapters
        with self.attempt(allowed):
            self.model.c3a.save_pretrained(self.folder / slot, name)
        if allowed:
            state = {key: value.clone() for key, value in self.expected.state(name).items()}
            self.saved[slot] = (copy.copy(self.expected.adapters[name]), state)

    @operation(5, when=lambda sequence: True, name=free, slot=one_of("x", *SLOTS), trainable=one_of(False, True))
    def load(self, name: str, slot: str, trainable: bool) -> None:
        expected = self.expected
        allowed = slot in self.saved and name not in expected.adapters
        allowed = allowed and not (self.saved[slot][0].bias != "none" and self.has_biased())
        with self.attempt(allowed):
            c3a_triton.load_adapter(self.model, self.folder / slot, name, is_trainable=trainable)
        if allowed:
            adapter, state = self.saved[slot]
            values = {key: state[key].to(torch.float32, copy=True) for key in adapter.values}
            if "norm.weight" in values:
                values["norm.weight"] = state["norm.weight"].to(expected.dtype, copy=True)
            expected.base |= {key: state[key].to(expected.dtype, copy=True) for key in adapter.biases()}
            self.noted(name, Adapter(values, adapter.bias, not trainable, not trainable))

    @operation(4, name=known, slot=one_of(*SLOTS))
    def hotswap(self, name: str, slot: str) -> None:
        expected = self.expected
        allowed = name in expected.adapters and slot in self.saved and name not in expected.merged_names()
        if allowed:
            present, state = expected.state(name), self.saved[slot][1]
            allowed = {key: w.shape for key, w in present.items()} == {key: w.shape for key, w in state.items()}
        with self.attempt(allowed):
            self.model.c3a.hotswap_adapter(self.folder / slot, name)
        if allowed:
            for key, w in present.items():
                place = expected.base if key.endswith(".bias") else expected.adapters[name].values
                place[key] = state[key].to(w.dtype, copy=True)

    @operation(3, names=several(1, 2), new=free)
    def combine(self, names: list[str], new: str) -> None:
        expected = self.expected
        weights = dict(zip(names, [0.5, -2.0], strict=False))
        allowed = len(weights) == len(names) and expected.all_known(names) and new not in expected.adapters
        allowed = allowed and not expected.trained_whole(names)
        allowed = allowed and all(expected.adapters[name].bias == "none" for name in names)
        summed: dict[str, Tensor] = {}
        for name in names if allowed else ():
            for key, w in expected.adapters[name].values.items():
                term = weights[name] * expected.adapters[name].strength * w.double()
                allowed = allowed and (key not in summed or summed[key].shape == term.shape)
                summed[key] = summed[key] + term if key in summed and allowed else term
        with self.attempt(allowed):
            self.model.c3a.add_weighted_adapter(names, [0.5, -2.0][: len(names)], new)
        if allowed:
            values = self.own_values(new)
            assert values.keys() == summed.keys()
            for key, w in values.items():
                assert torch.allclose(w.double(), summed[key], rtol=1e-5, atol=1e-5)
            self.noted(new, Adapter(values))

    @operation(6, when=lambda sequence: True, dtype=dtypes)
    def cast(self, dtype: torch.dtype) -> None:
        expected = self.expected
        self.model.to(dtype)
        expected.dtype = dtype
        expected.bound = max(BOUNDS[dtype], expected.bound if expected.merged else 0.0)
        for tensors in (expected.base, *(adapter.values for adapter in expected.adapters.values())):
            tensors.update({key: value.to(dtype) for key, value in tensors.items()})

    @operation(4, when=lambda sequence: True, how=one_of(*COPIES))
    def move(self, how: str) -> None:
        """Go on with a copy; the original has nothing in common with it."""
        original, before = self.model, self.compute()
        duplicated = COPIES[how](original)
        if self.expected.disabled:  # the context is the original's alone
            with duplicated.c3a.disable_adapter():
                assert torch.equal(self.compute(duplicated), before)
            return
        assert torch.equal(self.compute(duplicated), before)
        self.model = duplicated
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.zero_()

    @operation(2, frozen=one_of(False, True))
    def freeze(self, frozen: bool) -> None:
        self.model.c3a.freeze_for_inference(frozen)
        for adapter in self.expected.adapters.values() if frozen else ():
            adapter.frozen = True

    @operation(3, backend=lambda draw, sequence: draw.choice([*sequence.backends, "nonsense"]))
    def set_backend(self, backend: str) -> None:
        with self.attempt(backend != "nonsense"):
            self.model.c3a.set_backend(backend)
        if backend != "nonsense":
            self.expected.backend = backend
            self.expected.folded.clear()

    @operation(2)
    def fold(self) -> None:
        adapted = [name for name, _ in self.model.c3a.layers() if name in FOLDED]
        self.model.c3a.set_backend("fold", adapted)
        self.expected.folded = set(adapted)

    @operation(4, name=known)
    def train(self, name: str) -> None:
        """Change an adapter's values in place, as an optimizer does. What is merged keeps its values here."""
        expected = self.expected
        if name not in expected.adapters or name in expected.merged_names():
            return
        with torch.no_grad():
            for key, parameter in self.present(name).items():
                expected.adapters[name].values[key] = parameter.copy_(torch.randn(parameter.shape)).clone()
            for key in expected.adapters[name].biases():
                bias = self.model.get_submodule(key.partition(".")[0]).bias
                expected.base[key] = bias.copy_(torch.randn(bias.shape)).clone()

    @operation(
        1,
        when=lambda sequence: is_adapted(sequence) and not sequence.expected.disabled,
        names=active_or(several(1, 2)),
        safe=one_of(False, True),
    )
    def merge_and_unload(self, names: list[str] | None, safe: bool) -> None:
        expected = self.expected
        allowed = names is None or expected.all_known(names)
        with self.attempt(allowed):
            self.model.c3a.merge_and_unload(safe_merge=safe, adapter_names=names)
        if allowed:
            for layer, left in self.unmerged(names).items():
                expected.merged.setdefault(layer, []).extend(left)
            for name in expected.trained_whole(expected.active):
                expected.base["norm.weight"] = expected.adapters[name].values["norm.weight"]
            expected.active = []
            self.assert_output()
            expected.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.unloaded()

    @operation(1, when=lambda sequence: is_adapted(sequence) and not sequence.expected.disabled)
    def unload(self) -> None:
        allowed = self.is_unmergeable()
        with self.attempt(allowed):
            self.model.c3a.unload()
        if allowed:
            self.unloaded()

    def unloaded(self) -> None:
        assert [type(module) for module in self.model.modules()] == [type(module) for module in DENSE.modules()]
        assert "c3a" not in self.model.__dict__
        self.expected = Expected(self.expected.base, self.expected.dtype, BOUNDS[self.expected.dtype])

    # What holds after every operation

    def compute(self, model: Any = None) -> Tensor:
        with torch.no_grad():
            return (self.model if model is None else model)(self.ids)

    def assert_close(self, out: Tensor, ref: Tensor) -> None:
        assert out.dtype == self.expected.dtype
        error = float((out.double() - ref).norm() / ref.norm())
        assert error <= self.expected.bound, f"relative error {error:.3g}"

    def assert_output(self) -> None:
        self.assert_close(self.compute(), self.expected.output())

    def assert_values(self) -> None:
        expected = self.expected
        for key, value in expected.base.items():
            layer, _, kind = key.partition(".")
            module = self.model.get_submodule(layer)
            module = module.get_base_layer() if isinstance(module, C3ALinear) else module
            present = getattr(getattr(module, "original_module", module), kind)
            assert present.dtype == expected.dtype
            if kind == "bias" or layer not in expected.merged:
                assert torch.equal(present, value), f"{key}: the base has changed"
        if not is_adapted(self):
            return
        manager = self.model.c3a
        assert manager.model is self.model
        assert list(manager.adapters) == list(expected.adapters)
        assert manager.active_adapters == expected.active
        for name in expected.adapters:
            present, values = self.present(name), expected.adapters[name].values
            assert present.keys() == values.keys()
            for key, w in values.items():
                assert present[key].dtype == w.dtype
                assert torch.equal(present[key], w), f"{key}: {name} has changed"
        for layer, module in manager.layers():
            assert module.merged_adapters == expected.merged.get(layer, [])
            assert module.scaling == {name: expected.adapters[name].strength for name in module.c3a_kernel}
            if module.has_backends:
                assert module.backend == ("fold" if layer in expected.folded else expected.backend)
        for module in (self.model.get_submodule(layer) for layer in (*LAYERS, "norm")):
            assert getattr(module, "disable_adapters", bool(expected.disabled)) == bool(expected.disabled)

    def assert_trained(self) -> None:
        """The active adapters, as far as they are not frozen, and nothing else."""
        expected = self.expected
        if not is_adapted(self) or expected.disabled:
            return
        trained = {name: expected.adapters[name] for name in expected.active if not expected.adapters[name].frozen}
        biases = {key for adapter in trained.values() for key in adapter.biases()}
        for name, parameter in self.model.named_parameters():
            path = name.split(".")
            if "c3a_kernel" in path or "modules_to_save" in path:
                is_trained = path[2] in trained
            else:
                is_trained = f"{path[0]}.{path[-1]}" in biases
            assert parameter.requires_grad == is_trained, name

    # Steps

    def situations(self) -> list[str]:
        """What the next operation meets."""
        expected = self.expected
        situations = {"merged": expected.merged, "disabled": expected.disabled, "none": not expected.adapters}
        return [name for name, holds in situations.items() if holds]

    def draw(self, draw: random.Random) -> "Step":
        possible = {name: weight for name, (weight, when, _) in OPERATIONS.items() if when(self)}
        [name] = draw.choices(list(possible), list(possible.values()))
        return name, {argument: how(draw, self) for argument, how in OPERATIONS[name][2].items()}

    def step(self, step: "Step") -> None:
        name, arguments = step
        self.was_refused = False
        getattr(self, name)(**arguments)
        was_refused = self.was_refused
        self.assert_output()
        self.assert_values()
        self.assert_trained()
        self.was_refused = was_refused


Step = tuple[str, dict[str, Any]]


@contextlib.contextmanager
def new_sequence(backends: tuple[str, ...], device: torch.device) -> Iterator[Sequence]:
    shared_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with (
        tempfile.TemporaryDirectory(dir=shared_memory) as folder,
        warnings.catch_warnings(),
        torch.backends.cudnn.flags(allow_tf32=False),  # of convolutions, which are allowed it otherwise
    ):
        warnings.simplefilter("ignore")
        yield Sequence(folder, backends, device)


def play(steps: list[Step], backends: tuple[str, ...] = BACKENDS, device: torch.device = CPU) -> None:
    """Run the steps of a failure again."""
    with new_sequence(backends, device) as sequence:
        for step in steps:
            sequence.step(step)


def shrunk(steps: list[Step], backends: tuple[str, ...], device: torch.device) -> list[Step]:
    """The steps without those that their failure does without."""

    def failure(steps: list[Step]) -> tuple[Any, ...] | None:
        try:
            play(steps, backends, device)
        except (Exception, pytest.fail.Exception) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return type(error), place.filename, place.lineno
        return None

    what = failure(steps)
    for index in reversed(range(len(steps) - 1 if what else 0)):
        fewer = steps[:index] + steps[index + 1 :]
        if failure(fewer) == what:
            steps = fewer
    return steps


def run_sequences(
    seeds: range, n_steps: int, backends: tuple[str, ...] = BACKENDS, device: torch.device = CPU
) -> Counter[str]:
    """Play a sequence per seed; returns how many operations met what."""
    met: Counter[str] = Counter()
    for seed in seeds:
        draw = random.Random(seed)
        start = {
            "layers": draw.choices(TARGETS, k=2),
            "block_sizes": draw.choices([2, 2, 4], k=2),
            "whole": draw.choices([False, False, True], k=2),
            "bias": draw.choice(["none", "none", "all", "c3a_only"]),
        }
        steps: list[Step] = [("start", start)]
        try:
            with new_sequence(backends, device) as sequence:
                sequence.step(steps[0])
                for _ in range(n_steps):
                    met.update(sequence.situations())
                    steps.append(sequence.draw(draw))
                    sequence.step(steps[-1])
                    met.update(["operations", "refused" if sequence.was_refused else "allowed"])
        except (Exception, pytest.fail.Exception) as error:
            program = "\n".join(f"  {step!r}," for step in shrunk(steps, backends, device))
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}, by these steps:\n{program}") from error
    return met


def test_sequences_of_operations() -> None:
    met = run_sequences(range(100), 25)
    assert met["allowed"] > 0.7 * met["operations"], met
    assert met["merged"] > 0.25 * met["operations"], met
    assert met["disabled"] > 0.05 * met["operations"], met


@pytest.mark.parametrize("backend", sorted(TRITON_BACKENDS))
def test_sequences_under_triton(device: torch.device, backend: str) -> None:
    run_sequences(range(2), 8, (backend, "torch"), device)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(4))  # for `pytest -n`
def test_many_sequences_of_operations(part: int) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(run_sequences(range(seed, seed + 1250), 25))
