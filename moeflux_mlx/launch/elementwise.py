"""Launches of ``kernels/elementwise.metal``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from .base import Launch, dims, expect, kernel, normal


def _add(a: mx.array, b: mx.array) -> mx.array:
    return a + b


def _two_vectors(rng: np.random.Generator, dtype: mx.Dtype, n: int) -> tuple[Any, ...]:
    return normal(rng, dtype, n), normal(rng, dtype, n)


@kernel(
    reference=_add,
    sample=_two_vectors,
    sizes=[{"n": 1}, {"n": 37}, {"n": 1025}],
    large={"n": 1 << 24},
)
def residual_add(a: mx.array, b: mx.array) -> Launch:
    """``a + b`` over ``[n]``."""
    (n,) = dims("a", a, 1)
    expect("b", b, (n,))
    return Launch(
        "residual_add", {"a": a, "b": b, "n": n}, {"out": (n,)}, (n, 1, 1), (256, 1, 1)
    )
