"""What the cost model says of the goals for one layer, on an H200: `python -m bench.predicted`.

It rewrites the tables in docs/performance.md. Nothing is measured here: the goals are those of `bench.op`, from records
in which predicted times stand where a GPU's would; beside them stands what cards have measured. Not modelled, and so
not in the tables: the steps of whole models, Python's time, and what share of a bandwidth kernels reach.
"""

import sys
from pathlib import Path

import torch

from c3a_triton.benchmark import cases, layer
from c3a_triton.operator import cost_model, dispatch
from c3a_triton.operator.launch import fft_bases
from c3a_triton.operator.tuned import Times
from c3a_triton.tuning.costs import PEFT_C3A, PEFT_LORA, Case, Setting, predicted_times

from . import ROOT, ceilings, committed, model, op, report, runs

__all__ = ["main", "measured_table", "records", "section", "table"]

DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench.predicted: begin -->", "<!-- bench.predicted: end -->"
DTYPE = torch.bfloat16
VERDICT: dict[bool | None, str] = {True: "yes", False: "no", None: "-"}
METHODS = {"base": dispatch.BASE, "peft_lora": PEFT_LORA, "peft_c3a": PEFT_C3A, "ours:auto": "auto"}


def records(at: cost_model.Ceilings = cost_model.CEILINGS) -> runs.Records:
    """Results of `bench.op` as a card of these ceilings would write them, with predicted times."""
    found: runs.Records = {}
    large = (case for case in cases.LAYERS if case.n_tokens >= 1024)
    layers: tuple[layer.Case, ...] = (*large, *op.squares(), op.wide(), *cases.DECODERS)
    for case in layers:
        for method in METHODS:
            times = {"both": {"median": _both(case, method, at)}}
            found[layer.key(case, method)] = {"case": vars(case), "method": method, "times": times}
    for case in cases.DECODING:
        for method in ("base", "ours:auto"):
            found[f"decode {layer.key(case, method)}"] = {"seconds": _decoding(case, method, at)}
    return found


def _both(case: layer.Case, method: str, at: cost_model.Ceilings = cost_model.CEILINGS) -> float:
    """Seconds forward and backward; layers that read one x transform it once in each direction."""
    seconds = 0.0
    seen: set[int] = set()
    for source, part in case.parts:
        times, transforms = _layer(part, method, at)
        seconds += times.forward + (times.backward or 0.0)
        if source in seen:
            seconds -= transforms
        seen.add(source)
    return seconds


def _layer(case: cases.LayerCase, method: str, at: cost_model.Ceilings) -> tuple[Times, float]:
    """Seconds of one layer, and those of them in which x is transformed, which another layer may have done."""
    setting = Setting(torch.device("cuda"), DTYPE, case.n_tokens, train=True)
    sizes = (case.in_features, case.out_features)
    if method != "ours:auto":
        b = {"base": 0, "peft_lora": cases.LORA_RANK}.get(method, case.b)
        return predicted_times(Case(*sizes, b, METHODS[method]), setting, at), 0.0
    forward, backward = (
        dispatch.cheapest(cost_model.Sizes(case.n_tokens, *sizes, case.b, DTYPE), backward=backward)
        for backward in (False, True)
    )
    times = Times(
        predicted_times(Case(*sizes, case.b, forward), setting, at).forward,
        predicted_times(Case(*sizes, case.b, backward), setting, at).backward,
    )
    n_bytes = (DTYPE.itemsize + fft_bases.spectrum_itemsize(DTYPE, case.b)) * case.n_tokens * case.in_features
    return times, n_bytes / at.bandwidth * (forward, backward).count("fft")


def _decoding(case: cases.LayerCase, method: str, at: cost_model.Ceilings) -> float:
    """One launch that reads W, and of an adapted layer w; x and y are nothing beside them."""
    elements = case.in_features * case.out_features
    n_bytes = DTYPE.itemsize * elements + (4 * elements / case.b if method != "base" else 0)
    return at.launch_seconds + n_bytes / at.bandwidth


def table() -> str:
    """The goals with what is predicted for them on an H200."""
    goals = [goal for goal in op.goals(records()) if goal.measured is not None]
    rows = [[goal.case, goal.goal, goal.measured, VERDICT[goal.reached]] for goal in goals]
    return report.format_table(["case", "goal", "predicted", "reached by the prediction"], rows)


def measured_table(card: committed.Card) -> str:
    """The goals with what is predicted for them at a card's measured ceilings, and what was measured there."""
    measured = op.goals(card.records.get("op", {}))
    expected = op.goals(records(card.ceilings))
    rows = [
        [found.case, found.goal, one.measured or "-", found.measured or "not measured", VERDICT[found.reached]]
        for found, one in zip(measured, expected, strict=True)
    ]
    return report.format_table(["case", "goal", "predicted", "measured", "reached"], rows)


def section() -> str:
    """The text between the markers: the prediction, then every card that has measured."""
    parts = [table()]
    for card in committed.cards(committed.RESULTS):
        title = f"Predicted beside measured: {card.title}. The prediction takes the ceilings measured on that card."
        parts += [title, measured_table(card), "\n".join(ceilings.tables(card.records.get("ceilings", {}))).strip()]
        if "model" in card.records:
            parts.append("\n".join(model.tables(card.records["model"])).strip())
    return "\n\n".join(parts)


def main(document: Path = DOCUMENT) -> int:
    """Rewrite the tables in docs/performance.md; returns the exit status."""
    return report.write_between(document, BEGIN, END, section())


if __name__ == "__main__":
    sys.exit(main())
