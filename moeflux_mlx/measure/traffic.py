"""The bytes that a call of a lowered graph must move, in whatever way it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine.graph.lower import LoweredCall, buffers_read
from ..engine.graph.op import Op
from ..engine.graph.roles import ExpertBaseBuf, KvCacheKBuf, KvCacheVBuf
from ..engine.ops import (
    EmbedGatherNTokens,
    KvCacheAppendNTokens,
    SdpaCausalTiled,
    SdpaLatentCausal,
)
from ..experts.weights import Weight


def moved_bytes(
    step: LoweredCall, inputs: Sequence[Any], outputs: Sequence[Any]
) -> int:
    """Return the bytes that a call reads and writes, each counted once.

    Weights count as stored. Routed experts count K for each token, at most once each.
    Embeddings count the rows looked up, KV caches the rows attended to or appended. All
    other inputs and outputs count in full. Values that pass between fused Ops do not
    count.

    Args:
        step: the call.
        inputs: its kernel's inputs: values of buffers, then weights.
        outputs: its results.
    """
    buffers = buffers_read(step.ops)
    values, weights = inputs[: len(buffers)], inputs[len(buffers) :]
    caches = KvCacheKBuf, KvCacheVBuf
    append = next((op for op in step.ops if isinstance(op, KvCacheAppendNTokens)), None)
    if append is step.ops[0]:
        return 2 * sum(_n_bytes(x) for x in values[:2])
    total = sum(map(_n_bytes, outputs))
    for buf, value in zip(buffers, values, strict=True):
        if buf is None or buf.role is ExpertBaseBuf:
            continue
        share = 1.0
        if append is not None and buf.role in caches:
            # The output is as large as the input, but only a row of it is new.
            new = value.size // value.shape[2] * append.n_tokens // append.n_seqs
            total += new * value.itemsize - _n_bytes(value)
            continue
        if buf.role in caches:
            share = _seen_share(step.ops, inputs, value)
        total += round(share * _n_bytes(value))
    total += sum(_expert_bytes(op) for op in step.ops)
    for name, weight in zip(step.weights, weights, strict=True):
        if name is not None:
            total += round(_used_share(step.ops, name) * weight_bytes(weight))
    return total


def weight_bytes(weight: Weight) -> int:
    """Return the bytes of a weight's arrays."""
    return sum(map(_n_bytes, (weight.w, weight.scales, weight.biases)))


def _n_bytes(value: Any) -> int:
    return int(getattr(value, "nbytes", 0))


def _expert_bytes(op: Op) -> int:
    if not op.n_experts_used:
        return 0
    routed: Any = op
    return int(min(op.n_experts_used, routed.n_experts) * routed.expert_bytes)


def _seen_share(ops: Sequence[Op], inputs: Sequence[Any], cache: Any) -> float:
    """Return the share of a cache's rows that are attended to, without spare rows."""
    kinds = SdpaCausalTiled, SdpaLatentCausal
    attend = next(op for op in ops if isinstance(op, kinds))
    if attend.start is None:
        return 1.0
    start = inputs[buffers_read(ops).index(attend.start)]
    n_seen = int(start.max()) + attend.n_tokens // attend.n_seqs
    return min(1.0, n_seen / cache.shape[2])


def _used_share(ops: Sequence[Op], name: str) -> float:
    """Return the share of a weight that is read; less than 1 for embeddings only."""
    for op in ops:
        if isinstance(op, EmbedGatherNTokens) and op.weight.name == name:
            return min(1.0, op.n_tokens / op.vocab_size)
    return 1.0
