"""Adapters on quantized base layers, with the real libraries on the CPU: bitsandbytes and torchao, through PEFT."""

import copy
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from scripts import run_example
from tiny_models import IDS, llama, logits
from torch import Tensor, nn

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig, C3ALinear, ConfigError, register_linear_like
from c3a_triton.bases import quantized
from c3a_triton.bases.quantized import hold_layout, quantized_weight, release_layout

bnb = pytest.importorskip("bitsandbytes")
torchao_quantization = pytest.importorskip("torchao.quantization")
peft = pytest.importorskip("peft")
pytest.importorskip("peft.utils.quantization_utils")

IN, OUT, B = 64, 96, 16


def four_bit(nested: bool = False, bias: bool = True) -> nn.Module:
    plain = nn.Linear(IN, OUT, bias=bias)
    base = bnb.nn.Linear4bit(IN, OUT, bias=bias, quant_type="nf4", compress_statistics=nested)
    base.load_state_dict(plain.state_dict())
    base.support_avx512bf16_for_cpu = True  # as on a processor that has it: repacking itself needs none
    return base.to("cpu").requires_grad_(False)


def eight_bit() -> nn.Module:
    base = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    base.load_state_dict(nn.Linear(IN, OUT).state_dict())
    return base.to("cpu").requires_grad_(False)


TORCHAO = {
    "int8": lambda: torchao_quantization.Int8WeightOnlyConfig(),
    "int4": lambda: torchao_quantization.IntxWeightOnlyConfig(
        torch.int4, torchao_quantization.granularity.PerGroup(32)
    ),
    "float8": lambda: torchao_quantization.Float8WeightOnlyConfig(),
    "e5m2": lambda: torchao_quantization.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
}


def of_torchao(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    base = nn.Linear(IN, OUT).to(dtype).requires_grad_(False)
    torchao_quantization.quantize_(base, TORCHAO[kind]())
    return base


BASES: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes 4-bit": four_bit,
    "bitsandbytes 4-bit nested": lambda: four_bit(nested=True),
    "bitsandbytes 8-bit": eight_bit,
    "torchao int8": lambda: of_torchao("int8"),
    "torchao int4": lambda: of_torchao("int4"),
    "torchao float8": lambda: of_torchao("float8"),
    "torchao e5m2": lambda: of_torchao("e5m2"),
}
# How far a weight of that many bits is from what was quantized, relative to its norm: measured, with some room.
LOSS = {"4-bit": 0.14, "int4": 0.16, "8-bit": 0.015, "int8": 0.015, "float8": 0.05, "e5m2": 0.06}


def loss(kind: str) -> float:
    return next(bound for name, bound in LOSS.items() if name in kind)


def adapted(kind: str, base: nn.Module | None = None) -> C3ALinear:
    layer = C3ALinear(BASES[kind]() if base is None else base, "default", B, "gaussian", layer_name="model.fc")
    if kind.startswith("torchao"):
        layer.quantization_config = TORCHAO[kind.split()[1]]()
    return layer


def dequantized(layer: C3ALinear) -> Tensor:
    """The base weight in float64, by the library's own means and nothing of ours."""
    base = layer.get_base_layer()
    weight: Any = base.weight
    if isinstance(base, bnb.nn.Linear4bit):
        assert not getattr(weight.quant_state, "packing_format_for_cpu", False)
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if isinstance(base, bnb.nn.Linear8bitLt):
        scales = base.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scales.double().view(-1, 1) / 127
    return weight.dequantize().double()


def content(base: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a base layer consists of, the state of its quantization included."""
    weight: Any = base.weight
    tensors = {
        name: value.clone() for name, value in base.state_dict().items() if type(value) in (Tensor, nn.Parameter)
    }
    if hasattr(weight, "__tensor_flatten__"):
        tensors |= {name: getattr(weight, name).clone() for name in weight.__tensor_flatten__()[0]}
    if isinstance(base, bnb.nn.Linear8bitLt):
        tensors |= {"codes": weight.data.clone(), "scales": base.state.SCB if weight.SCB is None else weight.SCB}
    return tensors


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)) for name, value in one.items()
    )


@pytest.fixture(autouse=True)
def _clean_registry() -> Iterator[None]:
    before = dict(quantized._registry)
    yield
    quantized._registry.clear()
    quantized._registry.update(before)


# Forward and backward


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", BASES)
def test_forward_and_gradients_are_those_of_the_dequantized_weight(kind: str, training: bool) -> None:
    layer = adapted(kind).train(training)
    w = layer.c3a_kernel["default"]
    x = torch.randn(3, 5, IN, requires_grad=True)
    dy = torch.randn(3, 5, OUT)
    layer(x).backward(dy)
    y = layer(x)
    weight = dequantized(layer) + oracle.dense(w)
    expected = x.detach().double() @ weight.T + layer.bias.double()
    # In evaluation bitsandbytes' 8-bit layer quantizes x as well.
    quantized_x = kind == "bitsandbytes 8-bit" and not training
    oracle.assert_close(y, expected, torch.float32, bound=0.02 if quantized_x else None)
    oracle.assert_close(x.grad, dy.double() @ weight, torch.float32)
    oracle.assert_close(w.grad, oracle.weight_grad(dy, x, B), torch.float32)
    assert layer._kernels[0].dtype == torch.float32
    delta = y - layer.base_layer(x)
    oracle.assert_close(delta, oracle.product(x, w), torch.float32, bound=1e-4)


@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_is_that_of_x(kind: str, dtype: torch.dtype) -> None:
    base = of_torchao("int8", dtype) if kind.startswith("torchao") else BASES[kind]()
    layer = adapted(kind, base.to(dtype) if kind.endswith("8-bit") else base)
    x = torch.randn(5, IN, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, layer.c3a_kernel["default"].grad.dtype) == (dtype, dtype, torch.float32)
    expected = x.detach().double() @ (dequantized(layer) + oracle.dense(layer.c3a_kernel["default"])).T
    oracle.assert_close(y, expected + layer.bias.double(), dtype, bound=1e-2)


def test_a_base_that_cuts_the_gradient_is_refused_and_may_still_infer() -> None:
    base = nn.Linear(IN, OUT).requires_grad_(False)
    torchao_quantization.quantize_(base, torchao_quantization.Int8DynamicActivationInt8WeightConfig())
    layer = C3ALinear(base, "default", B, layer_name="model.fc")
    x = torch.randn(5, IN)
    with torch.no_grad():
        oracle.assert_close(
            layer(x) - base(x), oracle.product(x, layer.c3a_kernel["default"]), torch.float32, bound=1e-3
        )
    layer(x).sum().backward()  # nothing below it is trained
    assert layer.c3a_kernel["default"].grad is not None
    with pytest.raises(AdapterStateError, match=r"model\.fc: this Linear passes no gradient on to its input"):
        layer(x.requires_grad_())
    layer.enable_adapters(False)
    layer(x)


def test_a_base_with_quantized_activations_is_merged_into() -> None:
    base = nn.Linear(IN, OUT).requires_grad_(False)
    config = torchao_quantization.Int8DynamicActivationInt8WeightConfig()
    torchao_quantization.quantize_(base, config)
    layer = C3ALinear(base, "default", B, "gaussian")
    layer.quantization_config = config
    wanted, before = dequantized(layer) + oracle.dense(layer.c3a_kernel["default"]), content(base)
    layer.merge()
    assert (dequantized(layer) - wanted).norm() <= LOSS["int8"] * wanted.norm()
    layer.unmerge()
    assert same(content(layer.base_layer), before)


@pytest.mark.parametrize("granularity", ["PerTensor", "PerRow"])
def test_float8_products_infer_and_are_merged_into(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao asks for a GPU that has them; torch computes them on CPUs as well, without a backward pass."""
    from torchao.quantization import quant_api

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    monkeypatch.setattr(quant_api, "is_sm_at_least_89", lambda: True)
    config = torchao_quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=getattr(torchao_quantization, granularity)()
    )
    base = nn.Linear(IN, OUT).bfloat16().requires_grad_(False)
    torchao_quantization.quantize_(base, config)
    layer = C3ALinear(base, "default", B, "gaussian", layer_name="model.fc")
    layer.quantization_config = config
    wanted, before = dequantized(layer) + oracle.dense(layer.c3a_kernel["default"]), content(base)
    x = torch.randn(5, IN, dtype=torch.bfloat16)
    y = layer(x)
    oracle.assert_close(y, x.double() @ wanted.T + base.bias.double(), torch.bfloat16, bound=0.06)
    y.sum().backward()  # nothing below it is trained
    assert layer.c3a_kernel["default"].grad.norm() > 0
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_mm"):
        base(x.clone().requires_grad_()).sum().backward()
    with pytest.raises(AdapterStateError, match=r"model\.fc: this Linear passes no gradient on to its input"):
        layer(x.clone().requires_grad_())
    layer.merge()
    assert (dequantized(layer) - wanted).norm() <= LOSS["float8"] * wanted.norm()
    layer.unmerge()
    assert same(content(layer.base_layer), before)


# bitsandbytes' repacking


def pack(base: nn.Module) -> None:
    """What bitsandbytes does in the first forward without gradient on a processor with AVX512-BF16."""
    base.weight.data, base.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        base.weight.data, base.weight.quant_state
    )


def is_packed(base: nn.Module) -> bool:
    return getattr(base.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_a_base_that_was_repacked_is_unpacked(nested: bool) -> None:
    base = four_bit(nested)
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    pack(base)
    broken = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    assert (broken - weight).norm() > weight.norm()
    layer = adapted("bitsandbytes 4-bit", base).eval()
    x = torch.randn(5, IN)
    # Repacking has rounded the blocks' scales to bfloat16.
    expected = x.double() @ (weight + oracle.dense(layer.c3a_kernel["default"])).T + base.bias.double()
    oracle.assert_close(layer(x), expected, torch.float32, bound=5e-3)
    pack(base)
    layer.merge()
    merged = dequantized(layer)
    wanted = weight + oracle.dense(layer.c3a_kernel["default"])
    assert (merged - wanted).norm() <= LOSS["4-bit"] * wanted.norm()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_evaluation_before_training_and_merging(bias: bool) -> None:
    """On a processor with AVX512-BF16 the trap itself: no gradient, a wrong merge, an unmerge that is refused."""
    layer = adapted("bitsandbytes 4-bit", four_bit(bias=bias))
    before, x = content(layer.base_layer), torch.randn(5, IN)
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert not is_packed(layer.base_layer)
    assert same(content(layer.base_layer), before)
    layer.train()
    x.requires_grad_()
    layer(x).sum().backward()
    weight = dequantized(layer) + oracle.dense(layer.c3a_kernel["default"])
    oracle.assert_close(x.grad, weight.sum(0).expand(5, -1), torch.float32)
    layer.merge()
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.unmerge()
    assert same(content(layer.base_layer), before)


def test_widths_that_bitsandbytes_cannot_repack() -> None:
    base = bnb.nn.Linear4bit(24, 40, quant_type="nf4").to("cpu").requires_grad_(False)
    layer = C3ALinear(base, "default", 8).eval()
    x = torch.randn(5, 24)
    expected = x.double() @ (dequantized(layer) + oracle.dense(layer.c3a_kernel["default"])).T + base.bias.double()
    oracle.assert_close(layer(x), expected, torch.float32)


def test_layers_that_are_not_adapted_pass_gradients_too() -> None:
    """A 4-bit layer between two adapted ones would cut the gradient of the lower one."""
    model = nn.Sequential(*(bnb.nn.Linear4bit(64, 64, quant_type="nf4") for _ in range(3))).to("cpu")
    native = [layer.support_avx512bf16_for_cpu for layer in model]
    for layer in model:
        layer.support_avx512bf16_for_cpu = True
    c3a_triton.apply(model, C3AConfig(block_size=16, target_modules=["0", "2"]))
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 64))
    assert not any(is_packed(layer.get_base_layer() if isinstance(layer, C3ALinear) else layer) for layer in model)
    model.train()
    model(torch.randn(2, 64)).sum().backward()
    assert model[0].c3a_kernel["default"].grad.norm() > 0
    model = model.c3a.unload()
    assert [layer.support_avx512bf16_for_cpu for layer in model] == native


def test_a_failed_apply_leaves_the_layout_to_bitsandbytes() -> None:
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu"), nn.ModuleList([nn.Linear(4, 4)]))
    native = model[0].support_avx512bf16_for_cpu
    with pytest.raises(ConfigError, match="ModuleList"):
        c3a_triton.apply(
            model, C3AConfig(block_size=16, target_modules=["0"], exclude_modules=["1.0"], modules_to_save=["1"])
        )
    assert model[0].support_avx512bf16_for_cpu == native


def test_holding_and_releasing() -> None:
    base = four_bit()
    hold_layout(base)
    assert not base.support_avx512bf16_for_cpu
    release_layout(base)
    assert base.support_avx512bf16_for_cpu == bnb.functional.has_avx512bf16()
    plain = nn.Linear(4, 4)
    hold_layout(plain)
    assert not hasattr(plain, "support_avx512bf16_for_cpu")


# Merging


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("kind", BASES)
def test_merging_requantizes_and_unmerging_restores_bit_for_bit(kind: str, used: bool) -> None:
    layer = adapted(kind)
    x = torch.randn(5, IN)
    layer.train()
    if used:
        layer(x)
    weight, delta = dequantized(layer), oracle.dense(layer.c3a_kernel["default"])
    delta_is = delta.norm() / weight.norm()
    assert delta_is > 0.2
    before, applied = content(layer.base_layer), layer(x)
    kind_of_weight = type(layer.base_layer.weight)
    layer.merge(safe_merge=used)
    assert type(layer.base_layer.weight) is kind_of_weight
    assert not layer.base_layer.weight.requires_grad
    merged = dequantized(layer)
    assert (merged - weight - delta).norm() <= loss(kind) * (weight + delta).norm()
    assert (layer(x) - applied).norm() <= loss(kind) * applied.norm()
    oracle.assert_close(layer(x), x.double() @ merged.T + layer.bias.double(), torch.float32)
    layer.eval()
    layer.unmerge()
    assert not layer.base_layer.training
    assert same(content(layer.base_layer), before)
    layer.train()
    torch.testing.assert_close(layer(x), applied, rtol=0, atol=0)
    layer.merge()  # what was brought back can be merged into again
    torch.testing.assert_close(dequantized(layer), merged, rtol=0, atol=0)


def test_a_second_adapter_merges_on_top_and_a_change_in_between_is_seen() -> None:
    layer = adapted("bitsandbytes 8-bit")
    layer.update_layer("second", 32, "gaussian")
    before, base = content(layer.base_layer), quantized.copy_of(layer.base_layer)
    layer.merge()
    with pytest.warns(UserWarning, match="merged already; merging"):
        layer.merge(adapter_names=["second"])
    wanted = dequantized(adapted("bitsandbytes 8-bit", base))
    wanted += oracle.dense(layer.c3a_kernel["default"]) + oracle.dense(layer.c3a_kernel["second"])
    assert (dequantized(layer) - wanted).norm() <= 2 * LOSS["8-bit"] * wanted.norm()
    copied = copy.deepcopy(layer)
    layer.unmerge()
    assert same(content(layer.base_layer), before)
    copied.base_layer.weight.data[0, 0] += 1
    with pytest.raises(AdapterStateError, match="changed after"):
        copied.unmerge()


def test_the_kept_copy_of_a_four_bit_layer_knows_itself() -> None:
    layer = adapted("bitsandbytes 4-bit")
    original = layer.base_layer
    layer.merge()
    layer.unmerge()
    assert layer.base_layer.weight.module is layer.base_layer is not original
    assert layer.base_layer.quant_state is layer.base_layer.weight.quant_state


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: of_torchao("int8"), "torchao configuration.*TorchAoConfig, or set quantization_config"),
        (lambda: bnb.nn.Linear4bit(IN, OUT), "not quantized it: move the model to its device"),
        (lambda: bnb.nn.Linear8bitLt(IN, OUT), "not quantized it: move the model to its device"),
    ],
    ids=["torchao unknown", "4-bit unquantized", "8-bit with 16-bit weights"],
)
def test_what_cannot_be_merged_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    layer = C3ALinear(make(), "default", B, layer_name="model.fc")
    before = layer.base_layer.weight
    with pytest.raises(AdapterStateError, match=f"model.fc: .*{reason}"):
        layer.merge()
    assert layer.base_layer.weight is before
    assert not layer.merged


def test_another_configuration_than_the_weight_s_is_refused() -> None:
    layer = adapted("torchao int8")
    layer.quantization_config = TORCHAO["float8"]()
    before = content(layer.base_layer)
    with pytest.raises(AdapterStateError, match=r"model\.fc: .*Float8Tensor.*not the one that it was quantized with"):
        layer.merge()
    assert same(content(layer.base_layer), before)
    layer.quantization_config = torchao_quantization.IntxWeightOnlyConfig(
        torch.int4, torchao_quantization.granularity.PerGroup(48)
    )
    with pytest.raises(AdapterStateError, match=r"model\.fc: quantizing the merged weight .* failed"):
        layer.merge()
    assert same(content(layer.base_layer), before)
    assert not layer.merged


def test_without_peft_merging_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.utils.quantization_utils", None)
    layer = adapted("bitsandbytes 8-bit")
    before = content(layer.base_layer)
    with pytest.raises(AdapterStateError, match=r"model\.fc: .*pip install 'peft>=0\.20'"):
        layer.merge()
    assert same(content(layer.base_layer), before)


def test_what_peft_s_own_layer_does_to_an_eight_bit_base() -> None:
    """Why this library never adds to storage: PEFT's C3A adds ΔW to the int8 codes, and the layer is ruined."""
    from peft.tuners.c3a.layer import C3ALinear as PeftC3ALinear

    base, ours = eight_bit(), adapted("bitsandbytes 8-bit")
    ours.base_layer = copy.deepcopy(base)
    theirs = PeftC3ALinear(base, "default", block_size=B, init_weights="gaussian", config=peft.C3AConfig(block_size=B))
    theirs.c3a_kernel["default"].data = ours.c3a_kernel["default"].data.clone()
    x = torch.randn(5, IN)
    wanted = ours(x)
    errors = []
    for layer in (theirs, ours):
        layer.merge()
        errors.append(((layer(x) - wanted).norm() / wanted.norm()).item())
    assert errors[0] > 0.1 > LOSS["8-bit"] > errors[1]


# The registry


class Int8Linear(nn.Module):
    """A linear layer of a library that nobody here knows: codes, a scale, widths under other names."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.n_out, self.n_in = weight.shape
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("codes", (weight / self.scale).round().to(torch.int8))

    def dequantize(self) -> Tensor:
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().T.to(x.dtype)


class NamedInt8Linear(Int8Linear):
    """The same with the usual names."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape


def register(layer_class: type[nn.Module] = Int8Linear) -> None:
    register_linear_like(
        layer_class,
        widths=lambda layer: (layer.n_in, layer.n_out),
        dequantize=lambda layer: layer.dequantize(),
        requantize=lambda layer, weight: Int8Linear(weight),
    )


def int8_model() -> nn.Sequential:
    return nn.Sequential(Int8Linear(torch.randn(OUT, IN)), nn.ReLU(), nn.Linear(OUT, 8))


def test_a_registered_class_is_linear_everywhere(tmp_path: Path) -> None:
    config = C3AConfig(block_size=8, target_modules="all-linear", init_weights="gaussian")
    assert [name for name, _ in c3a_triton.apply(int8_model(), config).c3a.layers()] == ["2"]
    register()
    model = int8_model()
    plain, x = copy.deepcopy(model), torch.randn(5, IN, requires_grad=True)
    c3a_triton.apply(model, config)
    layer = model[0]
    y = layer(x)
    y.sum().backward()
    weight = layer.base_layer.dequantize().double() + oracle.dense(layer.c3a_kernel["default"])
    oracle.assert_close(y, x.detach().double() @ weight.T, torch.float32)
    oracle.assert_close(x.grad, weight.sum(0).expand(5, -1), torch.float32)
    codes, applied = layer.base_layer.codes.clone(), model(x)
    model.c3a.save_pretrained(tmp_path)
    torch.testing.assert_close(c3a_triton.load_adapter(plain, tmp_path)(x), applied, rtol=0, atol=0)
    model.c3a.merge_adapter()
    assert (layer.base_layer.dequantize() - weight).norm() <= 0.01 * weight.norm()
    layer.cpu()
    model.c3a.unmerge_adapter()
    assert torch.equal(layer.base_layer.codes, codes)
    assert isinstance(model.c3a.merge_and_unload()[0], Int8Linear)


def test_an_unknown_class_is_adapted_by_name_and_never_merged_into() -> None:
    model = nn.Sequential(NamedInt8Linear(torch.randn(OUT, IN)))
    c3a_triton.apply(model, C3AConfig(block_size=8, target_modules=["0"]))
    before = model[0].base_layer.codes.clone()
    with pytest.raises(AdapterStateError, match="0: .*register_linear_like"):
        model.c3a.merge_adapter()
    with pytest.raises(AdapterStateError, match="register_linear_like"):
        model.c3a.merge_and_unload()
    assert torch.equal(model[0].base_layer.codes, before)
    register_linear_like(NamedInt8Linear)
    with pytest.raises(AdapterStateError, match="without the functions dequantize and requantize"):
        model.c3a.merge_adapter()


def test_the_nearest_base_class_counts() -> None:
    register(Int8Linear)
    assert quantized.registered(NamedInt8Linear(torch.randn(4, 4))).requantize is not None
    register_linear_like(NamedInt8Linear)
    assert quantized.registered(NamedInt8Linear(torch.randn(4, 4))).requantize is None
    assert quantized.registered(nn.Linear(4, 4)) is None


@pytest.mark.parametrize(
    ("layer_class", "functions", "message"),
    [
        ("Linear", {}, "a class of modules"),
        (Tensor, {}, "a class of modules"),
        (nn.Linear, {}, "Linear itself"),
        (nn.Module, {}, "Module itself"),
        (Int8Linear, {"dequantize": Int8Linear.dequantize}, "both dequantize and requantize"),
    ],
)
def test_what_cannot_be_registered(layer_class: Any, functions: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_linear_like(layer_class, **functions)
    assert Int8Linear not in quantized._registry


def test_a_weight_that_cannot_be_quantized_again_leaves_a_model_that_computes_the_same() -> None:
    def requantize(layer: Any, weight: Tensor) -> Int8Linear:
        if failing is layer:
            raise MemoryError("no room")
        return Int8Linear(weight)

    register_linear_like(
        Int8Linear,
        widths=lambda layer: (layer.n_in, layer.n_out),
        dequantize=Int8Linear.dequantize,
        requantize=requantize,
    )
    model = c3a_triton.apply(
        nn.Sequential(nn.Linear(IN, IN), Int8Linear(torch.randn(OUT, IN))),
        C3AConfig(block_size=8, target_modules="all-linear", init_weights="gaussian"),
    )
    x, original, failing = torch.randn(5, IN), model[0].weight.clone(), model[1].base_layer
    y = model(x)
    with pytest.raises(AdapterStateError, match="^1: .*no room"):
        model.c3a.merge_adapter()
    assert (model[0].merged, model[1].merged) == (True, False)
    torch.testing.assert_close(model(x), y)
    failing = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not that everything is merged already
        model.c3a.merge_adapter()
    assert model[1].merged
    model.c3a.unmerge_adapter()
    assert torch.equal(model[0].weight, original)
    assert torch.equal(model(x), y)


def test_dequantizing_to_something_else_is_refused() -> None:
    register_linear_like(
        NamedInt8Linear, dequantize=lambda layer: layer.dequantize().T, requantize=lambda layer, weight: layer
    )
    layer = C3ALinear(NamedInt8Linear(torch.randn(OUT, IN)), "default", B, layer_name="model.fc")
    with pytest.raises(AdapterStateError, match=r"model\.fc: .*shape \(64, 96\)"):
        layer.merge()


def test_a_reason_or_an_access() -> None:
    assert isinstance(quantized_weight(C3ALinear(nn.Linear(4, 4), "default", 2)), str)
    assert isinstance(quantized_weight(adapted("bitsandbytes 8-bit")), quantized.QuantizedWeight)


class PackedLinear(nn.Module):
    """Shaped like GPTQ's and AWQ's layers: packed integers under `qweight`, a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.register_buffer("qweight", torch.randint(-(2**31), 2**31 - 1, (IN // 8, OUT), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([(self.qweight >> 4 * i) & 15 for i in range(8)], dim=1).flatten(0, 1)
        return x @ (codes.to(x.dtype) - 8) / 32


def test_packed_layers_are_found_by_all_linear() -> None:
    model = nn.Sequential(PackedLinear(), nn.ReLU())
    c3a_triton.apply(model, C3AConfig(block_size=B, target_modules="all-linear"))
    layer, x = model[0], torch.randn(5, IN)
    oracle.assert_close(
        layer(x) - layer.base_layer(x), oracle.product(x, layer.c3a_kernel["default"]), torch.float32, bound=1e-4
    )
    with pytest.raises(AdapterStateError, match="PackedLinear"):
        model.c3a.merge_adapter()


# Models of transformers


def quantization_configs() -> dict[str, Any]:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    return {
        "bitsandbytes 4-bit": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        "bitsandbytes 8-bit": BitsAndBytesConfig(load_in_8bit=True),
        "torchao int8": TorchAoConfig(TORCHAO["int8"]()),
        "torchao int4": TorchAoConfig(TORCHAO["int4"]()),
    }


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_configs()[kind], dtype=torch.float32
    )


@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8", "torchao int4"])
def test_a_model_that_transformers_quantized(kind: str, model_folder: Path, tmp_path: Path) -> None:
    model = load(model_folder, kind)
    config = C3AConfig(block_size=16, target_modules="all-linear", init_weights="gaussian")
    c3a_triton.apply(model, config)
    assert len(list(model.c3a.layers())) == 14
    kernels = [p for p in model.parameters() if p.requires_grad]
    assert {(p.dtype, p.device.type) for p in kernels} == {(torch.float32, "cpu")}
    assert len(kernels) == 14
    model.eval()
    logits(model)  # evaluation before training: nothing may be repacked
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.norm() > 0 for p in kernels)
    with torch.no_grad():
        for p in kernels:
            p.sub_(p.grad / p.grad.norm())

    applied = logits(model)
    model.c3a.save_pretrained(tmp_path)
    again = c3a_triton.load_adapter(load(model_folder, kind), tmp_path).train()
    torch.testing.assert_close(logits(again), applied, rtol=0, atol=0)
    with model.c3a.disable_adapter():
        base = logits(model)
    assert (applied - base).norm() > 0.3 * base.norm()
    model.c3a.merge_adapter()
    assert (logits(model) - applied).norm() < 2.5 * loss(kind) * applied.norm()
    model.c3a.unmerge_adapter()
    torch.testing.assert_close(logits(model), applied, rtol=0, atol=0)
    model = model.c3a.merge_and_unload()
    assert not any(isinstance(module, C3ALinear) for module in model.modules())
    assert (logits(model) - applied).norm() < 2.5 * loss(kind) * applied.norm()


def test_a_copy_and_a_pickle_of_an_adapted_quantized_layer() -> None:
    layer = adapted("bitsandbytes 4-bit").train()
    x = torch.randn(5, IN)
    expected = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.load(file, weights_only=False)(x), expected, rtol=0, atol=0)


def test_the_example_in_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert run_example("qc3a", tmp_path, "--short", "--steps", "30", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    figures = re.search(r"text: (\S+) before, (\S+) after, (\S+) merged", printed)
    assert figures is not None
    before, after, merged = map(float, figures.groups())
    assert after < before - 0.01
    assert merged < before
    assert "reloaded onto the quantized base: largest difference 0.0e+00" in printed
    assert (tmp_path / "out" / "qc3a" / "adapter" / "adapter_model.safetensors").stat().st_size > 1000
