"""Fusions of attention: its queries and keys, and its output under a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...launch import attention
from ...ops.attention import RopeNTokens, SdpaCausalTiled
from ...ops.elementwise import SigmoidGateNTokens, SplitQGate
from ...ops.norm import RmsNormPerHeadNTokens
from ..attention import SPARE_KERNELS, attend_spare, takes_spare
from ..registry import Run, Values, fusion

PLACED_HEADS = (
    RmsNormPerHeadNTokens,
    RopeNTokens,
    RmsNormPerHeadNTokens,
    RopeNTokens,
)


def _places_heads(ops: Sequence[Any]) -> bool:
    """Return whether norms and rotations belong to one token's queries and keys."""
    q_norm, q_rope, k_norm, k_rope = ops[:4]
    linked = (
        q_norm.x == q_rope.x
        and k_norm.x == k_rope.x
        and q_rope.inv_freq == k_rope.inv_freq
        and q_rope.start == k_rope.start
        and q_rope.scale == k_rope.scale == 1.0
        and not q_rope.pairs
        and not k_rope.pairs
        and q_norm.eps == k_norm.eps
    )
    one_each = q_rope.n_tokens == q_rope.n_seqs
    narrow = q_norm.head_dim == k_norm.head_dim <= attention.MAX_HEAD_DIM
    return linked and one_each and narrow


def _placing(ops: Sequence[Any], q_proj: Any, values: Values) -> tuple[Any, ...]:
    """Return the arguments of the kernels that place heads."""
    q_norm, q_rope, k_norm, _ = ops
    q_weight, k_weight = (values[norm.weight.name].w for norm in (q_norm, k_norm))
    return (
        values[q_proj],
        values[k_norm.x],
        q_weight,
        k_weight.astype(q_weight.dtype),
        values[q_rope.inv_freq],
        values[q_rope.start],
        q_norm.eps,
    )


def _attention_inputs(ops: Sequence[Any]) -> int:
    split, *placed = ops[:5]
    fits = split.q_out == placed[0].x and _places_heads(placed)
    return 5 if fits else 0


@fusion("attention_inputs", (SplitQGate, *PLACED_HEADS), _attention_inputs)
def attention_inputs(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Split queries from their gate; normalise and rotate queries and keys."""
    split, *placed = ops
    given = _placing(placed, split.q_proj, values)
    q, gate, k = run(attention.attention_inputs(*given))
    return {split.q_out: q, split.gate_out: gate, placed[2].x: k}


def _ungated_inputs(ops: Sequence[Any]) -> int:
    return 4 * (ops[0].x != ops[2].x and _places_heads(ops))


@fusion("attention_inputs_ungated", PLACED_HEADS, _ungated_inputs)
def ungated_attention_inputs(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Normalise and rotate queries and keys."""
    given = _placing(ops, ops[0].x, values)
    q, k = run(attention.attention_inputs_ungated(*given))
    return {ops[0].x: q, ops[2].x: k}


def _turned_heads(ops: Sequence[Any]) -> int:
    q_rope, k_rope = ops[:2]
    alike = all(
        getattr(q_rope, name) == getattr(k_rope, name)
        for name in ("inv_freq", "start", "scale", "head_dim", "rotary_dim")
    )
    one_each = q_rope.n_tokens == q_rope.n_seqs == k_rope.n_tokens
    halves = not q_rope.pairs and not k_rope.pairs
    narrow = q_rope.head_dim <= attention.MAX_HEAD_DIM
    return 2 * (q_rope.x != k_rope.x and alike and one_each and halves and narrow)


@fusion("attention_inputs_ungated", (RopeNTokens, RopeNTokens), _turned_heads)
def turned_heads(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Rotate queries and keys without norms."""
    q_rope, k_rope = ops
    launch = attention.attention_inputs_ungated(
        values[q_rope.x],
        values[k_rope.x],
        None,
        None,
        values[q_rope.inv_freq],
        values[q_rope.start],
        scale=q_rope.scale,
        head_dim=q_rope.head_dim,
    )
    q, k = run(launch)
    return {q_rope.x: q, k_rope.x: k}


def _gated_attention(ops: Sequence[Any]) -> int:
    return 2 * (takes_spare(ops[0]) and ops[1].x == ops[0].attn_out)


@fusion(
    "sdpa_decode_parts",
    (SdpaCausalTiled, SigmoidGateNTokens),
    _gated_attention,
    kernels=SPARE_KERNELS,
)
def gated_attention(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Attend over splits of the cache, then join and gate them."""
    attend, gate = ops
    q, k, v = values[attend.q], values[attend.k], values[attend.v]
    start, scale = values[attend.start], attend.softmax_scale
    sinks = None if attend.sinks is None else values[attend.sinks.name]
    opened = values[gate.gate]
    return {gate.x: attend_spare(run, q, k, v, start, scale, opened, sinks)}
