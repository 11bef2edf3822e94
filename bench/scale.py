"""What C3A adds to models spread over many GPUs, on paper: `python -m bench.scale` writes docs/scale.md's tables.

Nothing is measured. Messages and bytes are those of transformers' plans (each colwise layer reduces its own input
gradient, each rowwise layer its output) and of this library (one reduction of dw for each adapted layer of the plan);
tests count them for two and four processes. Collectives are rings: of n bytes over N GPUs each GPU sends
2 (N - 1) / N n to reduce them, and half of it to gather, scatter or exchange them. Times are the cost model's.
"""

import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch

from c3a_triton.operator import cost_model, dispatch

from . import ROOT, report

__all__ = ["DENSE", "MOE", "Layer", "Linear", "Traffic", "adapter_traffic", "frozen_traffic", "main", "section"]

DOCUMENT = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- bench.scale: begin -->", "<!-- bench.scale: end -->"
TOKENS = 8192  # of a batch that the GPUs of one tensor-parallel group share
STATE = 16  # bytes of a trained parameter: itself, its gradient and AdamW's two moments in float32


class Linear(NamedTuple):
    """A linear layer and its style in the plan, `"colwise"` or `"rowwise"`."""

    in_features: int
    out_features: int
    style: str


@dataclass(frozen=True)
class Layer:
    """A decoder layer: its linear layers, and the weights [out, in] of each of its experts, where it has some."""

    hidden: int
    linears: tuple[Linear, ...]
    experts: tuple[tuple[int, int], ...] = ()
    n_experts: int = 0
    top_k: int = 0


# Llama 3.1 70B, 80 layers; Qwen3 235B-A22B, 94 layers: the sizes of their published configurations.
DENSE = Layer(
    8192,
    (
        Linear(8192, 8192, "colwise"),
        Linear(8192, 1024, "colwise"),
        Linear(8192, 1024, "colwise"),
        Linear(8192, 8192, "rowwise"),
        Linear(8192, 28672, "colwise"),
        Linear(8192, 28672, "colwise"),
        Linear(28672, 8192, "rowwise"),
    ),
)
MOE = Layer(
    4096,
    (
        Linear(4096, 8192, "colwise"),
        Linear(4096, 512, "colwise"),
        Linear(4096, 512, "colwise"),
        Linear(8192, 4096, "rowwise"),
    ),
    experts=((3072, 4096), (4096, 1536)),
    n_experts=128,
    top_k=8,
)
N_LAYERS = {DENSE: 80, MOE: 94}


class Traffic(NamedTuple):
    """Collectives of one layer and training step: how many forward and backward, and the bytes that a GPU sends."""

    forward: int
    backward: int
    n_bytes: float

    def plus(self, other: "Traffic") -> "Traffic":
        """Both."""
        return Traffic(self.forward + other.forward, self.backward + other.backward, self.n_bytes + other.n_bytes)


def _ring(n_gpus: int, n_bytes: float) -> float:
    """What each GPU sends to gather, scatter or exchange so many bytes; twice that to reduce them."""
    return (n_gpus - 1) / n_gpus * n_bytes


def _parameters(layer: Layer) -> int:
    """Of the linear layers."""
    return sum(linear.in_features * linear.out_features for linear in layer.linears)


def _expert_parameters(layer: Layer) -> int:
    return layer.n_experts * sum(out * into for out, into in layer.experts)


def frozen_traffic(layer: Layer, tp: int, fsdp: int, ep: int = 1, n_tokens: int = TOKENS) -> Traffic:
    """What the frozen model sends, in bfloat16, where a gradient passes through it.

    Args:
        layer: the layer.
        tp: GPUs of a tensor-parallel group, which share a batch.
        fsdp: groups, over which FSDP2 shards the weights; 1: none.
        ep: GPUs over which the experts are spread, of all tp · fsdp.
        n_tokens: of the batch of one group.
    """
    found, activations = Traffic(0, 0, 0.0), 2 * n_tokens * layer.hidden
    if tp > 1:
        styles = [linear.style for linear in layer.linears]
        n_rowwise, n_colwise = styles.count("rowwise"), styles.count("colwise")
        found = Traffic(n_rowwise, n_colwise, (n_rowwise + n_colwise) * 2 * _ring(tp, activations))
    if fsdp > 1:  # the weights are gathered for each direction
        found = found.plus(Traffic(1, 1, 2 * _ring(fsdp, 2 * _parameters(layer) / tp)))
    if ep > 1:
        routed = 2 * n_tokens / tp * layer.top_k * layer.hidden
        found = found.plus(Traffic(3, 2, 4 * _ring(ep, routed)))  # there and back; counts, a few bytes, before it
        if tp > 1:  # a group's parts of the batch, and the gradients of the routing's weights
            found = found.plus(Traffic(1, 2, 2 * _ring(tp, activations) + _ring(tp, 2 * n_tokens * layer.top_k)))
    return found


def adapter_traffic(layer: Layer, b: int, tp: int, fsdp: int) -> Traffic:
    """What C3A adds: one reduction of dw for each adapted layer of the plan, and FSDP2's of the kernels.

    Kernels of experts stay where their experts are.
    """
    n_bytes = 4 * _parameters(layer) / b
    found = Traffic(0, len(layer.linears), 2 * _ring(tp, n_bytes)) if tp > 1 else Traffic(0, 0, 0.0)
    if fsdp > 1:  # gathered with the weights, no message of their own; dw scattered
        found = found.plus(Traffic(0, 1, 3 * _ring(fsdp, n_bytes)))
    return found


def _state(layer: Layer, b: int, fsdp: int, ep: int) -> float:
    """Bytes of kernels, gradients and AdamW's moments on a GPU, of one layer."""
    return STATE / b * (_parameters(layer) / fsdp + _expert_parameters(layer) / ep)


def _covering(width: int, b: int, n_gpus: int) -> int:
    """The widest run of whole blocks that a GPU's part of a width reaches into."""
    share = math.ceil(width / n_gpus)
    starts = range(0, width, share)
    return max(b * (math.ceil(min(start + share, width) / b) - start // b) for start in starts)


def time_ratio(layer: Layer, b: int, tp: int, n_tokens: int = TOKENS) -> float:
    """Predicted time of the adapted linear layers over the frozen ones', both directions, without messages."""
    adapted = frozen = 0.0
    for linear in layer.linears:
        split = [1, tp] if linear.style == "colwise" else [tp, 1]
        n, m = (math.ceil(width / count) for width, count in zip(linear[:2], split, strict=True))
        base = cost_model.base_seconds(cost_model.Sizes(n_tokens, n, m, b, torch.bfloat16))
        n, m = (_covering(width, b, count) for width, count in zip(linear[:2], split, strict=True))
        sizes = cost_model.Sizes(n_tokens, n, m, b, torch.bfloat16)
        frozen += 2 * base
        adapted += 2 * base + sum(
            cost_model.added_seconds(dispatch.cheapest(sizes, backward=backward), sizes, backward=backward)
            for backward in (False, True)
        )
    return adapted / frozen


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.3g}"


def _row(layer: Layer, b: int, tp: int, fsdp: int, ep: int = 1) -> list[str]:
    frozen, added = frozen_traffic(layer, tp, fsdp, ep), adapter_traffic(layer, b, tp, fsdp)
    return [
        f"{frozen.forward} + {frozen.backward}",
        _megabytes(frozen.n_bytes),
        f"{added.forward} + {added.backward}",
        _megabytes(added.n_bytes),
        f"{100 * added.n_bytes / frozen.n_bytes:.2g} %",
        f"{N_LAYERS[layer] * _state(layer, b, fsdp, ep) / 1e9:.3g}",
        f"{time_ratio(layer, b, tp):.2f}",
    ]


COLUMNS = (
    "frozen: messages fwd + bwd",
    "MB",
    "C3A adds: messages",
    "MB",
    "of frozen",
    "adapter state, GB, all layers",
    "time without messages, C3A / frozen, predicted",
)


def dense_table() -> str:
    """70B, all linear layers adapted."""
    rows = [
        [tp * fsdp, f"{tp} × {fsdp}", b, *_row(DENSE, b, tp, fsdp)]
        for tp, fsdp in ((8, 1), (8, 2), (8, 4), (8, 8), (4, 16), (2, 32), (1, 64))
        for b in (128, 1024)
    ]
    return report.format_table(["GPUs", "tp × fsdp", "b", *COLUMNS], rows)


def moe_table() -> str:
    """235B, attention and all experts adapted."""
    rows = [
        [tp * fsdp, f"{tp} × {fsdp}, {ep}", b, *_row(MOE, b, tp, fsdp, ep)]
        for tp, fsdp, ep in ((4, 2, 8), (4, 4, 16), (4, 8, 32), (4, 16, 64), (1, 64, 64))
        for b in (128, 512)
    ]
    return report.format_table(["GPUs", "tp × fsdp, ep", "b", *COLUMNS], rows)


def section() -> str:
    """The text between the markers."""
    return "\n\n".join(
        [
            f"Llama 3.1 70B, one of 80 layers, {TOKENS} tokens for each tensor-parallel group:",
            dense_table(),
            f"Qwen3 235B-A22B, one of 94 layers, {TOKENS} tokens for each tensor-parallel group (the last column is of "
            "attention's linear layers alone):",
            moe_table(),
        ]
    )


def main() -> int:
    """Rewrite the tables; returns the exit status."""
    return report.write_between(DOCUMENT, BEGIN, END, section())


if __name__ == "__main__":
    sys.exit(main())
