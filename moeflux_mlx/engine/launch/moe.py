"""Launches of ``kernels/moe.metal``.

Letters: T tokens, D model width, E experts, K experts per token, N expert width, I and
O input and output width of a projection, G quantisation group. One projection of all
experts is a matrix in slots, as ``slots.py`` describes it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ...device import SIMD
from ..ops import moe as ops
from ..ops.functions import linear
from .base import (
    Case,
    Given,
    Launch,
    ceil_div,
    dims,
    expect,
    in_float32,
    kernel,
    normal,
    require,
)
from .slots import (
    Matrix,
    check_matrix,
    in_slot,
    matrix_inputs,
    numbers,
    random_matrix,
    row_lengths,
    types_of,
)

MAX_EXPERTS = 512
MAX_K = 16
FLOAT32 = (mx.float32,)
UNUSED = 0xFFFFFFFF


def check_routing(
    logits: mx.array, k: int, first: int | None = None
) -> tuple[int, int]:
    """Return tokens and experts; with ``first`` only that many values are logits."""
    n_tokens, n_experts = dims("logits", logits, 2)
    if first is not None:
        fits = n_tokens == 1 and 1 <= first <= n_experts
        require("n_experts", fits, f"one row of at least {first} values", logits.shape)
        n_experts = first
    require("logits", n_experts <= MAX_EXPERTS, f"E <= {MAX_EXPERTS}", n_experts)
    require("k", 1 <= k <= min(MAX_K, n_experts), f"1 to {MAX_K}, at most E", k)
    return n_tokens, n_experts


def _one_simdgroup_each(n: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return grid and threadgroup for ``n`` simdgroups, four per threadgroup."""
    return (ceil_div(n, 4) * 4 * SIMD, 1, 1), (4 * SIMD, 1, 1)


def softmax_topk(given: Given) -> tuple[mx.array, mx.array]:
    logits = given.wide.logits[:, : given.n_experts]
    indices, weights = ops.softmax_topk(logits, given.k)
    return indices, ops.normalised(weights) if given.normalize else weights


def random_logits(case: Case, t: int) -> mx.array:
    """Return logits ``[T, E]`` with three equal maxima, two of them 32 apart."""
    logits = case.rng.standard_normal((t, case.e), np.float32)
    tokens, largest, top = np.arange(t), logits.argmax(-1), logits.max(-1)
    for distance in (3, SIMD):
        logits[tokens, (largest + distance) % case.e] = top
    return mx.array(logits).astype(case.dtype)


def _some_logits(case: Case) -> tuple[Any, ...]:
    unit = case.get("unit")
    first = case.e - 3 * unit if case.t == 1 else None
    return random_logits(case, case.t), case.k, bool(unit), first


@kernel(
    reference=softmax_topk,
    sample=_some_logits,
    sizes=[
        {"t": 1, "e": 3, "k": 1},
        {"t": 5, "e": 33, "k": 10},
        {"t": 3, "e": 512, "k": 16},
        {"t": 9, "e": 128, "k": 8},
        {"t": 6, "e": 65, "k": 7, "unit": 1},
        {"t": 1, "e": 71, "k": 7, "unit": 1},
    ],
    large={"t": 4096, "e": 512, "k": 10},
    varying=("n_tokens",),
)
def moe_softmax_topk(
    logits: mx.array, k: int, normalize: bool = False, n_experts: int | None = None
) -> Launch:
    """The K largest of a softmax of ``[T, E]``: ``indices`` and ``weights`` ``[T, K]``.

    ``normalize`` divides each token's weights by their sum. With ``n_experts`` the
    logits are the first values of one row ``[1, n]``.
    """
    n_tokens, n_experts = check_routing(logits, k, n_experts)
    grid, threadgroup = _one_simdgroup_each(n_tokens)
    return Launch(
        "moe_softmax_topk",
        {"logits": logits, "n_tokens": n_tokens, "n_experts": n_experts, "k": k},
        {"indices": (n_tokens, k), "weights": (n_tokens, k)},
        grid,
        threadgroup,
        {"PER_LANE": ceil_div(n_experts, SIMD), "NORMALIZE": int(normalize)},
    )


_normalize = in_float32(ops.normalised)


def random_weights(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.uniform(0.05, 1.0, shape).astype(np.float32))


def _some_weights(case: Case) -> tuple[Any, ...]:
    return (random_weights(case.rng, case.t, case.k),)


@kernel(
    reference=_normalize,
    sample=_some_weights,
    sizes=[{"t": 1, "k": 1}, {"t": 61, "k": 10}, {"t": 1, "k": 10}, {"t": 33, "k": 8}],
    large={"t": 4096, "k": 10},
    varying=("n",),
    dtypes=FLOAT32,
)
def moe_normalize_weights(weights: mx.array) -> Launch:
    """Each row of ``[T, K]`` divided by its sum."""
    n_tokens, k = dims("weights", weights, 2)
    require("weights", k <= MAX_K, f"K <= {MAX_K}", k)
    n = n_tokens * k
    require("weights", n < 1 << 31, "T * K < 2^31", n)
    return Launch(
        "moe_normalize_weights",
        {"weights": weights, "n": n, "k": k},
        {"out": (n_tokens, k)},
        (ceil_div(n, 256) * 256, 1, 1),
        (256, 1, 1),
    )


def _noaux_topk(given: Given) -> tuple[mx.array, mx.array]:
    return ops.noaux_topk(**vars(given.wide))


def _some_noaux(case: Case) -> tuple[Any, ...]:
    bias = normal(case.rng, (case.dtype, mx.float32)[case.s], case.e, scale=0.1)
    logits, divided = random_logits(case, case.t), bool(case.get("normalize", 1))
    return logits, bias, case.k, case.groups, case.best, 2.5, divided


@kernel(
    reference=_noaux_topk,
    sample=_some_noaux,
    sizes=[
        {"t": 1, "e": 2, "k": 1, "groups": 1, "best": 1, "s": 0, "normalize": 0},
        {"t": 5, "e": 40, "k": 6, "groups": 8, "best": 3, "s": 1},
        {"t": 5, "e": 256, "k": 8, "groups": 8, "best": 4, "s": 1},
        {"t": 3, "e": 384, "k": 10, "groups": 1, "best": 1, "s": 1},
        {"t": 6, "e": 160, "k": 6, "groups": 32, "best": 3, "s": 0, "normalize": 0},
    ],
    large={"t": 4096, "e": 256, "k": 8, "groups": 8, "best": 4, "s": 1},
    varying=("n_tokens",),
)
def moe_noaux_topk(
    logits: mx.array,
    bias: mx.array,
    k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> Launch:
    """DeepSeek-V3's choice of K of ``[T, E]``: ``indices``, ``weights`` ``[T, K]``.

    As in transformers, experts outside the best groups are never chosen. mlx-lm does
    not normalise for K = 1, where ``normalize`` must be false to agree with it.
    """
    n_tokens, n_experts = check_routing(logits, k)
    expect("bias", bias, (n_experts,))
    per_lane = check_groups(n_experts, k, n_group, topk_group)
    grid, threadgroup = _one_simdgroup_each(n_tokens)
    return Launch(
        "moe_noaux_topk",
        {
            "logits": logits,
            "bias": bias,
            "n_tokens": n_tokens,
            "n_experts": n_experts,
            "n_group": n_group,
            "topk_group": topk_group,
            "k": k,
            "scale": scale,
        },
        {"indices": (n_tokens, k), "weights": (n_tokens, k)},
        grid,
        threadgroup,
        {
            "PER_LANE": per_lane,
            "NORMALIZE": int(normalize),
        },
    )


def check_groups(n_experts: int, k: int, n_group: int, topk_group: int) -> int:
    """Check groups of experts; return the most experts that a lane looks at."""
    require("n_group", n_group > 0 and SIMD % n_group == 0, "a divisor of 32", n_group)
    require(
        "n_group", n_experts % n_group == 0, f"a divisor of E = {n_experts}", n_group
    )
    per_group = n_experts // n_group
    require("n_group", n_group == 1 or per_group > 1, "two experts a group", n_group)
    known = 1 <= topk_group <= n_group
    require("topk_group", known, f"1 to n_group = {n_group}", topk_group)
    n_kept = topk_group * per_group
    require("k", k <= n_kept, f"at most {n_kept} experts of the groups kept", k)
    return ceil_div(per_group, SIMD // n_group)


def _combine(given: Given) -> mx.array:
    wide = given.wide
    total = (wide.weights[:, None] * wide.experts).sum(axis=0)
    return ops.combined(wide.h, total, wide.shared, wide.gate).astype(given.h.dtype)


def _combine_apart(given: Given) -> mx.array:
    return _combine(Given(**{**vars(given), "experts": mx.stack(given.experts)}))


def _one_token(case: Case) -> tuple[Any, ...]:
    h, shared, gate = (case.normal(n) for n in (case.d, case.d, 1))
    weights = random_weights(case.rng, case.k)
    return h, shared, gate, weights, case.normal(case.k, case.d)


def _one_token_apart(case: Case) -> tuple[Any, ...]:
    *rest, experts = _one_token(case)
    return (*rest, [experts[j] for j in range(case.k)])


def _check_token(h: mx.array, shared: mx.array, weights: mx.array) -> tuple[int, int]:
    (n,) = dims("h", h, 1)
    expect("shared", shared, (n,))
    (k,) = dims("weights", weights, 1)
    require("weights", k <= MAX_K, f"K <= {MAX_K}", k)
    return n, k


@kernel(
    reference=_combine_apart,
    sample=_one_token_apart,
    sizes=[{"k": 1, "d": 1}, {"k": 10, "d": 261}, {"k": 16, "d": 96}],
    large={"k": 8, "d": 1 << 20},
    varying=("n",),
)
def moe_combine_residual(
    h: mx.array,
    shared: mx.array,
    gate: mx.array,
    weights: mx.array,
    experts: list[mx.array],
) -> Launch:
    """``h + sum(w * e) + sigmoid(gate) * shared``, ``[D]``, of K separate arrays."""
    n, k = _check_token(h, shared, weights)
    expect("gate", gate, (1,))
    require("experts", len(experts) == k, f"K = {k} arrays", len(experts))
    for j, expert in enumerate(experts):
        expect(f"experts[{j}]", expert, (n,))
    # Metal requires every buffer bound; the kernel does not read these.
    bound = [*experts, *[gate] * (MAX_K - k)]
    return Launch(
        "moe_combine_residual",
        {
            "h": h,
            "shared": shared,
            "gate": gate,
            "weights": weights,
            **{f"e{j}": expert for j, expert in enumerate(bound)},
            "n": n,
        },
        {"out": (n,)},
        (ceil_div(n, 256) * 256, 1, 1),
        (256, 1, 1),
        {"K": k},
    )


@kernel(
    reference=_combine,
    sample=_one_token,
    sizes=[{"k": 1, "d": 1}, {"k": 10, "d": 261}, {"k": 16, "d": 96}],
    large={"k": 8, "d": 1 << 20},
    varying=("n",),
)
def moe_combine_residual_flat(
    h: mx.array,
    shared: mx.array,
    gate: mx.array,
    weights: mx.array,
    experts: mx.array,
) -> Launch:
    """``h + sum(w * e) + sigmoid(gate) * shared``, ``[D]``, experts ``[K, D]``."""
    n, k = _check_token(h, shared, weights)
    expect("gate", gate, (1,))
    expect("experts", experts, (k, n))
    require("experts", k * n < 1 << 31, "K * D < 2^31", k * n)
    return Launch(
        "moe_combine_residual_flat",
        {
            "h": h,
            "shared": shared,
            "gate": gate,
            "weights": weights,
            "experts": experts,
            "k": k,
            "n": n,
        },
        {"out": (n,)},
        (ceil_div(n, 256) * 256, 1, 1),
        (256, 1, 1),
    )


_combine_tokens = in_float32(ops.combined)


def _some_tokens(case: Case) -> tuple[Any, ...]:
    h, shared = (case.normal(case.t, case.d) for _ in range(2))
    moe_sum = normal(case.rng, (case.dtype, mx.float32)[case.s], case.t, case.d)
    return h, moe_sum, shared, case.normal(case.t, 1)


@kernel(
    reference=_combine_tokens,
    sample=_some_tokens,
    sizes=[
        {"t": 1, "d": 1, "s": 0},
        {"t": 3, "d": 130, "s": 1},
        {"t": 7, "d": 516, "s": 1},
        {"t": 2, "d": 1028, "s": 0},
    ],
    large={"t": 2048, "d": 4096, "s": 1},
    varying=("n",),
)
def moe_combine_residual_n_tokens(
    h: mx.array, moe_sum: mx.array, shared: mx.array, gate: mx.array
) -> Launch:
    """``h + moe_sum + sigmoid(gate) * shared`` over ``[T, D]``, gate ``[T, 1]``."""
    n_tokens, n = dims("h", h, 2)
    expect("moe_sum", moe_sum, (n_tokens, n))
    expect("shared", shared, (n_tokens, n))
    expect("gate", gate, (n_tokens, 1))
    return Launch(
        "moe_combine_residual_n_tokens",
        {"h": h, "moe_sum": moe_sum, "shared": shared, "gate": gate, "n": n},
        {"out": (n_tokens, n)},
        (256 * ceil_div(n, 4 * 256), n_tokens, 1),
        (256, 1, 1),
    )


def _accumulate(given: Given) -> mx.array:
    weighted = given.weights[:, None] * given.wide.bucket
    return given.acc.at[given.tokens].add(weighted)


def _some_bucket(case: Case) -> tuple[Any, ...]:
    tokens = mx.array(case.rng.permutation(case.t)[: case.m].astype(np.uint32))
    acc = normal(case.rng, mx.float32, case.t, case.d)
    bucket = case.normal(case.m, case.d)
    return acc, bucket, tokens, random_weights(case.rng, case.m)


@kernel(
    reference=_accumulate,
    sample=_some_bucket,
    sizes=[
        {"t": 1, "m": 1, "d": 1},
        {"t": 5, "m": 3, "d": 514},
        {"t": 41, "m": 37, "d": 20},
        {"t": 9, "m": 9, "d": 516},
    ],
    large={"t": 2048, "m": 512, "d": 4096},
    varying=("m", "n"),
)
def moe_bucket_accumulate(
    acc: mx.array, bucket: mx.array, tokens: mx.array, weights: mx.array
) -> Launch:
    """Float32 ``acc`` ``[T, D]``, plus ``weights * bucket`` at ``tokens`` ``[M]``."""
    n_tokens, n = dims("acc", acc, 2)
    m, _ = dims("bucket", bucket, 2)
    expect("bucket", bucket, (m, n))
    expect("tokens", tokens, (m,))
    expect("weights", weights, (m,))
    require("tokens", m <= n_tokens, f"at most T = {n_tokens}", m)
    return Launch(
        "moe_bucket_accumulate",
        {
            "acc": acc,
            "bucket": bucket,
            "tokens": tokens,
            "weights": weights,
            "m": m,
            "n": n,
        },
        {"out": (n_tokens, n)},
        (ceil_div(n, 4 * 128) * 128, n_tokens, 1),
        (128, 1, 1),
    )


def _id_map(given: Given) -> tuple[mx.array, mx.array]:
    n_tokens, k = given.indices.shape
    chosen = given.indices[..., None] == mx.arange(given.n_experts)
    slots = mx.argmax(chosen, axis=1)
    assignments = mx.arange(n_tokens)[:, None] * k + slots
    lists = mx.where(chosen.any(axis=1), assignments, UNUSED).astype(mx.uint32)
    counts = chosen.sum(axis=(0, 1)).astype(mx.uint32)
    return counts, mx.sort(lists, axis=0).T


def _some_choices(case: Case) -> tuple[Any, ...]:
    """Return K distinct experts per token, lower ids more often."""
    share = 1.0 / np.arange(1, case.e + 1)
    share /= share.sum()
    rows = [
        case.rng.choice(case.e, case.k, replace=False, p=share) for _ in range(case.t)
    ]
    return mx.array(np.stack(rows).astype(np.int32)), case.e


@kernel(
    reference=_id_map,
    sample=_some_choices,
    sizes=[
        {"t": 1, "k": 1, "e": 2},
        {"t": 37, "k": 3, "e": 7},
        {"t": 129, "k": 10, "e": 64},
        {"t": 5, "k": 16, "e": 300},
    ],
    large={"t": 4096, "k": 10, "e": 512},
    varying=("n_tokens",),
    dtypes=FLOAT32,
)
def moe_id_map(indices: mx.array, n_experts: int) -> Launch:
    """Experts ``[T, K]`` as ``counts`` ``[E]`` and lists of assignments ``[E, T]``."""
    n_tokens, k = dims("indices", indices, 2)
    known = 1 <= n_experts <= MAX_EXPERTS
    require("n_experts", known, f"1 to {MAX_EXPERTS}", n_experts)
    require("indices", k <= min(MAX_K, n_experts), f"K <= {MAX_K}, at most E", k)
    # Assignments are uint32, of which one value means none.
    require("indices", n_tokens * k < 1 << 31, "T * K < 2^31", n_tokens * k)
    grid, threadgroup = _one_simdgroup_each(n_experts)
    return Launch(
        "moe_id_map",
        {"indices": indices, "n_tokens": n_tokens, "k": k, "n_experts": n_experts},
        {"counts": (n_experts,), "lists": (n_experts, n_tokens)},
        grid,
        threadgroup,
    )


def _mm_id(given: Given) -> mx.array:
    n_tokens, x, k = given.lists.shape[1], given.wide.x, given.k
    per_assignment = x.shape[0] != n_tokens
    out = mx.zeros((n_tokens * k, given.n_out))
    slots = numbers(given.slot_of_expert)
    for expert, count in enumerate(numbers(given.counts)):
        if count:
            chosen = given.lists[expert, :count]
            w = in_slot(given, given.matrix, slots[expert], x.shape[1])
            out[chosen] = linear(x[chosen if per_assignment else chosen // k], w)
    return out.reshape(n_tokens, k, given.n_out).astype(given.x.dtype)


def _some_assignments(case: Case) -> tuple[Any, ...]:
    indices, n_experts = _some_choices(case)
    counts, lists = _id_map(Given(indices=indices, n_experts=n_experts))
    x = case.normal(case.t * case.k if case.get("each") else case.t, case.i)
    matrix = random_matrix(case, n_experts + 1, (case.o, case.i), case.bits)
    order = case.rng.permutation(n_experts + 1)[:n_experts]
    slots = mx.array(order.astype(np.uint32))
    return x, matrix, counts, lists, slots, case.k, case.o, case.bits, case.g


@kernel(
    reference=_mm_id,
    sample=_some_assignments,
    sizes=[
        dict(t=1, k=1, e=2, i=32, o=1, bits=2, g=32, s=0),
        dict(t=5, k=2, e=3, i=64, o=67, bits=4, g=64, s=1, base=1),
        dict(t=37, k=2, e=3, i=96, o=40, bits=8, g=32, s=0, each=1, base=3),
        dict(t=34, k=1, e=2, i=256, o=130, bits=4, g=128, s=1, base=8),
        dict(t=9, k=2, e=3, i=96, o=67, bits=4, g=32, s=0, base=2, floats=1, bias=1),
        dict(t=3, k=1, e=2, i=64, o=5, bits=4, g=16, s=0, each=1, floats=1),
    ],
    large=dict(t=1024, k=8, e=64, i=2048, o=768, bits=4, g=64, s=1),
    varying=("n_tokens",),
)
def moe_mm_id(
    x: mx.array,
    matrix: Matrix,
    counts: mx.array,
    lists: mx.array,
    slot_of_expert: mx.array,
    k: int,
    n_out: int,
    bits: int,
    group_size: int,
) -> Launch:
    """Products of experts with the rows that ``moe_id_map`` lists: ``[T, K, O]``.

    ``x`` is ``[T, I]``, shared by a token's K experts, or ``[T * K, I]``. Experts may
    have biases.
    """
    n_experts, n_tokens = dims("lists", lists, 2)
    n_rows, n_in = dims("x", x, 2)
    require("k", 1 <= k <= min(MAX_K, n_experts), f"1 to {MAX_K}, at most E", k)
    require("x", n_rows in (n_tokens, n_tokens * k), "T or T * K rows", n_rows)
    require("lists", n_tokens * k < 1 << 31, "T * K < 2^31", n_tokens * k)
    expect("counts", counts, (n_experts,))
    expect("slot_of_expert", slot_of_expert, (n_experts,))
    lengths = check_matrix("matrix", matrix, n_out, n_in, bits, group_size)
    inputs, there = matrix_inputs(matrix)
    return Launch(
        "moe_mm_id",
        {
            "x": x,
            **inputs,
            **row_lengths(lengths),
            "counts": counts,
            "lists": lists,
            "slot_of_expert": slot_of_expert,
            "n_tokens": n_tokens,
            "k": k,
            "n_in": n_in,
            "n_out": n_out,
        },
        {"out": (n_tokens, k, n_out)},
        (128 * ceil_div(n_out, 64), ceil_div(n_tokens, 32), n_experts),
        (128, 1, 1),
        {
            "BITS": bits,
            "G": group_size,
            "PER_ASSIGNMENT": int(n_rows != n_tokens),
            **there,
        },
        types_of(matrix, x.dtype),
    )


def _combine_slots(given: Given) -> mx.array:
    return (given.weights[..., None] * given.wide.mid).sum(axis=1)


def _some_slots(case: Case) -> tuple[Any, ...]:
    return case.normal(case.t, case.k, case.d), random_weights(case.rng, case.t, case.k)


@kernel(
    reference=_combine_slots,
    sample=_some_slots,
    sizes=[
        {"t": 1, "k": 1, "d": 1},
        {"t": 3, "k": 10, "d": 131},
        {"t": 5, "k": 8, "d": 260},
        {"t": 2, "k": 16, "d": 1028},
    ],
    large={"t": 2048, "k": 8, "d": 4096},
    varying=("n",),
)
def moe_combine_topk(mid: mx.array, weights: mx.array) -> Launch:
    """The weighted sum over K of ``[T, K, D]``, weights ``[T, K]``: ``[T, D]``."""
    n_tokens, k, n = dims("mid", mid, 3)
    expect("weights", weights, (n_tokens, k))
    return Launch(
        "moe_combine_topk",
        {"mid": mid, "weights": weights, "k": k, "n": n},
        {"out": (n_tokens, n)},
        (256 * ceil_div(n, 4 * 256), n_tokens, 1),
        (256, 1, 1),
    )
