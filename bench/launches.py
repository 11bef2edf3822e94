"""Launches and bytes of a layer's step, counted: `python -m bench.launches` prints the tables of docs/kernels.md.

Nothing computes: tensors are on the meta device, Triton's launches are replaced. A launch is a Triton kernel, or a call
of an aten function that is neither a view nor an allocation (cuFFT may launch more than one for it). Its bytes are its
tensor arguments read once and its results written once, as if no cache held anything from one launch to the next.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from c3a_triton.benchmark import cases, peers
from c3a_triton.operator import arguments, calls, routes
from c3a_triton.operator.launch import specs
from c3a_triton.operator.routed import c3a_routed, grouped_base

from . import overhead, report

__all__ = ["CASE", "EXPERTS", "Count", "Experts", "experts_step", "experts_table", "main", "step", "table"]

CASE = cases.LayerCase(8192, 4096, 4096, 128)
METHODS = ("ours:direct", "ours:fft", "ours:expand", "ours:fold", "ours:torch", "peft_c3a", "peft_lora", "base")
META = torch.device("meta")
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Experts:
    """The stacked experts of a layer, each with gate, up and down."""

    n_tokens: int
    top_k: int = 8
    n_experts: int = 128
    hidden: int = 2048
    intermediate: int = 768
    b: int = 128


EXPERTS = (Experts(8192), Experts(1))  # of Qwen3-30B-A3B
EXPERTS_BACKENDS = ("fft", "direct", "base")


@dataclass
class Count:
    """What is launched, by name and in order, and the bytes that it reads and writes."""

    names: list[str] = field(default_factory=list)
    n_bytes: int = 0

    def add(self, name: str, tensors: list[Tensor]) -> None:
        """One launch that reads or writes these tensors, each as often as it is listed."""
        self.names.append(name)
        self.n_bytes += sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors)


class _Aten(TorchDispatchMode):
    """Adds the aten calls that take a launch to a count."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if not (func.is_view or name in ("detach", "_unsafe_view") or "empty" in name):
            read = args[1:] if kwargs.get("beta") == 0 else args
            tensors = [
                leaf for leaf in tree_leaves((read, kwargs, result)) if isinstance(leaf, Tensor) and leaf.is_meta
            ]
            if tensors:
                self.count.add(name, tensors)
        return result


@contextmanager
def _counted(count: Count | None = None) -> Iterator[Count]:
    """What is launched within, in a new count or added to a given one."""
    count = count or Count()

    def launched(kernel: Any, **arguments: Any) -> None:
        tensors = [value for name, value in arguments.items() if name.endswith("_ptr") and value is not None]
        if arguments.get("ACCUMULATE"):
            tensors.append(arguments["out_ptr" if "out_ptr" in arguments else "sums_ptr"])  # read before it is written
        count.add(kernel.__name__, tensors)

    with (
        overhead.stubbed_launches(launched),
        # Meta tensors take the path of real ones, with the tiles of the card that the goals are set for.
        mock.patch.object(arguments, "is_plain", return_value=True),
        mock.patch.object(specs, "card_of", return_value="sm_90"),
        _Aten(count),
    ):
        yield count


def step(method: str, case: cases.LayerCase = CASE) -> tuple[Count, Count]:
    """Forward and backward of one layer over a frozen base; "ours:fold" takes its gradient of w by "fft".

    Raises:
        ImportError: Triton, or for its layers PEFT, is not installed.
    """
    base, w = peers.frozen_base(case, META), peers.kernel_values(case, META).requires_grad_()
    x = torch.empty(case.n_tokens, case.in_features, device=META, dtype=getattr(torch, case.dtype)).requires_grad_()
    trained: tuple[Tensor, ...] = (w,)
    layer: Callable[[Tensor], Tensor]
    if method.startswith("ours:"):
        # Not our module, which sends meta tensors another way.
        layer = partial(
            calls.c3a_linear, weight=base.weight, bias=None, kernels=trained, backend=method.removeprefix("ours:")
        )
    else:
        layer = module = peers.build(method, base, case, w)
        trained = peers.trained(module)
    with mock.patch.dict("os.environ", {"C3A_TRITON_BACKEND": "fft"}):
        with _counted():
            layer(x)  # builds what is kept from call to call
        with _counted() as forward:
            y = layer(x)
        with _counted() as backward:
            torch.autograd.grad(y, (x, *trained), torch.empty_like(y))
    return forward, backward


def experts_step(backend: str, case: Experts = EXPERTS[0]) -> tuple[Count, Count]:
    """Forward and backward of both projections of experts over frozen bf16 weights, tiles of rows included.

    What lies between them and around them (the activation, the sort, the sum over choices) is the model's own.

    Raises:
        ImportError: Triton is not installed.
    """
    size, hidden, inter, b = case.n_experts, case.hidden, case.intermediate, case.b

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=META)

    def project(x: Tensor, weight: Tensor, w: Tensor, of: routes.Routes, gather: bool) -> Tensor:
        if backend == "base":
            return grouped_base(x[of.source] if gather else x, weight, of.offsets, False, False)
        return c3a_routed(x, weight, None, (w,), of, gather=gather, backend=backend)

    weights = tensor(size, 2 * inter, hidden), tensor(size, hidden, inter)
    kernels = [
        tensor(size, weight.shape[1] // b, weight.shape[2] // b, b, dtype=torch.float32).requires_grad_()
        for weight in weights
    ]
    x = tensor(case.n_tokens, hidden).requires_grad_()
    # What is kept from call to call is there after the first.
    for forward, backward in ((Count(), Count()), (first := Count(), second := Count())):
        of = routes.make(tensor(case.n_tokens, case.top_k, dtype=torch.int64), size)
        with _counted(forward):
            up = project(x, weights[0], kernels[0], of, True)
        h = up.detach()[:, :inter].contiguous().requires_grad_()
        with _counted(forward):
            y = project(h, weights[1], kernels[1], of, False)
        for result, source, w in ((y, h, kernels[1]), (up, x, kernels[0])):
            dy, trained = torch.empty_like(result), () if backend == "base" else (w,)
            with _counted(backward):
                torch.autograd.grad(result, (source, *trained), dy)
    return first, second


def experts_table() -> str:
    """Launches and bytes of `EXPERTS`, in markdown."""
    found = [
        [str(case.n_tokens), backend, direction, str(len(count.names)), f"{count.n_bytes / 1e6:.0f}"]
        for case in EXPERTS
        for backend in EXPERTS_BACKENDS
        for direction, count in zip(DIRECTIONS, experts_step(backend, case), strict=True)
    ]
    return report.format_table(["T", "experts", "direction", "launches", "MB"], found)


def _per_token(method: str) -> list[str]:
    """Bytes per token of both directions by both widths, in which they are linear: from counts at six sizes.

    None is wider than `CASE`, so that tokens come in one chunk as there.
    """

    def slopes(case: cases.LayerCase) -> Iterator[float]:
        half = case.n_tokens // 2
        for few, many in zip(step(method, replace(case, n_tokens=half)), step(method, case), strict=True):
            yield (many.n_bytes - few.n_bytes) / half

    narrow = replace(CASE, in_features=CASE.in_features // 2, out_features=CASE.out_features // 2)
    wide_in, wide_out = replace(narrow, in_features=CASE.in_features), replace(narrow, out_features=CASE.out_features)
    return [
        f"{(more_in - start) / narrow.in_features:.3g}·in + {(more_out - start) / narrow.out_features:.3g}·out"
        for start, more_in, more_out in zip(slopes(narrow), slopes(wide_in), slopes(wide_out), strict=True)
    ]


def table(methods: tuple[str, ...] = METHODS) -> str:
    """Launches, bytes per token in activations and all bytes of `CASE`, in markdown."""
    found = [
        [method.removeprefix("ours:"), direction, str(len(count.names)), per_token, f"{count.n_bytes / 1e6:.0f}"]
        for method in methods
        for direction, count, per_token in zip(DIRECTIONS, step(method), _per_token(method), strict=True)
    ]
    return report.format_table(["layer", "direction", "launches", "bytes per token", "MB"], found)


def main() -> int:
    """Print the tables, and every launch by name; returns the exit status."""
    print(table())
    print(experts_table())
    for method in METHODS:
        for direction, count in zip(DIRECTIONS, step(method), strict=True):
            print(f"{method}, {direction}: {', '.join(count.names)}")
    for backend in EXPERTS_BACKENDS:
        for direction, count in zip(DIRECTIONS, experts_step(backend), strict=True):
            print(f"experts by {backend}, {direction}: {', '.join(count.names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
