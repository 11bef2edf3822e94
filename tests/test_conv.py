"""`C3AConv2d` against convolutions in float64 whose ΔW is written out tap by tap."""

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import c3a_triton
from c3a_triton import AdapterStateError, BackendError, C3AConfig, C3AConv2d, C3ALinear, ConfigError, ShapeError

IN, OUT = 12, 24
# Everything that nn.Conv2d takes beside its channels and its kernel size.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded and strided": {"padding": (1, 2), "stride": (2, 1)},
    "dilated, same": {"padding": "same", "dilation": 2},
    "reflected": {"padding": 2, "padding_mode": "reflect"},
    "circular": {"padding": (1, 0), "padding_mode": "circular"},
    "groups": {"groups": 2, "padding": 1},
    "no bias": {"bias": False},
}


def make(
    b: int = 3, size: int | tuple[int, int] = (3, 2), dtype: torch.dtype = torch.float32, **form: Any
) -> C3AConv2d:
    base = nn.Conv2d(IN, OUT, size, **form).to(dtype)
    return C3AConv2d(base, "default", b, "gaussian", layer_name="features.conv")


def dense(layer: C3AConv2d, name: str = "default") -> Tensor:
    """ΔW in float64, a tap at a time: kernel columns tap · n … tap · n + n − 1 belong to the tap of that index."""
    base, w = layer.get_base_layer(), layer.c3a_kernel[name]
    kh, kw = base.kernel_size
    n = base.in_channels // base.groups // w.shape[-1]
    assert w.shape[1] == kh * kw * n
    scale = 1 / (kh * kw * base.in_channels // base.groups)
    delta = torch.zeros(base.weight.shape, dtype=torch.float64)
    for row in range(kh):
        for column in range(kw):
            tap = row * kw + column
            delta[:, :, row, column] = oracle.dense(w[:, tap * n : (tap + 1) * n], scale)
    return delta


def convolved(x: Tensor, weight: Tensor, base: nn.Conv2d) -> Tensor:
    """The convolution without bias that the base would do, with another weight, in float64."""
    twin = nn.Conv2d(
        base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding, base.dilation, base.groups,
        bias=False, padding_mode=base.padding_mode,
    ).double()  # fmt: skip
    return torch.func.functional_call(twin, {"weight": weight}, (x.double(),))


def biased(layer: C3AConv2d) -> Tensor | float:
    return 0.0 if layer.bias is None else layer.bias.detach().double()[:, None, None]


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_gradients(form: str) -> None:
    layer = make(**FORMS[form])
    base, w = layer.base_layer, layer.c3a_kernel["default"]
    x = torch.randn(2, IN, 9, 8, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    delta = dense(layer).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    expected = convolved(exact_x, base.weight.detach().double() + delta, base)
    expected.backward(dy.double())
    oracle.assert_close(y, expected + biased(layer), torch.float32)
    oracle.assert_close(x.grad, exact_x.grad, torch.float32)
    oracle.assert_close(layer(x) - base(x), convolved(x.detach(), delta.detach(), base), torch.float32, bound=1e-4)
    # dw: the entries of the dense gradient that each element of w stands at, summed.
    probe = torch.zeros_like(w, dtype=torch.float64)
    for index in range(0, w.numel(), 5):
        unit = torch.zeros_like(w)
        unit.view(-1)[index] = 1
        other = make(**FORMS[form])
        other.c3a_kernel["default"].data = unit
        probe.view(-1)[index] = (dense(other) * delta.grad).sum()
    chosen = torch.arange(0, w.numel(), 5)
    oracle.assert_close(w.grad.view(-1)[chosen], probe.view(-1)[chosen], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    # As many inputs as a ΔW in float16 without a rest of the scale would be subnormal for.
    base = nn.Conv2d(512, 16, 3, padding=1, bias=False).to(dtype)
    layer = C3AConv2d(base, "default", 16)
    if dtype == torch.float64:
        layer.c3a_kernel["default"].data = layer.c3a_kernel["default"].data.double()
    x = torch.randn(1, 512, 6, 6).to(dtype)
    with torch.no_grad():
        base.weight.zero_()
    oracle.assert_close(layer(x), convolved(x, dense(layer), base), dtype)
    with torch.no_grad():
        assert torch.isfinite(layer(x * 1e3)).all()


def test_under_autocast_it_computes_in_the_autocast_dtype() -> None:
    layer = make(padding=1)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
    x = torch.randn(2, IN, 5, 5)
    exact = convolved(x, dense(layer), layer.base_layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    error = (y - exact).norm() / exact.norm()
    assert 5e-4 < error < 5e-3


def test_one_by_one_is_the_linear_layer() -> None:
    layer = make(4, size=1)
    linear = C3ALinear(nn.Linear(IN, OUT), "default", 4)
    linear.base_layer.weight.data = layer.base_layer.weight.data.flatten(1)
    linear.base_layer.bias.data = layer.base_layer.bias.data
    linear.c3a_kernel["default"].data = layer.c3a_kernel["default"].data
    x = torch.randn(2, IN, 5, 4)
    torch.testing.assert_close(layer(x), linear(x.movedim(1, -1)).movedim(-1, 1))


def test_an_image_without_batch_and_channels_last() -> None:
    layer = make(padding=1)
    x = torch.randn(2, IN, 6, 5)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_several_adapters_of_different_block_sizes_and_rows_of_their_own() -> None:
    layer = make(3)
    layer.update_layer("other", 6, "gaussian")
    layer.set_adapter(["default", "other"])
    x, base = torch.randn(3, IN, 5, 5), layer.base_layer
    both = base.weight.detach().double() + dense(layer) + dense(layer, "other")
    oracle.assert_close(layer(x), convolved(x, both, base) + biased(layer), torch.float32)
    rows = layer(x, adapter_names=["other", "__base__", "default"])
    for row, weight in enumerate([dense(layer, "other"), 0, dense(layer)]):
        expected = convolved(x[row : row + 1], base.weight.detach().double() + weight, base) + biased(layer)
        oracle.assert_close(rows[row : row + 1], expected, torch.float32)


@pytest.mark.parametrize("form", ["plain", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_and_unmerging(form: str, dtype: torch.dtype) -> None:
    layer = make(dtype=dtype, **FORMS[form])
    layer.update_layer("other", 6, "gaussian")
    layer.set_adapter(["default", "other"])
    before, x = layer.base_layer.weight.detach().clone(), torch.randn(2, IN, 5, 5, dtype=dtype)
    plain, applied = layer.base_layer(x), layer(x)
    delta = layer.get_delta_weight("default")
    assert (delta.shape, delta.dtype) == (before.shape, dtype)
    oracle.assert_close(delta, dense(layer), dtype)
    layer.merge(safe_merge=True)
    assert layer.base_layer.weight.is_contiguous()
    wanted = before.double() + dense(layer) + dense(layer, "other")
    # Rounded once: to bfloat16 that alone costs 1.7e-3.
    once = 2e-3 if dtype == torch.bfloat16 else 1e-6
    oracle.assert_close(layer.base_layer.weight, wanted, dtype, bound=once)
    assert (layer(x) - applied).norm() <= 3 * once * applied.norm()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    assert torch.equal(layer.base_layer(x), plain)


def test_a_merge_that_is_kept_from_a_changed_weight() -> None:
    layer = make()
    layer.merge()
    layer.base_layer.weight.data[0, 0, 0, 0] += 1
    with pytest.raises(AdapterStateError, match=r"features\.conv: .*changed after"):
        layer.unmerge()


def test_an_offloaded_convolution_is_merged_in_accelerates_map() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    layer = make(padding=1)
    hooks.add_hook_to_module(layer.base_layer, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    weights = layer.base_layer._hf_hook.weights_map
    before, x = weights["weight"], torch.randn(2, IN, 5, 5)
    applied = layer(x)
    layer.merge()
    assert weights["weight"].shape == before.shape
    torch.testing.assert_close(layer(x), applied)
    layer.unmerge()
    assert torch.equal(weights["weight"], before)


def test_compiled_and_exported_it_is_the_same() -> None:
    layer, x = make(padding=1), torch.randn(2, IN, 5, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_convolution_of_its_own_kind() -> None:
    layer = C3AConv2d(Twice(IN, OUT, 1), "default", 3, layer_name="conv")
    x = torch.randn(1, IN, 2, 2)
    oracle.assert_close(
        layer(x) - layer.base_layer(x), convolved(x, dense(layer), layer.base_layer), torch.float32, bound=1e-4
    )
    with pytest.raises(AdapterStateError, match="conv: .*a forward of its own"):
        layer.merge()


@pytest.mark.parametrize(
    ("form", "b", "message"),
    [
        ({}, 5, r"features\.conv \(channels\): block_size=5 does not divide in_features=12"),
        ({"groups": 4}, 4, r"\(channels of a group\): block_size=4 does not divide in_features=3"),
    ],
)
def test_block_sizes_that_do_not_fit(form: dict[str, Any], b: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        make(b, **form)


def test_what_it_is_not() -> None:
    with pytest.raises(ConfigError, match="Linear is not of kind conv2d"):
        C3AConv2d(nn.Linear(4, 4), "default", 2)
    with pytest.raises(ConfigError, match="Conv2d is not of kind linear"):
        C3ALinear(nn.Conv2d(4, 4, 1), "default", 2)
    with pytest.raises(BackendError, match="no choice of backend"):
        C3AConv2d(nn.Conv2d(4, 4, 1), "default", 2, backend="torch")
    layer = make()
    layer.backend = "torch"
    with pytest.raises(BackendError, match=r"features\.conv: .*leave it at 'auto'"):
        layer(torch.randn(1, IN, 5, 5))


class Vision(nn.Module):
    """A convolution, a depthwise one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.body = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(F.relu(self.stem(x)))).mean((2, 3)))


def test_in_a_model_from_apply_to_file_and_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, plain = Vision(), Vision()
    plain.load_state_dict(model.state_dict())
    config = C3AConfig(
        block_size=6, target_modules=["stem", "body", "head"], block_size_pattern={"stem": 3}, init_weights="gaussian"
    )
    c3a_triton.apply(model, config, backend="torch")
    assert [(type(layer), layer.backend) for _, layer in model.c3a.layers()] == [
        (C3AConv2d, "auto"), (C3AConv2d, "auto"), (C3ALinear, "torch"),
    ]  # fmt: skip
    model.c3a.set_backend("reference")
    with pytest.raises(BackendError, match="body is a conv2d layer"):
        model.c3a.set_backend("torch", ["body"])
    assert [layer.backend for _, layer in model.c3a.layers()] == ["auto", "auto", "reference"]
    assert "108" in next(line for line in model.c3a.summary().splitlines() if line.startswith("stem"))
    x = torch.randn(2, 3, 6, 6)
    model(x).square().sum().backward()
    assert all(layer.c3a_kernel["default"].grad.norm() > 0 for _, layer in model.c3a.layers())
    applied = model(x)
    assert (applied - plain(x)).norm() > 0.05 * plain(x).norm()

    with pytest.warns(UserWarning, match=r"PEFT .*cannot load this adapter, which has 2 others \(stem, body\)"):
        model.c3a.save_pretrained(tmp_path)
    again = c3a_triton.load_adapter(plain, tmp_path)
    torch.testing.assert_close(again(x), applied, rtol=1e-5, atol=1e-6)
    merged = model.c3a.merge_and_unload()
    assert type(merged.body) is nn.Conv2d
    torch.testing.assert_close(merged(x), applied, rtol=1e-4, atol=1e-5)


def test_a_lazy_convolution_has_no_channels_yet() -> None:
    with pytest.raises(ConfigError, match="0 is a LazyConv2d, which cannot be adapted"):
        c3a_triton.apply(nn.Sequential(nn.LazyConv2d(4, 1)), C3AConfig(block_size=2, target_modules=["0"]))


def test_all_linear_leaves_convolutions_alone() -> None:
    model = c3a_triton.apply(Vision(), C3AConfig(block_size=6, target_modules="all-linear"))
    assert [name for name, _ in model.c3a.layers()] == ["head"]


def test_auto_block_size() -> None:
    model = c3a_triton.apply(Vision(), C3AConfig(block_size="auto", rank=2, target_modules=["body"]))
    assert model.body.block_size["default"] == 6


def test_a_file_for_another_convolution_is_refused(tmp_path: Path) -> None:
    model = c3a_triton.apply(Vision(), C3AConfig(block_size=6, target_modules=["body"]))
    with pytest.warns(UserWarning, match="PEFT"):
        model.c3a.save_pretrained(tmp_path)
    other = Vision()
    other.body = nn.Conv2d(12, 12, 5, padding=2)
    with pytest.raises(c3a_triton.CheckpointError, match=r"body: its kernel \[2, 18, 6\] is for in_features=108"):
        c3a_triton.load_adapter(other, tmp_path)
    other.body = nn.Conv2d(36, 12, (1, 9), groups=3)  # as many inputs, other channels
    with pytest.raises(c3a_triton.CheckpointError, match=r"b has to divide \(12, 4\) \(channels of a group\)"):
        c3a_triton.load_adapter(other, tmp_path)
