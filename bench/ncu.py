"""NVIDIA's Nsight Compute on about fifty of our launches: what the memory and the multiprocessors did in each.

`ncu` runs `python -m bench.profiled --ncu`, which makes each launch once; its report is kept for its own viewer, and
read back as CSV for the records. It replays every launch some ten times, with empty caches. It may be missing, or be
refused the counters by the driver or the container: that is recorded in its own words. On a CPU nothing is measured:
the launches are listed as they would be.
"""

import csv
import io
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import processes, profiled, report, runs

__all__ = ["SUBJECT", "joined", "read_metrics"]

# Sections, not metrics: one name that a version does not know would end the run.
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "LaunchStats", "Occupancy")
_OPTIONS = [
    *("--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only"),
    *("-k", "regex:_kernel", *(word for section in _SECTIONS for word in ("--section", section)), "-f"),
]
# Of the part's time: for ncu to write its report, and for the report to be read.
_LAST_SECONDS = 20.0
_WORDS = 8  # lines of a log that are kept
DRY = "dry run on a CPU: no metric was read"

# What is kept of a report, by the columns that say it: the first that is there and has a number.
_FIGURES = {
    "seconds": r"gpu__time_duration\.(sum|avg|max)|Duration",
    "dram_bytes_read": r"dram__bytes_read\.sum",
    "dram_bytes_written": r"dram__bytes_write\.sum",
    "dram_bytes_per_second": r"dram__bytes\.sum\.per_second",
    "dram_percent": r"(gpu__dram_throughput|dram__throughput)\.avg\.pct_of_peak_sustained_elapsed|DRAM Throughput",
    "memory_percent": r"gpu__compute_memory_throughput\.avg\.pct_of_peak_sustained_elapsed|Mem Busy",
    "compute_percent": r"sm__throughput\.avg\.pct_of_peak_sustained_elapsed|Compute \(SM\) Throughput",
    "l2_hit_percent": r"lts__t_sector_hit_rate\.pct|L2 Hit Rate",
    "occupancy_percent": r"sm__warps_active\.avg\.pct_of_peak_sustained_active|Achieved Occupancy",
    "registers": r"launch__registers_per_thread|Registers Per Thread",
}
# To seconds and bytes.
_TIMES = {name + long: 10**-n for n, name in ((9, "n"), (6, "u"), (3, "m"), (0, "")) for long in ("s", "second")}
_BYTES = re.compile(r"([kKMGT]?)(byte|B)(/s|/second)?")
_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def _tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    yield runs.Task("launches", 0, partial(_measure, setting), 30.0)


def _measure(setting: runs.Setting, record: runs.Record) -> None:
    scratch = setting.scratch.resolve()
    listed, log = scratch / "ncu-launches.json", scratch / "ncu.log"
    kept = scratch / "kernels.ncu-rep"
    for old in (listed, kept):
        old.unlink(missing_ok=True)
    program = [*processes.python("bench.profiled"), "--ncu", str(listed), "--device", str(setting.device)]
    program += ["--tiny"] if setting.tiny else []
    if setting.device.type == "cpu":
        environment = dict(os.environ) | {"TRITON_INTERPRET": "1"}
        ended = processes.run(program, log=log, limit=setting.seconds_left(), env=environment, grace=1)
        record["launches"] = report.read_json(listed) if listed.exists() else []
        if ended.exit_code:
            raise RuntimeError(f"bench.profiled ended with {ended.exit_code}: {_words(log)}")
        _write_dry(scratch / "ncu.csv", record["launches"])
        return
    found = _program()
    if found is None:
        record |= {"status": "unavailable", "message": "ncu was not found"}
        return
    left = max(2.0, setting.seconds_left() - _LAST_SECONDS)
    program += ["--until", f"{time.time() + left:.0f}"]
    command = [str(found), *_OPTIONS, "-o", str(kept.with_suffix("")), *program]
    ended = processes.run(command, log=log, limit=left + _LAST_SECONDS / 2, env=processes.natively(), grace=5)
    record |= {"exit_code": ended.exit_code, "seconds": ended.seconds, "words": _words(log)}
    record["launches"] = report.read_json(listed) if listed.exists() else []
    if not kept.exists():
        record |= {"status": "unavailable", "message": f"no report: {record['words']}"}
        return
    command = [str(found), "--import", str(kept), "--page", "raw", "--csv"]
    processes.run(command, log=scratch / "ncu.csv", limit=max(2.0, setting.seconds_left()), grace=1)
    metrics = read_metrics((scratch / "ncu.csv").read_text(errors="replace"))
    mismatch = joined(record["launches"], metrics)
    if mismatch is not None:
        record |= {"status": "incomplete" if metrics else "unavailable", "message": mismatch, "metrics": metrics}


def _program() -> Path | None:
    """Where ncu lies: on the path, or in one of the usual folders."""
    on_path = shutil.which("ncu")
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [Path("/usr/local/cuda/bin"), *sorted(Path("/usr/local").glob("cuda-*/bin"), reverse=True)]
    folders += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    found = [Path(on_path)] if on_path else []
    found += [folder / "ncu" for folder in folders]
    return next((path for path in found if path.is_file() and os.access(path, os.X_OK)), None)


def _words(log: Path) -> str:
    """What a log says went wrong, or else its last lines."""
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("==ERROR==")]
    return " / ".join((errors or lines)[-_WORDS:])


def _write_dry(path: Path, launches: Sequence[profiled.Launch]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"{DRY}\n")
        rows = csv.DictWriter(file, ["case", "call", "place", "kernel", "grid", "bytes"], extrasaction="ignore")
        rows.writeheader()
        rows.writerows(launches)


# Reading a report


def read_metrics(text: str) -> list[dict[str, Any]]:
    """The rows of `ncu --page raw --csv` in the order of the launches: `kernel`, and what `_FIGURES` names in SI units.

    Lines before the header, a row of units or none, columns that are missing or hold no number: all that happens.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if "Kernel Name" in line), None)
    if start is None:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    units: dict[str, str] = {}
    if rows and not rows[0].get("ID"):
        units = {name: unit or "" for name, unit in rows.pop(0).items() if name}
    rows = [row for row in rows if (row.get("ID") or "").isdigit() and row.get("Kernel Name")]
    rows.sort(key=lambda row: int(row["ID"]))
    return [{"kernel": re.split(r"[(<]", row["Kernel Name"])[0].strip(), **_figures(row, units)} for row in rows]


def _figures(row: dict[str, str], units: dict[str, str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for figure, columns in _FIGURES.items():
        for column in (name for name in row if name and re.fullmatch(columns, name)):
            value = (row[column] or "").replace(",", "")
            if figure not in found and re.fullmatch(r"[\d.]+(e[+-]?\d+)?", value):
                found[figure] = float(value) * _factor(units.get(column, "").strip())
    if "dram_bytes_read" in found and "dram_bytes_written" in found:
        found["dram_bytes"] = found["dram_bytes_read"] + found["dram_bytes_written"]
    elif "dram_bytes_per_second" in found and "seconds" in found:
        found["dram_bytes"] = found["dram_bytes_per_second"] * found["seconds"]
    return found


def _factor(unit: str) -> float:
    if (found := _BYTES.fullmatch(unit)) is not None:
        return _PREFIXES[found[1]]
    return _TIMES.get(unit, 1.0)


def joined(launches: Sequence[profiled.Launch], metrics: Sequence[dict[str, Any]]) -> str | None:
    """Put into each launch its `metrics`, as far as both lists agree; what does not fit, or None."""
    kernels = {one["kernel"] for one in launches}
    ours = [row for row in metrics if row["kernel"] in kernels]
    for place, (one, row) in enumerate(zip(launches, ours, strict=False)):
        if one["kernel"] != row["kernel"]:
            return f"launch {place} is {one['kernel']}, in the report {row['kernel']}"
        one["metrics"] = {name: value for name, value in row.items() if name != "kernel"}
    return None if len(launches) == len(ours) else f"{len(ours)} launches in the report, {len(launches)} were made"


# What is read off


_HEADERS = [
    "call",
    "#",
    "kernel",
    "time",
    "must move",
    "DRAM moved",
    "DRAM",
    "memory",
    "compute",
    "L2 hits",
    "occupancy",
]
_PERCENT = ("dram_percent", "memory_percent", "compute_percent", "l2_hit_percent", "occupancy_percent")


def _tables(records: runs.Records) -> list[str]:
    lines = ["", "With empty caches before each launch. Percent of the card's peak, of sectors that hit, of warps."]
    rows: dict[str, list[list[object]]] = {}
    for record in records.values():
        for one in record.get("launches", ()):
            found = one.get("metrics", {})
            rows.setdefault(one["case"], []).append(
                [
                    one["call"],
                    one["place"],
                    one["kernel"],
                    report.format_seconds(found["seconds"]) if "seconds" in found else "-",
                    report.format_bytes(one["bytes"]),
                    report.format_bytes(round(found["dram_bytes"])) if "dram_bytes" in found else "-",
                    *(f"{found[name]:.0f}" if name in found else "-" for name in _PERCENT),
                ]
            )
    for case, found_rows in rows.items():
        lines += ["", f"### {case}", "", report.format_table(_HEADERS, found_rows)]
    return lines


SUBJECT = runs.Subject(
    "ncu", "What Nsight Compute saw", _tasks, _tables, goals=lambda records: [], plot=lambda records, path: None
)
