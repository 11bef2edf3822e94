"""The command `c3a-triton`: what runs, and what becomes of errors.

Each command is a module of `commands` with `run`, a function of the parsed arguments that returns the exit code. It is
imported when it runs: help, versions and wrong usage are answered without torch, which takes seconds to import.
"""

import importlib
import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .commands.parsers import PROG, parse
from .errors import BackendError, C3AError

__all__ = ["main"]


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
            args = parse(argv)
            _check_kernels()
            code = importlib.import_module(f"{__package__}.commands.{args.command}").run(args)
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
    import torch

    # On a CPU torch has no class for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _failed(message: str) -> int:
    print(f"{PROG}: error: {message}", file=sys.stderr)
    return 1


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"{PROG}: warning: {message}", file=sys.stderr)
