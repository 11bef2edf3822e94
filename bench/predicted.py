"""What the cost model says of the goals for one layer, on an H200: `python -m bench.predicted`.

It rewrites the table in docs/performance.md. Nothing is measured: the goals are those of `bench.op`, from records in
which predicted times stand where a GPU's would. Not modelled, and so not in the table: the steps of whole models,
Python's time, and what share of a bandwidth kernels reach.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from c3a_triton import dispatch, launch_fft
from c3a_triton.benchmark import cases, layer
from c3a_triton.tuned import Times
from c3a_triton.tuning.costs import PEFT_C3A, PEFT_LORA, Case, Setting, predicted_times

from . import ROOT, op, report, runs

__all__ = ["main", "records", "table"]

DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench.predicted: begin -->", "<!-- bench.predicted: end -->"
DTYPE = torch.bfloat16
METHODS = {"base": dispatch.BASE, "peft_lora": PEFT_LORA, "peft_c3a": PEFT_C3A, "ours:auto": "auto"}


def records(ceilings: dispatch.Ceilings = dispatch.CEILINGS) -> runs.Records:
    """Results of `bench.op` as a card of these ceilings would write them, with predicted times."""
    found: runs.Records = {}
    large = (case for case in cases.LAYERS if case.n_tokens >= 1024)
    layers: tuple[layer.Case, ...] = (*large, *op.squares(), op.wide(), *cases.DECODERS)
    for case in layers:
        for method in METHODS:
            times = {"both": {"median": _both(case, method, ceilings)}}
            found[layer.key(case, method)] = {"case": vars(case), "method": method, "times": times}
    for case in cases.DECODING:
        for method in ("base", "ours:auto"):
            found[f"decode {layer.key(case, method)}"] = {"seconds": _decoding(case, method, ceilings)}
    return found


def _both(case: layer.Case, method: str, ceilings: dispatch.Ceilings = dispatch.CEILINGS) -> float:
    """Seconds forward and backward; layers that read one x transform it once in each direction."""
    seconds = 0.0
    seen: set[int] = set()
    for source, part in case.parts:
        times, transforms = _layer(part, method, ceilings)
        seconds += times.forward + (times.backward or 0.0)
        if source in seen:
            seconds -= transforms
        seen.add(source)
    return seconds


def _layer(case: cases.LayerCase, method: str, ceilings: dispatch.Ceilings) -> tuple[Times, float]:
    """Seconds of one layer, and those of them in which x is transformed, which another layer may have done."""
    setting = Setting(torch.device("cuda"), DTYPE, case.n_tokens, train=True)
    sizes = (case.in_features, case.out_features)
    if method != "ours:auto":
        b = {"base": 0, "peft_lora": cases.LORA_RANK}.get(method, case.b)
        return predicted_times(Case(*sizes, b, METHODS[method]), setting, ceilings), 0.0
    forward, backward = (
        dispatch.cheapest(case.n_tokens, *sizes, case.b, DTYPE, backward=backward) for backward in (False, True)
    )
    times = Times(
        predicted_times(Case(*sizes, case.b, forward), setting, ceilings).forward,
        predicted_times(Case(*sizes, case.b, backward), setting, ceilings).backward,
    )
    n_bytes = (DTYPE.itemsize + launch_fft.spectrum_itemsize(DTYPE, case.b)) * case.n_tokens * case.in_features
    return times, n_bytes / ceilings.bandwidth * (forward, backward).count("fft")


def _decoding(case: cases.LayerCase, method: str, ceilings: dispatch.Ceilings) -> float:
    """One launch that reads W, and of an adapted layer w; x and y are nothing beside them."""
    elements = case.in_features * case.out_features
    n_bytes = DTYPE.itemsize * elements + (4 * elements / case.b if method != "base" else 0)
    return ceilings.launch_seconds + n_bytes / ceilings.bandwidth


def table() -> str:
    """The goals with what is predicted for them."""
    goals = [goal for goal in op.goals(records()) if goal.measured is not None]
    verdict: dict[Any, str] = {True: "yes", False: "no"}
    rows = [[goal.case, goal.goal, goal.measured, verdict[goal.reached]] for goal in goals]
    return report.format_table(["case", "goal", "predicted", "reached by the prediction"], rows)


def main(document: Path = DOCUMENT) -> int:
    """Rewrite the table in docs/performance.md; returns the exit status."""
    return report.write_between(document, BEGIN, END, table())


if __name__ == "__main__":
    sys.exit(main())
