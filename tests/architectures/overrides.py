"""Fields of configurations whose size their names do not tell, by model type or class: path of a field → value.

"_start" has arguments of the configuration's own constructor, for those without usable defaults.
"""

from typing import Any

_RESNET = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 64], "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}  # fmt: skip
_LAST_STAGE = {"backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_LAST_STAGES = {"backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}}
_ALL_STAGES = {"backbone_config": {**_RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "detr": _LAST_STAGE,
    "conditional_detr": _LAST_STAGE,
    "dab-detr": _LAST_STAGE,
    "table-transformer": _LAST_STAGE,
    "deformable_detr": _LAST_STAGES,
    "omdet-turbo": _LAST_STAGES,
    "BeitForSemanticSegmentation": {
        "num_hidden_layers": 4,
        "out_indices": [1, 2, 3, 4],
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "DetrForSegmentation": {**_ALL_STAGES, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "pix2struct": {"vision_config.patch_embed_hidden_size": 768},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 768},
    "Data2VecVisionForSemanticSegmentation": {
        "num_hidden_layers": 4,
        "out_indices": [0, 1, 2, 3],
        "auxiliary_channels": 64,
    },
    "DPTForSemanticSegmentation": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "DPTForDepthEstimation": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "blt": {"encoder_config.hidden_size_global": 64, "decoder_config.hidden_size_global": 64},
    "cohere_compass": {
        "text_config.rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
        }
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128},
    "kimi_linear": {"num_experts_per_token": 2, "num_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma4_assistant": {
        "_start": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "reformer": {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [32, 32], "max_position_embeddings": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "bailing_hybrid": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "dots3_note": {"swa_head_dim": 32},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "hybrid_layer_ids": [1, 3],
    },
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 8,
        "text_config.indexer_compress_ratio": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "levit": {"patch_size": 16},
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 0.25, "hidden_dim": 1280},
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 64,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "perceiver": {"num_cross_attention_heads": 1, "num_self_attention_heads": 4},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4, "<|visual token 000000|>": 5}},
    "chameleon": {"vocabulary_map": {"<image>": 3, "IMGIMGBS": 4, "IMGIMGBAZ": 5}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "hunyuan_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "mistral4": {"head_dim": 32},
    "step3p7": {"text_config.sliding_window": 8},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "efficientloftr": {"hidden_size": 256},
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 64},
    "align": {
        "vision_config.width_coefficient": 1.0,
        "vision_config.depth_coefficient": 0.25,
        "vision_config.hidden_dim": 1280,
        "projection_dim": 320,
    },
    "align_vision_model": {"width_coefficient": 1.0, "depth_coefficient": 0.25, "hidden_dim": 1280},
    "swin2sr": {"embed_dim": 48},
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "sapiens2": {
        "head_config.upsample_out_channels": [32, 32],
        "head_config.upsample_kernel_sizes": [4, 4],
        "head_config.conv_out_channels": [32],
        "head_config.conv_kernel_sizes": [1],
    },
    "bros": {"dim_bbox_projection": 16},
    "sam3_tracker": {"low_res_mask_size": 16},
    "depth_pro": {"patch_size": 64},
    "audio-spectrogram-transformer": {"max_length": 64},
    "encodec": {"codebook_dim": 64},
    "clap": {"audio_config.spec_size": 256},
    "clap_audio_model": {"spec_size": 256},
    "lilt": {"hidden_size": 96},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
}
