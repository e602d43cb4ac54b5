"""Fusions of a gated DeltaNet: all Ops between its projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...graph.rows import one_row
from ...launch import linear_attention
from ...ops.linear_attention import (
    ComputeDecayBetaNTokens,
    Conv1dStepNTokens,
    GatedDeltaNetStepNTokens,
    PartKeyHeadsNTokens,
)
from ...ops.norm import GatedRmsNormNTokens, RmsNormQkNTokens
from ..registry import Run, Values, fusion

GATED_DELTA = (
    Conv1dStepNTokens,
    RmsNormQkNTokens,
    ComputeDecayBetaNTokens,
    GatedDeltaNetStepNTokens,
    GatedRmsNormNTokens,
)


def _gated_delta(ops: Sequence[Any]) -> int:
    conv, unit, gates, rule, norm = ops[:5]
    limits = linear_attention
    fits = (
        conv.mask is conv.lengths is gates.mask is None
        and conv.n_tokens == conv.n_seqs
        and 2 <= conv.kernel_size <= limits.MAX_WIDTH
        and rule.key_dim % limits.SIMD == 0
        and rule.key_dim <= limits.MAX_KEY_DIM
        and rule.value_dim <= limits.MAX_VALUE_DIM
        and unit.key_offset_per_token == rule.num_k_heads * rule.key_dim
    )
    linked = (
        unit.x == rule.conv_out == conv.conv_out
        and rule.g_decay == gates.g_decay_out
        and rule.beta_gate == gates.beta_gate_out
        and norm.values == rule.output
    )
    return len(GATED_DELTA) if fits and linked else 0


@fusion("gated_delta_decode", GATED_DELTA, _gated_delta, takes_parts=True)
def gated_delta_decode(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run all of a gated DeltaNet between its projections."""
    conv, _, gates, _, norm = ops
    projected = (conv.qkv_in, norm.z, gates.beta_in, gates.alpha_in)
    return _decode_delta(ops, run, values, projected)


def _gated_delta_by_key(ops: Sequence[Any]) -> int:
    part, *rest = ops
    conv, _, gates, rule, norm = rest[: len(GATED_DELTA)]
    linked = (
        conv.qkv_in == part.qkv_out
        and norm.z == part.z_out
        and (gates.beta_in, gates.alpha_in) == (part.beta_out, part.alpha_out)
        and (part.num_k_heads, part.num_v_heads) == (rule.num_k_heads, rule.num_v_heads)
        and (part.key_dim, part.value_dim) == (rule.key_dim, rule.value_dim)
    )
    n = _gated_delta(rest) if linked else 0
    return n and 1 + n


@fusion(
    "gated_delta_decode",
    (PartKeyHeadsNTokens, *GATED_DELTA),
    _gated_delta_by_key,
    takes_parts=True,
)
def gated_delta_by_key(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run the same for projections that are grouped by key head."""
    part, *rest = ops
    return _decode_delta(rest, run, values, (part.qkvz, part.ba))


def _decode_delta(
    ops: Sequence[Any], run: Run, values: Values, projected: tuple[Any, ...]
) -> Values:
    conv, unit, gates, rule, norm = ops
    rows, starts = one_row(*(values[buf] for buf in projected))
    a_log = values[gates.a_log.name].w
    launch = linear_attention.gated_delta_decode(
        rows,
        starts,
        values[conv.conv_state].astype(rows.dtype),
        values[conv.weight.name].w,
        a_log,
        values[gates.dt_bias.name].w.astype(a_log.dtype),
        values[rule.state],
        values[norm.weight.name].w,
        rule.num_k_heads,
        norm.eps,
        unit.eps,
    )
    history, state, out = run(launch)
    return {conv.conv_state: history, rule.state: state, norm.output: out}
