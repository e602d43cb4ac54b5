"""The slot table as arrays: one for the device, one for lookups of many experts."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .pool import SlotPool
from .residency import EMPTY, SlotTable


class TableCopy:
    """A copy of a ``SlotTable`` in arrays, updated for the layers that changed.

    Args:
        pools: the pool of each layer's slots.
    """

    def __init__(self, table: SlotTable, pools: Sequence[SlotPool]):
        self._table, self._pools = table, pools
        self._slots = np.full((len(table.slots), table.n_experts), EMPTY, np.int32)
        self._array: mx.array | None = None

    def on_device(self) -> mx.array:
        """Return each expert's current slot: uint32 ``[n_layers, n_experts]``.

        An absent expert has its pool's ``absent`` slot. The host later compares the
        chosen experts with its own table, and discards results of absent ones.
        """
        slots = self._refreshed()
        if self._array is None:
            absent = np.array([pool.absent for pool in self._pools])[:, None]
            found = np.where(slots == EMPTY, absent, slots)
            self._array = mx.array(found.astype(np.uint32))
        return self._array

    def n_complete(self, layers: Sequence[int], ids: np.ndarray) -> int:
        """Return how many leading layers have all their chosen experts in memory.

        Args:
            ids: chosen experts ``[n, K]`` of the n layers; an id out of range counts as
                absent.
        """
        last = self._table.n_experts - 1
        found = self._refreshed()[np.array(layers)[:, None], ids.clip(0, last)]
        lacking = ((found == EMPTY) | (ids < 0) | (ids > last)).any(axis=1)
        return int(lacking.argmax()) if lacking.any() else len(layers)

    def _refreshed(self) -> np.ndarray:
        changed = self._table.changed
        while changed:
            layer = changed.pop()
            slots = self._table.slots[layer]
            self._slots[layer, : len(slots)] = slots
            self._array = None
        return self._slots
