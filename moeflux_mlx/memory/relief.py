"""Shrink the expert pool while the system is short of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .. import device
from ..experts.streaming.streamer import ExpertStreamer
from ..system.pressure import Pressure
from ..system.progress import notice
from . import caches

# Seconds between two checks of the memory pressure.
LOOK_SECONDS = 1.0
# Seconds between two reductions: the system needs time to notice the freed memory.
STEP_SECONDS = 5.0
# Seconds without pressure before the pool grows, and between two such steps.
CALM_SECONDS = 30.0
# A reduction keeps this share of the present slots. A growth step gives back this share
# of all slots.
KEPT = {Pressure.WARNING: 3 / 4, Pressure.CRITICAL: 1 / 2}
REGAINED = 1 / 8


class Relief:
    """The pool size under memory pressure: it falls step by step, and recovers slowly.

    The pressure is checked between calls only.
    """

    def __init__(
        self,
        streamer: ExpertStreamer,
        pressure: Callable[[], Pressure] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._streamer, self._clock = streamer, clock
        self._pressure = pressure or device.memory_pressure
        self._share = 1.0
        now = clock()
        self._next_look = now
        # The earliest times of the next reduction and of the next growth.
        self._next_less, self._next_more = now, now

    def n_slots(self, wanted: int) -> int:
        """Return how many of ``wanted`` slots the pool may have now."""
        n_slots = max(self._streamer.least_slots, int(wanted * self._share))
        return min(wanted, self._streamer.rounded(n_slots))

    def look(self, wanted: int) -> bool:
        """Check the pressure if it is time; return whether ``n_slots`` has changed."""
        now = self._clock()
        if now < self._next_look or self._streamer.stays:
            return False
        self._next_look = now + LOOK_SECONDS
        pressure, before = self._pressure(), self.n_slots(wanted)
        if pressure is not Pressure.NORMAL:
            self._next_more = now + CALM_SECONDS
            if now >= self._next_less and before > self._streamer.least_slots:
                self._next_less = now + STEP_SECONDS
                self._give_way(pressure, before, wanted)
        elif self._share < 1 and now >= self._next_more:
            self._next_more = now + CALM_SECONDS
            self._share = min(1.0, self._share + REGAINED)
            if self._share == 1:
                notice("the system has free memory again: experts get theirs back")
        return self.n_slots(wanted) != before

    def _give_way(self, pressure: Pressure, before: int, wanted: int) -> None:
        self._share *= KEPT[pressure]
        n_slots = self.n_slots(wanted)
        # The pool never has fewer slots than a token needs, so it grows from there.
        self._share = max(self._share, n_slots / wanted)
        notice(
            f"warning: the system is short of memory ({pressure.name.lower()}), "
            f"so experts give way: {n_slots} of {before} stay in memory"
        )


class FreePool:
    """A pool without a memory plan, which gives way only to memory pressure."""

    def __init__(self, streamer: ExpertStreamer):
        self._streamer, self._most_slots = streamer, streamer.n_slots
        self._relief = Relief(streamer)

    def give_way(self, cache: list[Any]) -> None:
        """Resize the pool before a call with ``cache`` if the pressure has changed."""
        if self._relief.look(self._most_slots):
            resize(self._streamer, self._relief.n_slots(self._most_slots), cache)


def resize(streamer: ExpertStreamer, n_slots: int, cache: list[Any]) -> None:
    """Resize the pool to at most ``n_slots``, after computing the caches' arrays.

    If each change copies the pool, the size is rounded down, so that growing caches
    change it rarely.
    """
    n_slots = streamer.rounded(n_slots)
    if n_slots == streamer.n_slots:
        return
    # A cache's lazy array may still read slots.
    mx.eval(caches.arrays_of(cache))
    mx.synchronize()
    streamer.resize(n_slots)
