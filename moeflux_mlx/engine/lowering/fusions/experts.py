"""Fusions of routed experts: their choice, both halves, and a shared expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ...graph.op import Op
from ...graph.rows import RowPart, one_row, whole
from ...launch import experts as expert_kernels
from ...launch import moe
from ...ops.elementwise import SwigluFusedBatched
from ...ops.moe import (
    MoeCombineResidualNTokens,
    MoeDecodeExperts,
    MoeNoauxTopK,
    MoeNormalizeWeights,
    MoeSoftmaxTopK,
    guard,
)
from ...ops.quant import MatvecNTokens
from ..moe import all_known, experts_act, noaux_fits, routing_fits
from ..registry import Run, Values, fusion
from ..rows import form, parts
from .one_by_one import one_by_one
from .products import is_product


def _routing(ops: Sequence[Any]) -> int:
    return 2 * (routing_fits(ops[0]) and ops[1].weights == ops[0].weights_out)


@fusion(
    "moe_softmax_topk",
    (MoeSoftmaxTopK, MoeNormalizeWeights),
    _routing,
    takes_parts=True,
)
def route(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Choose experts and divide their weights by their sum."""
    top, _ = ops
    logits, n_experts = values[top.logits], None
    if isinstance(logits, RowPart) and logits.start == 0:
        logits, n_experts = logits.row, top.n_experts
    launch = moe.moe_softmax_topk(whole(logits), top.k, True, n_experts)
    indices, weights = run(launch)
    return {top.indices_out: indices, top.weights_out: weights}


def _experts(ops: Sequence[Any]) -> int:
    """Count routed experts, the Ops of a shared expert if any, and their sum."""
    experts, *rest = ops
    if isinstance(rest[0], MoeCombineResidualNTokens):
        combine = rest[0]
        linked = combine.shared_out is None
    else:
        act, down, combine = rest[:3]
        linked = (
            is_product(down)
            and down.input == act.out
            and combine.shared_out == down.output
        )
    n = 2 + rest.index(combine)
    # Rows of experts that ranks share are exchanged before they are added.
    linked = linked and combine.moe_sum == experts.out_sum and not experts.shared
    return n if linked else 0


EXPERT_KERNELS = ("experts_gate_up_swiglu", "experts_down_combine")


def experts_and_shared(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run the experts' first half, then their second half and the shared expert's."""
    experts, source = ops[0], values[ops[0].experts]
    if not _all_alike(ops, values):
        return one_by_one(ops, [op.reference for op in ops], values)
    x, indices = values[experts.mlp_in], values[experts.indices]
    slots, opened = experts_act(experts, run, x, indices, source)
    return _second_half(ops, run, values, opened, slots, values[experts.weights])


def _all_alike(ops: Sequence[Any], values: Values) -> bool:
    """Return whether kernels know all matrices; only run time tells, by the experts."""
    experts, *shared, _ = ops
    stacks = values[experts.experts].weights
    if not all_known(stacks):
        return False
    group_size = form(stacks.down)[1]
    return not shared or form(values[shared[1].weight.name])[1] == group_size


def _second_half(
    ops: Sequence[Any],
    run: Run,
    values: Values,
    opened: mx.array,
    slots: mx.array,
    weights: mx.array,
) -> Values:
    experts, *shared, combine = ops
    source = values[experts.experts]
    row, starts, matrix = None, None, None
    if shared:
        act, down = shared
        projected = [act.gate, act.up]
        projected += [combine.shared_gate] if combine.shared_gate is not None else []
        row, starts = one_row(*(values[buf] for buf in projected))
        weight = values[down.weight.name]
        matrix = (*parts(weight), form(weight)[0])
    stack = source.weights.down
    launch = expert_kernels.experts_down_combine(
        opened,
        slots,
        weights,
        stack.records,
        row,
        starts,
        matrix,
        values[combine.h_mid],
        *form(stack),
    )
    (out,) = run(launch)
    guard(source, [out])
    return {combine.hidden_out: out}


def _routed(ops: Sequence[Any]) -> int:
    """Count routing and the Ops of the experts."""
    top, experts = ops[0], ops[2]
    linked = experts.indices == top.indices_out and experts.weights == top.weights_out
    n = _experts(ops[2:]) if linked and _routing(ops) else 0
    return n and 2 + n


def routed_experts(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Route in the experts' first launch, if each expert is in the slot of its id."""
    top, experts, source = ops[0], ops[2], values[ops[2].experts]
    x, logits = values[experts.mlp_in], values[top.logits]
    fits = source.resident is not None and _in_row(x, logits)
    if not fits or not _all_alike(ops[2:], values):
        routed = route(ops[:2], run, values)
        return {**routed, **experts_and_shared(ops[2:], run, {**values, **routed})}
    stacks = source.weights
    sizes = (experts.expert_dim, *form(stacks.gate), x.start, x.size)
    matrices = stacks.gate.records, stacks.up.records
    launch = expert_kernels.experts_route_gate_up(
        x.row, top.n_experts, top.k, *matrices, *sizes, experts.alpha, experts.limit
    )
    opened, chosen, weights = run(launch)
    source.count(top.k)
    out = _second_half(ops[2:], run, values, opened, chosen, weights)
    indices = chosen.view(mx.int32)
    return {**out, top.indices_out: indices, top.weights_out: weights}


def _chosen_by_noaux(ops: Sequence[Any]) -> int:
    """Count a choice by sigmoids and the Ops of the experts."""
    top, experts = ops[0], ops[1]
    linked = experts.indices == top.indices_out and experts.weights == top.weights_out
    plain = linked and noaux_fits(top) and not experts.limit
    n = _experts(ops[1:]) if plain and top.n_tokens == 1 else 0
    return n and 1 + n


def noaux_experts(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Choose in the experts' first launch, if each expert is in the slot of its id."""
    top, experts = ops[:2]
    source, correction = values[experts.experts], values[top.bias.name].w
    x, logits = values[experts.mlp_in], values[top.logits]
    groups = top.n_group, top.topk_group, top.scale, top.normalised
    stacks = source.weights
    unbiased = stacks.gate.bias is None and stacks.up.bias is None
    fits = source.resident is not None and unbiased and _in_row(x, logits)
    if not fits or not _all_alike(ops[1:], values):
        launch = moe.moe_noaux_topk(whole(logits), correction, top.k, *groups)
        indices, weights = run(launch)
        routed = {top.indices_out: indices, top.weights_out: weights}
        return {**routed, **experts_and_shared(ops[1:], run, {**values, **routed})}
    matrices = stacks.gate.records, stacks.up.records
    sizes = (experts.expert_dim, *form(stacks.gate), x.start, x.size)
    launch = expert_kernels.experts_noaux_gate_up(
        x.row, correction, top.k, *groups, *matrices, *sizes
    )
    opened, chosen, weights = run(launch)
    source.count(top.k)
    out = _second_half(ops[1:], run, values, opened, chosen, weights)
    indices = chosen.view(mx.int32)
    return {**out, top.indices_out: indices, top.weights_out: weights}


def _in_row(x: Any, logits: Any) -> bool:
    """Return whether a row begins with the logits and holds the experts' input."""
    both = isinstance(x, RowPart) and isinstance(logits, RowPart)
    return both and x.row is logits.row and logits.start == 0


def _add_experts(*shared: type[Op]) -> None:
    """Add the fusions of routed experts, with the Ops of a shared one if given."""
    types: tuple[type[Op], ...]
    types = (MoeDecodeExperts, *shared, MoeCombineResidualNTokens)
    add = fusion(
        "experts_down_combine",
        types,
        _experts,
        takes_parts=True,
        kernels=EXPERT_KERNELS,
    )
    add(experts_and_shared)
    add = fusion(
        "experts_route_gate_up",
        (MoeSoftmaxTopK, MoeNormalizeWeights, *types),
        _routed,
        takes_parts=True,
        # Streamed experts must be found first, after a launch that only routes.
        kernels=("experts_route_gate_up", "moe_softmax_topk", *EXPERT_KERNELS),
    )
    add(routed_experts)
    add = fusion(
        "experts_noaux_gate_up",
        (MoeNoauxTopK, *types),
        _chosen_by_noaux,
        takes_parts=True,
        kernels=("experts_noaux_gate_up", "moe_noaux_topk", *EXPERT_KERNELS),
    )
    add(noaux_experts)


_add_experts(SwigluFusedBatched, MatvecNTokens)
_add_experts()
