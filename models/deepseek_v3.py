"""DeepSeek-V3, R1 and Kimi-K2: latent attention, experts chosen by sigmoids in groups.

A drop-in for ``mlx_lm.models.deepseek_v3``: constructor, weight names, caches and
sanitising are mlx-lm's own; the forward pass is a graph of Ops per layer. As in
transformers, experts outside the best groups are never chosen. mlx-lm gives them the
score 0 instead; its class remains available with ``native=False``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_lm.models import deepseek_v3 as stock
from mlx_lm.models.rope_utils import initialize_rope

from moeflux_mlx.engine import noaux
from moeflux_mlx.engine.checks import (
    check_numbers,
    check_rope,
    lacks_of_rope,
    lacks_of_yarn,
    missing_tensor,
    read_arguments,
)
from moeflux_mlx.engine.layer import LayerForm
from moeflux_mlx.engine.mixers import LatentAttention
from moeflux_mlx.engine.native import GraphText, NativeModel
from moeflux_mlx.experts.files.configuration import Configuration
from moeflux_mlx.experts.files.safetensors import TensorEntry

ModelArgs = stock.ModelArgs
# Names where this class follows transformers but mlx-lm's does not.
departs = noaux.departs
# Whole numbers that may be 0 or null, or that this class does not use.
OTHER_COUNTS = {"first_k_dense_replace", "q_lora_rank", "num_key_value_heads"}


def lacks(config: Mapping[str, Any]) -> str | None:
    """Return a setting of a configuration that the class does not support, if any."""
    for key, value in (("moe_layer_freq", 1), ("rope_interleave", True)):
        if config.get(key, value) != value:
            return key
    rope = lacks_of_yarn(config) or lacks_of_rope(config, ["rope_parameters"])
    return rope or noaux.lacks(config)


def layers(args: ModelArgs, *, joint_kv: bool = False) -> Iterator[LayerForm]:
    """Return the form of each layer.

    Args:
        joint_kv: as in ``LatentAttention``.
    """
    attention = LatentAttention(
        args.num_attention_heads,
        args.kv_lora_rank,
        args.qk_nope_head_dim,
        args.qk_rope_head_dim,
        args.v_head_dim,
        args.q_lora_rank,
        args.attention_bias,
        joint_kv,
    )
    return noaux.forms(args, attention)


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
    config.check_counts(["n_routed_experts"])
    args = read_arguments(
        config, ModelArgs, unused=OTHER_COUNTS, optional=["q_lora_rank"]
    )
    noaux.check(config, args)
    check_numbers(config, args, "n_routed_experts", grouped=False)
    joint_kv = any(name.endswith("kv_b_proj.weight") for name in tensors)
    forms = layers(args, joint_kv=joint_kv)
    if missing := missing_tensor(config, tensors, args, forms):
        return missing
    dims, theta, longest = args.qk_rope_head_dim, args.rope_theta, 4096
    scaling = copy.deepcopy(args.rope_scaling)
    check_rope(
        config,
        "rope_scaling",
        lambda: initialize_rope(dims, theta, True, scaling, longest),
        pairs=True,
    )
    return None
