"""A tiny random model of every causal language model of transformers, from its config class alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# What configs call their sizes, and sizes that fit together. A name is set where a family's config has it.
SIZES: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2, "init_std": 0.2,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "ffn_hidden_size": 32, "n_group": 1,
    "topk_group": 1, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "dense_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "router_hidden_size": 16,
    # compressed and indexed attention
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 64, "index_head_dim": 8, "index_n_heads": 2, "o_groups": 2, "o_lora_rank": 16, "rotary_dim": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 64, "d_rel": 4,
    # recurrent layers
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 8, "linear_num_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
    "mamba_d_ssm": 64, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "mamba_dt_rank": 4,
    "mamba_headdim": 8, "n_mamba_heads": 2,
    # encoder-decoders
    "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "encoder_layers": 1,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 32, "ffn_dim": 32, "word_embed_proj_dim": 32,
}  # fmt: skip

# Where these do not fit, or there is more to say.
DECODERS = [  # if told so
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
]  # fmt: skip
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},
    "bailing_hybrid": HYBRID,
    "bamba": {"attn_layer_indices": [1]},
    "ctrl": {"dff": 32},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_key_value_heads": 4},
    "dots3_note_text": {"per_layer_config": {}},
    "gemma4_text": {"per_layer_config": {}, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 264},
    "gemma4_unified_text": {"per_layer_config": {}},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "granitemoehybrid": HYBRID,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    "minimax": HYBRID,
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"num_hidden_layers": None},
    "olmo_hybrid": HYBRID,
    "prophetnet": {"num_hidden_layers": None, "num_decoder_layers": 2, "num_encoder_layers": 1}
    | {"num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "xlnet": {"max_position_embeddings": None, "num_attention_heads": None, "n_layer": 2, "n_head": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# No tiny model is made of these: their configs do not give one from sizes alone.
LEFT_OUT = {
    "cohere_compass_text": "needs rope_parameters for each kind of layer",
    "dbrx": "its config has no defaults that work",
    "gemma3n_text": "at this size its states are not finite",
    "gemma4_assistant": "runs beside another model only",
    "cpmant": "has no attention mask, and its states run over padding",
    "hrm_text": "its number of layers counts their repetitions",
    "longcat_flash": "its number of layers counts each of them twice",
    "qwen4_exp_text": "its indexed attention needs more than sizes",
    "zamba": "its shared layers need more layers",
    "zamba2": "its shared layers need more layers",
    "gemma4_unified_assistant": "runs beside another model only",
}


def names() -> list[str]:
    """Model types. Of what is made of several models, such as one that sees, the language model alone is an entry."""
    return [
        name
        for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if name not in LEFT_OUT and not CONFIG_MAPPING[name].sub_configs
    ]


def tiny_config(name: str) -> PretrainedConfig:
    cls = CONFIG_MAPPING[name]
    known = cls().to_dict().keys() | set(cls.attribute_map)
    sizes = {key: size for key, size in SIZES.items() if key in known}
    if "kv_lora_rank" in known:  # every head has keys and values of its own
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if name in DECODERS:
        sizes["is_decoder"] = True
    sizes |= EXCEPTIONS.get(name, {})
    return cls(**{key: size for key, size in sizes.items() if size is not None})


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
