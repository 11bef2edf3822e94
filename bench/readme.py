"""README's figures, and the CPU's in full in docs/performance.md, from committed results: `python -m bench.readme`.

They are never typed: they stand between two markers of each document, and this is what puts them there.
"""

import sys

from . import ROOT, committed, cpu, op, report

__all__ = ["cpu_section", "main", "section"]

BEGIN, END = "<!-- bench.readme: begin -->", "<!-- bench.readme: end -->"
NOTHING_MEASURED = """No GPU figure is given, because none has been measured yet. [docs/gpu.md](docs/gpu.md) is for
whoever has an NVIDIA GPU for fifteen minutes: two commands that test on it and measure against PEFT's C3A, PEFT's LoRA
and the frozen base."""


def section() -> str:
    """README's text between the markers: the CPU in short, then every GPU whose results are committed."""
    results = report.read_json(committed.RESULTS / "cpu.json")
    gpus = [_gpu_section(card) for card in committed.cards(committed.RESULTS)]
    introduction = (
        f"One thread of an {results['environment']['cpu']}, medians of one run "
        "([every case, and how to reproduce it](docs/performance.md#on-a-cpu)):"
    )
    return "\n\n".join([introduction, cpu.headline(results), *(gpus or [NOTHING_MEASURED])])


def cpu_section() -> str:
    """The text between the markers of docs/performance.md: the CPU, every case."""
    results = report.read_json(committed.RESULTS / "cpu.json")
    where = results["environment"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "peft", "python"))
    return (
        f"CPU time of one thread of an {where['cpu']}, calls alternating, medians of one run ({versions}). Reproduce "
        f"with `{where['command']}`.\n\n{cpu.summary(results)}"
    )


def _gpu_section(card: committed.Card) -> str:
    """One layer on a card, against its peers; the goals, reached or not, stand in docs/performance.md."""
    lines = op.both_tables(card.records.get("op", {}))
    goals = [goal for goal in op.goals(card.records.get("op", {})) if goal.reached is not None]
    reached = sum(bool(goal.reached) for goal in goals)
    return (
        f"{card.title}, medians of one run; of {len(goals)} goals {reached} are reached "
        "([which, and what was predicted](docs/performance.md)). Reproduce with `python -m bench.gpu right --out DIR`."
        "\n" + "\n".join(lines)
    )


def main() -> int:
    """Rewrite the sections in both documents; returns the exit status."""
    return report.write_between(ROOT / "README.md", BEGIN, END, section()) or report.write_between(
        ROOT / "docs" / "performance.md", BEGIN, END, cpu_section()
    )


if __name__ == "__main__":
    sys.exit(main())
