"""Reads in flight: records on their way into slots, not yet in the slot table."""

from __future__ import annotations

import time
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import ExpertStoreError
from ...system.progress import Report
from ..files.reader import Batch, Read, ReadWorkers
from ..files.store import ExpertStore
from ..pool.pool import SlotPool
from ..pool.residency import SlotTable
from ..pool.stats import Counters, StreamStats

# A layer's number and an expert's id.
Expert = tuple[int, int]


@dataclass(frozen=True)
class Submitted:
    """Reads submitted into claimed slots; ``ahead``: before any request for them."""

    batch: Batch
    slots: list[int]
    ahead: bool

    @property
    def experts(self) -> list[Expert]:
        """The experts that the batch reads."""
        return [(read.layer, read.expert) for read in self.batch.reads]


class InFlight:
    """Submit reads, and enter finished ones in the slot table.

    Args:
        index: maps a layer's number to its index in the slot table.
        pools: the pool of each layer, by that index.
    """

    def __init__(
        self,
        store: ExpertStore,
        index: Mapping[int, int],
        pools: Sequence[SlotPool],
        table: SlotTable,
        reader: ReadWorkers,
        stats: StreamStats,
    ):
        self._store, self._index, self._pools = store, index, pools
        self._table, self.reader, self._stats = table, reader, stats
        self._checked = np.zeros((len(index), store.n_experts), dtype=bool)
        self._submitted: list[Submitted] = []

    def __bool__(self) -> bool:
        return bool(self._submitted)

    def name(self, layer: int) -> str:
        """Return a layer's name for errors."""
        return self._store.name(layer)

    def experts_of(self, layer: int) -> set[int]:
        """Return a layer's experts that are in flight."""
        experts = (expert for begun in self._submitted for expert in begun.experts)
        return {expert for of_layer, expert in experts if of_layer == layer}

    def is_over(self, layer: int, experts: Collection[int]) -> bool:
        """Return whether all reads of these experts of a layer have ended."""
        wanted = {(layer, expert) for expert in experts}
        return all(
            begun.batch.over
            for begun in self._submitted
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
        """Claim slots and submit reads into them while slots last; return how many.

        Args:
            keep: table keys that must not be evicted.
            ahead: no request needs these experts yet, so no call has to wait for them.
        """
        index = self._index[layer]
        slots: list[int] = []
        for _ in experts:
            if (slot := self._table.claim(index, keep)) is None:
                break
            slots.append(slot)
        reads = [
            self._read(layer, expert, slot)
            for expert, slot in zip(experts, slots, strict=False)
        ]
        # One batch per expert read ahead: a token may need only some of them.
        size = 1 if ahead else len(reads)
        for first in range(0, len(reads), max(1, size)):
            batch = Batch(reads[first : first + size])
            self._submitted.append(Submitted(batch, slots[first : first + size], ahead))
            start = time.perf_counter()
            self.reader.submit(batch)
            self._stats[layer].wait_seconds += time.perf_counter() - start
        return len(reads)

    def finish(
        self,
        waiting: Counters | None = None,
        wanted: Collection[Expert] | None = None,
    ) -> dict[Expert, ExpertStoreError]:
        """Wait for reads, enter them in the slot table and return the failures.

        After an interrupt the remaining reads stay in flight for the next call.

        Args:
            waiting: counters that receive the time spent waiting.
            wanted: the reads ahead to wait for; None: all of them.
        """
        failed: dict[Expert, ExpertStoreError] = {}
        for begun in list(self._submitted):
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
                if (error := self._finish_read(read, slot, begun.ahead)) is not None:
                    failed[read.layer, read.expert] = error
            self._submitted.remove(begun)
            begun.batch.let_go()
        return failed

    def cancel(self) -> None:
        """Drop reads that no worker has begun."""
        for begun in self._submitted:
            begun.batch.cancel()

    def preload(self, report: Report | None = None) -> None:
        """Read every expert into its slot, layer by layer.

        Args:
            report: receives the progress in bytes.

        Raises:
            ExpertStoreError: a record cannot be read.
        """
        n_records = sum(self._store.count(layer) for layer in self._index)
        n_read = 0
        for layer, index in self._index.items():
            slots = self._table.all_slots(index)
            reads = [self._read(layer, e, slot) for e, slot in enumerate(slots)]
            batch = Batch(reads)
            self.reader.submit(batch)
            batch.wait()
            batch.let_go()
            self._count_preloaded(reads)
            n_read += len(slots)
            if report is not None:
                stride = self._pools[index].stride
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
        store, layout, index = (
            self._store,
            self._store.layout(layer),
            self._index[layer],
        )
        checked = self._checked[index, expert]
        return Read(
            store.spans(layer, expert),
            self._pools[index].place(slot, layout.stride),
            layer,
            expert,
            None if checked else store.checksum(layer, expert),
            layout.stride - layout.record_bytes,
            name=store.name(layer),
        )

    def _finish_read(
        self, read: Read, slot: int, ahead: bool
    ) -> ExpertStoreError | None:
        index, counters = self._index[read.layer], self._stats[read.layer]
        counters.read_seconds += read.seconds
        counters.second_tries += read.second_tries
        if read.error is not None or not read.done:
            self._table.release(index, slot)
            if read.error is not None:
                # The file may change before the next read: check all checksums again.
                self._checked[index] = False
            return read.error
        if ahead:
            counters.read_ahead += 1
        else:
            counters.misses += 1
        counters.read_bytes += read.n_bytes
        self._checked[index, read.expert] = True
        self._table.place(index, read.expert, slot)
        return None
