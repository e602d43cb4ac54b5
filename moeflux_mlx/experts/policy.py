"""Which expert gives up its slot when another one needs it."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Protocol


class Policy(Protocol):
    """Orders the keys of the experts that are in memory; one object per group."""

    def touch(self, key: int) -> None:
        """Note a use of ``key``; the first one also makes it known."""

    def victim(self, keep: Container[int]) -> int | None:
        """Forget and return the key to evict, never one of ``keep``; None if none."""


class LRU:
    """Evict the expert whose last use is the longest ago."""

    def __init__(self) -> None:
        # A dict keeps insertion order: the oldest use comes first.
        self._uses: dict[int, None] = {}

    def touch(self, key: int) -> None:
        """Move ``key`` to the end of the line."""
        self._uses.pop(key, None)
        self._uses[key] = None

    def victim(self, keep: Container[int]) -> int | None:
        """Forget and return the oldest key that is not in ``keep``."""
        for key in self._uses:
            if key not in keep:
                del self._uses[key]
                return key
        return None


PolicyFactory = Callable[[], Policy]
