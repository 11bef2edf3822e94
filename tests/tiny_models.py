"""Models of transformers with random weights, small enough to be built in every test."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

IDS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 1, 0], [4, 6, 2, 9, 9]])
_LLAMA = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def llama(*, tied: bool = False, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(_LLAMA | {"tie_word_embeddings": tied} | changes)))


def llama_classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**_LLAMA, num_labels=3))


def bert_classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=24, n_layer=2, n_head=2)).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=24, d_kv=12, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return ViTForImageClassification(config).eval()


_ENCODER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {"vocab_size": 32, "max_position_embeddings": 32, "projection_dim": 24, "eos_token_id": 2}
    vision = {"image_size": 8, "patch_size": 4, "projection_dim": 24}
    return CLIPModel(CLIPConfig(text_config=_ENCODER | text, vision_config=_ENCODER | vision, projection_dim=24)).eval()


def segformer() -> SegformerForSemanticSegmentation:
    torch.manual_seed(0)
    stages: dict[str, Any] = {"hidden_sizes": [16] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    return SegformerForSemanticSegmentation(
        SegformerConfig(**stages, mlp_ratios=[2] * 4, decoder_hidden_size=16, num_labels=2)
    ).eval()


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**_ENCODER, image_size=8, patch_size=4)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**_LLAMA), image_token_index=31)
    ).eval()


def musicgen() -> MusicgenForConditionalGeneration:
    torch.manual_seed(0)
    decoder = {"vocab_size": 32, "hidden_size": 24, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MusicgenConfig(
        text_encoder={"model_type": "t5", "vocab_size": 32, "d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 1},
        audio_encoder={"model_type": "encodec", "num_filters": 2, "hidden_size": 8, "codebook_dim": 8},
        decoder=decoder | {"num_codebooks": 1},
    )
    return MusicgenForConditionalGeneration(config).eval()


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


class MLP(nn.Module):
    """Two linear layers and a norm, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.second = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


_MOE = _LLAMA | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def _mixture(name: str, implementation: str | None, **config: Any) -> Any:
    """A model whose experts are stacked, with values large enough for each part to show in the logits."""
    torch.manual_seed(0)
    options = {} if implementation is None else {"experts_implementation": implementation}
    values = getattr(transformers, f"{name}Config")(**(_MOE | config))
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(values, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model.eval()


def qwen3_moe(implementation: str | None = None, **changes: Any) -> Any:
    config = {"moe_intermediate_size": 16, "num_experts": 4, "head_dim": 12}
    return _mixture("Qwen3Moe", implementation, **(config | changes))


def mixtral(implementation: str | None = None) -> Any:
    return _mixture("Mixtral", implementation, intermediate_size=16, num_local_experts=4)


def gpt_oss(implementation: str | None = None, **changes: Any) -> Any:
    config = {"intermediate_size": 16, "num_local_experts": 4, "head_dim": 12, "layer_types": ["full_attention"]}
    model = _mixture("GptOss", implementation, **(config | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "sinks" in name:
                parameter.normal_(std=0.4)
    return model


def deepseek_v3(implementation: str | None = None) -> Any:
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    groups = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "n_shared_experts": 1}
    config = {"moe_intermediate_size": 16, "n_routed_experts": 4}
    return _mixture("DeepseekV3", implementation, **latent, **groups, **config)


def llama4(implementation: str | None = None) -> Any:
    config = {"intermediate_size": 16, "intermediate_size_mlp": 32, "num_local_experts": 3, "head_dim": 12}
    values = _MOE | config | {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "use_qk_norm": False}
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model.eval()
