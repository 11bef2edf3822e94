"""Models that ZeRO-3 keeps in parts: merged, hot-swapped, switched, by all processes in step. CPUs and gloo.

DeepSpeed has no wheels. Where it is not installed a stand-in keeps the parameters in parts, by DeepSpeed's names.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import HAS_PLANS, TORCHRUN, launch

import c3a_triton
from c3a_triton.bases.weights import weight_access

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)
pytest.importorskip("transformers")

TESTS = Path(__file__).resolve().parent
BOUND = 1e-5
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (it has no wheels)"
)


DEEPSPEED = pytest.param("deepspeed", marks=needs_deepspeed)
only_deepspeed = pytest.mark.parametrize("found", [DEEPSPEED], indirect=True)  # the stand-in trains nothing
only_stand_in = pytest.mark.parametrize("found", ["stand-in"], indirect=True)  # which counts


@pytest.fixture(scope="module", params=["stand-in", DEEPSPEED])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases of `partitioned_worker.py`, in one launch of two processes."""
    folder = tmp_path_factory.mktemp("parts")
    launch(*TORCHRUN, str(TESTS / "partitioned_worker.py"), str(folder), request.param, deepspeed=True)
    return json.loads((folder / "results.json").read_text())


def of(found: dict[str, Any], case: str) -> dict[str, Any]:
    assert isinstance(found[case], dict), found[case]
    return found[case]


@pytest.mark.parametrize("keep", ["cpu", "device"])
def test_merging_gives_the_bits_that_one_process_gets_and_unmerging_the_former_ones(
    found: dict[str, Any], keep: str
) -> None:
    """Linear and transposed layers, a convolution, an embedding and the head tied to it, a stack; two adapters."""
    merged = of(found, "merged")
    for what in ("merged as alone", "moved", "a part is kept", "brought back", "in parts"):
        assert merged[f"{keep}: {what}"] is True, what
    assert merged[f"{keep}: output"] <= BOUND


@only_stand_in
def test_one_layer_at_a_time_is_put_together(found: dict[str, Any]) -> None:
    merged = of(found, "merged")
    for keep in ("cpu", "device"):
        # The largest weight, a convolution's, and its kernel.
        assert 0 < merged[f"{keep}: most gathered"] <= merged[f"{keep}: largest"] * 4 / 3


def test_what_is_merged_for_good_is_the_plain_model_still_in_parts(found: dict[str, Any]) -> None:
    unloaded = of(found, "unloaded")
    assert unloaded["same object"]
    assert unloaded["equal"]
    assert unloaded["plain"] == []
    assert unloaded["output"] <= BOUND
    assert unloaded["in parts"]


def test_hot_swapping_and_resetting_reach_every_part(found: dict[str, Any]) -> None:
    swapped = of(found, "swapped")
    assert swapped["values"]
    assert swapped["head"]
    assert swapped["output"] <= BOUND
    assert swapped["reset"] == 0.0


@only_deepspeed
def test_the_copies_in_32_bits_that_deepspeed_trains_are_swapped_too(found: dict[str, Any]) -> None:
    assert of(found, "in 16 bits") == {"kept": True, "dtype": "torch.bfloat16"}


def test_an_adapter_is_loaded_into_a_base_in_parts_but_no_module_copied_out_of_an_engine(found: dict[str, Any]) -> None:
    loaded = of(found, "loaded")
    assert loaded["values"]
    assert loaded["output"] <= BOUND
    assert loaded["added"].startswith("ConfigError: modules_to_save: norm is in a DeepSpeed engine")
    assert "before deepspeed.initialize" in loaded["added"]


@only_stand_in
def test_rows_of_tokens_in_a_model_in_parts(found: dict[str, Any]) -> None:
    tokens = of(found, "tokens")
    for what in ("state", "merged as alone", "brought back", "loaded", "first values", "swapped"):
        assert tokens[what] is True, what
    assert max(tokens["output"], tokens["merged output"]) <= BOUND
    assert tokens["added"].startswith("ConfigError: trainable_token_indices: table is in a DeepSpeed engine")


@pytest.mark.skipif(not HAS_PLANS, reason="transformers 4: experts are layers")
def test_experts_are_merged(found: dict[str, Any]) -> None:
    experts = of(found, "experts")
    assert experts["layers"] == 2
    assert experts["merged as alone"]
    assert experts["brought back"]
    assert max(experts["adapted"], experts["merged"]) <= BOUND


def test_pefts_own_verbs(found: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    by_peft = of(found, "PEFT")
    for what in ("swapped", "merged as alone", "brought back"):
        assert by_peft[what], what
    assert by_peft["output"] <= BOUND


def test_where_one_process_fails_all_do_and_nothing_changes(found: dict[str, Any]) -> None:
    failing = of(found, "failing")
    for case, own in {
        "disabled": "AdapterStateError: down: adapters are disabled",
        "memory": "MemoryError: no memory left",
        "memory, safe": "MemoryError: no memory left",
        "unload": "MemoryError: no memory left",
        "file": "CheckpointError: there is no folder",
    }.items():
        (other, failed), unchanged = failing[case]
        assert failed.startswith(own), case
        assert other.startswith("AdapterStateError: "), case
        assert "process 1, which shares this model, fails" in other, case
        assert own in other, case
        assert unchanged, case


def test_processes_that_do_not_do_the_same_are_told(found: dict[str, Any]) -> None:
    failing = of(found, "failing")
    for case, what in {
        "names": "adapters[0] is 'default'",
        "keep_base": "keep_base is 'cpu'",
        "verbs": "the verb",
    }.items():
        said, unchanged = failing[case]
        for text in said:
            assert text.startswith("AdapterStateError: "), case
            assert what in text, case
        assert unchanged, case


def test_what_is_wrong_in_every_process_is_refused_in_each(found: dict[str, Any]) -> None:
    failing = of(found, "failing")
    for case, what in {
        "not finite": "down: merging ['second'] gives a weight that is not finite",
        "swap of merged": "adapter 'default' is merged: unmerge it",
        "changed since": "down: the base weight was changed after ['default'] were merged",
        "changed, both": "down: the base weight was changed after ['default'] were merged",
    }.items():
        said, unchanged = failing[case]
        assert all(text.startswith(f"AdapterStateError: {what}") for text in said), case
        assert unchanged, case


def test_a_failure_in_the_middle_leaves_the_same_layers_merged_everywhere(found: dict[str, Any]) -> None:
    failing = of(found, "failing")
    assert failing["middle"][1] == "MemoryError: no memory left"
    one, two = failing["merged so far"]
    assert one == two
    assert True in one
    assert False in one
    assert failing["taken back"]


def test_adapters_of_rows_and_active_ones_compute_as_in_one_process(found: dict[str, Any]) -> None:
    switched = of(found, "switched")
    assert switched["gap"] <= BOUND
    assert switched["distinct"] > 1.0
    assert switched["combined"]


@only_deepspeed
def test_adapters_of_rows_and_active_ones_train_as_in_one_process(found: dict[str, Any]) -> None:
    trained = of(found, "trained")
    assert trained["loss"] <= BOUND
    assert trained["adapters"] <= BOUND
    assert trained["moved"] > 1e-3


class Coded(torch.nn.Linear):
    """Quantized, as far as merging is concerned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_a_quantized_weight_in_parts_is_refused() -> None:
    layer = c3a_triton.C3ALinear(Coded(8, 8), block_size=4)
    layer.base_layer.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(c3a_triton.AdapterStateError, match="that ZeRO-3 keeps in parts only ordinary ones"):
        weight_access(layer)
