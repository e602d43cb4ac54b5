"""Fusions: consecutive Ops of one token that run as one launch.

A launch costs some microseconds, however little it computes, and a layer has about
twenty Ops, most of them tiny.

A fusion finds its Ops by the values that they read of each other, not by the model. So
a family without an output gate or a shared expert still has the other fusions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..graph.lower import Kernel
from ..graph.op import Access, JointRows, Op
from ..graph.rows import RowPart, whole
from ..launch import attention, linear_attention, moe, quant
from ..launch import experts as expert_kernels
from ..ops.attention import RopeNTokens, SdpaCausalTiled
from ..ops.elementwise import (
    ResidualAddNTokens,
    SigmoidGateNTokens,
    SplitQGate,
    SwigluFusedBatched,
)
from ..ops.linear_attention import (
    ComputeDecayBetaNTokens,
    Conv1dStepNTokens,
    GatedDeltaNetStepNTokens,
    PartKeyHeadsNTokens,
)
from ..ops.moe import (
    MoeCombineResidualNTokens,
    MoeDecodeExperts,
    MoeNormalizeWeights,
    MoeSoftmaxTopK,
    guard,
)
from ..ops.norm import (
    GatedRmsNormNTokens,
    RmsNormBf16NTokens,
    RmsNormPerHeadNTokens,
    RmsNormQkNTokens,
)
from ..ops.quant import MatvecNTokens
from .attention import SPARE_KERNELS, attend_spare, takes_spare
from .moe import all_known, experts_act, routing_fits
from .registry import Run, Values, fusion
from .rows import form, kernel_form, parts


def _is_product(op: Op, *, with_bias: bool = False) -> bool:
    return (
        isinstance(op, MatvecNTokens)
        and op.n_tokens == 1
        and (with_bias or op.bias is None)
        and kernel_form(op.weight)
    )


def _reads(op: Op, x: Any) -> bool:
    """Return whether an Op is a product with ``x``, with or without a bias."""
    return _is_product(op, with_bias=True) and op.input == x  # type: ignore[attr-defined]


def _norm_and_products(ops: Sequence[Any]) -> int:
    """Count a norm and the products that read it, with one or two whole matrices."""
    norm = ops[0]
    if norm.n_tokens > 1:
        return 0
    n, first = 1, ops[1].weight
    matrices = itertools.islice(_matrices(ops[1:], norm.out), quant.MAX_PRODUCTS)
    for matrix in matrices:
        own = matrix[0].weight
        same_size = own.quantization.group_size == first.quantization.group_size
        if not same_size or own.dtype != first.dtype:
            break
        n += len(matrix)
    return n if n > 1 else 0


def _matrices(ops: Sequence[Any], x: Any) -> Iterator[list[Any]]:
    """Yield lists of the leading products with ``x``, one list for a joint matrix."""
    while ops and _reads(ops[0], x):
        joint = ops[0].weight.joint
        n, rows = 0, 0
        for op in ops:
            own = op.weight.joint if _reads(op, x) else None
            if joint is None or own != JointRows(joint.name, rows, joint.n_rows):
                break
            n, rows = n + 1, rows + op.out_dim
        if joint is not None and rows != joint.n_rows:
            return
        yield list(ops[: n or 1])
        ops = ops[n or 1 :]


@fusion(
    "norm_matvecs",
    (RmsNormBf16NTokens, MatvecNTokens),
    _norm_and_products,
    joint=True,
)
def norm_matvecs(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run a norm and the products with its output; return all as parts of one row."""
    norm, *products = ops
    x, weight = values[norm.x], values[norm.weight.name].w
    matrices, biases, parts_of = [], [], []
    for same in _matrices(products, norm.out):
        ref = same[0].weight
        matrix = values[ref.joint.name if ref.joint else ref.name]
        group_size = form(matrix)[1]
        matrices.append((*parts(matrix), form(matrix)[0]))
        biases.append(_bias(same, values, x.dtype))
        parts_of.append(same)
    launch = quant.norm_matvecs(x, weight, matrices, norm.eps, group_size, biases)
    (row,) = run(launch)
    *starts, _ = quant.norm_row(norm.dim, [m[0].shape[0] for m in matrices])
    out: dict[Any, Any] = {norm.out: RowPart(row, starts[-1], norm.dim)}
    for start, same in zip(starts, parts_of, strict=False):
        for op in same:
            first = op.weight.joint.first if op.weight.joint else 0
            out[op.output] = RowPart(row, start + first, op.out_dim)
    return out


def _bias(products: Sequence[Any], values: Values, dtype: mx.Dtype) -> Any:
    """Return the bias of the products with one matrix, or None."""
    ref = next((op.bias for op in products if op.bias is not None), None)
    if ref is None:
        return None
    bias: mx.array = values[ref.joint.name if ref.joint else ref.name].w
    return bias.astype(dtype)


def _one_row(*parts: Any) -> tuple[mx.array, tuple[int, ...]]:
    """Return an array ``[B, width]`` that holds all parts, and where each begins."""
    rows = {id(part.row) for part in parts if isinstance(part, RowPart)}
    if len(rows) == 1 and all(isinstance(part, RowPart) for part in parts):
        return parts[0].row, tuple(part.start for part in parts)
    arrays = [whole(part) for part in parts]
    starts = itertools.accumulate((x.shape[-1] for x in arrays[:-1]), initial=0)
    return mx.concatenate(arrays, axis=-1), tuple(starts)


def _product_and_residual(ops: Sequence[Any]) -> int:
    is_product = _is_product(ops[0], with_bias=True)
    return 2 * (is_product and ops[1].a == ops[0].output)


@fusion("matvec_residual", (MatvecNTokens, ResidualAddNTokens), _product_and_residual)
def matvec_residual(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run a product and its sum with the residual stream."""
    product, add = ops
    weight, x, residual = (
        values[product.weight.name],
        values[product.input],
        values[add.b],
    )
    bias = None if product.bias is None else values[product.bias.name].w
    given = x, *parts(weight), residual, *form(weight)
    launch = quant.matvec_residual(
        *given, None if bias is None else bias.astype(x.dtype)
    )
    return {add.out: run(launch)[0]}


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
    rows, starts = _one_row(*(values[buf] for buf in projected))
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
            _is_product(down)
            and down.input == act.out
            and combine.shared_out == down.output
        )
    n = 2 + rest.index(combine)
    linked = linked and combine.moe_sum == experts.out_sum
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
        row, starts = _one_row(*(values[buf] for buf in projected))
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
    both = isinstance(x, RowPart) and isinstance(logits, RowPart)
    in_row = both and x.row is logits.row and logits.start == 0
    if source.resident is None or not in_row or not _all_alike(ops[2:], values):
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


_add_experts(SwigluFusedBatched, MatvecNTokens)
_add_experts()


def one_by_one(ops: Sequence[Op], kernels: Sequence[Kernel], values: Values) -> Values:
    """Run Ops one by one with their kernels, in place of a fusion."""
    held = {key: whole(value) for key, value in values.items()}
    for op, kernel in zip(ops, kernels, strict=True):
        names = [f.name for f in op.buffer_fields if f.access & Access.READ]
        refs = (getattr(op, name) for name in op.weight_fields)
        keys = [getattr(op, name) for name in names]
        keys += [None if ref is None else ref.name for ref in refs]
        out = kernel(*(held[key] for key in keys))
        outs = out if isinstance(out, tuple) else (out,)
        held |= dict(zip(op.writes, outs, strict=True))
    return held
