"""The operator: every backend against the dense float64 definition, in forward, dx and dw, and what autograd, autocast,
functorch and compilers see of it. Triton backends run natively on a GPU, in Triton's interpreter elsewhere."""

import warnings

import oracle
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from c3a_triton import BackendError, ShapeError, c3a_linear, circulant_linear, circulant_matrix
from c3a_triton.operator import backends, dense, fourier
from c3a_triton.operator.cost_model import Sizes, predicted_seconds
from c3a_triton.operator.dispatch import BACKENDS, choose
from c3a_triton.operator.launch import decode, plans

ALL = [name for name in BACKENDS if name not in ("auto", "fold")]
FLOAT64 = ["reference", "torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def operands(device, dtype, n_tokens, m, n, b, seed=0, kernels=1):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dy = normal(n_tokens, n * b).to(device, dtype), normal(n_tokens, m * b).to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x, dy, [normal(m, n, b).to(device, wide) for _ in range(kernels)]


def check_all_three(device, backend, dtype, n_tokens, m, n, b, seed=0):
    x, dy, (w,) = operands(device, dtype, n_tokens, m, n, b, seed)
    x.requires_grad_()
    w.requires_grad_()
    y = circulant_linear(x, w, backend=backend)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    oracle.assert_close(y, oracle.product(x, w), dtype)
    oracle.assert_close(dx, oracle.input_grad(dy, w), dtype)
    assert dw.dtype == w.dtype
    if n_tokens:
        # dw is summed in float32 from rounded operands: the dtype of x and dy bounds its error, not its own.
        oracle.assert_close(dw, oracle.weight_grad(dy, x, b), w.dtype, bound=oracle.BOUNDS[dtype])
    else:
        assert not dw.any()


# Values


@pytest.mark.parametrize("backend", ALL)
@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
@given(
    dtype=st.sampled_from(DTYPES),
    n_tokens=st.integers(1, 40),
    m=st.integers(1, 4),
    n=st.integers(1, 4),
    b=st.sampled_from([1, 2, 3, 5, 7, 8, 12, 16, 24, 33, 48]),
    seed=st.integers(0, 2**16),
)
@example(dtype=torch.float16, n_tokens=1, m=2, n=3, b=5, seed=0)
@example(dtype=torch.bfloat16, n_tokens=0, m=2, n=1, b=4, seed=0)
@example(dtype=torch.float32, n_tokens=19, m=1, n=2, b=96, seed=0)
def test_every_backend_equals_the_definition(device, backend, dtype, n_tokens, m, n, b, seed):
    check_all_three(device, backend, dtype, n_tokens, m, n, b, seed)


@pytest.mark.parametrize("backend", FLOAT64)
def test_float64_is_computed_in_float64(device, backend):
    check_all_three(device, backend, torch.float64, 9, 2, 3, 6)


@pytest.mark.parametrize("n_tokens", [1, 63, 200])
def test_torch_backend_is_the_same_in_chunks(device, monkeypatch, n_tokens):

    monkeypatch.setattr(fourier, "CPU_CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(fourier, "GPU_CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(fourier, "FEW_ELEMENTS", 0)
    check_all_three(device, "torch", torch.float32, n_tokens, 2, 3, 16)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiny_gradients_and_large_activations_survive(device, backend, dtype):
    x, dy, (w,) = operands(device, dtype, 24, 2, 3, 16)
    x, dy = (x * 1e4).requires_grad_(), dy * 1e-8
    w.requires_grad_()
    y = circulant_linear(x, w, backend=backend)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    oracle.assert_close(y, oracle.product(x, w), dtype)
    oracle.assert_close(dx, oracle.input_grad(dy, w), dtype)
    oracle.assert_close(dw, oracle.weight_grad(dy, x, 16), torch.float32, bound=oracle.BOUNDS[dtype])


@pytest.mark.parametrize("backend", ALL)
def test_float16_takes_activations_of_ten_thousand(device, backend):
    x, _, (w,) = operands(device, torch.float16, 24, 2, 3, 16)
    x = x * 1e4
    oracle.assert_close(circulant_linear(x, w, backend=backend), oracle.product(x, w), torch.float16)


@pytest.mark.parametrize("backend", ALL)
def test_shapes_and_strides(device, backend):
    _, _, (w,) = operands(device, torch.float32, 1, 2, 3, 4)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 12, 7, generator=generator).to(device).transpose(1, 2)  # (5, 7, 12), strided
    y = circulant_linear(x, w, backend=backend)
    oracle.assert_close(y, oracle.product(x, w), torch.float32)
    y = circulant_linear(x[:, ::2], w, scale=0.3, backend=backend)
    oracle.assert_close(y, oracle.product(x[:, ::2], w, scale=0.3), torch.float32)
    assert circulant_linear(x[0, 0], w, backend=backend).shape == (8,)
    assert circulant_linear(x[:0], w, backend=backend).shape == (0, 7, 8)
    # The gradient of a sum has stride zero everywhere.
    x = x.detach().requires_grad_()
    circulant_linear(x, w, backend=backend).sum().backward()
    oracle.assert_close(x.grad, oracle.input_grad(torch.ones(5, 7, 8), w), torch.float32)


@pytest.mark.parametrize("backend", [*ALL, "fold", "auto"])
@pytest.mark.parametrize(
    ("dtype", "with_bias"),
    [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)],
    ids=["float32", "float16 without bias", "bfloat16"],
)
def test_fused_layer_equals_base_plus_adapters(device, backend, dtype, with_bias):
    x, dy, (w, other) = operands(device, dtype, 2 * 9, 3, 2, 8, kernels=2)
    _, _, (fine,) = operands(device, dtype, 1, 6, 4, 4, seed=5)
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(24, 16, generator=generator) / 4).to(device, dtype)
    bias = torch.randn(24, generator=generator).to(device, dtype) if with_bias else None
    kernels = [w, other, fine]
    leaves = [t.requires_grad_() for t in (x, weight, *kernels)] + ([bias.requires_grad_()] if with_bias else [])
    y = c3a_linear(x.view(2, 9, 16), weight, bias, kernels, backend=backend)
    grads = torch.autograd.grad(y, leaves, dy.view_as(y))

    x64, dy64 = x.detach().cpu().double(), dy.cpu().double()
    dense = weight.detach().cpu().double() + sum(oracle.dense(w) for w in kernels)
    expected = x64 @ dense.T + (bias.detach().cpu().double() if with_bias else 0)
    # Three summands, each rounded to the dtype on its way.
    oracle.assert_close(y.view(18, 24), expected, dtype, bound=2 * oracle.BOUNDS[dtype])
    oracle.assert_close(grads[0], dy64 @ dense, dtype, bound=2 * oracle.BOUNDS[dtype])
    oracle.assert_close(grads[1], dy64.T @ x64, dtype)
    for w, dw in zip(kernels, grads[2:5], strict=True):
        expected = oracle.weight_grad(dy, x, w.shape[2])
        oracle.assert_close(dw, expected, torch.float32, bound=oracle.BOUNDS[dtype])
    if with_bias:
        oracle.assert_close(grads[5], dy64.sum(0), dtype)


@pytest.mark.parametrize(
    ("dtype", "m", "n", "b", "n_tokens"),
    oracle.in_turn(
        ((*shape, n_tokens) for shape in ((3, 2, 16), (2, 3, 7)) for n_tokens in (1, 5, 16)),
        (torch.float16, torch.bfloat16),
    ),
)
def test_a_few_tokens_take_one_kernel_for_base_and_adapters(device, monkeypatch, dtype, n_tokens, m, n, b):
    calls = []
    compute = decode.decode_linear
    monkeypatch.setattr(decode, "decode_linear", lambda *a, **k: calls.append(a[0].shape) or compute(*a, **k))
    x, dy, kernels = operands(device, dtype, n_tokens, m, n, b, kernels=2)
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(m * b, n * b, generator=generator) / 4).to(device, dtype)
    bias = torch.randn(m * b, generator=generator).to(device, dtype)
    dense = weight.cpu().double() + sum(oracle.dense(w) for w in kernels)
    expected = x.cpu().double() @ dense.T + bias.cpu().double()
    with torch.no_grad():
        oracle.assert_close(c3a_linear(x, weight, bias, kernels, backend="direct"), expected, dtype)
    x.requires_grad_()
    kernels = [w.requires_grad_() for w in kernels]
    y = c3a_linear(x.view(1, n_tokens, -1), weight, bias, kernels, backend="direct")
    assert calls == [(n_tokens, n * b)] * 2
    oracle.assert_close(y[0], expected, dtype)
    dx, *dws = torch.autograd.grad(y, (x, *kernels), dy[None])
    oracle.assert_close(dx, dy.cpu().double() @ dense, dtype, bound=2 * oracle.BOUNDS[dtype])
    for dw in dws:
        oracle.assert_close(dw, oracle.weight_grad(dy, x, b), torch.float32, bound=oracle.BOUNDS[dtype])


@pytest.mark.parametrize("case", ["many tokens", "float32", "transposed weight", "two block sizes", "no tokens"])
def test_what_the_decoding_kernel_does_not_take_is_computed_all_the_same(device, monkeypatch, case):
    monkeypatch.setattr(decode, "decode_linear", None)
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    x, _, (w,) = operands(device, dtype, {"many tokens": 17, "no tokens": 0}.get(case, 4), 3, 2, 8)
    kernels = [w, operands(device, dtype, 1, 6, 4, 4)[2][0]] if case == "two block sizes" else [w]
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    if case == "transposed weight":
        weight = weight.t().contiguous().t()
    expected = x.cpu().double() @ (weight.cpu().double() + sum(oracle.dense(w) for w in kernels)).T
    y = c3a_linear(x, weight, None, kernels, backend="direct")
    oracle.assert_close(y, expected, dtype, bound=2 * oracle.BOUNDS[dtype])


@pytest.mark.parametrize("backend", ALL)
def test_circulant_matrix_and_merge(device, backend):
    _, _, (w,) = operands(device, torch.float32, 1, 3, 2, 6)
    _, _, (fine,) = operands(device, torch.float32, 1, 6, 4, 3, seed=2)
    oracle.assert_close(circulant_matrix(w), oracle.dense(w), torch.float32)
    oracle.assert_close(circulant_matrix(w, scale=2.0, dtype=torch.bfloat16), oracle.dense(w, 2.0), torch.bfloat16)
    for dtype in DTYPES:
        base = torch.randn(18, 12, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        for weight in (base.clone(), base.clone().t().contiguous().t()):
            dense.add_circulant_(weight, [w, fine])
            exact = base.cpu().float() + (circulant_matrix(w) + circulant_matrix(fine)).cpu()
            assert torch.equal(weight.cpu(), exact.to(dtype)) or (weight.cpu() - exact.to(dtype)).abs().max() < 1e-6
            assert (weight != base).any()


def test_merge_in_chunks_of_rows(device, monkeypatch):
    monkeypatch.setattr(dense, "MERGE_CHUNK_ELEMENTS", 100)
    kernels = [operands(device, torch.float32, 1, 12 // b, 18 // b, b, seed=b)[2][0] for b in (2, 3, 6)]
    weight = torch.zeros(12, 18, device=device)
    dense.add_circulant_(weight, kernels)
    oracle.assert_close(weight, sum(oracle.dense(w) for w in kernels), torch.float32)


# Autograd


@pytest.mark.parametrize("backend", [*FLOAT64, "fold"])
@pytest.mark.parametrize("b", [1, 3, 5, 8])
def test_gradcheck_to_second_order(device, backend, b):
    x, _, (w, other) = operands(device, torch.float64, 4, 2, 3, b, kernels=2)
    weight = torch.randn(2 * b, 3 * b, dtype=torch.float64, device=device)
    bias = torch.randn(2 * b, dtype=torch.float64, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, w, other)]

    def layer(x, weight, bias, *kernels):
        return c3a_linear(x.view(2, 2, -1), weight, bias, kernels, backend=backend)

    def delta(x, w):
        return circulant_linear(x, w, scale=0.7, backend="torch" if backend == "fold" else backend)

    # Of the larger blocks a random projection of the derivatives, which costs a few calls whatever their number.
    fast = b >= 5
    assert torch.autograd.gradcheck(layer, leaves, fast_mode=fast)
    assert torch.autograd.gradcheck(delta, (x, w), fast_mode=fast)
    assert torch.autograd.gradgradcheck(layer, leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(delta, (x, w), fast_mode=fast)
    assert torch.autograd.gradcheck(circulant_matrix, (w,), fast_mode=fast)


@pytest.mark.parametrize("backend", ["direct", "fft", "expand"])
def test_double_backward_of_triton_backends(device, backend):
    x, dy, (w,) = operands(device, torch.float32, 5, 2, 3, 8)
    x.requires_grad_()
    w.requires_grad_()

    def penalty(backend):
        dx, dw = torch.autograd.grad(circulant_linear(x, w, backend=backend), (x, w), dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, w))

    for ours, reference in zip(penalty(backend), penalty("reference"), strict=True):
        oracle.assert_close(ours, reference.double().cpu(), torch.float32)


def test_only_wanted_gradients_are_computed(device, monkeypatch):
    calls = []
    for name in ("product", "weight_grad", "backward"):
        function = getattr(fourier, name)
        monkeypatch.setattr(fourier, name, lambda *a, _f=function, _n=name, **k: calls.append(_n) or _f(*a, **k))
    spied = backends.Backend(fourier.product, fourier.weight_grad, fourier.backward)
    monkeypatch.setitem(backends.BY_NAME, "torch", spied)
    plans.clear_plans()
    x, dy, (w,) = operands(device, torch.float32, 3, 2, 2, 4)
    circulant_linear(x, w.requires_grad_(), backend="torch").backward(dy)
    assert calls == ["product", "weight_grad"]
    calls.clear()
    circulant_linear(x.requires_grad_(), w.detach(), backend="torch").backward(dy)
    assert calls == ["product", "product"]
    calls.clear()
    circulant_linear(x, w, backend="torch").backward(dy)
    assert calls == ["product", "backward"]  # dy is transformed once for both


def test_equal_block_sizes_run_as_one_product(device, monkeypatch):
    calls = []
    backend = backends.BY_NAME["torch"]
    spied = backend._replace(product=lambda *a, **k: calls.append(a[1]) or backend.product(*a, **k))
    monkeypatch.setitem(backends.BY_NAME, "torch", spied)
    plans.clear_plans()
    x, _, kernels = operands(device, torch.float32, 3, 2, 2, 4, kernels=3)
    c3a_linear(x, torch.zeros(8, 8, device=device), None, kernels, backend="torch")
    assert len(calls) == 1
    assert torch.equal(calls[0], kernels[0] + kernels[1] + kernels[2])


def test_gradients_of_summed_adapters_do_not_share_memory(device):
    x, dy, kernels = operands(device, torch.float32, 3, 2, 2, 4, kernels=2)
    for w in kernels:
        w.requires_grad_()
    c3a_linear(x, torch.zeros(8, 8, device=device), None, kernels).backward(dy)
    assert torch.equal(kernels[0].grad, kernels[1].grad)
    assert kernels[0].grad.data_ptr() != kernels[1].grad.data_ptr()


@pytest.mark.parametrize("backend", ["torch", "direct", "fft"])
def test_what_is_kept_for_backward(device, backend):
    """At most x in its own dtype and the kernel; the frozen weight is there anyway; nothing where nothing is wanted."""
    x, _, (w,) = operands(device, torch.bfloat16, 16, 2, 2, 8)
    weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.bfloat16, device=device), requires_grad=False)
    x.requires_grad_()

    def saved(w):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            c3a_linear(x, weight, None, [w], backend=backend)
        return sum(t.numel() * t.element_size() for t in kept if t.data_ptr() != weight.data_ptr())

    assert saved(w.detach().requires_grad_()) == x.numel() * 2 + w.numel() * 4
    assert saved(w.detach()) == w.numel() * 4  # x is kept for dw alone


@pytest.mark.parametrize("backend", [*ALL, "fold"])
def test_outputs_can_be_modified_in_place(device, backend):
    """As nn.Linear's can, which models do (Llama 4 adds routed experts to the shared one)."""
    x, _, (w,) = operands(device, torch.float32, 6, 2, 2, 4)
    weight = torch.randn(8, 8, device=device)
    for shape in ((6, 8), (2, 3, 8)):
        grads = []
        for in_place in (True, False):
            w = w.detach().requires_grad_()
            y = c3a_linear(x.view(shape), weight, None, [w], backend=backend)
            y = y.add_(1).relu_() if in_place else (y + 1).relu()
            grads += torch.autograd.grad(y.sum(), w)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ALL)
def test_bit_identical_from_run_to_run(device, deterministic, backend):
    x, dy, (w,) = operands(device, torch.bfloat16, 33, 2, 3, 16)
    x.requires_grad_()
    w.requires_grad_()

    def run():
        y = circulant_linear(x, w, backend=backend)
        return y, *torch.autograd.grad(y, (x, w), dy)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# Folding


def fold_operands(device, dtype, n_tokens=20):
    """A layer with three adapters of two block sizes, the weight's own digits, and W + Σ ΔW rounded once."""
    x, dy, kernels = operands(device, dtype, n_tokens, 3, 2, 8, kernels=2)
    kernels.append(operands(device, dtype, 1, 6, 4, 4, seed=5)[2][0])
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    exact = weight.cpu().double() + sum(oracle.dense(w) for w in kernels)
    return x, dy, weight, kernels, exact.float().to(device, dtype)


@pytest.mark.parametrize("n_tokens", [1, 20])
def test_fold_computes_as_the_merged_layer_does(device, n_tokens):
    x, dy, weight, kernels, folded = fold_operands(device, torch.bfloat16, n_tokens)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(4)).to(device, torch.bfloat16)
    leaves = [
        x.requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
        *(w.requires_grad_() for w in kernels),
    ]
    y = c3a_linear(x, weight, bias, kernels, backend="fold")
    dx, dweight, dbias, *dws = torch.autograd.grad(y, leaves, dy)
    # Bit for bit what a merged layer gives: summed in float32 and rounded once, not adapter by adapter.
    assert torch.equal(y, nn.functional.linear(x, folded, bias))
    assert torch.equal(dx, dy @ folded)
    with torch.no_grad():
        assert torch.equal(c3a_linear(x, weight, bias, kernels, backend="fold"), y)
    # The other gradients are those of the exact layer, which "auto" computes.
    exact = c3a_linear(x, weight, bias, kernels)
    expected = torch.autograd.grad(exact, leaves[1:], dy)
    for ours, theirs in zip((dweight, dbias, *dws), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(y, exact)


def test_fold_without_kernels_is_the_base(device):
    x, _, weight, _, _ = fold_operands(device, torch.float32)
    assert torch.equal(c3a_linear(x, weight, None, [], backend="fold"), nn.functional.linear(x, weight))


def test_fold_keeps_no_folded_weight_for_backward(device):
    x, _, weight, kernels, _ = fold_operands(device, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        c3a_linear(x.requires_grad_(), weight, None, [w.requires_grad_() for w in kernels], backend="fold")
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, weight, *kernels)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_double_backward_through_fold(device, dtype):
    x, _, weight, kernels, _ = fold_operands(device, dtype)
    leaves = [x.requires_grad_(), *(w.requires_grad_() for w in kernels)]

    def penalty(backend):
        y = c3a_linear(x, weight, None, kernels, backend=backend)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in grads), leaves)

    for ours, exact in zip(penalty("fold"), penalty("reference"), strict=True):
        oracle.assert_close(ours, exact.double().cpu(), ours.dtype, bound=1e-4 if dtype == torch.float32 else 3e-2)


def test_fold_under_compile_and_functorch(device):
    x, dy, weight, kernels, _ = fold_operands(device, torch.float32)
    leaves = [x.requires_grad_(), *(w.requires_grad_() for w in kernels)]

    def layer(x, *kernels):
        return c3a_linear(x, weight, None, kernels, backend="fold")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), layer(*leaves))
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves, dy), torch.autograd.grad(layer(*leaves), leaves, dy), strict=True
    ):
        torch.testing.assert_close(a, b)
    _, tangent = torch.func.jvp(layer, tuple(leaves), tuple(t.detach().cos() for t in leaves))
    _, expected = torch.func.jvp(
        lambda x, *kernels: c3a_linear(x, weight, None, kernels, backend="torch"),
        tuple(leaves),
        tuple(t.detach().cos() for t in leaves),
    )
    torch.testing.assert_close(tangent, expected)


def test_fold_is_for_layers_and_only_by_name(monkeypatch):
    x, _, (w,) = operands(torch.device("cpu"), torch.float32, 3, 2, 2, 4)
    with pytest.raises(BackendError, match="'fold'.*circulant_linear has none"):
        circulant_linear(x, w, backend="fold")
    monkeypatch.setenv("C3A_TRITON_BACKEND", "fold")
    with pytest.raises(BackendError, match="'fold'.*C3A_TRITON_BACKEND.*by name"):
        c3a_linear(x, torch.zeros(8, 8), None, [w])


# Autocast


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_behaves_as_linear(device, backend):
    x, dy, (w,) = operands(device, torch.float32, 6, 2, 2, 8)
    weight = torch.randn(16, 16, device=device)
    x.requires_grad_()
    w.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = c3a_linear(x, weight, None, [w], backend=backend)
        assert y.dtype == nn.functional.linear(x, weight).dtype == torch.bfloat16
        assert circulant_linear(x, w, backend=backend).dtype == torch.bfloat16
        # A backward pass inside the region computes as one outside it does.
        inside = torch.autograd.grad(y, (x, w), dy.bfloat16(), retain_graph=True)
    outside = torch.autograd.grad(y, (x, w), dy.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    dw = oracle.weight_grad(dy.bfloat16(), x.bfloat16(), 8)
    oracle.assert_close(inside[1], dw, torch.float32, bound=1e-5 if backend == "reference" else 1e-4)
    with torch.autocast(device.type, torch.bfloat16):
        assert circulant_linear(x.double(), w.double(), backend=backend).dtype == torch.float64


# Compilers and functorch


@pytest.mark.parametrize("backend", ["torch", "direct"])
def test_custom_ops_are_well_formed(device, backend):
    x, dy, (w,) = operands(device, torch.float32, 4, 2, 3, 4)
    x.requires_grad_()
    w.requires_grad_()
    weight, bias = torch.randn(8, 12, device=device), torch.randn(8, device=device)
    op = torch.ops.c3a_triton
    # opcheck compiles: one Triton backend in the interpreter stands for all.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.linear.default, (x, weight, bias, [w], 0.1, False, backend), test_utils=utils)
    torch.library.opcheck(op.linear.default, (dy, None, None, [w], 0.1, True, backend), test_utils=utils)
    torch.library.opcheck(
        op.weight_grad.default, (dy.requires_grad_(), x, 4, 0.1, torch.float32, backend), test_utils=utils
    )


def test_compiles_as_one_graph_for_any_number_of_tokens(device):
    _, _, (w,) = operands(device, torch.float32, 1, 2, 2, 8)
    w.requires_grad_()
    weight = torch.randn(16, 16, device=device)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: c3a_linear(x, weight, None, [w]), fullgraph=True, backend=count, dynamic=True)
    for n_tokens in (5, 3, 40):  # the first differs from every other size, or the compiler takes them for one symbol
        x = torch.randn(n_tokens, 16, device=device, requires_grad=True)
        y = compiled(x)
        assert torch.equal(y, c3a_linear(x, weight, None, [w]))
    assert len(graphs) == 1


def test_aot_autograd_gives_the_eager_gradients(device):
    x, dy, (w, other) = operands(device, torch.float32, 6, 2, 2, 8, kernels=2)
    weight, bias = torch.randn(16, 16, device=device), torch.randn(16, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, w, other)]

    def layer(x, weight, bias, *kernels):
        return c3a_linear(x, weight, bias, kernels)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*leaves), leaves, dy)
    eager = torch.autograd.grad(layer(*leaves), leaves, dy)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "direct", "fft", "expand"])
def test_cuda_graphs_capture_and_replay(device, backend):
    x, _, (w,) = operands(device, torch.bfloat16, 64, 2, 2, 64)
    weight = torch.randn(128, 128, device=device, dtype=torch.bfloat16)
    c3a_linear(x, weight, None, [w], backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = c3a_linear(x, weight, None, [w], backend=backend)
    x.copy_(torch.randn_like(x))
    w.copy_(torch.randn_like(w))
    graph.replay()
    assert torch.equal(y, c3a_linear(x, weight, None, [w], backend=backend))


def functorch_cases():
    def ours(x, w, weight, bias):
        return c3a_linear(x, weight, bias, [w, 2 * w], backend="torch").pow(3).sum()

    def dense(x, w, weight, bias):
        return (x @ (weight + 3 * circulant_matrix(w)).T + bias).pow(3).sum()

    shapes = ((3, 12), (2, 3, 4), (8, 12), (8,))
    generator = torch.Generator().manual_seed(0)
    return ours, dense, [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def assert_trees_close(a, b):
    leaves, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (a, b))
    assert len(leaves) == len(expected)
    for ours, reference in zip(leaves, expected, strict=True):
        assert reference.abs().max() > 0
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, args: torch.func.grad(f, (0, 1, 2, 3))(*args),
        lambda f, args: torch.func.jacrev(f, (0, 1))(*args),
        lambda f, args: torch.func.jacfwd(f, (0, 1))(*args),
        lambda f, args: torch.func.hessian(f, (0, 1))(*args),
        lambda f, args: torch.func.jvp(f, tuple(args), tuple(t.cos() for t in args)),
    ],
    ids=["grad", "jacrev", "jacfwd", "hessian", "jvp"],
)
def test_functorch_transforms(transform):
    ours, dense, args = functorch_cases()
    assert_trees_close(transform(ours, args), transform(dense, args))


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)], ids=["x", "w", "both"])
def test_vmap_and_per_sample_gradients(dims):
    ours, dense, (x, w, weight, bias) = functorch_cases()
    args = [torch.stack([t, t.sin(), t.cos()]) if dim == 0 else t for t, dim in zip((x, w), dims, strict=True)]
    dims = (*dims, None, None)
    for transform in (lambda f: f, lambda f: torch.func.grad(f, (0, 1))):
        assert_trees_close(
            torch.func.vmap(transform(ours), dims)(*args, weight, bias),
            torch.func.vmap(transform(dense), dims)(*args, weight, bias),
        )


def test_forward_mode_outside_functorch_is_refused_not_wrong():
    x, _, (w,) = operands(torch.device("cpu"), torch.float32, 3, 2, 2, 4)
    w.requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            circulant_linear(dual, w)


def test_meta_and_fake_tensors_propagate_shapes():
    x, w = torch.empty(2, 5, 12, device="meta"), torch.empty(2, 3, 4, device="meta")
    assert circulant_linear(x, w).shape == (2, 5, 8)
    with torch._subclasses.FakeTensorMode():
        y = c3a_linear(torch.empty(3, 12), torch.empty(8, 12), None, [torch.empty(2, 3, 4, requires_grad=True)])
        y.sum().backward()
    assert y.shape == (3, 8)


# Choice of backend


def test_auto_on_a_cpu_is_torch(monkeypatch):
    sizes = Sizes(100, 64, 64, 8, torch.float32, torch.device("cpu"))
    monkeypatch.delenv("C3A_TRITON_BACKEND", raising=False)
    assert choose("auto", sizes) == "torch"
    monkeypatch.setenv("C3A_TRITON_BACKEND", "reference")
    assert choose("auto", sizes) == "reference"
    assert choose("torch", sizes) == "torch"
    monkeypatch.setenv("C3A_TRITON_BACKEND", "fastest")
    with pytest.raises(BackendError, match="C3A_TRITON_BACKEND='fastest'.*'direct'"):
        choose("auto", sizes)


def test_a_repeated_call_follows_the_environment(device, monkeypatch):
    monkeypatch.delenv("C3A_TRITON_BACKEND", raising=False)
    x, dy, (w,) = operands(device, torch.float32, 3, 2, 2, 4)
    for tensor in (x, w):
        tensor.requires_grad_()

    def grads():
        return torch.autograd.grad(circulant_linear(x, w), (x, w), dy)

    before = grads()
    monkeypatch.setenv("C3A_TRITON_BACKEND", "fastest")
    with pytest.raises(BackendError, match="C3A_TRITON_BACKEND='fastest'"):
        grads()
    monkeypatch.delenv("C3A_TRITON_BACKEND")
    y = circulant_linear(x, w)
    monkeypatch.setenv("C3A_TRITON_BACKEND", "fastest")
    with pytest.raises(BackendError, match="C3A_TRITON_BACKEND='fastest'"):
        torch.autograd.grad(y, (x, w), dy)
    monkeypatch.delenv("C3A_TRITON_BACKEND")
    assert all(map(torch.equal, before, grads()))


def test_cost_model_prefers_one_launch_for_few_tokens_and_spectra_for_many():
    def best(n_tokens, in_features, out_features, b, names=("direct", "fft", "expand", "torch")):
        sizes = Sizes(n_tokens, in_features, out_features, b, torch.bfloat16)
        return min(names, key=lambda name: predicted_seconds(name, sizes))

    assert best(1, 4096, 4096, 128) == "direct"
    assert best(64, 4096, 4096, 128) == best(1024, 1024, 1024, 128) == "direct"
    assert best(128, 4096, 4096, 128) == best(2048, 1024, 1024, 128) == "fft"
    for sizes in ((3072, 3072, 64), (4096, 4096, 256), (4096, 4096, 1024), (8192, 28672, 128)):
        assert best(8192, *sizes) == "fft"
    # A block that no power of two takes apart is transformed whole, which costs as much as a dense product; float32
    # spectra cost more bytes.
    assert best(8192, 1536, 1536, 1536) == "fft"
    assert best(8192, 1535, 1535, 1535) == "expand"
    sixteen = [
        predicted_seconds("fft", Sizes(8192, 4096, 4096, 64, dtype)) for dtype in (torch.float16, torch.bfloat16)
    ]
    assert sixteen[0] > sixteen[1]
    assert best(8192, 3072, 3072, 64, ("direct", "expand", "torch")) == "expand"
    assert best(8192, 8192, 28672, 128, ("direct", "expand", "torch")) == "torch"


@pytest.mark.parametrize("backend", ["direct", "fft", "expand"])
def test_a_named_backend_that_cannot_run_says_why(backend):
    x, w = torch.randn(2, 8, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    with pytest.raises(BackendError, match=f"{backend!r}.*float64.*'auto'"):
        circulant_linear(x, w, backend=backend)


def test_auto_takes_float64(device):
    x, w = (
        torch.randn(2, 8, dtype=torch.float64, device=device),
        torch.randn(1, 2, 4, dtype=torch.float64, device=device),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle.assert_close(circulant_linear(x, w), oracle.product(x, w), torch.float64)


# Bad input


def bad_calls():
    x, w, weight = torch.randn(3, 12), torch.randn(2, 3, 4), torch.randn(8, 12)
    return {
        "width": (lambda: circulant_linear(x[:, :8], w), "8 features.*= 12"),
        "kernel dimensions": (lambda: circulant_linear(x, w[0]), r"\(out_blocks, in_blocks, block_size\)"),
        "kernel dtype": (lambda: circulant_linear(x, w.int()), "torch.int32"),
        "integer x": (lambda: circulant_linear(x.int(), w), "torch.int32"),
        "scalar x": (lambda: circulant_linear(torch.tensor(1.0), w), r"shape \(\)"),
        "weight width": (lambda: c3a_linear(x, weight[:, :8], None, [w]), r"12 features.*\(8, 8\)"),
        "weight rows": (lambda: c3a_linear(x, weight[:4], None, [w]), "4 rows.*= 8"),
        "mixed dtypes": (lambda: c3a_linear(x.half(), weight, None, [w]), "float16.*float32"),
        "bias dtype": (lambda: c3a_linear(x, weight, torch.zeros(8).half(), [w]), "bias torch.float16"),
        "bias size": (lambda: c3a_linear(x, weight, torch.zeros(4), [w]), r"\(4,\).*\(8,\)"),
        "devices": (lambda: circulant_linear(x, w.to("meta")), "cpu.*meta"),
        "matrix": (lambda: circulant_matrix(w[0]), "block_size"),
        "merge": (lambda: dense.add_circulant_(weight, [w[:1]]), r"\(1, 3, 4\).*\(8, 12\)"),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_operands_that_do_not_fit_are_named(name):
    call, message = bad_calls()[name]
    with pytest.raises(ShapeError, match=message):
        call()


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(BackendError, match="'cuda'.*'auto', 'reference', 'torch', 'direct', 'fft', 'expand'"):
        circulant_linear(torch.randn(1, 4), torch.randn(1, 1, 4), backend="cuda")
