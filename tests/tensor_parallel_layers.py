"""One tensor-parallel layer in every way of spreading it, and what the cases of all processes are compared with.

Of `tensor_parallel_worker.py`.
"""

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
import transformers
from oracle import dense, weight_grad
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from c3a_triton import C3ALinear
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


def attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception:
        return traceback.format_exc()


def is_ours(value: Any) -> bool:
    return type(value).__module__.startswith("c3a_triton")


def left_in(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    cells = getattr(forward, "__closure__", None) or ()
    return any(map(is_ours, [forward, *(cell.cell_contents for cell in cells)]))


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
SIZES = {2: ((24, 24), (12, 18), (18, 12)), 4: ((12, 18), (6, 6))}
# Before 5.23 styles of transformers take parts for equal ones.
NEEDS_EQUAL_PARTS = Version(transformers.__version__) < Version("5.23")
EQUAL_SIZES = {2: SIZES[2], 4: ((16, 24), (8, 8))}


def known_ways() -> list[str]:
    """All but what transformers 5.17 has no style for and what torch 2.11 does not compute, adapters or none."""
    missing = set() if "replicate" in ALL_PARALLEL_STYLES else {"replicate"}
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    tokens = DTensor.from_local(torch.zeros(2, 2, 2), mesh, [Shard(1)])
    weight = DTensor.from_local(torch.zeros(2, 2), mesh, [Replicate()])
    try:
        nn.functional.linear(tokens, weight)
    except RuntimeError:  # 2.11 views x as one list of tokens, and finds that rows of spread ones are no such list
        missing.add("sequence_parallel")
    return [way for way in WAYS if way not in missing]


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

    layer(x_part(x))  # the first call has the processes compare their kernels
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
    for number, way in enumerate(known_ways()):
        sizes = EQUAL_SIZES if NEEDS_EQUAL_PARTS and not way.startswith("torch") else SIZES
        for in_features, out_features in sizes[dist.get_world_size()]:
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
