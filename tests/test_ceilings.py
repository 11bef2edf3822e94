"""What a card can do at most, the sweep over tokens, the headline and the models of the GPU job, without a GPU."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bench_package  # noqa: F401
import pytest
import torch
from clock import Clock

from bench import ceilings, launches, model, op, runs, token_sweep
from c3a_triton.benchmark import cases, gate, layer, models, peers, timing
from c3a_triton.operator import bounds, cost_model
from c3a_triton.operator.launch import direct, specs

CPU, META = torch.device("cpu"), torch.device("meta")


def _setting(timer: timing.Timer | None = None, device: torch.device = CPU) -> runs.Setting:
    return runs.Setting(device, timer or timing.CpuTimer(repeats=1), ("base", "ours:auto"), tiny=True)


def _measured(tasks: list[runs.Task], device: torch.device = CPU) -> runs.Records:
    return {task.key: runs.attempt(task, device) for task in tasks}


def _every_second(seconds: float) -> SimpleNamespace:
    """A timer whose calls take so long."""
    return SimpleNamespace(measure=lambda call: (call(), timing.Timing.of([seconds], wall=seconds))[1])


# Ceilings


def test_every_ceiling_is_measured_and_shown(device: torch.device) -> None:
    pytest.importorskip("triton")
    chosen = [task for task in ceilings.tasks(_setting(_every_second(0.5), device)) if "fft layer" not in task.key]
    records = _measured(chosen, device)
    assert {key: record for key, record in records.items() if record["status"] != "ok"} == {}
    assert records[ceilings.BANDWIDTH_KEY]["bytes_per_second"] == 2 * (1 << 20) / 0.5
    assert records["read bandwidth"]["bytes_per_second"] == records["write bandwidth"]["bytes_per_second"] == 2 << 20
    repeats = 3 if device == CPU else ceilings.RESIDENT_REPEATS
    assert records["copy in the L2"]["bytes_per_second"] == repeats * records["copy in the L2"]["set_bytes"] / 0.5
    tokens, features = ceilings.TINY.n_tokens, ceilings.TINY.in_features
    dense = 2 * tokens * features * features / 0.5
    products = {key: record["flops_per_second"] for key, record in records.items() if "flops_per_second" in record}
    assert products.pop("mix float16 b=16") == 2 * dense / 16
    assert set(products.values()) == {dense}
    assert len(products) == 4 * 2 + 2
    text = "\n".join(ceilings.tables(records))
    assert all(key.removeprefix("launch: ") in text for key in records)


@pytest.mark.parametrize("beta", [0, 1])
def test_a_product_with_beta_1_adds_in_place(beta: int) -> None:
    results: list[torch.Tensor] = []
    timer = SimpleNamespace(measure=lambda call: (results.append(call().clone()), timing.Timing.of([1.0]))[1])
    ceilings._cublas(_setting(timer), "float32", beta, {})
    torch.manual_seed(0)
    case = ceilings.TINY
    x, weight = torch.randn(case.n_tokens, case.in_features), torch.randn(case.out_features, case.in_features)
    y = torch.randn(case.n_tokens, case.out_features)
    torch.testing.assert_close(results[0], beta * y + x @ weight.t() / case.in_features**0.5)


def test_tf32_is_switched_on_for_its_products_alone() -> None:
    matmul = torch.backends.cuda.matmul
    before, seen = matmul.fp32_precision, []

    def measure(call: object) -> timing.Timing:
        # Torch's older switch agrees; asking it raises otherwise.
        assert matmul.allow_tf32 == (matmul.fp32_precision == "tf32")
        seen.append(matmul.fp32_precision)
        raise ZeroDivisionError

    for name in ("tf32", "float32"):
        with pytest.raises(ZeroDivisionError):
            ceilings._cublas(_setting(SimpleNamespace(measure=measure)), name, 0, {})
    assert (seen, matmul.fp32_precision) == (["tf32", before], before)


def test_a_copy_is_made_by_every_program_in_every_round(device: torch.device) -> None:
    pytest.importorskip("triton")
    from bench import resident

    source = torch.randn(10_001, device=device)
    for repeats in (1, 3):
        target = torch.zeros_like(source)
        resident.copy_again(source, target, repeats=repeats, programs=3)
        assert torch.equal(source, target)


@pytest.mark.parametrize(("most", "expected"), [(100, 1), (1 << 20, 12), (12_500_000, 152)])
def test_programs_copy_as_much_as_each_other_within_the_cache(most: int, expected: int) -> None:
    """With ten programs; a set is source and target, and every program has one part of it at least."""
    resident = pytest.importorskip("bench.resident")
    call, set_bytes = ceilings._resident_copy(most, 10, CPU)
    assert set_bytes == 2 * 4 * 10 * resident.BLOCK * expected
    assert set_bytes <= most or expected == 1
    assert call.keywords["programs"] == 10


def test_one_kernel_of_a_product_is_launched_again(device: torch.device) -> None:
    pytest.importorskip("triton")
    x, w = torch.randn(20, 64, device=device), torch.randn(2, 2, 32, device=device)
    y = torch.empty(20, 64, device=device)

    def product() -> None:
        direct.direct_product(x, w, scale=1.0, out=y.zero_())

    product()
    expected = y.clone()
    (again,) = ceilings._launches_of("table_product_kernel", product)
    again()
    torch.testing.assert_close(y, 2 * expected)  # which was added to


def test_launches_are_timed_on_the_host_and_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(ceilings.time, "perf_counter", clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.spend(100.0))  # waiting does not count
    monkeypatch.setattr(timing, "graphed", lambda call: SimpleNamespace(graph=call))
    seconds = {True: 2.0, False: 3.0}  # of a fifth of the launches
    timer = SimpleNamespace(measure=lambda call: timing.Timing.of([seconds[hasattr(call, "graph")]]))
    setting = dataclasses.replace(_setting(timer), device=torch.device("cuda"))
    record: runs.Record = {}
    ceilings._launching(setting, 50, lambda device: lambda: clock.spend(1.5), record)
    assert record == {"host_seconds": 1.5, "device_seconds": 0.3, "graph_seconds": 0.2}


def test_a_shorter_timer_is_the_same_but_for_its_time() -> None:
    timer = object.__new__(timing.CudaTimer)
    timer.device, timer.seconds, timer.max_repeats, timer._flush = CPU, 0.25, 50, torch.zeros(3)
    shorter = timing.within(timer, 0.1)
    assert (shorter.seconds, timing.within(timer, 1.0).seconds, timer.seconds) == (0.1, 0.25, 0.25)
    assert shorter._flush is timer._flush
    on_cpu = timing.CpuTimer()
    assert timing.within(on_cpu, 0.1) is on_cpu


def test_kernels_of_the_ceilings_are_launched_without_operands() -> None:
    """As `launches` is called by those who compile ahead."""
    pytest.importorskip("triton")
    with launches._counted() as count, mock.patch.object(specs, "check_available"):
        for _, call in ceilings.launches(META):
            call()
    kernels = {name for name in count.names if name.endswith("_kernel")}
    assert kernels >= {"table_product_kernel", "mix_kernel", "sum_partials_kernel", "copy_again_kernel", "outer_kernel"}


# The headline


def test_the_headline_measures_what_goals_name_first_and_what_the_grid_measures() -> None:
    methods = peers.methods(("auto", "torch", "direct", "fft", "expand", "fold"), with_peft=True)
    setting = runs.Setting(CPU, timing.CpuTimer(), methods)
    planned = {task.key: task for task in op.headline(setting)}
    assert planned.keys() - {task.key for task in op.tasks(setting)} == {k for k in planned if "peft_lora32" in k}
    assert len(planned) < 140
    goals = {op.BANDWIDTH_KEY}
    for case in (*op.squares(), op.wide(), *cases.DECODERS, cases.LayerCase(1024, 4096, 4096, 128), *cases.COMPARISON):
        goals |= {layer.key(case, method) for method in ("base", "peft_lora", "ours:auto")}
    goals |= {layer.key(case, "peft_c3a") for case in op.squares()}
    goals |= {f"decode {layer.key(case, m)}" for case in cases.DECODING[:3] for m in ("base", "ours:auto")}
    assert {key for key, task in planned.items() if task.worth == 0} == goals
    assert "decode peft_lora T=1 3072→3072 bfloat16" in planned
    assert planned["ours:fft T=848 3072→1024 b=64 bfloat16"].worth == 1
    assert planned["ours:fold T=8192 4096→4096 b=128 bfloat16"].worth == 2
    assert planned["ours:torch T=8192 4096→4096 b=128 bfloat16"].worth == 3


@pytest.mark.skipif(peers.why_no_peft() is not None, reason="needs PEFT")
def test_lora_has_the_rank_that_its_name_says() -> None:
    case = cases.LayerCase(3, 40, 48, 8, "float32")
    for method, rank in (("peft_lora", 16), ("peft_lora32", 32)):
        lora_a, _ = peers.trained(layer.Workload.of(case, method, CPU).layers[0])
        assert lora_a.shape == (rank, 40)
    assert not peers.is_c3a("peft_lora32")


@pytest.mark.parametrize("case", [cases.LayerCase(5, 12, 20, 4, "float32"), cases.DECODERS_TINY[0]])
def test_the_truth_of_a_case_is_computed_once_for_all_methods(
    monkeypatch: pytest.MonkeyPatch, case: layer.Case
) -> None:
    computed, of = [], gate.Truth.of
    monkeypatch.setattr(gate.Truth, "of", lambda *args, **kwargs: (computed.append(args), of(*args, **kwargs))[1])
    truths = gate.Truths()
    works = [layer.Workload.of(case, method, CPU) for method in ("dense", "ours:torch", "ours:reference")]
    for work in works:
        work.check(truths)
    assert len(computed) == len(case.parts)
    works[-1].kernels[-1] = works[-1].kernels[-1].flip(-1)
    with pytest.raises(gate.GateError, match=f"y of layer {len(case.parts) - 1} is wrong"):
        works[-1].check(truths)  # other operands have another truth


# Models


def test_models_are_built_once_for_cases_that_differ_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    built, llama = [], models.llama
    monkeypatch.setattr(models, "llama", lambda *args, **kwargs: (built.append(args), llama(*args, **kwargs))[1])
    tiny = [cases.ModelCase("q, v", n_tokens, cases.QV, 2, 16) for n_tokens in (4, 6)]
    monkeypatch.setattr(cases, "MODELS_TINY", (*tiny, cases.ModelCase("all linear", 4, cases.ALL_LINEAR, 2, 16)))
    methods = ("base", "ours:torch", "ours:auto", "ours:fold", "peft_c3a")
    setting = dataclasses.replace(_setting(), methods=methods if peers.why_no_peft() is None else methods[:-1])
    records = _measured(list(model.brief(setting)))
    assert [record["status"] for record in records.values()] == ["ok", "ok"], records
    assert len(built) == 1
    times: dict[str, Any] = next(iter(records.values()))["times"]
    assert times.keys() == {"base", "ours:auto", "peft_c3a"} & {*setting.methods}
    # A generation, which is no training, leaves no trace in a training step after it.
    modes, step = [], models.training_step
    monkeypatch.setattr(models, "training_step", lambda m, ids: (modes.append(m.training), step(m, ids))[1])
    whole = list(model.tasks(setting))
    records = _measured([whole[0], whole[-1], whole[1]])
    assert [record["status"] for record in records.values()] == ["ok"] * 3, records
    assert (len(built), set(modes)) == (2, {True})


# The sweep over tokens, and the fit


CARD = cost_model.CEILINGS._replace(
    bandwidth=3e12,
    l2_bandwidth=7e12,
    cublas_flops={2: 700e12, 4: 50e12},
    triton_flops={2: 400e12, 4: 120e12},
    tf32_flops=250e12,
    launch_seconds=4e-6,
)
HOST_SECONDS = 2e-5


def _as_predicted() -> runs.Records:
    """Records of a card on which the cost model is right."""
    records: runs.Records = {ceilings.BANDWIDTH_KEY: {"bytes_per_second": CARD.bandwidth}}
    # Of every two bytes that a copy moves, one is read and one, which takes longer, written.
    records[ceilings.L2_KEY] = {"bytes_per_second": 2 / (1 / CARD.l2_bandwidth + bounds.WRITTEN / CARD.l2_bandwidth)}
    rates = {"cuBLAS float32, beta 0": CARD.cublas_flops[4], "table product bfloat16": CARD.triton_flops[2]}
    rates |= {"table product float32": CARD.triton_flops[4], "mix float16 b=16": CARD.tf32_flops}
    records |= {key: {"flops_per_second": rate} for key, rate in rates.items()}
    for record in records.values():
        record |= {"status": "ok", "time": {"median": 1.0}}
    for case, backend in token_sweep._cases():
        record = {"status": "ok", "case": vars(case), "backend": backend, "times": {}}
        for direction in token_sweep.DIRECTIONS:
            seconds = token_sweep._predicted(record, direction, CARD)
            wall = seconds + HOST_SECONDS * token_sweep._launch_count(record, direction)
            record["times"][direction] = {"median": seconds, "wall": wall}
        records[token_sweep._key(case, backend)] = record
    return records


def test_the_fit_finds_the_constants_from_which_times_were_made() -> None:
    records = _as_predicted()
    found = token_sweep.fitted(records)
    expected = token_sweep._constants(CARD)
    assert token_sweep._constants(found) == {n: pytest.approx(value, rel=5e-3) for n, value in expected.items()}
    assert token_sweep.host_seconds(records) == pytest.approx(HOST_SECONDS, rel=5e-3)
    # One stray measurement is no constant.
    stray = "direct T=1 4096→4096 b=128 bfloat16"
    times = {direction: {"median": 1.0, "wall": 1.0} for direction in token_sweep.DIRECTIONS}
    found = token_sweep.fitted(records | {stray: records[stray] | {"times": times}})
    assert found.launch_seconds == pytest.approx(CARD.launch_seconds, rel=0.02)
    text = "\n".join(token_sweep.tables(records))
    assert re.search(r"\| launch_seconds +\| 2.5e-06 +\| 4e-06 +\|", text)
    unmeasured = records[stray] | {"times": {}, "status": "out of memory"}
    assert "out of memory" in "\n".join(token_sweep.tables({stray: unmeasured}))
    cell = token_sweep._cell(records["base T=32768 4096→4096 b=128 bfloat16"], "forward", found)
    assert cell == "1.57 ms (1.69 ms; 1.58 ms)"


def test_what_was_not_measured_is_as_committed() -> None:
    assert token_sweep.fitted({}) == cost_model.CEILINGS
    assert token_sweep.host_seconds({}) is None
    assert "constants" not in "\n".join(token_sweep.tables({}))
    right_alone = {
        ceilings.BANDWIDTH_KEY: {"bytes_per_second": 3e12},
        "cuBLAS bfloat16, beta 0": {"flops_per_second": 7e14},
    }
    found = token_sweep.fitted(right_alone)
    assert (found.bandwidth, found.cublas_flops[2]) == (3e12, 7e14)
    assert found._replace(bandwidth=0.0, cublas_flops={}) == cost_model.CEILINGS._replace(
        bandwidth=0.0, cublas_flops={}
    )


@pytest.mark.interpreter
def test_products_are_measured_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    sweep = [task for task in token_sweep.tasks(_setting()) if task.worth == 1 and "fft" not in task.key]
    records = _measured(sweep)
    assert {record["status"] for record in records.values()} == {"ok"}, records
    assert records["base T=20 16→16 b=8 float32"]["times"].keys() == {*token_sweep.DIRECTIONS}
    text = "\n".join(token_sweep.tables(records))
    assert text.count("| 20 ") == 2
    # What is wrong is not timed.
    monkeypatch.setattr(token_sweep, "circulant_linear", lambda x, w, backend: x * w.mean())
    (record,) = _measured(sweep[1:2]).values()
    assert (record["status"], record["times"]) == ("wrong", {})


def test_the_sweep_covers_what_the_issue_names_within_its_share() -> None:
    planned = list(token_sweep.tasks(dataclasses.replace(_setting(), tiny=False)))
    keys = {task.key for task in planned}
    assert {*ceilings.KERNELS, ceilings.BANDWIDTH_KEY, ceilings.L2_KEY, "cuBLAS float32, beta 0"} < keys
    assert sum(task.worth == 1 for task in planned) == 2 * (8 * 4 + 3)
    assert sum(task.seconds for task in planned) < 50


def test_kernels_of_the_sweep_are_launched_without_operands() -> None:
    pytest.importorskip("triton")
    with launches._counted() as count, mock.patch.object(specs, "check_available"):
        for key, call in token_sweep.launches(META):
            if " T=1 " in key or " T=8192 " in key:
                call()
    kernels = {name for name in count.names if name.endswith("_kernel")}
    assert kernels >= {"hankel_kernel", "table_product_kernel", "mix_kernel", "outer_kernel", "expand_kernel"}
    assert kernels & {"diagonal_sums_kernel"}
