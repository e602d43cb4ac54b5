"""Experts on their way into slots, until the table of slots knows them."""

from __future__ import annotations

import time
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import ExpertStoreError
from ...system.progress import Report
from ..files.reader import Batch, Read, ReadPool
from ..files.store import ExpertStore
from ..pool.pool import SlotPool
from ..pool.residency import SlotTable
from ..pool.stats import Counters, StreamStats

# An expert by layer and number.
Expert = tuple[int, int]


@dataclass(frozen=True)
class Begun:
    """Reads into claimed slots; ``ahead`` of anyone's asking for the experts."""

    batch: Batch
    slots: list[int]
    ahead: bool

    @property
    def experts(self) -> list[Expert]:
        """The reads under way."""
        return [(read.layer, read.expert) for read in self.batch.reads]


class InFlight:
    """Begins reads and, when they are over, enters them in the table.

    Args:
        rows: row of the table by layer.
        pools: memory behind the slots of each row.
    """

    def __init__(
        self,
        store: ExpertStore,
        rows: Mapping[int, int],
        pools: Sequence[SlotPool],
        table: SlotTable,
        reader: ReadPool,
        stats: StreamStats,
    ):
        self._store, self._rows, self._pools = store, rows, pools
        self._table, self.reader, self._stats = table, reader, stats
        self._checked = np.zeros((len(rows), store.n_experts), dtype=bool)
        self._begun: list[Begun] = []

    def __bool__(self) -> bool:
        return bool(self._begun)

    def name(self, layer: int) -> str:
        """Return a layer's name in errors."""
        return self._store.name(layer)

    def coming(self, layer: int) -> set[int]:
        """Return a layer's experts that are being read."""
        experts = (expert for begun in self._begun for expert in begun.experts)
        return {expert for of_layer, expert in experts if of_layer == layer}

    def is_over(self, layer: int, experts: Collection[int]) -> bool:
        """Tell whether no read of a layer's experts is under way any more."""
        wanted = {(layer, expert) for expert in experts}
        return all(
            begun.batch.over
            for begun in self._begun
            if not wanted.isdisjoint(begun.experts)
        )

    def begin(
        self,
        layer: int,
        experts: list[int],
        keep: Container[int],
        *,
        ahead: bool = False,
    ) -> int:
        """Submit reads into claimed slots until none can be had; return how many.

        Args:
            keep: keys of the table that may not be evicted for it.
            ahead: nobody asked for them yet, nor need wait for them.
        """
        row = self._rows[layer]
        slots: list[int] = []
        for _ in experts:
            if (slot := self._table.claim(row, keep)) is None:
                break
            slots.append(slot)
        reads = [
            self._read(layer, expert, slot)
            for expert, slot in zip(experts, slots, strict=False)
        ]
        # A token may wait for one expert that was read ahead and not for the next.
        size = 1 if ahead else len(reads)
        for first in range(0, len(reads), max(1, size)):
            batch = Batch(reads[first : first + size])
            self._begun.append(Begun(batch, slots[first : first + size], ahead))
            start = time.perf_counter()
            self.reader.submit(batch)
            self._stats[layer].wait_seconds += time.perf_counter() - start
        return len(reads)

    def settle(
        self,
        waiting: Counters | None = None,
        wanted: Collection[Expert] | None = None,
    ) -> dict[Expert, ExpertStoreError]:
        """Wait for reads and enter them in the table; return failures.

        An interrupt leaves the rest in flight, to be settled by the next call.

        Args:
            waiting: counts how long it took.
            wanted: wait for these only of all that is read ahead; None: for all.
        """
        failed: dict[Expert, ExpertStoreError] = {}
        for begun in list(self._begun):
            optional = begun.ahead and wanted is not None
            if optional and not begun.batch.over:
                assert wanted is not None
                if not any(expert in wanted for expert in begun.experts):
                    continue
            start = time.perf_counter()
            begun.batch.wait()
            if waiting is not None:
                waiting.wait_seconds += time.perf_counter() - start
            for read, slot in zip(begun.batch.reads, begun.slots, strict=True):
                if (error := self._settle_read(read, slot, begun.ahead)) is not None:
                    failed[read.layer, read.expert] = error
            self._begun.remove(begun)
        return failed

    def cancel(self) -> None:
        """Leave out reads that no thread has begun."""
        for begun in self._begun:
            begun.batch.cancel()

    def preload(self, report: Report | None = None) -> None:
        """Read every expert into its slot, one row after the other.

        Args:
            report: hears how far it has come.

        Raises:
            ExpertStoreError: one could not be read.
        """
        n_records = sum(self._store.count(layer) for layer in self._rows)
        n_read = 0
        for layer, row in self._rows.items():
            slots = self._table.all_slots(row)
            reads = [self._read(layer, e, slot) for e, slot in enumerate(slots)]
            batch = Batch(reads)
            self.reader.submit(batch)
            batch.wait()
            self._count_preloaded(reads)
            n_read += len(slots)
            if report is not None:
                stride = self._pools[row].stride
                report("reading experts", n_read * stride, n_records * stride)

    def _count_preloaded(self, reads: list[Read]) -> None:
        for read in reads:
            if read.error is not None:
                raise read.error
            counters = self._stats[read.layer]
            counters.preloaded += 1
            counters.second_tries += read.second_tries
            counters.read_bytes += read.n_bytes
            counters.read_seconds += read.seconds

    def _read(self, layer: int, expert: int, slot: int) -> Read:
        store, layout, row = self._store, self._store.layout(layer), self._rows[layer]
        checked = self._checked[row, expert]
        return Read(
            store.spans(layer, expert),
            self._pools[row].place(slot, layout.stride),
            layer,
            expert,
            None if checked else store.checksum(layer, expert),
            layout.stride - layout.record_bytes,
            name=store.name(layer),
        )

    def _settle_read(
        self, read: Read, slot: int, ahead: bool
    ) -> ExpertStoreError | None:
        row, counters = self._rows[read.layer], self._stats[read.layer]
        counters.read_seconds += read.seconds
        counters.second_tries += read.second_tries
        if read.error is not None or not read.done:
            self._table.release(row, slot)
            if read.error is not None:
                # Once mended, the file may hold anything.
                self._checked[row] = False
            return read.error
        if ahead:
            counters.read_ahead += 1
        else:
            counters.misses += 1
        counters.read_bytes += read.n_bytes
        self._checked[row, read.expert] = True
        self._table.place(row, read.expert, slot)
        return None
