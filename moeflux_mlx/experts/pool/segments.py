"""How slots are divided: between groups of layers, and into segments of memory.

A segment is one buffer, of which a device bounds the length. Layers next to each other
share it, and none reaches into another's: a launch is given one buffer.

Where only whole buffers go back to the system, a pool that becomes smaller replaces one
segment after the other. Meanwhile there are two buffers of one segment, so a pool that
may become smaller has several.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ... import device
from ...errors import BudgetError
from .budget import count_slots, most_bytes, within_working_set
from .policy import part_of, rows_of
from .pool import POOL_ALIGNMENT, allocated_bytes

# Segments of a pool that may have to replace them. More keep worse experts: see
# docs/memory.md for what was measured.
MOST_SEGMENTS = 8
# Slots that each of them has at least, or as many as a layer has experts: enough for a
# prompt to read some experts while it uses others.
LEAST_SEGMENT_SLOTS = 64
# Sizes that such a pool takes, in equal steps: each change copies all that it holds.
N_SIZES = 8


@dataclass(frozen=True)
class Division:
    """The parts of a pool.

    ``counts`` are the experts of each row, which is one MoE layer. Rows of a group
    share slots, of which it has at least ``least``; groups next to each other share a
    segment. With ``blank`` each segment has one slot more. ``shortened``: memory has
    room for more slots, but buffers have not. ``n_wanted`` segments there would be if
    buffers were of any length.
    """

    counts: tuple[int, ...]
    n_slots: int
    n_groups: int
    n_segments: int
    least: int
    blank: bool = False
    shortened: bool = False
    n_wanted: int = 1

    def segment(self, row: int) -> int:
        """Return which segment a row's slots are in."""
        return part_of(row, len(self.counts), self.n_segments)

    @cached_property
    def group_slots(self) -> list[int]:
        """Slots of each group."""
        return shares(by_group(self.counts, self.n_groups), self.n_slots, self.least)

    @cached_property
    def segment_slots(self) -> list[int]:
        """Slots of each segment, but for the blank one."""
        n_rows, found = len(self.counts), [0] * self.n_segments
        for group, n in enumerate(self.group_slots):
            first = rows_of(group, n_rows, self.n_groups).start
            found[self.segment(first)] += n
        return found

    def longest_bytes(self, stride: int) -> int:
        """Return the bytes of the longest buffer, with slots of ``stride``."""
        return allocated_bytes(max(self.segment_slots) + self.blank, stride)

    def slack_bytes(self, stride: int) -> int:
        """Return the bytes that are taken beside those of ``n_slots``."""
        return self.n_segments * (POOL_ALIGNMENT + self.blank * stride)

    def n_bytes(self, stride: int) -> int:
        """Return the bytes of all of it."""
        return self.n_slots * stride + self.slack_bytes(stride)

    def replacing_bytes(self, stride: int) -> int:
        """Return the bytes to be taken besides when it first becomes smaller.

        They are enough for a blank slot, whether or not there is one.
        """
        least = self.n_groups * self.least
        most = largest_replaced(self.group_slots, self.n_slots, least)
        return allocated_bytes(most + 1, stride) if most else 0


def by_group(counts: Sequence[int], n_groups: int) -> list[int]:
    """Return the sums of rows' ``counts`` in each of the groups."""
    groups = (rows_of(g, len(counts), n_groups) for g in range(n_groups))
    return [sum(counts[rows.start : rows.stop]) for rows in groups]


def shares(most: Sequence[int], n_slots: int, least: int) -> list[int]:
    """Divide slots: ``least`` for each group, the rest in proportion.

    With fewer slots no group has more than before.

    Args:
        most: slots that each group can use.
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
    """Return the numbers of slots that a pool takes, in rising order.

    Args:
        most: its first size.
        least: slots that one token needs.
    """
    if device.returns_pages():
        return range(least, most + 1)
    steps = {max(least, most * n // N_SIZES) for n in range(1, N_SIZES + 1)}
    return sorted({least, *steps})


def largest_replaced(most: Sequence[int], n_slots: int, least: int) -> int:
    """Return the slots of the longest buffer that a pool takes to become smaller.

    Where it becomes larger again, up to ``n_slots``, that was its longest one.

    Args:
        most: slots of each group at first, each of which has its own segment.
        least: slots of all groups that one token needs.
    """
    if device.returns_pages():
        return 0
    below = [n for n in sizes(sum(most), least) if n < n_slots]
    return max(shares(most, below[-1], least // len(most))) if below else 0


@dataclass(frozen=True)
class _Room:
    """What ``divide`` is given: see there."""

    bytes: int
    replacing: int | None
    counts: tuple[int, ...]
    stride: int
    top_k: int
    scope: str
    spares: bool

    def groups(self, n_segments: int) -> int:
        """Return how many groups share slots, where there are so many segments."""
        return n_segments if self.scope == "global" else len(self.counts)

    def allows(self, n_segments: int) -> bool:
        """Tell whether one token's experts fit into so many segments."""
        n_least = self.groups(n_segments) * self.top_k
        least_bytes = n_least * self.stride + n_segments * POOL_ALIGNMENT
        return least_bytes <= self.bytes and n_least <= sum(self.counts)

    def division(self, n_segments: int) -> Division:
        """Return the most slots that there can be in so many segments.

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
        whole = Division(self.counts, n_slots, n_groups, n_segments, self.top_k, blank)
        if self.replacing is None:
            return whole
        found = range(n_least, n_slots + 1)
        n_fitting = bisect.bisect_left(
            found,
            True,
            key=lambda n: not self._replaces(replace(whole, n_slots=n)),
        )
        return replace(whole, n_slots=found[max(0, n_fitting - 1)])

    def _replaces(self, division: Division) -> bool:
        """Tell whether there is room to make a division's pool smaller."""
        assert self.replacing is not None
        taken = division.n_bytes(self.stride) + division.replacing_bytes(self.stride)
        return taken <= self.replacing

    def wanted(self, *, gives_way: bool) -> int:
        """Return how many segments there are to be, whatever a buffer's length."""
        if device.returns_pages():
            return 1
        if self.scope != "global":
            # Each group of slots has its own, to be replaced whole.
            return len(self.counts)
        each = min(max(self.counts), LEAST_SEGMENT_SLOTS)
        # As many for who plans the pool as for who makes it, and spares slots.
        whole = replace(self, spares=False)
        for n in range(min(MOST_SEGMENTS, len(self.counts)), 1, -1):
            if gives_way and self.allows(n) and whole.division(n).n_slots >= n * each:
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
    """Divide ``memory`` into slots of ``stride`` bytes, in as few segments as may be.

    Args:
        memory: bytes in all; None: as many as fit into 3/4 of physical memory. No more
            is taken than the device recommends.
        counts: experts of each row; more slots are of no use.
        top_k: slots that one token needs in a group.
        scope: as for ``ExpertStreamer``.
        spares: a slot of each segment stays blank, if one can be spared.
        gives_way: the pool may have to become smaller.
        replacing: bytes in all while it does; None: unbounded.

    Raises:
        BudgetError: one token's experts do not fit into memory, or one row's into a
            buffer.
    """
    limits = device.gpu_limits()
    asked = most_bytes() if memory is None else within_working_set(memory)
    room = _Room(asked, replacing, tuple(counts), stride, top_k, scope, spares)
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
    """Return the memory of slots for all experts, in as many segments as they need."""
    limits, n_slots = device.gpu_limits(), sum(counts)
    first = 1 if device.returns_pages() else min(MOST_SEGMENTS, len(counts))
    for n in range(first, len(counts) + 1):
        division = Division(tuple(counts), n_slots, n, n, 1)
        if limits is None or division.longest_bytes(stride) <= limits.buffer_bytes:
            break
    return division.n_bytes(stride)


def _shortened(division: Division, stride: int, limit_bytes: int) -> Division:
    """Return a division of fewer slots, so few that the longest buffer is allowed."""

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
