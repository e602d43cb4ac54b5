"""Who keeps arrays of slots from one call to the next."""

from __future__ import annotations

import weakref
from typing import Protocol


class Holder(Protocol):
    """Keeps arrays that look into slots, or what was made of such arrays."""

    def let_go(self) -> None:
        """Keep none of them any more; ask the streamer for new ones."""


class Holders:
    """Those that must let go before the memory of slots can go back to the system.

    They are not kept alive by this.
    """

    def __init__(self) -> None:
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()

    def add(self, holder: Holder) -> None:
        """Have one be asked from now on."""
        self._holders.add(holder)

    def let_go(self) -> None:
        """Have all of them let go."""
        for holder in [*self._holders]:
            holder.let_go()
