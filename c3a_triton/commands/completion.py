"""`c3a-triton completion`: the completion script of a shell."""

import argparse
from typing import Any

from c3a_triton.errors import C3AError

from .parsers import parser

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """The command."""
    try:
        import shtab
    except ImportError as error:
        raise C3AError("completion needs the package shtab: pip install shtab, or c3a_triton[cli]") from error
    whole = parser()
    _complete_paths(whole, {"DIR": shtab.DIRECTORY, "MODEL": shtab.DIRECTORY, "FILE": shtab.FILE})
    print(shtab.complete(whole, shell=args.shell))
    return 0


def _complete_paths(parser: argparse.ArgumentParser, completers: dict[str, Any]) -> None:
    """Mark the arguments that take a path, which their metavar tells."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _complete_paths(child, completers)
        elif action.metavar in completers:
            action.complete = completers[action.metavar]  # type: ignore[attr-defined]
