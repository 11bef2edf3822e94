"""What one of several processes does: its part of tensor-parallel layers and models, compared with doing all of it.

Run by torchrun from `test_tensor_parallel.py`; the first process writes one JSON object with all cases.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensor_parallel_layers import (
    NEEDS_EQUAL_PARTS,
    attempt,
    by_transformers,
    counted,
    everywhere,
    is_ours,
    layers,
    left_in,
    worst,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import c3a_triton
from c3a_triton import C3AConfig
from c3a_triton.bases.parallel import parallel_mesh

# Models of transformers

STEPS = 20
VOCABULARY = 68 if NEEDS_EQUAL_PARTS else 66
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


def whole_model(folder: Path, steps: int = STEPS) -> dict[str, Any]:
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
    found["spread embeddings"] = parallel_mesh(many.get_input_embeddings()) is not None
    found["backward"] = [backward, {**frozen_backward, "allreduce": frozen_backward["allreduce"] + n_kernels}]
    many.disable_input_require_grads()
    losses = train(many, steps), train(one, steps)
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
        for model in (one, many):
            model.c3a.set_adapter(["default", "other"], weights=[0.5, -1.5])
        found["strengths"] = worst([many(IDS).logits - one(IDS).logits])
        found["rows with strengths"] = worst(
            [many(IDS, adapter_names=rows).logits - one(IDS, adapter_names=rows).logits]
        )
        for model in (one, many):
            model.c3a.merge_adapter()
        found["merged with strengths"] = worst([many(IDS).logits - one(IDS).logits])
        for model in (one, many):
            model.c3a.unmerge_adapter()
            model.c3a.set_adapter("other", weights=1.0)
            model.c3a.set_scale("default", 1.0)
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
    """Styles of transformers over the base layers of a model that is adapted already."""
    one, many = adapt(alone(folder)), adapt(alone(folder))
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for name, module in many.named_modules():
        if name.endswith("base_layer") and "lm_head" not in name:
            by_transformers("rowwise" if "o_proj" in name or "down_proj" in name else "colwise")(module, mesh)
    return worst([train(many, 3) - train(one, 3), *(many(IDS).logits - one(IDS).logits)])


def in_bfloat16(folder: Path) -> dict[str, Any]:
    """Against one process in bfloat16, whose difference from float32 is the scale of rounding; merged to the bit."""
    grads, outputs = [], []
    bfloat16 = {"dtype": torch.bfloat16}
    models = [adapt(model(folder, **bfloat16)) for model in (spread, alone, alone)]
    models[2].float()
    for model in models:
        output = model(input_ids=IDS, labels=IDS)
        output.loss.backward()
        outputs.append(output.logits.detach().float())
        grads.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad]))
    for model in models:
        model.c3a.merge_adapter()
    return {"merged as whole": same(weights(models[0]), weights(models[1]))} | {
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
    x = torch.randn(4, 24)

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

    def second_derivative() -> None:
        model = parallelize_module(nn.ModuleDict({"part": nn.Linear(8, 8)}), mesh, {"part": ColwiseParallel()})
        adapt_part(model)
        model["part"](torch.randn(2, 8)).sum().backward()
        x = torch.randn(2, 8, requires_grad=True)
        torch.autograd.grad(model["part"](x).square().sum(), x, create_graph=True)

    def around(style: str) -> None:
        model = c3a_triton.apply(
            nn.ModuleDict({"part": nn.Linear(8, 8)}), C3AConfig(block_size=4, target_modules=["part"])
        )
        by_transformers(style)(model["part"], mesh)
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
        "second derivative": message(second_derivative),
        "around": message(lambda: around("colwise")),
    }


def inside(model: nn.Module) -> list[str]:
    """Names of modules in which anything of this library is left."""
    return [name for name, module in model.named_modules() if left_in(module) or is_ours(module)]


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
    cases = {"llama": STEPS, "llama, tied": 5, "qwen3": STEPS} if dist.get_world_size() == 2 else {"qwen3": STEPS}
    results["models"] = {name: attempt(partial(whole_model, folder / name, steps)) for name, steps in cases.items()}
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
