"""A window of layers recorded into a GPU trace for Xcode."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ...errors import BackendError


class CaptureWindow:
    """Records from the first layer of a range to its last, once.

    Metal allows it only in a process started with ``MTL_CAPTURE_ENABLED=1``.

    Args:
        path: the ``.gputrace`` to make; it must not exist.
        first: index of the first layer in the trace.
        last: index of the last one.
        start: begins the trace at a path.
        stop: ends it.
    """

    def __init__(
        self,
        path: str,
        first: int,
        last: int,
        start: Callable[[str], None] = mx.metal.start_capture,
        stop: Callable[[], None] = mx.metal.stop_capture,
    ):
        self.path, self.first, self.last = path, first, last
        self._start, self._stop = start, stop
        self._state = "waiting"

    @property
    def waits_for_work(self) -> bool:
        """Tell whether work must be done before the next layer is begun."""
        return self._state != "done"

    def begin_layer(self, layer: int) -> None:
        """Hear that a layer begins; everything before it has been evaluated.

        Raises:
            BackendError: the trace cannot be started.
        """
        if self._state == "waiting" and layer == self.first:
            try:
                self._start(self.path)
            except (RuntimeError, ValueError) as error:
                raise BackendError(
                    f"[capture] cannot record {self.path}: {error} (MTL_CAPTURE_ENABLED"
                    "=1 must be set when the process starts)"
                ) from error
            self._state = "recording"
        elif self._state == "recording" and not self.first <= layer <= self.last:
            self._stop()
            self._state = "done"
