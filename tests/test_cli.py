"""The command `c3a-triton`: what it prints, what it returns, and that a user's mistake is a message."""

import json
import os
import re
import resource
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from math import nan
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import tiny_models

import c3a_triton
from c3a_triton import C3AConfig, cli
from c3a_triton.benchmark import gate, layer, peers
from c3a_triton.commands import bench, doctor, folder_merge, merge, parsers
from c3a_triton.commands.options import module_choice, parameter_choice
from c3a_triton.operator import calls, dispatch

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("autotune", "cache", "inspect", "merge", "bench", "doctor")
needs_peft = pytest.mark.skipif(peers.why_no_peft() is not None, reason="needs PEFT")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A tiny Llama in shards, and an adapter for it."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = tiny_models.llama()
    model.save_pretrained(folder / "model", max_shard_size="10KB")
    config = C3AConfig(block_size=4, target_modules=["q_proj", "down_proj"], block_size_pattern={"down_proj": 24})
    c3a_triton.apply(model, config).c3a.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def run(capsys):
    """Run a command line here; (exit code, what it printed, what it said on standard error)."""

    def run(*args: object) -> tuple[int, str, str]:
        code = cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert ("Traceback" in captured.err) == ("Please report it" in captured.err)
        return code, captured.out, captured.err

    return run


def failed(run, *args: object) -> str:
    code, out, err = run(*args)
    assert (code, out) == (1, "")
    return err[err.index("c3a-triton: error: ") :]


# The command itself


def command(*args: object, **options) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, args)], capture_output=True, text=True, env=env, **options)


def test_the_installed_command(tmp_path):
    """What takes imports is run in this process by the tests below, and by test_tuning_command.py as installed."""
    script = Path(sysconfig.get_path("scripts")) / "c3a-triton"
    done = command(script, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"c3a_triton {c3a_triton.__version__}\n", "")
    assert command(script, "frobnicate", cwd=tmp_path).returncode == 2


@pytest.fixture
def bare() -> Callable[..., subprocess.CompletedProcess]:
    """Run `python -m c3a_triton` where no .pth file counts: editable installations are by those."""

    def bare(line: str, folder: Path, *first: Path) -> subprocess.CompletedProcess:
        path = [*map(str, first), *filter(None, sys.path)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-S", "-m", "c3a_triton", *line.split()]
        return subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True)

    return bare


@pytest.mark.parametrize("line", ["doctor --json", "inspect nowhere"])
def test_a_checkout_that_is_not_installed_names_the_remedy(bare, line):
    done = bare(line, ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"c3a-triton: error: the kernels are missing, because {ROOT / 'c3a_triton'} is a checkout that is not "
        f"installed: run `pip install -e .` in {ROOT}, or start from another folder if c3a_triton is installed\n"
    )


def test_a_checkout_that_lies_before_the_installed_package(bare, tmp_path):
    """As from a wheel: a folder with the package, its kernels in it."""
    package = tmp_path / "site" / "c3a_triton"
    package.mkdir(parents=True)
    for entry in (*(ROOT / "c3a_triton").iterdir(), ROOT / "kernels"):
        (package / entry.name).symlink_to(entry)
    done = bare("inspect nowhere", ROOT, package.parent)
    assert (done.returncode, done.stdout) == (1, "")
    assert "start from another folder" in done.stderr
    done = bare(f"inspect {tmp_path}/nowhere", tmp_path, package.parent)
    assert (done.returncode, done.stderr) == (1, f"c3a-triton: error: there is no folder or file {tmp_path}/nowhere\n")


def test_a_reader_that_goes_away(tmp_path):
    """As `| head -1` does: no traceback, nothing on standard error."""
    pytest.importorskip("shtab")
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-m", "c3a_triton", "completion", "zsh"]
    done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_a_form_for_machines(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert f"examples:\n  c3a-triton {name}" in out
    assert "--json" in out


@pytest.mark.parametrize(
    ("line", "code"),
    [("--help", 0), ("--version", 0), ("bench --help", 0), ("bench --in 8 --block-size 4 --tokens 4", 2)],
)
def test_what_computes_nothing_is_answered_at_once(tmp_path, line, code):
    """In less CPU time than torch takes to be imported, several times over."""
    script = "import sys; from c3a_triton.cli import main; code = main(); print('torch' in sys.modules); sys.exit(code)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(sys.executable, "-c", script, *line.split(), cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "False"), done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_backends_are_those_of_the_operator():
    assert parsers.BACKENDS == dispatch.BACKENDS


def test_help_names_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in (*COMMANDS, "completion", "Exit codes"))
    assert run("--version") == (0, f"c3a_triton {c3a_triton.__version__}\n", "")


@pytest.mark.parametrize(
    "args",
    [
        "",
        "frobnicate",
        "inspect",
        "inspect --frobnicate x",
        "merge --model x --adapter y",
        "bench --block-size 4 --tokens 4",
        "bench --in 8 --block-size 4 --tokens 4",
        "bench x --in 8 --out 8 --block-size 4 --tokens 4",
        "bench x --in 8 --block-size 4 --tokens 4",
        "bench --in 8 --out 8 --block-size 4 --tokens 4 --layers 2",
        "bench --in 8 --out 8 --block-size 0 --tokens 4",
        "bench --in 8 --out 8 --block-size four --tokens 4",
        "bench --in 8 --out 8 --block-size 4 --tokens 4 --dtype int8",
        "bench --in 8 --out 8 --block-size 4 --tokens 4 --seconds -1",
        "bench --in 8 --out 8 --block-size 4 --tokens 4 --backends quantum",
        "completion powershell",
    ],
)
def test_wrong_usage(run, args):
    code, out, err = run(*args.split())
    assert (code, out) == (2, "")
    assert err.startswith("usage: c3a-triton")


def test_what_was_not_foreseen_is_told_as_ours(run, monkeypatch):
    def fail() -> None:
        raise ZeroDivisionError("by 7")

    monkeypatch.setattr(doctor, "_backends", fail)
    code, out, err = run("doctor")
    assert (code, out) == (1, "")
    assert "ZeroDivisionError: by 7" in err
    assert "c3a-triton doctor" in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "c3a-triton: interrupted\n"),
        (MemoryError("8 EiB"), 1, "c3a-triton: error: not enough memory: 8 EiB\n"),
        (torch.OutOfMemoryError("CUDA"), 1, "c3a-triton: error: not enough memory: CUDA\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "c3a-triton: error: [Errno 13] Permission denied: '/x'\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_a_command(run, monkeypatch, error, code, message):
    def fail() -> None:
        raise error

    monkeypatch.setattr(doctor, "_backends", fail)
    assert run("doctor") == (code, "", message)


def test_warnings_are_lines(run, monkeypatch, folders):
    monkeypatch.setattr(doctor, "_backends", lambda: warnings.warn("mind the gap", stacklevel=1) or [])
    code, _, err = run("doctor")
    assert (code, err) == (0, "c3a-triton: warning: mind the gap\n")


def test_completion(run, monkeypatch):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "tcsh"):
        code, out, _ = run("completion", shell)
        assert code == 0
        assert all(name in out for name in COMMANDS)
    _, out, _ = run("completion", "bash")
    assert "_c3a_triton_merge___output_COMPGEN=_shtab_compgen_dirs" in out
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install shtab" in failed(run, "completion", "bash")


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (None, None),
        (["all-linear"], "all-linear"),
        (["q_proj"], ["q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (["attn.c_proj"], ["attn.c_proj"]),
        ([".*mlp.*"], ".*mlp.*"),
        (["(q|v)_proj"], "(q|v)_proj"),
    ],
)
def test_module_choice(words, meaning):
    assert module_choice(words) == meaning


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (None, None),
        (["all-experts"], "all-experts"),
        (["experts.down_proj"], ["experts.down_proj"]),
        (["up_proj,down_proj", "scale"], ["up_proj", "down_proj", "scale"]),
    ],
)
def test_parameter_choice(words, meaning):
    assert parameter_choice(words) == meaning


# inspect


def test_inspect_a_model(run, folders):
    code, out, _ = run("inspect", folders / "model", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["class"], found["layers"]) == ("LlamaForCausalLM", 14)
    groups = {group["name"].rpartition(".")[2]: group for group in found["groups"]}
    assert groups["k_proj"]["name"] == "model.layers.*.self_attn.k_proj"
    assert (groups["k_proj"]["layers"], groups["k_proj"]["in_features"], groups["k_proj"]["out_features"]) == (
        2,
        24,
        12,
    )
    assert groups["k_proj"]["valid_block_sizes"] == [1, 2, 3, 4, 6, 12]
    rows = {row["block_size"]: row for row in found["block_sizes"]}
    # k and v have no 24: q and o of 24 × 24, three of 24 × 48, in two layers
    assert rows[24]["layers"] == 10
    assert rows[24]["parameters"] == 2 * (2 * 24 * 24 + 3 * 24 * 48) // 24
    assert rows[24]["lora_rank"] == pytest.approx(rows[24]["parameters"] / (2 * (2 * 48 + 3 * 72)))
    assert rows[24]["adapter_bytes"] == 4 * rows[24]["parameters"]

    code, out, _ = run("inspect", folders / "model" / "config.json", "--target-modules", "k_proj", "q_proj")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["model.layers.*.self_attn.k_proj", "2", "24", "12", "1,", "2,", "3,", "4,", "6,", "12"] in lines
    assert ["24", "2", "of", "4", "48", "0.399", "%", "0.5", "192", "B"] in lines


def test_inspect_the_same_parameters_as_apply(run, folders):
    _, out, _ = run("inspect", folders / "model", "--target-modules", ".*(q|v)_proj", "--json")
    row = next(row for row in json.loads(out)["block_sizes"] if row["block_size"] == 6)
    model = c3a_triton.apply(tiny_models.llama(), C3AConfig(block_size=6, target_modules=["q_proj", "v_proj"]))
    assert row["parameters"] == model.c3a.get_nb_trainable_parameters()[0]
    _, out, _ = run("inspect", folders / "model", "--exclude-modules", "mlp.*", "q_proj", "--json")
    assert json.loads(out)["exclude_modules"] == ["mlp.*", "q_proj"]
    _, out, _ = run("inspect", folders / "model", "--exclude-modules", ".*mlp.*", "--json")
    assert json.loads(out)["layers"] == 8


def test_inspect_transposed_layers_of_a_model_without_weights(run, tmp_path):
    tiny_models.gpt2().config.save_pretrained(tmp_path)
    _, out, _ = run("inspect", tmp_path, "--target-modules", "c_attn", "--json")
    (group,) = json.loads(out)["groups"]
    assert (group["in_features"], group["out_features"]) == (24, 72)


def test_inspect_an_adapter(run, folders):
    code, out, _ = run("inspect", folders / "adapter", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["layers"], found["parameters"], found["other_parameters"]) == (4, 2 * (24 * 24 // 4 + 48), 0)
    assert found["config_state"] == "as it was saved with the weights"
    assert found["weights_bytes"] == (folders / "adapter" / "adapter_model.safetensors").stat().st_size
    groups = {group["name"].rpartition(".")[2]: group for group in found["groups"]}
    assert (groups["down_proj"]["block_size"], groups["down_proj"]["chosen_by"]) == (24, "down_proj")
    assert (groups["q_proj"]["block_size"], groups["q_proj"]["chosen_by"]) == (4, "block_size")
    assert (groups["down_proj"]["in_features"], groups["down_proj"]["out_features"]) == (48, 24)
    code, out, _ = run("inspect", folders / "adapter")
    assert code == 0
    assert "4 layers, 384 parameters" in out


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """A tiny mixture of experts, and an adapter for its experts and one kind of layer."""
    pytest.importorskip("transformers.integrations.moe", reason="transformers 4: experts are layers")
    folder = tmp_path_factory.mktemp("experts")
    model = tiny_models.qwen3_moe(num_hidden_layers=2)
    model.save_pretrained(folder / "model")
    config = C3AConfig(block_size=4, target_modules=["q_proj"], target_parameters="all-experts")
    with pytest.warns(UserWarning, match="it cannot load this adapter, which has 4 others"):
        c3a_triton.apply(model, config).c3a.save_pretrained(folder / "adapter")
    return folder


def test_inspect_stacked_experts(run, experts):
    code, out, err = run("inspect", experts / "model", "--json")
    assert (code, json.loads(out)["layers"], json.loads(out)["target_parameters"]) == (0, 8, None)
    assert "target_parameters=" in err  # what is left out is said
    code, out, err = run("inspect", experts / "model", "--target-parameters", "all-experts", "--json")
    found = json.loads(out)
    assert (code, err, found["layers"]) == (0, "", 12)
    groups = {group["name"]: group for group in found["groups"]}
    up = groups["model.layers.*.mlp.experts.gate_up_proj"]
    assert (up["layers"], up["stack"], up["in_features"], up["out_features"]) == (2, 4, 24, 32)
    assert up["valid_block_sizes"] == [1, 2, 4, 8]  # of the 16 rows of gate and of up, not of 32
    assert groups["model.layers.*.self_attn.q_proj"]["stack"] == 0
    row = next(row for row in found["block_sizes"] if row["block_size"] == 4)
    config = C3AConfig(block_size=4, target_modules="all-linear", target_parameters="all-experts")
    model = c3a_triton.apply(tiny_models.qwen3_moe(num_hidden_layers=2), config)
    assert row["parameters"] == model.c3a.get_nb_trainable_parameters()[0]
    arguments = ("--target-modules", "q_proj", "--target-parameters", "experts.down_proj,gate_up_proj")
    _, out, _ = run("inspect", experts / "model", *arguments)
    assert re.search(r"experts\.down_proj +2 +16 +4 × 24 +1, 2, 4, 8\n", out)
    assert "target_parameters=['experts.down_proj', 'gate_up_proj']" in out


def test_inspect_an_adapter_of_stacked_experts(run, experts):
    _, out, _ = run("inspect", experts / "adapter", "--json")
    found = json.loads(out)
    groups = {group["name"].rpartition(".")[2]: group for group in found["groups"]}
    assert (found["layers"], found["parameters"], found["other_parameters"]) == (6, 2592, 0)
    assert (groups["down_proj"]["stack"], groups["down_proj"]["parameters"]) == (4, 2 * 4 * 24 * 16 // 4)
    assert (groups["down_proj"]["in_features"], groups["down_proj"]["out_features"]) == (16, 24)
    assert groups["q_proj"]["stack"] == 0
    _, out, _ = run("inspect", experts / "adapter")
    assert re.search(r"experts\.gate_up_proj +2 +24 +4 × 32 +4 +block_size +1,536\n", out)
    code, out, err = run("inspect", experts / "adapter", "--target-parameters", "up_proj")
    assert (code, out) == (2, "")
    assert "is an adapter, whose layers are fixed" in err
    assert "target_parameters=['up_proj'] matches no" in failed(
        run, "inspect", experts / "model", "--target-parameters", "up_proj"
    )


def test_merge_stacked_experts(run, experts, tmp_path):
    arguments = ("--model", experts / "model", "--adapter", experts / "adapter", "--output", tmp_path / "merged")
    code, out, err = run("merge", *arguments, "--json")
    found = json.loads(out)
    assert code == 0, err
    assert (found["layers"], found["added"], len(found["changed"])) == (6, [], 2 + 2 * 3 * 4)
    assert found["check"]["difference"] <= found["check"]["tolerance"] < found["check"]["effect"]
    assert found["check"]["reached"] == 6


def test_autotune_stacked_experts(run, experts, tmp_path):
    arguments = ("--max-params", "2k", "--target-modules", "q_proj", "--target-parameters", "all-experts")
    code, out, err = run("autotune", experts / "model", *arguments, "--no-measure", "--output", tmp_path, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {group["group"]: group["stack"] for group in found["groups"]} == {
        "q_proj": 0,
        "gate_up_proj": 4,
        "down_proj": 4,
    }
    model = c3a_triton.apply(tiny_models.qwen3_moe(num_hidden_layers=2), C3AConfig.from_pretrained(tmp_path))
    assert model.c3a.get_nb_trainable_parameters()[0] == found["parameters"] <= 2000


def test_inspect_tells_layers_of_different_sizes_apart(run, tmp_path):
    pattern = {"model.layers.0.*": 8}
    config = C3AConfig(block_size=4, target_modules=["q_proj"], block_size_pattern=pattern)
    c3a_triton.apply(tiny_models.llama(), config).c3a.save_pretrained(tmp_path)
    _, out, _ = run("inspect", tmp_path, "--json")
    groups = json.loads(out)["groups"]
    assert [(group["layers"], group["block_size"], group["chosen_by"]) for group in groups] == [
        (1, 8, "model.layers.0.*"),
        (1, 4, "block_size"),
    ]


def test_inspect_an_edited_adapter(run, folders, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes((folders / "adapter/adapter_model.safetensors").read_bytes())
    config = json.loads((folders / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "its/name"}))
    code, out, _ = run("inspect", tmp_path)
    assert code == 0
    assert "C3A adapter for its/name" in out
    assert "changed since the weights were saved" in out
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"block_size": 8}))
    assert "block_size is 8, was 4" in failed(run, "inspect", tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json: it is not the folder"),
        ({"config.json": "{"}, "cannot read the configuration of"),
        ({"config.json": "{}"}, "cannot read the configuration of"),
        ({"config.json": '{"model_type": "from_the_future"}'}, "from_the_future"),
        ({"config.json": '{"model_type": "llama", "hidden_size": -4}'}, "transformers cannot"),
        ({"config.json": '{"model_type": "llama", "hidden_size": "wide"}'}, "transformers cannot"),
        ({"adapter_config.json": "{"}, "is not valid JSON"),
        ({"adapter_config.json": '{"peft_type": "LORA"}'}, "'LORA' adapter; only 'C3A'"),
        ({"adapter_config.json": '{"peft_type": "C3A"}'}, "has no adapter_model.safetensors"),
        ({"adapter_config.json": '{"peft_type": "C3A"}', "adapter_model.safetensors": "x"}, "may be damaged"),
    ],
)
def test_inspect_broken_folders(run, tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert message in failed(run, "inspect", tmp_path)


def test_code_of_a_models_folder_is_not_run(run, tmp_path):
    marker = tmp_path / "was-run"
    (tmp_path / "configuration_evil.py").write_text(
        f"""open({str(marker)!r}, "w")
from transformers import LlamaConfig
class EvilConfig(LlamaConfig):
    model_type = "evil"
"""
    )
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "cannot read the configuration" in failed(run, "inspect", tmp_path)
    assert not marker.exists()


def test_inspect_what_matches_nothing(run, folders):
    assert "matches no module" in failed(run, "inspect", folders / "model", "--target-modules", "attention")
    assert "is not a valid regular expression" in failed(run, "inspect", folders / "model", "--target-modules", "(")
    code, _, err = run("inspect", folders / "adapter", "--target-modules", "q_proj")
    assert (code, "leave --target-modules out" in err) == (2, True)


def test_a_name_that_no_folder_has_is_a_models_name(run, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "no folder here, so taken for a model's name" in failed(run, "inspect", "nobody/nothing")


# merge


def test_merge(run, folders, tmp_path):
    arguments = ("--model", folders / "model", "--adapter", folders / "adapter", "--output", tmp_path / "merged")
    code, out, err = run("merge", *arguments, "--json")
    found = json.loads(out)
    assert code == 0, err
    assert (found["layers"], found["added"], found["untied"]) == (4, [], False)
    assert found["check"]["difference"] <= found["check"]["tolerance"] < found["check"]["effect"]
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert found["weights_bytes"] == sum(path.stat().st_size for path in shards)
    assert all(shard.name in err for shard in shards)
    assert "--force" in failed(run, "merge", *arguments)
    code, out, _ = run("merge", *arguments, "--force")
    assert code == 0
    assert out.startswith(f"4 layers merged into {tmp_path / 'merged'} (")
    assert "such an effect" not in out
    assert "not checked" not in out


def test_merge_says_what_its_check_does_not_tell(run, folders, tmp_path, monkeypatch):
    """An effect within the tolerance, and layers that the inputs pass by."""
    monkeypatch.setattr(merge, "TOLERANCES", {torch.float32: 100.0})
    compare = merge._compare
    monkeypatch.setattr(merge, "_compare", lambda *args: compare(*args) | {"reached": 3})
    arguments = ("--model", folders / "model", "--adapter", folders / "adapter", "--output", tmp_path / "merged")
    code, out, _ = run("merge", *arguments)
    assert code == 0
    assert "such an effect is not checked" in out
    assert "the inputs reach 3 of the 4 adapted layers" in out


def test_merge_checks_before_the_output_appears(run, folders, tmp_path, monkeypatch):
    """A merge that is wrong, here by twice the update: the check sees it, and nothing is left."""
    layer = c3a_triton.adapters.layer
    add = layer.add_circulant_
    monkeypatch.setattr(layer, "add_circulant_", lambda weight, kernels: add(weight, [*kernels, *kernels]))
    arguments = ("--model", folders / "model", "--adapter", folders / "adapter", "--output", tmp_path / "merged")
    for check in ([], ["--check"]):
        assert "more than the 0.0001 that rounding explains" in failed(run, "merge", *arguments, *check)
        assert list(tmp_path.iterdir()) == []
    code, out, _ = run("merge", *arguments, "--no-check", "--json")
    assert (code, json.loads(out)["check"]) == (0, None)


def test_merge_of_a_model_that_does_not_fit_into_memory(run, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "available_memory", lambda: 1000)
    arguments = ("--model", folders / "model", "--adapter", folders / "adapter", "--output", tmp_path / "merged")
    assert re.search(
        r"--check: the model takes .* of main memory in float32", failed(run, "merge", *arguments, "--check")
    )
    assert not (tmp_path / "merged").exists()
    code, out, err = run("merge", *arguments, "--json")
    assert code == 0
    assert re.search(r"merge: not checked: the model takes .* are free", err)
    assert json.loads(out)["not_checked"].startswith("the model takes")


def test_merge_checks_what_the_folder_has_lost(run, folders, tmp_path, monkeypatch):
    """What loading would make up is told from what it makes up for the model, too."""
    plan = folder_merge.plan_merge

    def without_added(*arguments):
        found = plan(*arguments)
        found.added.clear()
        return found

    monkeypatch.setattr(folder_merge, "plan_merge", without_added)
    model = tiny_models.llama(tied=True)
    model.save_pretrained(tmp_path / "model")
    config = C3AConfig(block_size=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="copy of its own"):
        c3a_triton.apply(model, config).c3a.save_pretrained(tmp_path / "adapter")
    arguments = ("--model", tmp_path / "model", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert "the merged folder has no lm_head.weight, which the model's has" in failed(run, "merge", *arguments)


@pytest.mark.parametrize("build", ["vit", "bert_classifier", "t5", "gpt2", "clip", "segformer"])
def test_merge_checks_models_of_all_sorts(run, tmp_path, build):
    model = getattr(tiny_models, build)()
    model.save_pretrained(tmp_path / "model")
    config = C3AConfig(block_size="auto", target_modules="all-linear", init_weights="gaussian")
    c3a_triton.apply(model, config).c3a.save_pretrained(tmp_path / "adapter")
    arguments = ("--model", tmp_path / "model", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    code, out, err = run("merge", *arguments, "--json")
    assert code == 0, err
    found = json.loads(out)["check"]
    assert found["difference"] <= found["tolerance"] < found["effect"]


@pytest.mark.parametrize(
    ("build", "targets", "reason"),
    [
        ("musicgen", ["k_proj"], "a MusicgenForConditionalGeneration does not take the inputs made up for it"),
        ("llava", r"model\.vision_tower\..*fc1", "reach none of the adapted layers"),
    ],
)
def test_merge_says_where_a_check_would_say_nothing(run, tmp_path, build, targets, reason):
    """Where several parts of the configuration tell of words, and where what is made up is text alone."""
    model = getattr(tiny_models, build)()
    model.save_pretrained(tmp_path / "model")
    c3a_triton.apply(model, C3AConfig(block_size=8, target_modules=targets)).c3a.save_pretrained(tmp_path / "adapter")
    arguments = ("--model", tmp_path / "model", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert reason in failed(run, "merge", *arguments, "--check")
    code, out, err = run("merge", *arguments, "--json")
    assert code == 0, err
    assert reason in json.loads(out)["not_checked"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_check_allows_for_rounding(tmp_path, dtype):
    """Of a model of more layers than the others here, in 16 bits: a right merge passes with room to spare."""
    model = tiny_models.llama(hidden_size=48, num_hidden_layers=6).to(dtype)
    model.save_pretrained(tmp_path / "model")
    c3a_triton.apply(model, C3AConfig(block_size=8, target_modules="all-linear")).c3a.save_pretrained(
        tmp_path / "adapter"
    )
    folder_merge.merge_folder(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    found = merge._compare(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged", torch.device("cpu"))
    assert 0 < found["difference"] < found["tolerance"] / 3


def test_merge_refusals_are_messages(run, folders, tmp_path):
    def message(model: object, adapter: object, output: object = tmp_path / "merged", *more: str) -> str:
        return failed(run, "merge", "--model", model, "--adapter", adapter, "--output", output, *more)

    assert "there is no folder" in message(tmp_path / "nowhere", folders / "adapter")
    assert "no folder" in message(folders / "model", tmp_path / "nowhere")
    assert "has no config.json: it is an adapter's" in message(folders / "adapter", folders / "adapter")
    assert "is not the folder of an adapter" in message(folders / "model", folders / "model", tmp_path)
    assert "which is read" in message(folders / "model", folders / "adapter", folders / "model", "--force")
    (tmp_path / "file").write_text("")
    ready = (folders / "model", folders / "adapter")
    assert "cannot write" in message(*ready, tmp_path / "file" / "merged")
    assert "cannot write" in message(*ready, "/proc/merged")
    assert "cpu or cuda" in message(*ready, tmp_path / "merged", "--device", "mps")
    assert "no such device" in message(*ready, tmp_path / "merged", "--device", "abacus")
    if not torch.cuda.is_available():
        assert "sees 0 GPUs" in message(*ready, tmp_path / "merged", "--device", "cuda")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# bench


def test_bench_a_layer(run):
    args = "bench --in 12 --out 24 --block-size 4 --tokens 8 --seconds 0 --device cpu --dtype float32 --json"
    code, out, err = run(*args.split())
    assert code == 0, err
    found = json.loads(out)
    assert found["case"] == {"n_tokens": 8, "in_features": 12, "out_features": 24, "b": 4, "dtype": "float32"}
    expected = {"base", "dense", "ours:auto"} | ({"peft_lora", "peft_c3a"} if found["peft_missing"] is None else set())
    assert found["times"].keys() == expected
    assert all(times[mode]["median"] > 0 for times in found["times"].values() for mode in ("forward", "both"))


def test_bench_without_peft(run, monkeypatch):
    monkeypatch.setattr(peers, "why_no_peft", lambda: "PEFT is not measured: ImportError: no peft")
    args = "bench --in 12 --out 24 --block-size 4 --tokens 8 --seconds 0 --device cpu --backends torch reference"
    code, out, _ = run(*args.split())
    assert code == 0
    assert "no peft. To compare: pip install peft" in out
    rows = [line.split("  ")[0] for line in out.splitlines()]
    assert rows[3:7] == ["frozen base", "dense ΔW", "c3a_triton, torch", "c3a_triton, reference"]


def test_bench_measures_nothing_that_is_wrong(run, monkeypatch):
    monkeypatch.setitem(gate.TOLERANCES, torch.float32, 0.0)
    monkeypatch.setattr(layer.Workload, "calls", lambda work: pytest.fail("measured"))
    message = failed(
        run,
        *[
            "bench",
            "--in",
            "12",
            "--out",
            "24",
            "--block-size",
            "4",
            "--tokens",
            "8",
            "--device",
            "cpu",
            "--seconds",
            "0",
        ],
    )
    assert "nothing was measured, because a result is wrong" in message


def test_bench_refusals(run, folders, tmp_path):
    args = ["--in", "12", "--out", "24", "--block-size", "5", "--tokens", "8", "--device", "cpu"]
    assert "block_size=5 does not divide in_features=12 or out_features=24" in failed(run, "bench", *args)
    args = ["--block-size", "4", "--tokens", "8", "--device", "cpu"]
    assert "not enough memory" in failed(run, "bench", "--in", 40_000_000, "--out", 40_000_000, *args)
    assert "there is no folder" in failed(run, "bench", tmp_path / "nowhere", *args)
    config = tiny_models.bert_classifier().config
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    assert "only causal language models are measured" in failed(run, "bench", tmp_path, *args)
    args = ["--block-size", "5", "--tokens", "8", "--device", "cpu"]
    assert "block_size=5 does not divide" in failed(run, "bench", folders / "model", *args)


@needs_peft
def test_bench_a_model(run, folders):
    args = "--block-size 4 --tokens 6 --batch 2 --layers 1 --seconds 0 --device cpu --target-modules q_proj v_proj"
    code, out, err = run("bench", folders / "model", *args.split(), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["times"].keys() == {"base", "peft_lora", "peft_c3a", "ours:auto"}
    assert found["case"]["name"] == "2 layers"
    text = bench._text(found)
    assert "training step of LlamaForCausalLM, 2 layers adapted, b = 4, 2 × 6 tokens" in text


# doctor


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """One small shape in float32, a home of its own."""
    monkeypatch.setattr(doctor, "SHAPES", doctor.SHAPES[:1])
    monkeypatch.setattr(doctor, "TOLERANCES", {torch.float32: 1e-5})
    monkeypatch.setenv("HOME", str(tmp_path / "secret"))
    monkeypatch.delenv("C3A_TRITON_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("C3A_TRITON_BACKEND", raising=False)


def test_doctor(run, quick, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    code, out, err = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0, out
    assert found["healthy"]
    assert found["versions"]["torch"] == torch.__version__
    states = {entry["backend"]: entry for entry in found["backends"] if entry["device"] == "cpu"}
    assert {"auto", "reference", "torch", "direct", "fft", "expand", "fold"} == states.keys()
    for entry in states.values():
        assert (entry["state"] == "works") == (entry["error"] is not None and 0 < entry["error"] < 1e-5)
    assert states["torch"]["state"] == "works"
    assert found["environment"]["TRITON_CACHE_DIR"] == "(a path)"
    assert found["tuned_table"]["path"].startswith("~")
    assert not found["tuned_table"]["exists"]
    assert str(tmp_path) not in out + err

    monkeypatch.setattr(doctor, "_backends", lambda: found["backends"])
    code, out, _ = run("doctor")
    assert code == 0
    lines = out.splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")
    assert any(line.startswith("torch     cpu     float32   works: ") for line in lines)


def test_doctor_says_which_peft_transformers_own_verbs_want(run, quick, monkeypatch):
    peft = pytest.importorskip("transformers.integrations.peft")
    pytest.importorskip("peft")
    monkeypatch.setattr(doctor, "_backends", list)
    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", "0.17.0")
    assert "PEFT:" not in run("doctor")[1]
    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", "99.0")  # transformers 5.24 wants one that is not out yet
    assert "model.add_adapter and model.load_adapter of this transformers ask for PEFT 99.0" in run("doctor")[1]


def test_doctor_says_what_it_tries_before_it_does(run, quick, monkeypatch):
    monkeypatch.setattr(doctor.dispatch, "BACKENDS", ("auto", "torch"))
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 0)

    def errors(backend, *where):
        print(f"computing by {backend}", file=sys.stderr)
        return [0.0]

    monkeypatch.setattr(doctor, "_errors", errors)
    code, out, err = run("doctor", "--json")
    assert (code, len(json.loads(out)["backends"])) == (0, 2)
    assert err.splitlines() == [
        "doctor: auto on cpu in float32",
        "computing by auto",
        "doctor: torch on cpu in float32",
        "computing by torch",
    ]


def test_doctor_finds_what_is_broken(run, quick, monkeypatch):
    monkeypatch.setenv("C3A_TRITON_BACKEND", "nonsense")
    monkeypatch.setattr(doctor.dispatch, "BACKENDS", ("auto", "torch"))
    code, out, _ = run("doctor", "--json")
    states = {entry["backend"]: entry for entry in json.loads(out)["backends"] if entry["device"] == "cpu"}
    assert code == 1
    assert states["auto"]["state"] == "broken"
    assert "C3A_TRITON_BACKEND='nonsense' is unknown" in states["auto"]["reason"]
    assert states["torch"]["state"] == "works"


@pytest.mark.parametrize(
    ("wrong", "factor", "error"),
    [("y", 1.001, "0.001"), ("dx", 1.001, "0.001"), ("dw", 1.001, "0.001"), ("dw", nan, "nan")],
)
def test_doctor_finds_what_is_wrong(run, quick, monkeypatch, wrong, factor, error):
    right = calls.c3a_linear

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, w, backend):
            with torch.enable_grad():
                ctx.inputs = x.detach().requires_grad_(), w.detach().requires_grad_()
                ctx.y = right(ctx.inputs[0], weight, bias, [ctx.inputs[1]], backend="torch")
            return ctx.y.detach() * (factor if wrong == "y" else 1)

        @staticmethod
        def backward(ctx, dy):
            dx, dw = torch.autograd.grad(ctx.y, ctx.inputs, dy)
            return dx * (factor if wrong == "dx" else 1), None, None, dw * (factor if wrong == "dw" else 1), None

    def c3a_linear(x, weight, bias, kernels, *, backend):
        return Wrong.apply(x, weight, bias, *kernels, backend)

    monkeypatch.setattr(doctor.dispatch, "BACKENDS", ("torch",))
    monkeypatch.setattr(doctor.calls, "c3a_linear", c3a_linear)
    code, out, _ = run("doctor")
    assert code == 1
    assert f"broken: wrong by {error}, allowed: 1e-05" in out
