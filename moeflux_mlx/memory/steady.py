"""Measure memory that neither Python's collector nor a device frees meanwhile."""

from __future__ import annotations

import gc
import threading

import mlx.core as mx


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


def active_bytes() -> int:
    """Return the bytes of MLX's arrays, without those of finished work.

    A GPU's result is there before the arrays that led to it are freed: MLX frees them
    when it is told that the work has ended, on CUDA in another thread.
    """
    mx.synchronize()
    return mx.get_active_memory()
