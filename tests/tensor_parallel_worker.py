"""What one of several processes does: its part of tensor-parallel layers and models, compared with doing all of it.

Run by torchrun from `test_tensor_parallel.py`; the first process writes one JSON object with all cases.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from oracle import dense, weight_grad
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, apply_tensor_parallelism
from transformers.utils import logging

import c3a_triton
from c3a_triton import C3AConfig, C3ALinear
from c3a_triton.bases.parallel import leave

ROWS, TOKENS, ROPE = 4, 8, 2
NAMES = ["first", "second", "__base__", "first"]


def worst(differences: Iterable[Tensor]) -> float:
    """The largest of absolute differences, over all processes."""
    largest = torch.tensor(max((float(d.abs().max()) for d in differences if d.numel()), default=0.0))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def everywhere(holds: bool) -> bool:
    """Whether something holds in all processes."""
    count = torch.tensor(int(holds))
    dist.all_reduce(count, dist.ReduceOp.MIN)
    return bool(count)


def counted(function: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What a function returns, and how many collectives of each kind it took."""
    with CommDebugMode() as mode:
        result = function()
    found: dict[str, int] = {}
    for op, count in mode.get_comm_counts().items():
        kind = str(op).rpartition(".")[2].rstrip("_").replace("_", "")
        found[kind] = found.get(kind, 0) + count
    return result, found


# One layer


def chunk(tensor: Tensor, dim: int) -> Tensor:
    """This process's part, empty where there are fewer than processes, written out as plainly as possible."""
    size, n, rank = tensor.shape[dim], dist.get_world_size(), dist.get_rank()
    length = -(-size // n)
    indices = [i for i in range(size) if length * rank <= i < length * (rank + 1)]
    return tensor.index_select(dim, torch.tensor(indices, dtype=torch.int64))


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda tensor: tensor,
    "features": lambda tensor: chunk(tensor, -1),
    "tokens": lambda tensor: chunk(tensor, 1),
    "packed": lambda tensor: torch.cat([chunk(half, -1) for half in tensor.chunk(2, -1)], -1),
}


def by_torch(style: Any) -> Callable[[nn.Module, Any], None]:
    return lambda base, mesh: parallelize_module(base, mesh, style())


def by_transformers(name: str, *, local: bool = False) -> Callable[[nn.Module, Any], None]:
    """By a style of transformers; `local`: as quantized layers are called, whose kernels know no DTensors."""

    def spread(base: Any, mesh: Any) -> None:
        base._hf_quantized_needs_local_tp = local
        style: Any = ALL_PARALLEL_STYLES[name]
        for parameter in list(base._parameters):
            style.shard_param(base, parameter, mesh)
        base.config = type("Config", (), {"qk_rope_head_dim": ROPE})()
        style.install_forward(base, mesh)

    return spread


@dataclass(frozen=True)
class Way:
    """How a layer is spread, and in which parts its x and y are outside of it."""

    spread: Callable[[nn.Module, Any], None]
    x: str = "whole"
    y: str = "whole"
    n_sums: int = 1
    weight: Callable[[Tensor], Tensor] = field(default=lambda weight: weight)


def rows_of(weight: Tensor) -> Tensor:
    return chunk(weight, 0)


def columns_of(weight: Tensor) -> Tensor:
    return chunk(weight, 1)


def packed_rows_of(weight: Tensor) -> Tensor:
    return torch.cat([chunk(half, 0) for half in weight.chunk(2, 0)])


WAYS = {
    "torch, colwise": Way(by_torch(ColwiseParallel), y="features", weight=rows_of),
    "torch, colwise, tokens to all": Way(
        by_torch(lambda: ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())),
        x="tokens",
        weight=rows_of,
    ),
    "torch, rowwise": Way(by_torch(RowwiseParallel), x="features", weight=columns_of),
    "torch, rowwise, all to tokens": Way(
        by_torch(lambda: RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))),
        y="tokens",
        weight=columns_of,
    ),
    "colwise": Way(by_transformers("colwise"), y="features", weight=rows_of),
    "colwise_gather_output": Way(by_transformers("colwise_gather_output"), weight=rows_of),
    "rowwise": Way(by_transformers("rowwise"), x="features", weight=columns_of),
    "rowwise_split_input": Way(by_transformers("rowwise_split_input"), weight=columns_of),
    "packed_colwise": Way(by_transformers("packed_colwise"), y="packed", weight=packed_rows_of),
    "sequence_parallel": Way(by_transformers("sequence_parallel"), x="tokens", y="tokens"),
    "colwise, local": Way(by_transformers("colwise", local=True), y="features", weight=rows_of),
    "rowwise, local": Way(by_transformers("rowwise", local=True), x="features", weight=columns_of),
    "replicate": Way(by_transformers("replicate"), n_sums=0),
    "mla_kv_a_proj": Way(by_transformers("mla_kv_a_proj"), n_sums=0),
    "replicated_with_grad_allreduce": Way(by_transformers("replicated_with_grad_allreduce"), x="tokens", y="tokens"),
}
# Number of processes → in_features, out_features. Of the last one some of four processes have nothing.
SIZES = {2: ((24, 24), (12, 18), (18, 12)), 4: ((12, 18), (20, 20), (6, 6))}


def linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(in_features, out_features, bias).double().requires_grad_(False)


def close(layer: Any) -> bool:
    """Take the base layer out of an adapted one; whether nothing of the adapters is left in it."""
    leave(layer.base_layer)
    return not left_in(layer.base_layer)


def one_layer(way: str, sizes: tuple[int, int], bs: tuple[int, int], *, adapted_first: bool) -> dict[str, Any]:
    """A layer with two adapters against their definition, and against the same layer without adapters."""
    in_features, out_features = sizes
    how, mesh = WAYS[way], dist.init_device_mesh("cpu", (dist.get_world_size(),))
    x_part, y_part = PARTS[how.x], PARTS[how.y]
    has_bias = way != "packed_colwise"  # of which transformers gives processes other parts than of the weight
    frozen, base, whole = (linear(*sizes, has_bias) for _ in range(3))
    how.spread(frozen, mesh)
    if not adapted_first:
        how.spread(base, mesh)
    layer: Any = C3ALinear(base, "first", bs[0], "gaussian")
    layer.update_layer("second", bs[1], "gaussian")
    layer.set_adapter(["first", "second"])
    generator = torch.Generator().manual_seed(3)
    for name in ("first", "second"):
        kernel = layer.c3a_kernel[name]
        kernel.data = torch.randn(kernel.shape, generator=generator, dtype=torch.float64)
    if adapted_first:
        how.spread(base, mesh)
    x, dy = (torch.randn(ROWS, TOKENS, width, generator=generator, dtype=torch.float64) for width in sizes)
    deltas = {name: dense(layer.c3a_kernel[name]) for name in ("first", "second")} | {
        "__base__": torch.zeros(1, dtype=torch.float64)
    }
    outer_dy = dy.clone()
    if way == "mla_kv_a_proj":  # each process has a summand of what goes around the next projection
        outer_dy[..., -ROPE:] /= dist.get_world_size()

    def passes(module: Any) -> tuple[Tensor, Tensor | None, dict[str, int], dict[str, int]]:
        part = x_part(x).clone().requires_grad_()
        y, forward = counted(lambda: module(part))
        _, backward = counted(lambda: y.backward(y_part(outer_dy)))
        return y.detach(), part.grad, forward, backward

    y, dx, forward, backward = passes(layer)
    _, _, frozen_forward, frozen_backward = passes(frozen)
    summed = deltas["first"] + deltas["second"]
    n_kernels = len(set(bs))  # those of one block size are one
    extra = {**frozen_backward, "allreduce": frozen_backward.get("allreduce", 0) + how.n_sums * n_kernels}
    expected = whole(x) + x @ summed.T
    found: dict[str, Any] = {
        "y": worst([y - y_part(expected)]),
        "dx": worst([dx - x_part(dy @ (whole.weight + summed))]),
        "dw": worst(
            layer.c3a_kernel[name].grad - weight_grad(dy, x, b) for name, b in zip(("first", "second"), bs, strict=True)
        ),
        "collectives": forward == frozen_forward
        and {k: v for k, v in backward.items() if v} == {k: v for k, v in extra.items() if v},
        "sums": how.n_sums * n_kernels,
        "counts": [forward, backward, frozen_forward, frozen_backward],
    }
    with torch.no_grad():
        part = x_part(x)
        y, forward = counted(lambda: layer(part))
        alone, frozen_forward = counted(lambda: frozen(part))
        found["no grad"] = worst([y - y_part(expected)])
        found["collectives"] &= forward == frozen_forward
    # Rows of their own
    layer.zero_grad()
    part = x_part(x).clone().requires_grad_()
    layer(part, adapter_names=NAMES).backward(y_part(outer_dy))
    mine = {name: torch.tensor([i for i, other in enumerate(NAMES) if other == name]) for name in ("first", "second")}
    by_row = torch.stack(
        [whole(x[i]) + x[i] @ deltas[name].expand(out_features, in_features).T for i, name in enumerate(NAMES)]
    )
    dx_by_row = torch.stack([dy[i] @ (whole.weight + deltas[name]) for i, name in enumerate(NAMES)])
    found["rows"] = worst(
        [
            layer(x_part(x), adapter_names=NAMES).detach() - y_part(by_row),
            part.grad - x_part(dx_by_row),
            *(
                layer.c3a_kernel[name].grad - weight_grad(dy[mine[name]], x[mine[name]], layer.block_size[name])
                for name in mine
            ),
        ]
    )
    # Disabled, merged, unmerged
    before = base.weight.to_local().clone() if hasattr(base.weight, "to_local") else base.weight.clone()
    merged: Any = C3ALinear(linear(*sizes, has_bias), "first", bs[0])
    merged.update_layer("second", bs[1])
    for name in ("first", "second"):
        merged.c3a_kernel[name].data = layer.c3a_kernel[name].data
    merged.merge(adapter_names=["first", "second"])
    layer.merge(safe_merge=True)
    weight = base.weight.to_local() if hasattr(base.weight, "to_local") else base.weight
    with torch.no_grad():
        found["merged"] = worst([layer(part) - y_part(expected)])
        found["merged as whole"] = everywhere(torch.equal(weight, how.weight(merged.base_layer.weight)))
        layer.unmerge()
        found["unmerged"] = everywhere(torch.equal(weight, before))
        layer.enable_adapters(False)
        found["disabled"] = everywhere(torch.equal(layer(part), alone))
    found["delta"] = worst([layer.get_delta_weight("first") - deltas["first"]])
    found["left"] = everywhere(close(layer))
    with torch.no_grad():
        found["left"] &= everywhere(torch.equal(base(part), alone))
    return found


def layers() -> dict[str, Any]:
    """Every way of spreading a layer in turn, with every pair of block sizes that its widths can have."""
    found = {}
    for number, way in enumerate(WAYS):
        for in_features, out_features in SIZES[dist.get_world_size()]:
            largest = gcd(in_features, out_features)
            divisors = [b for b in range(1, largest + 1) if largest % b == 0]
            bs = divisors[number % len(divisors)], divisors[-1 - (number // 2) % len(divisors)]
            if way == "torch, rowwise" and in_features % dist.get_world_size():
                continue  # torch takes the parts of x for equal ones
            case = f"{way}, {in_features} to {out_features}, b={bs}"
            found[case] = attempt(
                partial(one_layer, way, (in_features, out_features), bs, adapted_first=len(found) % 2 == 1)
            )
    return found


def attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception:
        return traceback.format_exc()


# Models of transformers

VOCABULARY, STEPS = 66, 20
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False, attention_bias=True)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=False)),
}
# On two processes blocks of 8 fit the local widths of some layers, on four those of none.
CONFIG = C3AConfig(
    block_size=8,
    block_size_pattern={"o_proj": 16, "v_proj": 32, "lm_head": 2},
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    init_weights="gaussian",
)
IDS = torch.arange(36).view(3, 12) % VOCABULARY + 1


def batches() -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randint(1, VOCABULARY, (3, 12), generator=generator)


def train(model: Any, steps: int = STEPS) -> Tensor:
    """The loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)
    losses = []
    for ids, _ in zip(batches(), range(steps), strict=False):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def alone(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def spread(folder: Path, **options: Any) -> Any:
    return alone(folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size()), **options)


def adapt(model: Any, config: C3AConfig = CONFIG, name: str = "default") -> Any:
    torch.manual_seed(4)
    c3a_triton.apply(model, config, name)
    return model


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of tensors of the same names."""
    assert found.keys() == expected.keys()
    return worst(found[name].detach() - expected[name].detach() for name in expected)


def weights(model: Any) -> dict[str, Tensor]:
    """A model's parameters but for kernels, whole, under the names of the plain model."""
    return {
        name.replace(".base_layer.", "."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
        if "c3a_kernel" not in name
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return everywhere(
        found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    )


def collectives(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    loss, forward = counted(lambda: model(input_ids=IDS, labels=IDS).loss)
    _, backward = counted(loss.backward)
    model.zero_grad()
    return forward, backward


def whole_model(folder: Path) -> dict[str, Any]:
    """Trained, merged and saved over processes as alone."""
    one, many, frozen = adapt(alone(folder)), adapt(spread(folder)), spread(folder).requires_grad_(False)
    start = {name: tensor.clone() for name, tensor in one.c3a.state_dict().items()}
    for model in (many, frozen):
        model.enable_input_require_grads()
    found: dict[str, Any] = {"start": apart(many.c3a.state_dict(), start)}
    forward, backward = collectives(many)
    frozen_forward, frozen_backward = collectives(frozen)
    n_kernels = len(list(many.c3a.layers()))
    found["forward"] = [forward, frozen_forward]
    found["backward"] = [backward, {**frozen_backward, "allreduce": frozen_backward["allreduce"] + n_kernels}]
    many.disable_input_require_grads()
    losses = train(many), train(one)
    kernels = many.c3a.state_dict()
    found["losses"] = worst([losses[0] - losses[1]])
    found["kernels"] = apart(kernels, one.c3a.state_dict())
    found["moved"] = min(float((kernels[name] - tensor).abs().max()) for name, tensor in start.items())
    with torch.no_grad():
        expected, plain = one(IDS).logits, frozen(IDS).logits
        found["no grad"] = worst([many(IDS).logits - expected])
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
        found["generated"] = everywhere(torch.equal(many.generate(IDS, **options), one.generate(IDS, **options)))
        with many.c3a.disable_adapter():
            found["disabled"] = everywhere(torch.equal(many(IDS).logits, plain))
        for name, layer in one.c3a.layers():  # to the bit, for merged weights
            layer.c3a_kernel["default"].copy_(kernels[f"{name}.c3a_kernel"])
        before = weights(many)
        many.c3a.merge_adapter(safe_merge=True)
        one.c3a.merge_adapter()
        found["merged"] = worst([many(IDS).logits - one(IDS).logits])
        found["merged as whole"] = same(weights(many), weights(one))
        found["changed"] = not same(weights(many), before)
        many.c3a.unmerge_adapter()
        found["unmerged"] = same(weights(many), before)
        many.c3a.unload()
        found["unloaded"] = everywhere(torch.equal(many(IDS).logits, plain)) and not inside(many)
    return found


def checkpointing(folder: Path) -> dict[str, float]:
    """Gradients that recomputing gives, against those without it."""
    found = {}
    for reentrant in (False, True):
        model = adapt(spread(folder)).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        one = adapt(alone(folder))
        one(input_ids=IDS, labels=IDS).loss.backward()
        grads = [{name: p.grad for name, p in m.named_parameters() if p.requires_grad} for m in (model, one)]
        found[f"reentrant={reentrant}"] = apart(*grads)
    return found


OTHER = C3AConfig(block_size=4, target_modules=["q_proj", "up_proj", "down_proj"], init_weights="gaussian")


def several_adapters(folder: Path) -> dict[str, Any]:
    """Two of unlike blocks and targets: both at once, one for each row, exchanged, deleted, and saved."""
    one, many = alone(folder), spread(folder)
    for model in (one, many):
        adapt(model)
        adapt(model, OTHER, "other")
    found: dict[str, Any] = {}
    for name, settings in (("both", ["default", "other"]), ("other", "other")):
        grads = []
        for model in (one, many):
            model.c3a.set_adapter(settings)
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        found[name] = apart(*grads)
    rows = ["default", "__base__", "other"]
    found["rows"] = worst([many(IDS, adapter_names=rows).logits - one(IDS, adapter_names=rows).logits])
    with torch.no_grad():
        found["rows, no grad"] = worst([many(IDS, adapter_names=rows).logits - one(IDS, adapter_names=rows).logits])
        found["rows differ"] = float((many(IDS, adapter_names=rows).logits - many(IDS).logits).abs().max())
        with many.c3a.using(rows[::-1]), one.c3a.using(rows[::-1]):
            found["using"] = worst([many(IDS).logits - one(IDS).logits])
        # A file of one process in the model of several, and back
        saved = folder.parent / "saved"
        if dist.get_rank() == 0:
            for kernel in (layer.c3a_kernel["other"] for _, layer in one.c3a.layers() if "other" in layer.c3a_kernel):
                kernel.mul_(-1)
            one.c3a.save_pretrained(saved / "other", "other")
        dist.barrier()
        expected = c3a_triton.load_adapter(alone(folder), saved / "other")(IDS).logits
        many.c3a.hotswap_adapter(saved / "other", "other")
        found["hot swapped"] = worst([many(IDS).logits - expected])
        loaded = c3a_triton.load_adapter(spread(folder), saved / "other")
        found["loaded"] = worst([loaded(IDS).logits - expected])
        many.c3a.freeze_for_inference()
        found["frozen for inference"] = worst([many(IDS).logits - expected for _ in range(2)])
        many.c3a.delete_adapter("other")
        many.c3a.set_adapter("default")
        found["after deletion"] = worst([many(IDS).logits - adapt(alone(folder))(IDS).logits])
        many.c3a.merge_and_unload()
        found["merged for good"] = worst([many(IDS).logits - adapt(alone(folder))(IDS).logits])
        found["left"] = everywhere(not inside(many))
    return found


def adapted_before_sharding(folder: Path) -> float:
    """transformers' plan over the base layers of a model that is adapted already."""
    one, many = adapt(alone(folder)), adapt(alone(folder))
    plan = {}
    for name, module in many.named_modules():
        if name.endswith("base_layer") and "lm_head" not in name:
            style = "rowwise" if "o_proj" in name or "down_proj" in name else "colwise"
            plan |= {f"{name}.{parameter}": style for parameter, _ in module.named_parameters()} | {name: style}
    apply_tensor_parallelism(many, dist.init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    return worst([train(many, 3) - train(one, 3), *(many(IDS).logits - one(IDS).logits)])


def in_bfloat16(folder: Path) -> dict[str, float]:
    """Against one process in bfloat16, whose difference from float32 is the scale of rounding."""
    grads, outputs = [], []
    bfloat16 = {"dtype": torch.bfloat16}
    many, one, exact = (adapt(model(folder, **bfloat16)) for model in (spread, alone, alone))
    for model in (many, one, exact.float()):
        output = model(input_ids=IDS, labels=IDS)
        output.loss.backward()
        outputs.append(output.logits.detach().float())
        grads.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad]))
    return {
        what: worst([many - exact]) / worst([one - exact])
        for what, (many, one, exact) in (("logits", outputs), ("gradients", grads))
    }


def compiled(mesh: Any) -> dict[str, Any]:
    """A compiled pair of layers against the same in eager code."""
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    pair: Any = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24)).requires_grad_(False)
    parallelize_module(pair, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    c3a_triton.apply(pair, C3AConfig(block_size=8, target_modules=["0", "1"], init_weights="gaussian"))
    x = torch.randn(ROWS, 24)

    def step(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        pair.zero_grad()
        y = function(x.requires_grad_())
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in pair.parameters() if p.requires_grad)]

    expected = step(pair)
    torch._dynamo.reset()
    function = torch.compile(pair, backend="aot_eager", fullgraph=True)
    found["step"] = worst(a - b for a, b in zip(step(function), expected, strict=True))
    with torch.no_grad():
        found["alone"] = worst([function(x) - expected[0]])
    return found


def copied(mesh: Any) -> dict[str, bool]:
    """A copy of an adapted layer of torch's plan has forward and weights of its own."""
    model: Any = parallelize_module(nn.ModuleDict({"part": nn.Linear(8, 8)}), mesh, {"part": RowwiseParallel()})
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["part"], init_weights="gaussian"))
    x = torch.randn(2, 8 // dist.get_world_size())
    with torch.no_grad():
        expected = model["part"](x)
        copy = deepcopy(model["part"])
        same = torch.equal(copy(x), expected)
        copy.base_layer.weight.zero_()
        return {
            "same": everywhere(same),
            "differs": everywhere(not torch.equal(copy(x), expected)),
            "original": everywhere(torch.equal(model["part"](x), expected)),
        }


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def two_dimensions() -> dict[str, Any]:
    """FSDP2 over tensor parallelism, of a model that is adapted in between, against one process."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    config = C3AConfig(block_size=4, target_modules=["up", "down"], init_weights="gaussian")
    models = []
    for plan in ({}, {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}):
        torch.manual_seed(0)
        model = (
            parallelize_module(nn.Sequential(Block(), Block()), mesh["tensor"], plan)
            if plan
            else nn.Sequential(Block(), Block())
        )
        torch.manual_seed(5)
        models.append(c3a_triton.apply(model, config))
    one, many = models
    start = one.c3a.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    for block in many:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(many, mesh=mesh["data"])
    losses = []
    for model, n_parts, part in ((one, 1, 0), (many, 2, mesh["data"].get_local_rank())):
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)
        for _ in range(STEPS):
            x, target = torch.randn(4, 12, generator=generator), torch.randn(4, 12, generator=generator)
            loss = (model(x[part::n_parts]) - target[part::n_parts]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = loss.detach()
            if n_parts > 1:
                dist.all_reduce(loss, group=mesh["data"].get_group())
            losses.append(loss / n_parts)
    (_, layer), *_ = many.c3a.layers()
    return {
        "losses": worst(a - b for a, b in zip(losses[:STEPS], losses[STEPS:], strict=True)),
        "kernels": apart(many.c3a.state_dict(), one.c3a.state_dict()),
        "moved": min(float((one.c3a.state_dict()[name] - tensor).abs().max()) for name, tensor in start.items()),
        "weight": str(layer.base_layer.weight.placements),
        "kernel": str(layer.c3a_kernel["default"].placements),
        "merge": message(many.c3a.merge_adapter),
        "adapt": message(lambda: c3a_triton.apply(over_both(mesh), config)),
    }


def over_both(mesh: Any) -> nn.Module:
    model = parallelize_module(nn.Sequential(Block()), mesh["tensor"], {"0.up": ColwiseParallel()})
    return fully_shard(model, mesh=mesh["data"])


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused() -> dict[str, str]:
    """What is said of parts of a plan that no adapter can join."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

    def by_style(module: nn.Module, name: str) -> nn.Module:
        by_transformers(name)(module, mesh)
        return nn.ModuleDict({"part": module})

    def adapt_part(model: nn.Module) -> None:
        c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["part"]))

    class Int8Linear(nn.Linear):
        """Quantized, as far as merging is concerned."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    def merge_quantized() -> None:
        layer = by_style(Int8Linear(8, 8), "colwise")
        adapt_part(layer)
        layer["part"].base_layer.weight.requires_grad_(False)
        layer["part"].merge()

    later = nn.ModuleDict({"part": nn.Linear(8, 8)})
    adapt_part(later)
    by_transformers("all_reduce")(later["part"].base_layer, mesh)

    mixed = parallelize_module(nn.ModuleDict({"part": nn.Linear(8, 8)}), mesh, {"part": ColwiseParallel()})
    adapt_part(mixed)
    mixed["part"].base_layer._forward_pre_hooks.clear()
    spread_tokens = DTensor.from_local(torch.randn(2, 8), mesh, [Shard(0)])

    def around(plan: dict[str, Any]) -> None:
        model = c3a_triton.apply(
            nn.ModuleDict({"part": nn.Linear(8, 8)}), C3AConfig(block_size=4, target_modules=["part"])
        )
        apply_tensor_parallelism(model, mesh, plan)
        model["part"](torch.randn(2, 8))

    bare = nn.Linear(8, 8)
    bare.weight = nn.Parameter(distribute_tensor(bare.weight, mesh, [Shard(0)]))
    return {
        "embedding": message(lambda: adapt_part(by_style(nn.Embedding(8, 8), "embedding_rowwise"))),
        "all_reduce": message(lambda: adapt_part(by_style(nn.Linear(8, 8), "all_reduce"))),
        "packed_rowwise": message(lambda: adapt_part(by_style(nn.Linear(8, 8, bias=False), "packed_rowwise"))),
        "no plan": message(lambda: adapt_part(nn.ModuleDict({"part": bare}))),
        "x in parts": message(lambda: mixed["part"](spread_tokens)),
        "another plan later": message(lambda: later["part"](torch.randn(2, 8))),
        "quantized": message(merge_quantized),
        "around": message(lambda: around({"part": "colwise"})),
    }


def inside(model: nn.Module) -> list[str]:
    """Names of modules in which anything of this library is left."""
    return [name for name, module in model.named_modules() if left_in(module) or is_ours(module)]


def is_ours(value: Any) -> bool:
    return type(value).__module__.startswith("c3a_triton")


def left_in(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    cells = getattr(forward, "__closure__", None) or ()
    return any(map(is_ours, [forward, *(cell.cell_contents for cell in cells)]))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        for name, make in MODELS.items():
            torch.manual_seed(0)
            make().save_pretrained(folder / name)
    dist.barrier()
    results: dict[str, Any] = {"layers": layers()}
    names = MODELS if dist.get_world_size() == 2 else ["qwen3"]
    results["models"] = {name: attempt(partial(whole_model, folder / name)) for name in names}
    llama = folder / "llama"
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    further: dict[str, Callable[[], Any]] = {
        "checkpointing": partial(checkpointing, llama),
        "several adapters": partial(several_adapters, llama),
        "adapted before sharding": partial(adapted_before_sharding, llama),
        "bfloat16": partial(in_bfloat16, llama),
        "compiled": partial(compiled, mesh),
        "copied": partial(copied, mesh),
        "refused": refused,
    }
    if dist.get_world_size() == 4:
        further = {"two dimensions": two_dimensions}
    results["further"] = {name: attempt(function) for name, function in further.items()}
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    # As in `distributed_worker.py`: a thread of torch's own aborts some interpreters that end here.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
