"""The command `c3a-triton`: its parser, and what becomes of errors.

Each command is a module that adds its parser and sets `run`, a function of the parsed arguments that returns the exit
code: 0 for success, 1 where something failed, 2 for a command line that cannot be understood.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .errors import BackendError, C3AError

__all__ = ["main"]

PROG = "c3a-triton"
# (module, function) that adds each command, in the order of the help text.
COMMANDS = (
    ("commands.autotune", "add_autotune"),
    ("commands.autotune", "add_cache"),
    ("commands.inspect", "add"),
    ("commands.merge", "add"),
    ("commands.bench", "add"),
    ("commands.doctor", "add"),
)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments after the program's name; None means the process's own.

    Returns:
        The exit code: 0 success, 1 failure with a message on standard error, 2 wrong usage, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that lacks a sign gets its escape, not an exception.
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args = _parser().parse_args(argv)
            _check_kernels()
            code = args.run(args)
            sys.stdout.flush()
            return code
    except SystemExit as end:  # argparse: 0 after --help, 2 after wrong usage
        return end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has seen enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (C3AError, OSError) as error:
        return _failed(str(error))
    except Exception as error:
        if _is_want_of_memory(error):
            return _failed(f"not enough memory: {error}")
        traceback.print_exc()
        print(
            f"{PROG}: this is a mistake in c3a_triton, not yours. Please report it, with what `{PROG} doctor` prints",
            file=sys.stderr,
        )
        return 1


def _check_kernels() -> None:
    """Refuse a checkout that is not installed, which `python -m c3a_triton` takes where it is the working directory.

    Raises:
        BackendError: its kernels are not in the package; with the remedy.
    """
    if importlib.util.find_spec(f"{__package__}.kernels") is None:
        package = Path(__file__).resolve().parent
        raise BackendError(
            f"the kernels are missing, because {package} is a checkout that is not installed: "
            f"run `pip install -e .` in {package.parent}, or start from another folder if c3a_triton is installed"
        )


def _is_want_of_memory(error: Exception) -> bool:
    # On a CPU torch has no class for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _failed(message: str) -> int:
    print(f"{PROG}: error: {message}", file=sys.stderr)
    return 1


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"{PROG}: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="C3A adapters from the command line.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"c3a_triton {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for module, function in COMMANDS:
        getattr(importlib.import_module(f"{__package__}.{module}"), function)(subparsers)
    _add_completion(subparsers, parser)
    return parser


def _add_completion(subparsers: Any, whole: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "completion",
        help="print a shell's completion script",
        description="Print the completion script of a shell, which needs the package shtab.",
        epilog="examples:\n  c3a-triton completion bash > ~/.local/share/bash-completion/completions/c3a-triton\n"
        '  c3a-triton completion zsh > "${fpath[1]}/_c3a-triton"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=_SHELLS)
    parser.set_defaults(run=lambda args: _print_completion(whole, args.shell))


def _print_completion(parser: argparse.ArgumentParser, shell: str) -> int:
    try:
        import shtab
    except ImportError as error:
        raise C3AError("completion needs the package shtab: pip install shtab, or c3a_triton[cli]") from error
    _complete_paths(parser, {"DIR": shtab.DIRECTORY, "MODEL": shtab.DIRECTORY, "FILE": shtab.FILE})
    print(shtab.complete(parser, shell=shell))
    return 0


def _complete_paths(parser: argparse.ArgumentParser, completers: dict[str, Any]) -> None:
    """Mark the arguments that take a path, which their metavar tells."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _complete_paths(child, completers)
        elif action.metavar in completers:
            action.complete = completers[action.metavar]  # type: ignore[attr-defined]
