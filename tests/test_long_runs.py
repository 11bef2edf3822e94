"""Long runs: memory does not grow, what is deleted is gone, and losses do not drift from those of the dense model."""

import ctypes
import gc
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import c3a_triton

IN, HIDDEN, OUT, B = 12, 24, 6, 6
CONFIG = c3a_triton.C3AConfig(block_size=B, target_modules=["0", "2"])


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step % 1000)
    x = torch.randn(16, IN, generator=generator)
    return x, torch.sin(x[:, :OUT] + x[:, OUT:])


def steps_of(model: nn.Module) -> Callable[[int], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step(number: int) -> float:
        x, wanted = batch(number)
        y = model(x)
        loss = F.mse_loss(y, wanted.to(y.dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def python_bytes() -> int:
    """Bytes that Python holds, of those it has asked for since tracing began."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


class MallInfo(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    )


def handed_out_bytes() -> int:
    """Bytes that malloc has handed out: tensors, and what torch keeps beside them.

    Counted, where the resident size depends on what the system has read, swapped out and got back.
    """
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) or pytest.skip("needs glibc 2.33")
    mallinfo.restype = MallInfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


# Training


def growth(run: Callable[[], None]) -> tuple[int, int, int]:
    """What one run added: bytes that Python holds, live tensors, bytes that malloc has handed out."""
    alive, handed_out, held = tensors_alive(), handed_out_bytes(), python_bytes()
    run()
    return python_bytes() - held, tensors_alive() - alive, handed_out_bytes() - handed_out


def check_memory(steps: int) -> None:
    step = steps_of(c3a_triton.apply(new_model(), CONFIG))

    def run() -> None:
        for i in range(steps):
            step(i)

    tracemalloc.start()  # before the first step: what turns over is counted from the beginning, and has not grown
    try:
        for i in range(min(steps, 500)):  # what is built once, at whatever step
            step(i)
        # A leak adds to every window. A table that doubles, at whatever step, adds to one.
        windows = [growth(run) for _ in range(3)]
        held, alive, handed_out = (min(found) for found in zip(*windows, strict=True))
        assert held < 50_000, windows
        assert alive <= 0, windows  # what other tests left may go
        assert handed_out < 100_000, windows
    finally:
        tracemalloc.stop()


def test_training_does_not_grow() -> None:
    check_memory(200)


@pytest.mark.nightly
def test_long_training_does_not_grow() -> None:
    check_memory(7_000)


def test_the_memory_check_sees_memory_that_is_no_tensor() -> None:
    before = handed_out_bytes()
    kept = [ctypes.create_string_buffer(200_000), ctypes.create_string_buffer(64 << 20)]
    assert handed_out_bytes() - before >= sum(map(len, kept))


def test_the_memory_check_sees_one_kept_tensor_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    forward = c3a_triton.C3ALinear.forward

    def leaking(layer: Any, x: Tensor) -> Tensor:
        kept.append(forward(layer, x).detach())
        return forward(layer, x)

    monkeypatch.setattr(c3a_triton.C3ALinear, "forward", leaking)
    with pytest.raises(AssertionError):
        check_memory(20)


# Adding and deleting


def test_hundreds_of_adapters_come_and_go() -> None:
    model = c3a_triton.apply(new_model(), CONFIG)
    x, names = batch(0)[0], [name for name, _ in model.named_modules()]
    y = model(x)
    gone: list[weakref.ref[Tensor]] = []

    def cycle(i: int) -> None:
        model.c3a.add_adapter(f"adapter{i}", CONFIG)
        model.c3a.set_adapter(f"adapter{i}")
        if i % 50 == 0:
            model(x).sum().backward()
            model.c3a.merge_adapter()
            model.c3a.unmerge_adapter()
        gone.extend(weakref.ref(layer.c3a_kernel[f"adapter{i}"]) for _, layer in model.c3a.layers())
        model.c3a.set_adapter("default")
        if i % 2:
            model.c3a.rename_adapter(f"adapter{i}", f"renamed{i}")
        model.c3a.delete_adapter(f"renamed{i}" if i % 2 else f"adapter{i}")

    for i in range(50):
        cycle(i)
    alive, objects = tensors_alive(), len(gc.get_objects())
    for i in range(50, 350):
        cycle(i)
    assert tensors_alive() <= alive  # what other tests left may go
    assert len(gc.get_objects()) - objects < 100 + 2 * 300  # the weak references of this test
    assert len(gone) == 700
    assert not any(reference() is not None for reference in gone)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(x), y)


def test_models_that_were_adapted_are_freed() -> None:
    def live() -> list[weakref.ref[Any]]:
        model = c3a_triton.apply(new_model(), CONFIG)
        steps_of(model)(0)
        model.c3a.freeze_for_inference()
        with torch.no_grad(), model.c3a.disable_adapter():
            model(batch(0)[0])
        unloaded = c3a_triton.apply(new_model(), CONFIG)
        layers = [layer for _, layer in unloaded.c3a.layers()]
        unloaded.c3a.unload()
        return [weakref.ref(found) for found in (model, *model.modules(), *model.parameters(), *layers)]

    live()
    alive = tensors_alive()
    for _ in range(2):
        references = live()
        gc.collect()
        assert not any(reference() is not None for reference in references)
    assert tensors_alive() <= alive  # what other tests left may go


# The loss curve


class DenseUpdate(nn.Module):
    """A linear layer whose weight is W + ΔW, written densely in float64; autograd differentiates the indexing."""

    def __init__(self, base: nn.Linear, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.detach().double())
        self.register_buffer("weight", base.weight.detach().double())
        self.register_buffer("bias", base.bias.detach().double())
        b = w.shape[-1]
        row, column = torch.arange(base.out_features)[:, None], torch.arange(base.in_features)[None, :]
        self.index = (row // b, column // b, (column - row) % b)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.double(), self.weight + self.w[self.index] / self.weight.shape[1], self.bias)


def check_drift(steps: int) -> None:
    model = c3a_triton.apply(new_model(), CONFIG)
    dense = nn.Sequential(
        *(
            DenseUpdate(module.base_layer, module.c3a_kernel["default"])
            if isinstance(module, c3a_triton.C3ALinear)
            else module
            for module in model
        )
    )
    step, dense_step = steps_of(model), steps_of(dense)
    losses = torch.tensor([(step(i), dense_step(i)) for i in range(steps)], dtype=torch.float64)
    assert losses[-50:, 1].mean() < 0.8 * losses[:50, 1].mean(), "nothing was learnt, so the comparison means little"
    error = (losses[:, 0] - losses[:, 1]).abs() / losses[:, 1]
    print(f"{steps} steps: loss {losses[0, 1]:.4f} to {losses[-1, 1]:.4f}, largest difference {error.max():.2e}")
    assert error.max() < 1e-4, f"relative difference {error.max():.3g} at step {int(error.argmax())}"


def test_losses_follow_the_dense_model() -> None:
    check_drift(300)


@pytest.mark.nightly
def test_losses_follow_the_dense_model_for_long() -> None:
    check_drift(5000)
