"""Consecutive Ops as one launch: what decoding one token is made of.

A launch costs some microseconds whatever it does, and a layer of one token is some
twenty Ops of which most do next to nothing. All groups here are of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..graph.lower import Kernel
from ..graph.op import Access, Op
from ..launch import attention, linear_attention, moe, quant
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
from .attention import attend_spare, takes_spare
from .moe import all_known, experts_act, routing_fits
from .rows import form, kernel_form, parts
from .table import Run, Values, group


def _is_product(op: Op) -> bool:
    return (
        isinstance(op, MatvecNTokens)
        and op.n_tokens == 1
        and op.bias is None
        and kernel_form(op.weight)
    )


def _norm_and_products(ops: Sequence[Any]) -> int:
    """Count a norm and the products that read it, quantised in groups of one size."""
    norm = ops[0]
    if norm.n_tokens > 1:
        return 0
    n = 1
    for op in ops[1 : 1 + quant.MAX_PRODUCTS]:
        if not _is_product(op) or op.input != norm.out:
            break
        first, own = ops[1].weight, op.weight
        same_group = own.quantization.group_size == first.quantization.group_size
        if not same_group or own.dtype != first.dtype:
            break
        n += 1
    return n if n > 1 else 0


@group("norm_matvecs", (RmsNormBf16NTokens, MatvecNTokens), _norm_and_products)
def norm_matvecs(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run a norm and up to four products with its row."""
    norm, *products = ops
    matrices = []
    for op in products:
        weight = values[op.weight]
        matrices.append((*parts(weight), form(weight)[0]))
    x, weight = values[norm.x], values[norm.weight].w
    group_size = form(values[products[0].weight])[1]
    launch = quant.norm_matvecs(x, weight, matrices, norm.eps, group_size)
    written = (norm.out, *(op.output for op in products))
    return dict(zip(written, run(launch), strict=False))


def _product_and_residual(ops: Sequence[Any]) -> int:
    return 2 * (_is_product(ops[0]) and ops[1].a == ops[0].output)


@group("matvec_residual", (MatvecNTokens, ResidualAddNTokens), _product_and_residual)
def matvec_residual(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run a product that is added to the residual stream."""
    product, add = ops
    weight, x, residual = values[product.weight], values[product.input], values[add.b]
    launch = quant.matvec_residual(x, *parts(weight), residual, *form(weight))
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


@group("gated_delta_decode", GATED_DELTA, _gated_delta)
def gated_delta_decode(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run all of a gated DeltaNet between its projections."""
    conv, unit, gates, rule, norm = ops
    qkv = values[conv.qkv_in]
    a_log = values[gates.a_log].w
    launch = linear_attention.gated_delta_decode(
        qkv,
        values[conv.conv_state].astype(qkv.dtype),
        values[conv.weight].w,
        values[gates.alpha_in],
        values[gates.beta_in],
        a_log,
        values[gates.dt_bias].w.astype(a_log.dtype),
        values[rule.state],
        values[norm.z],
        values[norm.weight].w,
        rule.num_k_heads,
        norm.eps,
        unit.eps,
    )
    history, state, out = run(launch)
    return {conv.conv_state: history, rule.state: state, norm.output: out}


ATTENTION_INPUTS = (
    SplitQGate,
    RmsNormPerHeadNTokens,
    RopeNTokens,
    RmsNormPerHeadNTokens,
    RopeNTokens,
)


def _attention_inputs(ops: Sequence[Any]) -> int:
    split, q_norm, q_rope, k_norm, k_rope = ops[:5]
    linked = (
        q_norm.x == q_rope.x == split.q_out
        and k_norm.x == k_rope.x
        and q_rope.inv_freq == k_rope.inv_freq
        and q_rope.start == k_rope.start
        and q_norm.eps == k_norm.eps
    )
    one_each = q_rope.n_tokens == q_rope.n_seqs
    narrow = split.head_dim <= attention.MAX_HEAD_DIM
    return len(ATTENTION_INPUTS) if linked and one_each and narrow else 0


@group("attention_inputs", ATTENTION_INPUTS, _attention_inputs)
def attention_inputs(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Part queries from their gate, normalise and rotate queries and keys."""
    split, q_norm, q_rope, k_norm, _ = ops
    launch = attention.attention_inputs(
        values[split.q_proj],
        values[k_norm.x],
        values[q_norm.weight].w,
        values[k_norm.weight].w.astype(values[q_norm.weight].w.dtype),
        values[q_rope.inv_freq],
        values[q_rope.start],
        q_norm.eps,
    )
    q, gate, k = run(launch)
    return {split.q_out: q, split.gate_out: gate, k_norm.x: k}


def _gated_attention(ops: Sequence[Any]) -> int:
    return 2 * (takes_spare(ops[0]) and ops[1].x == ops[0].attn_out)


@group("sdpa_decode_parts", (SdpaCausalTiled, SigmoidGateNTokens), _gated_attention)
def gated_attention(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Attend over parts of the cache, then join and gate them."""
    attend, gate = ops
    q, k, v = values[attend.q], values[attend.k], values[attend.v]
    start, scale = values[attend.start], attend.softmax_scale
    return {gate.x: attend_spare(run, q, k, v, start, scale, values[gate.gate])}


def _routing(ops: Sequence[Any]) -> int:
    return 2 * (routing_fits(ops[0]) and ops[1].weights == ops[0].weights_out)


@group("moe_softmax_topk", (MoeSoftmaxTopK, MoeNormalizeWeights), _routing)
def route(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Choose experts and divide their weights by the sum."""
    top, _ = ops
    launch = moe.moe_softmax_topk(values[top.logits], top.k, normalize=True)
    indices, weights = run(launch)
    return {top.indices_out: indices, top.weights_out: weights}


EXPERTS = (
    MoeDecodeExperts,
    SwigluFusedBatched,
    MatvecNTokens,
    MoeCombineResidualNTokens,
)


def _experts(ops: Sequence[Any]) -> int:
    experts, act, down, combine = ops[:4]
    linked = (
        _is_product(down)
        and down.input == act.out
        and combine.moe_sum == experts.out_sum
        and combine.shared_out == down.output
    )
    return len(EXPERTS) if linked else 0


@group("experts_down_combine", EXPERTS, _experts)
def experts_and_shared(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run the experts' first half, then theirs and the shared expert's second."""
    experts, act, down, combine = ops
    source, shared = values[experts.experts], values[down.weight]
    bits, group_size = form(shared)
    stacks = source.weights
    if not all_known(stacks) or form(stacks.down)[1] != group_size:
        kernels = [op.reference for op in ops]
        return one_by_one(ops, kernels, values)
    row, indices = values[experts.mlp_in], values[experts.indices]
    slots, opened = experts_act(experts, run, row, indices, source)
    launch = moe.experts_down_combine(
        opened,
        slots,
        values[experts.weights],
        stacks.down.records,
        values[act.gate],
        values[act.up],
        (*parts(shared), bits),
        values[combine.shared_gate],
        values[combine.h_mid],
        *form(stacks.down),
    )
    (out,) = run(launch)
    guard(source, [out])
    return {combine.hidden_out: out}


def one_by_one(ops: Sequence[Op], kernels: Sequence[Kernel], values: Values) -> Values:
    """Perform Ops, each by its kernel, in place of their group."""
    held = dict(values)
    for op, kernel in zip(ops, kernels, strict=True):
        names = [f.name for f in op.buffer_fields if f.access & Access.READ]
        fields = (getattr(op, name) for name in (*names, *op.weight_fields))
        out = kernel(*(held[field] for field in fields))
        outs = out if isinstance(out, tuple) else (out,)
        held |= dict(zip(op.writes, outs, strict=True))
    return held
