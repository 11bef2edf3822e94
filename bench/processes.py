"""Processes with a time limit, whose output goes to a file."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import ROOT

__all__ = ["Ended", "natively", "python", "run"]

# Seconds that an interrupted process has for what it still wants to write.
GRACE = 20


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    exit_code: int
    interrupted: bool  # because its time was up
    seconds: float


def run(
    command: Sequence[str], *, log: Path, limit: float, env: Mapping[str, str] | None = None, grace: float = GRACE
) -> Ended:
    """Run `command` in the repository root; nothing of it is left when this returns.

    Args:
        command: program and arguments.
        log: file for all of its output.
        limit: seconds after which it is interrupted.
        env: its whole environment; None for this process's own.
        grace: seconds from there until it is killed, with all it has started.

    Raises:
        OSError: it cannot be started.
    """
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            interrupted = not _wait(process, limit)
            if interrupted:
                process.send_signal(signal.SIGINT)
                _wait(process, grace)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started, which is in its session
                process.wait()
    return Ended(process.returncode, interrupted, time.perf_counter() - start)


def python(module: str) -> list[str]:
    """The command that runs a module of this repository."""
    return [sys.executable, "-m", module]


def natively() -> dict[str, str]:
    """The environment without Triton's interpreter, which this process may run in."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
