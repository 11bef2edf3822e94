"""The report: one HTML page that needs nothing beside it, for phones and for paper."""

from collections.abc import Iterable
from html import escape

from c3a_triton.adapters.report import format_seconds

from . import plots
from .outcome import Outcome

__all__ = ["document", "fragment"]

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 60rem;
  padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.c3a-wide { overflow-x: auto; }
.c3a-wide table { border-collapse: collapse; font-size: 0.875rem; }
.c3a-wide th, .c3a-wide td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ccc; text-align: right;
  white-space: nowrap; }
.c3a-wide th:first-child, .c3a-wide td:first-child { text-align: left; }
.c3a-total tr:last-child td { font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: 100%; min-width: 22rem; max-width: 44rem; height: auto; display: block; }
figcaption, .c3a-note { font-size: 0.875rem; color: #444; }
pre { overflow-x: auto; background: #f4f4f4; padding: 0.75rem; font-size: 0.8125rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .c3a-wide, pre { overflow: visible; }
  .c3a-wide th, .c3a-wide td { white-space: normal; padding: 0.15rem 0.3rem; } pre { white-space: pre-wrap; }
  figure, table { break-inside: avoid; } }
"""
_HEADER = ("group", "layers", "in", "out", "b", "parameters", "backend", "time", "share")


def document(outcome: Outcome) -> str:
    """The whole page. Everything that comes from the model is escaped."""
    title = escape(f"C3A block sizes for {outcome.model}")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{_body(outcome)}\n</body>\n</html>\n"
    )


def fragment(outcome: Outcome) -> str:
    """The page's content for a notebook."""
    return f"<style>{_STYLE.replace('body {', '.c3a-report {')}</style><div class='c3a-report'>{_body(outcome)}</div>"


def _body(outcome: Outcome) -> str:
    label = outcome.costs.label
    base = outcome.base_seconds
    without = "" if base is None else f"; without adapters {format_seconds(base)} ({label})"
    summary = (
        f"{outcome.parameters:,} parameters, {format_seconds(outcome.seconds)} ({label}) a step{without}. Objective: "
        f"{outcome.objective}. Budget: {outcome.budget.text}. A step is the {outcome.step}. Times are {label}"
        f"{outcome.source}."
    )
    header = [f"{name} ({label})" if name == "time" else name for name in _HEADER]
    choice = _table(header, [*map(outcome.cells, outcome.rows), outcome.total_cells()], "c3a-wide c3a-total")
    peers = [(point.label, f"{point.parameters:,}", format_seconds(point.seconds)) for point in outcome.peers]
    compared = _table(
        ["adapter", "parameters", f"time ({label})"],
        [*peers, ("C3A, as chosen", f"{outcome.parameters:,}", format_seconds(outcome.seconds))],
        "c3a-wide c3a-total",
    )
    missing = "" if peers else '<p class="c3a-note">LoRA and PEFT\'s C3A were not measured in this run.</p>'
    environment = _table(["", ""], outcome.environment.items())
    return "\n".join(
        [
            f"<p>{escape(summary)}</p>",
            f"<h2>The choice</h2>{choice}",
            '<p class="c3a-note">Times are of all layers of a group, their base included.</p>',
            f"<h2>Parameters against step time</h2><figure>{plots.front_svg(outcome)}<figcaption>The line is the "
            f"Pareto front under the budget; the star is the choice. Times are {label}.</figcaption></figure>",
            compared + missing,
            f"<h2>Time by block size</h2><figure>{plots.heat_map_svg(outcome)}<figcaption>One layer of each group, "
            f"over the time of its fastest block size; stars are the choice. Times are {label}.</figcaption></figure>",
            f"<h2>Configuration</h2><pre>{escape(outcome.config.to_json().decode())}</pre>",
            f"<h2>Device and versions</h2>{environment}",
        ]
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], style: str = "c3a-wide") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="{style}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
