"""The table of small and odd cases between guards, and that neither can be fooled: bugs are planted in both."""

import ast
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_package
import pytest
import torch
from torch import Tensor

from bench import guards, kernel_cases, launch_hooks, overhead, report, runs, sanitize
from c3a_triton.benchmark import gate
from c3a_triton.operator import autograd
from c3a_triton.operator.launch import direct

KERNELS = sorted((bench_package.ROOT / "kernels").glob("*.py"))
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", kernel_cases.CASES, ids=lambda case: case.key)
def test_every_case_is_right_and_stays_in_its_tensors(case: kernel_cases.Case, device: torch.device) -> None:
    kernel_cases.check(case, device)


# What the table covers


def decorated() -> dict[str, set[str]]:
    """Every function that Triton compiles, with the names that its body mentions."""
    found = {}
    for path in KERNELS:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                (decorator,) = node.decorator_list
                assert ast.unparse(decorator) in ("triton.jit", "triton.jit(do_not_specialize=COUNTS)", "helper")
                found[node.name] = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return found


@pytest.fixture(scope="module")
def launched() -> dict[str, dict[str, set[Any]]]:
    """By kernel: the dtypes of its cases, the values of its flags, and whether each tensor was aligned."""
    pytest.importorskip("triton")
    seen: dict[str, dict[str, set[Any]]] = defaultdict(lambda: defaultdict(set))
    running: list[kernel_cases.Case] = []

    def note(kernel: Any, **arguments: Any) -> None:
        found = seen[kernel.__name__]
        found["dtype"].add(running[-1].dtype)
        for name, value in arguments.items():
            assert name.endswith("_ptr") or not isinstance(value, torch.Tensor), name
            if isinstance(value, bool) and name.isupper() and name != "PDL":  # which is the card's
                found[name].add(value)
            if name in ("x_ptr", "dy_ptr", "w_ptr", "weight_ptr", "bias_ptr") and value is not None:
                found[name].add(value.data_ptr() % 16 == 0)

    with overhead.stubbed_launches(note):
        for case in kernel_cases.CASES:
            running.append(case)
            with pytest.raises(gate.GateError):  # nothing is computed
                kernel_cases.check(case, CPU)
    return seen


def test_every_kernel_is_launched(launched: dict[str, dict[str, set[Any]]]) -> None:
    functions = decorated()
    helpers = set().union(*functions.values()) & functions.keys()
    assert functions.keys() - helpers == kernel_cases.KERNELS  # what is not launched is part of what is
    assert launched.keys() == kernel_cases.KERNELS


def test_every_kernel_is_launched_in_every_dtype_and_both_ways(launched: dict[str, dict[str, set[Any]]]) -> None:
    for name, found in launched.items():
        # Decoding has no float32.
        dtypes = {"float16", "bfloat16"} | ({"float32"} if name != "decode_kernel" else set())
        assert found.pop("dtype") == dtypes, name
        assert {key: values for key, values in found.items() if values != {True, False}} == {}, name


def test_a_run_that_is_cut_short_has_seen_every_operator() -> None:
    first = [case.operator for case in kernel_cases.CASES[: len(kernel_cases._OPERATORS)]]
    assert sorted(first) == sorted(kernel_cases._OPERATORS)
    assert len({case.key for case in kernel_cases.CASES}) == len(kernel_cases.CASES)


def test_launches_are_noted_and_made(device: torch.device) -> None:
    x, w = torch.randn(3, 12, device=device), torch.randn(2, 3, 4, device=device)
    before = direct.direct_product(x, w, scale=1.0)  # a plan from here on
    with launch_hooks.noted() as names:
        assert torch.equal(direct.direct_product(x, w, scale=1.0), before)
    assert names == ["hankel_kernel"]
    direct.direct_product(x, w, scale=1.0)
    assert len(names) == 1


# Guards


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("skip", [0, 1])
def test_a_guarded_tensor_is_as_any_other_but_nan(device: torch.device, dtype: torch.dtype, skip: int) -> None:
    for guard in (guards.GUARD, 0):
        tensor = guards.Memory(guard).empty((3, 5), dtype, device, "x", stride=(7, 1), skip=skip)
        assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type) == ((3, 5), (7, 1), dtype, device.type)
        assert tensor.isnan().all()
        assert tensor.data_ptr() % 64 == skip * dtype.itemsize
        assert tensor.untyped_storage().nbytes() == 2 * guard + (skip + 2 * 7 + 5) * dtype.itemsize
        assert not tensor._is_view()


@pytest.mark.parametrize(
    ("at", "place"), [(-1, "2 before it"), (15, "0 behind its end"), (19, "8 behind its end"), (3, "between its rows")]
)
def test_one_value_written_outside_is_found(device: torch.device, at: int, place: str) -> None:
    memory = guards.Memory()
    tensor = memory.empty((4, 3), torch.float16, device, "out", stride=(4, 1))
    memory.empty((2,), torch.float32, device, "another")
    tensor.fill_(1.0)
    assert memory.damage() == []
    torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + at).fill_(1.0)
    (found,) = memory.damage()
    assert f"outside of out [4, 3] torch.float16, the first {place}" in found


def test_a_workspace_nobody_has_written_shows_where_it_is_copied_to(device: torch.device) -> None:
    memory = guards.Memory()
    workspace = memory.empty((8,), torch.float32, device, "workspace")
    out = memory.empty((8,), torch.float32, device, "out")
    torch.as_strided(out, (8,), (1,), out.storage_offset() + 8).copy_(workspace * 2.0)
    assert len(memory.damage()) == 1


def test_only_what_the_package_allocates_is_guarded(device: torch.device) -> None:
    methods = [getattr(torch.Tensor, name) for name in ("new_empty", "contiguous", "clone", "to")]
    functions = [torch.empty, torch.empty_like, *methods]
    memory = guards.Memory()
    x, w = torch.randn(12, 3, device=device).t(), torch.randn(2, 3, 4, device=device)
    with guards.guarded(memory):
        torch.empty(3), x.contiguous(), x.clone()
        assert memory._buffers == []
        y = direct.direct_product(x, w, scale=1.0)
    assert [buffer.what.partition(":")[0] for buffer in memory._buffers] == [
        "what new_or_given has from new_empty",
        "what with_contiguous_rows has from contiguous",
    ]
    assert y.untyped_storage().nbytes() > 2 * guards.GUARD
    assert torch.equal(y, direct.direct_product(x, w, scale=1.0))
    assert [torch.empty, torch.empty_like, *(getattr(torch.Tensor, f.__name__) for f in functions[2:])] == functions


def test_custom_ops_and_other_threads_are_guarded(device: torch.device) -> None:
    x, w = torch.randn(3, 12, device=device), torch.randn(2, 3, 4, device=device)
    results: list[Tensor] = []

    def call() -> None:
        results.append(autograd.registered_ops.linear(x, None, None, [w], 1.0, False, "direct"))

    with guards.guarded(guards.Memory()):
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert [y.untyped_storage().nbytes() > 2 * guards.GUARD for y in results] == [True, True]


def test_gradients_flow_through_guarded_copies(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, device=device, requires_grad=True)
    exec_in_package = dict(direct.__dict__)
    exec("def copied(x): return x.t().contiguous().to(torch.float64)", exec_in_package)
    with guards.guarded(memory := guards.Memory()):
        copied = exec_in_package["copied"](x)
    assert len(memory._buffers) == 2
    (grad,) = torch.autograd.grad(copied.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


# Planted bugs


def _case(monkeypatch: pytest.MonkeyPatch, operator: Callable[..., Iterator[Any]]) -> kernel_cases.Case:
    monkeypatch.setitem(kernel_cases._OPERATORS, "planted", operator)
    return kernel_cases.Case("planted", 5, 2, 3, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y, None),
        (lambda y: y * 1.001, "relative error"),
        (lambda y: torch.cat([y[:-1], y[-1:] * torch.nan]), "8 values that are not finite"),
        (lambda y: y[:-1], "shape"),
    ],
    ids=["right", "scaled", "unwritten", "short"],
)
def test_wrong_results_are_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor], message: str | None
) -> None:
    def operator(given: Any) -> Iterator[Any]:
        x, w = given.x(), given.w()
        yield "y", wrong(direct.direct_product(x, w, scale=0.37)), kernel_cases._exact(x) @ kernel_cases._dense(w).T

    case = _case(monkeypatch, operator)
    if message is None:
        kernel_cases.check(case, device)
    else:
        with pytest.raises(gate.GateError, match=message):
            kernel_cases.check(case, device)


def test_one_wrong_element_does_not_hide_in_the_norm() -> None:
    truth = torch.ones(400, 400, dtype=torch.float64)
    value = truth.clone()
    value[7, 9] = 1.2
    with pytest.raises(gate.GateError, match="at one element"):
        kernel_cases.compare("y", value, truth, 1e-2)


def test_a_kernel_that_writes_past_its_tensor_is_caught(device: torch.device) -> None:
    from bench import overrun

    assert overrun.overrun_kernel.__name__ == sanitize.PLANTED
    assert sanitize._finds_overrun(device)


@pytest.fixture
def unmasked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes the masks of all loads, or of all stores, from every kernel."""
    interpreter: ModuleType = pytest.importorskip("triton.runtime.interpreter")

    def without(kind: str) -> None:
        name = f"create_masked_{kind}"
        masked = getattr(interpreter.InterpreterBuilder, name)

        def everywhere(self: Any, *arguments: Any, **more: Any) -> Any:
            at = 1 if kind == "load" else 2
            mask = arguments[at]
            whole = type(mask)(mask.data | True, mask.dtype)
            return masked(self, *arguments[:at], whole, *arguments[at + 1 :], **more)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, everywhere)

    return without


# One of each kernel whose tiles reach so little past its tensors that the process survives it.
REACHING = [
    "direct T=3 w=5×3×7",
    "direct T=33 w=3×2×24",
    "weight_grad T=9 w=5×3×7",
    "weight_grad T=9 w=2×1×97",
    "decode T=9 w=3×1×64",
    "decode T=5 w=1×40×16",
    "expand T=0 w=5×3×7",
    "grouped T=4 w=6×4×3",
    "grouped T=80",
    "fft T=19 w=5×3×7",
    "routed T=7 w=2×3×5",
    "routed_direct T=7 w=2×3×5",
    "routed_direct T=60",
    "routed_backward T=7 w=2×3×5",
]


@pytest.mark.interpreter
@pytest.mark.parametrize("key", REACHING)
def test_a_store_without_its_mask_is_caught(key: str, unmasked: Callable[[str], None]) -> None:
    (case,) = [case for case in kernel_cases.CASES if case.key.startswith(key)]
    unmasked("store")
    with pytest.raises(gate.GateError, match="bytes written outside of"):
        kernel_cases.check(case, CPU)


# Where what is read past an end reaches a result: a sum's last step. What only fills rows that are not stored does not.
SUMMING = [
    "direct T=3 w=5×3×7",
    "direct T=130",
    "weight_grad T=9 w=5×3×7",
    "weight_grad T=9 w=2×1×97",
    "decode T=4",
    "grouped T=4 w=6×4×3",
    "grouped T=80",
    "fft T=19 w=5×3×7",
    "fft_weight_grad T=7",
    "routed T=7 w=2×3×5",
    "routed_direct T=7 w=2×3×5",
    "routed_direct T=60",
    "routed_backward T=7 w=2×3×5",
]


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("key", SUMMING)
def test_a_load_without_its_mask_is_caught(key: str, unmasked: Callable[[str], None]) -> None:
    (case,) = [case for case in kernel_cases.CASES if case.key.startswith(key)]
    unmasked("load")
    with pytest.raises(gate.GateError, match="not finite|is wrong"):
        kernel_cases.check(case, CPU)


# The process that runs the table


EXPAND = "^expand .* bfloat16"


def _sanitize(path: Path, device: torch.device, *more: str) -> dict[str, Any]:
    sanitize.main(["--out", str(path), "--device", device.type, "--cases", EXPAND, *more])
    return report.read_json(path)


def test_the_table_is_recorded_case_by_case(tmp_path: Path, device: torch.device) -> None:
    keys = [case.key for case in kernel_cases.CASES if re.search(EXPAND, case.key)]
    found = _sanitize(tmp_path / "a.json", device)
    assert {key: case["status"] for key, case in found["cases"].items()} == dict.fromkeys(keys, "ok")
    assert (found["done"], found["running"], found["kernels"]) == (True, None, ["expand_kernel"])
    assert found["overrun_found"] is True
    halves = [_sanitize(tmp_path / f"{i}.json", device, "--shard", f"{i}/2")["cases"] for i in range(2)]
    assert [len(half) for half in halves] == [1, 1]
    assert {**halves[0], **halves[1]}.keys() == set(keys)


def test_the_table_goes_on_behind_the_case_that_ended_the_process(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = kernel_cases.check
    begun: list[str] = []

    def dies(case: kernel_cases.Case, *args: Any, **kwargs: Any) -> None:
        begun.append(case.key)
        if len(begun) == 1:
            raise KeyboardInterrupt  # the process is gone
        check(case, *args, **kwargs)

    monkeypatch.setattr(kernel_cases, "check", dies)
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        _sanitize(path, device)
    assert report.read_json(path)["running"] == begun[0]
    found = _sanitize(path, device)
    assert [case["status"] for case in found["cases"].values()] == ["error", "ok"]
    assert len(begun) == 2  # what ended a process is not tried again


def test_a_lost_gpu_ends_the_process_and_is_recorded(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(task: runs.Task, device: torch.device) -> runs.Record:
        raise runs.DeviceLostError({"status": "error", "message": "an illegal memory access was encountered"})

    monkeypatch.setattr(runs, "attempt", lost)
    found = _sanitize(tmp_path / "results.json", device)
    assert [case["message"] for case in found["cases"].values()] == ["an illegal memory access was encountered"]
    assert not found["done"]


def test_the_bare_table_uses_no_guards(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    memory = guards.Memory
    monkeypatch.setattr(guards, "Memory", lambda guard=guards.GUARD: (sizes.append(guard), memory(guard))[1])
    found = _sanitize(tmp_path / "results.json", device, "--bare")
    assert sizes == [0, 0]
    assert found["done"]
    assert "overrun_found" not in found
