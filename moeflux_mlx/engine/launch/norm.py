"""Launches of ``kernels/norm.metal``.

Letters: T tokens, D row width, H heads, Hk key heads, d head width. A weight may have
another type than activations: bfloat16 in a checkpoint, with float32 activations.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from ... import device
from ...device import SIMD
from ..ops import norm as ops
from ..ops.functions import rms_norm
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

MAX_THREADS = 1024
# Columns of a row that a simdgroup, or a threadgroup of 1024, keeps in registers. On
# Metal, M1 and M2 are certain to run 1024 threads with 16 values each.
MAX_HEAD_DIM = 1024
MAX_DIM = 1 << 16 if device.has_many_registers() else 1 << 14


def _check_eps(eps: float) -> None:
    require("eps", 0 <= eps < math.inf, "a finite number, not negative", eps)


def _row_threads(dim: int) -> int:
    """Return the threads for a row: whole simdgroups, four columns per thread."""
    return min(MAX_THREADS, ceil_div(dim, 4 * SIMD) * SIMD)


def _slices(name: str, x: mx.array, weight: mx.array) -> tuple[int, int]:
    """Return the number and width of the slices of ``x``, as wide as ``weight``."""
    n_tokens, width = dims(name, x, 2)
    (dim,) = dims("weight", weight, 1)
    require("weight", dim <= MAX_HEAD_DIM, f"d <= {MAX_HEAD_DIM}", dim)
    require(name, width % dim == 0, f"a multiple of {dim} columns", width)
    return n_tokens * (width // dim), dim


def _simdgroup_each(n: int) -> tuple[int, int, int]:
    """Return the grid for ``n`` simdgroups, four per threadgroup."""
    return (4 * SIMD, ceil_div(n, 4), 1)


def _weight(case: Case) -> mx.array:
    """Return a weight ``[d]`` around 1."""
    values = 1 + 0.5 * case.rng.standard_normal(case.d, np.float32)
    return mx.array(values).astype(case.other)


ROWS: list[dict[str, int]] = [
    {"t": 1, "d": 1, "s": 0},
    {"t": 1, "d": 7, "s": 0},
    {"t": 3, "d": 7, "s": 1},
    {"t": 2, "d": 301, "s": 0},
    {"t": 1, "d": 2048, "s": 1},
    {"t": 1, "d": 4101, "s": 0},
]
LARGE_ROWS = {"t": 4096, "d": 4096, "s": 1}
EPS = 1e-3


def _sum_sq(given: Given) -> mx.array:
    return given.wide.x.square().sum(axis=-1)


def _some_rows_weighted(case: Case) -> tuple[Any, ...]:
    return case.normal(case.t, case.d), _weight(case), EPS


def _some_rows(case: Case) -> tuple[Any, ...]:
    return _some_rows_weighted(case)[:1]


@kernel(reference=_sum_sq, sample=_some_rows, sizes=ROWS, large=LARGE_ROWS, varying=())
def rms_norm_sum_sq(x: mx.array) -> Launch:
    """The sum of squares of each row of ``[T, D]``, float32 ``[T]``."""
    n_tokens, dim = dims("x", x, 2)
    require("x", dim < 1 << 31, "D < 2^31", dim)
    n_threads = _row_threads(dim)
    return Launch(
        "rms_norm_sum_sq",
        {"x": x, "dim": dim},
        {"sum_sq": (n_tokens,)},
        (n_threads, n_tokens, 1),
        (n_threads, 1, 1),
    )


def _apply(given: Given) -> mx.array:
    wide = given.wide
    scale = mx.rsqrt(wide.sum_sq[:, None] / wide.x.shape[1] + wide.eps)
    return (wide.x * scale * wide.weight).astype(given.x.dtype)


def _some_rows_summed(case: Case) -> tuple[Any, ...]:
    x, weight, eps = _some_rows_weighted(case)
    return x, _sum_sq(Given(x=x)), weight, eps


def _apply_launch(
    name: str,
    x: mx.array,
    sum_sq: mx.array,
    weight: mx.array,
    eps: float,
    per_thread: int,
) -> Launch:
    n_tokens, dim = dims("x", x, 2)
    require("x", dim < 1 << 31, "D < 2^31", dim)
    expect("sum_sq", sum_sq, (n_tokens,))
    expect("weight", weight, (dim,))
    _check_eps(eps)
    n_threads = min(256, ceil_div(dim, per_thread * SIMD) * SIMD)
    wide = ceil_div(dim, per_thread * n_threads) * n_threads
    return Launch(
        name,
        {"x": x, "sum_sq": sum_sq, "weight": weight, "dim": dim, "eps": eps},
        {"out": (n_tokens, dim)},
        (wide, n_tokens, 1),
        (n_threads, 1, 1),
    )


@kernel(
    reference=_apply, sample=_some_rows_summed, sizes=ROWS, large=LARGE_ROWS, varying=()
)
def rms_norm_apply(
    x: mx.array, sum_sq: mx.array, weight: mx.array, eps: float
) -> Launch:
    """``x * rsqrt(sum_sq / D + eps) * weight`` over ``[T, D]``, a thread per value."""
    return _apply_launch("rms_norm_apply", x, sum_sq, weight, eps, 1)


@kernel(
    reference=_apply, sample=_some_rows_summed, sizes=ROWS, large=LARGE_ROWS, varying=()
)
def rms_norm_apply_bf16(
    x: mx.array, sum_sq: mx.array, weight: mx.array, eps: float
) -> Launch:
    """``x * rsqrt(sum_sq / D + eps) * weight`` over ``[T, D]``, four per thread."""
    return _apply_launch("rms_norm_apply_bf16", x, sum_sq, weight, eps, 4)


_fused = in_float32(rms_norm)


@kernel(
    reference=_fused,
    sample=_some_rows_weighted,
    sizes=[*ROWS, {"t": 1, "d": 1 << 14, "s": 0}],
    large=LARGE_ROWS,
    varying=(),
)
def rms_norm_bf16_fused_n_tokens(x: mx.array, weight: mx.array, eps: float) -> Launch:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the rows of ``[T, D]``."""
    n_tokens, dim = dims("x", x, 2)
    require("x", dim <= MAX_DIM, f"D <= {MAX_DIM}", dim)
    expect("weight", weight, (dim,))
    _check_eps(eps)
    n_threads = _row_threads(dim)
    return Launch(
        "rms_norm_bf16_fused_n_tokens",
        {"x": x, "weight": weight, "dim": dim, "eps": eps},
        {"out": (n_tokens, dim)},
        (n_threads, n_tokens, 1),
        (n_threads, 1, 1),
        {"BLOCKS": ceil_div(dim, 4 * n_threads)},
    )


_per_head = in_float32(ops.rms_norm_heads)


def _some_heads(case: Case) -> tuple[Any, ...]:
    return case.normal(case.t, case.h * case.d), _weight(case), EPS


HEADS: list[dict[str, int]] = [
    {"t": 1, "h": 1, "d": 1, "s": 0},
    {"t": 1, "h": 1, "d": 7, "s": 1},
    {"t": 3, "h": 2, "d": 5, "s": 1},
    {"t": 1, "h": 3, "d": 1024, "s": 0},
    {"t": 3, "h": 7, "d": 77, "s": 0},
    {"t": 5, "h": 4, "d": 128, "s": 1},
    {"t": 1, "h": 5, "d": 256, "s": 0},
]
LARGE_HEADS = {"t": 4096, "h": 32, "d": 128, "s": 1}


@kernel(
    reference=_per_head,
    sample=_some_heads,
    sizes=HEADS,
    large=LARGE_HEADS,
    varying=("n_slices",),
)
def rms_norm_per_head_n_tokens(x: mx.array, weight: mx.array, eps: float) -> Launch:
    """The weighted RMS norm of each slice of d columns of ``[T, H * d]``."""
    n_slices, dim = _slices("x", x, weight)
    _check_eps(eps)
    return Launch(
        "rms_norm_per_head_n_tokens",
        {"x": x, "weight": weight, "n_slices": n_slices, "dim": dim, "eps": eps},
        {"out": tuple(x.shape)},
        _simdgroup_each(n_slices),
        (4 * SIMD, 1, 1),
        {"BLOCKS": ceil_div(dim, 4 * SIMD)},
    )


_qk = in_float32(ops.unit_qk)


def _some_qkv(case: Case) -> tuple[Any, ...]:
    h, d, gap, width = case.h, case.d, case.gap, case.h * case.d
    return case.normal(case.t, 2 * width + gap + case.v), h, d, width + gap, 1e-3


@kernel(
    reference=_qk,
    sample=_some_qkv,
    sizes=[
        {"t": 1, "h": 1, "d": 1, "gap": 0, "v": 0},
        {"t": 1, "h": 1, "d": 3, "gap": 0, "v": 1},
        {"t": 3, "h": 2, "d": 5, "gap": 3, "v": 11},
        {"t": 2, "h": 3, "d": 36, "gap": 131, "v": 257},
        {"t": 1, "h": 2, "d": 128, "gap": 0, "v": 512},
        {"t": 3, "h": 1, "d": 257, "gap": 0, "v": 385},
    ],
    large={"t": 4096, "h": 16, "d": 128, "gap": 0, "v": 4096},
    varying=("total",),
)
def rms_norm_qk(
    x: mx.array, num_k_heads: int, key_dim: int, key_offset: int, eps: float
) -> Launch:
    """Rows ``q|gap|k|v`` with heads of q and k as unit vectors, q times d^-1/2.

    Args:
        x: ``[T, total]``; q begins at column 0.
        num_k_heads: Hk, the heads of q and of k.
        key_dim: d.
        key_offset: first column of k.
        eps: added to each head's sum of squares.
    """
    n_tokens, total = dims("x", x, 2)
    require("num_k_heads", num_k_heads > 0, "a positive number", num_k_heads)
    require("key_dim", 0 < key_dim <= MAX_HEAD_DIM, f"1 to {MAX_HEAD_DIM}", key_dim)
    width = num_k_heads * key_dim
    inside = width <= key_offset <= total - width
    require("key_offset", inside, f"{width} columns on both sides", key_offset)
    require("x", total < 1 << 31, "fewer than 2^31 columns", total)
    _check_eps(eps)
    n_blocks = ceil_div(key_dim, 4 * SIMD)
    chunk, rest = 4 * SIMD * n_blocks, (key_offset - width, total - key_offset - width)
    n_pieces = 2 * num_k_heads + sum(ceil_div(n, chunk) for n in rest)
    sizes = {"n_heads": num_k_heads, "dim": key_dim, "key_offset": key_offset}
    return Launch(
        "rms_norm_qk",
        {"x": x, **sizes, "total": total, "eps": eps},
        {"out": (n_tokens, total)},
        (4 * SIMD, ceil_div(n_pieces, 4), n_tokens),
        (4 * SIMD, 1, 1),
        {"BLOCKS": n_blocks},
    )


_gated = in_float32(ops.gated_rms_norm)


def _some_gated_heads(case: Case) -> tuple[Any, ...]:
    x, weight, eps = _some_heads(case)
    return x, case.normal(case.t, case.h * case.d), weight, eps


@kernel(
    reference=_gated,
    sample=_some_gated_heads,
    sizes=HEADS,
    large=LARGE_HEADS,
    varying=("n_slices",),
)
def gated_rms_norm(
    values: mx.array, z: mx.array, weight: mx.array, eps: float
) -> Launch:
    """``rms_norm(values) * weight * silu(z)`` per head of ``[T, H * d]``."""
    n_slices, dim = _slices("values", values, weight)
    expect("z", z, tuple(values.shape))
    _check_eps(eps)
    inputs: dict[str, Any] = {"values": values, "z": z, "weight": weight}
    return Launch(
        "gated_rms_norm",
        {**inputs, "n_slices": n_slices, "dim": dim, "eps": eps},
        {"out": tuple(values.shape)},
        _simdgroup_each(n_slices),
        (4 * SIMD, 1, 1),
        {"BLOCKS": ceil_div(dim, 4 * SIMD)},
    )
