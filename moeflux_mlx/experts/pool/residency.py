"""Which expert is in which slot."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from .policy import Policy, PolicyFactory, PoolShape, part_of, rows_of
from .segments import by_group, shares

EMPTY = -1


class SlotTable:
    """Slots shared by all rows of experts, or by groups of them.

    A row is one MoE layer, counted from 0. ``rows[row][expert]`` is the slot of an
    expert, counted from the first of the row's segment, or ``EMPTY``. A claimed slot
    belongs to nobody until it is placed or released, so a read in flight can be neither
    found nor evicted.
    ``changed`` collects the rows that differ from a copy of them.

    Where rows share, no row loses a slot to another one that leaves it fewer than
    ``floor``.

    Floors and pins were set for the first number of slots: where they leave no victim
    they are passed over.
    """

    def __init__(
        self,
        n_rows: int,
        n_experts: int,
        n_slots: int,
        *,
        top_k: int,
        policy: PolicyFactory,
        n_groups: int = 1,
        n_segments: int = 1,
        least: int = 1,
        floor: int | None = None,
        counts: Sequence[int] | None = None,
    ):
        """Begin with empty slots.

        Args:
            top_k: experts of a row that one token uses.
            n_groups: groups of rows that share slots; each has its own.
            n_segments: parts of memory, of whole groups; in each, slots count from 0.
            least: slots that no group has fewer of.
            floor: by default ``top_k``, or half an even share if that is less.
            counts: experts of each row, where some have fewer than ``n_experts``.
        """
        self.n_experts = n_experts
        # Lists, not an array: a token looks up single experts.
        self.rows = [[EMPTY] * n for n in counts or [n_experts] * n_rows]
        self.changed = set(range(n_rows))
        self._shape = PoolShape(n_rows, n_experts, n_slots, n_groups)
        self._n_segments, self._least = n_segments, least
        records = by_group([len(row) for row in self.rows], n_groups)
        self._most = shares(records, n_slots, least)
        # The first of each group, in its segment.
        self._firsts = [
            sum(self._most[other] for other in range(g) if self._together(other, g))
            for g in range(n_groups)
        ]
        # How many of each group's slots, the first ones, are in use.
        self._in_use = list(self._most)
        self.capacity = min(self._in_use)
        self.floor = min(top_k, n_slots // (2 * n_rows)) if floor is None else floor
        self._make_policy = policy
        self._policy: Policy = policy(self._shape)
        self._n_held = [0] * n_rows
        self._above_floor: set[int] = set()
        self._free = [list(reversed(self._slots(g))) for g in range(self.n_groups)]

    @property
    def n_groups(self) -> int:
        """Groups of rows that share slots."""
        return self._shape.n_groups

    @property
    def n_slots(self) -> int:
        """Slots in use, all groups together."""
        return sum(self._in_use)

    def rows_of(self, group: int) -> range:
        """Return the rows that share a group's slots."""
        return self._shape.rows(group)

    def n_slots_of(self, group: int) -> int:
        """Return how many slots of a group are in use."""
        return self._in_use[group]

    def segment(self, row: int) -> int:
        """Return which segment a row's slots are in."""
        return part_of(row, len(self.rows), self._n_segments)

    def _together(self, *groups: int) -> bool:
        return len({self.segment(self.rows_of(g).start) for g in groups}) == 1

    def unused(self, segment: int) -> list[range]:
        """Return the slots of a segment that are not in use."""
        return [
            range(self._slots(g).stop, self._firsts[g] + self._most[g])
            for g in range(self.n_groups)
            if self.segment(self.rows_of(g).start) == segment
        ]

    def key(self, row: int, expert: int) -> int:
        """Return the number that stands for an expert of a row."""
        return row * self.n_experts + expert

    def touch(self, row: int, experts: Sequence[int]) -> None:
        """Note that the experts are used now."""
        base = row * self.n_experts
        self._policy.use(row, [base + expert for expert in experts])

    def claim(self, row: int, keep: Container[int]) -> int | None:
        """Return a slot to write into, evicting a key not in ``keep`` if need be."""
        if free := self._free[self._shape.group(row)]:
            return free.pop()
        victim = self._victim(row, keep)
        return None if victim is None else self._evict(victim)

    def place(self, row: int, expert: int, slot: int) -> None:
        """Say that a claimed slot now holds an expert."""
        self.changed.add(row)
        self.rows[row][expert] = slot
        self._hold(row, self._n_held[row] + 1)
        self._policy.admit(row, self.key(row, expert))

    def release(self, row: int, slot: int) -> None:
        """Give back a claimed slot that holds nothing."""
        self._free[self._shape.group(row)].append(slot)

    def resize(self, n_slots: int, move: Callable[[int, int, int], None]) -> None:
        """Use only so many slots, the first of each group; none may be in flight.

        What no longer fits is forgotten, in the policy's order of eviction. ``move``
        copies, within a segment, from one slot to another.
        """
        self._in_use = shares(self._most, n_slots, self._least)
        self.capacity = min(self._in_use)
        for group in range(self.n_groups):
            self._pack(group, move)

    def _pack(self, group: int, move: Callable[[int, int, int], None]) -> None:
        rows = self.rows_of(group)
        held = {
            slot: (row, expert)
            for row in rows
            for expert, slot in enumerate(self.rows[row])
            if slot != EMPTY
        }
        for _ in range(len(held) - self._in_use[group]):
            victim = self._policy.victim(rows[0], rows, ())
            assert victim is not None
            del held[self._evict(victim)]
        inside = self._slots(group)
        free = sorted(set(inside) - held.keys(), reverse=True)
        for slot in sorted(held.keys() - set(inside)):
            row, expert = held[slot]
            # Copied first: an interrupt here leaves the expert where it was.
            move(self.segment(row), slot, free[-1])
            self.changed.add(row)
            self.rows[row][expert] = free.pop()
        self._free[group] = free

    def fill(self) -> None:
        """Say that every expert of every row has its slot, one after the other."""
        for row in range(len(self.rows)):
            self.rows[row] = list(self.all_slots(row))
        self.repair()

    def all_slots(self, row: int) -> range:
        """Return the slots of a row's experts where every expert has one."""
        segment = rows_of(self.segment(row), len(self.rows), self._n_segments)
        first = sum(map(len, self.rows[segment.start : row]))
        return range(first, first + len(self.rows[row]))

    def repair(self) -> None:
        """Make everything follow from ``rows`` again after an interrupt anywhere.

        No slot may be in flight. Uses are forgotten, contents are not.
        """
        self.changed.update(range(len(self.rows)))
        unused = [set(self._slots(g)) for g in range(self.n_groups)]
        self._policy = self._make_policy(self._shape)
        for row, slots in enumerate(self.rows):
            present = [e for e, slot in enumerate(slots) if slot != EMPTY]
            unused[self._shape.group(row)].difference_update(slots)
            self._hold(row, len(present))
            for expert in present:
                self._policy.admit(row, self.key(row, expert))
        self._free = [sorted(slots, reverse=True) for slots in unused]

    def _victim(self, row: int, keep: Container[int]) -> int | None:
        rows = self._above_floor
        found = self._policy.victim(row, rows if row in rows else {*rows, row}, keep)
        if found is not None:
            return found
        # A floor is no reason to fail.
        return self._policy.victim(row, range(len(self.rows)), keep)

    def _evict(self, key: int) -> int:
        """Forget an expert; return its slot."""
        row, expert = divmod(key, self.n_experts)
        slot = self.rows[row][expert]
        self.changed.add(row)
        self.rows[row][expert] = EMPTY
        self._hold(row, self._n_held[row] - 1)
        self._policy.forget(row, key)
        return slot

    def _slots(self, group: int) -> range:
        first = self._firsts[group]
        return range(first, first + self._in_use[group])

    def _hold(self, row: int, n_held: int) -> None:
        self._n_held[row] = n_held
        if n_held > self.floor:
            self._above_floor.add(row)
        else:
            self._above_floor.discard(row)
