"""What one of two processes does with a model that ZeRO-3 keeps in parts, DeepSpeed's own or the stand-in.

Run by torchrun from `test_partitioned.py`; the first process writes one JSON object with all cases of both.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zero_stand_in
from tiny_models import logits, qwen3_moe
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import c3a_triton
from c3a_triton import C3AConfig
from c3a_triton.bases.sharded import gathered, is_partitioned

# With odd widths no weight has two equal parts.
WIDTH, INNER, TOKENS, B = 9, 15, 15, 3
IDS = torch.arange(4 * 6).view(4, 6) * 7 % TOKENS
CONFIG = C3AConfig(
    block_size=B,
    target_modules=["table", "up", "down", "conv", "head"],
    target_parameters=["stack"],
    modules_to_save=["norm"],
    init_weights="gaussian",
)

# All rows share what is adapted by itself, and a weighted sum is of kernels alone.
ROWS = replace(CONFIG, target_parameters=None, modules_to_save=None)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...d,eod->...o", x, self.stack)


class Model(nn.Module):
    """A layer of each kind, and two of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), Conv1D(WIDTH, INNER)
        self.conv, self.mixed = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), Stack()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(torch.tanh(self.up(x)))
        x = x + self.conv(x.mT.unsqueeze(-1)).squeeze(-1).mT
        return self.head(self.norm(x + 0.1 * self.mixed(x)))

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def build(config: C3AConfig = CONFIG, *others: str) -> Any:
    torch.manual_seed(0)
    model = c3a_triton.apply(Model().eval(), config)
    for name in others:
        model.c3a.add_adapter(name, config)
    return model


def values(model: nn.Module) -> dict[str, Tensor]:
    """All parameters whole; every process calls."""
    return {name: gathered(parameter).detach().clone() for name, parameter in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def everyone(value: Any) -> list[Any]:
    """What each process has found."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# Cases: a way of bringing models into parts → what was found


def merged(way: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for keep in ("cpu", "device"):
        alone, model = build(CONFIG, "second"), build(CONFIG, "second")
        way.initialize(model)
        before = values(model)
        zero_stand_in.most_gathered = 0
        for names in (None, ["second"]):  # one after the other: the second one looks at what the first one left
            for each in (alone, model):
                each.c3a.merge_adapter(names, safe_merge=True, keep_base=keep)
        found[f"{keep}: merged as alone"] = equal(values(model), values(alone))
        found[f"{keep}: moved"] = not equal(values(model), before)
        found[f"{keep}: output"] = difference(model(IDS), alone(IDS))
        kept = [layer._merge_state.kept for _, layer in model.c3a.layers()]
        sizes = [whole.numel() for whole in (layer._merge_state.kept for _, layer in alone.c3a.layers())]
        found[f"{keep}: a part is kept"] = all(2 * k.numel() - n in (-1, 1) for k, n in zip(kept, sizes, strict=True))
        found[f"{keep}: most gathered"] = zero_stand_in.most_gathered
        found[f"{keep}: largest"] = max(p.numel() for p in before.values())
        model.c3a.unmerge_adapter()
        found[f"{keep}: brought back"] = equal(values(model), before)
        found[f"{keep}: in parts"] = all(p.numel() == 0 for p in model.parameters())
    return found


def unloaded(way: Any, folder: Path) -> dict[str, Any]:
    alone, model = build(), build()
    way.initialize(model)
    model(IDS)
    found = {"same object": model.c3a.merge_and_unload(safe_merge=True) is model}
    alone.c3a.merge_and_unload()
    return found | {
        "equal": equal(values(model), values(alone)),
        "plain": [name for name in values(model) if "c3a" in name or "base_layer" in name],
        "output": difference(model(IDS), alone(IDS)),
        "in parts": all(map(is_partitioned, model.parameters())),
    }


def swapped(way: Any, folder: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    other = c3a_triton.apply(Model().eval(), CONFIG)
    if dist.get_rank() == 0:
        other.c3a.save_pretrained(folder / "other", save_embedding_layers=True)
    dist.barrier()
    alone, model = build(), build()
    way.initialize(model)
    alone.c3a.hotswap_adapter(folder / "other")
    model.c3a.hotswap_adapter(folder / "other")
    found: dict[str, Any] = {
        "values": equal(model.c3a.state_dict(save_embedding_layers=False), other.c3a.state_dict()),
        "head": equal({"": gathered(model.head.base_layer.weight)}, {"": other.head.base_layer.weight}),
        "output": difference(model(IDS), alone(IDS)),
    }
    (_, layer), *_ = model.c3a.layers()
    layer.reset_c3a_parameters("default", init_weights=True)
    found["reset"] = float(gathered(layer.c3a_kernel["default"]).abs().max())
    return found


def loaded(way: Any, folder: Path) -> dict[str, Any]:
    """An adapter with a module trained whole and the embeddings, into a base that is in parts already."""
    torch.manual_seed(0)
    alone: Any = Model().eval()
    torch.manual_seed(0)
    model = way.built()
    for each in (alone, model):
        c3a_triton.load_adapter(each, folder / "other")
    found = {"values": equal(values(model), values(alone))}
    way.initialize(model)
    return found | {"output": difference(model(IDS), alone(IDS)), "added": message(lambda: add_afterwards(model))}


def add_afterwards(model: Any) -> None:
    model.c3a.add_adapter("late", CONFIG)


def with_tokens(way: Any, folder: Path) -> dict[str, Any]:
    """Rows of the embedding, which the tied head has too: computed, merged, brought back, saved, loaded, swapped."""
    config = replace(ROWS, target_modules=["up"], trainable_token_indices=[7, 2])
    name = "table.token_adapter.trainable_tokens_delta"
    alone, model = build(config), build(config)
    for each in (alone, model):
        each.table.token_adapter.trainable_tokens_delta["default"].data.add_(1)
    way.initialize(model)
    found = {
        "output": difference(model(IDS), alone(IDS)),
        "state": equal(model.c3a.state_dict(), alone.c3a.state_dict()),
    }
    before = values(model)
    for each in (alone, model):
        each.c3a.merge_adapter()
    found["merged as alone"] = equal(values(model), values(alone))
    found["merged output"] = difference(model(IDS), alone(IDS))
    model.c3a.unmerge_adapter()
    found["brought back"] = equal(values(model), before)
    model.c3a.save_pretrained(folder / "tokens")
    torch.manual_seed(0)
    other = c3a_triton.load_adapter(zero_stand_in.put_in_parts(Model().eval()), folder / "tokens")
    found["loaded"] = other.c3a.state_dict()[name].equal(before[f"{name}.default"])
    torch.manual_seed(0)
    first = c3a_triton.apply(zero_stand_in.put_in_parts(Model().eval()), config).c3a.state_dict()[name]
    found["first values"] = first.equal(before["table.weight"][[7, 2]])
    model.c3a.hotswap_adapter(folder / "tokens")
    found["swapped"] = equal(values(model), before)
    found["added"] = message(lambda: model.c3a.add_adapter("other", config))
    return found


def failing(way: Any, folder: Path) -> dict[str, Any]:
    """One process cannot: the others learn of it, and nothing has changed."""
    import deepspeed

    rank = dist.get_rank()
    model = build(CONFIG, "second")
    way.initialize(model)
    layers = [layer for _, layer in model.c3a.layers()]
    found: dict[str, Any] = {}

    def tried(case: str, verb: Callable[[], Any]) -> None:
        before = values(model)
        found[case] = everyone(message(verb)), equal(values(model), before)

    def with_broken(layer: Any, verb: Callable[[], Any]) -> Callable[[], Any]:
        def out_of_memory(*args: Any) -> None:
            raise MemoryError("no memory left")

        def run() -> None:
            if rank == 1:
                layer._add_delta_ = out_of_memory
            try:
                verb()
            finally:
                layer.__dict__.pop("_add_delta_", None)

        return run

    def change(parameter: Any, add: float) -> None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.view(-1)[0] += add

    c3a = model.c3a
    layers[2].enable_adapters(rank != 1)
    tried("disabled", c3a.merge_adapter)
    layers[2].enable_adapters(True)
    tried("memory", with_broken(layers[0], c3a.merge_adapter))
    tried("memory, safe", with_broken(layers[3], lambda: c3a.merge_adapter(safe_merge=True)))
    tried("unload", with_broken(layers[0], c3a.merge_and_unload))
    tried("names", lambda: c3a.merge_adapter(("default", "second")[rank]))
    tried("keep_base", lambda: c3a.merge_adapter(keep_base=("cpu", None)[rank]))
    tried("verbs", (c3a.unmerge_adapter, c3a.merge_adapter)[rank])
    tried("file", lambda: c3a.hotswap_adapter(folder / ("other", "nowhere")[rank]))

    # In the middle: what was merged before it stays so, everywhere, and can be taken back.
    before = values(model)
    found["middle"] = everyone(message(with_broken(layers[2], c3a.merge_adapter)))
    found["merged so far"] = everyone([layer.merged for layer in layers])
    c3a.unmerge_adapter()
    found["taken back"] = equal(values(model), before)

    change(layers[2].c3a_kernel["second"], torch.inf)
    tried("not finite", lambda: c3a.merge_adapter("second", safe_merge=True))
    c3a.merge_adapter()
    tried("swap of merged", lambda: c3a.hotswap_adapter(folder / "other"))
    change(layers[2].weight, 1.0)
    tried("changed since", c3a.unmerge_adapter)
    tried("changed, both", lambda: c3a.merge_adapter("second"))
    return found


def switched(way: Any, folder: Path) -> dict[str, Any]:
    """Each process's rows have adapters of their own; active adapters change between calls."""
    rank = dist.get_rank()
    alone, model = build(ROWS, "second"), build(ROWS, "second")
    way.initialize(model)
    names = [["default", "second", "__base__", "second"], ["second", "second", "default", "__base__"]][rank]
    gaps = []
    with torch.no_grad():
        for _ in range(2):
            outputs = []
            for each in (alone, model):
                with each.c3a.using(names):
                    outputs.append(each(IDS))
                each.c3a.set_adapter(names[0])
                outputs.append(each(IDS))
                with each.c3a.disable_adapter():
                    outputs.append(each(IDS))
            gaps += [difference(outputs[i], outputs[i + 3]) for i in range(3)]
    for each in (alone, model):
        each.c3a.add_weighted_adapter(["default", "second"], [0.5, 1.0], "third")
    return {
        "gap": max(everyone(max(gaps))),
        "distinct": difference(outputs[0], outputs[2]),
        "combined": equal(model.c3a.state_dict("third"), alone.c3a.state_dict("third")),
    }


def experts(way: Any, folder: Path) -> dict[str, Any]:
    """Stacks of experts, which the grouped product reads, and the layers around them."""
    config = C3AConfig(block_size=4, target_parameters="all-experts", init_weights="gaussian")
    torch.manual_seed(1)
    alone = c3a_triton.apply(qwen3_moe(), config)
    torch.manual_seed(1)
    model: Any = c3a_triton.apply(qwen3_moe(), config)
    way.initialize(model)
    before, found = values(model), {"adapted": difference(logits(model), logits(alone))}
    for each in (alone, model):
        each.c3a.merge_adapter()
    found |= {
        "merged as alone": equal(values(model), values(alone)),
        "merged": difference(logits(model), logits(alone)),
    }
    model.c3a.unmerge_adapter()
    return found | {"brought back": equal(values(model), before), "layers": len(list(model.c3a.layers()))}


def by_peft(way: Any, folder: Path) -> dict[str, Any]:
    """A PeftModel whose layers this library computes, by PEFT's own verbs."""
    import peft
    from peft.utils.hotswap import hotswap_adapter

    def adapted() -> Any:
        torch.manual_seed(0)
        config = peft.C3AConfig(block_size=B, target_modules=["up"], init_weights="gaussian")
        return c3a_triton.apply(peft.get_peft_model(Model().eval(), config))

    alone, model = adapted(), adapted()
    torch.manual_seed(1)
    if dist.get_rank() == 0:
        with torch.no_grad():
            other = adapted()
            other.base_model.model.up.c3a_kernel["default"].mul_(2)
            other.save_pretrained(folder / "peft")
    dist.barrier()
    way.initialize(model)
    found: dict[str, Any] = {}
    for each in (alone, model):
        hotswap_adapter(each, str(folder / "peft"), adapter_name="default")
    before = values(model)
    found["swapped"] = equal(before, values(alone))
    for each in (alone, model):
        each.merge_adapter()
    found["merged as alone"] = equal(values(model), values(alone)) and not equal(values(model), before)
    model.unmerge_adapter()
    return found | {"brought back": equal(values(model), before), "output": difference(model(IDS), alone(IDS))}


CASES: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    "merged": merged,
    "unloaded": unloaded,
    "swapped": swapped,
    "loaded": loaded,
    "tokens": with_tokens,
    "experts": experts,
    "PEFT": by_peft,
    "failing": failing,
    "switched": switched,
}


class StandIn:
    """What DeepSpeed does with parameters, without training them."""

    def __init__(self) -> None:
        zero_stand_in.install()

    def built(self) -> Any:
        """A model that is in parts before anything is adapted."""
        return zero_stand_in.put_in_parts(Model().eval())

    def initialize(self, model: nn.Module) -> None:
        """Keep a model in parts from now on."""
        zero_stand_in.initialize(model)


class DeepSpeed:
    def __init__(self, *, bf16: bool = False) -> None:
        self.config = {
            "train_micro_batch_size_per_gpu": len(IDS) // 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
        }

    def built(self) -> Any:
        """As the stand-in's."""
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=self.config):
            return Model().eval()

    def initialize(self, model: Any) -> Callable[..., None]:
        """As the stand-in's; returns what trains for a step."""
        import deepspeed

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(trained, lr=0.1) if trained else None, config=self.config
        )

        def step(ids: Tensor, lr: float = 0.1) -> float:
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            loss = loss_of(engine(ids))
            engine.backward(loss)
            engine.step()
            return float(loss)

        return step


def loss_of(y: Tensor) -> Tensor:
    return torch.log_softmax(y, -1)[..., 0].mean()


def in_16_bits(folder: Path) -> dict[str, Any]:
    """DeepSpeed trains copies in 32 bits, which have to follow."""
    model = build()
    step = DeepSpeed(bf16=True).initialize(model)
    step(IDS)
    model.c3a.hotswap_adapter(folder / "other")
    found = model.c3a.state_dict()
    step(IDS, lr=0.0)
    return {"kept": equal(model.c3a.state_dict(), found), "dtype": str(model.down.c3a_kernel["default"].dtype)}


def trained(folder: Path) -> dict[str, Any]:
    """Steps with adapters of the rows' own, and with others active, in both processes and alone."""
    rank, size = dist.get_rank(), dist.get_world_size()
    alone, model = build(ROWS, "second"), build(ROWS, "second")
    for each in (alone, model):
        each.c3a.set_adapter(["default", "second"])
    optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1)
    start = {name: tensor.clone() for name, tensor in alone.c3a.state_dict().items()}
    step = DeepSpeed().initialize(model)
    names = ["default", "second", "second", "default"]  # something to train in each process, whichever is active
    losses: list[Tensor] = []
    for i in range(6):
        active = (["default", "second"], ["second"], ["default"])[i // 2]
        own, rows = (None, None) if i % 2 else (names, names[rank::size])
        alone.c3a.set_adapter(active)
        with alone.c3a.using(own):
            loss = loss_of(alone(IDS))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.c3a.set_adapter(active)
        with model.c3a.using(rows):
            parts = everyone(step(IDS[rank::size]))
        losses.append(loss.detach() - sum(parts) / size)
    expected = {name: alone.c3a.state_dict(name) for name in ("default", "second")}
    found = {name: model.c3a.state_dict(name) for name in expected}
    return {
        "loss": float(torch.stack(losses).abs().max()),
        "adapters": max(difference(found[n][k], tensor) for n in expected for k, tensor in expected[n].items()),
        "moved": min(difference(start[key], tensor) for key, tensor in expected["default"].items()),
    }


def main(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    way: Any = StandIn() if kind == "stand-in" else DeepSpeed()
    cases = {case: partial(run, way) for case, run in CASES.items()}
    if kind == "deepspeed":
        cases |= {"in 16 bits": in_16_bits, "trained": trained}
    results: dict[str, Any] = {}
    for case, run in cases.items():
        try:
            results[case] = run(folder)
        except Exception:
            results[case] = traceback.format_exc()
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    os._exit(0)  # as `distributed_worker.py` does


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
