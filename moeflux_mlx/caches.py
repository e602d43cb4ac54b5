"""Take back what a call did to mlx-lm's caches, of whatever kind they are.

MLX's values are immutable, so what a cache held is there as long as somebody holds it.
Yet rows are written in place only while nobody else holds them: where new ones replace
nothing that counts, not the rows are held but where they end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

# Their rows lie after each other, and later ones never touch those before the end.
APPENDED = (KVCache, QuantizedKVCache, BatchKVCache)
ROTATING = (RotatingKVCache, BatchRotatingKVCache)
KNOWN = (*APPENDED, *ROTATING, ArraysCache, ChunkedKVCache, ConcatenateKVCache)
ROWS = ("keys", "values")


def every_cache(caches: Any) -> list[Any] | None:
    """Return the caches of a call, those inside others too; None: not all are known."""
    found: list[Any] = []
    for cache in caches if isinstance(caches, list | tuple) else [caches]:
        if type(cache) is CacheList:
            inner = every_cache(cache.caches)
            if inner is None:
                return None
            found += inner
        elif type(cache) in KNOWN:
            found.append(cache)
        elif cache is not None:
            return None
    return found


class CacheState:
    """Where a cache was before a call, to go back to as often as wanted.

    Args:
        cache: one of ``every_cache``.
        n_tokens: of each sequence, that the call will add; None: not known.
    """

    def __init__(self, cache: Any, n_tokens: int | None):
        self.cache = cache
        left_out = ROWS if _keeps_rows(cache, n_tokens) else ()
        self._names = [name for name in vars(cache) if name not in left_out]
        self._held = self._values()

    def now(self) -> CacheState:
        """Return where the cache is now, as far as this state knows of it."""
        state = object.__new__(CacheState)
        state.cache, state._names = self.cache, self._names
        state._held = state._values()
        return state

    def put_back(self) -> None:
        """Have the cache as it was."""
        for name, value in zip(self._names, self._held, strict=True):
            setattr(self.cache, name, _copied(value))

    def _values(self) -> list[Any]:
        own = vars(self.cache)
        return [_copied(own[name]) for name in self._names]


def _keeps_rows(cache: Any, n_tokens: int | None) -> bool:
    """Tell whether rows that count stay in a cache's arrays while a call adds some."""
    kind, keys = type(cache), getattr(cache, "keys", None)
    if keys is None:
        return False
    if kind in APPENDED:
        return True
    if kind is ChunkedKVCache:
        return bool(cache.offset - cache.start_position <= cache.chunk_size)
    if kind in ROTATING and n_tokens == 1:
        # A full one loses the row that the next token does not see any more.
        n_rows = keys.shape[2]
        n_used = cache._offset if kind is BatchRotatingKVCache else cache.offset
        return bool(
            n_rows <= cache.max_size and (n_used < n_rows or n_rows == cache.max_size)
        )
    return False


def _copied(value: Any) -> Any:
    """Return a value that a cache does not change with its own; no bytes move."""
    if isinstance(value, mx.array):
        # The same values behind another handle.
        return value.view(value.dtype)
    if isinstance(value, list | tuple):
        return type(value)([_copied(part) for part in value])
    return value


@contextlib.contextmanager
def put_back_on_failure(
    caches: Iterable[Any], n_tokens: int | None = None
) -> Iterator[None]:
    """Leave caches as they were if what is done with them fails; unknown ones stay.

    Args:
        n_tokens: as for ``CacheState``.
    """
    known = [c for cache in caches for c in every_cache([cache]) or ()]
    states = [CacheState(cache, n_tokens) for cache in known]
    try:
        yield
    except BaseException:
        for state in states:
            state.put_back()
        raise
