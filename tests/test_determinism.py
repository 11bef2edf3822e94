"""The same bits from run to run, and from a run that stopped and went on."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import c3a_triton
from c3a_triton.adapters.embedding import C3AEmbedding

STEPS = 200
pytestmark = pytest.mark.filterwarnings("ignore:PEFT adapts linear layers alone")
CONFIG = c3a_triton.C3AConfig(block_size=4, target_modules=["embed", "first", "second"], init_weights="gaussian")


class Net(nn.Module):
    """An embedding, whose rows repeat within a batch, two linear layers and dropout, which draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 16)
        self.drop = nn.Dropout(0.1)
        self.second = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(self.drop(torch.tanh(self.first(self.embed(ids)))))


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return Net()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """The losses of steps [first, last); the data and the dropout of a step depend on its number alone."""
    losses = []
    for step in range(first, last):
        torch.manual_seed(1000 + step)
        ids, wanted = torch.randint(0, 20, (6, 5)), torch.randn(6, 5, 4)
        loss = (model(ids) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def kernels(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.c3a.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_runs_give_the_same_bits(deterministic: None) -> None:
    def run() -> tuple[list[float], dict[str, Tensor]]:
        model = c3a_triton.apply(new_model(), CONFIG)
        return train(model, optimizer_of(model), 0, STEPS), kernels(model)

    (losses, adapter), (losses_again, adapter_again) = run(), run()
    assert losses == losses_again
    assert losses[-1] < losses[0]
    assert_same(adapter, adapter_again)


@pytest.mark.parametrize("backend", ["direct", "fft", "expand"])
def test_two_runs_of_the_kernels_give_the_same_bits(deterministic: None, device: torch.device, backend: str) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        layer = c3a_triton.C3ALinear(nn.Linear(24, 16), block_size=8, backend=backend).to(device)
        optimizer = optimizer_of(layer)
        for step in range(3):
            x = torch.randn(40, 24, generator=torch.Generator().manual_seed(step)).to(device)
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        return [layer.c3a_kernel["default"].detach(), layer(x).detach()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_threads_that_share_an_embedding_give_the_same_bits(deterministic: None) -> None:
    """The one op whose sums otherwise depend on which thread comes first."""
    torch.manual_seed(0)
    layer = C3AEmbedding(nn.Embedding(64, 64), block_size=16)
    ids, dy = torch.randint(0, 64, (8, 4096)), torch.randn(8, 4096, 64)

    def gradient() -> Tensor:
        layer.zero_grad()
        layer(ids).backward(dy)
        return layer.c3a_kernel["default"].grad.clone()

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(5))
    finally:
        torch.set_num_threads(threads)


def test_a_resumed_run_gives_the_bits_of_one_that_did_not_stop(deterministic: None, tmp_path: Path) -> None:
    whole = c3a_triton.apply(new_model(), CONFIG)
    losses = train(whole, optimizer_of(whole), 0, STEPS)

    stopped = c3a_triton.apply(new_model(), CONFIG)
    optimizer = optimizer_of(stopped)
    until = train(stopped, optimizer, 0, STEPS // 2)
    stopped.c3a.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    del stopped, optimizer

    resumed = c3a_triton.load_adapter(new_model(), tmp_path / "adapter", is_trainable=True)
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert until + train(resumed, optimizer, STEPS // 2, STEPS) == losses
    assert_same(kernels(resumed), kernels(whole))


def test_a_pickled_run_gives_the_bits_of_one_that_did_not_stop(deterministic: None) -> None:
    model = c3a_triton.apply(new_model(), CONFIG)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 20)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, 20, 40) == train(other, other_optimizer, 20, 40)
    assert_same(kernels(model), kernels(other))


def test_disabling_and_merging_in_between_leave_no_trace_in_the_bits(deterministic: None) -> None:
    """An evaluation with merged or disabled adapters, as trainers run it, changes nothing of what follows."""
    plain, evaluated = (c3a_triton.apply(new_model(), CONFIG) for _ in range(2))
    optimizers = optimizer_of(plain), optimizer_of(evaluated)
    ids = torch.arange(10).view(2, 5)
    for step in range(0, 30, 10):
        assert train(plain, optimizers[0], step, step + 10) == train(evaluated, optimizers[1], step, step + 10)
        with torch.no_grad(), evaluated.c3a.disable_adapter():
            evaluated(ids)
        evaluated.c3a.merge_adapter()
        with torch.inference_mode():
            evaluated(ids)
        evaluated.c3a.unmerge_adapter()
    assert_same(kernels(plain), kernels(evaluated))
