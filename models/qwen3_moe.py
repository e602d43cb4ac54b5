"""Qwen3-MoE: full attention in every layer, routed experts in all of them or some.

A drop-in for ``mlx_lm.models.qwen3_moe``: constructor, weight names, caches and
sanitising are mlx-lm's own; the forward pass is a graph of Ops per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.models import qwen3_moe as stock

from moeflux_mlx.engine.blocks import DenseMlp, Moe
from moeflux_mlx.engine.checks import (
    check_numbers,
    check_rope,
    lacks_of_rope,
    missing_tensor,
    read_arguments,
)
from moeflux_mlx.engine.layer import LayerForm
from moeflux_mlx.engine.mixers import Attention
from moeflux_mlx.engine.native import GraphText, NativeModel
from moeflux_mlx.experts.files.configuration import Configuration
from moeflux_mlx.experts.files.safetensors import TensorEntry

ModelArgs = stock.ModelArgs


def lacks(config: Mapping[str, Any]) -> str | None:
    """Return a setting of a configuration that the class does not support, if any."""
    if (key := lacks_of_rope(config, ["rope_scaling"])) is not None:
        return key
    if config.get("hidden_act", "silu") != "silu":
        return "hidden_act"
    if config.get("num_experts") == 0:
        return "no experts"
    keys = ("attention_bias", "use_sliding_window")
    return next((key for key in keys if config.get(key)), None)


def layers(args: ModelArgs) -> Iterator[LayerForm]:
    """Yield the form of each layer."""
    attention = Attention(
        args.num_attention_heads, args.num_key_value_heads, args.head_dim
    )
    moe = Moe(
        args.num_experts,
        args.num_experts_per_tok,
        args.moe_intermediate_size,
        normalised=args.norm_topk_prob,
    )
    dense = DenseMlp(args.intermediate_size)
    routed, other = (
        LayerForm(attention, mlp, args.hidden_size, args.rms_norm_eps)
        for mlp in (moe, dense)
    )
    for index in range(args.num_hidden_layers):
        is_dense = index in args.mlp_only_layers
        is_dense = is_dense or (index + 1) % args.decoder_sparse_step != 0
        yield other if is_dense else routed


class Model(NativeModel, GraphText, stock.Model):
    """A model from tokens ``[B, T]`` to logits ``[B, T, V]`` that runs on graphs."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.run_on_graphs(self, layers(args))


def check(config: Configuration, tensors: Mapping[str, TensorEntry]) -> str | None:
    """Check a configuration against a checkpoint's tensors before anything is built.

    Returns:
        A tensor that no file has, if there is one.

    Raises:
        ModelError: a value is invalid, or a tensor has another shape.
    """
    args = read_arguments(config, ModelArgs, indices=["mlp_only_layers"])
    if missing := missing_tensor(config, tensors, args, layers(args)):
        return missing
    check_numbers(config, args)
    width, theta = args.head_dim, args.rope_theta
    check_rope(config, "rope_theta", lambda: nn.RoPE(width, base=theta))
    return None
