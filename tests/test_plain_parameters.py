"""Parameters that are adapted through W + ΔW: any module's matrices and stacks, those of unknown experts among them."""

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import assert_close, dense
from tiny_models import IDS, logits
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import c3a_triton
from c3a_triton import C3AConfig, C3AParameters, ConfigError, ShapeError

pytestmark = pytest.mark.filterwarnings("ignore:.*computed as W")


class Mixed(nn.Module):
    """A matrix and a stack that a forward reads, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))
        self.stack = nn.Parameter(torch.randn(3, 6, 6))
        self.calls = 0

    def forward(self, x: Tensor, *, times: float = 1.0) -> Tensor:
        self.calls += 1
        y = x @ self.table.T
        return times * torch.einsum("td,eod->to", y, self.stack)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.mixed = Mixed()

    def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
        return self.mixed(self.first(x), times=times)


def adapted(model: Any, *parameters: str, name: str = "default", block_size: int = 2) -> Any:
    config = C3AConfig(
        block_size=block_size,
        target_modules=[],
        target_parameters=list(parameters or ("table", "stack")),
        init_weights="gaussian",
    )
    if hasattr(model, "c3a"):
        model.c3a.add_adapter(name, config)
        return model
    return c3a_triton.apply(model, config, adapter_name=name)


def truth(plain: nn.Module, model: Any, x: Tensor, adapters: tuple[str, ...] = ("default",)) -> Tensor:
    values = {name: value.double() for name, value in plain.named_parameters()}
    for name, layer in model.c3a.layers():
        for adapter in adapters:
            w = layer.c3a_kernel[adapter]
            values[name] = values[name] + (dense(w) if w.dim() == 3 else torch.stack(list(map(dense, w))))
    return functional_call(copy.deepcopy(plain).double(), values, (x.double(),))


@pytest.fixture
def plain() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_the_module_computes_with_the_sum(plain: Model, x: Tensor) -> None:
    model = adapted(copy.deepcopy(plain))
    assert isinstance(model.mixed, C3AParameters)
    assert {name: tuple(layer.c3a_kernel["default"].shape) for name, layer in model.c3a.layers()} == {
        "mixed.table": (3, 2, 2),
        "mixed.stack": (3, 3, 3, 2),
    }
    assert_close(model(x), truth(plain, model, x), torch.float32)
    assert_close(model(x, times=2.0), 2 * truth(plain, model, x), torch.float32)
    assert model.mixed.calls == 2  # what a forward notes on its module stays


def test_gradients(plain: Model, x: Tensor) -> None:
    model = adapted(plain).double()
    kernels = [layer.c3a_kernel["default"] for _, layer in model.c3a.layers()]
    first = model.first.weight.requires_grad_()

    def loss(*values: Tensor) -> Tensor:
        names = [f"{name}.c3a_kernel.default" for name, _ in model.c3a.layers()]
        return functional_call(model, dict(zip([*names, "first.weight"], values, strict=True)), (x.double(),))

    assert torch.autograd.gradcheck(loss, [*kernels, first])


def test_verbs(plain: Model, x: Tensor) -> None:
    base = plain(x)
    model = adapted(adapted(copy.deepcopy(plain)), "stack", name="other", block_size=3)
    alone = model(x)
    with model.c3a.disable_adapter():
        assert torch.equal(model(x), base)
    model.c3a.set_adapter(["default", "other"])
    with_stack = {name: layer for name, layer in model.c3a.layers() if "other" in layer.c3a_kernel}
    assert [*with_stack] == ["mixed.stack"]
    assert not torch.equal(model(x), alone)
    model.c3a.set_adapter("other")
    model.c3a.set_adapter("default")
    assert torch.equal(model(x), alone)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.c3a.merge_adapter(safe_merge=True)
    assert_close(model(x), alone.double(), torch.float32)
    model.c3a.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    merged = copy.deepcopy(model).c3a.merge_and_unload()
    assert type(merged.mixed) is Mixed
    assert "forward" not in merged.mixed.__dict__
    assert_close(merged(x), alone.double(), torch.float32)
    assert torch.equal(model.c3a.unload()(x), base)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_copies_and_pickles(plain: Model, x: Tensor) -> None:
    model = adapted(plain)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.mixed.base_layer.table.zero_()
        assert not torch.equal(other(x), expected)
        assert torch.equal(model(x), expected)


def test_explain_names_what_has_no_backend(plain: Model) -> None:
    model = adapted(plain)
    with pytest.raises(ConfigError, match=r"no adapted layer .*without a backend to choose: mixed\.table, mixed"):
        c3a_triton.explain(model.mixed)
    with pytest.warns(UserWarning, match="computed as W"):
        model.c3a.add_adapter("all", C3AConfig(block_size=2, target_modules=["first"], target_parameters=["table"]))
    model.c3a.set_adapter("all")
    assert "without a backend to choose: mixed.table, mixed.stack." in c3a_triton.explain(model, 8)


def test_rows_have_one_adapter(plain: Model, x: Tensor) -> None:
    model = adapted(adapted(plain), name="other")
    model.c3a.set_adapter("other")
    expected = model(x)
    model.c3a.set_adapter("default")
    with model.c3a.using(["other"] * 5):
        assert torch.equal(model(x), expected)
    mixed = model(x, adapter_names=["default", "other", "__base__", "other", "default"])
    torch.testing.assert_close(mixed[[1, 3]], expected[[1, 3]])
    torch.testing.assert_close(mixed[[0, 4]], model(x)[[0, 4]])
    with model.c3a.using(["other", "default"]), pytest.raises(ShapeError, match="computes with one weight for all"):
        model.mixed(x[:2])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(plain: Model, x: Tensor, backend: str) -> None:
    model = adapted(plain)
    expected = model(x)
    torch.autograd.backward(expected.sum())
    kernels = [layer.c3a_kernel["default"] for _, layer in model.c3a.layers()]
    gradients = [kernel.grad.clone() for kernel in kernels]
    model.zero_grad()
    in_one_graph = not torch.__version__.startswith("2.11.")  # whose compiler stops at a module's __dict__
    compiled = torch.compile(model, backend=backend, fullgraph=in_one_graph)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    for kernel, gradient in zip(kernels, gradients, strict=True):
        torch.testing.assert_close(kernel.grad, gradient)
    assert model.mixed.calls == 3
    with model.c3a.disable_adapter():
        torch.testing.assert_close(compiled(x), model(x))


def test_compiled_with_adapters_named_in_the_call(plain: Model, x: Tensor) -> None:
    model = adapted(adapted(plain), name="other")
    compiled = torch.compile(model, backend="eager")
    for name in ("default", "other", "default"):
        with model.c3a.using([name] * 5):
            torch.testing.assert_close(compiled(x), model(x))


class Recomputing(Mixed):
    """It reads its parameters first in what a checkpoint computes again."""

    def forward(self, x: Tensor, *, times: float = 1.0) -> Tensor:
        return checkpoint(super().forward, x, times=times, use_reentrant=False)


def test_read_first_in_a_checkpoint(plain: Model, x: Tensor) -> None:
    again = copy.deepcopy(plain)
    again.mixed.__class__ = Recomputing
    models = adapted(plain), adapted(again)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model(x).square().sum().backward()
    for (_, ours), (_, true) in zip(models[1].c3a.layers(), models[0].c3a.layers(), strict=True):
        assert torch.equal(ours.c3a_kernel["default"].grad, true.c3a_kernel["default"].grad)


class Half(Mixed):
    """It reads its matrix, and its stack where it is told to."""

    def forward(self, x: Tensor, *, times: float = 1.0) -> Tensor:
        return super().forward(x) if times == 2.0 else x @ self.table.T


def test_a_parameter_that_its_module_does_not_read_is_told_of(plain: Model, x: Tensor) -> None:
    plain.mixed.__class__ = Half
    model = adapted(plain)
    with pytest.warns(UserWarning, match=r"never called by a forward of Model.*: mixed\.stack\. "):
        expected = model(x)
    before = model.mixed.base_layer.stack.clone()
    with pytest.warns(UserWarning, match=r"left out of the merge: mixed\.stack\. "):
        model.c3a.merge_adapter()
    assert torch.equal(model.mixed.base_layer.stack, before)
    torch.testing.assert_close(model(x), expected)
    model.c3a.unmerge_adapter()
    expected = model(x, times=2.0)  # and now it is read
    model.c3a.merge_adapter()
    torch.testing.assert_close(model(x, times=2.0), expected)


@pytest.mark.parametrize(
    "read",
    [
        lambda x, w: nn.functional.linear(x, w),
        lambda x, w: x @ w,
        lambda x, w: w @ x,
        lambda x, w: torch.einsum("td,ed->te", x, w),
        lambda x, w: x @ w[:2].T,
        lambda x, w: x @ w.T,
    ],
)
def test_a_parameter_that_another_module_reads_is_refused_then(plain: Model, x: Tensor, read: Any) -> None:
    model = adapted(plain, "table")
    with pytest.raises(
        (ConfigError, AttributeError), match=r"mixed\.table is an adapted parameter, and what .*target_p"
    ):
        read(x, model.mixed.table)


def test_hooks_of_accelerate(plain: Model, x: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = adapted(copy.deepcopy(plain))
    model = adapted(accelerate.cpu_offload(plain, execution_device="cpu"))
    with torch.no_grad():
        for (_, ours), (_, other) in zip(model.c3a.layers(), expected.c3a.layers(), strict=True):
            ours.c3a_kernel["default"].copy_(other.c3a_kernel["default"])
    assert torch.equal(model(x), expected(x))
    model.c3a.merge_adapter()
    torch.testing.assert_close(model(x), expected(x))


class OtherWays(Mixed):
    def forward(self, x: Tensor, *, times: float = 1.0) -> Tensor:
        return x @ self.get_parameter("table").T

    def encode(self, x: Tensor) -> Tensor:
        return 2 * self.forward(x)


def test_other_ways_to_a_parameter(plain: Model, x: Tensor) -> None:
    plain.mixed.__class__ = OtherWays
    model = adapted(plain, "table")
    layer = model.mixed.table
    expected = x @ (layer.weight + dense(layer.c3a_kernel["default"]).float()).T
    torch.testing.assert_close(model.mixed(x), expected)
    torch.testing.assert_close(model.mixed.encode(x), 2 * expected)
    with model.c3a.disable_adapter():
        assert torch.equal(model.mixed.encode(x), 2 * x @ layer.weight.T)


class GptOssExperts(nn.Module):
    """As in transformers 4, where no attribute tells of the order of its dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("td,edo->to", x, self.down_proj)


def test_stacks_that_are_stored_with_rows_and_columns_exchanged(x: Tensor) -> None:
    torch.manual_seed(0)
    model = adapted(nn.Sequential(GptOssExperts()), "down_proj")
    layer = model[0].down_proj
    deltas = torch.stack(list(map(dense, layer.c3a_kernel["default"]))).float()  # [3, out, in]
    expected = torch.einsum("td,eod->to", x, layer.weight.mT + deltas)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(layer.get_delta_weight("default"), deltas.mT)
    model.c3a.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.c3a.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_experts_of_a_class_that_is_not_known() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.JetMoeConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=12,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    plain = transformers.JetMoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3)
    adapter = C3AConfig(block_size=4, target_modules=[], target_parameters="all-experts", init_weights="gaussian")
    model = c3a_triton.apply(copy.deepcopy(plain), adapter)
    names = [name for name, _ in model.c3a.layers()]
    assert names
    assert all(name.endswith("linear.weight") for name in names)
    values = dict(plain.named_parameters())
    for name, layer in model.c3a.layers():
        values[name] = values[name] + torch.stack(list(map(dense, layer.c3a_kernel["default"]))).float()
    expected = functional_call(plain, values, (), {"input_ids": IDS}).logits
    torch.testing.assert_close(logits(model), expected)
    assert not torch.allclose(logits(model), logits(plain), atol=0.1)
