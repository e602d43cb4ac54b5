"""Executor ``sim``: our Metal kernels on the simulator, on any Linux machine."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ... import config
from ...errors import BackendError
from .. import simulator
from ..launch.prepared import Prepared
from ..metal import Instance
from .kernels import KernelExecutor, metal_kernel


class SimExecutor(KernelExecutor):
    """Runs the source that MLX writes for Metal, compiled for the CPU; slow.

    Args:
        checked: look for races, bad accesses and uninitialised reads.
        seed: order in which threads, simdgroups and threadgroups run.
        numbers: ``plain``, ``contracted`` or ``fast``, as in ``simulator.call``.
    """

    name = "sim"

    def __init__(
        self, checked: bool | None = None, seed: int = 0, numbers: str = "plain"
    ):
        super().__init__()
        self.checked = config.sim_checked() if checked is None else checked
        self.seed, self.numbers = seed, numbers

    @classmethod
    def open(cls) -> SimExecutor:
        if not simulator.available():
            raise BackendError(
                "[sim] expected the packages ziglang and pyelftools: "
                "pip install moeflux-mlx[sim]"
            )
        return cls()

    def build(self, instance: Instance) -> Any:
        return metal_kernel(instance, lines=True)

    def call(self, built: Any, ready: Prepared) -> list[mx.array]:
        mx.eval(ready.inputs)
        return simulator.call(
            built,
            inputs=ready.inputs,
            **ready.options,
            checked=self.checked,
            numbers=self.numbers,
            seed=self.seed,
        )
