"""Facts about the hardware that MLX runs on; every hardware number stands here."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import platform
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from threadpoolctl import ThreadpoolController

from .errors import BudgetError
from .system.limits import left_by_ulimit as left_by_ulimit
from .system.limits import memory_left_bytes, memory_limit_bytes
from .system.limits import process_bytes as process_bytes
from .system.pressure import Pressure
from .system.pressure import memory_pressure as system_pressure

# Direct reads begin and end at multiples of this: no disk's logical block is larger.
DISK_BLOCK_BYTES = 4 << 10

# Logits larger than this stay lazy on a CPU: most callers drop a prompt's logits.
EAGER_LOGITS_BYTES = 64 << 20
# From this many rows on, unpacking a quantised matrix once beats doing it for each row,
# values left unscaled.
UNPACK_MIN_ROWS = 3
# Unpacked values the host handles at once: 1 MiB, half of a common L2 cache.
HOST_BLOCK_VALUES = 256 << 10
# Attention's scores that the host handles at once, 8 MiB, unless one head has more.
HOST_SCORES = 2 << 20
# Rows times packed matrices of so many values are worth several threads.
HOST_THREADED_VALUES = 4 << 20
# From this many multiply-adds on, a product of the host is worth several threads.
THREADED_MIN_MACS = 64 << 20
# Keys up to this size are copied by one launch, values with them, in less time than MLX
# needs to update both in place, which takes it two launches each.
COPIED_CACHE_BYTES = 4 << 20
# Address space that OpenBLAS takes for each of its threads.
BLAS_BUFFER_BYTES = 32 << 20
# Growth of an interpreter once it runs: stacks, Python's objects.
PROCESS_GROWTH_BYTES = 36 << 20
# A thread's stack where no limit says less.
THREAD_STACK_BYTES = 8 << 20
# Address space that the C library sets aside for a thread's allocations.
THREAD_HEAP_BYTES = 64 << 20
# Overhead of an allocation: its pages' ends and the allocator's own records.
ALLOCATION_SLACK_BYTES = 1 << 20
# Share of memory that resident matrices may take when kept unpacked in float32.
UNPACKED_SHARE = 1 / 8
# How long reading back takes, and the pause in which a GPU waits for what comes next,
# in layers: an estimate from one profile on an H200.
GPU_READ_BACK_LAYERS = 4.0
# Rows a matrix from which on MLX's gather_qmm on Metal takes blocks of sorted rows.
METAL_ROWS_A_MATRIX = 4


def on_cpu() -> bool:
    """Tell whether MLX computes on the CPU by default."""
    return mx.default_device().type == mx.DeviceType.cpu


@dataclass(frozen=True)
class GpuLimits:
    """A GPU's limits of memory: the longest buffer, and how much to use in all."""

    buffer_bytes: int
    working_set_bytes: int


def gpu_limits() -> GpuLimits | None:
    """Return Metal's limits; None where MLX takes memory from another allocator.

    MLX on a Mac takes all memory from Metal, also to compute on the CPU. It refuses a
    longer buffer. A larger working set it does not refuse, but macOS then takes pages
    from the GPU and puts them back while it computes.
    """
    if not mx.metal.is_available():
        return None
    info = mx.device_info(mx.Device(mx.gpu))
    return GpuLimits(
        int(info["max_buffer_length"]), int(info["max_recommended_working_set_size"])
    )


def machine_name() -> str:
    """Name the device that MLX computes on."""
    info: dict[str, Any] = {}
    if mx.metal.is_available() or mx.cuda.is_available():
        info = mx.device_info()
    return str(info.get("device_name") or _processor())


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        line = next(x for x in text.splitlines() if x.startswith("model name"))
        return line.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def mlx_version() -> str:
    """Return the version of the installed MLX."""
    return metadata.version("mlx")


def prefers_host_arrays() -> bool:
    """Tell whether NumPy arrays beat MLX's here: on a CPU under Linux.

    MLX's CPU wheel for Linux links the reference BLAS (about 1 GFLOP/s a core where
    NumPy's OpenBLAS does 50) and hands every operation to another thread.
    """
    return on_cpu() and sys.platform == "linux"


def has_many_registers() -> bool:
    """Tell whether launches may count on CUDA's registers, twice those of a Mac."""
    return bool(mx.cuda.is_available())


def gathers_strided() -> bool:
    """Tell whether MLX gathers matrices that do not lie end to end; not on CUDA."""
    return on_cpu() or not mx.cuda.is_available()


def multiplies_by_blocks(n_rows: int, n_matrices: int) -> bool:
    """Tell whether MLX multiplies sorted rows a block at a time by quantised matrices.

    That is on Metal, where enough rows share a matrix, and sums in another order. It
    copies matrices that do not lie end to end, all that there are.
    """
    return (
        not on_cpu()
        and mx.metal.is_available()
        and n_rows // n_matrices >= METAL_ROWS_A_MATRIX
    )


def multiplies_row_by_row() -> bool:
    """Tell whether MLX gathers matrices for one row alike, however many there are."""
    return on_cpu()


@contextlib.contextmanager
def host_threads(n_macs: int) -> Iterator[None]:
    """Let NumPy's BLAS use its threads only where products are large enough.

    OpenBLAS wakes a thread for products of a few hundred microseconds, which costs
    more than it saves and stalls on busy cores.

    Args:
        n_macs: multiply-adds of a typical product in the block.
    """
    if n_macs >= THREADED_MIN_MACS:
        yield
        return
    with _blas().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def start_blas() -> None:
    """Have NumPy's BLAS make its threads and buffers, so that they can be measured."""
    side = 2 * round(THREADED_MIN_MACS ** (1 / 3))
    # BLAS ends the process where it cannot have a buffer.
    check_allocation(BLAS_BUFFER_BYTES * n_cores() + 8 * side**2, "memory")
    square = np.ones((side, side), np.float32)
    square @ square


def n_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@functools.cache
def physical_memory_bytes() -> int:
    """Return the machine's memory, or the limits of this process if they are less.

    Limits are those of control groups, ``ulimit -v`` and ``ulimit -d``.
    """
    return memory_limit_bytes()


def ulimit_bytes(n_threads: int) -> int | None:
    """Return the bytes that limits of address space and data allow; or None.

    Args:
        n_threads: to be started yet, whose stacks these limits count in full.
    """
    left = left_by_ulimit()
    if left is None:
        return None
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if not 0 < stack <= THREAD_STACK_BYTES:
        stack = THREAD_STACK_BYTES
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        stack += THREAD_HEAP_BYTES
    return max(1, (process_bytes() or 0) + left - n_threads * stack)


def left_bytes() -> int | None:
    """Return the memory that arrays can still take; None where the GPU has its own."""
    if mx.cuda.is_available() and not on_cpu():
        return None
    return memory_left_bytes()


def memory_pressure() -> Pressure:
    """Return how short the system is of the memory that experts take here."""
    if mx.cuda.is_available() and not on_cpu():
        return Pressure.NORMAL
    return system_pressure()


def check_allocation(n_bytes: int, part: str) -> None:
    """Raise BudgetError unless the system would give so much memory now.

    MLX writes to its allocator's memory without looking: where memory cannot be
    had, that ends the process.

    Args:
        part: the part that asks, for the message.
    """
    try:
        # Private like the allocator's own, or limits of data would not count it.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mmap.mmap(-1, n_bytes + ALLOCATION_SLACK_BYTES, flags).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BudgetError(
            f"[{part}] cannot allocate {n_bytes} bytes: {error}; this process can take "
            f"{memory_left_bytes()} more: give less memory, or raise the limit"
        ) from error


def return_memory(array: np.ndarray) -> bool:
    """Return the whole pages of an array to the system; its values are lost.

    Tells whether the system took them. Memory that CUDA manages is not the system's.
    """
    if mx.cuda.is_available() and not on_cpu():
        return False
    page = mmap.PAGESIZE
    begin = -(-array.ctypes.data // page) * page
    end = (array.ctypes.data + array.nbytes) // page * page
    # macOS counts pages as free at once only with an advice of its own.
    advice = getattr(mmap, "MADV_FREE_REUSABLE", mmap.MADV_DONTNEED)
    return end <= begin or not _c().madvise(
        ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice
    )


def return_freed() -> None:
    """Have MLX return freed memory from now on, where it takes the system's.

    It would keep all of it for arrays of the same sizes, without a bound on a CPU. On
    GPUs it stays as it is: there it costs more to ask for memory.
    """
    if on_cpu():
        mx.set_cache_limit(0)
        mx.clear_cache()


def trim_heap() -> None:
    """Have the C library return freed memory, where it can."""
    trim = getattr(_c(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _c() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def activation_dtype(model_dtype: mx.Dtype) -> mx.Dtype:
    """Return the type of activations: the model's, but float32 on a CPU.

    MLX's CPU products are 9 times slower in bfloat16 than in float32.
    """
    return mx.float32 if on_cpu() else model_dtype


# Threads of a simdgroup, and of CUDA's warp.
SIMD = 32
# Metal's limits for one launch, on every Apple GPU.
MAX_THREADS_PER_GROUP = 1024
MAX_THREADGROUP_BYTES = 32 << 10
MAX_BUFFERS = 31
# Threads of a threadgroup times registers of a thread that M1 and M2 are known to
# allow. Beyond the second number their threads spill. Later chips have more.
THREADGROUP_REGISTERS = 53_248
MAX_REGISTERS = 128
# CUDA's, of threadgroups along y and z.
MAX_CUDA_GRID_YZ = 65535
