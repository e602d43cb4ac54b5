"""Which expert is in which slot as arrays: for a device, and for many at once."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .pool import SlotPool
from .residency import EMPTY, SlotTable


class TableCopy:
    """A copy of a ``SlotTable`` in arrays, brought up to date where that changed.

    Args:
        pools: memory behind the slots of each row.
    """

    def __init__(self, table: SlotTable, pools: Sequence[SlotPool]):
        self._table, self._pools = table, pools
        self._slots = np.full((len(table.rows), table.n_experts), EMPTY, np.int32)
        self._array: mx.array | None = None

    def on_device(self) -> mx.array:
        """Return uint32 ``[n_rows, n_experts]``: each expert's slot at this moment.

        What a device computes with an absent expert can be thrown away once the host
        has seen which experts were asked for.
        """
        slots = self._refreshed()
        if self._array is None:
            absent = np.array([pool.absent for pool in self._pools])[:, None]
            found = np.where(slots == EMPTY, absent, slots)
            self._array = mx.array(found.astype(np.uint32))
        return self._array

    def n_complete(self, rows: Sequence[int], ids: np.ndarray) -> int:
        """Return how many rows, from the first on, have all their experts in memory.

        Args:
            ids: ``[n, K]`` of each row; ids out of range are of no expert.
        """
        last = self._table.n_experts - 1
        found = self._refreshed()[np.array(rows)[:, None], ids.clip(0, last)]
        lacking = ((found == EMPTY) | (ids < 0) | (ids > last)).any(axis=1)
        return int(lacking.argmax()) if lacking.any() else len(rows)

    def _refreshed(self) -> np.ndarray:
        changed = self._table.changed
        while changed:
            row = changed.pop()
            slots = self._table.rows[row]
            self._slots[row, : len(slots)] = slots
            self._array = None
        return self._slots
