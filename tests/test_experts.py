"""Experts with stacked weights and adapters: against the dense definition in float64, and under every verb."""

import copy
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import assert_close
from safetensors.torch import load_file
from tiny_models import IDS, deepseek_v3, gpt_oss, llama4, logits, mixtral, qwen3_moe
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import c3a_triton
from c3a_triton import AdapterStateError, BackendError, C3AConfig, ConfigError, ShapeError
from c3a_triton.adapters.experts import C3AExperts, C3AStacked
from c3a_triton.operator import bounds, cost_model
from c3a_triton.operator.cost_model import Sizes

pytest.importorskip("transformers.integrations.moe", reason="transformers 4: experts are layers")

MODELS = {"qwen3": qwen3_moe, "mixtral": mixtral, "gpt-oss": gpt_oss, "deepseek": deepseek_v3, "llama4": llama4}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CASES = [(model, how) for model in MODELS for how in IMPLEMENTATIONS if model != "llama4"] + [("llama4", None)]


def adapted(model: Any, block_size: int = 4, name: str = "default", **options: Any) -> Any:
    """The model with an adapter on all its experts and on nothing else, of which every kernel has values of its own."""
    config = C3AConfig(
        block_size=block_size, target_modules=[], target_parameters="all-experts", init_weights="gaussian", **options
    )
    if hasattr(model, "c3a"):
        model.c3a.add_adapter(name, config)
        return model
    return c3a_triton.apply(model, config, adapter_name=name)


def dense(w: Tensor) -> Tensor:
    """ΔW [E, m·b, n·b] of w [E, m, n, b], differentiable."""
    n_experts, m, n, b = w.shape
    j, p = torch.arange(b)[:, None], torch.arange(b)
    blocks = w[..., (p - j) % b]  # [E, m, n, j, p]
    return blocks.permute(0, 1, 3, 2, 4).reshape(n_experts, m * b, n * b) / (n * b)


def kernels_of(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    return {name: layer.c3a_kernel[adapter] for name, layer in model.c3a.layers()}


class Truth:
    """A model in float64 whose experts have the dense W + ΔW."""

    def __init__(self, plain: Any, model: Any, adapters: tuple[str, ...] = ("default",)) -> None:
        self.plain = copy.deepcopy(plain).double().requires_grad_(False)
        self.plain.config._experts_implementation = "eager"
        self.kernels = {
            (adapter, name): kernel.detach().double().requires_grad_()
            for adapter in adapters
            for name, kernel in kernels_of(model, adapter).items()
        }
        self.transposed = {name: layer.transposed for name, layer in model.c3a.layers()}

    def logits(self, **inputs: Any) -> Tensor:
        values = dict(self.plain.named_parameters())
        for (_, name), kernel in self.kernels.items():
            delta = dense(kernel)
            values[name] = values[name] + (delta.mT if self.transposed[name] else delta)
        return functional_call(self.plain, values, (), inputs).logits


def router_of(model: nn.Module) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight")))


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_logits_and_gradients_are_those_of_the_dense_definition(name: str, implementation: str | None) -> None:
    plain = MODELS[name](implementation)
    model = adapted(copy.deepcopy(plain))
    truth = Truth(plain, model)
    x = torch.randn(2, 7, 24)
    dy = torch.randn(2, 7, 32)
    found = []
    for one, call, kernels in (
        (model, model, kernels_of(model)),
        (truth.plain, truth.logits, {name: w for (_, name), w in truth.kernels.items()}),
    ):
        dtype = router_of(one).dtype
        router_of(one).requires_grad_()
        embeds = x.to(dtype).requires_grad_()
        out: Any = call(inputs_embeds=embeds)
        y = out if isinstance(out, Tensor) else out.logits
        wanted = [embeds, router_of(one), *kernels.values()]
        found.append([y, *torch.autograd.grad((y * dy.to(dtype)).sum(), wanted)])
    assert not torch.allclose(found[1][0].float(), logits_of(plain, x), atol=0.01)  # the adapter is not small
    for ours, true in zip(*found, strict=True):
        assert_close(ours, true, torch.float32)


def logits_of(model: nn.Module, embeds: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs_embeds=embeds).logits


@pytest.mark.parametrize("name", MODELS)
def test_names_in_the_model_and_in_its_state_dict(name: str) -> None:
    plain = MODELS[name]()
    stacked = [key for key in plain.state_dict() if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    model = adapted(plain)
    assert [name for name, _ in model.c3a.layers()] == stacked
    assert sorted(model.c3a.state_dict()) == sorted(f"{key}.c3a_kernel" for key in stacked)
    inner = [key.replace(".experts.", ".experts.base_layer.") for key in stacked]
    assert {*inner, *(f"{key}.c3a_kernel.default" for key in stacked)} <= model.state_dict().keys()
    assert not {*stacked} & model.state_dict().keys()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{key}.c3a_kernel.default" for key in stacked}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_with_no_adapter_in_force_the_models_own_implementation_computes(implementation: str) -> None:
    model = qwen3_moe(implementation)
    before = logits(model)
    adapted(model)
    assert not torch.equal(logits(model), before)
    with model.c3a.disable_adapter():
        assert torch.equal(logits(model), before)
    model.set_experts_implementation("eager")
    with model.c3a.disable_adapter():
        now = logits(model)
    plain = model.c3a.unload()
    assert torch.equal(logits(plain), now)
    assert not any(isinstance(module, (C3AExperts, C3AStacked)) for module in plain.modules())
    assert plain.model.layers[0].mlp.experts.config is plain.config


def test_the_name_of_our_implementation_is_not_for_models_to_choose() -> None:
    model, plain = adapted(qwen3_moe("eager")), qwen3_moe()
    with model.c3a.disable_adapter():
        expected = logits(model)
        model.set_experts_implementation("c3a_triton")
        with pytest.raises(ConfigError, match="'c3a_triton' is what adapted experts name by themselves"):
            logits(model)
        model.set_experts_implementation("eager")
        assert torch.equal(logits(model), expected)
    plain.set_experts_implementation("c3a_triton")
    with pytest.raises(ConfigError, match="no way in which Qwen3MoeExperts computes"):
        logits(plain)


def test_several_adapters_of_different_block_sizes_add_up_and_are_switched() -> None:
    plain = qwen3_moe()
    model = adapted(adapted(copy.deepcopy(plain)), block_size=8, name="other")
    alone = logits(model)
    assert_close(alone, Truth(plain, model).logits(input_ids=IDS), torch.float32)
    model.c3a.set_adapter(["default", "other"])
    both = Truth(plain, model, ("default", "other")).logits(input_ids=IDS)
    assert_close(logits(model), both, torch.float32)
    model.c3a.set_adapter("other")
    other = logits(model)
    model.c3a.rename_adapter("other", "new")
    assert torch.equal(logits(model), other)
    model.c3a.delete_adapter("new")
    assert torch.equal(logits(model), alone)


def test_one_projection_alone() -> None:
    for wanted in ("gate_up_proj", "down_proj"):
        plain = gpt_oss()
        config = C3AConfig(block_size=8, target_modules=[], target_parameters=[wanted], init_weights="gaussian")
        model = c3a_triton.apply(copy.deepcopy(plain), config)
        assert [name.rpartition(".")[2] for name, _ in model.c3a.layers()] == [wanted]
        assert_close(logits(model), Truth(plain, model).logits(input_ids=IDS), torch.float32)
        # The second projection may follow, with an adapter of its own.
        adapted(model, name="all")
        model.c3a.set_adapter("all")
        assert_close(logits(model), Truth(plain, model, ("all",)).logits(input_ids=IDS), torch.float32)


def test_beside_linear_layers_and_a_second_adapter_that_names_layers_like_parts() -> None:
    model = deepseek_v3()
    config = C3AConfig(block_size=4, target_modules="all-linear", target_parameters="all-experts")
    c3a_triton.apply(model, config)
    names = [name for name, _ in model.c3a.layers()]
    assert any("experts.down_proj" in name for name in names)
    assert any("shared_experts.down_proj" in name for name in names)
    model.c3a.add_adapter("layers", C3AConfig(block_size=4, target_modules=["down_proj"]))
    model.c3a.set_adapter("layers")
    assert [name for name, layer in model.c3a.layers() if "layers" in layer.c3a_kernel] == [
        "model.layers.0.mlp.shared_experts.down_proj"
    ]


def test_weighted_combination() -> None:
    plain = qwen3_moe()
    model = adapted(adapted(copy.deepcopy(plain)), name="other")
    model.c3a.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum")
    for name, kernel in kernels_of(model, "sum").items():
        parts = [kernels_of(model, adapter)[name] for adapter in ("default", "other")]
        torch.testing.assert_close(kernel, 0.5 * parts[0] + 2.0 * parts[1])
    model.c3a.set_adapter("sum")
    assert_close(logits(model), Truth(plain, model, ("sum",)).logits(input_ids=IDS), torch.float32)


def test_what_is_set_on_the_adapted_module_is_set_on_the_experts() -> None:
    plain = qwen3_moe()
    model = adapted(copy.deepcopy(plain))
    experts = model.model.layers[0].mlp.experts
    weight = nn.Parameter(torch.randn_like(experts.gate_up_proj.weight))
    for module in (experts, plain.model.layers[0].mlp.experts):
        module.act_fn = nn.Tanh()
        module.gate_up_proj = nn.Parameter(weight.detach().clone())
    assert_close(logits(model), Truth(plain, model).logits(input_ids=IDS), torch.float32)
    expected, config = logits(model), copy.deepcopy(model.config)
    config._experts_implementation = "eager"
    experts.config = config
    assert torch.equal(logits(model), expected)
    experts.config = experts.config
    assert torch.equal(logits(model), expected)
    with model.c3a.disable_adapter():
        torch.testing.assert_close(logits(model), logits(plain))
    assert model.c3a.unload().model.layers[0].mlp.experts.config is config


# Merging


@pytest.mark.parametrize("name", MODELS)
def test_merging_and_unmerging_bit_for_bit(name: str) -> None:
    model = adapted(MODELS[name]())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted_logits = logits(model)
    model.c3a.merge_adapter(safe_merge=True)
    assert not all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_close(logits(model), adapted_logits.double(), torch.float32)
    model.c3a.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), adapted_logits)


def test_merge_and_unload_gives_a_plain_model() -> None:
    plain = gpt_oss()
    keys, kind = list(plain.state_dict()), type(plain.model.layers[0].mlp.experts)
    model = adapted(copy.deepcopy(plain))
    truth = Truth(plain, model).logits(input_ids=IDS)
    merged = model.c3a.merge_and_unload()
    assert list(merged.state_dict()) == keys
    assert type(merged.model.layers[0].mlp.experts) is kind
    for implementation in IMPLEMENTATIONS:
        merged.set_experts_implementation(implementation)
        assert_close(logits(merged), truth, torch.float32)


def test_a_merged_model_can_be_cast_and_unmerged() -> None:
    model = adapted(qwen3_moe())
    expected = copy.deepcopy(model).to(torch.float64)
    model.c3a.merge_adapter()
    model.to(torch.float64)
    model.c3a.unmerge_adapter()
    own = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(own[name], parameter), name


def test_delta_weight_has_the_shape_of_the_parameter() -> None:
    for build in (qwen3_moe, gpt_oss):
        model = adapted(build())
        for _, layer in model.c3a.layers():
            delta = layer.get_delta_weight("default")
            assert delta.shape == layer.weight.shape
            true = dense(layer.c3a_kernel["default"].detach().double())
            assert_close(delta, true.mT if layer.transposed else true, torch.float32)


def test_the_models_own_save_pretrained_keeps_the_names_and_is_no_plain_model(tmp_path: Path) -> None:
    model = adapted(qwen3_moe())
    with pytest.warns(UserWarning, match="with C3A adapters in place"):
        model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor), name
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("save", ["adapter", "model"])
def test_peft_refuses_an_adapter_of_which_it_would_leave_out_the_experts(tmp_path: Path, save: str) -> None:
    peft = pytest.importorskip("peft")
    qwen3_moe().save_pretrained(tmp_path / "base")
    plain = type(qwen3_moe()).from_pretrained(tmp_path / "base")
    config = C3AConfig(
        block_size=4, target_modules=["q_proj"], target_parameters="all-experts", init_weights="gaussian"
    )
    model = c3a_triton.apply(copy.deepcopy(plain), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (model.c3a.save_pretrained if save == "adapter" else model.save_pretrained)(tmp_path / "saved")
        load = partial(peft.PeftModel.from_pretrained, copy.deepcopy(plain))
        load = load if save == "adapter" else type(plain).from_pretrained
        with pytest.raises((TypeError, ValueError), match=r"(?s)Target module Qwen3MoeExperts.* is not supported"):
            load(tmp_path / "saved")
        again = c3a_triton.load_adapter(copy.deepcopy(plain), tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert again.c3a.adapters["default"].target_modules == ["q_proj"]


def test_peft_s_own_adapters_of_the_same_module_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = adapted(qwen3_moe())
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    with pytest.raises(AdapterStateError, match=r"gate_up_proj, .*down_proj: adapted parameters.*\(ParamWrapper\)"):
        peft.get_peft_model(model, config)


def test_other_verbs_of_transformers_see_a_plain_model() -> None:
    model = adapted(qwen3_moe(tie_word_embeddings=True), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.resize_token_embeddings(32)
    expected, generated = logits(model), model.generate(IDS[:, :3], max_new_tokens=4, do_sample=False)
    merged = model.c3a.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    assert_close(logits(merged), expected.double(), torch.float32)
    assert torch.equal(merged.generate(IDS[:, :3], max_new_tokens=4, do_sample=False), generated)


# Calls of other kinds


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = adapted(qwen3_moe(num_hidden_layers=2)).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=IDS).logits.square().sum().backward()
        return [w.grad for w in kernels_of(model).values()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for ours, true in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, true)


def test_a_recomputed_layer_has_the_adapter_of_its_forward() -> None:
    model = adapted(adapted(qwen3_moe()), name="other").train()
    model.c3a.set_adapter(["default", "other"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with model.c3a.using(["other"] * 3):
        y = model(input_ids=IDS).logits.square().sum()
    y.backward()
    assert all(w.grad is None for w in kernels_of(model).values())
    ours = [w.grad.clone() for w in kernels_of(model, "other").values()]
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model.c3a.set_adapter("other")
    model(input_ids=IDS).logits.square().sum().backward()
    for grad, true in zip(ours, (w.grad for w in kernels_of(model, "other").values()), strict=True):
        torch.testing.assert_close(grad, true)


def test_rows_with_adapters_of_their_own() -> None:
    model = adapted(adapted(qwen3_moe()), name="other")
    names = ["default", "other", "__base__"]
    together = model(input_ids=IDS, adapter_names=names).logits
    for row, name in enumerate(names):
        with model.c3a.using([name]):
            torch.testing.assert_close(together[row : row + 1], model(input_ids=IDS[row : row + 1]).logits)
    layer = next(layer for _, layer in model.c3a.layers())
    with model.c3a.using(names), pytest.raises(ShapeError, match="gate_up_proj: 3 adapter names .* sorted by expert"):
        model.model.layers[0].mlp.experts(torch.randn(6, 24), torch.zeros(6, 2, dtype=torch.long), torch.rand(6, 2))
    assert layer.active_adapters == ["default"]


def test_threads_have_their_own_adapters() -> None:
    model = adapted(adapted(qwen3_moe()), name="other")
    expected = {}
    for name in ("default", "other"):
        with model.c3a.using([name] * 3):
            expected[name] = logits(model)
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(5):
            with model.c3a.using([name] * 3):
                if not torch.equal(logits(model), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not torch.equal(*expected.values())


def test_autocast() -> None:
    model = adapted(qwen3_moe().to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(input_ids=IDS).logits
        y.float().square().sum().backward()
    assert all(torch.isfinite(w.grad).all() and w.grad.any() for w in kernels_of(model).values())
    with torch.no_grad():
        torch.testing.assert_close(y, model(input_ids=IDS).logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("build", [gpt_oss, llama4])
def test_compiled_in_one_graph(build: Callable[[], Any]) -> None:
    model = adapted(build())
    block = next(module for module in model.modules() if hasattr(module, "experts"))
    x = torch.randn(2, 5, 24)
    expected, found = block(x)[0], torch.compile(block, backend="aot_eager", fullgraph=True)(x)[0]
    torch.testing.assert_close(found, expected)
    wanted = list(kernels_of(model).values())
    for ours, true in zip(
        torch.autograd.grad(found.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, true)


@torch.no_grad()
def test_another_adapter_compiles_nothing_again(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = adapted(adapted(qwen3_moe()), name="two")
    counter = CompileCounter()
    block = model.model.layers[0].mlp
    compiled, x = torch.compile(block, backend=counter, fullgraph=True), torch.randn(2, 5, 24)
    model.c3a.save_pretrained(tmp_path, "two")
    found = []
    for adapter in ("default", "two"):
        model.c3a.set_adapter(adapter, inference_mode=True)
        found.append(compiled(x)[0])
        torch.testing.assert_close(found[-1], block(x)[0])
    model.c3a.hotswap_adapter(tmp_path, "default")
    model.c3a.set_adapter("default", inference_mode=True)
    assert torch.equal(compiled(x)[0], found[1])
    assert not torch.allclose(*found)
    assert counter.frame_count == 1


def test_copies_and_pickles_have_experts_of_their_own() -> None:
    model = adapted(qwen3_moe())
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        experts = other.model.layers[0].mlp.experts
        assert experts.base_layer.config.c3a_layer is experts
        assert experts.base_layer.config._config is other.config
        assert all(part.base_layer is experts.base_layer for part in experts.parts().values())
        with torch.no_grad():
            for kernel in kernels_of(other).values():
                kernel.zero_()
        assert not torch.equal(logits(other), expected)
        assert torch.equal(logits(model), expected)
        other.c3a.unload()
        assert torch.equal(logits(model), expected)


def test_a_replica_computes_with_its_own_tensors() -> None:
    model = adapted(qwen3_moe())
    experts = model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(6, 24), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    expected = experts(x, index, weights)

    def replicated(module: nn.Module) -> Any:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicated(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 2)
        return replica

    found = replicated(experts)(x, index, weights)
    up, down = (part.c3a_kernel["default"].detach() for part in experts.parts().values())
    with torch.no_grad():
        for part in experts.parts().values():
            part.weight.mul_(2)
        up.mul_(2)
        down.mul_(2)
    torch.testing.assert_close(found, experts(x, index, weights))
    assert not torch.allclose(found, expected)


# What experts can get


def experts_of(build: Callable[..., Any] = qwen3_moe) -> tuple[Any, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Adapted experts, and the dense definition of what they compute."""
    plain = build()
    model = adapted(plain)
    wrapper = model.model.layers[0].mlp.experts
    true = copy.deepcopy(wrapper.base_layer).double()
    true.config = copy.deepcopy(model.config)
    true.config._experts_implementation = "eager"
    with torch.no_grad():
        for name, part in wrapper.parts().items():
            delta = dense(part.c3a_kernel["default"].detach().double())
            getattr(true, name).add_(delta.mT if part.transposed else delta)
    return wrapper, true


@pytest.mark.parametrize("build", [qwen3_moe, gpt_oss])
@pytest.mark.parametrize(
    ("n_tokens", "top_k", "ids"), [(0, 2, (0, 4)), (1, 1, (0, 4)), (9, 1, (2, 3)), (9, 2, (1, 3)), (33, 3, (0, 4))]
)
def test_any_number_of_tokens_and_experts_without_any(
    build: Callable[..., Any], n_tokens: int, top_k: int, ids: tuple[int, int]
) -> None:
    wrapper, true = experts_of(build)
    x, weights = torch.randn(n_tokens, 24, requires_grad=True), torch.rand(n_tokens, top_k)
    index = torch.randint(*ids, (n_tokens, top_k))
    y = wrapper(x, index, weights)
    assert_close(y, true(x.double(), index, weights.double()), torch.float32)
    y.square().sum().backward()
    for part in wrapper.parts().values():
        grad = part.c3a_kernel["default"].grad
        reached = {int(i) for i in index.flatten()}
        assert [bool(one.any()) for one in grad] == [expert in reached for expert in range(4)]


class _Allocated(TorchDispatchMode):
    """The bytes of the largest tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("build", [qwen3_moe, gpt_oss, llama4])
def test_nothing_of_the_size_of_all_experts_is_made_or_kept(build: Callable[..., Any]) -> None:
    plain = build()
    experts = next(module for module in plain.modules() if type(module).__name__.endswith("Experts"))
    wide = copy.copy(experts)
    sizes = {name: (16, *(8 * width for width in p.shape[1:])) for name, p in experts.named_parameters()}
    wide._parameters = {name: nn.Parameter(torch.randn(size) / 8) for name, size in sizes.items()}
    wide.num_experts = 16
    wide.hidden_size = 8 * 24
    holder = nn.Module()
    holder.experts = wide.requires_grad_(False)
    model = adapted(holder, block_size=16)
    n_tokens = 16 if build is llama4 else 4
    x = torch.randn(n_tokens, 8 * 24, requires_grad=True)
    routing = () if build is llama4 else (torch.randint(0, 16, (n_tokens, 2)), torch.rand(n_tokens, 2))
    kept: list[Tensor] = []
    with (
        _Allocated() as memory,
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        model.experts(x, *routing).square().sum().backward()
    dense_bytes = 4 * wide.down_proj.numel()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert all(w.grad is not None for w in kernels_of(model).values())
    assert 0 < memory.largest < dense_bytes / 2
    # The weights themselves are kept by reference.
    assert max(
        tensor.untyped_storage().nbytes() for tensor in kept if tensor.untyped_storage().data_ptr() not in own
    ) < (dense_bytes / 8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_without_an_expert_and_without_choices(implementation: str) -> None:
    model = adapted(qwen3_moe(implementation))
    experts = model.model.layers[0].mlp.experts
    x, shares, index = torch.randn(6, 24), torch.rand(6, 2), torch.randint(0, 4, (6, 2))
    index[2, 1], index[4] = 4, 4
    for tensor in (x, shares):
        tensor.requires_grad_()
    ours = experts(x, index, shares)
    merged = copy.deepcopy(model).c3a.merge_and_unload()
    merged.set_experts_implementation("eager")
    true = merged.model.layers[0].mlp.experts(x, index.clamp(max=3), shares.masked_fill(index == 4, 0.0))
    torch.testing.assert_close(ours, true)
    assert not ours[4].any()
    gradients = [torch.autograd.grad(y.sum(), [x, shares]) for y in (ours, true)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ShapeError, match=r"index is torch.int64 of shape \(6, 0\)"):
        experts(x, index[:, :0], shares[:, :0])


def test_experts_of_other_processes() -> None:
    wrapper, true = experts_of()
    base = wrapper.base_layer
    base._is_expert_parallel = True
    x, weights = torch.randn(9, 24, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    index = torch.randint(0, 5, (9, 2))
    index[0] = 4  # none of this token's experts is here
    elsewhere = index == 4
    y = wrapper(x, index, weights)
    shares = weights.detach().double().masked_fill(elsewhere, 0.0)
    assert_close(y, true(x.detach().double(), index.clamp(max=3), shares), torch.float32)
    y.square().sum().backward()
    assert not x.grad[0].any()
    assert x.grad[1:].any(dim=1).all() or elsewhere[1:].all(dim=1).any()
    assert torch.equal(weights.grad == 0, elsewhere)


def test_a_forward_that_was_put_around_the_experts_before_stays_there() -> None:
    """As expert parallelism does, which sends tokens to other processes in its own."""
    model = qwen3_moe()
    experts = model.model.layers[0].mlp.experts
    inner, calls = experts.forward, []
    experts.forward = lambda *args: (calls.append(args), inner(*args))[1]
    expected = adapted(qwen3_moe())
    adapted(model)
    with torch.no_grad():
        for name, kernel in kernels_of(model).items():
            kernel.copy_(kernels_of(expected)[name])
    assert torch.equal(logits(model), logits(expected))
    assert len(calls) == 1
    model.c3a.unload()
    assert torch.equal(logits(model), logits(qwen3_moe()))


def test_zero3_gathers_the_kernels_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of DeepSpeed, here of a stand-in: kernels are emptied as ZeRO-3 leaves them."""
    model = adapted(qwen3_moe())
    expected, holder, registered = logits(model), model.model.layers[0].mlp.experts, []
    zero = SimpleNamespace(register_external_parameter=lambda module, parameter: registered.append(module))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    for kernel in kernels_of(model).values():
        values = kernel.data
        kernel.ds_id, kernel.all_gather = 0, lambda kernel=kernel, values=values: setattr(kernel, "data", values)
        kernel.data = torch.empty(0)
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected)
    assert registered == [holder, holder]


def test_hooks_of_accelerate_stay_around_the_experts() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    for build in (qwen3_moe, llama4):
        model = build()
        for module in [module for module in model.modules() if type(module).__name__.endswith("Experts")]:
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
        adapted(model)
        hooked = logits(model)
        with model.c3a.disable_adapter():
            base = logits(model)
        assert not torch.equal(hooked, base)
        hooks.remove_hook_from_submodules(model)
        assert torch.equal(logits(model), hooked)
        model.c3a.unload()
        assert torch.equal(logits(model), base)


def test_offloaded_experts_are_computed_and_merged() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = adapted(qwen3_moe())
    model = accelerate.cpu_offload(qwen3_moe(), execution_device="cpu")
    adapted(model)
    values = kernels_of(expected)
    with torch.no_grad():
        for name, kernel in kernels_of(model).items():
            kernel.copy_(values[name])
    assert torch.equal(logits(model), logits(expected))
    base = logits(qwen3_moe())
    model.c3a.merge_adapter()
    torch.testing.assert_close(logits(model), logits(expected))
    model.c3a.unmerge_adapter()
    with model.c3a.disable_adapter():
        torch.testing.assert_close(logits(model), base)


def test_sharded_by_fsdp2(tmp_path: Path) -> None:
    model = adapted(qwen3_moe()).train()
    expected = copy.deepcopy(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model.model.layers[0], mesh=mesh)
        found, true = model(input_ids=IDS).logits, expected(input_ids=IDS).logits
        torch.testing.assert_close(found, true)
        found.square().sum().backward()
        true.square().sum().backward()
        for name, kernel in kernels_of(expected).items():
            torch.testing.assert_close(kernels_of(model)[name].grad.full_tensor(), kernel.grad)
        with pytest.raises(AdapterStateError, match="gate_up_proj: nothing can be merged .* DTensor"):
            model.c3a.merge_adapter()
        late = qwen3_moe()
        fully_shard(late.model.layers[0], mesh=mesh)
        with pytest.raises(ConfigError, match="gate_up_proj is sharded already"):
            adapted(late)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_quantized_experts_are_computed_by_their_own_class(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    names = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    quantized = qwen3_moe(implementation).to(torch.bfloat16)
    torchao.quantize_(
        quantized, torchao.FqnToConfig({name: torchao.Int8WeightOnlyConfig() for name in names}), filter_fn=None
    )
    model = adapted(quantized)
    if implementation == "grouped_mm":  # nor does the model compute alone
        with pytest.raises(BackendError, match=r"gate_up_proj: .* Int8Tensor, .*choose another one, such as \"eager\""):
            model(input_ids=IDS)
        full = torch.OutOfMemoryError("no memory left")  # which another format would not mend
        monkeypatch.setattr("transformers.integrations.moe._grouped_linear", mock.Mock(side_effect=full))
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            model(input_ids=IDS)
        return
    plain = qwen3_moe().to(torch.bfloat16)
    other = adapted(copy.deepcopy(plain))
    with torch.no_grad():
        for name, kernel in kernels_of(other).items():
            kernel.copy_(kernels_of(model)[name])
    assert_close(logits(model), logits(other).double(), torch.bfloat16, bound=0.03)
    model(input_ids=IDS).logits.float().square().sum().backward()
    assert all(w.grad.any() for w in kernels_of(model).values())
    with pytest.raises(AdapterStateError, match=r"gate_up_proj: nothing can be merged .* Int8Tensor"):
        model.c3a.merge_adapter()


# What is told


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_said_of_experts_that_compute(name: str) -> None:
    model = adapted(MODELS[name]()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.c3a.disable_adapter():
            model(input_ids=IDS)  # the first call, without the adapters
        model(input_ids=IDS).logits.square().sum().backward()
        model(input_ids=IDS)
    assert not model.c3a._watch.uncalled


def test_experts_that_a_model_passes_by_are_told_of() -> None:
    model = adapted(qwen3_moe())
    # As kernels of the hub do, which are other implementations of the forward.
    model.model.layers[0].mlp.experts.base_layer.forward = lambda hidden, index, weights: hidden
    with pytest.warns(UserWarning, match="never called by a forward of .*experts"):
        model(input_ids=IDS)


def test_summary_explain_and_counts() -> None:
    model = adapted(qwen3_moe())
    text = model.c3a.summary()
    assert "model.layers.0.mlp.experts.gate_up_proj" in text
    assert "4 × 32" in text
    trainable, _ = model.c3a.get_nb_trainable_parameters()
    assert trainable == sum(w.numel() for w in kernels_of(model).values()) == 4 * (32 * 24 + 24 * 16) // 4
    groups = c3a_triton.param_groups(model, lr=1e-3)
    assert sum(p.numel() for group in groups for p in group["params"]) == trainable
    lines = c3a_triton.explain(model, tokens=[1, 4096], device="cuda").splitlines()
    assert [line.split()[:5] for line in lines[2:6]] == [
        ["1", width, f"4×{out}", "4", tokens] for width, out in (("24", 32), ("16", 24)) for tokens in ("1", "4096")
    ]
    sizes = Sizes(2 * 4096 // 4, 24, 32, 4, torch.float32)
    fft = bounds.seconds(cost_model.routed_launches("fft", sizes, 4, 2 * 4096), bounds.CEILINGS)
    assert f"{fft * 1e6:.1f}" in lines[3].split()
    assert lines[3].split()[5] in cost_model.ROUTED
    assert "Stacked experts" in lines[-2]


def test_backends_that_write_dense_weights_are_refused_by_name() -> None:
    model = adapted(qwen3_moe())
    for name in ("expand", "fold"):
        model.c3a.set_backend(name)
        with pytest.raises(BackendError, match=rf"experts\.gate_up_proj: .*{name}"):
            model(input_ids=IDS)
    with pytest.raises(BackendError, match=r"gate_up_proj is a experts layer|gate_up_proj"):
        model.c3a.save_spectra(["experts.gate_up_proj"])
    model.c3a.save_spectra()
