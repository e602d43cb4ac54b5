"""Experts on demand: read into slots when asked for, kept while there is room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from ... import config
from ...errors import BudgetError, ConfigError, ExpertStoreError, MoefluxError
from ...system.files import short
from ...system.progress import Report
from ...system.uncopied import Uncopied
from ..compute.resident import PreloadedExperts
from ..compute.streamed import StreamedExperts
from ..files.layout import ExpertLayout
from ..files.reader import INLINE_BYTES, ReadPool
from ..files.store import ExpertStore
from ..pool.guards import Guards
from ..pool.holders import Holders
from ..pool.policy import DEFAULT_POLICY, PolicyFactory, policy_factory
from ..pool.pool import SlotPool, open_pools, pool_stride
from ..pool.residency import EMPTY, SlotTable
from ..pool.resizing import Resizing
from ..pool.segments import divide
from ..pool.stats import StreamStats
from ..pool.table_copy import TableCopy
from ..weights import ExpertWeights
from .demand import Demand
from .in_flight import InFlight
from .read_ahead import ReadAhead

# Experts in a wave: enough to keep every reading thread busy, few enough that the
# first results do not wait for half the pool.
WAVE_EXPERTS = 32
# So many calls' results may be on their way at a time: hardly anybody has more.
RESIDENT_GUARDS = 4

Source = StreamedExperts | PreloadedExperts


def check_scope(scope: str) -> None:
    """Raise ConfigError unless it says how layers share slots."""
    if scope not in ("global", "layer"):
        raise ConfigError(f"[scope] expected 'global' or 'layer' but got {scope!r}")


class _Repairs:
    """Entered for changes that an interrupt may leave half done; the next mends them.

    A class: a generator that an interrupt leaves suspended ends at an unknown time.
    """

    def __init__(self, repair: Callable[[], None]):
        self._repair = repair
        self._interrupted = False

    def __enter__(self) -> None:
        if self._interrupted:
            self._repair()
        self._interrupted = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Errors of ours leave nothing half done.
        if kind is None or issubclass(kind, MoefluxError):
            self._interrupted = False


class ExpertStreamer(Uncopied):
    """Slots for the experts of all layers of a store, under one memory budget.

    One thread at a time may use slots, from asking for them until it has guarded what
    it made of them: it holds ``lock`` meanwhile, as a call of a model does. Which
    thread it is may change. The store stays the caller's to close, after the streamer.
    """

    def __init__(
        self,
        store: ExpertStore,
        memory: int | None = None,
        *,
        scope: str = "global",
        policy: str | PolicyFactory = DEFAULT_POLICY,
        floor: int | None = None,
        chosen: int | None = None,
        read_threads: int | None = None,
        inline_bytes: int = INLINE_BYTES,
        read_ahead: str = "auto",
        runs_ahead: bool = False,
        gives_way: bool = True,
        stacks: bool = False,
        evaluate: Callable[..., None] = mx.eval,
        report: Report | None = None,
        lock: threading.RLock | None = None,
        holders: Holders | None = None,
    ):
        """Allocate the pool; if it holds every expert, read them all now.

        Args:
            store: the open files that experts are read from.
            memory: bytes for all experts, alignment included; None: as many as fit
                into 3/4 of physical memory.
            scope: ``global``: layers compete for slots; ``layer``: equal shares.
            policy: decides on evictions: a name that ``policy_factory`` knows, or what
                makes one.
            floor: as for ``SlotTable``.
            chosen: experts of a layer that a token chooses, where fewer of them than
                that may be in memory together; by default all must.
            read_threads: parallel reads, from the environment by default.
            inline_bytes: reads of up to this many bytes together need no thread.
            read_ahead: ``on``, ``off``, or ``auto``: as measured.
            runs_ahead: tokens run as if no expert were missing. A slot, if one can be
                spared, then stays blank for those that are: without them layers choose
                more like with them than with others in their place.
            gives_way: the pool is likely to become smaller.
            stacks: where all experts stay, each of a layer's tensors lies end to end.
            evaluate: evaluates arrays that must be done before slots change, like
                ``mx.eval``; an executor's own counts how long that takes.
            report: hears how far reading all experts has come.
            lock: held by the calls of a model; one of its own by default.
            holders: who keeps what ``source`` returns, or arrays of it.

        Raises:
            ConfigError: an argument has no usable value.
            TraceError: the recording that ``policy`` names is not usable.
            BudgetError: the budget cannot hold the needs of one token; states the
                minimum.
            ExpertStoreError: a record could not be read.
        """
        check_scope(scope)
        self._store, self._stacks = store, stacks
        self._stacked: dict[int, tuple[ExpertLayout, int, int]] = {}
        self._chosen = chosen or store.top_k
        self._rows = {layer: row for row, layer in enumerate(store.layers)}
        layouts = [store.layout(layer) for layer in store.layers]
        counts = [store.count(layer) for layer in store.layers]
        division = divide(
            memory,
            counts=counts,
            stride=pool_stride(layouts),
            top_k=store.top_k,
            scope=scope,
            spares=runs_ahead,
            gives_way=gives_way,
        )
        self.pools = open_pools(layouts, division.segment_slots, blank=division.blank)
        self._table = SlotTable(
            len(layouts),
            store.n_experts,
            division.n_slots,
            top_k=self._chosen,
            policy=policy_factory(policy) if isinstance(policy, str) else policy,
            n_groups=division.n_groups,
            n_segments=division.n_segments,
            least=division.least,
            floor=floor,
            counts=counts,
        )
        pools = [self.pools[division.segment(row)] for row in self._rows.values()]
        self._copy = TableCopy(self._table, pools)
        self._holders = holders or Holders()
        self._holders.add(self)
        least = self._table.n_groups * store.top_k
        self._resizing = Resizing(self.pools, self._table, least, self._holders)
        self._new_reader = partial(
            ReadPool, read_threads or config.read_threads(), inline_bytes
        )
        self._sources: dict[tuple[int, bool], Source] = {}
        self._weights: dict[int, ExpertWeights] = {}
        self.lock = lock or threading.RLock()
        self._repairs = _Repairs(self._repair)
        self._guards = Guards(evaluate)
        # The last ``ask``: layer, ids, and those that were missing.
        self._asked: tuple[int, list[int], list[int]] | None = None
        self.stats = StreamStats(store.layers)
        self._in_flight = InFlight(
            store, self._rows, pools, self._table, self._new_reader(), self.stats
        )
        self._demand = Demand(self._rows, self._table, self._in_flight, self.stats)
        # A read that needs no thread cannot run ahead of anything.
        self._least_record = min(layout.record_bytes for layout in layouts)
        if read_ahead == "auto" and not self.reads_aside:
            read_ahead = "off"
        self.read_ahead = ReadAhead(read_ahead, lambda: self.stats.total.wait_seconds)
        self.resident = division.n_slots == sum(counts)
        # Whether ``resize`` is refused.
        self.stays = False
        if self.resident:
            try:
                self._in_flight.preload(report)
            finally:
                self._in_flight.reader.close()

    @property
    def n_slots(self) -> int:
        """Experts that fit into memory at the same time, all layers together."""
        return self._table.n_slots

    @property
    def store(self) -> ExpertStore:
        """The open files that experts are read from."""
        return self._store

    @property
    def reads_aside(self) -> bool:
        """Whether threads read experts, so that others may compute meanwhile."""
        return self._least_record > self._in_flight.reader.inline_bytes

    @property
    def most_slots(self) -> int:
        """Slots that there were at first."""
        return self._resizing.most_slots

    @property
    def least_slots(self) -> int:
        """Slots that one token needs."""
        return self._resizing.least_slots

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert in memory."""
        return self.pools[0].stride

    @property
    def capacity(self) -> int:
        """Experts of one layer that fit into memory together."""
        return self._table.capacity

    def fits(self, n_experts: int) -> bool:
        """Tell whether so many experts of a layer, if it has them, fit into memory."""
        return min(n_experts, self._store.n_experts) <= self._table.capacity

    def most_asked(self, n_tokens: int) -> int:
        """Return the most experts that tokens ask for, all layers together."""
        most = min(n_tokens * self._chosen, self._store.n_experts)
        return len(self._rows) * most

    @property
    def miss_rate(self) -> float:
        """Share of layers, of one token or a batch each, that lately missed experts
        which nobody had foreseen."""
        return self._demand.miss_rate

    @property
    def slack_bytes(self) -> int:
        """Bytes taken beside those of ``n_slots`` slots."""
        return self._resizing.slack_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes taken for experts, alignment included; never more than the budget."""
        return sum(pool.n_bytes for pool in self.pools)

    def rounded(self, n_slots: int) -> int:
        """Return the number of slots, no larger, that is worth a change of size."""
        return self._resizing.rounded(n_slots)

    def most_fitting(self, room: int, replacing: int) -> int:
        """Return how many slots fit into ``room``; fewer than the least: none do.

        Args:
            replacing: bytes that there are for slots while the pool becomes smaller.
        """
        return self._resizing.most_fitting(room, replacing)

    def resize(self, n_slots: int) -> None:
        """Use ``n_slots`` slots, within the memory taken at first; not in the middle of
        a token.

        The memory of slots given up goes back to the system. The experts that the
        policy would evict first are forgotten, the others stay in memory. Where only
        whole buffers go back, there are two of one segment meanwhile.

        Raises:
            ConfigError: ``n_slots`` is no int.
            BudgetError: fewer slots than one token needs, or more than there were at
                first; or experts must ``stay``; or there is no memory for a segment's
                second buffer.
        """
        if type(n_slots) is not int:
            raise ConfigError(
                f"[resize] expected n_slots as an int but got {short(n_slots)}"
            )
        if not self.least_slots <= n_slots <= self.most_slots:
            raise BudgetError(
                f"[resize] expected {self.least_slots} to {self.most_slots} slots "
                f"but got {n_slots}"
            )
        if self.stays:
            raise BudgetError(
                "[resize] expected no call under mx.grad, mx.compile or the like "
                "before: what it gave reads all experts; load the model anew"
            )
        with self.lock, self._repairs:
            self._guards.wait()
            self._in_flight.settle()
            if self.resident and n_slots < self.most_slots:
                self._unsettle()
            self._resizing(n_slots)

    def come_and_go(self) -> None:
        """Have calls ask for experts from now on, also where all of them are here."""
        if self.resident and not self.stays:
            with self.lock, self._repairs:
                self._guards.wait()
                self._holders.let_go()
                self._unsettle()

    def let_go(self) -> None:
        """Keep no arrays of slots, nor what has some."""
        self._sources.clear()
        self._weights.clear()

    def _pool(self, layer: int) -> SlotPool:
        return self.pools[self._table.segment(self._rows[layer])]

    @property
    def experts(self) -> list[tuple[int, int]]:
        """All experts there are, as ``(layer, expert)``."""
        return [
            (layer, e) for layer in self._rows for e in range(self._store.count(layer))
        ]

    @property
    def held(self) -> list[tuple[int, int]]:
        """The experts in memory."""
        with self.lock, self._repairs:
            self._in_flight.settle()
            rows = self._table.rows
            return [
                (layer, e)
                for layer, e in self.experts
                if self.resident or rows[self._rows[layer]][e] != EMPTY
            ]

    def preload(self, experts: Collection[tuple[int, int]]) -> None:
        """Read ``(layer, expert)`` pairs at once; the layers share the room there is.

        Raises:
            ConfigError: there is no such layer or expert.
            ExpertStoreError: one could not be read; the others are kept.
        """
        self._check_experts(experts)
        if self.resident:
            return
        with self.lock, self._repairs:
            self._guards.wait()
            self._in_flight.settle()
            self._demand.preload(experts)

    def _check_experts(self, experts: Collection[tuple[int, int]]) -> None:
        n_experts = self._store.n_experts
        listed = experts if isinstance(experts, Collection) else [experts]
        for pair in listed:
            match pair:
                case (int(layer), int(expert)):
                    if layer in self._rows and 0 <= expert < n_experts:
                        continue
            raise ConfigError(
                f"[preload] expected experts as (layer, expert) of layers "
                f"{min(self._rows)} to {max(self._rows)} and experts 0 to "
                f"{n_experts - 1} but got {pair!r}"
            )

    def _unsettle(self) -> None:
        """Stream from now on experts that were all in memory."""
        for layer, place in self._stacked.items():
            self._pool(layer).unstack(*place)
        self._stacked.clear()
        self._in_flight.reader = self._new_reader()
        self._table.fill()
        self.resident = False

    def source(self, layer: int) -> Source:
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

    def _new_source(self, layer: int) -> Source:
        layout = self._store.layout(layer)
        if not self.resident:
            return StreamedExperts(self, layer, self._rows[layer])
        slots = self._table.all_slots(self._rows[layer])
        place = layout, slots.start, len(slots)
        if self._stacks:
            weights = self._pool(layer).stack(*place)
            self._stacked[layer] = place
        else:
            weights = self._pool(layer).weights(*place)
        return PreloadedExperts(weights, self.stats[layer])

    def weights(self, layer: int) -> ExpertWeights:
        """Return all slots of a layer's segment in the layer's layout.

        They are there until the next ``resize``, and only where experts come and go.
        """
        if layer not in self._weights:
            layout = self._store.layout(layer)
            self._weights[layer] = self._pool(layer).weights(layout)
        return self._weights[layer]

    def guard(self, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` before any slot is overwritten."""
        with self.lock:
            self._guards.add(outputs)

    def begin(self, arrays: Sequence[mx.array]) -> None:
        """Begin lazy arrays before the next ``resize``: they hold slots until then."""
        with self.lock:
            self._guards.begin(arrays)

    def guard_result(self, result: mx.array) -> None:
        """Have the result of a call that guarded nothing else computed in time.

        Where every expert is in memory nothing is overwritten before ``resize``.
        """
        if self.resident:
            # As little of it as makes MLX compute the rest.
            self.guard(result.reshape(-1)[:1])

    def stay(self) -> None:
        """Refuse to ``resize`` from now on: arrays without a guard read all slots."""
        self.stays = True

    def hand_over(self) -> None:
        """Begin to compute readers of slots, so that any thread can wait for them.

        Only the thread that made a lazy array can compute it.
        """
        with self.lock:
            self._guards.hand_over()
            if self.resident:
                # Nobody waits for them between calls: the oldest are done by now.
                self._guards.keep(RESIDENT_GUARDS)

    def close(self) -> None:
        """Wait for reads in flight and end the reading threads."""
        with self.lock:
            self._in_flight.cancel()
            self._in_flight.settle()
            self._in_flight.reader.close()

    def __enter__(self) -> ExpertStreamer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _repair(self) -> None:
        """Mend a change that an interrupt left half done."""
        self._in_flight.cancel()
        self._in_flight.settle()
        self._table.repair()
        self._resizing.repair()

    def ask(self, layer: int, indices: mx.array) -> None:
        """Ask for a layer as ``StreamedExperts.ask`` promises."""
        with self.lock, self._repairs:
            ids = self._read_back([indices])[0].ravel().tolist()
            self._asked = layer, ids, self._request(layer, ids)

    def _request(self, layer: int, ids: list[int]) -> list[int]:
        """Begin to read a step's missing experts, or go on if they were asked for."""
        asked, self._asked = self._asked, None
        if asked is not None and asked[:2] == (layer, ids):
            missing, coming = asked[2], self._in_flight.coming(layer)
            # Another call may have waited for them, and not minded a failure. A call
            # that ended after asking leaves this behind, and others evict since then.
            absent = self._demand.missing(layer, self._demand.distinct(layer, ids))
            if coming.issuperset(missing) and coming.issuperset(absent):
                return missing
        self._in_flight.settle(wanted=())
        return self._demand.request(layer, ids)

    def slots(
        self,
        layer: int,
        indices: mx.array,
        expected: Mapping[int, mx.array] | None = None,
    ) -> mx.array:
        """Give a layer its slots as ``StreamedExperts.slots`` promises.

        Args:
            expected: by layer, ids that it will likely ask for: those begin to be read.
        """
        later = expected or {}
        with self.lock, self._repairs:
            found = self._read_back([indices, *later.values()])
            ids, *likely = (array.ravel().tolist() for array in found)
            if likely:
                self._in_flight.settle(wanted=())
                with_likely = dict(zip(later, likely, strict=True))
                self._demand.provide(layer, ids, with_likely)
            else:
                self._demand.receive(layer, ids, self._request(layer, ids))
            places = self._table.rows[self._rows[layer]]
            slots = np.array([places[e] for e in ids], dtype=np.uint32)
            return mx.array(slots.reshape(indices.shape))

    def batches(
        self, layer: int, indices: mx.array
    ) -> Iterator[tuple[slice, mx.array]]:
        """Give a layer its batches as ``StreamedExperts.batches`` promises."""
        with self.lock, self._repairs:
            rows = self._read_back([indices])[0].tolist()
        first = 0
        while first < len(rows):
            stop, needed = first, set(rows[first])
            while stop < len(rows) and len(needed) <= self._table.capacity:
                stop += 1
                needed = needed.union(*rows[stop : stop + 1])
            batch = slice(first, max(stop, first + 1))
            yield batch, self.slots(layer, indices[batch])
            first = batch.stop

    def parts(
        self, layer: int, indices: mx.array
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Give a layer its parts as ``StreamedExperts.parts`` promises."""
        places = self._table.rows[self._rows[layer]]
        with self.lock, self._repairs:
            ids = self._read_back([indices])[0].ravel().tolist()
            missing = self._request(layer, ids)
            if self._in_flight.is_over(layer, missing):
                # Nothing to wait for, as where no thread was needed: one part.
                self._demand.receive(layer, ids, missing)
                missing = []
            here = [i for i, e in enumerate(ids) if e not in missing]
            slots = [places[ids[i]] for i in here]
        if here:
            yield here, slots
        if not missing:
            return
        with self.lock, self._repairs:
            self._demand.receive(layer, ids, missing)
            later = [i for i, e in enumerate(ids) if e in missing]
            slots = [places[ids[i]] for i in later]
        yield later, slots

    @property
    def is_reading(self) -> bool:
        """Whether something is still being read ahead."""
        with self.lock, self._repairs:
            self._in_flight.settle(wanted=())
            return bool(self._in_flight)

    def slots_on_device(self, layers: Collection[int] = ()) -> mx.array:
        """Return each expert's slot, uint32 ``[n_layers, n_experts]``.

        Absent experts have the blank one, or slot 0; layers are in the store's order.

        Args:
            layers: wait for the reads ahead of these.
        """
        with self.lock, self._repairs:
            self._in_flight.settle(wanted=())
            for layer in self._rows.keys() & layers:
                self._demand.await_foreseen(layer)
            return self._copy.on_device()

    def confirm(
        self,
        layers: Sequence[int],
        chosen: Sequence[mx.array],
        *,
        again: bool = False,
        n_foreseen: int | None = None,
    ) -> int:
        """Enter the choices of a run that looked slots up on the device.

        The first layer that lacked an expert gets it; what later ones chose is then
        no more than likely, and may still be being read on return.

        Args:
            layers: those that ran, in order.
            chosen: arrays of expert ids, together as many for each layer, in order.
            again: the first layer's were entered before, when it lacked some.
            n_foreseen: how many of the layers, from the first on, have run before for
                this token, and were read ahead for; what is missing of them is a
                surprise. None: do not read ahead for those after the one that lacked.

        Returns:
            How many of the layers, from the first on, had all they asked for.

        Raises:
            ExpertStoreError, BudgetError: as ``StreamedExperts.slots``.
        """
        with self.lock, self._repairs:
            found = [ids.ravel() for ids in self._read_back(chosen)]
            ids = np.concatenate(found).reshape(len(layers), -1)
            self._in_flight.settle(wanted=())
            rows = [self._rows[layer] for layer in layers]
            n_right = self._copy.n_complete(rows, ids)
            for n in range(int(again and n_right > 0), n_right):
                self._demand.confirm(layers[n], ids[n].tolist())
            if n_right < len(layers):
                ahead = n_foreseen is not None
                later = range(n_right + 1, len(layers)) if ahead else ()
                self._demand.provide(
                    layers[n_right],
                    ids[n_right].tolist(),
                    {layers[n]: ids[n].tolist() for n in later},
                    surprising=n_foreseen is None or n_right < n_foreseen,
                )
            return n_right

    def foresee(self, layer: int, indices: mx.array) -> None:
        """Begin to read experts that a layer is expected to ask for next.

        A failed read is of no consequence: whoever asks reads again.

        Args:
            indices: expert ids, any shape.
        """
        with self.lock, self._repairs:
            ids = self._read_back([indices])[0].ravel().tolist()
            self._in_flight.settle(wanted=())
            self._demand.foresee(layer, ids)

    def _read_back(self, chosen: Sequence[mx.array]) -> list[np.ndarray]:
        """Wait for expert ids, and for all that still reads slots."""
        self._guards.wait(*chosen)
        for indices in chosen:
            if not mx.issubdtype(indices.dtype, mx.integer):
                raise ExpertStoreError(
                    f"[slots] expected expert ids as integers but got {indices.dtype}"
                )
        return [np.array(indices, copy=False) for indices in chosen]

    def waves(
        self, layer: int, experts: Sequence[int]
    ) -> Iterator[list[tuple[int, int]]]:
        counters, row = self.stats[layer], self._rows[layer]
        wanted = self._demand.distinct(layer, [int(e) for e in experts])
        left = dict.fromkeys(wanted)
        n_ahead = min(WAVE_EXPERTS, max(1, self._table.capacity // 2))
        read: set[int] = set()
        while left:
            with self.lock, self._repairs:
                wave = self._next_wave(layer, left, read)
                if not wave:
                    read.update(self._begin_some(layer, list(left)[:n_ahead], left))
                    wave = self._next_wave(layer, left, read)
                for expert, _ in wave:
                    del left[expert]
                visited = [expert for expert, _ in wave]
                self._table.touch(row, visited)
                counters.hits += sum(expert not in read for expert in visited)
                if left:
                    keep = [*visited, *left]
                    read.update(self._begin_some(layer, list(left)[:n_ahead], keep))
            yield wave

    def _next_wave(
        self, layer: int, left: Collection[int], read: Collection[int]
    ) -> list[tuple[int, int]]:
        """Return the experts in memory by now, raising if one of ``read`` failed."""
        if self._in_flight:
            # The last wave's outputs are computed while the next one is read.
            self._guards.wait()
        failed = self._in_flight.settle(self.stats[layer])
        wanted = [e for e in left if e in read and (layer, e) in failed]
        if wanted:
            raise failed[layer, wanted[0]]
        places = self._table.rows[self._rows[layer]]
        return [(e, places[e]) for e in left if places[e] != EMPTY]

    def _begin_some(
        self, layer: int, experts: list[int], keep: Collection[int]
    ) -> list[int]:
        """Begin to read as many of ``experts`` as find a slot; return those."""
        self._guards.wait()
        keys = self._demand.keys(layer, keep)
        return experts[: self._in_flight.begin(layer, experts, keys)]
