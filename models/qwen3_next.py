"""Qwen3-Next: gated DeltaNet and gated full attention layers, routed experts or none.

A drop-in for ``mlx_lm.models.qwen3_next``: constructor, weight names, caches and
sanitising are mlx-lm's own; the forward pass is a graph of Ops per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models import qwen3_next as stock

from moeflux_mlx.engine.blocks import DenseMlp, Moe
from moeflux_mlx.engine.checks import (
    check_numbers,
    check_partial_rope,
    check_shared_heads,
    missing_tensor,
    read_arguments,
)
from moeflux_mlx.engine.layer import LayerForm
from moeflux_mlx.engine.mixers import Attention, GatedDeltaNet
from moeflux_mlx.engine.native import GraphText, NativeModel
from moeflux_mlx.engine.published import converted, has_taps_last
from moeflux_mlx.experts.files.configuration import Configuration
from moeflux_mlx.experts.files.safetensors import TensorEntry

ModelArgs = stock.ModelArgs


def lacks(config: Mapping[str, Any]) -> str | None:
    """Return a setting of a configuration that the class does not support, if any."""
    if config.get("hidden_act", "silu") != "silu":
        return "hidden_act"
    return "no experts" if config.get("num_experts") == 0 else None


def layers(args: ModelArgs, *, taps_last: bool = False) -> Iterator[LayerForm]:
    """Yield the form of each layer.

    Args:
        taps_last: as in ``GatedDeltaNet``.
    """
    delta = GatedDeltaNet(
        args.linear_num_key_heads,
        args.linear_num_value_heads,
        args.linear_key_head_dim,
        args.linear_value_head_dim,
        args.linear_conv_kernel_dim,
        taps_last,
        by_key=True,
    )
    heads = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    biases = ("q", "k", "v", "o") if args.attention_bias else ()
    attention = Attention(*heads, gated=True, biases=biases)
    moe = Moe(
        args.num_experts,
        args.num_experts_per_tok,
        args.moe_intermediate_size,
        normalised=args.norm_topk_prob,
        shared_dim=args.shared_expert_intermediate_size,
    )
    dense = DenseMlp(args.intermediate_size)
    forms = {
        (mixer, mlp): LayerForm(mixer, mlp, args.hidden_size, args.rms_norm_eps)
        for mixer in (delta, attention)
        for mlp in (moe, dense)
    }
    for index in range(args.num_hidden_layers):
        is_dense = index in args.mlp_only_layers
        is_dense = is_dense or (index + 1) % args.decoder_sparse_step != 0
        is_linear = (index + 1) % args.full_attention_interval != 0
        yield forms[delta if is_linear else attention, dense if is_dense else moe]


class Model(NativeModel, GraphText, stock.Model):
    """A model from tokens ``[B, T]`` to logits ``[B, T, V]`` that runs on graphs."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.run_on_graphs(self, layers(args))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rename weights as mlx-lm does, with experts stacked or streamed."""
        unused = ["lm_head.weight"] if self.args.tie_word_embeddings else []
        return converted(super().sanitize(weights), unused)


def check(config: Configuration, tensors: Mapping[str, TensorEntry]) -> str | None:
    """Check a configuration against a checkpoint's tensors before anything is built.

    Returns:
        A tensor that no file has, if there is one.

    Raises:
        ModelError: a value is invalid, or a tensor has another shape.
    """
    args = read_arguments(config, ModelArgs, indices=["mlp_only_layers"])
    forms = layers(args, taps_last=has_taps_last(tensors))
    if missing := missing_tensor(config, tensors, args, forms):
        return missing
    check_numbers(config, args)
    heads = "linear_num_value_heads", "linear_num_key_heads"
    check_shared_heads(config, args, *heads)
    check_partial_rope(config, args, "rope_scaling")
    return None
