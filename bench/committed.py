"""What GPUs have measured, as it is committed: `bench/results/<card>-<date>/`, written by `bench.publish`."""

from pathlib import Path
from typing import Any, NamedTuple

from c3a_triton import dispatch

from . import ROOT, report, runs, token_sweep

__all__ = ["RESULTS", "Card", "cards"]

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
    def ceilings(self) -> dispatch.Ceilings:
        """What the cost model takes of this card, as far as it was measured."""
        return token_sweep.fitted({**self.records.get("ceilings", {}), **self.records.get("tokens", {})})


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
        first = results[0]["environment"]
        for result in results:
            where = result["environment"]
            if where["gpu"] is None or where["tiny"]:
                raise ValueError(f"{path} holds a rehearsal: no GPU has measured it")
            if (where["gpu"]["name"], where["commit"]) != (first["gpu"]["name"], first["commit"]):
                raise ValueError(f"{path} mixes {first['gpu']['name']}, {first['commit']} with another card or commit")
        # Of what both jobs record, the first stays: `right` checks before it measures.
        records = {name: found for result in reversed(results) for name, found in result["records"].items()}
        found.append(Card(path, first, records))
    return found
