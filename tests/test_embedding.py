"""`C3AEmbedding` against a dense ΔE in float64, vocabularies that no block size divides included."""

import warnings
from pathlib import Path

import oracle
import pytest
import torch
from tiny_models import IDS, llama, logits
from torch import Tensor, nn

import c3a_triton
from c3a_triton import (
    AdapterStateError,
    BackendError,
    C3AConfig,
    C3AEmbedding,
    CheckpointError,
    ConfigError,
    ShapeError,
)

WIDTH = 24
VOCABULARIES = pytest.mark.parametrize("rows", [48, 50, 7, 1], ids=lambda rows: f"{rows} rows")


def make(
    rows: int = 50, b: int = 8, dtype: torch.dtype = torch.float32, padding_idx: int | None = None
) -> C3AEmbedding:
    base = nn.Embedding(rows, WIDTH, padding_idx=padding_idx).to(dtype)
    return C3AEmbedding(base, "default", b, "gaussian", layer_name="model.embed_tokens")


def dense(layer: C3AEmbedding, *names: str) -> Tensor:
    """ΔE in float64, cut off where the vocabulary ends, without the padding's row."""
    kernels = [layer.c3a_kernel[name] for name in names or ["default"]]
    delta = sum(oracle.dense(w, 1 / WIDTH)[: layer.num_embeddings] for w in kernels)
    if layer.padding_idx is not None:
        delta[layer.padding_idx] = 0
    return delta


@VOCABULARIES
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_forward_and_gradient(rows: int, padding_idx: int | None) -> None:
    layer = make(rows, padding_idx=padding_idx)
    w = layer.c3a_kernel["default"]
    assert w.shape == (-(-rows // 8), 3, 8)
    ids = torch.randint(rows, (4, 5))
    y = layer(ids)
    assert y.dtype == torch.float32
    if rows == 1 and padding_idx == 0:
        assert not y.any()
        return
    oracle.assert_close(y, (layer.base_layer.weight.double() + dense(layer))[ids], torch.float32)
    dy = torch.randn_like(y)
    y.backward(dy)
    # The gradient of E, summed along the circulant diagonals.
    of_rows = torch.zeros(w.shape[0] * 8, WIDTH, dtype=torch.float64)
    counted = torch.ones_like(ids, dtype=torch.bool) if padding_idx is None else ids != padding_idx
    of_rows.index_add_(0, ids[counted], dy[counted].double())
    oracle.assert_close(w.grad, diagonals(of_rows), torch.float32)


def diagonals(of_rows: Tensor, b: int = 8) -> Tensor:
    """The gradient of w, from that of every row of the matrix whose circulant diagonals it stands on."""
    blocks = of_rows.reshape(-1, b, WIDTH // b, b)
    dw = torch.zeros(blocks.shape[0], WIDTH // b, b, dtype=torch.float64)
    for j in range(b):
        for p in range(b):
            dw[:, :, (p - j) % b] += blocks[:, j, :, p]
    return dw / WIDTH


def test_nothing_as_large_as_the_embedding_is_made() -> None:
    layer = make(4096, 8)
    ids = torch.tensor([[1, 2, 4095]])
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                sizes.append(out.numel())
            return out

    with Sizes(), torch.no_grad():
        layer(ids)
    assert 0 < max(sizes) <= 3 * WIDTH


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = make(dtype=dtype)
    ids = torch.randint(50, (30,))
    expected = (layer.base_layer.weight.double() + dense(layer))[ids]
    oracle.assert_close(layer(ids), expected, dtype, bound=1e-6 if dtype == torch.float64 else None)


def test_deterministic_and_compiled(deterministic: None) -> None:
    layer, ids = make(), torch.randint(50, (4, 5))
    y = torch.compile(layer, fullgraph=True, backend="eager")(ids)
    assert torch.equal(y, layer(ids))
    y.sum().backward()


def test_several_adapters_and_rows_of_their_own() -> None:
    layer = make()
    layer.update_layer("other", 12, "gaussian")
    layer.set_adapter(["default", "other"])
    ids, weight = torch.randint(50, (3, 5)), layer.base_layer.weight.detach().double()
    oracle.assert_close(layer(ids), (weight + dense(layer, "default", "other"))[ids], torch.float32)
    rows = layer(ids, adapter_names=["other", "__base__", "default"])
    oracle.assert_close(rows[0], (weight + dense(layer, "other"))[ids[0]], torch.float32)
    assert torch.equal(rows[1], layer.base_layer(ids[1]))
    oracle.assert_close(rows[2], (weight + dense(layer))[ids[2]], torch.float32)
    layer.enable_adapters(False)
    assert torch.equal(layer(ids), layer.base_layer(ids))


@VOCABULARIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_merging_and_unmerging(rows: int, dtype: torch.dtype, padding_idx: int | None) -> None:
    layer = make(rows, dtype=dtype, padding_idx=padding_idx)
    layer.update_layer("other", 12, "gaussian")
    layer.set_adapter(["default", "other"])
    before = layer.base_layer.weight.detach().clone()
    delta = layer.get_delta_weight("default")
    assert (delta.shape, delta.dtype) == (before.shape, dtype)
    wanted = before.double() + dense(layer, "default", "other")
    if not (rows == 1 and padding_idx == 0):
        oracle.assert_close(delta, dense(layer), dtype)
    storage = layer.base_layer.weight.data_ptr()
    layer.merge(safe_merge=rows == 50)
    assert layer.base_layer.weight.data_ptr() == storage
    if not (rows == 1 and padding_idx == 0):
        oracle.assert_close(layer.base_layer.weight, wanted, dtype, bound=2e-3 if dtype == torch.bfloat16 else None)
    if padding_idx is not None:
        assert torch.equal(layer.base_layer.weight[padding_idx], before[padding_idx])
    ids = torch.arange(rows)
    assert torch.equal(layer(ids), layer.base_layer.weight)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_norm": 1.0}, "max_norm, which rewrites"), ({"scale_grad_by_freq": True}, "scale_grad_by_freq")],
)
def test_forms_that_cannot_be_adapted(options: dict[str, object], message: str) -> None:
    model = nn.Sequential(nn.Embedding(8, 4, **options), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=f"^0: .*{message}"):
        c3a_triton.apply(model, C3AConfig(block_size=2, target_modules=["0", "1"]))
    assert isinstance(model[1], nn.Linear)


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


def test_an_embedding_of_its_own_kind() -> None:
    layer = C3AEmbedding(Scaled(10, WIDTH), "default", 8, layer_name="embed")
    ids = torch.arange(10)
    oracle.assert_close(layer(ids) - layer.base_layer(ids), dense(layer), torch.float32, bound=1e-4)
    with pytest.raises(AdapterStateError, match="embed: .*a forward of its own"):
        layer.merge()


def test_what_it_is_not_and_block_sizes() -> None:
    with pytest.raises(ConfigError, match="Linear is not of kind embedding"):
        C3AEmbedding(nn.Linear(4, 4), "default", 2)
    with pytest.raises(
        ShapeError, match=r"embed_tokens \(embedding_dim\): block_size=16 does not divide in_features=24"
    ):
        make(b=16)
    with pytest.raises(BackendError, match="no choice of backend"):
        C3AEmbedding(nn.Embedding(4, 4), "default", 2, backend="torch")


# In models


def test_in_a_model_from_apply_to_file_and_back(tmp_path: Path) -> None:
    model = llama(vocab_size=37)
    ids = IDS % 37
    plain = logits(model, ids)
    config = C3AConfig(block_size=12, target_modules=["embed_tokens", "q_proj"], init_weights="gaussian")
    c3a_triton.apply(model, config)
    assert {name for name, layer in model.c3a.layers() if layer.kind == "embedding"} == {"model.embed_tokens"}
    assert model.get_input_embeddings().weight.shape == (37, 24)
    line = next(line for line in model.c3a.summary().splitlines() if line.startswith("model.embed_tokens"))
    assert line.split()[2:6] == ["24", "37", "12", "block_size"]
    assert "96" in line.split()  # ⌈37 / 12⌉ · 24
    model(input_ids=ids, labels=ids).loss.backward()
    kernel = model.model.embed_tokens.c3a_kernel["default"]
    assert kernel.grad.norm() > 0
    assert [p for p in model.parameters() if p.requires_grad and p.ndim != 3] == []
    applied = logits(model, ids)
    assert (applied - plain).norm() > 0.1 * plain.norm()
    with pytest.warns(UserWarning, match=r"PEFT .*1 others \(model\.embed_tokens\)"):
        model.c3a.save_pretrained(tmp_path)
    again = c3a_triton.load_adapter(llama(vocab_size=37), tmp_path)
    assert torch.equal(logits(again, ids), applied)
    with pytest.raises(CheckpointError, match=r"embed_tokens: its kernel \[4, 2, 12\].*out_features=49"):
        c3a_triton.load_adapter(llama(vocab_size=49), tmp_path)
    with model.c3a.using(["default", "__base__", "default"]):
        mixed = logits(model, ids)
    torch.testing.assert_close(mixed[1], plain[1])
    torch.testing.assert_close(mixed[0], applied[0])
    merged = model.c3a.merge_and_unload()
    assert type(merged.model.embed_tokens) is nn.Embedding
    torch.testing.assert_close(logits(merged, ids), applied, rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_warned_about_and_changes_only_with_a_merge() -> None:
    model = llama(tied=True)
    hidden = torch.randn(2, 24)
    head = model.lm_head(hidden)
    with pytest.warns(UserWarning, match=r"embed_tokens.weight is one tensor with lm_head.weight \(tied\)"):
        c3a_triton.apply(model, C3AConfig(block_size=8, target_modules=["embed_tokens"]))
    assert torch.equal(model.lm_head(hidden), head)
    with pytest.warns(UserWarning, match="tied.*merging changes both"):
        model.c3a.merge_adapter()
    assert not torch.equal(model.lm_head(hidden), head)
    model.c3a.unmerge_adapter()
    assert torch.equal(model.lm_head(hidden), head)


def test_all_linear_leaves_embeddings_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = c3a_triton.apply(llama(), C3AConfig(block_size=4, target_modules="all-linear"))
    assert not any(layer.kind == "embedding" for _, layer in model.c3a.layers())
