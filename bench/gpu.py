"""The GPU job, in two commands of five minutes: `docs/gpu.md` says how to run them and what to do with what they write.

    python -m bench.gpu right --out DIR     is it right, what are the ceilings, and the figures that goals name
    python -m bench.gpu tune --out DIR      data to tune from without a card; or, where `right` found wrong results
                                            (--right FILE), those cases again with everything that explains them

Each ends by itself. Results are rewritten after every measurement, the summary and the logs after every part, so that
nothing is lost when it is killed; the table comes last. `--device cpu --tiny` rehearses it on a machine without a GPU,
and writes the same files.
"""

import argparse
import faulthandler
import io
import lzma
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import (
    ROOT,
    STARTED,
    ceilings,
    checks,
    diagnosis,
    model,
    native_tests,
    ncu,
    op,
    precompile,
    precompiled,
    profiled,
    report,
    runs,
    tile_sweep,
    token_sweep,
)

__all__ = ["JOBS", "main"]

SECONDS = 280  # of the 300 that a command has: what comes before this process and is written last takes its time
SCRATCH = "c3a_triton-gpu"
GRACE = 10  # until the process ends, whatever it does
COPIED = (".xml", ".csv", ".ncu-rep")  # what parts leave in the folder for logs that is wanted beside the results


@dataclass(frozen=True)
class Part:
    """One part of a job, with the most seconds that it may take.

    Together they fill a job's time, where the cache serves: that takes ten seconds and not sixty; starting takes ten.
    """

    subject: runs.Subject
    seconds: float


CACHE = Part(precompiled.SUBJECT, 60)
RIGHT = (
    CACHE,
    Part(native_tests.SUBJECT, 80),
    Part(checks.guarded(), 30),
    Part(checks.sanitized(("memcheck",), checks.one_each), 30),
    Part(ceilings.SUBJECT, 20),
    Part(op.HEADLINE, 75),
    Part(profiled.SUBJECT, 25),
)
TUNE = (
    CACHE,
    Part(tile_sweep.SUBJECT, 105),
    Part(ncu.SUBJECT, 70),
    Part(model.BRIEF, 45),
    Part(token_sweep.SUBJECT, 40),
)
JOBS = {"right": RIGHT, "tune": TUNE}
AGAIN_SECONDS = 200  # of what was wrong; the sanitizers have the rest


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=JOBS)
    runs.add_options(parser)
    names = sorted({"again", *(part.subject.name for parts in JOBS.values() for part in parts)})
    parser.add_argument("--only", choices=names, action="append", help="only these parts of the job")
    parser.add_argument("--workers", type=int, help="test processes (default: half of the cores)")
    scratch = Path(tempfile.gettempdir())
    said = f"where logs lie meanwhile, in a folder {SCRATCH} that is begun anew (default: %(default)s)"
    parser.add_argument("--scratch", type=Path, default=scratch, help=said)
    parser.add_argument(
        "--cache", type=Path, default=precompile.OUT, metavar="DIR", help="from bench.precompile (default: %(default)s)"
    )
    found = "what `right` wrote: where it found something wrong, `tune` explains that instead"
    parser.add_argument("--right", type=Path, metavar="FILE", help=found)
    parser.set_defaults(budget_s=SECONDS)
    args = parser.parse_args(argv)
    if args.right is not None and args.job != "tune":
        parser.error("--right FILE is for `tune`")
    args.chosen, args.note = _parts(parser, args)
    here = [part.subject.name for part in args.chosen]
    if strange := [name for name in args.only or () if name not in here]:
        parser.error(f"--only {' '.join(strange)}: `{args.job}` has {', '.join(here)} here")
    try:
        re.compile(args.cases or "")
    except re.error as error:
        parser.error(f"--cases {args.cases}: {error}")
    return args


def _parts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[tuple[Part, ...], str | None]:
    """The parts of the job, and what is to be said about their choice."""
    if args.right is None:
        return JOBS[args.job], None
    try:
        right = report.read_json(args.right)
        wrong = diagnosis.wrong(right["records"])
        of = f"{args.right.name} of commit {right['environment']['commit']}"
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"--right {args.right} is not the right.json that came back: {type(error).__name__}: {error}")
    if not wrong:
        return TUNE, f"{of} shows nothing wrong that can be run again: this is data to tune from"
    counts = f"cases of kernels: {len(wrong.cases)}, tests: {len(wrong.tests)}, layers: {len(wrong.layers)}"
    note = f"{of} shows what is wrong ({counts}): it is run again, and nothing is tuned"
    under_tools = diagnosis.sanitized(wrong)
    more = () if under_tools is None else (Part(under_tools, SECONDS - AGAIN_SECONDS),)
    return (CACHE, Part(diagnosis.subject(wrong), AGAIN_SECONDS if more else SECONDS), *more), note


def _head(job: runs.Job) -> list[str]:
    name = job.args.job
    title = {"right": "Is it right, and what are the ceilings", "tune": "Data to tune from"}[name]
    lines = [f"# {title}", "", *runs.where(job.results)]
    if job.setting.device.type == "cpu":
        lines[0] = f"# A rehearsal on a CPU: {title}"
        lines.insert(1, "\nNo GPU took part: nothing here says anything about one.")
    return lines


def _write(job: runs.Job, subjects: Sequence[runs.Subject]) -> str:
    """The summary and the logs as far as they are; returns the summary."""
    text = runs.summary(job.results, subjects, _head(job))
    out, name = job.args.out, job.args.job
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    job.results.save()
    scratch = job.setting.scratch
    for result in scratch.iterdir():
        if result.suffix in COPIED:
            (out / result.name).write_bytes(_anonymous(result.read_bytes(), keep_size=result.suffix == ".ncu-rep"))
    archive = out / f"{name}-logs.tar.xz"
    part = archive.with_name(archive.name + ".part")
    with lzma.open(part, "wb", preset=1) as packed, tarfile.open(fileobj=packed, mode="w") as logs:
        for path in sorted(scratch.rglob("*")):
            if path.is_file() and path.suffix not in COPIED:
                content = _anonymous(path.read_bytes())
                member = tarfile.TarInfo(f"logs/{path.relative_to(scratch)}")
                member.size = len(content)
                logs.addfile(member, io.BytesIO(content))
    os.replace(part, archive)
    return text


def _anonymous(content: bytes, *, keep_size: bool = False) -> bytes:
    """Without where the checkout lies, and without the machine's name, which pytest writes.

    With `keep_size` every byte stays where it is, as a format needs that says how long its texts are.
    """
    root = str(ROOT).encode()
    if keep_size:
        return content.replace(root, b".".ljust(len(root), b"/"))
    content = re.sub(rb' hostname="[^"]*"', b"", content)
    return content.replace(root, b".")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit status: 3 where something of ours is wrong or failed.

    As a program (`argv` is None) its time has run since the process started.
    """
    spent = time.monotonic() - STARTED if argv is None else 0.0
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    args.budget_s -= spent
    if torch.device(args.device).type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # is read when kernels are defined: with the first launch
    precompiled.adopt(args.cache)
    job = runs.open_job("python -m bench.gpu", args, on_cpu=False, name=args.job, grace=GRACE)
    if isinstance(job, int):
        return job
    workers = max(1, (os.cpu_count() or 2) // 2) if args.workers is None else args.workers
    scratch = args.scratch / SCRATCH
    if not args.resume:
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    job.setting = replace(job.setting, scratch=scratch, workers=workers, cache=args.cache)
    (scratch / "nvidia-smi.txt").write_text(report.output("nvidia-smi", "-q") or "no nvidia-smi here\n")
    if args.note is not None and args.note not in job.results.notes:
        print(args.note, flush=True)
        job.results.notes.append(args.note)
    # Another machine than that of the results has no cache yet.
    first = {CACHE.subject.name} if precompiled.missing(args.cache) else set()
    for name in first:
        job.results.records.pop(name, None)
    parts = [part for part in args.chosen if not args.only or part.subject.name in {*args.only, *first}]
    subjects = [part.subject for part in args.chosen]  # those with results of an earlier run are told, too
    try:
        for part in parts:
            start = time.monotonic()
            print(f"{part.subject.name} ... ({job.setting.seconds_left():.0f} s left)", flush=True)
            with precompiled.counted(job.results, part.subject.name, scratch / "cache-misses.txt"):
                runs.measure(job.until(start + part.seconds), [part.subject])
            _write(job, subjects)
            job.results.spent[part.subject.name] = time.monotonic() - start
    except runs.DeviceLostError as error:
        return runs.start_again("bench.gpu", str(error), argv, job.setting.seconds_left())
    finally:
        faulthandler.cancel_dump_traceback_later()
    print("\n" + _write(job, subjects))
    return 3 if runs.failed(job.results, subjects) else 0


if __name__ == "__main__":
    sys.exit(main())
