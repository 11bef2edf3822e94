"""The GPU job's Triton cache, which `bench.precompile` filled elsewhere: unpacked, and whether it serves here.

    python -m bench.precompiled DIR --report FILE     look every kernel up, compile what is not found, say how many

Kernels that are found cost about a millisecond each. Where none is, because Triton or ptxas are not those that compiled
them, they are compiled here by all cores, those of the job's parts first, as far as the time goes.
"""

import argparse
import lzma
import math
import os
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from c3a_triton.operator.launch import specs

from . import ROOT, precompile, processes, report, runs, specialisations

__all__ = ["SUBJECT", "adopt", "counted", "main", "missing", "unpack"]

SECONDS_TO_END = 5  # of the process that looks up, after its time
TINY = 8  # kernels that a rehearsal looks up


def adopt(folder: Path) -> None:
    """Unpack the cache in `folder`, where there is one, and let this process and its children use it."""
    if not (folder / precompile.MANIFEST).exists():
        return
    cache = report.read_json(folder / precompile.MANIFEST)["cache_dir"]
    os.environ["TRITON_CACHE_DIR"] = cache
    try:
        unpack(folder, Path(cache))
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        print(f"cache: {folder / precompile.ARCHIVE} cannot be unpacked: {type(error).__name__}: {error}", flush=True)


def missing(folder: Path) -> bool:
    """Whether the cache that belongs to `folder` has still to be unpacked, as on a machine that has just started."""
    manifest = folder / precompile.MANIFEST
    return manifest.exists() and not Path(report.read_json(manifest)["cache_dir"]).exists()


def unpack(folder: Path, cache: Path) -> None:
    """Put the archive's content where it was made, unless something is there."""
    if cache.exists():
        return
    part = cache.with_name(cache.name + ".part")
    with tarfile.open(folder / precompile.ARCHIVE, "r:xz") as archive:
        archive.extractall(part, filter="data")
    part.rename(cache)


# The first part of a job


def _tasks(setting: runs.Setting) -> Iterator[runs.Task]:
    yield runs.Task("look-up", 0, partial(_look_up, setting))


def _look_up(setting: runs.Setting, record: runs.Record) -> None:
    folder = setting.cache
    if not (folder / precompile.MANIFEST).exists():
        record |= {
            "status": "unavailable",
            "message": f"no {precompile.MANIFEST} in --cache {_told(folder)}: kernels are compiled when launched",
        }
        return
    manifest = report.read_json(folder / precompile.MANIFEST)
    here: dict[str, Any] = {**precompile.toolchain(manifest["card"])}
    if setting.device.type == "cuda":
        here["card"] = specs.card_of(setting.device)
    reasons = [f"{name} is {here[name]}, was {manifest[name]}" for name in here if here[name] != manifest[name]]
    print(f"cache: {'; '.join(reasons) or 'compiled by the same Triton and ptxas'}", flush=True)
    record |= {"hit": False, "reasons": reasons}
    if here.get("card", manifest["card"]) == manifest["card"]:  # else no kernel of it is launched here
        record |= _fill(setting)
        record["hit"] = not reasons and record["found"] > 0 and not (record["compiled"] or record["failed"])
    if not record["hit"]:
        counts = ", ".join(f"{record[name]} {name}" for name in ("found", "compiled", "left") if name in record)
        record |= {"status": "unavailable", "message": "; ".join([*reasons, counts, *record.get("failed", [])[:3]])}


def _told(folder: Path) -> str:
    return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)


def _fill(setting: runs.Setting) -> dict[str, Any]:
    """Counts of what a process of its own found and compiled; this one may run in Triton's interpreter."""
    path, log = setting.scratch / "cache.json", setting.scratch / "cache.log"
    path.unlink(missing_ok=True)
    seconds = max(1.0, setting.seconds_left() - 2 * SECONDS_TO_END)
    options = ["--report", str(path.resolve()), "--seconds", f"{seconds:.0f}"]
    options += ["--most", str(TINY)] if setting.tiny else []
    command = [*processes.python("bench.precompiled"), str(setting.cache.resolve()), *options]
    ended = processes.run(
        command, log=log, limit=seconds + SECONDS_TO_END, env=processes.natively(), grace=SECONDS_TO_END
    )
    if not path.exists():
        words = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the look-up ended with {ended.exit_code} after {ended.seconds:.0f} s: {' '.join(words)}")
    return report.read_json(path)


def _tables(records: runs.Records) -> list[str]:
    lines = []
    found = records.get("look-up", {})
    if "found" in found:
        spent = report.format_seconds(found["seconds"])
        counts = ", ".join(f"{found[name]} {name}" for name in ("found", "compiled", "left"))
        lines += ["", f"The cache {'serves' if found['hit'] else 'does not serve'} here: {counts}, in {spent}."]
    rows = [[key, record["compiled"]] for key, record in records.items() if key != "look-up"]
    return [*lines, "", report.format_table(["part", "kernels compiled during it"], rows)] if rows else lines


SUBJECT = runs.Subject(
    "cache",
    "Kernels compiled ahead of time",
    _tasks,
    _tables,
    goals=lambda records: [],
    plot=lambda records, path: None,
)


# The other parts


@contextmanager
def counted(results: runs.Results, part: str, log: Path) -> Iterator[None]:
    """Add to the results how many kernels were compiled meanwhile, which the cache did not have; `log` names them."""
    if part == SUBJECT.name:  # which counts itself
        yield
        return
    before = _kernels()
    try:
        yield
    finally:
        new = sorted(path.stem for path in _kernels() - before)
        record = results.records.setdefault(SUBJECT.name, {}).setdefault(part, {"status": "ok", "compiled": 0})
        record["compiled"] += len(new)
        with log.open("a", encoding="utf-8") as file:
            file.writelines(f"{part}: {name}\n" for name in new)
        results.save()


def _kernels() -> set[Path]:
    folder = os.environ.get("TRITON_CACHE_DIR")
    return set((Path(folder) if folder else Path.home() / ".triton" / "cache").glob("*/*.cubin"))


# What runs without the interpreter


def main(argv: Sequence[str] | None = None) -> int:
    """Look up and compile; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.precompiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what bench.precompile wrote")
    parser.add_argument("--report", type=Path, required=True, metavar="FILE", help="where the counts are written")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time for it")
    parser.add_argument("--most", type=int, help="so many kernels")
    args = parser.parse_args(argv)
    manifest = report.read_json(args.folder / precompile.MANIFEST)
    os.environ |= precompile.environment(Path(manifest["cache_dir"]))
    start = time.monotonic()
    wanted = specialisations.read([args.folder / precompile.SPECIALISATIONS])[: args.most]
    done = precompile.fill(wanted, args.jobs, card=manifest["card"], seconds=args.seconds)
    failed = [one.error for one in done if one.error is not None]
    compiled = sum(one.compiled for one in done)
    counts = {"found": len(done) - compiled - len(failed), "compiled": compiled, "left": len(wanted) - len(done)}
    report.write_json(args.report, {**counts, "failed": failed, "seconds": time.monotonic() - start})
    return 0


if __name__ == "__main__":
    sys.exit(main())
