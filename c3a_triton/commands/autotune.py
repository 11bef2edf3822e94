"""`c3a-triton autotune`: block sizes and backends for a model, under a budget."""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from c3a_triton.errors import CheckpointError
from c3a_triton.operator import tuned
from c3a_triton.tuning import plots, tuner
from c3a_triton.tuning.measurement import Progress

from .options import module_choice, parameter_choice, print_json

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """The command."""
    # Whatever cannot be written should be known before anything is measured.
    if args.output is not None:
        tuner.check_writable(tuner.config_file(args.output), "--output")
    if args.report is not None:
        if Path(args.report).suffix.lower() not in (".html", ".htm"):
            raise CheckpointError(f"--report {args.report}: give a name that ends with .html; the PNG goes beside it")
        tuner.check_writable(Path(args.report), "--report")
        plots.matplotlib_figure()
    with _shown() as progress:
        try:
            result = tuner.autotune(
                args.model,
                args.max_params,
                args.tokens,
                like_lora_rank=args.like_lora_rank,
                max_adapter_mb=args.max_adapter_mb,
                target_modules=module_choice(args.target_modules),
                exclude_modules=module_choice(args.exclude_modules),
                target_parameters=parameter_choice(args.target_parameters),
                dtype=args.dtype,
                objective=args.objective,
                mode=args.mode,
                device=args.device,
                measure=not args.no_measure,
                compare=args.report is not None,
                tiles=args.tiles,
                progress=progress,
            )
        except KeyboardInterrupt:
            print(f"what was measured is kept in {tuned.path()}: the same command goes on from there", file=sys.stderr)
            raise
    output = None if args.output is None else result.save(args.output)
    pages = () if args.report is None else result.report(args.report)
    if args.json:
        written = {"output": None if output is None else str(output), "report": [str(page) for page in pages]}
        print_json(result.to_dict() | written)
    else:
        print(result.table)
        for path in (output, *pages):
            if path is not None:
                print(f"Written: {path}")
    return 0


@contextlib.contextmanager
def _shown() -> Iterator[Progress]:
    """What shows the measurements' progress on standard error: rich's bar, or lines where rich is not installed."""
    try:
        bars = importlib.import_module("rich.progress")
        console = importlib.import_module("rich.console").Console(stderr=True)
    except ImportError:
        yield lambda done, total, name: print(f"measuring {done + 1} of {total}: {name}", file=sys.stderr)
        return
    columns = (bars.TextColumn("measuring"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, bars.TextColumn("{task.fields[name]}", markup=False), console=console) as bar:
        task = bar.add_task("", total=None, name="", visible=False)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, name=name, visible=True)
