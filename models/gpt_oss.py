"""gpt-oss: attention with sinks, windowed in every other layer; biased experts.

A drop-in for ``mlx_lm.models.gpt_oss``: constructor, weight names, caches and
sanitising are mlx-lm's own; the forward pass is a graph of Ops per layer. As in
transformers, a false ``truncate`` in ``rope_scaling`` is respected. mlx-lm ignores it;
its class remains available with ``native=False``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_lm.models import gpt_oss as stock
from mlx_lm.models.rope_utils import initialize_rope

from moeflux_mlx.engine.blocks import Moe
from moeflux_mlx.engine.checks import (
    check_numbers,
    check_rope,
    missing_tensor,
    read_arguments,
)
from moeflux_mlx.engine.layer import LayerForm
from moeflux_mlx.engine.mixers import Attention
from moeflux_mlx.engine.native import GraphText, NativeModel
from moeflux_mlx.engine.yarn import (
    check_truncate,
    departs_by_truncate,
    follow_truncate,
)
from moeflux_mlx.experts.files.configuration import Configuration
from moeflux_mlx.experts.files.safetensors import TensorEntry

ROUTED = "experts"
departs = departs_by_truncate
SLIDING, FULL = "sliding_attention", "full_attention"
ATTENTION: dict[str, Any] = {"sinks": True, "scale_name": "sm_scale"}
MOE: dict[str, Any] = {"routed_name": ROUTED, "router": "router", "biased": True}
# A softmax over the top k equals the normalised top k of a softmax over all.
MOE |= {"normalised": True, "alpha": 1.702, "limit": 7.0}
# The only supported values of entries that neither class reads.
KNOWN = {"hidden_act": "silu", "swiglu_limit": 7.0, "attention_bias": True}
KNOWN |= {"tie_word_embeddings": False, "rope_parameters": None}
UNKNOWN = ("mscale", "mscale_all_dim", "attention_factor")


@dataclass
class ModelArgs(stock.ModelArgs):
    """mlx-lm's arguments and the longest sequence."""

    max_position_embeddings: int | None = None


def lacks(config: Mapping[str, Any]) -> str | None:
    """Return a setting of a configuration that the class does not support, if any."""
    stored = config.get("quantization_config") or {}
    if "quantization" not in config and "quant_method" in stored:
        return "experts as published, before 'moeflux pack' or mlx_lm.convert"
    for key, value in KNOWN.items():
        if config.get(key, value) != value:
            return key
    scaling = config.get("rope_scaling")
    # Without it transformers uses a default of its own, and mlx-lm none.
    if not isinstance(scaling, dict) or scaling.get("rope_type") != "yarn":
        return "rope_scaling"
    return next((key for key in UNKNOWN if scaling.get(key) is not None), None)


def layers(args: ModelArgs) -> Iterator[LayerForm]:
    """Yield the form of each layer."""
    heads = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    full = Attention(*heads, norms=(), biases=("q", "k", "v", "o"), **ATTENTION)
    moe = Moe(
        args.num_local_experts, args.num_experts_per_tok, args.intermediate_size, **MOE
    )
    mixers = {FULL: full, SLIDING: replace(full, window=args.sliding_window)}
    forms = {
        kind: LayerForm(mixer, moe, args.hidden_size, args.rms_norm_eps)
        for kind, mixer in mixers.items()
    }
    kinds = args.layer_types or [SLIDING, FULL] * (args.num_hidden_layers // 2)
    yield from (forms[kind] for kind in kinds)


class Model(NativeModel, GraphText, stock.Model):
    """A model from tokens ``[B, T]`` to logits ``[B, T, V]`` that runs on graphs."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        follow_truncate((layer.self_attn.rope for layer in self.layers), args)
        self.run_on_graphs(self, layers(args))


def check(config: Configuration, tensors: Mapping[str, TensorEntry]) -> str | None:
    """Check a configuration against a checkpoint's tensors before anything is built.

    Returns:
        A tensor that no file has, if there is one.

    Raises:
        ModelError: a value is invalid, or a tensor has another shape.
    """
    args = read_arguments(config, ModelArgs, unused=["rope_theta"])
    kinds, n = args.layer_types, args.num_hidden_layers
    by_turns = kinds is None and n % 2 == 0
    named = isinstance(kinds, list) and {*map(str, kinds)} == {SLIDING, FULL}
    if not (by_turns or (named and len(kinds) == n)):
        raise config.wrong("layer_types", f"{SLIDING} and {FULL}, {n} in all", kinds)
    forms, routed = layers(args), f".{ROUTED}."
    if missing := missing_tensor(config, tensors, args, forms, routed):
        return missing
    check_numbers(config, args, "num_local_experts")
    sizes = args.head_dim, args.rope_theta, False, args.rope_scaling
    check_rope(config, "rope_scaling", lambda: initialize_rope(*sizes))
    check_truncate(config)
    return None
