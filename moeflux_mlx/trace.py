"""One token through a whole model as one function that MLX traced once.

Python then only hands states over; MLX replays the same launches. What would change a
launch from token to token is kept from it: caches come whole, with spare rows, and
where they end is an array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache

from .model import BuiltOnce

Forward = Callable[[mx.array, list[Any]], mx.array]
# Traces of one model: as many shapes of caches and numbers of sequences at a time.
MAX_TRACES = 4


class TracedKV:
    """Stands for a ``KVCache`` in a trace: whole arrays, and an array as offset."""

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array):
        self.keys, self.values, self.offset = keys, values, offset

    def make_mask(self, *_args: Any, **_options: Any) -> None:
        """Return None: a single token sees all rows up to its own."""


class StepTracer:
    """Runs ``forward(tokens, caches)`` for one token of each sequence from a trace.

    Args:
        forward: an ordinary call of the model, lazy throughout, that takes ``TracedKV``
            for ``KVCache`` and moves all caches on.
    """

    def __init__(self, forward: Forward):
        self._forward = forward
        self._traces: BuiltOnce[tuple[Callable[..., list[mx.array]], Any]]
        self._traces = BuiltOnce(MAX_TRACES)

    def __call__(
        self,
        tokens: mx.array,
        caches: Sequence[Any],
        held: Sequence[object],
        *,
        traced: bool = True,
    ) -> mx.array | None:
        """Return the logits ``[B, 1, V]``, or None where only an ordinary call can.

        That is: before the first token, when a cache has no room for one more, or for
        other caches than mlx-lm's plain ones.

        Args:
            tokens: ``[B, 1]``.
            held: what is part of a trace and not an argument, as weights: a trace
                serves as long as these are the same objects, and keeps them.
            traced: False makes the same call without a trace, to look into it.
        """
        kinds = tuple(_kind(cache) for cache in caches)
        if None in kinds:
            return None
        states = [array for cache in caches for array in _states(cache)]
        shapes = tuple(state.shape for state in states)
        key = (tuple(map(id, held)), tokens.shape, kinds, shapes)
        if traced:
            call, _ = self._traces.get(
                key, lambda: (mx.compile(self._function(kinds)), held)
            )
        else:
            call = self._function(kinds)
        offset = next(c.offset for c in caches if isinstance(c, KVCache))
        # Nobody else may hold the states when MLX evaluates: it updates them in place.
        for cache in caches:
            _set_states(cache, [None, None])
        new = states
        try:
            logits, *new = call(tokens, mx.array(offset, mx.int32), *states)
        finally:
            for i, cache in enumerate(caches):
                _set_states(cache, new[2 * i : 2 * i + 2])
        for cache in caches:
            if isinstance(cache, KVCache):
                cache.offset += 1
        return logits

    def _function(self, kinds: Sequence[Any]) -> Callable[..., list[mx.array]]:
        def step(
            tokens: mx.array, offset: mx.array, *states: mx.array
        ) -> list[mx.array]:
            caches: list[Any] = []
            for i, kind in enumerate(kinds):
                first, second = states[2 * i : 2 * i + 2]
                if kind is KVCache:
                    caches.append(TracedKV(first, second, offset))
                else:
                    caches.append(ArraysCache(2))
                    _set_states(caches[-1], [first, second])
            logits = self._forward(tokens, caches)
            return [logits, *(state for cache in caches for state in _states(cache))]

        return step


def _kind(cache: Any) -> type | None:
    """Return the class of a cache that a trace can move on by one token."""
    if type(cache) is KVCache:
        has_room = cache.keys is not None and cache.offset < cache.keys.shape[2]
        return KVCache if has_room else None
    if type(cache) is ArraysCache and len(cache.cache) == 2:
        plain = cache.left_padding is None and cache.lengths is None
        begun = all(state is not None for state in cache.cache)
        return ArraysCache if plain and begun else None
    return None


def _states(cache: Any) -> list[Any]:
    if isinstance(cache, ArraysCache):
        return [*cache.cache]
    return [cache.keys, cache.values]


def _set_states(cache: Any, states: list[Any]) -> None:
    if isinstance(cache, ArraysCache):
        cache.cache = states
    else:
        cache.keys, cache.values = states
