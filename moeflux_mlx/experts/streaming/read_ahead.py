"""Whether to read experts before they are asked for: found out by trying both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ...errors import ConfigError

# Tokens timed with reading ahead, and as many without, the two in turns. One turn of
# each is enough where a way saves this share.
TRIAL_TOKENS = 32
TURN_TOKENS = 8
CLEAR_SHARE = 0.2
# The slowest of this many tokens is ignored.
SLOWEST_OF = 8
# Tokens for which the outcome holds.
HOLD_TOKENS = 512
# Least share of a token's time that must be waiting, and that must be saved.
LEAST_SHARE = 0.02


def check_read_ahead(choice: str) -> None:
    """Raise ConfigError unless it says whether to read ahead."""
    if choice not in ("auto", "on", "off"):
        raise ConfigError(
            f"[read_ahead] expected 'auto', 'on' or 'off' but got {choice!r}"
        )


class ReadAhead:
    """Says for each token whether to read ahead.

    Args:
        choice: ``on``, ``off``, or ``auto`` for the faster one here.
        waited: returns the seconds waited for reads so far.
        clock: returns seconds.

    Raises:
        ConfigError: there is no such choice.
    """

    def __init__(
        self,
        choice: str,
        waited: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
    ):
        check_read_ahead(choice)
        self._choice, self._waited, self._clock = choice, waited, clock
        self._winner, self._left = False, 0
        self._began = 0.0, 0.0
        self._active = False
        self._forget()

    def _forget(self) -> None:
        self._times: dict[bool, list[float]] = {False: [], True: []}
        self._waits: list[float] = []

    def begin(self) -> bool:
        """Hear that a token begins; tell whether to read ahead for it."""
        self._began = self._clock(), self._waited()
        if self._choice != "auto":
            return self._choice == "on"
        if self._left:
            self._active = self._winner
        else:
            n = sum(map(len, self._times.values()))
            self._active = n // TURN_TOKENS % 2 == 1
        return self._active

    def end(self) -> None:
        """Hear that the token is over."""
        if self._choice != "auto":
            return
        if self._left:
            self._left -= 1
            return
        seconds = self._clock() - self._began[0]
        self._times[self._active].append(seconds)
        if not self._active:
            self._waits.append(self._waited() - self._began[1])
        without, ahead = self._times[False], self._times[True]
        if len(without) == TURN_TOKENS and not ahead:
            # Nothing to hide: no need to try.
            if _usual(self._waits) < LEAST_SHARE * _usual(without):
                self._decide(False)
        elif len(without) == len(ahead):
            self._compare(_usual(without), _usual(ahead))

    def _compare(self, without: float, ahead: float) -> None:
        """Decide after as many tokens of each, unless the two are too alike yet."""
        is_clear = min(without, ahead) < (1 - CLEAR_SHARE) * max(without, ahead)
        if is_clear or len(self._times[True]) == TRIAL_TOKENS:
            self._decide(ahead < (1 - LEAST_SHARE) * without)

    def _decide(self, winner: bool) -> None:
        self._winner, self._left = winner, HOLD_TOKENS
        self._forget()


def _usual(times: Sequence[float]) -> float:
    """Return the mean of all but the slowest tokens.

    A first token may take seconds, in which kernels are compiled. But a median would
    leave out every token that waits for the disk where most find the page cache filled.
    """
    n = len(times) - len(times) // SLOWEST_OF
    return sum(sorted(times)[:n]) / n
