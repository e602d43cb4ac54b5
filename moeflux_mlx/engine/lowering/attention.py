"""Ways of rotary positions, the KV cache and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ... import device
from ...experts.weights import Weight
from ..launch import Kernel
from ..launch import attention as kernels
from ..ops import attention as ops
from .registry import Run, way


@way(ops.RopeNTokens, "rope_n_tokens", lambda op: not op.pairs)
def rope(
    op: Any, run: Run, x: mx.array, inv_freq: mx.array, start: mx.array
) -> mx.array:
    return run(kernels.rope_n_tokens(x, inv_freq, start, op.num_heads, op.scale))[0]


def _of_one_width(op: ops.KvCacheAppendNTokens) -> bool:
    return not op.value_dim


@way(ops.KvCacheAppendNTokens, "kv_cache_append_n_tokens", _of_one_width)
def kv_cache_append(op: Any, run: Run, *values: mx.array) -> tuple[mx.array, ...]:
    if values[2].nbytes > device.COPIED_CACHE_BYTES:
        return op.reference(*values)
    return run(kernels.kv_cache_append_n_tokens(*values))


def _known_width(op: ops.SdpaCausalTiled) -> bool:
    d = op.head_dim
    return d % kernels.SIMD == 0 and d <= kernels.MAX_HEAD_DIM


def takes_spare(op: ops.SdpaCausalTiled) -> bool:
    """Return whether kernels can attend over a cache with spare rows."""
    one_each = op.n_tokens == op.n_seqs
    return op.start is not None and one_each and _known_width(op)


def attend_spare(
    run: Run,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    start: mx.array,
    scale: float,
    gate: mx.array | None = None,
    sinks: Weight | None = None,
) -> mx.array:
    """Attend over splits of a cache with spare rows, join them, and gate the result."""
    sums, stats = run(kernels.sdpa_decode_parts(q, k, v, start, scale))
    scores = None if sinks is None else sinks.w.astype(q.dtype)
    return run(kernels.sdpa_decode_join(sums, stats, q.dtype, gate, scores))[0]


# The kernels that ``attend_spare`` launches.
SPARE_KERNELS = ("sdpa_decode_parts", "sdpa_decode_join")


@way(ops.SdpaCausalTiled, "sdpa_decode_parts", takes_spare, SPARE_KERNELS)
def sdpa_parts(
    op: Any, run: Run, q: mx.array, k: mx.array, v: mx.array, *rest: Any
) -> mx.array:
    """Attend for one token; launches do not depend on the number of rows in use."""
    _, start, sinks = rest
    return attend_spare(run, q, k, v, start, op.softmax_scale, sinks=sinks)


def _width_fits(op: ops.SdpaCausalTiled) -> bool:
    # Only the kernel that joins splits takes sinks.
    return op.start is None and op.sinks is None and _known_width(op)


def _one_token(op: ops.SdpaCausalTiled) -> bool:
    return _width_fits(op) and op.n_tokens == op.n_seqs


def _one_launch(kernel: Kernel, fits: Callable[[Any], bool]) -> None:
    """Add a way of one launch over the whole cache."""

    @way(ops.SdpaCausalTiled, kernel.name, fits)
    def attend(
        op: Any,
        run: Run,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        mask: mx.array | None,
        *_: None,
    ) -> mx.array:
        return run(kernel(q, k, v, op.softmax_scale, mask))[0]


def _folds(fold: int) -> Callable[[Any], bool]:
    """Return a test whether ``fold`` query heads of a key head fit one simdgroup."""

    def fits(op: ops.SdpaCausalTiled) -> bool:
        few = fold * op.head_dim <= kernels.FOLDED_CHANNELS
        return few and _width_fits(op) and op.heads_per_kv % fold == 0

    return fits


_one_launch(kernels.sdpa_decode, _one_token)
for fold in kernels.FOLDS:
    _one_launch(kernels.FOLDED[fold], _folds(fold))
_one_launch(kernels.sdpa_causal_staged, _width_fits)


@way(
    ops.SdpaCausalTiled,
    "attn_scores_batched",
    lambda op: _one_token(op) and op.mask is None,
    ("attn_scores_batched", "attn_softmax_batched", "attn_values_batched"),
)
def sdpa_three_passes(
    op: Any, run: Run, q: mx.array, k: mx.array, v: mx.array, *_: None
) -> mx.array:
    (scores,) = run(kernels.attn_scores_batched(q, k, op.softmax_scale))
    rows = scores.reshape(-1, scores.shape[-1])
    (p,) = run(kernels.attn_softmax_batched(rows))
    return run(kernels.attn_values_batched(p.reshape(scores.shape), v, q.dtype))[0]
