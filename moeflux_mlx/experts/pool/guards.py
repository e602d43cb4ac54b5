"""Lazy arrays that read slots, to be computed before the slots change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import mlx.core as mx


class Guards:
    """Arrays to compute before a slot is overwritten, used by one thread at a time.

    Only the thread that made a lazy array can begin to compute it. So a thread calls
    ``hand_over`` before another thread takes its turn. If it did not, Ctrl-C ended its
    call: nobody has the results, and its guards are dropped. What was handed over is
    kept as a number that MLX has once the arrays are computed, so that no call's rows
    stay in memory after it.

    Args:
        evaluate: computes arrays, like ``mx.eval``.
    """

    def __init__(self, evaluate: Callable[..., None]):
        self._evaluate = evaluate
        # A number that any thread may use.
        self._nothing = mx.array(0)
        self._thread = 0
        self._own: list[mx.array] = []
        # Arrays to begin on hand-over without waiting for them later.
        self._unwaited: list[mx.array] = []
        self._handed: list[mx.array] = []

    def add(self, arrays: Sequence[mx.array]) -> None:
        """Guard lazy arrays of this thread."""
        self._enter()
        self._own.extend(arrays)

    def begin(self, arrays: Sequence[mx.array]) -> None:
        """Begin lazy arrays when this thread hands over, then drop them.

        A lazy array keeps its inputs, such as slots, alive until it is computed. It is
        not kept here afterwards, so that its owner can update it in place.
        """
        self._enter()
        self._unwaited.extend(arrays)

    def hand_over(self) -> None:
        """Begin to compute this thread's guards, so any thread can wait for them."""
        self._enter()
        unwaited, self._unwaited = self._unwaited, []
        own = mx.depends([self._nothing], self._own) if self._own else []
        begun = [*own, *unwaited]
        if not begun:
            return
        try:
            mx.async_eval(*begun)
        except ValueError:
            # Inside mx.grad, for example: MLX refuses async_eval there but not eval.
            mx.eval(*begun)
        self._handed.extend(own)
        self._own = []

    def wait(self, *others: mx.array) -> None:
        """Compute all guarded arrays, and ``others``."""
        self._enter()
        try:
            # Apart from the rest: while this thread differentiates, MLX crashes on one
            # evaluation of its own arrays and of those that another thread has begun.
            if self._handed:
                mx.eval(self._handed)
            if others or self._own:
                self._evaluate(*others, *self._own)
        except Exception:
            self._forget()
            raise
        # After Ctrl-C, which is no Exception, they stay guarded: the next call may
        # evict their experts.
        self._forget()

    def keep(self, n: int) -> None:
        """Wait for all handed-over arrays but the newest ``n``, and drop them."""
        oldest = self._handed[:-n]
        if oldest:
            mx.eval(oldest)
            del self._handed[: len(oldest)]

    def _enter(self) -> None:
        me = threading.get_ident()
        if self._thread != me:
            self._own, self._unwaited = [], []
            self._thread = me

    def _forget(self) -> None:
        self._own, self._handed = [], []
