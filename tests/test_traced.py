"""torch.jit.trace and the exporters to ONNX: ordinary operations, right for other sizes than the traced ones."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MLP
from torch import Tensor, nn

import c3a_triton
from c3a_triton import C3AConfig


class Tokens(nn.Module):
    """An embedding, a linear layer of three dimensions, a convolution of them, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.linear = nn.Linear(8, 12)
        self.conv = nn.Conv2d(12, 8, (3, 1), padding=(1, 0))
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.linear(self.embedding(ids)))
        return self.head(self.conv(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2))


def tokens(target: str | list[str], **config: Any) -> Any:
    torch.manual_seed(0)
    model = Tokens().eval()
    return c3a_triton.apply(
        model, C3AConfig(**{"block_size": 4, "target_modules": target, "init_weights": "gaussian"} | config)
    )


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(1))


def traced(model: nn.Module, *inputs: Tensor) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # torch compares the trace with a call; 16 bits are rounded elsewhere.
        return torch.jit.trace(model, inputs, check_tolerance=3e-2)


SIZES = [(2, 5), (1, 1), (7, 3)]


def several() -> Any:
    model = tokens(["linear", "head"])
    model.c3a.add_adapter("other", C3AConfig(block_size=2, target_modules=["linear"], init_weights="gaussian"))
    model.c3a.set_adapter(["default", "other"])
    return model


def merged() -> Any:
    model = tokens(["linear", "conv", "embedding"])
    model.c3a.merge_adapter()
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "linear": lambda: tokens(["linear", "head"]),
    "reference": lambda: c3a_triton.apply(
        Tokens().eval(), C3AConfig(block_size=4, target_modules=["linear"]), backend="reference"
    ),
    "embedding": lambda: tokens(["embedding"]),
    "conv": lambda: tokens(["conv"]),
    "all": lambda: tokens(["embedding", "linear", "conv", "head"]),
    "bfloat16": lambda: tokens(["linear"]).to(torch.bfloat16),
    "modules_to_save": lambda: tokens(["linear"], modules_to_save=["head"], bias="all"),
    "several": several,
    "merged": merged,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_is_right_for_other_sizes(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    found = traced(model, ids(3, 4))
    torch.jit.save(found, str(tmp_path / "traced.pt"))
    loaded = torch.jit.load(str(tmp_path / "traced.pt"))
    tolerance = 3e-2 if name == "bfloat16" else 1e-5
    for size in SIZES:
        with torch.no_grad():
            expected = model(ids(*size))
        torch.testing.assert_close(loaded(ids(*size)), expected, atol=tolerance, rtol=tolerance)


def test_peft_models_that_were_converted() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.C3AConfig(block_size=2, target_modules=["first", "second"])
    model = c3a_triton.apply(peft.get_peft_model(MLP(), config).eval())
    found = traced(model.base_model.model, torch.randn(3, 12))
    for n in (1, 5):
        x = torch.randn(n, 12)
        torch.testing.assert_close(found(x), model.base_model.model(x), atol=1e-5, rtol=1e-5)


def test_a_traced_operator() -> None:
    w = torch.randn(2, 3, 4)
    found = torch.jit.trace(lambda x: c3a_triton.circulant_linear(x, w), torch.randn(2, 12))
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(found(x), c3a_triton.circulant_linear(x, w))


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
@pytest.mark.parametrize("name", ["linear", "embedding", "conv", "several", "modules_to_save"])
def test_onnx(name: str, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    model = MODELS[name]()
    path = str(tmp_path / "model.onnx")
    sizes = (
        {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)}
        if dynamo
        else {"dynamic_axes": {"ids": {0: "batch", 1: "time"}}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (ids(3, 4),), path, input_names=["ids"], dynamo=dynamo, **sizes)
    session = runtime.InferenceSession(path)
    for size in SIZES:
        (found,) = session.run(None, {"ids": ids(*size).numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(ids(*size)), atol=1e-4, rtol=1e-4)
