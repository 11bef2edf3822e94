"""`C3AEmbedding` against a dense ΔE in float64, vocabularies that no block size divides included."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import accelerate
import oracle
import peft
import pytest
import torch
from tiny_models import IDS, llama, logits
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisualEmbeddingTable
from transformers.models.pegasus.modeling_pegasus import PegasusSinusoidalPositionalEmbedding
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding
from versions import PEFT

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
    """Gemma's: the scale is a buffer, rounded to the weight's dtype."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.register_buffer("embed_scale", torch.tensor(50.6), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Tripled(nn.Embedding):
    """Nobody says by how much it scales; its `embed_scale` is of no account."""

    embed_scale = 7.0

    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


class Normed(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.normalize(super().forward(ids), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("base", "scale"),
    [
        (Scaled(50, WIDTH), 50.6),
        (Tripled(50, WIDTH, padding_idx=3), 3.0),
        (BartScaledWordEmbedding(50, WIDTH, 1, embed_scale=WIDTH**0.5), WIDTH**0.5),
        (nn.Embedding(50, WIDTH), 1.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_update_is_scaled_as_the_embedding_is(base: nn.Embedding, scale: float, dtype: torch.dtype) -> None:
    layer = C3AEmbedding(copy.deepcopy(base).to(dtype), "default", 8, "gaussian", layer_name="embed")
    ids = torch.arange(50).view(2, 25)
    expected = layer(ids)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    update = (expected - layer.base_layer(ids)).flatten(0, 1).double()
    assert (update - scale * dense(layer)).norm() < bound * expected.double().norm()
    layer.merge()
    assert (layer(ids) - expected).double().norm() < bound * expected.double().norm()
    layer.unmerge()
    assert torch.equal(layer(ids), expected)


@pytest.mark.skipif(PEFT < (0, 18), reason="PEFT 0.17 does not scale what LoRA adds to a scaled embedding")
def test_the_update_of_scaled_embeddings_is_that_of_peft() -> None:
    """PEFT's LoRA of the same ΔE, on the same base."""
    base = Scaled(48, WIDTH)
    layer = C3AEmbedding(base, "default", 8, "gaussian")
    lora = peft.tuners.lora.Embedding(copy.deepcopy(base), "default", r=48, lora_alpha=48, config=peft.LoraConfig())
    lora.lora_embedding_B["default"].data = layer.get_delta_weight("default").T.contiguous()
    lora.lora_embedding_A["default"].data = torch.eye(48)
    torch.testing.assert_close(layer(torch.arange(48)), lora(torch.arange(48)), rtol=1e-4, atol=1e-4)


def test_rows_copies_and_a_scale_that_changes() -> None:
    layer = C3AEmbedding(Scaled(50, WIDTH), "default", 8, "gaussian")
    ids = torch.arange(6).view(2, 3)
    rows = layer(ids, adapter_names=["default", "__base__"])
    torch.testing.assert_close(rows[0], layer(ids)[0])
    torch.testing.assert_close(rows[1], layer.base_layer(ids)[1])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    torch.testing.assert_close(copied(ids), layer(ids), rtol=0, atol=0)
    update = layer(ids) - layer.base_layer(ids)
    layer.base_layer.embed_scale.fill_(1.0)
    torch.testing.assert_close(layer(ids) - layer.base_layer(ids), update / 50.6, rtol=1e-3, atol=1e-5)


def test_a_scale_that_is_offloaded() -> None:
    base = Scaled(50, WIDTH)
    base.register_buffer("embed_scale", torch.tensor(50.6))
    layer = C3AEmbedding(base, "default", 8, "gaussian")
    expected = layer(torch.arange(50))
    accelerate.cpu_offload(base, execution_device="cpu", offload_buffers=True)
    assert base.embed_scale.is_meta
    torch.testing.assert_close(layer(torch.arange(50)), expected, rtol=0, atol=0)


def test_an_embedding_of_its_own_kind() -> None:
    layer = C3AEmbedding(Normed(10, WIDTH), "default", 8, layer_name="embed")
    ids = torch.arange(10)
    oracle.assert_close(layer(ids) - layer.base_layer(ids), dense(layer), torch.float32, bound=1e-4)
    with pytest.raises(AdapterStateError, match="embed: .*a forward of its own"):
        layer.merge()


@pytest.mark.parametrize(
    "build",
    [
        lambda: OPTLearnedPositionalEmbedding(30, WIDTH),  # called with a mask
        lambda: BartLearnedPositionalEmbedding(30, WIDTH),  # with ids, of which the shape counts
        lambda: PegasusSinusoidalPositionalEmbedding(30, WIDTH),  # with a shape
        lambda: WhisperPositionalEmbedding(30, WIDTH),
        lambda: Ovis2VisualEmbeddingTable(30, WIDTH),  # with probabilities
        lambda: IdeficsDecoupledEmbedding(30, 4, WIDTH),  # with ids of another table, too
    ],
)
def test_what_is_not_called_with_ids_of_its_own_is_refused_by_name(build: Callable[[], nn.Embedding]) -> None:
    model = nn.ModuleDict({"positions": build(), "fc": nn.Linear(WIDTH, WIDTH)})
    modules = dict(model.named_modules())
    with pytest.raises(ConfigError, match=r"positions: this \w+ cannot be adapted: .*exclude_modules"):
        c3a_triton.apply(model, C3AConfig(block_size=8, target_modules=["fc", "positions"]))
    assert dict(model.named_modules()) == modules


def test_a_model_with_scaled_embeddings_from_apply_to_file_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    config = Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    base = Gemma3ForCausalLM(config).eval()
    model = copy.deepcopy(base)
    c3a_triton.apply(model, C3AConfig(block_size=8, target_modules=["embed_tokens"], init_weights="gaussian"))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        model.c3a.save_pretrained(tmp_path)
        loaded = c3a_triton.load_adapter(copy.deepcopy(base), tmp_path)
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=0, atol=0)
        # The head is tied, and changes with a merge: what the decoder makes of ids does not.
        hidden = model.model(input_ids=IDS).last_hidden_state
        model.c3a.merge_and_unload()
        torch.testing.assert_close(model.model(input_ids=IDS).last_hidden_state, hidden, rtol=1e-4, atol=1e-4)


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
