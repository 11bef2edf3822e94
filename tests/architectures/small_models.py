"""Every class of transformers' mappings with a small configuration.

Sizes are written by the names of configuration fields, nested configurations included; where names do not tell,
`overrides.py` does.
"""

import re
from typing import Any

import torch
import transformers
from overrides import OVERRIDES
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

MAX_PARAMETERS = 30_000_000
VOCABULARY = 128
WIDTH, WIDER, HEADS, HEAD = 64, 128, 4, 16
IMAGE = 64

# The mappings whose classes are tried; of a model type in none of them, the class without a head.
GROUPS = (
    "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ",
    "CTC", "AUDIO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION",
    "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "DEPTH_ESTIMATION",
    "MASK_GENERATION", "MASKED_IMAGE_MODELING",
    "VIDEO_CLASSIFICATION", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "TIME_SERIES_PREDICTION",
    "TIME_SERIES_REGRESSION", "TABLE_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING", "VISUAL_QUESTION_ANSWERING",
    "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "DECISION", "IMAGE_TO_IMAGE", "IMAGE_MATTING", "POSE_ESTIMATION",
    "NORMAL_ESTIMATION", "POINTMAP_ESTIMATION", "TEXT_RECOGNITION", "TABLE_RECOGNITION", "RNNT", "TDT", "MULTIMODAL_LM",
    "RETRIEVAL", "CAUSAL_IMAGE_MODELING",
)  # fmt: skip


def classes() -> dict[str, str]:
    """Class → the mapping that it is tried for."""
    found: dict[str, str] = {}
    covered: set[str] = set()
    for group in GROUPS:
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{group}_MAPPING_NAMES", {}).items():
            covered.add(model_type)
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, group)
    for model_type, names in modeling_auto.MODEL_MAPPING_NAMES.items():
        if model_type not in covered:
            found.setdefault(names if isinstance(names, str) else names[0], "MODEL")
    return found


def find(name: str) -> tuple[Any, Any]:
    """A class and its small configuration."""
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    if config_class is None:
        types = [
            model_type
            for group in ("", *(f"FOR_{group}_" for group in GROUPS))
            for model_type, names in getattr(modeling_auto, f"MODEL_{group}MAPPING_NAMES", {}).items()
            if name in ([names] if isinstance(names, str) else names)
        ]
        config_class = configuration_auto.CONFIG_MAPPING[types[0]]
    return model_class, small_config(config_class, name)


# Configurations

# Value → fields that get it where they are larger.
_AT_MOST_BY_VALUE = {
    WIDTH: (
        "hidden_size d_model n_embd embed_dim dim embedding_size projection_dim out_hidden_size output_dim "
        "hidden_dim word_embed_proj_dim d_embed embedding_dim emb_dim text_hidden_size pooler_hidden_size "
        "latent_dim projection_size image_text_hidden_size decoder_hidden_dim lru_width mm_hidden_size "
        "feature_size encoder_hidden_dim mask_feature_size d_latents text_encoder_width class_embed_dim "
        "text_projection_in_dim text_projection_out_dim adapter_in_dim adapter_out_dim projector_input_dim "
        "projector_output_dim task_encoder_hidden_dim audio_embed_dim mm_embed_dim output_proj_dims "
        "condition_dim fpn_feature_size share_expert_dim enc_dim d_embed_proj true_hidden_size "
        "output_channels post_conv_in_channels upsample_groups attention_hidden_size classifier_proj_size "
        "cross_hidden_size patch_embed_hidden_size entity_emb_size backbone_hidden_size max_target_positions "
        "max_decoder_position_embeddings max_text_positions context_length upsample_initial_channel crop_size"
    ),
    WIDER: (
        "intermediate_size ffn_dim d_ff n_inner mlp_dim dim_feedforward linear_units ffn_hidden_size dff "
        "dim_ff decoder_ffn_dim encoder_ffn_dim encoder_feedforward_dim feed_forward_size "
        "encoder_linear_units decoder_linear_units expert_ffn_hidden_size dense_intermediate_size "
        "max_position_embeddings n_positions n_ctx original_max_position_embeddings mamba_d_ssm "
        "vocab_size_per_layer_input entity_vocab_size ngram_vocab_size_base"
    ),
    HEAD: (
        "head_dim d_kv d_head v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim swa_head_dim global_head_dim attention_head_size "
        "resampler_head_dim dim_head resampler_dim_head cross_head_dim kv_channels state_size mamba_d_state "
        "ssm_state_size time_step_rank mamba_dt_rank chunk_size mamba_chunk_size attention_chunk_size "
        "num_conv_pos_embeddings hidden_size_per_layer_input"
    ),
    32: (
        "mamba_d_head mamba_head_dim qk_head_dim q_lora_rank kv_lora_rank o_lora_rank max_source_positions "
        "flow_size speech_decoder_postnet_units speech_decoder_prenet_units codebook_size num_embeddings "
        "num_codevectors_per_group codebook_dim codevector_dim proj_codevector_dim local_attention_window_len "
        "encoder_hash_byte_group_vocab"
    ),
    4: (
        "n_routed_experts num_experts num_local_experts moe_num_experts num_experts_per_layer n_experts "
        "mm_tokens_per_image frames_per_clip num_frames pred_num_mask_tokens num_groups"
    ),
    2: (
        "num_experts_per_tok moe_topk moe_k num_experts_per_token top_k moe_top_k num_layers_per_stack "
        "num_self_attends_per_block num_blocks linear_num_key_heads num_denoising group_detr"
    ),
    1: (
        "n_group topk_group n_groups num_expert_group mamba_n_groups n_shared_experts first_k_dense_replace "
        "num_dense_layers num_global_layers"
    ),
    8: (
        "sliding_window attention_window_size sliding_window_size local_attention num_queries "
        "num_query_tokens num_object_queries num_detection_tokens image_embedding_size num_latents "
        "num_image_tokens perceiver_resampler_num_latents latent_query_num rotary_dim"
    ),
    33: "spectrogram_bins",
    65: "keypoint_decoder_dim",
    80: "model_in_dim num_mel_bins n_mel_bins",
    0: "num_kv_shared_layers",
}
_AT_MOST = {name: value for value, names in _AT_MOST_BY_VALUE.items() for name in names.split()}
_NO_DROPOUT = (
    "dropout attention_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop "
    "activation_dropout dropout_rate classifier_dropout layerdrop encoder_layerdrop decoder_layerdrop hidden_dropout "
    "embedding_dropout drop_path_rate final_dropout feat_proj_dropout feat_quantizer_dropout attention_probs_dropout "
    "summary_last_dropout summary_first_dropout router_jitter_noise"
)
_EXACTLY: dict[str, Any] = {
    **dict.fromkeys(_NO_DROPOUT.split(), 0.0),
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "use_cache": False,
    "add_router_probs": False,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
# Lists of widths from stage to stage. Those of convolutional networks depend on each other and are left as they are.
_LISTS = (
    "hidden_sizes", "embed_dims", "embed_dim", "neck_hidden_sizes", "conv_dim", "tdnn_dim", "encoder_hidden_sizes",
    "decoder_in_channels", "fusion_hidden_sizes", "backbone_channel_list", "embed_dim_per_stage",
    "subsampling_conv_channels", "post_process_channels", "feature_channels",
)  # fmt: skip
_LAYERS = re.compile(r"(num_.*layers|n_layers?|.*_layers|num_layers|depth|.*_depth|layers|.*num_hidden_layers)$")
_NOT_LAYERS = re.compile(
    r"layer_types|fpn_|num_feat_extract_layers|.*residual_layers|cross_attention_layers|num_kv_shared|num_dense|"
    r"no_rope_layers|rope_scaling_layers|moe_layers|num_attention_layers|rotary|num_hidden_groups|num_global_layers"
)
_HEADS = re.compile(r".*(_heads|_head)$|n_head$|num_heads$|.*attention_heads$")
_ID = re.compile(
    r"(?!num_).*(_token_id|_token_index|_token_ids|_start_id|_end_id|_token|_newline_id|_patch_id|_bos_id|_eos_id|_pad_id)$"
)
_WIDE = re.compile(r".*(hidden_size|_dim|_dims|_size|channels|width|features|units|filters|rank)$")
_KEEP = re.compile(
    r".*(patch_size|image_size|kernel_size|window_size|crop_size|stride|sampling|sample_rate|buckets|max_distance|"
    r"position|temperature|hop_length|chunk|block_size|num_groups|grid|scale|max_len|length|audio_channels|num_channels|"
    r"in_channels|token|_id|in_chans|tubelet_size|merge_size|input_channels|frame_size|pool_size|roi_size|bias)$"
)


def small_config(config_class: Any, name: str = "") -> Any:
    """A small configuration of a class of configurations, changed by `OVERRIDES[name]`."""
    overrides = {**OVERRIDES.get(config_class.model_type, {}), **OVERRIDES.get(name, {})}
    default = config_class(**overrides.pop("_start", {}))
    ids: dict[int, int] = {}
    values = _small(default.to_dict(), ids)
    for key in ("transformers_version", "architectures", "torch_dtype", "dtype", "_name_or_path"):
        values.pop(key, None)
    if "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ()) or any(
        isinstance(values.get(key), dict) for key in ("vision_config", "thinker_config")
    ):
        _add_mrope_sections(values)
    for path, value in overrides.items():
        *parents, last = path.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if value is None and last in inner and path.endswith("layer_types"):
            del inner[last]
        else:
            inner[last] = value
    config = config_class.from_dict(values)
    config._attn_implementation = "eager"
    return config


def _add_mrope_sections(values: dict[str, Any]) -> None:
    """Split the rotary dimensions for time, height and width as HEAD wants it; defaults are for larger heads."""
    for key, value in values.items():
        if not isinstance(value, dict):
            continue
        if key == "rope_parameters" and "rope_type" in value and "vision" not in values.get("model_type", ""):
            half = int(HEAD * (value.get("partial_rotary_factor") or 1)) // 2
            value.setdefault("mrope_section", [half // 2, half // 4, half // 4])
        else:
            _add_mrope_sections(value)


def _small(values: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    original, values = values, dict(values)
    hierarchical = isinstance(values.get("depths"), list)
    chosen = _layers_to_keep(values)
    for key, value in original.items():
        if not isinstance(key, str):
            continue
        if key == "per_layer_config" and isinstance(value, dict):
            kept = chosen[1] if chosen else []
            values[key] = {
                str(kept.index(int(layer))): _small(entry, ids) for layer, entry in value.items() if int(layer) in kept
            }
        elif key == "head_dim" and value is None:
            values[key] = HEAD
        elif key == "vocab_size" and value is None:
            values[key] = VOCABULARY
        elif key in ("image_token_id", "image_token_index", "video_token_index") and value is None:
            values[key] = VOCABULARY - 28
        elif isinstance(value, dict):
            values[key] = value if key in ("id2label", "label2id", "task_specific_params") else _small(value, ids)
        elif key in _EXACTLY and not isinstance(value, (list, dict)) and value is not None:
            values[key] = type(value)(_EXACTLY[key])
        elif isinstance(value, bool) or value is None or isinstance(value, (str, float)):
            continue
        elif isinstance(value, list) and not ("stage_out_channels" in original and key in _LISTS):
            values[key] = _small_list(key, value, ids, chosen)
        elif isinstance(value, int):
            values[key] = _small_int(key, value, ids, chosen, original, hierarchical)
    if (
        isinstance(features := original.get("out_features"), list)
        and not hierarchical
        and "num_hidden_layers" in original
    ):
        count = max(len(features), values["num_hidden_layers"])
        values["num_hidden_layers"] = count
        values["out_features"] = [f"stage{number}" for number in range(count - len(features) + 1, count + 1)]
        for key in ("out_indices", "stage_names"):
            values.pop(key, None)
    return values


def _layers_to_keep(values: dict[str, Any]) -> tuple[int, list[int]] | None:
    """(number of layers, which to keep) so that every kind of layer is among them, where lists say the kinds."""
    for key in ("num_hidden_layers", "n_layers", "num_layers", "n_layer", "depth", "encoder_layers"):
        count = values.get(key)
        if isinstance(count, int) and count > 2:
            lists = [v for k, v in values.items() if isinstance(v, list) and len(v) == count]
            kept: list[int] = []
            for entries in lists:
                for number, entry in enumerate(entries):
                    if entry not in [entries[index] for index in kept]:
                        kept.append(number)
            for number in range(count):
                if len(kept) < 2 and number not in kept:
                    kept.append(number)
            return count, sorted(kept)[:6]
    return None


def _small_list(key: str, value: list[Any], ids: dict[int, int], chosen: Any) -> list[Any]:
    if value and all(isinstance(entry, dict) for entry in value):
        return [_small(entry, ids) for entry in value]
    if key == "image_grid_pinpoints":
        return [[64, 64]]
    if chosen and len(value) == chosen[0]:
        kept = [value[index] for index in chosen[1]]
        if key.endswith("heads_per_layer"):
            return [HEADS if entry == max(value) else HEADS // 2 for entry in kept]
        return kept
    if not value or not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value):
        return value
    if _ID.match(key):
        return [_small_id(entry, ids) for entry in value]
    if key == "mrope_section" or (key.endswith("_section") and sum(value) > 8):
        return [4, 2, 2]
    if key in ("depths", "layers_per_stage", "num_layers_per_stage"):
        return [min(entry, 2) for entry in value]
    if re.match(
        r"(global_attn_indexes|deepstack_visual_indexes|fullatt_block_indexes|.*_block_ind.*|look_.*layers)", key
    ):
        return [1]
    if key == "image_size":
        return [IMAGE] * len(value)
    if key in _LISTS:
        # One factor for all lists, which have to fit together.
        return [entry // 4 if entry % 4 == 0 and entry >= 32 else entry for entry in value]
    return value


def _small_id(value: int, ids: dict[int, int]) -> int:
    """A token's id within the small vocabulary, different ones for different ones."""
    if value < VOCABULARY - 40:
        return value
    return ids.setdefault(value, VOCABULARY - 1 - len(ids))


def _small_int(
    key: str, value: int, ids: dict[int, int], chosen: Any, values: dict[str, Any], hierarchical: bool
) -> int:
    if re.search(r"vocab_sizes?$|vocab$", key):
        return min(value, VOCABULARY)
    if _ID.match(key):
        return _small_id(value, ids)
    if key == "hidden_size" and "embed_dim_per_stage" in values:
        return value // 4
    if key in ("embed_dim", "hidden_size", "encoder_hidden_size") and hierarchical and "num_heads" in values:
        return max(value // 4, 16)  # doubled from stage to stage, and divided by the heads of each
    if key == "window_size":
        return 32 if value >= 64 else min(value, 2)
    if key in _AT_MOST:
        return min(value, _AT_MOST[key])
    if re.search(r"(key_value|kv)_(attention_)?heads", key) or key in ("n_head_kv", "num_kv_heads"):
        own = re.sub(r"(key_value|kv)_(attention_)?heads", "attention_heads", key)
        heads = values.get(own, values.get("num_attention_heads", values.get("num_heads", 0)))
        return 1 if value == 1 else min(heads, HEADS) if value == heads else 2
    if _HEADS.match(key) and isinstance(value, int):
        return min(value, HEADS)
    if _LAYERS.match(key) and not _NOT_LAYERS.match(key):
        if chosen and value == chosen[0]:
            return len(chosen[1])
        return min(value, 2)
    if key == "image_size":
        return min(value, IMAGE)
    if key == "patch_size":
        return value if value <= 8 else 8 if value % 8 == 0 else value if value < 16 else 8
    if value >= 128 and re.search(r"intermediate|ffn|mlp_dim|feed_?forward", key):
        return WIDER
    if value > WIDTH and _WIDE.match(key) and not _KEEP.match(key):
        return WIDTH
    return value


def count_parameters(model_class: Any, config: Any) -> int | None:
    """How many parameters a model would have; None where it does not build without memory."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in model_class(config).parameters())
    except Exception:
        return None


def disturb(model: nn.Module) -> None:
    """Give parameters that are all alike (zeros, ones) values of their own, so that gradients reach what is behind."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1:
            values = parameter.data
            if not torch.isfinite(values).all() or (values.std() < 1e-4 and values.abs().max() < 2):
                noise = torch.randn(values.shape, generator=generator) * 0.05
                parameter.data = torch.where(torch.isfinite(values), values, 0) + noise.to(values.dtype)
            elif values.std() < 0.01:
                parameter.data = values + torch.randn(values.shape, generator=generator).to(values.dtype) * 0.02
