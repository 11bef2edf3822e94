"""Experts that a plan spreads over two and four processes train, merge and save as on one. CPUs and gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_package  # noqa: F401
import pytest
import torch
from tiny_models import qwen3_moe

import c3a_triton
from bench import scale
from c3a_triton import C3AConfig

for module in ("transformers.distributed.expert_parallel", "accelerate"):
    pytest.importorskip(module, reason=f"experts are spread by {module}")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

WORKER = Path(__file__).resolve().with_name("expert_parallel_worker.py")
BOUND = 1e-5
TRAINED = {
    2: [
        "qwen3, experts",
        "mixtral, experts",
        "gpt-oss, experts",
        "qwen3, parts of experts",
        "deepseek, parts of experts",
        "fp8, experts",
        "fp8, parts of experts",
    ],
    4: ["qwen3, experts", "qwen3, parts of experts"],
}
SHARDED = {2: ["fsdp"], 4: ["fsdp, replicas", "fsdp"]}


def by_processes(cases: dict[int, list[str]]) -> list[Any]:
    """(number of processes, case); with more than two, which take as long again, nightly."""
    marks = {n: [] if n == 2 else [pytest.mark.nightly] for n in cases}
    return [pytest.param(n, case, marks=marks[n]) for n, found in cases.items() for case in found]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All cases of `expert_parallel_worker.py` for a number of processes, in one launch, of each process."""
    known: dict[int, list[dict[str, Any]]] = {}

    def of(n_processes: int) -> list[dict[str, Any]]:
        if n_processes not in known:
            folder = tmp_path_factory.mktemp("spread")
            variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(n_processes), str(WORKER), str(folder), str(n_processes)]
            done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=600)
            assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
            known[n_processes] = json.loads((folder / "results.json").read_text())
        return known[n_processes]

    return of


def of_all(results: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    """What each process has found in a case."""
    for found in results:
        assert isinstance(found[case], dict), found[case]
    return [found[case] for found in results]


@pytest.mark.parametrize(("n_processes", "case"), by_processes(TRAINED))
def test_processes_train_as_one_and_their_file_loads_on_one(results: Any, n_processes: int, case: str) -> None:
    """Experts by expert parallelism, parts of each expert by tensor parallelism; the plan's attention beside them."""
    for found in of_all(results(n_processes), case):
        assert found["start"] == 0
        assert found["held"] == 1 / n_processes
        assert found["moved"] > 0.1
        for what in ("losses", "adapter", "file"):
            assert found[what] <= BOUND, what


@pytest.mark.parametrize("case", ["fp8, experts", "fp8, parts of experts"])
def test_parts_of_codes_are_not_merged_into(results: Any, case: str) -> None:
    for found in of_all(results(2), case):
        assert found["codes"] == "torch.float8_e4m3fn"
        assert found["merge"].startswith("AdapterStateError: ")
        assert "model.layers.0.mlp.experts.gate_up_proj: nothing can be merged into this FP8Experts" in found["merge"]
        assert "its codes are a DTensor" in found["merge"]


@pytest.mark.parametrize("case", ["qwen3, experts", "gpt-oss, experts", "qwen3, parts of experts"])
def test_gradients_are_clipped_as_by_one(results: Any, case: str) -> None:
    """By transformers' Trainer or accelerate, which know that gradients lie on several meshes; beyond the bound."""
    for found in of_all(results(2), case):
        assert found["norms"] > 0.1  # which are among the losses that were compared; the bound is 0.02


@pytest.mark.parametrize(("n_processes", "case"), by_processes(SHARDED))
def test_fsdp2_around_expert_parallelism(results: Any, n_processes: int, case: str) -> None:
    for found in of_all(results(n_processes), case):
        assert found["start"] == 0
        assert found["held"] == 1 / n_processes
        assert found["moved"] > 0.1
        for what in ("losses", "adapter", "file"):
            assert found[what] <= BOUND, what
        assert found["second"].startswith("ConfigError: model.layers.0.mlp.experts.gate_up_proj is sharded already")
        assert found["merge"].startswith("AdapterStateError: model.layers.0.mlp.experts.gate_up_proj: nothing can be")
        assert found["hot swap"].startswith("AdapterStateError: model.layers.0.mlp.experts.gate_up_proj is sharded")
        assert found["rows"].startswith("ShapeError: model.layers.0.mlp.experts.gate_up_proj: 3 adapter names")


@pytest.mark.parametrize("case", ["verbs, experts", "verbs, parts of experts"])
def test_verbs_do_what_they_do_on_one(results: Any, case: str) -> None:
    for found in of_all(results(2), case):
        said = found.pop("rows of other adapters in each process")
        assert said.startswith("AdapterStateError: adapter_names: the processes that share this model do not do the")
        assert "names[2] is 'default' in process 0 and 'other' in process 1" in said
        for what in ("deltas", "merged weights", "reset", "sum", "hot swapped", "loaded"):
            assert found.pop(what) == 0, what
        for what, value in found.items():
            assert value is True if isinstance(value, bool) else value <= BOUND, what


def test_adapters_exchange_nothing(results: Any) -> None:
    for found in of_all(results(2), "collectives"):
        for alone, adapted in found.values():
            assert sum(alone.values()) > 5
            assert adapted == alone


def test_the_messages_on_paper_are_those_that_are_exchanged(results: Any) -> None:
    """What docs/scale.md counts for such a layer; beside it the head's, one forward and one backward."""
    attention = tuple(scale.Linear(24, 24, style) for style in ["colwise"] * 3 + ["rowwise"])
    layer = scale.Layer(24, attention, experts=((24, 24), (24, 24)), n_experts=4, top_k=2)
    sent = scale.frozen_traffic(layer, tp=2, fsdp=1, ep=2)
    for found in of_all(results(2), "collectives"):
        alone, _ = next(found[plan] for plan in found if "ep_size" in plan)
        assert sum(alone.values()) == sent.forward + sent.backward + 2


def test_processes_with_seeds_of_their_own_have_one_adapter(results: Any) -> None:
    for found in of_all(results(2), "seeds"):
        assert found["logits"] <= BOUND
        assert found["deviation"] > 0.5


def test_what_cannot_be_spread_says_what_to_do(results: Any) -> None:
    experts = "model.layers.0.mlp.experts"
    for said in of_all(results(2), "refused"):
        assert said["block size"].startswith(
            f"ShapeError: {experts}.gate_up_proj (in, and gate and up each, of the part that one process has): "
            "block_size=8 does not divide out_features=12"
        )
        assert said["block size of a file"].startswith("CheckpointError")
        assert "b has to divide (24, 12) (in, and gate and up each, of the part" in said["block size of a file"]
        assert said["uneven"].startswith(f"ConfigError: {experts}.gate_up_proj: its plan cuts 34 into 4 parts")
        assert said["llama4"].startswith(
            "ConfigError: model.layers.0.feed_forward.experts.gate_up_proj: a plan spreads"
        )
        assert said["fsdp first"].startswith(f"ConfigError: {experts}.gate_up_proj is sharded already")
        for what in ("spread later", "spread later by the plan"):
            assert said[what].startswith(f"ConfigError: {experts}.gate_up_proj")
            assert "Spread the model first" in said[what]


def test_what_is_noted_of_expert_parallelism_reaches_the_experts() -> None:
    config = C3AConfig(block_size=4, target_modules=[], target_parameters="all-experts")
    holder = c3a_triton.apply(qwen3_moe(), config).model.layers[0].mlp.experts
    for value in (True, False):
        holder._is_expert_parallel = value
        assert holder.base_layer._is_expert_parallel is value
        assert holder._is_expert_parallel is value
