"""Launches of ``kernels/mla.metal``: attention of the DeepSeek-V3 family.

Letters: T tokens, H heads, N nope, R rope, L latent and V value width, S rows in the
cache, G quantisation group. A row holds heads side by side: ``[T, H * N]``. Matrices
are stacked as in mlx-lm, with 4 bits per value: words ``[H, O, I / 8]``, scales and
biases ``[H, O, I / G]``. B sequences have two caches: latents ``[B, S, L]``
and rotated rope keys ``[B, S, R]``. ``start`` is the row of the first new token.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ...device import SIMD
from ...experts.weights import Quantization, Weight
from ..ops import latent as ops
from ..ops.attention import join_heads, split_heads, with_rows
from ..ops.functions import heads_linear, rms_norm, rope, to_host
from .base import (
    Case,
    Given,
    Launch,
    Reference,
    ceil_div,
    dims,
    expect,
    in_float32,
    kernel,
    normal,
    require,
    require_part,
)
from .prepared import Size3

MAX_SIMDGROUPS = 8
# Heads that share a read of a cache row: the rows of a simdgroup matrix.
FOLD = 8
HEADS_PER_THREAD = 4
# Rows of weights that a lane holds.
ROWS = 4
MAX_MATRIX_IN = 1024
MAX_LATENT = 512
MAX_ROPE = 256
STEP = 16
TILE = 4096
FLOAT32 = (mx.float32,)
Start = int | mx.array


def _simdgroup_rows(n: int, *more: int) -> tuple[Size3, Size3]:
    """Return grid and threadgroup for ``n`` simdgroups per row, four a threadgroup."""
    y, z = (*more, 1, 1)[:2]
    return (ceil_div(n, 4) * 4 * SIMD, y, z), (4 * SIMD, 1, 1)


def _heads(name: str, width: int, head_width: int) -> int:
    require(name, width % head_width == 0, f"a multiple of {head_width} columns", width)
    return width // head_width


_split = in_float32(ops.split_q_kv)


def _some_q_kv(case: Case) -> tuple[Any, ...]:
    q = case.normal(case.t, case.h * (case.n + case.r))
    return q, case.normal(case.t, case.l + case.r), case.h, case.n


@kernel(
    reference=_split,
    sample=_some_q_kv,
    sizes=[
        {"t": 1, "h": 1, "n": 1, "r": 1, "l": 1},
        {"t": 3, "h": 5, "n": 6, "r": 10, "l": 161},
        {"t": 1, "h": 16, "n": 128, "r": 64, "l": 512},
        {"t": 7, "h": 3, "n": 192, "r": 32, "l": 96},
    ],
    large={"t": 4096, "h": 128, "n": 128, "r": 64, "l": 512},
    varying=("n_tokens",),
)
def mla_split_q_kv(q: mx.array, kv: mx.array, num_heads: int, nope_dim: int) -> Launch:
    """``[T, H * (N + R)]`` and ``[T, L + R]`` as q_nope, q_pe, latent and rope key."""
    n_tokens, q_width = dims("q", q, 2)
    require("num_heads", num_heads > 0, "a positive number", num_heads)
    head_dim = _heads("q", q_width, num_heads)
    require("nope_dim", 0 < nope_dim < head_dim, f"1 to {head_dim - 1}", nope_dim)
    rope_dim = head_dim - nope_dim
    rows, kv_width = dims("kv", kv, 2)
    require("kv", rows == n_tokens, f"{n_tokens} rows", rows)
    require("kv", kv_width > rope_dim, f"more than {rope_dim} columns", kv_width)
    latent_dim = kv_width - rope_dim
    grid, threadgroup = _simdgroup_rows(num_heads + 1, n_tokens)
    return Launch(
        "mla_split_q_kv",
        {
            "q": q,
            "kv": kv,
            "n_tokens": n_tokens,
            "n_heads": num_heads,
            "nope_dim": nope_dim,
            "rope_dim": rope_dim,
            "latent_dim": latent_dim,
        },
        {
            "q_nope": (n_tokens, num_heads * nope_dim),
            "q_pe": (n_tokens, num_heads * rope_dim),
            "latent": (n_tokens, latent_dim),
            "k_pe": (n_tokens, rope_dim),
        },
        grid,
        threadgroup,
    )


def _yarn(given: Given) -> mx.array:
    x, inv_freq = to_host(given.wide.x), to_host(given.inv_freq)
    rope_dim, start = 2 * inv_freq.size, np.array(given.start)
    heads = split_heads(x, start.size, x.shape[1] // rope_dim)
    turned = rope(heads, rope_dim, inv_freq, start, given.mscale, pairs=True)
    return mx.array(join_heads(turned)).astype(given.x.dtype)


def _position(case: Case) -> Start:
    """Return the start as a number or as an array."""
    return mx.array([case.start], mx.int32) if case.get("as_array") else case.start


def _some_rope(case: Case) -> tuple[Any, ...]:
    exponents, n_seqs = np.arange(0, case.r, 2) / case.r, case.get("b", 1)
    inv_freq = mx.array((1e4**-exponents).astype(np.float32))
    starts = mx.array([case.start + 5 * i for i in range(n_seqs)], mx.int32)
    mscale = 1.0 + 0.1 * case.h
    return case.normal(n_seqs * case.t, case.h * case.r), inv_freq, starts, mscale


@kernel(
    reference=_yarn,
    sample=_some_rope,
    sizes=[
        {"t": 1, "h": 1, "r": 2, "start": 0},
        {"t": 3, "h": 5, "r": 6, "start": 7, "b": 2},
        {"t": 1, "h": 128, "r": 64, "start": 4095},
        {"t": 5, "h": 1, "r": 64, "start": 11},
        {"t": 2, "h": 9, "r": 98, "start": 100},
    ],
    large={"t": 4096, "h": 128, "r": 64, "start": 0},
    varying=("n_new",),
)
def yarn_rope_apply(
    x: mx.array, inv_freq: mx.array, start: mx.array, mscale: float
) -> Launch:
    """Rotate neighbouring pairs of ``mscale * x``, ``[B * T, H * R]``.

    ``inv_freq`` ``[R / 2]`` is float32: 1 / ``YarnRoPE._freqs`` of mlx-lm; ``start``
    int32 ``[B]``.
    """
    (n_pairs,) = dims("inv_freq", inv_freq, 1)
    n_tokens, width = dims("x", x, 2)
    n_heads = _heads("x", width, 2 * n_pairs)
    n_new = _new_tokens("start", start, n_tokens)
    wide = min(ceil_div(n_pairs, 2), 64)
    high = min(ceil_div(n_heads, HEADS_PER_THREAD), 256 // wide)
    return Launch(
        "yarn_rope_apply",
        {
            "x": x,
            "inv_freq": inv_freq,
            "start": start,
            "n_new": n_new,
            "mscale": mscale,
            "n_heads": n_heads,
            "rope_dim": 2 * n_pairs,
        },
        {"out": (n_tokens, width)},
        (
            ceil_div(ceil_div(n_pairs, 2), wide) * wide,
            ceil_div(ceil_div(n_heads, HEADS_PER_THREAD), high) * high,
            n_tokens,
        ),
        (wide, high, 1),
    )


def _placed(given: Given) -> tuple[mx.array, ...]:
    wide, rope_dim = given.wide, 2 * given.inv_freq.size
    q = wide.q[:, : given.num_heads * (given.nope_dim + rope_dim)]
    kv = wide.kv[:, given.kv_at or 0 :][:, : wide.weight.size + rope_dim]
    nope, q_pe, latent, k_pe = ops.split_q_kv(q, kv, given.num_heads, given.nope_dim)
    latent = rms_norm(latent, wide.weight, given.eps)
    q_pe, k_pe = (_yarn(Given(**vars(wide), x=x)) for x in (q_pe, k_pe))
    return tuple(x.astype(given.q.dtype) for x in (nope, q_pe, latent, k_pe))


def _some_inputs(case: Case) -> tuple[Any, ...]:
    q, kv, *sizes = _some_q_kv(case)
    _, inv_freq, start, mscale = _some_rope(case.but(b=case.t, t=1))
    weight = 1 + normal(case.rng, case.other, case.l, scale=0.1)
    given = weight, inv_freq, start, *sizes, 0.1, mscale
    if not (at := case.get("at")):
        return q, kv, *given
    row = mx.concatenate([q, case.normal(case.t, at - q.shape[1]), kv, q], axis=1)
    return row, row, *given, at


@kernel(
    reference=_placed,
    sample=_some_inputs,
    sizes=[
        {"t": 1, "h": 1, "n": 1, "r": 2, "l": 1, "start": 0, "s": 0},
        {"t": 3, "h": 5, "n": 6, "r": 10, "l": 161, "start": 7, "s": 1},
        {"t": 1, "h": 16, "n": 128, "r": 64, "l": 512, "start": 4095, "s": 1},
        {"t": 2, "h": 3, "n": 12, "r": 196, "l": 96, "start": 100, "s": 0},
        {"t": 1, "h": 3, "n": 6, "r": 10, "l": 35, "start": 7, "s": 1, "at": 51},
    ],
    large={"t": 1, "h": 128, "n": 128, "r": 64, "l": 512, "start": 8000, "s": 0},
    varying=(),
)
def mla_inputs(
    q: mx.array,
    kv: mx.array,
    weight: mx.array,
    inv_freq: mx.array,
    start: mx.array,
    num_heads: int,
    nope_dim: int,
    eps: float,
    mscale: float,
    kv_at: int | None = None,
) -> Launch:
    """``mla_split_q_kv`` of one token each, its latents normed, its rope parts rotated.

    ``weight`` is ``[L]``; ``inv_freq`` and ``mscale`` are those of
    ``yarn_rope_apply``, and ``start`` int32 ``[B]``. The outputs are q_nope, q_pe,
    latent and rope key. With ``kv_at`` both inputs are rows ``[1, n]`` of a single
    token: ``q`` begins with the queries, and the other part of ``kv`` begins there.
    """
    if kv_at is not None:
        parts = _parts_of_rows(q, kv, weight, inv_freq, num_heads, nope_dim, kv_at)
        split = mla_split_q_kv(*parts, num_heads, nope_dim)
    else:
        split = mla_split_q_kv(q, kv, num_heads, nope_dim)
    sizes = {
        name: split.inputs[name] for name in ("nope_dim", "rope_dim", "latent_dim")
    }
    pairs = sizes["rope_dim"] % 2 == 0
    require("q", pairs, "whole pairs with positions", sizes["rope_dim"])
    expect("weight", weight, (sizes["latent_dim"],))
    expect("inv_freq", inv_freq, (sizes["rope_dim"] // 2,))
    expect("start", start, (split.inputs["n_tokens"],))
    return Launch(
        "mla_inputs",
        {
            "q": q,
            "kv": kv,
            "weight": weight,
            "inv_freq": inv_freq,
            "start": start,
            "eps": eps,
            "mscale": mscale,
            "kv_at": kv_at or 0,
            "n_heads": num_heads,
            **sizes,
        },
        split.outputs,
        split.grid,
        split.threadgroup,
    )


def _parts_of_rows(
    q: mx.array,
    kv: mx.array,
    weight: mx.array,
    inv_freq: mx.array,
    num_heads: int,
    nope_dim: int,
    kv_at: int,
) -> tuple[mx.array, mx.array]:
    """Check rows that hold more than queries and a key-value row; return these parts.

    A launch takes the rows whole: nothing evaluates the parts.
    """
    (latent_dim,), (n_pairs,) = dims("weight", weight, 1), dims("inv_freq", inv_freq, 1)
    q_width = num_heads * (nope_dim + 2 * n_pairs)
    kv_width = latent_dim + 2 * n_pairs
    for name, row, at, width in (("q", q, 0, q_width), ("kv", kv, kv_at, kv_width)):
        rows, n = dims(name, row, 2)
        require(name, rows == 1, "one row", rows)
        require_part(name, at, width, n)
    return q[:, :q_width], kv[:, kv_at : kv_at + kv_width]


def _new_tokens(name: str, each: mx.array, n_tokens: int) -> int:
    """Return the tokens of a sequence, given an array with one value per sequence."""
    (n_seqs,) = dims(name, each, 1)
    require(name, n_tokens % n_seqs == 0, f"a divisor of {n_tokens} rows", n_seqs)
    return n_tokens // n_seqs


def _check_start(start: Start, limit: int) -> None:
    """Check a start that is a number; kernels accept any value of an array."""
    if not isinstance(start, mx.array):
        require("start", 0 <= start < limit, f"0 to {limit - 1}", start)


def _append(given: Given) -> tuple[mx.array, mx.array]:
    at = mx.array(given.start).reshape(1)
    pairs = (given.latent_cache, given.latent), (given.rope_cache, given.k_pe)
    latents, ropes = (
        with_rows(_as_heads(cache), new[None, None], at).reshape(cache.shape)
        for cache, new in pairs
    )
    return latents, ropes


def _as_heads(cache: mx.array) -> mx.array:
    """Return ``[S, W]`` or ``[1, 1, S, W]`` as the latter."""
    return cache.reshape(1, 1, *cache.shape[-2:])


def _some_caches(case: Case) -> tuple[Any, ...]:
    ones = [1, 1] * case.get("heads")
    caches = case.normal(*ones, case.s, case.l), case.normal(*ones, case.s, case.r)
    rows = case.normal(case.t, case.l), case.normal(case.t, case.r)
    return *caches, *rows, _position(case)


@kernel(
    reference=_append,
    sample=_some_caches,
    sizes=[
        {"s": 1, "t": 1, "l": 1, "r": 1, "start": 0},
        {"s": 9, "t": 3, "l": 33, "r": 6, "start": 6, "as_array": 1, "heads": 1},
        {"s": 2, "t": 1, "l": 96, "r": 2, "start": 0},
        {"s": 21, "t": 1, "l": 512, "r": 64, "start": 13},
    ],
    large={"s": 32768, "t": 1, "l": 512, "r": 64, "start": 32767},
    varying=("start", "n_rows", "n_new"),
)
def mla_kv_cache_append(
    latent_cache: mx.array,
    rope_cache: mx.array,
    latent: mx.array,
    k_pe: mx.array,
    start: Start,
) -> Launch:
    """Both caches with new rows ``[start, start + T)``, without any past the end.

    Caches are ``[S, L]`` and ``[S, R]``, or ``[1, 1, S, W]`` as models hold them; the
    outputs have the same shapes.
    """
    as_held = isinstance(latent_cache, mx.array) and latent_cache.ndim == 4
    *ones, n_rows, latent_dim = dims("latent_cache", latent_cache, 4 if as_held else 2)
    one = f"one sequence and head of {n_rows} rows"
    require("latent_cache", ones in ([], [1, 1]), one, tuple(latent_cache.shape))
    rope_dim = dims("rope_cache", rope_cache, 2 + len(ones))[-1]
    expect("rope_cache", rope_cache, (*ones, n_rows, rope_dim))
    n_new, _ = dims("latent", latent, 2)
    require("latent", n_new <= n_rows, f"at most {n_rows} rows", n_new)
    expect("latent", latent, (n_new, latent_dim))
    expect("k_pe", k_pe, (n_new, rope_dim))
    _check_start(start, n_rows - n_new + 1)
    grid, threadgroup = _simdgroup_rows(n_rows)
    return Launch(
        "mla_kv_cache_append",
        {
            "latent_cache": latent_cache,
            "rope_cache": rope_cache,
            "latent": latent,
            "k_pe": k_pe,
            "start": start,
            "n_rows": n_rows,
            "n_new": n_new,
            "latent_dim": latent_dim,
            "rope_dim": rope_dim,
        },
        {
            "latent_out": tuple(latent_cache.shape),
            "rope_out": tuple(rope_cache.shape),
        },
        grid,
        threadgroup,
    )


def _placed_and_appended(given: Given) -> tuple[mx.array, ...]:
    q_nope, q_pe, latent, k_pe = _placed(given)
    caches = given.latent_cache, given.rope_cache
    # MLX ends the process for a row outside of the cache.
    if 0 <= int(np.array(given.place)[0]) < caches[0].shape[2]:
        new = {"latent": latent, "k_pe": k_pe, "start": given.place}
        caches = _append(Given(**{**vars(given), **new}))
    return q_nope, q_pe, *caches


def _some_inputs_and_caches(case: Case) -> tuple[Any, ...]:
    q, kv, weight, inv_freq, start, *rest = _some_inputs(case.but(t=1))
    caches = (case.normal(1, 1, case.rows, n) for n in (case.l, case.r))
    place = mx.array([case.row], mx.int32)
    return q, kv, weight, inv_freq, start, *caches, place, *rest


@kernel(
    reference=_placed_and_appended,
    sample=_some_inputs_and_caches,
    sizes=[
        {"h": 1, "n": 1, "r": 2, "l": 1, "start": 0, "s": 0, "rows": 1, "row": 0},
        {"h": 5, "n": 6, "r": 10, "l": 161, "start": 7, "s": 1, "rows": 19, "row": 7},
        {"h": 16, "n": 128, "r": 64, "l": 512, "start": 4095, "s": 1}
        | {"rows": 33, "row": 32},
        {"h": 3, "n": 12, "r": 196, "l": 96, "start": 100, "s": 0, "rows": 8, "row": 0},
        {"h": 3, "n": 6, "r": 10, "l": 35, "start": 7, "s": 1, "at": 51}
        | {"rows": 11, "row": 10},
        {"h": 4, "n": 6, "r": 6, "l": 33, "start": 3, "s": 0, "rows": 7, "row": 7},
        {"h": 2, "n": 5, "r": 4, "l": 31, "start": 3, "s": 1, "rows": 3, "row": -1},
    ],
    large={"h": 128, "n": 128, "r": 64, "l": 512, "start": 700, "s": 0}
    | {"rows": 768, "row": 700},
    varying=("n_rows",),
)
def mla_inputs_append(
    q: mx.array,
    kv: mx.array,
    weight: mx.array,
    inv_freq: mx.array,
    start: mx.array,
    latent_cache: mx.array,
    rope_cache: mx.array,
    place: mx.array,
    num_heads: int,
    nope_dim: int,
    eps: float,
    mscale: float,
    kv_at: int | None = None,
) -> Launch:
    """``mla_inputs`` of one token, and both caches with its latents and rope key.

    Caches are ``[1, 1, S, L]`` and ``[1, 1, S, R]``; the new row is ``place`` int32
    ``[1]``, dropped if outside. The outputs are q_nope, q_pe and the caches.
    """
    expect("start", start, (1,))
    given = q, kv, weight, inv_freq, start, num_heads, nope_dim, eps, mscale, kv_at
    placed = mla_inputs(*given)
    sizes = placed.inputs
    *ones, n_rows, _ = dims("latent_cache", latent_cache, 4)
    require("latent_cache", ones == [1, 1], "one sequence and head", tuple(ones))
    require("latent_cache", n_rows < 1 << 26, "fewer than 2^26 rows", n_rows)
    expect("latent_cache", latent_cache, (1, 1, n_rows, sizes["latent_dim"]))
    expect("rope_cache", rope_cache, (1, 1, n_rows, sizes["rope_dim"]))
    expect("place", place, (1,))
    caches = {"latent_cache": latent_cache, "rope_cache": rope_cache}
    grid, threadgroup = _simdgroup_rows(num_heads + 1 + n_rows)
    return Launch(
        "mla_inputs_append",
        {**sizes, **caches, "place": place, "n_rows": n_rows},
        {
            **{name: placed.outputs[name] for name in ("q_nope", "q_pe")},
            "latent_out": tuple(latent_cache.shape),
            "rope_out": tuple(rope_cache.shape),
        },
        grid,
        threadgroup,
    )


def _check_heads_matrix(
    x_name: str, x: mx.array, w: mx.array, scales: mx.array, biases: mx.array
) -> tuple[int, int, int, int, int]:
    """Check one matrix per head and its rows; return T, H, O, I and I / G."""
    n_heads, n_out, n_words = dims("w", w, 3)
    n_in, n_groups = 8 * n_words, dims("scales", scales, 3)[2]
    require("w", n_in % 32 == 0, "an input width in groups of 32", n_in)
    require("w", n_in <= MAX_MATRIX_IN, f"I <= {MAX_MATRIX_IN}", n_in)
    expect("scales", scales, (n_heads, n_out, n_groups))
    expect("biases", biases, (n_heads, n_out, n_groups))
    whole = n_in % n_groups == 0 and n_in // n_groups in (32, 64, 128)
    require("scales", whole, f"{n_in} columns in groups of 32, 64 or 128", n_groups)
    n_tokens, _ = dims(x_name, x, 2)
    expect(x_name, x, (n_tokens, n_heads * n_in))
    require(x_name, n_tokens < 1 << 31, "fewer than 2^31 tokens", n_tokens)
    return n_tokens, n_heads, n_out, n_in, n_groups


def _lanes(n_in: int) -> int:
    """Return the lanes that share a row: a power of two, for 32 columns each."""
    n_lanes: int = 1 << (n_in // 32 - 1).bit_length()
    return n_lanes


def _per_head_grid(n_out: int, n_heads: int, n_lanes: int) -> tuple[Size3, Size3]:
    return _simdgroup_rows(ceil_div(n_out, ROWS * SIMD // n_lanes), n_heads)


def _per_head(name: str) -> Reference:
    """Return the reference of a kernel whose input rows have this name."""

    def reference(given: Given) -> mx.array:
        n_heads, _, n_words = given.w.shape
        form = Quantization(4, 8 * n_words // given.scales.shape[2])
        weight = Weight(given.w, given.wide.scales, given.wide.biases, form)
        rows = getattr(given, name)
        heads = rows.astype(mx.float32).reshape(len(rows), n_heads, -1)
        return heads_linear(heads, weight).reshape(len(rows), -1).astype(rows.dtype)

    return reference


def _some_per_head(case: Case) -> tuple[Any, ...]:
    rng, h, o, i = case.rng, case.h, case.o, case.i
    w = mx.array(rng.integers(0, 1 << 32, (h, o, i // 8), np.uint32))
    scales = rng.uniform(0.5, 1.0, (h, o, i // case.g)) / (8 * i**0.5)
    biases = -7.5 * scales * rng.uniform(0.8, 1.2, scales.shape)
    parts = (
        mx.array(p.astype(np.float32)).astype(case.other) for p in (scales, biases)
    )
    return case.normal(case.t, h * i), w, *parts


_q_prime = _per_head("q_nope")


@kernel(
    reference=_q_prime,
    sample=_some_per_head,
    sizes=[
        {"t": 1, "h": 1, "o": 1, "i": 32, "g": 32, "s": 0},
        {"t": 3, "h": 2, "o": 37, "i": 128, "g": 64, "s": 1},
        {"t": 1, "h": 3, "o": 512, "i": 128, "g": 128, "s": 1},
        {"t": 1, "h": 2, "o": 96, "i": 192, "g": 32, "s": 0},
    ],
    large={"t": 1, "h": 128, "o": 512, "i": 128, "g": 64, "s": 1},
    varying=("n_tokens",),
)
def mla_q_prime_4bit(
    q_nope: mx.array, w: mx.array, scales: mx.array, biases: mx.array
) -> Launch:
    """``[T, H * N]`` times W_uk of each head, ``[H, L, N / 8]``: ``[T, H * L]``."""
    n_tokens, n_heads, n_out, n_in, n_groups = _check_heads_matrix(
        "q_nope", q_nope, w, scales, biases
    )
    n_lanes = _lanes(n_in)
    grid, threadgroup = _per_head_grid(n_out, n_heads, n_lanes)
    return Launch(
        "mla_q_prime_4bit",
        {
            "q_nope": q_nope,
            "w": w,
            "scales": scales,
            "biases": biases,
            "n_tokens": n_tokens,
            "n_heads": n_heads,
            "latent_dim": n_out,
            "nope_dim": n_in,
            "n_groups": n_groups,
        },
        {"q_prime": (n_tokens, n_heads * n_out)},
        grid,
        threadgroup,
        {"LANES": n_lanes},
    )


_out_per_head = _per_head("context")


@kernel(
    reference=_out_per_head,
    sample=_some_per_head,
    sizes=[
        {"t": 1, "h": 1, "o": 1, "i": 32, "g": 32, "s": 0},
        {"t": 3, "h": 2, "o": 11, "i": 512, "g": 64, "s": 1},
        {"t": 1, "h": 3, "o": 128, "i": 512, "g": 128, "s": 0},
        {"t": 2, "h": 1, "o": 64, "i": 480, "g": 32, "s": 1},
    ],
    large={"t": 1, "h": 128, "o": 128, "i": 512, "g": 64, "s": 1},
    varying=("n_tokens",),
)
def mla_out_per_head_4bit(
    context: mx.array, w: mx.array, scales: mx.array, biases: mx.array
) -> Launch:
    """``[T, H * L]`` times W_uv of each head, ``[H, V, L / 8]``: ``[T, H * V]``."""
    n_tokens, n_heads, n_out, n_in, n_groups = _check_heads_matrix(
        "context", context, w, scales, biases
    )
    n_lanes = _lanes(n_in)
    grid, threadgroup = _per_head_grid(n_out, n_heads, n_lanes)
    return Launch(
        "mla_out_per_head_4bit",
        {
            "context": context,
            "w": w,
            "scales": scales,
            "biases": biases,
            "n_tokens": n_tokens,
            "n_heads": n_heads,
            "value_dim": n_out,
            "latent_dim": n_in,
            "n_groups": n_groups,
        },
        {"out": (n_tokens, n_heads * n_out)},
        grid,
        threadgroup,
        {"LANES": n_lanes},
    )


def _attention(
    q_prime: mx.array,
    q_pe: mx.array,
    latent: mx.array,
    rope: mx.array,
    scale: float,
    seen: mx.array | None,
) -> tuple[dict[str, Any], int, int, dict[str, int]]:
    """Check attention's inputs; return them, H, simdgroups and the template."""
    n_tokens, width = dims("q_prime", q_prime, 2)
    n_seqs, n_rows, latent_dim = _one_head("latent", latent)
    rope_seqs, rope_rows, rope_dim = _one_head("rope", rope)
    require("latent", n_tokens % n_seqs == 0, f"a divisor of {n_tokens}", n_seqs)
    require("rope", rope_seqs == n_seqs, f"{n_seqs} sequences", rope_seqs)
    n_new = n_tokens // n_seqs
    whole = latent_dim % 32 == 0 and latent_dim <= MAX_LATENT
    require("latent", whole, f"L a multiple of 32 up to {MAX_LATENT}", latent_dim)
    require("rope", rope_dim <= MAX_ROPE, f"R <= {MAX_ROPE}", rope_dim)
    require("rope", rope_rows == n_rows, f"{n_rows} rows", rope_rows)
    require("latent", n_rows < 1 << 30, "fewer than 2^30 rows", n_rows)
    require("q_prime", n_new <= n_rows, f"at most {n_rows} tokens", n_new)
    if seen is not None:
        expect("seen", seen, (n_seqs,))
    n_heads = _heads("q_prime", width, latent_dim)
    expect("q_pe", q_pe, (n_tokens, n_heads * rope_dim))
    n_simdgroups = min(MAX_SIMDGROUPS, latent_dim // 32)
    inputs = {
        "q_prime": q_prime,
        "q_pe": q_pe,
        "latent": latent,
        "rope": rope,
        "seen": seen,
        "scale": scale,
        "n_new": n_new,
        "n_heads": n_heads,
        "n_rows": n_rows,
        "latent_dim": latent_dim,
        "rope_dim": rope_dim,
    }
    blocks = {
        "BLOCKS": ceil_div(latent_dim // 32, n_simdgroups),
        "ROPE_BLOCKS": ceil_div(ceil_div(rope_dim, 32), n_simdgroups),
        "HAS_SEEN": int(seen is not None),
    }
    return inputs, n_heads, n_simdgroups, blocks


def _one_head(name: str, cache: mx.array) -> tuple[int, int, int]:
    """Return the sizes of a cache ``[B, S, W]`` or ``[B, 1, S, W]``."""
    as_held = isinstance(cache, mx.array) and cache.ndim == 4
    n_seqs, *one, n_rows, width = dims(name, cache, 4 if as_held else 3)
    require(name, one in ([], [1]), "one head", tuple(cache.shape))
    return n_seqs, n_rows, width


def _rows_of(cache: mx.array) -> mx.array:
    """Return the rows ``[B, S, W]`` of a cache."""
    return cache.reshape(cache.shape[0], *cache.shape[-2:])


def _scores(given: Given) -> mx.array:
    """Return the scores ``[B, H, T, S]``, -inf for rows that a token does not see."""
    wide, latent, rope = given.wide, _rows_of(given.wide.latent), given.wide.rope
    n_seqs, n_rows, _ = latent.shape
    n_new = len(given.q_prime) // n_seqs
    total = mx.zeros((n_new, n_rows))
    for queries, keys in ((wide.q_prime, latent), (wide.q_pe, _rows_of(rope))):
        heads = queries.reshape(n_seqs, n_new, -1, keys.shape[2]).swapaxes(1, 2)
        total = total + heads @ keys.swapaxes(1, 2)[:, None]
    ends = mx.full(n_seqs, n_rows) if given.seen is None else given.seen
    last = ends.astype(mx.int32)[:, None, None, None] - n_new
    seen = mx.arange(n_rows) <= last + mx.arange(n_new)[:, None]
    return mx.where(seen, given.scale * total, -mx.inf)


def _folded(given: Given) -> mx.array:
    weights = mx.softmax(_scores(given), axis=-1)
    context = (weights @ _rows_of(given.wide.latent)[:, None]).swapaxes(1, 2)
    return context.reshape(given.q_prime.shape).astype(given.q_prime.dtype)


def _some_attention(case: Case) -> tuple[Any, ...]:
    """Return queries, caches and scale; with ``rise`` scores increase by row.

    With ``spare`` the caches end with that many rows that no token sees, the first of
    several caches with one less.
    """
    t, h, s, l, r, b = case.t, case.h, case.s, case.l, case.r, case.get("b", 1)
    shapes = (b * t, h, l), (b, s, l)
    queries, latent = (case.rng.standard_normal(n) for n in shapes)
    if case.get("rise"):
        queries[..., 0], latent[..., 0] = 3.0, np.linspace(-12.0, 12.0, s)
    q_prime, latents = (
        mx.array(x.astype(np.float32)).astype(case.dtype)
        for x in (queries.reshape(b * t, h * l), latent)
    )
    ropes, q_pe = case.normal(b, s, r), case.normal(b * t, h * r)
    if case.get("held"):
        latents, ropes = latents[:, None], ropes[:, None]
    given = q_prime, q_pe, latents, ropes, 2.0 * (l + r) ** -0.5
    if not case.get("spare"):
        return given
    ends = [s - case.spare + (b > 1 and i == 0) for i in range(b)]
    return *given, mx.array(ends, mx.uint32)


@kernel(
    reference=_folded,
    sample=_some_attention,
    sizes=[
        {"t": 1, "h": 1, "s": 1, "l": 32, "r": 2},
        {"t": 3, "h": 9, "s": 39, "l": 96, "r": 40, "rise": 1},
        {"t": 1, "h": 5, "s": 70, "l": 512, "r": 64},
        {"t": 5, "h": 3, "s": 33, "l": 288, "r": 64},
        {"t": 1, "h": 2, "s": 17, "l": 32, "r": 42, "spare": 6},
        {"t": 2, "h": 3, "s": 21, "l": 64, "r": 8, "spare": 5, "b": 3},
    ],
    large={"t": 1, "h": 128, "s": 4096, "l": 512, "r": 64},
    varying=("n_new", "n_rows"),
)
def mla_sdpa_folded(
    q_prime: mx.array,
    q_pe: mx.array,
    latent: mx.array,
    rope: mx.array,
    scale: float,
    seen: mx.array | None = None,
) -> Launch:
    """Causal attention of ``[N, H * L]`` and ``[N, H * R]`` over the caches.

    Caches are ``[B, S, L]`` and ``[B, S, R]``, N = B T, or have a dimension of one
    head before S, as models hold them. ``seen`` uint32 ``[B]`` is the
    number of rows in use of caches with spare rows.
    """
    inputs, n_heads, n_simdgroups, blocks = _attention(
        q_prime, q_pe, latent, rope, scale, seen
    )
    n_tokens = q_prime.shape[0]
    n_threads = SIMD * n_simdgroups
    return Launch(
        "mla_sdpa_folded",
        inputs,
        {"context": tuple(q_prime.shape)},
        (ceil_div(n_heads, FOLD) * n_threads, n_tokens, 1),
        (n_threads, 1, 1),
        blocks,
    )


def _tiles(given: Given) -> tuple[mx.array, ...]:
    scores, latent, parts = _scores(given), _rows_of(given.wide.latent)[:, None], []
    for begin in range(0, latent.shape[2], given.tile):
        part = scores[..., begin : begin + given.tile]
        largest = part.max(axis=-1, keepdims=True)
        weights = mx.where(part == -mx.inf, 0.0, mx.exp(part - largest))
        sums = weights @ latent[..., begin : begin + given.tile, :]
        parts.append((largest[..., 0], weights.sum(axis=-1), sums))
    maxima, denominators, sums = (
        mx.stack([p.swapaxes(1, 2).flatten(0, 2) for p in of_tiles])
        for of_tiles in zip(*parts, strict=True)
    )
    return maxima, denominators, sums


def _some_tiled_attention(case: Case) -> tuple[Any, ...]:
    given = _some_attention(case)
    return (*given[:5], case.tile, *given[5:])


@kernel(
    reference=_tiles,
    sample=_some_tiled_attention,
    sizes=[
        {"t": 1, "h": 1, "s": 1, "l": 32, "r": 2, "tile": 16},
        {"t": 2, "h": 9, "s": 75, "l": 64, "r": 8, "tile": 32, "rise": 1},
        {"t": 1, "h": 5, "s": 70, "l": 512, "r": 64, "tile": 32},
        {"t": 3, "h": 3, "s": 34, "l": 288, "r": 64, "tile": 16},
        {"t": 1, "h": 2, "s": 75, "l": 32, "r": 42, "tile": 16, "spare": 30},
        {"t": 2, "h": 3, "s": 37, "l": 64, "r": 8, "tile": 16, "spare": 9, "b": 2},
        {
            "t": 1,
            "h": 3,
            "s": 19,
            "l": 32,
            "r": 8,
            "tile": 16,
            "b": 2,
            "held": 1,
            "spare": 3,
        },
    ],
    large={"t": 1, "h": 128, "s": 32768, "l": 512, "r": 64, "tile": TILE},
    varying=("n_tokens", "n_new", "n_rows"),
)
def mla_sdpa_tile_accumulate(
    q_prime: mx.array,
    q_pe: mx.array,
    latent: mx.array,
    rope: mx.array,
    scale: float,
    tile: int = TILE,
    seen: mx.array | None = None,
) -> Launch:
    """Maximum, denominator and sums of every tile of the cache, for each head.

    ``seen`` is as in ``mla_sdpa_folded``; tiles after it count as unseen.
    """
    inputs, n_heads, n_simdgroups, blocks = _attention(
        q_prime, q_pe, latent, rope, scale, seen
    )
    require("tile", tile > 0 and tile % STEP == 0, f"a multiple of {STEP} rows", tile)
    n_tokens, n_rows = q_prime.shape[0], inputs["n_rows"]
    n_tiles, n_slices = ceil_div(n_rows, tile), n_tokens * n_heads
    n_threads = SIMD * n_simdgroups
    return Launch(
        "mla_sdpa_tile_accumulate",
        {**inputs, "n_tokens": n_tokens},
        {
            "maxima": (n_tiles, n_slices),
            "denominators": (n_tiles, n_slices),
            "sums": (n_tiles, n_slices, inputs["latent_dim"]),
        },
        (ceil_div(n_heads, FOLD) * n_threads, n_tokens, n_tiles),
        (n_threads, 1, 1),
        {**blocks, "TILE": tile},
    )


def _finalize(given: Given) -> mx.array:
    factors = mx.exp(given.maxima - given.maxima.max(axis=0, keepdims=True))
    total = (factors[..., None] * given.sums).sum(axis=0)
    context = total / (factors * given.denominators).sum(axis=0)[:, None]
    width = given.num_heads * given.sums.shape[2]
    return context.reshape(-1, width).astype(given.dtype)


def _some_tiles(case: Case) -> tuple[Any, ...]:
    rng, n, heads = case.rng, case.n, case.t * case.h
    maxima = rng.uniform(-5.0, 20.0, (n, heads)).astype(np.float32)
    denominators = rng.uniform(1.0, 9.0, (n, heads)).astype(np.float32)
    sums = rng.standard_normal((n, heads, case.l), np.float32)
    if n > 1:
        # A tile that the first token does not see.
        maxima[-1, 0], denominators[-1, 0], sums[-1, 0] = -np.inf, 0, 0
    return mx.array(maxima), mx.array(denominators), mx.array(sums), case.h, case.dtype


@kernel(
    reference=_finalize,
    sample=_some_tiles,
    sizes=[
        {"n": 1, "t": 1, "h": 1, "l": 4},
        {"n": 3, "t": 3, "h": 5, "l": 36},
        {"n": 9, "t": 1, "h": 7, "l": 512},
    ],
    large={"n": 32, "t": 1, "h": 128, "l": 512},
    varying=("n_tiles", "n_slices"),
)
def mla_sdpa_tile_finalize(
    maxima: mx.array,
    denominators: mx.array,
    sums: mx.array,
    num_heads: int,
    dtype: mx.Dtype,
) -> Launch:
    """The context ``[T, H * L]`` in ``dtype``, joined from tiles."""
    n_tiles, n_slices = dims("maxima", maxima, 2)
    expect("denominators", denominators, (n_tiles, n_slices))
    _, _, latent_dim = dims("sums", sums, 3)
    expect("sums", sums, (n_tiles, n_slices, latent_dim))
    require("sums", latent_dim % 4 == 0, "L a multiple of 4", latent_dim)
    n = n_tiles * n_slices
    require("maxima", n < 1 << 31, "fewer than 2^31 values", n)
    fits = num_heads > 0 and n_slices % num_heads == 0
    require("num_heads", fits, f"a divisor of {n_slices}", num_heads)
    wide = min(latent_dim // 4, 128)
    return Launch(
        "mla_sdpa_tile_finalize",
        {
            "maxima": maxima,
            "denominators": denominators,
            "sums": sums,
            "n_tiles": n_tiles,
            "n_slices": n_slices,
            "latent_dim": latent_dim,
        },
        {"context": (n_slices // num_heads, num_heads * latent_dim)},
        (ceil_div(latent_dim // 4, wide) * wide, n_slices, 1),
        (wide, 1, 1),
        types={"T": dtype},
    )
