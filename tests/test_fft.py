"""The spectral launchers against the dense definition: natively on a GPU, in Triton's interpreter elsewhere.

Small and odd sizes in every dtype are those of `bench/kernel_cases.py` (test_guards.py); here are shapes that it lacks
and what there is besides: bases, chunks, strides, ranges. The interpreter takes some milliseconds per program,
and there is one per slot: large blocks appear once each, with few tokens, and what does not depend on the block size is
tested with small ones.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import bench_package  # noqa: F401
import oracle
import pytest
import torch
from torch import Tensor

from bench import launch_hooks
from c3a_triton.errors import BackendError, ShapeError
from c3a_triton.operator.launch import fft_bases, fft_plans, plans, specs, tiles
from c3a_triton.operator.launch.fft import fft_backward, fft_product, fft_weight_grad

pytestmark = pytest.mark.usefixtures("nan_filled")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (FP32, FP16, BF16)
# (tokens, m, n, b): m ≠ n wherever a mix-up could hide; ragged tokens; powers of two and not, odd, prime, 1, 2.
SHAPES = (
    (3, 20, 33, 1),
    (40, 5, 3, 2),
    (7, 2, 5, 3),
    (130, 3, 5, 7),
    (19, 4, 3, 16),
    (33, 2, 3, 31),
    (17, 3, 2, 34),
)
# Larger blocks, one dtype each, the last two taken apart.
LARGE = ((BF16, 19, 3, 2, 96), (FP16, 3, 1, 2, 72))
HUGE = ((FP32, 5, 2, 1, 192), (FP16, 2, 1, 1, 1024))


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def tensors(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [t, n·b], dy [t, m·b] and w [m, n, b] of random normal values."""
    x = torch.randn(t, n * b, device=device).to(dtype)
    dy = torch.randn(t, m * b, device=device).to(dtype)
    return x, dy, torch.randn(m, n, b, device=device)


def check(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> None:
    """Forward and both gradients against the definition."""
    x, dy, w = tensors(device, dtype, t, m, n, b)
    oracle.assert_close(fft_product(x, w, scale=0.37), oracle.product(x, w, 0.37), dtype)
    dx, dw = fft_backward(dy, x, w, scale=0.37)
    oracle.assert_close(dx, oracle.input_grad(dy, w, 0.37), dtype)
    # Spectra are rounded as x is: its dtype bounds the error of dw, which is float32.
    oracle.assert_close(dw, oracle.weight_grad(dy, x, b, 0.37), FP32, bound=oracle.BOUNDS[dtype])


@pytest.mark.parametrize(("dtype", "t", "m", "n", "b"), oracle.in_turn(SHAPES))
def test_small_blocks(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> None:
    check(device, dtype, t, m, n, b)


@pytest.mark.parametrize(("dtype", "t", "m", "n", "b"), LARGE)
def test_large_blocks(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> None:
    check(device, dtype, t, m, n, b)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "t", "m", "n", "b"), HUGE)
def test_huge_blocks(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> None:
    x, _, w = tensors(device, dtype, t, m, n, b)
    oracle.assert_close(fft_product(x, w, scale=0.37), oracle.product(x, w, 0.37), dtype)


def forget_plans() -> None:
    fft_bases._basis.cache_clear()
    plans.clear_plans()


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """For tests that change what plans are made of."""
    forget_plans()
    yield
    forget_plans()


def transform(device: torch.device, dtype: torch.dtype, b: int) -> fft_bases.Transform:
    return fft_bases.transform(device, dtype, b, specs.precision(dtype, "tf32"))


# Once, and three times over; where something even or odd is left over; tokens that do not fill a tile of whole blocks.
@pytest.mark.parametrize(
    ("dtype", "t", "m", "n", "b"),
    [(BF16, 11, 2, 1, 256), (FP16, 5, 1, 2, 320), (FP32, 3, 2, 1, 258), (BF16, 130, 1, 1, 136), (FP32, 3, 1, 1, 528)],
)
def test_blocks_that_are_taken_apart(device: torch.device, dtype: torch.dtype, t: int, m: int, n: int, b: int) -> None:
    check(device, dtype, t, m, n, b)


def test_how_blocks_are_taken_apart() -> None:
    sizes = (1, 96, 128, 129, 192, 256, 258, 768, 1024, 4096, 1 << 20)
    assert {b: fft_bases.taken_apart(b) for b in sizes} == {
        1: (1, 1),
        96: (1, 96),
        128: (1, 128),
        129: (1, 129),
        192: (2, 96),
        256: (2, 128),
        258: (2, 129),
        768: (8, 96),
        1024: (8, 128),
        4096: (32, 128),
        1 << 20: (64, 1 << 14),  # no more blocks than a tile has rows
    }


@pytest.mark.parametrize("b", [1, 2, 3, 7, 16, 33, 64, 96, 97])
@pytest.mark.parametrize("basis_dtype", [FP32, BF16])
def test_basis(b: int, basis_dtype: torch.dtype) -> None:
    # O Oᵀ = 1 up to the gain, and each slot is the DFT it stands for.
    basis = fft_bases._basis(b, basis_dtype, False, torch.device("cpu"))
    matrix, transposed = basis.inverse.double(), basis.forward.double()
    assert torch.equal(matrix.T, transposed)
    assert all(size % fft_bases.PAD == 0 for size in matrix.shape)
    slots = (b + 1) // 2
    assert not matrix[b:].any()
    assert not matrix[:, 2 * slots :].any()
    matrix = matrix[:b, : 2 * slots]
    tolerance = 1e-6 if basis_dtype == FP32 else 1e-2
    torch.testing.assert_close(matrix @ matrix.T * basis.gain, torch.eye(b).double(), atol=tolerance, rtol=0)
    x = torch.randn(b, dtype=torch.float64)
    z = (x @ matrix).view(slots, 2) * (basis.gain * b / 2) ** 0.5
    spectrum = torch.fft.rfft(x)
    expected = torch.view_as_real(spectrum)[:slots].clone()
    expected[0, 1] = spectrum[b // 2].real if b % 2 == 0 else 0
    expected[0] /= 2**0.5
    torch.testing.assert_close(z, expected, atol=10 * tolerance, rtol=0)


def test_tf32_rounds_to_nearest() -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-12, 0.0])])
    rounded = fft_bases._to_tf32(x)
    assert not (rounded.view(torch.int32) & 0x1FFF).any()
    assert (rounded - x).abs().max() <= x.abs().max() * 2**-11
    assert rounded[-4:].tolist() == [1.0, 1 + 2**-9, -1.0, 0.0]
    # The mean error is that of rounding, not of cutting off.
    assert ((rounded.abs() - x.abs()) / x.abs().clamp_min(1e-30))[:1000].mean().abs() < 5e-5


@pytest.mark.parametrize(
    ("dtype", "m", "n", "b"), oracle.in_turn([(3, 2, 32), (5, 3, 7), (10, 30, 1)], (BF16, FP32, FP16))
)
def test_product_epilogue(device: torch.device, dtype: torch.dtype, m: int, n: int, b: int) -> None:
    t = 21
    x, dy, w = tensors(device, dtype, t, m, n, b)
    bias = torch.randn(m * b, device=device).to(dtype)
    base = torch.randn(t, m * b, device=device).to(dtype)
    product = oracle.product(x, w, 0.37)
    oracle.assert_close(fft_product(x, w, scale=0.37, bias=bias), product + bias.cpu().double(), dtype)
    # Both at once, into rows of a wider tensor whose other columns stay as they are.
    wide = torch.full((t, m * b + 3), 7.0, device=device, dtype=dtype)
    wide[:, 1:-2] = base
    out = wide[:, 1:-2]
    assert fft_product(x, w, scale=0.37, out=out, bias=bias) is out
    oracle.assert_close(out, product + base.cpu().double() + bias.cpu().double(), dtype)
    assert (wide[:, 0] == 7).all()
    assert (wide[:, -2:] == 7).all()
    dx = x.clone()
    assert fft_backward(dy, x, w, scale=0.37, out=dx)[0] is dx
    oracle.assert_close(dx, oracle.input_grad(dy, w, 0.37) + x.cpu().double(), dtype)


@pytest.mark.parametrize(("dtype", "b"), [(FP32, 6), (FP16, 5), (BF16, 24)])
def test_strided_operands(device: torch.device, dtype: torch.dtype, b: int) -> None:
    m, n, t = 2, 3, 18
    wide = torch.randn(2 * t, n * b + 5, device=device).to(dtype)
    columns = torch.randn(n * b, t, device=device).to(dtype).t()
    dy = torch.randn(t, m * b + 1, device=device).to(dtype)[:, 1:]
    w = torch.randn(n, m, b, device=device).transpose(0, 1)
    for x in (wide[::2, 3:-2], columns, wide[:1, 3:-2].expand(t, -1)):
        oracle.assert_close(fft_product(x, w, scale=1.0), oracle.product(x, w, 1.0), dtype)
        dw = fft_weight_grad(dy, x, b, scale=1.0)
        oracle.assert_close(dw, oracle.weight_grad(dy, x, b, 1.0), FP32, bound=oracle.BOUNDS[dtype])


# From 32 on, spectra of bfloat16 are bfloat16.
@pytest.mark.parametrize(("dtype", "b"), [(FP32, 8), (FP16, 8), (BF16, 8), (BF16, 32)])
def test_range(device: torch.device, dtype: torch.dtype, b: int) -> None:
    # Large activations, all of one sign so that their sum is larger still, and gradients as small as the dtype holds.
    x, dy, w = tensors(device, dtype, 20, 2, 3, b)
    large = (x.float().abs() * 1e4).to(dtype)
    tiny = (dy.float() * (2e-4 if dtype == FP16 else 1e-8)).to(dtype)
    oracle.assert_close(fft_product(large, w, scale=1e-2 / b), oracle.product(large, w, 1e-2 / b), dtype)
    dx, dw = fft_backward(tiny, large, w, scale=1.0)
    oracle.assert_close(dx, oracle.input_grad(tiny, w, 1.0), dtype)
    oracle.assert_close(dw, oracle.weight_grad(tiny, large, b, 1.0), FP32, bound=oracle.BOUNDS[dtype])


@pytest.mark.parametrize(("dtype", "b"), [(FP32, 8), (FP16, 8), (BF16, 32)])
def test_small_kernels_and_scales(device: torch.device, dtype: torch.dtype, b: int) -> None:
    # The scale is applied to the float32 sum: kernels of training size, far below float16's smallest normal number.
    x, _, w = tensors(device, dtype, 20, 2, 3, b)
    w *= 1e-7
    oracle.assert_close(fft_product(x, w, scale=1e6), oracle.product(x, w, 1e6), dtype)


def test_chunks(device: torch.device, fresh_plans: None, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, t, m, n, b = FP32, 300, 2, 3, 4
    x, dy, w = tensors(device, dtype, t, m, n, b)
    bias = torch.randn(m * b, device=device).to(dtype)

    def run(scratch: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(specs, "scratch_bytes", lambda device: scratch)
        plans.clear_plans()
        dx, dw = fft_backward(dy, x, w, scale=0.37)
        return fft_product(x, w, scale=0.37, bias=bias), dx, dw

    whole, chunked = run(0), run(1)
    assert torch.equal(chunked[2], fft_weight_grad(dy, x, b, scale=0.37))
    assert fft_plans._cut(transform(device, dtype, b), t, m, n) == (False, 128)
    # Tokens do not depend on each other; the gradient of w is summed in another order.
    assert torch.equal(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])
    torch.testing.assert_close(whole[2], chunked[2], atol=1e-5, rtol=1e-5)
    oracle.assert_close(chunked[2], oracle.weight_grad(dy, x, b, 0.37), FP32, bound=oracle.BOUNDS[dtype])


@pytest.mark.parametrize(("dtype", "b"), [(FP32, 4), (FP16, 5)])
def test_chunks_with_a_whole_spectrum(
    device: torch.device, dtype: torch.dtype, b: int, fresh_plans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The spectrum of x is narrow and computed at once, what it is multiplied to is wide and cut.
    t, m, n = 300, 12, 2
    x, dy, w = tensors(device, dtype, t, m, n, b)
    whole = fft_product(x, w, scale=0.37), *fft_backward(dy, x, w, scale=0.37)
    spectrum = transform(device, dtype, b).memory(t, n).n_bytes
    monkeypatch.setattr(specs, "scratch_bytes", lambda device: 2 * spectrum)
    plans.clear_plans()
    cut = fft_product(x, w, scale=0.37), *fft_backward(dy, x, w, scale=0.37)
    with launch_hooks.noted() as names:
        fft_product(x, w, scale=0.37)
        fft_backward(dy, x, w, scale=0.37)
    # The backward has three chunks of dy, and x in the first of them.
    assert [names.count(name) for name in ("spectra_kernel", "results_kernel")] == [1 + 3, 3 + 3]
    assert torch.equal(cut[0], whole[0])
    assert torch.equal(cut[1], whole[1])
    oracle.assert_close(cut[2], oracle.weight_grad(dy, x, b, 0.37), FP32, bound=oracle.BOUNDS[dtype])
    assert torch.equal(cut[2], fft_weight_grad(dy, x, b, scale=0.37))


def test_chunk_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    of = transform(torch.device("cpu"), BF16, 256)

    def cut(n_tokens: int, scratch: int, x_blocks: int = 16) -> tuple[bool, int]:
        monkeypatch.setattr(specs, "scratch_bytes", lambda device: scratch)
        return fft_plans._cut(of, n_tokens, x_blocks, 16)

    assert cut(8192, 256 << 20) == (True, 8192)
    whole, step = cut(8192, 24 << 20)
    assert not whole
    assert step % 128 == 0
    assert 0.8 * (24 << 20) <= 2 * step * 4096 * 2 <= 24 << 20
    assert cut(1, 24 << 20) == (True, 1)
    assert cut(8192, 0) == (True, 8192)
    # What the whole spectrum of a narrow x takes is not there for the others.
    whole, step = cut(8192, 24 << 20, x_blocks=1)
    assert whole
    assert 2 * 8192 * 256 + 2 * step * 4096 <= 24 << 20
    # Rows are counted in 32 bits, whatever the scratch.
    whole, step = cut(2**31, 0)
    assert not whole
    assert step * 16 * of.apart < 2**31


def test_scratch_follows_the_cache_where_memory_is_far_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda:0")

    def scratch(name: str, cache: int) -> int:
        monkeypatch.setattr(specs, "card_of", lambda device: name)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=cache << 20)
        )
        return specs.scratch_bytes.__wrapped__(card) >> 20

    assert scratch("sm_86", 96) == 48  # an L40S
    assert scratch("sm_86", 6) == 256  # an A10
    assert scratch("sm_90", 50) == 256  # an H200
    assert scratch("sm_80", 40) == 256  # an A100


def test_the_same_from_run_to_run(device: torch.device, deterministic: None) -> None:
    x, dy, w = tensors(device, FP32, 600, 1, 2, 4)  # a layer this small splits its tokens over programs
    first, second = ((fft_product(x, w, scale=1.0), *fft_backward(dy, x, w, scale=1.0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    oracle.assert_close(first[2], oracle.weight_grad(dy, x, 4, 1.0), FP32)


@pytest.mark.parametrize("b", [1, 32])
def test_no_tokens(device: torch.device, dtype: torch.dtype, b: int) -> None:
    x, dy, w = tensors(device, dtype, 0, 3, 2, b)
    assert fft_product(x, w, scale=1.0).shape == (0, 3 * b)
    dx, dw = fft_backward(dy, x, w, scale=1.0)
    assert dx.shape == (0, 2 * b)
    assert dx.dtype == dtype
    assert torch.equal(dw, torch.zeros_like(w))
    assert torch.equal(fft_weight_grad(dy, x, b, scale=1.0), dw)


def test_tokens_do_not_touch_each_other(device: torch.device, dtype: torch.dtype) -> None:
    x, _, w = tensors(device, dtype, 20, 2, 3, 8)
    clean = fft_product(x, w, scale=1.0)
    x[7] = float("nan")
    x[11, 2] = float("inf")
    out = fft_product(x, w, scale=1.0)
    assert torch.isnan(out[7]).all()
    assert not torch.isfinite(out[11]).all()
    others = [t for t in range(20) if t not in (7, 11)]
    assert torch.equal(out[others], clean[others])


def test_spectra_of_bfloat16_are_bfloat16(device: torch.device) -> None:
    scratch = {dtype: transform(device, dtype, 64).scratch for dtype in DTYPES}
    assert scratch == {BF16: BF16, FP16: FP32, FP32: FP32}
    assert transform(device, BF16, 16).scratch == FP32


def test_tf32_only_where_torch_allows_it(device: torch.device) -> None:
    try:
        assert transform(device, FP32, 64).precision == "tf32x3"
        torch.set_float32_matmul_precision("high")
        assert transform(device, FP32, 64).precision == "tf32"
        x, dy, w = tensors(device, FP32, 9, 2, 3, 16)
        oracle.assert_close(fft_product(x, w, scale=1.0), oracle.product(x, w, 1.0), FP32, bound=2e-3)
        dw = fft_weight_grad(dy, x, 16, scale=1.0)
        oracle.assert_close(dw, oracle.weight_grad(dy, x, 16, 1.0), FP32, bound=2e-3)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_tiles() -> None:
    for card in tiles.GENERATIONS:
        for itemsize in (2, 4):
            for b in (1, 2, 7, 16, 33, 96, 192, 256, 768, 1 << 20):
                apart, size = fft_bases.taken_apart(b)
                tile = tiles.transform_tile(card, itemsize, size, apart)
                # Whole tiles of rows fit the padding of spectra, whole tiles of columns that of the basis; a tile
                # holds whole blocks.
                assert fft_bases.PAD % tile.block_t == 0
                assert fft_bases.PAD % tile.block_o == 0
                assert tile.block_t % apart == 0
                assert min(tile.block_o, tile.block_i) >= 16
            assert tiles.mix_tile(card, itemsize, 1, 2, 2).block_t == 16
            outer = tiles.outer_tile(card, itemsize, 2, 2)
            assert min(outer.block_o, outer.block_i) == 16
            # Few wide tiles: what they read of the other operand is read as often as there are tiles.
            assert tiles.outer_tile(card, itemsize, 96, 96).block_o >= 64


def test_where_one_pass_over_dy_serves_both() -> None:
    assert tiles.mixes_and_sums("sm_90", 2, 128, 128)
    assert tiles.mixes_and_sums("sm_90", 2, 224, 64)
    assert not tiles.mixes_and_sums("sm_90", 2, 256, 128)
    assert not tiles.mixes_and_sums("sm_80", 2, 128, 128)
    assert not tiles.mixes_and_sums("sm_90", 4, 16, 16)
    assert tiles.mix_outer_tile("sm_90", 2, 224, 64).block_o == 256


# Launches of a call


def test_three_launches_a_direction(device: torch.device) -> None:
    x, dy, w = tensors(device, BF16, 20, 2, 3, 32)
    out = torch.randn_like(dy)
    with launch_hooks.noted() as forward:
        fft_product(x, w, scale=1.0, bias=dy[0], out=out)
    with launch_hooks.noted() as backward:
        fft_backward(dy, x, w, scale=1.0, out=torch.zeros_like(x))
    assert forward == ["spectra_kernel", "mix_kernel", "results_kernel"]
    assert backward == ["spectra_kernel", "outer_kernel", "results_kernel"]


def test_chunks_take_three_more(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "scratch_bytes", lambda device: 1)
    x, dy, w = tensors(device, BF16, 300, 1, 1, 32)
    with launch_hooks.noted() as forward:
        fft_product(x, w, scale=1.0)
    with launch_hooks.noted() as backward:
        fft_backward(dy, x, w, scale=1.0)
    assert forward == ["spectra_kernel", "mix_kernel", "results_kernel"] * 3
    assert backward == ["spectra_kernel", "outer_kernel", "results_kernel"] * 3


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    x, dy, w = tensors(device, FP32, 4, 2, 3, 8)
    with pytest.raises(ShapeError, match=r"x has 16 features.*24"):
        fft_product(dy, w, scale=1.0)
    with pytest.raises(ShapeError, match="float64"):
        fft_product(x.double(), w, scale=1.0)
    with pytest.raises(ShapeError, match=r"out \(4, 16\) torch.float16"):
        fft_product(x, w, scale=1.0, out=dy.half())
    with pytest.raises(ShapeError, match="block_size 5"):
        fft_weight_grad(dy, x, 5, scale=1.0)
    with pytest.raises(ShapeError, match="must agree"):
        fft_backward(dy[1:], x, w, scale=1.0)
    with pytest.raises(BackendError, match="meta"):
        fft_product(x.to("meta"), w.to("meta"), scale=1.0)
