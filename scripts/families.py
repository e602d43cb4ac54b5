"""Tiny configurations of mlx-lm's Mixture-of-Experts models, one for each module."""

from __future__ import annotations

from typing import Any

N_EXPERTS, TOP_K, VOCAB = 8, 2, 128
N_LAYERS = 2

# Settings of many families at once. A family's ModelArgs ignores the names that it does
# not have.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "sliding_window": 32,
    # The numbers of experts, under every name that some family gives them.
    "num_experts": N_EXPERTS,
    "n_routed_experts": N_EXPERTS,
    "num_local_experts": N_EXPERTS,
    "moe_num_experts": N_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_top_k": TOP_K,
    "moe_k": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_layer_freq": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # Latent attention and its indexer.
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 16,
    # Linear attention.
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "layer_group_size": 2,
    "group_norm_size": 2,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_proj_bias": False,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_expand": 2,
}
GRANITE = {
    "logits_scaling": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
BOTH_KINDS = ["sliding_attention", "full_attention"]
LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 4,
    "num_layers": N_LAYERS,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_OF_KINDS = dict.fromkeys(BOTH_KINDS, DEFAULT_ROPE)
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
KDA = {
    "full_attn_layers": [2],
    "kda_layers": [1],
    "head_dim": 32,
    "num_heads": 2,
    "short_conv_kernel_size": 4,
}

# The settings of single families. They replace the common ones of the same name.
# deepseek_v3, glm4_moe, minimax, qwen3_moe and qwen3_next have one that our own class
# does not support and mlx-lm's ignores. So even ``load`` runs these in mlx-lm's class.
FAMILIES: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afmoe": {"layer_types": BOTH_KINDS, "num_dense_layers": 1},
    "bailing_hybrid": {},
    "bailing_moe": {},
    "bailing_moe_linear": {},
    "bailing_moe_v3": {"head_dim": 32},
    "dbrx": {
        "d_model": 64,
        "n_layers": N_LAYERS,
        "n_heads": 4,
        "ffn_config": {
            "ffn_hidden_size": 32,
            "moe_num_experts": N_EXPERTS,
            "moe_top_k": TOP_K,
        },
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek": {},
    "deepseek_v2": {"topk_method": "greedy", "n_group": 1, "rope_scaling": YARN},
    "deepseek_v3": {"scoring_func": "softmax"},
    "deepseek_v32": {},
    "deepseek_v41": {
        "scoring_func": "sqrtsoftplus",
        "o_groups": 2,
        "o_lora_rank": 32,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
        "compress_ratios": [4, 4],
        "kv_source_layer_ids": [0],
        "index_source_layer_ids": [0, 1],
        "candidate_source_layer_id": 0,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
    },
    "dots1": {},
    "ernie4_5_moe": {"use_bias": False, "moe_num_shared_experts": 1},
    "exaone_moe": {"layer_types": BOTH_KINDS, "is_moe_layer": [False, True]},
    "gemma4": {
        "text_config": {
            "model_type": "gemma4_text",
            "enable_moe_block": True,
            "top_k_experts": TOP_K,
            "global_head_dim": 32,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "layer_types": BOTH_KINDS,
        }
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": TOP_K,
        "global_head_dim": 32,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "layer_types": BOTH_KINDS,
        "tie_word_embeddings": True,
    },
    "glm4_moe": {"rope_scaling": None, "scoring_func": "softmax"},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {"rope_parameters": DEFAULT_ROPE},
    "gpt_oss": {"layer_types": BOTH_KINDS},
    "granitemoe": GRANITE,
    "granitemoehybrid": {**GRANITE, **MAMBA, "layer_types": ["mamba", "attention"]},
    "hunyuan": {
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        **MAMBA,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k25": {"text_config": {"model_type": "deepseek_v3"}},
    "kimi_k3": {
        "text_config": {
            "model_type": "kimi_linear",
            "linear_attn_config": KDA,
            "attn_res_block_size": 2,
            "routed_expert_hidden_size": 32,
            "latent_moe_use_norm": True,
        }
    },
    "kimi_linear": {
        "linear_attn_config": KDA,
        "model_max_length": 512,
        "num_expert_group": 1,
    },
    "kimi_vl": {"text_config": {"model_type": "deepseek_v3"}},
    "laguna": {
        "layer_types": BOTH_KINDS,
        "mlp_layer_types": ["dense", "sparse"],
        "num_attention_heads_per_layer": [4, 4],
        "rope_parameters": ROPE_OF_KINDS,
    },
    "lfm2_moe": {
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention"],
    },
    "llama4": {
        "text_config": {
            "model_type": "llama4_text",
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 64,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 64,
            "attn_scale": 0.1,
            "attn_temperature_tuning": True,
            "floor_scale": 64,
            "rope_scaling": None,
        }
    },
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT,
    "mellum": {"layer_types": BOTH_KINDS, "rope_parameters": ROPE_OF_KINDS},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 32,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "minimax": {"rotary_dim": 8, "scoring_func": "softmax"},
    "minimax_m3_vl": {
        "text_config": {
            "model_type": "minimax_m3",
            "moe_layer_freq": [0, 1],
            "dense_intermediate_size": 64,
        }
    },
    "mistral4": {
        "rope_parameters": {
            **DEFAULT_ROPE,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "mixtral": {},
    "muse_spark": {
        "text_config": {
            "n_shared_experts": 0,
            "num_shared_experts": 0,
            "post_norm_eps": 1e-5,
            "rope_parameters": DEFAULT_ROPE,
            "layer_rope_theta": [10000.0, 0.0],
            "layer_types": BOTH_KINDS,
            "final_logit_softcapping": 30.0,
            "output_multiplier": 1.0,
            "moe_hidden_size": 32,
        }
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "num_hidden_layers": 3,
        "hybrid_override_pattern": "M*E",
    },
    "olmoe": {},
    "phimoe": {"rope_scaling": None},
    "phixtral": {
        "num_vocab": VOCAB,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": N_LAYERS,
        "rotary_dim": 8,
    },
    "qwen2_moe": {},
    "qwen3_5_moe": {"text_config": {"model_type": "qwen3_5_moe_text"}},
    "qwen3_moe": {"use_sliding_window": True},
    "qwen3_next": {"hidden_act": "gelu"},
    "qwen3_vl_moe": {"text_config": {"model_type": "qwen3_moe"}},
    "solar_open": {},
    "step3p5": {
        "num_attention_groups": 2,
        "moe_layers_enum": "1",
        "share_expert_dim": 32,
    },
}


def configuration(family: str) -> dict[str, Any]:
    """Return a family's tiny configuration, in the form of ``config.json``."""
    own = FAMILIES[family]
    config = {**COMMON, "model_type": family, **own}
    if "text_config" in own:
        text = {**COMMON, **own["text_config"]}
        config["text_config"] = text
    return config
