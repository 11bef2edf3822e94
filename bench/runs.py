"""A job's measurements: one after another by worth, each recorded as soon as it is made, resumable.

What every benchmark shares: its options, its results on disk, what becomes of a failure, the end of the time.
The results are rewritten after every measurement, so a run that is cut short loses nothing and `--resume` goes on from
there; the summary and one plot per subject are written last.
"""

import argparse
import faulthandler
import importlib.util
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from c3a_triton.benchmark import gate, peers, timing
from c3a_triton.errors import BackendError
from c3a_triton.operator import dispatch

from . import ROOT, report

__all__ = [
    "DeviceLostError",
    "Job",
    "Record",
    "Records",
    "Results",
    "Setting",
    "Subject",
    "Task",
    "add_options",
    "attempt",
    "command",
    "failed",
    "measure",
    "open_job",
    "problems",
    "start_again",
    "summary",
    "where",
    "write",
]

Record = dict[str, Any]  # `status`, `message` where that is not "ok", and what was measured
Records = dict[str, Record]

QUICK_WORTH = 0
OUT_OF_TIME = "not measured (the time was up; go on with --resume)"
OPTIONAL_PACKAGES = ("triton", "peft", "transformers")  # whose rows appear where they are installed


class DeviceLostError(RuntimeError):
    """The process can no longer use its GPU, as after an illegal memory access; a new process can."""


@dataclass(frozen=True)
class Setting:
    """What a measurement has to know of the machine and of the run."""

    device: torch.device
    timer: timing.Timer
    methods: tuple[str, ...]  # see `peers.methods`
    tiny: bool = False  # sizes that only try the code
    n_layers: int | None = None  # of a model; None for all it has
    deadline: float = math.inf  # by time.monotonic, for what takes as long as it is given
    scratch: Path = Path(tempfile.gettempdir()) / "c3a_triton-bench"  # folder for logs of processes
    workers: int = 1  # processes that may run side by side
    cache: Path = ROOT / "out" / "gpu"  # what `bench.precompile` wrote

    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def with_peft(self) -> bool:
        """Whether PEFT's layers can be measured."""
        return "peft_c3a" in self.methods


@dataclass(frozen=True)
class Task:
    """One measurement; the smaller `worth`, the earlier. `measure` adds what it finds to the record as it goes."""

    key: str
    worth: int
    measure: Callable[[Record], None]
    seconds: float = 5.0  # about what it takes: it is not begun with less time left


@dataclass(frozen=True)
class Subject:
    """One benchmark, `python -m bench.<name>`."""

    name: str
    about: str
    tasks: Callable[[Setting], Iterator[Task]]
    tables: Callable[[Records], list[str]]  # lines of markdown
    goals: Callable[[Records], list[report.Goal]]
    plot: Callable[[Records, Path], None]  # writes a PNG; called only where matplotlib is installed
    on_cpu: bool = False  # whether its figures mean something on a machine without a GPU


@dataclass
class Results:
    """What has been measured, on disk after every addition."""

    path: Path
    environment: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    records: dict[str, Records] = field(default_factory=dict)  # by subject
    spent: dict[str, float] = field(default_factory=dict)  # seconds, by subject

    @classmethod
    def open(cls, path: Path, environment: dict[str, Any], *, resume: bool) -> "Results":
        """New results, or with `resume` those in `path`.

        Results of another device, commit or set of versions are not mixed with new ones: they stay beside them, under
        `path`'s name with a number.

        Raises:
            FileExistsError: there are results already, and `resume` is False.
        """
        if not path.exists():
            return cls(path, environment)
        if not resume:
            raise FileExistsError(f"{path} exists: go on from it with --resume, or choose another --out")
        found = report.read_json(path)
        for key in ("device", "gpu", "commit", "versions"):
            before, now = found["environment"][key], environment[key]
            if key == "gpu" and before is not None and now is not None:
                before, now = before["name"], now["name"]  # clocks differ from minute to minute
            if before != now:
                aside = next(other for i in count(1) if not (other := path.with_stem(f"{path.stem}-{i}")).exists())
                path.rename(aside)
                note = f"{aside.name} was measured with {key} {before}, this is {now}: begun anew"
                print(note, flush=True)
                return cls(path, environment, [note])
        return cls(path, found["environment"], found["notes"], found["records"], found["spent"])

    def save(self) -> None:
        """Write everything."""
        content = {"environment": self.environment, "notes": self.notes, "spent": self.spent, "records": self.records}
        report.write_json(self.path, content)


# One measurement


def attempt(task: Task, device: torch.device) -> Record:
    """Measure; whatever goes wrong is recorded under `status` and `message`, beside what was measured before.

    Raises:
        DeviceLostError: the GPU does not answer this process any more; its `args[0]` is the record so far.
    """
    record: Record = {"status": "ok"}
    try:
        task.measure(record)
    except torch.cuda.OutOfMemoryError as error:
        record |= {"status": "out of memory", "message": str(error)}
    except gate.GateError as error:
        record |= {"status": "wrong", "message": str(error)}
    except BackendError as error:
        record |= {"status": "unavailable", "message": str(error)}
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL_PACKAGES
        record |= {
            "status": "unavailable" if missing else "error",
            "message": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLostError(record) from error
    return record


# A run


@dataclass
class Job:
    """One run of the program: its options and its results."""

    args: argparse.Namespace
    results: Results
    setting: Setting

    @property
    def deadline(self) -> float:
        """When it has to end, by time.monotonic."""
        return self.setting.deadline

    def until(self, deadline: float) -> "Job":
        """The same job, of which a part has to end earlier."""
        return replace(self, setting=replace(self.setting, deadline=min(deadline, self.deadline)))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results, tables and plots")
    parser.add_argument("--resume", action="store_true", help="go on from the results in DIR")
    parser.add_argument("--budget-s", type=float, default=570, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--commit", metavar="HASH", help="what is measured, where the checkout came without its .git")
    parser.add_argument("--quick", action="store_true", help="only what is worth most")
    parser.add_argument("--cases", metavar="REGEX", help="only measurements whose key matches, for example 'T=8192 '")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the code itself")
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the models, for smaller cards")


def open_job(
    program: str, args: argparse.Namespace, *, on_cpu: bool, name: str = "results", grace: float = 25
) -> Job | int:
    """The job that `args` ask for, or the exit status of a run that cannot be made; then the reason is printed.

    Its results are `name`.json in `--out`. `grace`: seconds after the budget until the process ends, whatever it does.
    """
    device = torch.device(args.device)
    if device.type == "cpu" and not (args.tiny or on_cpu):
        print(f"{program}: --device cpu only tries the code: give --tiny too", file=sys.stderr)
        return 2
    if device.type == "cuda" and not torch.cuda.is_available():
        instead = f"{program} --device cpu" if on_cpu else "python -m bench.cpu"
        print(f"{program} needs an NVIDIA GPU, and torch sees none on this machine. CPU figures: {instead}")
        return 1
    deadline = time.monotonic() + args.budget_s
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in the background of a shell; processes of a job are interrupted by it, and would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        environment = report.environment(device, args.commit, tiny=args.tiny)
        results = Results.open(args.out / f"{name}.json", environment, resume=args.resume)
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return 2
    # A kernel that never ends cannot be interrupted; the results on disk survive this exit.
    faulthandler.dump_traceback_later(max(args.budget_s, 0) + grace, exit=True)
    missing = peers.why_no_peft()
    if missing is not None and missing not in results.notes:
        results.notes.append(missing)
    # The branches of dispatch, so that a new backend is measured as soon as there is one.
    backends = tuple(name for name in dispatch.BACKENDS if name not in ("auto", "reference"))
    methods = peers.methods(("auto", *backends), with_peft=missing is None)
    timer = timing.CudaTimer(device) if device.type == "cuda" else timing.CpuTimer()
    setting = Setting(device, timer, methods, args.tiny, args.layers, deadline)
    results.save()
    return Job(args, results, setting)


def _chosen(job: Job, subjects: Sequence[Subject]) -> list[tuple[Subject, Task]]:
    """The tasks to measure, the worthiest first; equals stay in the order of subjects and of their tasks."""
    pattern = re.compile(job.args.cases or "")
    tasks = [(subject, task) for subject in subjects for task in subject.tasks(job.setting)]
    limit = QUICK_WORTH if job.args.quick else max((task.worth for _, task in tasks), default=0)
    tasks = [(subject, task) for subject, task in tasks if task.worth <= limit and pattern.search(task.key)]
    return sorted(tasks, key=lambda pair: pair[1].worth)


def measure(job: Job, subjects: Sequence[Subject]) -> None:
    """Measure what is not measured yet, until the time is up.

    Raises:
        DeviceLostError: the process cannot go on; a new one can, with `--resume`.
    """
    left_out: dict[str, list[str]] = {subject.name: [] for subject in subjects}
    for subject, task in _chosen(job, subjects):
        records = job.results.records.setdefault(subject.name, {})
        if task.key in records:
            continue
        if task.seconds > job.setting.seconds_left():
            left_out[subject.name].append(task.key)
            continue
        start = time.monotonic()
        try:
            record = attempt(task, job.setting.device)
        except DeviceLostError as error:
            records[task.key] = error.args[0]
            job.results.save()
            raise DeviceLostError(f"{subject.name}: {task.key}: {error.args[0].get('message')}") from error
        records[task.key] = record
        job.results.save()
        said = record["status"] if record["status"] == "ok" else f"{record['status']}: {record['message']}"
        print(f"{subject.name}: {task.key}: {said} ({time.monotonic() - start:.1f} s)", flush=True)
    for name, keys in left_out.items():
        said = f"{name}: {OUT_OF_TIME}: "
        job.results.notes[:] = [note for note in job.results.notes if not note.startswith(said)]
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            job.results.notes.append(f"{said}{'; '.join(keys[:3])}{more}")
            print(job.results.notes[-1], flush=True)


def start_again(module: str, reason: str, argv: Sequence[str] | None, seconds_left: float) -> int:
    """Replace this process, whose GPU context is dead, by one that goes on after the case that killed it."""
    print(f"the GPU context died in {reason}", flush=True)
    arguments = [*(sys.argv[1:] if argv is None else argv), "--resume", f"--budget-s={max(seconds_left, 10):.0f}"]
    arguments = [sys.executable, "-m", module, *arguments]
    print("starting again:", shlex.join(arguments), flush=True)
    os.chdir(ROOT)
    os.execv(sys.executable, arguments)


# What is written last


def where(results: Results) -> list[str]:
    """Lines that say what was measured on what."""
    found = results.environment
    gpu = found["gpu"] or {"name": f"no GPU; {found['cpu']}"}
    lines = [f"- {key}: {value}" for key, value in {**gpu, "date": found["date"]}.items()]
    lines += [f"- {name}: {version}" for name, version in found["versions"].items() if version is not None]
    lines += [f"- commit: {found['commit']}"]
    return lines + [f"- {note}" for note in results.notes]


def problems(records: Records) -> list[str]:
    """Lines about everything that went wrong, keys with the same message together."""
    keys: dict[str, list[str]] = {}
    for key, found in records.items():
        if "message" in found:
            keys.setdefault(f"{found['status']}: {found['message']}", []).append(key)
    if not keys:
        return []
    lines = ["", "### What went wrong", ""]
    for message, affected in keys.items():
        more = f" and {len(affected) - 3} more" if len(affected) > 3 else ""
        lines.append(f"- {'; '.join(affected[:3])}{more}: {message}")
    return lines


def summary(results: Results, subjects: Sequence[Subject], head: Sequence[str]) -> str:
    """What was measured, in markdown: a section per subject, and last the goals."""
    lines = list(head)
    for subject in subjects:
        records = results.records.get(subject.name, {})
        if records:
            lines += ["", f"## {subject.about}", *subject.tables(records), *problems(records)]
    goals = [goal for subject in subjects for goal in subject.goals(results.records.get(subject.name, {}))]
    if results.environment["tiny"]:
        lines += [
            "",
            "Tiny sizes, to try the code: none of these figures says how fast anything is, and no goal is theirs.",
        ]
    elif goals:
        lines += ["", "## Goals", "", report.goals_table(goals)]
    return "\n".join(lines) + "\n"


def failed(results: Results, subjects: Sequence[Subject]) -> bool:
    """Whether something of ours computed wrongly or failed; a peer that cannot compute a case is a finding instead."""
    return any(
        found["status"] in ("wrong", "error")
        for subject in subjects
        for key, found in results.records.get(subject.name, {}).items()
        if "peft" not in key
    )


def write(job: Job, subjects: Sequence[Subject], head: Sequence[str]) -> int:
    """Print and write the summary and the plots.

    Returns:
        The exit status: 3 where something of ours computed wrongly or failed, otherwise 0.
    """
    text = summary(job.results, subjects, head)
    path = job.args.out / "summary.md"
    path.write_text(text, encoding="utf-8")
    job.results.save()
    print(f"\n{text}\nwritten: {job.results.path}, {path}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
    else:
        for subject in subjects:
            if records := job.results.records.get(subject.name):
                subject.plot(records, job.args.out / f"{subject.name}.png")
    return 3 if failed(job.results, subjects) else 0


def command(subject: Subject, argv: list[str] | None = None) -> int:
    """`python -m bench.<subject>`: measure, print, write; returns the exit status."""
    module = f"bench.{subject.name}"
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=subject.about)
    add_options(parser)
    if subject.on_cpu:
        parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    job = open_job(f"python -m {module}", parser.parse_args(argv), on_cpu=subject.on_cpu)
    if isinstance(job, int):
        return job
    try:
        measure(job, [subject])
    except DeviceLostError as error:
        return start_again(module, str(error), argv, job.setting.seconds_left())
    finally:
        faulthandler.cancel_dump_traceback_later()
    return write(job, [subject], [f"# {subject.about}", "", *where(job.results)])
