"""Batches whose rows have adapters of their own: kernels, ops, layers, models."""

import copy
import gc
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import bench_package  # noqa: F401
import graph_memory
import oracle
import pytest
import torch
from scripts import run_example
from tiny_models import IDS, MLP, llama, llama_classifier, logits
from torch import Tensor, nn

import c3a_triton
from bench import launch_hooks
from c3a_triton import C3AConfig, C3ALinear
from c3a_triton.errors import AdapterNotFoundError, AdapterStateError, BackendError, ShapeError
from c3a_triton.operator.launch import grouped
from c3a_triton.operator.rows import c3a_linear_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (in, out, block size of each adapter): several sizes in one batch, odd ones, 1, and one as wide as the layer.
SHAPES = ((48, 36, (12, 3, 12, 1)), (64, 32, (32, 16, 8, 32)), (30, 20, (5, 10, 5, 2)), (40, 40, (40, 20)))
# (tokens per row, adapter of each row; −1: none), few tokens per adapter and many.
BATCHES = ((1, (1, -1, 0, -1, 1, 0)), (3, (1, 1, 0)), (70, (1, 0, -1, 0)), (40, (1, 1, 1)))


def make_kernels(in_features: int, out_features: int, sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    return [torch.randn(out_features // b, in_features // b, b, device=device) for b in sizes]


def expected(x: Tensor, kernels: list[Tensor], rows: tuple[int, ...], transpose: bool = False) -> Tensor:
    """Row by row by the dense definition, scale 1 / in_features, for x [rows, t, features]."""
    product = oracle.input_grad if transpose else oracle.product
    return torch.stack([product(row, kernels[a]) * (a >= 0) for row, a in zip(x, rows, strict=True)])


# Every shape, and every dtype at sizes that Triton's tiles divide and do not.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), *((s, dtype) for s in SHAPES[:2] for dtype in DTYPES[1:])],
    ids=lambda value: (
        str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else "x".join(map(str, value[:2]))
    ),
)
@pytest.mark.usefixtures("nan_filled")
def test_grouped_product(device: torch.device, dtype: torch.dtype, shape: tuple) -> None:
    in_features, out_features, sizes = shape
    kernels = make_kernels(in_features, out_features, sizes, device)
    for i, (tokens, rows) in enumerate(BATCHES):
        rows = tuple(a if a < 1 else len(sizes) - a for a in rows)
        for transpose in (False, True):
            widths = (out_features, in_features) if transpose else (in_features, out_features)
            x = torch.randn(len(rows) * tokens, widths[0] + 3, device=device).to(dtype)[:, 1:-2]
            bias = torch.randn(widths[1], device=device).to(dtype) if i % 2 else None
            y = grouped.grouped_product(x, kernels, rows, scale=1 / in_features, transpose=transpose, bias=bias)
            ref = expected(x.reshape(len(rows), tokens, -1), kernels, rows, transpose).flatten(0, 1)
            oracle.assert_close(y, ref if bias is None else ref + bias.cpu().double(), dtype)


def test_many_rows_of_one_token_each(device: torch.device) -> None:
    # More tokens than SMALL_T, each with another adapter: still the kernel for few tokens, whole sums per program.
    kernels = make_kernels(32, 32, (16,) * 40, device)
    rows = tuple(torch.randperm(40).tolist())
    x = torch.randn(40, 32, device=device)
    y = grouped.grouped_product(x, kernels, rows, scale=1 / 32)
    oracle.assert_close(y, expected(x[:, None], kernels, rows)[:, 0], torch.float32)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.usefixtures("nan_filled")
def test_few_tokens_split_their_sums(device: torch.device, transpose: bool) -> None:
    kernels, rows = make_kernels(320, 320, (80, 20), device), (1, -1, 0)
    x, bias = torch.randn(3, 320, device=device), torch.randn(320, device=device)
    y = grouped.grouped_product(x, kernels, rows, scale=1 / 320, transpose=transpose, bias=bias)
    ref = expected(x[:, None], kernels, rows, transpose)[:, 0] + bias.cpu().double()
    oracle.assert_close(y, ref, torch.float32)


def test_kernels_at_any_address(device: torch.device) -> None:
    # A view into a flat buffer begins where it likes, and a transposed one has its blocks elsewhere.
    flat = torch.randn(4 * 4 * 8 + 1, device=device)
    kernels = [flat[1:].view(4, 4, 8), torch.randn(4, 4, 8, device=device).transpose(0, 1)]
    assert kernels[0].data_ptr() % 16
    x = torch.randn(2, 32, device=device)
    y = grouped.grouped_product(x, kernels, (1, 0), scale=1 / 32)
    oracle.assert_close(y, expected(x[:, None], kernels, (1, 0))[:, 0], torch.float32)


def uncopied(shape: tuple[int, int, int], kind: str) -> Tensor:
    """A w that kernels cannot read where it lies."""
    m, n, b = shape
    if kind == "unaligned":
        return torch.randn(m * n * b + 1)[1:].view(shape)
    return torch.randn(shape).half() if kind == "16 bits" else torch.randn(n, m, b).transpose(0, 1)


@pytest.fixture
def graphs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[graph_memory.Capturing]:
    if device.type == "cuda":
        pytest.skip("stand-ins on a CPU; test_compile.py has graphs")
    monkeypatch.setattr(grouped, "_tables", {})
    monkeypatch.setattr(grouped, "_captured", {})
    with graph_memory.on_cpu() as capturing:
        yield capturing


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("kind", ["unaligned", "transposed", "16 bits"])
def test_a_graph_finds_what_a_call_before_has_copied(graphs: graph_memory.Capturing, kind: str, tokens: int) -> None:
    """At the same addresses, with the values of now; and none of it in the graph's own memory."""
    kernels, rows = [uncopied((2, 4, 8), kind), torch.randn(2, 4, 8)], (1, -1, 0)
    x = torch.randn(3 * tokens, 32)

    def check() -> Tensor:
        y = grouped.grouped_product(x, kernels, rows, scale=1 / 32)
        ref = expected(x.view(3, tokens, 32), [w.float() for w in kernels], rows).flatten(0, 1)
        oracle.assert_close(y, ref, torch.float32)
        return y

    graphs.on = True
    with pytest.raises(BackendError, match="copy of a kernel is missing.*same call once before"):
        check()
    graphs.on = False
    with graph_memory.GraphMemory() as memory:
        assert check() in memory
    kept = [table.values for table in grouped._tables.values()] + [grouped._copies[kernels[0]]]
    assert [tensor in memory for tensor in kept] == [False] * len(kept)
    before = dict(grouped._tables)
    graphs.on = True
    kernels[0].data.normal_()
    check()
    assert grouped._captured == grouped._tables == before
    copies = len(grouped._copies)
    kernels.clear()
    gc.collect()
    assert len(grouped._copies) == copies - 1  # held no longer than w


def test_a_mixed_batch_that_is_captured_too_early_says_what_to_do(graphs: graph_memory.Capturing) -> None:
    x, kernels = torch.randn(2, 32), [torch.randn(2, 4, 8)]
    graphs.on = True
    with pytest.raises(BackendError, match="mixed batch's table is missing.*same call once before"):
        grouped.grouped_product(x, kernels, (0, -1), scale=1.0)
    assert not grouped._tables


def test_a_copy_follows_its_kernel(device: torch.device) -> None:
    """Made under inference mode, it serves later calls too; and never values or shapes that w no longer has."""
    w, x = torch.randn(2, 4, 9, device=device)[..., :8], torch.randn(2, 32, device=device)
    with torch.inference_mode():
        grouped.grouped_product(x, [w], (0, 0), scale=1.0)
    for changed in (
        w,
        torch.randn(2, 4, 9, device=device)[..., :8],
        torch.randn(4, 4, 8, device=device).transpose(0, 1),
        torch.randn(2, 4, 9, device=device)[..., 1:],
    ):
        w.data = changed
        y = grouped.grouped_product(x, [w.requires_grad_()], (0, 0), scale=1.0)
        oracle.assert_close(y, oracle.product(x, w.detach(), 1.0), torch.float32)
        assert not y.requires_grad


def test_no_tokens(device: torch.device) -> None:
    x, w = torch.empty(0, 8, device=device), torch.ones(3, 2, 4, device=device)
    y = grouped.grouped_product(x, [w], [0, -1], scale=1.0)
    assert y.shape == (0, 12)


def test_operands_that_do_not_fit(device: torch.device) -> None:
    x, w = torch.randn(4, 8, device=device), torch.randn(3, 2, 4, device=device)
    for bad in (
        lambda: grouped.grouped_product(x, [w], [0, 0, 0], scale=1.0),
        lambda: grouped.grouped_product(x, [w], [0, 1], scale=1.0),
        lambda: grouped.grouped_product(x, [w], [-1, -1], scale=1.0),
        lambda: grouped.grouped_product(x, [w], [], scale=1.0),
        lambda: grouped.grouped_product(x, [w, torch.ones(2, 4, 2, device=device)], [0, 1], scale=1.0),
        lambda: grouped.grouped_product(x, [w], [0, 0], scale=1.0, transpose=True),
        lambda: grouped.grouped_product(x, [w], [0, 0], scale=1.0, bias=x[0]),
        lambda: grouped.grouped_product(x.double(), [w], [0, 0], scale=1.0),
        lambda: c3a_linear_rows(x, None, None, [w], [0, 0]),
        lambda: c3a_linear_rows(x, None, None, [w], [0, 0, 1, 0]),
        lambda: c3a_linear_rows(x, None, None, [w], [0, 0, -2, 0]),
        lambda: c3a_linear_rows(x, None, None, [], [-1] * 4),
        lambda: c3a_linear_rows(x[0], None, None, [w], [0] * 8),
    ):
        with pytest.raises(ShapeError):
            bad()
    with pytest.raises(BackendError, match="fold"):
        c3a_linear_rows(x, None, None, [w], [0] * 4, backend="fold")


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("n_adapters", [2, 9])
def test_one_launch_per_block_size(device: torch.device, tokens: int, n_adapters: int) -> None:
    kernels = make_kernels(16, 16, tuple((8, 4)[i % 2] for i in range(n_adapters)), device)
    x, weight = torch.randn(n_adapters + 1, tokens, 16, device=device), torch.randn(16, 16, device=device)
    with torch.no_grad(), launch_hooks.noted() as names:
        c3a_linear_rows(x, weight, None, kernels, range(-1, n_adapters), backend="direct")
    kernel = "grouped_hankel_kernel" if tokens == 1 else "grouped_product_kernel"
    assert names == [kernel, kernel]


BACKENDS = ("torch", "reference", "direct", "fft", "expand")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "alone"])
def test_values_and_gradients(device: torch.device, backend: str, fused: bool) -> None:
    in_features, out_features, rows = 24, 18, (2, -1, 0, 2)
    kernels = [w.requires_grad_() for w in make_kernels(in_features, out_features, (3, 2, 6), device)]
    kernels[0].requires_grad_(False)
    x = torch.randn(4, 3, in_features, device=device, requires_grad=True)
    weight = torch.randn(out_features, in_features, device=device, requires_grad=True) if fused else None
    bias = torch.randn(out_features, device=device, requires_grad=True) if fused else None
    y = c3a_linear_rows(x, weight, bias, kernels, rows, backend=backend)
    dy = torch.randn_like(y)
    y.backward(dy)
    base = oracle.product(x, weight[..., None], 1.0) + bias.cpu().double() if fused else 0
    oracle.assert_close(y, expected(x, kernels, rows) + base, torch.float32)
    base = oracle.input_grad(dy, weight[..., None], 1.0) if fused else 0
    oracle.assert_close(x.grad, expected(dy, kernels, rows, transpose=True) + base, torch.float32)
    assert kernels[0].grad is None
    assert torch.equal(kernels[1].grad, torch.zeros_like(kernels[1]))  # no row had it
    mine = [0, 3]
    oracle.assert_close(kernels[2].grad, oracle.weight_grad(dy[mine], x[mine], 6), torch.float32)
    if fused:
        dense = torch.einsum("rto,rti->oi", dy.cpu().double(), x.detach().cpu().double())
        oracle.assert_close(weight.grad, dense, torch.float32)
        oracle.assert_close(bias.grad, dy.cpu().double().sum((0, 1)), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(c3a_linear_rows(x, weight, bias, kernels, rows, backend=backend), y)


def test_derivatives_of_any_order() -> None:
    kernels = [torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    x = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 9, dtype=torch.float64)

    def f(x: Tensor, *kernels: Tensor) -> Tensor:
        return c3a_linear_rows(x, weight, None, kernels, (1, -1, 0))

    assert torch.autograd.gradcheck(f, (x, *kernels))
    assert torch.autograd.gradgradcheck(f, (x, *kernels))


def test_under_torch_func() -> None:
    kernels = [torch.randn(2, 3, 3) for _ in range(2)]
    x, rows = torch.randn(4, 9), (1, -1, 0, 1)

    def loss(x: Tensor, *kernels: Tensor) -> Tensor:
        return c3a_linear_rows(x, None, None, kernels, rows).square().sum()

    inputs = [t.clone().requires_grad_() for t in (x, *kernels)]
    loss(*inputs).backward()
    for grad, leaf in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x, *kernels), inputs, strict=True):
        torch.testing.assert_close(grad, leaf.grad)
    batched = torch.vmap(lambda x: c3a_linear_rows(x, None, None, kernels, rows))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[1], 2 * batched[0])


def test_registered_as_torch_asks() -> None:
    kernels = [torch.randn(2, 3, 3, requires_grad=True), torch.randn(3, 9, 2)[:, :, :1].repeat(2, 1, 1)]
    rows = torch.tensor([1, -1, 0, 1])
    args = (torch.randn(4, 9, requires_grad=True), None, None, kernels, rows, 0.1, False, "torch")
    torch.library.opcheck(torch.ops.c3a_triton.linear_rows.default, args)
    dy, x = torch.randn(4, 6, requires_grad=True), torch.randn(4, 9)
    torch.library.opcheck(
        torch.ops.c3a_triton.weight_grad_rows.default, (dy, x, [3, 1], rows, 0.1, torch.float32, "torch")
    )


def adapted_layer(dtype: torch.dtype = torch.float32, **block_sizes: int) -> C3ALinear:
    (first, b), *others = block_sizes.items()
    layer = C3ALinear(nn.Linear(24, 12, dtype=dtype), first, b, layer_name="model.fc")
    for name, b in others:
        layer.update_layer(name, b)
    return layer


def by_row(layer: C3ALinear, x: Tensor, names: list[str]) -> Tensor:
    """Each row by itself, in float64, with the adapter of its name."""
    weight, bias = layer.weight.detach().cpu().double(), layer.bias.detach().cpu().double()
    rows = []
    for row, name in zip(x.detach().cpu().double(), names, strict=True):
        rows.append(row @ weight.T + bias)
        if name in layer.c3a_kernel:
            rows[-1] += oracle.product(row, layer.c3a_kernel[name])
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["auto", "direct", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_layer(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    layer, x = adapted_layer(dtype, a=3, b=1, c=12, d=4).to(device), torch.randn(6, 2, 24).to(device, dtype)
    names = ["d", "__base__", "a", "c", "elsewhere", "a"]
    for kernel in layer.c3a_kernel.values():
        kernel.data.mul_(20)
    layer.backend = backend
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = layer(x, adapter_names=names)
        oracle.assert_close(y, by_row(layer, x, names), dtype, bound=2 * oracle.BOUNDS[dtype])
    # A base that the fused step must not touch computes itself.
    calls = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    hooked = layer(x, adapter_names=names)
    oracle.assert_close(hooked, by_row(layer, x, names), dtype, bound=2 * oracle.BOUNDS[dtype])
    assert calls == [1]


def test_layer_without_any_of_the_adapters() -> None:
    layer, x = adapted_layer(a=3), torch.randn(2, 24)
    assert torch.equal(layer(x, adapter_names=["other", "__base__"]), layer.base_layer(x))
    layer.enable_adapters(False)
    assert torch.equal(layer(x, adapter_names=["a", "a"]), layer.base_layer(x))


def test_layer_under_autocast() -> None:
    layer, x = adapted_layer(a=3, b=4), torch.randn(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, adapter_names=["b", "a"])
    oracle.assert_close(y, by_row(layer, x, ["b", "a"]), torch.float32, bound=2 * oracle.BOUNDS[torch.bfloat16])


def test_layer_refuses_before_it_computes() -> None:
    layer, x, calls = adapted_layer(a=3), torch.randn(2, 24), []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    layer.merge()
    with pytest.raises(AdapterStateError, match=r"model\.fc.*unmerge"):
        layer(x, adapter_names=["a", "a"])
    layer.unmerge()
    layer.backend = "fold"
    with pytest.raises(ShapeError, match="3 adapter names for a batch of 2 rows"):
        layer(x, adapter_names=["a"] * 3)
    assert not calls
    with pytest.raises(BackendError, match=r"model\.fc.*fold"):
        layer(x, adapter_names=["a", "a"])


def test_one_graph_for_all_names() -> None:
    layer, x = adapted_layer(a=3, b=4), torch.randn(3, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for number, names in enumerate((["a", "b", "__base__"], ["b", "b", "a"], ["a", "a", "a"])):
        # The first graphs are those of both shapes; then any recompilation is an error.
        stance = torch.compiler.set_stance("fail_on_recompile") if number else nullcontext()
        with layer._scope.bound(names=tuple(names)), stance:
            for rows in (x, x[:, None].repeat(1, 4, 1)):
                layer.zero_grad()
                layer(rows).sum().backward()
                grads = {name: kernel.grad for name, kernel in layer.c3a_kernel.items()}
                layer.zero_grad()
                y = compiled(rows)
                y.sum().backward()
                torch.testing.assert_close(y, layer(rows))
                for name, kernel in layer.c3a_kernel.items():
                    if grads[name] is not None:
                        torch.testing.assert_close(kernel.grad, grads[name])
                    elif kernel.grad is not None:  # a graph does not know which adapters have rows
                        assert not kernel.grad.any()


def adapted_llama() -> nn.Module:
    """Adapters of different sizes on different layers, strong enough to change what is generated."""
    model = c3a_triton.apply(llama().eval(), C3AConfig(block_size=4, target_modules=["q_proj", "down_proj"]), "one")
    model.c3a.add_adapter("two", C3AConfig(block_size=8, target_modules=["q_proj", "up_proj"]))
    model.c3a.add_adapter("three", C3AConfig(block_size=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for _, layer in model.c3a.layers():
        for kernel in layer.c3a_kernel.values():
            kernel.data.normal_(0, 3, generator=generator)
    return model


def alone(model: nn.Module, name: str) -> nn.Module:
    """A plain model with one adapter merged, or none."""
    model = copy.deepcopy(model)
    if name == "__base__":
        return model.c3a.unload()
    return model.c3a.merge_and_unload(adapter_names=[name])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_equals_one_by_one(num_beams: int) -> None:
    model, names = adapted_llama(), ["three", "__base__", "two", "one", "three"]
    ids = torch.randint(1, 32, (5, 4), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    with model.c3a.using(names):
        together = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    texts = set()
    for row, name in enumerate(names):
        own = ids[row : row + 1]
        text = alone(model, name).generate(input_ids=own, attention_mask=torch.ones_like(own), **options)
        assert torch.equal(together[row : row + 1, : text.shape[1]], text), name
        texts.add(tuple(text[0, 4:].tolist()))
    assert len(texts) > 3, "the adapters change nothing: the comparison means nothing"


def test_names_given_to_forward() -> None:
    model, names = adapted_llama(), ["two", "__base__", "three"]
    with torch.no_grad():
        y = model(input_ids=IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            own = alone(model, name)(input_ids=IDS[row : row + 1]).logits
            torch.testing.assert_close(y[row : row + 1], own, rtol=1e-4, atol=1e-4)
        plain = model(input_ids=IDS, adapter_names=None).logits
        torch.testing.assert_close(plain, model(input_ids=IDS).logits)
        for bad, error in ((["two"] * 2, ShapeError), (["typo"] * 3, AdapterNotFoundError)):
            with pytest.raises(error):
                model(input_ids=IDS, adapter_names=bad)
            torch.testing.assert_close(model(input_ids=IDS).logits, plain)


def test_names_given_to_copies_and_to_the_unloaded() -> None:
    model = adapted_llama()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        y = other(input_ids=IDS, adapter_names=["two", "one", "three"]).logits
        torch.testing.assert_close(y, model(input_ids=IDS, adapter_names=["two", "one", "three"]).logits)
    hooks = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()]
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["q_proj"]), "four")
    assert [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()] == hooks
    model.c3a.unload()
    for part in model.modules():
        assert not part._forward_pre_hooks
        assert not part._forward_pre_hooks_with_kwargs
        assert not part._forward_hooks
        assert not part._forward_hooks_always_called


def test_training_a_mixed_batch_under_gradient_checkpointing() -> None:
    model, names = adapted_llama().train(), ["two", "one", "three"]
    for _, layer in model.c3a.layers():
        layer.c3a_kernel.requires_grad_(True)

    def grads() -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model(input_ids=IDS, labels=IDS, adapter_names=names).loss.backward()
    plain = grads()
    assert len(plain) > 10
    model.zero_grad()
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        # The backward pass may come within the context, after it, after another one, or in another thread.
        with model.c3a.using(names):
            model(input_ids=IDS, labels=IDS).loss.backward()
        torch.testing.assert_close(grads(), plain)
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, adapter_names=names).loss
        with model.c3a.using(names[::-1]):
            loss.backward()
        torch.testing.assert_close(grads(), plain)
        model.zero_grad()
        with model.c3a.using(names):
            loss = model(input_ids=IDS, labels=IDS).loss
            with ThreadPoolExecutor() as pool:  # as the engine's own for a GPU, which has an empty context
                pool.submit(loss.backward).result()
        torch.testing.assert_close(grads(), plain)
        model.zero_grad()


def test_two_forward_passes_and_one_backward_pass_under_gradient_checkpointing() -> None:
    """Each layer is computed again as it was in its own forward pass: with names, others, or none."""
    model = adapted_llama().train()
    for _, layer in model.c3a.layers():
        layer.c3a_kernel.requires_grad_(True)

    def grads(together: bool) -> dict[str, Tensor]:
        model.zero_grad()
        losses = []
        for names in (["two", "one", "three"], None, ["one", "__base__", "one"]):
            losses.append(model(input_ids=IDS, labels=IDS, adapter_names=names).loss)
            if not together:
                losses.pop().backward()
        if together:
            sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = grads(together=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(grads(together=True), expected)


def test_modules_trained_whole_go_row_by_row() -> None:
    config = {"target_modules": ["q_proj"], "modules_to_save": ["score"]}
    model = c3a_triton.apply(llama_classifier().eval(), C3AConfig(block_size=4, **config), "one")
    model.c3a.add_adapter("two", C3AConfig(block_size=8, **config))
    for factor, module in enumerate(model.score.modules_to_save.values(), start=2):
        module.weight.data.mul_(factor)
    names = ["two", "one", "__base__"]
    with torch.no_grad():
        y = model(input_ids=IDS, adapter_names=names).logits
    for row, name in enumerate(names[:2]):
        model.c3a.set_adapter(name)
        torch.testing.assert_close(y[row], logits(model)[row])
    with model.c3a.disable_adapter():
        torch.testing.assert_close(y[2], logits(model)[2])


def test_a_model_of_ones_own_compiles_and_takes_no_harm_from_the_hook() -> None:
    torch.compiler.reset()  # how often one class is compiled is limited, whichever tests did it
    model = c3a_triton.apply(MLP(), C3AConfig(block_size=6, target_modules=["first", "second"]))
    x = torch.randn(3, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with model.c3a.using(["default", "__base__", "default"]):
        torch.testing.assert_close(compiled(x), model(x))


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--adapters", "3", "--requests", "5", "--new-tokens", "4", "--hidden", "64", "--layers", "1"]
    assert run_example("serve_many", tmp_path, *arguments) == 0
    assert "5 requests for 3 adapters and the base, 4 distinct texts" in capsys.readouterr().out
