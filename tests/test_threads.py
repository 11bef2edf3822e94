"""Adapted models in threads, in other processes, under `torch.inference_mode` and with hooks."""

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import c3a_triton
from c3a_triton.adapters.layer import C3ALinear

CONFIG = c3a_triton.C3AConfig(block_size=6, target_modules=["first", "second"], init_weights="gaussian")


class MLP(nn.Module):
    """Here, and not of a module that imports transformers: a spawned process imports what it unpickles."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.second = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


def adapted(seed: int = 0, **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    return c3a_triton.apply(MLP(), {**CONFIG.to_dict(), **config})


def train(model: nn.Module, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = (model(torch.randn(8, 12, generator=generator)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Threads


def in_threads(*work: Callable[[], object]) -> list[object]:
    """What each function returns, all of them running at once."""
    results: list[object] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = work[i]()
        except BaseException as error:  # handed to the main thread, which fails the test
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_two_models_are_trained_in_two_threads() -> None:
    alone = [train(adapted(seed), 60, seed) for seed in (1, 2)]
    models = [adapted(1), adapted(2)]  # seeds are the process's: models are made before the threads
    together = in_threads(lambda: train(models[0], 60, 1), lambda: train(models[1], 60, 2))
    assert together == alone


def test_models_are_adapted_merged_and_saved_in_two_threads(tmp_path: Path) -> None:
    def live(i: int) -> Tensor:
        model, x = MLP(), torch.ones(2, 12)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        for round_ in range(15):
            c3a_triton.apply(model, CONFIG, "a")
            with torch.no_grad():
                y = model(x)
                model.c3a.merge_adapter()
                torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
            model.c3a.unmerge_adapter()
            model.c3a.save_pretrained(tmp_path / f"{i}-{round_}", "a")
            model.c3a.load_adapter(tmp_path / f"{i}-{round_}", "b")
            model.c3a.set_adapter("b")
            assert torch.equal(model(x), y)
            model.c3a.unload()
            assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
        return y

    in_threads(*(lambda i=i: live(i) for i in range(3)))


def test_one_model_answers_in_two_threads() -> None:
    model = adapted()
    batches = [torch.randn(4, 12) for _ in range(20)]
    with torch.no_grad():
        expected = [model(x) for x in batches]

    def answer() -> list[Tensor]:
        with torch.inference_mode():
            return [model(x) for x in batches]

    for answers in in_threads(answer, answer, answer):
        assert all(torch.equal(y, y_expected) for y, y_expected in zip(answers, expected, strict=True))  # type: ignore[call-overload]


# Processes


def test_training_on_a_data_loader_with_workers() -> None:
    torch.manual_seed(5)
    data = TensorDataset(torch.randn(24, 12))

    def losses(**options: Any) -> list[float]:
        model = adapted()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        found = []
        for (x,) in DataLoader(data, batch_size=6, **options):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(num_workers=2) == losses()


def answer_from(model: nn.Module, x: Tensor, sender: Any) -> None:
    """In another process: the model's output, that of a merged copy, and a step of training."""
    y = model(x)
    y.sum().backward()
    grads = [p.grad.tolist() for p in model.parameters() if p.grad is not None]
    sender.send((y.tolist(), grads, list(model.c3a.adapters), model.c3a.model is model))  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_model_in_another_process(start: str) -> None:
    model, x = adapted(), torch.ones(2, 12)
    y = model(x)  # used here before it goes there
    y.sum().backward()
    grads = [p.grad.tolist() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    context = multiprocessing.get_context(start)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer_from, args=(model, x, sender))
    process.start()
    sender.close()  # a process that dies leaves nobody to send
    answer = receiver.recv()
    process.join()
    assert process.exitcode == 0
    assert answer == (y.tolist(), grads, ["default"], True)


# Inference mode


@pytest.mark.filterwarnings("ignore:adapters were merged")
def test_inference_mode_leaves_a_model_that_can_be_trained() -> None:
    model, x = adapted(), torch.randn(4, 12)
    model.c3a.add_adapter("other", CONFIG)
    y = model(x).detach()
    with torch.inference_mode():
        assert torch.equal(model(x), y)
        model.c3a.merge_adapter()
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        model.c3a.set_adapter(["other", "default"])
        model.c3a.set_adapter("default")
    assert torch.equal(model(x), y)
    train(model, 3, 0)


def test_what_is_added_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    adapted().c3a.save_pretrained(tmp_path)
    model = MLP()
    with torch.inference_mode():
        c3a_triton.apply(model, {**CONFIG.to_dict(), "modules_to_save": ["norm"]}, "a")
        c3a_triton.load_adapter(model, tmp_path, "b")
        model.c3a.add_weighted_adapter(["b"], [2.0], "c")
    model.c3a.hotswap_adapter(tmp_path, "b")
    for name in ("a", "b", "c"):
        model.c3a.set_adapter(name)
        before = {key: value.clone() for key, value in model.c3a.state_dict(name).items()}
        train(model, 2, 0)
        assert all(not torch.equal(value, before[key]) for key, value in model.c3a.state_dict(name).items())


@pytest.mark.parametrize("backend", ["torch", "fft"])
def test_a_frozen_layer_used_in_inference_mode_first_passes_gradients_on(device: torch.device, backend: str) -> None:
    layer = C3ALinear(nn.Linear(16, 8), block_size=4, init_weights="gaussian", backend=backend).to(device)
    x = torch.randn(20, 16, device=device)
    plain = x.clone().requires_grad_()
    layer(plain).sum().backward()
    layer.requires_grad_(False)
    layer.freeze_for_inference()
    with torch.inference_mode():
        layer(x)
    again = x.clone().requires_grad_()
    layer(again).sum().backward()
    torch.testing.assert_close(again.grad, plain.grad, rtol=1e-4, atol=1e-5)


# Hooks


@pytest.mark.parametrize("where", ["layer", "base"])
def test_hooks_are_called_and_change_what_they_return(where: str) -> None:
    model, x = adapted(), torch.randn(4, 12)
    y = model(x)
    layer = model.second
    module = layer if where == "layer" else layer.base_layer
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        module.register_forward_hook(lambda _, args, out: seen.update(y=out.detach().clone())),
        module.register_full_backward_hook(lambda _, dx, dy: seen.update(dx=dx[0], dy=dy[0])),
    ]
    hooked = model(x)
    torch.testing.assert_close(hooked, y, rtol=1e-5, atol=1e-6)
    hooked.sum().backward()
    assert torch.equal(seen["dy"], torch.ones_like(y))
    base = layer.base_layer
    whole = base.weight + layer.get_delta_weight("default")
    weight = whole if where == "layer" else base.weight
    torch.testing.assert_close(seen["y"], seen["x"] @ weight.T + base.bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["dx"], seen["dy"] @ weight, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    handle = module.register_forward_hook(lambda _, args, out: out + 1)
    torch.testing.assert_close(model(x), y + 1, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert torch.equal(model(x), y)


def test_hooks_on_kernels_see_their_gradients() -> None:
    model = adapted()
    seen = []
    kernel = model.first.c3a_kernel["default"]
    kernel.register_hook(lambda grad: seen.append(grad.clone()))
    kernel.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    model(torch.randn(4, 12)).square().sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)
