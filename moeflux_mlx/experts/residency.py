"""Which expert is in which slot."""

from __future__ import annotations

from collections.abc import Container, Sequence

from .policy import LRU, Policy, PolicyFactory

EMPTY = -1


class SlotTable:
    """Slots shared by all rows of experts, or divided evenly between them.

    A row is one MoE layer, counted from 0. ``rows[row][expert]`` is the slot of an
    expert, or ``EMPTY``. A claimed slot belongs to nobody until it is
    placed or released, so a read in flight can be neither found nor evicted.
    ``changed`` collects the rows that differ from what a copy of them says.
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
        self.changed = set(range(n_rows))
        n_groups = 1 if shared else n_rows
        self.capacity = n_slots // n_groups
        self._shared = shared
        self._policy = policy
        self._policies: list[Policy] = [policy() for _ in range(n_groups)]
        self._free = [
            list(reversed(range(g * self.capacity, (g + 1) * self.capacity)))
            for g in range(n_groups)
        ]

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
        self.changed.add(victim_row)
        self.rows[victim_row][expert] = EMPTY
        return slot

    def place(self, row: int, expert: int, slot: int) -> None:
        """Say that a claimed slot now holds an expert."""
        self.changed.add(row)
        self.rows[row][expert] = slot
        self.touch(row, [expert])

    def release(self, row: int, slot: int) -> None:
        """Give back a claimed slot that holds nothing."""
        self._free[self._group(row)].append(slot)

    def repair(self) -> None:
        """Make everything follow from ``rows`` again after an interrupt anywhere.

        No slot may be in flight. Uses are forgotten, contents are not.
        """
        groups = range(len(self._free))
        self.changed.update(range(len(self.rows)))
        unused = [
            set(range(g * self.capacity, (g + 1) * self.capacity)) for g in groups
        ]
        self._policies = [self._policy() for _ in groups]
        for row, slots in enumerate(self.rows):
            present = [e for e, slot in enumerate(slots) if slot != EMPTY]
            unused[self._group(row)].difference_update(slots)
            self.touch(row, present)
        self._free = [sorted(slots, reverse=True) for slots in unused]

    def _group(self, row: int) -> int:
        return 0 if self._shared else row
