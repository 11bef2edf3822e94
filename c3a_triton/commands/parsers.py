"""What the command line takes: the parser of every command. Nothing here imports torch, so that help is quick.

A command's parser is `_add_NAME`, and what the command does is `run(args)` in the module of its name.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c3a_triton import __version__
from c3a_triton.errors import ConfigError
from c3a_triton.files.config import CONFIG_NAME
from c3a_triton.tuning.goal import MODES, OBJECTIVES, parse_count

__all__ = ["BACKENDS", "DTYPES", "PROG", "parse", "parser"]

PROG = "c3a-triton"
DTYPES = ("float32", "float16", "bfloat16")
# Those of `operator.dispatch`, which needs torch; a test holds them equal.
BACKENDS = ("auto", "reference", "torch", "direct", "fft", "expand", "fold")
_SHELLS = ("bash", "zsh", "tcsh")
_EXAMPLES = """\
examples:
  c3a-triton autotune path/to/model --like-lora-rank 16 --output adapter
  c3a-triton inspect path/to/model --target-modules q_proj v_proj
  c3a-triton merge --model path/to/model --adapter adapter --output merged
  c3a-triton bench --in 4096 --out 4096 --block-size 128 --tokens 1024
  c3a-triton doctor

Each command has a --help of its own, and --json for machines.
Exit codes: 0 success, 1 something failed (the message is on standard error), 2 wrong usage."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the name of their `command`; argparse ends the process where they cannot be understood."""
    args = parser().parse_args(argv)
    args.check_usage(args)
    return args


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = argparse.ArgumentParser(
        prog=PROG,
        description="C3A adapters from the command line.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"c3a_triton {__version__}")
    whole.set_defaults(check_usage=lambda args: None)
    subparsers = whole.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for add in (_add_autotune, _add_cache, _add_inspect, _add_merge, _add_bench, _add_doctor, _add_completion):
        add(subparsers)
    return whole


# In the order of the help text


def _add_autotune(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "autotune",
        "choose block sizes and backends for a model, under a budget",
        "Choose the block sizes that fit a budget of parameters and run fastest on this machine. Of the model only\n"
        "config.json is read, no weights.",
        """\
  c3a-triton autotune path/to/model --like-lora-rank 16 --output adapter
  c3a-triton autotune path/to/model --max-params 2M --target-modules q_proj v_proj --tokens 4096
  c3a-triton autotune path/to/model --max-adapter-mb 20 --target-modules all-linear --report report.html
  c3a-triton autotune path/to/model --max-params 2M --no-measure --json

Layers of one role and shape form a group, and each group gets one block size. Times are measured on the GPU and kept,
so that an interrupted run goes on where it was, and the backend "auto" chooses by them from then on. Without a GPU, or
with --no-measure, they are predicted by a cost model, and labelled so.""",
    )
    parser.add_argument("model", metavar="MODEL", help="a transformers folder or name, or a config.json")
    _add_target_options(parser)
    _add_parameter_option(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max-params", type=_count, metavar="N", help="the most parameters: 2000000, 500k, 2M")
    budget.add_argument(
        "--like-lora-rank", type=_positive_int, metavar="R", help="as many as LoRA of this rank on the same layers"
    )
    budget.add_argument(
        "--max-adapter-mb", type=_megabytes, metavar="X", help="the size of the adapter's file, in 10^6 bytes"
    )
    parser.add_argument("--tokens", type=_positive_int, default=8192, metavar="T", help="tokens per step (8192)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base and of x (the model's own, or bfloat16)")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="latency",
        help="latency: the fastest; params: the most parameters, then the fastest; balanced: between the two (latency)",
    )
    parser.add_argument(
        "--mode", choices=MODES, default="train", help="train: forward and backward; infer: forward (train)"
    )
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:1, ... or cpu (the GPU if there is one)")
    parser.add_argument("--no-measure", action="store_true", help="predict by the cost model; needs no GPU")
    parser.add_argument("--tiles", action="store_true", help="measure tiles of the chosen kernels too (a GPU, minutes)")
    parser.add_argument("--output", metavar="FILE", help="write the configuration: a .json file, or a folder")
    parser.add_argument("--report", metavar="FILE", help="write a page, report.html, and report.png beside it")


def _add_cache(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "cache",
        "show or clear what autotune has measured",
        'Show or clear the tuned table: measured times of layers, by which the backend "auto" chooses. It lies in the\n'
        "folder that C3A_TRITON_CACHE names, or in the user's cache folder.",
        """\
  c3a-triton cache show
  c3a-triton cache show --json
  c3a-triton cache clear""",
    )
    parser.add_argument("action", choices=("show", "clear"))


def _add_inspect(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "inspect",
        "show a model's layers and their block sizes, or what an adapter holds",
        "Show which layers of a model can be adapted, their block sizes, and the parameters of each; or an adapter's\n"
        "layers, block sizes and parameters. Of a model only the configuration is read, no weights.",
        """\
  c3a-triton inspect path/to/model
  c3a-triton inspect path/to/model/config.json --target-modules q_proj v_proj
  c3a-triton inspect path/to/model --target-modules '.*mlp.*' --exclude-modules down_proj
  c3a-triton inspect path/to/mixtral --target-parameters all-experts
  c3a-triton inspect path/to/adapter --json""",
    )
    parser.add_argument(
        "path", metavar="MODEL", help="a transformers folder or name, a config.json, or an adapter's folder"
    )
    _add_target_options(parser)
    _add_parameter_option(parser)

    def check_usage(args: argparse.Namespace) -> None:
        chosen = args.target_modules or args.target_parameters or args.exclude_modules
        if chosen and (Path(args.path) / CONFIG_NAME).exists():
            parser.error(f"{args.path} is an adapter, whose layers are fixed: leave --target-modules out")

    parser.set_defaults(check_usage=check_usage)


def _add_merge(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "merge",
        "merge an adapter into a plain model folder, shard by shard",
        "Write a model folder with an adapter merged into its weights, tensor by tensor: the model need not fit into\n"
        "memory. The folder appears when it is complete. Every weight is summed in float32 and rounded once. Where\n"
        "the model fits into memory, what the folder computes is compared with model and adapter before that.",
        """\
  c3a-triton merge --model path/to/model --adapter path/to/adapter --output merged
  c3a-triton merge --model path/to/model --adapter path/to/adapter --output merged --force --no-check""",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a transformers folder with safetensors")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter's folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace the output where it is a model's folder")
    parser.add_argument("--device", default="cpu", help="where the sums are computed: cpu (the default) or cuda")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="load both models in float32, one after the other, and compare what they make of random inputs; where "
        "that differs by more than rounding explains, nothing is written. By default it is done where the model fits "
        "into memory and its inputs are known; with --check it is an error where they are not. It takes about as "
        "long as the merge: two models are loaded, and three forward passes made",
    )
    parser.add_argument(
        "--merge-uncalled",
        action="store_true",
        help="merge layers too that the model never calls; by default they are left out, because "
        "adapters there compute nothing",
    )


def _add_bench(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "bench",
        "measure one layer or one model against PEFT on this machine",
        "Measure one adapted layer (--in, --out), or a training step of a model with random weights (MODEL, of which\n"
        "only the configuration is read), against PEFT's C3A and LoRA and the frozen base. First a layer's results\n"
        "are held against the dense definition, a model's against PEFT's. Medians of wall time, in turn; of a layer\n"
        "on a GPU, of its events with a cold cache.",
        """\
  c3a-triton bench --in 4096 --out 4096 --block-size 128 --tokens 1024
  c3a-triton bench --in 3072 --out 1024 --block-size 64 --tokens 8192 --dtype bfloat16 --backends auto direct fft
  c3a-triton bench path/to/model --block-size 64 --tokens 212 --batch 4 --target-modules q_proj v_proj
  c3a-triton bench path/to/model/config.json --block-size 64 --tokens 64 --layers 2 --device cpu --json""",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a transformers folder, name or config.json")
    parser.add_argument("--in", dest="in_features", type=_positive_int, metavar="N", help="one layer's input width")
    parser.add_argument("--out", dest="out_features", type=_positive_int, metavar="N", help="its output width")
    parser.add_argument("--block-size", type=_positive_int, required=True, metavar="B", help="size of circulant blocks")
    parser.add_argument("--tokens", type=_positive_int, required=True, metavar="T", help="tokens (of a sequence)")
    parser.add_argument("--batch", type=_positive_int, default=1, metavar="N", help="a model's sequences (default: 1)")
    parser.add_argument("--layers", type=_positive_int, metavar="N", help="measure a model of only so many layers")
    _add_target_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU where there is one)")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        metavar="NAME",
        help="ours to measure (default: auto, and of a layer on a GPU every other one that runs)",
    )
    parser.add_argument("--seconds", type=_seconds, default=4.0, help="for wall time in turn (default: %(default)s)")

    def check_usage(args: argparse.Namespace) -> None:
        widths = [width for width in (args.in_features, args.out_features) if width is not None]
        if len(widths) != (2 if args.model is None else 0):
            parser.error("give either MODEL, or --in and --out for one layer")
        for name in ("target_modules", "exclude_modules", "layers"):
            if widths and getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is for a MODEL")

    parser.set_defaults(check_usage=check_usage)


def _add_doctor(subparsers: Any) -> None:
    _command(
        subparsers,
        "doctor",
        "show versions, devices and which backends work here, for a bug report",
        "Show versions and devices, and compute a small product and its gradients by every backend on every device,\n"
        "held against the dense definition. The exit code is 1 where something that should work does not.",
        """\
  c3a-triton doctor
  c3a-triton doctor --json | jq .backends""",
    )


def _add_completion(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "completion",
        help="print a shell's completion script",
        description="Print the completion script of a shell, which needs the package shtab.",
        epilog="examples:\n  c3a-triton completion bash > ~/.local/share/bash-completion/completions/c3a-triton\n"
        '  c3a-triton completion zsh > "${fpath[1]}/_c3a-triton"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=_SHELLS)


# What they share


def _command(subparsers: Any, name: str, purpose: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A command's parser, with `--json` and examples below its help."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=purpose,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    """`--target-modules` and `--exclude-modules`, as `C3AConfig` takes them; see `options.module_choice`."""
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help='names of modules, one regular expression for whole names, or "all-linear"',
    )
    parser.add_argument(
        "--exclude-modules", nargs="+", metavar="NAME", help="names of modules, or one regular expression: left out"
    )


def _add_parameter_option(parser: argparse.ArgumentParser) -> None:
    """`--target-parameters`, as `C3AConfig` takes it; see `options.parameter_choice`."""
    parser.add_argument(
        "--target-parameters",
        nargs="+",
        metavar="NAME",
        help='names of parameters to be adapted themselves, such as stacked experts, or "all-experts"',
    )


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    try:
        return parse_count(text)
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


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time to measure for")
    return value
