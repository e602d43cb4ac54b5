"""Requests of steps: which experts to read, which to keep, which count as used."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set

from ...errors import BudgetError, ExpertStoreError
from ..pool.residency import EMPTY, SlotTable
from ..pool.stats import StreamStats
from .in_flight import InFlight

# How many tokens the miss rate remembers: it follows a change of topic at once.
MISS_RATE_TOKENS = 2


class Demand:
    """Has the experts of one step after the other in memory, and counts them.

    A step is one request of a layer, for a token or for a batch.
    ``miss_rate`` is the share of steps that lately missed an expert which nobody had
    foreseen.

    Args:
        rows: row of the table by layer.
    """

    def __init__(
        self,
        rows: Mapping[int, int],
        table: SlotTable,
        in_flight: InFlight,
        stats: StreamStats,
    ):
        self._rows, self._table = rows, table
        self._in_flight, self._stats = in_flight, stats
        self._foreseen: dict[int, set[int]] = {}
        self.miss_rate = 1.0

    def distinct(self, layer: int, ids: Sequence[int]) -> list[int]:
        """Return each of the experts once, in rising order.

        Raises:
            ExpertStoreError: there is no such expert.
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
        return {self._table.key(self._rows[layer], expert) for expert in experts}

    def provide(
        self,
        layer: int,
        ids: Sequence[int],
        likely: Mapping[int, Sequence[int]] | None = None,
        *,
        surprising: bool = True,
    ) -> None:
        """Have a step's experts in memory, and begin to read later layers'.

        Args:
            likely: by layer, ids that it will ask for if nothing changes its mind;
                some may be of no expert.
            surprising: whether nothing could have foreseen the missing ones.

        Raises:
            ExpertStoreError, BudgetError: as ``StreamedExperts.slots``.
        """
        later = {
            other: [e for e in sorted(set(chosen)) if 0 <= e < self._n_experts(other)]
            for other, chosen in (likely or {}).items()
        }
        keep = {key for other in later for key in self.keys(other, later[other])}
        missing = self.request(layer, ids, keep, surprising=surprising)
        keep |= self.keys(layer, ids)
        for other, experts in later.items():
            self._foresee(other, experts, keep)
        self.receive(layer, ids, missing)

    def await_foreseen(self, layer: int) -> None:
        """Wait for the reads ahead of a layer.

        A failed one is read again when it is really asked for.
        """
        if coming := self._in_flight.coming(layer):
            wanted = {(layer, expert) for expert in coming}
            self._in_flight.settle(self._stats[layer], wanted)

    def request(
        self,
        layer: int,
        ids: Sequence[int],
        likely: Set[int] = frozenset(),
        *,
        surprising: bool = True,
    ) -> list[int]:
        """Begin to read those of a step's experts that are missing; return these.

        Args:
            likely: keys of the table that are evicted for it only if nothing else is.
            surprising: as for ``provide``.
        """
        needed = self.distinct(layer, ids)
        if len(needed) > self._table.capacity:
            raise BudgetError(
                f"[slots] {self._in_flight.name(layer)}: expected at most "
                f"{self._table.capacity} distinct experts in one step but got "
                f"{len(needed)}: the memory budget is too small for it"
            )
        missing = self.missing(layer, needed)
        coming = self._in_flight.coming(layer)
        to_read = [e for e in missing if e not in coming]
        if to_read:
            self._begin(layer, to_read, self.keys(layer, needed), likely)
        self._note_foreseen(layer, set(needed).difference(to_read))
        self._note_rate(surprising and bool(to_read))
        return missing

    def receive(self, layer: int, ids: Sequence[int], missing: list[int]) -> None:
        """Wait for the requested experts, and note the use of all the experts."""
        counters, n_read = self._stats[layer], 0
        wanted = {(layer, expert) for expert in missing}
        if wanted:
            before = counters.misses
            failed = self._in_flight.settle(counters, wanted)
            if failed_wanted := wanted & failed.keys():
                raise failed[min(failed_wanted)]
            n_read = counters.misses - before
        self._note_use(layer, self.distinct(layer, ids), n_read)

    def confirm(self, layer: int, ids: Sequence[int]) -> None:
        """Enter a step whose experts were all in memory."""
        needed = self.distinct(layer, ids)
        self._note_use(layer, needed)
        self._note_foreseen(layer, needed)
        self._note_rate(False)

    def foresee(self, layer: int, ids: Sequence[int]) -> None:
        """Begin to read experts that a layer is expected to ask for next."""
        expected = self.distinct(layer, ids)
        self._foresee(layer, expected, self.keys(layer, expected))

    def _foresee(self, layer: int, experts: list[int], keep: Set[int]) -> None:
        coming = self._in_flight.coming(layer)
        missing = [e for e in self.missing(layer, experts) if e not in coming]
        begun = self._in_flight.begin(layer, missing, keep, ahead=True)
        self._foreseen.setdefault(layer, set()).update(missing[:begun])

    def preload(self, experts: Collection[tuple[int, int]]) -> None:
        """Read ``(layer, expert)`` pairs that nobody asked for: they are no misses.

        Raises:
            ExpertStoreError: one could not be read; the others are kept.
        """
        wanted = self._fitting(experts)
        before = self._stats.snapshot().layers
        keep = {key for layer in wanted for key in self.keys(layer, wanted[layer])}
        for layer, chosen in wanted.items():
            self._in_flight.begin(layer, self.missing(layer, chosen), keep)
        failed = self._in_flight.settle()
        for layer, old in before.items():
            counters = self._stats[layer]
            counters.preloaded += counters.misses - old.misses
            counters.misses = old.misses
        if failed:
            raise failed[min(failed)]

    def _fitting(self, experts: Collection[tuple[int, int]]) -> dict[int, list[int]]:
        """Return experts by layer, no more than there are slots, layers sharing."""
        wanted: dict[int, list[int]] = {layer: [] for layer in self._rows}
        for layer, expert in experts:
            if len(wanted[layer]) < self._table.capacity:
                wanted[layer].append(expert)
        layers = {row: layer for layer, row in self._rows.items()}
        for group in range(self._table.n_groups):
            sharing = [wanted[layers[row]] for row in self._table.rows_of(group)]
            while sum(map(len, sharing)) > self._table.n_slots_of(group):
                max(sharing, key=len).pop()
        return wanted

    def _begin(
        self, layer: int, experts: list[int], keep: Set[int], likely: Set[int]
    ) -> None:
        """Submit reads of experts, all of which find slots."""
        begun = self._in_flight.begin(layer, experts, keep | likely)
        if begun < len(experts):
            # Reads ahead hold slots until they are done.
            self._in_flight.settle()
            begun += self._in_flight.begin(layer, experts[begun:], keep)
        assert begun == len(experts)

    def _note_use(self, layer: int, experts: list[int], n_read: int = 0) -> None:
        """Count a step's experts, all in memory by now, ``n_read`` not before it."""
        self._table.touch(self._rows[layer], experts)
        self._stats[layer].hits += len(experts) - n_read

    def _note_foreseen(self, layer: int, found: Collection[int]) -> None:
        """Count those of a step's experts that were read ahead of it."""
        used = self._foreseen.pop(layer, set()).intersection(found)
        self._stats[layer].read_ahead_used += len(used)

    def _note_rate(self, missed: bool) -> None:
        share = 1 / (MISS_RATE_TOKENS * len(self._rows))
        self.miss_rate += share * (missed - self.miss_rate)

    def _n_experts(self, layer: int) -> int:
        return len(self._table.rows[self._rows[layer]])

    def missing(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return those of a layer's experts that have no slot."""
        places = self._table.rows[self._rows[layer]]
        return [e for e in experts if places[e] == EMPTY]
