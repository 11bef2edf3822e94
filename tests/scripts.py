"""The examples as scripts, run in this process: what they import takes longer than they do."""

import importlib
import runpy
import sys
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_example(name: str, folder: Path, *arguments: str) -> int:
    """The exit status of `python examples/NAME.py ARGUMENTS`, started in a folder; what it sets here is put back."""
    script = EXAMPLES / f"{name}.py"
    logging = importlib.import_module("transformers.utils.logging")
    verbosity = logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(EXAMPLES)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()
    return 0
