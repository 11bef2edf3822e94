"""Numbers under stress on every backend: what is not finite, too large, too small, or too far away in memory.

A row of x that is not finite may spoil its own output and nothing else, as in `nn.Linear`. Where a value is infinite,
`nn.Linear` gives infinities; Fourier backends subtract them from each other and give NaN, in the same places.
"""

import functools

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from c3a_triton import c3a_linear, circulant_linear
from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.operator.dispatch import BACKENDS
from c3a_triton.operator.launch import specs, tiles

BACKEND_NAMES = [name for name in BACKENDS if name not in ("auto", "fold")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOT_FINITE = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
# An infinity takes the same way as NaN.
NOT_FINITE_OF_DTYPE = pytest.mark.parametrize(
    ("dtype", "value"), [*((dtype, torch.nan) for dtype in DTYPES), (torch.float16, torch.inf)], ids=str
)
NOT_FINITE_OF_FEW_DTYPES = pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, torch.nan), (torch.bfloat16, torch.inf)], ids=str
)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKEND_NAMES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
M, N, B, T = 2, 3, 8, 20

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


def operands(device, dtype, n_tokens=T):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, N * B, generator=generator).to(device, dtype)
    dy = torch.randn(n_tokens, M * B, generator=generator).to(device, dtype)
    w = torch.randn(M, N, B, generator=generator).to(device)
    return x, dy, w


def run(x, dy, w, backend):
    """y, dx and dw."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = circulant_linear(x, w, backend=backend)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy)


@functools.cache
def clean(device, dtype, backend):
    """y, dx and dw of the operands as they are."""
    return run(*operands(device, dtype), backend)


def split(out, spoilt):
    """(what may be spoilt, the rest) of an output by a mask over its leading axes."""
    return out[spoilt], out[~spoilt]


# Not finite


@EVERY_BACKEND
@NOT_FINITE_OF_DTYPE
def test_a_row_of_x_spoils_itself_alone(device, backend, dtype, value):
    x, dy, w = operands(device, dtype)
    clean_y, clean_dx, clean_dw = clean(device, dtype, backend)
    x[7, B + 3] = value
    y, dx, dw = run(x, dy, w, backend)
    row = torch.arange(T, device=device) == 7
    bad, good = split(y, row)
    assert not torch.isfinite(bad).any()
    assert torch.equal(good, split(clean_y, row)[1])
    assert torch.equal(dx, clean_dx)
    # Every dw of the block that the element belongs to is a sum over it; the others are not.
    block = torch.arange(N, device=device) == 1
    assert not torch.isfinite(dw[:, block]).any()
    assert torch.equal(dw[:, ~block], clean_dw[:, ~block])


@EVERY_BACKEND
@NOT_FINITE_OF_FEW_DTYPES
def test_a_row_of_dy_spoils_itself_alone(device, backend, dtype, value):
    """For small b the kernel of dw behind "direct" and "expand" sums blocks by a product: all of dw may be NaN."""
    x, dy, w = operands(device, dtype)
    _, clean_dx, clean_dw = clean(device, dtype, backend)
    dy[T - 1, 2] = value
    _, dx, dw = run(x, dy, w, backend)
    assert not torch.isfinite(dx[-1]).any()
    assert torch.equal(dx[:-1], clean_dx[:-1])
    assert not torch.isfinite(dw[0]).any()
    if backend not in ("direct", "expand"):
        assert torch.equal(dw[1], clean_dw[1])


@EVERY_BACKEND
@NOT_FINITE_OF_FEW_DTYPES
def test_w_spoils_its_row_and_column_of_blocks(device, backend, dtype, value):
    x, dy, w = operands(device, dtype)
    clean_y, clean_dx, _ = clean(device, dtype, backend)
    w[1, 2, 5] = value
    y, dx, dw = run(x, dy, w, backend)
    assert not torch.isfinite(y[:, B:]).any()
    assert torch.equal(y[:, :B], clean_y[:, :B])
    assert not torch.isfinite(dx[:, 2 * B :]).any()
    assert torch.equal(dx[:, : 2 * B], clean_dx[:, : 2 * B])
    assert torch.isfinite(dw).all()


@pytest.mark.parametrize("backend", ["reference", "direct", "expand"])
@EVERY_DTYPE
def test_infinities_are_those_of_linear(device, backend, dtype):
    x, _, w = operands(device, dtype)
    x[7, B + 3] = torch.inf
    y = circulant_linear(x, w, backend=backend)
    expected = F.linear(x[7].double(), oracle.dense(w).to(device))
    assert torch.equal(y[7].double(), expected)


@pytest.mark.parametrize("backend", ["torch", "fft"])
def test_infinities_are_nan_to_fourier(device, backend):
    x, _, w = operands(device, torch.float32)
    x[7, B + 3] = torch.inf
    assert torch.isnan(circulant_linear(x, w, backend=backend)[7]).all()


@pytest.mark.parametrize("backend", [*BACKEND_NAMES, "fold"])
@NOT_FINITE
def test_a_layer_keeps_rows_apart(device, backend, value):
    base = nn.Linear(N * B, M * B).to(device)
    layer = C3ALinear(base, block_size=B, init_weights="gaussian", backend=backend)
    layer.requires_grad_(False)
    x, dy, _ = operands(device, torch.float32)

    def both(x):
        x = x.clone().requires_grad_()
        y = layer(x)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    clean = both(x)
    x[7, 3] = value
    (y, dx), (clean_y, clean_dx) = both(x), clean
    others = torch.arange(T, device=device) != 7
    assert not torch.isfinite(y[7]).any()
    assert torch.equal(y[others], clean_y[others])
    assert torch.equal(dx, clean_dx)


# Large and small


@EVERY_BACKEND
@pytest.mark.parametrize("b", [8, 64])
def test_float16_overflows_in_the_output_alone(device, backend, b):
    """Only results beyond 65504 are infinite, with their sign: sums and spectra on the way (here b · 1e4) are not."""
    x = torch.full((4, 2 * b), 1e4, dtype=torch.float16, device=device)
    x[1] = -x[1]
    x[2] /= 4
    x[3] = torch.randn(2 * b, generator=torch.Generator().manual_seed(1)).to(x) * 1e4
    w = torch.full((1, 2, b), 10.0, device=device)
    exact = oracle.product(x, w)
    assert exact[0, 0] > 65504 > exact[2, 0]
    y = circulant_linear(x, w, backend=backend)
    assert (y[0] == torch.inf).all()
    assert (y[1] == -torch.inf).all()
    oracle.assert_close(y[2:], exact[2:], torch.float16)


@EVERY_BACKEND
@EVERY_DTYPE
def test_constant_activations_of_ten_thousand(device, backend, dtype):
    """All of one sign, so that a block's spectrum peaks at b · 1e4."""
    b = 16
    x, w = torch.full((5, 2 * b), 1e4, dtype=dtype, device=device), torch.rand(1, 2, b, device=device) + 0.5
    dy = torch.full((5, b), 1e-4 if dtype == torch.float16 else 1e-8, dtype=dtype, device=device)
    y, dx, dw = run(x, dy, w, backend)
    oracle.assert_close(y, oracle.product(x, w), dtype)
    oracle.assert_close(dx, oracle.input_grad(dy, w), dtype)
    oracle.assert_close(dw, oracle.weight_grad(dy, x, b), torch.float32, bound=oracle.BOUNDS[dtype])


@EVERY_BACKEND
def test_subnormal_float16_is_not_flushed(device, backend):
    """Inputs below 6e-5 have few digits in float16, and those count: the reference starts from the rounded input."""
    x, dy, w = operands(device, torch.float32)
    x, dy, w = (x * 2e-6).half(), (dy * 2e-6).half(), w * 1e4
    assert x.abs().max() < 6.1e-5
    y, dx, dw = run(x, dy, w, backend)
    for out, ref in ((y, oracle.product(x, w)), (dx, oracle.input_grad(dy, w))):
        oracle.assert_close(out, ref, torch.float16)
    oracle.assert_close(dw, oracle.weight_grad(dy, x, B), torch.float32, bound=oracle.BOUNDS[torch.float16])


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subnormal_float32_is_right_or_zero(device, backend, dtype):
    """Hardware may flush what is below 1.2e-38. It costs no more than that, and no other row anything."""
    x, _, w = operands(device, dtype)
    clean = circulant_linear(x, w, backend=backend)
    x[3] = x[3].double().mul(1e-39).to(dtype)
    y = circulant_linear(x, w, backend=backend)
    others = torch.arange(T, device=device) != 3
    assert torch.equal(y[others], clean[others])
    assert (y[3].cpu().double() - oracle.product(x[3], w)).abs().max() < 2**-126


# Far away


@pytest.fixture
def far(tmp_path, device):
    """2³² float16 values."""
    if device.type != "cpu":
        return torch.empty(2**32 + 64, dtype=torch.float16, device=device)
    # A sparse file: addresses without memory behind them.
    return torch.from_file(str(tmp_path / "far"), shared=True, size=2**32 + 64, dtype=torch.float16)


@EVERY_BACKEND
def test_rows_far_apart_in_memory(backend, far, device):
    """Row 2 is 2³¹ elements from row 0: one token out of each of many long sequences. 32 bits would point before it."""
    x = far.as_strided((3, N * B), (2**30 + 8, 1), 2**31)
    dy = far.as_strided((3, M * B), (2**30 + 8, 1), 2**31 - 64)
    values_x, values_dy, w = operands(device, torch.float16, 3)
    x.copy_(values_x)
    dy.copy_(values_dy)
    y, dx, dw = run(x, dy, w, backend)
    oracle.assert_close(y, oracle.product(x, w), torch.float16)
    oracle.assert_close(dx, oracle.input_grad(dy, w), torch.float16)
    oracle.assert_close(dw, oracle.weight_grad(dy, x, B), torch.float32, bound=oracle.BOUNDS[torch.float16])


def test_rows_are_copied_where_a_tile_would_not_fit_32_bits():
    far = torch.empty(specs.MAX_ROW_STRIDE * 2 + 8)
    near = far.as_strided((3, 4), (specs.MAX_ROW_STRIDE, 1))
    assert specs.with_contiguous_rows(near) is near
    apart = far.as_strided((2, 4), (specs.MAX_ROW_STRIDE + 1, 1))
    assert specs.with_contiguous_rows(apart).is_contiguous()
    alone = far.as_strided((1, 4), (specs.MAX_ROW_STRIDE + 1, 1))
    assert specs.with_contiguous_rows(alone) is alone


def test_no_tile_has_more_rows_than_fit_32_bits():
    def tiles_in(table):
        if isinstance(table, tiles.TileConfig):
            return [table]
        values = table.values() if isinstance(table, dict) else table if isinstance(table, tuple) else ()
        return [tile for value in values for tile in tiles_in(value)]

    found = [tile for table in vars(tiles).values() for tile in tiles_in(table)]
    assert len(found) > 10
    assert max(tile.block_t for tile in found) * specs.MAX_ROW_STRIDE < 2**31


def test_the_fused_layer_takes_rows_far_apart(far, device):
    x = far.as_strided((3, N * B), (2**30 + 8, 1), 2**31)
    values, _, w = operands(device, torch.float16, 3)
    x.copy_(values)
    weight = torch.randn(M * B, N * B, device=device).half()
    for backend in ("direct", "expand"):
        y = c3a_linear(x, weight, None, [w], backend=backend)
        exact = oracle.product(x, weight[..., None], 1.0) + oracle.product(x, w)
        oracle.assert_close(y, exact, torch.float16)
