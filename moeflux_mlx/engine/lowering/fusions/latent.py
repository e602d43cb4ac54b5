"""Fusions of attention over a compressed cache: all that precedes its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...graph.rows import RowPart, whole
from ...launch import mla
from ...ops.attention import RopeNTokens
from ...ops.latent import MlaSplitQKv
from ...ops.norm import RmsNormBf16NTokens
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
    q, kv, kv_at = values[split.q], values[split.kv], None
    in_rows = isinstance(q, RowPart) and isinstance(kv, RowPart) and q.start == 0
    if in_rows:
        q, kv, kv_at = q.row, kv.row, kv.start
    launch = mla.mla_inputs(
        whole(q),
        whole(kv),
        values[norm.weight.name].w,
        values[q_rope.inv_freq],
        values[q_rope.start],
        split.num_heads,
        split.nope_dim,
        norm.eps,
        q_rope.scale,
        kv_at,
    )
    q_nope, q_pe, latent, k_pe = run(launch)
    parts = {split.q_nope: q_nope, norm.out: latent}
    return {**parts, q_rope.x: q_pe, k_rope.x: k_pe}
