"""Which tests touch the GPU, by mark, and what `--card` lets a machine without one stand in for."""

from pathlib import Path

import pytest
import torch

# Before the sessions below, which forget what they import.
from c3a_triton.operator import dispatch
from c3a_triton.operator.cost_model import Sizes

pytest_plugins = ["pytester"]

TESTS = """
    import pytest

    @pytest.fixture
    def layer(device): ...

    def test_direct(device): ...
    def test_through_a_fixture(layer): ...
    @pytest.mark.gpu
    def test_marked(): ...
    @pytest.mark.nightly
    def test_long(device): ...
    @pytest.mark.parametrize("part", ["gpu"])  # a name, not a mark
    def test_elsewhere(part): ...
"""
CARD = """
    import torch
    from c3a_triton.operator import dispatch
    from c3a_triton.operator.cost_model import Sizes
    from c3a_triton.operator.launch import specs

    def test_card():
        cpu, meta = torch.device("cpu"), torch.device("meta")
        assert specs.card_of(cpu) == {card!r}
        assert specs.card_of(meta) == "sm_80"
        sizes = Sizes(8192, 4096, 4096, 256, torch.bfloat16, cpu)
        assert dispatch.choose("auto", sizes) == {choice}
        assert dispatch.choose("auto", sizes._replace(device=meta)) == "torch"
"""


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with this one's conftest, for sessions on a machine without a GPU."""
    monkeypatch.delenv("C3A_TRITON_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:xdist\nmarkers =\n gpu\n native\n nightly\n")
    return pytester


@pytest.mark.parametrize(
    ("expression", "selected"),
    [
        ("native", ["test_direct", "test_through_a_fixture", "test_marked", "test_long"]),
        ("native and not nightly", ["test_direct", "test_through_a_fixture", "test_marked"]),
        ("not native", ["test_elsewhere[gpu]"]),
    ],
)
def test_native_tests_are_those_that_touch_the_device(
    session: pytest.Pytester, expression: str, selected: list[str]
) -> None:
    session.makepyfile(TESTS)
    collected = session.inline_run("--collect-only", "-m", expression).getcalls("pytest_collection_finish")
    assert [item.name for item in collected[0].session.items] == selected


@pytest.mark.parametrize("card", ["sm_90", "sm_100"])
def test_a_session_computes_as_on_a_card(session: pytest.Pytester, card: str) -> None:
    sizes = Sizes(8192, 4096, 4096, 256, torch.bfloat16, torch.device("cpu"))
    assert dispatch.choose("auto", sizes) == "torch"
    session.makepyfile(CARD.format(card=card, choice="dispatch.cheapest(sizes)"))
    session.inline_run("--card", card).assertoutcome(passed=1)
    # And no longer.
    assert dispatch.choose("auto", sizes) == "torch"


def test_a_machine_with_a_gpu_has_its_own_card(session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    session.makepyfile(TESTS)
    result = session.runpytest_inprocess("--card", "sm_90")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--card is for machines without a GPU*"])


def test_the_interpreter_is_not_forced(session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    session.makepyfile("import os\ndef test_switch(): assert os.environ['TRITON_INTERPRET'] == os.environ['EXPECTED']")
    for given, expected in (("0", "0"), (None, "1")):
        monkeypatch.setenv("EXPECTED", expected)
        monkeypatch.delenv("TRITON_INTERPRET")
        if given:
            monkeypatch.setenv("TRITON_INTERPRET", given)
        session.inline_run().assertoutcome(passed=1)
