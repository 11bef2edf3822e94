"""Where a measurement was made, and how its results are written down."""

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from c3a_triton.adapters.report import format_bytes, format_seconds
from c3a_triton.benchmark.machine import cpu_name, package_versions

from . import ROOT

__all__ = [
    "Goal",
    "at_least",
    "at_most",
    "environment",
    "format_bytes",
    "format_seconds",
    "format_table",
    "goals_table",
    "output",
    "read_json",
    "write_between",
    "write_json",
]

PACKAGES = ("torch", "triton", "c3a_triton", "peft", "transformers", "numpy")
GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")


def output(*command: str) -> str | None:
    """What `command` prints, or None where it is missing, fails or takes half a minute."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    commit = output("git", "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("-dirty" if output("git", "status", "--porcelain") else "")


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    gpu: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    # CUDA_VISIBLE_DEVICES renumbers torch's devices, not nvidia-smi's.
    identity = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else device.index or 0
    # The clocks are recorded as found; nothing here changes them.
    query = output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader", f"--id={identity}")
    if query is not None:
        gpu |= dict(zip(GPU_FIELDS, (value.strip() for value in query.split(",")), strict=False))
    return gpu


def environment(device: torch.device, commit: str | None = None, *, tiny: bool = False) -> dict[str, Any]:
    """Device, driver, versions, commit, date, CPU and command of this process, for a results file.

    Args:
        device: where it computes.
        commit: what to say where git does not know.
        tiny: whether sizes only try the code, so that times say nothing.
    """
    return {
        "date": datetime.date.today().isoformat(),
        "tiny": tiny,
        "device": device.type,
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": package_versions(PACKAGES),
        "commit": _commit() or commit,
        "command": f"python -m bench.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip(),
    }


def write_json(path: Path, results: Any) -> None:
    """Write `results` to `path` whole: a reader, or a run that is cut short, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table, padded so that it also reads well in a terminal."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


@dataclass(frozen=True)
class Goal:
    """A figure to reach; `measured` and `reached` are None where it was not measured."""

    case: str
    goal: str
    measured: str | None = None
    reached: bool | None = None


def at_most(case: str, limit: float, value: float | None, *, what: str = "", unit: str = "") -> Goal:
    """A goal that is reached by `value` (None: not measured) up to `limit`; `what` names the case that `value` is."""
    return _goal(case, f"≤ {limit:g}{unit}", value, value is not None and value <= limit, what, unit)


def at_least(case: str, limit: float, value: float | None, *, what: str = "", unit: str = "") -> Goal:
    """As `at_most`, for a value that has to be `limit` or more."""
    return _goal(case, f"≥ {limit:g}{unit}", value, value is not None and value >= limit, what, unit)


def _goal(case: str, goal: str, value: float | None, reached: bool, what: str, unit: str) -> Goal:
    if value is None:
        return Goal(case, goal)
    return Goal(case, goal, f"{value:.3g}{unit}" + (f" ({what})" if what else ""), reached)


def write_between(path: Path, begin: str, end: str, text: str) -> int:
    """Put `text` between two markers of a document; returns an exit status, 1 where they are missing."""
    document = path.read_text(encoding="utf-8")
    before, _, rest = document.partition(begin)
    _, marker, after = rest.partition(end)
    if not marker:
        print(f"{path} lacks the markers {begin} and {end}", file=sys.stderr)
        return 1
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
    return 0


def goals_table(goals: Sequence[Goal]) -> str:
    """A line per goal: case, goal, measured, reached."""
    rows = [
        [found.case, found.goal, found.measured or "not measured", {None: "-", True: "yes", False: "no"}[found.reached]]
        for found in goals
    ]
    return format_table(["case", "goal", "measured", "reached"], rows)
