"""gpt-oss in MXFP4: the real modules, loaded by `from_pretrained`, on the CPU.

Only the Triton kernels of the hub are not: their place is taken, where transformers keeps them, by what they compute.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from tiny_models import IDS, gpt_oss, logits
from torch import Tensor

import c3a_triton
from c3a_triton import C3AConfig, ConfigError

integration = pytest.importorskip("transformers.integrations.mxfp4")
if not hasattr(integration, "Mxfp4ReverseDeserialize"):
    pytest.skip("this transformers has MXFP4 in another form", allow_module_level=True)
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
    return SimpleNamespace(storage=SimpleNamespace(data=data, layout=Strided(data.shape)), dtype=dtype)


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
    config = C3AConfig(block_size=B, target_modules=["q_proj", "o_proj"], **options)
    import warnings

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
    assert ConfigError
