"""GLM-4.5, 4.6 and 4.7: full attention, experts chosen by sigmoids, a shared expert.

A drop-in for ``mlx_lm.models.glm4_moe``: constructor, weight names, caches and
sanitising are mlx-lm's own; the forward pass is a graph of Ops per layer. As in
transformers, experts outside the best groups are never chosen. mlx-lm gives them the
score 0 instead; its class remains available with ``native=False``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.models import glm4_moe as stock

from moeflux_mlx.engine import noaux
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
# Names where this class follows transformers but mlx-lm's does not.
departs = noaux.departs


def lacks(config: Mapping[str, Any]) -> str | None:
    """Return a setting of a configuration that the class does not support, if any."""
    return lacks_of_rope(config) or noaux.lacks(config)


def layers(args: ModelArgs) -> Iterator[LayerForm]:
    """Return the form of each layer."""
    attention = Attention(
        args.num_attention_heads,
        args.num_key_value_heads,
        args.head_dim,
        norms=("q", "k") if args.use_qk_norm else (),
        biases=("q", "k", "v") if args.attention_bias else (),
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
    unused = ["first_k_dense_replace", "n_shared_experts"]
    args = read_arguments(config, ModelArgs, unused=unused)
    noaux.check(config, args)
    check_numbers(config, args, "n_routed_experts")
    if missing := missing_tensor(config, tensors, args, layers(args)):
        return missing
    config.check_number("partial_rotary_factor", args.partial_rotary_factor, 1)
    width, theta = int(args.head_dim * args.partial_rotary_factor), args.rope_theta
    check_rope(config, "rope_theta", lambda: nn.RoPE(width, base=theta))
    return None
