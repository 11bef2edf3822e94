"""README's performance section, written from the committed results: `python -m bench.readme`.

Figures in README are never typed: they stand between two markers, and this is what puts them there.
"""

import sys
from pathlib import Path

from . import ROOT, cpu, report

__all__ = ["main", "section"]

RESULTS = ROOT / "bench" / "results" / "cpu.json"
BEGIN, END = "<!-- bench.readme: begin -->", "<!-- bench.readme: end -->"


def section() -> str:
    """The text between the markers."""
    results = report.read_json(RESULTS)
    where = results["environment"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "peft", "python"))
    return (
        f"CPU time of one thread of an {where['cpu']}, calls alternating, medians of one run ({versions}). Reproduce "
        f"with `{where['command']}`.\n\n{cpu.summary(results)}"
    )


def main() -> int:
    """Rewrite the section in README.md; returns the exit status."""
    path = Path(ROOT / "README.md")
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        print(f"{path} lacks the markers {BEGIN} and {END}", file=sys.stderr)
        return 1
    path.write_text(f"{before}{BEGIN}\n\n{section()}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
