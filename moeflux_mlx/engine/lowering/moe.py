"""Ways of routing and of the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ...experts.weights import ExpertWeights, Quantization, Weight
from ..graph.experts import GraphExperts
from ..graph.rows import RowPart
from ..launch import elementwise, quant
from ..launch import experts as expert_kernels
from ..launch import moe as kernels
from ..ops import moe as ops
from .registry import Run, way
from .rows import form, kernel_form, parts


def routing_fits(op: ops.MoeSoftmaxTopK) -> bool:
    return op.n_experts <= kernels.MAX_EXPERTS and op.k <= kernels.MAX_K


@way(ops.MoeSoftmaxTopK, "moe_softmax_topk", routing_fits)
def softmax_topk(op: Any, run: Run, logits: mx.array) -> tuple[mx.array, ...]:
    return run(kernels.moe_softmax_topk(logits, op.k))


def _noaux_fits(op: ops.MoeNoauxTopK) -> bool:
    fits = op.n_experts <= kernels.MAX_EXPERTS and op.k <= kernels.MAX_K
    pairs = op.n_group == 1 or op.n_experts > op.n_group
    return fits and pairs and kernels.SIMD % op.n_group == 0


@way(ops.MoeNoauxTopK, "moe_noaux_topk", _noaux_fits)
def noaux_topk(
    op: Any, run: Run, logits: mx.array, bias: Weight
) -> tuple[mx.array, ...]:
    groups = op.n_group, op.topk_group
    launch = kernels.moe_noaux_topk(
        logits, bias.w, op.k, *groups, op.scale, op.normalised
    )
    return run(launch)


@way(ops.MoeNormalizeWeights, "moe_normalize_weights")
def normalize_weights(_op: Any, run: Run, weights: mx.array) -> mx.array:
    return run(kernels.moe_normalize_weights(weights))[0]


def _has_gate(op: ops.MoeCombineResidualNTokens) -> bool:
    return op.shared_gate is not None


@way(ops.MoeCombineResidualNTokens, "moe_combine_residual_n_tokens", _has_gate)
def combine(
    _op: Any, run: Run, h: mx.array, moe_sum: mx.array, shared: mx.array, gate: mx.array
) -> mx.array:
    launch = kernels.moe_combine_residual_n_tokens(h, moe_sum, shared, gate)
    return run(launch)[0]


# The modes of 4-bit floats that kernels know for experts.
FLOATS = (Quantization(4, 32, "mxfp4"), Quantization(4, 16, "nvfp4"))


def all_known(experts: ExpertWeights) -> bool:
    """Return whether our kernels know the experts' quantisation."""
    gate, up, down = experts.gate, experts.up, experts.down
    known = (kernel_form(w) or w.quantization in FLOATS for w in (gate, up, down))
    if not all(known):
        return False
    same_type = gate.scales.dtype == up.scales.dtype
    return same_type and _added(gate) == _added(up) and _packed(gate) == _packed(up)


def _added(weight: Weight) -> mx.Dtype | None:
    return None if weight.bias is None else weight.bias.dtype


def _packed(weight: Weight) -> tuple[Quantization | None, bool]:
    return weight.quantization, weight.biases is None


def _with_known_experts(
    call: Callable[..., mx.array],
) -> Callable[..., mx.array]:
    """Wrap a way: use the reference for experts whose form no kernel knows.

    The form is known only at run time, when the experts are there.
    """

    def go(op: Any, run: Run, *values: Any) -> mx.array:
        experts: GraphExperts = values[3]
        if not all_known(experts.weights):
            return op.reference(*values)
        return call(op, run, *values)

    return go


@way(
    ops.MoeDecodeExperts,
    "experts_gate_up_swiglu",
    kernels=("experts_gate_up_swiglu", "experts_down_sum"),
)
@_with_known_experts
def decode_experts(
    op: Any,
    run: Run,
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    source: GraphExperts,
) -> mx.array:
    """Run two launches over the slots: gate, up and SwiGLU, then down and the sum."""
    slots, act = experts_act(op, run, x, indices, source)
    down = source.weights.down
    sizes = (op.dim, *form(down))
    (out,) = run(
        expert_kernels.experts_down_sum(act, slots, weights, down.records, *sizes)
    )
    ops.guard(source, [out])
    return out.reshape(1, -1)


def experts_act(
    op: ops.MoeDecodeExperts,
    run: Run,
    x: mx.array | RowPart,
    indices: mx.array,
    source: GraphExperts,
) -> tuple[mx.array, mx.array]:
    """Return the slots ``[1, K]`` of a token's experts and their activations."""
    slots, experts = source.slots(indices), source.weights
    gate, up = experts.gate.records, experts.up.records
    row, start = (x.row, x.start) if isinstance(x, RowPart) else (x, 0)
    sizes = (op.expert_dim, *form(experts.gate), start, op.dim, op.alpha, op.limit)
    (act,) = run(expert_kernels.experts_gate_up_swiglu(row, slots, gate, up, *sizes))
    return slots, act


@way(
    ops.MoeGatherIdFuse,
    "moe_mm_id",
    kernels=("moe_id_map", "moe_mm_id", "swiglu_fused_batched", "moe_combine_topk"),
)
@_with_known_experts
def gather_experts(
    op: Any,
    run: Run,
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    source: GraphExperts,
) -> mx.array:
    """Run one launch for each projection of all experts."""
    outs = []
    for rows, slots in source.batches(indices):
        outs.append(_gather(op, run, x[rows], indices[rows], slots, source))
        ops.guard(source, outs[-1:])
    mid = outs[0] if len(outs) == 1 else mx.concatenate(outs)
    return run(kernels.moe_combine_topk(mid, weights))[0]


def _gather(
    op: ops.MoeGatherIdFuse,
    run: Run,
    x: mx.array,
    indices: mx.array,
    slots: mx.array,
    source: GraphExperts,
) -> mx.array:
    """Return the experts' rows ``[N, K, D]``."""
    experts, n_rows = source.weights, indices.size
    slot_of = mx.arange(op.n_experts, dtype=mx.uint32)
    if source.resident is None:
        slot_of[indices.reshape(-1)] = slots.reshape(-1)
    counts, lists = run(kernels.moe_id_map(indices, op.n_experts))

    def product(rows: mx.array, weight: Weight, n_out: int) -> mx.array:
        launch = kernels.moe_mm_id(
            rows, weight.records, counts, lists, slot_of, op.k, n_out, *form(weight)
        )
        return run(launch)[0]

    gate = product(x, experts.gate, op.expert_dim)
    up = product(x, experts.up, op.expert_dim)
    opened = (part.reshape(n_rows, op.expert_dim) for part in (gate, up))
    (act,) = run(elementwise.swiglu_fused_batched(*opened, op.alpha, op.limit))
    return product(act, experts.down, op.dim)


def expert_rows(
    op: ops.RoutedExperts, run: Run, rows: mx.array, experts: ExpertWeights, slot: int
) -> mx.array:
    """Apply one expert to rows ``[M, D]``."""
    gate = matmul(run, rows, experts.gate[slot])
    up = matmul(run, rows, experts.up[slot])
    (act,) = run(elementwise.swiglu_fused_batched(gate, up, op.alpha, op.limit))
    return matmul(run, act, experts.down[slot])


def matmul(run: Run, rows: mx.array, weight: Weight) -> mx.array:
    """Multiply rows by a quantised matrix in tiles; add its bias, if any."""
    (out,) = run(quant.qmm_t(rows, *parts(weight), *form(weight)))
    return out if weight.bias is None else out + weight.bias.astype(out.dtype)


# The kernels that ``expert_rows`` launches.
EXPERT_KERNELS = ("qmm_t", "swiglu_fused_batched")


@way(
    ops.MoeBatchedPermuteFuse,
    "qmm_t",
    kernels=(*EXPERT_KERNELS, "moe_combine_topk"),
)
@_with_known_experts
def batched_experts(
    op: Any,
    run: Run,
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    source: GraphExperts,
    out_sum: mx.array,
) -> mx.array:
    """Run expert after expert, then sum each token's rows by increasing expert."""
    order, outs, used = _by_expert(op, run, x, indices, source)
    position, rising = op.rising(order)
    mid = mx.concatenate([outs[expert] for expert in used])[mx.array(position)]
    shares = mx.take_along_axis(weights, mx.array(rising), axis=-1)
    return out_sum + run(kernels.moe_combine_topk(mid, shares))[0]


@way(
    ops.MoeBatchedPermuteFuse,
    "moe_bucket_accumulate",
    kernels=(*EXPERT_KERNELS, "moe_bucket_accumulate"),
)
@_with_known_experts
def bucket_experts(
    op: Any,
    run: Run,
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    source: GraphExperts,
    out_sum: mx.array,
) -> mx.array:
    """Run expert after expert; add the rows of each to the sum in one launch."""
    order, outs, used = _by_expert(op, run, x, indices, source)
    shares = weights.reshape(-1)[mx.array(order)]
    tokens = mx.array((order // op.k).astype(np.uint32))
    start = 0
    for expert in used:
        stop = start + outs[expert].shape[0]
        launch = kernels.moe_bucket_accumulate(
            out_sum, outs[expert], tokens[start:stop], shares[start:stop]
        )
        (out_sum,) = run(launch)
        start = stop
    return out_sum


def _by_expert(
    op: Any, run: Run, x: mx.array, indices: mx.array, source: GraphExperts
) -> tuple[np.ndarray, dict[int, mx.array], list[int]]:
    """Return the order of rows by expert, each one's output, and those used."""
    order, used, ranges = ops.by_expert(np.array(indices).reshape(-1))
    rows, outs = x[mx.array(order // op.k)], {}
    for wave in source.waves(used):
        for expert, slot in wave:
            start, stop = ranges[expert]
            part = rows[start:stop]
            outs[expert] = expert_rows(op, run, part, source.weights, slot)
        ops.guard(source, [outs[expert] for expert, _ in wave])
    return order, outs, used
