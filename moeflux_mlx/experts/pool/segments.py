"""Divide slots among layer groups, and memory into segments.

A segment is one buffer, and a device bounds a buffer's length. Consecutive layers share
a segment. All slots of a layer are in the same segment, because a launch takes one
buffer of experts.

Where the system takes back whole buffers only, a shrinking pool replaces its segments
one after the other. A second buffer of one segment then exists for a moment. So a pool
that may have to shrink has several short segments.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ... import device
from ...errors import BudgetError
from .budget import count_slots, most_bytes, within_working_set
from .policy import group_of, layers_of
from .pool import POOL_ALIGNMENT, allocated_bytes

# Segments of a pool that may have to replace them. More segments hit less often: see
# the measurements in docs/memory.md.
MOST_SEGMENTS = 8
# Each of these segments has at least this many slots, or a layer's number of experts if
# that is less. A prompt can then read some experts while it uses others.
LEAST_SEGMENT_SLOTS = 64
# Such a pool has one of N_SIZES sizes in equal steps. More sizes mean more changes, and
# each change copies the pool.
N_SIZES = 8


@dataclass(frozen=True)
class Division:
    """A pool's layer groups and segments.

    ``counts`` has the number of experts of each MoE layer. The layers of a group share
    at least ``least`` slots. Consecutive groups share a segment. With ``blank`` each
    segment has one more slot. ``shortened``: the buffers' length bounds the number of
    slots, not the memory. ``n_wanted`` is the number of segments that the pool would
    have if buffers could have any length.
    """

    counts: tuple[int, ...]
    n_slots: int
    n_groups: int
    n_segments: int
    least: int
    blank: bool = False
    shortened: bool = False
    n_wanted: int = 1

    def segment(self, layer: int) -> int:
        """Return the segment of a layer's slots."""
        return group_of(layer, len(self.counts), self.n_segments)

    @cached_property
    def group_slots(self) -> list[int]:
        """Number of slots of each group."""
        return shares(by_group(self.counts, self.n_groups), self.n_slots, self.least)

    @cached_property
    def segment_slots(self) -> list[int]:
        """Number of slots of each segment, without the blank one."""
        n_layers, found = len(self.counts), [0] * self.n_segments
        for group, n in enumerate(self.group_slots):
            first = layers_of(group, n_layers, self.n_groups).start
            found[self.segment(first)] += n
        return found

    def longest_bytes(self, stride: int) -> int:
        """Return the bytes of the longest buffer with slots of ``stride`` bytes."""
        return allocated_bytes(max(self.segment_slots) + self.blank, stride)

    def slack_bytes(self, stride: int) -> int:
        """Return the bytes allocated in addition to ``n_slots`` slots."""
        return self.n_segments * (POOL_ALIGNMENT + self.blank * stride)

    def n_bytes(self, stride: int) -> int:
        """Return the bytes of the pool."""
        return self.n_slots * stride + self.slack_bytes(stride)

    def replacing_bytes(self, stride: int) -> int:
        """Return the bytes of the second buffer when the pool first shrinks.

        They include a blank slot, whether or not the pool has one.
        """
        least = self.n_groups * self.least
        most = largest_replaced(self.group_slots, self.n_slots, least)
        return allocated_bytes(most + 1, stride) if most else 0


def by_group(counts: Sequence[int], n_groups: int) -> list[int]:
    """Return the sum of the layers' ``counts`` in each group."""
    groups = (layers_of(g, len(counts), n_groups) for g in range(n_groups))
    return [sum(counts[layers.start : layers.stop]) for layers in groups]


def shares(most: Sequence[int], n_slots: int, least: int) -> list[int]:
    """Divide slots: ``least`` for each group, the rest in proportion.

    The division is monotonic: with fewer slots in all, no group gets more.

    Args:
        most: number of slots that each group can use.
    """
    found = [min(least, n) for n in most]
    wanted = [n - share for n, share in zip(most, found, strict=True)]
    rest, total = n_slots - sum(found), sum(wanted)
    if total:
        found = [
            share + rest * n // total for share, n in zip(found, wanted, strict=True)
        ]
    groups = range(len(most))
    while (left := n_slots - sum(found)) > 0:
        with_room = [g for g in groups if found[g] < most[g]] or groups
        for group in with_room[:left]:
            found[group] += 1
    return found


def sizes(most: int, least: int) -> Sequence[int]:
    """Return the sizes of a pool in slots, ascending.

    Args:
        most: the first size.
        least: number of slots that one token needs.
    """
    if device.returns_pages():
        return range(least, most + 1)
    steps = {max(least, most * n // N_SIZES) for n in range(1, N_SIZES + 1)}
    return sorted({least, *steps})


def largest_replaced(most: Sequence[int], n_slots: int, least: int) -> int:
    """Return the slots of the longest buffer that a pool allocates when it shrinks.

    A pool that grows to ``n_slots`` again has allocated no longer second buffer.

    Args:
        most: first number of slots of each group; each group has its own segment.
        n_slots: number of slots before the pool shrinks.
        least: number of slots that one token needs, over all groups.
    """
    if device.returns_pages():
        return 0
    below = [n for n in sizes(sum(most), least) if n < n_slots]
    return max(shares(most, below[-1], least // len(most))) if below else 0


@dataclass(frozen=True)
class _Room:
    """The arguments of ``divide``."""

    bytes: int
    replacing: int | None
    counts: tuple[int, ...]
    stride: int
    top_k: int
    scope: str
    spares: bool

    def groups(self, n_segments: int) -> int:
        """Return the number of layer groups for a number of segments."""
        return n_segments if self.scope == "global" else len(self.counts)

    def allows(self, n_segments: int) -> bool:
        """Return whether one token's experts fit into ``n_segments`` segments."""
        n_least = self.groups(n_segments) * self.top_k
        least_bytes = n_least * self.stride + n_segments * POOL_ALIGNMENT
        return least_bytes <= self.bytes and n_least <= sum(self.counts)

    def division(self, n_segments: int) -> Division:
        """Return the division into ``n_segments`` segments with the most slots.

        Raises:
            BudgetError: one token's experts do not fit.
        """
        n_groups = self.groups(n_segments)
        n_least, n_records = n_groups * self.top_k, sum(self.counts)
        n_slots = count_slots(
            self.bytes,
            stride=self.stride,
            slack_bytes=n_segments * POOL_ALIGNMENT,
            n_records=n_records,
            n_minimum=n_least,
        )
        rest = n_slots - n_segments
        blank = self.spares and n_slots < n_records and rest >= n_least
        n_slots = rest if blank else n_slots
        most = Division(self.counts, n_slots, n_groups, n_segments, self.top_k, blank)
        if self.replacing is None:
            return most
        found = range(n_least, n_slots + 1)
        n_fitting = bisect.bisect_left(
            found,
            True,
            key=lambda n: not self.can_shrink(replace(most, n_slots=n)),
        )
        return replace(most, n_slots=found[max(0, n_fitting - 1)])

    def can_shrink(self, division: Division) -> bool:
        """Return whether ``replacing`` has room for a division and a second buffer."""
        assert self.replacing is not None
        taken = division.n_bytes(self.stride) + division.replacing_bytes(self.stride)
        return taken <= self.replacing

    def wanted(self, *, gives_way: bool) -> int:
        """Return the number of segments, without regard to a buffer's length."""
        if device.returns_pages():
            return 1
        if self.scope != "global":
            # Each layer has its own segment, so that it can be replaced alone.
            return len(self.counts)
        each = min(max(self.counts), LEAST_SEGMENT_SLOTS)
        # Ignore blank slots: the planner, which knows of none, must get the same number
        # as the streamer.
        plain = replace(self, spares=False)
        for n in range(min(MOST_SEGMENTS, len(self.counts)), 1, -1):
            if gives_way and self.allows(n) and plain.division(n).n_slots >= n * each:
                return n
        return 1


def divide(
    memory: int | None,
    *,
    counts: Sequence[int],
    stride: int,
    top_k: int,
    scope: str = "global",
    spares: bool = False,
    gives_way: bool = True,
    replacing: int | None = None,
) -> Division:
    """Divide ``memory`` into slots of ``stride`` bytes, in as few segments as possible.

    Args:
        memory: bytes of the pool, capped at the working set that the device recommends;
            None: 3/4 of physical memory.
        counts: number of experts of each layer, which is the most slots of use.
        stride: bytes of a slot.
        top_k: number of slots of a group that one token needs.
        scope: as for ``ExpertStreamer``.
        spares: keep a blank slot in each segment if there is room.
        gives_way: the pool may have to shrink.
        replacing: bytes of the pool and a second buffer while it shrinks; None:
            unbounded.

    Raises:
        BudgetError: one token's experts do not fit into memory, or those of one layer
            do not fit into a buffer.
    """
    n_bytes = most_bytes() if memory is None else within_working_set(memory)
    room = _Room(n_bytes, replacing, tuple(counts), stride, top_k, scope, spares)
    found = _divided(room, gives_way)
    if replacing is None:
        return found
    # The streamer divides the plan's bytes without regard to a second buffer. It may
    # want more segments than the plan, or a blank slot in each.
    n_bytes = found.n_bytes(stride)
    while True:
        alone = replace(room, bytes=n_bytes, replacing=None)
        made = _divided(alone, gives_way)
        spared = _divided(replace(alone, spares=True), gives_way)
        if room.can_shrink(made) and room.can_shrink(spared):
            return made
        less = room.division(made.n_segments).n_bytes(stride)
        n_bytes = min(less, n_bytes - stride)
        if not replace(room, bytes=n_bytes).allows(1):
            return found


def _divided(room: _Room, gives_way: bool) -> Division:
    limits, counts, stride = device.gpu_limits(), room.counts, room.stride
    n_wanted = room.wanted(gives_way=gives_way)
    found = None
    for n_segments in range(n_wanted, len(counts) + 1):
        if found is not None and not room.allows(n_segments):
            break
        found = replace(room.division(n_segments), n_wanted=n_wanted)
        if limits is None or found.longest_bytes(stride) <= limits.buffer_bytes:
            return found
    assert found is not None and limits is not None
    return _shortened(found, stride, limits.buffer_bytes)


def full_bytes(counts: Sequence[int], stride: int) -> int:
    """Return the bytes of a pool that holds all experts, in the segments it needs."""
    limits, n_slots = device.gpu_limits(), sum(counts)
    first = 1 if device.returns_pages() else min(MOST_SEGMENTS, len(counts))
    for n in range(first, len(counts) + 1):
        division = Division(tuple(counts), n_slots, n, n, 1)
        if limits is None or division.longest_bytes(stride) <= limits.buffer_bytes:
            break
    return division.n_bytes(stride)


def _shortened(division: Division, stride: int, limit_bytes: int) -> Division:
    """Return the division with the most slots whose longest buffer is allowed."""

    def of(n_slots: int) -> Division:
        return replace(division, n_slots=n_slots, shortened=True)

    least = division.n_groups * division.least
    sizes = range(least, division.n_slots + 1)
    n_fitting = bisect.bisect_right(
        sizes, limit_bytes, key=lambda n: of(n).longest_bytes(stride)
    )
    if not n_fitting:
        raise BudgetError(
            f"[pool] expected a buffer of at least {of(least).longest_bytes(stride)} "
            f"bytes for {division.least} experts of {stride} bytes but this device "
            f"allows {limit_bytes}: use a model with smaller experts"
        )
    return of(sizes[n_fitting - 1])
