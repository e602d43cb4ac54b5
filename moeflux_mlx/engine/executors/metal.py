"""Executor ``metal``: our kernels on Apple silicon through ``mx.fast.metal_kernel``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ... import config
from ...errors import BackendError
from ..launch.prepared import Prepared
from .capture import CaptureWindow
from .kernels import KernelExecutor


class MetalExecutor(KernelExecutor):
    """Launches lazily: a kernel runs when MLX needs its result."""

    name = "metal"
    compiles = True

    def __init__(self) -> None:
        super().__init__()
        window = config.capture()
        self.capture = CaptureWindow(*window) if window else None

    @classmethod
    def open(cls) -> MetalExecutor:
        if not mx.metal.is_available():
            raise BackendError("[metal] expected a Mac with Apple silicon")
        return cls()

    def call(self, built: Any, ready: Prepared) -> list[mx.array]:
        made: list[mx.array] = built(inputs=ready.inputs, **ready.options)
        return made

    @property
    def watches_layers(self) -> bool:
        waits = self.capture is not None and self.capture.waits_for_work
        return waits or super().watches_layers

    def begin_layer(self, chunk: int, layer: int, *inputs: mx.array) -> None:
        if self.capture is not None and self.capture.waits_for_work:
            mx.eval(inputs)
            self.drain()
            self.capture.begin_layer(layer)
