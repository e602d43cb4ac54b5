"""Launches of ``kernels/elementwise.metal``.

Letters: T tokens, D model width, F width of an activation, K experts per token, H
heads, d head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..ops import elementwise as ops
from ..ops.functions import clipped_swiglu, swiglu
from .base import (
    Case,
    Given,
    Launch,
    ceil_div,
    dims,
    expect,
    in_float32,
    kernel,
    require,
)

# Threads of a threadgroup that share nothing. Grids are whole threadgroups.
THREADS = 256
MAX_VALUES = 1 << 31


def _whole_groups(n: int, n_threads: int) -> int:
    """Return ``n`` threads rounded up to whole threadgroups of ``n_threads``."""
    return ceil_div(n, n_threads) * n_threads


def _pair(
    name: str, inputs: dict[str, mx.array], rank: int, per_thread: int = 1
) -> Launch:
    """Return the launch over two arrays; they and the output have one shape."""
    (first, a), (second, b) = inputs.items()
    shape = dims(first, a, rank)
    expect(second, b, shape)
    require(first, a.size < MAX_VALUES, "fewer than 2^31 values", a.size)
    grid = (_whole_groups(ceil_div(a.size, per_thread), THREADS), 1, 1)
    inputs_and_n: dict[str, Any] = {**inputs, "n": a.size}
    return Launch(name, inputs_and_n, {"out": shape}, grid, (THREADS, 1, 1))


def _two_vectors(case: Case) -> tuple[Any, ...]:
    return case.normal(case.n), case.normal(case.n)


def _two_matrices(case: Case) -> tuple[Any, ...]:
    return case.normal(case.t, case.d), case.normal(case.t, case.d)


VECTORS = [{"n": 1}, {"n": 7}, {"n": 37}, {"n": 1025}]
MATRICES = [
    {"t": 1, "d": 1},
    {"t": 1, "d": 7},
    {"t": 3, "d": 7},
    {"t": 5, "d": 411},
    {"t": 1, "d": 2048},
]
LARGE_VECTOR = {"n": 1 << 24}
LARGE_MATRIX = {"t": 4096, "d": 4096}


_add = in_float32(ops.add)


@kernel(
    reference=_add,
    sample=_two_vectors,
    sizes=VECTORS,
    large=LARGE_VECTOR,
    varying=("n",),
)
def residual_add(a: mx.array, b: mx.array) -> Launch:
    """``a + b`` over ``[n]``."""
    return _pair("residual_add", {"a": a, "b": b}, 1)


@kernel(
    reference=_add,
    sample=_two_matrices,
    sizes=MATRICES,
    large=LARGE_MATRIX,
    varying=("n",),
)
def residual_add_n_tokens(a: mx.array, b: mx.array) -> Launch:
    """``a + b`` over ``[T, D]``."""
    return _pair("residual_add_n_tokens", {"a": a, "b": b}, 2, per_thread=4)


_swiglu = in_float32(swiglu)


@kernel(
    reference=_swiglu,
    sample=_two_vectors,
    sizes=VECTORS,
    large=LARGE_VECTOR,
    varying=("n",),
)
def swiglu_fused(gate: mx.array, up: mx.array) -> Launch:
    """``silu(gate) * up`` over ``[n]``, one thread per value."""
    return _pair("swiglu_fused", {"gate": gate, "up": up}, 1)


@kernel(
    reference=_swiglu,
    sample=_two_vectors,
    sizes=[{"n": 4}, {"n": 36}, {"n": 1028}],
    large=LARGE_VECTOR,
    varying=("n",),
)
def swiglu_fused_vec4(gate: mx.array, up: mx.array) -> Launch:
    """``silu(gate) * up`` over ``[n]``, a multiple of four; four values per thread."""
    (n,) = dims("gate", gate, 1)
    require("gate", n % 4 == 0, "a multiple of 4 values", n)
    return _pair("swiglu_fused_vec4", {"gate": gate, "up": up}, 1, per_thread=4)


def activated(gate: mx.array, up: mx.array, alpha: float, limit: float) -> mx.array:
    """Return ``silu(gate) * up``, or with a ``limit`` the clipped one."""
    out: mx.array = swiglu(gate, up)
    return clipped_swiglu(gate, up, alpha, limit) if limit else out


def _two_to_clip(case: Case) -> tuple[Any, ...]:
    given = _two_matrices(case)
    return (*given, 1.702, 0.75) if case.get("clipped") else given


@kernel(
    reference=in_float32(activated),
    sample=_two_to_clip,
    sizes=[*MATRICES, {**MATRICES[-1], "clipped": 1}],
    large=LARGE_MATRIX,
    varying=("n",),
)
def swiglu_fused_batched(
    gate: mx.array, up: mx.array, alpha: float = 1.0, limit: float = 0.0
) -> Launch:
    """``silu(gate) * up`` over ``[T, F]``, or ``clipped_swiglu`` with a ``limit``."""
    require("limit", limit >= 0, "0 or a bound", limit)
    inputs = {"gate": gate, "up": up}
    launch = _pair("swiglu_fused_batched", inputs, 2, per_thread=4)
    numbers = {"alpha": alpha, "limit": limit}
    return replace(launch, inputs={**launch.inputs, **numbers})


_sigmoid_gate = in_float32(ops.sigmoid_gate)


@kernel(
    reference=_sigmoid_gate,
    sample=_two_matrices,
    sizes=MATRICES,
    large=LARGE_MATRIX,
    varying=("n",),
)
def sigmoid_gate(x: mx.array, gate: mx.array) -> Launch:
    """``x * sigmoid(gate)`` over ``[T, D]``."""
    return _pair("sigmoid_gate", {"x": x, "gate": gate}, 2, per_thread=4)


_split = in_float32(ops.split_q_gate)


def _some_q_proj(case: Case) -> tuple[Any, ...]:
    return case.normal(case.t, 2 * case.h * case.d), case.h


@kernel(
    reference=_split,
    sample=_some_q_proj,
    sizes=[
        {"t": 1, "h": 1, "d": 1},
        {"t": 3, "h": 2, "d": 5},
        {"t": 257, "h": 1, "d": 3},
        {"t": 1, "h": 16, "d": 64},
        {"t": 5, "h": 3, "d": 80},
        {"t": 3, "h": 2, "d": 256},
    ],
    large={"t": 4096, "h": 16, "d": 256},
    varying=("n_slices",),
)
def split_q_gate(q_proj: mx.array, num_heads: int) -> Launch:
    """``[T, H * 2d]``, per head q then gate, split into two ``[T, H * d]``."""
    n_tokens, width = dims("q_proj", q_proj, 2)
    require("num_heads", num_heads > 0, "a positive number", num_heads)
    require("q_proj", width % (2 * num_heads) == 0, f"{num_heads} times 2d", width)
    head_dim, n_slices = width // num_heads // 2, n_tokens * num_heads
    wide = min(ceil_div(head_dim, 4), THREADS)
    high, half = THREADS // wide, (n_tokens, width // 2)
    return Launch(
        "split_q_gate",
        {"q_proj": q_proj, "n_slices": n_slices, "dim": head_dim},
        {"q": half, "gate": half},
        (_whole_groups(ceil_div(head_dim, 4), wide), _whole_groups(n_slices, high), 1),
        (wide, high, 1),
    )


def _weighted_sum(given: Given) -> mx.array:
    weighted = given.weights[:, None] * given.wide.values
    return weighted.sum(axis=0).astype(given.values.dtype)


def _some_values(case: Case) -> tuple[Any, ...]:
    weights = mx.array(case.rng.uniform(0.05, 1.0, case.k).astype(np.float32))
    return case.normal(case.k, case.d), weights


@kernel(
    reference=_weighted_sum,
    sample=_some_values,
    sizes=[
        {"k": 1, "d": 1},
        {"k": 2, "d": 3},
        {"k": 10, "d": 301},
        {"k": 8, "d": 2048},
    ],
    large={"k": 10, "d": 1 << 20},
    varying=(),
)
def weighted_sum(values: mx.array, weights: mx.array) -> Launch:
    """The sum of ``weights[k] * values[k]`` over ``[K, D]``; weights are float32."""
    k, dim = dims("values", values, 2)
    expect("weights", weights, (k,))
    return Launch(
        "weighted_sum",
        {"values": values, "weights": weights, "k": k, "dim": dim},
        {"out": (dim,)},
        (_whole_groups(dim, 64), 1, 1),
        (64, 1, 1),
    )


def _zeros(given: Given) -> mx.array:
    return mx.zeros((given.n,), mx.float32)


def _count(case: Case) -> tuple[Any, ...]:
    return (case.n,)


@kernel(
    reference=_zeros,
    sample=_count,
    sizes=VECTORS,
    large=LARGE_VECTOR,
    varying=("n",),
    dtypes=(mx.float32,),
)
def zero_buffer(n: int) -> Launch:
    """Zeros ``[n]`` in float32."""
    require("n", 0 < n < MAX_VALUES, "a positive number below 2^31", n)
    grid = (_whole_groups(ceil_div(n, 4), THREADS), 1, 1)
    return Launch("zero_buffer", {"n": n}, {"out": (n,)}, grid, (THREADS, 1, 1))
