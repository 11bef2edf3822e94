"""What one of several processes does: train a model in every way of spreading it, and compare with doing it alone.

Run by torchrun from `test_distributed.py`; the first process writes one JSON object with all cases.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import c3a_triton
from c3a_triton import C3AConfig

STEPS, ROWS, WIDTH = 20, 4, 12
CONFIG = C3AConfig(
    block_size=4, target_modules=["up", "down"], modules_to_save=["head"], bias="c3a_only", init_weights="gaussian"
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def build(config: C3AConfig = CONFIG) -> Any:
    torch.manual_seed(0)
    return c3a_triton.apply(Model(), config)


Update = Callable[[Tensor], None]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(c3a_triton.param_groups(model, lr=3e-2, head_lr=1e-2))


def by_torch(model: nn.Module) -> Update:
    optimizer = optimizer_of(model)

    def update(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def train(model: nn.Module, update: Update, rank: int = 0, n_processes: int = 1) -> Tensor:
    """The losses of each step, over the whole batch, of which each process computes its rows."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        x, target = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, 3, generator=generator)
        loss = (model(x[rank::n_processes]) - target[rank::n_processes]).square().mean()
        update(loss)
        loss = loss.detach().clone()
        if n_processes > 1:
            dist.all_reduce(loss)
        losses.append(loss / n_processes)
    return torch.stack(losses)


def sharded(model: Any, **options: Any) -> Any:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def with_base_whole(model: Any) -> Any:
    return sharded(model, ignored_params={p for p in model.parameters() if not p.requires_grad})


def in_bfloat16(model: Any) -> Any:
    return sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def fsdp1(model: Any) -> Any:
    # The policy that docs/devices.md documents: whole blocks, and parameters as they are.
    return FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu")
    )


def adapted_afterwards(model: Any, **options: Any) -> Any:
    """DDP first, used, and adapted then; each process draws other kernels, of which the first one's count."""
    torch.manual_seed(0)
    wrapper = nn.parallel.DistributedDataParallel(Model(), **options)
    with torch.random.fork_rng():
        wrapper(torch.randn(ROWS, WIDTH)).square().sum().backward()
        wrapper.zero_grad()
    torch.rand(dist.get_rank())
    return c3a_triton.apply(wrapper, CONFIG)


WAYS: dict[str, Callable[[Any], Any]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "ddp first": adapted_afterwards,
    "ddp first, with options": partial(
        adapted_afterwards, find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=1
    ),
    "fsdp2": sharded,
    "fsdp2, base whole": with_base_whole,
    "fsdp2, bfloat16": in_bfloat16,
    "fsdp1": fsdp1,
}


def differences(
    losses: tuple[Tensor, Tensor], found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]
) -> dict[str, Any]:
    """What of losses and trained tensors differs from training alone, and how far training moved them."""
    same_names = found.keys() == expected.keys() == start.keys()
    return {
        "loss": float((losses[0] - losses[1]).abs().max()),
        "adapter": max(float((found[name] - expected[name]).abs().max()) for name in expected) if same_names else None,
        "same names": same_names,
        "moved": min(float((expected[name] - start[name]).abs().max()) for name in expected),
    }


def spread(way: str, folder: Path) -> dict[str, Any]:
    """Train, save and load on one device; differences from training alone."""
    alone = build()
    expected = train(alone, by_torch(alone))
    model = build()
    start = {name: tensor.clone() for name, tensor in model.c3a.state_dict().items()}
    wrapped = WAYS[way](model)
    model = getattr(wrapped, "c3a", model.c3a).model
    losses = train(wrapped, by_torch(wrapped), dist.get_rank(), dist.get_world_size())
    if way == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            model.c3a.save_pretrained(folder)
    else:
        model.c3a.save_pretrained(folder)
    dist.barrier()
    return differences((losses, expected), reloaded(folder), alone.c3a.state_dict(), start) | {
        "kernels sharded": "fsdp2" in way
        and all("DTensor" in type(layer.c3a_kernel["default"]).__name__ for _, layer in model.c3a.layers()),
    }


def spread_of(wrapper: Any) -> float:
    """How far trained tensors of the processes lie apart, relatively, after a step of unlike gradients in each."""
    trained = [parameter for parameter in wrapper.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        with wrapper.no_sync():
            wrapper(torch.randn(ROWS, WIDTH, generator=generator)).square().mean().backward()
        wrapper(torch.randn(ROWS, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    flat = torch.cat([parameter.detach().flatten() for parameter in trained])
    both = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(both, flat)
    return float((both[0] - both[1]).norm() / both[0].norm())


def through_wrappers(folder: Path) -> dict[str, Any]:
    """Verbs that change what is trained, where the model is in a DDP, and what is said where that cannot be."""
    ddp = nn.parallel.DistributedDataParallel
    kernels = C3AConfig(block_size=4, target_modules=["up"], init_weights="gaussian")
    model = c3a_triton.apply(Model(), kernels)
    wrapper = ddp(model)
    c3a_triton.apply(wrapper, C3AConfig(block_size=4, target_modules=["down"]), "second")
    found: dict[str, Any] = {"one manager": wrapper.c3a is model.c3a, "names": list(model.c3a.adapters)}
    model.c3a.set_adapter(["default", "second"])
    found["both set"] = spread_of(wrapper)
    model.c3a.set_adapter("second")
    found["second set"] = spread_of(wrapper)
    model.c3a.delete_adapter("second")
    model.c3a.set_adapter("default")
    found["second deleted"] = spread_of(wrapper)
    loaded = c3a_triton.load_adapter(ddp(Model()), folder, is_trainable=True)
    found["loaded"] = spread_of(loaded)
    biases = c3a_triton.apply(ddp(Model()), replace(kernels, bias="all"))
    found["biases"] = spread_of(biases)

    hooked = ddp(Model())
    hooked.register_comm_hook(None, default_hooks.allreduce_hook)
    built_in = ddp(Model())
    built_in._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    around = nn.ModuleDict({"part": ddp(Model())})
    base = ddp(Model())
    found["said"] = {
        "hook": message(lambda: c3a_triton.apply(hooked, kernels)),
        "built-in hook": message(lambda: c3a_triton.apply(built_in, kernels)),
        "static": message(lambda: c3a_triton.apply(ddp(Model(), static_graph=True), kernels)),
        "of its own": message(lambda: c3a_triton.apply(type("Own", (ddp,), {})(Model()), kernels)),
        "part": message(lambda: c3a_triton.apply(around, kernels)),
        "nested": message(lambda: c3a_triton.apply(nn.DataParallel(ddp(Model())), kernels)),
        "fsdp1": message(lambda: c3a_triton.apply(fsdp1(Model()), kernels)),
        "frozen": message(lambda: c3a_triton.load_adapter(base, folder)),
    }
    found["unchanged"] = spread_of(base)
    found["adapters left"] = [name for name, module in base.named_modules() if hasattr(module, "c3a_kernel")]
    return found


def reloaded(folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return c3a_triton.load_adapter(Model(), folder).c3a.state_dict()


class Reader(nn.Module):
    """An embedding, a block, and an output layer that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(10, WIDTH), nn.Sequential(Block())
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.words.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.words(ids)))


def reader() -> Any:
    torch.manual_seed(0)
    return Reader()


def with_tokens(way: str, folder: Path) -> dict[str, Any]:
    """Rows of tokens, trained by two processes and by one; saved, loaded alone, merged and brought back."""
    config = C3AConfig(block_size=4, target_modules=["up"], trainable_token_indices=[7, 2], init_weights="gaussian")
    ids = torch.tensor([[1, 7], [2, 4], [7, 7], [2, 9]])

    def train(model: nn.Module, rank: int = 0, n_processes: int = 1) -> None:
        update = by_torch(model)
        for _ in range(STEPS):
            update(model(ids[rank::n_processes]).square().mean())

    alone, model = (c3a_triton.apply(reader(), config) for _ in range(2))
    start = {name: tensor.clone() for name, tensor in model.c3a.state_dict().items()}
    train(alone)
    wrapped = WAYS[way](model)
    train(wrapped, dist.get_rank(), dist.get_world_size())
    whole = FullyShardedDataParallel.summon_full_params if way == "fsdp1" else nullcontext
    with whole(wrapped):
        model.c3a.save_pretrained(folder)
        after = {name: tensor.clone() for name, tensor in model.c3a.state_dict().items()}
    dist.barrier()
    if way == "ddp":  # the others have sharded the weights
        model.c3a.merge_adapter()
        model.c3a.unmerge_adapter()
        after = model.c3a.state_dict()
    loaded = c3a_triton.load_adapter(reader(), folder).c3a.state_dict()
    expected = alone.c3a.state_dict()
    same = all(tensor.equal(loaded[name.replace("_fsdp_wrapped_module.", "")]) for name, tensor in after.items())
    return differences((torch.zeros(1), torch.zeros(1)), loaded, expected, start) | {"same afterwards": same}


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused(folder: Path) -> dict[str, str]:
    """What is said about layers that FSDP2 has sharded, and nothing about those beside a tensor-parallel plan."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"blocks.0.up": ColwiseParallel(), "blocks.0.down": RowwiseParallel()}

    def beside(config: C3AConfig) -> None:
        parallelize_module(build(config), mesh, plan)(torch.randn(ROWS, WIDTH))

    return {
        "adapt fsdp2": message(lambda: c3a_triton.apply(sharded(Model()), CONFIG)),
        "load fsdp2": message(lambda: c3a_triton.load_adapter(sharded(Model()), folder)),
        "beside the plan": message(lambda: beside(C3AConfig(block_size=4, target_modules=["1.up"]))),
    }


# DeepSpeed's ZeRO-3


def zero_config(**changes: Any) -> dict[str, Any]:
    """Nothing is kept whole, however small, and nothing clipped, as DeepSpeed does unless told otherwise."""
    return {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    } | changes


def build_from_parts() -> Any:
    """The adapter put into a model that was built in parts, as transformers builds it where ZeRO-3 is configured."""
    import deepspeed

    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=zero_config()):
        model = Model()
    return c3a_triton.apply(model, CONFIG)


def build_by_peft() -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.C3AConfig(
        block_size=4, target_modules=["up", "down"], modules_to_save=["head"], init_weights="gaussian"
    )
    return c3a_triton.apply(peft.get_peft_model(Model(), config))


ZERO_WAYS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "apply": (build, build, {}),
    "apply, small ones whole": (build, build, {"zero_optimization": {"stage": 3}}),
    "a base in parts": (build, build_from_parts, {}),
    "PEFT": (build_by_peft, build_by_peft, {}),
}


def of_adapter(model: Any) -> dict[str, Tensor]:
    """An adapter's tensors; every process calls."""
    if hasattr(model, "c3a"):
        return {name: tensor.clone() for name, tensor in model.c3a.state_dict().items()}
    import deepspeed
    import peft

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}


def zero3(way: str, folder: Path) -> dict[str, Any]:
    """As `spread`."""
    import deepspeed

    build_alone, build_model, changes = ZERO_WAYS[way]
    alone = build_alone()
    start = of_adapter(alone)
    expected = train(alone, by_torch(alone))
    model = build_model()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=zero_config(**changes))
    empty = all(parameter.numel() == 0 for parameter in model.parameters())

    def update(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    losses = train(engine, update, dist.get_rank(), dist.get_world_size())
    found = of_adapter(model)
    if hasattr(model, "c3a"):
        model.c3a.save_pretrained(folder)
        found = reloaded(folder)
    return differences((losses, expected), found, of_adapter(alone), start) | {
        "in parts": empty,
        "refused": {} if way != "apply" else refused_in_parts(model),
    }


def refused_in_parts(model: Any) -> dict[str, str]:
    (_, layer), *_ = model.c3a.layers()
    return {
        "delta": message(lambda: layer.get_delta_weight("default")),
        "function": message(lambda: c3a_triton.circulant_linear(torch.randn(2, WIDTH), layer.c3a_kernel["default"])),
    }


def main(folder: Path, cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run = {"torch": (WAYS, spread), "zero3": (ZERO_WAYS, zero3)}[cases]
    results: dict[str, Any] = {}
    for way in run[0]:
        try:
            results[way] = run[1](way, folder / way)
        except Exception:
            results[way] = traceback.format_exc()
    if cases == "torch":
        results["refused"] = refused(folder / "fsdp2")
        results["tokens"] = {way: with_tokens(way, folder / f"tokens {way}") for way in ("ddp", "fsdp2", "fsdp1")}
        results["through wrappers"] = through_wrappers(folder / "ddp")
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    # One in ten interpreters that end here is aborted by a thread of torch's own. What counts is written by now.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
