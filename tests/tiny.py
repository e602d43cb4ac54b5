"""Small random models in mlx-lm's own checkpoint format, for tests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
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

# Settings of every family; those of single families follow.
SIZES = dict(
    hidden_size=64,
    num_attention_heads=4,
    num_experts_per_tok=2,
    vocab_size=320,
    max_position_embeddings=4096,
)
HEADS = dict(num_key_value_heads=2, head_dim=32)
LINEAR_HEADS = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
)
# Experts that a sigmoid's score chooses within groups, beside shared ones.
GROUPED_EXPERTS = dict(
    num_hidden_layers=3,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=8,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    rope_theta=10000.0,
)

TEXT_CONFIG = dict(
    SIZES | HEADS | LINEAR_HEADS,
    model_type="qwen3_5_moe_text",
    num_hidden_layers=4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    full_attention_interval=4,
    num_experts=8,
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
    SIZES | HEADS,
    model_type="qwen3_moe",
    num_hidden_layers=3,
    intermediate_size=96,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    num_experts=8,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    moe_intermediate_size=32,
    norm_topk_prob=True,
)

QWEN3_NEXT_CONFIG = dict(
    QWEN3_MOE_CONFIG | LINEAR_HEADS,
    model_type="qwen3_next",
    num_hidden_layers=4,
    partial_rotary_factor=0.25,
    full_attention_interval=2,
    shared_expert_intermediate_size=64,
)

GPT_OSS_CONFIG = dict(
    SIZES | HEADS,
    model_type="gpt_oss",
    num_hidden_layers=4,
    intermediate_size=64,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"] * 2,
    rms_norm_eps=1e-5,
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
)

GLM4_MOE_CONFIG = dict(
    SIZES | HEADS | GROUPED_EXPERTS,
    model_type="glm4_moe",
    partial_rotary_factor=0.5,
    attention_bias=True,
    use_qk_norm=True,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    tie_word_embeddings=False,
)

DEEPSEEK_V3_CONFIG = dict(
    SIZES | GROUPED_EXPERTS,
    model_type="deepseek_v3",
    num_key_value_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=24,
    attention_bias=False,
    moe_layer_freq=1,
    rms_norm_eps=1e-6,
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
    SIZES | HEADS,
    model_type="minimax",
    num_hidden_layers=2,
    intermediate_size=32,
    shared_intermediate_size=0,
    rotary_dim=16,
    use_qk_norm=True,
    num_local_experts=8,
    scoring_func="sigmoid",
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)


# How a projection of a layer's experts is stored; a type is dense.
ExpertForms = Mapping[tuple[int, str], Quantization | mx.Dtype]

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


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


def built(
    family: ModuleType, config: dict, seed: int, dtype: mx.Dtype = mx.float32
) -> nn.Module:
    """Build mlx-lm's own model with seeded random weights."""
    mx.random.seed(seed)
    return randomised(family.Model(family.ModelArgs.from_dict(config)), dtype)


def stock_model(seed: int = 0, dtype: mx.Dtype = mx.float32, **overrides) -> nn.Module:
    """Build mlx-lm's own qwen3_5_moe with random weights; overrides are config."""
    return built(qwen3_5_moe, qwen3_5_moe_config(overrides), seed, dtype)


def qwen3_5_moe_config(overrides: Mapping[str, object]) -> dict:
    """Return a configuration; the text model's is nested in it."""
    return {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "text_config": {**TEXT_CONFIG, **overrides},
    }


def make_of(
    family: ModuleType,
    configure: Callable[[Mapping[str, object]], dict],
    path: Path,
    *,
    seed: int = 0,
    bits: int | None = 4,
    group_size: int = 32,
    dtype: mx.Dtype = mx.float32,
    experts: Quantization | ExpertForms | None = None,
    **overrides,
) -> Path:
    """Write a random checkpoint of a family of mlx-lm; overrides are config.

    All but ``experts`` is dense when ``bits`` is None.

    Args:
        configure: returns the configuration that overrides make.
        experts: how the routed experts are stored, if not like everything else.
    """
    config = configure(overrides)
    model = built(family, config, seed, dtype)
    if bits is not None or experts is not None:
        predicate = forms_of_weights(model, bits, experts)
        model, config = quantize_model(
            model, config, group_size, bits or 4, quant_predicate=predicate
        )
    path.mkdir(parents=True, exist_ok=True)
    save_model(path, model)
    save_config({**config, "eos_token_id": 0}, path / "config.json")
    write_tokenizer(path, {**SIZES, **overrides}["vocab_size"])
    return path


def maker(family: ModuleType, defaults: Mapping[str, object]) -> Callable[..., Path]:
    """Return a function that writes checkpoints with this flat configuration."""
    return partial(make_of, family, lambda overrides: {**defaults, **overrides})


make_checkpoint = partial(make_of, qwen3_5_moe, qwen3_5_moe_config)
make_qwen3_moe = maker(qwen3_moe, QWEN3_MOE_CONFIG)
make_qwen3_next = maker(qwen3_next, QWEN3_NEXT_CONFIG)
make_glm4_moe = maker(glm4_moe, GLM4_MOE_CONFIG)
make_deepseek_v3 = maker(deepseek_v3, DEEPSEEK_V3_CONFIG)
make_minimax = maker(minimax, MINIMAX_CONFIG)
make_gpt_oss = maker(gpt_oss, GPT_OSS_CONFIG)


def forms_of_weights(
    model: nn.Module, bits: int | None, experts: Quantization | ExpertForms | None
) -> Callable[[str, nn.Module], bool | dict]:
    """Return a predicate for ``quantize_model``; it casts the matrices left dense."""
    own = getattr(model, "quant_predicate", None)

    def predicate(path: str, module: nn.Module) -> bool | dict:
        found = re.search(r"layers\.(\d+)\..*(?:switch_mlp|experts)\.(\w+)", path)
        if experts is None or found is None:
            return bits is not None and (own is None or own(path, module))
        one_form = isinstance(experts, Quantization)
        form = experts if one_form else experts[int(found[1]), found[2]]
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


def halved(path: Path) -> Path:
    """Store a checkpoint's float32 tensors in bfloat16, as published ones are."""
    for file in map(str, path.glob("*.safetensors")):
        tensors = mx.load(file)
        mx.eval(tensors)
        short = {
            name: x.astype(mx.bfloat16) if x.dtype == mx.float32 else x
            for name, x in tensors.items()
        }
        mx.save_safetensors(file, short, {"format": "mlx"})
    return path
