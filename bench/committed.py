"""What GPUs have measured, as it is committed: `bench/results/<card>-<date>/`, written by `bench.publish`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from c3a_triton.operator import bounds
from c3a_triton.operator.launch import tiles

from . import ROOT, report, runs, token_sweep

__all__ = ["RESULTS", "Card", "cards", "measured_on"]

RESULTS = ROOT / "bench" / "results"


class Card(NamedTuple):
    """One card's results."""

    folder: Path
    environment: dict[str, Any]
    records: dict[str, runs.Records]  # by subject, of both jobs

    @property
    def title(self) -> str:
        """Card, date, versions and commit, in a line."""
        where = self.environment
        versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "triton", "peft", "python"))
        driver = where["gpu"].get("driver_version", "unknown")
        return f"{where['gpu']['name']}, {where['date']}, driver {driver} ({versions}; commit {where['commit']})"

    @property
    def ceilings(self) -> bounds.Ceilings:
        """What the cost model takes of this card: what was measured, else what is committed for its family."""
        gpu = self.environment["gpu"]
        major, minor = map(int, gpu["capability"].split("."))
        before = bounds.ceilings_of(gpu["name"], tiles.generation((major, minor)))
        return token_sweep.fitted({**self.records.get("ceilings", {}), **self.records.get("tokens", {})}, before)


def measured_on(environments: Sequence[dict[str, Any]], where: str) -> dict[str, Any]:
    """The first of these environments of results, which are all of one card and commit.

    Raises:
        ValueError: one is a rehearsal's, or of another card or commit than the first; `where` says whose they are.
    """
    first = environments[0]
    for found in environments:
        if found["gpu"] is None or found["tiny"]:
            raise ValueError(f"{where}: this is a rehearsal, no GPU has measured it")
        if (found["gpu"]["name"], found["commit"]) != (first["gpu"]["name"], first["commit"]):
            raise ValueError(f"{where}: results of two cards or commits, which must not be mixed")
    return first


def cards(folder: Path = RESULTS) -> list[Card]:
    """Every card's results, by name and date.

    Raises:
        ValueError: a folder holds results that no GPU has measured, or of two cards or commits.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            continue
        results = [report.read_json(name) for job in ("right", "tune") if (name := path / f"{job}.json").exists()]
        if not results:
            raise ValueError(f"{path} holds neither right.json nor tune.json")
        first = measured_on([result["environment"] for result in results], str(path))
        # Of what both jobs record, the first stays: `right` checks before it measures.
        records = {name: found for result in reversed(results) for name, found in result["records"].items()}
        found.append(Card(path, first, records))
    return found
