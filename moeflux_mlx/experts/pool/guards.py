"""Lazy arrays that read slots, to be computed before the slots change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import mlx.core as mx


class Guards:
    """What must be computed before a slot is overwritten, by one thread at a time.

    Only the thread that made a lazy array can compute it. So before another one comes,
    it begins to: ``hand_over``. What a thread left without that is of a call that
    Ctrl-C ended, and nobody has its results.

    Args:
        evaluate: computes arrays, like ``mx.eval``.
    """

    def __init__(self, evaluate: Callable[..., None]):
        self._evaluate = evaluate
        self._thread = 0
        self._own: list[mx.array] = []
        # To be begun with them, and not waited for.
        self._besides: list[mx.array] = []
        self._handed: list[mx.array] = []

    def add(self, arrays: Sequence[mx.array]) -> None:
        """Guard lazy arrays of this thread."""
        self._enter()
        self._own.extend(arrays)

    def begin(self, arrays: Sequence[mx.array]) -> None:
        """Have lazy arrays begun when this thread hands over, and keep them no longer.

        What holds memory as long as it is lazy, others may update in place later.
        """
        self._enter()
        self._besides.extend(arrays)

    def hand_over(self) -> None:
        """Begin to compute what this thread guards, for any thread to wait for."""
        self._enter()
        besides, self._besides = self._besides, []
        begun = [*self._own, *besides]
        if not begun:
            return
        try:
            mx.async_eval(*begun)
        except ValueError:
            # As inside mx.grad, where waiting is allowed.
            mx.eval(*begun)
        self._handed.extend(self._own)
        self._own = []

    def wait(self, *others: mx.array) -> None:
        """Compute all that is guarded, and ``others``."""
        self._enter()
        guards = [*self._handed, *self._own]
        if not guards and not others:
            return
        try:
            self._evaluate(*others, *guards)
        except Exception:
            self._forget()
            raise
        # Ctrl-C leaves them guarded: another call may be next, and evict.
        self._forget()

    def keep(self, n: int) -> None:
        """Wait for all but the newest ``n`` that were handed over."""
        oldest = self._handed[:-n]
        if oldest:
            mx.eval(oldest)
            del self._handed[: len(oldest)]

    def _enter(self) -> None:
        me = threading.get_ident()
        if self._thread != me:
            self._own, self._besides = [], []
            self._thread = me

    def _forget(self) -> None:
        self._own, self._handed = [], []
