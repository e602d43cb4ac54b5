"""Serve each step's request: which experts to read, to keep and to count as used."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set

from ...errors import BudgetError, ExpertStoreError
from ..pool.residency import EMPTY, SlotTable
from ..pool.stats import StreamStats
from .in_flight import InFlight

# Tokens that the miss rate averages over: few, so it follows a change of topic at once.
MISS_RATE_TOKENS = 2


class Demand:
    """Bring the experts of each request into memory, and count hits and misses.

    A request is for one layer and for one token or one batch. ``miss_rate`` is the
    recent share of requests that missed an expert without a prediction of it.

    Args:
        index: maps a layer's number to its index in the slot table.
    """

    def __init__(
        self,
        index: Mapping[int, int],
        table: SlotTable,
        in_flight: InFlight,
        stats: StreamStats,
    ):
        self._index, self._table = index, table
        self._in_flight, self._stats = in_flight, stats
        self._read_ahead: dict[int, set[int]] = {}
        self.miss_rate = 1.0

    def distinct(self, layer: int, ids: Sequence[int]) -> list[int]:
        """Return the distinct expert ids in ascending order.

        Raises:
            ExpertStoreError: the layer has no such expert.
        """
        distinct, n_experts = sorted(set(ids)), self._n_experts(layer)
        if distinct and not 0 <= distinct[0] <= distinct[-1] < n_experts:
            raise ExpertStoreError(
                f"[slots] {self._in_flight.name(layer)}: expected experts from 0 to "
                f"{n_experts - 1} but got {distinct[0]} to {distinct[-1]}"
            )
        return distinct

    def keys(self, layer: int, experts: Collection[int]) -> set[int]:
        """Return the table's keys of a layer's experts."""
        return {self._table.key(self._index[layer], expert) for expert in experts}

    def provide(
        self,
        layer: int,
        ids: Sequence[int],
        likely: Mapping[int, Sequence[int]] | None = None,
        *,
        unpredicted: bool = True,
    ) -> None:
        """Bring a request's experts into memory, and begin to read later layers'.

        Args:
            likely: predicted expert ids by layer; ids out of range are ignored.
            unpredicted: whether nobody predicted the missing experts.

        Raises:
            ExpertStoreError, BudgetError: as ``StreamedExperts.slots``.
        """
        later = {
            other: [e for e in sorted(set(chosen)) if 0 <= e < self._n_experts(other)]
            for other, chosen in (likely or {}).items()
        }
        keep = {key for other in later for key in self.keys(other, later[other])}
        missing = self.request(layer, ids, keep, unpredicted=unpredicted)
        keep |= self.keys(layer, ids)
        for other, experts in later.items():
            self._begin_read_ahead(other, experts, keep)
        self.receive(layer, ids, missing)

    def await_read_ahead(self, layer: int) -> None:
        """Wait for a layer's reads ahead.

        A failed read is repeated when a request needs the expert.
        """
        if in_flight := self._in_flight.experts_of(layer):
            wanted = {(layer, expert) for expert in in_flight}
            self._in_flight.finish(self._stats[layer], wanted)

    def request(
        self,
        layer: int,
        ids: Sequence[int],
        likely: Set[int] = frozenset(),
        *,
        unpredicted: bool = True,
    ) -> list[int]:
        """Begin to read a request's missing experts; return all that are missing.

        Args:
            likely: table keys to evict only where no other victim is left.
            unpredicted: as for ``provide``.
        """
        needed = self.distinct(layer, ids)
        if len(needed) > self._table.capacity:
            raise BudgetError(
                f"[slots] {self._in_flight.name(layer)}: expected at most "
                f"{self._table.capacity} distinct experts in one step but got "
                f"{len(needed)}: the memory budget is too small for it"
            )
        missing = self.missing(layer, needed)
        in_flight = self._in_flight.experts_of(layer)
        to_read = [e for e in missing if e not in in_flight]
        if to_read:
            self._begin(layer, to_read, self.keys(layer, needed), likely)
        self._note_predicted(layer, set(needed).difference(to_read))
        self._note_rate(unpredicted and bool(to_read))
        return missing

    def receive(self, layer: int, ids: Sequence[int], missing: list[int]) -> None:
        """Wait for the missing experts, then count the use of all requested ones."""
        counters, n_read = self._stats[layer], 0
        wanted = {(layer, expert) for expert in missing}
        if wanted:
            before = counters.misses
            failed = self._in_flight.finish(counters, wanted)
            if failed_wanted := wanted & failed.keys():
                raise failed[min(failed_wanted)]
            n_read = counters.misses - before
        self._note_use(layer, self.distinct(layer, ids), n_read)

    def confirm(self, layer: int, ids: Sequence[int]) -> None:
        """Count a request whose experts were all in memory."""
        needed = self.distinct(layer, ids)
        self._note_use(layer, needed)
        self._note_predicted(layer, needed)
        self._note_rate(False)

    def begin_read_ahead(self, layer: int, ids: Sequence[int]) -> None:
        """Begin to read the experts that a layer is predicted to request."""
        expected = self.distinct(layer, ids)
        self._begin_read_ahead(layer, expected, self.keys(layer, expected))

    def _begin_read_ahead(self, layer: int, experts: list[int], keep: Set[int]) -> None:
        in_flight = self._in_flight.experts_of(layer)
        missing = [e for e in self.missing(layer, experts) if e not in in_flight]
        begun = self._in_flight.begin(layer, missing, keep, ahead=True)
        self._read_ahead.setdefault(layer, set()).update(missing[:begun])

    def preload(self, experts: Collection[tuple[int, int]]) -> None:
        """Read ``(layer, expert)`` pairs in advance; these reads are not misses.

        Raises:
            ExpertStoreError: a record cannot be read; the others are kept.
        """
        wanted = self._fitting(experts)
        before = self._stats.snapshot().layers
        keep = {key for layer in wanted for key in self.keys(layer, wanted[layer])}
        for layer, chosen in wanted.items():
            self._in_flight.begin(layer, self.missing(layer, chosen), keep)
        failed = self._in_flight.finish()
        for layer, old in before.items():
            counters = self._stats[layer]
            counters.preloaded += counters.misses - old.misses
            counters.misses = old.misses
        if failed:
            raise failed[min(failed)]

    def _fitting(self, experts: Collection[tuple[int, int]]) -> dict[int, list[int]]:
        """Return as many of the experts by layer as fit into each group's slots."""
        wanted: dict[int, list[int]] = {layer: [] for layer in self._index}
        for layer, expert in experts:
            if len(wanted[layer]) < self._table.capacity:
                wanted[layer].append(expert)
        layers = {index: layer for layer, index in self._index.items()}
        for group in range(self._table.n_groups):
            sharing = [wanted[layers[index]] for index in self._table.layers_of(group)]
            while sum(map(len, sharing)) > self._table.n_slots_of(group):
                max(sharing, key=len).pop()
        return wanted

    def _begin(
        self, layer: int, experts: list[int], keep: Set[int], likely: Set[int]
    ) -> None:
        """Submit reads of all the experts; each one finds a slot."""
        begun = self._in_flight.begin(layer, experts, keep | likely)
        if begun < len(experts):
            # Reads ahead hold claimed slots: wait for them, then evict those experts.
            self._in_flight.finish()
            begun += self._in_flight.begin(layer, experts[begun:], keep)
        assert begun == len(experts)

    def _note_use(self, layer: int, experts: list[int], n_read: int = 0) -> None:
        """Count a use of experts now in memory; ``n_read`` of them were misses."""
        self._table.touch(self._index[layer], experts)
        self._stats[layer].hits += len(experts) - n_read

    def _note_predicted(self, layer: int, found: Collection[int]) -> None:
        """Count the found experts that were read ahead for this request."""
        used = self._read_ahead.pop(layer, set()).intersection(found)
        self._stats[layer].read_ahead_used += len(used)

    def _note_rate(self, missed: bool) -> None:
        share = 1 / (MISS_RATE_TOKENS * len(self._index))
        self.miss_rate += share * (missed - self.miss_rate)

    def _n_experts(self, layer: int) -> int:
        return len(self._table.slots[self._index[layer]])

    def missing(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return the given experts of a layer that have no slot."""
        places = self._table.slots[self._index[layer]]
        return [e for e in experts if places[e] == EMPTY]
