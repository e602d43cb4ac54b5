"""A pool that becomes smaller and larger again, and returns memory meanwhile."""

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
    """Gives a pool fewer slots, or more again up to as many as it had at first.

    Where the system takes single pages back, they are those of the last slots of each
    group. Elsewhere each group has a segment of its own, which is replaced by a shorter
    or a longer buffer, one after the other.

    Args:
        pools: the segments.
        holders: keep arrays of slots.
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
        """Bytes taken beside those of slots."""
        return sum(pool.slack_bytes for pool in self._pools)

    def rounded(self, n_slots: int) -> int:
        """Return the largest number of slots up to this one that is worth a change."""
        return self._sizes[max(0, bisect.bisect_right(self._sizes, n_slots) - 1)]

    def most_fitting(self, room: int, replacing: int) -> int:
        """Return how many slots fit into ``room``; fewer than the least: none do.

        Args:
            replacing: bytes that there are for slots while the pool becomes smaller.
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
        """Change the number of slots, all groups together; no read may be in flight.

        Raises:
            BudgetError: memory for the copy cannot be had. What was in memory still is,
                but for what a segment that became smaller before had no room for.
        """
        if self._replaces:
            self._replace_all(self._table.shares(n_slots))
            return
        self._table.resize(n_slots, self._move)
        for segment, pool in enumerate(self._pools):
            pool.give_up(self._table.unused(segment))

    def _replace_all(self, n_slots: Sequence[int]) -> None:
        changed = [
            g for g, pool in enumerate(self._pools) if pool.n_slots != n_slots[g]
        ]
        if changed:
            self._holders.let_go()
            # What still reads slots has been asked for, but may not be done.
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
        """Set right what an interrupt left, once the table is right in itself."""
        if self._replaces:
            for group in range(len(self._pools)):
                self._follow(group)

    def _follow(self, group: int) -> None:
        """Have the table use all slots that a group's segment has, no fewer."""
        self._table.resize_group(group, self._pools[group].n_slots, self._move)

    def _move(self, segment: int, source: int, target: int) -> None:
        self._pools[segment].move(source, target)
