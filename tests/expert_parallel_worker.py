"""What one of several processes does: train models whose experts are spread over them, and compare with one's alone.

Run by torchrun from `test_expert_parallel.py`; the first process writes one JSON object with all cases.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fp8_stand_in
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from tiny_models import IDS, deepseek_v3, gpt_oss, llama4, logits, mixtral, qwen3_moe
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import Trainer
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.distributed.utils import initialize_distributed_mesh

import c3a_triton
from c3a_triton import C3AConfig

STEPS, BLOCK = 20, 4
MODELS: dict[str, Any] = {
    "qwen3": qwen3_moe,
    "mixtral": mixtral,
    "gpt-oss": gpt_oss,
    "deepseek": deepseek_v3,
    "llama4": llama4,
}
MODELS |= {name: partial(qwen3_moe, moe_intermediate_size=width) for name, width in (("wide", 24), ("odd", 17))}
# Attention is left whole: layers of a plan are tested elsewhere.
WHOLE = {f"model.layers.*.self_attn.{name}_proj": "replicate" for name in "qkvo"}


def config(**changes: Any) -> C3AConfig:
    values = {"block_size": BLOCK, "target_modules": [], "target_parameters": "all-experts", "init_weights": "gaussian"}
    return C3AConfig(**(values | changes))


def adapted(model: Any, name: str = "default", **changes: Any) -> Any:
    """The model with an adapter, the same whatever it is spread over."""
    torch.manual_seed(3)
    if hasattr(model, "c3a"):
        model.c3a.add_adapter(name, config(**changes))
        return model
    return c3a_triton.apply(model, config(**changes), adapter_name=name)


def spread(name: str, folder: Path, **plan: Any) -> Any:
    """A model that transformers spreads over the processes as it loads it."""
    if dist.get_rank() == 0 and not folder.exists():
        MODELS[name]().save_pretrained(folder)
    dist.barrier()
    return type(MODELS[name]()).from_pretrained(folder, distributed_config=DistributedConfig(**plan))


def sharded(model: Any, adapt: Callable[[Any], Any], **plan: Any) -> Any:
    """Expert parallelism first, then adapters, then FSDP2 with the model's own plan."""
    plan_of = DistributedConfig(**plan)
    _, meshes = initialize_distributed_mesh(plan_of)
    tp_plan, ep_plan, fsdp_plan = model._resolve_parallel_plans(plan_of)
    model.config.distributed_config = plan_of
    if plan_of.tp_size > 1:
        apply_tensor_parallelism(model, meshes.get_mesh("tp"), tp_plan)
    apply_expert_parallelism(model, meshes.get_mesh("ep"), meshes.get_mesh("tp"), ep_plan)
    adapt(model)
    return apply_fully_sharded_data_parallelism(model, meshes, fsdp_plan, ep_plan)


def train(model: Any, part: int = 0, n_parts: int = 1, clip: Callable[[Any], Any] = lambda model: 0.0) -> Tensor:
    """Losses, and what `clip` gives, of each step over the whole batch, of which this process computes a part."""
    model.train()
    optimizer = torch.optim.AdamW(c3a_triton.param_groups(model, lr=1e-2), foreach=True)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(0, 32, (4, 7), generator=generator).chunk(n_parts)[part]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = float(clip(model))
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        if n_parts > 1:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        found.append([float(loss), norm])
    model.eval()
    return torch.tensor(found)


def by_accelerate(model: Any) -> Any:
    return Accelerator(cpu=True).clip_grad_norm_(list(model.parameters()), 0.02)


def by_trainer(model: Any) -> Any:
    return Trainer._mixed_mesh_grad_norm(None, model, 0.02)


def apart(found: Any, expected: Any) -> float:
    """The largest difference between tensors, or between those of two dictionaries with the same names."""
    if isinstance(found, Tensor):
        found, expected = {"": found}, {"": expected}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(float((whole(found[name]) - whole(expected[name])).abs().max()) for name in expected)


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def kernels_of(model: Any, adapter: str = "default") -> dict[str, Any]:
    return {name: layer.c3a_kernel[adapter] for name, layer in model.c3a.layers() if adapter in layer.c3a_kernel}


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def trained(
    model: Any, alone: Any, folder: Path, part: int = 0, n_parts: int = 1, clip: Any = lambda model: 0.0
) -> dict[str, Any]:
    """What differs from training alone: at the start, in losses and norms, in the adapter, and in its file."""
    start = {name: kernel.detach().clone() for name, kernel in kernels_of(alone).items()}
    found = {"start": apart(kernels_of(model), start)}
    of_experts = {name: kernel for name, kernel in kernels_of(model).items() if ".experts." in name}
    found["held"] = max(k.to_local().untyped_storage().nbytes() / k.nbytes for k in of_experts.values())
    losses, expected = train(model, part, n_parts, clip), train(alone, clip=clip)
    found |= {"losses": apart(losses, expected), "norms": float(expected[:, 1].max())}
    found["moved"] = apart(kernels_of(alone), start)
    found["adapter"] = apart(model.c3a.state_dict(), alone.c3a.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.c3a.save_pretrained(folder)
    again = c3a_triton.load_adapter(type(alone)(alone.config), folder)
    found["file"] = apart(again.c3a.state_dict(), alone.c3a.state_dict())
    return found


EP2, TP2 = {"tp_size": 2, "ep_size": 2}, {"tp_size": 2}


def by_plan(
    name: str, clip: Any = lambda model: 0.0, modules: Any = (), **plan: Any
) -> Callable[[Path], dict[str, Any]]:
    """Train a model that transformers has spread as it loaded it."""

    def case(folder: Path) -> dict[str, Any]:
        changes = {"target_modules": list(modules)}
        model, alone = spread(name, folder / name, **plan), adapted(MODELS[name](), **changes)
        return trained(adapted(model, **changes), alone, folder / "adapter", clip=clip)

    return case


def in_fp8(**plan: Any) -> Callable[[Path], dict[str, Any]]:
    """Train beside experts of float8 codes, each process with its part of codes and scales."""

    def load(path: Path, **options: Any) -> Any:
        return type(qwen3_moe()).from_pretrained(path, dtype=torch.float32, **options)

    def case(folder: Path) -> dict[str, Any]:
        path = folder / "fp8"
        if dist.get_rank() == 0 and not path.exists():
            kept = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate", "lm_head"]
            fp8_stand_in.checkpoint(qwen3_moe(), path, 8, ".experts.", modules_to_not_convert=kept)
        dist.barrier()
        fp8_stand_in.install(pytest.MonkeyPatch(), fp8_stand_in.exact, fp8_stand_in.grouped)
        model, alone = adapted(load(path, distributed_config=DistributedConfig(**plan))), adapted(load(path))
        codes = str(model.model.layers[0].mlp.experts.base_layer.gate_up_proj.dtype)
        return trained(model, alone, folder / "adapter") | {"codes": codes, "merge": message(model.c3a.merge_adapter)}

    return case


def with_fsdp(**plan: Any) -> Callable[[Path], dict[str, Any]]:
    """Train a model whose processes have batches of their own, and FSDP2 over them."""

    def case(folder: Path) -> dict[str, Any]:
        model = sharded(qwen3_moe(), adapted, **plan)
        n_parts = plan["fsdp_size"]
        part = dist.get_rank() // plan["tp_size"]
        found = trained(model, adapted(qwen3_moe()), folder / "adapter", part, n_parts)
        return found | {
            "second": message(lambda: adapted(model, "second")),
            "merge": message(model.c3a.merge_adapter),
            "hot swap": message(lambda: model.c3a.hotswap_adapter(folder / "adapter")),
            "rows": message(lambda: model(input_ids=IDS, adapter_names=["default", "default", "__base__"])),
        }

    return case


def gradients(model: Any) -> dict[str, Any]:
    model.train()
    model(input_ids=IDS).logits.square().mean().backward()
    model.eval()
    found = {name: kernel.grad for name, kernel in kernels_of(model).items()}
    model.zero_grad()
    return found


def verbs(name: str, **plan: Any) -> Callable[[Path], dict[str, Any]]:
    """Whatever else adapters can do, beside the same done alone."""

    def case(folder: Path) -> dict[str, Any]:
        plain = spread(name, folder / name, **plan)
        base = logits(plain)
        model, alone = adapted(plain), adapted(MODELS[name]())
        found: dict[str, Any] = {"logits": apart(logits(model), logits(alone))}
        with model.c3a.disable_adapter():
            found["disabled"] = torch.equal(logits(model), base)

        def both(verb: Callable[[Any], Any]) -> None:
            for one in (model, alone):
                verb(one)

        def differ(what: str, of: Callable[[Any], Any] = logits) -> None:
            found[what] = apart(of(model), of(alone))

        both(lambda one: adapted(one, "other", block_size=2))
        both(lambda one: one.c3a.set_adapter(["default", "other"]))
        differ("both")
        differ("deltas", lambda one: {key: layer.get_delta_weight("other") for key, layer in one.c3a.layers()})
        differ("gradients", gradients)
        both(lambda one: one.gradient_checkpointing_enable({"use_reentrant": False}))
        differ("checkpointed gradients", gradients)
        both(lambda one: one.gradient_checkpointing_disable())
        differ("rows of one adapter", lambda one: one(input_ids=IDS, adapter_names=["other"] * 3).logits.detach())
        names = ["default", "other", "__base__"]
        differ("rows", lambda one: one(input_ids=IDS, adapter_names=names).logits.detach())
        own = names[:2] + names[dist.get_rank() :][:1]
        found["rows of other adapters in each process"] = message(lambda: model(input_ids=IDS, adapter_names=own))
        generated = [one.generate(IDS[:, :3], max_new_tokens=4, do_sample=False) for one in (model, alone)]
        found["generated"] = torch.equal(*generated)

        both(lambda one: one.c3a.set_adapter(["default", "other"], weights=[0.5, -1.5]))
        differ("strengths")
        differ(
            "deltas of strengths", lambda one: {key: part.get_delta_weight("other") for key, part in one.c3a.layers()}
        )
        differ("gradients of strengths", gradients)
        weights = {key: whole(layer.weight) for key, layer in model.c3a.layers()}
        both(lambda one: one.c3a.merge_adapter(safe_merge=True))
        differ("merged weights", lambda one: {key: layer.weight for key, layer in one.c3a.layers()})
        differ("merged")
        model.c3a.unmerge_adapter()
        alone.c3a.unmerge_adapter()
        found["unmerged"] = all(torch.equal(whole(layer.weight), weights[key]) for key, layer in model.c3a.layers())

        both(lambda one: (torch.manual_seed(5), [layer.reset_c3a_parameters("other") for _, layer in one.c3a.layers()]))
        differ("reset", lambda one: one.c3a.state_dict("other"))
        both(lambda one: adapted(one, "third"))
        both(lambda one: one.c3a.add_weighted_adapter(["default", "third"], [0.5, 2.0], "sum"))
        differ("sum", lambda one: one.c3a.state_dict("sum"))
        both(lambda one: (one.c3a.set_adapter("sum"), one.c3a.rename_adapter("sum", "total")))
        both(lambda one: (one.c3a.delete_adapter("other"), one.c3a.freeze_for_inference()))
        differ("renamed")

        file = folder / f"{name} {plan}"
        if dist.get_rank() == 0:
            alone.c3a.save_pretrained(file, "total")
        dist.barrier()
        model.c3a.hotswap_adapter(file, "third")
        found["hot swapped"] = apart(model.c3a.state_dict("third"), alone.c3a.state_dict("total"))
        counts = [one.c3a.get_nb_trainable_parameters() for one in (model, alone)]
        found["counted"] = counts[0] == counts[1]
        model.c3a.load_adapter(file, "loaded")
        found["loaded"] = apart(model.c3a.state_dict("loaded"), alone.c3a.state_dict("total"))
        model.c3a.set_adapter("loaded")
        differ("after loading")
        model.c3a.unload()
        found["unloaded"] = torch.equal(logits(model), base)
        merged = [adapted(one).c3a.merge_and_unload() for one in (model, MODELS[name]())]
        found["merged and unloaded"] = apart(logits(merged[0]), logits(merged[1]))
        return found

    return case


def collectives(folder: Path) -> dict[str, Any]:
    """How many messages a forward and its backward pass exchange, of the model alone and with adapters."""
    counts: dict[str, Any] = {}
    for plan in (EP2, TP2):
        model, counted = spread("qwen3", folder / "qwen3", **plan), []
        for prepare in (lambda one: one.requires_grad_(False), adapted):
            prepare(model)
            embeds = torch.randn(2, 5, 24, requires_grad=True)
            with CommDebugMode() as messages:
                model(inputs_embeds=embeds).logits.sum().backward()
            counted.append({str(key): count for key, count in messages.get_comm_counts().items()})
        counts[str(plan)] = counted
    return counts


def seeds(folder: Path) -> dict[str, Any]:
    """An adapter of which each process draws other values."""
    model = spread("qwen3", folder / "qwen3", **EP2)
    torch.manual_seed(10 + dist.get_rank())
    c3a_triton.apply(model, config(target_modules=["q_proj"]))
    model.c3a.save_pretrained(folder / "seeds")
    dist.barrier()
    again = c3a_triton.load_adapter(MODELS["qwen3"](), folder / "seeds")
    deviations = [float(kernel.std()) for kernel in again.c3a.state_dict().values()]
    return {"logits": apart(logits(model), logits(again)), "deviation": min(deviations)}


def refused(folder: Path) -> dict[str, str]:
    """What is said of models that cannot be adapted, or not so."""
    found = {"llama4": message(lambda: adapted(spread("llama4", folder / "llama4", **TP2)))}
    model = spread("wide", folder / "wide", **TP2)
    found["block size"] = message(lambda: adapted(model, block_size=8))
    found["block size of a file"] = message(
        lambda: c3a_triton.load_adapter(model, saved(folder / "of 8", block_size=8))
    )
    _, meshes = initialize_distributed_mesh(DistributedConfig(**EP2))
    for what, names in (("spread later", "experts.base_layer"), ("spread later by the plan", "experts")):
        late = adapted(qwen3_moe())
        plan = late._expand_parallel_plan(
            {f"model.layers.*.mlp.{names}.{name}": "grouped_gemm" for name in ("gate_up_proj", "down_proj")}
            | {f"model.layers.*.mlp.{names}": "ep_dispatch_experts"}
        )
        apply_expert_parallelism(late, meshes.get_mesh("ep"), meshes.get_mesh("tp"), plan)
        found[what] = message(lambda late=late: logits(late))
    found["uneven"] = message(lambda: adapted(spread("odd", folder / "odd", **TP2), block_size=1))
    loaded = spread("qwen3", folder / "qwen3", fsdp_size=2, ep_size=2)
    found["fsdp first"] = message(lambda: adapted(loaded))
    return found


def saved(folder: Path, **changes: Any) -> Path:
    """A folder with an adapter of the wide model, which one process has written."""
    if dist.get_rank() == 0:
        adapted(MODELS["wide"](), **changes).c3a.save_pretrained(folder)
    dist.barrier()
    return folder


CASES: dict[int, dict[str, Callable[[Path], dict[str, Any]]]] = {
    2: {
        "qwen3, experts": by_plan("qwen3", by_trainer, ["q_proj", "o_proj"], **EP2),
        "mixtral, experts": by_plan("mixtral", **EP2, ep_implementation="all_reduce"),
        "gpt-oss, experts": by_plan("gpt-oss", by_accelerate, **EP2),
        "qwen3, parts of experts": by_plan("qwen3", by_accelerate, ["q_proj", "o_proj"], **TP2),
        "deepseek, parts of experts": by_plan("deepseek", **TP2),
        "fp8, experts": in_fp8(**EP2),
        "fp8, parts of experts": in_fp8(**TP2),
        "fsdp": with_fsdp(tp_size=1, fsdp_size=2, ep_size=2),
        "verbs, experts": verbs("gpt-oss", **EP2),
        "verbs, parts of experts": verbs("qwen3", **TP2),
        "collectives": collectives,
        "seeds": seeds,
        "refused": refused,
    },
    4: {
        "qwen3, experts": by_plan("qwen3", tp_size=4, ep_size=4, tp_plan=WHOLE),
        "qwen3, parts of experts": by_plan("qwen3", tp_size=4, tp_plan=WHOLE),
        "fsdp, replicas": with_fsdp(tp_size=2, fsdp_size=2, ep_size=2),
        "fsdp": with_fsdp(tp_size=2, fsdp_size=2, ep_size=4),
    },
}


def main(folder: Path, n_processes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name, case in CASES[n_processes].items():
        try:
            results[name] = case(folder)
        except Exception:
            results[name] = traceback.format_exc()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, results)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(every))
    dist.barrier()
    # As in `distributed_worker.py`: a thread of torch's own aborts some interpreters that end.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
