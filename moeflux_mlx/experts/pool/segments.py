"""How slots are divided: between groups of layers, and into segments of memory.

A segment is one buffer, of which a device bounds the length. Layers next to each other
share it, and none reaches into another's: a launch is given one buffer.
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


@dataclass(frozen=True)
class Division:
    """The parts of a pool.

    ``counts`` are the experts of each row, which is one MoE layer. Rows of a group
    share slots, of which it has at least ``least``; groups next to each other share a
    segment. With ``blank`` each segment has one slot more. ``shortened``: memory has
    room for more slots, but buffers have not.
    """

    counts: tuple[int, ...]
    n_slots: int
    n_groups: int
    n_segments: int
    least: int
    blank: bool = False
    shortened: bool = False

    def segment(self, row: int) -> int:
        """Return which segment a row's slots are in."""
        return part_of(row, len(self.counts), self.n_segments)

    @cached_property
    def segment_slots(self) -> list[int]:
        """Slots of each segment, but for the blank one."""
        n_rows, found = len(self.counts), [0] * self.n_segments
        records = by_group(self.counts, self.n_groups)
        for group, n in enumerate(shares(records, self.n_slots, self.least)):
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


def divide(
    memory: int | None,
    *,
    counts: Sequence[int],
    stride: int,
    top_k: int,
    scope: str = "global",
    spares: bool = False,
) -> Division:
    """Divide ``memory`` into slots of ``stride`` bytes, in as few segments as may be.

    Args:
        memory: bytes in all; None: as many as fit into 3/4 of physical memory. No more
            is taken than the device recommends.
        counts: experts of each row; more slots are of no use.
        top_k: slots that one token needs in a group.
        scope: as for ``ExpertStreamer``.
        spares: a slot of each segment stays blank, if one can be spared.

    Raises:
        BudgetError: one token's experts do not fit into memory, or one row's into a
            buffer.
    """
    limits = device.gpu_limits()
    asked = most_bytes() if memory is None else within_working_set(memory)
    found = None
    for n_segments in range(1, len(counts) + 1):
        n_groups = n_segments if scope == "global" else len(counts)
        least = n_groups * top_k * stride + n_segments * POOL_ALIGNMENT
        if found is not None and (asked < least or sum(counts) < n_groups * top_k):
            break
        n_slots = count_slots(
            asked,
            stride=stride,
            slack_bytes=n_segments * POOL_ALIGNMENT,
            n_records=sum(counts),
            n_minimum=n_groups * top_k,
        )
        rest = n_slots - n_segments
        blank = spares and n_slots < sum(counts) and rest >= n_groups * top_k
        n_slots = rest if blank else n_slots
        found = Division(tuple(counts), n_slots, n_groups, n_segments, top_k, blank)
        if limits is None or found.longest_bytes(stride) <= limits.buffer_bytes:
            return found
    assert found is not None and limits is not None
    return _shortened(found, stride, limits.buffer_bytes)


def full_bytes(counts: Sequence[int], stride: int) -> int:
    """Return the memory of slots for all experts, in as many segments as they need."""
    limits, n_slots = device.gpu_limits(), sum(counts)
    for n in range(1, len(counts) + 1):
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
