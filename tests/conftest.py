"""What every test file shares: the device, the interpreter switch, seeds, NaN-filled allocations."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

# The folder `kernels` in the repository root must not shadow the published package of that name, which transformers
# imports: `python -m pytest` puts the current directory on the path, `pytest` does not.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Everything is on this machine: nothing asks the hub, not even bitsandbytes, which looks there for a kernel.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Triton reads the switch when a kernel is defined, so it is set before anything imports triton. TRITON_INTERPRET=0 says
# that no test may need it, as those that are not `native` do not.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--card",
        choices=("sm_80", "sm_86", "sm_90", "sm_100"),
        help="without a GPU: take this card's tiles, and let 'auto' choose kernels as on a GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    card = config.getoption("--card")
    if card is None:
        return
    if torch.cuda.is_available():
        raise pytest.UsageError("--card is for machines without a GPU; on this one tests run on the card that is there")
    from c3a_triton.operator import dispatch
    from c3a_triton.operator.launch import plans, specs

    def forget() -> None:
        dispatch.refresh()
        plans.clear_plans()

    patch = pytest.MonkeyPatch()
    for module, name, answer in ((specs, "card_of", card), (dispatch, "_kernels_pay", True)):
        on_others = getattr(module, name)
        patch.setattr(module, name, lambda device, a=answer, f=on_others: a if device.type == "cpu" else f(device))
    forget()
    config.add_cleanup(forget)
    config.add_cleanup(patch.undo)


@pytest.hookimpl(tryfirst=True)  # before -m is heeded
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    skip_natively = pytest.mark.skip(reason="launches on CPU tensors: needs Triton's interpreter")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("interpreter") is not None and not interpreted:
            item.add_marker(skip_natively)
        needs_gpu = item.get_closest_marker("gpu") is not None  # keywords have names of parameters too
        if needs_gpu and not torch.cuda.is_available():
            item.add_marker(skip)
        if needs_gpu or "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.native)


@pytest.hookimpl(trylast=True)  # when the report has been sent
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End a process of pytest-xdist that an illegal access has cost its CUDA context, so that another is started.

    Every test would fail in it, at once, and so it would take the others' too.
    """
    if not (report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized()):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one; otherwise the CPU, with Triton's kernels in its interpreter."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Put variables back, such as the interpreter's switch, which a rehearsal of the GPU job sets for its process."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the library allocates without values with NaN, so that an element no kernel writes fails the test."""

    def filling(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_nan(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("c3a_triton") and tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return allocate_nan

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filling(getattr(torch, name)))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Run the test under `torch.use_deterministic_algorithms(True)`."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
