"""Compiles ahead of time, without a GPU, what the GPU job will launch: `python -m bench.precompile`.

Fills a Triton cache for one card with the kernels of the job's parts, of its guards and of the tests that `--tests`
recorded, and with the C modules by which Triton launches them. `bench.precompiled` unpacks it on the GPU machine, at
the same absolute path, which Triton writes into its cache. Versions of Python and Triton have to be that machine's.
What the cache holds already is not compiled again.

Writes into --out: cache.tar.xz; manifest.json, of what compiled it; specialisations.jsonl.xz, to compile it elsewhere;
kernels.csv, a line per kernel: for what, its constants, CPU seconds to compile, registers, bytes of spills per thread,
bytes of shared memory per block.
"""

import argparse
import csv
import hashlib
import importlib
import json
import lzma
import math
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from . import ROOT, report, specialisations

__all__ = [
    "ARCHIVE",
    "MANIFEST",
    "OUT",
    "SPECIALISATIONS",
    "Built",
    "build",
    "environment",
    "fill",
    "main",
    "resources",
    "toolchain",
]

OUT = ROOT / "out" / "gpu"
CACHE = Path("/tmp/c3a_triton-cache")
ARCHIVE, MANIFEST, SPECIALISATIONS, TABLE = "cache.tar.xz", "manifest.json", "specialisations.jsonl.xz", "kernels.csv"
MOST_BYTES = 40 << 20  # of the archive
PURPOSE = 36  # characters of it in the table
RESOURCES = "resources.json"  # beside a kernel in the cache
# Symbols of libcuda.so.1 are found at run time; one that every module uses makes the linker note the library.
LIBCUDA = "int cuGetErrorString(void) { return 0; }\n"


@dataclass
class Built:
    """A kernel in the cache."""

    hash: str = ""
    compiled: bool = False  # now, not found
    resources: dict[str, Any] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)  # of the cache: its own, and those of modules that launch it
    error: str | None = None


def _triton(module: str) -> Any:
    """A module of Triton, which need not be installed where this one is only imported."""
    return importlib.import_module(f"triton.{module}")


def toolchain(card: str) -> dict[str, str]:
    """What decides whether a cache serves here: two machines with equal values have equal keys."""
    cache, compiler = _triton("runtime.cache"), _triton("backends.nvidia.compiler")
    return {
        "triton_key": hashlib.sha256(cache.triton_key().encode()).hexdigest(),
        "ptxas": compiler.get_ptxas_version(specialisations.target(card).arch).strip().splitlines()[-1],
        "triton": importlib.import_module("triton").__version__,
        "python": platform.python_version().rpartition(".")[0],
    }


def environment(cache: Path) -> dict[str, str]:
    """Variables under which Triton uses a cache, and writes only what is launched into it."""
    return {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}


# One kernel


def build(one: specialisations.Specialisation, card: str = specialisations.CARD) -> Built:
    """Compile a kernel for a card, unless the cache has it, and the modules that launch it; never raises."""
    hits: list[bool] = []
    knobs, cache = _triton("knobs"), _triton("runtime.cache")
    start = _cpu_seconds()
    try:
        with mock.patch.object(knobs.compilation, "listener", lambda cache_hit, **more: hits.append(cache_hit)):
            compile_ = importlib.import_module("triton").compile
            kernel = compile_(one.source(), target=specialisations.target(card), options=dict(one.options))
        entry = cache.get_cache_manager(kernel.hash)
        found = entry.get_file(RESOURCES)
        if hits == [False] or found is None:
            seconds = round(_cpu_seconds() - start, 2) if hits == [False] else None
            used = resources(kernel.asm["cubin"])
            used = {"registers": used["registers"], "spills": used["stack"] + used["local"]}
            known = {"seconds": seconds, **used, "shared": kernel.metadata.shared}
            found = entry.put(json.dumps(known), RESOURCES, binary=False)
        known = json.loads(Path(found).read_text(encoding="utf-8"))
        folders = [Path(found).parent.name, *_modules(kernel)]
    # Whatever a compiler raises is what is to be known about this kernel.
    except Exception as error:
        return Built(error=f"{one.name}, {one.purpose}: {type(error).__name__}: {error}")
    return Built(kernel.hash, hits == [False], known, folders)


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory (both are spills) of a thread of the one kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_triton("knobs").nvidia.cuobjdump.path, "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(item.split(":")[:2] for item in output.split() if item.count(":") == 1)
    return {name: int(usage[key]) for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))}


def _modules(kernel: Any) -> set[str]:
    """Build the C modules that Triton needs to launch a kernel, where they are not cached; returns their folders.

    Their key says whether Python is an ELF file, which it finds out by the program `file`: one each for with and
    without that.
    """
    nvidia, building = _triton("backends.nvidia.driver"), _triton("runtime.build")
    found: set[str] = set()
    machine = building.platform_key().rpartition(",")[0]
    compile_module = building._build

    def built(name: str, source: str, folder: str, library_dirs: list[str], *more: Any, **options: Any) -> str:
        kept = Path(once, name)
        if not kept.exists():
            link = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"]
            subprocess.run([os.environ.get("CC", "gcc"), *link, "-x", "c", "-"], input=LIBCUDA, text=True, check=True)
            shutil.copy(compile_module(name, source, folder, [*library_dirs, folder], *more, **options), kept)
        return str(kept)

    with tempfile.TemporaryDirectory() as once:
        for linkage in ("ELF", ""):
            with (
                mock.patch.object(building, "_build", built),
                mock.patch.object(building, "platform_key", return_value=f"{machine},{linkage}"),
                mock.patch.object(nvidia, "library_dirs", return_value=[nvidia.libdevice_dir]),
                # They are not loaded: there is no driver.
                mock.patch.object(building, "_load_module_from_path", _noting(found)),
            ):
                nvidia.CudaUtils()
                if hasattr(nvidia, "make_launcher"):  # a module per signature; newer versions have one for all
                    nvidia.CudaLauncher(kernel.src, kernel.metadata)
    return found


def _noting(folders: set[str]) -> Callable[[str, str], Any]:
    def load(name: str, path: str) -> Any:
        folders.add(Path(path).parent.name)
        return mock.MagicMock()

    return load


# Many


def fill(
    wanted: Sequence[specialisations.Specialisation],
    jobs: int,
    *,
    card: str = specialisations.CARD,
    seconds: float = math.inf,
) -> list[Built]:
    """Build kernels in processes of their own, in this order, until the time is up; the first ones of `wanted`."""
    deadline = time.monotonic() + seconds
    done: list[Built] = []
    with ProcessPoolExecutor(jobs) as pool:
        # One by one: what has begun when the time is up is waited for.
        for result in pool.map(partial(build, card=card), wanted):
            done.append(result)
            if len(done) % 100 == 0:
                compiled = sum(one.compiled for one in done)
                print(f"{len(done)} of {len(wanted)} kernels, {compiled} of them compiled", flush=True)
            if time.monotonic() > deadline:
                pool.shutdown(cancel_futures=True)
                break
    return done


# What is written


def pack(cache: Path, folders: Iterable[str], archive: Path) -> None:
    """These folders of a cache, as they are, in a compressed archive; equal files make an equal one."""
    part = archive.with_name(archive.name + ".part")
    with lzma.open(part, "wb", preset=3) as packed, tarfile.open(fileobj=packed, mode="w") as files:
        for folder in sorted(set(folders)):
            for path in sorted((cache / folder).iterdir()):
                files.add(path, arcname=f"{folder}/{path.name}", filter=_plain)
    os.replace(part, archive)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _table(kernels: Iterable[tuple[specialisations.Specialisation, Built]]) -> list[list[str]]:
    """A row per kernel, in an order that does not depend on that of the launches."""
    rows = []
    for one, built in kernels:
        known = {name: value for name, value in one.constants.items() if value is not None and value is not False}
        tile = " ".join(f"{name[6:]}{value}" for name, value in known.items() if name.startswith("BLOCK_"))
        constants = " ".join(
            name if value is True else f"{name}={value}"
            for name, value in known.items()
            if not name.startswith("BLOCK_")
        )
        pointers = " ".join(kind[1:] for _, kind, _ in one.arguments if kind.startswith("*"))
        options = (str(one.options.get(f"num_{name}", "-")) for name in ("warps", "stages"))
        found = (str(built.resources[name]) for name in ("seconds", "registers", "spills", "shared"))
        rows.append([one.name, pointers, constants, tile, *options, *found, one.purpose[:PURPOSE]])
    columns = ["kernel", "pointers", "constants", "tile", "warps", "stages"]
    return [[*columns, "CPU s", "registers", "spills", "shared", "for"], *sorted(rows)]


def _write(
    out: Path, cache: Path, wanted: Sequence[specialisations.Specialisation], done: Sequence[Built], card: str
) -> int:
    """Everything but the cache itself; returns the archive's bytes."""
    kernels = [(one, built) for one, built in zip(wanted, done, strict=False) if built.error is None]
    folders = {folder for _, built in kernels for folder in built.folders}
    pack(cache, folders, out / ARCHIVE)
    with lzma.open(out / SPECIALISATIONS, "wt", encoding="utf-8") as file:
        file.writelines(one.as_line() for one in wanted)
    with (out / TABLE).open("w", encoding="utf-8", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows(_table(kernels))
    counts = {"kernels": len(kernels), "modules": len(folders) - len({built.hash for _, built in kernels})}
    commit = report.environment(torch.device("cpu"))["commit"]
    where = {"card": card, "cache_dir": str(cache), "commit": commit}
    report.write_json(out / MANIFEST, {**toolchain(card), **where, **counts})
    return (out / ARCHIVE).stat().st_size


def main(argv: Sequence[str] | None = None) -> int:
    """Record, compile, pack; returns the exit status: 1 where a kernel does not compile or too much would travel."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.precompile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder for what is written (default: %(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=CACHE, help="on both machines (default: %(default)s)")
    parser.add_argument("--card", default=specialisations.CARD, help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    kinds = ("job", "guards")
    parser.add_argument("--of", nargs="*", choices=kinds, default=kinds, help="what to record (default: all)")
    parser.add_argument("--tests", type=Path, nargs="*", default=[], metavar="FILE", help="what tests recorded")
    args = parser.parse_args(argv)
    os.environ |= environment(args.cache_dir)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    parts = specialisations.record(specialisations.job_launches(), args.card) if "job" in args.of else []
    guards = specialisations.record(specialisations.guards_launches(), args.card) if "guards" in args.of else []
    tests = specialisations.read(args.tests)
    # What a run that is cut short should have comes first.
    wanted = specialisations.unique([*parts, *guards, *tests])
    print(
        f"{len(parts)} kernels of the job's parts, {len(guards)} of guards, {len(tests)} of tests: {len(wanted)}",
        flush=True,
    )
    done = fill(wanted, args.jobs, card=args.card)
    n_bytes = _write(args.out, args.cache_dir, wanted, done, args.card)
    failures = [built.error for built in done if built.error is not None]
    print(*failures, sep="\n")
    compiled = sum(built.compiled for built in done)
    print(
        f"{len(done)} kernels, {compiled} compiled now, {len(failures)} failed; {time.monotonic() - start:.0f} s; "
        f"{args.out / ARCHIVE}: {report.format_bytes(n_bytes)}"
    )
    if n_bytes > MOST_BYTES:
        print(f"the archive is larger than the {report.format_bytes(MOST_BYTES)} that can travel", file=sys.stderr)
    return 1 if failures or n_bytes > MOST_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
