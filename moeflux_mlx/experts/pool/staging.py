"""Copies of records to a CUDA GPU, through pinned host memory.

If the host wrote into managed memory, its pages would move to the host, and the GPU
would fetch them back one page fault at a time. So records are read into pinned host
memory instead, and each is copied to its slot by one transfer of the copy engine.
"""

from __future__ import annotations

import functools
import importlib
import mmap
import weakref
from collections import deque
from typing import Any

import mlx.core as mx
import numpy as np

from ... import device
from ...errors import BackendError
from ...system.progress import notice
from ..files.reader import Place


class Copier:
    """The calls of CUDA's runtime that staging needs.

    Raises:
        BackendError: a call failed; names the call and CUDA's error.
    """

    def __init__(self, runtime: Any):
        """Use ``cuda.bindings.runtime``, or an object with the same functions."""
        self._runtime = runtime

    def pin(self, address: int, n_bytes: int) -> None:
        """Pin host memory, so that the copy engine can read it."""
        self._call("cudaHostRegister", address, n_bytes, 0)

    def unpin(self, address: int) -> None:
        """Unpin host memory; it may be freed afterwards."""
        self._call("cudaHostUnregister", address)

    def stream(self) -> Any:
        """Return a new stream that does not synchronise with the default stream."""
        return self._call(
            "cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking
        )

    def close(self, stream: Any) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def copy(self, target: int, source: int, n_bytes: int, stream: Any) -> None:
        """Copy between host or GPU addresses, and wait for the copy."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", target, source, n_bytes, kind, stream)
        self._call("cudaStreamSynchronize", stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._runtime, name)(*arguments)
        if error:
            raise BackendError(f"[cuda] {name}: {error.name}")
        return results[0] if results else None


class Stage:
    """A pinned host buffer of ``n_bytes``, and a stream for copies out of it."""

    def __init__(self, copier: Copier, n_bytes: int):
        self._copier = copier
        self._stream = copier.stream()
        weakref.finalize(self, copier.close, self._stream)
        memory = mmap.mmap(-1, n_bytes)
        self.buffer = memoryview(memory)
        self._address = np.frombuffer(memory, np.uint8).ctypes.data
        copier.pin(self._address, n_bytes)
        weakref.finalize(self, copier.unpin, self._address)

    def send(self, address: int, n_bytes: int) -> None:
        """Copy the first ``n_bytes`` to a GPU address; return when they are there."""
        self.copy(address, self._address, n_bytes)

    def fetch(self, address: int, n_bytes: int) -> None:
        """Copy ``n_bytes`` from a GPU address to the buffer."""
        self.copy(self._address, address, n_bytes)

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        """Copy between two GPU addresses."""
        self._copier.copy(target, source, n_bytes, self._stream)


class Staging:
    """A set of stages that grows with the number of concurrent reads.

    Args:
        n_bytes: bytes of the largest record.
    """

    def __init__(self, copier: Copier, n_bytes: int):
        self._copier, self._n_bytes = copier, n_bytes
        self._free: deque[Stage] = deque()

    def take(self) -> Stage:
        """Take a free stage or make one; a stage that is not returned is collected."""
        try:
            return self._free.pop()
        except IndexError:
            return Stage(self._copier, self._n_bytes)

    def give(self, stage: Stage) -> None:
        """Return a stage for the next read."""
        self._free.append(stage)

    def move(self, target: int, source: int, n_bytes: int) -> None:
        """Copy between two GPU addresses."""
        stage = self.take()
        stage.copy(target, source, n_bytes)
        self.give(stage)

    def fetch(self, address: int, n_bytes: int) -> np.ndarray:
        """Return a copy of any number of bytes at a GPU address, uint8."""
        stage, values = self.take(), np.empty(n_bytes, np.uint8)
        for at in range(0, n_bytes, self._n_bytes):
            part = values[at : at + self._n_bytes]
            stage.fetch(address + at, len(part))
            part[:] = np.frombuffer(stage.buffer, np.uint8, len(part))
        self.give(stage)
        return values

    def send(self, address: int, values: np.ndarray) -> None:
        """Copy any number of bytes, uint8 ``[n]``, to a GPU address."""
        stage = self.take()
        for at in range(0, len(values), self._n_bytes):
            part = values[at : at + self._n_bytes]
            stage.buffer[: len(part)] = part.data
            stage.send(address + at, len(part))
        self.give(stage)


class StagedPlace(Place):
    """A slot in a GPU's memory, at ``address``."""

    def __init__(self, staging: Staging, address: int, n_bytes: int):
        super().__init__(n_bytes)
        self._staging, self._address = staging, address
        self._stage: Stage | None = None

    def open(self) -> memoryview:
        self._stage = self._staging.take()
        return self._stage.buffer[: self.n_bytes]

    def close(self, whole: bool) -> None:
        stage, self._stage = self._stage, None
        if stage is not None:
            if whole:
                stage.send(self._address, self.n_bytes)
            self._staging.give(stage)


def open_staging(n_bytes: int) -> Staging | None:
    """Return staging for records of at most ``n_bytes``, or None without need for it.

    The host writes slots directly where MLX has no CUDA GPU or ``cuda-bindings`` is
    not installed.
    """
    if device.on_cpu() or not mx.cuda.is_available():
        return None
    runtime = _runtime()
    return None if runtime is None else Staging(Copier(runtime), n_bytes)


@functools.cache
def _runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        notice(
            "experts are read several times slower without cuda-bindings: install "
            "moeflux-mlx[cuda]"
        )
        return None
