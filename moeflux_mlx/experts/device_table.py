"""Which expert is in which slot, for a device that is not to wait for the host."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .residency import SlotTable


class DeviceTable:
    """A copy of a ``SlotTable`` as an array, made anew where the table changed.

    An absent expert has slot 0: what a device computes with it can be thrown away
    once the host has seen which experts were asked for.
    """

    def __init__(self, table: SlotTable):
        self._table = table
        self._slots = np.zeros((len(table.rows), table.n_experts), np.uint32)
        self._array: mx.array | None = None

    def array(self) -> mx.array:
        """Return uint32 ``[n_rows, n_experts]``: each expert's slot at this moment."""
        changed = self._table.changed
        while changed:
            row = changed.pop()
            self._slots[row] = np.maximum(self._table.rows[row], 0)
            self._array = None
        if self._array is None:
            self._array = mx.array(self._slots)
        return self._array
