"""Fusions of attention over a compressed cache: all that precedes its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .... import device
from ...graph.rows import RowPart, whole
from ...launch import mla
from ...ops.attention import KvCacheAppendNTokens, RopeNTokens
from ...ops.latent import MlaSplitQKv
from ...ops.norm import RmsNormBf16NTokens
from ..latent import append_latents, compressed
from ..registry import Run, Values, fusion


def _latent_inputs(ops: Sequence[Any]) -> int:
    split, norm, q_rope, k_rope = ops[:4]
    linked = (
        norm.x == split.latent
        and q_rope.x == split.q_pe
        and k_rope.x == split.k_pe
        and norm.out not in (split.q_nope, split.q_pe, split.k_pe)
    )
    alike = all(
        getattr(q_rope, name) == getattr(k_rope, name)
        for name in ("inv_freq", "start", "scale", "head_dim", "rotary_dim", "n_seqs")
    )
    pairs = q_rope.pairs and k_rope.pairs
    whole = q_rope.rotary_dim == q_rope.head_dim == split.rope_dim
    one_each = split.n_tokens == q_rope.n_tokens == q_rope.n_seqs
    return 4 * (linked and alike and pairs and whole and one_each)


@fusion(
    "mla_inputs",
    (MlaSplitQKv, RmsNormBf16NTokens, RopeNTokens, RopeNTokens),
    _latent_inputs,
    takes_parts=True,
)
def latent_inputs(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Split queries and the token's row, norm its latents, and rotate rope parts."""
    split, norm, q_rope, k_rope = ops
    arrays, facts = _given(ops, values)
    q_nope, q_pe, latent, k_pe = run(mla.mla_inputs(*arrays, *facts))
    parts = {split.q_nope: q_nope, norm.out: latent}
    return {**parts, q_rope.x: q_pe, k_rope.x: k_pe}


def _given(
    ops: Sequence[Any], values: Values
) -> tuple[tuple[mx.array, ...], tuple[Any, ...]]:
    """Return the arrays and the other arguments of ``mla_inputs``."""
    split, norm, q_rope, _ = ops
    q, kv, kv_at = values[split.q], values[split.kv], None
    in_rows = isinstance(q, RowPart) and isinstance(kv, RowPart) and q.start == 0
    if in_rows:
        q, kv, kv_at = q.row, kv.row, kv.start
    weight = values[norm.weight.name].w
    placed = weight, values[q_rope.inv_freq], values[q_rope.start]
    facts = split.num_heads, split.nope_dim, norm.eps, q_rope.scale, kv_at
    return (whole(q), whole(kv), *placed), facts


def _inputs_and_append(ops: Sequence[Any]) -> int:
    *placed, append = ops[:5]
    split, norm, _, k_rope = placed
    linked = append.k_src == norm.out and append.v_src == k_rope.x
    one = append.n_tokens == append.n_seqs == split.n_tokens == 1
    widths = append.head_dim, append.value_dim
    alike = widths == (split.latent_dim, split.rope_dim) and compressed(append)
    fits = _latent_inputs(placed) and linked and one and alike and append.of_arrays
    return 5 * bool(fits)


@fusion(
    "mla_inputs_append",
    (MlaSplitQKv, RmsNormBf16NTokens, RopeNTokens, RopeNTokens, KvCacheAppendNTokens),
    _inputs_and_append,
    takes_parts=True,
    # Caches that are too large to be copied.
    kernels=("mla_inputs_append", "mla_inputs", "mla_kv_cache_append"),
)
def latent_inputs_and_append(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Do as ``latent_inputs``, and append the token's row to small caches."""
    *placed, append = ops
    split, norm, q_rope, k_rope = placed
    arrays, facts = _given(placed, values)
    caches, row = [values[append.k_cache], values[append.v_cache]], values[append.row]
    # Kernels copy caches, and a larger one costs more than MLX's update in place.
    small = caches[0].nbytes <= device.COPIED_CACHE_BYTES
    if small and all(cache.dtype == arrays[0].dtype for cache in caches):
        launch = mla.mla_inputs_append(*arrays, *caches, row, *facts)
        q_nope, q_pe, latents, ropes = run(launch)
        heads = {split.q_nope: q_nope, q_rope.x: q_pe}
    else:
        heads = dict(latent_inputs(placed, run, values))
        new = heads.pop(norm.out), heads.pop(k_rope.x)
        latents, ropes = append_latents(append, run, *new, *caches, row)
    return {**heads, append.k_cache: latents, append.v_cache: ropes}
