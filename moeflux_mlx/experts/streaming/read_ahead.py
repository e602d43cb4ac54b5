"""Decide by trial whether to read experts ahead of the router's choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ...errors import ConfigError

# A trial times TRIAL_TOKENS with reading ahead and TRIAL_TOKENS without, in alternating
# turns of TURN_TOKENS. One turn of each decides if the faster one saves CLEAR_SHARE.
TRIAL_TOKENS = 32
TURN_TOKENS = 8
CLEAR_SHARE = 0.2
# One token in this many, the slowest, is left out of a mean.
SLOWEST_OF = 8
# A decision holds for this many tokens; then the trial is repeated. Not to read ahead
# holds only while tokens wait for at most WAITS_MORE times their share in the trial.
HOLD_TOKENS = 512
WAITS_MORE = 2.0
# Reading ahead must save this share of a token's time. Without it, a token must spend
# this share on waiting, or there is nothing to save.
LEAST_SHARE = 0.02


def check_read_ahead(choice: str) -> None:
    """Raise ConfigError unless ``choice`` is ``auto``, ``on`` or ``off``."""
    if choice not in ("auto", "on", "off"):
        raise ConfigError(
            f"[read_ahead] expected 'auto', 'on' or 'off' but got {choice!r}"
        )


class ReadAhead:
    """Decide for each token whether to read ahead.

    Args:
        choice: ``on``, ``off``, or ``auto``: measure both and use the faster one.
        waited: returns the total seconds spent waiting for reads.
        clock: returns seconds.

    Raises:
        ConfigError: ``choice`` is unknown.
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
        self._began, self._share = (0.0, 0.0), 0.0
        self._active = False
        self._forget()

    def _forget(self) -> None:
        self._times: dict[bool, list[float]] = {False: [], True: []}
        self._waits: list[float] = []

    def begin(self) -> bool:
        """Start a token, timed during a trial; return whether to read ahead for it."""
        if self._choice != "auto":
            return self._choice == "on"
        if self._left:
            self._active = self._winner
        else:
            self._began = self._now()
            n = sum(map(len, self._times.values()))
            self._active = n // TURN_TOKENS % 2 == 1
        return self._active

    def _now(self) -> tuple[float, float]:
        return self._clock(), self._waited()

    def end(self) -> None:
        """End the timing of the token, and decide if enough tokens were timed."""
        if self._choice != "auto":
            return
        if self._left:
            self._left -= 1
            if not self._winner and self._left % TURN_TOKENS == 0:
                self._look()
            return
        seconds = self._clock() - self._began[0]
        self._times[self._active].append(seconds)
        if not self._active:
            self._waits.append(self._waited() - self._began[1])
        without, ahead = self._times[False], self._times[True]
        if len(without) == TURN_TOKENS and not ahead:
            # Tokens hardly wait for reads: reading ahead has nothing to save.
            if _trimmed_mean(self._waits) < LEAST_SHARE * _trimmed_mean(without):
                self._decide(False)
        elif len(without) == len(ahead):
            self._compare(_trimmed_mean(without), _trimmed_mean(ahead))

    def _compare(self, without: float, ahead: float) -> None:
        """Decide if one way is clearly faster, or if the trial is over."""
        is_clear = min(without, ahead) < (1 - CLEAR_SHARE) * max(without, ahead)
        if is_clear or len(self._times[True]) == TRIAL_TOKENS:
            self._decide(ahead < (1 - LEAST_SHARE) * without)

    def _decide(self, winner: bool) -> None:
        self._winner, self._left = winner, HOLD_TOKENS
        self._share = _trimmed_mean(self._waits) / _trimmed_mean(self._times[False])
        self._began = self._now()
        self._forget()

    def _look(self) -> None:
        """Repeat the trial now if tokens wait longer than in the last one.

        The page cache may have held the experts then, and no longer does.
        """
        (began, had_waited), self._began = self._began, self._now()
        seconds, waited = self._began[0] - began, self._began[1] - had_waited
        if waited > WAITS_MORE * max(self._share, LEAST_SHARE) * seconds:
            self._left = 0


def _trimmed_mean(times: Sequence[float]) -> float:
    """Return the mean without the slowest tokens.

    The first token may take seconds, because it compiles kernels. But a median would
    ignore all reads from the disk if most tokens find their experts in the page cache.
    """
    n = len(times) - len(times) // SLOWEST_OF
    return sum(sorted(times)[:n]) / n
