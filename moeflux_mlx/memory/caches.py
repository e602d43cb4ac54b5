"""mlx-lm's caches of any kind: their growth, and restoring their state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from ..experts.weights import leaves
from .own_caches import OwnForm, is_own

# mlx-lm's KV caches grow by this many rows.
CACHE_STEP = 256
# These append rows and never overwrite a row before the end.
APPENDED = (KVCache, QuantizedKVCache, BatchKVCache)
ROTATING = (RotatingKVCache, BatchRotatingKVCache)
KNOWN = (*APPENDED, *ROTATING, ArraysCache, ChunkedKVCache, ConcatenateKVCache)


@dataclass(frozen=True)
class CacheForm:
    """Bytes of one cache for one sequence: for each row, and independent of rows."""

    row_bytes: float
    state_bytes: int


def single_caches(cache: Iterable[Any]) -> Iterator[Any]:
    """Yield the caches of a call one by one; a layer may have a list of several."""
    for one in cache:
        if one is not None:
            inner = getattr(one, "caches", None)
            yield from [one] if inner is None else single_caches(inner)


def always_trim(cache: Iterable[Any]) -> bool:
    """Tell whether all caches of a call can be trimmed, now and when they are full."""
    singles = [*single_caches(cache)]
    return all(one.is_trimmable() and not isinstance(one, ROTATING) for one in singles)


def most_rows(cache: Any) -> int | None:
    """Return the most rows that a cache keeps of a sequence; None: unbounded."""
    most = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return int(most) if most else None


def rows(cache: Any) -> tuple[int, int, int]:
    """Return a KV cache's allocated rows, used rows and bytes; zeros for others."""
    keys = getattr(cache, "keys", None)
    if keys is None:
        return 0, 0, 0
    first = keys[0] if isinstance(keys, list | tuple) else keys
    used = getattr(cache, "_idx", cache.offset)
    return first.shape[-2], int(used), cache.nbytes


def n_rows(cache: Iterable[Any]) -> int:
    """Return the most rows in use in any cache of a call."""
    return max((rows(c)[1] for c in single_caches(cache)), default=0)


def growth_bytes(
    cache: Iterable[Any], forms: Sequence[CacheForm], n_seqs: int, t: int, step: int
) -> int:
    """Return the bytes by which caches grow in ``t`` tokens, ``step`` per call."""
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
        more = max(0, min(more, most + _rows_beyond(cache, min(t, step)) - allocated))
    return state + math.ceil(row) * more


def _rows_beyond(cache: Any, n: int) -> int:
    """Return the rows beyond its window that a windowed cache has after ``n`` more.

    A chunked cache grows by whole steps. In a rotating one the first new row replaces
    the oldest.
    """
    grows_by_steps = isinstance(cache, ChunkedKVCache)
    return -(-n // CACHE_STEP) * CACHE_STEP if grows_by_steps else n - 1


def _allocated(allocated: int, used: int, t: int, step: int) -> int:
    """Return the allocated rows of mlx-lm's KV cache after ``t`` tokens.

    The tokens arrive ``step`` per call. A full cache is first cut to its rows in use
    and then grows by multiples of ``CACHE_STEP``.
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


def are_known(cache: Iterable[Any]) -> bool:
    """Return whether ``CacheState`` can restore every cache of a call."""
    return all(type(one) in KNOWN or _is_of_model(one) for one in single_caches(cache))


def _is_of_model(cache: Any) -> bool:
    """Tell whether a file of an mlx-lm model defines a cache of immutable values.

    Subclasses of other caches may write rows where these do not, and are unknown.
    """
    is_models = type(cache).__module__.startswith("mlx_lm.models.") and is_own(cache)
    return is_models and not isinstance(cache, KNOWN) and OwnForm.of(cache).is_plain


class CacheState:
    """The state of a cache before a call, which can be restored any number of times.

    MLX's arrays are immutable, so holding a cache's arrays is enough to restore them.
    But MLX updates an array in place only if nobody else holds it. So if the call only
    appends rows, this class holds the position of the end instead of the rows.

    Args:
        cache: one of ``single_caches``.
        n_tokens: tokens of each sequence that the call will add; None: unknown.
    """

    def __init__(self, cache: Any, n_tokens: int | None = None):
        self.cache = cache
        left_out = ("keys", "values") if _keeps_rows(cache, n_tokens) else ()
        self._names = [name for name in vars(cache) if name not in left_out]
        self._held = self._values()

    def now(self) -> CacheState:
        """Return the cache's present state, of the same attributes."""
        state = object.__new__(CacheState)
        state.cache, state._names = self.cache, self._names
        state._held = state._values()
        return state

    def put_back(self) -> None:
        """Restore the cache."""
        for name, value in zip(self._names, self._held, strict=True):
            setattr(self.cache, name, _copied(value))

    def _values(self) -> list[Any]:
        own = vars(self.cache)
        return [_copied(own[name]) for name in self._names]


def _keeps_rows(cache: Any, n_tokens: int | None) -> bool:
    """Return whether a call leaves all rows that count in a cache's arrays."""
    kind = type(cache)
    if getattr(cache, "keys", None) is None:
        return False
    if isinstance(cache, APPENDED):
        return True
    if kind is ChunkedKVCache:
        return bool(cache.offset - cache.start_position <= cache.chunk_size)
    if kind in ROTATING and n_tokens == 1:
        # A full cache loses one row, which the next token does not attend to.
        allocated = cache.keys.shape[2]
        used = cache._offset if kind is BatchRotatingKVCache else cache.offset
        most = cache.max_size
        return bool(allocated <= most and (used < allocated or allocated == most))
    return False


def _copied(value: Any) -> Any:
    """Return a copy that the cache's own updates do not change; no bytes move."""
    if isinstance(value, mx.array):
        # A view has the same values but is another Python object.
        return value.view(value.dtype)
    if type(value) in (list, tuple):
        return type(value)([_copied(part) for part in value])
    return value


class PutBackOnFailure:
    """Context that restores mlx-lm's caches if its block fails; gives their states.

    Rows that a KV cache received meanwhile stay behind its end until they are replaced.
    This is a class because a generator interrupted by Ctrl-C would restore the caches
    at an unknown time.

    Args:
        n_tokens: as for ``CacheState``.
    """

    def __init__(self, cache: Iterable[Any], n_tokens: int | None = None):
        self._states = [CacheState(one, n_tokens) for one in single_caches(cache)]

    def __enter__(self) -> list[CacheState]:
        return self._states

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for state in self._states:
                state.put_back()
