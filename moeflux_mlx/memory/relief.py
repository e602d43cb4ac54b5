"""Let the pool of experts give way while the system itself runs short of memory."""

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

# Seconds between two looks at the system.
LOOK_SECONDS = 1.0
# Seconds between two steps: the system needs some to notice the memory it was given.
STEP_SECONDS = 5.0
# Seconds without pressure before experts come back, and between two such steps.
CALM_SECONDS = 30.0
# Share of its slots that a pool keeps at a step, and the share of all that it gets back
# at one.
KEPT = {Pressure.WARNING: 3 / 4, Pressure.CRITICAL: 1 / 2}
REGAINED = 1 / 8


class Relief:
    """How many slots a pool has while the system is short: fewer and fewer.

    It is looked at between calls only. Afterwards they come back, slowly.
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
        # When the pool may become smaller next, and when larger.
        self._next_less, self._next_more = now, now

    def n_slots(self, wanted: int) -> int:
        """Return how many of so many wanted slots there may be now."""
        n_slots = int(wanted * self._share)
        return min(wanted, max(self._streamer.least_slots, n_slots))

    def look(self, wanted: int) -> bool:
        """Look at the system if it is time; tell whether ``n_slots`` has changed."""
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
                notice("the system has memory again, so experts have theirs back")
        return self.n_slots(wanted) != before

    def _give_way(self, pressure: Pressure, before: int, wanted: int) -> None:
        self._share *= KEPT[pressure]
        n_slots = self.n_slots(wanted)
        # The pool holds no less than one token needs, so that is where it grows from.
        self._share = max(self._share, n_slots / wanted)
        notice(
            f"warning: the system runs short of memory ({pressure.name.lower()}), so "
            f"experts give way: {n_slots} of {before} stay in memory"
        )


class FreePool:
    """A pool that no plan bounds: it gives way to the system, and to nothing else."""

    def __init__(self, streamer: ExpertStreamer):
        self._streamer, self._most_slots = streamer, streamer.n_slots
        self._relief = Relief(streamer)

    def give_way(self, cache: list[Any]) -> None:
        """Bring the pool to its size before a call with these caches."""
        if self._relief.look(self._most_slots):
            resize(self._streamer, self._relief.n_slots(self._most_slots), cache)


def resize(streamer: ExpertStreamer, n_slots: int, cache: list[Any]) -> None:
    """Give the pool so many slots, once nothing that caches await reads them."""
    if n_slots == streamer.n_slots:
        return
    # A lazy state may still have to read the slots it was computed from.
    mx.eval(caches.arrays_of(cache))
    mx.synchronize()
    streamer.resize(n_slots)
