"""Shrink a pool and grow it again, and give memory back to the system meanwhile."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import mlx.core as mx

from ... import device
from .holders import Holders
from .pool import SlotPool, allocated_bytes
from .residency import SlotTable
from .segments import largest_replaced, sizes


class Resizing:
    """Change the number of slots of a pool, up to its first size.

    Where the system takes back single pages, each layer group gives back the pages of
    its last slots. Elsewhere each group has its own segment. The segments are then
    replaced, one after the other, by shorter or longer buffers.

    Args:
        pools: the pools of the segments.
        least_slots: slots that one token needs.
        holders: the objects that keep arrays of slots.
    """

    def __init__(
        self,
        pools: Sequence[SlotPool],
        table: SlotTable,
        least_slots: int,
        holders: Holders,
    ):
        self._pools, self._table, self._holders = pools, table, holders
        self.most_slots, self.least_slots = table.n_slots, least_slots
        self._replaces = not device.returns_pages()
        self._sizes = sizes(self.most_slots, least_slots)

    @property
    def slack_bytes(self) -> int:
        """Bytes allocated in addition to the slots."""
        return sum(pool.slack_bytes for pool in self._pools)

    def rounded(self, n_slots: int) -> int:
        """Return the largest pool size, at most ``n_slots``, that resizing uses."""
        return self._sizes[max(0, bisect.bisect_right(self._sizes, n_slots) - 1)]

    def most_fitting(self, room: int, replacing: int) -> int:
        """Return how many slots fit into ``room``; below ``least_slots`` means none.

        Args:
            room: bytes for the pool.
            replacing: bytes for the pool while it shrinks, the second buffer included.
        """
        stride, slack = self._pools[0].stride, self.slack_bytes
        n_slots = min((room - slack) // stride, self.most_slots)
        if not self._replaces:
            return n_slots
        for n in reversed(self._sizes):
            taken = n * stride + slack + self._replacing_bytes(n)
            if n <= n_slots and taken <= replacing:
                return n
        return 0

    def _replacing_bytes(self, n_slots: int) -> int:
        most = self._table.shares(self.most_slots)
        largest = largest_replaced(most, n_slots, self.least_slots)
        pool = self._pools[0]
        n_blank = len(pool.bytes) - pool.n_slots
        return allocated_bytes(largest + n_blank, pool.stride) if largest else 0

    def __call__(self, n_slots: int) -> None:
        """Change the number of slots of all groups; no read may be in flight.

        Raises:
            BudgetError: a second buffer cannot be allocated. Segments replaced before
                keep their new size; the others are unchanged.
        """
        if self._replaces:
            self._replace_all(self._table.shares(n_slots))
            return
        self._table.resize(n_slots, self._move)
        for segment, pool in enumerate(self._pools):
            pool.give_back(self._table.unused(segment))

    def _replace_all(self, n_slots: Sequence[int]) -> None:
        changed = [
            g for g, pool in enumerate(self._pools) if pool.n_slots != n_slots[g]
        ]
        if changed:
            self._holders.let_go()
            # Readers of slots were submitted; wait until the device has finished them.
            mx.synchronize()
        for group in changed:
            self._replace(group, n_slots[group])
            mx.clear_cache()

    def _replace(self, group: int, n_slots: int) -> None:
        pool = self._pools[group]
        buffer = pool.allocate(n_slots)
        try:
            if n_slots < pool.n_slots:
                self._table.resize_group(group, n_slots, self._move)
            pool.replace(buffer)
        finally:
            self._follow(group)

    def repair(self) -> None:
        """Fit the repaired table to the segments after an interrupt."""
        if self._replaces:
            for group in range(len(self._pools)):
                self._follow(group)

    def _follow(self, group: int) -> None:
        """Let the table use exactly the slots that a group's segment has."""
        self._table.resize_group(group, self._pools[group].n_slots, self._move)

    def _move(self, segment: int, source: int, target: int) -> None:
        self._pools[segment].move(source, target)
