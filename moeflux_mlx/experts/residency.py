"""Which expert is in which slot."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from .policy import LRU, Policy, PolicyFactory

EMPTY = -1


class SlotTable:
    """Slots shared by all rows of experts, or divided evenly between them.

    A row is one MoE layer, counted from 0. ``rows[row][expert]`` is the slot of an
    expert, or ``EMPTY``. A claimed slot belongs to nobody until it is
    placed or released, so a read in flight can be neither found nor evicted.
    """

    def __init__(
        self,
        n_rows: int,
        n_experts: int,
        n_slots: int,
        *,
        shared: bool = True,
        policy: PolicyFactory = LRU,
    ):
        self.n_experts = n_experts
        # Lists, not an array: a token looks up single experts.
        self.rows = [[EMPTY] * n_experts for _ in range(n_rows)]
        n_groups = 1 if shared else n_rows
        self.n_groups, self.slots_per_group = n_groups, n_slots // n_groups
        # Of each group's slots the first ones are in use.
        self.capacity = self.slots_per_group
        self._shared = shared
        self._policy = policy
        self._policies: list[Policy] = [policy() for _ in range(n_groups)]
        self._free = [list(reversed(self._slots(g))) for g in range(n_groups)]

    def key(self, row: int, expert: int) -> int:
        """Return the number that stands for an expert of a row."""
        return row * self.n_experts + expert

    def touch(self, row: int, experts: Sequence[int]) -> None:
        """Note that the experts, all in memory, are used now."""
        base = row * self.n_experts
        self._policies[self._group(row)].touch([base + expert for expert in experts])

    def claim(self, row: int, keep: Container[int]) -> int | None:
        """Return a slot to write into, evicting a key not in ``keep`` if need be."""
        group = self._group(row)
        if self._free[group]:
            return self._free[group].pop()
        if (victim := self._policies[group].victim(keep)) is None:
            return None
        victim_row, expert = divmod(victim, self.n_experts)
        slot = self.rows[victim_row][expert]
        self.rows[victim_row][expert] = EMPTY
        return slot

    def place(self, row: int, expert: int, slot: int) -> None:
        """Say that a claimed slot now holds an expert."""
        self.rows[row][expert] = slot
        self.touch(row, [expert])

    def release(self, row: int, slot: int) -> None:
        """Give back a claimed slot that holds nothing."""
        self._free[self._group(row)].append(slot)

    def resize(self, capacity: int, move: Callable[[int, int], None]) -> None:
        """Use only the first ``capacity`` slots of each group; none may be in flight.

        What no longer fits is forgotten, in the policy's order of eviction. ``move``
        copies from one slot to another.
        """
        self.capacity = capacity
        for group in range(self.n_groups):
            self._pack(group, move)

    def _pack(self, group: int, move: Callable[[int, int], None]) -> None:
        held = {
            slot: (row, expert)
            for row, slots in enumerate(self.rows)
            if self._group(row) == group
            for expert, slot in enumerate(slots)
            if slot != EMPTY
        }
        for _ in range(len(held) - self.capacity):
            victim = self._policies[group].victim(())
            assert victim is not None
            row, expert = divmod(victim, self.n_experts)
            del held[self.rows[row][expert]]
            self.rows[row][expert] = EMPTY
        inside = self._slots(group)
        free = sorted(set(inside) - held.keys(), reverse=True)
        for slot in sorted(held.keys() - set(inside)):
            row, expert = held[slot]
            # Copied first: an interrupt here leaves the expert where it was.
            move(slot, free[-1])
            self.rows[row][expert] = free.pop()
        self._free[group] = free

    def fill(self) -> None:
        """Say that every expert of every row has its slot, one after the other."""
        for row in range(len(self.rows)):
            base = row * self.n_experts
            self.rows[row] = list(range(base, base + self.n_experts))
        self.repair()

    def repair(self) -> None:
        """Make everything follow from ``rows`` again after an interrupt anywhere.

        No slot may be in flight. Uses are forgotten, contents are not.
        """
        groups = range(self.n_groups)
        unused = [set(self._slots(g)) for g in groups]
        self._policies = [self._policy() for _ in groups]
        for row, slots in enumerate(self.rows):
            present = [e for e, slot in enumerate(slots) if slot != EMPTY]
            unused[self._group(row)].difference_update(slots)
            self.touch(row, present)
        self._free = [sorted(slots, reverse=True) for slots in unused]

    def _slots(self, group: int) -> range:
        first = group * self.slots_per_group
        return range(first, first + self.capacity)

    def _group(self, row: int) -> int:
        return 0 if self._shared else row
