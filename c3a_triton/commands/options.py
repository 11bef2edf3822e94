"""What the commands share: parsers that look alike, options of the same meaning, output for machines."""

import argparse
import json
import re
from typing import Any

import torch

from c3a_triton.errors import ConfigError

__all__ = [
    "DTYPES",
    "add_command",
    "add_target_options",
    "device_option",
    "module_choice",
    "positive_int",
    "print_json",
]

DTYPES = ("float32", "float16", "bfloat16")


def add_command(subparsers: Any, name: str, purpose: str, description: str, examples: str) -> argparse.ArgumentParser:
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


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """`--target-modules` and `--exclude-modules`, as `C3AConfig` takes them; see `module_choice`."""
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help='names of modules, one regular expression for whole names, or "all-linear"',
    )
    parser.add_argument(
        "--exclude-modules", nargs="+", metavar="NAME", help="names of modules, or one regular expression: left out"
    )


def module_choice(values: list[str] | None) -> list[str] | str | None:
    """What a user's words mean to `C3AConfig`: "all-linear", one regular expression, or a list of names."""
    if values is None:
        return None
    if len(values) == 1 and (values[0] == "all-linear" or not re.fullmatch(r"[\w.,-]+", values[0])):
        return values[0]
    return [name for value in values for name in value.split(",") if name]


def positive_int(text: str) -> int:
    """A number of 1 or more, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def device_option(text: str | None) -> torch.device:
    """The device of this name; by default the GPU where there is one.

    Raises:
        ConfigError: torch knows no such device, or it is not here.
    """
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {text}: torch knows no such device") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {text}: choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {text}: torch sees {torch.cuda.device_count()} GPUs here")
    return device


def print_json(document: Any) -> None:
    """The one JSON document that a command with `--json` prints."""
    print(json.dumps(document, indent=2, ensure_ascii=False))
