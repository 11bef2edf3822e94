"""The CPU's figures against PEFT: `python -m bench.cpu [--json FILE]`.

CPU time of one thread, calls alternating, medians. PEFT is needed: every figure is a ratio to it.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c3a_triton.benchmark import cases, gate, peers, timing
from c3a_triton.operator import calls

from . import report

__all__ = ["headline", "main", "summary"]


def operator(case: cases.OperatorCase, seconds: float) -> dict[str, Any]:
    """Forward and backward of the operator, x and w both requiring their gradients."""
    from peft.tuners.c3a.utils import BlockCircularConvolution

    x = torch.randn(case.n_tokens, case.in_blocks * case.b, requires_grad=True)
    w = torch.randn(case.out_blocks, case.in_blocks, case.b, requires_grad=True)
    dy = torch.randn(case.n_tokens, case.out_blocks * case.b)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return calls.circulant_linear(x, w, scale=1.0)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x, w), (x, w), dy)

    theirs = BlockCircularConvolution.apply
    truth = gate.Truth.of(torch.zeros(dy.shape[1], x.shape[1]), w, x, dy, scale=1.0)
    (dx, dw), (_, their_dw) = step(ours), step(theirs)
    for name, value, expected in (
        ("y", ours(x, w), truth.y),
        ("dx", dx, truth.dx),
        ("dw", dw, truth.dw),
        ("PEFT's y", theirs(x, w), truth.y),
        ("PEFT's dw", their_dw, truth.dw),
    ):
        _demand(gate.relative_error(value, expected), f"{name} in {case}")
    timings = timing.alternate({"ours": partial(step, ours), "peft": partial(step, theirs)}, seconds=seconds)
    return _compared(asdict(case), timings)


def expand(seconds: float) -> dict[str, Any]:
    """The dense ΔW of one layer, and as a yardstick only filling a matrix of its size."""
    case = cases.EXPAND
    layer = cases.LayerCase(1, case.in_features, case.out_features, case.b, "float32")
    base, w = peers.frozen_base(layer, torch.device("cpu")), peers.kernel_values(layer, torch.device("cpu"))
    ours, theirs = peers.build("ours:auto", base, layer, w), peers.build("peft_c3a", base, layer, w)
    their_delta = theirs.get_delta_weight("default").double()
    _demand(gate.relative_error(ours.get_delta_weight("default"), their_delta), "ΔW compared with PEFT's")
    timings = timing.alternate(
        {
            "ours": lambda: ours.get_delta_weight("default"),
            "peft": lambda: theirs.get_delta_weight("default"),
            "fill": lambda: torch.full((case.out_features, case.in_features), 1.0),
        },
        seconds=seconds,
    )
    row = _compared(asdict(case), timings)
    return row | {"fill": asdict(timings["fill"]), "peft_over_fill": timings["peft"].median / timings["fill"].median}


def call(seconds: float) -> list[dict[str, Any]]:
    """One layer on tiny tensors: what Python and autograd cost."""
    case = cases.CALL
    layer = cases.LayerCase(case.n_tokens, case.in_features, case.out_features, case.b, "float32")
    base, w = peers.frozen_base(layer, torch.device("cpu")), peers.kernel_values(layer, torch.device("cpu"))
    x = torch.randn(case.n_tokens, case.in_features, requires_grad=True)
    dy = torch.randn(case.n_tokens, case.out_features)
    truth = gate.Truth.of(base.weight, w, x, dy)
    layers = {"ours": peers.build("ours:auto", base, layer, w), "peft": peers.build("peft_c3a", base, layer, w)}
    kernels = {name: peers.trained(built)[0] for name, built in layers.items()}
    for name, built in layers.items():
        gate.check_layer(built, kernels[name], x, dy, truth, only=("y", "dw") if name == "peft" else ("y", "dx", "dw"))

    def step(name: str) -> Any:
        return torch.autograd.grad(layers[name](x), (x, kernels[name]), dy)

    def forward(name: str) -> Tensor:
        with torch.no_grad():
            return layers[name](x)

    rows = []
    for mode, function in (("forward, no grad", forward), ("forward + backward", step)):
        timings = timing.alternate({name: partial(function, name) for name in layers}, seconds=seconds)
        rows.append(_compared(asdict(case) | {"mode": mode}, timings))
    return rows


def saved() -> dict[str, Any]:
    """Bytes one layer keeps for its backward: a bfloat16 input, a frozen base."""
    case = cases.SAVED
    device = torch.device("cpu")
    base, w = peers.frozen_base(case, device), peers.kernel_values(case, device)
    x = torch.randn(case.n_tokens, case.in_features, dtype=torch.bfloat16, requires_grad=True)
    measured = {
        name: asdict(timing.saved_bytes(peers.build(method, base, case, w), x))
        for name, method in (("ours", "ours:auto"), ("peft", "peft_c3a"), ("lora", "peft_lora"))
    }
    return {"case": asdict(case), "x_bytes": x.nbytes, "kernel_bytes": w.nbytes, **measured}


def _demand(error: float, name: str) -> None:
    if not error <= 1e-5:
        raise gate.GateError(f"{name} is wrong: relative error {error:.2g}, allowed in float32: 1e-5")


def _compared(case: dict[str, Any], timings: dict[str, timing.Timing]) -> dict[str, Any]:
    ours, theirs = timings["ours"], timings["peft"]
    return {"case": case, "ours": asdict(ours), "peft": asdict(theirs), "ratio": theirs.median / ours.median}


def _times(row: dict[str, Any]) -> list[str]:
    shown = [report.format_seconds(row[name]["median"]) for name in ("peft", "ours")]
    return [*shown, f"{row['ratio']:.2f}"]


def headline(results: dict[str, Any]) -> str:
    """The results in one short markdown table."""
    ratios = [row["ratio"] for row in results["operator"]]
    spread = f"{results['geometric_mean']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    matrix, kept = results["expand"]["case"], results["saved"]
    peft, ours = kept["peft"]["activations"], kept["ours"]["activations"]
    saved = [report.format_bytes(peft), report.format_bytes(ours), f"{peft / ours:.2f}"]
    rows = [
        [f"operator, forward + backward, geometric mean of {len(ratios)} sizes (least, most)", "", "", spread],
        [f"ΔW of {matrix['out_features']} × {matrix['in_features']}, b = {matrix['b']}", *_times(results["expand"])],
        *([f"one layer call on tiny tensors, {row['case']['mode']}", *_times(row)] for row in results["call"]),
        ["saved for backward by one layer, bfloat16", *saved],
    ]
    return report.format_table(["float32, if not said otherwise", "PEFT's C3A", "ours", "PEFT / ours"], rows)


def summary(results: dict[str, Any]) -> str:
    """The results as text: markdown that also reads well in a terminal."""
    headers = ["T", "b", "in blocks", "out blocks", "PEFT", "ours", "PEFT / ours"]
    rows = [[*row["case"].values(), *_times(row)] for row in results["operator"]]
    rows.append(["geometric mean", *[""] * 5, f"{results['geometric_mean']:.2f}"])
    parts = [
        "Operator, forward + backward, float32, against PEFT's BlockCircularConvolution:",
        report.format_table(headers, rows),
    ]

    expanded = results["expand"]
    headers = ["out", "in", "b", "PEFT", "ours", "PEFT / ours", "only filling", "PEFT / filling"]
    fill = [report.format_seconds(expanded["fill"]["median"]), f"{expanded['peft_over_fill']:.2f}"]
    parts += [
        "Expanding ΔW, float32, against PEFT's get_delta_weight:",
        report.format_table(headers, [[*expanded["case"].values(), *_times(expanded), *fill]]),
    ]

    headers = ["T", "in", "out", "b", "mode", "PEFT", "ours", "PEFT / ours"]
    parts += [
        "One layer call on tiny tensors, against PEFT's C3ALinear:",
        report.format_table(headers, [[*row["case"].values(), *_times(row)] for row in results["call"]]),
    ]

    kept = results["saved"]
    case = kept["case"]
    rows = [
        [label, report.format_bytes(kept[name]["activations"]), report.format_bytes(kept[name]["parameters"])]
        for label, name in (("ours", "ours"), ("PEFT C3A", "peft"), (f"PEFT LoRA r={cases.LORA_RANK}", "lora"))
    ]
    parts += [
        f"Saved for backward by one layer ({case['n_tokens']} tokens, {case['in_features']} → {case['out_features']}, "
        f"b = {case['b']}, bfloat16 x of {report.format_bytes(kept['x_bytes'])}, kernel of "
        f"{report.format_bytes(kept['kernel_bytes'])}, frozen base):",
        report.format_table(["layer", "activations", "parameters (alive anyway)"], rows),
    ]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and, with `--json`, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=(__doc__ or "").strip())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--seconds", type=float, default=6.0, help="time per comparison (default: %(default)s)")
    args = parser.parse_args(argv)
    missing = peers.why_no_peft()
    if missing is not None:
        print(f"bench.cpu compares with PEFT: install it with `pip install peft`. {missing}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [operator(case, args.seconds) for case in cases.OPERATOR]
    results = {
        "environment": report.environment(torch.device("cpu")),
        "operator": rows,
        "geometric_mean": timing.geometric_mean([row["ratio"] for row in rows]),
        "expand": expand(args.seconds),
        "call": call(args.seconds / 3),
        "saved": saved(),
    }
    print(summary(results))
    if args.json is not None:
        report.write_json(args.json, results)
        print(f"\nwritten: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
