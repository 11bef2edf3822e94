"""`c3a-triton autotune` and `c3a-triton cache`, on model folders that the tests write."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import llama

from c3a_triton import C3AConfig, apply, cli
from c3a_triton.operator import dispatch, tuned
from c3a_triton.tuning import measurement

COMMAND = shutil.which("c3a-triton", path=str(Path(sys.executable).parent)) or "c3a-triton"
HANG = 1800  # seconds, after which a process is taken to hang


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("C3A_TRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("C3A_TRITON_BACKEND", raising=False)
    dispatch.refresh()
    yield tmp_path / "cache"
    dispatch.refresh()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model's folder that holds its configuration and nothing else."""
    path = tmp_path_factory.mktemp("model")
    config = llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    return path


def called(capsys, *arguments):
    """(exit code, standard output, standard error) of the command, in this process."""
    code = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_what_is_written_is_what_is_applied(folder, tmp_path, capsys):
    output, page = tmp_path / "new" / "c3a.json", tmp_path / "new" / "report.html"
    arguments = ["autotune", folder, "--max-params", "3k", "--target-modules", "all-linear", "--no-measure", "--json"]
    code, out, err = called(capsys, *arguments, "--output", output, "--report", page)
    assert code == 0, err
    document = json.loads(out)
    assert document["times"] == "predicted"
    assert document["output"] == str(output)
    assert document["report"] == [str(page), str(page.with_suffix(".png"))]
    assert all(Path(path).stat().st_size > 1000 for path in document["report"])
    assert document["parameters"] <= 3000
    model = apply(llama(), C3AConfig.from_pretrained(output))
    assert model.c3a.get_nb_trainable_parameters()[0] == document["parameters"]


def test_an_interrupted_run_keeps_what_it_measured_and_is_resumed(folder, capsys, monkeypatch):
    """Measured on the CPU, by the clock: Ctrl-C in the fifth call that is timed, of the third case; then to its end."""
    arguments = ["autotune", folder, "--max-params", "10k", "--tokens", 16, "--device", "cpu", "--dtype", "float32"]
    seconds, calls = measurement._cpu_seconds, []

    def interrupted(call):
        calls.append(call)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return seconds(call)

    with monkeypatch.context() as patch:
        patch.setattr(measurement, "_cpu_seconds", interrupted)
        code, out, err = called(capsys, *arguments, "--json")
    assert (code, out) == (130, "")
    assert "is kept in" in err
    kept = tuned.load().times
    assert len(kept) == 2  # each a forward and a backward
    code, out, err = called(capsys, *arguments, "--json")
    assert code == 0, err
    found = tuned.load().times
    assert len(found) > len(kept)
    assert {key: found[key] for key in kept} == kept  # not measured again
    assert json.loads(out)["times"] == "measured"


def test_the_table_on_the_screen(folder, capsys):
    code, out, _ = called(capsys, "autotune", folder, "--like-lora-rank", 2, "--no-measure")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:7] == ["group", "layers", "in", "out", "b", "parameters", "backend"]
    assert [line.split()[0] for line in lines[1:4]] == ["q_proj", "v_proj", "all"]
    assert "as many parameters as LoRA of rank 2" in out
    assert "predicted" in out


def test_targets_as_names_or_as_an_expression(folder, capsys):
    def groups(*targets):
        arguments = ("autotune", folder, "--max-params", "50k", "--no-measure", "--json", "--target-modules", *targets)
        return [row["group"] for row in json.loads(called(capsys, *arguments)[1])["groups"]]

    assert groups("q_proj", "up_proj") == ["q_proj", "up_proj"]
    assert groups("q_proj,up_proj") == ["q_proj", "up_proj"]
    assert groups(r".*\.(gate|up)_proj") == ["gate_proj", "up_proj"]
    assert groups("q_proj", "up_proj", "--exclude-modules", "up_proj") == ["q_proj"]


@pytest.mark.parametrize("model", ["missing", "empty", "broken", "unknown", "list", "impossible"])
def test_a_model_that_cannot_be_read(model, folder, tmp_path, capsys):
    path = tmp_path / model
    if model != "missing":
        path.mkdir()
    good = json.loads((folder / "config.json").read_text())
    contents = {
        "broken": "{",
        "unknown": json.dumps({"model_type": "no-such-model", "architectures": ["NoSuchModel"]}),
        "list": "[]",
        "impossible": json.dumps(good | {"hidden_size": "wide"}),
    }
    if model in contents:
        (path / "config.json").write_text(contents[model])
    code, out, err = called(capsys, "autotune", path, "--max-params", "1M", "--no-measure")
    assert (code, out) == (1, "")
    assert str(path) in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-params", "10"], "still need"),
        (["--max-params", "1M", "--target-modules", "q_prj"], "q_proj"),
        (["--max-params", "1M", "--target-modules", "("], "not a valid regular expression"),
        (["--max-params", "1M", "--device", "cpu"], "GPUs only"),
        (["--max-params", "1M", "--report", "page.txt"], ".html"),
    ],
)
def test_what_cannot_be_done_says_why(folder, capsys, arguments, message):
    code, out, err = called(capsys, "autotune", folder, *arguments, "--no-measure")
    assert (code, out) == (1, "")
    assert message in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--max-params", "1M", "--like-lora-rank", "4"],
        ["--max-params", "many"],
        ["--max-params", "0"],
        ["--like-lora-rank", "-1"],
        ["--max-adapter-mb", "nan"],
        ["--max-params", "1M", "--objective", "speed"],
        ["--max-params", "1M", "--tokens", "0"],
        ["--max-params", "1M", "--tokens", "many"],
        ["--max-params", "1M", "--unknown"],
    ],
)
def test_wrong_usage(folder, capsys, arguments):
    code, out, err = called(capsys, "autotune", folder, *arguments)
    assert (code, out) == (2, "")
    assert "usage" in err


@pytest.mark.parametrize("option", ["--output", "--report"])
def test_what_cannot_be_written_is_refused_before_anything_is_measured(folder, tmp_path, capsys, monkeypatch, option):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("c3a_triton.tuning.tuner.autotune", lambda *args, **kwargs: pytest.fail("measured"))
    target = tmp_path / "file" / "c3a.html"
    code, out, err = called(capsys, "autotune", folder, "--max-params", "1M", option, target)
    assert (code, out) == (1, "")
    assert "is not a folder" in err
    code, _, err = called(capsys, "autotune", folder, "--max-params", "1M", "--report", tmp_path)
    assert code == 1


def test_the_cache_is_shown_and_cleared(cache, capsys):
    assert called(capsys, "cache", "show")[:2] == (0, f"{cache}/tuned-1.json: 0 measured layers, 0 measured tiles\n")
    key = tuned.Key("NVIDIA Test", "9.0", "2.13", "3.9", "bfloat16", 13, 4096, 1024, 128, "fft")
    tuned.add({key: tuned.Times(1e-4, 2e-4), key._replace(b=64): tuned.Times(3e-4)})
    code, out, _ = called(capsys, "cache", "show")
    assert code == 0
    assert "NVIDIA Test (9.0), torch 2.13, triton 3.9" in out
    assert ["bfloat16", "8192", "4096", "1024", "128", "fft", "100", "µs", "200", "µs"] in map(
        str.split, out.splitlines()
    )
    document = json.loads(called(capsys, "cache", "show", "--json")[1])
    assert document["path"] == f"{cache}/tuned-1.json"
    assert [(row["b"], row["forward"], row["backward"]) for row in document["times"]] == [
        (64, 3e-4, None),
        (128, 1e-4, 2e-4),
    ]
    assert json.loads(called(capsys, "cache", "clear", "--json")[1])["removed"] == 2
    assert not (cache / "tuned-1.json").exists()
    assert called(capsys, "cache", "clear")[0] == 0
    (cache / "tuned-1.json").write_text("{")
    code, out, err = called(capsys, "cache", "show")
    assert (code, "set aside" in err) == (0, True)


def test_the_installed_command_needs_a_large_model_s_shapes_alone(tmp_path):
    """Layers as of a Llama of 3 billion parameters, predicted, in less memory than its embeddings take."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
    ).save_pretrained(tmp_path)
    # Not ru_maxrss: there a process starts with what the one that started it has.
    code = """
import atexit, re, runpy, sys
from pathlib import Path
tell = lambda: print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
atexit.register(tell)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
    arguments = ["autotune", tmp_path, "--max-params", "20M", "--target-modules", "all-linear", "--no-measure"]
    command = [sys.executable, "-c", code, COMMAND, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^all +14 ", done.stdout, re.MULTILINE)
    assert int(done.stdout.splitlines()[-1]) < 1 << 20
