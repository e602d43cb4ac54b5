"""Belady's rule: the fewest misses that any policy could have, knowing the future."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence


def fewest_misses(
    steps: Sequence[Sequence[int]], n_slots: int, at_once: Sequence[bool]
) -> list[int]:
    """Return the keys that each step has to read, their sum being the least possible.

    Evicting the key that is needed again the latest is optimal (Belady, 1966), also
    where a step needs several keys in memory at once, which then are no candidates.

    Args:
        steps: the distinct keys that each step uses.
        n_slots: keys that fit into memory; at least those of a step ``at_once``.
        at_once: whether a step's keys must be in memory together. Else each is used as
            it comes, what is in memory first, and need not stay: at best one miss
            better than slots that must hold the last key of such a step.
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
    """Return for each step its keys with the step that uses each next."""
    upcoming: dict[int, int] = {}
    found: list[dict[int, int]] = []
    for i in range(len(steps) - 1, -1, -1):
        found.append({key: upcoming.get(key, len(steps)) for key in steps[i]})
        upcoming.update(dict.fromkeys(steps[i], i))
    return found[::-1]


class _Memory:
    """Keys in memory with their next uses."""

    def __init__(self, n_slots: int):
        self._n_slots = n_slots
        self._next_use: dict[int, int | None] = {}
        # Latest first; an entry that the dictionary contradicts is out of date.
        self._latest: list[tuple[int, int]] = []

    def __contains__(self, key: int) -> bool:
        return key in self._next_use

    def lock(self, keys: Iterable[int]) -> None:
        """Take keys in, never to be evicted before ``hold`` says when they are used."""
        self._next_use.update(dict.fromkeys(keys))

    def hold(self, next_use: dict[int, int]) -> None:
        """Take keys in, or say anew when they are used next."""
        self._next_use.update(next_use)
        for key, step in next_use.items():
            heapq.heappush(self._latest, (-step, key))

    def trim(self) -> None:
        """Evict until keys fit into the slots, the one used latest first."""
        while len(self._next_use) > self._n_slots:
            negative, key = heapq.heappop(self._latest)
            if self._next_use.get(key) == -negative:
                del self._next_use[key]
