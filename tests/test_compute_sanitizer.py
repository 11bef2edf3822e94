"""compute-sanitizer is found, run and understood: with programs that behave as it does, for there is none here."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_package  # noqa: F401
import pytest
import torch

from bench import checks, compute_sanitizer, kernel_cases, processes, report, runs, sanitize
from c3a_triton.benchmark import timing

CPU = torch.device("cpu")
# Seconds: after which a process is taken to hang, and for which those sleep that are to be ended.
HANG, SLEEP = 1800, 3600
OVERRUN = """
========= Invalid __global__ write of size 4 bytes
=========     at overrun_kernel+0x90 in overrun.py:19
=========     by thread (127,0,0) in block (0,0,0)
=========     Access at 0x7f2c4c8001fc is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2c4c800000 of size 508 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch_our_kernel(int) [0x3344] in cuda_utils.so
=========
"""
READ = """
========= Invalid __global__ read of size 16 bytes
=========     at mix_kernel+0x3440 in fft.py:350
=========     by thread (32,0,0) in block (453,0,0)
=========     Access to 0x1001c3ecc00 is out of bounds
=========
========= Invalid __global__ read of size 16 bytes
=========     at mix_kernel+0x3440 in fft.py:350
=========
"""
RACE = """
========= Error: Race reported between Write access at diagonal_sums_kernel+0x5ad20 in weight_grad.py:71
=========     and Read access at diagonal_sums_kernel+0x5b000 in weight_grad.py:72 [6136 hazards]
=========
========= Warning: Race reported between Write access at diagonal_sums_kernel+0x60 in weight_grad.py:71
=========     and Write access at diagonal_sums_kernel+0x60 in weight_grad.py:71 [4 hazards]
=========
"""
# As its version 2026.4 speaks where it cannot watch a process.
REFUSAL = """
========= Error: process didn't terminate successfully
=========     The application may have hit an error when dereferencing Unified Memory from the host.
========= Error: Target application terminated before first instrumented API call
"""


def log(*parts: str, count: int | None = 0) -> str:
    last = "" if count is None else f"========= ERROR SUMMARY: {count:,} errors\n"
    return "".join(("========= COMPUTE-SANITIZER\n", *(part.lstrip("\n") for part in parts), last))


# What it says


def test_reports_are_read_with_their_kernels() -> None:
    found = compute_sanitizer.read_log(log(OVERRUN, READ, count=2752) + "========= ERROR SUMMARY: 2742 not printed\n")
    assert found.count == 2752
    assert [report[0] for report in found.reports] == [
        "Invalid __global__ write of size 4 bytes",
        *["Invalid __global__ read of size 16 bytes"] * 2,
    ]
    assert len(found.about(["mix_kernel"])) == 2
    assert len(found.about([sanitize.PLANTED])) == 1
    assert found.about(["launch_our_kernel"]) == []  # where the host was
    assert found.complaints == []


def test_hazards_and_refusals_are_read() -> None:
    summary = "========= RACECHECK SUMMARY: 12 hazards displayed (1 error, 11 warnings)\n"
    found = compute_sanitizer.read_log(log(RACE, count=None) + summary)
    assert (found.count, len(found.about(kernel_cases.KERNELS))) == (12, 2)
    assert found.reports[0][1].endswith("[6136 hazards]")
    refused = compute_sanitizer.read_log(log(REFUSAL, count=None))
    assert (refused.count, refused.reports) == (None, [])
    assert "before first instrumented API call" in refused.complaints[1][0]
    assert compute_sanitizer.read_log("nothing of its own\n") == compute_sanitizer.Log()


OK = {"cases": {"a": {"status": "ok"}, "b": {"status": "ok"}}, "running": None, "done": True}
ENDED = processes.Ended(compute_sanitizer.ERROR_EXIT_CODE, False, 3.0)
CLEAN = processes.Ended(0, False, 3.0)
NONE: dict[str, Any] = {"cases": {}, "done": False}
HALF = {"cases": {"a": {"status": "ok"}}, "running": "b", "done": False}
WRONG = {"cases": {"a": {"status": "ok"}, "b": {"status": "wrong", "message": "y is wrong"}}, "done": True}
DEAD = {"cases": {"a": {"status": "error", "message": "CUDA driver initialization failed"}}, "done": False}
INTERNAL = "========= Internal Sanitizer Error: the launch of a kernel was not tracked. Errors might go undetected.\n"
FOREIGN = "========= Invalid __global__ read of size 4 bytes\n=========     at gemvx_kernel+0x10\n"


@pytest.mark.parametrize(
    ("tool", "text", "results", "ended", "expected", "words"),
    [
        ("memcheck", log(OVERRUN, count=1), OK, ENDED, "passed", ""),
        ("memcheck", log(READ, OVERRUN, count=3), OK, ENDED, "errors", "at mix_kernel"),
        ("memcheck", log(READ, count=None), HALF, ENDED, "errors", "read of size 16"),
        ("memcheck", log(), OK, CLEAN, "blind", "planted"),
        ("memcheck", log(), NONE, CLEAN, "refused", "last words"),  # no errors, because nothing was run
        ("memcheck", log(REFUSAL, count=None), NONE, ENDED, "refused", "first instrumented"),
        ("memcheck", "", NONE, processes.Ended(255, False, 0.1), "refused", "last words"),
        ("memcheck", log(), DEAD, CLEAN, "refused", "driver initialization"),
        ("memcheck", log(OVERRUN, count=1), WRONG, ENDED, "incomplete", "b: wrong: y is wrong"),
        ("memcheck", log(OVERRUN, count=1), HALF, ENDED, "incomplete", "last words"),
        ("memcheck", log(OVERRUN, count=None), OK, ENDED, "incomplete", "last words"),
        ("memcheck", log(OVERRUN, INTERNAL, count=1), OK, ENDED, "incomplete", "might go undetected"),
        ("memcheck", log(OVERRUN, FOREIGN, count=2), OK, ENDED, "incomplete", "gemvx_kernel"),
        ("memcheck", log(count=None), HALF, processes.Ended(-9, True, 60.0), "timed out", "after 60 s in b"),
        ("racecheck", log(), OK, CLEAN, "passed", ""),
        ("racecheck", log(RACE, count=12), OK, ENDED, "errors", "Race reported"),
        ("racecheck", log(), OK, ENDED, "incomplete", "exit code 86"),
    ],
)
def test_verdicts(
    tool: str, text: str, results: dict[str, Any], ended: processes.Ended, expected: str, words: str
) -> None:
    said, found = checks.verdict(tool, compute_sanitizer.read_log(text), results, ended, ["last words"])
    assert said == expected
    assert words in " / ".join(found)


# Where it is


def _program(path: Path, text: str = "#!/bin/sh\nexit 0\n", mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_every_copy_is_found_and_the_one_on_the_path_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "compute-sanitizer"
    wheels = tmp_path / "site-packages" / "nvidia"
    on_path = _program(tmp_path / "path" / name)
    home = _program(tmp_path / "cuda" / "bin" / name)
    below = _program(tmp_path / "cuda" / name / name)
    old = _program(wheels / "cuda_sanitizer_api" / "bin" / name)
    new = _program(wheels / "cu13" / "bin" / name)
    _program(wheels / "cu14" / "bin" / name, mode=0o644)
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setenv("CUDA_HOME", str(home.parents[1]))
    monkeypatch.setenv("CUDA_PATH", str(home.parents[1]))
    spec = SimpleNamespace(submodule_search_locations=[str(wheels)])
    monkeypatch.setattr(compute_sanitizer, "find_spec", lambda package: {"nvidia": spec}[package])
    found = [path for path in compute_sanitizer.candidates() if tmp_path in path.parents]
    assert found == [on_path, home, below, new, old]
    on_path.unlink()
    home.unlink()
    home.symlink_to(below)
    assert [path for path in compute_sanitizer.candidates() if tmp_path in path.parents] == [home, new, old]
    monkeypatch.setattr(compute_sanitizer, "find_spec", lambda package: None)
    assert [path for path in compute_sanitizer.candidates() if tmp_path in path.parents] == [home]


def test_options_that_a_version_lacks_are_left_out(tmp_path: Path) -> None:
    known = "  --target-processes arg (=all)\n  --kernel-name arg\n"
    path = _program(tmp_path / "nvidia" / "api" / "bin" / "compute-sanitizer", f"#!/bin/sh\ncat <<E\n{known}E\n")
    made = compute_sanitizer.command(path, "memcheck", tmp_path / "100%.txt", ["python", "-V"])
    assert made[1:7] == [
        *("--tool", "memcheck", "--error-exitcode", "86"),
        *("--log-file", str(tmp_path / "100%%.txt")),
    ]
    assert made[7:] == [
        *("--target-processes", "application-only", "--kernel-name", "kernel_substring=_kernel", "python", "-V")
    ]
    _program(tmp_path / "nvidia" / "api" / "lib" / "libsanitizer-collection.so")
    made = compute_sanitizer.command(path, "racecheck", tmp_path / "log", ["python"])
    assert made[-3:] == ["--injection-path", str(tmp_path / "nvidia" / "api" / "lib"), "python"]
    _program(path, "#!/bin/sh\necho 'Copyright'\necho 'Version 2026.4.0.0'\n")
    assert compute_sanitizer.version(path) == "Version 2026.4.0.0"


def test_every_option_of_ours_matches_our_kernels() -> None:
    assert all("_kernel" in name for name in (*kernel_cases.KERNELS, sanitize.PLANTED))


# A whole run. The stand-in runs the program where BEHAVIOUR says so, and writes what the real one would.


STAND_IN = """\
#!{python}
import json, os, subprocess, sys, time
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("Version 0 (a stand-in)")
elif arguments == ["--help"]:
    print("--target-processes --launch-timeout --kernel-name --padding --report-api-errors --destroy-on-device-error")
else:
    with open({record!r}, "a") as record:
        caching = os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")
        print(json.dumps([arguments, caching, "TRITON_INTERPRET" in os.environ]), file=record)
    tool, path = (arguments[arguments.index(option) + 1] for option in ("--tool", "--log-file"))
    program = arguments[arguments.index({python!r}):]
    texts = {texts!r}
    def say(text):
        open(path, "w").write(text)
    {behaviour}
"""
RUN = "code = subprocess.run(program).returncode"
# As if the program had run: it takes seconds to import torch.
PRETEND = (
    'open(program[program.index("--out") + 1], "w").write('
    'json.dumps({"cases": {"a": {"status": "ok"}}, "running": None, "done": True}))'
)
BEHAVIOURS = {
    "passes": f'{PRETEND}; say(texts[tool]); sys.exit(86 if tool == "memcheck" else 0)',
    "runs": f'{RUN}; say(texts[tool]); sys.exit(code or (86 if tool == "memcheck" else 0))',
    "errors": f'{PRETEND}; say(texts["errors of " + tool]); sys.exit(86)',
    "refuses": 'say(texts["refusal"]); sys.exit(255)',
    "lies": 'say(texts["lie"]); sys.exit(0)',
    "does not know an option": 'print("unrecognised option"); sys.exit(255)',
    "hangs": f'say(texts["start"]); time.sleep({SLEEP})',
}
TEXTS = {
    "memcheck": log(OVERRUN, count=1),
    "racecheck": log(),
    "errors of memcheck": log(READ, OVERRUN, count=3),
    "errors of racecheck": log(RACE, count=12),
    "refusal": log(REFUSAL, count=None),
    "lie": log(),
    "start": log(count=None),
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Puts stand-ins in the place of whatever this machine has."""

    def put(*behaviours: str) -> list[Path]:
        paths = []
        for i, behaviour in enumerate(behaviours):
            text = STAND_IN.format(
                python=sys.executable,
                record=str(tmp_path / "record"),
                texts=TEXTS,
                behaviour=BEHAVIOURS[behaviour],
            )
            paths.append(_program(tmp_path / str(i) / "compute-sanitizer", text))
        monkeypatch.setattr(compute_sanitizer, "candidates", lambda: paths)
        return paths

    return put


def _setting(tmp_path: Path, limit: float, device: torch.device = CPU, workers: int = 1) -> runs.Setting:
    deadline = runs.time.monotonic() + limit
    return runs.Setting(device, timing.CpuTimer(repeats=1), (), False, None, deadline, tmp_path / "out", workers)


def _record(
    tmp_path: Path, tool: str, *, limit: float = HANG, cases: str = "^expand", device: torch.device = CPU
) -> runs.Record:
    subject = checks.sanitized((tool,), cases)
    setting = _setting(tmp_path, limit, device)
    (task,) = subject.tasks(setting)
    record = runs.attempt(task, device)
    lines = "\n".join(subject.tables({tool: record}))
    assert re.search(rf"\| {tool} +\| {record['verdict']} +\|", lines)
    assert all(" / ".join(found) in lines for found in record.get("reports", []))
    json.dumps(record)
    return record


@pytest.mark.parametrize(
    ("behaviour", "tool", "status", "said"),
    [
        ("passes", "memcheck", "ok", "passed"),
        ("passes", "racecheck", "ok", "passed"),
        ("errors", "memcheck", "wrong", "errors"),
        ("errors", "racecheck", "ok", "errors"),
        ("refuses", "memcheck", "unavailable", "refused"),
        ("lies", "racecheck", "unavailable", "refused"),
        ("does not know an option", "memcheck", "unavailable", "refused"),
    ],
)
def test_what_it_does_is_recorded(
    tmp_path: Path, stand_in: Callable[..., list[Path]], behaviour: str, tool: str, status: str, said: str
) -> None:
    (path,) = stand_in(behaviour)
    record = _record(tmp_path, tool)
    assert (record["status"], record["verdict"]) == (status, said)
    assert (record["path"], record["version"]) == (str(path), "Version 0 (a stand-in)")
    if behaviour == "errors":
        assert record["kernels"] == [{"memcheck": "mix_kernel", "racecheck": "diagonal_sums_kernel"}[tool]]
        assert record["errors"] == {"memcheck": 2, "racecheck": 12}[tool]  # the planted one is not ours
        assert len(record["reports"]) == 2
    if status != "ok":
        assert record["message"].startswith(said)
        words = {"errors": "mix_kernel", "refuses": "instrumented", "does not know an option": "unrecognised option"}
        assert words[behaviour] in record["message"] if behaviour in words else True


def test_it_watches_the_real_program_in_exact_allocations(
    tmp_path: Path, stand_in: Callable[..., list[Path]], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("runs")
    record = _record(tmp_path, "memcheck", cases="^expand .*float32", device=device)
    assert (record["verdict"], record["cases"], record["failed"]) == ("passed", 1, {})
    ((arguments, caching, interpreted),) = map(json.loads, (tmp_path / "record").read_text().splitlines())
    assert (caching, interpreted) == ("1", device.type == "cpu")
    assert arguments[arguments.index("--padding") + 1] == "512"
    assert {"--bare", "--overrun", "bench.sanitize"} <= set(arguments)
    # On a GPU nothing runs in the interpreter.
    assert "TRITON_INTERPRET" not in checks._environment(torch.device("cuda"))
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert checks._environment(torch.device("cuda"))["OMP_NUM_THREADS"] == "2"  # eight of them share the cores


def test_one_that_hangs_is_ended_with_all_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[..., list[Path]]
) -> None:
    stand_in("hangs", "passes")
    monkeypatch.setattr(checks, "time", SimpleNamespace(monotonic=lambda: 0.0))  # starting it takes none of its time
    record = _record(tmp_path, "racecheck", limit=2)
    assert (record["status"], record["verdict"]) == ("unavailable", "timed out")
    assert record["seconds"] < SLEEP


def test_another_copy_is_tried_where_one_refuses(tmp_path: Path, stand_in: Callable[..., list[Path]]) -> None:
    refusing, passing, _ = stand_in("refuses", "passes", "errors")
    record = _record(tmp_path, "memcheck")
    assert (record["verdict"], record["path"]) == ("passed", str(passing))
    assert "instrumented" in " ".join(record["refusals"][str(refusing)])


def test_what_an_earlier_run_left_counts_for_nothing(tmp_path: Path, stand_in: Callable[..., list[Path]]) -> None:
    stand_in("passes")
    assert _record(tmp_path, "racecheck")["verdict"] == "passed"
    stand_in("lies")
    assert _record(tmp_path, "racecheck")["verdict"] == "refused"


def test_none_is_recorded_as_not_found(tmp_path: Path, stand_in: Callable[..., list[Path]]) -> None:
    stand_in()
    record = _record(tmp_path, "memcheck")
    assert (record["status"], record["verdict"], record["message"]) == ("unavailable", "not found", "not found")


# Between guards


def _guards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, *, limit: float = HANG, cases: str = "^expand"
) -> runs.Record:
    """The record of two processes that are this program instead of `bench.sanitize`."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    monkeypatch.setattr(processes, "python", lambda module: [sys.executable, str(path), module])
    subject = checks.guarded(cases)
    (task,) = subject.tasks(_setting(tmp_path, limit, workers=2))
    record = runs.attempt(task, CPU)
    assert "| " in "\n".join(subject.tables({"guards": record}))
    json.dumps(record)
    return record


# Does in no time what `bench.sanitize` does: of its cases it takes the index as the name.
PROGRAM = """
    import json, os, sys
    path = sys.argv[sys.argv.index("--out") + 1]
    index, count = map(int, sys.argv[sys.argv.index("--shard") + 1].split("/"))
    results = {"cases": {}, "kernels": ["expand_kernel"], "running": None, "done": False}
    if os.path.exists(path):
        results = json.load(open(path))
    if results["running"]:
        results["cases"][results["running"]] = {"status": "error", "message": "the process ended in this case"}
        results["running"] = None
    def save():
        json.dump(results, open(path, "w"))
    keys = KEYS[index::count]
    for key in keys:
        if key not in results["cases"]:
            BODY
    results |= {"done": True, "overrun_found": FOUND}
    save()
"""
KEYS = [case.key for case in kernel_cases.CASES if case.key.startswith("expand")]
RIGHT = 'results["cases"][key] = {"status": "ok"}'


def _ended(process: subprocess.Popen[bytes], *, unless: Callable[[], bool]) -> bool:
    """Whether a process has ended by itself before something is so."""
    while process.poll() is None:
        if unless():
            return False
        time.sleep(0.01)
    return True


def _worker(body: str = RIGHT, *, found: bool = True) -> str:
    return PROGRAM.replace("KEYS", repr(KEYS)).replace("BODY", body).replace("FOUND", str(found))


def test_parts_of_the_table_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _guards(tmp_path, monkeypatch, _worker())
    assert record["status"] == "ok"
    assert (record["cases"], record["failed"], record["missing"]) == (len(KEYS), {}, [])
    assert record["kernels"] == ["expand_kernel"]


def test_failures_between_guards_fail_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = 'results["cases"][key] = {"status": "wrong", "message": "4 bytes"} if key == keys[1] else {"status": "ok"}'
    record = _guards(tmp_path, monkeypatch, _worker(wrong))
    assert record["status"] == "wrong"
    assert record["failed"] == dict.fromkeys(KEYS[2:], "wrong: 4 bytes")
    assert f"{KEYS[3]}: wrong: 4 bytes" in record["message"]
    record = _guards(tmp_path, monkeypatch, _worker(found=False))
    assert (record["status"], record["overrun_found"]) == ("wrong", False)
    assert "planted" in record["message"]


def test_a_kernel_that_no_case_launches_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [case.key for case in kernel_cases.CASES]
    record = _guards(tmp_path, monkeypatch, _worker().replace(repr(KEYS), repr(keys)), cases="")
    assert record["status"] == "wrong"
    assert record["message"].startswith("no case launched block_sums_kernel, ")


def test_behind_a_case_that_kills_its_process_another_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = f'results["running"] = key; save(); os.abort() if key == {KEYS[0]!r} else None; {RIGHT}'
    record = _guards(tmp_path, monkeypatch, _worker(dying + '; results["running"] = None'))
    assert record["failed"] == {KEYS[0]: "error: the process ended in this case"}
    assert (record["cases"], record["missing"]) == (len(KEYS), [])


def test_a_table_that_does_not_run_or_takes_too_long_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _guards(tmp_path, monkeypatch, "import sys\nsys.exit('no such card')")
    assert record["status"] == "error"
    assert "4 cases did not run" in record["message"]
    assert "no such card" in record["message"]

    # The time of the first process is up when it has come to a case; the other one has all it needs.
    class Clock(threading.local):
        now = 0.0

    clock, reached = Clock(), tmp_path / "reached"

    def wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
        if _ended(process, unless=lambda: "0/2" in process.args and reached.exists()):
            return True
        clock.now += seconds
        return False

    monkeypatch.setattr(processes, "_wait", wait)
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: clock.now))
    hang = f"save(), open({str(reached)!r}, 'w').close(), time.sleep({SLEEP})"
    record = _guards(tmp_path, monkeypatch, _worker(f"import time; ({hang}) if key == {KEYS[2]!r} else None; {RIGHT}"))
    assert (record["status"], record["missing"]) == ("incomplete", [KEYS[2]])


# The job


def test_all_checks_resume_and_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[..., list[Path]], device: torch.device
) -> None:
    (path,) = stand_in("errors")
    monkeypatch.setattr(runs.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 1)
    out = tmp_path / "out"
    command = ["--device", device.type, "--tiny", "--budget-s", "5700", "--cases", "^expand .*float32"]
    command += ["--out", str(out)]
    assert checks.main(command) == 3  # memcheck's errors, not racecheck's
    records = report.read_json(out / "results.json")["records"]
    assert {key: record["status"] for part in records.values() for key, record in part.items()} == {
        "guards": "ok",
        "memcheck": "wrong",
        "racecheck": "ok",
    }
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert "- racecheck: Error: Race reported between Write access at diagonal_sums_kernel" in text
    assert "wrong: errors / Invalid __global__ read" in text
    path.unlink()  # nothing is run again
    assert checks.main([*command, "--resume"]) == 3
    assert report.read_json(out / "results.json")["records"] == records


def test_each_tool_has_an_equal_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limits = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(compute_sanitizer, "candidates", lambda: [Path("some")])
    monkeypatch.setattr(compute_sanitizer, "version", lambda path: "0")

    def under(path: Path, tool: str, device: torch.device, cases: str, folder: Path, limit: float) -> dict[str, object]:
        limits.append(limit)
        clock[0] += 30.0
        return {"verdict": "passed", "words": []}

    monkeypatch.setattr(checks, "_under", under)
    for task in checks.sanitized().tasks(_setting(tmp_path, 90)):
        task.measure({})
    assert limits == [45.0, 60.0]  # of 90, then of the 60 that the first has left


def test_few_cases_launch_every_kernel() -> None:
    pattern = checks.one_each()
    chosen = [case for case in kernel_cases.CASES if re.search(pattern, case.key)]
    assert len(chosen) < len(kernel_cases.KERNELS)
    launched = dict(kernel_cases.launched())
    assert set().union(*(launched[case] for case in chosen)) == kernel_cases.KERNELS


def test_an_interrupted_process_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"""
        import signal, subprocess, sys, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep({SLEEP})"])
        print(child.pid, flush=True)
        time.sleep({SLEEP})
    """
    command, log = [sys.executable, "-c", textwrap.dedent(program)], tmp_path / "log"
    # Its time is up when it has started its child.
    started = lambda: "\n" in log.read_text()  # noqa: E731
    monkeypatch.setattr(processes, "_wait", lambda process, seconds: _ended(process, unless=started))
    ended = processes.run(command, log=log, limit=3, grace=0.5)
    assert ended.interrupted
    assert ended.exit_code == -signal.SIGKILL
    stat = Path(f"/proc/{log.read_text().split()[0]}/stat")

    def lives() -> bool:
        try:
            return stat.read_text().rpartition(") ")[2][0] != "Z"
        except OSError:
            return False

    until = time.monotonic() + HANG  # it has been killed, but nobody waits for a child's child
    while lives():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_process_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    sleeps, ends = ([sys.executable, "-c", f"import time; time.sleep({n})"] for n in (SLEEP, 0))
    ended = processes.run(sleeps, log=tmp_path / "log", limit=0.1, grace=0.1)
    assert ended.interrupted
    assert 0.1 <= ended.seconds < SLEEP
    ended = processes.run(ends, log=tmp_path / "log", limit=HANG)
    assert (ended.exit_code, ended.interrupted) == (0, False)
