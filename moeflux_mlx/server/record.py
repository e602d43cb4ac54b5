"""Counts of a server's requests, tokens and errors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

# Number of errors on the status page.
RECENT = 20
# The status for a client that disconnected; HTTP defines none.
HUNG_UP = 499


@dataclass(frozen=True)
class Failure:
    """The time, status and text of a request's error."""

    when: float
    status: int
    text: str


@dataclass
class Record:
    """Counts since the start, updated by the threads of requests.

    ``statuses`` counts requests for text by their final status. An error after the
    beginning of a stream counts with the error's status.
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
        """Count a request as open within this context."""
        with self._lock:
            self.n_open += 1
        try:
            yield
        finally:
            with self._lock:
                self.n_open -= 1

    def end_request(self, status: int, error: str | None) -> None:
        """Count a finished request, and record its error if there is one."""
        with self._lock:
            self.statuses[status] += 1
            if error is not None:
                self.failures.append(Failure(time.time(), status, error))

    def ended(self) -> dict[int, int]:
        """Return the number of finished requests by status."""
        with self._lock:
            return dict(sorted(self.statuses.items()))

    def recent(self) -> list[Failure]:
        """Return the last errors, the newest first."""
        with self._lock:
            return [*reversed(self.failures)]

    def add_prompt(self, n_tokens: int, n_cached: int) -> None:
        """Count a prompt, with its cached tokens separately."""
        with self._lock:
            self.prompt_tokens += n_tokens - n_cached
            self.cached_tokens += n_cached

    def add_token(self) -> None:
        """Count a generated token."""
        with self._lock:
            self.generated_tokens += 1
