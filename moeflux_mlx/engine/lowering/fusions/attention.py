"""Fusions of attention: its queries and keys, and its output under a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .... import device
from ...graph.rows import RowPart, whole
from ...launch import attention
from ...ops.attention import KvCacheAppendNTokens, RopeNTokens, SdpaCausalTiled
from ...ops.elementwise import SigmoidGateNTokens, SplitQGate
from ...ops.norm import RmsNormBf16NTokens, RmsNormPerHeadNTokens
from ..attention import SPARE_KERNELS, attend_spare, kv_cache_append, takes_spare
from ..registry import Run, Values, fusion

PLACED_HEADS = (
    RmsNormPerHeadNTokens,
    RopeNTokens,
    RmsNormPerHeadNTokens,
    RopeNTokens,
)
# The same with norms over the rows of all heads.
PLACED_ROWS = RmsNormBf16NTokens, RopeNTokens, RmsNormBf16NTokens, RopeNTokens


def _places_heads(ops: Sequence[Any]) -> bool:
    """Return whether norms and rotations belong to one token's queries and keys."""
    q_norm, q_rope, k_norm, k_rope = ops[:4]
    linked = (
        _normed(q_norm) == q_rope.x
        and _normed(k_norm) == k_rope.x
        and q_rope.inv_freq == k_rope.inv_freq
        and q_rope.start == k_rope.start
        and q_rope.scale == k_rope.scale == 1.0
        and not q_rope.pairs
        and not k_rope.pairs
        and q_norm.eps == k_norm.eps
    )
    one_each = q_rope.n_tokens == q_rope.n_seqs
    narrow = q_rope.head_dim == k_rope.head_dim <= attention.MAX_HEAD_DIM
    return linked and one_each and narrow


def _normed(norm: Any) -> Any:
    """Return the buffer of a norm's result; norms of heads are in place."""
    return norm.out if isinstance(norm, RmsNormBf16NTokens) else norm.x


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
@fusion("attention_inputs_ungated", PLACED_ROWS, _ungated_inputs)
def ungated_attention_inputs(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Normalise and rotate queries and keys."""
    given = _placing(ops, ops[0].x, values)
    d = ops[1].head_dim
    q, k = run(attention.attention_inputs_ungated(*given, head_dim=d))
    return {ops[1].x: q, ops[3].x: k}


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


def _appends(ops: Sequence[Any], n_placed: int) -> int:
    """Count Ops that place one token's heads, and the append of its key and value."""
    append, q_rope = ops[n_placed], ops[n_placed // 2 - 1]
    linked = append.of_arrays and append.k_src == ops[n_placed - 1].x
    one = append.n_tokens == append.n_seqs == q_rope.n_seqs == 1
    width = append.head_dim == q_rope.head_dim and not append.value_dim
    return n_placed + 1 if linked and one and width else 0


def _inputs_and_append(ops: Sequence[Any]) -> int:
    return _ungated_inputs(ops) and _appends(ops, 4)


def _turned_and_append(ops: Sequence[Any]) -> int:
    return _turned_heads(ops) and _appends(ops, 2)


def _place_and_append(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Place a token's heads and append its key and value to small caches."""
    *placed, append = ops
    n_each = len(placed) // 2
    q_rope, k_rope = placed[n_each - 1], placed[-1]
    parts = [values[buf] for buf in (placed[0].x, placed[n_each].x, append.v_src)]
    caches = [values[append.k_cache], values[append.v_cache]]
    in_row = all(isinstance(part, RowPart) for part in parts)
    in_row = in_row and len({id(part.row) for part in parts}) == 1
    # Kernels copy caches, and a larger one costs more than MLX's update in place.
    small = caches[0].nbytes <= device.COPIED_CACHE_BYTES
    if not in_row or not small or any(c.dtype != parts[0].row.dtype for c in caches):
        held = {key: whole(value) for key, value in values.items()}
        place = turned_heads if len(placed) == 2 else ungated_attention_inputs
        heads = place(placed, run, held)
        names = append.v_src, append.k_cache, append.v_cache, append.row
        given = heads[k_rope.x], *(held[name] for name in names)
        keys, rows = kv_cache_append(append, run, *given)
        return {**heads, append.k_cache: keys, append.v_cache: rows}
    norms, eps = (None, None), 0.0
    if len(placed) == 4:
        q_weight, k_weight = (values[norm.weight.name].w for norm in placed[::2])
        norms, eps = (q_weight, k_weight.astype(q_weight.dtype)), placed[0].eps
    launch = attention.attention_inputs_append(
        parts[0].row,
        *norms,
        values[q_rope.inv_freq],
        values[q_rope.start],
        *caches,
        values[append.row],
        q_rope.num_heads,
        tuple(part.start for part in parts),
        eps,
        q_rope.scale,
    )
    q, keys, rows = run(launch)
    return {q_rope.x: q, append.k_cache: keys, append.v_cache: rows}


for types, takes in (
    ((*PLACED_HEADS, KvCacheAppendNTokens), _inputs_and_append),
    ((*PLACED_ROWS, KvCacheAppendNTokens), _inputs_and_append),
    ((RopeNTokens, RopeNTokens, KvCacheAppendNTokens), _turned_and_append),
):
    fusion(
        "attention_inputs_append",
        types,
        takes,
        takes_parts=True,
        # Caches that are too large to be copied, and rows in several arrays.
        kernels=(
            "attention_inputs_append",
            "attention_inputs_ungated",
            "kv_cache_append_n_tokens",
        ),
    )(_place_and_append)


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
