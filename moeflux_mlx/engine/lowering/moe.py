"""Ways of routing and of the experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...experts.compute.rank_experts import RankExperts
from ...experts.compute.source import filled
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


def noaux_fits(op: ops.MoeNoauxTopK) -> bool:
    fits = op.n_experts <= kernels.MAX_EXPERTS and op.k <= kernels.MAX_K
    pairs = op.n_group == 1 or op.n_experts > op.n_group
    return fits and pairs and kernels.SIMD % op.n_group == 0


@way(ops.MoeNoauxTopK, "moe_noaux_topk", noaux_fits)
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


def knows(form: Quantization | None) -> bool:
    """Return whether our kernels know a quantisation of experts."""
    return kernel_form(form) or form in FLOATS


def all_known(experts: ExpertWeights) -> bool:
    """Return whether our kernels know the experts' quantisation."""
    gate, up, down = experts.gate, experts.up, experts.down
    if not all(knows(w.quantization) for w in (gate, up, down)):
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


def _own_alone(op: ops.RoutedExperts) -> bool:
    return not op.shared


def _of_all_ranks(op: ops.RoutedExperts) -> bool:
    return op.shared


@way(
    ops.MoeDecodeExperts,
    "experts_gate_up_swiglu",
    _own_alone,
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
    slots = source.slots(indices)
    return slots, act_in_slots(op, run, x, slots, source.weights)


def act_in_slots(
    op: ops.MoeDecodeExperts,
    run: Run,
    x: mx.array | RowPart,
    slots: mx.array,
    experts: ExpertWeights,
) -> mx.array:
    """Return the activations ``[K, F]`` of a token in the experts' slots."""
    gate, up = experts.gate.records, experts.up.records
    row, start = (x.row, x.start) if isinstance(x, RowPart) else (x, 0)
    sizes = (op.expert_dim, *form(experts.gate), start, op.dim, op.alpha, op.limit)
    (act,) = run(expert_kernels.experts_gate_up_swiglu(row, slots, gate, up, *sizes))
    return act


@way(
    ops.MoeDecodeExperts,
    "experts_down_rows",
    _of_all_ranks,
    kernels=("experts_gate_up_swiglu", "experts_down_rows", "moe_combine_topk"),
)
@_with_known_experts
def decode_of_all_ranks(
    op: Any,
    run: Run,
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    source: RankExperts,
) -> mx.array:
    """Run the experts' halves as ``decode_experts``, but exchange rows, then sum."""
    experts = source.weights

    def make(x: mx.array, _: Any, ids: mx.array, slots: mx.array) -> mx.array:
        # Always K slots, so that one compiled kernel serves any number of own experts.
        n = slots.size
        every = slots if n == op.k else slots[filled(n, op.k)]
        act = act_in_slots(op, run, x, every, experts)
        sizes = (op.dim, *form(experts.down))
        launch = expert_kernels.experts_down_rows(
            act, every, experts.down.records, *sizes
        )
        return run(launch)[0][:n]

    mid = source.by_slot(x, indices, make)
    return run(kernels.moe_combine_topk(mid, weights))[0]


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
    if op.shared:
        mid = _gather_of_all_ranks(op, run, x, indices, source)
    else:
        mid = op.rows_in_portions(x, indices, source, partial(_gather, op, run))
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
    slot_of = mx.arange(op.n_experts, dtype=mx.uint32)
    if source.resident is None:
        slot_of[indices.reshape(-1)] = slots.reshape(-1)
    return _gathered(op, run, x, indices, slot_of, source.weights)


def _gathered(
    op: ops.MoeGatherIdFuse,
    run: Run,
    x: mx.array,
    indices: mx.array,
    slot_of: mx.array,
    experts: ExpertWeights,
) -> mx.array:
    """Return the rows ``[N, K, D]`` of experts in the slots ``[E]`` of their ids."""
    n_rows, k = indices.size, indices.shape[1]
    counts, lists = run(kernels.moe_id_map(indices, slot_of.size))

    def product(rows: mx.array, weight: Weight, n_out: int) -> mx.array:
        launch = kernels.moe_mm_id(
            rows, weight.records, counts, lists, slot_of, k, n_out, *form(weight)
        )
        return run(launch)[0]

    gate = product(x, experts.gate, op.expert_dim)
    up = product(x, experts.up, op.expert_dim)
    opened = (part.reshape(n_rows, op.expert_dim) for part in (gate, up))
    (act,) = run(elementwise.swiglu_fused_batched(*opened, op.alpha, op.limit))
    return product(act, experts.down, op.dim)


def _gather_of_all_ranks(
    op: ops.MoeGatherIdFuse,
    run: Run,
    x: mx.array,
    indices: mx.array,
    source: GraphExperts,
) -> mx.array:
    """Return the rows ``[N, K, D]`` of the experts of all ranks."""
    assert isinstance(source, RankExperts)
    experts, n_own = source.weights, len(source.own)

    def make(x: mx.array, tokens: Any, ids: mx.array, slots: mx.array) -> mx.array:
        slot_of = mx.arange(n_own, dtype=mx.uint32)
        slot_of[ids] = slots
        rows, one_each = x[mx.array(tokens)], ids.astype(mx.int32)[:, None]
        return _gathered(op, run, rows, one_each, slot_of, experts)[:, 0]

    found: mx.array = source.by_slot(x, indices, make)
    return found


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
    order, used, ranges = ops.by_expert(np.array(indices).reshape(-1))
    position, rising = op.rising(order)

    def make(x: mx.array, tokens: Any, *chosen: Any) -> mx.array:
        return mx.concatenate([*_by_expert(op, run, x, tokens, *chosen)])

    if op.shared:
        rows = op.by_expert_of_all_ranks(x, indices, source, make)
        position = order[position]
    else:
        rows = make(x, order // op.k, used, ranges, source)
    shares = mx.take_along_axis(weights, mx.array(rising), axis=-1)
    mid = rows[mx.array(position)]
    return out_sum + run(kernels.moe_combine_topk(mid, shares))[0]


@way(
    ops.MoeBatchedPermuteFuse,
    "moe_bucket_accumulate",
    _own_alone,
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
    order, used, ranges = ops.by_expert(np.array(indices).reshape(-1))
    outs = _by_expert(op, run, x, order // op.k, used, ranges, source)
    shares = weights.reshape(-1)[mx.array(order)]
    tokens = mx.array((order // op.k).astype(np.uint32))
    start = 0
    for out in outs:
        stop = start + out.shape[0]
        launch = kernels.moe_bucket_accumulate(
            out_sum, out, tokens[start:stop], shares[start:stop]
        )
        (out_sum,) = run(launch)
        start = stop
    return out_sum


def _by_expert(
    op: Any,
    run: Run,
    x: mx.array,
    tokens: np.ndarray,
    used: list[int],
    ranges: ops.Ranges,
    source: GraphExperts,
) -> list[mx.array]:
    """Return the rows of ``tokens`` through each expert in ``used``, in order."""
    rows, outs = x[mx.array(tokens)], {}
    for wave in source.waves(used):
        for expert, slot in wave:
            start, stop = ranges[expert]
            part = rows[start:stop]
            outs[expert] = expert_rows(op, run, part, source.weights, slot)
        ops.guard(source, [outs[expert] for expert, _ in wave])
    return [outs[expert] for expert in used]
