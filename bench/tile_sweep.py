"""Tiles for every kernel, tried one by one: for each look-up that the profiled calls make, candidates and their times.

A candidate's results are held against those of the committed tile; one that gives others, or that the card cannot run,
is recorded with the reason and ends nothing. What is timed is the whole call, of which a tile decides one launch or
two. Nothing is kept: the committed tiles are in use again after each task, and choosing by the times is for a reader.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from typing import Any
from unittest import mock

import torch

from c3a_triton.benchmark import timing
from c3a_triton.operator import dispatch
from c3a_triton.operator.launch import plans, specs, tiles
from c3a_triton.operator.launch.tiles import Lookup, TileConfig
from c3a_triton.tuning import tile_search

from . import overhead, profiled, report, runs

__all__ = ["SUBJECT", "candidates", "launches"]

META = torch.device("meta")
# A median of fifteen, of fewer where a call takes more than a millisecond.
SECONDS, REPEATS = 0.015, 15

Candidate = dict[str, Any]  # tile, status, message where that is not "ok", and times where it is


def candidates(lookup: Lookup) -> list[TileConfig]:
    """The committed tile, then others that may be faster and compute the same."""
    return [getattr(tiles, lookup[0])(*lookup[1]), *tiles.candidates(lookup)]


def launches(device: torch.device, *, tiny: bool = False) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every call with every candidate, by name: for those who record what they launch, on "meta" too."""
    for name, call in profiled.launches(device, tiny=tiny):
        for lookup in _lookups(call):
            for tile in _chosen(lookup, tiny):
                yield f"{name} | {_said(lookup)} | {_shape(tile)}", partial(_with, lookup, tile, call)


@contextmanager
def _in_use(lookup: Lookup, tile: TileConfig) -> Iterator[None]:
    """Within it one tile is another than the committed one; afterwards all are committed."""
    tiles.override({lookup: tile})
    plans.clear_plans()
    try:
        yield
    finally:
        _committed()


def _committed() -> None:
    tiles.override({})
    plans.clear_plans()
    dispatch.refresh()  # measured tiles, where a user has some, are for the next call that chooses


def _with(lookup: Lookup, tile: TileConfig, call: Callable[[], object]) -> object:
    with _in_use(lookup, tile):
        return call()


def _lookups(call: Callable[[], object]) -> list[Lookup]:
    """What a call asks for, with committed tiles."""
    _committed()
    with tiles.recorded() as asked:
        call()
    return sorted(asked, key=str)


def _chosen(lookup: Lookup, tiny: bool) -> list[TileConfig]:
    return candidates(lookup)[:2] if tiny else candidates(lookup)


def _said(lookup: Lookup) -> str:
    return " ".join(map(str, (lookup[0], *lookup[1])))


def _shape(tile: TileConfig) -> str:
    t, o, i, warps, stages = astuple(tile)
    return f"{t}×{o}×{i}, {warps} warps, {stages} stages"


# What is measured


def _tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    """One per call and look-up; look-ups that other calls have made before come last."""
    seen: set[Lookup] = set()
    for case, name, lookup in _asked(setting):
        measure = partial(_measure, setting, case, name, lookup)
        yield runs.Task(f"{case.key} {name} | {_said(lookup)}", int(lookup in seen), measure, 1.0)
        seen.add(lookup)


def _asked(setting: runs.Setting) -> list[tuple[profiled.Profiled, str, Lookup]]:
    """(case, call, look-up), found out without the device."""
    with (
        overhead.stubbed_launches(),
        mock.patch.object(specs, "card_of", return_value=specs.card_of(setting.device)),
    ):
        return [
            (case, name, lookup)
            for case in profiled.profiled_cases(tiny=setting.tiny)
            for name, call in profiled.calls(case, META).items()
            for lookup in _lookups(call)
        ]


def _measure(setting: runs.Setting, case: profiled.Profiled, name: str, lookup: Lookup, record: runs.Record) -> None:
    tried: list[Candidate] = []
    record |= {"case": case.key, "call": name, "lookup": [lookup[0], *lookup[1]], "candidates": tried}
    torch.manual_seed(0)
    call = profiled.calls(case, setting.device)[name]
    tolerance = tile_search.TOLERANCE[getattr(torch, case.layer.dtype).itemsize]
    timer = _timer(setting)
    committed, *others = _chosen(lookup, setting.tiny)
    expected = tile_search._tensors(_with(lookup, committed, call))
    for tile in (committed, *others):
        if tried and setting.seconds_left() < 0:  # where each is compiled first, a look-up takes a minute
            said = f"the time was up: {len(tried)} of {1 + len(others)} candidates"
            record |= {"status": "incomplete", "message": said}
            break
        found: Candidate = {"tile": list(astuple(tile)), "status": "ok"}
        tried.append(found)
        with _in_use(lookup, tile):
            # A tile may ask for more than the card has: shared memory, registers, threads.
            try:
                start = time.perf_counter()
                results = tile_search._tensors(call())
                same = tile_search._same(results, expected, tolerance)
                found["first_seconds"] = time.perf_counter() - start  # compilation included, where it was needed
                if same:
                    timed = timer.measure(call)
                    found |= {"seconds": timed.median, "p20": timed.p20, "p80": timed.p80}
                else:
                    found |= {"status": "wrong", "message": "other results than the committed tile's"}
            except Exception as error:
                found |= {"status": "failed", "message": f"{type(error).__name__}: {error}"}
                if setting.device.type == "cuda":
                    torch.cuda.synchronize(setting.device)  # what has killed the context ends the task here


def _timer(setting: runs.Setting) -> timing.Timer:
    if setting.device.type != "cuda":
        return timing.CpuTimer(repeats=1)
    return timing.CudaTimer(setting.device, seconds=SECONDS, max_repeats=REPEATS)


# What is read off


def _tables(records: runs.Records) -> list[str]:
    lines = [*_listed(records, "wrong", "Other results than with the committed tile")]
    rows = []
    for key, record in records.items():
        call, _, lookup = key.partition(" | ")
        tried = record.get("candidates", [])
        timed = [found for found in tried if "seconds" in found]
        if not timed or timed[0] is not tried[0]:
            rows.append([call, lookup, len(tried), record["status"], "-", "-", "-"])
            continue
        committed, best = timed[0], min(timed, key=lambda found: found["seconds"])
        rows.append(
            [
                call,
                lookup,
                f"{len(timed)} of {len(tried)}",
                f"{_shape(TileConfig(*committed['tile']))}: {report.format_seconds(committed['seconds'])}",
                "the same" if best is committed else _shape(TileConfig(*best["tile"])),
                report.format_seconds(best["seconds"]),
                f"{committed['seconds'] / best['seconds'] - 1:.1%}",
            ]
        )
    headers = ["call", "look-up", "timed", "committed", "fastest", "time", "gain"]
    lines += ["", "Times of whole calls, cold cache, medians.", "", report.format_table(headers, rows)]
    return lines + _listed(records, "failed", "What could not run")


def _listed(records: runs.Records, status: str, title: str) -> list[str]:
    """The candidates that ended so, with the reason, those of one look-up in a line."""
    lines = []
    for key, record in records.items():
        reasons: dict[str, list[str]] = {}
        for found in record.get("candidates", []):
            if found["status"] == status:
                reasons.setdefault(found["message"], []).append(_shape(TileConfig(*found["tile"])))
        lines += [f"- {key}: {'; '.join(shapes)}: {reason}" for reason, shapes in reasons.items()]
    return ["", f"### {title}", "", *lines] if lines else []


SUBJECT = runs.Subject(
    "tiles", "Tiles, tried one by one", _tasks, _tables, goals=lambda records: [], plot=lambda records, path: None
)
