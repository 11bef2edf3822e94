"""Two processes agree with one: DDP, FSDP, ZeRO-3, and examples/train.py under its launchers. CPUs and gloo."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import HAS_PLANS, TORCHRUN, launch, launch_by_accelerate
from safetensors.torch import load_file

import c3a_triton
from c3a_triton.bases.sharded import check_gathered, whole_shape
from c3a_triton.errors import ShapeError

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

TESTS = Path(__file__).resolve().parent
EXAMPLE = TESTS.parent / "examples" / "train.py"
BOUND = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases of `distributed_worker.py`, in one launch."""
    folder = tmp_path_factory.mktemp("spread")
    launch(*TORCHRUN, str(TESTS / "distributed_worker.py"), str(folder), "torch")
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("way", ["ddp", "ddp first", "ddp first, with options", "fsdp2", "fsdp2, base whole", "fsdp1"])
def test_two_processes_train_as_one_and_their_files_load_on_one(results: dict[str, Any], way: str) -> None:
    """Kernels, biases and a module trained whole, after 20 steps of the same batches."""
    found = results[way]
    assert isinstance(found, dict), found
    assert found["same names"]
    assert found["moved"] > 1e-2
    assert found["loss"] <= BOUND
    assert found["adapter"] <= BOUND
    assert found["kernels sharded"] == way.startswith("fsdp2")


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp1"])
def test_rows_of_tokens_are_trained_as_by_one(results: dict[str, Any], way: str) -> None:
    found = results["tokens"][way]
    assert found["same names"]
    assert found["moved"] > 1e-2
    assert found["adapter"] <= BOUND
    assert found["same afterwards"]


def test_mixed_precision_of_fsdp2(results: dict[str, Any]) -> None:
    found = results["fsdp2, bfloat16"]
    assert isinstance(found, dict), found
    assert found["kernels sharded"]
    assert BOUND < found["loss"] < 0.05
    assert found["adapter"] < found["moved"]


def test_what_cannot_be_spread_says_what_to_do(results: dict[str, Any]) -> None:
    said = results["refused"]
    assert said["adapt fsdp2"].startswith("ConfigError: blocks.0.up is sharded already")
    assert said["load fsdp2"].startswith("CheckpointError")
    for case in ("adapt fsdp2", "load fsdp2"):
        assert "adapt the model first and call fully_shard afterwards" in said[case]
    assert said["beside the plan"] == "no error"


def test_verbs_through_ddp_keep_what_is_trained_in_step(results: dict[str, Any]) -> None:
    found = results["through wrappers"]
    assert found["one manager"]
    assert found["names"] == ["default", "second"]
    for case in ("both set", "second set", "second deleted", "loaded", "biases", "unchanged"):
        assert found[case] < 1e-6, case
    assert found["adapters left"] == []


def test_wrappers_that_cannot_be_built_again_are_refused_with_the_order_that_works(results: dict[str, Any]) -> None:
    said = results["through wrappers"]["said"]
    for case in ("hook", "built-in hook", "static", "of its own"):
        assert said[case].startswith("AdapterStateError: this DistributedDataParallel "), case
    assert "communication hook" in said["hook"]
    assert "communication hook" in said["built-in hook"]
    assert "part in this ModuleDict is wrapped in DistributedDataParallel" in said["part"]
    assert "wrapped in DistributedDataParallel" in said["nested"]
    assert "wrapped in FullyShardedDataParallel" in said["fsdp1"]
    for case in said.keys() - {"frozen"}:
        assert "Adapt the model first" in said[case], case
    assert "is_trainable=True" in said["frozen"]


# DeepSpeed's ZeRO-3

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (it has no wheels)"
)


@pytest.fixture(scope="module")
def zero3_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("zero")
    launch(*TORCHRUN, str(TESTS / "distributed_worker.py"), str(folder), "zero3", deepspeed=True)
    return json.loads((folder / "results.json").read_text())


@needs_deepspeed
@pytest.mark.parametrize("way", ["apply", "apply, small ones whole", "a base in parts", "PEFT"])
def test_two_processes_of_zero3_train_as_one(zero3_results: dict[str, Any], way: str) -> None:
    found = zero3_results[way]
    assert isinstance(found, dict), found
    assert found["in parts"]
    assert found["same names"]
    assert found["moved"] > 1e-2
    assert found["loss"] <= BOUND
    assert found["adapter"] <= BOUND


@needs_deepspeed
def test_what_is_in_parts_is_refused_outside_the_model(zero3_results: dict[str, Any]) -> None:
    said = zero3_results["apply"]["refused"]
    for case in ("delta", "function"):
        assert said[case].startswith("ShapeError: w has the shape (0,)")
    assert "deepspeed.zero.GatheredParameters" in said["delta"]


def test_a_layer_lets_zero3_gather_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the layer asks of DeepSpeed, here of a stand-in: its kernels are emptied as ZeRO-3 leaves them."""
    layer = c3a_triton.C3ALinear(torch.nn.Linear(8, 8), block_size=4)
    layer.base_layer.register_forward_hook(lambda *args: None)  # as ZeRO-3 has hooks on every module
    x, kernel = torch.randn(3, 8), layer.c3a_kernel["default"]
    y, values = layer(x), kernel.data.clone()
    registered = []
    zero = SimpleNamespace(register_external_parameter=lambda module, parameter: registered.append((module, parameter)))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    kernel.ds_id, kernel.all_gather = 0, lambda: setattr(kernel, "data", values)
    kernel.data = torch.empty(0)
    with pytest.raises(ShapeError, match=r"shape \(0,\).*deepspeed\.zero\.GatheredParameters"):
        layer.get_delta_weight("default")
    for _ in range(2):
        torch.testing.assert_close(layer(x), y)
    assert [(module is layer, parameter is kernel) for module, parameter in registered] == [(True, True)]


def test_a_kernel_that_zero3_has_left_empty_is_refused() -> None:
    kernel: Any = torch.nn.Parameter(torch.empty(0))
    check_gathered(kernel)  # nobody's: what it lacks is the operator's to say
    kernel.ds_id, kernel.ds_shape = 0, torch.Size([2, 2, 4])
    with pytest.raises(ShapeError, match=r"^w has the shape \(0,\).*deepspeed\.zero\.GatheredParameters"):
        check_gathered(kernel)
    assert whole_shape(kernel).numel() == 16
    kernel.data = torch.ones(2, 2, 4)
    check_gathered(kernel)


# examples/train.py

SMALL = ("--cpu", "--steps", "20", "--block-size", "8", "--length", "16", "--lr", "0.05", "--target-modules", "q_proj")


def example(folder: Path, *arguments: str) -> None:
    """The example in this process."""
    assert example_module().main([*SMALL, "--output", str(folder), *arguments]) == 0


def example_module() -> Any:
    sys.path.insert(0, str(EXAMPLE.parent))  # it imports its neighbours
    try:
        spec = importlib.util.spec_from_file_location("train_example", EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLE.parent))


def losses_and_adapter(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.tensor(json.loads((folder / "losses.json").read_text())), load_file(
        folder / "adapter_model.safetensors"
    )


# Of each way what of transformers it needs.
NEEDS = {
    "tensor parallel": "transformers.distributed.tensor_parallel",
    "expert parallel": "transformers.distributed.expert_parallel",
}
EXPERTS = ("--target-parameters", "all-experts")
# Options of one process and of two, and those of two alone.
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain loop, FSDP2": (("--plain-loop",), ("--batch", "2")),
    "Trainer, DDP": ((), ("--batch", "2")),
    "tensor parallel": (("--plain-loop",), ("--tp", "2")),
    "expert parallel": (("--plain-loop", *EXPERTS), ("--ep", "2")),
}


def is_here(way: str) -> bool:
    """Whether this transformers has what a way needs."""
    return way not in NEEDS or (HAS_PLANS and importlib.util.find_spec(NEEDS[way]) is not None)


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the example writes in each way; in one launch, because importing costs more than training."""
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("two")
    ways = {way: options for way, options in WAYS.items() if is_here(way)}
    runs = [[*SMALL, *both, *two, "--output", str(folder / way)] for way, (both, two) in ways.items()]
    script = folder / "all.py"
    script.write_text(
        f"import os, sys, torch; sys.path.insert(0, {str(EXAMPLE.parent)!r}); import train\n"
        f"status = max(train.main(arguments) for arguments in {runs!r})\n"
        "torch.distributed.destroy_process_group()\n"
        "os._exit(status)\n"  # as `distributed_worker.py` does: a thread of torch's own aborts some that end
    )
    launch_by_accelerate("--multi_gpu", "--num_processes", "2", str(script))
    return folder


@pytest.mark.filterwarnings("ignore:PEFT adapts linear layers alone")
@pytest.mark.parametrize("way", WAYS)
def test_the_example_in_two_processes_trains_as_in_one(tmp_path: Path, in_two_processes: Path, way: str) -> None:
    if not is_here(way):
        pytest.skip(f"this transformers has no {NEEDS[way]}")
    example(tmp_path, *WAYS[way][0])
    one, two = losses_and_adapter(tmp_path), losses_and_adapter(in_two_processes / way)
    assert len(one[0]) == 20
    torch.testing.assert_close(two[0], one[0], rtol=0, atol=BOUND)
    assert two[1].keys() == one[1].keys()
    assert any(".experts." in name for name in one[1]) == (way == "expert parallel")
    for name, tensor in one[1].items():
        assert tensor.abs().max() > 0.1
        if way == "expert parallel":
            # Where a gradient is about zero Adam divides rounding errors by each other: single values say less.
            assert (two[1][name] - tensor).norm() <= BOUND * tensor.norm()
        else:
            torch.testing.assert_close(two[1][name], tensor, rtol=0, atol=BOUND)


@needs_deepspeed
def test_the_example_under_zero3(tmp_path: Path) -> None:
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    example(tmp_path / "one", "--batch", "4")
    options = ("--use_deepspeed", "--zero_stage", "3", "--zero3_save_16bit_model", "true", "--num_processes", "2")
    script = (str(EXAMPLE), *SMALL, "--batch", "2", "--output", str(tmp_path / "two"))
    launch_by_accelerate(*options, *script, deepspeed=True)
    assert list((tmp_path / "two" / "checkpoint-20").glob("global_step20/zero_*")), "not ZeRO-3's checkpoint"
    one, two = losses_and_adapter(tmp_path / "one"), losses_and_adapter(tmp_path / "two")
    torch.testing.assert_close(two[0], one[0], rtol=0, atol=BOUND)
    assert two[1].keys() == one[1].keys()
    for name, tensor in one[1].items():
        # Where a gradient is about zero Adam divides rounding errors by each other.
        torch.testing.assert_close(two[1][name], tensor, rtol=0, atol=1e-4)


def test_the_example_resumes_and_takes_a_model_and_a_text(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from tiny_models import llama

    llama(vocab_size=256).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    own = ("--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--gradient-checkpointing")
    example(tmp_path / "out", *own, "--steps", "4", "--save-steps", "2")
    whole = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "gone")
    example(tmp_path / "out", *own, "--steps", "4", "--save-steps", "2", "--resume")
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    c3a_triton.load_adapter(llama(vocab_size=256), tmp_path / "out" / "checkpoint-4")


def test_the_example_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    for arguments, expected in {
        ("--block-size", "-3"): "positive integer",
        ("--plain-loop", "--resume"): "writes no checkpoints",
        ("--tp", "2"): "all 1 processes share one model, or none",
    }.items():
        with pytest.raises(SystemExit):
            example(tmp_path, *arguments)
        assert expected in capsys.readouterr().err
    with pytest.raises(AssertionError):
        example(tmp_path, "--text", str(tmp_path / "nowhere"))
    assert "no such file or folder" in capsys.readouterr().err
