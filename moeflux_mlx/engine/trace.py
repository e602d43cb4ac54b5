"""One token through layers of a model as one function that MLX traced once.

Python then only hands states over; MLX replays the same launches. What would change a
launch from token to token is kept from it: caches come whole, with spare rows, and
where they end is an array; which expert lies in which slot is an array too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from ..calls.compiling import Compiled, forget_gone
from ..experts.weights import leaves
from .context import turns_round
from .model import BuiltOnce

# Traces of some layers: as many shapes of caches and numbers of sequences at a time.
MAX_TRACES = 4


@dataclass(frozen=True)
class Passed:
    """The results of one token of each sequence in some layers.

    ``out`` is the last one's output, or the logits after a model's last.
    Where slots were looked up, ``inputs`` are what a run from each layer on begins
    with, tokens before the first, and ``chosen`` int32 ``[n, B, K]`` the experts asked
    for, a row for each layer that did.
    """

    out: mx.array
    inputs: list[mx.array]
    chosen: mx.array | None


Forward = Callable[[range, mx.array, list[Any], mx.array | None], Passed]


class TracedKV:
    """Stands for a cache of rows in a trace: whole arrays, and an array as offset.

    ``row`` int32 ``[1]`` is where the token goes, if that does not follow from it.
    """

    def __init__(
        self,
        keys: mx.array,
        values: mx.array,
        offset: mx.array,
        row: mx.array | None = None,
    ):
        self.keys, self.values, self.offset, self.row = keys, values, offset, row

    def make_mask(self, *_args: Any, **_options: Any) -> None:
        """Return None: a single token sees all rows up to its own, or all."""


class StepTracer:
    """Runs ``forward(layers, x, caches, slots)`` for one token of each sequence.

    Args:
        forward: an ordinary call of some layers of the model, lazy throughout, that
            takes ``TracedKV`` for ``KVCache`` and moves all caches on.
    """

    def __init__(self, forward: Forward):
        self._forward = forward
        self._traces: dict[range, BuiltOnce[tuple[Callable[..., Any], Any]]] = {}
        # Caches whose states a call has, and their new values.
        self._lent: tuple[Sequence[Any], list[Any]] | None = None

    def __call__(
        self,
        layers: range,
        x: mx.array,
        caches: Sequence[Any],
        held: Sequence[object],
        slots: mx.array | None = None,
        *,
        traced: bool = True,
    ) -> Passed:
        """Run layers from a trace; caches are given new states, not moved on.

        Their own row is thus written again by whoever runs the layers again, and
        states that are to be put back later the caller keeps.

        Args:
            x: tokens ``[B, 1]`` before the first layer, else what the layer before
                gave.
            caches: of these layers, all of which ``can_trace``.
            held: what is part of a trace and not an argument, as weights: a trace
                serves as long as these are the same objects, and keeps them.
            slots: uint32 ``[n, E]``, where experts that are not in memory for good
                lie; None if all are.
            traced: False makes the same call without a trace, to look into it.
        """
        kinds = [type(cache) for cache in caches]
        states = [state for cache in caches for state in states_of(cache)]
        shapes = tuple(state.shape for state in states)
        key = (tuple(map(id, held)), x.shape, tuple(kinds), shapes, slots is None)
        if traced:
            traces = self._traces.setdefault(layers, BuiltOnce(MAX_TRACES))
            call, _ = traces.get(
                key, lambda: (Compiled(self._function(layers, kinds)), held)
            )
        else:
            call = self._function(layers, kinds)
        offset = next((c.offset for c in caches if not isinstance(c, ArraysCache)), 0)
        turning = any(isinstance(c, RotatingKVCache) for c in caches)
        rows = mx.array(list(map(next_row, caches)), mx.int32) if turning else None
        self._lent = caches, states
        try:
            # Nobody else may hold them when MLX evaluates: it updates them in place.
            for cache in caches:
                set_states(cache, [None, None])
            passed, new = call(x, mx.array(offset, mx.int32), rows, slots, states)
            self._lent = caches, new
        finally:
            self.give_back()
        return Passed(*passed)

    def let_go(self) -> None:
        """Keep no traces, nor what is part of them."""
        self._traces.clear()
        forget_gone()

    def give_back(self) -> None:
        """Give caches the states that a call has, unless they have theirs.

        A call does so itself; after Ctrl-C in the middle of that somebody else must.
        """
        if self._lent is None:
            return
        caches, states = self._lent
        for i, cache in enumerate(caches):
            set_states(cache, states[2 * i : 2 * i + 2])
        self._lent = None

    def _function(self, layers: range, kinds: Sequence[type]) -> Callable[..., Any]:
        def step(
            x: mx.array,
            offset: mx.array,
            rows: mx.array | None,
            slots: mx.array | None,
            states: list[mx.array],
        ) -> tuple[tuple[Any, ...], list[mx.array]]:
            caches: list[Any] = []
            for i, kind in enumerate(kinds):
                first, second = states[2 * i : 2 * i + 2]
                if kind is KVCache:
                    caches.append(TracedKV(first, second, offset))
                elif kind is RotatingKVCache:
                    assert rows is not None
                    caches.append(TracedKV(first, second, offset, rows[i : i + 1]))
                else:
                    caches.append(ArraysCache(2))
                    set_states(caches[-1], [first, second])
            passed = self._forward(layers, x, caches, slots)
            parts = passed.out, passed.inputs, passed.chosen
            return parts, [state for cache in caches for state in states_of(cache)]

        return step


def can_trace(cache: Any, window: int | None) -> bool:
    """Tell whether a trace can move a cache on by one token.

    Not before the first one, nor when there is no room for one more, nor others than
    mlx-lm's plain caches.

    Args:
        window: how many of the last tokens a token sees; None: all.
    """
    if type(cache) is KVCache and window is None:
        return cache.keys is not None and cache.offset < cache.keys.shape[2]
    if turns_round(cache, window):
        return (
            cache.keys is not None and next_row(cache) < cache.keys.shape[2] <= window
        )
    if type(cache) is ArraysCache and len(cache.cache) == 2:
        plain = cache.left_padding is None and cache.lengths is None
        return plain and all(state is not None for state in cache.cache)
    return False


def next_row(cache: Any) -> int:
    """Return the row that the next token takes in a cache that has rows; else 0."""
    if isinstance(cache, RotatingKVCache):
        # One that is full begins again with its first.
        return 0 if cache._idx == cache.max_size else cache._idx
    return getattr(cache, "offset", 0)


def place_of(cache: Any) -> tuple[int, ...]:
    """Return where a cache of rows ends; nothing of others."""
    if isinstance(cache, RotatingKVCache):
        return cache.offset, cache._idx
    return (cache.offset,) if isinstance(cache, KVCache) else ()


def end_at(cache: Any, place: tuple[int, ...], n_more: int = 0) -> None:
    """Have a cache of rows end where it did, or ``n_more`` tokens of 0 or 1 later."""
    if isinstance(cache, RotatingKVCache):
        cache.offset, cache._idx = place
        if n_more:
            cache._idx = next_row(cache) + 1
            cache.offset += 1
    elif isinstance(cache, KVCache):
        cache.offset = place[0] + n_more


def states_of(cache: Any) -> list[Any]:
    """Return the two arrays that a cache holds."""
    if isinstance(cache, ArraysCache):
        return [*cache.cache]
    return [cache.keys, cache.values]


def arrays_of(caches: Sequence[Any]) -> list[mx.array]:
    """Return every array that caches hold, of whatever kind they are."""
    plain = [c for c in caches if type(c) is KVCache]
    held = [x for c in plain for x in (c.keys, c.values) if x is not None]
    others = [vars(c) for c in caches if c is not None and type(c) is not KVCache]
    return held + leaves(others)


def set_states(cache: Any, states: list[Any]) -> None:
    """Give a cache its two arrays."""
    if isinstance(cache, ArraysCache):
        cache.cache = states
    else:
        cache.keys, cache.values = states
