"""`tie_weights` and `resize_token_embeddings` of adapted models: base weights stay tied, trained copies apart."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import IDS, llama, t5
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig

QUIET = pytest.mark.filterwarnings(
    "ignore:.*tied", "ignore:.*adapter", "ignore:.*one module", "ignore:.*no longer tied"
)
pytestmark = QUIET


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    sizes = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=32, d_model=24, encoder_layers=1, decoder_layers=1, **sizes, **ids, scale_embedding=True
    )
    return BartForConditionalGeneration(config)


MODELS = {"llama": lambda: llama(tied=True), "t5": t5, "bart": bart}
CASES = [
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}),
    ("t5", {"target_modules": ["q", "lm_head"]}),
    ("t5", {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    ("t5", {"target_modules": ["q"], "modules_to_save": ["shared"]}),
    ("bart", {"target_modules": ["q_proj", "encoder.embed_tokens", "decoder.embed_tokens"]}),
    ("bart", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("bart", {"target_modules": ["q_proj"], "modules_to_save": ["shared", "embed_tokens"]}),
]


def logits(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def trained(name: str, fields: dict[str, Any]) -> Any:
    model = c3a_triton.apply(MODELS[name]().eval(), C3AConfig(block_size=8, **fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def state(model: nn.Module) -> dict[str, tuple[int, bool]]:
    return {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
def test_tying_again_changes_nothing(name: str, fields: dict[str, Any]) -> None:
    model = trained(name, fields)
    expected, before, modules = logits(model), state(model), dict(model.named_modules())
    model.tie_weights()
    assert state(model) == before
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), expected)
    # Another copy of the model ties its own.
    copied = copy.deepcopy(model)
    copied.tie_weights()
    assert torch.equal(logits(copied), expected)
    assert state(model) == before
    if sum("embed_tokens" in target or target == "lm_head" for target in fields["target_modules"]) == 1:
        model.c3a.merge_adapter()
        merged = logits(model)
        model.tie_weights()
        assert torch.equal(logits(model), merged)
        model.c3a.unmerge_adapter()
        assert torch.equal(logits(model), expected)
    model.resize_token_embeddings(32)  # no other size: as often as a script likes
    assert state(model) == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
def test_weights_that_have_come_apart_are_tied_without_the_copies(name: str, fields: dict[str, Any]) -> None:
    """A move through meta, as accelerate's preparation for FSDP2 makes it, leaves every name a tensor of its own."""
    model = trained(name, fields)
    expected, values, buffers = logits(model), model.state_dict(), dict(model.named_buffers())
    model.to("meta")
    model.load_state_dict(values, assign=True)
    for where, buffer in buffers.items():
        model.get_submodule(where.rpartition(".")[0]).register_buffer(
            where.rpartition(".")[2], buffer, persistent=False
        )
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    names = [name for name, _ in model.named_parameters()]
    groups: dict[int, list[str]] = {}
    for other, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(other)
    assert not [group for group in groups.values() if len(group) > 1 and any(".modules_to_save." in x for x in group)]
    base = {name: id(p) for name, p in MODELS[name]().named_parameters(remove_duplicate=False)}
    assert len(names) == len(set(base.values())) + sum(
        "c3a_kernel" in name or ".modules_to_save." in name for name in names
    )


@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
def test_another_size_of_held_embeddings_is_refused_by_name(name: str, fields: dict[str, Any]) -> None:
    model = trained(name, fields)
    expected, before = logits(model), state(model)
    with pytest.raises(AdapterStateError, match=r"(lm_head|embed_tokens|shared).* for 32 tokens, not 40.*unload"):
        model.resize_token_embeddings(33, pad_to_multiple_of=8)
    assert state(model) == before
    assert torch.equal(logits(model), expected)
    model.c3a.unload()
    assert "tie_weights" not in model.__dict__
    assert model.resize_token_embeddings(40).weight.shape[0] == 40


@pytest.mark.parametrize("name", MODELS)
def test_a_model_whose_embeddings_are_its_own_is_resized(name: str) -> None:
    model = trained(name, {"target_modules": ["q"] if name == "t5" else ["q_proj"]})
    expected = logits(model)
    model.resize_token_embeddings(40, mean_resizing=False)
    torch.testing.assert_close(logits(model)[..., :32], expected)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not model.get_input_embeddings().weight.requires_grad
    assert all(layer.c3a_kernel["default"].requires_grad for _, layer in model.c3a.layers())


@pytest.mark.parametrize("fields", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_whoever_ties_by_hand_ties_the_base(fields: dict[str, Any]) -> None:
    model = trained("llama", {"target_modules": ["q_proj"]} | fields)
    expected, head = logits(model), model.lm_head
    other = nn.Parameter(model.model.embed_tokens.weight.detach().clone(), requires_grad=False)
    head.weight = other
    assert (head.base_layer if hasattr(head, "base_layer") else head.original_module).weight is other
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("fields", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_resizing_a_part_is_refused_for_what_is_tied_outside_of_it(fields: dict[str, Any]) -> None:
    model = trained("llama", {"target_modules": ["q_proj"]} | fields)
    before = state(model)
    with pytest.raises(AdapterStateError, match=r"lm_head.* for 32 tokens, not 40"):
        model.model.resize_token_embeddings(40)
    assert state(model) == before
