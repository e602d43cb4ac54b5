"""mlx-lm's caches of any kind: how they grow, and how they are put back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
)

from .weights import leaves

# mlx-lm's KV caches grow by this many rows.
CACHE_STEP = 256
# Their rows lie after each other, so that a mark of the end is enough to go back.
HELD_CACHES = (ArraysCache, KVCache, QuantizedKVCache, BatchKVCache)


@dataclass(frozen=True)
class CacheForm:
    """What one cache takes of a sequence: for each row, and once for all."""

    row_bytes: float
    state_bytes: int


def single_caches(cache: Iterable[Any]) -> Iterator[Any]:
    """Give the caches of a call one by one: a layer may have a list of several."""
    for one in cache:
        if one is not None:
            parts = getattr(one, "caches", None)
            yield from [one] if parts is None else single_caches(parts)


def most_rows(cache: Any) -> int | None:
    """Return how many rows a cache keeps of a long sequence; None: all of them."""
    most = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return int(most) if most else None


def rows(cache: Any) -> tuple[int, int, int]:
    """Return a KV cache's rows, those in use, and the bytes of all; else zeros."""
    keys = getattr(cache, "keys", None)
    if keys is None:
        return 0, 0, 0
    first = keys[0] if isinstance(keys, list | tuple) else keys
    used = getattr(cache, "_idx", cache.offset)
    return first.shape[-2], int(used), cache.nbytes


def n_rows(cache: Iterable[Any]) -> int:
    """Return the most rows that any of the caches of a call has in use."""
    return max((rows(c)[1] for c in single_caches(cache)), default=0)


def growth_bytes(
    cache: Iterable[Any], forms: Sequence[CacheForm], n_seqs: int, t: int, step: int
) -> int:
    """Return the bytes by which caches grow in ``t`` tokens, ``step`` at a time."""
    pairs = zip(single_caches(cache), forms, strict=False)
    return sum(_growth(one, form, n_seqs, t, step) for one, form in pairs)


def _growth(cache: Any, form: CacheForm, n_seqs: int, t: int, step: int) -> int:
    state = n_seqs * form.state_bytes if cache.empty() else 0
    allocated, used, n_bytes = rows(cache)
    row = n_bytes / allocated if allocated else n_seqs * form.row_bytes
    if not row or used + t <= allocated:
        return state
    more = _allocated(allocated, used, t, step) - allocated
    if (most := most_rows(cache)) is not None:
        more = max(0, min(more, most + t - allocated))
    return state + math.ceil(row) * more


def _allocated(allocated: int, used: int, t: int, step: int) -> int:
    """Return the rows of mlx-lm's KV cache after ``t`` tokens, ``step`` at a time.

    What is full is cut to the rows in use and grows by whole steps of its own.
    """
    end = used + t
    while used < end:
        n = min(step, end - used)
        if used + n > allocated:
            allocated = used + -(-n // CACHE_STEP) * CACHE_STEP
        used += n
    return allocated


def arrays_of(cache: Iterable[Any]) -> list[mx.array]:
    """Return the arrays that the caches of a call hold."""
    held = (c for c in single_caches(cache) if not c.empty())
    return [array for c in held for array in leaves(c.state)]


class PutBackOnFailure:
    """Leaves mlx-lm's caches as they were if the block fails.

    Rows that a KV cache took meanwhile stay, after its end, until others replace them.
    A class: a generator that Ctrl-C leaves suspended would put them back at any time.
    """

    def __init__(self, cache: Iterable[Any]):
        self._held = [
            (one, name, _held(value))
            for one in single_caches(cache)
            for name, value in vars(one).items()
            if not (isinstance(one, HELD_CACHES) and name in ("keys", "values"))
        ]

    def __enter__(self) -> None:
        """Do nothing: what there was is known."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for one, name, value in self._held:
                setattr(one, name, value)


def _held(value: Any) -> Any:
    """Return a value of a cache that stays as it is when the cache changes its own."""
    if isinstance(value, list):
        return [*value]
    return mx.array(value) if isinstance(value, mx.array) else value
