"""Families that choose experts by sigmoids (noaux_tc): forms and checks.

Their first layers are dense; the others may have a shared expert. Keys of
configurations have the names of mlx-lm's arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..experts.files.configuration import Configuration
from .blocks import DenseMlp, Moe, Noaux
from .layer import LayerForm
from .mixers import Mixer


def forms(args: Any, mixer: Mixer) -> Iterator[LayerForm]:
    """Yield the form of each layer; all share one mixer."""
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
        LayerForm(mixer, mlp, args.hidden_size, args.rms_norm_eps)
        for mlp in (moe, DenseMlp(args.intermediate_size))
    )
    for index in range(args.num_hidden_layers):
        yield dense if index < args.first_k_dense_replace else routed


def lacks(config: Mapping[str, Any]) -> str | None:
    """Return a setting of a configuration that such graphs do not support, if any.

    It concerns the choice of experts, or a published form of matrices that mlx-lm
    unpacks first.
    """
    stored = config.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method is not None:
        return f"quantization_config of {method}"
    if config.get("tie_word_embeddings"):
        return "tie_word_embeddings"
    if not config.get("n_routed_experts"):
        return "no experts"
    known = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    for key, value in known.items():
        if config.get(key, value) != value:
            return key
    # transformers divides a single weight by itself; mlx-lm leaves it as it is.
    one = config.get("num_experts_per_tok", 1) == 1
    divides = one and config.get("norm_topk_prob", True)
    return "norm_topk_prob of one expert" if divides else None


def departs(config: Mapping[str, Any]) -> str | None:
    """Return where native classes follow transformers but mlx-lm's do not, if so."""
    if (config.get("topk_group") or 1) >= (config.get("n_group") or 1):
        return None
    return (
        "experts of groups left out: transformers never chooses them; mlx-lm gives "
        "them the score 0, which beats a negative score"
    )


def check(config: Configuration, args: Any) -> None:
    """Refuse numbers of layers and groups that a choice by sigmoids cannot have.

    Args:
        args: mlx-lm's arguments, made of the configuration.

    Raises:
        ModelError: a number contradicts the others; names the key.
    """
    first, n_layers = args.first_k_dense_replace, args.num_hidden_layers
    if type(first) is not int or not 0 <= first < n_layers:
        expected = f"from 0 to num_hidden_layers - 1 ({n_layers - 1})"
        raise config.wrong("first_k_dense_replace", expected, first)
    if args.n_shared_experts is not None:
        config.check_counts(["n_shared_experts"])
    key, n_experts = "n_routed_experts", args.n_routed_experts
    config.check_multiple(key, n_experts, "n_group", args.n_group)
    config.check_number("routed_scaling_factor", args.routed_scaling_factor)
    each = n_experts // args.n_group
    if args.n_group > 1 and each < 2:
        raise config.wrong("n_group", f"of {key} ({n_experts}) by twos", args.n_group)
    if args.topk_group > args.n_group:
        expected = f"from 1 to n_group ({args.n_group})"
        raise config.wrong("topk_group", expected, args.topk_group)
    if args.num_experts_per_tok > args.topk_group * each:
        expected = (
            f"at most the experts of topk_group groups ({args.topk_group * each})"
        )
        raise config.wrong("num_experts_per_tok", expected, args.num_experts_per_tok)
