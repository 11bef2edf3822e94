"""Base layers: widths, the proof that one is plain, and the way to its weight."""

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from transformers.pytorch_utils import Conv1D

from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.bases.linear_like import is_plain, is_transposed, linear_widths
from c3a_triton.bases.weights import fingerprint, kernel_device, weight_access
from c3a_triton.errors import AdapterStateError


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Foreign(nn.Module):
    """Linear-like, with a storage that only its own forward understands."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) / 8).T


class Marked(Tensor):
    """A tensor subclass, as quantization and sharding libraries put in a weight's place."""


def _replace_forward(base: nn.Linear) -> None:
    forward = base.forward
    base.forward = lambda x: 3 * forward(x)  # type: ignore[method-assign]


def _offload(base: nn.Linear) -> None:
    add_hook_to_module(base, AlignDevicesHook(execution_device="cpu", offload=True))


def _weight_of_another_class(base: nn.Linear) -> None:
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Marked))


# What keeps the fused step away from an nn.Linear, each changing what the layer computes or could.
TRAPS = {
    "forward hook": lambda base: base.register_forward_hook(lambda module, args, y: y + 1),
    "forward pre-hook": lambda base: base.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "backward hook": lambda base: base.register_full_backward_hook(lambda module, dx, dy: None),
    "backward pre-hook": lambda base: base.register_full_backward_pre_hook(lambda module, dy: None),
    "forward replaced": _replace_forward,
    "parametrization": lambda base: parametrizations.weight_norm(base),
    "weight norm": lambda base: weight_norm(base),
    "offloaded": _offload,
    "tensor subclass": _weight_of_another_class,
}


@pytest.mark.parametrize(
    ("module", "widths"),
    [
        (nn.Linear(6, 4), (6, 4)),
        (Conv1D(4, 6), (6, 4)),
        (Foreign(6, 4), (6, 4)),
        (Subclass(6, 4), (6, 4)),
        (nn.LayerNorm(6), None),
        (nn.Embedding(6, 4), None),
        (nn.Bilinear(6, 6, 4), None),
        (nn.LazyLinear(4), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_widths(module: nn.Module, widths: tuple[int, int] | None) -> None:
    assert linear_widths(module) == widths
    assert is_transposed(module) == isinstance(module, Conv1D)


def test_an_ordinary_linear_is_plain() -> None:
    assert is_plain(nn.Linear(6, 4), torch.randn(2, 6))
    assert is_plain(nn.Linear(6, 4, bias=False).to(torch.bfloat16), torch.randn(2, 6))


def test_a_weight_elsewhere_is_not_plain() -> None:
    base = nn.Linear(6, 4, device="meta")
    assert not is_plain(base, torch.randn(2, 6))
    assert is_plain(base, torch.randn(2, 6, device="meta"))
    base = nn.Linear(6, 4)
    base._hf_hook = accelerate.hooks.ModelHook()
    assert not is_plain(base, torch.randn(2, 6))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("trap", TRAPS)
def test_a_linear_that_is_more_is_not_plain(trap: str) -> None:
    base = nn.Linear(6, 4)
    TRAPS[trap](base)
    assert not is_plain(base, torch.randn(2, 6))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("trap", TRAPS)
def test_a_layer_over_it_is_right(trap: str) -> None:
    base = nn.Linear(6, 4)
    TRAPS[trap](base)
    layer = C3ALinear(base, "default", 2)
    x = torch.randn(5, 6)
    expected = base(x) + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(x).as_subclass(Tensor), expected.as_subclass(Tensor))
    assert (expected - base(x)).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_all_modules_is_seen(kind: str) -> None:
    base, x = nn.Linear(6, 4), torch.randn(2, 6)
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda *args: None)
    try:
        assert not is_plain(base, x)
    finally:
        handle.remove()
    assert is_plain(base, x)


def test_hooks_that_come_and_go() -> None:
    base, x = nn.Linear(6, 4), torch.randn(2, 6)
    layer = C3ALinear(base, "default", 2)
    before = layer(x)
    _offload(base)
    assert base.weight.is_meta
    torch.testing.assert_close(layer(x), before)
    assert not is_plain(base, x)
    accelerate.hooks.remove_hook_from_module(base)
    assert is_plain(base, x)
    torch.testing.assert_close(layer(x), before)


def test_kernels_live_where_the_base_computes() -> None:
    base = nn.Linear(6, 4)
    _offload(base)
    assert base.weight.is_meta
    assert kernel_device(base) == torch.device("cpu")
    assert kernel_device(nn.Linear(6, 4, device="meta")) == torch.device("meta")
    assert kernel_device(Foreign(6, 4)) == torch.device("cpu")


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (Foreign(6, 4), "not a parameter of its own"),
        (Subclass(6, 4), "a forward of its own"),
        (parametrizations.weight_norm(nn.Linear(6, 4)), "not a parameter of its own"),
        (nn.Linear(6, 4, device="meta"), "meta device"),
    ],
    ids=["foreign", "subclass", "parametrized", "meta"],
)
def test_merging_is_refused_with_the_reason(base: nn.Module, reason: str) -> None:
    layer = C3ALinear(base, "default", 2, layer_name="model.fc")
    with pytest.raises(AdapterStateError, match=f"model.fc.*{reason}"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantized_storage_is_never_added_to(dtype: torch.dtype) -> None:
    base = nn.Linear(6, 4)
    base.weight = nn.Parameter(torch.randn(4, 6).to(dtype), requires_grad=False)
    before = base.weight.clone()
    with pytest.raises(AdapterStateError, match=str(dtype)):
        C3ALinear(base, "default", 2).merge()
    assert torch.equal(base.weight.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 8), (7, 3), (1, 1), (300, 1200)], ids=str)
def test_a_fingerprint_sees_every_element(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).to(dtype)
    mark = fingerprint(weight)
    assert fingerprint(weight.clone()) == mark
    for row, column in {(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)}:
        changed = weight.clone()
        changed[row, column] = torch.nextafter(changed[row, column].float(), torch.tensor(9.0)) * 1.01
        assert fingerprint(changed) != mark
    if min(shape) > 1:
        assert fingerprint(weight.flip(0)) != mark
        assert fingerprint(weight.flip(1)) != mark


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 0), (0, 6)], ids=str)
def test_a_fingerprint_of_nothing(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """What some of four processes have of a layer with two columns or rows."""
    assert fingerprint(torch.randn(6, 6).to(dtype)[: shape[0], : shape[1]]) == 0


def test_a_fingerprint_of_views() -> None:
    weight = torch.randn(8, 6)
    assert fingerprint(weight.t()) == fingerprint(weight.clone().t())
    flat = torch.randn(49)
    assert fingerprint(flat[1:].view(8, 6)) == fingerprint(flat[1:].clone().view(8, 6))
    zero = torch.zeros(4, 4)
    assert fingerprint(zero) != fingerprint(-zero)


def test_an_offloaded_weight_is_replaced_in_accelerates_map_and_nowhere_else() -> None:
    for base in (nn.Linear(6, 4), Conv1D(4, 6)):
        _offload(base)
        weights = base._hf_hook.weights_map
        shared, before = weights["weight"], weights["weight"].clone()
        layer, x = C3ALinear(base, "default", 2), torch.randn(3, 6)
        y, plain = layer(x), base(x)
        layer.merge()
        assert weights["weight"].shape == before.shape
        torch.testing.assert_close(base(x), y)
        assert torch.equal(shared, before)
        layer.unmerge()
        assert torch.equal(base(x), plain)


def test_the_weight_of_a_transposed_layer_is_read_as_out_by_in() -> None:
    base = Conv1D(4, 6)
    access = weight_access(C3ALinear(base, "default", 2))
    assert access.read().shape == (4, 6)
    new = torch.randn(4, 6)
    access.write(new)
    assert torch.equal(base.weight.detach(), new.T)
