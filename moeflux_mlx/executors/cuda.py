"""Executor ``cuda``: our kernels on NVIDIA GPUs through ``mx.fast.cuda_kernel``."""

from __future__ import annotations

import functools
import struct
import sys
from typing import Any

import mlx.core as mx

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

    def build(self, kernel: MetalKernel) -> Any:
        if sys.stderr.isatty():
            print(f"\r\033[Kbuilding {kernel.name}", end="\r", file=sys.stderr)
        return kernel

    def call(self, built: MetalKernel, ready: Prepared) -> list[mx.array]:
        _check_grid(ready)
        baked, template, inputs = bind(ready)
        return _cuda_kernel(built.name, baked)(
            inputs=inputs,
            template=template,
            grid=ready.grid,
            threadgroup=ready.threadgroup,
            output_shapes=ready.output_shapes,
            output_dtypes=ready.output_dtypes,
        )


def bind(
    ready: Prepared,
) -> tuple[frozenset[str], list[tuple[str, Any]], list[mx.array]]:
    """Return the names of baked numbers, the template with them, and the inputs left.

    Numbers that are not baked become arrays in the GPU's memory where there is one.
    """
    baked = frozenset(ready.numbers) & GEOMETRY
    template, inputs = list(ready.template), []
    for parameter, array in zip(ready.kernel.inputs, ready.inputs, strict=True):
        name = parameter.name
        if name in baked:
            number = _as_int(ready.numbers[name], parameter.type)
            template.append((cuda.baked_name(ready.kernel, name), number))
        elif name in ready.numbers:
            inputs.append(_on_device(ready.numbers[name], array.dtype))
        else:
            inputs.append(array)
    return baked, template, inputs


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


def _as_int(value: float, kind: str) -> int:
    """Return a number as an int of a template: a float by its bits, a uint wrapped."""
    if kind == "float":
        return struct.unpack("<i", struct.pack("<f", value))[0]
    return struct.unpack("<i", struct.pack("<I", int(value) % (1 << 32)))[0]


@functools.cache
def _cuda_kernel(name: str, baked: frozenset[str]) -> Any:
    kernels = library()
    kernel = kernels[name]
    # MLX tells compiled kernels apart by name alone, in memory and on disk.
    header = cuda.header(kernels, kernel)
    digest = kernels.fingerprint(name, header, *sorted(baked))
    return mx.fast.cuda_kernel(
        name=f"moeflux_{name}_{digest}",
        input_names=[p.name for p in kernel.inputs if p.name not in baked],
        output_names=[p.name for p in kernel.outputs],
        source=cuda.body(kernel, baked),
        header=header,
    )
