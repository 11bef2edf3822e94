"""What one of two processes that share a model does: verbs that fail in one of them, or differ, and what comes of it.

Run by torchrun from `test_agreement.py`; the first process writes one JSON object, in which each case has a list with
what every process found.
"""

import importlib.util
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import c3a_triton
from c3a_triton import C3AConfig
from c3a_triton.adapters import merging
from c3a_triton.adapters.saving import AdapterTensors
from c3a_triton.bases.agreement import broadcast, in_step

WIDTH = 8
# Layers in the plan, and one that is not.
LAYERS = C3AConfig(block_size=4, target_modules=["up", "down", "head"], init_weights="gaussian")
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
CASES: dict[str, Callable[[Path], Any]] = {}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head, self.tail = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(torch.tanh(self.head(x + self.down(torch.tanh(self.up(x))))))


def plain() -> Any:
    torch.manual_seed(0)
    return Model()


def spread() -> Any:
    """A model of which each process computes a part."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize_module(plain(), mesh, PLAN)


def adapted(*names: str) -> Any:
    """A spread model with these adapters."""
    model = spread()
    for name in names or ("default",):
        c3a_triton.apply(model, LAYERS, name)
    return model


def by_rank(*values: Any) -> Any:
    """What this process has of these values."""
    return values[dist.get_rank()]


def local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def state(model: Any) -> dict[str, Any]:
    """All that a verb may change, as text and copies."""
    found: dict[str, Any] = {name: local(tensor).clone() for name, tensor in model.named_parameters()}
    found |= {f"{name} wants": tensor.requires_grad for name, tensor in model.named_parameters()}
    found |= {f"{name} is": type(module).__name__ for name, module in model.named_modules()}
    if (manager := getattr(model, "c3a", None)) is not None:
        found |= {"adapters": manager.adapters, "active": manager.active_adapters, "merged": manager._merged()}
        found["scaling"] = [dict(layer.scaling) for _, layer in manager.layers()]
    return found


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def said(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def tried(model: Any, function: Callable[[], Any]) -> dict[str, Any]:
    """What is said, whether the model is what it was, and whether the processes go on together."""
    before = state(model)
    text = said(function)
    unchanged = equal(before, state(model))
    torch.manual_seed(1)
    y = model(torch.randn(3, WIDTH)).detach()
    both = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(both, y)
    return {"said": text, "unchanged": unchanged, "together": torch.equal(*both)}


def case(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CASES[function.__name__] = function
    return function


# Adding and loading


@case
def adapters_of_other_names(folder: Path) -> Any:
    model = spread()
    return tried(model, lambda: c3a_triton.apply(model, LAYERS, by_rank("one", "two")))


@case
def other_block_sizes(folder: Path) -> Any:
    model = spread()
    return tried(model, lambda: c3a_triton.apply(model, C3AConfig(block_size=by_rank(4, 2), target_modules=["head"])))


@case
def other_targets(folder: Path) -> Any:
    model = spread()
    return tried(
        model, lambda: c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=[by_rank("head", "tail")]))
    )


@case
def targets_in_another_order(folder: Path) -> Any:
    model, names = spread(), by_rank(["head", "tail"], ["tail", "head"])
    return tried(model, lambda: c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=names)))


@case
def a_model_whose_layers_have_another_order(folder: Path) -> Any:
    model = spread()
    if dist.get_rank():
        model.register_module("head", model._modules.pop("head"))
    return tried(model, lambda: c3a_triton.apply(model, C3AConfig(block_size=4, target_modules={"head", "tail"})))


@case
def a_block_size_that_fits_one(folder: Path) -> Any:
    model = spread()
    return tried(model, lambda: c3a_triton.apply(model, C3AConfig(block_size=by_rank(4, 5), target_modules=["head"])))


@case
def a_backend_that_one_does_not_know(folder: Path) -> Any:
    model = spread()
    return tried(model, lambda: c3a_triton.apply(model, LAYERS, backend=by_rank("auto", "nonsense")))


@case
def a_second_adapter_that_one_has(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: c3a_triton.apply(model, LAYERS, by_rank("three", "two")))


def saved(folder: Path, seed: int = 0) -> Path:
    """An adapter's folder of this process alone."""
    folder = folder / f"rank{dist.get_rank()}"
    model = c3a_triton.apply(plain(), LAYERS)
    torch.manual_seed(seed)
    nn.init.normal_(model.head.c3a_kernel["default"])
    model.c3a.save_pretrained(folder)
    return folder


@case
def files_with_other_values(folder: Path) -> Any:
    model, directory = spread(), saved(folder, seed=dist.get_rank())
    return tried(model, lambda: c3a_triton.load_adapter(model, directory))


@case
def a_file_that_one_does_not_have(folder: Path) -> Any:
    model, directory = spread(), by_rank(saved(folder), folder / "nowhere")
    return tried(model, lambda: c3a_triton.load_adapter(model, directory))


@case
def equal_files_in_other_folders(folder: Path) -> Any:
    model, directory = spread(), saved(folder)
    text = said(lambda: c3a_triton.load_adapter(model, directory))
    return {"said": text, "adapters": list(model.c3a.adapters)}


@case
def swapped_for_other_values(folder: Path) -> Any:
    model, directory = adapted(), saved(folder, seed=dist.get_rank())
    return tried(model, lambda: model.c3a.hotswap_adapter(directory))


@case
def swapped_for_a_file_that_one_does_not_have(folder: Path) -> Any:
    model, directory = adapted(), by_rank(saved(folder), folder / "nowhere")
    return tried(model, lambda: model.c3a.hotswap_adapter(directory))


@case
def swapped_for_equal_values(folder: Path) -> Any:
    model, directory = adapted(), saved(folder)
    found = tried(model, lambda: model.c3a.hotswap_adapter(directory))
    return found | {"kernel": model.head.c3a_kernel["default"].sum().item()}


@case
def weighted_with_other_weights(folder: Path) -> Any:
    model = adapted("one", "two")
    weights = [1.0, by_rank(0.5, 0.25)]
    return tried(model, lambda: model.c3a.add_weighted_adapter(["one", "two"], weights, "both"))


@case
def weighted_of_one_that_is_unknown(folder: Path) -> Any:
    model = adapted("one", "two")
    names = ["one", by_rank("two", "three")]
    return tried(model, lambda: model.c3a.add_weighted_adapter(names, [1.0, 1.0], "both"))


# Switching, renaming, removing


@case
def set_to_another(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: model.c3a.set_adapter(by_rank("one", "two")))


@case
def set_in_another_order(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: model.c3a.set_adapter(by_rank(["one", "two"], ["two", "one"])))


@case
def set_with_another_strength(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: model.c3a.set_adapter("two", weights=by_rank(0.5, 0.25)))


@case
def given_another_strength(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: model.c3a.set_scale("one", by_rank(0.5, 0.25)))


@case
def given_a_strength_that_is_none(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: model.c3a.set_scale("one", by_rank(0.5, float("nan"))))


@case
def set_to_one_that_is_unknown(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: model.c3a.set_adapter(by_rank("two", "three")))


@case
def deleted_and_renamed(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(
        model, lambda: by_rank(model.c3a.delete_adapter, partial(model.c3a.rename_adapter, new="three"))("two")
    )


@case
def others_deleted(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: model.c3a.delete_adapter(by_rank("one", "two")))


@case
def renamed_otherwise(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: model.c3a.rename_adapter("one", by_rank("three", "four")))


@case
def rows_of_others(folder: Path) -> Any:
    model = adapted("one", "two")

    def enter() -> None:
        with model.c3a.using(["one", by_rank("one", "two"), "two"]):
            raise AssertionError("entered")

    return tried(model, enter)


# Merging


@case
def other_adapters_merged(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: model.c3a.merge_adapter(by_rank("one", "two")))


@case
def merged_where_the_result_is_finite(folder: Path) -> Any:
    model = adapted()
    with poisoned(model):
        before = state(model)
        text = said(lambda: model.c3a.merge_adapter(safe_merge=True))
        unchanged = equal(before, state(model))
    return tried(model, lambda: None) | {"said": text, "unchanged": unchanged}


@contextmanager
def poisoned(model: Any) -> Iterator[None]:
    """Within it the kernel of the last process alone gives nothing finite."""
    kernel = model.up.c3a_kernel["default"].data
    former = kernel.clone()
    kernel.fill_(by_rank(1.0, torch.inf))
    yield
    kernel.copy_(former)


@case
def merging_that_breaks_in_one(folder: Path) -> Any:
    model = adapted()
    add = merging.add

    def fail(*args: Any) -> None:
        raise MemoryError("out of memory")

    merging.add = by_rank(add, fail)
    try:
        text = said(model.c3a.merge_adapter)
    finally:
        merging.add = add
    model.c3a.unmerge_adapter()
    return tried(model, lambda: None) | {"said": text}


@case
def unmerged_where_the_weight_changed(folder: Path) -> Any:
    model = adapted()
    model.c3a.merge_adapter()
    if dist.get_rank():
        local(model.up.base_layer.weight)[0, 0] += 1
    before = state(model)
    texts = [said(model.c3a.unmerge_adapter), said(model.c3a.unload), said(lambda: model.c3a.set_adapter("default"))]
    texts.append(said(lambda: model.c3a.disable_adapter().__enter__()))
    return {"texts": texts, "unchanged": equal(before, state(model))}


@case
def merged_for_good_and_for_a_while(folder: Path) -> Any:
    model = adapted("one", "two")
    return tried(model, lambda: by_rank(model.c3a.merge_and_unload, model.c3a.merge_adapter)())


@case
def all_goes_well(folder: Path) -> Any:
    """A life in step: the model is one of this library's no longer when it is over."""
    model = adapted("one", "two")
    manager = model.c3a
    manager.set_adapter(["one", "two"])
    manager.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both")
    manager.set_adapter("both")
    manager.merge_adapter()
    manager.unmerge_adapter()
    manager.rename_adapter("both", "sum")
    manager.delete_adapter("two")
    with manager.using(["one", "sum", "__base__"]):
        model(torch.zeros(3, WIDTH))
    with manager.disable_adapter():
        disabled = tried(model, lambda: None)
    kernel = manager.state_dict("sum")["up.c3a_kernel"]
    same = [torch.empty_like(kernel) for _ in range(dist.get_world_size())]
    dist.all_gather(same, kernel)
    merged = manager.merge_and_unload()
    left = {type(module).__module__.partition(".")[0] for module in merged.modules()}
    return {
        "said": disabled["said"],
        "unchanged": disabled["unchanged"] and "c3a_triton" not in left,
        "together": disabled["together"] and torch.equal(*same) and tried(merged, lambda: None)["together"],
    }


@case
def a_step_within_a_step(folder: Path) -> Any:
    """What fails within both, or in the outer one alone, is told once: the processes stay together."""
    model, found = spread(), []

    def fail(inside: bool) -> None:
        with in_step(model, "outer"):
            if dist.get_rank() and not inside:
                raise ValueError("outside")
            with in_step(model, "inner"):
                if dist.get_rank() and inside:
                    raise ValueError("inside")

    for inside in (True, False):
        found.append(tried(model, partial(fail, inside)))
    return found


# First values


@case
def other_seeds(folder: Path) -> Any:
    """Kernels of layers in no plan, and copies that are trained whole, of which each process has drawn its own."""
    model = spread()
    torch.manual_seed(1 + dist.get_rank())
    nn.init.normal_(model.tail.weight)
    c3a_triton.apply(model, replace(LAYERS, modules_to_save=["tail"]))
    tensors = [local(tensor) for tensor in model.c3a.state_dict().values()]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    both = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(both, flat)
    return {"same": torch.equal(*both), "drawn": flat.std().item(), "count": len(tensors)}


@case
def spread_after_it_was_adapted(folder: Path) -> Any:
    """Nobody has agreed on kernels then: those of equal seeds are equal, others are refused by the first call."""
    mesh, found = dist.init_device_mesh("cpu", (dist.get_world_size(),)), []
    plan = {"up.base_layer": ColwiseParallel(), "down.base_layer": RowwiseParallel()}
    for seeds in ((0, 0), (0, 1)):
        model = plain()
        torch.manual_seed(by_rank(*seeds))
        parallelize_module(c3a_triton.apply(model, LAYERS), mesh, plan)
        found.append([said(lambda model=model: model(torch.zeros(3, WIDTH))) for _ in range(2)])
    model, other = adapted(), adapted()
    torch.manual_seed(dist.get_rank())
    model.up.reset_c3a_parameters("default", "gaussian")
    other.up.update_layer("default", 4, "gaussian")
    found.append([said(partial(drawn, torch.zeros(3, WIDTH))) for drawn in (model, other)])
    return found


@case
def parts_that_processes_divide(folder: Path) -> Any:
    """What is divided over one mesh stays so, whatever other meshes of these processes there are."""
    tp, ep = (dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(name,)) for name in ("tp", "ep"))
    whole, value = torch.zeros(2, 3), float(dist.get_rank() + 1)
    divided = distribute_tensor(whole, ep, [Shard(0)])
    for tensor in (whole, local(divided)):
        tensor.fill_(value)
    broadcast([tp, ep], [divided, whole])
    return {"divided": local(divided).tolist(), "whole": whole.tolist()}


@case
def a_plan_beside_data_parallel(folder: Path) -> Any:
    """Processes that share no layer share no adapter either: what they do is DDP's to keep in step."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(plain(), mesh["tp"], PLAN)
    return said(lambda: c3a_triton.apply(model, LAYERS, by_rank("one", "two")))


# Saving


@contextmanager
def writers() -> Iterator[list[str]]:
    """The folders that this process writes adapters into."""
    written: list[str] = []
    write = AdapterTensors.write

    def noted(self: AdapterTensors, directory: Any, tensors: Any) -> None:
        written.append(Path(directory).name)
        write(self, directory, tensors)

    AdapterTensors.write = noted  # type: ignore[method-assign]
    try:
        yield written
    finally:
        AdapterTensors.write = write  # type: ignore[method-assign]


@case
def saved_by_all_and_loaded_at_once(folder: Path) -> Any:
    model = adapted()
    kernel = model.head.c3a_kernel["default"]
    found = []
    with writers() as written:
        for value in range(5):
            kernel.data.fill_(value)
            model.c3a.save_pretrained(folder / "all")
            c3a_triton.load_adapter(model, folder / "all", f"copy{value}")
            model.c3a.hotswap_adapter(folder / "all", "copy0")
            found.append([local(model.head.c3a_kernel[name]).max().item() for name in (f"copy{value}", "copy0")])
    return {"found": found, "written": written}


@case
def saved_by_the_first_alone(folder: Path) -> Any:
    model = adapted()
    with writers() as written:
        if dist.get_rank() == 0:
            model.c3a.save_pretrained(folder / "first")
    return written


@case
def kernels_that_fsdp_divides(folder: Path) -> Any:
    """The plan's mesh has one process here, FSDP2's has two: what they divide is put together by all."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = c3a_triton.apply(parallelize_module(plain(), mesh["tp"], PLAN), LAYERS)
    expected = {name: tensor.clone() for name, tensor in model.c3a.state_dict().items()}
    fully_shard(model, mesh=mesh["dp"])
    with writers() as written:
        model.c3a.save_pretrained(folder / "divided")
    alone = c3a_triton.load_adapter(plain(), folder / "divided")
    return {"written": written, "equal": equal(expected, alone.c3a.state_dict())}


# What cannot be had beside a plan


@case
def built_by_peft(folder: Path) -> Any:
    """PEFT draws kernels by layer and process, and knows no agreement."""
    if importlib.util.find_spec("peft") is None:
        return None
    import peft

    from c3a_triton.integrations.peft import patch_peft, unpatch_peft

    config = peft.C3AConfig(block_size=4, target_modules=["head"])
    model, built = spread(), peft.get_peft_model(spread(), config)
    patch_peft()
    try:
        patched = tried(model, lambda: peft.get_peft_model(model, config))
    finally:
        unpatch_peft()
    return patched | {"converted": said(lambda: c3a_triton.apply(built)), "class": type(built.head).__module__}


@case
def trained_whole_in_the_plan(folder: Path) -> Any:
    model = spread()
    config = C3AConfig(block_size=4, target_modules=["head"], modules_to_save=["up"])
    return tried(model, lambda: c3a_triton.apply(model, config))


@case
def biases_in_the_plan(folder: Path) -> Any:
    model = spread()
    config = C3AConfig(block_size=4, target_modules=["head"], bias="all")
    return tried(model, lambda: c3a_triton.apply(model, config))


@case
def biases_outside_the_plan(folder: Path) -> Any:
    model = spread()
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["head"], bias="c3a_only"))
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


# Models of transformers, spread as they are loaded

QUERIES = C3AConfig(block_size=4, target_modules=["q_proj", "o_proj"], init_weights="gaussian")


def whole_llama(*, tied: bool = False) -> Any:
    from tiny_models import llama

    return llama(tied=tied, num_key_value_heads=2)


def llama(folder: Path, *, tied: bool = False, plan: dict[str, str] | None = None) -> Any:
    """A tiny Llama, of which each process loads its part, by the plan of its class or by another."""
    import transformers

    if dist.get_rank() == 0:
        whole_llama(tied=tied).save_pretrained(folder / "base")
    dist.barrier()
    distributed = transformers.DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=distributed)


@case
def counted_in_a_llama(folder: Path) -> Any:
    model, alone = c3a_triton.apply(llama(folder), QUERIES), c3a_triton.apply(whole_llama(), QUERIES)
    counts = [list(each.c3a.get_nb_trainable_parameters()) for each in (model, alone)]
    return {"counts": counts, "summary": model.c3a.summary() == alone.c3a.summary()}


@case
def a_llama_saved_by_all(folder: Path) -> Any:
    """The model's own `save_pretrained`, which puts the base together: every process has to call."""
    model = c3a_triton.apply(llama(folder), QUERIES)
    c3a_triton.apply(model, QUERIES, "second")
    with writers() as written:
        model.save_pretrained(folder / "model", is_main_process=dist.get_rank() == 0)
    alone = c3a_triton.load_adapter(whole_llama(), folder / "model")
    c3a_triton.load_adapter(alone, folder / "model" / "second", "second")
    return {
        "written": written,
        "equal": [equal(model.c3a.state_dict(name), alone.c3a.state_dict(name)) for name in ("default", "second")],
        "weights": (folder / "model" / "model.safetensors").exists(),
    }


@case
def a_llama_with_embeddings_in_the_file(folder: Path) -> Any:
    """What the file takes along of the base is put together, and taken apart again: every process calls."""
    from transformers import LlamaConfig

    # Plans of transformers 5.17 leave embeddings whole unless they are named.
    styles = {"embed_tokens": "embedding_rowwise", **LlamaConfig.base_model_tp_plan}
    spread_llama = partial(llama, folder, plan={f"model.{name}": style for name, style in styles.items()})
    model = c3a_triton.apply(spread_llama(), QUERIES)
    embeddings = model.get_input_embeddings().weight
    local(embeddings).mul_(2)
    with writers() as written:
        model.c3a.save_pretrained(folder / "adapter", save_embedding_layers=True)
    alone = c3a_triton.load_adapter(whole_llama(), folder / "adapter")
    again = c3a_triton.load_adapter(spread_llama(), folder / "adapter")
    swapped = c3a_triton.apply(spread_llama(), QUERIES)
    swapped.c3a.hotswap_adapter(folder / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        c3a_triton.load_adapter(swapped, folder / "adapter", "again")
        local(swapped.get_input_embeddings().weight).zero_()
        c3a_triton.load_adapter(swapped, folder / "adapter", "once more")
    expected = local(embeddings)
    return {
        "written": written,
        "whole": torch.equal(embeddings.full_tensor(), alone.get_input_embeddings().weight),
        "parts": [torch.equal(local(each.get_input_embeddings().weight), expected) for each in (again, swapped)],
        "kernels": equal(again.c3a.state_dict(), alone.c3a.state_dict()),
        "warned": ["take the place of the model's" in str(warning.message) for warning in caught].count(True),
    }


@case
def one_of_two_tied_layers(folder: Path) -> Any:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    head = parallelize_module(whole_llama(tied=True), mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    both = llama(folder, tied=True)
    return {
        "one": said(lambda: c3a_triton.apply(head, QUERIES)),
        "both": said(lambda: c3a_triton.apply(both, QUERIES)),
        "still one": both.lm_head.weight is both.model.embed_tokens.weight,
    }


@case
def a_tied_head_is_adapted(folder: Path) -> Any:
    """The head computes with its adapter and the embedding without, until both have it merged, as in one process."""
    from tiny_models import IDS

    outputs = []
    config = replace(QUERIES, target_modules=["q_proj", "lm_head"])
    for model in (llama(folder, tied=True), whole_llama(tied=True)):
        torch.manual_seed(0)
        c3a_triton.apply(model, config)
        steps = [lambda: None, model.c3a.merge_adapter, model.c3a.unmerge_adapter, model.c3a.merge_and_unload]
        outputs.append([(step(), model(IDS).logits.detach())[1] for step in steps])
        tied = model.lm_head.weight is model.model.embed_tokens.weight
    spread, alone = outputs
    return {
        "errors": [float((one - other).abs().max()) for one, other in zip(spread, alone, strict=True)],
        "moved": float((alone[1] - alone[0]).abs().max()),
        "bits": torch.equal(spread[2], spread[0]),
        "tied": tied,
    }


@case
def heads_in_the_plan(folder: Path) -> Any:
    model = llama(folder)
    config = C3AConfig(block_size=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return said(lambda: c3a_triton.apply(model, config))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    results: dict[str, Any] = {}
    for name, run in CASES.items():
        try:
            found = run(folder / name)
        except Exception:
            found = traceback.format_exc()
        results[name] = [None] * dist.get_world_size()
        dist.all_gather_object(results[name], found)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    # As in `distributed_worker.py`: some interpreters that end here are aborted by a thread of torch's own.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
