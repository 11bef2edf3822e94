"""Launches take the kernels that Triton's `JITFunction.run` takes, past it or through it.

Nothing is compiled: what is compared are the specialisations that Triton's own Python asks its compiler for.
"""

import functools
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from unittest import mock

import bench_package  # noqa: F401
import pytest
import torch

from bench import uncomputed
from c3a_triton.operator.launch import plans

triton = pytest.importorskip("triton")
compiled = pytest.importorskip("c3a_triton.operator.launch.compiled")
JITFunction = triton.runtime.jit.JITFunction

CONSTANTS: dict[str, Any] = {
    "row_blocks": 2,
    "col_blocks": 4,
    "split_length": 64,
    "stride_w_row": 64,
    "stride_w_col": 16,
    "b": 16,
    "TRANSPOSE": False,
    "HAS_BIAS": False,
    "EVEN_K": True,
    "PRECISION": "tf32x3",
    "BLOCK_M": 16,
    "BLOCK_J": 16,
    "BLOCK_K": 64,
    "num_warps": 2,
}
GRID = (3, 2, 1)


class Card(uncomputed.Driver):
    """Notes what its launcher is called with."""

    def __init__(self, card: str = "sm_90") -> None:
        super().__init__(self._called, card)
        self.calls: list[tuple[Any, ...]] = []

    def _called(self, *arguments: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def card() -> Iterator[Card]:
    found = Card()
    with uncomputed.launches(found):
        compiled._binding.cache_clear()  # which may be another test's, of wrong keys
        yield found
    compiled._binding.cache_clear()


def kernel() -> Any:
    return plans.kernels().direct.hankel_kernel


def tensor(dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    """Aligned by 16 bytes where the offset, in elements, is 0."""
    return torch.empty(64, dtype=dtype)[offset:]


def arguments(**changed: Any) -> dict[str, Any]:
    usual = {
        "x_ptr": tensor(),
        "w_ptr": tensor(),
        "bias_ptr": None,
        "out_ptr": tensor(),
        "scale": 0.5,
        "stride_x_t": 64,
        "stride_out_s": 64,
        "stride_out_t": 64,
        "ACCUMULATE": False,
    }
    return usual | changed


VARIANTS = [
    *[
        arguments(x_ptr=tensor(dtype, offset))
        for dtype, offset in product((torch.float16, torch.float32), (0, 1, 4, 8))
    ],
    *[arguments(w_ptr=torch.nn.Parameter(tensor(offset=offset))) for offset in (0, 1)],
    *[arguments(bias_ptr=bias) for bias in (tensor(), tensor(offset=1), tensor(torch.bfloat16))],
    *[arguments(out_ptr=tensor(offset=offset), x_ptr=tensor(offset=1)) for offset in (0, 1)],
    *[
        arguments(stride_x_t=stride)
        for stride in (-16, -1, 0, 1, 2, 3, 15, 16, 17, 18, 2**31 - 1, 2**31, 2**31 + 1, 2**40)
    ],
    *[arguments(stride_out_t=stride) for stride in (1, 2, 16)],
    *[arguments(scale=scale) for scale in (1, 1.0, 2, 16, True, 0.25)],
    *[arguments(ACCUMULATE=value) for value in (False, True)],
]


def asked(found: Any) -> tuple[Any, ...]:
    """All that Triton's compiler was asked for."""
    source = found.src
    options = {name: value for name, value in vars(found.metadata).items() if name != "target"}
    return (
        source.fn.__name__,
        source.signature,
        source.constants,
        source.attrs,
        repr(options),
        str(found.metadata.target),
    )


def by_triton(given: dict[str, Any], **options: Any) -> Any:
    """The kernel that a `JITFunction` takes that has launched nothing before."""
    fresh = uncomputed.native.__wrapped__(kernel())
    return fresh.run(grid=GRID, warmup=True, enable_fp_fusion=True, **CONSTANTS, **options, **given)


def check(card: Card, launch: Callable[..., None], given: dict[str, Any], **options: Any) -> None:
    """A launch with these arguments takes the right kernel, and gives it them; tensors, or their addresses."""
    launch(**given)
    call = card.calls[-1]
    assert call[:4] == (*GRID, 0)
    assert asked(card.loaded[call[4] - 1]) == asked(by_triton(given, **options))
    values = CONSTANTS | given
    passed = call[-1] if isinstance(call[-1], tuple) else call[-len(kernel().arg_names) :]
    for one, name in zip(passed, kernel().arg_names, strict=True):
        value = values[name]
        assert one is value or (isinstance(value, torch.Tensor) and one == value.data_ptr())


def check_all(card: Card, launch: Callable[..., None]) -> None:
    for given in VARIANTS:
        check(card, launch, given)


@pytest.fixture
def through_triton() -> Iterator[mock.Mock]:
    """Counts the launches that go through `JITFunction.run`; for plans that are made after it."""
    run = JITFunction.run
    counted = mock.Mock()

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs["warmup"]:
            counted()
        return run(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", counting):
        yield counted


def test_a_launch_takes_the_kernel_that_triton_would(card: Card, through_triton: mock.Mock) -> None:
    launch = plans.bound(kernel(), GRID, **CONSTANTS)
    check_all(card, launch)
    through_triton.reset_mock()
    for given in VARIANTS[::-1]:
        check(card, launch, given)
    through_triton.assert_not_called()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("{name}_at % 16", "0"),
        ("{name}.dtype", "0"),
        ("{name} % 16", "0"),
        ("2 <= {name}", "1 <= {name}"),
        ("< 2**31", "< 2**63"),
        ("else {name}.__class__", "else 0"),
        ("{name}.__class__, {name}", "0"),
    ],
)
def test_a_key_that_leaves_something_out_is_caught(
    card: Card, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    told_apart = compiled._told_apart

    def less(name: str, is_constexpr: bool) -> str:
        return told_apart(name, is_constexpr).replace(right.format(name=name), wrong.format(name=name))

    monkeypatch.setattr(compiled, "_told_apart", less)
    launch = plans.bound(kernel(), GRID, **CONSTANTS)
    with pytest.raises(AssertionError):
        check_all(card, launch)


def test_names_of_arguments_are_not_those_of_the_text_around_them(card: Card) -> None:
    taken = set(re.findall(r"\w+", compiled._SOURCE))
    for module in plans.kernels():
        for name, one in vars(module).items():
            assert not name.endswith("_kernel") or not taken & set(one.arg_names), name


def test_a_kept_kernel_stays_loaded(card: Card) -> None:
    launch = plans.bound(kernel(), GRID, **CONSTANTS)
    launch(**arguments())
    loaded = weakref.ref(card.loaded.pop())
    kernel().device_caches.clear()
    gc.collect()
    assert loaded() is not None
    del launch
    plans.clear_plans()
    gc.collect()
    assert loaded() is None


def test_each_device_has_its_own_kernel(card: Card, through_triton: mock.Mock) -> None:
    launch = plans.bound(kernel(), GRID, **CONSTANTS)
    for card.device in (0, 1, 0, 1):
        launch(**arguments())
    assert [call[4] for call in card.calls] == [1, 2, 1, 2]
    assert through_triton.call_count == 2


def test_a_launch_takes_constants_and_options_later_too(card: Card, through_triton: mock.Mock) -> None:
    launch = plans.bound(kernel(), GRID, launch_pdl=True, **CONSTANTS)
    given = arguments()
    del given["ACCUMULATE"], given["stride_out_s"]
    for accumulate in (True, False, True):
        bound = functools.partial(launch, ACCUMULATE=accumulate, stride_out_s=16)
        bound(**given)
        found = card.loaded[card.calls[-1][4] - 1]
        assert found.src.constants[(kernel().arg_names.index("ACCUMULATE"),)] is accumulate
        assert found.metadata.launch_pdl
        assert found.metadata.num_warps == 2
    assert through_triton.call_count == 2
    launch(**arguments(), num_warps=8)  # what is not for the kernel goes through Triton
    assert card.loaded[card.calls[-1][4] - 1].metadata.num_warps == 8
    launch(**arguments())
    assert card.loaded[card.calls[-1][4] - 1].metadata.num_warps == 2


def test_whoever_watches_launches_sees_each(
    card: Card, through_triton: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = triton.knobs
    launch = plans.bound(kernel(), GRID, **CONSTANTS)
    launch(**arguments())

    def launched_through_triton() -> bool:
        through_triton.reset_mock()
        launch(**arguments())
        return through_triton.called

    assert not launched_through_triton()
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hook = mock.Mock()
        chain.add(hook)
        assert launched_through_triton()
        chain.remove(hook)
        assert not launched_through_triton()
    kernel().pre_run_hooks.append(lambda *args, **kwargs: None)
    assert launched_through_triton()
    kernel().pre_run_hooks.clear()
    switches = [(knobs.runtime, name) for name in ("launch_enter_hook", "launch_exit_hook")]
    for owner, name in switches:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, None)
            assert launched_through_triton()
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *args: ("", ""))
        assert launched_through_triton()
    with monkeypatch.context() as patch:
        patch.setattr(knobs.compilation, "instrumentation_mode", "mode")
        assert launched_through_triton()
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        check(card, launch, arguments())
        assert card.loaded[card.calls[-1][4] - 1].metadata.debug
    check(card, launch, arguments())
    assert not card.loaded[card.calls[-1][4] - 1].metadata.debug
    assert not launched_through_triton()


def test_a_kernel_that_was_not_launched_is_not_kept(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    run = JITFunction.run
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, **given: run(self, **{**given, "warmup": True}))
        launch = plans.bound(kernel(), GRID, **CONSTANTS)
        for _ in range(2):
            launch(**arguments())
    assert not card.calls
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, **given: None)
        launch = plans.bound(kernel(), GRID, **CONSTANTS)
        for _ in range(2):
            launch(**arguments())
    assert not card.calls


@pytest.mark.parametrize("more", ["global_scratch_size", "profile_scratch_size", "gsan_enabled"])
def test_launches_that_allocate_or_report_are_left_to_triton(card: Card, through_triton: mock.Mock, more: str) -> None:
    class Launcher(card.launcher_cls):  # type: ignore[name-defined]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            setattr(self, more, 1)

        def __call__(self, *arguments: Any) -> None:
            """Nothing is allocated."""

    card.launcher_cls = Launcher
    launch = plans.bound(kernel(), GRID, **CONSTANTS)
    for _ in range(2):
        launch(**arguments())
    assert through_triton.call_count == 2
    assert not card.calls


def test_a_function_of_another_form_is_left_to_triton(
    card: Card, through_triton: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = not compiled._takes_a_tuple()
    monkeypatch.setattr(compiled, "_takes_a_tuple", lambda: other)
    launch = plans.bound(kernel(), GRID, **CONSTANTS)
    for _ in range(2):
        check(card, launch, arguments())
    assert through_triton.call_count == 2


def test_other_tritons_and_the_interpreter_launch_as_they_do(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.keeps(kernel())
    assert not compiled.keeps(object())  # an interpreted kernel is of another class
    for version, kept in (("3.5.1", False), ("3.6.0", True), ("3.9.1+git1", True), ("3.10.0", False), ("4.0.0", False)):
        monkeypatch.setattr(triton, "__version__", version)
        assert compiled.keeps(kernel()) is kept
    launch = plans.bound(kernel(), GRID, **CONSTANTS)
    assert isinstance(launch, functools.partial)
    launch(**arguments())
    assert len(card.calls) == 1
