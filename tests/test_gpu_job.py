"""The GPU job: its parts share five minutes, nothing is lost, and what comes back lands where people look."""

import copy
import json
import lzma
import re
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_package import ROOT

from bench import committed, gpu, op, predicted, publish, readme, report, runs
from c3a_triton.benchmark import cases, layer

REHEARSAL = Path(__file__).parent / "data" / "gpu_rehearsal"
NAMES = ("right", "tune")


@pytest.fixture(autouse=True)
def _no_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would outlive the test."""
    monkeypatch.setattr(runs.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)


# A job of parts that are made up


def _part(name: str, seconds: float, measure: Any = None) -> gpu.Part:
    def tasks(setting: runs.Setting) -> Any:
        def task(record: runs.Record) -> None:
            record["seconds_left"] = setting.seconds_left()
            (setting.scratch / f"{name}.log").write_text(f"of {name}")
            if measure is not None:
                measure(setting)

        yield runs.Task("a", 0, task, seconds=0.0)

    subject = runs.Subject(name, f"About {name}", tasks, lambda r: ["", "a table"], lambda r: [], lambda r, p: None)
    return gpu.Part(subject, seconds)


def _main(out: Path, *more: str, job: str = "right") -> int:
    scratch = str(out.with_name("scratch"))
    return gpu.main([job, "--device", "cpu", "--tiny", "--out", str(out), "--scratch", scratch, *more])


def _logs(out: Path, job: str = "right") -> list[str]:
    with lzma.open(out / f"{job}-logs.tar.xz") as packed, tarfile.open(fileobj=packed) as logs:
        return sorted(Path(name).name for name in logs.getnames())


def test_parts_have_their_share_and_are_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    written: list[list[str]] = []

    def look(setting: runs.Setting) -> None:
        written.append(sorted(path.name for path in out.iterdir()))

    def fail(setting: runs.Setting) -> None:
        look(setting)
        if len(written) == 2:
            raise KeyboardInterrupt  # the machine is taken away

    parts = (_part("first", 20, look), _part("second", 1e6, fail), _part("third", 5))
    monkeypatch.setitem(gpu.JOBS, "right", parts)
    with pytest.raises(KeyboardInterrupt):
        _main(out)
    files = ["right-logs.tar.xz", "right.json", "right.md"]
    assert written == [["right.json"], files]
    found = report.read_json(out / "right.json")
    assert "a" in found["records"]["first"]
    assert not found["records"]["second"]
    assert 0 < found["records"]["first"]["a"]["seconds_left"] <= 20
    assert "About first" in (out / "right.md").read_text()
    assert "first.log" in _logs(out)

    assert _main(out, "--resume") == 0
    assert len(written) == 3  # what was measured is not measured again
    again = report.read_json(out / "right.json")
    assert again["records"]["first"] == found["records"]["first"]
    assert all("a" in again["records"][name] for name in ("second", "third"))
    assert sorted(path.name for path in out.iterdir()) == files
    assert {"first.log", "second.log", "third.log"} <= set(_logs(out))


def test_no_part_has_more_than_the_job_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.JOBS, "right", (_part("long", 1e6),))
    assert _main(tmp_path / "a") == 0
    left = report.read_json(tmp_path / "a" / "right.json")["records"]["long"]["a"]["seconds_left"]
    assert 0 < left <= gpu.SECONDS
    assert gpu.SECONDS + gpu.GRACE < 300


def test_a_programs_time_runs_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.JOBS, "right", (_part("long", 1e6),))
    monkeypatch.setattr(gpu, "STARTED", time.monotonic() - 100)  # which imports took
    out, scratch = str(tmp_path / "out"), str(tmp_path / "scratch")
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "right", "--device", "cpu", "--tiny", "--out", out, "--scratch", scratch]
    )
    assert gpu.main() == 0
    left = report.read_json(tmp_path / "out" / "right.json")["records"]["long"]["a"]["seconds_left"]
    assert 0 < left <= gpu.SECONDS - 100


@pytest.mark.parametrize("unpacked", [False, True])
def test_the_cache_is_unpacked_whatever_else_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unpacked: bool
) -> None:
    """On another machine, say, than that of the results that are gone on from."""
    folder, cache, looked_up = tmp_path / "gpu", tmp_path / "cache", []
    report.write_json(folder / "manifest.json", {"cache_dir": str(cache)})
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # for pytest to put back
    part = _part("cache", 5, lambda setting: (looked_up.append(cache.exists()), cache.mkdir(exist_ok=True)))
    monkeypatch.setattr(gpu, "CACHE", part)
    monkeypatch.setitem(gpu.JOBS, "right", (part, _part("op", 5)))
    options = ("--cache", str(folder), "--only", "op")
    assert _main(tmp_path / "out", *options) == 0
    if not unpacked:
        cache.rmdir()
    assert _main(tmp_path / "out", *options, "--resume") == 0
    assert looked_up == ([False] if unpacked else [False, False])


def test_reports_of_tools_keep_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\x10" + f"{ROOT}/kernels/fft.py".encode() + b"\x00"

    def profile(setting: runs.Setting) -> None:
        for name in ("kernels.ncu-rep", "ncu.csv"):
            (setting.scratch / name).write_bytes(content)

    monkeypatch.setitem(gpu.JOBS, "tune", (_part("ncu", 5, profile),))
    assert _main(tmp_path / "out", job="tune") == 0
    binary, text = ((tmp_path / "out" / name).read_bytes() for name in ("kernels.ncu-rep", "ncu.csv"))
    assert text == b"\x10./kernels/fft.py\x00"
    assert (len(binary), str(ROOT).encode() in binary) == (len(content), False)
    assert Path(binary[1:-1].decode()) == Path("kernels/fft.py")


def test_a_rehearsal_says_so_and_names_no_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.JOBS, "right", (_part("some", 5),))
    assert _main(tmp_path / "out", "--commit", "given") == 0
    text = (tmp_path / "out" / "right.md").read_text()
    assert text.startswith("# A rehearsal on a CPU: ")
    assert "none of these figures says how fast anything is" in text
    assert "Goals" not in text
    where = report.read_json(tmp_path / "out" / "right.json")["environment"]
    assert where["tiny"]
    assert where["gpu"] is None


def test_the_commit_is_told_where_git_does_not_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "output", lambda *command: None)
    assert report.environment(torch.device("cpu"), "abc")["commit"] == "abc"


def test_a_program_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: tuple[str, ...], **options: Any) -> None:
        raise report.subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(report.subprocess, "run", run)
    assert report.output(sys.executable) is None


def test_a_dead_context_starts_the_same_job_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def lost(*args: object) -> runs.Record:
        raise runs.DeviceLostError({"status": "error", "message": "gone"})

    monkeypatch.setitem(gpu.JOBS, "tune", (_part("some", 5),))
    monkeypatch.setattr(runs, "attempt", lost)
    monkeypatch.setattr(runs.os, "execv", lambda path, command: started.append(command) or 0)
    monkeypatch.setattr(runs.os, "chdir", lambda path: None)
    _main(tmp_path / "out", job="tune")
    assert started[0][1:4] == ["-m", "bench.gpu", "tune"]
    assert "--resume" in started[0]
    (budget,) = [float(word.partition("=")[2]) for word in started[0] if word.startswith("--budget-s=")]
    assert budget <= gpu.SECONDS


def test_wrong_results_fail_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(setting: runs.Setting) -> None:
        raise runs.gate.GateError("y is wrong")

    monkeypatch.setitem(gpu.JOBS, "right", (_part("some", 5, wrong), _part("other", 5)))
    assert _main(tmp_path / "out") == 3
    assert "wrong: y is wrong" in (tmp_path / "out" / "right.md").read_text()
    assert "other" in report.read_json(tmp_path / "out" / "right.json")["records"]


def test_what_cannot_be_run_is_refused_before_anything_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "thesis.txt").write_text("mine")
    broken = tmp_path / "right.json"
    broken.write_text('{"records": {')
    for more, said in (
        (("--only", "tiles"), "--only tiles: `right` has cache, tests, "),
        (("--cases", "(?!decode"), "--cases (?!decode: "),
    ):
        with pytest.raises(SystemExit):
            _main(tmp_path / "out", *more)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _main(tmp_path / "out", "--right", str(broken), job="tune")
    assert "is not the right.json that came back: JSONDecodeError" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in scratch.iterdir()] == ["thesis.txt"]


def test_a_part_alone_leaves_the_others_in_the_summary_and_other_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.JOBS, "right", (_part("first", 5), _part("second", 5)))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "thesis.txt").write_text("mine")
    assert _main(tmp_path / "out", "--only", "first") == 0
    assert "second.log" not in _logs(tmp_path / "out")
    assert _main(tmp_path / "out", "--only", "second", "--resume") == 0
    text = (tmp_path / "out" / "right.md").read_text()
    assert "About first" in text
    assert "About second" in text
    assert (scratch / "thesis.txt").read_text() == "mine"
    assert "thesis.txt" not in _logs(tmp_path / "out")


# The page that tells how to run it


@pytest.mark.parametrize("job", NAMES)
def test_the_page_has_every_part_and_its_seconds(job: str) -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    section = page.partition(f'bench.gpu {job} --out "$OUT"')[2].partition("\n## ")[0]
    told = re.findall(r"^\| (\w+) \| (\d+) s \|", section, re.MULTILINE)
    assert [(name, float(seconds)) for name, seconds in told] == [
        (part.subject.name, part.seconds) for part in gpu.JOBS[job]
    ]


# What came back, and where it goes


def _rehearsal(job: str) -> dict[str, Any]:
    return json.loads((REHEARSAL / f"{job}.json").read_text(encoding="utf-8"))


def test_the_committed_rehearsal_is_what_the_jobs_write() -> None:
    files = sorted(path.name for path in REHEARSAL.iterdir())
    assert len(files) == 8
    for job in NAMES:
        found = _rehearsal(job)
        assert (found["environment"]["gpu"], found["environment"]["tiny"]) == (None, True)
        assert list(found["records"]) == [part.subject.name for part in gpu.JOBS[job]]
        assert "A rehearsal on a CPU" in (REHEARSAL / f"{job}.md").read_text(encoding="utf-8")
        # Every table can be made of it again.
        results = runs.Results(REHEARSAL / f"{job}.json", found["environment"], records=found["records"])
        runs.summary(results, [part.subject for part in gpu.JOBS[job]], [])


@pytest.fixture
def came_back(tmp_path: Path) -> Path:
    """The rehearsal as a card would have written it, with one layer of the goals in it."""
    folder = tmp_path / "back"
    folder.mkdir()
    square = cases.LayerCase(8192, 4096, 4096, 128)
    timed = {
        layer.key(square, method): {
            "status": "ok",
            "case": vars(square),
            "method": method,
            "times": {mode: {"median": seconds, "wall": seconds} for mode in layer.MODES},
        }
        for method, seconds in (("base", 1e-3), ("ours:auto", 1.3e-3))
    }
    for job in NAMES:
        found = _rehearsal(job)
        card = {"name": "NVIDIA Some Card 80GB", "capability": "9.0", "driver_version": "1.2"}
        found["environment"] |= {"device": "cuda", "gpu": card, "tiny": False, "commit": "abc", "date": "2030-01-02"}
        if job == "right":
            found["records"]["op"] |= timed
        report.write_json(folder / f"{job}.json", found)
        (folder / f"{job}.md").write_text(f"summary of {job}")
    (folder / "kernels.ncu-rep").write_bytes(b"binary")
    return folder


def test_results_are_copied_by_card_and_date(
    tmp_path: Path, came_back: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    (came_back / "ncu.csv").write_text("x" * 100)
    monkeypatch.setattr(
        publish, "LARGEST", (came_back / "right.json").stat().st_size + (came_back / "tune.json").stat().st_size
    )
    (came_back / "right-logs.tar.xz").write_bytes(b"x" * (publish.LARGEST + 1))
    target = publish.copy([came_back], results)
    assert target == results / "some-card-80gb-2030-01-02"
    assert sorted(path.name for path in target.iterdir()) == [
        "ncu.csv",
        "right.json",
        "right.md",
        "tune.json",
        "tune.md",
    ]
    assert "right-logs.tar.xz is larger than" in capsys.readouterr().out
    (card,) = committed.cards(results)
    assert card.title.startswith("NVIDIA Some Card 80GB, 2030-01-02, driver 1.2 (torch")
    assert {part.subject.name for parts in gpu.JOBS.values() for part in parts} == set(card.records)


@pytest.mark.parametrize("change", [{"gpu": None}, {"tiny": True}, {"commit": "another"}, {"gpu": {"name": "another"}}])
def test_what_no_card_or_two_have_measured_is_refused(tmp_path: Path, came_back: Path, change: dict[str, Any]) -> None:
    found = report.read_json(came_back / "tune.json")
    report.write_json(came_back / "tune.json", found | {"environment": found["environment"] | change})
    with pytest.raises(ValueError, match="rehearsal|two cards or commits"):
        publish.copy([came_back], tmp_path / "results")
    assert not (tmp_path / "results").exists()
    committed_folder = tmp_path / "committed" / "card"
    committed_folder.mkdir(parents=True)
    for path in came_back.glob("*.json"):
        (committed_folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="rehearsal|two cards or commits"):
        committed.cards(tmp_path / "committed")


def test_results_do_not_take_the_place_of_others(tmp_path: Path, came_back: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    (again / "right.json").write_bytes((came_back / "right.json").read_bytes())
    with pytest.raises(ValueError, match="right.json in two folders"):
        publish.copy([came_back, again], tmp_path / "results")
    target = publish.copy([came_back], tmp_path / "results")
    before = (target / "right.json").read_bytes()
    found = report.read_json(again / "right.json")
    report.write_json(again / "right.json", found | {"environment": found["environment"] | {"commit": "another"}})
    with pytest.raises(ValueError, match="has results of commit abc, these are of another"):
        publish.copy([again], tmp_path / "results")
    assert (target / "right.json").read_bytes() == before


def test_readme_and_performance_are_generated_from_what_is_committed(
    tmp_path: Path, came_back: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(committed, "RESULTS", results)
    (results / "cpu.json").write_bytes((ROOT / "bench" / "results" / "cpu.json").read_bytes())
    assert "No GPU figure is given" in readme.section()
    assert predicted.section() == "\n\n".join([predicted.table(), predicted.FLOOR_TITLE, predicted.floor_table()])

    publish.copy([came_back], results)
    assert "No GPU figure is given" not in readme.section()
    assert "NVIDIA Some Card 80GB, 2030-01-02" in readme.section()
    assert "1.3 ms (1.30)" in readme.section()
    section = predicted.section()
    assert section.startswith(predicted.table())
    measured = section.removeprefix(predicted.table()).splitlines()
    (row,) = [line for line in measured if "4096→4096, b=128: ours / base" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")][3:] == ["1.3", "yes"]


def test_every_committed_result_parses() -> None:
    for card in committed.cards():
        assert predicted.measured_table(card)
        for parts in gpu.JOBS.values():
            for part in parts:
                part.subject.tables(card.records.get(part.subject.name, {}))
    performance = ROOT / "docs" / "performance.md"
    documents = [(ROOT / "README.md", readme.section()), (performance, readme.cpu_section())]
    documents.append((performance, predicted.section()))
    for document, section in documents:
        assert section in document.read_text(encoding="utf-8")


# Goals, scaled by what a card can do


def _measured(bandwidth: float, flops: float, over: float) -> runs.Records:
    square = cases.LayerCase(8192, 4096, 4096, 128)
    base = 2 * 2 * 8192 * 4096 * 4096 / flops
    found: runs.Records = {op.BANDWIDTH_KEY: {"status": "ok", "bytes_per_second": bandwidth}}
    for method, seconds in (("base", base), ("ours:auto", over * base)):
        times = {mode: {"median": seconds, "wall": seconds} for mode in layer.MODES}
        found[layer.key(square, method)] = {"status": "ok", "case": vars(square), "method": method, "times": times}
    return copy.deepcopy(found)


@pytest.mark.parametrize(
    ("bandwidth", "flops", "goal", "over", "reached"),
    [
        (4.3e12, 790e12, "≤ 1.45", 1.44, True),
        (2.15e12, 790e12, "≤ 1.9", 1.89, True),  # the extra bytes take twice the time
        (2.15e12, 790e12, "≤ 1.9", 1.91, False),
        (4.3e12, 474e12, "≤ 1.27", 1.28, False),  # a slower base product leaves less to add
    ],
)
def test_goals_over_the_base_are_scaled(bandwidth: float, flops: float, goal: str, over: float, reached: bool) -> None:
    (found,) = [g for g in op.goals(_measured(bandwidth, flops, over)) if "4096→4096, b=128: ours / base" in g.case]
    assert found.goal.startswith(goal), found
    assert found.reached is reached
    assert ("1.45" in found.case) is (goal != "≤ 1.45")
