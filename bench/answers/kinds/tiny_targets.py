"""Tiny random models of every kind of causal LM that transformers has, from the kinds' own default configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

CLASSES = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
"""The model class of each kind, by name."""
KINDS = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(x for x in CLASSES if x not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Causal LMs, then what besides takes images."""
VOCAB = 128
NOISE = 0.3
"""Deviation of what is added to every parameter: logits far apart, and no gate, bias or sink that begins at zero stays
without effect."""
REACH = 8
"""Of windows and whatever else begins at some length: within the text of a test."""
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "embedding_size", "word_embed_proj_dim", "d_model", "emb_dim"), 64),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "projection_dim", "codebook_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff"), 96),
    **dict.fromkeys(("num_hidden_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("rotary_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("encoder_hash_byte_group_vocab", "backbone_hidden_size", "num_centroids"), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), REACH),
    **dict.fromkeys(("local_attention", "keep_window_size", "attention_chunk_size"), REACH),
    **dict.fromkeys(("index_topk", "floor_scale", "log_scaling_n_floor", "original_max_position_embeddings"), REACH),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), REACH),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("index_block_size", "index_topk_blocks"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
}
"""What a config's field becomes where its default is larger."""
IMAGE_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dory": {"sliding_window": 16},  # its own code fails where a prompt is longer, and for some batches
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
    },
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    ),
    **dict.fromkeys(("glm4v_text", "glm_ocr_text"), {"rope_parameters": IMAGE_ROPE}),
    "glm4v_moe_text": {"rope_parameters": IMAGE_ROPE | {"mrope_section": [2, 1, 1]}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_decoder_layers": 2, "num_encoder_layers": 2},
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"), {"rope_parameters": IMAGE_ROPE}
    ),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), {"vision_start_token_id": 3}),
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "xlnet": {"d_head": 16},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8, "layers_block_type": None},
}
"""What a kind needs besides."""
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_config(config_class: type[PretrainedConfig], **overrides: Any) -> PretrainedConfig:
    """The class's default config, its parts too, with SIZES and as few layers as show every type of its layers."""
    default = config_class()
    known = vars(default) | {name: vars(default).get(real) for name, real in config_class.attribute_map.items()}
    fields: dict[str, Any] = {name: size for name, size in (SIZES | TOKENS).items() if _larger(known.get(name), size)}
    if "kv_lora_rank" in known:  # latent attention has no groups
        fields["num_key_value_heads"] = SIZES["num_attention_heads"]
    if "head_dim" in known and known["head_dim"] is None:
        fields["head_dim"] = SIZES["head_dim"]
    if "num_hidden_layers" in fields:
        fields |= _first_layers(default)
    if getattr(default, "is_decoder", True) is False and not getattr(default, "is_encoder_decoder", False):
        fields["is_decoder"] = True
    if rope := _tiny_rope(known.get("rope_parameters") or {}):
        fields["rope_parameters"] = rope
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            fields[name] = tiny_config(type(part)).to_dict()
    return config_class(**fields | OVERRIDES.get(config_class.model_type, {}) | overrides)


def _tiny_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Angles that change at REACH, and those of images divided as the head is; nothing where neither is there."""
    found: dict[str, Any] = {}
    if _larger(rope.get("original_max_position_embeddings"), REACH):
        found["original_max_position_embeddings"] = REACH
    if "mrope_section" in rope:
        pairs = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
        found["mrope_section"] = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]
    return found and rope | found


def _larger(value: Any, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > size


def _first_layers(default: PretrainedConfig) -> dict[str, Any]:
    """num_hidden_layers, and the beginnings of the lists with an entry a layer."""
    lists = {
        name: value
        for name, value in vars(default).items()
        if isinstance(value, list) and len(value) == default.num_hidden_layers
    }
    repeating = {name: value for name, value in lists.items() if len(set(map(str, value))) <= len(value) // 2}
    count = max([2, *(1 + max(value.index(one) for one in value) for value in repeating.values())])
    sized = {
        name: [SIZES[name] if name in SIZES and _larger(one, SIZES[name]) else one for one in value[:count]]
        for name, value in repeating.items()
    }
    return {"num_hidden_layers": count} | sized


def tiny_target(kind: str, seed: int = 0, named: str | None = None, **overrides: Any) -> PreTrainedModel:
    """A random model of a kind, of its class or the one named, in float32 and ready to decode; the same for the same
    arguments."""
    model_class = getattr(transformers, named or CLASSES[kind])
    config = tiny_config(CONFIG_MAPPING[kind], **overrides)
    if not isinstance(config, model_class.config_class):  # the kind's causal LM is a part of it
        parts = [part for part in vars(config).values() if isinstance(part, model_class.config_class)]
        config = parts[0] if parts else config
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # sdpa, the default of some versions, has no cap
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
        for embedding in model.get_input_embeddings().parameters():
            embedding.mul_(0.1)  # or a tied head says the last token again
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, decoder_start_token_id=1)
    return model


def full_attention(kind: str) -> dict[str, Any]:
    """What makes every layer of the kind full attention; nothing where they are, or where its config says nothing of
    layers and windows."""
    config_class = CONFIG_MAPPING[kind]
    config, field = tiny_config(config_class), config_class.attribute_map.get("layer_types", "layer_types")
    types = getattr(config, "layer_types", None)
    if types and isinstance(getattr(config_class, field, None), property):
        return {}
    if types:
        return {"layer_types": ["full_attention"] * len(types)} if set(types) != {"full_attention"} else {}
    return {"sliding_window": None} if getattr(config, "sliding_window", None) else {}
