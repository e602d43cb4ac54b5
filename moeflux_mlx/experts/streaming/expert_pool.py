"""The expert slots of all layers under one memory budget: size, contents, lifetime."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial

import mlx.core as mx

from ... import config
from ...errors import BudgetError, ConfigError, MoefluxError
from ...system.files import short
from ...system.progress import Report
from ...system.uncopied import Uncopied
from ..compute.resident import PreloadedExperts
from ..compute.streamed import StreamedExperts
from ..files.layout import ExpertLayout
from ..files.reader import INLINE_BYTES, ReadWorkers
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

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

# Guarded results that may be pending where nothing is evicted. Few callers have more
# calls in flight.
RESIDENT_GUARDS = 4

Source = StreamedExperts | PreloadedExperts


def check_scope(scope: str) -> None:
    """Raise ConfigError unless ``scope`` is ``global`` or ``layer``."""
    if scope not in ("global", "layer"):
        raise ConfigError(f"[scope] expected 'global' or 'layer' but got {scope!r}")


class _Repairs:
    """Context for changes that an interrupt may cut short; the next entry repairs them.

    This is a class because an interrupted generator is finalised at an unknown time.
    """

    def __init__(self, repair: Callable[[], None]):
        self._repair = repair
        self._interrupted = False

    def __enter__(self) -> None:
        if self._interrupted:
            self._repair()
        self._interrupted = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Our own errors are raised only between complete changes.
        if kind is None or issubclass(kind, MoefluxError):
            self._interrupted = False


class ExpertPool(Uncopied):
    """Slots for the experts of all layers of a store, under one memory budget.

    One thread at a time may use slots. It holds ``lock`` from its request until it has
    guarded the arrays that read the slots, as a model's call does. Threads may take
    turns. The caller closes the store, after the pool.
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
            store: the open files of the experts.
            memory: bytes for all experts, alignment included; None: 3/4 of physical
                memory.
            scope: ``global``: layers compete for slots; ``layer``: equal shares.
            policy: the eviction policy: a name for ``policy_factory``, or a factory.
            floor: as for ``SlotTable``.
            chosen: number of a layer's experts that a token chooses; default:
                ``store.top_k``, the number that must be in memory together.
            read_threads: number of reading threads; default: the environment's.
            inline_bytes: reads of at most this many bytes in all use no thread.
            read_ahead: ``on``, ``off``, or ``auto``: measure and use the faster one.
            runs_ahead: tokens run as if no expert were missing. The pool then keeps a
                blank slot, if it can spare one, to stand for missing experts: later
                layers choose nearly the same experts after a blank expert, but other
                ones after a wrong expert.
            gives_way: the pool is likely to shrink.
            stacks: if all experts fit, store each of a layer's tensors contiguously.
            evaluate: evaluates arrays before slots change, like ``mx.eval``; an
                executor passes its own to measure the time.
            report: receives the progress of reading all experts.
            lock: the lock that a model's calls hold; default: a new one.
            holders: objects that keep views of slots from one call to the next.

        Raises:
            ConfigError: an argument has no usable value.
            TraceError: the recording that ``policy`` names is not usable.
            BudgetError: the budget cannot hold one token's experts; states the minimum.
            ExpertStoreError: a record cannot be read.
        """
        check_scope(scope)
        self._store, self._stacks = store, stacks
        self._stacked: dict[int, tuple[ExpertLayout, int, int]] = {}
        self._chosen = chosen or store.top_k
        self._index = {layer: index for index, layer in enumerate(store.layers)}
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
        pools = [self.pools[division.segment(index)] for index in self._index.values()]
        self._copy = TableCopy(self._table, pools)
        self._holders = holders or Holders()
        self._holders.add(self)
        least = self._table.n_groups * store.top_k
        self._resizing = Resizing(self.pools, self._table, least, self._holders)
        self._new_reader = partial(
            ReadWorkers, read_threads or config.read_threads(), inline_bytes
        )
        self._sources: dict[tuple[int, bool], Source] = {}
        self._weights: dict[int, ExpertWeights] = {}
        self.lock = lock or threading.RLock()
        self._repairs = _Repairs(self._repair)
        self._guards = Guards(evaluate)
        self.stats = StreamStats(store.layers)
        self._in_flight = InFlight(
            store, self._index, pools, self._table, self._new_reader(), self.stats
        )
        self._demand = Demand(self._index, self._table, self._in_flight, self.stats)
        # A read without a thread blocks the caller, so it cannot run ahead.
        self._least_record = min(layout.record_bytes for layout in layouts)
        if read_ahead == "auto" and not self.reads_in_workers:
            read_ahead = "off"
        self.read_ahead = ReadAhead(read_ahead, lambda: self.stats.wait_seconds)
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
        """Number of experts that fit into memory together, over all layers."""
        return self._table.n_slots

    @property
    def store(self) -> ExpertStore:
        """The open files of the experts."""
        return self._store

    @property
    def reads_in_workers(self) -> bool:
        """Whether worker threads read experts while the caller computes."""
        return self._least_record > self._in_flight.reader.inline_bytes

    @property
    def most_slots(self) -> int:
        """Number of slots before any ``resize``."""
        return self._resizing.most_slots

    @property
    def least_slots(self) -> int:
        """Number of slots that one token needs."""
        return self._resizing.least_slots

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.pools[0].stride

    @property
    def capacity(self) -> int:
        """Number of experts of one layer that always fit into memory together."""
        return self._table.capacity

    def fits(self, n_experts: int) -> bool:
        """Return whether ``n_experts`` of a layer, or all it has, fit into memory."""
        return min(n_experts, self._store.n_experts) <= self._table.capacity

    def most_requested(self, n_tokens: int) -> int:
        """Return the most experts that ``n_tokens`` tokens request, over all layers."""
        most = min(n_tokens * self._chosen, self._store.n_experts)
        return len(self._index) * most

    @property
    def slack_bytes(self) -> int:
        """Bytes allocated in addition to ``n_slots`` slots."""
        return self._resizing.slack_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes allocated for experts, alignment included; at most the budget."""
        return sum(pool.n_bytes for pool in self.pools)

    def rounded(self, n_slots: int) -> int:
        """Return the largest pool size, at most ``n_slots``, that ``resize`` is for."""
        return self._resizing.rounded(n_slots)

    def most_fitting(self, room: int, replacing: int) -> int:
        """Return how many slots fit into ``room``; below ``least_slots`` means none.

        Args:
            room: bytes for the pool.
            replacing: bytes for the pool while it shrinks, the second buffer included.
        """
        return self._resizing.most_fitting(room, replacing)

    def resize(self, n_slots: int) -> None:
        """Change the number of slots; call this between tokens only.

        A smaller pool evicts experts in the policy's order, keeps the others, and
        returns memory to the system. Where the system takes back whole buffers only,
        one segment at a time has a second buffer during the change.

        Raises:
            ConfigError: ``n_slots`` is not an int.
            BudgetError: ``n_slots`` is outside ``least_slots`` to ``most_slots``; or
                ``stay`` was called; or the second buffer cannot be allocated.
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
                "[resize] expected no earlier call under mx.grad or mx.compile but got "
                "one, whose result may still read any expert: load the model again"
            )
        with self.lock, self._repairs:
            self._guards.wait()
            self._in_flight.finish()
            if self.resident and n_slots < self.most_slots:
                self._begin_streaming()
            self._resizing(n_slots)

    def come_and_go(self) -> None:
        """Stream experts from now on, even if all of them are in memory."""
        if self.resident and not self.stays:
            with self.lock, self._repairs:
                self._guards.wait()
                self._holders.let_go()
                self._begin_streaming()

    def let_go(self) -> None:
        """Drop every array of slots, and every source that has some."""
        self._sources.clear()
        self._weights.clear()

    def _pool(self, layer: int) -> SlotPool:
        return self.pools[self._table.segment(self._index[layer])]

    @property
    def experts(self) -> list[tuple[int, int]]:
        """All experts of the store as ``(layer, expert)``."""
        return [
            (layer, e) for layer in self._index for e in range(self._store.count(layer))
        ]

    @property
    def held(self) -> list[tuple[int, int]]:
        """The experts in memory."""
        with self.lock, self._repairs:
            self._in_flight.finish()
            slots = self._table.slots
            return [
                (layer, e)
                for layer, e in self.experts
                if self.resident or slots[self._index[layer]][e] != EMPTY
            ]

    def preload(self, experts: Collection[tuple[int, int]]) -> None:
        """Read ``(layer, expert)`` pairs now, as many as fit into each group's slots.

        Raises:
            ConfigError: there is no such layer or expert.
            ExpertStoreError: a record cannot be read; the others are kept.
        """
        self._check_experts(experts)
        if self.resident:
            return
        with self.lock, self._repairs:
            self._guards.wait()
            self._in_flight.finish()
            self._demand.preload(experts)

    def _check_experts(self, experts: Collection[tuple[int, int]]) -> None:
        n_experts = self._store.n_experts
        listed = experts if isinstance(experts, Collection) else [experts]
        for pair in listed:
            match pair:
                case (int(layer), int(expert)):
                    if layer in self._index and 0 <= expert < n_experts:
                        continue
            raise ConfigError(
                f"[preload] expected (layer, expert) pairs with layers "
                f"{min(self._index)} to {max(self._index)} and experts 0 to "
                f"{n_experts - 1} but got {pair!r}"
            )

    def _begin_streaming(self) -> None:
        """Begin to stream: from now on experts may be evicted."""
        for layer, place in self._stacked.items():
            self._pool(layer).unstack(*place)
        self._stacked.clear()
        self._in_flight.reader = self._new_reader()
        self._table.fill()
        self.resident = False

    def guard(self, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` before any slot is overwritten."""
        with self.lock:
            self._guards.add(outputs)

    def begin(self, arrays: Sequence[mx.array]) -> None:
        """Compute lazy arrays before the next ``resize``, as they may hold slots."""
        with self.lock:
            self._guards.begin(arrays)

    def guard_result(self, result: mx.array) -> None:
        """Guard the result of a call on resident experts, which guarded nothing else.

        Resident slots change only on ``resize``; streamed calls guard their own reads.
        """
        if self.resident:
            self.guard(result)

    def stay(self) -> None:
        """Refuse ``resize`` from now on, because unguarded arrays read the slots."""
        self.stays = True

    def hand_over(self) -> None:
        """Begin to compute guarded arrays, so that another thread can wait for them.

        Only the thread that made a lazy array can begin to compute it.
        """
        with self.lock:
            self._guards.hand_over()
            if self.resident:
                # Resident calls never wait for guards, so drop the oldest here.
                self._guards.keep(RESIDENT_GUARDS)

    def close(self) -> None:
        """Cancel reads that no worker has begun, wait for the rest, end the workers."""
        with self.lock:
            self._in_flight.cancel()
            self._in_flight.finish()
            self._in_flight.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _repair(self) -> None:
        """Repair a change that an interrupt left half done."""
        self._in_flight.cancel()
        self._in_flight.finish()
        self._table.repair()
        self._resizing.repair()
