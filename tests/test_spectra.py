"""What outlives a call: x's spectrum for the layers that read the same x, and w's for layers frozen for inference.

What is launched is counted under the kernels themselves, in Triton's interpreter or natively. Whatever is reused, every
result is held against the dense definition of what x and w are at the time of the call.
"""

import copy
import gc
import io
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import bench_package  # noqa: F401
import graph_memory
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import c3a_triton
from bench import launch_hooks
from c3a_triton import C3AConfig, C3ALinear, c3a_linear, circulant_linear
from c3a_triton.errors import BackendError
from c3a_triton.operator import spectra
from c3a_triton.operator.launch import fft, fft_bases, plans, specs

IN, OUT, B = 12, 8, 4


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins with empty slots, and leaves none that no living tensor accounts for. Any x is large enough."""
    spectra._slots.clear()
    monkeypatch.setattr(spectra, "LEAST_SHARED", 0)
    yield
    gc.collect()
    assert not spectra._slots


class Analyses(list[bool]):
    """The spectra that a test launches: whether of w, otherwise of x or dy."""

    def take(self) -> tuple[int, int]:
        """(of x or dy, of w) since the last time."""
        found = self.count(False), self.count(True)
        self.clear()
        return found


@pytest.fixture
def launches() -> Iterator[Analyses]:
    found = Analyses()

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.fn.__name__ == "spectra_kernel":
                found.extend(name == "w_ptr" for name in ("w_ptr", "x_ptr", "other_ptr") if kwargs[name] is not None)
            return run(self, *args, **kwargs)

        return counted

    with launch_hooks.caught(counting):
        yield found


def layer(device: torch.device, out_features: int = OUT, block_size: int = B, **options: Any) -> C3ALinear:
    base = nn.Linear(IN, out_features, bias=False).requires_grad_(False)
    return C3ALinear(base, "default", block_size, "gaussian", backend="fft", **options).to(device)


def qkv(device: torch.device) -> list[C3ALinear]:
    """Layers of the same input; k has fewer outputs, as with grouped queries."""
    return [layer(device), layer(device, OUT // 2), layer(device)]


def kernel(one: C3ALinear, name: str = "default") -> Tensor:
    return one.c3a_kernel[name].detach()


def right(one: C3ALinear, x: Tensor, y: Tensor) -> None:
    """y is what the layer gives of x as both are now."""
    w = oracle.dense(kernel(one)) + one.base_layer.weight.detach().cpu().double()
    oracle.assert_close(y, (x.detach().cpu().double() @ w.T).reshape(-1, w.shape[0]).view(y.shape), x.dtype)


def activation(device: torch.device, requires_grad: bool = False) -> Tensor:
    """As a model has it: three axes, and with gradients no leaf."""
    x = torch.randn(2, 5, IN, device=device)
    return x.requires_grad_() * 1 if requires_grad else x


# x: when a spectrum is shared


@pytest.mark.parametrize(("least", "shared"), [(0, True), (1, False)])
def test_a_small_x_is_transformed_by_each_of_its_layers(
    device: torch.device, launches: Analyses, monkeypatch: pytest.MonkeyPatch, least: int, shared: bool
) -> None:
    x = activation(device, requires_grad=True)
    monkeypatch.setattr(spectra, "LEAST_SHARED", x.nbytes + least)
    layers = qkv(device)
    ys = [one(x) for one in layers]
    assert launches.take() == (1 if shared else 3, 3)
    torch.autograd.grad(sum(y.sum() for y in ys), [one.c3a_kernel["default"] for one in layers])
    assert launches.take()[0] == (4 if shared else 6)


def test_layers_that_read_the_same_x_share_its_spectrum(device: torch.device, launches: Analyses) -> None:
    layers, x = qkv(device), activation(device, requires_grad=True)
    outputs = [one(x) for one in layers]
    assert launches.take() == (1, 3)
    for one, y in zip(layers, outputs, strict=True):
        right(one, x, y)
    dys = [torch.randn_like(y) for y in outputs]
    dx, *dws = torch.autograd.grad(outputs, (x, *(one.c3a_kernel["default"] for one in layers)), dys)
    assert launches.take() == (1 + 3, 3)
    for dw, dy in zip(dws, dys, strict=True):
        truth = oracle.weight_grad(dy.reshape(10, -1), x.detach().reshape(10, -1), B)
        oracle.assert_close(dw, truth, torch.float32)
    weights = [oracle.dense(kernel(one)) + one.base_layer.weight.cpu().double() for one in layers]
    oracle.assert_close(dx, sum(dy.cpu().double() @ w for dy, w in zip(dys, weights, strict=True)), torch.float32)


def test_without_gradients_too(device: torch.device, launches: Analyses) -> None:
    layers, x = qkv(device), activation(device)
    with torch.no_grad():
        for one in layers:
            right(one, x, one(x))
    assert launches.take() == (1, 3)


def test_gradients_of_kernels_alone_share_it(device: torch.device, launches: Analyses) -> None:
    layers, x = qkv(device), activation(device)  # as in a model's first layers, whose input wants no gradient
    sum(one(x).sum() for one in layers).backward()
    assert launches.take() == (1 + 1 + 3, 3)
    truth = oracle.weight_grad(torch.ones(10, OUT), x.view(10, IN), B)
    oracle.assert_close(layers[0].c3a_kernel["default"].grad, truth, torch.float32)


@torch.no_grad()
def test_adapters_that_are_summed_share_it(device: torch.device, launches: Analyses) -> None:
    layers, x = qkv(device), activation(device)
    for one in layers:
        one.update_layer("other", B, "gaussian")
        one.set_adapter(["default", "other"])
    weights = [
        oracle.dense(kernel(one)) + oracle.dense(kernel(one, "other")) + one.base_layer.weight.cpu().double()
        for one in layers
    ]
    for _ in range(3):  # the sums are new tensors every time, the layers are not
        x.data.normal_()
        for one, w in zip(layers, weights, strict=True):
            oracle.assert_close(one(x), x.cpu().double() @ w.T, torch.float32)
        assert launches.take() == (1, 3)


def test_block_sizes_have_spectra_of_their_own(device: torch.device, launches: Analyses) -> None:
    fine, coarse, x = layer(device, block_size=2), layer(device), activation(device)
    with torch.no_grad():
        for one in (fine, coarse, fine, coarse):
            right(one, x, one(x))
    assert launches.take() == (4, 4)


def test_a_spectrum_that_does_not_fit_the_scratch_is_not_kept(
    device: torch.device, launches: Analyses, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, x = qkv(device), torch.randn(300, IN, device=device)
    one_spectrum = 2 * 2 * (-(-300 * 3 // 128) * 128) * 4
    try:
        for scratch, analyses in ((2 * one_spectrum, 1), (2 * one_spectrum - 1, 3)):
            monkeypatch.setattr(specs, "scratch_bytes", lambda device, scratch=scratch: scratch)
            plans.clear_plans()
            with torch.no_grad():
                for one in layers:
                    right(one, x, one(x))
            assert launches.take() == (analyses, 3)
    finally:
        plans.clear_plans()


# x: when it is not


def in_place(x: Tensor) -> None:
    x.mul_(2)


def other_memory(x: Tensor) -> None:
    x.data = torch.randn_like(x)


def other_strides(x: Tensor) -> None:
    x.data = x.data.as_strided(x.shape, (IN, 2 * IN, 1))


@pytest.mark.parametrize("change", [in_place, other_memory, other_strides])
def test_x_changed_between_two_layers(device: torch.device, change: Callable[[Tensor], None]) -> None:
    (q, k, _), x = qkv(device), activation(device)
    with torch.no_grad():
        right(q, x, q(x))
        change(x)
        right(k, x, k(x))


def test_an_input_that_is_filled_again_behind_its_version(device: torch.device, launches: Analyses) -> None:
    # Through `.data`, by a kernel of the user's or by the replay of a graph that ends in x: no version counts it.
    layers, x = qkv(device), activation(device)
    with torch.no_grad():
        for _ in range(3):
            version = x._version
            x.data.normal_()
            assert x._version == version
            for one in layers:
                right(one, x, one(x))
    assert launches.take() == (3, 9)


def test_x_freed_and_another_at_its_address(device: torch.device) -> None:
    (q, k, _), memory = qkv(device), torch.randn(10, IN, device=device)
    with torch.no_grad():
        for _ in range(5):
            # A tensor of its own in the same memory: same address and version, and sooner or later the same id.
            x = torch.empty(0, device=device).set_(memory.untyped_storage(), 0, (10, IN))
            assert x._version == 1
            right(q, x, q(x))
            del x
            assert not spectra._slots
            memory.data.normal_()
            x = torch.empty(0, device=device).set_(memory.untyped_storage(), 0, (10, IN))
            right(k, x, k(x))
            del x


def test_views_and_casts_are_tensors_of_their_own(device: torch.device, launches: Analyses) -> None:
    (q, k, v), x = qkv(device), activation(device)
    with torch.no_grad():
        for one, same in zip((q, k, v), (x, x.detach(), x.view(10, IN)), strict=True):
            right(one, same, one(same))
        assert launches.take() == (3, 3)
        with torch.autocast(device.type, torch.bfloat16):
            for one in (q, k):
                oracle.assert_close(one(x).bfloat16(), reference(one, x), torch.bfloat16)
        assert launches.take() == (2, 2)


def reference(one: C3ALinear, x: Tensor) -> Tensor:
    return x.cpu().double() @ (oracle.dense(kernel(one)) + one.base_layer.weight.cpu().double()).T


def test_tensors_of_inference_mode_have_no_version(device: torch.device) -> None:
    (q, k, _) = qkv(device)
    with torch.inference_mode():
        x = activation(device)
        right(q, x, q(x))
        assert not spectra._slots
        x.mul_(2)
        right(k, x, k(x))


def test_compiled_code_and_captured_graphs_keep_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, IN, device=device)
    assert spectra._slot(x) is not None
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert spectra._slot(x) is None
    # What compiled code calls is the op, and it writes into its tensors again without counting versions.
    w = torch.randn(2, 3, B, device=device)
    torch.ops.c3a_triton.linear(x, None, None, [w], 1.0, False, "fft")
    assert not spectra._slots
    on_gpu: Any = SimpleNamespace(is_inference=lambda: False, is_cuda=True, get_device=lambda: 0)
    # Not in builds for the CPU.
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7 + index, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert spectra._slot(on_gpu) == (0, 7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert spectra._slot(on_gpu) is None


def test_without_a_place_everything_is_computed(
    device: torch.device, launches: Analyses, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, x = qkv(device), activation(device)
    for one in layers:
        one.freeze_for_inference()
    with torch.no_grad():
        for one in layers:
            one(x)
        launches.clear()
        monkeypatch.setattr(spectra, "_slot", lambda tensor: None)
        for one in layers:
            right(one, x, one(x))
            kernel(one).data.normal_()
            right(one, x, one(x))
    assert launches.take() == (6, 6)


def test_recomputation_in_the_backward(device: torch.device) -> None:
    layers = qkv(device)
    w = [one.c3a_kernel["default"] for one in layers]

    def block(x: Tensor) -> Tensor:
        h = x * 1
        return torch.cat([one(h) for one in layers], dim=-1).square().sum()

    x = torch.randn(10, IN, device=device, requires_grad=True)
    plain = torch.autograd.grad(block(x), (x, *w))
    for reentrant in (True, False):
        block_of_x = checkpoint(block, x, use_reentrant=reentrant)
        if reentrant:  # which does not work with autograd.grad
            block_of_x.backward()
            found = (x.grad, *(one.grad for one in w))
        else:
            found = torch.autograd.grad(block_of_x, (x, *w))
        for grad, expected in zip(found, plain, strict=True):
            torch.testing.assert_close(grad, expected)


# x: for how long


def test_x_is_not_kept_alive(device: torch.device) -> None:
    q, x = layer(device), activation(device)
    with torch.no_grad():
        q(x)
    assert len(spectra._slots) == 1
    death, (entry,) = weakref.ref(x), spectra._slots.values()
    spectrum = weakref.ref(entry.spectrum)
    del x, entry
    assert death() is None
    assert spectrum() is None
    assert not spectra._slots


def test_nothing_but_x_is_kept_for_the_backward(device: torch.device) -> None:
    layers, x = qkv(device), activation(device, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [one(x) for one in layers]
    known = [x] + [t for one in layers for t in (one.base_layer.weight, one.c3a_kernel["default"])]
    addresses = {t.untyped_storage().data_ptr() for t in known}
    assert {t.untyped_storage().data_ptr() for t in saved} <= addresses
    # One spectrum at most, whatever the number of layers, and gone with the graph that keeps x.
    assert len(spectra._slots) == 1
    saved.clear()
    del known, x, outputs
    assert not spectra._slots


def test_the_end_of_a_backward_pass_empties_the_slot(device: torch.device) -> None:
    layers, x = qkv(device), activation(device, requires_grad=True)
    seen = []
    for _ in range(2):
        hidden = x * 1
        hidden.register_hook(lambda grad: seen.append(len(spectra._slots)))
        y = sum(one(hidden).sum() for one in layers)
        torch.autograd.grad(y, x)
        assert not spectra._slots
    assert seen == [1, 1]


def test_the_next_spectrum_takes_the_slot(device: torch.device) -> None:
    q, x, other = layer(device), activation(device), activation(device)
    with torch.no_grad():
        q(x)
        (first,) = spectra._slots.values()
        spectrum = weakref.ref(first.spectrum)
        del first
        # Before memory for another one is asked for: never two at a time.
        found, keep = spectra.of_input((other, kernel(q)), "none")
        assert found is None
        assert keep is not None
        assert not spectra._slots
        q(other)
    (second,) = spectra._slots.values()
    assert second.x() is other
    assert spectrum() is None
    del other, x


def test_threads_that_share_a_slot() -> None:
    # The interpreter itself takes one thread: this is about the slot, with computations that any thread can do.
    tensors = [torch.full((4,), float(i)) for i in range(4)]
    wrong, start = [], threading.Barrier(4)

    def work(i: int) -> None:
        readers = [torch.zeros(1) for _ in range(3)]
        start.wait()
        for step in range(400):
            x = tensors[(i + step // 8) % 4]
            for w in readers:
                spectrum, keep = spectra.of_input((x, w), "sum")
                if spectrum is None:
                    spectrum = x * 2
                    keep(spectrum)
                if not torch.equal(spectrum, x * 2):
                    wrong.append((i, step))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    tensors.clear()


@pytest.mark.gpu
def test_streams_have_slots_of_their_own(launches: Analyses) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    (q, k, v), x = qkv(device), activation(device)
    side = torch.cuda.Stream()
    with torch.no_grad():
        right(q, x, q(x))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            right(k, x, k(x))
        right(v, x, v(x))
    assert launches.take() == (2, 3)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_a_graph_replayed_after_w_changed(frozen: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    layers, x = qkv(device), activation(device)
    with torch.no_grad():
        for one in layers:
            one.freeze_for_inference(frozen)
            one(x)  # compiles, and leaves a spectrum behind that the graph must not read
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [one(x) for one in layers]
        for _ in range(2):
            x.data.normal_()
            for one in layers:
                kernel(one).data.normal_()
            graph.replay()
            torch.cuda.synchronize()
            for one, y in zip(layers, outputs, strict=True):
                right(one, x, y)


# w: recomputed unless it is frozen


@torch.no_grad()
def test_w_is_transformed_in_every_call(device: torch.device, launches: Analyses) -> None:
    q, x = layer(device), activation(device)
    q.eval().requires_grad_(False)
    for _ in range(2):
        right(q, x, q(x))
        w = kernel(q)
        version, address = w._version, w.data_ptr()
        w.data.normal_()
        assert (w._version, w.data_ptr()) == (version, address)
    right(q, x, q(x))
    assert launches.take()[1] == 3


@torch.no_grad()
def test_a_frozen_w_is_transformed_once(device: torch.device, launches: Analyses) -> None:
    q, x = layer(device), activation(device)
    before = q(x)
    launches.clear()
    q.freeze_for_inference()
    assert not any(kernel.requires_grad for kernel in q.c3a_kernel.values())
    assert all(torch.equal(q(x), before) for _ in range(3))
    assert launches.take()[1] == 1
    with torch.enable_grad():  # of an input in front of it
        inputs = x.clone().requires_grad_()
        torch.autograd.grad(q(inputs).sum(), inputs)
        torch.autograd.grad(q(inputs).sum(), inputs)
    assert launches.take()[1] == 1  # that of the transposed product
    q.freeze_for_inference(False)
    assert torch.equal(q(x), before)
    assert launches.take()[1] == 1
    assert not len(spectra._frozen)


@torch.no_grad()
def test_who_writes_through_data_freezes_again(device: torch.device) -> None:
    q, x = layer(device), activation(device)
    q.freeze_for_inference()
    before = q(x)
    kernel(q).data.mul_(2)
    assert torch.equal(q(x), before)  # the documented duty: nothing tells
    q.freeze_for_inference()
    right(q, x, q(x))


def reset(one: C3ALinear) -> None:
    one.reset_c3a_parameters("default", "gaussian")


def replace(one: C3ALinear) -> None:
    one.update_layer("default", B, "gaussian")


def delete(one: C3ALinear) -> None:
    one.delete_adapter("default")
    one.update_layer("default", B, "gaussian")
    one.set_adapter("default")


def rename(one: C3ALinear) -> None:
    one.rename_adapter("default", "old")
    one.update_layer("default", B, "gaussian")
    one.set_adapter("default")


def switch(one: C3ALinear) -> None:
    one.update_layer("other", B, "gaussian")
    one.set_adapter("other", inference_mode=True)
    one.c3a_kernel["default"].data.normal_()
    one.set_adapter("default", inference_mode=True)


def merge(one: C3ALinear) -> None:
    one.merge()
    one.c3a_kernel["default"].data.normal_()
    one.unmerge()


def disable(one: C3ALinear) -> None:
    one.enable_adapters(False)
    one.c3a_kernel["default"].data.normal_()
    one.enable_adapters(True)


def load(one: C3ALinear) -> None:
    one.load_state_dict({name: torch.randn_like(value) for name, value in one.state_dict().items()})


def assign(one: C3ALinear) -> None:
    state = {name: torch.randn_like(value) for name, value in one.state_dict().items()}
    one.load_state_dict(state, assign=True)


def cast(one: C3ALinear) -> None:
    one.half().float()


def write(one: C3ALinear) -> None:
    one.c3a_kernel["default"].normal_()


def write_data(one: C3ALinear) -> None:
    one.c3a_kernel["default"].data = torch.randn_like(one.c3a_kernel["default"])


def exchange(one: C3ALinear) -> None:
    one.c3a_kernel["default"] = nn.Parameter(torch.randn_like(one.c3a_kernel["default"]))


def train(one: C3ALinear) -> None:
    w = one.c3a_kernel["default"].requires_grad_()
    with torch.enable_grad():
        one(torch.randn(3, IN, device=w.device)).square().sum().backward()
    w.data.sub_(w.grad, alpha=0.1)  # as an optimizer whose writes no version counts
    w.requires_grad_(False)


CHANGES = [
    reset,
    replace,
    delete,
    rename,
    switch,
    merge,
    disable,
    load,
    assign,
    cast,
    write,
    write_data,
    exchange,
    train,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_writes_w_drops_what_is_kept(device: torch.device, change: Callable[[C3ALinear], None]) -> None:
    q, x = layer(device), activation(device)
    q.freeze_for_inference()
    before = q(x)
    change(q)
    after = q(x)
    right(q, x, after)
    assert not torch.equal(after, before)


@torch.no_grad()
def test_functional_calls_and_copies_are_not_frozen(device: torch.device, launches: Analyses) -> None:
    q, x = layer(device), activation(device)
    q.freeze_for_inference()
    before = q(x)
    launches.clear()
    other = {"c3a_kernel.default": torch.randn_like(q.c3a_kernel["default"])}
    for _ in range(2):
        y = torch.func.functional_call(q, other, (x,))
        w = oracle.dense(other["c3a_kernel.default"]) + q.base_layer.weight.cpu().double()
        oracle.assert_close(y, x.cpu().double() @ w.T, torch.float32)
        other["c3a_kernel.default"].data.normal_()
    assert torch.equal(q(x), before)
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(q), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), before)
        kernel(copied).data.normal_()
        right(copied, x, copied(x))
    assert torch.equal(q(x), before)


@torch.no_grad()
def test_what_is_kept_dies_with_w(device: torch.device) -> None:
    q, x = layer(device), activation(device)
    q.freeze_for_inference()
    q(x)
    (kept,) = spectra._frozen.values()
    ((_, spectrum),) = kept.values()
    death = weakref.ref(spectrum)
    del q, kept, spectrum
    gc.collect()
    assert death() is None
    assert not len(spectra._frozen)


@torch.no_grad()
def test_a_model_is_frozen_through_its_manager(device: torch.device, launches: Analyses, tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN)).to(device)
    c3a_triton.apply(model, C3AConfig(block_size=B, target_modules=["0", "1"], init_weights="gaussian"), backend="fft")
    model.c3a.save_pretrained(tmp_path)
    x = torch.randn(5, IN, device=device)
    before = model(x)
    model.c3a.freeze_for_inference()
    launches.clear()
    assert all(torch.equal(model(x), before) for _ in range(2))
    assert launches.take()[1] == 2
    # An adapter that is loaded replaces nothing that is kept, and is not frozen itself.
    for _, one in model.c3a.layers():
        one.reset_c3a_parameters("default", "gaussian")
    assert not torch.equal(model(x), before)
    model.c3a.load_adapter(tmp_path, "saved")
    model.c3a.set_adapter("saved", inference_mode=True)
    launches.clear()
    assert all(torch.equal(model(x), before) for _ in range(2))
    assert launches.take()[1] == 4
    model.c3a.freeze_for_inference()
    model.c3a.freeze_for_inference(False)
    assert not len(spectra._frozen)


class Parallel(nn.Module):
    """Layers of the same input."""

    def __init__(self, layers: list[C3ALinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [one(x) for one in self.layers]


def test_an_optimizer_step_under_fully_shard(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """FSDP2 gathers w into the same tensor object, of the same version, in every forward."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    seen = []
    of_weight = spectra.of_weight

    def recording(w: Tensor, *args: Any) -> Any:
        seen.append((w, w._version))
        return of_weight(w, *args)

    monkeypatch.setattr(spectra, "of_weight", recording)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh(device.type, (1,))
        model = Parallel(qkv(device))
        layers: Any = list(model.layers)
        for module in (*layers, model):
            fully_shard(module, mesh=mesh)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        x, before = activation(device), None
        for _ in range(3):
            weights = [
                oracle.dense(kernel(one).full_tensor()) + one.base_layer.weight.full_tensor().cpu().double()
                for one in layers
            ]
            outputs = model(x)
            for w, y in zip(weights, outputs, strict=True):
                oracle.assert_close(y, x.cpu().double() @ w.T, torch.float32)
            assert before is None or not torch.equal(outputs[0], before)
            before = outputs[0].detach()
            sum(y.square().sum() for y in outputs).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len({(id(w), version) for w, version in seen}) == len(layers)
    finally:
        dist.destroy_process_group()


def test_a_single_call_shares_with_the_next(device: torch.device, launches: Analyses) -> None:
    x, w, other = activation(device), torch.randn(2, 3, B, device=device), torch.randn(4, 3, B, device=device)
    for kernels in (w, other):
        y = circulant_linear(x, kernels, backend="fft")
        oracle.assert_close(y.view(10, -1), oracle.product(x.view(10, IN), kernels), torch.float32)
    assert launches.take() == (1, 2)


# x's spectrum in the place of x

LARGE_B, LARGE_IN = 32, 96


def saving(device: torch.device, block_size: int = LARGE_B, out_features: int = 64, **options: Any) -> C3ALinear:
    base = nn.Linear(LARGE_IN, out_features, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    one = C3ALinear(base, "default", block_size, "gaussian", backend="fft", **options).to(device)
    one.save_spectrum = True
    return one


def wide_activation(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, 5, LARGE_IN, device=device, dtype=dtype, requires_grad=True)


def check_gradients(one: C3ALinear, x: Tensor, y: Tensor) -> None:
    """dx and dw of y, of what x was when y was computed."""
    rows, dy = x.detach().view(10, -1).clone(), torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, one.c3a_kernel["default"]), dy, retain_graph=True)
    weight = oracle.dense(kernel(one)) + one.base_layer.weight.detach().cpu().double()
    oracle.assert_close(dx.view(10, -1), dy.view(10, -1).cpu().double() @ weight, torch.bfloat16)
    truth = oracle.weight_grad(dy.view(10, -1), rows, one.block_size["default"])
    oracle.assert_close(dw, truth, torch.float32, bound=oracle.BOUNDS[torch.bfloat16])


def saved_by(call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What a call returns, and what autograd saves for its backward."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), saved


def test_the_spectrum_is_saved_in_the_place_of_x(device: torch.device, launches: Analyses) -> None:
    one, x = saving(device), wide_activation(device)
    y, saved = saved_by(lambda: one(x))
    assert launches.take() == (1, 1)
    right(one, x, y)
    assert not any(tensor.shape == x.shape for tensor in saved)
    (spectrum,) = (tensor for tensor in saved if tensor.dtype == torch.bfloat16 and tensor is not one.base_layer.weight)
    assert spectrum.nbytes == -(-10 * 3 // 128) * 128 * LARGE_B * 2  # x's bytes, but for rows of padding
    check_gradients(one, x, y)
    assert launches.take() == (1, 1)  # of dy and w alone
    wanted = (x, one.c3a_kernel["default"])
    found = torch.autograd.grad(y, wanted, torch.ones_like(y))
    one.save_spectrum = False
    assert all(map(torch.equal, found, torch.autograd.grad(one(x), wanted, torch.ones_like(y))))


def test_layers_that_share_a_spectrum_save_one(device: torch.device, launches: Analyses) -> None:
    layers, x = [saving(device), saving(device, out_features=32)], wide_activation(device)
    outputs, saved = zip(*(saved_by(lambda one=one: one(x)) for one in layers), strict=True)
    assert launches.take() == (1, 2)
    first, second = (
        {t.data_ptr() for t in tensors if t.dim() == 2 and t.shape[0] == LARGE_B // 2} for tensors in saved
    )
    assert first == second
    assert len(first) == 1
    for one, y in zip(layers, outputs, strict=True):
        check_gradients(one, x, y)
    assert launches.take() == (2, 2)


def test_a_saved_spectrum_is_of_what_x_was(device: torch.device) -> None:
    one, leaf = saving(device), wide_activation(device)
    x = leaf * 1
    before = x.detach().clone()
    y = one(x)
    x.mul_(3)  # x itself, saved, would make the backward an error
    dy = torch.randn_like(y)
    (dw,) = torch.autograd.grad(y, one.c3a_kernel["default"], dy)
    truth = oracle.weight_grad(dy.view(10, -1), before.view(10, -1), LARGE_B)
    oracle.assert_close(dw, truth, torch.float32, bound=oracle.BOUNDS[torch.bfloat16])


def test_gradients_of_kernels_alone_come_from_it(device: torch.device, launches: Analyses) -> None:
    one, x = saving(device), wide_activation(device).detach()
    one.update_layer("other", LARGE_B, "gaussian")
    one.set_adapter(["default", "other"])
    y = one(x)
    launches.clear()
    dy = torch.randn_like(y)
    dws = torch.autograd.grad(y, [one.c3a_kernel[name] for name in ("default", "other")], dy)
    assert launches.take() == (1, 0)
    truth = oracle.weight_grad(dy.view(10, -1), x.view(10, -1), LARGE_B)
    for dw in dws:
        oracle.assert_close(dw, truth, torch.float32, bound=oracle.BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("reason", ["float32", "small blocks", "two block sizes", "a trained weight", "direct"])
def test_where_it_cannot_stand_for_x_x_is_saved(device: torch.device, reason: str) -> None:
    one, x = saving(device, block_size=16 if reason == "small blocks" else LARGE_B), wide_activation(device)
    if reason == "float32":
        one, x = one.float(), wide_activation(device, torch.float32)
    if reason == "two block sizes":
        one.update_layer("other", 16, "gaussian")
        one.set_adapter(["default", "other"])
    if reason == "a trained weight":
        one.base_layer.weight.requires_grad_()
    if reason == "direct":
        saving(device)(x)  # leaves the spectrum of x
        one.backend = reason
    y, saved = saved_by(lambda: one(x))
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)
    if reason in ("small blocks", "direct"):
        check_gradients(one, x, y)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize(
    ("backend", "dtype"), [("fold", torch.float32), ("torch", torch.float32), ("torch", torch.float64)]
)
def test_other_backends_compute_their_own_gradients(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    one, x = saving(device), wide_activation(device)
    w = one.c3a_kernel["default"].detach().to(dtype).requires_grad_()
    dy = torch.randn(2, 5, 64, device=device).bfloat16()

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        y = c3a_linear(x, one.base_layer.weight, None, [w], backend=backend, save_spectrum=True)
        return torch.autograd.grad(y, (x, w), dy)

    expected = gradients(x)
    one(x)  # leaves the spectrum of x
    assert all(map(torch.equal, gradients(x), expected))


def test_a_second_derivative_is_refused_by_name(device: torch.device) -> None:
    one, x = saving(device), wide_activation(device)
    with pytest.raises(
        BackendError, match=r"create_graph=True: a second derivative needs x.*save_spectra\(save=False\)"
    ):
        torch.autograd.grad(one(x).sum(), x, create_graph=True)
    one.save_spectrum = False
    (dx,) = torch.autograd.grad(one(x).float().square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(dx.float().square().sum(), one.c3a_kernel["default"])
    assert torch.isfinite(twice).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_saved_spectrum_under_checkpointing(device: torch.device, use_reentrant: bool) -> None:
    one, x = saving(device), wide_activation(device)
    y = checkpoint(one, x, use_reentrant=use_reentrant)
    right(one, x, y)
    dy = torch.randn_like(y)
    y.backward(dy)
    truth = oracle.weight_grad(dy.view(10, -1), x.detach().view(10, -1), LARGE_B)
    oracle.assert_close(one.c3a_kernel["default"].grad, truth, torch.float32, bound=oracle.BOUNDS[torch.bfloat16])


def test_saving_is_chosen_through_the_manager(device: torch.device) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Conv2d(4, 4, 1)

    model = c3a_triton.apply(Two(), C3AConfig(block_size=4, target_modules=["first", "second"]))
    model.c3a.save_spectra()
    assert model.first.save_spectrum
    model.c3a.save_spectra("first", save=False)
    assert not model.first.save_spectrum
    with pytest.raises(BackendError, match="second is a conv2d layer"):
        model.c3a.save_spectra("second")
    with pytest.raises(c3a_triton.ConfigError, match="no adapted layer is named 'frist'.*first"):
        model.c3a.save_spectra("frist")
    with pytest.raises(c3a_triton.ConfigError, match=r"say save_spectra\(save=False\)"):
        model.c3a.save_spectra(False)


# In which memory it lies


def test_what_is_kept_lies_in_no_graph_s_memory(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("stand-ins on a CPU; test_compile.py has graphs")
    q, x = layer(device), activation(device)
    q.freeze_for_inference()
    fft_bases._basis.cache_clear()
    plans.clear_plans()
    with graph_memory.on_cpu(), graph_memory.GraphMemory() as memory, torch.no_grad():
        y = q(x)
    right(q, x, y)
    ((_, kept),) = spectra._frozen[q.c3a_kernel["default"]].values()
    basis = fft_bases.transform(device, x.dtype, B, specs.precision(x.dtype, "tf32")).basis
    assert y in memory
    assert [tensor in memory for tensor in (kept, basis.inverse, basis.forward)] == [False] * 3
    # Under inference mode too: what is kept serves calls that have gradients.
    fft_bases._basis.cache_clear()
    plans.clear_plans()
    with torch.inference_mode():
        q(x)
    assert not fft_bases.transform(device, x.dtype, B, "tf32x3").basis.forward.is_inference()


def test_an_error_comes_back_from_where_memory_is_allocated() -> None:
    def fail() -> Tensor:
        raise torch.OutOfMemoryError("here")

    with graph_memory.on_cpu(), pytest.raises(torch.OutOfMemoryError, match="here"):
        spectra.lasting(fail, torch.device("cpu"), "nothing")


def test_a_graph_that_is_captured_too_early_says_what_to_do(device: torch.device) -> None:
    x, w = torch.randn(3, IN, device=device), torch.randn(2, 3, B, device=device)
    fft_bases._basis.cache_clear()
    plans.clear_plans()
    with graph_memory.on_cpu() as capturing:
        capturing.on = True
        for _ in range(2):
            with pytest.raises(BackendError, match=f"DFT basis of length {B} is missing.*same call once before"):
                fft.fft_product(x, w, scale=1.0)
        capturing.on = False
        fft.fft_product(x, w, scale=1.0)
        capturing.on = True
        oracle.assert_close(fft.fft_product(x, w, scale=1.0), oracle.product(x, w, 1.0), torch.float32)
