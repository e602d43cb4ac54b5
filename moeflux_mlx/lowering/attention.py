"""Ways of rotary positions, the KV cache and attention."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..launch import attention as kernels
from ..ops import attention as ops
from .table import Run, way


@way(ops.RopeNTokens, "rope_n_tokens")
def rope(
    op: Any, run: Run, x: mx.array, inv_freq: mx.array, start: mx.array
) -> mx.array:
    return run(kernels.rope_n_tokens(x, inv_freq, start, op.num_heads))[0]


@way(ops.KvCacheAppendNTokens, "kv_cache_append_n_tokens")
def kv_cache_append(_op: Any, run: Run, *values: mx.array) -> tuple[mx.array, ...]:
    return run(kernels.kv_cache_append_n_tokens(*values))


def _width_fits(op: ops.SdpaCausalTiled) -> bool:
    d = op.head_dim
    return d % kernels.SIMD == 0 and d <= kernels.MAX_HEAD_DIM


def _one_token(op: ops.SdpaCausalTiled) -> bool:
    return _width_fits(op) and op.n_tokens == op.n_seqs


@way(ops.SdpaCausalTiled, "sdpa_decode", _one_token)
def sdpa_decode(
    op: Any, run: Run, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None
) -> mx.array:
    """One token: the rows of the cache are parted between simdgroups."""
    return run(kernels.sdpa_decode(q, k, v, op.softmax_scale, mask))[0]


# A lane holds its share of the queries and of the sums in fold * d / 16 registers; more
# than 64 of them would spill.
FOLDED_CHANNELS = 1024


def _direct(fold: int) -> None:
    """Add the way that folds ``fold`` query heads of one key head."""
    kernel = kernels.FOLDED[fold]

    def folds(op: ops.SdpaCausalTiled) -> bool:
        few = fold * op.head_dim <= FOLDED_CHANNELS
        return few and _width_fits(op) and op.heads_per_kv % fold == 0

    @way(ops.SdpaCausalTiled, kernel.name, folds)
    def sdpa(
        op: Any, run: Run, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None
    ) -> mx.array:
        return run(kernel(q, k, v, op.softmax_scale, mask))[0]


for fold in kernels.FOLDS:
    _direct(fold)


@way(ops.SdpaCausalTiled, "sdpa_causal_staged", _width_fits)
def sdpa_staged(
    op: Any, run: Run, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None
) -> mx.array:
    return run(kernels.sdpa_causal_staged(q, k, v, op.softmax_scale, mask))[0]


@way(
    ops.SdpaCausalTiled,
    "attn_scores_batched",
    lambda op: _one_token(op) and op.mask is None,
)
def sdpa_three_passes(
    op: Any, run: Run, q: mx.array, k: mx.array, v: mx.array, _mask: None
) -> mx.array:
    (scores,) = run(kernels.attn_scores_batched(q, k, op.softmax_scale))
    rows = scores.reshape(-1, scores.shape[-1])
    (p,) = run(kernels.attn_softmax_batched(rows))
    return run(kernels.attn_values_batched(p.reshape(scores.shape), v, q.dtype))[0]
