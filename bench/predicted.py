"""What the cost model says of the goals for one layer, on an H200: `python -m bench.predicted`.

It rewrites the tables in docs/performance.md. Nothing is measured here: the goals are those of `bench.op`, from records
in which predicted times stand where a GPU's would; beside them stands what cards have measured. Not modelled, and so
not in the tables: the steps of whole models, Python's time, and what share of a bandwidth kernels reach.
"""

import sys
from pathlib import Path

import torch

from c3a_triton.benchmark import cases, layer
from c3a_triton.operator import bounds, cost_model, dispatch
from c3a_triton.tuning.costs import PEFT_C3A, PEFT_LORA, Case, Setting, predicted_times

from . import ROOT, ceilings, committed, model, op, report, runs

__all__ = ["assumptions", "floor_table", "main", "measured_table", "records", "section", "table"]

DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench.predicted: begin -->", "<!-- bench.predicted: end -->"
DTYPE = torch.bfloat16
VERDICT: dict[bool | None, str] = {True: "yes", False: "no", None: "-"}
FLOOR_TITLE = (
    "By the base layer's rate and by how many bytes of the L2 a launch finds again of what the one before wrote last:"
)
METHODS = {"base": dispatch.BASE, "peft_lora": PEFT_LORA, "peft_c3a": PEFT_C3A, "ours:auto": "auto"}


def records(at: bounds.Ceilings = bounds.CEILINGS) -> runs.Records:
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


def _both(
    case: layer.Case, method: str, at: bounds.Ceilings = bounds.CEILINGS, *, keeps_spectrum: bool = False
) -> float:
    """Seconds forward and backward; layers that read one x transform it once in each direction.

    With `keeps_spectrum` the backward pass has it from the forward.
    """
    seconds = 0.0
    seen: set[int] = set()
    for source, part in case.parts:
        again = source in seen
        seconds += sum(_layer(part, method, at, has_spectrum=(again, again or keeps_spectrum)))
        seen.add(source)
    return seconds


def _layer(
    case: cases.LayerCase, method: str, at: bounds.Ceilings, has_spectrum: tuple[bool, bool]
) -> tuple[float, float]:
    """Seconds of one layer, forward and backward, where it may have x's spectrum from elsewhere."""
    setting = Setting(torch.device("cuda"), DTYPE, case.n_tokens, train=True)
    shape = (case.in_features, case.out_features)
    if method != "ours:auto":
        b = {"base": 0, "peft_lora": cases.LORA_RANK}.get(method, case.b)
        times = predicted_times(Case(*shape, b, METHODS[method]), setting, at)
        assert times.backward is not None
        return times.forward, times.backward
    sizes = cost_model.Sizes(case.n_tokens, *shape, case.b, DTYPE)
    base = cost_model.base_seconds(sizes, ceilings=at)
    forward, backward = (
        cost_model.added_seconds(
            dispatch.cheapest(sizes, backward=backward, ceilings=at),
            sizes,
            backward=backward,
            has_spectrum=has_spectrum[backward],
            ceilings=at,
        )
        for backward in (False, True)
    )
    return base + forward, base + backward


def _decoding(case: cases.LayerCase, method: str, at: bounds.Ceilings) -> float:
    sizes = cost_model.Sizes(case.n_tokens, case.in_features, case.out_features, case.b, DTYPE)
    if method == "base":
        return cost_model.base_seconds(sizes, ceilings=at)
    return cost_model.predicted_seconds("decode", sizes, ceilings=at)


def table() -> str:
    """The goals with what is predicted for them on an H200."""
    goals = [goal for goal in op.goals(records()) if goal.measured is not None]
    rows = [[goal.case, goal.goal, goal.measured, VERDICT[goal.reached]] for goal in goals]
    return report.format_table(["case", "goal", "predicted", "reached by the prediction"], rows)


def assumptions() -> dict[str, bounds.Ceilings]:
    """The ceilings on which most depends, by what is assumed: the base's rate, and what stays in the L2."""
    at = bounds.CEILINGS
    return {
        f"{rate} TFLOP/s, {megabytes} MB": at._replace(
            cublas_flops={**at.cublas_flops, 2: rate * 1e12}, l2_bytes=megabytes * 1e6
        )
        for rate in (650, 790)
        for megabytes in (24, 40)
    }


def floor_table() -> str:
    """How near the memory floor layers come, by what is assumed."""
    rows = []
    for b in (64, 128, 256, 1024):
        case = cases.LayerCase(8192, 4096, 4096, b)
        rows.append([f"T=8192, {case.label}, b={b}: layer / frozen base", "≤ 1.29", "≤ 1.24", *_over_base(case)])
    kept = cases.LayerCase(8192, 4096, 4096, 128)
    name = f"T=8192, {kept.label}, b=128, x's spectrum kept for the backward pass"
    rows.append([name, "", "≤ 1.20", *_over_base(kept, keeps_spectrum=True)])
    for case, reach, aim in zip(cases.COMPARISON, ("≤ 1.55", "≤ 2.25"), ("≤ 1.46", "≤ 2.1"), strict=True):
        rows.append(
            [f"T={case.n_tokens}, {case.label}, b={case.b}: layer / frozen base", reach, aim, *_over_base(case)]
        )
    extra = []
    for at in assumptions().values():
        base, ours, peft = (_both(kept, method, at) for method in ("base", "ours:auto", "peft_c3a"))
        extra.append(f"{(peft - base) / (ours - base):.1f}")
    rows.append([f"T=8192, {kept.label}, b=128: extra time, PEFT C3A / ours", "≥ 10", "12", *extra])
    return report.format_table(["forward + backward", "to reach", "aim", *assumptions()], rows)


def _over_base(case: cases.LayerCase, *, keeps_spectrum: bool = False) -> list[str]:
    return [
        f"{_both(case, 'ours:auto', at, keeps_spectrum=keeps_spectrum) / _both(case, 'base', at):.2f}"
        for at in assumptions().values()
    ]


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
    parts = [table(), FLOOR_TITLE, floor_table()]
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
