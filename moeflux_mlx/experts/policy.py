"""Which expert gives up its slot when another one needs it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Protocol


class Policy(Protocol):
    """Orders the keys of the experts that are in memory; one object per group."""

    def touch(self, keys: Iterable[int]) -> None:
        """Note a use of each key, in this order; the first one makes a key known."""

    def victim(self, keep: Container[int]) -> int | None:
        """Forget and return the key to evict, never one of ``keep``; None if none."""


class LRU:
    """Evict the expert whose last use is the longest ago."""

    def __init__(self) -> None:
        # A dict keeps insertion order: the oldest use comes first.
        self._uses: dict[int, None] = {}

    def touch(self, keys: Iterable[int]) -> None:
        """Move the keys to the end of the line."""
        uses = self._uses
        for key in keys:
            uses.pop(key, None)
            uses[key] = None

    def victim(self, keep: Container[int]) -> int | None:
        """Forget and return the oldest key that is not in ``keep``."""
        for key in self._uses:
            if key not in keep:
                del self._uses[key]
                return key
        return None


PolicyFactory = Callable[[], Policy]
