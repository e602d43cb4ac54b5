"""A GPU capture of some layers, for Xcode."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ...errors import BackendError


class CaptureWindow:
    """Captures a range of layers once.

    Metal allows this only in a process started with ``MTL_CAPTURE_ENABLED=1``.

    Args:
        path: the ``.gputrace`` to write; it must not exist.
        first: index of the first layer to capture.
        last: index of the last layer.
        start: starts a capture to a path.
        stop: stops it.
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
        """Return whether work must be done before the next layer begins."""
        return self._state != "done"

    def begin_layer(self, layer: int) -> None:
        """Start or stop as a layer begins; everything before it has been evaluated.

        Raises:
            BackendError: the capture cannot be started.
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
