"""What is lost when a trained C3A adapter is made into a LoRA by singular values: `python examples/to_lora.py`.

A byte-level Llama of width 128 learns English, a C3A adapter teaches it Python, as in `demo.py` and without a network.
Then each ΔW is cut down to its r largest singular values, which no LoRA of rank r can better, and held-out text is read
again. A circulant's singular values are the magnitudes of a Fourier transform: none of them is small, so nothing can be
left out. About a minute of one CPU core.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpus
import torch
import transformers
from demo import C3A_LEARNING_RATE, load_model, prepare
from rich.progress import Progress
from torch import Tensor
from training import SHORT, Size, bits_per_byte, train_base

import c3a_triton

RANKS = (8, 16, 32, 64, 96, 128)


def truncated(delta_weight: Tensor, rank: int) -> Tensor:
    """The matrix of this rank that is nearest to ΔW `(out_features, in_features)`, as a LoRA would hold it."""
    u, sigma, vh = torch.linalg.svd(delta_weight, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vh[:rank]


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Train, cut, and print a line for each rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--short", action="store_true", help="a few steps of a tiny model, to see that it runs")
    args = parser.parse_args(argv)
    size = SHORT if args.short else Size(width=128, layers=2)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)

    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as base, Progress(disable=True) as progress, torch.enable_grad():
        train_base(Path(base), size, device, progress)
        text = corpus.split(corpus.standard_library())
        job = prepare(Path(base), text, size.steps, size, device, progress, lr_scale=1.0)
        config = c3a_triton.C3AConfig(block_size=args.block_size, target_modules="all-linear")
        model: Any = c3a_triton.apply(load_model(Path(base), device), config)
        run = job.train("C3A", model, C3A_LEARNING_RATE)

    layers = [layer for _, layer in model.c3a.layers()]
    weights = [layer.base_layer.weight.clone() for layer in layers]
    updates = [layer.get_delta_weight("default") for layer in layers]
    norm = torch.stack([update.norm() for update in updates]).norm()
    print(f"{'':16}{'parameters':>12}{'norm lost':>12}{'bits per byte':>16}")
    print(f"{'base':16}{0:12,}{'':12}{run.before:16.3f}")
    print(f"{f'C3A, b = {args.block_size}':16}{run.trainable_parameters:12,}{'0 %':>12}{run.after:16.3f}")
    for rank in RANKS:
        lost = []
        for layer, weight, update in zip(layers, weights, updates, strict=True):
            kept = truncated(update, rank)
            layer.base_layer.weight.copy_(weight + kept)
            lost.append((update - kept).norm())
        with model.c3a.disable_adapter():
            after = bits_per_byte(model, job.windows, job.bytes_per_token)
        parameters = rank * sum(sum(update.shape) for update in updates)
        print(f"{f'LoRA, r = {rank}':16}{parameters:12,}{torch.stack(lost).norm() / norm:12.0%}{after:16.3f}")


if __name__ == "__main__":
    main()
