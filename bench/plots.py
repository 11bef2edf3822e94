"""Plots of results, where matplotlib is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["bars", "lines"]


def _panels(n_panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(3, n_panels)
    rows = -(-n_panels // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[n_panels:]:
        unused.set_visible(False)
    return figure, axes


def lines(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path, *, x: str, y: str) -> None:
    """A PNG of line charts on logarithmic axes: panel title → series → points."""
    figure, axes = _panels(len(panels))
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    for axis, (title, panel) in zip(axes, panels.items(), strict=False):
        for name, points in panel.items():
            # A series has one colour in all panels.
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=f"C{names.index(name)}", label=name)
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
        axis.set_xticks(ticks := sorted({point[0] for points in panel.values() for point in points}), labels=ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def bars(panels: Mapping[str, Mapping[str, float]], path: Path, *, y: str) -> None:
    """A PNG of bar charts: panel title → name → value, each bar with its value written on it."""
    figure, axes = _panels(len(panels))
    for axis, (title, panel) in zip(axes, panels.items(), strict=False):
        drawn = axis.bar(list(panel), list(panel.values()), color=[f"C{i}" for i in range(len(panel))])
        axis.bar_label(drawn, fmt="%.3g", fontsize="small")
        axis.set(title=title, ylabel=y)
        axis.tick_params(axis="x", labelrotation=30)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
