"""`C3ALinear` alone: what it computes, what its forward reads, activation, merging, and what it says to bad input."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers.pytorch_utils import Conv1D

from c3a_triton.adapters.layer import C3ALinear
from c3a_triton.errors import AdapterNotFoundError, AdapterStateError, BackendError, ConfigError, ShapeError
from c3a_triton.files.config import C3AConfig
from c3a_triton.operator.reference import circulant_matrix

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(base: nn.Module | None = None, **block_sizes: int) -> C3ALinear:
    """A layer 12 → 18 with large kernels, by default one adapter "default" of block size 3."""
    names = block_sizes or {"default": 3}
    layer = C3ALinear(nn.Linear(12, 18) if base is None else base, *next(iter(names.items())))
    for name, b in list(names.items())[1:]:
        layer.update_layer(name, b)
    for kernel in layer.c3a_kernel.values():
        nn.init.normal_(kernel, std=10)
    return layer


def delta(layer: C3ALinear, x: Tensor, *names: str) -> Tensor:
    return sum((oracle.product(x, layer.c3a_kernel[name]) for name in names), torch.zeros(()))


def base_output(layer: C3ALinear, x: Tensor) -> Tensor:
    weight = layer.weight.T if isinstance(layer.base_layer, Conv1D) else layer.weight
    return nn.functional.linear(x.double(), weight.double(), None if layer.bias is None else layer.bias.double())


BASES = {
    "linear": lambda: nn.Linear(12, 18),
    "linear without bias": lambda: nn.Linear(12, 18, bias=False),
    "Conv1D": lambda: Conv1D(18, 12),
}


# What it computes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_forward_is_base_plus_the_dense_update(base: str, dtype: torch.dtype) -> None:
    layer = make(BASES[base]().to(dtype))
    x = torch.randn(2, 5, 12, dtype=dtype)
    oracle.assert_close(layer(x), base_output(layer, x) + delta(layer, x, "default"), dtype)
    assert layer.c3a_kernel["default"].dtype == torch.float32


def test_fold_computes_as_the_merged_layer() -> None:
    layer = make(nn.Linear(12, 18).bfloat16(), default=3, other=6)
    layer.set_adapter(["default", "other"])
    layer.backend = "fold"
    x = torch.randn(2, 5, 12).bfloat16()
    y = layer(x)
    layer.merge()
    assert torch.equal(y, layer(x))


def test_fold_is_refused_beside_the_base() -> None:
    layer = make(Conv1D(18, 12))
    layer.backend = "fold"
    layer.layer_name = "h.0.attn"
    with pytest.raises(BackendError, match="h.0.attn.*'fold'.*'auto'"):
        layer(torch.randn(3, 12))
    with pytest.raises(BackendError, match="'fold'"):
        layer(torch.randn(3, 12), adapter_names=["default"] * 3)
    layer.enable_adapters(False)
    assert layer(torch.randn(3, 12)).shape == (3, 18)


def test_gradients_are_the_dense_ones() -> None:
    layer = make()
    layer.base_layer.requires_grad_(False)
    x, dy = torch.randn(7, 12, requires_grad=True), torch.randn(7, 18)
    layer(x).backward(dy)
    w = layer.c3a_kernel["default"]
    oracle.assert_close(w.grad, oracle.weight_grad(dy, x, 3), torch.float32)
    oracle.assert_close(x.grad, dy.double() @ layer.weight.double() + oracle.input_grad(dy, w), torch.float32)
    assert layer.weight.grad is None


def test_active_adapters_are_summed_each_of_the_same_input() -> None:
    layer = make(a=3, b=3, c=2)
    layer.set_adapter(["a", "b", "c"])
    x = torch.randn(4, 12)
    oracle.assert_close(layer(x), base_output(layer, x) + delta(layer, x, "a", "b", "c"), torch.float32)
    layer.set_adapter("c")
    oracle.assert_close(layer(x), base_output(layer, x) + delta(layer, x, "c"), torch.float32)
    layer.set_adapter([])
    oracle.assert_close(layer(x), base_output(layer, x), torch.float32)


def test_a_foreign_base_gets_the_sum_out_of_place() -> None:
    class Remembering(nn.Linear):
        """Returns a tensor that it still holds: adding in place would change it."""

        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    layer = make(Remembering(12, 18), a=3, b=6)
    layer.set_adapter(["a", "b"])
    x = torch.randn(4, 12)
    y = layer(x)
    oracle.assert_close(y, base_output(layer, x) + delta(layer, x, "a", "b"), torch.float32)
    oracle.assert_close(layer.base_layer.last, base_output(layer, x), torch.float32)


@pytest.mark.parametrize("base", BASES)
def test_autocast_computes_in_its_dtype_and_returns_that_of_x(base: str) -> None:
    layer, x = make(BASES[base]()), torch.randn(64, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = base_output(layer, x) + delta(layer, x, "default")
    # x is rounded before each of two products and their results after: twice the error of one rounding.
    oracle.assert_close(y, expected, torch.float32, bound=2 * oracle.BOUNDS[torch.bfloat16])
    assert (y.double() - expected).norm() / expected.norm() > 1e-4
    layer.enable_adapters(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float32


def test_input_that_does_not_fit_names_the_layer() -> None:
    layer = C3ALinear(nn.Linear(12, 18), "default", 3, layer_name="model.fc")
    for x in (torch.randn(4, 12, dtype=torch.bfloat16), torch.randn(4, 18), torch.ones(4, 12, dtype=torch.int64)):
        with pytest.raises(ShapeError, match=r"model\.fc"):
            layer(x)


def test_a_layer_cast_to_16_bits_still_computes() -> None:
    layer, x = make(), torch.randn(16, 12)
    expected = base_output(layer, x) + delta(layer, x, "default")
    layer.to(torch.bfloat16)
    assert layer.c3a_kernel["default"].dtype == torch.bfloat16
    y = layer(x.bfloat16())
    oracle.assert_close(y, expected, torch.bfloat16, bound=1e-2)
    assert "C3ALinear" in type(y.grad_fn).__name__  # one node, as with float32 kernels
    y.float().sum().backward()
    assert layer.c3a_kernel["default"].grad.dtype == torch.bfloat16


def test_fold_computes_as_merged_with_kernels_in_16_bits() -> None:
    layer, x = make().to(torch.bfloat16), torch.randn(16, 12).bfloat16()
    layer.backend = "fold"
    y = layer(x)
    layer.merge()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("base", BASES)
def test_16_bit_kernels_are_summed_in_float32(base: str) -> None:
    layer, x = make(BASES[base](), a=3, b=3), torch.randn(4, 12)
    for name, value in (("a", 1.0), ("b", 2.0**-9)):  # the sum has one bit more than bfloat16
        layer.c3a_kernel[name].data = torch.full_like(layer.c3a_kernel[name], value, dtype=torch.bfloat16)
    layer.set_adapter(["a", "b"])
    oracle.assert_close(layer(x), base_output(layer, x) + delta(layer, x, "a", "b"), torch.float32)


def test_rows_with_adapters_of_their_own() -> None:
    layer, x = make(a=3, b=2), torch.randn(4, 5, 12)
    y = layer(x, adapter_names=["b", "__base__", "a", "b"])
    expected = base_output(layer, x)
    for row, name in ((0, "b"), (2, "a"), (3, "b")):
        expected[row] += delta(layer, x[row], name)
    oracle.assert_close(y, expected, torch.float32)
    with pytest.raises(ShapeError, match="3 adapter names for a batch of 4 rows"):
        layer(x, adapter_names=["a"] * 3)
    layer.merge(adapter_names=["a"])
    with pytest.raises(AdapterStateError, match="unmerge"):
        layer(x, adapter_names=["a"] * 4)


def test_delta_weight() -> None:
    for dtype in DTYPES:
        layer = make(nn.Linear(12, 18).to(dtype))
        oracle.assert_close(layer.get_delta_weight("default"), oracle.dense(layer.c3a_kernel["default"]), dtype)
    assert make(Conv1D(18, 12)).get_delta_weight("default").shape == (18, 12)
    with pytest.raises(AdapterNotFoundError, match=r"no adapter 'x'.*default"):
        layer.get_delta_weight("x")


# What its forward reads: a tuple of parameters that must never be stale


def _functional(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    w = torch.randn_like(layer.c3a_kernel["default"])
    y = torch.func.functional_call(layer, {"c3a_kernel.default": w}, (x,))
    return y, w


def _assigned(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    w = torch.randn_like(layer.c3a_kernel["default"])
    layer.load_state_dict(layer.state_dict() | {"c3a_kernel.default": w}, assign=True)
    return layer(x), w


def _set_item(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    w = torch.randn_like(layer.c3a_kernel["default"])
    layer.c3a_kernel["default"] = nn.Parameter(w)
    return layer(x), w


def _by_attribute(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    # FSDP1 puts plain tensors in the place of its parameters.
    w = torch.randn_like(layer.c3a_kernel["default"])
    delattr(layer.c3a_kernel, "default")
    layer.c3a_kernel.default = w
    return layer(x), w


def _from_meta(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    state = layer.state_dict()
    layer.to("meta").to_empty(device="cpu").load_state_dict(state)
    return layer(x), state["c3a_kernel.default"]


def _overwritten_on_conversion(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        layer._apply(lambda tensor: tensor * 2)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    return layer(x), layer.c3a_kernel["default"]


def _deep_copied(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    other = copy.deepcopy(layer)
    other.c3a_kernel["default"].data.mul_(2)
    return other(x), layer.c3a_kernel["default"] * 2


def _pickled(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    other = pickle.loads(pickle.dumps(layer))
    other.c3a_kernel["default"].data.mul_(2)
    return other(x), layer.c3a_kernel["default"] * 2


def _saved_and_loaded(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return _set_item(torch.load(buffer, weights_only=False), x)


def _shallow_copied(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    other = copy.copy(layer)
    _, w = _set_item(layer, x)
    assert torch.equal(other(x), layer(x))
    return layer(x), w


def _data_parallel_replica(layer: C3ALinear, x: Tensor) -> tuple[Tensor, Tensor]:
    # As torch.nn.parallel.replicate does it: parameters become attributes of replicas.
    replica, kernels = layer._replicate_for_data_parallel(), layer.c3a_kernel._replicate_for_data_parallel()
    kernels.default = w = torch.randn_like(layer.c3a_kernel["default"])
    replica._modules = {"base_layer": layer.base_layer, "c3a_kernel": kernels}
    return replica(x), w


EXCHANGES = [
    _functional,
    _assigned,
    _set_item,
    _by_attribute,
    _from_meta,
    _overwritten_on_conversion,
    _deep_copied,
    _pickled,
    _saved_and_loaded,
    _shallow_copied,
    _data_parallel_replica,
]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda function: function.__name__)
def test_an_exchanged_parameter_is_the_one_that_computes(
    exchange: Callable[[C3ALinear, Tensor], tuple[Tensor, Tensor]],
) -> None:
    layer, x = make(), torch.randn(4, 12)
    before = layer(x)
    y, w = exchange(layer, x)
    base = layer.base_layer if layer.base_layer.weight.device == x.device else None
    assert base is not None
    torch.testing.assert_close(y.double(), base(x).double() + oracle.product(x, w), atol=1e-5, rtol=1e-5)
    if exchange is not _from_meta:
        assert (y - before).abs().max() > 0.1
    if exchange is _functional:
        assert torch.equal(layer(x), before)


def test_compiled_without_breaks_and_without_recompiling_for_another_adapter() -> None:
    layer, x = make(a=3, b=3), torch.randn(4, 12)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for name in ("a", "b", "a"):
        layer.set_adapter(name)
        oracle.assert_close(compiled(x), base_output(layer, x) + delta(layer, x, name), torch.float32)
    assert counter.frame_count == 1
    w = torch.randn_like(layer.c3a_kernel["a"])
    y = torch.func.functional_call(compiled, {"_orig_mod.c3a_kernel.a": w}, (x,))
    oracle.assert_close(y, base_output(layer, x) + oracle.product(x, w), torch.float32)

    @torch.compile(backend="eager", fullgraph=True)
    def call(w: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"c3a_kernel.a": w}, (x,))

    torch.testing.assert_close(call(w, x), y)


def test_a_pickle_has_no_class_of_the_watching_dictionary() -> None:
    assert type(copy.deepcopy(make().c3a_kernel)._parameters) is dict
    assert b"_WatchedParameters" not in pickle.dumps(make())


# Adapters


@pytest.mark.parametrize("name", ["", "a.b", "keys", "_parameters", "forward", "__base__", 3])
def test_names_that_cannot_be_used(name: str) -> None:
    layer = make()
    with pytest.raises(ConfigError, match="name"):
        layer.update_layer(name, 3)
    assert list(layer.c3a_kernel) == list(layer.block_size) == ["default"]


def test_block_sizes_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"fc: block_size=4 does not divide.*in_features=12, out_features=18.*6"):
        C3ALinear(nn.Linear(12, 18), "default", 4, layer_name="fc")
    layer = make()
    with pytest.raises(ShapeError):
        layer.update_layer("other", 5)
    with pytest.raises(ConfigError):
        layer.update_layer("other", 0)
    assert list(layer.c3a_kernel) == list(layer.block_size) == ["default"]
    with pytest.raises(ConfigError, match="LayerNorm"):
        C3ALinear(nn.LayerNorm(12), "default", 3)


def test_a_config_in_place_of_block_size_and_init() -> None:
    config = C3AConfig(block_size=6, init_weights=True, inference_mode=True)
    layer = C3ALinear(nn.Linear(12, 18), "default", config=config)
    assert layer.block_size == {"default": 6}
    assert not layer.c3a_kernel["default"].any()
    assert not layer.c3a_kernel["default"].requires_grad
    layer.update_layer("other", 3, config=config)
    assert layer.c3a_kernel["other"].shape == (6, 4, 3)
    layer.update_layer("auto", config={"block_size": "auto", "rank": 5})
    assert layer.block_size["auto"] == 3


def test_only_active_adapters_are_trainable() -> None:
    layer = make(a=3, b=3, c=2)

    def trainable() -> list[str]:
        return [name for name, kernel in layer.c3a_kernel.items() if kernel.requires_grad]

    assert trainable() == layer.active_adapters == ["a"]
    layer.set_adapter(["b", "c", "of another layer"])
    assert trainable() == ["b", "c"]
    layer.enable_adapters(False)
    assert trainable() == []
    assert layer.disable_adapters
    layer.enable_adapters(True)
    assert trainable() == ["b", "c"]
    layer.set_adapter("a", inference_mode=True)
    assert trainable() == []


def test_deleting_and_renaming() -> None:
    layer, x = make(a=3, b=3, c=2), torch.randn(4, 12)
    w = layer.c3a_kernel["b"]
    layer.set_adapter("b")
    y = layer(x)
    layer.rename_adapter("b", "z")
    assert layer.c3a_kernel["z"] is w
    assert list(layer.c3a_kernel) == list(layer.block_size) == ["a", "z", "c"]
    assert layer.active_adapters == ["z"]
    assert torch.equal(layer(x), y)
    with pytest.raises(AdapterStateError, match="already"):
        layer.rename_adapter("a", "c")
    layer.delete_adapter("a")
    assert torch.equal(layer(x), y)
    with pytest.warns(UserWarning, match="'z' is deleted; 'c' is active"):
        layer.delete_adapter("z")
    assert layer.active_adapters == list(layer.block_size) == ["c"]
    oracle.assert_close(layer(x), base_output(layer, x) + delta(layer, x, "c"), torch.float32)
    layer.delete_adapter("c")
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("init_weights", ["gaussian", "kaiming_uniform", "xavier_uniform", False, True])
def test_resetting(init_weights: bool | str) -> None:
    layer = C3ALinear(nn.Linear(96, 32), "default", 8)
    layer.reset_c3a_parameters("default", init_weights)
    w = layer.c3a_kernel["default"].detach()
    std = {"gaussian": 1.0, "kaiming_uniform": (1 / 96 / 3) ** 0.5, True: 0.0}.get(init_weights, (2 / 128) ** 0.5)
    assert abs(float(w.std()) - std) <= 0.1 * std
    with pytest.raises(ConfigError, match="init_weights"):
        layer.reset_c3a_parameters("default", "bogus")


# Merging


@pytest.mark.parametrize("keep_base", ["cpu", "device"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("base", ["linear", "Conv1D"])
def test_merge_rounds_once_and_unmerge_restores_every_bit(base: str, dtype: torch.dtype, keep_base: str) -> None:
    layer = make(BASES[base]().to(dtype), a=3, b=2)
    original, x = layer.weight.detach().clone(), torch.randn(4, 12, dtype=dtype)
    plain = layer.base_layer(x)
    update = sum(circulant_matrix(layer.c3a_kernel[name].detach(), 1 / 12) for name in ("a", "b"))
    layer.merge(adapter_names=["a", "b"], keep_base=keep_base)
    wide = torch.promote_types(dtype, torch.float32)
    matrix = original.T if base == "Conv1D" else original
    expected = (matrix.to(wide) + update).to(dtype)
    merged = layer.weight.detach().T if base == "Conv1D" else layer.weight.detach()
    assert merged.dtype == dtype
    # The kernels may be added in another order than here, which moves a sum by a last bit of float32.
    order = {"rtol": torch.finfo(dtype).eps, "atol": 2**-22 * float(update.abs().max())}
    torch.testing.assert_close(merged, expected, **order)
    assert (merged == expected).float().mean() > (0.9 if dtype.itemsize == 2 else 0.3)
    assert layer.merged
    assert layer.merged_adapters == ["a", "b"]
    assert not torch.equal(layer(x), plain)
    assert set(layer.state_dict()) == {*("base_layer.weight", "base_layer.bias"), "c3a_kernel.a", "c3a_kernel.b"}
    layer.unmerge()
    assert torch.equal(layer.weight, original)
    assert not layer.merged


def test_merging_one_of_two_leaves_the_other_applied() -> None:
    layer, x = make(a=3, b=2), torch.randn(4, 12)
    layer.set_adapter(["a", "b"])
    y, original = layer(x), layer.weight.detach().clone()
    layer.merge(adapter_names=["a"])
    torch.testing.assert_close(layer(x), y)
    with pytest.warns(UserWarning, match=r"\['a'\] are merged already; merging \['b'\] too"):
        layer.merge()
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.base_layer(x), y)
    with pytest.warns(UserWarning, match="nothing to do"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, original)
    assert torch.equal(layer(x), y)
    with pytest.warns(UserWarning, match=r"nothing is merged"):
        layer.unmerge()


def _train(layer: C3ALinear) -> None:
    layer.base_layer.weight.data.add_(1e-3)


def _load(layer: C3ALinear) -> None:
    layer.load_state_dict({"base_layer.weight": torch.randn(18, 12)}, strict=False)


def _write_behind_the_version(layer: C3ALinear) -> None:
    layer.base_layer.weight.data[3, 5] += 1e-3


@pytest.mark.parametrize("change", [_train, _load, _write_behind_the_version], ids=lambda function: function.__name__)
def test_a_weight_that_was_changed_after_merging_is_not_overwritten(change: Callable[[C3ALinear], None]) -> None:
    layer = make(a=3, b=3)
    layer.merge()
    change(layer)
    changed = layer.weight.detach().clone()
    with pytest.raises(AdapterStateError, match="changed after"):
        layer.unmerge()
    with pytest.raises(AdapterStateError, match="changed after"), warnings.catch_warnings(record=True):
        layer.merge(adapter_names=["b"])
    assert torch.equal(layer.weight, changed)
    assert layer.merged_adapters == ["a"]
    # A cast or a move must not make it forgotten.
    layer.double().float()
    with pytest.raises(AdapterStateError, match="changed after"):
        layer.unmerge()


def test_merged_for_good() -> None:
    layer = make()
    layer.merge(keep_base=None)
    merged = layer.weight.detach().clone()
    for refused in (layer.unmerge, lambda: layer.enable_adapters(False)):
        with pytest.raises(AdapterStateError, match="keep_base=None"):
            refused()
    assert torch.equal(layer.weight, merged)
    assert not layer.disable_adapters
    with pytest.raises(ConfigError, match="keep_base"):
        make().merge(keep_base="disk")


@pytest.mark.parametrize("keep_base", ["cpu", "device"])
def test_what_is_kept_follows_copies_and_casts(keep_base: str) -> None:
    layer = make()
    original = layer.weight.detach().clone()
    layer.merge(keep_base=keep_base)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.unmerge()
        assert torch.equal(other.weight, original)
    assert layer.merged
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.weight, original.bfloat16())


def test_what_is_lost_on_meta_is_not_restored() -> None:
    layer = make()
    layer.merge()
    layer.to("meta").to_empty(device="cpu")
    with pytest.raises(AdapterStateError):
        layer.unmerge()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_safe_merge_refuses_what_is_not_finite(value: float) -> None:
    layer = make(nn.Linear(12, 18).to(torch.float16))
    layer.c3a_kernel["default"].data[1, 2, 1] = value
    original = layer.weight.detach().clone()
    with pytest.raises(AdapterStateError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, original)
    assert not layer.merged
    layer.c3a_kernel["default"].data[1, 2, 1] = 1.0
    layer.merge(safe_merge=True)
    assert layer.merged
    layer.unmerge()
    assert torch.equal(layer.weight, original)


def test_a_merged_adapter_cannot_be_replaced_reset_or_deleted() -> None:
    layer = make(a=3, b=3)
    layer.merge()
    for forbidden in (
        lambda: layer.delete_adapter("a"),
        lambda: layer.update_layer("a", 2),
        lambda: layer.reset_c3a_parameters("a"),
    ):
        with pytest.raises(AdapterStateError, match="'a' is merged"):
            forbidden()
    layer.delete_adapter("b")
    layer.rename_adapter("a", "c")
    assert layer.merged_adapters == ["c"]
    layer.unmerge()
    assert not layer.merged


def test_disabling_unmerges_as_in_peft() -> None:
    layer, x = make(), torch.randn(4, 12)
    y, original = layer(x), layer.weight.detach().clone()
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer.weight, original)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert torch.equal(layer(x), y)


def test_a_disabled_layer_is_not_merged_into() -> None:
    layer = make()
    layer.enable_adapters(False)
    with pytest.raises(AdapterStateError, match="disabled"):
        layer.merge()
    assert not layer.merged


def test_a_merged_layer_trains_nothing() -> None:
    layer = make()
    layer.base_layer.requires_grad_(False)
    layer.merge()
    assert not layer(torch.randn(4, 12)).requires_grad


@pytest.mark.parametrize("base", [8, None, "x", nn.Linear], ids=str)
def test_what_is_no_layer_is_refused_by_what_it_is(base: Any) -> None:
    with pytest.raises(ConfigError, match=r"C3ALinear goes around a layer, such as nn\.Linear\(8, 8\), got"):
        C3ALinear(base)
