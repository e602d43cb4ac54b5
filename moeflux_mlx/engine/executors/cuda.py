"""Executor ``cuda``: our kernels on NVIDIA GPUs through ``mx.fast.cuda_kernel``."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ...device import MAX_CUDA_GRID_YZ
from ...errors import BackendError, KernelError
from ...system import private
from ..launch.prepared import Prepared
from ..metal import Instance, cuda, library
from .kernels import KernelExecutor


class CudaExecutor(KernelExecutor):
    """Launches lazily, like ``metal``; MLX compiles kernels again in each process."""

    name = "cuda"
    compiles = True

    @classmethod
    def open(cls) -> CudaExecutor:
        if not mx.cuda.is_available():
            raise BackendError(
                "[cuda] expected an NVIDIA GPU and the package mlx[cuda]"
            )
        return cls()

    def clock(self) -> Callable[[mx.array], mx.array] | None:
        return _nanoseconds

    def build(self, instance: Instance) -> Any:
        if sys.stderr.isatty():
            name = instance.kernel.name
            print(f"\r\033[Kbuilding {name}", end="\r", file=sys.stderr)
        return _cuda_kernel(instance)

    def call(self, built: Any, ready: Prepared) -> list[mx.array]:
        _check_grid(ready)
        made: list[mx.array] = built(inputs=bound(ready), **ready.options)
        return made


def bound(ready: Prepared) -> list[mx.array]:
    """Return a launch's inputs, with numbers as arrays in the GPU's memory."""
    pairs = zip(ready.instance.inputs, ready.inputs, strict=True)
    return [
        _on_device(ready.numbers[p.name], x.dtype) if p.name in ready.numbers else x
        for p, x in pairs
    ]


def _nanoseconds(after: mx.array) -> mx.array:
    (ns,) = _clock()(
        inputs=[after],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(2,)],
        output_dtypes=[mx.uint64],
    )
    return ns  # type: ignore[no-any-return]


@functools.cache
def _clock() -> Any:
    source = """
        unsigned long long now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        ns[0] = now;
        ns[1] = after[0];
    """
    return mx.fast.cuda_kernel(
        name="moeflux_clock",
        input_names=["after"],
        output_names=["ns"],
        source=source,
    )


def _check_grid(ready: Prepared) -> None:
    """Refuse a grid that Metal accepts and CUDA does not."""
    for axis in (1, 2):
        n = ready.grid[axis] // ready.threadgroup[axis]
        if n > MAX_CUDA_GRID_YZ:
            raise KernelError(
                f"[{ready.kernel.name}] grid: expected at most {MAX_CUDA_GRID_YZ} "
                f"threadgroups along {'xyz'[axis]} but got {n}"
            )


@functools.lru_cache(maxsize=4096)
def _on_device(value: float, dtype: mx.Dtype) -> mx.array:
    """Return a number as an array in the GPU's memory.

    MLX keeps arrays of up to 8 bytes in the host's memory. Every threadgroup reads them
    over the bus, which costs 35 us per launch. So this array has four elements.
    """
    array = mx.full((4,), value, dtype)
    mx.eval(array)
    return array


@functools.cache
def _cuda_kernel(instance: Instance) -> Any:
    """Register an instance of a kernel with MLX.

    MLX hashes the source and looks up the name at every launch, so both are short.
    """
    kernel = instance.kernel
    body, header = cuda.body(instance), cuda.header(library(), kernel)
    # MLX may identify compiled kernels by name alone.
    digest = hashlib.sha256(f"{header}\0{body}".encode()).hexdigest()[:16]
    return mx.fast.cuda_kernel(
        name=f"moeflux_{kernel.name}_{digest}",
        input_names=[p.name for p in instance.inputs],
        output_names=[p.name for p in kernel.outputs],
        source=body,
        header=_included(header),
    )


@functools.cache
def _included(header: str) -> str:
    """Return an include of a file with a header; the header if none can be written."""
    digest = hashlib.sha256(header.encode()).hexdigest()[:16]
    try:
        path = private.made("cuda") / f"{digest}.h"
        if not private.is_private(path) or path.read_text() != header:
            private.write_text(path, header)
    except OSError:
        return header
    return f'#include "{path.resolve()}"\n'
