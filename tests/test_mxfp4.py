"""gpt-oss in MXFP4: the real modules, loaded by `from_pretrained`, on the CPU.

Only the Triton kernels of the hub are not: their place is taken, where transformers keeps them, by what they compute.
"""

import copy
import functools
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from tiny_models import IDS, gpt_oss, logits
from torch import Tensor

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig, ConfigError

integration = pytest.importorskip("transformers.integrations.mxfp4")
if not hasattr(integration, "Mxfp4ReverseDeserialize"):
    pytest.skip("this transformers has MXFP4 in another form", allow_module_level=True)
if not hasattr(integration, "routing_from_top_k"):  # 5.17; such experts are refused, with the remedy
    pytest.skip("this transformers computes experts in MXFP4 with what its router makes", allow_module_level=True)
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

B = 8
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


# What the hub's kernels are, in torch


class Strided:
    """The layout that changes nothing, which a CPU and most GPUs have."""

    def __init__(self, shape: Any) -> None:
        pass

    def unswizzle_data(self, data: Tensor) -> Tensor:
        return data


def wrap(data: Tensor, dtype: Any = None) -> Any:
    storage = SimpleNamespace(data=data, layout=Strided(data.shape))
    return SimpleNamespace(storage=storage, dtype=dtype, device=data.device)


def values_of(weight: Any, scales: Any) -> Tensor:
    """[n_experts, in, out] in float64, of two values in each byte along `in` and a scale for 32 of them."""
    codes, exponents = weight.storage.data.mT, scales.storage.data.mT
    halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
    return (VALUES.double()[halves] * 2.0 ** (exponents.double() - 127).repeat_interleave(32, -1)).mT


def routing(router_logits: Tensor, k: int) -> tuple[Any, Any, Any]:
    top, index = router_logits.topk(k)
    return integration.routing_from_top_k(index, top.softmax(-1), router_logits.shape[1])


def matmul_ogs(
    x: Tensor,
    w: Any,
    bias: Tensor,
    routing_data: Any,
    gather_indx: Any = None,
    scatter_indx: Any = None,
    precision_config: Any = None,
    gammas: Tensor | None = None,
    fused_activation: Any = None,
) -> Tensor:
    weight, counts = values_of(w, precision_config.weight_scale), routing_data.expt_hist.long()
    expert = torch.arange(len(counts)).repeat_interleave(counts)
    k = routing_data.n_expts_act
    rows = x if gather_indx is None else x[gather_indx.src_indx.long() // k]
    y = torch.bmm(rows.double()[:, None], weight[expert])[:, 0] + bias.double()[expert]
    if fused_activation is not None:
        alpha, limit = fused_activation.fn_args
        gate, up = y[:, ::2].clamp(max=limit), y[:, 1::2].clamp(-limit, limit)
        y = gate * torch.sigmoid(alpha * gate) * (up + 1)
    if scatter_indx is not None:
        y = (y * gammas[:, None])[scatter_indx.src_indx.long()].unflatten(0, (-1, k)).sum(1)
    # Whatever x wants, what a kernel writes has no gradient.
    return y.to(x.dtype).detach()


HUB = SimpleNamespace(
    tensor=SimpleNamespace(FP4="fp4", wrap_torch_tensor=wrap, convert_layout=lambda tensor, layout, **options: tensor),
    tensor_details=SimpleNamespace(
        layout=SimpleNamespace(StridedLayout=Strided, make_default_matmul_mxfp4_w_layout=lambda mx_axis: (Strided, {}))
    ),
    matmul_ogs=SimpleNamespace(
        PrecisionConfig=SimpleNamespace,
        FlexCtx=SimpleNamespace,
        InFlexData=SimpleNamespace,
        FnSpecs=lambda *args: args,
        FusedActivation=lambda specs, args, reduction: SimpleNamespace(fn_args=args),
        matmul_ogs=matmul_ogs,
    ),
    swiglu=SimpleNamespace(swiglu_fn=None),
    routing=SimpleNamespace(
        routing=routing,
        GatherIndx=SimpleNamespace,
        ScatterIndx=SimpleNamespace,
        RoutingData=lambda scales, hist, n_experts, k, data: SimpleNamespace(
            gate_scal=scales, expt_hist=hist, n_expts_act=k
        ),
        compute_expt_data_torch=lambda *args: None,
    ),
)


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import hub_kernels
    from transformers.quantizers import quantizer_mxfp4

    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *args, **kwargs: HUB)
    monkeypatch.setattr(integration, "triton_kernels_hub", HUB, raising=False)
    monkeypatch.setattr(quantizer_mxfp4.Mxfp4HfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    histc = torch.histc  # for integers a CPU has none
    monkeypatch.setattr(torch, "histc", lambda values, **options: histc(values.float(), **options).int())
    # Where there is none, it dequantizes.
    monkeypatch.setattr(quantizer_mxfp4, "get_current_accelerator", lambda: torch.device("cuda"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as gpt-oss' is: blocks of 16 bytes, a scale for each."""
    path = tmp_path_factory.mktemp("model")
    gpt_oss(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, layer_types=["full_attention"] * 2
    ).save_pretrained(path)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(path / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            n_experts, n_in, n_out = value.shape
            tensors[f"{name}_blocks"] = torch.randint(256, (n_experts, n_out, n_in // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(122, 127, (n_experts, n_out, n_in // 32), dtype=torch.uint8)
        else:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def load(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def dequantized(path: Path) -> Any:
    from transformers import Mxfp4Config

    return load(path, quantization_config=Mxfp4Config(dequantize=True))


def adapted(model: Any, like: Any = None, **options: Any) -> Any:
    """The model with an adapter of random values, or of those of another model."""
    config = C3AConfig(block_size=B, target_modules=["q_proj", "o_proj"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c3a_triton.apply(model, config)
    torch.manual_seed(1)
    others = {} if like is None else dict(like.c3a.layers())
    with torch.no_grad():
        for name, layer in model.c3a.layers():
            own = layer.c3a_kernel["default"]
            own.copy_(others[name].c3a_kernel["default"] if others else torch.randn(own.shape) * 10)
    return model


def output_and_gradients(model: Any) -> list[Tensor]:
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = model(inputs_embeds=x).logits
    kernels = [layer.c3a_kernel["default"] for _, layer in model.c3a.layers()]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *kernels])]


def test_gradients_pass_experts_that_have_no_backward(folder: Path) -> None:
    model = load(folder)
    assert type(model.model.layers[0].mlp.experts).__name__ == "Mxfp4GptOssExperts"
    plain = dequantized(folder)
    oracle.assert_close(logits(model), logits(plain).double(), torch.float32)
    ids = model.get_input_embeddings()(IDS).detach().requires_grad_()
    cut = torch.autograd.grad(model(inputs_embeds=ids).logits.square().sum(), ids)[0]
    true = torch.autograd.grad(plain(inputs_embeds=ids).logits.square().sum(), ids)[0]
    assert (cut - true).norm() > 0.1 * true.norm()  # by itself it computes a wrong one, and says nothing
    adapted(model)
    adapted(plain, model)
    for ours, truth in zip(output_and_gradients(model), output_and_gradients(plain), strict=True):
        oracle.assert_close(ours, truth.double(), torch.float32, bound=1e-4)
    mlps = [layer.mlp for layer in model.model.layers]
    assert all("forward" in mlp.__dict__ for mlp in mlps)
    unloaded = model.c3a.unload()
    assert not any("forward" in layer.mlp.__dict__ for layer in unloaded.model.layers)


@pytest.mark.parametrize("targets", [None, "all-experts"], ids=str)
def test_hooks_of_accelerate_stand_before_what_passes_gradients(targets: Any, folder: Path) -> None:
    """As `device_map="auto"` puts them onto every module where it takes several devices."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = load(folder)
    hooks.attach_execution_device_hook(model, "cpu")
    adapted(model, target_parameters=targets)
    plain = adapted(dequantized(folder), model, target_parameters=targets)
    for ours, truth in zip(output_and_gradients(model), output_and_gradients(plain), strict=True):
        oracle.assert_close(ours, truth.double(), torch.float32, bound=1e-4)
    mlp = model.c3a.unload().model.layers[0].mlp
    assert mlp._old_forward.__func__ is type(mlp).forward
    hooks.remove_hook_from_module(model, recurse=True)  # which leaves the class's forward on the instance
    adapted(model, plain, target_parameters=targets)
    for ours, truth in zip(output_and_gradients(model), output_and_gradients(plain), strict=True):
        oracle.assert_close(ours, truth.double(), torch.float32, bound=1e-4)


def test_a_forward_that_somebody_else_has_put_there_refuses_gradients(folder: Path) -> None:
    model = load(folder)
    mlp = model.model.layers[1].mlp
    mlp.forward = functools.partial(type(mlp).forward, mlp)  # as a kernel of the hub might be
    base = logits(model)
    adapted(model)
    with pytest.raises(AdapterStateError, match=r"Mxfp4GptOssMLP has no backward pass here.*dequantize=True"):
        model(input_ids=IDS)
    assert (logits(model) - base).norm() > 0.1 * base.norm()
    model.c3a.unload()
    assert not mlp._forward_pre_hooks
    torch.testing.assert_close(logits(model), base, rtol=0, atol=0)
    adapted(model, target_parameters=["layers.1.mlp.experts.down_proj"])
    with pytest.raises(AdapterStateError, match=r"Mxfp4GptOssMLP computes past its adapted experts.*dequantize=True"):
        logits(model)


@pytest.mark.parametrize("targets", ["all-experts", ["gate_up_proj"], ["down_proj"]], ids=str)
def test_adapted_experts_compute_what_the_dequantized_ones_do(targets: Any, folder: Path) -> None:
    model = adapted(load(folder), target_parameters=targets)
    plain = adapted(dequantized(folder), model, target_parameters=targets)
    assert [name for name, _ in model.c3a.layers()] == [name for name, _ in plain.c3a.layers()]
    found, true = output_and_gradients(model), output_and_gradients(plain)
    for ours, truth in zip(found, true, strict=True):
        oracle.assert_close(ours, truth.double(), torch.float32, bound=1e-4)
    applied = logits(model)
    oracle.assert_close(applied, logits(plain).double(), torch.float32, bound=1e-4)
    with model.c3a.disable_adapter(), plain.c3a.disable_adapter():
        base = logits(model)
        oracle.assert_close(base, logits(plain).double(), torch.float32, bound=1e-4)
    assert (applied - base).norm() > 0.1 * base.norm()
    torch.testing.assert_close(logits(copy.deepcopy(model)), applied, rtol=0, atol=0)


def test_with_no_adapter_in_force_the_fused_kernels_compute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(load(folder), target_parameters="all-experts")
    calls: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs.get("fused_activation"))
        return matmul_ogs(*args, **kwargs)

    monkeypatch.setattr(HUB.matmul_ogs, "matmul_ogs", counted)
    logits(model)
    assert not calls
    with model.c3a.disable_adapter():
        logits(model)
    assert [call is not None for call in calls] == [True, False] * 2


def test_files_are_those_of_the_dequantized_model(folder: Path, tmp_path: Path) -> None:
    model = adapted(load(folder), target_parameters="all-experts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.c3a.save_pretrained(tmp_path)
        plain = c3a_triton.load_adapter(dequantized(folder), tmp_path)
        again = c3a_triton.load_adapter(load(folder), tmp_path)
    oracle.assert_close(logits(plain), logits(model).double(), torch.float32, bound=1e-4)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert "mlp.experts.gate_up_proj" in model.c3a.summary()
    assert "4×128" in c3a_triton.explain(model, tokens=[64], device="cuda")
    (layer,) = (layer for name, layer in model.c3a.layers() if name.endswith("layers.1.mlp.experts.down_proj"))
    delta = layer.get_delta_weight("default")
    assert (delta.dtype, delta.shape) == (torch.float32, (4, 64, 32))


def test_merging_is_refused_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    model = adapted(load(folder), target_parameters="all-experts")
    with pytest.raises(AdapterStateError, match=r"gate_up_proj: nothing .*Mxfp4GptOssExperts.*dequantize=True"):
        model.c3a.merge_adapter()
    assert not any(layer.merged for _, layer in model.c3a.layers())
    plain = adapted(dequantized(folder), model, target_parameters="all-experts")
    applied = logits(plain)
    with pytest.warns(UserWarning, match=r"save_pretrained\(..., save_original_format=False\)"):
        merged = plain.c3a.merge_and_unload()
    merged.save_pretrained(tmp_path, save_original_format=False)
    again = load(tmp_path)
    assert type(again.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
    oracle.assert_close(logits(again), applied.double(), torch.float32, bound=1e-4)
    attention = adapted(load(folder))
    applied = logits(attention)
    merged = attention.c3a.merge_and_unload()  # which experts have no part in
    oracle.assert_close(logits(merged), applied.double(), torch.float32, bound=1e-4)


def test_what_cannot_be_adapted_is_refused_by_name(folder: Path) -> None:
    def refused(model: Any, target: str, reason: str) -> None:
        with pytest.raises(ConfigError, match=rf"layers\.0\.mlp\.experts\.{target}: .*{reason}"):
            adapted(model, target_parameters=[target])

    refused(load(folder), "gate_up_proj_bias", "only gate_up_proj and down_proj can be adapted")
    spread = load(folder)
    spread.model.layers[0].mlp.experts._is_hooked = True
    refused(spread, "down_proj", r"spreads over processes.*Mxfp4Config\(dequantize=True\)")
    model = adapted(load(folder))
    model.model.layers[1].mlp.experts._is_hooked = True
    with pytest.raises(AdapterStateError, match=r"Mxfp4GptOssExperts has no backward pass here.*dequantize=True"):
        model(input_ids=IDS)
    unloaded = load(folder)
    unloaded.model.layers[0].mlp.experts.gate_up_proj_precision_config = None
    refused(unloaded, "gate_up_proj", "not loaded")
    with pytest.warns(UserWarning, match=r"stacked expert weights are not adapted: 4 of them .* hold 49,152 of"):
        c3a_triton.apply(load(folder), C3AConfig(block_size=B, target_modules=["q_proj"]))


def test_experts_of_transformers_4_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their forward takes what a router of the kernels makes, which passes no gradient on."""
    model = load(folder)
    monkeypatch.delattr(integration.Mxfp4GptOssExperts, "forward_routed")
    with pytest.raises(ConfigError, match=r"experts\.down_proj: this release of transformers.*dequantize=True"):
        adapted(model, target_parameters=["down_proj"])
    adapted(model)
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(AdapterStateError, match="has no backward pass here"):
        experts(torch.randn(3, 32, requires_grad=True), None, None, None)
    model.c3a.unload()
    assert not experts._forward_pre_hooks
