"""`c3a-triton autotune` and `c3a-triton cache`."""

import argparse
import contextlib
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from c3a_triton.adapters.report import format_seconds, format_table
from c3a_triton.errors import C3AError, CheckpointError, ConfigError
from c3a_triton.operator import tuned
from c3a_triton.tuning import plots, tuner
from c3a_triton.tuning.measurement import Progress
from c3a_triton.tuning.solver import OBJECTIVES

from .options import DTYPES, add_command, add_target_options, module_choice, positive_int, print_json

__all__ = ["add_autotune", "add_cache"]

_AUTOTUNE_EXAMPLES = """\
  c3a-triton autotune path/to/model --like-lora-rank 16 --output adapter
  c3a-triton autotune path/to/model --max-params 2M --target-modules q_proj v_proj --tokens 4096
  c3a-triton autotune path/to/model --max-adapter-mb 20 --target-modules all-linear --report report.html
  c3a-triton autotune path/to/model --max-params 2M --no-measure --json

Layers of one role and shape form a group, and each group gets one block size. Times are measured on the GPU and kept,
so that an interrupted run goes on where it was, and the backend "auto" chooses by them from then on. Without a GPU, or
with --no-measure, they are predicted by a cost model, and labelled so."""
_CACHE_EXAMPLES = """\
  c3a-triton cache show
  c3a-triton cache show --json
  c3a-triton cache clear"""


def add_autotune(subparsers: Any) -> None:
    """Add `autotune`."""
    parser = add_command(
        subparsers,
        "autotune",
        "choose block sizes and backends for a model, under a budget",
        "Choose the block sizes that fit a budget of parameters and run fastest on this machine. Of the model only\n"
        "config.json is read, no weights.",
        _AUTOTUNE_EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a transformers folder or name, or a config.json")
    add_target_options(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max-params", type=_count, metavar="N", help="the most parameters: 2000000, 500k, 2M")
    budget.add_argument(
        "--like-lora-rank", type=positive_int, metavar="R", help="as many as LoRA of this rank on the same layers"
    )
    budget.add_argument(
        "--max-adapter-mb", type=_megabytes, metavar="X", help="the size of the adapter's file, in 10^6 bytes"
    )
    parser.add_argument("--tokens", type=positive_int, default=8192, metavar="T", help="tokens per step (8192)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base and of x (the model's own, or bfloat16)")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="latency",
        help="latency: the fastest; params: the most parameters, then the fastest; balanced: between the two (latency)",
    )
    parser.add_argument(
        "--mode", choices=tuner.MODES, default="train", help="train: forward and backward; infer: forward (train)"
    )
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:1, ... or cpu (the GPU if there is one)")
    parser.add_argument("--no-measure", action="store_true", help="predict by the cost model; needs no GPU")
    parser.add_argument("--tiles", action="store_true", help="measure tiles of the chosen kernels too (a GPU, minutes)")
    parser.add_argument("--output", metavar="FILE", help="write the configuration: a .json file, or a folder")
    parser.add_argument("--report", metavar="FILE", help="write a page, report.html, and report.png beside it")
    parser.set_defaults(run=_run_autotune)


def _count(text: str) -> int:
    try:
        return tuner.parse_count(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _megabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _run_autotune(args: argparse.Namespace) -> int:
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


def add_cache(subparsers: Any) -> None:
    """Add `cache`."""
    parser = add_command(
        subparsers,
        "cache",
        "show or clear what autotune has measured",
        'Show or clear the tuned table: measured times of layers, by which the backend "auto" chooses. It lies in the\n'
        "folder that C3A_TRITON_CACHE names, or in the user's cache folder.",
        _CACHE_EXAMPLES,
    )
    parser.add_argument("action", choices=("show", "clear"))
    parser.set_defaults(run=_run_cache)


def _run_cache(args: argparse.Namespace) -> int:
    path = tuned.path()
    if args.action == "clear":
        try:
            removed = tuned.clear()
        except OSError as error:
            raise C3AError(f"{path} cannot be removed: {error}") from error
        if args.json:
            print_json({"path": str(path), "removed": removed})
        else:
            print(f"{removed} measurements removed: {path}")
        return 0
    table = tuned.load()
    if args.json:
        times = [key._asdict() | found._asdict() for key, found in sorted(table.times.items())]
        tiles = [key._asdict() | {"tile": tile} for key, tile in sorted(table.tiles.items())]
        print_json({"path": str(path), "times": times, "tiles": tiles})
        return 0
    print(f"{path}: {len(table.times)} measured layers, {len(table.tiles)} measured tiles")
    machines: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for key, found in sorted(table.times.items()):
        sizes = (str(2**key.token_bits), str(key.in_features), str(key.out_features), str(key.b))
        backward = "" if found.backward is None else format_seconds(found.backward)
        row = (key.dtype, *sizes, key.backend, format_seconds(found.forward), backward)
        machines.setdefault(key[:4], []).append(row)
    header = ("dtype", "tokens", "in", "out", "b", "backend", "forward", "backward")
    for (device, capability, torch_version, triton_version), rows in machines.items():
        print(f"\n{device} ({capability}), torch {torch_version}, triton {triton_version}")
        print(format_table([header, *rows], {1, 2, 3, 4, 6, 7}))
    return 0
