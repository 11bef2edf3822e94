"""Adapters on FP8 checkpoints of transformers: the real classes, loaded by `from_pretrained`, on the CPU.

Only the Triton kernels that compute the products are not: their place is taken, where transformers keeps them, by the
same arithmetic in torch, activations quantized by token and block included.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from tiny_models import IDS, llama, logits, qwen3_moe
from torch import Tensor, nn

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig, C3ALinear

finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
if not hasattr(finegrained, "FP8LinearFunction"):
    pytest.skip("this transformers' FP8 layers pass no gradient on", allow_module_level=True)
from fp8_stand_in import MOST, checkpoint, exact, grouped, install, tiled, weight_of  # noqa: E402

B = 16
# What quantizing a normal weight costs, relative to its norm: measured 0.0260 and 0.0268, with little room.
LOSS, LOSS_POWERS_OF_TWO = 0.027, 0.028
# What quantizing activations costs besides.
LOSS_OF_X = 0.04


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def fp8_linear(
    block: tuple[int, int] | None = (128, 128),
    scheme: str = "dynamic",
    powers_of_two: bool = False,
    widths: tuple[int, int] = (256, 384),
    bias: bool = True,
) -> Any:
    torch.manual_seed(0)
    form = "ue8m0" if powers_of_two else "float"
    layer = finegrained.FP8Linear(*widths, block, scheme, form, has_bias=bias)
    codes, scales = tiled(torch.randn(widths[1], widths[0]) * torch.linspace(0.5, 2.0, widths[0]), block, powers_of_two)
    layer.weight.data, layer.weight_scale_inv.data = codes, scales
    if scheme == "static":
        layer.activation_scale.data = torch.tensor(4 / MOST)
    if bias:
        layer.bias.data = torch.randn(widths[1])
    return layer.requires_grad_(False)


LAYERS = {
    "blocks": {},
    "blocks that do not divide": {"widths": (208, 336)},
    "no bias": {"bias": False},
    "blocks of rows": {"block": (1, 32)},
    "powers of two": {"powers_of_two": True},
    "one scale": {"block": None},
    "static activations": {"scheme": "static"},
    "one scale, static": {"block": None, "scheme": "static"},
}


def adapted(base: Any) -> C3ALinear:
    layer = C3ALinear(base, "default", B, "gaussian", layer_name="model.fc")
    with torch.no_grad():
        layer.c3a_kernel["default"].normal_().mul_(base.in_features / 2)
    return layer


def bits(layer: Any) -> dict[str, Tensor]:
    return {name: value.clone().reshape(-1).view(torch.uint8) for name, value in layer.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_gradients(kind: str) -> None:
    base = fp8_linear(**LAYERS[kind])
    layer = adapted(base)
    w, weight = layer.c3a_kernel["default"], weight_of(base)
    x = torch.randn(3, 5, base.in_features, requires_grad=True)
    dy = torch.randn(3, 5, base.out_features)
    y = layer(x)
    y.backward(dy)
    oracle.assert_close(y - base(x), oracle.product(x, w), torch.float32, bound=1e-4)
    bias = 0.0 if base.bias is None else base.bias.double()
    oracle.assert_close(y, x.detach().double() @ (weight + oracle.dense(w)).T + bias, torch.float32, bound=LOSS_OF_X)
    # The gradient passes through the dequantized weight, as transformers defines it.
    oracle.assert_close(x.grad, dy.double() @ (weight + oracle.dense(w)), torch.float32)
    oracle.assert_close(w.grad, oracle.weight_grad(dy, x, B), torch.float32)
    oracle.assert_close(layer(x, adapter_names=["default"] * 3), y.detach().double(), torch.float32)
    oracle.assert_close(layer(x.detach().bfloat16()), y.detach().double(), torch.bfloat16, bound=LOSS_OF_X)


@pytest.mark.parametrize("kind", LAYERS)
def test_merging_costs_what_the_docs_say_and_unmerging_nothing(kind: str) -> None:
    base = fp8_linear(**LAYERS[kind])
    layer = adapted(base)
    x = torch.randn(5, base.in_features)
    before, weight, delta = bits(base), weight_of(base), oracle.dense(layer.c3a_kernel["default"])
    assert delta.norm() > 0.3 * weight.norm()
    applied = layer(x)
    layer.merge(safe_merge=True)
    merged: Any = layer.base_layer
    assert type(merged) is finegrained.FP8Linear
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    after = {name: (value.dtype, value.shape) for name, value in merged.state_dict().items()}
    assert after == {name: (value.dtype, value.shape) for name, value in base.state_dict().items()}
    # The codes are the nearest ones, with scales that fit each tile.
    codes, scales = tiled((weight + delta).float(), base.block_size, merged.weight_scale_inv.element_size() == 1)
    oracle.assert_close(weight_of(merged).float(), weight_of(merged, codes, scales), torch.float32, bound=1e-3)
    error = (weight_of(merged) - weight - delta).norm() / (weight + delta).norm()
    assert 0.02 < error < (LOSS_POWERS_OF_TWO if kind == "powers of two" else LOSS)
    assert (layer(x) - applied).norm() < 0.05 * applied.norm()
    layer.unmerge()
    assert same(bits(layer.base_layer), before)
    torch.testing.assert_close(layer(x), applied, rtol=0, atol=0)
    layer.merge()
    torch.testing.assert_close(weight_of(layer.base_layer), weight_of(merged), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "lost"), [(0.001, 1.02), (0.003, 1.0), (0.01, 0.91), (0.03, 0.67), (0.1, 0.26), (0.3, 0.09), (1.0, 0.04)]
)
def test_what_is_lost_of_an_update(size: float, lost: float, recwarn: pytest.WarningsRecorder) -> None:
    """The docs' figures: a small update is mostly rounded away, which is said."""
    base = fp8_linear(widths=(512, 512))
    base.weight.data, base.weight_scale_inv.data = tiled(torch.randn(512, 512), (128, 128))
    layer, weight = adapted(base), weight_of(base)
    kernel = layer.c3a_kernel["default"]
    with torch.no_grad():
        kernel.mul_(size * weight.norm() / oracle.dense(kernel).norm())
    delta = oracle.dense(kernel)
    layer.merge()
    error = weight_of(layer.base_layer) - weight - delta
    assert float(error.norm() / delta.norm()) == pytest.approx(lost, abs=0.02)
    assert any("lost in their rounding" in str(warning.message) for warning in recwarn) == (lost > 0.5)


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_a_tile_to_which_nothing_is_added_stays_as_it_is(powers_of_two: bool) -> None:
    base = fp8_linear(powers_of_two=powers_of_two)
    base.weight.data[:128, :128] = 0.0
    layer = adapted(base)
    with torch.no_grad():
        layer.c3a_kernel["default"].zero_()
    before = weight_of(base)
    layer.merge()
    oracle.assert_close(weight_of(layer.base_layer).float(), before, torch.float32, bound=1e-6)
    assert torch.isfinite(layer.base_layer.weight_scale_inv.float()).all()
    assert not layer.base_layer.weight[:128, :128].float().any()


def test_codes_fit_the_scales_as_they_are_stored() -> None:
    """In 16 bits scales are rounded; the codes are the nearest ones of those, and the largest of a tile has one."""
    base = fp8_linear()
    base.weight_scale_inv.data = base.weight_scale_inv.data.bfloat16()
    layer, before = adapted(base), bits(base)
    wanted = weight_of(base) + oracle.dense(layer.c3a_kernel["default"])
    layer.merge()
    found = weight_of(layer.base_layer)
    is_normal = layer.base_layer.weight.double().abs() > 2**-6
    lost = ((found - wanted).abs() / wanted.abs())[is_normal].max()
    assert 0.058 < lost < 0.0589  # halfway between 1 and 1 + 1/8: 1/17
    layer.unmerge()
    assert same(bits(layer.base_layer), before)


def test_what_is_not_finite_is_refused_by_a_safe_merge() -> None:
    layer = adapted(fp8_linear())
    with torch.no_grad():
        layer.c3a_kernel["default"][0, 0, 0] = torch.inf
    before = bits(layer.base_layer)
    with pytest.raises(AdapterStateError, match=r"model\.fc: merging .* not finite"):
        layer.merge(safe_merge=True)
    assert same(bits(layer.base_layer), before)


def test_codes_that_a_cast_has_made_numbers_are_not_unmerged() -> None:
    """What torch makes of float8 in `to(dtype)` is no weight, with an adapter or without one."""
    layer = adapted(fp8_linear())
    layer.merge()
    layer.to(torch.bfloat16)
    with pytest.raises(AdapterStateError, match=r"model\.fc: the base weight was changed after \['default'\]"):
        layer.unmerge()


def test_what_cannot_be_merged_into_says_why() -> None:
    packed, other, nowhere, subclass = (fp8_linear() for _ in range(4))
    packed.weight.data = torch.zeros(384, 128, dtype=torch.int8)
    other.weight_scale_inv.data = torch.ones(384, 1)
    nowhere.to("meta")
    subclass.weight = nn.Parameter(subclass.weight.as_subclass(type("Shard", (Tensor,), {})), requires_grad=False)
    reasons = {"codes are torch.int8": packed, r"\[384, 1\], not one for each of \[3, 2\]": other}
    reasons |= {"meta device": nowhere, "Shard, of which this process may have a part": subclass}
    for reason, base in reasons.items():
        with pytest.raises(AdapterStateError, match=rf"model\.fc: nothing can be merged into this FP8Linear.*{reason}"):
            adapted(base).merge()


def test_a_grouped_layer_is_refused_by_name() -> None:
    model = nn.Sequential(finegrained.FP8GroupedLinear(64, 128, 2, (32, 32)), nn.Linear(16, 16))
    with pytest.raises(
        c3a_triton.ConfigError, match="^0.*this FP8GroupedLinear cannot be adapted: its inputs are groups"
    ):
        c3a_triton.apply(model, C3AConfig(block_size=8, target_modules=["0"]))
    with pytest.warns(UserWarning, match="^0: left out of target_modules='all-linear'"):
        c3a_triton.apply(model, C3AConfig(block_size=8, target_modules="all-linear"))
    assert [name for name, _ in model.c3a.layers()] == ["1"]


# A model from its checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(llama(hidden_size=128, intermediate_size=320), tmp_path_factory.mktemp("model"))


def load(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options)


def dequantized(path: Path) -> Any:
    from transformers import FineGrainedFP8Config

    model = load(path, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32)
    return model.float()  # what is no FP8 layer has the checkpoint's dtype


def test_a_model_from_the_checkpoint_to_the_merged_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    assert {type(module).__name__ for name, module in model.named_modules() if name.endswith("proj")} == {"FP8Linear"}
    with pytest.warns(UserWarning, match="is quantized"):
        c3a_triton.apply(model, C3AConfig(block_size=B, target_modules="all-linear", init_weights="gaussian"))
    kernels = [p for p in model.parameters() if p.requires_grad]
    assert {(p.dtype, p.dim()) for p in kernels} == {(torch.float32, 3)}
    assert len(kernels) == 14
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.norm() > 0 for p in kernels)
    with torch.no_grad():
        for p in kernels:
            p.sub_(p.grad / p.grad.norm())
    applied = logits(model)
    model.c3a.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="is quantized"):
        again = c3a_triton.load_adapter(load(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), applied, rtol=0, atol=0)

    model.c3a.merge_adapter()
    error = (logits(model) - applied).norm() / applied.norm()
    assert 0.005 < error < 0.15
    model.c3a.unmerge_adapter()
    torch.testing.assert_close(logits(model), applied, rtol=0, atol=0)
    with warnings.catch_warnings(record=True) as told:
        merged = model.c3a.merge_and_unload()
    assert not any("save_original_format" in str(warning.message) for warning in told)
    assert not any(isinstance(module, C3ALinear) for module in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(merged), rtol=0, atol=0)


def test_a_model_that_peft_has_built(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.C3AConfig(block_size=B, target_modules=["q_proj", "down_proj"], init_weights="gaussian")
    model = c3a_triton.apply(peft.get_peft_model(load(folder), config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c3a_kernel" in name:
                parameter.mul_(30)
    applied = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert 0 < (logits(merged) - applied).norm() < 0.15 * applied.norm()
    assert type(merged.model.layers[0].mlp.down_proj) is finegrained.FP8Linear


def test_saving_a_dequantized_model_writes_codes_without_a_word(tmp_path: Path) -> None:
    """Why the docs name `save_original_format=False`: what transformers writes otherwise loads as another model."""
    path = checkpoint(llama(hidden_size=128, intermediate_size=384), tmp_path / "model")
    model = c3a_triton.apply(dequantized(path), C3AConfig(block_size=B, target_modules=["q_proj"]))
    if not hasattr(model, "_weight_conversions"):  # transformers 5.24 writes what the weights are
        model = model.c3a.merge_and_unload()
        model.save_pretrained(tmp_path / "plain")
        torch.testing.assert_close(logits(load(tmp_path / "plain", dtype=torch.float32)), logits(model), rtol=0, atol=0)
        return
    with pytest.warns(UserWarning, match=r"save_pretrained\(..., save_original_format=False\)"):
        model = model.c3a.merge_and_unload()
    model.save_pretrained(tmp_path / "codes")
    assert "quantization_config" not in json.loads((tmp_path / "codes" / "config.json").read_text())
    assert (logits(load(tmp_path / "codes", dtype=torch.float32)) - logits(model)).norm() > 0.5 * logits(model).norm()
    model.save_pretrained(tmp_path / "plain", save_original_format=False)
    torch.testing.assert_close(logits(load(tmp_path / "plain", dtype=torch.float32)), logits(model), rtol=0, atol=0)


# Experts


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = qwen3_moe(hidden_size=128, moe_intermediate_size=128, head_dim=32, num_hidden_layers=2)
    return checkpoint(model, tmp_path_factory.mktemp("moe"), modules_to_not_convert=["mlp.gate", "lm_head"])


def with_experts(model: Any, like: Any = None) -> Any:
    """The model with an adapter on all its experts, of some other model's values."""
    config = C3AConfig(block_size=B, target_modules=["q_proj"], target_parameters="all-experts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c3a_triton.apply(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, layer in model.c3a.layers():
            own = layer.c3a_kernel["default"]
            own.copy_(
                torch.randn(own.shape) * 30 if like is None else dict(like.c3a.layers())[name].c3a_kernel["default"]
            )
    return model


@pytest.fixture
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without quantized activations a model is, up to rounding, the dequantized one."""
    install(monkeypatch, exact, grouped)


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_compute_what_the_dequantized_ones_do(implementation: str, moe: Path) -> None:
    model = with_experts(load(moe, dtype=torch.float32, experts_implementation=implementation))
    plain = with_experts(dequantized(moe), model)
    assert {type(part.base_layer).__name__ for name, part in model.c3a.layers() if "experts" in name} == {"FP8Experts"}
    found = []
    for one in (model, plain):
        x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = one(inputs_embeds=x).logits
        kernels = [layer.c3a_kernel["default"] for _, layer in one.c3a.layers()]
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *kernels])])
    for ours, true in zip(*found, strict=True):
        oracle.assert_close(ours, true.double(), torch.float32, bound=1e-4)
    with model.c3a.disable_adapter(), plain.c3a.disable_adapter():
        base = logits(model)
        oracle.assert_close(base, logits(plain).double(), torch.float32, bound=1e-4)
    assert (logits(model) - base).norm() > 0.1 * base.norm()


def stack_of(model: Any, name: str) -> Tensor:
    """W of one projection of experts in float64."""
    experts = model.get_submodule(name.rpartition(".")[0]).base_layer
    codes, scales = (getattr(experts, name.rpartition(".")[2] + ending) for ending in ("", "_scale_inv"))
    return torch.stack([weight_of(experts, *pair) for pair in zip(codes, scales, strict=True)])


@pytest.mark.usefixtures("exact_kernels")
def test_experts_are_merged_into_and_saved(moe: Path, tmp_path: Path) -> None:
    model = with_experts(load(moe, dtype=torch.float32, experts_implementation="grouped_mm"))
    experts = model.model.layers[1].mlp.experts
    before = bits(experts.base_layer)
    wanted = {name: layer.get_delta_weight("default") for name, layer in model.c3a.layers() if "experts" in name}
    truth = {name: stack_of(model, name) + delta for name, delta in wanted.items()}
    applied = logits(model)
    model.c3a.merge_adapter(safe_merge=True)
    error = (logits(model) - applied).norm() / applied.norm()
    assert 0.001 < error < 0.1
    for name, weight in truth.items():
        assert 0.02 < (stack_of(model, name) - weight).norm() / weight.norm() < LOSS
    model.c3a.unmerge_adapter()
    assert same(bits(experts.base_layer), before)
    torch.testing.assert_close(logits(model), applied, rtol=0, atol=0)
    merged = model.c3a.merge_and_unload()
    assert type(merged.model.layers[1].mlp.experts).__name__ == "FP8Experts"
    merged.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32, experts_implementation="grouped_mm")
    torch.testing.assert_close(logits(again), logits(merged), rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["batched_mm", "deepgemm"])
def test_experts_that_would_cut_the_gradient_are_refused(implementation: str, moe: Path) -> None:
    model = load(moe, dtype=torch.float32, experts_implementation="grouped_mm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c3a_triton.apply(model, C3AConfig(block_size=B, target_modules=["q_proj"]))
    model.set_experts_implementation(implementation)
    with pytest.raises(AdapterStateError, match=rf"no backward pass with experts_implementation='{implementation}'"):
        model(input_ids=IDS)
    experts = model.model.layers[0].mlp.experts
    (check,) = experts._forward_pre_hooks.values()
    check(experts, (torch.randn(2, 128),))  # where no gradient is wanted none is cut
    assert not model.c3a.unload().model.layers[0].mlp.experts._forward_pre_hooks


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_with_fixed_scales_of_activations(implementation: str, moe: Path) -> None:
    """They compute one expert after another, each with its scales, whichever implementation adapted ones name."""
    model = load(moe, dtype=torch.float32, experts_implementation="eager")
    for layer in model.model.layers:
        layer.mlp.experts.activation_scheme = "static"
        for name, most in (("gate_up_proj", 2.0), ("down_proj", 0.5)):
            scales = nn.Parameter(torch.linspace(1, 2, 4) * most / MOST)
            setattr(layer.mlp.experts, f"{name}_activation_scale", scales)
    base = logits(model)
    with_experts(model).set_experts_implementation(implementation)
    applied = logits(model)
    with torch.no_grad():
        for _, layer in model.c3a.layers():
            layer.c3a_kernel["default"].zero_()
    oracle.assert_close(logits(model), base.double(), torch.float32, bound=1e-4)
    assert (applied - base).norm() > 0.1 * base.norm()


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_rows_of_no_expert_count_nothing(implementation: str, moe: Path) -> None:
    """As where a plan spreads the experts: what their kernels leave in such rows is nobody's."""
    model = with_experts(load(moe, dtype=torch.float32, experts_implementation=implementation))
    plain = with_experts(dequantized(moe), model)
    index, shares = torch.tensor([[0, 4], [4, 4], [3, 1], [2, 4]]), torch.rand(4, 2)
    found = []
    for one in (model, plain):
        experts = one.model.layers[0].mlp.experts
        experts.base_layer._is_expert_parallel = True
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = experts(x, index, shares)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, experts.gate_up_proj.c3a_kernel["default"]])])
    assert not found[0][0][1].any()
    for ours, true in zip(*found, strict=True):
        oracle.assert_close(ours, true.double(), torch.float32, bound=1e-4)


def test_what_is_asked_of_an_adapted_layer_is_not_in_codes(moe: Path) -> None:
    model = with_experts(load(moe))
    for name, layer in model.c3a.layers():
        delta, w = layer.get_delta_weight("default"), layer.c3a_kernel["default"]
        expected = torch.stack([oracle.dense(one) for one in w]) if "experts" in name else oracle.dense(w)
        oracle.assert_close(delta, expected, torch.float32)
    assert "4×256" in c3a_triton.explain(model, tokens=[64], device="cuda")
