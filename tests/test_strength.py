"""Adapter strength: W + Σ s_a ΔW_a in every kind of layer, by PEFT's verbs for LoRA, and what sees a number change."""

import copy
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import oracle
import pytest
import torch
from tiny_models import IDS, MLP, llama, logits, qwen3_moe
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D
from versions import PEFT

import c3a_triton
from c3a_triton import (
    AdapterNotFoundError,
    AdapterStateError,
    C3AConfig,
    C3AConv2d,
    C3AEmbedding,
    C3ALinear,
    ConfigError,
)
from c3a_triton.files.checkpoint import read_adapter
from c3a_triton.operator import spectra

STRENGTHS = {"a": 0.3, "b": -1.7}
FOLDERS = "trained", "strengthened"


class Hooked(nn.Linear):
    """A linear layer beside which adapters are computed, and not in one node with it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.0


def make(base: nn.Module | None = None, kind: type[C3ALinear] = C3ALinear, sizes: tuple[int, int] = (3, 6)) -> Any:
    """A layer with two active adapters of large kernels."""
    layer = kind(nn.Linear(12, 18) if base is None else base, "a", sizes[0])
    layer.update_layer("b", sizes[1])
    layer.set_adapter(["a", "b"])
    for kernel in layer.c3a_kernel.values():
        nn.init.normal_(kernel, std=10)
    return layer


def embedding() -> Any:
    return make(nn.Embedding(10, 12, padding_idx=3), C3AEmbedding, (4, 3))


def conv() -> Any:
    return make(nn.Conv2d(4, 6, 3, padding=1), C3AConv2d, (2, 1))


LAYERS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "linear": (make, lambda: torch.randn(2, 5, 12)),
    "equal sizes": (lambda: make(sizes=(3, 3)), lambda: torch.randn(5, 12)),
    "Conv1D": (lambda: make(Conv1D(18, 12)), lambda: torch.randn(5, 12)),
    "beside": (lambda: make(Hooked(12, 18)), lambda: torch.randn(5, 12)),
    "embedding": (embedding, lambda: torch.randint(0, 10, (2, 5))),
    "conv": (conv, lambda: torch.randn(2, 4, 5, 5)),
}


class Mixed(nn.Module):
    """A matrix and a stack that a forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.stack = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("td,eod->to", x @ self.table.T, self.stack)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed = Mixed()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


def with_parameters() -> Any:
    model: Any = Model()
    options = {"block_size": 2, "target_modules": [], "init_weights": "gaussian"}
    for name in ("a", "b"):
        c3a_triton.apply(model, C3AConfig(target_parameters=["table", "stack"], **options), name)
    model.c3a.set_adapter(["a", "b"])
    return model


def with_experts() -> Any:
    pytest.importorskip("transformers.integrations.moe", reason="transformers 4: experts are layers")
    model = qwen3_moe()
    options = {"block_size": 4, "target_modules": [], "target_parameters": "all-experts", "init_weights": "gaussian"}
    for name in ("a", "b"):
        c3a_triton.apply(model, C3AConfig(**options), name)
    model.c3a.set_adapter(["a", "b"])
    return model.eval()


def strengthen(model: nn.Module, strengths: dict[str, float] = STRENGTHS) -> None:
    for module in model.modules():
        if isinstance(module, C3ALinear):
            for name, value in strengths.items():
                module.set_scale(name, value)


def multiplied(model: nn.Module, strengths: dict[str, float] = STRENGTHS) -> Any:
    """A copy whose kernels are s · w."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, C3ALinear):
                for name, value in strengths.items():
                    module.c3a_kernel[name].mul_(value)
    return twin


# What it computes


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("case", LAYERS)
def test_layers_compute_with_the_dense_definition(case: str, grad: bool) -> None:
    build, draw = LAYERS[case]
    layer, x = build().double(), draw()
    x = x.double() if x.is_floating_point() else x
    plain = copy.deepcopy(layer.base_layer)
    with torch.no_grad():
        for name, strength in STRENGTHS.items():
            delta = strength * layer.get_delta_weight(name)
            plain.weight.add_(delta.T if case == "Conv1D" else delta)
    if case in ("linear", "equal sizes", "beside"):
        expected = sum(s * oracle.dense(layer.c3a_kernel[name]) for name, s in STRENGTHS.items())
        oracle.assert_close(plain.weight - layer.weight, torch.as_tensor(expected), torch.float64)
    before = layer(x)
    strengthen(layer)
    with torch.set_grad_enabled(grad):
        oracle.assert_close(layer(x), plain(x), torch.float64)
    strengthen(layer, {"a": 0.0, "b": 0.0})
    oracle.assert_close(layer(x), layer.base_layer(x), torch.float64)
    strengthen(layer, {"a": 1.0, "b": 1.0})
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_kernels_are_strengthened_in_float32(dtype: torch.dtype) -> None:
    layer, x = make().to(dtype), torch.randn(5, 12, dtype=dtype)
    strengthen(layer)
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    expected = expected + sum(oracle.product(x, s * layer.c3a_kernel[name].double()) for name, s in STRENGTHS.items())
    oracle.assert_close(layer(x), expected, dtype)
    assert layer._kernel_on("a").dtype == torch.float32


@pytest.mark.parametrize("build", [with_parameters, with_experts], ids=["parameters", "experts"])
def test_parameters_and_experts_compute_with_kernels_times_strengths(build: Callable[[], Any]) -> None:
    model = build()
    x = IDS if build is with_experts else torch.randn(5, 4)
    expected = multiplied(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.c3a.set_adapter(["a", "b"], weights=list(STRENGTHS.values()))

    def computed(model: Any) -> Tensor:
        y = model(x)
        return y if isinstance(y, Tensor) else y.logits

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(computed(model), computed(expected))
    computed(model).square().sum().backward()
    computed(expected).square().sum().backward()
    twins = dict(expected.c3a.layers())
    for layer_name, layer in model.c3a.layers():
        for name, strength in STRENGTHS.items():
            found, unscaled = layer.c3a_kernel[name].grad, twins[layer_name].c3a_kernel[name].grad
            torch.testing.assert_close(found, strength * unscaled, rtol=1e-3, atol=1e-4 * float(found.abs().max()))
    with torch.no_grad():
        y = computed(model)
        model.c3a.merge_adapter()
        torch.testing.assert_close(computed(model), y, rtol=1e-3, atol=1e-4)
        model.c3a.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_quantized_base_layer_is_computed_beside_the_strengths() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(12, 18))
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    layer, x = make(base[0]), torch.randn(5, 12)
    strengthen(layer)
    torch.testing.assert_close(layer(x) - base(x), _delta(layer, x))


def test_a_gradient_is_that_of_the_strength_of_its_forward_pass() -> None:
    layer, x = make(), torch.randn(5, 12)
    dy = torch.randn(5, 18)
    for between in (STRENGTHS["a"], 5.0):
        strengthen(layer)
        y = layer(x)
        layer.set_scale("a", between)
        layer.zero_grad()
        y.backward(dy)
        for name, b in layer.block_size.items():
            expected = STRENGTHS[name] * oracle.weight_grad(dy, x, b)
            oracle.assert_close(layer.c3a_kernel[name].grad, expected, torch.float32)


def test_fold_computes_as_the_merged_layer() -> None:
    layer = make(nn.Linear(12, 18).bfloat16())
    strengthen(layer)
    layer.backend = "fold"
    x = torch.randn(5, 12).bfloat16()
    y = layer(x)
    layer.merge()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_merges_with_strengths_and_comes_back_bit_for_bit(case: str) -> None:
    build, draw = LAYERS[case]
    layer, x = build(), draw()
    weight = layer.weight.clone()
    merged = multiplied(layer)
    strengthen(layer)
    y = layer(x)
    for one in (layer, merged):
        one.merge()
    torch.testing.assert_close(layer.weight, merged.weight)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterStateError, match="'a' is merged with the strength 0.3 and cannot get 0.5; unmerge"):
        layer.set_scale("a", 0.5)
    layer.set_scale("a", 0.3)  # which it has
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), y)


def test_tied_layers_keep_the_strength_of_what_stays_merged() -> None:
    model = llama(tied=True)
    for name, target in (("a", "embed_tokens"), ("b", "lm_head")):
        c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=[target], init_weights="gaussian"), name)
    model.c3a.set_adapter(["a", "b"], weights=[0.5, 0.25])
    layers = dict(model.c3a.layers())
    head, embed = (next(one for name, one in layers.items() if name.endswith(end)) for end in ("lm_head", "tokens"))
    weight = head.weight.clone()
    with pytest.warns(UserWarning, match="merging changes both"):
        model.c3a.merge_adapter()
    embed.unmerge()
    delta = oracle.dense(head.c3a_kernel["b"])[: weight.shape[0]]
    oracle.assert_close(head.weight - weight, 0.25 * delta, torch.float32, bound=1e-4)
    head.unmerge()
    assert torch.equal(head.weight, weight)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_rows_have_their_adapters_with_their_strengths(grad: bool) -> None:
    model: Any = MLP()
    for name in ("a", "b"):
        c3a_triton.apply(model, C3AConfig(block_size=6, target_modules="all-linear", init_weights="gaussian"), name)
    expected, x = multiplied(model), torch.randn(4, 12)
    for name, strength in STRENGTHS.items():
        model.c3a.set_scale(name, strength)
    names = ["b", "__base__", "a", "b"]
    with torch.set_grad_enabled(grad):
        y = model(x, adapter_names=names)
        for row, name in enumerate(names):
            with expected.c3a.using([name]):
                torch.testing.assert_close(y[row], expected(x[row : row + 1])[0])


# Who sees the number change


def test_compiled_code_is_not_compiled_again() -> None:
    layers, x = {name: make(base) for name, base in (("plain", None), ("beside", Hooked(12, 18)))}, torch.randn(5, 12)
    for layer in layers.values():
        torch._dynamo.reset()
        strengthen(layer)
        counter = CompileCounter()
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=1, error_on_recompile=True):
            for strength in (0.3, 0.7, -2.0, 0.0, 1.0):
                layer.set_scale("a", strength)
                torch.testing.assert_close(compiled(x), layer(x))
                layer.scaling = dict.fromkeys(layer.scaling, strength)
                torch.testing.assert_close(compiled(x), layer(x))
            layer.set_adapter([])
            layer.set_adapter(["a", "b"])
            torch.testing.assert_close(compiled(x), layer(x))
        assert counter.frame_count == 1


def test_a_functional_call_is_compiled_with_the_strength() -> None:
    layer, x, w = make(), torch.randn(5, 12), torch.randn(6, 4, 3)
    strengthen(layer)

    @torch.compile(backend="eager", fullgraph=True)
    def call(w: Tensor) -> Tensor:
        return functional_call(layer, {"c3a_kernel.a": w}, (x,))

    y = functional_call(layer, {"c3a_kernel.a": w}, (x,))
    torch.testing.assert_close(y - nn.functional.linear(x, layer.weight, layer.bias), _delta(layer, x, a=w))
    torch.testing.assert_close(call(w), y)
    batched = torch.vmap(lambda w: functional_call(layer, {"c3a_kernel.a": w}, (x,)))(torch.stack([w, 2 * w]))
    torch.testing.assert_close(batched[0], y)
    with torch.no_grad():
        torch.testing.assert_close(call(w), y)
        tangent = torch.func.jvp(lambda w: functional_call(layer, {"c3a_kernel.a": w}, (x,)), (w,), (w,))[1]
    torch.testing.assert_close(tangent, STRENGTHS["a"] * oracle.product(x, w).float())


def _delta(layer: Any, x: Tensor, **kernels: Tensor) -> Tensor:
    kernels = dict(layer.c3a_kernel.items()) | kernels
    return sum(oracle.product(x, kernels[name]) * s for name, s in STRENGTHS.items()).float()  # type: ignore[union-attr]


def test_scaling_within_compiled_code_breaks_its_graph_and_computes_right() -> None:
    layer, x = make(), torch.randn(5, 12)
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def call(x: Tensor) -> Tensor:
        layer.scale_layer(0.5)
        y = layer(x)
        layer.unscale_layer(0.5)
        return y

    expected = multiplied(layer, {"a": 0.5, "b": 0.5})(x)
    for _ in range(2):
        torch.testing.assert_close(call(x), expected)
    assert layer.scaling == {"a": 1.0, "b": 1.0}


@torch.no_grad()
def test_calls_without_gradients_have_kernels_in_one_place() -> None:
    """Captured graphs, and the tables of addresses of rows, hold them."""
    layer = make()
    strengthen(layer)
    place, number = layer._kernel_on("a").data_ptr(), layer._strengths["a"]._factor.data_ptr()
    for strength in (0.5, 1.0):
        layer.set_scale("a", strength)
        assert layer._strengths["a"]._factor.data_ptr() == number
        with torch.inference_mode():
            kernel = layer._kernel_on("a")
        assert kernel.data_ptr() == place
        assert not kernel.is_inference()
        assert torch.equal(kernel, strength * layer.c3a_kernel["a"])
    layer.c3a_kernel["a"].data.mul_(2)  # of which nobody hears
    assert torch.equal(layer._kernel_on("a"), layer.c3a_kernel["a"])


@torch.no_grad()
def test_memory_that_a_captured_graph_writes_into_outlives_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    strengthen(layer)
    places = {name: layer._kernel_on(name).data_ptr() for name in STRENGTHS}
    monkeypatch.setattr("c3a_triton.adapters.strength._of_graphs", kept := [])
    monkeypatch.setattr(spectra, "captures", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer._kernel_on("a")
    layer.delete_adapter("a")
    assert [product.data_ptr() for product in kept] == [places["a"]]


@torch.no_grad()
def test_what_is_kept_of_frozen_kernels_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(), torch.randn(5, 12)
    layer.freeze_for_inference()
    strengthen(layer)
    before = layer(x)
    products, multiply = [], torch.mul

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        products.append(args)
        return multiply(*args, **kwargs)

    monkeypatch.setattr(torch, "mul", counted)
    assert torch.equal(layer(x), before)
    assert not products
    assert all(layer._kernel_on(name) in spectra._frozen for name in STRENGTHS)
    for change in (
        lambda: layer.set_scale("a", 2.0),
        lambda: layer.c3a_kernel["a"].add_(1.0),
        lambda: layer.scaling.update(b=0.0),
        lambda: layer.reset_c3a_parameters("a", "gaussian"),
    ):
        change()
        expected = multiplied(layer, dict(layer.scaling))
        strengthen(expected, {"a": 1.0, "b": 1.0})
        torch.testing.assert_close(layer(x), expected(x))
    layer.freeze_for_inference(False)
    assert not len(spectra._frozen)


@torch.no_grad()
def test_layers_of_one_kernel_have_strengths_of_their_own() -> None:
    first, second = make(), make()
    second.c3a_kernel["a"] = first.c3a_kernel["a"]
    for layer, strength in ((first, 0.5), (second, 2.0)):
        layer.set_scale("a", strength)
        layer.freeze_for_inference()
    for layer, strength in ((first, 0.5), (second, 2.0), (first, 0.5)):
        assert torch.equal(layer._kernel_on("a"), strength * first.c3a_kernel["a"])


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "bfloat16 and back": lambda layer: layer.bfloat16().float(),
    "float64": lambda layer: layer.double(),
    "meta and back": lambda layer: copy.deepcopy(layer).to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_and_moves_keep_strengths(way: str) -> None:
    layer = make()
    strengthen(layer)
    found = COPIES[way](layer)
    assert found.scaling == STRENGTHS
    found.load_state_dict(layer.state_dict())
    x = torch.randn(5, 12, dtype=found.weight.dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(found(x), layer.to(x.dtype)(x))
    found.set_scale("a", 2.0)
    assert layer.scaling["a"] == (2.0 if found is layer else 0.3)
    if found is not layer:
        oracle.assert_close(layer._kernel_on("a"), 0.3 * layer.c3a_kernel["a"].double(), x.dtype, bound=1e-6)


def test_a_replica_computes_with_the_strengths() -> None:
    layer, x = make(), torch.randn(5, 12)
    strengthen(layer)
    replica, kernels = layer._replicate_for_data_parallel(), layer.c3a_kernel._replicate_for_data_parallel()
    for name, kernel in layer.c3a_kernel.items():
        kernels.__dict__[name] = kernel.detach().clone()
    replica._modules = {"base_layer": layer.base_layer, "c3a_kernel": kernels}
    torch.testing.assert_close(replica(x), layer(x))


def test_a_meta_layer_computes_shapes() -> None:
    layer = make()
    strengthen(layer)
    with torch.no_grad():
        assert layer.to("meta")(torch.randn(5, 12, device="meta")).shape == (5, 18)


def test_an_offloaded_layer_has_its_strengths() -> None:
    model, x = mlp(), torch.randn(5, 12)
    model.c3a.set_adapter(["a", "b"], weights=list(STRENGTHS.values()))
    expected = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(model(x), expected)
    model.c3a.set_scale("a", 0.0)
    with torch.no_grad():
        assert not torch.allclose(model(x), expected)
        model.c3a.set_scale("a", STRENGTHS["a"])
        torch.testing.assert_close(model(x), expected)


# Verbs of a layer


@pytest.mark.parametrize(
    "verbs",
    [
        lambda layer: layer.set_scale("a", 0.5),
        lambda layer: (layer.set_scale("a", 0.5), layer.scale_layer(0.5), layer.scale_layer(-3)),
        lambda layer: (layer.scale_layer(4), layer.unscale_layer(8)),
        lambda layer: (layer.scale_layer(4), layer.set_scale("b", 3), layer.unscale_layer()),
        lambda layer: (layer.scale_layer(0), layer.set_scale("a", 1.0)),
        lambda layer: (layer.set_scale("unknown", 0.5), layer.scale_layer(1)),
        lambda layer: (layer.set_adapter("b"), layer.scale_layer(0.1)),
        lambda layer: setattr(layer, "scaling", {name: 2 * s for name, s in layer.scaling.copy().items()}),
        lambda layer: layer.scaling.__setitem__("b", layer.scaling["b"] * 0.25),
    ],
)
def test_verbs_are_those_of_lora(verbs: Callable[[Any], Any]) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(12, 18))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0"]), "a")
    model.add_adapter("b", peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"]))
    theirs = model.base_model.model[0]
    theirs.set_adapter(["a", "b"])
    ours, initial = make(), theirs.scaling.copy()
    for layer in (theirs, ours):
        verbs(layer)
    assert dict(ours.scaling) == pytest.approx({name: s / initial[name] for name, s in theirs.scaling.items()})
    before = ours.scaling.copy()
    ours.scaling = {"a": 2, "unknown": 3}
    assert ours.scaling == {"a": 2.0, "b": 1.0}
    assert isinstance(before, dict)


NO_STRENGTHS = [math.nan, math.inf, -math.inf, True, "0.5", b"1", None, 1e39, 10**400, 1j, [0.5], torch.tensor(0.5)]
NO_STRENGTHS += [np.array(0.5), np.bool_(True), ...]


@pytest.mark.parametrize("value", NO_STRENGTHS, ids=repr)
def test_what_is_no_strength_is_refused(value: Any) -> None:
    layer = make()
    layer.layer_name = "h.0.attn"
    layer.set_scale("a", 0.5)
    ways: list[Callable[[], Any]] = [
        lambda: layer.set_scale("b", value),
        lambda: layer.set_scale("unknown", value),
        lambda: layer.scale_layer(value),
        lambda: setattr(layer, "scaling", {"a": 3.0, "b": value}),
        lambda: layer.scaling.__setitem__("b", value),
    ]
    if value is not None:
        ways.append(lambda: layer.unscale_layer(value))
    for way in ways:
        with pytest.raises(ConfigError, match="h.0.attn.*finite number"):
            way()
    assert layer.scaling == {"a": 0.5, "b": 1.0}


def test_what_is_no_strength_is_refused_by_the_manager() -> None:
    model = mlp()
    for value in NO_STRENGTHS:
        with pytest.raises(ConfigError, match="adapter 'b'.*finite number"):
            model.c3a.set_scale("b", value)
        if not isinstance(value, (list, type(None))):
            with pytest.raises(ConfigError, match="adapter 'b'.*finite number"):
                model.c3a.set_adapter("b", weights=value)
    assert model.c3a.active_adapters == ["a"]
    assert scalings(model) == [{"a": 1.0, "b": 1.0}] * 2


def test_numbers_of_any_kind_are_strengths() -> None:
    layer = make()
    for value in (1, -0.0, Fraction(1, 2), np.float32(0.25), np.int64(3)):
        layer.set_scale("a", value)
        assert type(layer.scaling["a"]) is float
        assert layer.scaling["a"] == value


def test_what_else_is_refused() -> None:
    layer = make()
    layer.set_scale("a", 1e30)
    with pytest.raises(ConfigError, match="finite number"):
        layer.scale_layer(1e30)
    with pytest.raises(ConfigError, match="cannot be divided by 0; unscale_layer"):
        layer.unscale_layer(0)
    with pytest.raises(AdapterNotFoundError, match="no adapter 'unknown'; it has: a, b"):
        layer.scaling["unknown"] = 0.5
    with pytest.raises(KeyError, match="unknown"):
        layer.scaling["unknown"]
    with pytest.raises(ConfigError, match="scaling must be a dict"):
        layer.scaling = 0.5
    assert layer.scaling == {"a": 1e30, "b": 1.0}


def test_strengths_go_with_their_adapters() -> None:
    layer, x = make(), torch.randn(5, 12)
    strengthen(layer)
    y = layer(x)
    assert "scaling={'a': 0.3, 'b': -1.7}" in repr(layer)
    layer.rename_adapter("a", "c")
    assert layer.scaling == {"c": 0.3, "b": -1.7}
    assert torch.equal(layer(x), y)
    layer.update_layer("c", 3)
    layer.delete_adapter("b")
    layer.update_layer("b", 6)
    assert layer.scaling == {"c": 1.0, "b": 1.0}
    assert "scaling" not in repr(layer)


# Verbs of the manager


def mlp() -> Any:
    model: Any = MLP()
    for name in ("a", "b"):
        c3a_triton.apply(model, C3AConfig(block_size=6, target_modules="all-linear", init_weights="gaussian"), name)
    return model


def scalings(model: Any) -> list[dict[str, float]]:
    return [dict(layer.scaling) for _, layer in model.c3a.layers()]


def test_adapters_are_set_with_weights() -> None:
    model, x = mlp(), torch.randn(5, 12)
    assert " × " not in model.c3a.summary()
    model.c3a.set_adapter(["a", "b"], weights=[0.3, -1.7])
    assert scalings(model) == [STRENGTHS] * 2
    assert "active × 0.3\n" in model.c3a.summary()
    y = model(x)
    model.c3a.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        model.c3a.set_adapter("b", weights=2.0)
    assert scalings(model) == [{"a": 0.3, "b": 2.0}] * 2
    model.c3a.set_adapter(["b", "a"], weights=iter([-1.7, 0.3]))
    torch.testing.assert_close(model(x), y)
    model.c3a.set_adapter(["a", "b"])
    assert scalings(model) == [STRENGTHS] * 2
    model.c3a.set_adapter(["a", "b"], weights=1)
    assert scalings(model) == [{"a": 1.0, "b": 1.0}] * 2


@pytest.mark.parametrize(
    ("names", "weights", "error", "match"),
    [
        (["a", "b"], [0.5], ConfigError, r"a strength for each adapter.*\[0.5\]"),
        (["b", "b"], [0.5, 0.1], ConfigError, "named once"),
        (["b"], [0.5, 0.1], ConfigError, "a strength for each adapter"),
        (["b", "a"], [0.5, math.nan], ConfigError, "adapter 'a'.*nan"),
        ("b", "0.5", ConfigError, "adapter 'b'.*'0.5'"),
        ("b", True, ConfigError, "adapter 'b'.*True"),
        ("b", {"b": 0.5}, ConfigError, "adapter 'b'.*'b'"),
        ("unknown", 0.5, AdapterNotFoundError, "'unknown'"),
    ],
)
def test_weights_are_checked_before_anything_changes(names: Any, weights: Any, error: Any, match: str) -> None:
    model = mlp()
    with pytest.raises(error, match=match):
        model.c3a.set_adapter(names, weights=weights)
    assert model.c3a.active_adapters == ["a"]
    assert scalings(model) == [{"a": 1.0, "b": 1.0}] * 2


def test_a_merged_adapter_has_the_strength_that_it_was_merged_with() -> None:
    model = mlp()
    model.c3a.set_scale("b", 3)
    model.c3a.merge_adapter("b")
    for scale in (0.5, 1):
        with pytest.raises(AdapterStateError, match="first: 'b' is merged with the strength 3"):
            model.c3a.set_scale("b", scale)
    model.c3a.set_scale("a", 0.5)
    assert scalings(model) == [{"a": 0.5, "b": 3.0}] * 2
    with pytest.raises(ConfigError, match="nan"):
        model.c3a.set_scale("a", math.nan)
    with pytest.raises(AdapterNotFoundError, match="'unknown'"):
        model.c3a.set_scale("unknown", 1)


def test_files_and_exchanged_values_know_of_no_strength(tmp_path: Path) -> None:
    model = llama()
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["q_proj"], init_weights="gaussian"), "a")
    model.c3a.save_pretrained(tmp_path / FOLDERS[0], "a")
    model.c3a.set_scale("a", 0.5)
    half = logits(model)
    model.c3a.save_pretrained(tmp_path / FOLDERS[1], "a")
    saved = [(read_adapter(tmp_path / folder).config, read_adapter(tmp_path / folder).tensors) for folder in FOLDERS]
    assert saved[0][0] == saved[1][0]
    torch.testing.assert_close(saved[0][1], saved[1][1], rtol=0, atol=0)
    with torch.no_grad():
        for _, layer in model.c3a.layers():
            layer.c3a_kernel["a"].zero_()
    model.c3a.hotswap_adapter(tmp_path / FOLDERS[0], "a")
    assert torch.equal(logits(model), half)
    model.c3a.load_adapter(tmp_path / FOLDERS[0], "b")
    model.c3a.set_adapter("b")
    assert not torch.allclose(logits(model), half)
    model.c3a.add_weighted_adapter(["a", "b"], [2.0, -0.5], "c")  # 2 · 0.5 w - 0.5 w
    model.c3a.set_adapter("c")
    torch.testing.assert_close(logits(model), half)


# PEFT's layers


def peft_model() -> Any:
    peft = pytest.importorskip("peft")
    from c3a_triton.integrations.peft import convert

    config = peft.C3AConfig(block_size=6, target_modules=["first", "second"], init_weights=False)
    model = peft.get_peft_model(MLP(), config, "a")
    model.add_adapter("b", config)
    convert(model)
    return model


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, C3ALinear)]


@pytest.fixture
def unpatched() -> Any:
    yield
    from c3a_triton.integrations.peft import unpatch_peft

    unpatch_peft()


@pytest.mark.usefixtures("unpatched")
def test_pefts_layers_have_strengths() -> None:
    model, x = peft_model(), torch.randn(5, 12)
    model.base_model.set_adapter(["a", "b"])
    expected = multiplied(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for module in layers_of(model):  # as diffusers' set_adapters does
        for name, strength in STRENGTHS.items():
            module.set_scale(name, strength)
    y = model(x)
    torch.testing.assert_close(y, expected(x))
    for module in layers_of(model):  # as its fuse_lora
        module.scale_layer(0.5)
        module.merge(safe_merge=True)
    torch.testing.assert_close(model(x), multiplied(expected, {"a": 0.5, "b": 0.5})(x), rtol=1e-4, atol=1e-4)
    model.base_model.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    for module in layers_of(model):
        module.unscale_layer(0.5)
    torch.testing.assert_close(model(x), y)
    if PEFT < (0, 18):
        with pytest.raises(AdapterStateError, match="'b' cannot be deleted: PEFT does that for C3A since 0.18"):
            model.delete_adapter("b")
        return
    model.delete_adapter("b")
    model.add_adapter("b", model.peft_config["a"])
    assert [dict(module.scaling) for module in layers_of(model)] == [{"a": 0.3, "b": 1.0}] * 2


@pytest.mark.usefixtures("unpatched")
@pytest.mark.parametrize("build", [peft_model, mlp], ids=["PEFT's", "in place"])
def test_pefts_helper_rescales(build: Callable[[], Any]) -> None:
    helpers = pytest.importorskip("peft.helpers")
    from c3a_triton.integrations.peft import patch_peft, unpatch_peft

    patch_peft()
    model, x = build(), torch.randn(5, 12)
    expected, y = multiplied(model, {"a": 0.5}), model(x)
    with helpers.rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(model(x), expected(x))
    assert torch.equal(model(x), y)
    with pytest.raises(ConfigError, match="finite number"), helpers.rescale_adapter_scale(model, math.inf):
        raise AssertionError
    assert torch.equal(model(x), y)
    unpatch_peft()
    with pytest.raises(ValueError, match="only supported"), helpers.rescale_adapter_scale(model, 0.5):
        raise AssertionError
