"""A server's record so far: requests, tokens, errors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

# How many errors the status page shows.
RECENT = 20
# The status counted for a client that went away: HTTP has none for it.
HUNG_UP = 499


@dataclass(frozen=True)
class Failure:
    """A request that got an error: when, the status of that error, and its text."""

    when: float
    status: int
    text: str


@dataclass
class Record:
    """Counts since the start, which threads of requests add to.

    ``statuses`` counts requests for text by the status that they ended with: of an
    error after a stream had begun, that error's own.
    """

    started: float = field(default_factory=time.time)
    statuses: Counter[int] = field(default_factory=Counter)
    failures: deque[Failure] = field(default_factory=lambda: deque(maxlen=RECENT))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    n_open: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def open_request(self) -> Iterator[None]:
        """Count a request as open while inside."""
        with self._lock:
            self.n_open += 1
        try:
            yield
        finally:
            with self._lock:
                self.n_open -= 1

    def end_request(self, status: int, error: str | None) -> None:
        """Count a request, and keep its error if there was one."""
        with self._lock:
            self.statuses[status] += 1
            if error is not None:
                self.failures.append(Failure(time.time(), status, error))

    def ended(self) -> dict[int, int]:
        """Return how many requests ended by status."""
        with self._lock:
            return dict(sorted(self.statuses.items()))

    def recent(self) -> list[Failure]:
        """Return the last errors, the newest first."""
        with self._lock:
            return [*reversed(self.failures)]

    def add_prompt(self, n_tokens: int, n_cached: int) -> None:
        """Count a prompt that was read, less the tokens that a kept one had."""
        with self._lock:
            self.prompt_tokens += n_tokens - n_cached
            self.cached_tokens += n_cached

    def add_token(self) -> None:
        """Count a generated token."""
        with self._lock:
            self.generated_tokens += 1
