"""Executors by name.

Imports: errors, config, device, calls, engine.graph, engine.launch, engine.lowering,
engine.metal, engine.simulator, experts, system.
"""

from __future__ import annotations

import mlx.core as mx

from ... import config
from ...errors import BackendError
from .base import Encoding, Executor
from .cuda import CudaExecutor
from .kernels import KernelExecutor
from .metal import MetalExecutor
from .ops import OpsExecutor
from .sim import SimExecutor
from .verified import verified_kernels

EXECUTORS: dict[str, type[Executor]] = {
    executor.name: executor
    for executor in (OpsExecutor, MetalExecutor, CudaExecutor, SimExecutor)
}


def open_executor(name: str | None = None) -> Executor:
    """Open the executor called ``name``, or the environment's choice, or the default.

    The default is ``metal`` or ``cuda`` where ``moeflux doctor`` has found kernels of
    this version right on this machine, and ``ops`` everywhere else. The default
    launches just the kernels found right; who names an executor takes all it has.

    Raises:
        BackendError: when there is none of that name or it cannot run here.
    """
    asked = name or config.executor_name()
    name = asked or default_executor()
    if name not in EXECUTORS:
        raise BackendError(
            f"[executor] expected one of {', '.join(EXECUTORS)} but got {name!r}"
        )
    executor = EXECUTORS[name].open()
    if not asked and isinstance(executor, KernelExecutor):
        executor.usable = verified_kernels(name).__contains__
    return executor


def default_executor() -> str:
    """Name the executor used when nobody asks for one."""
    name = gpu_executor()
    return name if name and verified_kernels(name) else "ops"


def gpu_executor() -> str | None:
    """Name the executor that runs our kernels on a GPU here; None without one."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


__all__ = [
    "EXECUTORS",
    "Encoding",
    "Executor",
    "OpsExecutor",
    "default_executor",
    "gpu_executor",
    "open_executor",
]
