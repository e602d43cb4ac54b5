"""Launches of ``kernels/attention.metal``.

Letters: N = B sequences x T tokens, H query heads, Hkv key heads, d head width, S rows
in the cache. Caches are ``[B, Hkv, S, d]``; MLX copies a slice of a longer one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ... import device
from ...device import SIMD
from ..ops.attention import join_heads, split_heads
from ..ops.elementwise import split_q_gate
from ..ops.functions import attention, rope, to_host
from ..ops.norm import rms_norm_heads
from .base import (
    Case,
    Given,
    Kernel,
    Launch,
    ceil_div,
    dims,
    expect,
    kernel,
    normal,
    require,
    require_part,
)

MAX_HEAD_DIM = 256
FLOAT32 = mx.float32
FOLDS = (8, 4, 2, 1)
# Most channels of the heads that a simdgroup takes together: for prompts and splits of
# a cache, and for a whole cache. A lane needs fold * d / 16 registers for its share of
# queries and sums. On Metal more than 32 leave a core with one threadgroup.
FOLDED_CHANNELS, DECODE_CHANNELS = (
    (1024, 2048) if device.has_many_registers() else (512, 512)
)


def _rope(given: Given) -> mx.array:
    # On the host, because MLX's takes reciprocals of the frequencies, which round
    # twice.
    x, inv_freq, start = map(to_host, (given.wide.x, given.inv_freq, given.start))
    heads = split_heads(x, start.size, given.num_heads)
    turned = rope(heads, 2 * inv_freq.size, inv_freq, start, given.scale)
    return mx.array(join_heads(turned)).astype(given.x.dtype)


def _some_rope(case: Case) -> tuple[Any, ...]:
    exponents = np.arange(case.pairs) / case.pairs
    inv_freq = mx.array((100.0**-exponents).astype(np.float32))
    start = mx.array((case.at + np.arange(case.b) * 3).astype(np.int32))
    x = case.normal(case.b * case.t, case.h * case.d)
    return x, inv_freq, start, case.h, case.get("scale", 1.0)


@kernel(
    reference=_rope,
    sample=_some_rope,
    sizes=[
        dict(b=1, t=1, h=1, d=2, pairs=1, at=0),
        dict(b=2, t=3, h=3, d=37, pairs=9, at=5),
        dict(b=1, t=5, h=2, d=64, pairs=32, at=1000),
        dict(b=9, t=1, h=1, d=96, pairs=16, at=70),
        dict(b=2, t=2, h=2, d=10, pairs=3, at=7, scale=1.25),
    ],
    large=dict(b=1, t=2048, h=32, d=128, pairs=64, at=0),
    varying=("n_tokens",),
)
def rope_n_tokens(
    x: mx.array,
    inv_freq: mx.array,
    start: mx.array,
    num_heads: int,
    scale: float = 1.0,
) -> Launch:
    """Rotate the first channels of each head of ``[N, H * d]``, pairing their halves.

    ``inv_freq`` is float32 ``[rotary / 2]``, ``start`` int32 ``[B]``. ``scale``
    multiplies the rotated channels.
    """
    n, width = dims("x", x, 2)
    (pairs,) = dims("inv_freq", inv_freq, 1)
    (n_seqs,) = dims("start", start, 1)
    require("start", n % n_seqs == 0, f"a divisor of {n} rows", n_seqs)
    divides = isinstance(num_heads, int) and num_heads > 0 and width % num_heads == 0
    require("num_heads", divides, f"a divisor of {width}", num_heads)
    d = width // num_heads
    require("inv_freq", 2 * pairs <= d, f"at most {d // 2} pairs", pairs)
    return Launch(
        "rope_n_tokens",
        {
            "x": x,
            "inv_freq": inv_freq,
            "start": start,
            "n_tokens": n // n_seqs,
            "n_heads": num_heads,
            "head_dim": d,
            "n_pairs": pairs,
            "scale": scale,
        },
        {"out": (n, width)},
        (32 * ceil_div(d - pairs, 32), num_heads, n),
        (32, 1, 1),
    )


# Not the Op's function: the kernel drops rows outside the cache, the Op refuses them.
def _append(given: Given) -> tuple[mx.array, mx.array]:
    n_seqs, heads, n_rows, d = given.k_cache.shape
    t, first = given.keys.shape[0] // n_seqs, int(np.array(given.row)[0])

    def updated(cache: mx.array, new: mx.array) -> mx.array:
        rows = new.reshape(n_seqs, t, heads, d).swapaxes(1, 2).astype(cache.dtype)
        parts = [
            rows[:, :, i - first] if 0 <= i - first < t else cache[:, :, i]
            for i in range(n_rows)
        ]
        return mx.stack(parts, axis=2)

    return updated(given.k_cache, given.keys), updated(given.v_cache, given.values)


def _some_append(case: Case) -> tuple[Any, ...]:
    rows = [case.normal(case.b * case.t, case.h * case.d) for _ in range(2)]
    caches = [case.normal(case.b, case.h, case.s, case.d) for _ in range(2)]
    return *rows, *caches, mx.array([case.row], mx.int32)


@kernel(
    reference=_append,
    sample=_some_append,
    sizes=[
        dict(b=1, t=1, h=1, s=1, d=2, row=0),
        dict(b=2, t=3, h=2, s=7, d=37, row=2),
        dict(b=1, t=5, h=3, s=9, d=64, row=6),
        dict(b=2, t=2, h=1, s=5, d=96, row=-1),
    ],
    large=dict(b=1, t=64, h=8, s=8192, d=128, row=100),
    varying=("n_tokens", "n_rows"),
)
def kv_cache_append_n_tokens(
    keys: mx.array,
    values: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    row: mx.array,
) -> Launch:
    """Both caches with new rows ``[N, Hkv * d]`` from ``row`` (int32 ``[1]``) on."""
    n_seqs, heads, n_rows, d = dims("k_cache", k_cache, 4)
    expect("v_cache", v_cache, k_cache.shape)
    n, _ = dims("keys", keys, 2)
    require("keys", n % n_seqs == 0, f"rows of {n_seqs} sequences", n)
    expect("keys", keys, (n, heads * d))
    expect("values", values, (n, heads * d))
    expect("row", row, (1,))
    return Launch(
        "kv_cache_append_n_tokens",
        {
            "keys": keys,
            "values": values,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "row": row,
            "n_tokens": n // n_seqs,
            "n_kv_heads": heads,
            "n_rows": n_rows,
            "head_dim": d,
        },
        dict.fromkeys(("k_out", "v_out"), (n_seqs, heads, n_rows, d)),
        (32 * ceil_div(d, 128), n_rows, n_seqs * heads),
        (32, 1, 1),
    )


def _check_cache(name: str, cache: mx.array) -> tuple[int, int, int, int]:
    """Return B, Hkv, S and d of a cache; a simdgroup must be able to share d."""
    n_seqs, heads, n_rows, d = dims(name, cache, 4)
    known = d % SIMD == 0 and d <= MAX_HEAD_DIM
    require(name, known, f"d a multiple of {SIMD}, at most {MAX_HEAD_DIM}", d)
    return n_seqs, heads, n_rows, d


def _heads(q: mx.array, kv_heads: int, d: int) -> tuple[int, int, int]:
    """Return N, H and the heads per key head of queries ``[N, H * d]``."""
    n, width = dims("q", q, 2)
    fits = width % (kv_heads * d) == 0
    require("q", fits, f"a multiple of {kv_heads * d} columns", width)
    return n, width // d, width // d // kv_heads


def _scores(given: Given) -> mx.array:
    n_seqs, kv_heads, n_rows, d = given.k.shape
    queries = given.q.astype(FLOAT32).reshape(n_seqs, kv_heads, -1, d) * given.scale
    scores = queries @ given.k.astype(FLOAT32).swapaxes(-1, -2)
    return scores.reshape(n_seqs, -1, n_rows)


def _some_scores(case: Case) -> tuple[Any, ...]:
    q = case.normal(case.b, case.h * case.per * case.d)
    return q, case.normal(case.b, case.h, case.s, case.d), case.d**-0.5


DECODE_SIZES = [
    dict(b=1, h=1, per=1, s=1, d=32),
    dict(b=2, h=2, per=3, s=11, d=64),
    dict(b=1, h=1, per=8, s=37, d=96),
    dict(b=1, h=1, per=2, s=9, d=256),
]
DECODE_LARGE = dict(b=1, h=2, per=8, s=32768, d=256)


@kernel(
    reference=_scores,
    sample=_some_scores,
    sizes=DECODE_SIZES,
    large=DECODE_LARGE,
    varying=("n_rows",),
)
def attn_scores_batched(q: mx.array, k: mx.array, scale: float) -> Launch:
    """Scores float32 ``[B, H, S]`` of one query per sequence, ``q`` ``[B, H * d]``."""
    n_seqs, kv_heads, n_rows, d = _check_cache("k", k)
    n, heads, per = _heads(q, kv_heads, d)
    require("q", n == n_seqs, f"{n_seqs} rows", n)
    return Launch(
        "attn_scores_batched",
        {
            "q": q,
            "k": k,
            "scale": scale,
            "n_heads": heads,
            "heads_per_kv": per,
            "n_rows": n_rows,
        },
        {"scores": (n_seqs, heads, n_rows)},
        (SIMD, 8 * ceil_div(n_rows, 8), n_seqs * kv_heads),
        (SIMD, 8, 1),
        {"D": d},
    )


def _softmax(given: Given) -> mx.array:
    return mx.softmax(given.scores, axis=-1, precise=True)


def _some_softmax(case: Case) -> tuple[Any, ...]:
    return (case.normal(case.r, case.s, scale=5.0),)


@kernel(
    reference=_softmax,
    sample=_some_softmax,
    sizes=[dict(r=1, s=1), dict(r=3, s=37), dict(r=2, s=300), dict(r=5, s=256)],
    large=dict(r=64, s=32768),
    varying=("n_rows",),
    dtypes=(FLOAT32,),
)
def attn_softmax_batched(scores: mx.array) -> Launch:
    """Softmax of each row, float32 ``[R, S]``."""
    rows, n_rows = dims("scores", scores, 2)
    return Launch(
        "attn_softmax_batched",
        {"scores": scores, "n_rows": n_rows},
        {"out": (rows, n_rows)},
        (256 * rows, 1, 1),
        (256, 1, 1),
    )


def _values(given: Given) -> mx.array:
    n_seqs, kv_heads, n_rows, _ = given.v.shape
    weights = given.p.reshape(n_seqs, kv_heads, -1, n_rows)
    return (weights @ given.v.astype(FLOAT32)).reshape(n_seqs, -1).astype(given.dtype)


def _some_values(case: Case) -> tuple[Any, ...]:
    heads = case.h * case.per
    scores = normal(case.rng, FLOAT32, case.b, heads, case.s, scale=2.0)
    v = case.normal(case.b, case.h, case.s, case.d)
    return mx.softmax(scores, axis=-1), v, case.dtype


@kernel(
    reference=_values,
    sample=_some_values,
    sizes=DECODE_SIZES,
    large=DECODE_LARGE,
    varying=("n_rows",),
)
def attn_values_batched(p: mx.array, v: mx.array, dtype: mx.Dtype) -> Launch:
    """Values weighted by ``p`` float32 ``[B, H, S]``: ``[B, H * d]`` in ``dtype``."""
    n_seqs, kv_heads, n_rows, d = _check_cache("v", v)
    _, heads, _ = dims("p", p, 3)
    require("p", heads % kv_heads == 0, f"a multiple of {kv_heads} heads", heads)
    expect("p", p, (n_seqs, heads, n_rows))
    return Launch(
        "attn_values_batched",
        {
            "p": p,
            "v": v,
            "n_heads": heads,
            "heads_per_kv": heads // kv_heads,
            "n_rows": n_rows,
        },
        {"out": (n_seqs, heads * d)},
        (256 * n_seqs * heads, 1, 1),
        (256, 1, 1),
        {"D": d},
        {"T": dtype},
    )


def _attention(given: Given) -> mx.array:
    n_seqs, _, _, d = given.k.shape
    q, k, v = map(to_host, (given.wide.q, given.wide.k, given.wide.v))
    mask = None if given.mask is None else np.array(given.mask)
    heads = split_heads(q, n_seqs, q.shape[1] // d)
    out = attention(heads, k, v, given.scale, mask)
    if mask is not None:
        # Kernels return 0 for a query that sees nothing; Ops leave its result open.
        out = np.where(mask.any(-1, keepdims=True), out, 0)
    return mx.array(join_heads(out)).astype(given.q.dtype)


def _some_attention(case: Case) -> tuple[Any, ...]:
    q = case.normal(case.b * case.t, case.h * case.per * case.d, scale=2.0)
    k, v = (case.normal(case.b, case.h, case.s, case.d) for _ in range(2))
    mask, n_masks = None, case.get("masks")
    if n_masks:
        seen = case.rng.random((n_masks, 1, case.t, case.s)) < 0.6
        seen[0, 0, -1] = False
        mask = mx.array(seen)
    return q, k, v, case.d**-0.5, mask


def _check_attention(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None, fold: int
) -> tuple[dict[str, Any], tuple[int, int, int], dict[str, int]]:
    """Check arguments; return the inputs without scale, (B, T, H) and the template."""
    n_seqs, kv_heads, n_rows, d = _check_cache("k", k)
    expect("v", v, k.shape)
    n, heads, per = _heads(q, kv_heads, d)
    require("q", n % n_seqs == 0, f"rows of {n_seqs} sequences", n)
    require("q", per % fold == 0, f"heads per key head a multiple of {fold}", per)
    t = n // n_seqs
    require("k", n_rows >= t, f"at least {t} rows", n_rows)
    n_masks = 0
    if mask is not None:
        n_masks = dims("mask", mask, 4)[0]
        require("mask", n_masks in (1, n_seqs), f"1 or {n_seqs} masks", n_masks)
        expect("mask", mask, (n_masks, 1, t, n_rows))
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "mask": mask,
        "n_heads": heads,
        "heads_per_kv": per,
        "n_rows": n_rows,
        "n_masks": n_masks,
    }
    template = {"D": d, "HAS_MASK": int(mask is not None)}
    return inputs, (n_seqs, t, heads), template


PREFILL_SIZES = [
    dict(b=1, t=1, h=1, per=1, s=1, d=32),
    dict(b=2, t=5, h=1, per=2, s=11, d=64, masks=1),
    dict(b=1, t=3, h=2, per=1, s=9, d=96),
    dict(b=2, t=9, h=1, per=1, s=17, d=256, masks=2),
]
PREFILL_LARGE = dict(b=1, t=512, h=2, per=8, s=2048, d=128)


def _folded(fold: int, *more: dict[str, int]) -> Any:
    """Return the decorator that registers the direct form for ``fold`` heads."""
    sizes = [{**size, "per": size["per"] * fold} for size in PREFILL_SIZES] + [*more]
    return kernel(
        reference=_attention,
        sample=_some_attention,
        sizes=sizes if fold < 8 else sizes[:3],
        large=PREFILL_LARGE,
        varying=("n_tokens", "n_rows", "n_masks"),
    )


def _direct(
    name: str,
    fold: int,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: mx.array | None,
) -> Launch:
    inputs, (n_seqs, t, heads), template = _check_attention(q, k, v, mask, fold)
    return Launch(
        name,
        {**inputs, "scale": scale, "n_tokens": t},
        {"out": tuple(q.shape)},
        (SIMD, 4 * ceil_div(t, 4), n_seqs * heads // fold),
        (SIMD, 4, 1),
        template,
    )


@_folded(1)
def sdpa_causal_direct(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> Launch:
    """Causal attention of ``q`` ``[N, H * d]``; ``mask`` bool ``[1 or B, 1, T, S]``."""
    return _direct("sdpa_causal_direct", 1, q, k, v, scale, mask)


@_folded(2)
def sdpa_causal_direct_fold2(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> Launch:
    """As ``sdpa_causal_direct``, two heads of a key head together."""
    return _direct("sdpa_causal_direct_fold2", 2, q, k, v, scale, mask)


@_folded(4)
def sdpa_causal_direct_fold4(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> Launch:
    """As ``sdpa_causal_direct``, four heads of a key head together."""
    return _direct("sdpa_causal_direct_fold4", 4, q, k, v, scale, mask)


@_folded(8)
def sdpa_causal_direct_fold8(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> Launch:
    """As ``sdpa_causal_direct``, eight heads of a key head together."""
    return _direct("sdpa_causal_direct_fold8", 8, q, k, v, scale, mask)


@_folded(1, dict(b=1, t=20, h=1, per=1, s=23, d=32))
def sdpa_causal_staged(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> Launch:
    """As ``sdpa_causal_direct``, with the cache's rows in threadgroup memory."""
    inputs, (n_seqs, t, heads), template = _check_attention(q, k, v, mask, 1)
    return Launch(
        "sdpa_causal_staged",
        {**inputs, "scale": scale, "n_tokens": t},
        {"out": tuple(q.shape)},
        (SIMD, 8 * ceil_div(t, 8), n_seqs * heads),
        (SIMD, 8, 1),
        template,
    )


def _fold(per: int, d: int, channels: int) -> int:
    """Return the number of heads of a key head that a simdgroup takes together."""
    return next(f for f in FOLDS if per % f == 0 and (f == 1 or f * d <= channels))


def _some_decode(case: Case) -> tuple[Any, ...]:
    q, k, v, scale, mask = _some_attention(case.but(t=1))
    # Scores near ``level`` overflow unless the kernel subtracts their maximum.
    common = (case.get("level", 0.0) / (scale * case.d)) ** 0.5
    moved = ((x + common).astype(case.dtype) for x in (q, k))
    return *moved, v, scale, mask


@kernel(
    reference=_attention,
    sample=_some_decode,
    sizes=[
        dict(b=1, h=1, per=1, s=1, d=32),
        dict(b=2, h=2, per=3, s=11, d=64, masks=2),
        dict(b=1, h=1, per=8, s=37, d=64, level=60.0),
        dict(b=2, h=1, per=4, s=19, d=256, masks=1),
        dict(b=1, h=1, per=8, s=9, d=128),
        dict(b=1, h=1, per=8, s=9, d=256),
    ],
    large=DECODE_LARGE,
    varying=("n_rows", "n_masks"),
)
def sdpa_decode(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> Launch:
    """Attention of one token per sequence, ``q`` ``[B, H * d]``."""
    inputs, (n_seqs, t, heads), template = _check_attention(q, k, v, mask, 1)
    require("q", t == 1, "one token of each sequence", t)
    fold = _fold(inputs["heads_per_kv"], template["D"], DECODE_CHANNELS)
    return Launch(
        "sdpa_decode",
        {**inputs, "scale": scale},
        {"out": tuple(q.shape)},
        (256, n_seqs * heads // fold, 1),
        (256, 1, 1),
        {**template, "FOLD": fold},
    )


FOLDED: dict[int, Kernel] = {
    1: sdpa_causal_direct,
    2: sdpa_causal_direct_fold2,
    4: sdpa_causal_direct_fold4,
    8: sdpa_causal_direct_fold8,
}


def _inputs(given: Given) -> tuple[mx.array, ...]:
    d = given.q_norm.size
    q_proj, gate = split_q_gate(given.q_proj, given.q_proj.shape[1] // (2 * d))
    q, k = _ungated_inputs(Given(**{**vars(given), "q_proj": q_proj}))
    return q, gate, k


def _ungated_inputs(given: Given) -> tuple[mx.array, ...]:
    wide, outs = Given(**{"scale": 1.0, "head_dim": None, **vars(given.wide)}), []
    for x, weight in ((wide.q_proj, wide.q_norm), (wide.k_proj, wide.k_norm)):
        rows, d = x, wide.head_dim
        if weight is not None:
            rows, d = rms_norm_heads(x, weight, wide.eps), d or weight.size
        num_heads = x.shape[1] // d
        outs.append(_rope(Given(**{**vars(wide), "x": rows, "num_heads": num_heads})))
    return tuple(x.astype(given.q_proj.dtype) for x in outs)


def _some_inputs(case: Case) -> tuple[Any, ...]:
    b, h, d, gates = case.b, case.h, case.d, case.get("gates", 1)
    _, inv_freq, start, *_ = _some_rope(case.but(t=1))
    rows = case.normal(b, (1 + gates) * h * d), case.normal(b, case.hk * d)
    other = case.other
    if not case.get("norms", 1):
        return *rows, None, None, inv_freq, start, 0.0, 1.25, d
    wide = case.get("wide", 0)
    widths = (h * d, case.hk * d) if wide else (d, d)
    norms = [1 + normal(case.rng, other, n, scale=0.1) for n in widths]
    return *rows, *norms, inv_freq, start, 0.1, *((1.0, d) if wide else ())


INPUTS_LARGE: dict[str, Any] = dict(b=1, h=16, hk=2, d=256, pairs=32, at=8000, s=0)


@kernel(
    reference=_inputs,
    sample=_some_inputs,
    sizes=[
        dict(b=1, h=1, hk=1, d=2, pairs=1, at=0, s=0),
        dict(b=2, h=3, hk=1, d=37, pairs=9, at=5, s=1),
        dict(b=1, h=6, hk=3, d=64, pairs=32, at=1000, s=0),
        dict(b=3, h=4, hk=2, d=256, pairs=32, at=70, s=1),
    ],
    large=INPUTS_LARGE,
    varying=(),
)
def attention_inputs(
    q_proj: mx.array,
    k_proj: mx.array,
    q_norm: mx.array,
    k_norm: mx.array,
    inv_freq: mx.array,
    start: mx.array,
    eps: float,
) -> Launch:
    """Queries ``[B, H * d]``, their gate and keys ``[B, Hkv * d]`` of one token each.

    ``q_proj`` ``[B, H * 2 * d]`` holds query then gate of each head. Norms are ``[d]``,
    ``inv_freq`` float32 ``[rotary / 2]``, ``start`` int32 ``[B]``.
    """
    (d,) = dims("q_norm", q_norm, 1)
    expect("k_norm", k_norm, (d,))
    given = q_proj, k_proj, q_norm, k_norm, inv_freq, start, eps
    return _place_heads("attention_inputs", *given, d=d, q_width=2 * d)


@kernel(
    reference=_ungated_inputs,
    sample=_some_inputs,
    sizes=[
        dict(b=1, h=1, hk=1, d=2, pairs=1, at=0, s=0, gates=0),
        dict(b=2, h=3, hk=1, d=37, pairs=9, at=5, s=1, gates=0),
        dict(b=1, h=7, hk=1, d=128, pairs=64, at=1000, s=0, gates=0),
        dict(b=3, h=4, hk=2, d=256, pairs=32, at=70, s=1, gates=0),
        dict(b=2, h=3, hk=1, d=37, pairs=9, at=5, s=0, gates=0, norms=0),
        dict(b=2, h=3, hk=1, d=37, pairs=9, at=5, s=1, gates=0, wide=1),
        dict(b=1, h=12, hk=5, d=64, pairs=9, at=9, s=0, gates=0, wide=1),
    ],
    large={**INPUTS_LARGE, "d": 128, "pairs": 64, "h": 32, "hk": 4, "gates": 0},
    varying=(),
)
def attention_inputs_ungated(
    q_proj: mx.array,
    k_proj: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    inv_freq: mx.array,
    start: mx.array,
    eps: float = 0.0,
    scale: float = 1.0,
    head_dim: int | None = None,
) -> Launch:
    """Queries ``[B, H * d]`` and keys ``[B, Hkv * d]`` of one token each.

    ``q_proj`` is ``[B, H * d]``; ``scale`` multiplies the rotated channels. Norms are
    ``[d]`` for each head, or ``[H * d]`` and ``[Hkv * d]`` for the rows of all heads;
    then, and without norms, ``head_dim`` is the width of heads. The rest is as in
    ``attention_inputs``.
    """
    d = head_dim
    if d is None and q_norm is not None:
        (d,) = dims("q_norm", q_norm, 1)
    require("head_dim", isinstance(d, int) and d > 0, "a width of heads", d)
    assert d is not None
    given = q_proj, k_proj, q_norm, k_norm, inv_freq, start, eps
    launch = _place_heads("attention_inputs_ungated", *given, d=d, q_width=d)
    heads, kv_heads = (launch.inputs[name] for name in ("n_heads", "n_kv_heads"))
    template = _norms(q_norm, k_norm, heads, kv_heads, d)
    return replace(
        launch,
        inputs={**launch.inputs, "turned_scale": scale},
        template=template,
        types={} if template["HAS_Q_NORM"] else {"N": q_proj.dtype},
    )


def _norms(
    q_norm: mx.array | None, k_norm: mx.array | None, heads: int, kv_heads: int, d: int
) -> dict[str, int]:
    """Check norms of each head or of rows of all heads; return their template."""
    there = q_norm is not None
    require("k_norm", (k_norm is not None) == there, "both norms or none", k_norm)
    rows = q_norm is not None and q_norm.size != d
    for name, norm, count in (("q_norm", q_norm, heads), ("k_norm", k_norm, kv_heads)):
        if norm is not None:
            expect(name, norm, (count * d if rows else d,))
    return {"HAS_Q_NORM": int(there), "HAS_K_NORM": int(there), "ROW_NORMS": int(rows)}


def _place_heads(
    name: str,
    q_proj: mx.array,
    k_proj: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    inv_freq: mx.array,
    start: mx.array,
    eps: float,
    *,
    d: int,
    q_width: int,
) -> Launch:
    """Check arguments and return the launch; heads of ``q_proj`` have ``q_width``."""
    require("q_norm", d <= MAX_HEAD_DIM, f"a width up to {MAX_HEAD_DIM}", d)
    (n,) = dims("start", start, 1)
    (pairs,) = dims("inv_freq", inv_freq, 1)
    require("inv_freq", 2 * pairs <= d, f"at most {d // 2} pairs", pairs)
    heads, kv_heads = (
        _whole_heads(name, x, n, width)
        for name, x, width in (("q_proj", q_proj, q_width), ("k_proj", k_proj, d))
    )
    arrays = {"q_proj": q_proj, "k_proj": k_proj, "q_norm": q_norm, "k_norm": k_norm}
    sizes = {"n_heads": heads, "n_kv_heads": kv_heads, "head_dim": d, "n_pairs": pairs}
    gate = {"gate": (n, heads * d)} if q_width > d else {}
    return Launch(
        name,
        {**arrays, "inv_freq": inv_freq, "start": start, "eps": eps, **sizes},
        {"q": (n, heads * d), **gate, "k": (n, kv_heads * d)},
        (SIMD, 4 * ceil_div(heads + kv_heads, 4), n),
        (SIMD, 4, 1),
    )


def _whole_heads(name: str, x: mx.array, n: int, width: int) -> int:
    """Return the number of heads of ``[n, heads * width]``."""
    rows, columns = dims(name, x, 2)
    require(name, rows == n, f"{n} rows", rows)
    require(name, columns % width == 0, f"heads of {width}", columns)
    return columns // width


def _inputs_and_append(given: Given) -> tuple[mx.array, ...]:
    _, kv_heads, _, d = given.k_cache.shape
    widths = given.num_heads * d, kv_heads * d, kv_heads * d
    parts = zip(given.starts, widths, strict=True)
    q_proj, k_proj, values = (given.row[:, at : at + n] for at, n in parts)
    rest = Given(**vars(given), q_proj=q_proj, k_proj=k_proj, head_dim=d)
    q, keys = _ungated_inputs(rest)
    more = {"keys": keys, "values": values, "row": given.place}
    return q, *_append(Given(**{**vars(given), **more}))


def _some_inputs_and_append(case: Case) -> tuple[Any, ...]:
    q, k, *norms, inv_freq, start, eps = _some_inputs(case.but(b=1, gates=0))[:7]
    shape = 1, case.hk, case.rows, case.d
    caches, place = [case.normal(*shape) for _ in "kv"], mx.array([case.row], mx.int32)
    # The parts lie in another order, with a gap.
    row = mx.concatenate([k, case.normal(1, 3), q, case.normal(*k.shape)], axis=1)
    starts = k.size + 3, 0, k.size + 3 + q.size
    given = row, *norms, inv_freq, start, *caches, place, case.h, starts
    return *given, eps, 1.25 if norms[0] is None else 1.0


@kernel(
    reference=_inputs_and_append,
    sample=_some_inputs_and_append,
    sizes=[
        dict(h=1, hk=1, d=2, pairs=1, at=0, s=0, rows=1, row=0),
        dict(h=3, hk=2, d=37, pairs=9, at=5, s=1, rows=19, row=7),
        dict(h=7, hk=1, d=128, pairs=64, at=1000, s=0, rows=33, row=32),
        dict(h=4, hk=2, d=256, pairs=32, at=70, s=1, rows=16, row=0),
        dict(h=3, hk=3, d=64, pairs=9, at=5, s=0, norms=0, rows=11, row=10),
        dict(h=5, hk=3, d=64, pairs=9, at=5, s=0, norms=0, rows=7, row=7),
        dict(h=2, hk=1, d=36, pairs=9, at=5, s=1, rows=3, row=-1),
        dict(h=3, hk=1, d=37, pairs=9, at=5, s=1, rows=19, row=7, wide=1),
        dict(h=12, hk=5, d=64, pairs=9, at=9, s=0, rows=3, row=3, wide=1),
    ],
    large=dict(h=32, hk=4, d=128, pairs=64, at=700, s=0, rows=768, row=700),
    varying=("n_rows",),
)
def attention_inputs_append(
    row: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    inv_freq: mx.array,
    start: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    place: mx.array,
    num_heads: int,
    starts: tuple[int, int, int],
    eps: float = 0.0,
    scale: float = 1.0,
) -> Launch:
    """Queries ``[1, H * d]`` of one token, and both caches with its key and value.

    The queries, keys and values begin at ``starts`` in ``row`` ``[1, n]``. Caches are
    ``[1, Hkv, S, d]``; the new row is ``place`` int32 ``[1]``, dropped if outside. The
    rest, norms of rows too, is as in ``attention_inputs_ungated``.
    """
    one, kv_heads, n_rows, d = dims("k_cache", k_cache, 4)
    require("k_cache", one == 1, "one sequence", one)
    require("k_cache", d <= MAX_HEAD_DIM, f"a width up to {MAX_HEAD_DIM}", d)
    require("k_cache", kv_heads * n_rows < 1 << 30, "fewer than 2^30 rows", n_rows)
    expect("v_cache", v_cache, k_cache.shape)
    require("num_heads", num_heads > 0, "a positive number", num_heads)
    three = isinstance(starts, tuple) and len(starts) == 3
    require("starts", three, "where three parts begin", starts)
    rows, width = dims("row", row, 2)
    require("row", rows == 1, "one row", rows)
    for at, heads in zip(starts, (num_heads, kv_heads, kv_heads), strict=True):
        require_part("starts", at, heads * d, width)
    template = _norms(q_norm, k_norm, num_heads, kv_heads, d)
    expect("start", start, (1,))
    expect("place", place, (1,))
    (pairs,) = dims("inv_freq", inv_freq, 1)
    require("inv_freq", 2 * pairs <= d, f"at most {d // 2} pairs", pairs)
    arrays = {"row": row, "q_norm": q_norm, "k_norm": k_norm, "inv_freq": inv_freq}
    arrays |= {"start": start, "k_cache": k_cache, "v_cache": v_cache, "place": place}
    n_placing = ceil_div(num_heads + kv_heads, 4)
    return Launch(
        "attention_inputs_append",
        {
            **arrays,
            **dict(zip(("q_at", "k_at", "v_at"), starts, strict=True)),
            "eps": eps,
            "turned_scale": scale,
            "n_heads": num_heads,
            "n_kv_heads": kv_heads,
            "head_dim": d,
            "n_pairs": pairs,
            "n_rows": n_rows,
        },
        {"q": (1, num_heads * d), **dict.fromkeys(("k_out", "v_out"), k_cache.shape)},
        (128 * (n_placing + ceil_div(kv_heads * n_rows, 32)), 1, 1),
        (128, 1, 1),
        template,
        {} if template["HAS_Q_NORM"] else {"N": row.dtype},
    )


# The fewest rows of a split of the cache, and the most splits.
PART_ROWS = 32
MAX_PARTS = 64
# The most splits that can be joined.
MAX_JOINED = 256


def part_rows(n_rows: int) -> int:
    """Return the rows of a split of a cache of ``n_rows``."""
    return max(PART_ROWS, ceil_div(n_rows, MAX_PARTS))


def _parts(given: Given) -> tuple[mx.array, mx.array]:
    n_seqs, kv_heads, n_rows, d = given.k.shape
    per = given.q.shape[1] // (kv_heads * d)
    size = part_rows(n_rows)
    n_parts = ceil_div(n_rows, size)
    grown = [(0, 0), (0, 0), (0, n_parts * size - n_rows), (0, 0)]
    wide = given.wide
    keys, values = (mx.repeat(mx.pad(x, grown), per, axis=1) for x in (wide.k, wide.v))
    query = wide.q.reshape(n_seqs, -1, 1, d) * given.scale
    scores = (query * keys).sum(-1).reshape(n_seqs, -1, n_parts, size)
    rows = mx.arange(n_parts * size).reshape(n_parts, size)
    seen = (rows <= given.start.reshape(-1, 1, 1, 1)) & (rows < n_rows)
    some = seen.any(-1, keepdims=True)
    top = mx.where(seen, scores, -mx.inf).max(-1, keepdims=True)
    top = mx.where(some, top, 0.0)
    weights = mx.where(seen, mx.exp(scores - top), 0.0)
    parted = values.reshape(n_seqs, -1, n_parts, size, d)
    sums = (weights[..., None] * parted).sum(-2)
    return sums, mx.concatenate([top, weights.sum(-1, keepdims=True)], -1)


def _some_parts(case: Case) -> tuple[Any, ...]:
    q, k, v, scale, _ = _some_decode(case)
    start = mx.array(np.maximum(case.at - 5 * np.arange(case.b), 0).astype(np.int32))
    return q, k, v, start, scale


@kernel(
    reference=_parts,
    sample=_some_parts,
    sizes=[
        dict(b=1, h=1, per=1, s=1, d=32, at=0),
        dict(b=2, h=2, per=3, s=130, d=64, at=64),
        dict(b=2, h=1, per=8, s=67, d=32, at=66),
        dict(b=1, h=1, per=4, s=200, d=256, at=37),
        dict(b=1, h=1, per=8, s=70, d=64, at=66),
        dict(b=1, h=1, per=8, s=70, d=128, at=66),
    ],
    large=dict(b=1, h=2, per=8, s=32768, d=256, at=32767),
    varying=("n_rows", "part_rows", "n_parts"),
)
def sdpa_decode_parts(
    q: mx.array, k: mx.array, v: mx.array, start: mx.array, scale: float
) -> Launch:
    """Attention of one token per sequence over P splits of a cache with spare rows.

    ``start`` int32 ``[B]`` is the last row seen. The outputs are inputs of
    ``sdpa_decode_join``: sums ``[B, H, P, d]`` and stats ``[B, H, P, 2]``.
    """
    inputs, (n_seqs, t, heads), template = _check_attention(q, k, v, None, 1)
    require("q", t == 1, "one token of each sequence", t)
    expect("start", start, (n_seqs,))
    d, per, n_rows = template["D"], inputs["heads_per_kv"], inputs["n_rows"]
    fold = _fold(per, d, FOLDED_CHANNELS)
    size = part_rows(n_rows)
    n_parts = ceil_div(n_rows, size)
    names = ("q", "k", "v", "n_heads", "heads_per_kv", "n_rows")
    return Launch(
        "sdpa_decode_parts",
        {
            **{name: inputs[name] for name in names},
            "start": start,
            "scale": scale,
            "part_rows": size,
            "n_parts": n_parts,
        },
        {
            "sums": (n_seqs, heads, n_parts, d),
            "stats": (n_seqs, heads, n_parts, 2),
        },
        (256, n_parts, n_seqs * heads // fold),
        (256, 1, 1),
        {"D": d, "FOLD": fold},
    )


def _joined(given: Given) -> mx.array:
    n_seqs, heads, _, d = given.sums.shape
    top, total = given.stats[..., :1], given.stats[..., 1:]
    highest = mx.where(total > 0, top, -mx.inf).max(2, keepdims=True)
    sink = mx.full((heads, 1, 1), -mx.inf)
    if given.sinks is not None:
        sink = given.sinks.astype(FLOAT32).reshape(heads, 1, 1)
        highest = mx.maximum(highest, sink)
    share = mx.where(total > 0, mx.exp(top - highest), 0.0)
    weight = (share * total).sum(2)
    if given.sinks is not None:
        weight = weight + mx.exp(sink - highest)[:, :, 0]
    out = mx.where(weight > 0, (share * given.sums).sum(2) / weight, 0.0)
    out = out.reshape(n_seqs, heads * d)
    if given.gate is not None:
        out = out * mx.sigmoid(given.gate.astype(FLOAT32))
    return out.astype(given.dtype)


def _some_joined(case: Case) -> tuple[Any, ...]:
    b, h, p, blind = case.b, case.h, case.p, case.get("blind")
    sums = normal(case.rng, FLOAT32, b, h, p, case.d)
    # A split that saw one row has a total of 1; maxima are far from zero.
    total = np.ones((b, h, p), np.float32)
    if p > 1:
        total = case.rng.uniform(1.0, 20.0, (b, h, p)).astype(np.float32)
    top = (60 + case.rng.standard_normal((b, h, p))).astype(np.float32)
    # Splits that saw nothing, with maxima above all others.
    total[:, :, p - blind :] = 0
    top[:, :, p - blind :] = 90
    stats = mx.array(np.stack([top, total], -1))
    gate = case.normal(b, h * case.d) if case.gated else None
    # Above all maxima, among them and below.
    sinks = 60 + case.normal(h, scale=2.0) if case.get("sunk") else None
    return sums, stats, case.dtype, gate, sinks


@kernel(
    reference=_joined,
    sample=_some_joined,
    sizes=[
        dict(b=1, h=1, p=1, d=32, gated=0),
        dict(b=2, h=3, p=5, d=64, gated=1, blind=2),
        dict(b=1, h=2, p=64, d=96, gated=1),
        dict(b=1, h=1, p=83, d=32, gated=0),
        dict(b=1, h=1, p=3, d=256, gated=0, blind=3),
        dict(b=2, h=5, p=3, d=64, gated=0, blind=1, sunk=1),
        dict(b=1, h=2, p=2, d=32, gated=1, blind=2, sunk=1),
    ],
    large=dict(b=1, h=16, p=64, d=256, gated=1),
    varying=("n_parts",),
)
def sdpa_decode_join(
    sums: mx.array,
    stats: mx.array,
    dtype: mx.Dtype,
    gate: mx.array | None = None,
    sinks: mx.array | None = None,
) -> Launch:
    """Attention ``[B, H * d]`` of ``sdpa_decode_parts``, times a gate's sigmoid.

    ``sinks`` ``[H]`` is one more score per head, without a value.
    """
    n_seqs, heads, n_parts, d = dims("sums", sums, 4)
    expect("stats", stats, (n_seqs, heads, n_parts, 2))
    require("sums", d % SIMD == 0, f"a width that is a multiple of {SIMD}", d)
    require("sums", n_parts <= MAX_JOINED, f"up to {MAX_JOINED} parts", n_parts)
    shape = (n_seqs, heads * d)
    if gate is not None:
        expect("gate", gate, shape)
    if sinks is not None:
        expect("sinks", sinks, (heads,))
    return Launch(
        "sdpa_decode_join",
        {
            "sums": sums,
            "stats": stats,
            "gate": gate,
            "sinks": sinks,
            "n_heads": heads,
            "n_parts": n_parts,
            "head_dim": d,
        },
        {"out": shape},
        (d, 8 * n_seqs * heads, 1),
        (SIMD, 8, 1),
        {"HAS_GATE": int(gate is not None), "HAS_SINKS": int(sinks is not None)},
        {"T": dtype},
    )
