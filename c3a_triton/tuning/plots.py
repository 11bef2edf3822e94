"""The pictures of a run: parameters against step time, and times by block size and group. Matplotlib, no display."""

import importlib
import io
import math
from collections.abc import Callable
from typing import Any

from c3a_triton.errors import C3AError

from .outcome import Outcome

__all__ = ["front_svg", "heat_map_svg", "matplotlib_figure", "overview", "png"]

# Inches; letters of 8 points stay readable on a phone, where a picture of the page is about 360 pixels wide.
_WIDTH, _FRONT_HEIGHT = 4.8, 4.2
_SMALL = 8
_CHOSEN = "#c8102e"
_FRONT = "#1f5fa8"
_PEER = "#6b6b6b"
_PEER_MARKS = {"LoRA": "s", "PEFT's C3A": "^"}


def overview(outcome: Outcome) -> Any:
    """Both pictures, one above the other, as a `matplotlib.figure.Figure`."""
    figure = _figure(_FRONT_HEIGHT + _heat_map_height(outcome))
    upper, lower = figure.subplots(2, 1, height_ratios=[_FRONT_HEIGHT, _heat_map_height(outcome)])
    _draw_front(upper, outcome)
    _draw_heat_map(lower, outcome)
    return figure


def front_svg(outcome: Outcome) -> str:
    """The Pareto front as an `<svg>` element."""
    return _svg(_FRONT_HEIGHT, lambda axes: _draw_front(axes, outcome))


def heat_map_svg(outcome: Outcome) -> str:
    """The heat map as an `<svg>` element."""
    return _svg(_heat_map_height(outcome), lambda axes: _draw_heat_map(axes, outcome))


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=200)
    return stream.getvalue()


def matplotlib_figure() -> Any:
    """The module matplotlib.figure.

    Raises:
        C3AError: matplotlib is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise C3AError("plots and reports need matplotlib: pip install 'c3a_triton[tune]'") from error


def _figure(height: float) -> Any:
    return matplotlib_figure().Figure(figsize=(_WIDTH, height), layout="constrained")


def _svg(height: float, draw: Callable[[Any], None]) -> str:
    figure = _figure(height)
    draw(figure.subplots())
    stream = io.StringIO()
    # Letters as outlines: the page looks the same whatever fonts its reader has.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with importlib.import_module("matplotlib").rc_context({"svg.fonttype": "path", "svg.hashsalt": "c3a_triton"}):
        figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _draw_front(axes: Any, outcome: Outcome) -> None:
    label = outcome.costs.label
    unit, scale = ("ms", 1e3) if outcome.seconds >= 1e-3 else ("µs", 1e6)
    front = outcome.front
    axes.plot(
        [point.parameters for point in front],
        [point.seconds * scale for point in front],
        ".-",
        color=_FRONT,
        label="C3A: fastest with as many parameters",
        gid="front",
    )
    for kind, mark in _PEER_MARKS.items():
        points = [point for point in outcome.peers if point.label.startswith(kind)]
        if points:
            axes.plot(
                [point.parameters for point in points],
                [point.seconds * scale for point in points],
                mark,
                color=_PEER,
                label=kind if kind == "LoRA" else "PEFT's C3A, the chosen block sizes",
            )
        for point in points if kind == "LoRA" else []:
            place = (point.parameters, point.seconds * scale)
            axes.annotate(point.label.removeprefix("LoRA "), place, (4, 4), textcoords="offset points", fontsize=_SMALL)
    axes.plot([outcome.parameters], [outcome.seconds * scale], "*", ms=15, color=_CHOSEN, label="chosen", gid="chosen")
    axes.axvline(outcome.budget.max_params, color=_CHOSEN, ls=":", lw=1, label="budget")
    if outcome.base_seconds is not None:
        axes.axhline(outcome.base_seconds * scale, color=_PEER, ls="--", lw=1, label="without adapters")
    axes.set_xscale("log")
    axes.margins(x=0.09)
    axes.tick_params(labelsize=_SMALL)
    axes.set_xlabel("parameters", fontsize=_SMALL)
    axes.set_ylabel(f"step time of the layers, {unit} ({label})", fontsize=_SMALL)
    axes.set_ylim(bottom=0)
    axes.set_title(f"Parameters against step time ({label})", fontsize=_SMALL + 1)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=_SMALL - 1, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _heat_map_height(outcome: Outcome) -> float:
    return 1.6 + 0.36 * len(outcome.groups)


def _draw_heat_map(axes: Any, outcome: Outcome) -> None:
    """One layer's time by block size and group, as a multiple of the group's fastest; grey where there is none."""
    sizes = sorted({b for valid in outcome.sizes for b in valid})
    values = []
    for group, valid in zip(outcome.groups, outcome.sizes, strict=True):
        found = {b: outcome.costs.fastest(group, b) for b in valid}
        seconds = {b: fastest[1] for b, fastest in found.items() if fastest is not None}
        least = min(seconds.values())
        values.append([seconds[b] / least if b in seconds else math.nan for b in sizes])
    axes.set_facecolor("#e4e4e4")
    highest = max((value for row in values for value in row if not math.isnan(value)), default=1.0)
    picture = axes.imshow(values, aspect="auto", cmap="viridis_r", vmin=1.0, vmax=max(highest, 1.1))
    axes.set_xticks(range(len(sizes)), labels=list(map(str, sizes)), rotation=90, fontsize=_SMALL)
    labels = [group.label for group in outcome.groups]
    axes.set_yticks(range(len(labels)), labels=labels, fontsize=_SMALL, parse_math=False)
    rows = range(len(outcome.chosen))
    axes.scatter([sizes.index(b) for b in outcome.chosen], rows, marker="*", s=70, color=_CHOSEN, gid="chosen-sizes")
    axes.set_xlabel("block size (grey: over the budget, or not valid)", fontsize=_SMALL)
    axes.set_title(f"Time of a layer over its fastest ({outcome.costs.label})", fontsize=_SMALL + 1)
    axes.figure.colorbar(picture, ax=axes, fraction=0.05).ax.tick_params(labelsize=_SMALL)
