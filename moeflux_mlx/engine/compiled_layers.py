"""A decoding step through layers of a model as one function that MLX compiled.

Python only passes states; MLX replays the same launches. No launch changes from token
to token: a cache is passed whole, with spare rows, and the row where it ends is an
array. The slot of each expert is an array too.
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

# Compiled functions kept for a range of layers, one for each shape of its inputs.
MAX_FUNCTIONS = 4


@dataclass(frozen=True)
class Passed:
    """The results of one token of each sequence in some layers.

    ``out`` is the output of the last layer, or the logits after the model's last one.
    If slots were looked up, ``inputs`` holds the input of each layer, which is tokens
    for the first, and ``chosen`` int32 ``[n, B, K]`` the experts that each routed layer
    requested. Where ranks share the experts, ``chosen`` is that of ``RankExperts``.
    """

    out: mx.array
    inputs: list[mx.array]
    chosen: mx.array | None


Forward = Callable[[range, mx.array, list[Any], mx.array | None], Passed]


class TracedKV:
    """Stands for a cache of rows as MLX traces: whole arrays, an array as offset.

    ``row`` int32 ``[1]`` is the row that the token takes, if not that of ``offset``.
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
        """Return None: a single token sees all rows up to its own, or all rows."""


class CompiledLayers:
    """Compiles and runs ``forward(layers, x, caches, slots)`` for one decoding step.

    Args:
        forward: an ordinary, lazy call of some layers of the model. It accepts
            ``TracedKV`` in place of ``KVCache`` and advances all caches.
    """

    def __init__(self, forward: Forward):
        self._forward = forward
        self._compiled: dict[range, BuiltOnce[tuple[Callable[..., Any], Any]]] = {}
        # Caches whose states a running call holds, and the states to give back.
        self._lent: tuple[Sequence[Any], list[Any]] | None = None

    def __call__(
        self,
        layers: range,
        x: mx.array,
        caches: Sequence[Any],
        held: Sequence[object],
        slots: mx.array | None = None,
        *,
        compiled: bool = True,
    ) -> Passed:
        """Run layers; give their caches new states without advancing them.

        A second run of the layers writes the same row again. The caller keeps the old
        states if it may have to restore them.

        Args:
            x: tokens ``[B, 1]`` for the first layer, else the output of the layer
                before.
            caches: caches of these layers; ``can_compile`` holds for all.
            held: objects that the compiled function captures, such as weights. It is
                used only with the same objects, and keeps them alive.
            slots: uint32 ``[n, E]``, the slots of experts that may be evicted; None if
                all stay in memory.
            compiled: False makes the same call without compiling, to observe it.
        """
        kinds = [type(cache) for cache in caches]
        states = [state for cache in caches for state in states_of(cache)]
        shapes = tuple(state.shape for state in states)
        key = (tuple(map(id, held)), x.shape, tuple(kinds), shapes, slots is None)
        if compiled:
            functions = self._compiled.setdefault(layers, BuiltOnce(MAX_FUNCTIONS))
            call, _ = functions.get(
                key, lambda: (Compiled(self._function(layers, kinds)), held)
            )
        else:
            call = self._function(layers, kinds)
        offset = next((c.offset for c in caches if not isinstance(c, ArraysCache)), 0)
        turning = any(isinstance(c, RotatingKVCache) for c in caches)
        rows = mx.array(list(map(next_row, caches)), mx.int32) if turning else None
        self._lent = caches, states
        try:
            # MLX updates the states in place only if nothing else holds them.
            for cache in caches:
                set_states(cache, [None, None])
            passed, new = call(x, mx.array(offset, mx.int32), rows, slots, states)
            self._lent = caches, new
        finally:
            self.give_back()
        return Passed(*passed)

    def let_go(self) -> None:
        """Drop the compiled functions and the objects that they capture."""
        self._compiled.clear()
        forget_gone()

    def give_back(self) -> None:
        """Give caches back the states that an interrupted call still holds.

        A call does so itself, but Ctrl-C may interrupt that.
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


def can_compile(cache: Any, window: int | None) -> bool:
    """Return whether a compiled function can advance a cache by one token.

    It must be one of mlx-lm's plain caches, hold a token, and have room for another.

    Args:
        window: number of last tokens that a token sees; None: all.
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
    """Return the row that the next token takes in a cache of rows; 0 for others."""
    if isinstance(cache, RotatingKVCache):
        # A full ring begins again at its first row.
        return 0 if cache._idx == cache.max_size else cache._idx
    return getattr(cache, "offset", 0)


def place_of(cache: Any) -> tuple[int, ...]:
    """Return where a cache of rows ends; an empty tuple for others."""
    if isinstance(cache, RotatingKVCache):
        return cache.offset, cache._idx
    return (cache.offset,) if isinstance(cache, KVCache) else ()


def end_at(cache: Any, place: tuple[int, ...], n_more: int = 0) -> None:
    """Set the end of a cache of rows: at ``place``, or ``n_more`` (0 or 1) later."""
    if isinstance(cache, RotatingKVCache):
        cache.offset, cache._idx = place
        if n_more:
            cache._idx = next_row(cache) + 1
            cache.offset += 1
    elif isinstance(cache, KVCache):
        cache.offset = place[0] + n_more


def states_of(cache: Any) -> list[Any]:
    """Return the two arrays of a cache."""
    if isinstance(cache, ArraysCache):
        return [*cache.cache]
    return [cache.keys, cache.values]


def arrays_of(caches: Sequence[Any]) -> list[mx.array]:
    """Return every array of caches of any type."""
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
