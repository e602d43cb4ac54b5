"""Bytes that a step must move, however it is performed."""

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
    """Return the bytes a step reads and writes, each once.

    That is: weights as stored; of routed experts at most K for each token and none
    twice; of an embedding the rows looked up; of KV caches the rows seen or appended;
    every other input and output whole. What passes between Ops performed together is
    not counted.

    Args:
        inputs: its kernel's: values of buffers, then weights.
        outputs: its results.
    """
    buffers = buffers_read(step.ops)
    values, weights = inputs[: len(buffers)], inputs[len(buffers) :]
    append = step.ops[0]
    if isinstance(append, KvCacheAppendNTokens):
        return 2 * sum(_n_bytes(x) for x in values[:2])
    total = sum(map(_n_bytes, outputs))
    for buf, value in zip(buffers, values, strict=True):
        if buf is None or buf.role is ExpertBaseBuf:
            continue
        share = 1.0
        if buf.role in (KvCacheKBuf, KvCacheVBuf):
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
    """Return which share of a cache's rows are seen: not the spare ones."""
    kinds = SdpaCausalTiled, SdpaLatentCausal
    attend = next(op for op in ops if isinstance(op, kinds))
    if attend.start is None:
        return 1.0
    start = inputs[buffers_read(ops).index(attend.start)]
    n_seen = int(start.max()) + attend.n_tokens // attend.n_seqs
    return min(1.0, n_seen / cache.shape[2])


def _used_share(ops: Sequence[Op], name: str) -> float:
    """Return which share of a weight is read: of an embedding, the rows looked up."""
    for op in ops:
        if isinstance(op, EmbedGatherNTokens) and op.weight.name == name:
            return min(1.0, op.n_tokens / op.vocab_size)
    return 1.0
