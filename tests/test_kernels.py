"""Every launcher against the dense definition: natively on a GPU, in Triton's interpreter elsewhere.

Small and odd sizes in every dtype are those of `bench/kernel_cases.py` (test_guards.py). Here are all shapes, in one
dtype each, and what that table lacks: strides, splits, ranges, plans, refusals.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import oracle
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from c3a_triton.errors import BackendError, ShapeError
from c3a_triton.operator.launch import decode, direct, expand, plans, specs, tiles, weight_grad

pytestmark = pytest.mark.usefixtures("nan_filled")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (m, n, b): m ≠ n wherever a mix-up could hide; powers of two and not, odd, prime, 1, b = in_features.
SHAPES = (
    (33, 20, 1),
    (5, 3, 2),
    (2, 5, 3),
    (4, 3, 15),
    (3, 5, 16),
    (1, 3, 31),
    (3, 2, 64),
    (2, 1, 80),
    (2, 3, 96),
    (2, 1, 97),
    (2, 1, 192),
    (1, 2, 256),
)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def cases() -> list[tuple[int, int, int, int]]:
    """(tokens, m, n, b): every shape with few tokens and with many; fewer where the interpreter has more to do."""
    few, many = (1, 7, 16), (17, 63, 130)
    return [
        (tokens[i % 3] if b < 64 else tokens[0] + i % 2, m, n, b)
        for i, (m, n, b) in enumerate(SHAPES)
        for tokens in (few, many)
    ]


def tensors(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [t, n·b], dy [t, m·b] and w [m, n, b] of random normal values."""
    x = torch.randn(t, n * b, device=device).to(dtype)
    dy = torch.randn(t, m * b, device=device).to(dtype)
    return x, dy, torch.randn(m, n, b, device=device)


@pytest.mark.parametrize(("dtype", "t", "m", "n", "b"), oracle.in_turn(cases()))
def test_direct_product(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> None:
    x, dy, w = tensors(device, dtype, t, m, n, b)
    oracle.assert_close(direct.direct_product(x, w, scale=0.37), oracle.product(x, w, 0.37), dtype)
    dx = direct.direct_product(dy, w, scale=0.37, transpose=True)
    oracle.assert_close(dx, oracle.input_grad(dy, w, 0.37), dtype)


@pytest.mark.parametrize(
    ("dtype", "t", "m", "n", "b"),
    oracle.in_turn(
        [
            (1, 3, 40, 1),
            (4, 2, 5, 3),
            (16, 4, 3, 15),
            (7, 2, 3, 24),
            (2, 2, 1, 97),
            (16, 3, 2, 16),
            (1, 5, 3, 48),
            (2, 1, 3, 112),
            (8, 3, 2, 32),
            (9, 3, 1, 64),
            (5, 1, 40, 16),
            (3, 1, 1, 256),
        ],
        (torch.float16, torch.bfloat16),
    ),
)
def test_decode_linear(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> None:
    x, _, w = tensors(device, dtype, t, m, n, b)
    weight = torch.randn(m * b, n * b, device=device).to(dtype)
    bias = torch.randn(m * b, device=device).to(dtype)
    expected = x.cpu().double() @ (weight.cpu().double() + oracle.dense(w, 0.37)).T + bias.cpu().double()
    # The sum is rounded once: W and what the adapter adds to it keep the digits that a folded weight loses.
    once = {torch.float16: 2.6e-4, torch.bfloat16: 2.1e-3}[dtype]
    oracle.assert_close(decode.decode_linear(x, weight, w, bias, scale=0.37), expected, dtype, bound=once)
    # The adapter's own part, where the weight has nothing to hide it.
    alone = decode.decode_linear(x, torch.zeros_like(weight), w, None, scale=0.37)
    oracle.assert_close(alone, oracle.product(x, w, 0.37), dtype)


@pytest.mark.parametrize("b", [5, 16])
def test_decode_linear_of_strided_operands(device: torch.device, b: int) -> None:
    dtype, t, m, n = torch.bfloat16, 3, 2, 4
    x = torch.randn(2 * t, n * b + 5, device=device).to(dtype)[::2, 3:-2]
    weight = torch.randn(m * b, n * b + 3, device=device).to(dtype)[:, 1:-2]
    w = torch.randn(n, m, b, device=device).transpose(0, 1)
    bias = torch.randn(m * b, 2, device=device).to(dtype)[:, 0]
    expected = x.cpu().double() @ (weight.cpu().double() + oracle.dense(w)).T + bias.cpu().double()
    repeated = (x[:1].expand(t, -1), expected[:1].expand(t, -1))
    for rows, ref in ((x, expected), (x.t().contiguous().t(), expected), repeated):
        y = decode.decode_linear(rows, weight, w, bias, scale=1 / (n * b))
        oracle.assert_close(y, ref, dtype)


@pytest.mark.parametrize("b", [4, 32])
def test_decode_keeps_what_folding_would_round_away(device: torch.device, b: int) -> None:
    # An adapter a thousand times smaller than the weight is below half a unit of nearly all of W's last digits.
    dtype, m, n = torch.bfloat16, 2, 64 // b
    x, _, w = tensors(device, dtype, 8, m, n, b)
    x[1:] = x[0]
    weight = torch.ones(m * b, n * b, device=device, dtype=dtype)
    x -= x.float().mean(1, keepdim=True).to(dtype)  # so that the base product is small
    expected = x.cpu().double() @ (weight.cpu().double() + oracle.dense(w, 1e-3)).T
    oracle.assert_close(decode.decode_linear(x, weight, w, None, scale=1e-3), expected, dtype)


@pytest.mark.parametrize(("n", "b"), [(81, 16), (130, 5)])
def test_decode_adds_the_parts_of_a_split_sum_in_ascending_order(device: torch.device, n: int, b: int) -> None:
    # In three parts: 2²⁷, −2²⁷ and 3, which the others would swallow in another order; then the bias, once.
    x, _, w = tensors(device, torch.bfloat16, 1, 1, n, b)
    weight = torch.zeros(b, n * b, device=device, dtype=torch.bfloat16)
    x[:, :] = 1
    for column, value in ((0, 2**27), (n * b // 2, -(2**27)), (-1, 3)):
        weight[:, column] = value
    bias = torch.full((b,), 0.5, device=device, dtype=torch.bfloat16)
    y = decode.decode_linear(x, weight, torch.zeros_like(w), bias, scale=1.0)
    assert torch.equal(y, torch.full_like(y, 3.5))


@pytest.mark.parametrize(("dtype", "t", "m", "n", "b"), oracle.in_turn(cases()))
def test_weight_grad(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> None:
    x, dy, _ = tensors(device, dtype, t, m, n, b)
    dw = weight_grad.weight_grad(dy, x, b, scale=0.37)
    # The operands are exact and the sum is float32 in every dtype.
    oracle.assert_close(dw, oracle.weight_grad(dy, x, b, 0.37), torch.float32)


@pytest.mark.parametrize(("dtype", "t", "m", "n", "b"), oracle.in_turn(cases()))
def test_both_gradients_at_once_are_those_apart(
    device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int
) -> None:
    x, dy, w = tensors(device, dtype, t, m, n, b)
    dx = direct.direct_product(dy, w, scale=0.37, transpose=True)
    both = direct.direct_backward(dy, x, w, scale=0.37)
    for found, apart in zip(both, (dx, weight_grad.weight_grad(dy, x, b, scale=0.37)), strict=True):
        assert torch.equal(found, apart)
    added = torch.ones_like(x)
    expected = direct.direct_product(dy, w, scale=0.37, transpose=True, out=torch.ones_like(x))
    assert direct.direct_backward(dy, x, w, scale=0.37, out=added)[0] is added
    assert torch.equal(added, expected)


@pytest.mark.parametrize(("dtype", "m", "n", "b"), oracle.in_turn(SHAPES))
def test_expand_weight(device: torch.device, dtype: torch.dtype, m: int, n: int, b: int) -> None:
    w = torch.randn(m, n, b, device=device)
    oracle.assert_close(expand.expand_weight(w, scale=0.37, dtype=dtype), oracle.dense(w, 0.37), dtype)
    transposed = expand.expand_weight(w, scale=0.37, dtype=dtype, transpose=True)
    oracle.assert_close(transposed, oracle.dense(w, 0.37).T, dtype)
    assert transposed.is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "layout", "m", "n", "b"),
    oracle.in_turn(
        (layout, *shape)
        for layout in ("contiguous", "transposed", "sliced")
        for shape in ((2, 3, 96), (5, 3, 7), (33, 20, 1), (1, 2, 256))
    ),
)
def test_add_expanded(device: torch.device, dtype: torch.dtype, layout: str, m: int, n: int, b: int) -> None:
    w = torch.randn(m, n, b, device=device)
    rows, cols = m * b, n * b
    storage = torch.randn(rows + cols, rows + cols + 1, device=device).to(dtype)
    before = storage.clone()
    view = {
        "contiguous": lambda s: s.view(-1)[: rows * cols].view(rows, cols),
        "transposed": lambda s: s.view(-1)[: rows * cols].view(cols, rows).t(),
        "sliced": lambda s: s[1 : rows + 1, 1 : cols + 1],
    }[layout]
    expand.add_expanded_(view(storage), w, scale=0.37)
    # In float32 with one rounding the result is the rounded sum but for the last bit of float32.
    exact = view(before).cpu().double() + oracle.dense(w, 0.37)
    once = {torch.float32: 1e-7, torch.float16: 2.6e-4, torch.bfloat16: 2.1e-3}[dtype]
    oracle.assert_close(view(storage), exact, dtype, bound=once)
    folded = expand.folded_weight(view(before), w, scale=0.37)
    assert torch.equal(folded, view(storage))
    assert layout == "sliced" or folded.stride() == view(before).stride()
    # Nothing outside the view is touched.
    view(storage).copy_(view(before))
    assert torch.equal(storage, before)


@pytest.mark.parametrize(
    ("dtype", "t", "m", "n", "b"),
    oracle.in_turn((t, *shape) for t in (5, 40) for shape in ((2, 3, 32), (5, 3, 7), (10, 30, 1), (2, 1, 97))),
)
def test_product_epilogue(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> None:
    x, _, w = tensors(device, dtype, t, m, n, b)
    bias = torch.randn(m * b, device=device).to(dtype)
    base = torch.randn(t, m * b, device=device).to(dtype)
    product = oracle.product(x, w, 0.37)
    out = base.clone()
    assert direct.direct_product(x, w, scale=0.37, out=out) is out
    oracle.assert_close(out, product + base.cpu().double(), dtype)
    # With a bias, too, into rows of a wider tensor whose other columns stay as they are.
    wide = torch.full((t, m * b + 3), 7.0, device=device, dtype=dtype)
    wide[:, 1:-2] = base
    direct.direct_product(x, w, scale=0.37, out=wide[:, 1:-2], bias=bias)
    oracle.assert_close(wide[:, 1:-2], product + base.cpu().double() + bias.cpu().double(), dtype)
    assert (wide[:, 0] == 7).all()
    assert (wide[:, -2:] == 7).all()


@pytest.mark.parametrize(("dtype", "b", "t"), oracle.in_turn(product((5, 24, 66), (3, 33))))
def test_strided_rows(device: torch.device, dtype: torch.dtype, b: int, t: int) -> None:
    m, n = 2, 1
    w = torch.randn(m, n, b, device=device)
    wide = torch.randn(2 * t, n * b + 5, device=device).to(dtype)
    columns = torch.randn(n * b, t, device=device).to(dtype).t()
    dy = torch.randn(t, m * b + 1, device=device).to(dtype)[:, 1:]
    for x in (wide[::2, 3:-2], columns, wide[:1, 3:-2].expand(t, -1)):
        oracle.assert_close(direct.direct_product(x, w, scale=1.0), oracle.product(x, w, 1.0), dtype)
        dw = weight_grad.weight_grad(dy, x, b, scale=1.0)
        oracle.assert_close(dw, oracle.weight_grad(dy, x, b, 1.0), torch.float32)
    strided_w = torch.randn(n, m, b, device=device).transpose(0, 1)
    x = wide[::2, 3:-2]
    oracle.assert_close(direct.direct_product(x, strided_w, scale=1.0), oracle.product(x, strided_w, 1.0), dtype)
    oracle.assert_close(expand.expand_weight(strided_w, scale=1.0, dtype=dtype), oracle.dense(strided_w, 1.0), dtype)


def test_split_sums(device: torch.device) -> None:
    # Long sums in one small layer are split over programs; the parts are added in a fixed order.
    x, dy, w = tensors(device, torch.float32, 600, 1, 2, 16)
    dw = weight_grad.weight_grad(dy, x, 16, scale=0.37)
    oracle.assert_close(dw, oracle.weight_grad(dy, x, 16, 0.37), torch.float32)
    assert torch.equal(dw, weight_grad.weight_grad(dy, x, 16, scale=0.37))
    x, dy, w = tensors(device, torch.float32, 300, 1, 1, 66)
    dw = weight_grad.weight_grad(dy, x, 66, scale=0.37)
    oracle.assert_close(dw, oracle.weight_grad(dy, x, 66, 0.37), torch.float32)
    assert torch.equal(dw, weight_grad.weight_grad(dy, x, 66, scale=0.37))
    x, _, w = tensors(device, torch.float32, 2, 1, 40, 16)
    out = direct.direct_product(x, w, scale=0.37)
    oracle.assert_close(out, oracle.product(x, w, 0.37), torch.float32)
    assert torch.equal(out, direct.direct_product(x, w, scale=0.37))
    x, _, w = tensors(device, torch.bfloat16, 5, 1, 40, 16)
    weight = torch.randn(16, 640, device=device).bfloat16()
    first, second = (decode.decode_linear(x, weight, w, None, scale=0.37) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("b", [1, 16, 96])
def test_no_tokens(device: torch.device, dtype: torch.dtype, b: int) -> None:
    x, dy, w = tensors(device, dtype, 0, 3, 2, b)
    assert direct.direct_product(x, w, scale=1.0).shape == (0, 3 * b)
    assert direct.direct_product(dy, w, scale=1.0, transpose=True).shape == (0, 2 * b)
    assert direct.direct_product(dy, w, scale=1.0, transpose=True).dtype == dtype
    dw = weight_grad.weight_grad(dy, x, b, scale=1.0)
    assert torch.equal(dw, torch.zeros(3, 2, b, device=device))


@pytest.mark.parametrize("t", [4, 20])
def test_range(device: torch.device, dtype: torch.dtype, t: int) -> None:
    # Large activations, gradients as small as the dtype holds to its usual precision, and usual kernels.
    x, dy, w = tensors(device, dtype, t, 2, 3, 32)
    small = 2e-4 if dtype == torch.float16 else 1e-8
    large = (x.float() * 1e4).to(dtype)
    tiny = (dy.float() * small).to(dtype)
    oracle.assert_close(direct.direct_product(large, w, scale=1 / 96), oracle.product(large, w), dtype)
    dx = direct.direct_product(tiny, w, scale=1.0, transpose=True)
    oracle.assert_close(dx, oracle.input_grad(tiny, w, 1.0), dtype)
    dw = weight_grad.weight_grad(tiny, large, 32, scale=1 / 96)
    oracle.assert_close(dw, oracle.weight_grad(tiny, large, 32), torch.float32)
    for size in (1e-3, 1e2):
        out = direct.direct_product(x, w * size, scale=1 / size)
        oracle.assert_close(out, oracle.product(x, w * size, 1 / size), dtype)
    if dtype != torch.float16:
        # float16 has no 1e-8 in w either; specs.py says so.
        out = direct.direct_product(x, w * 1e-8, scale=1.0)
        oracle.assert_close(out, oracle.product(x, w * 1e-8, 1.0), dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_not_finite(device: torch.device, dtype: torch.dtype) -> None:
    # Padding and rows read twice must not carry what is not finite to where it does not belong.
    x, dy, w = tensors(device, dtype, 20, 2, 3, 7)
    x[-1, 0] = torch.inf
    out = direct.direct_product(x, w, scale=1.0)
    assert torch.isfinite(out[:-1]).all()
    assert not torch.isfinite(out[-1]).any(dim=0)
    dw = weight_grad.weight_grad(dy, x, 7, scale=1.0)
    assert torch.isfinite(dw[:, 1:]).all()
    assert not torch.isfinite(dw[:, 0]).any()


@pytest.mark.parametrize("card", tiles.GENERATIONS)
def test_tiles(card: str) -> None:
    # A tile is whole for the matrix instructions, whatever the sizes.
    for itemsize in (2, 4):
        for t in (17, 64, 1024, 100_000):
            tile = tiles.product_tile(card, itemsize, t)
            assert tile.block_t >= 16
            assert tile.block_o >= 16
        for b in (1, 2, 7, 15, 16, 17, 48, 80, 96, 100, 192, 257, 768, 4096):
            step = tiles.inner_block(b, 64)
            assert step in (16, 32, 64)
            assert -(-b // step) * step <= max(16, 1.25 * -(-b // 16) * 16)
            if b > 64:
                assert tiles.diagonal_tile(card, itemsize, b).block_o in (32, 64, 128)
    assert tiles.inner_block(192, 64) == 64
    assert tiles.inner_block(96, 64) == 32
    assert tiles.inner_block(4096, 128) == 128


def test_generations() -> None:
    cards = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_86"}
    assert {capability: tiles.generation(capability) for capability in cards} == cards


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    x, dy, w = tensors(device, torch.float32, 4, 2, 3, 8)
    with pytest.raises(ShapeError, match=r"x has 16 features.*24"):
        direct.direct_product(dy, w, scale=1.0)
    with pytest.raises(ShapeError, match=r"x has 24 features.*16 transposed"):
        direct.direct_product(x, w, scale=1.0, transpose=True)
    with pytest.raises(ShapeError, match="float64"):
        direct.direct_product(x.double(), w, scale=1.0)
    with pytest.raises(ShapeError, match="float16"):
        direct.direct_product(x, w.half(), scale=1.0)
    with pytest.raises(ShapeError, match="float32, none of them 0"):
        expand.expand_weight(w[0], scale=1.0, dtype=torch.float32)
    with pytest.raises(ShapeError, match="float64"):
        expand.expand_weight(w, scale=1.0, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"bias \(24,\)"):
        direct.direct_product(x, w, scale=1.0, bias=x[0])
    with pytest.raises(ShapeError, match=r"out \(4, 16\) torch.float16"):
        direct.direct_product(x, w, scale=1.0, out=dy.half())
    with pytest.raises(ShapeError, match="rows must be contiguous"):
        direct.direct_product(x, w, scale=1.0, out=torch.zeros(16, 4, device=device).t())
    with pytest.raises(ShapeError, match=r"weight \(24, 16\)"):
        expand.add_expanded_(torch.zeros(24, 16, device=device), w, scale=1.0)
    with pytest.raises(ShapeError, match=r"weight \(24, 16\)"):
        expand.folded_weight(torch.zeros(24, 16, device=device), w, scale=1.0)
    with pytest.raises(ShapeError, match="expanded"):
        expand.add_expanded_(torch.zeros(1, 24, device=device).expand(16, 24), w, scale=1.0)
    weight = torch.zeros(16, 24, device=device, dtype=torch.half)
    for bad_x, bad_weight, message in (
        (x, weight.float(), "1 to 16 tokens.*float16 or bfloat16"),
        (x.half(), weight.bfloat16(), "torch.bfloat16"),
        (x.half().repeat(5, 1), weight, r"x \(20, 24\)"),
        (x[:0].half(), weight, r"x \(0, 24\)"),
        (x.half(), torch.zeros(24, 16, device=device, dtype=torch.half).t(), r"strides \(1, 16\)"),
        (dy.half(), weight, "do not fit"),
        (x.half(), weight[:8], "do not fit"),
    ):
        with pytest.raises(ShapeError, match=message):
            decode.decode_linear(bad_x, bad_weight, w, None, scale=1.0)
    with pytest.raises(ShapeError, match=r"bias \(24,\)"):
        decode.decode_linear(x.half(), weight, w, x[0].half(), scale=1.0)
    with pytest.raises(ShapeError, match="block_size 5"):
        weight_grad.weight_grad(dy, x, 5, scale=1.0)
    with pytest.raises(ShapeError, match="must agree"):
        weight_grad.weight_grad(dy[1:], x, 8, scale=1.0)
    with pytest.raises(ShapeError, match="must agree"):
        weight_grad.weight_grad(dy.half(), x, 8, scale=1.0)


def test_refuses_other_devices(device: torch.device) -> None:
    w = torch.empty(2, 3, 8, device="meta")
    with pytest.raises(BackendError, match="meta"):
        direct.direct_product(torch.empty(4, 24, device="meta"), w, scale=1.0)
    with pytest.raises(ShapeError, match="same device"):
        direct.direct_product(torch.zeros(4, 24, device=device), w, scale=1.0)


def test_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plans.clear_plans()
    assert "TRITON_INTERPRET=1" in str(specs.unavailable_reason(torch.device("cpu")))
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        weight_grad.weight_grad(torch.zeros(1, 4), torch.zeros(1, 4), 4, scale=1.0)


def test_missing_kernels_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "_installed", lambda package: package != "c3a_triton.kernels")
    with pytest.raises(BackendError, match="pip install"):
        specs.unavailable_reason(torch.device("cpu"))
    monkeypatch.setattr(specs, "_installed", lambda package: package != "triton")
    assert "triton is not installed" in str(specs.unavailable_reason(torch.device("cpu")))


def test_tf32_only_where_torch_allows_it() -> None:
    try:
        assert specs.precision(torch.float32) == "tf32x3"
        torch.set_float32_matmul_precision("high")
        assert specs.precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert specs.precision(torch.float32) == "tf32x3"


# Plans: what is decided once must not be taken for another call


LAYOUTS = ("plain", "apart", "columns", "repeated")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """`values` with other strides: rows apart, columns contiguous, or one row repeated."""
    if layout == "apart":
        wide = values.new_zeros(2 * values.shape[0], values.shape[1] + 3)
        wide[::2, 1:-2] = values
        return wide[::2, 1:-2]
    if layout == "columns":
        return values.t().contiguous().t()
    return values[:1].expand(values.shape[0], -1) if layout == "repeated" else values


@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32))
def test_any_sequence_of_calls_is_right(device: torch.device, seed: int) -> None:
    # Few values of everything, so that most calls find a plan, of a call that differs from them in one thing or more.
    # A wrong plan is far off; results of a few values are not, but beyond bounds that are meant for many.
    choose = random.Random(seed).choice
    for _ in range(12):
        dtype, b = choose(DTYPES), choose((2, 5, 16, 66))
        t, m, n = choose((0, 1, 2, 17, 18)), choose((1, 2)), choose((1, 2))
        transpose, scale = choose((False, True)), choose((1.0, 0.37))
        x, dy, w = tensors(device, dtype, t, m, n, b)
        x, dy = laid_out(x, choose(LAYOUTS)), laid_out(dy, choose(LAYOUTS))
        if choose((False, True)):
            w = w.transpose(0, 1).contiguous().transpose(0, 1)
        operand = dy if transpose else x
        expected = (oracle.input_grad if transpose else oracle.product)(operand, w, scale)
        bias = torch.randn(expected.shape[1], device=device).to(dtype) if choose((False, True)) else None
        out = torch.randn(expected.shape, device=device).to(dtype) if choose((False, True)) else None
        for summand in (bias, out):
            expected = expected if summand is None else expected + summand.cpu().double()
        result = direct.direct_product(operand, w, scale=scale, transpose=transpose, out=out, bias=bias)
        oracle.assert_close(result, expected, dtype, bound=3 * oracle.BOUNDS[dtype])

        dw = weight_grad.weight_grad(dy, x, b, scale=scale)
        if t:
            oracle.assert_close(dw, oracle.weight_grad(dy, x, b, scale), torch.float32)
        else:
            assert dw.shape == w.shape
            assert not dw.any()
        dense = expand.expand_weight(w, scale=scale, dtype=dtype, transpose=transpose)
        expected = oracle.dense(w, scale).T if transpose else oracle.dense(w, scale)
        oracle.assert_close(dense, expected, dtype, bound=3 * oracle.BOUNDS[dtype])
        weight = laid_out(torch.randn(m * b, n * b, device=device).to(dtype), choose(LAYOUTS[:3]))
        expected = weight.cpu().double() + oracle.dense(w, scale)
        folded = expand.folded_weight(weight, w, scale=scale)
        oracle.assert_close(folded, expected, dtype, bound=3 * oracle.BOUNDS[dtype])
        if decode.decodes(x, weight):
            expected = x.cpu().double() @ (weight.cpu().double() + oracle.dense(w, scale)).T
            y = decode.decode_linear(x, weight, w, None, scale=scale)
            oracle.assert_close(y, expected, dtype, bound=3 * oracle.BOUNDS[dtype])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Names and keyword arguments of launches that are not made, for tensors on any device."""
    calls: list[tuple[str, dict[str, Any]]] = []
    kernel_class = type(plans.kernels().direct.table_kernel)
    monkeypatch.setattr(kernel_class, "run", lambda kernel, **arguments: calls.append((kernel.__name__, arguments)))
    monkeypatch.setattr(specs, "unavailable_reason", lambda device: None)
    plans.clear_plans()
    yield calls
    plans.clear_plans()


@pytest.mark.interpreter
def test_plans_follow_the_tf32_switch(launched: list[tuple[str, dict[str, Any]]]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for t in (20, 3):
            x, dy, w = tensors(torch.device("cpu"), dtype, t, 2, 3, 8)
            for precision in ("highest", "high", "highest", "high"):
                torch.set_float32_matmul_precision(precision)
                try:
                    launched.clear()
                    direct.direct_product(x, w, scale=1.0)
                    weight_grad.weight_grad(dy, x, 8, scale=1.0)
                finally:
                    torch.set_float32_matmul_precision("highest")
                found.append({arguments["PRECISION"] for _, arguments in launched if "PRECISION" in arguments})
        # Nothing is compiled again for a switch that no operand of the kernel heeds.
        assert found == ([{"tf32x3"}, {"tf32"}] * 4 if dtype == torch.float32 else [{"tf32x3"}] * 8)


@pytest.mark.interpreter
def test_plans_are_of_one_device(launched: list[tuple[str, dict[str, Any]]]) -> None:
    for device in ("cpu", "meta", "cpu", "meta"):
        x, dy, w = tensors(torch.device(device), torch.float32, 300, 1, 1, 16)
        launched.clear()
        assert direct.direct_product(x, w, scale=1.0).device.type == device
        assert weight_grad.weight_grad(dy, x, 16, scale=1.0).device.type == device
        assert expand.expand_weight(w, scale=1.0, dtype=torch.float32).device.type == device
        allocated = {
            value.device.type for _, given in launched for value in given.values() if isinstance(value, Tensor)
        }
        assert allocated == {device}


def test_a_plan_runs_where_triton_launches_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current, n_devices = 0, 1

    @contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        nonlocal current
        before, current = current, device.index
        yield
        current = before

    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", made_current)

    def where(more: int) -> int:
        return current + more

    assert specs.on_device(torch.device("cpu"), where) is where
    assert specs.on_device(torch.device("cuda", 0), where) is where
    n_devices = 2
    runs = [specs.on_device(torch.device("cuda", i), where) for i in range(n_devices)]
    for outside in (0, 1):
        current = outside
        assert [run(10) for run in runs] == [10, 11]
        assert current == outside


def test_a_call_that_fails_fails_again(device: torch.device) -> None:
    x, w = torch.zeros(4, 24, device=device), torch.zeros(2, 3, 8, device=device)
    for _ in range(2):
        with pytest.raises(ShapeError, match="x has 24 features"):
            direct.direct_product(x, w, scale=1.0, transpose=True)
    direct.direct_product(x, w, scale=1.0)
    # The same shapes and dtypes: only the strides of what is written differ.
    direct.direct_product(x, w, scale=1.0, out=torch.zeros(4, 16, device=device))
    with pytest.raises(ShapeError, match="rows must be contiguous"):
        direct.direct_product(x, w, scale=1.0, out=torch.zeros(16, 4, device=device).t())


def test_nothing_of_w_is_kept(device: torch.device) -> None:
    x, _, w = tensors(device, torch.float32, 20, 2, 3, 16)
    weight = torch.zeros(32, 48, device=device)
    for _ in range(3):
        w.data.normal_()  # neither the address nor the version tells
        oracle.assert_close(direct.direct_product(x, w, scale=1.0), oracle.product(x, w, 1.0), torch.float32)
        oracle.assert_close(expand.expand_weight(w, scale=1.0, dtype=w.dtype), oracle.dense(w, 1.0), torch.float32)
        oracle.assert_close(expand.folded_weight(weight, w, scale=1.0), oracle.dense(w, 1.0), torch.float32)
