"""One call of a model at a time, whichever thread makes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from ..errors import ModelError
from ..system.uncopied import Uncopied

R = TypeVar("R")


class Experts(Protocol):
    """Experts that calls read."""

    def hand_over(self) -> None:
        """Let any thread wait for their readers."""


class OneAtATime(Uncopied):
    """Makes calls of a model whose experts ``streamer`` reads, None if nobody does."""

    streamer: Experts | None = None

    def __init__(self) -> None:
        # Held by each call.
        self.lock = threading.RLock()
        self._depth = 0
        self._refused: str | None = None

    def refuse(self, why: str) -> None:
        """Have all calls from now on end in a ModelError."""
        self._refused = why

    def alone(self, call: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Call while no other thread does; lazy results may outlive this."""
        with self.lock:
            depth = self._depth
            try:
                self._depth = depth + 1
                if self._refused is not None:
                    raise ModelError(self._refused)
                if depth == 0:
                    self._begin()
                return call(*args, **kwargs)
            finally:
                self._depth = depth
                if depth == 0 and self.streamer is not None:
                    self.streamer.hand_over()

    def _begin(self) -> None:
        """Prepare a call that is not part of another."""
