"""Executors by name."""

from __future__ import annotations

import mlx.core as mx

from .. import config
from ..errors import BackendError
from .base import Encoding, Executor
from .cuda import CudaExecutor
from .metal import MetalExecutor
from .ops import OpsExecutor
from .sim import SimExecutor
from .verified import is_verified

EXECUTORS: dict[str, type[Executor]] = {
    executor.name: executor
    for executor in (OpsExecutor, MetalExecutor, CudaExecutor, SimExecutor)
}


def open_executor(name: str | None = None) -> Executor:
    """Open the executor called ``name``, or the environment's choice, or the default.

    The default is ``metal`` or ``cuda`` where ``moeflux doctor`` has found every kernel
    of this version right on this machine, and ``ops`` everywhere else.

    Raises:
        BackendError: when there is none of that name or it cannot run here.
    """
    name = name or config.executor_name() or default_executor()
    if name not in EXECUTORS:
        raise BackendError(
            f"[executor] expected one of {', '.join(EXECUTORS)} but got {name!r}"
        )
    return EXECUTORS[name].open()


def default_executor() -> str:
    """Name the executor used when nobody asks for one."""
    name = gpu_executor()
    return name if name and is_verified(name) else "ops"


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
