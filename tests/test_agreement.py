"""Verbs in a model that a plan spreads over processes: all of them agree before one changes anything. CPUs and gloo."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import HAS_PLANS
from torch import nn

from c3a_triton.bases import agreement
from c3a_triton.bases.agreement import agree, in_step

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

WORKER = Path(__file__).resolve().with_name("agreement_worker.py")
needs_plans = pytest.mark.skipif(not HAS_PLANS, reason="this transformers has no plans of DTensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases of `agreement_worker.py`, in one launch, in which a process that waits for another fails after 30 s."""
    folder = tmp_path_factory.mktemp("shared")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER, folder],
        env=variables | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads((folder / "results.json").read_text())


NOTHING_IN_COMMON = "the processes that share this model do not do the same: "


@pytest.mark.parametrize(
    ("case", "what"),
    {
        "adapters_of_other_names": "adapter name is 'one' in process 0 and 'two' in process 1",
        "other_block_sizes": "configuration['block_size'] is 4 in process 0 and 2 in process 1",
        "other_targets": "configuration['target_modules'][0] is 'head' in process 0 and 'tail' in process 1",
        "targets_in_another_order": "configuration['target_modules'][0] is 'head' in process 0",
        "a_model_whose_layers_have_another_order": "targets[0][0] is 'head' in process 0 and 'tail' in process 1",
        "files_with_other_values": "tensors['head.c3a_kernel'] is torch.float32 [2, 2, 4] with the fingerprint ",
        "swapped_for_other_values": "tensors['head.c3a_kernel'] is torch.float32 [2, 2, 4] with the fingerprint ",
        "weighted_with_other_weights": "weights[1] is 0.5 in process 0 and 0.25 in process 1",
        "set_to_another": "adapters[0] is 'one' in process 0 and 'two' in process 1",
        "set_in_another_order": "adapters[0] is 'one' in process 0 and 'two' in process 1",
        "set_with_another_strength": "weights['two'] is 0.5 in process 0 and 0.25 in process 1",
        "given_another_strength": "scale['one'] is 0.5 in process 0 and 0.25 in process 1",
        "deleted_and_renamed": "the verb is delete_adapter in process 0 and rename_adapter in process 1",
        "others_deleted": "adapter name is 'one' in process 0 and 'two' in process 1",
        "renamed_otherwise": "adapter names[1] is 'three' in process 0 and 'four' in process 1",
        "rows_of_others": "adapter_names[1] is 'one' in process 0 and 'two' in process 1",
        "other_adapters_merged": "adapters[0] is 'one' in process 0 and 'two' in process 1",
        "merged_for_good_and_for_a_while": "the verb is merge_and_unload in process 0 and merge_adapter in process 1",
    }.items(),
)
def test_processes_that_do_not_do_the_same_are_told_and_nothing_changes(
    results: dict[str, Any], case: str, what: str
) -> None:
    for found in results[case]:
        assert isinstance(found, dict), found
        assert found["said"].startswith("AdapterStateError: ")
        assert NOTHING_IN_COMMON + what in found["said"]
        assert found["unchanged"]
        assert found["together"]


@pytest.mark.parametrize(
    ("case", "problem"),
    {
        "a_block_size_that_fits_one": "ShapeError: head: block_size=5 does not divide",
        "a_backend_that_one_does_not_know": "BackendError: backend='nonsense' is unknown",
        "a_second_adapter_that_one_has": "AdapterStateError: there is an adapter 'two' already",
        "a_file_that_one_does_not_have": "CheckpointError: there is no folder ",
        "swapped_for_a_file_that_one_does_not_have": "CheckpointError: there is no folder ",
        "weighted_of_one_that_is_unknown": "AdapterNotFoundError: there is no adapter 'three'",
        "set_to_one_that_is_unknown": "AdapterNotFoundError: there is no adapter 'three'",
        "given_a_strength_that_is_none": "ConfigError: adapter 'one': the strength must be a finite number",
        "merged_where_the_result_is_finite": "AdapterStateError: up: merging ['default'] gives a weight that is not",
        "merging_that_breaks_in_one": "MemoryError: out of memory",
    }.items(),
)
def test_what_fails_in_one_process_fails_in_all(results: dict[str, Any], case: str, problem: str) -> None:
    first, second = results[case]
    assert isinstance(first, dict), first
    assert second["said"].startswith(problem)
    assert first["said"].startswith("AdapterStateError: ")
    assert f"process 1, which shares this model, fails with {problem}" in first["said"]
    for found in (first, second):
        assert found["unchanged"]
        assert found["together"]


def test_an_error_within_two_steps_is_told_once(results: dict[str, Any]) -> None:
    first, second = results["a_step_within_a_step"]
    expected = {"inner: ": "inside", "inner: process 1, which shares this model, fails in outer": "outside"}
    for (start, text), by_first, by_second in zip(expected.items(), first, second, strict=True):
        assert by_first["said"].startswith(f"AdapterStateError: {start}")
        assert by_first["said"].endswith(f"ValueError: {text}")
        assert by_second["said"] == f"ValueError: {text}"
        assert by_first["together"]
        assert by_second["together"]


def test_a_weight_that_changed_in_one_process_is_unmerged_in_none(results: dict[str, Any]) -> None:
    verbs = ("unmerge_adapter", "unload", "set_adapter", "disable_adapter")
    first, second = results["unmerged_where_the_weight_changed"]
    for verb, by_first, by_second in zip(verbs, first["texts"], second["texts"], strict=True):
        assert by_first.startswith(f"AdapterStateError: {verb}: process 1, which shares this model, fails with ")
        assert by_second.startswith("AdapterStateError: up: the base weight was changed after")
    assert first["unchanged"]
    assert second["unchanged"]


def test_verbs_that_all_call_do_what_they_do_elsewhere(results: dict[str, Any]) -> None:
    for case in ("all_goes_well", "swapped_for_equal_values"):
        for found in results[case]:
            assert found["said"] == "no error"
            assert found["together"]
            assert found["unchanged"] == (case == "all_goes_well")
    assert results["equal_files_in_other_folders"] == [{"said": "no error", "adapters": ["default"]}] * 2


def test_first_values_are_the_first_process_s(results: dict[str, Any]) -> None:
    """Kernels of layers in no plan too, and copies of modules, however the seeds of the processes differ."""
    for found in results["other_seeds"]:
        assert found["same"]
        assert found["count"] == 5
        assert found["drawn"] > 0.5


def test_kernels_that_nobody_agreed_on_are_compared_by_the_first_call(results: dict[str, Any]) -> None:
    for alike, unlike, reset in results["spread_after_it_was_adapted"]:
        assert alike == ["no error"] * 2
        for text in (*unlike, *reset):
            assert text.startswith("AdapterStateError: up (reset, or adapted before the model was spread): the proc")
            assert "kernels['default'] is torch.float32 [4, 2, 4] with the fingerprint " in text


def test_parts_that_processes_divide_stay_their_own(results: dict[str, Any]) -> None:
    for value, found in zip((1.0, 2.0), results["parts_that_processes_divide"], strict=True):
        assert found == {"divided": [[value] * 3], "whole": [[1.0] * 3] * 2}


def test_processes_that_share_no_layer_need_not_agree(results: dict[str, Any]) -> None:
    assert results["a_plan_beside_data_parallel"] == ["no error"] * 2


def test_one_process_writes_and_all_load_what_it_wrote(results: dict[str, Any]) -> None:
    first, second = results["saved_by_all_and_loaded_at_once"]
    assert first["found"] == second["found"] == [[value, value] for value in range(5)]
    assert (len(first["written"]), second["written"]) == (5, [])
    assert results["saved_by_the_first_alone"] == [["first"], []]
    first, second = results["kernels_that_fsdp_divides"]
    assert first == {"written": ["divided"], "equal": True}
    assert second == {"written": [], "equal": True}


def test_what_lies_in_the_plan_is_not_trained_whole(results: dict[str, Any]) -> None:
    expected = {
        "trained_whole_in_the_plan": "ConfigError: modules_to_save: up cannot be trained whole, because the plan",
        "biases_in_the_plan": "ConfigError: bias='all': up.bias cannot be trained, because the plan spreads up",
    }
    for case, text in expected.items():
        for found in results[case]:
            assert found["said"].startswith(text)
            assert found["unchanged"]
            assert found["together"]
    assert results["biases_outside_the_plan"] == [["head.base_layer.bias", "head.c3a_kernel.default"]] * 2


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_peft_is_refused_where_it_would_give_each_process_an_adapter_of_its_own(results: dict[str, Any]) -> None:
    for found in results["built_by_peft"]:
        for text in (found["said"], found["converted"]):
            assert text.startswith("ConfigError: this ")
            assert "is spread over processes" in text
            assert "c3a_triton.apply(model, peft.C3AConfig(...))" in text
        assert found["unchanged"]
        assert found["together"]
        assert found["class"] == "peft.tuners.c3a.layer"


# Models of transformers


@needs_plans
def test_a_spread_model_is_counted_whole(results: dict[str, Any]) -> None:
    for found in results["counted_in_a_llama"]:
        spread, alone = found["counts"]
        assert spread == alone
        assert found["summary"]


@needs_plans
def test_the_model_s_own_saving_has_the_adapters_beside_it(results: dict[str, Any]) -> None:
    first, second = results["a_llama_saved_by_all"]
    assert (first["written"], second["written"]) == (["model", "second"], [])
    for found in (first, second):
        assert found["equal"] == [True, True]
        assert found["weights"]


@needs_plans
def test_embeddings_that_lie_in_the_plan_go_through_the_file(results: dict[str, Any]) -> None:
    first, second = results["a_llama_with_embeddings_in_the_file"]
    assert (first["written"], second["written"]) == (["adapter"], [])
    for found in (first, second):
        assert found["whole"]
        assert found["parts"] == [True, True]
        assert found["kernels"]
        assert found["warned"] == 1


@needs_plans
def test_a_plan_that_spreads_one_of_two_tied_layers_is_refused(results: dict[str, Any]) -> None:
    for found in results["one_of_two_tied_layers"]:
        assert found["one"].startswith(
            "ConfigError: lm_head and model.embed_tokens have one weight (tied), but the plan spreads lm_head alone"
        )
        assert "tie_word_embeddings=False" in found["one"]
        assert found["both"] == "no error"
        assert found["still one"]
    for found in results["a_tied_head_is_adapted"]:
        assert isinstance(found, dict), found
        assert max(found["errors"]) < 1e-5 < found["moved"]
        assert found["bits"]
        assert found["tied"]
    for text in results["heads_in_the_plan"]:
        assert text.startswith("ConfigError: modules_to_save: lm_head cannot be trained whole")


# Models of one process


def test_a_model_of_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is digested, sent or imported."""
    monkeypatch.setattr(agreement, "_flat", lambda value: pytest.fail("digested"))
    with in_step(nn.Linear(2, 2), "verb") as shared:
        shared["tensors"] = torch.zeros(2)
    code = """
import sys, torch
import c3a_triton
model = c3a_triton.apply(torch.nn.Sequential(torch.nn.Linear(8, 8)), {"block_size": 4, "target_modules": ["0"]})
model.c3a.set_adapter("default")
model.c3a.merge_adapter()
print("torch.distributed.tensor" in sys.modules, torch.distributed.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_problem_of_one_process_stays_what_it_is() -> None:
    problem = KeyError("own")
    with pytest.raises(KeyError) as caught:
        agree([], "verb", None, problem)
    assert caught.value is problem
    with pytest.raises(KeyError) as caught, in_step(nn.Linear(2, 2), "verb"):
        raise problem
    assert caught.value is problem
