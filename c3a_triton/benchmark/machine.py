"""What a measurement or a bug report says about this machine."""

import contextlib
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

__all__ = ["available_memory", "cpu_name", "package_versions"]


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The versions of Python and of installed packages; None for those that are missing."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if versions.get("torch"):
        import torch

        versions["torch"] = torch.__version__  # with the build ("+cu130"), which the metadata of some wheels lacks
    return versions


def available_memory() -> int | None:
    """Bytes of main memory that this process can still take, within its control group's limit; None if unknown."""
    amounts = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        amounts += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # without a limit it says "max"
            stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
            # What is kept of files gives way.
            taken = int(used.read_text()) - int(stat.get("inactive_file", 0))
            amounts.append(int(limit.read_text()) - taken)
    return min(amounts, default=None)
