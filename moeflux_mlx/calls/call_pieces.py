"""The pieces of a call between its routed blocks, told apart by their effects."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..memory.caches import most_rows, single_caches
from .blank_matrices import SWITCHES


class CallPieces:
    """The pieces of a call between its routed blocks.

    Pieces differ if they call other matrices or change other kinds of caches.
    """

    def __init__(self, cache: list[Any]):
        self._caches = [*single_caches(cache)]
        self._marks = [*map(_mark, self._caches)]
        self._called: list[tuple[type, tuple[int, ...]]] = []
        self._ended: list[tuple[Any, ...]] = []

    def heard(self, kind: type, shape: tuple[int, ...]) -> None:
        """Record the call of a matrix."""
        self._called.append((kind, shape))

    def watch(self, before: bool, arrays: list[mx.array]) -> None:
        """End a piece at a block, without computing."""
        if before:
            self._ended.append(self._piece())

    def last_new(self) -> int | None:
        """Return the first block by which all kinds of pieces have occurred.

        None means that the call must run to its end.
        """
        called, changed = self._piece()
        inside = {one for piece in self._ended for one in piece[0]}
        experts = {one for one in called if issubclass(one[0], SWITCHES)}
        if changed or not experts <= inside:
            return None
        return max(self._ended.index(piece) for piece in self._ended)

    def _piece(self) -> tuple[Any, ...]:
        marks = [*map(_mark, self._caches)]
        changed = [
            (type(cache), most_rows(cache))
            for cache, old, new in zip(self._caches, self._marks, marks, strict=True)
            if old != new
        ]
        piece = tuple(self._called), tuple(changed)
        self._marks, self._called = marks, []
        return piece


def _mark(cache: Any) -> Any:
    """Return a value that changes when the cache changes."""
    return getattr(cache, "offset", None), [*map(id, getattr(cache, "cache", ()))]
