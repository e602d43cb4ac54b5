"""DeepSeek-V3, R1 and Kimi-K2: latent attention, experts chosen by sigmoids in groups.

A drop-in for ``mlx_lm.models.deepseek_v3``: constructor, weight names, caches and
sanitising are mlx-lm's own; the forward pass is a graph of Ops per layer. Experts of
groups that are not among the best are never chosen, as in transformers; mlx-lm gives
them the score 0 instead, which its class (``native=False``) still does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_lm.models import deepseek_v3 as stock
from mlx_lm.models.rope_utils import initialize_rope

from moeflux_mlx.engine.blocks import ROUTED, DenseMlp, Moe, Noaux
from moeflux_mlx.engine.layer import LayerForm, expected_tensors
from moeflux_mlx.engine.mixers import LatentAttention
from moeflux_mlx.engine.native import (
    GraphText,
    NativeModel,
    check_choice,
    check_numbers,
    check_rope,
    lacks_of_choice,
    lacks_of_form,
    lacks_of_rope,
    lacks_of_yarn,
)
from moeflux_mlx.experts.files.configuration import (
    Configuration,
    check_tensors,
    counts_of,
)
from moeflux_mlx.experts.files.safetensors import TensorEntry

ModelArgs = stock.ModelArgs
# Whole numbers of a configuration that may be 0, null or of no use here.
OTHER_COUNTS = {"first_k_dense_replace", "q_lora_rank", "num_key_value_heads"}


def lacks(config: Mapping[str, Any]) -> str | None:
    """Return what a configuration asks for that the class does not do, if anything."""
    if config.get("tie_word_embeddings"):
        return "tie_word_embeddings"
    for key, value in (("moe_layer_freq", 1), ("rope_interleave", True)):
        if config.get(key, value) != value:
            return key
    rope = lacks_of_yarn(config) or lacks_of_rope(config, ["rope_parameters"])
    return rope or lacks_of_choice(config) or lacks_of_form(config)


def layers(args: ModelArgs, *, joint_kv: bool = False) -> Iterator[LayerForm]:
    """Yield what each layer is.

    Args:
        joint_kv: as ``LatentAttention`` has it.
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
    assert args.n_routed_experts is not None
    k = args.num_experts_per_tok
    moe = Moe(
        args.n_routed_experts,
        k,
        args.moe_intermediate_size,
        normalised=args.norm_topk_prob and k > 1,
        shared_dim=args.moe_intermediate_size * (args.n_shared_experts or 0),
        shared_name="shared_experts",
        gated=False,
        noaux=Noaux(args.n_group, args.topk_group, args.routed_scaling_factor),
    )
    routed, dense = (
        LayerForm(attention, mlp, args.hidden_size, args.rms_norm_eps)
        for mlp in (moe, DenseMlp(args.intermediate_size))
    )
    for index in range(args.num_hidden_layers):
        yield dense if index < args.first_k_dense_replace else routed


class Model(NativeModel, GraphText, stock.Model):
    """Tokens ``[B, T]`` to logits ``[B, T, V]``, whose calls are graphs."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.run_on_graphs(self, layers(args))


def check(config: Configuration, tensors: Mapping[str, TensorEntry]) -> str | None:
    """Hold a configuration against a checkpoint's tensors, before building anything.

    Returns:
        A tensor that no file has, if there is one.

    Raises:
        ModelError: a value is not usable, or a tensor has another shape.
    """
    config.check_counts({*counts_of(ModelArgs), "n_routed_experts"} - OTHER_COUNTS)
    if config.fields.get("q_lora_rank") is not None:
        config.check_counts(["q_lora_rank"])
    args = ModelArgs.from_dict(copy.deepcopy(config.fields))
    check_choice(config, args)
    check_numbers(config, args, "n_routed_experts", grouped=False)
    joint_kv = any(name.endswith("kv_b_proj.weight") for name in tensors)
    expected = expected_tensors(args, layers(args, joint_kv=joint_kv))
    missing = check_tensors(config, tensors, expected, optional=(ROUTED,))
    if missing is not None:
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
