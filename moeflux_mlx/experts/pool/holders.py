"""Objects that keep arrays of slots from one call to the next."""

from __future__ import annotations

import weakref
from typing import Protocol


class Holder(Protocol):
    """An object that keeps views of slots, or objects made from such views."""

    def let_go(self) -> None:
        """Drop them all; the next use takes new ones from the streamer."""


class Holders:
    """The holders that must let go before the memory of slots can be freed.

    The references are weak: a holder may be collected at any time.
    """

    def __init__(self) -> None:
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()

    def add(self, holder: Holder) -> None:
        """Add a holder."""
        self._holders.add(holder)

    def let_go(self) -> None:
        """Make every holder drop its arrays."""
        for holder in [*self._holders]:
            holder.let_go()
