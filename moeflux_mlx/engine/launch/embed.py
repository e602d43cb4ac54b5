"""Launches of ``kernels/embed.metal``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ...experts.weights import Weight
from ..ops.functions import embed
from .base import (
    FLOATS,
    Case,
    Given,
    Launch,
    ceil_div,
    dims,
    expect,
    kernel,
    normal,
    require,
)
from .quant import quantised, stored_in


def _rows(given: Given, weight: Weight) -> mx.array:
    ids, vocab = given.token_ids.reshape(-1), weight.w.shape[0]
    inside = (ids >= 0) & (ids < vocab)
    rows = embed(mx.where(inside, ids, 0), weight)
    return mx.where(inside[:, None], rows, np.nan).astype(given.dtype)


def _embed(given: Given) -> mx.array:
    return _rows(given, stored_in(given))


def _embed_dense(given: Given) -> mx.array:
    return _rows(given, Weight(given.w))


def _ids(case: Case) -> mx.array:
    """Return T ids, or the least and the largest ones beside a vocabulary."""
    ids = case.rng.integers(0, case.v, case.t)
    if case.get("outside"):
        ids[:2] = case.v, -1
    return mx.array(ids.astype(np.int32)).reshape(-1, *[1] * case.get("column"))


def _some_embed(case: Case) -> tuple[Any, ...]:
    parts = quantised(case, case.v, case.d, case.bits)
    return _ids(case), *parts, case.bits, case.g, case.dtype


def _some_dense(case: Case) -> tuple[Any, ...]:
    return _ids(case), normal(case.rng, case.other, case.v, case.d), case.dtype


def _checked_ids(token_ids: mx.array) -> int:
    """Return the number of ids ``[T]`` or ``[T, 1]``."""
    two = isinstance(token_ids, mx.array) and token_ids.ndim == 2
    n_tokens, *one = dims("token_ids", token_ids, 2 if two else 1)
    require("token_ids", one in ([], [1]), "one id in a row", tuple(token_ids.shape))
    return n_tokens


@kernel(
    reference=_embed,
    sample=_some_embed,
    sizes=[
        dict(t=1, v=1, d=32, bits=4, g=32, s=0),
        dict(t=9, v=7, d=192, bits=4, g=64, s=1),
        dict(t=3, v=37, d=96, bits=8, g=32, s=0, outside=1, column=1),
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
    """Rows ``token_ids`` int32 of an embedding ``[V, D]``, as ``dtype`` ``[T, D]``.

    Ids are ``[T]`` or ``[T, 1]``. The row of an id outside of the embedding is NaN.
    """
    n_tokens = _checked_ids(token_ids)
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
            "n_rows": vocab,
            "dim": dim,
        },
        {"out": (n_tokens, dim)},
        (64 * ceil_div(n_words, 64), n_tokens, 1),
        (64, 1, 1),
        {"BITS": bits, "G": group_size},
        {"T": dtype},
    )


@kernel(
    reference=_embed_dense,
    sample=_some_dense,
    sizes=[
        dict(t=1, v=1, d=1, s=0),
        dict(t=9, v=7, d=131, s=1),
        dict(t=3, v=37, d=258, s=0, outside=1, column=1),
    ],
    large=dict(t=4096, v=100000, d=2048, s=0),
    varying=(),
)
def embed_gather_dense(token_ids: mx.array, w: mx.array, dtype: mx.Dtype) -> Launch:
    """Rows ``token_ids`` of a dense ``[V, D]``, as ``embed_gather_4bit`` gives them."""
    n_tokens = _checked_ids(token_ids)
    vocab, dim = dims("w", w, 2)
    require("dtype", dtype in FLOATS, "a floating type", dtype)
    return Launch(
        "embed_gather_dense",
        {"token_ids": token_ids, "w": w, "n_rows": vocab, "dim": dim},
        {"out": (n_tokens, dim)},
        (64 * ceil_div(dim, 256), n_tokens, 1),
        (64, 1, 1),
        {},
        {"T": dtype},
    )
