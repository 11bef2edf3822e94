"""What is compiled ahead of time: that it is what a native launch asks for, and that it is found where it is unpacked.

The interpreter replaces the compiler in a whole process, so what compiles runs in others.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from bench_package import ROOT

from bench import kernel_cases, launch_hooks, precompile, precompiled, report, runs, specialisations
from c3a_triton.benchmark import cases, timing
from c3a_triton.operator.launch import direct, expand, plans, weight_grad

CARD = specialisations.CARD
CPU = torch.device("cpu")
# Three kernels; the operands of the first are not aligned.
LAUNCHES = """
x = torch.ones(3 * 12 + 1)[1:].view(3, 12)
direct.direct_product(x, torch.ones(4, 3, 4), scale=0.5, bias=torch.ones(16))
weight_grad.weight_grad(torch.ones(5, 8), torch.ones(5, 12), 4, scale=0.5)
expand.expand_weight(torch.ones(2, 3, 4), scale=0.5, dtype=torch.float32)
"""
# The same launches without the interpreter and without a GPU: every one becomes a compilation of its own.
NATIVELY = """
import json, sys
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from c3a_triton.operator.launch import direct, expand, specs, weight_grad

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver())
specs.unavailable_reason = lambda device: None
specs.card_of = lambda device: "sm_90"
run, found = JITFunction.run, []
knobs.compilation.listener = lambda *, src, cache_hit, **more: found.append([src.name, cache_hit])
JITFunction.run = lambda kernel, *args, **kwargs: run(kernel, *args, **{**kwargs, "warmup": True})
"""


def program(source: str, cache: Path) -> str:
    """What a program prints that runs natively."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=cache.parent, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Filled:
    """A cache that `bench.precompile` has filled with `LAUNCHES`."""

    out: Path
    cache: Path
    kernels: list[str]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    folder = tmp_path_factory.mktemp("precompile")
    lines = folder / "launches.jsonl"
    with (
        lines.open("w") as file,
        specialisations.recorded(file=file) as recorder,
        specialisations.as_on(CARD),
        launch_hooks.noted() as names,
    ):
        exec(LAUNCHES, {"torch": torch, "direct": direct, "expand": expand, "weight_grad": weight_grad})
    assert [one.name for one in recorder.found.values()] == list(dict.fromkeys(names))
    command = [sys.executable, "-m", "bench.precompile", "--of", "--tests", str(lines), "--jobs", "2"]
    command += ["--out", str(folder / "out"), "--cache-dir", str(folder / "cache")]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return Filled(folder / "out", folder / "cache", sorted(names))


@pytest.fixture
def setting(tmp_path: Path, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> runs.Setting:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(filled.cache))
    made = runs.Setting(CPU, timing.CpuTimer(), (), deadline=time.monotonic() + 300, scratch=tmp_path)
    return replace(made, cache=filled.out)


def look_up(setting: runs.Setting) -> runs.Record:
    (task,) = precompiled.SUBJECT.tasks(setting)
    return runs.attempt(task, setting.device)


@pytest.mark.slow
@pytest.mark.interpreter
def test_native_launches_find_what_was_compiled(filled: Filled) -> None:
    # The last is another specialisation of the first: its operands are aligned.
    aligned = LAUNCHES.replace("3 * 12 + 1)[1:]", "3 * 12)")
    found = json.loads(program(NATIVELY + LAUNCHES + aligned + "print(json.dumps(found))", filled.cache))
    assert len(filled.kernels) == 3
    assert sorted(found[:3]) == [[name, True] for name in filled.kernels]
    assert found[3:] == [["hankel_kernel", False]]


@pytest.mark.slow
def test_keys_do_not_depend_on_the_order_of_launches(tmp_path: Path) -> None:
    """Those of kernels that call the same functions, whichever of them is looked up first."""
    keys = """
import json, os
from c3a_triton.kernels import decode, direct, expand, fft, grouped, indexing, routed, weight_grad
kernels = [value for module in (decode, direct, expand, fft, grouped, indexing, routed, weight_grad)
           for name, value in sorted(vars(module).items()) if name.endswith("_kernel")]
child = os.fork()  # keys are kept, so that each order is a process's
found = {kernel.__name__: kernel.cache_key for kernel in kernels[:: 1 if child else -1]}
if child:
    os.wait()
print(json.dumps(dict(sorted(found.items()))), flush=True)
"""
    first, last = map(json.loads, program(keys, tmp_path).splitlines())
    assert len(first) == len(kernel_cases.KERNELS)
    assert first == last


@pytest.mark.slow
@pytest.mark.interpreter
def test_what_is_written(filled: Filled) -> None:
    manifest = report.read_json(filled.out / precompile.MANIFEST)
    assert manifest["kernels"] == 3
    assert manifest["cache_dir"] == str(filled.cache)
    header, *rows = (filled.out / precompile.TABLE).read_text().splitlines()
    assert header.startswith("kernel,")
    assert [row.partition(",")[0] for row in rows] == filled.kernels
    for row in rows:
        seconds, registers, spills, shared = row.split(",")[6:10]
        assert float(seconds) > 0
        assert 0 < int(registers) <= 255
        assert int(spills) == 0
        assert 0 <= int(shared) < 228 << 10


@pytest.mark.slow
@pytest.mark.interpreter
def test_it_serves_another_checkout_at_the_same_path(filled: Filled, tmp_path: Path) -> None:
    shutil.rmtree(filled.cache)
    precompiled.unpack(filled.out, filled.cache)
    checkout, site = tmp_path / "checkout", tmp_path / "checkout" / "site"
    for name, target in (("bench", checkout), ("c3a_triton", site), ("kernels", site / "c3a_triton")):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(site)
    code = """
import bench, runpy
import c3a_triton.kernels as kernels
print(bench.ROOT, kernels.__file__, flush=True)
runpy.run_module("bench.precompiled", run_name="__main__")
"""
    command = [sys.executable, "-c", code, str(filled.out), "--report", str(tmp_path / "report.json")]
    before = sorted(filled.cache.rglob("*"))
    where = subprocess.check_output(command, cwd=checkout, env=env, text=True, timeout=300).splitlines()[0]
    assert where.split() == [str(checkout), str(site / "c3a_triton" / "kernels" / "__init__.py")]
    found = report.read_json(tmp_path / "report.json")
    assert (found["found"], found["compiled"], found["left"], found["failed"]) == (3, 0, 0, [])
    assert sorted(filled.cache.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.interpreter
def test_job_says_that_the_cache_serves(filled: Filled, setting: runs.Setting) -> None:
    shutil.rmtree(filled.cache)
    precompiled.adopt(filled.out)
    assert os.environ["TRITON_CACHE_DIR"] == str(filled.cache)
    record = look_up(setting)
    assert record["status"] == "ok", record
    assert (record["hit"], record["found"], record["reasons"]) == (True, 3, [])


@pytest.mark.slow
@pytest.mark.interpreter
def test_job_compiles_what_a_broken_archive_of_another_triton_lacks(
    filled: Filled, setting: runs.Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    shutil.copytree(filled.out, out)
    manifest = report.read_json(out / precompile.MANIFEST)
    report.write_json(out / precompile.MANIFEST, manifest | {"triton_key": "other", "cache_dir": str(cache)})
    archive = (out / precompile.ARCHIVE).read_bytes()
    (out / precompile.ARCHIVE).write_bytes(archive[: len(archive) // 2])
    precompiled.adopt(out)
    assert "cannot be unpacked" in capsys.readouterr().out
    record = look_up(replace(setting, cache=out))
    assert (record["status"], record["hit"], record["compiled"]) == ("unavailable", False, 3), record
    assert "triton_key is" in record["message"]
    assert "was other" in record["message"]
    assert not runs.failed(runs.Results(tmp_path, {}, records={"cache": {"look-up": record}}), [precompiled.SUBJECT])


@pytest.mark.interpreter
def test_job_goes_on_without_a_cache(setting: runs.Setting, tmp_path: Path) -> None:
    record = look_up(replace(setting, cache=tmp_path))
    assert record["status"] == "unavailable"
    assert str(tmp_path) in record["message"]


def test_kernels_compiled_during_a_part_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    results = runs.Results(tmp_path / "results.json", {})

    def compile_one(name: str) -> None:
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / f"{name}_kernel.cubin").touch()

    compile_one("before")
    for name in ("first", "second"):  # of a part that is begun again
        with suppress(runs.DeviceLostError), precompiled.counted(results, "op", tmp_path / "log"):
            compile_one(name)
            raise runs.DeviceLostError
    assert report.read_json(results.path)["records"]["cache"]["op"]["compiled"] == 2
    assert (tmp_path / "log").read_text() == "op: first_kernel\nop: second_kernel\n"


def test_as_on_a_card_auto_chooses_as_on_a_gpu_and_meta_tensors_launch() -> None:
    case = cases.LayerCase(8192, 4096, 4096, 128)
    calls = list(specialisations.of_layers([case], torch.device("meta")))
    found = {}
    for name, call in calls:
        found[name.partition(" ")[0]] = {one.identity for one in specialisations.record([(name, call)])}
    assert found["ours:auto"] == found["ours:fft"]
    assert {json.loads(identity)[0].rpartition(".")[2] for identity in found["ours:direct"]} == {
        "table_kernel",
        "table_product_kernel",
        "diagonal_sums_kernel",
        "fold_sums_kernel",
    }


def test_every_part_with_launches_is_recorded() -> None:
    assert specialisations.parts() == ["ceilings", "model", "op", "profiled", "tile_sweep", "token_sweep"]


@pytest.mark.interpreter
def test_recording_ends_with_its_context() -> None:
    run = plans.kernels().expand.expand_kernel.run
    with specialisations.recorded() as recorder:
        expand.expand_weight(torch.ones(1, 1, 4), scale=1.0, dtype=torch.float32)
    assert len(recorder.found) == 1
    assert plans.kernels().expand.expand_kernel.run == run
    expand.expand_weight(torch.ones(1, 2, 4), scale=1.0, dtype=torch.float32)
    assert len(recorder.found) == 1
