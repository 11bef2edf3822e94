"""What a layer's class computes, told by calling a copy of it, and what becomes of adapters accordingly."""

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import IDS
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig, C3ALinear, CheckpointError, ConfigError
from c3a_triton.bases import probe
from c3a_triton.bases.linear_like import computes_its_weight
from c3a_triton.bases.probe import behaviour


class Rewritten(nn.Linear):
    """The product in other words, which also keeps books."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.calls += 1
        x.mul_(1.0 + 0 * torch.rand(()).item())
        y = torch.einsum("...i,oi->...o", self.inner(x), self.weight)
        return y if self.bias is None else y.float().to(y.dtype) + self.bias


class Grouped(nn.Linear):
    groups = 4

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:-2]
        w = self.weight.view(self.groups, -1, x.shape[-1]).transpose(1, 2)
        return torch.bmm(x.reshape(-1, self.groups, x.shape[-1]).transpose(0, 1), w).transpose(0, 1).reshape(*shape, -1)


class Sliced(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :100]


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-30, 30)


class WithLora(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.a = nn.Parameter(torch.randn(2, self.in_features))
        self.b = nn.Parameter(torch.zeros(self.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


class Masked(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mask", (torch.arange(self.in_features) % 2).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class ForOneDtype(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            raise RuntimeError("bfloat16 only")
        return F.linear(x, self.weight, self.bias)


class OfTwo(nn.Linear):
    def forward(self, x: Tensor, task: int) -> Tensor:
        return task * super().forward(x)


class Raising(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of order")


def router() -> nn.Module:
    return Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=4))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: nn.Linear(8, 4), "product"),
        (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(8, 4), "product"),
        (lambda: FalconLinear(8, 4), "product"),
        (lambda: FalconLinear(8, 4, bias=False), "product"),
        (lambda: Rewritten(8, 4), "product"),
        (lambda: IdeficsDecoupledLinear(8, 16), "product"),
        (lambda: IdeficsDecoupledLinear(8, 16, 4), "unfit"),
        (lambda: Grouped(8, 16), "unfit"),
        (lambda: Sliced(8, 100), "product"),
        (lambda: Sliced(8, 104), "unfit"),
        (lambda: Sliced(4096, 4096), "unfit"),
        (lambda: Clamped(8, 16), "other"),
        (lambda: WithLora(8, 16), "other"),
        (lambda: Masked(8, 16), "other"),
        (lambda: OfTwo(8, 16), "other"),
        (lambda: Raising(8, 16), "unfit"),
        (router, "unfit"),
    ],
)
def test_what_a_linear_class_computes(build: Any, kind: str, device: str) -> None:
    with torch.device(device):
        module = build()
    assert behaviour(module).kind == kind
    assert computes_its_weight(module) == (kind == "product")


def test_nothing_as_large_as_the_layer_is_made() -> None:
    with torch.device("meta"):
        assert behaviour(FalconLinear(2**16, 2**16)).kind == "product"  # 16 GiB in float32


def test_a_layer_that_only_its_own_tensors_can_try() -> None:
    assert behaviour(ForOneDtype(8, 16)).kind == "unfit"
    assert behaviour(ForOneDtype(8, 16).bfloat16()).kind == "product"


def test_quantized_weights_are_their_own_affair() -> None:
    layer = Raising(8, 16)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert behaviour(layer).kind == "other"


def test_the_layer_takes_no_notice() -> None:
    layer = Rewritten(8, 4)
    layer.inner.register_forward_hook(lambda *args: pytest.fail("a hook was called"))
    layer.register_forward_pre_hook(lambda *args: pytest.fail("a hook was called"))
    weight, version, generator, state = (
        layer.weight.clone(),
        layer.weight._version,
        torch.get_rng_state(),
        random.getstate(),
    )
    assert behaviour(layer).kind == "product"
    assert (layer.calls, layer.seen, layer.weight.grad, layer.weight._version) == (0, [], None, version)
    assert layer.training
    assert torch.equal(layer.weight, weight)
    assert torch.equal(torch.get_rng_state(), generator)
    assert random.getstate() == state
    with torch.inference_mode():
        assert behaviour(layer).kind == "product"


def test_one_trial_serves_layers_that_differ_in_their_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    behaviour(FalconLinear(8, 6))
    monkeypatch.setattr(probe, "_try_linear", lambda *args: pytest.fail("tried again"))
    behaviour(FalconLinear(8, 6))
    with pytest.raises(pytest.fail.Exception):
        behaviour(FalconLinear(8, 6, bias=False))


def test_one_trial_serves_layers_with_further_parameters_and_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    class Normed(nn.Linear):
        def __init__(self, eps: float = 1e-5) -> None:
            super().__init__(8, 6)
            self.scale, self.norm = nn.Parameter(torch.ones(6)), nn.LayerNorm(8, eps)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.norm(x)) * self.scale

    assert behaviour(Normed()).kind == "other"
    monkeypatch.setattr(probe, "_try_linear", lambda *args: pytest.fail("tried again"))
    assert behaviour(Normed()).kind == "other"
    wider = Normed()
    wider.scale = nn.Parameter(torch.ones(1))
    buffered = Normed()
    buffered.register_buffer("mask", torch.ones(6))
    for another in (Normed(1e-3), wider, buffered):
        with pytest.raises(pytest.fail.Exception):
            behaviour(another)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.router, self.down = nn.Linear(8, 8), router(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        scores, _ = self.router(x)
        return self.down(x) * scores.sum(-1, keepdim=True)


def test_all_linear_leaves_routers_out_with_one_word_and_a_name_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(Routed(), Routed())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        c3a_triton.apply(model, C3AConfig(block_size=4, target_modules="all-linear"))
    (message,) = [str(warning.message) for warning in caught]
    assert "0.router, 1.router" in message
    assert "tuple" in message
    assert [name for name, _ in model.c3a.layers()] == ["0.up", "0.down", "1.up", "1.down"]
    model(torch.randn(2, 8))

    plain = Routed()
    before = dict(plain.named_modules())
    with pytest.raises(ConfigError, match=r"router: this Llama4Router cannot be adapted: .*tuple.*exclude_modules"):
        c3a_triton.apply(plain, C3AConfig(block_size=4, target_modules=["up", "router"]))
    with pytest.raises(ConfigError, match="cannot be adapted"):
        C3ALinear(plain.router, block_size=4)
    assert dict(plain.named_modules()) == before

    stand_in = Routed()
    stand_in.router = nn.Linear(8, 4)
    c3a_triton.apply(stand_in, C3AConfig(block_size=4, target_modules=["router"])).c3a.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"router: this Llama4Router cannot be adapted"):
        c3a_triton.load_adapter(plain, tmp_path)


def test_a_falcon_is_merged() -> None:
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = FalconForCausalLM(config).eval()
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules="all-linear", init_weights="gaussian"))
    assert {type(layer.base_layer) for _, layer in model.c3a.layers()} == {FalconLinear}
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        model.c3a.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        model.c3a.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=0)


def test_what_is_no_product_is_adapted_and_not_merged() -> None:
    layer = C3ALinear(Clamped(8, 8), block_size=4, init_weights="gaussian")
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.get_delta_weight("default").T)
    with pytest.raises(AdapterStateError, match="Clamped: .*a forward of its own"):
        layer.merge()
