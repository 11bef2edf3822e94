"""Whole models under torch.compile, torch.export and torch.func: no graph breaks, no needless recompilation."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

pytest.importorskip("transformers")

from tiny_models import MLP, llama

import c3a_triton
from c3a_triton import C3AConfig
from c3a_triton.operator.launch import fft_bases, plans

CONFIG = C3AConfig(block_size=4, target_modules=["q_proj", "v_proj", "down_proj"], init_weights="gaussian")
MLP_CONFIG = C3AConfig(block_size=3, target_modules="all-linear", init_weights="gaussian")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@contextlib.contextmanager
def no_recompilation() -> Iterator[None]:
    """Within it a compilation is an error."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


def ids(n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 32, (2, n_tokens), generator=torch.Generator().manual_seed(seed))


def step(call: Callable[..., Any], model: nn.Module, n_tokens: int) -> tuple[Tensor, list[Tensor]]:
    """Logits and the gradients of what is trained."""
    output = call(input_ids=ids(n_tokens), labels=ids(n_tokens), use_cache=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return output.logits, list(torch.autograd.grad(output.loss, trained))


def assert_compiled_as_eager(compiled: Callable[..., Any], model: nn.Module, n_tokens: int) -> None:
    y, grads = step(compiled, model, n_tokens)
    expected, expected_grads = step(model, model, n_tokens)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert len(grads) > 0
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_training_in_one_graph_for_every_adapter_and_length(tmp_path: Path) -> None:
    """Compiled twice: for the first length, and for any length. Switching and hot-swapping adapters cost nothing."""
    model = c3a_triton.apply(llama(num_hidden_layers=1), CONFIG)
    model.c3a.add_adapter("other", CONFIG)
    model.c3a.save_pretrained(tmp_path)
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    # The batch has 2 rows: a length of 2, or two lengths alike, would be taken for the same symbol.
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_compiled_as_eager(compiled, model, 7)
    assert counter.frame_count == 1
    with no_recompilation():
        for name in ("other", "default"):
            model.c3a.set_adapter(name)
            assert_compiled_as_eager(compiled, model, 7)
        # New values in place, as an optimizer writes them or a checkpoint does.
        model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
        assert_compiled_as_eager(compiled, model, 7)
        # An adapter that came later, from disk.
        model.c3a.load_adapter(tmp_path, "loaded", is_trainable=True)
        model.c3a.set_adapter("loaded")
        model.c3a.delete_adapter("other")
        assert_compiled_as_eager(compiled, model, 7)
        model.c3a.rename_adapter("loaded", "renamed")
        assert_compiled_as_eager(compiled, model, 7)
    assert_compiled_as_eager(compiled, model, 9)  # the length becomes a symbol
    assert counter.frame_count == 2
    with no_recompilation():
        for n_tokens in (11, 5, 24):
            assert_compiled_as_eager(compiled, model, n_tokens)
        model.c3a.set_adapter("default")
        assert_compiled_as_eager(compiled, model, 17)
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_dynamic_shapes_compile_once() -> None:
    model = c3a_triton.apply(MLP(), MLP_CONFIG)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(torch.randn(7, 12)).sum().backward()
    with no_recompilation():
        for n_tokens in (9, 3, 20):
            x = torch.randn(n_tokens, 12)
            torch.testing.assert_close(compiled(x), model(x))


def test_what_else_an_adapter_may_be_does_not_break_the_graph() -> None:
    """Several adapters, none, merged ones, and rows with their own: each is one graph of its own, and right."""
    model = c3a_triton.apply(MLP(), MLP_CONFIG).eval()
    model.c3a.add_adapter("fine", C3AConfig(block_size=2, target_modules=["first"], init_weights="gaussian"))
    x = torch.randn(5, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def check() -> Tensor:
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        with no_recompilation():
            compiled(x + 1)
        return y

    one = check()
    model.c3a.set_adapter(["default", "fine"])
    both = check()
    assert not torch.allclose(one, both)
    with model.c3a.disable_adapter():
        assert not torch.allclose(check(), both)
    with model.c3a.using(["default", "fine", "__base__", "default", "fine"]):
        check()
    torch.testing.assert_close(check(), both)
    model.c3a.merge_adapter()
    torch.testing.assert_close(check(), both, rtol=1e-4, atol=1e-5)
    model.c3a.unmerge_adapter()
    with no_recompilation():
        torch.testing.assert_close(check(), both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_inside_and_outside_the_graph(dtype: torch.dtype) -> None:
    model = c3a_triton.apply(MLP(), MLP_CONFIG)
    x = torch.randn(5, 12)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x)

    with torch.autocast("cpu", dtype):
        expected = model(x)
        outside = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    inside = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    for y in (outside, inside):
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    outside.float().sum().backward()
    assert all(w.grad is not None and w.grad.dtype == torch.float32 for w in model.parameters() if w.requires_grad)


@pytest.mark.slow
def test_inductor_trains_as_eager() -> None:
    """In the mode that captures graphs on a GPU, and compiles like any other elsewhere."""
    model = nn.Sequential(nn.Linear(12, 6))
    c3a_triton.apply(model, MLP_CONFIG)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for call, inner in ((compiled, model), (eager, eager)):
        optimizer = torch.optim.SGD(c3a_triton.param_groups(inner, lr=0.5))
        for seed in range(3):
            x = torch.randn(7, 12, generator=torch.Generator().manual_seed(seed))
            call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for w, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(w, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [4, 64])
def test_reduce_overhead_replays_graphs_on_a_gpu(n_tokens: int) -> None:
    """A captured graph reads the kernels where they lie: new values in place are seen, another adapter too."""
    model = c3a_triton.apply(llama().cuda().bfloat16(), CONFIG)
    model.c3a.add_adapter("other", CONFIG)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    batch = ids(n_tokens).cuda()
    for name in ("default", "other", "default"):
        model.c3a.set_adapter(name)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                y = compiled(input_ids=batch, use_cache=False).logits.clone()
                torch.testing.assert_close(y, model(input_ids=batch, use_cache=False).logits, rtol=5e-2, atol=5e-2)
                for _, layer in model.c3a.layers():
                    layer.c3a_kernel[name].mul_(1.5)


def spectral(names: tuple[str, ...] = ("default",)) -> nn.Module:
    """Two layers by spectra, of a block size that "auto" would take them for."""
    config = C3AConfig(block_size=128, target_modules="all-linear", init_weights="gaussian")
    model = nn.Sequential(nn.Linear(256, 384), nn.GELU(), nn.Linear(384, 256)).to(accelerator())
    c3a_triton.apply(model, config, adapter_name=names[0], backend="fft")
    for name in names[1:]:
        model.c3a.add_adapter(name, config)
    # What an earlier test has left is not made again.
    fft_bases._basis.cache_clear()
    plans.clear_plans()
    return model


def accelerator() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.gpu
def test_graphs_of_spectra_train_as_eager() -> None:
    """Bases are made while the graphs are warmed up, forward and backward, and are no part of them."""
    model = spectral()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(96, 256, device=accelerator())
    for call, inner in ((compiled, model), (eager, eager)):
        optimizer = torch.optim.SGD(c3a_triton.param_groups(inner, lr=0.5))
        for step in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            call(x * (step + 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for w, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(w, other, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_of_a_model_frozen_for_inference() -> None:
    """Its spectra are kept by the calls that warm up, and computed anew by the graphs: changed values are seen."""
    model = spectral().eval()
    model.c3a.freeze_for_inference()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(96, 256, device=accelerator())
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x).clone(), model(x), rtol=1e-3, atol=1e-4)
        for _, layer in model.c3a.layers():
            layer.c3a_kernel["default"].mul_(1.5)
        x.normal_()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["direct", "fft"])
@pytest.mark.parametrize("kind", ["float32", "16 bits"])
def test_graphs_of_a_mixed_batch(backend: str, kind: str) -> None:
    """Tables of rows and addresses, and copies of kernels that are no float32, are found where graphs expect them."""
    model = spectral(("one", "two")).eval()
    model.c3a.set_backend(backend)
    if kind == "16 bits":
        model.half()
    dtype = next(model.parameters()).dtype
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(4, 64, 256, device=accelerator(), dtype=dtype)
    for number in range(6):  # other names in the same compiled code
        names = [["one", "two", "__base__", "one"], ["two", "two", "one", "__base__"]][number % 2]
        with torch.no_grad(), model.c3a.using(names):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=2e-2, atol=2e-2)
            for _, layer in model.c3a.layers():
                layer.c3a_kernel["one"].mul_(1.5)
            x.normal_()


# Copies


def _loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _loaded,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_compiled_model_is_copied_and_the_copy_compiles(duplicate: Callable[[nn.Module], Any]) -> None:
    """The model in place (`model.compile()`), whose copies are plain models again."""
    model = c3a_triton.apply(MLP(), MLP_CONFIG)
    model.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 12)
    y = model(x)
    other = duplicate(model)
    torch.testing.assert_close(other(x), y)
    with torch.no_grad():
        for _, layer in other.c3a.layers():
            layer.c3a_kernel["default"].mul_(2)
    torch.testing.assert_close(model(x), y)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), other(x))
    assert (other(x) - y).abs().max() > 0.1
    other.c3a.unload()
    torch.testing.assert_close(model(x), y)


# torch.export


@pytest.mark.parametrize("state", ["unmerged", "two adapters", "merged", "merged and unloaded"])
def test_export(tmp_path: Path, state: str) -> None:
    model = c3a_triton.apply(MLP(), MLP_CONFIG).eval()
    if state == "two adapters":
        model.c3a.add_adapter("fine", C3AConfig(block_size=2, target_modules=["first"], init_weights="gaussian"))
        model.c3a.set_adapter(["default", "fine"])
    elif state == "merged":
        model.c3a.merge_adapter()
    elif state == "merged and unloaded":
        model = model.c3a.merge_and_unload()
    # Sizes that differ from one another and from what comes later, or they would be taken for one symbol.
    shapes = ({0: torch.export.Dim("tokens", min=2, max=4096)},)
    program = torch.export.export(model, (torch.randn(7, 12),), dynamic_shapes=shapes)
    calls = [str(node.target) for node in program.graph.nodes if "c3a_triton" in str(node.target)]
    assert bool(calls) != state.startswith("merged")
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for n_tokens in (7, 3, 50):
        x = torch.randn(n_tokens, 12)
        torch.testing.assert_close(again(x), model(x))


def test_export_of_a_language_model() -> None:
    model = c3a_triton.apply(llama(num_hidden_layers=1), CONFIG).eval()
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=32)}, "use_cache": None}
    program = torch.export.export(model, (), {"input_ids": ids(7), "use_cache": False}, dynamic_shapes=shapes)
    assert sum("c3a_triton" in str(node.target) for node in program.graph.nodes) == 3
    for n_tokens in (7, 12):
        batch = {"input_ids": ids(n_tokens, seed=1), "use_cache": False}
        torch.testing.assert_close(program.module()(**batch).logits, model(**batch).logits)


# torch.func


def stacked(model: nn.Module, count: int) -> dict[str, Tensor]:
    """`count` sets of random kernels, one above the other."""
    return {
        name: torch.randn(count, *parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_an_ensemble_of_adapters_by_vmap() -> None:
    model = c3a_triton.apply(MLP(), MLP_CONFIG)
    ensemble, x = stacked(model, 3), torch.randn(5, 12)

    def call(kernels: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, kernels, (x,))

    before = model(x)
    together = torch.vmap(call, (0, None))(ensemble, x)
    for i in range(3):
        model.load_state_dict({name: values[i] for name, values in ensemble.items()}, strict=False)
        torch.testing.assert_close(together[i], model(x))
    assert not torch.allclose(before, together[0], atol=0.1)


def test_gradients_tangents_and_per_sample_gradients() -> None:
    model = c3a_triton.apply(MLP(), MLP_CONFIG)
    kernels = {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}
    x = torch.randn(5, 12)

    def loss(kernels: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, kernels, (x,)).square().mean()

    model(x).square().mean().backward()
    expected = {name: w.grad for name, w in model.named_parameters() if w.requires_grad}
    found = torch.func.grad(loss)(kernels, x)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)
    each = torch.vmap(torch.func.grad(loss), (None, 0))(kernels, x)
    for name, grad in expected.items():
        torch.testing.assert_close(each[name].mean(0), grad, rtol=1e-4, atol=1e-6)
    direction = {name: torch.randn_like(w) for name, w in kernels.items()}
    _, tangent = torch.func.jvp(lambda kernels: loss(kernels, x), (kernels,), (direction,))
    slope = sum((expected[name] * direction[name]).sum() for name in kernels)
    torch.testing.assert_close(tangent, slope, rtol=1e-3, atol=1e-5)
    hessian = torch.func.jacfwd(torch.func.grad(lambda x: loss(kernels, x)))(x)
    assert hessian.shape == (5, 12, 5, 12)
    torch.testing.assert_close(hessian, hessian.permute(2, 3, 0, 1), rtol=1e-3, atol=1e-5)
