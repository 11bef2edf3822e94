"""NVIDIA's compute-sanitizer: where it lies, how it is run on one of our processes, what it says.

It watches every access of the kernels: memcheck those to memory, racecheck hazards between threads in shared memory.
It may be missing, lack its own libraries, or be refused by the driver or the container; it may even report no errors
without having run anything. So the process it watches keeps a record of its own, and "passed" needs both. initcheck is
left out: kernels read the padding of spectra, which nobody has written, and never use it.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

__all__ = ["ERROR_EXIT_CODE", "TOOLS", "Log", "candidates", "command", "read_log", "version"]

TOOLS = ("memcheck", "racecheck")
ERROR_EXIT_CODE = 86
_NAME = "compute-sanitizer"
_LIBRARY = "libsanitizer-collection.so"

# Options that need not exist: those that a copy's --help does not name are left out.
_OPTIONS = {
    # One process; following others needs more of the installation and of the container.
    "--target-processes": "application-only",
    # The default of some is ten seconds; torch's import can take longer.
    "--launch-timeout": "120",
    # All of ours are called so, those of the hot loops of cuBLAS are not.
    "--kernel-name": "kernel_substring=_kernel",
}
_MEMCHECK_OPTIONS = {
    # What follows an error is still checked.
    "--destroy-on-device-error": "kernel",
    # Calls that fail are torch's and Triton's way to ask what a driver can do.
    "--report-api-errors": "no",
    # Allocations do not touch each other.
    "--padding": "512",
}


def candidates() -> list[Path]:
    """Every copy on this machine, those first that are most likely to fit its driver."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), key=_numbers, reverse=True)]
    roots.append(Path(sys.prefix))
    packages = find_spec("nvidia")  # NVIDIA's wheels share this folder
    for location in (packages.submodule_search_locations or []) if packages else []:
        roots += sorted(Path(location).glob("*"))
    on_path = shutil.which(_NAME)
    found = [Path(on_path)] if on_path else []
    found += [root / folder / _NAME for root in roots for folder in ("bin", _NAME)]
    usable = [path for path in found if path.is_file() and os.access(path, os.X_OK)]
    return list({path.resolve(): path for path in reversed(usable)}.values())[::-1]


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _asked(path: Path, option: str) -> str:
    try:
        done = subprocess.run([path, option], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{option}: {error}"
    return done.stdout + done.stderr


def version(path: Path) -> str:
    """What it says of its version, in one line."""
    lines = _asked(path, "--version").strip().splitlines()
    return lines[-1] if lines else "unknown"


def command(path: Path, tool: str, log: Path, program: Sequence[str]) -> list[str]:
    """The command that runs `program` under one of `TOOLS`, whose own words go to `log`."""
    known = _asked(path, "--help")
    options = _OPTIONS | (_MEMCHECK_OPTIONS if tool == "memcheck" else {})
    chosen = [word for option, value in options.items() if option in known for word in (option, value)]
    # Wheels have the libraries elsewhere than the toolkit, and the program does not look there.
    libraries = path.resolve().parent.parent / "lib"
    if (libraries / _LIBRARY).exists():
        chosen += ["--injection-path", str(libraries)]
    escaped = str(log).replace("%", "%%")
    return [
        *(str(path), "--tool", tool, "--error-exitcode", str(ERROR_EXIT_CODE), "--log-file", escaped),
        *(*chosen, *program),
    ]


# What it writes: reports, each a line and indented ones below it, then a summary

_LINE = re.compile(r"^=========(?P<indent> *)(?P<words>.*)$")
_SUMMARY = re.compile(r"^(ERROR|RACECHECK|LEAK) SUMMARY: (?P<count>[\d,.]+)")
_KERNEL = re.compile(r"\b\w+_kernel\b")


@dataclass
class Log:
    """What it wrote."""

    count: int | None = None  # of errors or hazards; None where it has not come to its summary
    reports: list[list[str]] = field(default_factory=list)  # about kernels
    complaints: list[list[str]] = field(default_factory=list)  # about anything else

    def about(self, kernels: Collection[str]) -> list[list[str]]:
        """The reports about any of these kernels."""
        return [report for report in self.reports if _kernels(report).intersection(kernels)]


def read_log(text: str) -> Log:
    """Read what one of `TOOLS` wrote."""
    log = Log()
    blocks: list[list[str]] = []
    for line in text.splitlines():
        found = _LINE.match(line)
        words = found["words"].strip() if found else ""
        if not found or not words or words == "COMPUTE-SANITIZER":
            continue
        summary = _SUMMARY.match(words)
        if summary:
            if log.count is None:  # a second line says how many were not printed
                log.count = int(re.sub(r"\D", "", summary["count"]))
        elif len(found["indent"]) > 1 and blocks:
            blocks[-1].append(words)
        else:
            blocks.append([words])
    for block in blocks:
        (log.reports if _kernels(block) else log.complaints).append(block)
    return log


def _kernels(report: Sequence[str]) -> set[str]:
    """The kernels that a report names, but not where Python was when it launched them."""
    return {name for line in report if not line.startswith("Host Frame") for name in _KERNEL.findall(line)}
