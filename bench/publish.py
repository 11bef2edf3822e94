"""Results that came back from a GPU, put where people look: `python -m bench.publish FOLDER ...`.

Copies what `python -m bench.gpu right` and `tune` wrote to `bench/results/<card>-<date>/`, and writes README's section
and the tables of `docs/performance.md` anew from all that is there. What it names last is to be committed.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from . import ROOT, committed, predicted, readme, report

__all__ = ["copy", "main"]

LARGEST = 1 << 20  # bytes of a file that is worth a place in the repository
KINDS = (".json", ".md", ".xml", ".csv", ".xz")


def copy(sources: list[Path], results: Path = committed.RESULTS) -> Path:
    """Copy the files of one card's jobs into a folder of `results`, named by card and date; returns that folder.

    Raises:
        ValueError: there are no results, or none that a GPU has measured, or of two cards or commits.
    """
    files = [path for source in sources for path in sorted(source.iterdir()) if path.suffix in KINDS]
    found = [report.read_json(path)["environment"] for path in files if path.name in ("right.json", "tune.json")]
    said = ", ".join(map(str, sources))
    if not found:
        raise ValueError(f"neither right.json nor tune.json in {said}")
    where = committed.measured_on(found, said)
    card = re.sub(r"[^a-z0-9]+", "-", where["gpu"]["name"].lower().removeprefix("nvidia")).strip("-")
    target = results / f"{card}-{where['date']}"
    names = [path.name for path in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} in two folders: choose one of them, or go on in one folder with --resume")
    before = [report.read_json(path)["environment"]["commit"] for path in target.glob("*.json")]
    if set(before) - {where["commit"]}:
        raise ValueError(f"{target} has results of commit {before[0]}, these are of {where['commit']}: move one away")
    target.mkdir(parents=True, exist_ok=True)
    for path in files:
        if path.stat().st_size > LARGEST:
            print(f"left out: {path} is larger than {report.format_bytes(LARGEST)}")
        else:
            shutil.copyfile(path, target / path.name)
    return target


def main(argv: list[str] | None = None) -> int:
    """Publish; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what the jobs wrote")
    args = parser.parse_args(argv)
    try:
        target = copy(args.folders)
    except (ValueError, OSError) as error:
        print(f"python -m bench.publish: {error}", file=sys.stderr)
        return 1
    status = readme.main() or predicted.main()
    print(f"to commit: {target.relative_to(ROOT)}, README.md, docs/performance.md")
    return status


if __name__ == "__main__":
    sys.exit(main())
