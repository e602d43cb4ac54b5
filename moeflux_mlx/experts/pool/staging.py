"""Records on their way to a GPU with memory of its own, through pinned host memory.

What the host writes into memory that CUDA manages takes the pages away from the GPU,
which then fetches them back, fault by fault. So records are read into host memory that
the GPU's copy engine reaches, and sent to their slots by one copy each.
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
    """What staging asks of CUDA's runtime.

    Raises:
        BackendError: CUDA refused; says what.
    """

    def __init__(self, runtime: Any):
        """Use ``cuda.bindings.runtime``, or what has the same functions."""
        self._runtime = runtime

    def pin(self, address: int, n_bytes: int) -> None:
        """Let the copy engine reach host memory."""
        self._call("cudaHostRegister", address, n_bytes, 0)

    def unpin(self, address: int) -> None:
        """Take that back; the memory may be freed then."""
        self._call("cudaHostUnregister", address)

    def stream(self) -> Any:
        """Return a new stream that waits for no other one."""
        return self._call(
            "cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking
        )

    def close(self, stream: Any) -> None:
        """Give a stream back."""
        self._call("cudaStreamDestroy", stream)

    def copy(self, target: int, source: int, n_bytes: int, stream: Any) -> None:
        """Copy between addresses, host's or GPU's, and wait until that is done."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", target, source, n_bytes, kind, stream)
        self._call("cudaStreamSynchronize", stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._runtime, name)(*arguments)
        if error:
            raise BackendError(f"[cuda] {name}: {error.name}")
        return results[0] if results else None


class Stage:
    """``n_bytes`` of pinned memory, and a stream for what is copied out of it."""

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
        """Copy the first bytes to a GPU's address; they are there on return."""
        self.copy(address, self._address, n_bytes)

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        """Copy between a GPU's addresses."""
        self._copier.copy(target, source, n_bytes, self._stream)


class Staging:
    """Stages that reads borrow, as many as are under way at a time.

    Args:
        n_bytes: of the largest record.
    """

    def __init__(self, copier: Copier, n_bytes: int):
        self._copier, self._n_bytes = copier, n_bytes
        self._free: deque[Stage] = deque()

    def take(self) -> Stage:
        """Lend a stage; one that is never given back is freed with its last use."""
        try:
            return self._free.pop()
        except IndexError:
            return Stage(self._copier, self._n_bytes)

    def give(self, stage: Stage) -> None:
        """Take a stage back."""
        self._free.append(stage)

    def move(self, target: int, source: int, n_bytes: int) -> None:
        """Copy between addresses of the GPU's memory."""
        stage = self.take()
        stage.copy(target, source, n_bytes)
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
    """Return stages for records of up to ``n_bytes``; None where the host writes slots.

    That is anywhere but on an NVIDIA GPU, and there where ``cuda-bindings`` is missing.
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
            "experts are read several times slower without cuda-bindings, which "
            "moeflux-mlx[cuda] installs"
        )
        return None
