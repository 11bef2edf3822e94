"""README's performance section, written from the committed results: `python -m bench.readme`.

Figures in README are never typed: they stand between two markers, and this is what puts them there.
"""

import sys
from typing import Any

from . import ROOT, cpu, gpu, op, report

__all__ = ["main", "section"]

RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench.readme: begin -->", "<!-- bench.readme: end -->"
NOTHING_MEASURED = """No GPU figure is given, because none has been measured yet. `python -m bench.gpu --out DIR` on a
machine with an NVIDIA GPU runs the tests natively and then measures, in under ten minutes and against PEFT's C3A,
PEFT's LoRA and the frozen base: one layer, decoding, a model's training step, merging, memory and Python's time."""


def section() -> str:
    """The text between the markers: the CPU, then every GPU whose results are committed."""
    results = [report.read_json(path) for path in sorted(RESULTS.glob("*.json"))]
    gpus = [_gpu_section(found) for found in results if found["environment"]["device"] == "cuda"]
    return "\n\n".join([_cpu_section(), *(gpus or [NOTHING_MEASURED])])


def _cpu_section() -> str:
    results = report.read_json(RESULTS / "cpu.json")
    where = results["environment"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "peft", "python"))
    return (
        f"CPU time of one thread of an {where['cpu']}, calls alternating, medians of one run ({versions}). Reproduce "
        f"with `{where['command']}`.\n\n{cpu.summary(results)}"
    )


def _gpu_section(results: dict[str, Any]) -> str:
    """What `bench.gpu` measured: the goals, reached or not, then one layer."""
    where, records = results["environment"], results["records"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "triton", "peft", "python"))
    goals = [
        goal
        for subject in (part.subject for parts in gpu.JOBS.values() for part in parts)
        for goal in subject.goals(records.get(subject.name, {}))
    ]
    text = (
        f"{where['gpu']['name']}, driver {where['gpu'].get('driver_version', 'unknown')} ({versions}; commit "
        f"{where['commit']}), medians of one run. Reproduce with `python -m bench.gpu --out DIR`.\n\n"
        f"{report.goals_table(goals)}"
    )
    return text + "\n" + "\n".join(op.both_tables(records.get("op", {})))


def main() -> int:
    """Rewrite the section in README.md; returns the exit status."""
    return report.write_between(ROOT / "README.md", BEGIN, END, section())


if __name__ == "__main__":
    sys.exit(main())
