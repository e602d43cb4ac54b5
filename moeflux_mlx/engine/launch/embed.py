"""Launches of ``kernels/embed.metal``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.functions import embed
from .base import FLOATS, Case, Given, Launch, ceil_div, dims, expect, kernel, require
from .quant import quantised, stored_in


def _embed(given: Given) -> mx.array:
    return embed(given.token_ids, stored_in(given)).astype(given.dtype)


def _some_embed(case: Case) -> tuple[Any, ...]:
    ids = mx.array(case.rng.integers(0, case.v, case.t).astype(np.int32))
    parts = quantised(case, case.v, case.d, case.bits)
    return ids, *parts, case.bits, case.g, case.dtype


@kernel(
    reference=_embed,
    sample=_some_embed,
    sizes=[
        dict(t=1, v=1, d=32, bits=4, g=32, s=0),
        dict(t=9, v=7, d=192, bits=4, g=64, s=1),
        dict(t=3, v=37, d=96, bits=8, g=32, s=0),
        dict(t=2, v=5, d=256, bits=2, g=128, s=1),
    ],
    large=dict(t=4096, v=100000, d=2048, bits=4, g=64, s=0),
    varying=(),
)
def embed_gather_4bit(
    token_ids: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
) -> Launch:
    """Rows ``token_ids`` int32 ``[T]`` of an embedding ``[V, D]``, as ``dtype``.

    The kernel does not check ids: they are data, so callers must.
    """
    (n_tokens,) = dims("token_ids", token_ids, 1)
    require("bits", bits in (2, 4, 8), "2, 4 or 8", bits)
    require("group_size", group_size in (32, 64, 128), "32, 64 or 128", group_size)
    require("dtype", dtype in FLOATS, "a floating type", dtype)
    vocab, n_words = dims("w", w, 2)
    dim = n_words * 32 // bits
    require("w", dim % group_size == 0, f"a width in groups of {group_size}", dim)
    expect("scales", scales, (vocab, dim // group_size))
    expect("biases", biases, (vocab, dim // group_size))
    return Launch(
        "embed_gather_4bit",
        {
            "token_ids": token_ids,
            "w": w,
            "scales": scales,
            "biases": biases,
            "dim": dim,
        },
        {"out": (n_tokens, dim)},
        (64 * ceil_div(n_words, 64), n_tokens, 1),
        (64, 1, 1),
        {"BITS": bits, "G": group_size},
        {"T": dtype},
    )
