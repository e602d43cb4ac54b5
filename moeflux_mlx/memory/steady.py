"""Keep Python's collector from freeing arrays while their memory is measured."""

from __future__ import annotations

import gc
import threading


class _Steady:
    """Pauses the collector while any thread of the process is inside.

    A model that nothing uses any more stays in memory until the collector runs. If that
    happened during a measurement, the model's bytes would be missing in the result.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._n_inside:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._n_inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside and self._was_enabled:
                gc.enable()


STEADY = _Steady()
