"""Small random models in mlx-lm's own checkpoint format, for tests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import (
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    minimax,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
)
from mlx_lm.utils import quantize_model, save_config, save_model

from moeflux_mlx.experts.weights import Quantization

TEXT_CONFIG = dict(
    model_type="qwen3_5_moe_text",
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    vocab_size=320,
    max_position_embeddings=4096,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
    tie_word_embeddings=False,
    full_attention_interval=4,
    num_experts=8,
    num_experts_per_tok=2,
    shared_expert_intermediate_size=64,
    moe_intermediate_size=64,
    norm_topk_prob=True,
    rope_parameters={
        "type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
)

QWEN3_MOE_CONFIG = dict(
    model_type="qwen3_moe",
    hidden_size=64,
    num_hidden_layers=3,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    vocab_size=320,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    num_experts=8,
    num_experts_per_tok=2,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    moe_intermediate_size=32,
    norm_topk_prob=True,
)

QWEN3_NEXT_CONFIG = dict(
    QWEN3_MOE_CONFIG,
    model_type="qwen3_next",
    num_hidden_layers=4,
    partial_rotary_factor=0.25,
    full_attention_interval=2,
    shared_expert_intermediate_size=64,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
)

GPT_OSS_CONFIG = dict(
    model_type="gpt_oss",
    hidden_size=64,
    num_hidden_layers=4,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"] * 2,
    rms_norm_eps=1e-5,
    vocab_size=320,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    rope_scaling=dict(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=64,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
    ),
    num_local_experts=8,
    num_experts_per_tok=2,
)


GLM4_MOE_CONFIG = dict(
    model_type="glm4_moe",
    hidden_size=64,
    num_hidden_layers=3,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    partial_rotary_factor=0.5,
    attention_bias=True,
    use_qk_norm=True,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    rms_norm_eps=1e-5,
    vocab_size=320,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
)


DEEPSEEK_V3_CONFIG = dict(
    model_type="deepseek_v3",
    hidden_size=64,
    num_hidden_layers=3,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=24,
    attention_bias=False,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    rms_norm_eps=1e-6,
    vocab_size=320,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    rope_scaling={
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
)


MINIMAX_CONFIG = dict(
    model_type="minimax",
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=32,
    shared_intermediate_size=0,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rotary_dim=16,
    use_qk_norm=True,
    num_local_experts=8,
    num_experts_per_tok=2,
    scoring_func="sigmoid",
    rms_norm_eps=1e-6,
    vocab_size=320,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)


# How a projection of a layer's experts is stored; a type is dense.
ExpertForms = Mapping[tuple[int, str], Quantization | mx.Dtype]

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def stock_model(seed: int = 0, dtype: mx.Dtype = mx.float32, **overrides) -> nn.Module:
    """Build mlx-lm's own model with seeded random weights; overrides are config."""
    mx.random.seed(seed)
    config = {
        "model_type": "qwen3_5_moe",
        "text_config": {**TEXT_CONFIG, **overrides},
    }
    model = qwen3_5_moe.Model(qwen3_5_moe.ModelArgs.from_dict(config))
    return randomised(model, dtype)


def randomised(model: nn.Module, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """Give a model seeded random weights."""
    # Random normals make routing and logits far from ties; zeros would not.
    model.update(
        tree_map(
            lambda p: (
                p + 0.05 * mx.random.normal(p.shape) if p.ndim < 3 else p * 1.5
            ).astype(dtype),
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    return model.eval()


def make_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    bits: int | None = 4,
    group_size: int = 32,
    dtype: mx.Dtype = mx.float32,
    experts: ExpertForms | None = None,
    **overrides,
) -> Path:
    """Write a random quantised (dense when ``bits`` is None) checkpoint to ``path``.

    ``experts`` says how the routed experts are stored, if not like everything else.
    """
    model = stock_model(seed, dtype, **overrides)
    config = {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "text_config": {**TEXT_CONFIG, **overrides},
        "eos_token_id": 0,
    }
    if bits is not None:
        predicate = model.quant_predicate
        if experts is not None:
            predicate = forms_of_experts(model, experts)
        model, config = quantize_model(
            model, config, group_size, bits, quant_predicate=predicate
        )
    path.mkdir(parents=True, exist_ok=True)
    save_model(path, model)
    save_config(config, path / "config.json")
    write_tokenizer(path, overrides.get("vocab_size", TEXT_CONFIG["vocab_size"]))
    return path


def make_qwen3_moe(path: Path, **options) -> Path:
    """Write a random checkpoint of mlx-lm's qwen3_moe, dense when ``bits`` is None."""
    return make_of(qwen3_moe, QWEN3_MOE_CONFIG, path, **options)


def make_glm4_moe(path: Path, **options) -> Path:
    """Write a random checkpoint of mlx-lm's glm4_moe, dense when ``bits`` is None."""
    return make_of(glm4_moe, GLM4_MOE_CONFIG, path, **options)


def make_deepseek_v3(path: Path, **options) -> Path:
    """Write a random checkpoint of mlx-lm's deepseek_v3; dense if ``bits`` is None."""
    return make_of(deepseek_v3, DEEPSEEK_V3_CONFIG, path, **options)


def make_minimax(path: Path, **options) -> Path:
    """Write a random checkpoint of mlx-lm's minimax, dense when ``bits`` is None."""
    return make_of(minimax, MINIMAX_CONFIG, path, **options)


def make_qwen3_next(path: Path, **options) -> Path:
    """Write a random checkpoint of mlx-lm's qwen3_next, dense when ``bits`` is None."""
    return make_of(qwen3_next, QWEN3_NEXT_CONFIG, path, **options)


def make_gpt_oss(path: Path, **options) -> Path:
    """Write a random checkpoint of mlx-lm's gpt_oss, dense when ``bits`` is None."""
    return make_of(gpt_oss, GPT_OSS_CONFIG, path, **options)


def make_of(
    family: ModuleType,
    defaults: Mapping[str, object],
    path: Path,
    *,
    seed: int = 0,
    bits: int | None = 4,
    group_size: int = 32,
    experts: Quantization | None = None,
    **overrides,
) -> Path:
    """Write a random checkpoint of a family of mlx-lm; overrides are config.

    ``experts`` says how all routed experts are stored, if not like everything else.
    """
    mx.random.seed(seed)
    config = {**defaults, **overrides}
    model = randomised(family.Model(family.ModelArgs.from_dict(config)))
    own = getattr(model, "quant_predicate", None)

    def predicate(path: str, module: nn.Module) -> bool | dict:
        if experts is not None and ".experts." in path:
            return dict(vars(experts))
        return bits is not None and (own is None or own(path, module))

    if bits is not None or experts is not None:
        model, config = quantize_model(
            model, config, group_size, bits or 4, quant_predicate=predicate
        )
    path.mkdir(parents=True, exist_ok=True)
    save_model(path, model)
    save_config({**config, "eos_token_id": 0}, path / "config.json")
    write_tokenizer(path, config["vocab_size"])
    return path


def forms_of_experts(model: nn.Module, experts: ExpertForms):
    """Return what tells ``quantize_model`` of each matrix; casts those left dense."""

    def predicate(path: str, module: nn.Module) -> bool | dict:
        found = re.search(r"layers\.(\d+)\..*switch_mlp\.(\w+)", path)
        if found is None:
            return model.quant_predicate(path, module)
        form = experts[int(found[1]), found[2]]
        if isinstance(form, Quantization):
            return dict(vars(form))
        module.weight = module.weight.astype(form)
        return False

    return predicate


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer of at most ``vocab_size`` entries, no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0}
    for letter in alphabet[: vocab_size - 1]:
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
