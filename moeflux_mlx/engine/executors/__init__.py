"""Executors by name.

Imports: errors, config, device, calls, engine.graph, engine.launch, engine.lowering,
engine.metal, engine.simulator, experts, system.
"""

from __future__ import annotations

import mlx.core as mx

from ... import config, device
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

    The default is ``metal`` or ``cuda`` if ``moeflux doctor`` has verified kernels of
    this version on this machine, else ``ops``. The default launches only verified
    kernels; an executor that is named launches all.

    Raises:
        BackendError: there is none of that name, or it cannot run here.
    """
    requested = name or config.executor_name()
    name = requested or default_executor()
    if name not in EXECUTORS:
        raise BackendError(
            f"[executor] expected one of {', '.join(EXECUTORS)} but got {name!r}"
        )
    executor = EXECUTORS[name].open()
    if not requested and isinstance(executor, KernelExecutor):
        executor.usable = verified_kernels(name).__contains__
    return executor


def default_executor() -> str:
    """Return the name of the executor that runs if none is named."""
    name = gpu_executor()
    return name if name and verified_kernels(name) else "ops"


def lacks_kernels(name: str | None) -> bool:
    """Tell whether a GPU runs MLX's operations, because no kernel was verified on it.

    Args:
        name: the executor that was named, if any.
    """
    is_named = name is not None or config.executor_name() is not None
    on_gpu = gpu_executor() is not None and not device.on_cpu()
    return on_gpu and not is_named and default_executor() == OpsExecutor.name


def gpu_executor() -> str | None:
    """Return the name of the executor that runs our kernels on a GPU here, or None."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


__all__ = [
    "EXECUTORS",
    "Encoding",
    "Executor",
    "KernelExecutor",
    "OpsExecutor",
    "default_executor",
    "gpu_executor",
    "lacks_kernels",
    "open_executor",
]
