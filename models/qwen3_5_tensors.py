"""Tensors and values that a Qwen3.5-MoE configuration may have."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

from mlx_lm.models.qwen3_5 import TextModelArgs
from mlx_lm.models.rope_utils import initialize_rope

from moeflux_mlx import blocks
from moeflux_mlx.blocks import ROUTED
from moeflux_mlx.configuration import (
    Configuration,
    Expected,
    check_tensors,
    counts_of,
)
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.safetensors import TensorEntry

# Whole numbers of a configuration that such a model does not use.
UNUSED_COUNTS = ("intermediate_size", "decoder_sparse_step", "max_position_embeddings")


def check(config: Configuration, tensors: Mapping[str, TensorEntry]) -> str | None:
    """Hold a configuration against a checkpoint's tensors, before building anything.

    Returns:
        A tensor that no file has, if there is one.

    Raises:
        ModelError: a value is not usable, or a tensor has another shape.
    """
    config.check_counts(set(counts_of(TextModelArgs)) - set(UNUSED_COUNTS))
    if config.fields.get("head_dim") is not None:
        config.check_counts(["head_dim"])
    if not isinstance(rope := config.fields.get("rope_parameters"), dict | None):
        raise config.wrong("rope_parameters", "an object or null", rope)
    args = TextModelArgs.from_dict(copy.deepcopy(config.fields))
    if args.num_experts < 1:
        raise config.wrong("num_experts", "a positive whole number", args.num_experts)
    # Files from before conversion have the axes of convolutions the other way round.
    convs = [e for name, e in tensors.items() if name.endswith("conv1d.weight")]
    converted = all(e.shape and e.shape[-1] == 1 for e in convs)
    shapes = expected_tensors(args, converted=converted)
    missing = check_tensors(config, tensors, shapes, optional=(ROUTED,))
    if missing is None:
        # Not before sizes are known to be those of the files: positions take memory.
        check_numbers(config, args)
    return missing


def check_numbers(config: Configuration, args: TextModelArgs) -> None:
    """Refuse numbers that no weight tells of; ModelError names the key."""
    if args.max_position_embeddings is not None:
        config.check_number("max_position_embeddings", args.max_position_embeddings)
    config.check_number("rms_norm_eps", args.rms_norm_eps, zero=True)
    config.check_number("rope_theta", args.rope_theta)
    config.check_number("partial_rotary_factor", args.partial_rotary_factor, 1)
    if not 1 <= args.num_experts_per_tok <= args.num_experts:
        expected = f"from 1 to num_experts ({args.num_experts})"
        raise config.wrong("num_experts_per_tok", expected, args.num_experts_per_tok)
    for key, divisor in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        config.check_multiple(key, getattr(args, key), divisor, getattr(args, divisor))
    dims = int(args.head_dim * args.partial_rotary_factor)  # type: ignore[operator]
    try:
        rope = initialize_rope(
            dims,
            args.rope_theta,
            False,
            copy.deepcopy(args.rope_scaling),
            args.max_position_embeddings,
        )
        blocks.rotation(rope)
    except ModelError:
        raise
    except Exception as error:
        known = "those of a rope_type that mlx-lm has"
        told = f"{type(error).__name__}: {error}"
        raise config.wrong("rope_parameters", known, told) from error


def expected_tensors(args: TextModelArgs, *, converted: bool) -> Iterator[Expected]:
    """Yield the tensors of a text model with their shapes as they are unpacked."""
    dim, vocab = args.hidden_size, args.vocab_size
    yield "embed_tokens.weight", (vocab, dim)
    yield "norm.weight", (dim,)
    if not args.tie_word_embeddings:
        yield "lm_head.weight", (vocab, dim)
    heads = args.num_attention_heads * args.head_dim  # type: ignore[operator]
    kv_heads = args.num_key_value_heads * args.head_dim  # type: ignore[operator]
    attention = {
        "q_proj.weight": (2 * heads, dim),
        "k_proj.weight": (kv_heads, dim),
        "v_proj.weight": (kv_heads, dim),
        "o_proj.weight": (dim, heads),
        "q_norm.weight": (args.head_dim,),
        "k_norm.weight": (args.head_dim,),
    }
    n_values = args.linear_num_value_heads
    values = n_values * args.linear_value_head_dim
    conv = 2 * args.linear_num_key_heads * args.linear_key_head_dim + values
    width = args.linear_conv_kernel_dim
    delta = {
        "in_proj_qkv.weight": (conv, dim),
        "in_proj_z.weight": (values, dim),
        "in_proj_b.weight": (n_values, dim),
        "in_proj_a.weight": (n_values, dim),
        "conv1d.weight": (conv, width, 1) if converted else (conv, 1, width),
        "dt_bias": (n_values,),
        "A_log": (n_values,),
        "norm.weight": (args.linear_value_head_dim,),
        "out_proj.weight": (dim, values),
    }
    n_experts, inner = args.num_experts, args.moe_intermediate_size
    shared = args.shared_expert_intermediate_size
    moe = {
        "gate.weight": (n_experts, dim),
        "shared_expert.gate_proj.weight": (shared, dim),
        "shared_expert.up_proj.weight": (shared, dim),
        "shared_expert.down_proj.weight": (dim, shared),
        "shared_expert_gate.weight": (1, dim),
        f"{ROUTED}.gate_proj.weight": (n_experts, inner, dim),
        f"{ROUTED}.up_proj.weight": (n_experts, inner, dim),
        f"{ROUTED}.down_proj.weight": (n_experts, dim, inner),
    }
    for layer in range(args.num_hidden_layers):
        yield f"layers.{layer}.input_layernorm.weight", (dim,)
        yield f"layers.{layer}.post_attention_layernorm.weight", (dim,)
        is_full = (layer + 1) % args.full_attention_interval == 0
        mixer = ("self_attn", attention) if is_full else ("linear_attn", delta)
        for block, shapes in (mixer, ("mlp", moe)):
            for name, shape in shapes.items():
                yield f"layers.{layer}.{block}.{name}", shape  # type: ignore[misc]
