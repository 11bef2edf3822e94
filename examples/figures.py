"""The demo's table and plot."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from training import Run

__all__ = ["plot", "show_table"]


def show_table(console: Console, runs: Sequence[Run]) -> None:
    """Every method's row, whoever wins."""
    table = Table(title="Adapting to held-out text", caption_justify="left")
    table.add_column("method", no_wrap=True)
    for header in (
        "trainable parameters",
        "seconds per step",
        "bits/byte before",
        "bits/byte after",
        "adapter on disk",
    ):
        table.add_column(header, justify="right")
    for run in runs:
        cells = (
            f"{run.trainable_parameters:,}",
            f"{run.seconds_per_step:.3f}",
            f"{run.before:.3f}",
            f"{run.after:.3f}",
        )
        table.add_row(run.method, *cells, f"{run.adapter_bytes / 1024:.0f} KiB")
    console.print(table)
    console.print(
        "Seconds per step: medians of one run. PEFT's C3A computes a wrong gradient with respect to a layer's input,\n"
        "so its adapters below the top layer train on wrong gradients; c3a_triton's do not.",
        highlight=False,
    )


def plot(runs: Sequence[Run], path: Path) -> None:
    """Each method's loss on its training batches (smoothed) and on held-out text, in bits per byte, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    figure, (training, held_out) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for run, colour, marker in zip(runs, ("#d55e00", "#0072b2", "#6b6b6b"), ("o", "s", "^"), strict=True):
        losses = run.training_curve
        window = max(1, len(losses) // 5)
        smooth = [statistics.fmean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
        training.plot(range(1, len(smooth) + 1), smooth, color=colour, linewidth=1.6)
        steps, values = zip(*run.curve, strict=True)
        label = f"{run.method}: {run.after:.3f}"
        held_out.plot(steps, values, color=colour, marker=marker, linewidth=1.6, label=label)
    held_out.axhline(runs[0].before, color="black", linewidth=0.9, linestyle=":", label=f"base: {runs[0].before:.3f}")
    training.set(title=f"Training batches, mean of the last {window} steps", xlabel="step", ylabel="bits per byte")
    held_out.set(title="Held-out text", xlabel="step", ylabel="bits per byte")
    for axes in (training, held_out):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, title="held-out bits per byte at the end")
    figure.savefig(path, dpi=150)
    plt.close(figure)
