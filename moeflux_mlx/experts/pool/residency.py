"""The slot table: which expert is in which slot."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from .policy import Policy, PolicyFactory, PoolShape, group_of, layers_of
from .segments import by_group, shares

EMPTY = -1


class SlotTable:
    """The slots that all MoE layers share, or that the layers of each group share.

    ``layer`` counts the MoE layers from 0. ``slots[layer][expert]`` is an expert's slot
    or ``EMPTY``; slots count from the first one of the layer's segment. A claimed slot
    belongs to no expert until ``place`` or ``release``, so an expert in flight can be
    neither used nor evicted. ``changed`` collects the layers that a copy must update.

    A layer does not lose a slot to another layer if it would have fewer than ``floor``
    left. The floors fit the first number of slots. After a ``resize`` they may leave no
    victim; then they are ignored.
    """

    def __init__(
        self,
        n_layers: int,
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
        """Make a table of empty slots.

        Args:
            top_k: number of experts of a layer that one token uses.
            policy: makes the eviction policy.
            n_groups: number of groups of consecutive layers that share slots.
            n_segments: number of buffers; each has the slots of whole groups.
            least: the least number of slots of a group.
            floor: as above; default: ``top_k``, or half an even share if that is less.
            counts: number of experts of each layer; default: ``n_experts``.
        """
        self.n_experts = n_experts
        # Lists are faster than an array to look up single experts.
        self.slots = [[EMPTY] * n for n in counts or [n_experts] * n_layers]
        self.changed = set(range(n_layers))
        self._shape = PoolShape(n_layers, n_experts, n_slots, n_groups)
        self._n_segments, self._least = n_segments, least
        records = by_group([len(layer) for layer in self.slots], n_groups)
        self._most = shares(records, n_slots, least)
        # Each group's first slot, counted from the first one of its segment.
        self._firsts = [
            sum(self._most[other] for other in range(g) if self._together(other, g))
            for g in range(n_groups)
        ]
        # Each group uses this many of its slots, from its first one on.
        self._in_use = list(self._most)
        self.floor = min(top_k, n_slots // (2 * n_layers)) if floor is None else floor
        self._make_policy = policy
        self._policy: Policy = policy(self._shape)
        self._n_held = [0] * n_layers
        self._above_floor: set[int] = set()
        self._free = [list(reversed(self._slots_of(g))) for g in range(self.n_groups)]

    @property
    def n_groups(self) -> int:
        """Number of groups of layers that share slots."""
        return self._shape.n_groups

    @property
    def capacity(self) -> int:
        """Number of slots in use of the smallest group."""
        return min(self._in_use)

    @property
    def n_slots(self) -> int:
        """Number of slots in use, over all groups."""
        return sum(self._in_use)

    def layers_of(self, group: int) -> range:
        """Return the layers that share a group's slots."""
        return self._shape.layers(group)

    def n_slots_of(self, group: int) -> int:
        """Return how many slots of a group are in use."""
        return self._in_use[group]

    def segment(self, layer: int) -> int:
        """Return the segment of a layer's slots."""
        return group_of(layer, len(self.slots), self._n_segments)

    def _together(self, *groups: int) -> bool:
        """Return whether groups share a segment."""
        return len({self.segment(self.layers_of(g).start) for g in groups}) == 1

    def unused(self, segment: int) -> list[range]:
        """Return the slots of a segment that are not in use."""
        return [
            range(self._slots_of(g).stop, self._firsts[g] + self._most[g])
            for g in range(self.n_groups)
            if self.segment(self.layers_of(g).start) == segment
        ]

    def key(self, layer: int, expert: int) -> int:
        """Return the policy's key of an expert."""
        return layer * self.n_experts + expert

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """Tell the policy that a step uses these experts."""
        base = layer * self.n_experts
        self._policy.use(layer, [base + expert for expert in experts])

    def claim(self, layer: int, keep: Container[int]) -> int | None:
        """Claim a free slot, or evict a key outside ``keep``; None without a victim."""
        if free := self._free[self._shape.group(layer)]:
            return free.pop()
        victim = self._victim(layer, keep)
        return None if victim is None else self._evict(victim)

    def place(self, layer: int, expert: int, slot: int) -> None:
        """Enter an expert in the slot claimed for it."""
        self.changed.add(layer)
        self.slots[layer][expert] = slot
        self._hold(layer, self._n_held[layer] + 1)
        self._policy.admit(layer, self.key(layer, expert))

    def release(self, layer: int, slot: int) -> None:
        """Free a claimed slot."""
        self._free[self._shape.group(layer)].append(slot)

    def resize(self, n_slots: int, move: Callable[[int, int, int], None]) -> None:
        """Use ``n_slots`` slots, the first ones of each group; none may be in flight.

        Experts that no longer fit are evicted in the policy's order.

        Args:
            move: ``move(segment, source, target)`` copies a slot within a segment.
        """
        for group, n in enumerate(self.shares(n_slots)):
            self.resize_group(group, n, move)

    def shares(self, n_slots: int) -> list[int]:
        """Return how many slots each group uses out of ``n_slots``."""
        return shares(self._most, n_slots, self._least)

    def resize_group(
        self, group: int, n_slots: int, move: Callable[[int, int, int], None]
    ) -> None:
        """Do as ``resize`` for the slots of one group."""
        self._in_use[group] = n_slots
        layers = self.layers_of(group)
        self.changed.update(layers)
        held = {
            slot: (layer, expert)
            for layer in layers
            for expert, slot in enumerate(self.slots[layer])
            if slot != EMPTY
        }
        for _ in range(len(held) - self._in_use[group]):
            victim = self._policy.victim(layers[0], layers, ())
            assert victim is not None
            del held[self._evict(victim)]
        inside = self._slots_of(group)
        free = sorted(set(inside) - held.keys(), reverse=True)
        for slot in sorted(held.keys() - set(inside)):
            layer, expert = held[slot]
            # Copy before changing the table: an interrupt leaves the old slot valid.
            move(self.segment(layer), slot, free[-1])
            self.slots[layer][expert] = free.pop()
        self._free[group] = free

    def fill(self) -> None:
        """Enter every expert in its slot of ``all_slots``."""
        for layer in range(len(self.slots)):
            self.slots[layer] = list(self.all_slots(layer))
        self.repair()

    def all_slots(self, layer: int) -> range:
        """Return the slots of a layer's experts if every expert has a slot."""
        segment = layers_of(self.segment(layer), len(self.slots), self._n_segments)
        first = sum(map(len, self.slots[segment.start : layer]))
        return range(first, first + len(self.slots[layer]))

    def repair(self) -> None:
        """Rebuild all other state from ``slots`` after an interrupt at any point.

        No slot may be in flight. The policy forgets past uses; the slots keep their
        experts.
        """
        self.changed.update(range(len(self.slots)))
        unused = [set(self._slots_of(g)) for g in range(self.n_groups)]
        self._policy = self._make_policy(self._shape)
        for layer, slots in enumerate(self.slots):
            present = [e for e, slot in enumerate(slots) if slot != EMPTY]
            unused[self._shape.group(layer)].difference_update(slots)
            self._hold(layer, len(present))
            for expert in present:
                self._policy.admit(layer, self.key(layer, expert))
        self._free = [sorted(slots, reverse=True) for slots in unused]

    def _victim(self, layer: int, keep: Container[int]) -> int | None:
        layers = self._above_floor
        if layer not in layers:
            # A layer may always evict its own experts.
            layers = {*layers, layer}
        found = self._policy.victim(layer, layers, keep)
        if found is not None:
            return found
        # Ignore the floors rather than fail.
        return self._policy.victim(layer, range(len(self.slots)), keep)

    def _evict(self, key: int) -> int:
        """Remove an expert; return its slot."""
        layer, expert = divmod(key, self.n_experts)
        slot = self.slots[layer][expert]
        self.changed.add(layer)
        self.slots[layer][expert] = EMPTY
        self._hold(layer, self._n_held[layer] - 1)
        self._policy.forget(layer, key)
        return slot

    def _slots_of(self, group: int) -> range:
        """Return a group's slots in use."""
        first = self._firsts[group]
        return range(first, first + self._in_use[group])

    def _hold(self, layer: int, n_held: int) -> None:
        self._n_held[layer] = n_held
        if n_held > self.floor:
            self._above_floor.add(layer)
        else:
            self._above_floor.discard(layer)
