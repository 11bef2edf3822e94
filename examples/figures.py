"""The demo's table and plot."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from training import Run

__all__ = ["plot", "show_table"]


def show_table(console: Console, runs: Iterable[Run]) -> None:
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


def plot(runs: Iterable[Run], path: Path) -> None:
    """Held-out bits per byte of each method over its steps, the training loss faintly behind."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for run, colour, marker in zip(runs, ("#d55e00", "#0072b2", "#7f7f7f"), ("o", "s", "^"), strict=True):
        window = max(1, len(run.training_curve) // 10)
        smooth = [
            statistics.fmean(run.training_curve[max(0, i - window) : i + 1]) for i in range(len(run.training_curve))
        ]
        axes.plot(range(1, len(smooth) + 1), smooth, color=colour, alpha=0.3, linewidth=1)
        steps, values = zip(*run.curve, strict=True)
        axes.plot(steps, values, color=colour, marker=marker, linewidth=2, label=f"{run.method}: {run.after:.3f}")
        axes.axhline(run.before, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("base model", (0, run.before), xytext=(4, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel="step", ylabel="bits per byte", title="Held-out text (bold) and training batches (faint, smoothed)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(title="held-out bits per byte at the end", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
