"""One call of a model at a time, from any thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from ..errors import ModelError
from ..experts.pool.holders import Holders
from ..system.uncopied import Uncopied

R = TypeVar("R")


class Experts(Protocol):
    """A source of experts for calls."""

    def hand_over(self) -> None:
        """Let any thread wait for the arrays that read experts."""


class OneAtATime(Uncopied):
    """Serialises the calls of a model; ``streamer`` reads its experts, or is None."""

    # The source of experts, and the objects that make room: of a subclass's own types.
    streamer: Any = None
    keeper: Any = None
    free_pool: Any = None

    def __init__(self) -> None:
        # Held during each call.
        self.lock = threading.RLock()
        # Objects that keep arrays of slots between calls.
        self.holders = Holders()
        self._depth = 0
        self._refused: str | None = None

    def refuse(self, why: str) -> None:
        """Make all later calls raise a ModelError."""
        self._refused = why

    def alone(self, call: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Call while no other thread does; lazy results may outlive the call."""
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

    @contextlib.contextmanager
    def reaching(self, experts: Experts) -> Iterator[None]:
        """Run calls in this context with these experts, outside the memory plan."""
        with self.lock:
            before = self.streamer, self.keeper, self.free_pool
            self.streamer, self.keeper, self.free_pool = experts, None, None
            # A nested call skips the checks of arguments, which are our own here.
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                self.streamer, self.keeper, self.free_pool = before

    def _begin(self) -> None:
        """Prepare a call that is not nested in another."""
