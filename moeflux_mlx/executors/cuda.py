"""Executor ``cuda``: our kernels on NVIDIA GPUs through ``mx.fast.cuda_kernel``."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .. import private
from ..device import MAX_CUDA_GRID_YZ
from ..errors import BackendError, KernelError
from ..launch.base import Prepared
from ..metal import MetalKernel, cuda, library
from .kernels import KernelExecutor

# Scalars that a model's geometry fixes: compiled in, so that no thread reads them and
# loops have known ends. All others change with the number of tokens.
GEOMETRY = frozenset(
    (
        "n_in",
        "n_out",
        "n_heads",
        "n_key_heads",
        "n_kv_heads",
        "heads_per_kv",
        "head_dim",
        "dim",
        "dv",
        "value_dim",
        "latent_dim",
        "rope_dim",
        "nope_dim",
        "key_offset",
        "n_channels",
        "n_history",
        "n_pairs",
        "n_groups",
        "n_experts",
        "k",
        "n_group",
        "topk_group",
        "scale",
        "eps",
        "qk_eps",
        "n0",
        "n1",
        "at1",
        "at_normed",
        "x_at",
        "gate_at",
        "up_at",
        "opens_at",
        "row_width",
        "qkv_at",
        "z_at",
        "b_at",
        "a_at",
        "n_shared",
        "mscale",
        "w_row",
        "s_row",
        "b_row",
        "w_base",
        "s_base",
        "b_base",
        "gate_w_base",
        "gate_s_base",
        "gate_b_base",
        "up_w_base",
        "up_s_base",
        "up_b_base",
    )
)


class CudaExecutor(KernelExecutor):
    """Launches lazily, as ``metal`` does; MLX keeps what it compiled on disk."""

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

    def build(self, kernel: MetalKernel) -> Any:
        if sys.stderr.isatty():
            print(f"\r\033[Kbuilding {kernel.name}", end="\r", file=sys.stderr)
        return kernel

    def call(self, built: MetalKernel, ready: Prepared) -> list[mx.array]:
        _check_grid(ready)
        values, inputs = bind(ready)
        return _cuda_kernel(built.name, tuple(values.items()))(
            inputs=inputs,
            grid=ready.grid,
            threadgroup=ready.threadgroup,
            output_shapes=ready.output_shapes,
            output_dtypes=ready.output_dtypes,
        )


def bind(ready: Prepared) -> tuple[dict[str, Any], list[mx.array]]:
    """Return the values that are compiled in, and the inputs left.

    Numbers that are not compiled in become arrays in the GPU's memory.
    """
    values, inputs = dict(ready.template), []
    for parameter, array in zip(ready.kernel.inputs, ready.inputs, strict=True):
        name = parameter.name
        if name in ready.numbers and name in GEOMETRY:
            number = ready.numbers[name]
            is_float = getattr(parameter, "type", "") == "float"
            values[name] = number if is_float else int(number)
        elif name in ready.numbers:
            inputs.append(_on_device(ready.numbers[name], array.dtype))
        else:
            inputs.append(array)
    return values, inputs


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
    """Refuse a grid that Metal takes and CUDA does not."""
    for axis in (1, 2):
        n = ready.grid[axis] // ready.threadgroup[axis]
        if n > MAX_CUDA_GRID_YZ:
            raise KernelError(
                f"[{ready.kernel.name}] grid: expected at most {MAX_CUDA_GRID_YZ} "
                f"threadgroups along {'xyz'[axis]} but got {n}"
            )


@functools.lru_cache(maxsize=4096)
def _on_device(value: float, dtype: mx.Dtype) -> mx.array:
    """Return a number in the GPU's memory, where MLX keeps none of up to 8 bytes.

    Read over the bus by every threadgroup, such numbers cost 35 us a launch.
    """
    array = mx.full((4,), value, dtype)
    mx.eval(array)
    return array


@functools.cache
def _cuda_kernel(name: str, values: tuple[tuple[str, Any], ...]) -> Any:
    """Register a kernel with its template and numbers compiled in.

    At every launch MLX hashes all of the source and looks the name up: both are short.
    """
    kernel = library()[name]
    body = cuda.body(kernel, dict(values))
    header = cuda.header(library(), kernel)
    # MLX tells compiled kernels apart by name, in memory and on disk.
    digest = hashlib.sha256(f"{header}\0{body}".encode()).hexdigest()[:16]
    compiled_in = dict(values)
    return mx.fast.cuda_kernel(
        name=f"moeflux_{name}_{digest}",
        input_names=[p.name for p in kernel.inputs if p.name not in compiled_in],
        output_names=[p.name for p in kernel.outputs],
        source=body,
        header=_included(header),
    )


@functools.cache
def _included(header: str) -> str:
    """Return an include of a file that holds a header, or the header."""
    digest = hashlib.sha256(header.encode()).hexdigest()[:16]
    try:
        path = private.made("cuda") / f"{digest}.h"
        if not private.is_private(path) or path.read_text() != header:
            private.write_text(path, header)
    except OSError:
        return header
    return f'#include "{path.resolve()}"\n'
