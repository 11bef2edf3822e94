"""What a measurement or a bug report says about this machine."""

import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

__all__ = ["cpu_name", "package_versions"]


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
