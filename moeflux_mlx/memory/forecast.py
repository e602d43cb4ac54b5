"""Predict how a model will run here, from its bytes and two measured bandwidths."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from rich.filesize import decimal

from .. import device

# Larger than processors' caches.
COPIED_BYTES = 32 << 20
ROUNDS = 4


@dataclass(frozen=True)
class Forecast:
    """Whether a model fits, how it would run, and the least time to move its bytes.

    Every token reads ``resident_bytes``, and ``token_bytes`` of chosen experts (None:
    unknown number). ``held_bytes`` of all ``expert_bytes`` are in memory. The process
    may still allocate ``room_bytes`` (None: unknown). Bandwidths are bytes per second
    (None: not measured).
    """

    resident_bytes: int
    expert_bytes: int
    token_bytes: int | None
    held_bytes: int
    room_bytes: int | None
    streams: bool
    memory_bandwidth: float | None
    disk_bandwidth: float | None

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole model."""
        return self.resident_bytes + self.expert_bytes

    @property
    def fits(self) -> bool:
        """Whether all of it would fit into memory."""
        return self.room_bytes is None or self.total_bytes <= self.room_bytes

    @property
    def missing(self) -> float:
        """Share of the experts' bytes that are not in memory."""
        return 1 - min(1.0, self.held_bytes / max(1, self.expert_bytes))

    @property
    def token_seconds(self) -> float | None:
        """Seconds to move a token's bytes, memory and disk one after the other."""
        if self.token_bytes is None or self.memory_bandwidth is None:
            return None
        seconds = (self.resident_bytes + self.token_bytes) / self.memory_bandwidth
        if self.missing == 0:
            return seconds
        if self.disk_bandwidth is None:
            return None
        return seconds + self.missing * self.token_bytes / self.disk_bandwidth

    @property
    def loaded_bytes(self) -> int | None:
        """Bytes read from disk until a short prompt's first token."""
        if not self.streams or self.missing == 0:
            return self.total_bytes
        if self.token_bytes is None:
            return None
        return self.resident_bytes + self.token_bytes

    @property
    def first_token_seconds(self) -> float | None:
        """Seconds to read ``loaded_bytes`` and compute one token."""
        if None in (self.token_seconds, self.loaded_bytes, self.disk_bandwidth):
            return None
        assert self.token_seconds and self.loaded_bytes and self.disk_bandwidth
        return self.loaded_bytes / self.disk_bandwidth + self.token_seconds

    def mode(self) -> str:
        """Return a line: whether the model fits, and how it runs."""
        total, room = decimal(self.total_bytes), self.room_bytes
        fits = f"{total} in all"
        if room is not None:
            word = "fits" if self.fits else "does not fit"
            fits += f", {word} into {decimal(max(0, room))}"
        if not self.streams:
            return f"{fits}: all in memory"
        held = f"{1 - self.missing:.0%} of the experts in memory"
        return f"{fits}: experts streamed, {held}"

    def speed(self) -> str:
        """Return a line: the bound on tokens per second, with its terms."""
        if self.token_bytes is None:
            return "unknown: the configuration has no number of experts per token"
        if self.memory_bandwidth is None:
            return "unknown: the memory's bandwidth was not measured"
        moved = f"{decimal(self.resident_bytes)} + {decimal(self.token_bytes)}"
        terms = f"({moved}) / {_rate(self.memory_bandwidth)}"
        if self.missing:
            disk = "a disk not measured yet"
            if self.disk_bandwidth is not None:
                disk = _rate(self.disk_bandwidth)
            terms += f" + {self.missing:.0%} x {decimal(self.token_bytes)} / {disk}"
        if (seconds := self.token_seconds) is None:
            return f"1 / ({terms})"
        speed = 1 / seconds
        number = f"{speed:,.0f}" if speed >= 100 else f"{speed:.2g}"
        return f"at most {number} tokens/s = 1 / ({terms})"

    def first_token(self) -> str:
        """Return a line: the least time until the first token."""
        seconds, loaded = self.first_token_seconds, self.loaded_bytes
        if loaded is None or self.token_bytes is None:
            return "unknown"
        if seconds is None or self.disk_bandwidth is None:
            return f"after reading {decimal(loaded)} from disk"
        return (
            f"not before {seconds:.2g} s: {decimal(loaded)} from disk at "
            f"{_rate(self.disk_bandwidth)}"
        )


def _rate(bandwidth: float) -> str:
    return f"{decimal(round(bandwidth))}/s"


@functools.cache
def memory_bandwidth() -> float | None:
    """Return the memory bandwidth of MLX's default device in bytes per second.

    A copy counts as a read and a write. The value is measured once and cached; None if
    there is no room for the measurement.
    """
    try:
        return _on_cpu() if device.on_cpu() else _on_gpu()
    except (MemoryError, RuntimeError):
        return None


def _on_cpu() -> float:
    source = np.zeros(COPIED_BYTES // 2, np.uint8)
    target = np.zeros_like(source)
    return max(_timed(lambda: np.copyto(target, source)) for _ in range(ROUNDS))


def _on_gpu() -> float:
    fastest = max(_copies_on_gpu(4 * COPIED_BYTES))
    # Free this memory, and keep it out of a model's peak.
    mx.clear_cache()
    mx.reset_peak_memory()
    return 8 * fastest


def _copies_on_gpu(n_bytes: int) -> list[float]:
    source = mx.zeros(n_bytes // 4, mx.float32)
    mx.eval(source)
    return [_timed(lambda: mx.eval(source + 1)) for _ in range(ROUNDS)]


def _timed(copy: Callable[[], object]) -> float:
    start = time.perf_counter()
    copy()
    return COPIED_BYTES / (time.perf_counter() - start)
