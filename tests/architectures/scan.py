"""Try C3A adapters on every architecture of transformers, each in a process of its own.

    python tests/architectures/scan.py --out out/architectures.jsonl      # goes on where it was interrupted
    python tests/architectures/scan.py --only LlamaForCausalLM --verbose

One line of JSON per class. Exits with 1 where something differs silently or fails.
"""

import argparse
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import checks
import small_models
import torch
import transformers

import c3a_triton
from c3a_triton import C3AConfig

# A model's process: seconds of the processor (of the clock ten times as many), and bytes of memory.
SECONDS, MEMORY = 45.0, 3 << 30


class Process:
    """A forked process that checks one class and writes steps and its result into a pipe."""

    def __init__(self, name: str, group: str, verbose: bool) -> None:
        self.name, self.group, self.step, self.line = name, group, "start", b""
        self.started = time.monotonic()
        self.pipe, write = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _child(name, write, verbose)
        os.close(write)

    def read(self) -> bool:
        """Take in what the process has written; False at its end."""
        data = os.read(self.pipe, 1 << 16)
        self.line += data
        *steps, _ = self.line.split(b"\n")
        for step in steps:
            if step.startswith(b"step "):
                self.step = step[5:].decode()
        return bool(data)

    def over_limits(self, seconds: float) -> str | None:
        """What limit the process has passed, or None."""
        if time.monotonic() - self.started > 10 * seconds:
            return f"longer than {10 * seconds:.0f} s in {self.step!r}"
        try:
            times = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            resident = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):
            return None
        if sum(map(int, times)) > seconds * os.sysconf("SC_CLK_TCK"):
            return f"longer than {seconds:.0f} s of CPU in {self.step!r}"
        return f"more than {MEMORY >> 30} GiB in {self.step!r}" if resident > MEMORY else None

    def end(self, limit: str | None) -> dict[str, Any]:
        """Wait for the process, killed where it has passed a limit, and give its result."""
        if limit:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        found = [line[7:] for line in self.line.split(b"\n") if line.startswith(b"result ")]
        if found:
            result = json.loads(found[-1])
        elif limit:
            # Before the first check it is the model that takes so long.
            result = {"status": "base" if self.step in ("start", "build", "base") else "timeout", "why": limit}
        else:
            result = {"status": "crash", "why": f"the process ended with {status} in {self.step!r}"}
        return {"class": self.name, "group": self.group, **result}


def _child(name: str, write: int, verbose: bool) -> None:
    try:
        if not verbose:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        limit = MEMORY + (16 << 30)  # addresses, of which torch takes more than memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        def say(step: str) -> None:
            os.write(write, f"step {step}\n".encode())

        say("build")
        try:
            model_class, config = small_models.find(name)
        except Exception as error:
            result = {
                "status": "base",
                "why": f"no configuration: {type(error).__name__}: {' '.join(str(error).split())[:400]}",
            }
            if verbose:
                traceback.print_exc()
        else:
            try:
                result = {"model_type": config.model_type, **checks.check_model(model_class, config, say)}
            except Exception as error:
                if verbose:
                    traceback.print_exc()
                result = {"status": "crash", "why": f"{type(error).__name__}: {error} {traceback.format_exc()[-600:]}"}
        data = b"\nresult " + json.dumps(result).encode() + b"\n"
        while data:
            data = data[os.write(write, data) :]
    finally:
        os._exit(0)


def _import_everything() -> None:
    """Import in the parent what every process would import by itself; no backward pass, which forbids forking."""
    transformers.logging.set_verbosity_error()
    model_class, config = small_models.find("LlamaForCausalLM")
    with tempfile.TemporaryDirectory() as folder:
        model_class(config).save_pretrained(folder)
        model = c3a_triton.apply(
            model_class.from_pretrained(folder), C3AConfig(block_size=2, target_modules="all-linear")
        )
        model(input_ids=torch.tensor([[1, 2]]))


def scan(todo: list[tuple[str, str]], out: Path, workers: int, seconds: float, verbose: bool) -> None:
    """Check all (class, group), a process each, and append results as they come."""
    torch.set_num_threads(1)
    _import_everything()
    todo = list(reversed(todo))
    running: list[Process] = []
    total, done = len(todo), 0
    with out.open("a") as file:
        while todo or running:
            while todo and len(running) < workers:
                running.append(Process(*todo.pop(), verbose))
            ready, _, _ = select.select([process.pipe for process in running], [], [], 0.2)
            for process in list(running):
                limit = process.over_limits(seconds)
                ended = process.pipe in ready and not process.read()
                if not limit and not ended:
                    continue
                result = process.end(limit)
                running.remove(process)
                file.write(json.dumps(result) + "\n")
                file.flush()
                done += 1
                print(f"{done}/{total} {result['class']} {result['status']} {result['why'][:150]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/architectures.jsonl"))
    parser.add_argument("--only", nargs="*", help="classes")
    parser.add_argument("--groups", nargs="*", help="names of mappings, for example CAUSAL_LM")
    parser.add_argument(
        "--again", nargs="*", default=[], help="outcomes that are tried again, for example silent failed"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the processor, for each class")
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = read(arguments.out)
    wanted = [
        (name, group)
        for name, group in small_models.classes().items()
        if (not arguments.only or name in arguments.only) and (not arguments.groups or group in arguments.groups)
    ]
    todo = [
        pair
        for pair in wanted
        if arguments.only or pair[0] not in results or results[pair[0]]["status"] in arguments.again
    ]
    todo.sort(key=lambda pair: pair[0] in results)  # what was not tried yet comes first
    scan(todo, arguments.out, arguments.workers, arguments.seconds, arguments.verbose)
    results = read(arguments.out)
    chosen = [results[name] for name, _ in wanted if name in results]
    print(dict(Counter(result["status"] for result in chosen)))
    bad = [result for result in chosen if result["status"] in ("silent", "failed", "crash", "timeout")]
    for result in bad:
        print(f"{result['status']} {result['class']}: {result['why']}")
    return 1 if bad else 0


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Class → its last result; a line that a killed scan has left unfinished is passed over."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        found[result["class"]] = result
    return found


if __name__ == "__main__":
    raise SystemExit(main())
