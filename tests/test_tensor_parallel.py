"""Several processes, each with its part of a model's layers, agree with one that has all of them. CPUs and gloo."""

import json
from pathlib import Path
from typing import Any

import bench_package  # noqa: F401
import pytest
import torch
from torch import Tensor, nn

from bench import scale
from c3a_triton import C3ALinear
from c3a_triton.bases.parallel import meshes, parallel_mesh, part_of
from c3a_triton.errors import ShapeError

pytest.importorskip("transformers.distributed.tensor_parallel")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

from test_distributed import TESTS, launch

BOUND, EXACT = 1e-5, 1e-10


def results(folder: Path, n_processes: int) -> dict[str, Any]:
    """All cases of `tensor_parallel_worker.py`, in one launch."""
    count = ("--standalone", "--nproc-per-node", str(n_processes))
    launch("torch.distributed.run", *count, str(TESTS / "tensor_parallel_worker.py"), str(folder))
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("four"), 4)


def case(results: dict[str, Any], name: str) -> Any:
    found = results["further"][name]
    assert isinstance(found, (dict, float)), found
    return found


@pytest.mark.parametrize("processes", ["of_two", "of_four"])
def test_a_layer_computes_its_part(processes: str, request: pytest.FixtureRequest) -> None:
    """Every style, block sizes that divide the local widths and that do not, even and uneven parts, and none at all."""
    found = request.getfixturevalue(processes)["layers"]
    has_all_ways = any(name.startswith("sequence_parallel") for name in found)  # torch 2.11 does not compute this one
    assert len(found) > (25 if has_all_ways else 24)
    for name, layer in found.items():
        assert isinstance(layer, dict), (name, layer)
        for what in ("y", "dx", "dw", "no grad", "rows", "merged", "delta"):
            assert layer[what] < EXACT, (name, what)
        for what in ("merged as whole", "unmerged", "disabled", "left"):
            assert layer[what], (name, what)


@pytest.mark.parametrize("processes", ["of_two", "of_four"])
def test_a_layer_sends_what_the_frozen_one_does_and_dw(processes: str, request: pytest.FixtureRequest) -> None:
    """Forward nothing, backward one all-reduce for each block size whose dw is in parts."""
    found = request.getfixturevalue(processes)["layers"]
    for name, layer in found.items():
        forward, backward, frozen_forward, frozen_backward = layer["counts"]
        assert layer["collectives"], (name, layer["counts"])
        assert forward == frozen_forward, name
        assert sum(backward.values()) - sum(frozen_backward.values()) == layer["sums"], name
    assert {layer["sums"] for layer in found.values()} == {0, 1, 2}


def check_model(found: Any) -> None:
    assert isinstance(found, dict), found
    assert found["start"] == 0
    assert found["moved"] > 1e-2
    for what in ("losses", "kernels", "no grad", "merged"):
        assert found[what] < BOUND, what
    for what in ("generated", "disabled", "merged as whole", "changed", "unmerged", "unloaded"):
        assert found[what], what
    assert found["forward"][0] == found["forward"][1]
    assert found["backward"][0] == found["backward"][1]
    assert found["backward"][0]["allreduce"] > 20


@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen3"])
def test_two_processes_train_a_model_as_one(of_two: dict[str, Any], name: str) -> None:
    """Losses and kernels of 20 steps, and collectives: none but those of the frozen model and one for each kernel."""
    check_model(of_two["models"][name])


def test_the_messages_on_paper_are_those_that_are_sent(of_two: dict[str, Any]) -> None:
    """What docs/scale.md counts for two such layers; beside them the embedding's and the head's, and its kernel's."""
    layer = scale.Layer(8, tuple(scale.Linear(8, 8, style) for style in ["colwise"] * 5 + ["rowwise"] * 2))
    sent = scale.frozen_traffic(layer, tp=2, fsdp=1).plus(scale.adapter_traffic(layer, b=4, tp=2, fsdp=1))
    found = of_two["models"]["llama"]
    # Plans of transformers 5.17 leave the embedding whole.
    assert found["forward"][0]["allreduce"] == 2 * sent.forward + found["spread embeddings"]
    assert found["backward"][0]["allreduce"] == 2 * sent.backward + 2


def test_four_processes_train_a_model_as_one(of_four: dict[str, Any]) -> None:
    check_model(of_four["models"]["qwen3"])


def test_fsdp2_over_tensor_parallelism_trains_as_one_process(of_four: dict[str, Any]) -> None:
    found = case(of_four, "two dimensions")
    assert found["losses"] < BOUND
    assert found["kernels"] < BOUND
    assert found["moved"] > 1e-2
    assert found["weight"].count("Shard") == 2
    assert found["kernel"].count("Shard") == 1
    assert found["merge"].startswith("AdapterStateError: 0.up: nothing can be merged")
    assert "as FSDP2 does it. Save the adapter, and merge it in a model that is not" in found["merge"]
    assert found["adapt"].startswith("ConfigError: 0.up is sharded already")
    assert "adapt the model first and call fully_shard afterwards" in found["adapt"]


def test_gradient_checkpointing(of_two: dict[str, Any]) -> None:
    found = case(of_two, "checkpointing")
    assert found.keys() == {"reentrant=False", "reentrant=True"}
    assert max(found.values()) < 1e-7


def test_several_adapters_by_turns_at_once_and_by_rows(of_two: dict[str, Any]) -> None:
    found = case(of_two, "several adapters")
    assert found.pop("left")
    assert found.pop("rows differ") > 1e-2
    assert len(found) == 13
    for what, difference in found.items():
        assert difference < BOUND, what


def test_a_model_is_sharded_after_it_was_adapted(of_two: dict[str, Any]) -> None:
    assert case(of_two, "adapted before sharding") < BOUND


def test_a_base_in_bfloat16(of_two: dict[str, Any]) -> None:
    """No further from float32 than one process in bfloat16 is, but for rounding in another order."""
    found = case(of_two, "bfloat16")
    assert 0.3 < found["logits"] < 2
    assert 0.3 < found["gradients"] < 2
    assert found["merged as whole"]


def test_compiled_layers(of_two: dict[str, Any]) -> None:
    found = case(of_two, "compiled")
    assert found["step"] < BOUND
    assert found["alone"] < BOUND


def test_a_copy_of_a_layer_is_one_of_its_own(of_two: dict[str, Any]) -> None:
    found = case(of_two, "copied")
    assert found == {"same": True, "differs": True, "original": True}


def test_what_no_adapter_can_join_is_refused_by_name(of_two: dict[str, Any]) -> None:
    said = case(of_two, "refused")
    assert said["embedding"].startswith("ConfigError: part is a tensor-parallel Embedding")
    assert said["all_reduce"].startswith("ConfigError: part is spread by AllReduceParallel")
    assert said["packed_rowwise"].startswith("ConfigError: part is spread by PackedRowwiseParallel")
    for case_ in ("embedding", "all_reduce", "packed_rowwise"):
        assert "leave it out of the plan" in said[case_]
    assert said["no plan"].startswith("ConfigError: part is sharded already")
    assert said["another plan later"].startswith("AdapterStateError: part is spread by AllReduceParallel")
    assert said["x in parts"].startswith("AdapterStateError: part: no adapter can be computed beside an x placed as")
    assert said["around"].startswith("ShapeError: part: x is a DTensor")
    assert "'<name>.base_layer'" in said["around"]
    assert said["quantized"].startswith("AdapterStateError: part: nothing can be merged into this Int8Linear")
    assert "of a layer that is spread over processes" in said["quantized"]
    assert said["second derivative"].startswith("AdapterStateError: part: create_graph=True: a layer that is spread")


# Without processes


def test_a_plain_model_is_spread_over_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    model[0].register_forward_hook(lambda *_: model)
    assert meshes(model) == []
    assert parallel_mesh(model[0]) is None
    assert part_of(model[0]) is None


def test_a_layer_that_is_split_in_another_way_is_refused() -> None:
    class Half(nn.Module):
        in_features, out_features = 8, 8

        def forward(self, x: Tensor) -> Tensor:
            return x[..., :4]

    layer = C3ALinear(Half(), block_size=4, layer_name="up")
    with pytest.raises(ShapeError, match=r"^up: x has the shape \(2, 8\) and the base layer gives \(2, 4\).*plan"):
        layer(torch.randn(2, 8))
