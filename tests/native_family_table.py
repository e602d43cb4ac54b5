"""The families with a class of our own, and small models that its tests try."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tiny import (
    DEEPSEEK_V3_CONFIG,
    make_checkpoint,
    make_deepseek_v3,
    make_glm4_moe,
    make_gpt_oss,
    make_minimax,
    make_qwen3_moe,
    make_qwen3_next,
)

from moeflux_mlx.experts.weights import Quantization

MXFP4 = Quantization(4, 32, "mxfp4")
SLIDING, FULL = "sliding_attention", "full_attention"
YARN = DEEPSEEK_V3_CONFIG["rope_scaling"]

# Odd numbers of experts and heads, one expert or ten, layers without experts, widths
# that fit no kernel.
QWEN3_MOE = {
    "e8-k2": {},
    "e5-k1-heads3-tied": dict(
        num_experts=5,
        num_experts_per_tok=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "e13-k10-dense-layers": dict(
        num_experts=13,
        num_experts_per_tok=10,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_hidden_layers=6,
        mlp_only_layers=[0, 3, 4],
    ),
    "e7-k3-every2-unnormalised-floats": dict(
        hidden_size=72,
        num_experts=7,
        num_experts_per_tok=3,
        head_dim=20,
        moe_intermediate_size=36,
        intermediate_size=52,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        norm_topk_prob=False,
    ),
}

# Odd numbers of experts and heads, layers without experts, widths that fit no kernel.
QWEN3_NEXT = {
    "e7-k3-dense-layers": dict(
        num_experts=7,
        num_experts_per_tok=3,
        linear_num_value_heads=6,
        mlp_only_layers=[1],
        tie_word_embeddings=True,
    ),
    "e5-k1-every2-floats": dict(
        hidden_size=72,
        num_experts=5,
        num_experts_per_tok=1,
        head_dim=20,
        num_attention_heads=3,
        num_key_value_heads=1,
        partial_rotary_factor=0.5,
        full_attention_interval=3,
        num_hidden_layers=3,
        decoder_sparse_step=2,
        linear_num_value_heads=9,
        linear_num_key_heads=3,
        linear_key_head_dim=20,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=3,
        norm_topk_prob=False,
        attention_bias=True,
    ),
}

# Groups or none, one expert or several, odd numbers of experts and heads, with norms
# and biases or without, layers without experts, widths that fit no kernel.
GLM4_MOE = {
    "e9-k3-groups-heads3": dict(
        n_routed_experts=9,
        num_experts_per_tok=3,
        n_group=3,
        topk_group=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        use_qk_norm=False,
        first_k_dense_replace=0,
        num_hidden_layers=2,
    ),
    "e8-k2": {},
    "e13-k1-raw-floats": dict(
        hidden_size=72,
        n_routed_experts=13,
        num_experts_per_tok=1,
        norm_topk_prob=False,
        n_shared_experts=2,
        moe_intermediate_size=36,
        head_dim=20,
        partial_rotary_factor=0.4,
        attention_bias=False,
        first_k_dense_replace=2,
        num_hidden_layers=4,
    ),
}

# Odd numbers of experts and heads, one expert or several, norms or none, as many heads
# of keys as of queries, widths that fit no kernel.
MINIMAX = {
    "e9-k3-heads3-tied": dict(
        num_local_experts=9,
        num_experts_per_tok=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "e8-k2": {},
    "e13-k1-raw-floats": dict(
        hidden_size=72,
        num_local_experts=13,
        num_experts_per_tok=1,
        intermediate_size=36,
        head_dim=None,
        rotary_dim=6,
        use_qk_norm=False,
        num_hidden_layers=3,
    ),
}

# YaRN with both mscales or none, queries from a narrow row or from the layer's own,
# groups or none, odd numbers of experts and heads, widths that fit no kernel.
DEEPSEEK_V3 = {
    "e9-k3-groups-heads3-no-rank": dict(
        n_routed_experts=9,
        num_experts_per_tok=3,
        n_group=3,
        topk_group=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=None,
        first_k_dense_replace=0,
        num_hidden_layers=2,
        rope_scaling={**YARN, "mscale": 1.3},
    ),
    "e8-k2": {},
    "e13-k1-biases-floats": dict(
        hidden_size=72,
        n_routed_experts=13,
        num_experts_per_tok=1,
        norm_topk_prob=False,
        n_shared_experts=2,
        moe_intermediate_size=36,
        num_attention_heads=5,
        num_key_value_heads=5,
        q_lora_rank=20,
        kv_lora_rank=28,
        qk_nope_head_dim=12,
        qk_rope_head_dim=10,
        v_head_dim=14,
        attention_bias=True,
        rope_scaling=None,
    ),
}

# Odd numbers of experts and heads, windows shorter than a prompt, each kind of layer
# first, widths that fit no kernel.
GPT_OSS = {
    "e7-k3": dict(
        num_local_experts=7,
        num_experts_per_tok=3,
        num_hidden_layers=3,
        layer_types=[SLIDING, FULL, SLIDING],
    ),
    "e6-k2-mxfp4": dict(num_local_experts=6, num_hidden_layers=2, layer_types=None),
    "e5-k1-full-first-floats": dict(
        hidden_size=72,
        intermediate_size=36,
        num_local_experts=5,
        num_experts_per_tok=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=20,
        sliding_window=5,
        num_hidden_layers=3,
        layer_types=[FULL, SLIDING, SLIDING],
    ),
}

# Odd expert counts, top-k 1 to 10, one to three full attention layers, tied or not.
QWEN3_5_MOE = {
    "e8-k2-every4": {},
    "e5-k1-every3-tied": dict(
        num_experts=5,
        num_experts_per_tok=1,
        full_attention_interval=3,
        tie_word_embeddings=True,
    ),
    "e13-k10-every2": dict(
        num_experts=13, num_experts_per_tok=10, full_attention_interval=2
    ),
    "e7-k3-every2-floats": dict(
        num_experts=7,
        num_experts_per_tok=3,
        full_attention_interval=2,
        num_hidden_layers=6,
    ),
    "e33-k4-heads-unnormalised": dict(
        num_experts=33,
        num_experts_per_tok=4,
        full_attention_interval=2,
        linear_num_value_heads=6,
        linear_num_key_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=32,
        norm_topk_prob=False,
        num_hidden_layers=3,
    ),
}


class Family(NamedTuple):
    """A function that writes a family's checkpoints, and the configurations to try.

    A test of seconds tries the first of them, and all of them in slow runs.

    Args:
        tolerance: how far logits may be from mlx-lm's, as a share of their size.
    """

    make: Callable[..., Path]
    configs: Mapping[str, Mapping[str, Any]]
    tolerance: float = 1e-5


FAMILIES = {
    "qwen3_moe": Family(make_qwen3_moe, QWEN3_MOE),
    # Three of four layers add up states in another order than mlx-lm's.
    "qwen3_5_moe": Family(make_checkpoint, QWEN3_5_MOE, tolerance=2e-5),
    "qwen3_next": Family(make_qwen3_next, QWEN3_NEXT),
    "glm4_moe": Family(make_glm4_moe, GLM4_MOE),
    "minimax": Family(make_minimax, MINIMAX),
    "deepseek_v3": Family(make_deepseek_v3, DEEPSEEK_V3),
    "gpt_oss": Family(make_gpt_oss, GPT_OSS),
}


def write(path: Path, family: str, config: str) -> Path:
    """Write a checkpoint, of which a configuration's name tells how it is stored."""
    make, configs, _ = FAMILIES[family]
    return make(
        path,
        seed=list(configs).index(config),
        bits=None if config.endswith("floats") else 4,
        experts=MXFP4 if config.endswith("mxfp4") else None,
        **configs[config],
    )
