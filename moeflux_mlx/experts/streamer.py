"""Experts on demand: read into slots when asked for, kept while there is room."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from .. import config
from ..errors import BudgetError, ConfigError, ExpertStoreError, MoefluxError
from ..weights import ExpertSource, ExpertWeights
from .budget import count_slots
from .packed import Progress
from .policy import LRU, PolicyFactory
from .pool import POOL_ALIGNMENT, SlotPool, pool_stride
from .reader import INLINE_BYTES, Batch, Read, ReadPool
from .residency import EMPTY, SlotTable
from .resident import PreloadedExperts
from .stats import Counters, StreamStats
from .store import ExpertStore

# Experts in a wave: enough to keep every reading thread busy, few enough that the
# first results do not wait for half the pool.
WAVE_EXPERTS = 32


class ExpertStreamer:
    """Slots for the experts of all layers of a store, under one memory budget.

    One thread at a time may generate; which thread it is may change. The store stays
    the caller's to close, after the streamer.
    """

    def __init__(
        self,
        store: ExpertStore,
        memory: int | float | str | None = None,
        *,
        scope: str = "global",
        policy: PolicyFactory = LRU,
        read_threads: int | None = None,
        inline_bytes: int = INLINE_BYTES,
        evaluate: Callable[..., None] = mx.eval,
        report: Progress | None = None,
    ):
        """Allocate the pool; if it holds every expert, read them all now.

        Args:
            store: the open files that experts are read from.
            memory: bytes for all experts (``8GB``, ``512MiB``, an int), alignment
                included; None: as many as fit into 3/4 of physical memory.
            scope: ``global``: layers compete for slots; ``layer``: equal shares.
            policy: makes what decides on evictions, one for each group of slots.
            read_threads: parallel reads, from the environment by default.
            inline_bytes: reads of up to this many bytes together need no thread.
            evaluate: evaluates arrays that must be done before slots change, like
                ``mx.eval``; an executor's own counts how long that takes.
            report: hears how far reading all experts has come.

        Raises:
            ConfigError: an argument has no usable value.
            BudgetError: the budget cannot hold what one token needs; states the
                minimum.
            ExpertStoreError: a record could not be read.
        """
        if scope not in ("global", "layer"):
            raise ConfigError(f"[scope] expected 'global' or 'layer' but got {scope!r}")
        self._store, self._evaluate = store, evaluate
        self._rows = {layer: row for row, layer in enumerate(store.layers)}
        layouts = [store.layout(layer) for layer in store.layers]
        n_rows, n_records = len(layouts), len(layouts) * store.n_experts
        groups = 1 if scope == "global" else n_rows
        n_slots = count_slots(
            memory,
            stride=pool_stride(layouts),
            slack_bytes=POOL_ALIGNMENT,
            n_records=n_records,
            n_minimum=groups * store.top_k,
        )
        n_slots -= n_slots % groups
        self._pool = SlotPool(layouts, n_slots)
        self._table = SlotTable(
            n_rows, store.n_experts, n_slots, shared=groups == 1, policy=policy
        )
        self._checked = np.zeros((n_rows, store.n_experts), dtype=bool)
        self._new_reader = partial(
            ReadPool, read_threads or config.read_threads(), inline_bytes
        )
        self._reader = self._new_reader()
        self._sources: dict[tuple[int, bool], ExpertSource] = {}
        self._lock = threading.RLock()
        self._guards: list[mx.array] = []
        self._interrupted = False
        self._in_flight: list[tuple[Batch, list[int]]] = []
        self.stats = StreamStats(store.layers)
        self.resident = n_slots == n_records
        if self.resident:
            self._preload(report)

    @property
    def n_slots(self) -> int:
        """Experts that fit into memory at the same time, all layers together."""
        return self._table.capacity * self._table.n_groups

    @property
    def n_groups(self) -> int:
        """Groups of layers that share slots; all have equally many."""
        return self._table.n_groups

    @property
    def least_slots(self) -> int:
        """Slots that one token needs."""
        return self._table.n_groups * self._store.top_k

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert in memory."""
        return self._pool.stride

    @property
    def pool(self) -> SlotPool:
        """The memory behind the slots."""
        return self._pool

    @property
    def memory_bytes(self) -> int:
        """Bytes taken for experts, alignment included; never more than the budget."""
        return self._pool.n_bytes

    def resize(self, n_slots: int) -> None:
        """Use ``n_slots`` slots, within the memory taken at first; not in the middle of
        a token.

        Of slots given up the memory goes back to the system. The experts that the
        policy would evict first are forgotten, the others stay in memory.

        Raises:
            BudgetError: fewer slots than one token needs, or more than there were at
                first.
        """
        table = self._table
        capacity = n_slots // table.n_groups
        if not self._store.top_k <= capacity <= table.slots_per_group:
            raise BudgetError(
                f"[resize] expected {self.least_slots} to {self._pool.n_slots} slots "
                f"but got {n_slots}"
            )
        with self._exclusive():
            self._evaluate_guards()
            self._settle()
            if self.resident and capacity < table.slots_per_group:
                self._unsettle()
            table.resize(capacity, self._pool.move)
            self._pool.give_up(
                [
                    range(first + capacity, first + table.slots_per_group)
                    for first in range(0, self._pool.n_slots, table.slots_per_group)
                ]
            )

    @property
    def experts(self) -> list[tuple[int, int]]:
        """All experts there are, as ``(layer, expert)``."""
        return [
            (layer, e) for layer in self._rows for e in range(self._store.n_experts)
        ]

    @property
    def held(self) -> list[tuple[int, int]]:
        """The experts in memory."""
        with self._exclusive():
            self._settle()
            rows = self._table.rows
            return [
                (layer, e)
                for layer, e in self.experts
                if self.resident or rows[self._rows[layer]][e] != EMPTY
            ]

    def preload(self, experts: Collection[tuple[int, int]]) -> None:
        """Read ``(layer, expert)`` pairs at once; the layers share what room there is.

        Raises:
            ExpertStoreError: one could not be read; what could be is kept.
        """
        if self.resident:
            return
        wanted = self._fitting(experts)
        with self._exclusive():
            self._evaluate_guards()
            self._settle()
            before = self.stats.snapshot().layers
            key = self._table.key
            keep = {
                key(self._rows[layer], e) for layer in wanted for e in wanted[layer]
            }
            for layer, chosen in wanted.items():
                places = self._table.rows[self._rows[layer]]
                self._begin(layer, [e for e in chosen if places[e] == EMPTY], keep)
            failed = self._settle()
            for layer, counters in before.items():
                # Nobody has asked for them: they are no misses.
                self.stats[layer].preloaded += (
                    self.stats[layer].misses - counters.misses
                )
                self.stats[layer].misses = counters.misses
            if failed:
                raise failed[min(failed)]

    def _fitting(self, experts: Collection[tuple[int, int]]) -> dict[int, list[int]]:
        wanted: dict[int, list[int]] = {layer: [] for layer in self._rows}
        for layer, expert in experts:
            if len(wanted[layer]) < self._table.capacity:
                wanted[layer].append(expert)
        while sum(map(len, wanted.values())) > self.n_slots:
            max(wanted.values(), key=len).pop()
        return wanted

    def _unsettle(self) -> None:
        """Stream from now on what was all in memory."""
        self._reader = self._new_reader()
        self._table.fill()
        self.resident = False

    def source(self, layer: int) -> ExpertSource:
        """Return one layer's experts as its MoE Op reads them, until ``resize``.

        Raises:
            ConfigError: the layer has no routed experts.
        """
        if layer not in self._rows:
            raise ConfigError(
                f"[source] expected one of the layers {list(self._rows)} but got "
                f"{layer}"
            )
        key = layer, self.resident
        if key not in self._sources:
            self._sources[key] = self._new_source(layer)
        return self._sources[key]

    def _new_source(self, layer: int) -> ExpertSource:
        layout = self._store.layout(layer)
        if not self.resident:
            return StreamedExperts(self, layer, self._pool.weights(layout))
        n_experts = self._store.n_experts
        first = self._rows[layer] * n_experts
        weights = self._pool.weights(layout, first, n_experts)
        return PreloadedExperts(weights, self.stats[layer])

    def guard(self, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` before any slot is overwritten."""
        with self._lock:
            self._guards.extend(outputs)

    def close(self) -> None:
        """Wait for reads in flight and end the reading threads."""
        with self._lock:
            self._cancel()
            self._settle()
            self._reader.close()

    def __enter__(self) -> ExpertStreamer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the lock, and set right what an interrupt in here left half done."""
        with self._lock:
            if self._interrupted:
                self._cancel()
                self._settle()
                self._table.repair()
            self._interrupted = True
            try:
                yield
            except MoefluxError:
                self._interrupted = False
                raise
            self._interrupted = False

    def _slots(self, layer: int, indices: mx.array) -> mx.array:
        with self._exclusive():
            guards, self._guards = self._guards, []
            self._evaluate(indices, *guards)
            if not mx.issubdtype(indices.dtype, mx.integer):
                raise ExpertStoreError(
                    f"[slots] expected expert ids as integers but got {indices.dtype}"
                )
            ids = np.array(indices, copy=False).ravel().tolist()
            needed = self._distinct(layer, ids)
            if len(needed) > self._table.capacity:
                raise BudgetError(
                    f"[slots] layer {layer}: expected at most {self._table.capacity} "
                    f"distinct experts in one step but got {len(needed)}: the memory "
                    "budget is too small for it"
                )
            self._settle()
            row = self._rows[layer]
            places = self._table.rows[row]
            missing = [e for e in needed if places[e] == EMPTY]
            if missing:
                self._fetch(layer, needed, missing)
            self._table.touch(row, needed)
            self.stats[layer].hits += len(needed) - len(missing)
            slots = np.array([places[e] for e in ids], dtype=np.uint32)
            return mx.array(slots.reshape(indices.shape))

    def _fetch(self, layer: int, needed: list[int], missing: list[int]) -> None:
        row = self._rows[layer]
        keep = {self._table.key(row, expert) for expert in needed}
        begun = self._begin(layer, missing, keep)
        assert begun == len(missing)
        failed = self._settle(self.stats[layer])
        if failed:
            raise failed[min(failed)]

    def _waves(
        self, layer: int, experts: Sequence[int]
    ) -> Iterator[list[tuple[int, int]]]:
        counters, row = self.stats[layer], self._rows[layer]
        left = dict.fromkeys(self._distinct(layer, [int(e) for e in experts]))
        n_ahead = min(WAVE_EXPERTS, max(1, self._table.capacity // 2))
        read: set[int] = set()
        while left:
            with self._exclusive():
                wave = self._next_wave(layer, left, read)
                if not wave:
                    read.update(self._read_ahead(layer, list(left)[:n_ahead], left))
                    wave = self._next_wave(layer, left, read)
                for expert, _ in wave:
                    del left[expert]
                visited = [expert for expert, _ in wave]
                self._table.touch(row, visited)
                counters.hits += sum(expert not in read for expert in visited)
                if left:
                    keep = [*visited, *left]
                    read.update(self._read_ahead(layer, list(left)[:n_ahead], keep))
            yield wave

    def _next_wave(
        self, layer: int, left: Collection[int], read: Collection[int]
    ) -> list[tuple[int, int]]:
        """Return what is in memory by now, raising if one of ``read`` failed."""
        if self._in_flight:
            # What was built on the last wave is computed while the next one is read.
            self._evaluate_guards()
        failed = self._settle(self.stats[layer])
        wanted = [e for e in left if e in read and (layer, e) in failed]
        if wanted:
            raise failed[layer, wanted[0]]
        places = self._table.rows[self._rows[layer]]
        return [(e, places[e]) for e in left if places[e] != EMPTY]

    def _read_ahead(
        self, layer: int, experts: list[int], keep: Collection[int]
    ) -> list[int]:
        """Begin to read as many of ``experts`` as find a slot; return those."""
        row = self._rows[layer]
        self._evaluate_guards()
        begun = self._begin(layer, experts, {self._table.key(row, e) for e in keep})
        return experts[:begun]

    def _begin(self, layer: int, experts: list[int], keep: set[int]) -> int:
        """Submit reads into claimed slots until none can be had; return how many."""
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
        if reads:
            batch = Batch(reads)
            self._in_flight.append((batch, slots))
            start = time.perf_counter()
            self._reader.submit(batch)
            self.stats[layer].wait_seconds += time.perf_counter() - start
        return len(reads)

    def _read(self, layer: int, expert: int, slot: int) -> Read:
        store = self._store
        checked = self._checked[self._rows[layer], expert]
        return Read(
            store.spans(layer, expert),
            self._pool.buffer(slot, store.layout(layer).record_bytes),
            layer,
            expert,
            None if checked else store.checksum(layer, expert),
        )

    def _settle(
        self, waiting: Counters | None = None
    ) -> dict[tuple[int, int], ExpertStoreError]:
        """Wait for reads in flight and enter them in the table; return failures.

        An interrupt leaves the rest in flight, to be settled by the next call.
        """
        failed: dict[tuple[int, int], ExpertStoreError] = {}
        while self._in_flight:
            batch, slots = self._in_flight[0]
            start = time.perf_counter()
            batch.wait()
            if waiting is not None:
                waiting.wait_seconds += time.perf_counter() - start
            for read, slot in zip(batch.reads, slots, strict=True):
                if (error := self._settle_read(read, slot)) is not None:
                    failed[read.layer, read.expert] = error
            del self._in_flight[0]
        return failed

    def _settle_read(self, read: Read, slot: int) -> ExpertStoreError | None:
        row, counters = self._rows[read.layer], self.stats[read.layer]
        counters.read_seconds += read.seconds
        if read.error is not None or not read.done:
            self._table.release(row, slot)
            return read.error
        counters.misses += 1
        counters.read_bytes += len(read.buffer)
        self._checked[row, read.expert] = True
        self._table.place(row, read.expert, slot)
        return None

    def _cancel(self) -> None:
        for batch, _ in self._in_flight:
            batch.cancel()

    def _evaluate_guards(self) -> None:
        guards, self._guards = self._guards, []
        if guards:
            self._evaluate(*guards)

    def _preload(self, report: Progress | None) -> None:
        """Read every expert into the slot ``row * n_experts + expert``."""
        n_experts = self._store.n_experts
        try:
            for layer, row in self._rows.items():
                slots = range(row * n_experts, (row + 1) * n_experts)
                reads = [self._read(layer, e, slot) for e, slot in enumerate(slots)]
                batch = Batch(reads)
                self._reader.submit(batch)
                batch.wait()
                self._count_preloaded(reads)
                if report is not None:
                    done = (row + 1) * n_experts * self.slot_bytes
                    report("reading experts", done, self.n_slots * self.slot_bytes)
        finally:
            self._reader.close()

    def _count_preloaded(self, reads: list[Read]) -> None:
        for read in reads:
            if read.error is not None:
                raise read.error
            counters = self.stats[read.layer]
            counters.preloaded += 1
            counters.read_bytes += len(read.buffer)
            counters.read_seconds += read.seconds

    def _distinct(self, layer: int, ids: Sequence[int]) -> list[int]:
        distinct = sorted(set(ids))
        if distinct and not 0 <= distinct[0] <= distinct[-1] < self._store.n_experts:
            raise ExpertStoreError(
                f"[slots] layer {layer}: expected experts from 0 to "
                f"{self._store.n_experts - 1} but got {distinct[0]} to {distinct[-1]}"
            )
        return distinct


class StreamedExperts:
    """One layer of an ``ExpertStreamer`` that does not hold every expert."""

    def __init__(self, streamer: ExpertStreamer, layer: int, weights: ExpertWeights):
        self._streamer, self._layer, self._weights = streamer, layer, weights

    @property
    def weights(self) -> ExpertWeights:
        """All slots of the pool in this layer's layout."""
        return self._weights

    @property
    def settled(self) -> None:
        """Experts come and go."""
        return None

    def asked(self, n: int) -> None:
        """Hear of nothing: whoever asks calls ``slots``, which counts."""

    def slots(self, indices: mx.array) -> mx.array:
        """Map ``[N, K]`` expert ids to slots, reading what is missing.

        Raises:
            ExpertStoreError: an id is out of range, or a record cannot be read; what
                could be read is kept, and the call may be repeated.
            BudgetError: more distinct experts than slots.
        """
        return self._streamer._slots(self._layer, indices)

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield ``(expert, slot)`` lists: first what is in memory, then what is read.

        While the caller computes with one wave the next one is being read.

        Raises:
            ExpertStoreError: an id is out of range, or a record cannot be read.
        """
        return self._streamer._waves(self._layer, experts)

    def guard(self, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` before any slot handed out so far is overwritten."""
        self._streamer.guard(*outputs)
