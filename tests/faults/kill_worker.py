"""Kills processes that write, at chosen and at random moments, and looks at what they leave.

    python kill_worker.py FOLDER KILLS

A child is forked for each kill, so that imports are paid for once. It dies by SIGKILL before the k-th step that it
takes in the file system (an audit hook counts them), for every k, and by an alarm, which nothing handles, at KILLS
random moments. After each, every file has to be the former or the new one, whole. Prints what was seen as JSON; any
broken promise is an exception.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import tiny_models
import torch
from safetensors import safe_open

import c3a_triton
from c3a_triton import C3AConfig, CheckpointError
from c3a_triton.commands.folder_merge import merge_folder
from c3a_triton.files.checkpoint import WEIGHTS_NAME, read_adapter
from c3a_triton.files.config import CONFIG_NAME
from c3a_triton.operator import tuned
from c3a_triton.operator.tuned import Key, Times

STEPS = ("open", "os.", "shutil.")


def child(work: Callable[[], None], *, step: int | None = None, after: float | None = None) -> bool:
    """Do the work in a child that dies before its step-th step, or after some seconds; whether it did."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if after is not None:
                # The system's: it comes in time even where this process does not get to run for long.
                signal.setitimer(signal.ITIMER_REAL, after)
            if step is not None:
                left = [step]

                def count(event: str, arguments: tuple[object, ...]) -> None:
                    if event.startswith(STEPS):
                        left[0] -= 1
                        if left[0] == 0:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(count)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed by itself"
    return False


def moments(
    work: Callable[[], None], prepare: Callable[[], None], kills: int, steps: int | None = None
) -> Iterator[bool]:
    """Kill the work before each of its steps (so many, spread evenly, and the last ones), then at random moments.

    Moments at which the work was done already do not count among the `kills`.
    """
    times = []
    for _ in range(3):
        prepare()
        start = time.perf_counter()
        child(work)
        times.append(time.perf_counter() - start)

    def counted() -> int:
        low, high = 1, 1
        while True:
            prepare()
            if not child(work, step=high):
                break
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            prepare()
            if child(work, step=middle):
                low = middle
            else:
                high = middle
        return low

    taken = counted()
    chosen = range(1, taken + 1)
    if steps is not None and taken > steps:
        spread = {1 + round(i * (taken - 1) / (steps - 1)) for i in range(steps)}
        chosen = sorted(spread | set(range(taken - steps // 2, taken + 1)))
    for step in chosen:
        prepare()
        yield child(work, step=step)
    draw, longest, died = random.Random(0), sorted(times)[1], 0
    for _ in range(20 * kills):
        if died == kills:
            return
        prepare()
        killed = child(work, after=draw.uniform(1e-6, longest))
        # The machine's pace changes: about nine in ten are to come in time.
        longest *= 1.02 if killed else 0.85
        died += killed
        yield killed
    raise AssertionError(f"of {20 * kills} kills only {died} came before the work was done")


def stored(path: Path) -> object:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).tolist() for key in file.keys()}, file.metadata()  # noqa: SIM118


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("what is mixed or in the way was not reported")


def saves(folder: Path, kills: int) -> Counter[str]:
    """An adapter over one of another configuration, over one of the same, and into an empty folder."""
    seen: Counter[str] = Counter()
    models = []
    for seed, b in ((0, 2), (1, 3), (2, 3)):
        torch.manual_seed(seed)
        config = C3AConfig(block_size=b, target_modules=["first", "second"], init_weights="gaussian")
        models.append(c3a_triton.apply(tiny_models.MLP(), config))
    target = folder / "adapter"
    for former, new in ((models[0], models[1]), (models[1], models[2]), (None, models[2])):
        wanted = []
        for model in (former, new):
            if model is None:
                wanted.append((None, None))
                continue
            model.c3a.save_pretrained(folder / "wanted")
            wanted.append(((folder / "wanted" / CONFIG_NAME).read_bytes(), stored(folder / "wanted" / WEIGHTS_NAME)))

        def prepare(former: torch.nn.Module | None = former) -> None:
            shutil.rmtree(target, ignore_errors=True)
            if former is not None:
                former.c3a.save_pretrained(target)

        def work(new: torch.nn.Module = new) -> None:
            new.c3a.save_pretrained(target)

        for killed in moments(work, prepare, kills):
            config = (target / CONFIG_NAME).read_bytes() if (target / CONFIG_NAME).exists() else None
            weights = stored(target / WEIGHTS_NAME) if (target / WEIGHTS_NAME).exists() else None
            assert config in (wanted[0][0], wanted[1][0]), "the configuration is neither"
            assert weights in (wanted[0][1], wanted[1][1]), "the weights are neither"
            whole = [pair for pair in wanted if pair == (config, weights)]
            # Where only the values differ, configuration and weights of either save are a whole adapter.
            same = wanted[0][0] == wanted[1][0]
            if (whole and weights is not None) or same:
                read_adapter(target)
                state = "new" if weights == wanted[1][1] else "former"
            elif weights is None and config is None:
                state = "nothing"
            else:
                message = refusal(lambda: read_adapter(target))
                assert WEIGHTS_NAME in message, message
                assert weights is None or CONFIG_NAME in message, message
                state = "mixed, reported"
            seen[state] += 1
            seen["killed"] += killed
            work()
            read_adapter(target)
    return seen


def merges(folder: Path, kills: int, steps: int | None) -> Counter[str]:
    """A merge with force over the folder of a former one."""
    seen: Counter[str] = Counter()
    model = tiny_models.llama()
    model.save_pretrained(folder / "model")

    def merge(name: str, output: Path, force: bool = False) -> None:
        # Without weights transformers 4 computes nothing, and it would be said that nobody has seen the layers called.
        merge_folder(folder / "model", folder / name, output, force=force, verify=lambda merged: None)

    for name, b in (("one", 2), ("two", 4)):
        adapted = c3a_triton.apply(
            tiny_models.llama(), C3AConfig(block_size=b, target_modules=["q_proj"], init_weights="gaussian")
        )
        adapted.c3a.save_pretrained(folder / name)
        merge(name, folder / f"wanted-{name}")

    def content(path: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()}

    former, new = content(folder / "wanted-one"), content(folder / "wanted-two")
    output, aside = folder / "merged", folder / ".merged.former"

    def prepare() -> None:
        for path in (output, aside, *folder.glob(".merged.*.tmp")):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder / "wanted-one", output)

    def work() -> None:
        merge("two", output, force=True)

    for killed in moments(work, prepare, kills, steps):
        if output.exists():
            found = content(output)
            assert found in (former, new), "the output is neither"
            state = "new" if found == new else "former"
            if aside.exists():
                assert found == new, "the former folder is there twice"
                state = "new, the former not yet removed"
                assert aside.name in refusal(work)
                shutil.rmtree(aside)
        else:
            assert content(aside) == former, "the former folder is lost"
            state = "former, under its other name"
        seen[state] += 1
        seen["killed"] += killed
        work()
        assert content(output) == new
        assert not aside.exists()
    return seen


def tables(folder: Path, kills: int) -> Counter[str]:
    """A tuned table that gets an entry."""
    os.environ["C3A_TRITON_CACHE"] = str(folder / "cache")
    seen: Counter[str] = Counter()

    def key(b: int) -> Key:
        return Key("card", "9.0", "2.13.0", "3.9.0", "bfloat16", 10, 4096, 4096, b, "fft")

    former = {key(b): Times(1e-3 * b) for b in range(1, 300)}
    new = former | {key(1000): Times(1.0)}

    def prepare() -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        tuned.add(former)

    def work() -> None:
        tuned.add({key(1000): Times(1.0)})

    for killed in moments(work, prepare, kills):
        times = tuned.load().times
        assert times in (former, new), "the table is neither"
        seen["new" if times == new else "former"] += 1
        seen["killed"] += killed
        work()
        assert tuned.load().times == new
        assert {path.suffix for path in (folder / "cache").iterdir()} == {".json", ".lock"}
    return seen


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="transformers|torch")
    torch.set_num_threads(1)
    steps = 8 if kills < 100 else None
    seen = {"save": saves(folder, kills), "merge": merges(folder, kills, steps), "tuned": tables(folder, kills)}
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
