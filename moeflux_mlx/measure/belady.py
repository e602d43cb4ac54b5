"""Belady's rule: the fewest misses possible for a policy that knows the future."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence


def fewest_misses(
    steps: Sequence[Sequence[int]], n_slots: int, at_once: Sequence[bool]
) -> list[int]:
    """Return the misses of each step under the policy with the fewest misses in all.

    Evicting the key with the latest next use is optimal (Belady, 1966). That holds too
    if a step needs several keys in memory together, which are then not evicted.

    Args:
        steps: the distinct keys that each step uses.
        n_slots: number of keys that fit into memory; at least a step ``at_once``.
        at_once: whether a step's keys must be in memory together. Otherwise each key is
            used when it is in memory, present ones first, and may be evicted at once.
            This can save one miss compared with slots, which must hold the last key.
    """
    memory = _Memory(n_slots)
    misses: list[int] = []
    for keys, next_use, together in zip(steps, _next_uses(steps), at_once, strict=True):
        misses.append(sum(key not in memory for key in keys))
        if together:
            memory.lock(keys)
            memory.trim()
        memory.hold(next_use)
        memory.trim()
    return misses


def _next_uses(steps: Sequence[Sequence[int]]) -> list[dict[int, int]]:
    """Return each step's keys with the number of the next step that uses them."""
    upcoming: dict[int, int] = {}
    found: list[dict[int, int]] = []
    for i in range(len(steps) - 1, -1, -1):
        found.append({key: upcoming.get(key, len(steps)) for key in steps[i]})
        upcoming.update(dict.fromkeys(steps[i], i))
    return found[::-1]


class _Memory:
    """The keys in memory, with their next uses."""

    def __init__(self, n_slots: int):
        self._n_slots = n_slots
        self._next_use: dict[int, int | None] = {}
        # A heap, latest use first; an entry is stale if ``_next_use`` differs from it.
        self._latest: list[tuple[int, int]] = []

    def __contains__(self, key: int) -> bool:
        return key in self._next_use

    def lock(self, keys: Iterable[int]) -> None:
        """Add keys that must not be evicted until ``hold`` gives their next use."""
        self._next_use.update(dict.fromkeys(keys))

    def hold(self, next_use: dict[int, int]) -> None:
        """Add keys, or update their next uses."""
        self._next_use.update(next_use)
        for key, step in next_use.items():
            heapq.heappush(self._latest, (-step, key))

    def trim(self) -> None:
        """Evict the keys with the latest next use until the rest fits."""
        while len(self._next_use) > self._n_slots:
            negative, key = heapq.heappop(self._latest)
            if self._next_use.get(key) == -negative:
                del self._next_use[key]
