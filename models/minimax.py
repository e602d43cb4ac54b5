"""MiniMax-M2: full attention with norms over all heads, experts chosen by sigmoids.

A drop-in for ``mlx_lm.models.minimax``: constructor, weight names, caches and
sanitising are mlx-lm's own; the forward pass is a graph of Ops per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import minimax as stock

from moeflux_mlx.engine.blocks import Moe, Noaux
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
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.configuration import Configuration
from moeflux_mlx.experts.files.safetensors import TensorEntry

ModelArgs = stock.ModelArgs
BLOCK, CORRECTION = "block_sparse_moe", "e_score_correction_bias"
# The only supported values of entries that neither class reads.
KNOWN = {"hidden_act": "silu", "scoring_func": "sigmoid", "sliding_window": None}
KNOWN |= {"qk_norm_type": "per_layer"}


def lacks(config: Mapping[str, Any]) -> str | None:
    """Return a setting of a configuration that the class does not support, if any."""
    stored = config.get("quantization_config")
    if "quantization" not in config and isinstance(stored, dict):
        return f"quantization_config of {stored.get('quant_method')}"
    kinds = config.get("attn_type_list")
    if isinstance(kinds, list) and kinds != [1] * len(kinds):
        return "attn_type_list with other than full attention"
    for key, value in KNOWN.items():
        if config.get(key, value) != value:
            return key
    return lacks_of_rope(config)


def layers(args: ModelArgs) -> Iterator[LayerForm]:
    """Yield the form of each layer."""
    heads = args.num_attention_heads, args.num_key_value_heads, _head_dim(args)
    norms = ("q", "k") if args.use_qk_norm else ()
    attention = Attention(*heads, norms=norms, row_norms=True)
    sizes = args.num_local_experts, args.num_experts_per_tok, args.intermediate_size
    moe = Moe(*sizes, normalised=True, noaux=Noaux(bias=CORRECTION), path=BLOCK)
    form = LayerForm(attention, moe, args.hidden_size, args.rms_norm_eps)
    yield from [form] * args.num_hidden_layers


def _head_dim(args: ModelArgs) -> int:
    return args.head_dim or args.hidden_size // args.num_attention_heads


class Model(NativeModel, GraphText, stock.Model):  # type: ignore[misc]
    """A model from tokens ``[B, T]`` to logits ``[B, T, V]`` that runs on graphs."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.run_on_graphs(self, layers(args))

    def __call__(  # type: ignore[override]
        self,
        inputs: mx.array,
        mask: mx.array | None = None,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Return logits ``[B, T, V]``.

        Raises:
            ModelError: a mask was given, which mlx-lm's class ignores.
        """
        if mask is not None:
            raise ModelError("[mask] expected None but got one: leave it out")
        return super().__call__(inputs, cache, input_embeddings)


def check(config: Configuration, tensors: Mapping[str, TensorEntry]) -> str | None:
    """Check a configuration against a checkpoint's tensors before anything is built.

    Returns:
        A tensor that no file has, if there is one.

    Raises:
        ModelError: a value is invalid, or a tensor has another shape.
    """
    args = read_arguments(
        config, ModelArgs, unused=["shared_intermediate_size"], optional=["head_dim"]
    )
    check_numbers(config, args, "num_local_experts")
    if missing := missing_tensor(config, tensors, args, layers(args)):
        return missing
    width, theta = args.rotary_dim, args.rope_theta
    config.check_number("rotary_dim", width, _head_dim(args))
    check_rope(config, "rotary_dim", lambda: nn.RoPE(width, base=theta))
    return None
