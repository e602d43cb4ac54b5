"""Qwen3.5-MoE and Qwen3.6-MoE: gated DeltaNet and full attention layers, all MoE.

A drop-in for ``mlx_lm.models.qwen3_5_moe``: constructor, weight names, caches and
sanitising are mlx-lm's own; the forward pass is a graph of Ops per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mlx_lm.models import qwen3_5_moe as stock
from mlx_lm.models.qwen3_5 import TextModelArgs

from moeflux_mlx.engine.blocks import Moe
from moeflux_mlx.engine.checks import (
    check_numbers,
    check_partial_rope,
    check_shared_heads,
    missing_tensor,
    read_arguments,
)
from moeflux_mlx.engine.forward import Forward
from moeflux_mlx.engine.layer import LayerForm
from moeflux_mlx.engine.mixers import Attention, GatedDeltaNet
from moeflux_mlx.engine.native import NativeModel
from moeflux_mlx.engine.published import has_taps_last
from moeflux_mlx.experts.files.configuration import Configuration
from moeflux_mlx.experts.files.safetensors import TensorEntry

ModelArgs = stock.ModelArgs
# Whole numbers of a configuration that the class does not use.
UNUSED_COUNTS = ("intermediate_size", "decoder_sparse_step", "max_position_embeddings")


def layers(args: TextModelArgs, *, taps_last: bool = False) -> Iterator[LayerForm]:
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
    )
    heads, kv_heads = args.num_attention_heads, args.num_key_value_heads
    attention = Attention(heads, kv_heads, args.head_dim, gated=True)  # type: ignore[arg-type]
    moe = Moe(
        args.num_experts,
        args.num_experts_per_tok,
        args.moe_intermediate_size,
        normalised=args.norm_topk_prob,
        shared_dim=args.shared_expert_intermediate_size,
    )
    linear, full = (
        LayerForm(mixer, moe, args.hidden_size, args.rms_norm_eps)
        for mixer in (delta, attention)
    )
    for index in range(args.num_hidden_layers):
        yield linear if (index + 1) % args.full_attention_interval else full


class Model(NativeModel, stock.Model):
    """A model whose ``language_model`` runs on graphs."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        text = self.language_model
        self.run_on_graphs(text, layers(text.args), "language_model.")

    @property
    def engine(self) -> Forward:
        """The forward pass that runs the model's calls."""
        found: Forward = self.language_model.forward
        return found


def check(config: Configuration, tensors: Mapping[str, TensorEntry]) -> str | None:
    """Check a configuration against a checkpoint's tensors before anything is built.

    Returns:
        A tensor that no file has, if there is one.

    Raises:
        ModelError: a value is invalid, or a tensor has another shape.
    """
    if not isinstance(rope := config.fields.get("rope_parameters"), dict | None):
        raise config.wrong("rope_parameters", "an object or null", rope)
    args = read_arguments(
        config, TextModelArgs, unused=UNUSED_COUNTS, optional=["head_dim"]
    )
    if args.num_experts < 1:
        raise config.wrong("num_experts", "a positive whole number", args.num_experts)
    forms = layers(args, taps_last=has_taps_last(tensors))
    if missing := missing_tensor(config, tensors, args, forms):
        return missing
    # Check positions last: they take memory by their size, which now is known to fit.
    check_numbers(config, args)
    heads = "linear_num_value_heads", "linear_num_key_heads"
    check_shared_heads(config, args, *heads)
    check_partial_rope(config, args, "rope_parameters")
    return None
