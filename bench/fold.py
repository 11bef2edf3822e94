"""What `backend="fold"` does to a fine-tune: `python -m bench.fold --json FILE`.

The demo's byte-level Llama learns English in float32, then three adapters teach it Python source on the same batches:
exact in float32, exact in bfloat16, and folded in bfloat16. Held-out loss after training, as trained and after merging
into the base's own dtype, over learning rates and seeds. Minutes on two CPU cores; the numbers do not depend on the
device beyond the order of sums, because rounding W + ΔW is the same everywhere.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

import c3a_triton

from . import ROOT, report

sys.path.append(str(ROOT / "examples"))

import corpus
import training

__all__ = ["main"]

METHODS = {
    "exact, float32": (torch.float32, "auto"),
    "exact, bfloat16": (torch.bfloat16, "auto"),
    "fold, bfloat16": (torch.bfloat16, "fold"),
}
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0)
SIZE = training.Size(width=256, layers=3, block_size=32, batch=4, length=128, held_out_windows=64)


def relative_update(model: Any) -> float:
    """rms of ΔW over rms of W, over all adapted layers."""
    squares = [
        (layer.get_delta_weight("default").double().square().sum(), layer.weight.double().square().sum())
        for _, layer in model.c3a.layers()
    ]
    return float((sum(delta for delta, _ in squares) / sum(weight for _, weight in squares)) ** 0.5)


def runs(base: Path, steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Train every method at every learning rate, from every seed's batches and kernels."""
    text = corpus.split(corpus.standard_library())
    tokens, held_out = (corpus.tokens_of(part, None) for part in (text.train, text.held_out))
    windows = corpus.spread_windows(held_out, SIZE.held_out_windows, SIZE.length)
    for learning_rate in LEARNING_RATES:
        for seed in range(seeds):
            batches = corpus.sample_batches(tokens, steps, SIZE.batch, SIZE.length, seed=seed)
            for method, (dtype, backend) in METHODS.items():
                torch.manual_seed(seed)
                model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
                config = c3a_triton.C3AConfig(block_size=SIZE.block_size, target_modules="all-linear")
                c3a_triton.apply(model, config, backend=backend)
                training.train(model, batches, learning_rate, torch.device("cpu"), advance=lambda note: None)
                update = relative_update(model)
                after = training.bits_per_byte(model, windows, 1.0)
                merged = training.bits_per_byte(model.c3a.merge_and_unload(), windows, 1.0)
                yield {
                    "method": method,
                    "learning_rate": learning_rate,
                    "seed": seed,
                    "relative_update": update,
                    "bits_per_byte": after,
                    "merged": merged,
                }


def summary(rows: list[dict[str, Any]]) -> str:
    """Medians over seeds as a table."""
    cells = []
    for learning_rate in LEARNING_RATES:
        for method in METHODS:
            found = [row for row in rows if (row["learning_rate"], row["method"]) == (learning_rate, method)]
            medians = [statistics.median(row[key] for row in found) for key in ("bits_per_byte", "merged")]
            update = statistics.median(row["relative_update"] for row in found)
            cells.append([f"{learning_rate:g}", method, f"{update:.1%}", *(f"{median:.4f}" for median in medians)])
    return report.format_table(["learning rate", "method", "rms ΔW / rms W", "bits per byte", "merged"], cells)


def main(argv: list[str] | None = None) -> int:
    """Train, print and, with `--json`, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.fold", description=(__doc__ or "").strip())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--steps", type=int, default=150, help="of each adapter (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: %(default)s)")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        torch.manual_seed(0)
        base = Path(folder)
        training.train_base(base, SIZE, torch.device("cpu"), progress)
        done = progress.add_task("adapters", total=len(METHODS) * len(LEARNING_RATES) * args.seeds)
        for row in runs(base, args.steps, args.seeds):
            rows.append(row)
            progress.advance(done)
    print(summary(rows))
    if args.json is not None:
        settings = {"steps": args.steps, "seeds": args.seeds}
        report.write_json(args.json, {"environment": report.environment(torch.device("cpu")), **settings, "runs": rows})
        print(f"\nwritten: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
