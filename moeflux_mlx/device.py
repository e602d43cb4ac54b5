"""Facts about the hardware that MLX runs on, and every hardware number."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import platform
import resource
import sys
import threading
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

# Alignment of direct reads: no disk's logical block is larger.
DISK_BLOCK_BYTES = 4 << 10

# Logits larger than this stay lazy on a CPU: most callers drop a prompt's logits.
EAGER_LOGITS_BYTES = 64 << 20
# From this many rows on, it is faster to unpack a quantised matrix once, without
# scaling its values, than for each row.
UNPACK_MIN_ROWS = 3
# Unpacked values that the host handles at once: 1 MiB, half of a common L2 cache.
HOST_BLOCK_VALUES = 256 << 10
# Attention scores that the host handles at once: 8 MiB, more if one head needs more.
HOST_SCORES = 2 << 20
# From this many packed values on, a product of the host runs on several threads.
HOST_THREADED_VALUES = 4 << 20
# From this many multiply-adds on, a dense product of the host runs on several threads.
THREADED_MIN_MACS = 64 << 20
# Up to this size of the keys, one launch that copies keys and values is faster than
# MLX's updates in place, which take two launches for each.
COPIED_CACHE_BYTES = 4 << 20
# Address space that OpenBLAS reserves for each of its threads.
BLAS_BUFFER_BYTES = 32 << 20
# Memory by which an interpreter grows while it runs: stacks and Python objects.
PROCESS_GROWTH_BYTES = 36 << 20
# A thread's stack, unless a limit makes it smaller.
THREAD_STACK_BYTES = 8 << 20
# Address space that the C library reserves for a thread's allocations.
THREAD_HEAP_BYTES = 64 << 20
# Overhead of an allocation: partly used pages and the allocator's records.
ALLOCATION_SLACK_BYTES = 1 << 20
# Share of memory that resident matrices may take if kept unpacked in float32.
UNPACKED_SHARE = 1 / 8
# Time of a read-back and of the GPU's pause after it, in units of one layer's time: an
# estimate from one profile on an H200.
GPU_READ_BACK_LAYERS = 4.0
# From this many rows per matrix on, MLX's gather_qmm on Metal multiplies in blocks.
METAL_ROWS_A_MATRIX = 4
# MLX's CUDA products of a stack of matrices find a matrix by an unsigned 32-bit number
# of values. Beyond it they read another matrix without an error.
CUDA_STACK_VALUES = 1 << 32
# The same for dense matrices and sorted ids: a signed number of bytes.
CUDA_STACK_BYTES = 1 << 31
# The same for quantised matrices on a CPU: a signed number of packed words.
CPU_STACK_WORDS = 1 << 31
# The compute capability of NVIDIA's Hopper.
HOPPER = 9


def on_cpu() -> bool:
    """Tell whether MLX computes on the CPU by default."""
    return mx.default_device().type == mx.DeviceType.cpu


@dataclass(frozen=True)
class GpuLimits:
    """A GPU's limits: the longest buffer, and the recommended total memory."""

    buffer_bytes: int
    working_set_bytes: int


def gpu_limits() -> GpuLimits | None:
    """Return Metal's limits, or None if MLX uses another allocator.

    On a Mac MLX allocates all memory from Metal, even for the CPU. It refuses a longer
    buffer. It accepts a larger working set, but then macOS moves pages from the GPU and
    back while it computes.
    """
    if not mx.metal.is_available():
        return None
    info = mx.device_info(mx.Device(mx.gpu))
    return GpuLimits(
        int(info["max_buffer_length"]), int(info["max_recommended_working_set_size"])
    )


def machine_name() -> str:
    """Return the name of the device that MLX computes on."""
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
    """Tell whether NumPy is faster than MLX here, which holds on a CPU under Linux.

    MLX's CPU wheel for Linux links the reference BLAS (about 1 GFLOP/s per core;
    NumPy's OpenBLAS reaches 50) and hands every operation to another thread.
    """
    return on_cpu() and sys.platform == "linux"


def has_many_registers() -> bool:
    """Tell whether a thread has CUDA's number of registers, twice that of a Mac."""
    return bool(mx.cuda.is_available())


def gathers_strided() -> bool:
    """Tell whether MLX can gather non-contiguous matrices, which CUDA cannot."""
    return on_cpu() or not mx.cuda.is_available()


def most_matrices(w: mx.array, bits: int | None, in_order: bool = True) -> int:
    """Return how many matrices a product of MLX over a stack indexes rightly.

    On Metal, and on a CPU for dense matrices, MLX counts in 64 bits.

    Args:
        w: the stack, ``[n, rows, columns]`` of values or of packed words.
        bits: bits of a packed value; None: dense.
        in_order: the product may be told that ids are sorted.
    """
    size = w.shape[1] * w.shape[2]
    if on_cpu():
        most = sys.maxsize if bits is None else CPU_STACK_WORDS // size
    elif not mx.cuda.is_available():
        most = sys.maxsize
    elif bits is None and in_order:
        most = CUDA_STACK_BYTES // (size * w.itemsize)
    elif bits is None:
        most = CUDA_STACK_VALUES // size
    else:
        most = CUDA_STACK_VALUES * bits // (size * 8 * w.itemsize)
    return max(1, most)


def multiplies_wrongly(n_groups: int, bits: int, mode: str) -> bool:
    """Tell whether MLX's product with a quantised matrix is silently wrong here.

    For rows of one affine group MLX 0.32.4 has a kernel for Hopper (``qmm_sm90``). All
    its results on an H200 were wrong.

    Args:
        n_groups: groups in a row of the matrix.
    """
    one_group = n_groups == 1 and bits in (4, 8) and mode == "affine"
    return one_group and not on_cpu() and _compute_capability() == HOPPER


def repeats_first_matrix() -> bool:
    """Tell whether MLX repeats the first of several quantised matrices along a batch.

    By its source MLX's CUDA product takes repeated matrices for a single one. It
    refuses matrices with gaps between them, such as parts of a cache.
    """
    return not on_cpu() and bool(mx.cuda.is_available())


def _compute_capability() -> int:
    """Return the major number of an NVIDIA GPU's compute capability, or 0."""
    if not mx.cuda.is_available():
        return 0
    return int(mx.device_info().get("compute_capability_major", 0))


def multiplies_by_blocks(n_rows: int, n_matrices: int) -> bool:
    """Tell whether MLX multiplies sorted rows by quantised matrices in blocks.

    It does so on Metal if enough rows share a matrix, and then sums in another order
    and copies all matrices that are not contiguous.
    """
    return (
        not on_cpu()
        and mx.metal.is_available()
        and n_rows // n_matrices >= METAL_ROWS_A_MATRIX
    )


def copies_slots(n_rows: int, n_matrices: int) -> bool:
    """Tell whether quantised matrices in slots are copied before rows meet them."""
    return not gathers_strided() or multiplies_by_blocks(n_rows, n_matrices)


def multiplies_row_by_row() -> bool:
    """Tell whether MLX computes a row the same way for any number of rows."""
    return on_cpu()


@contextlib.contextmanager
def host_threads(n_macs: int) -> Iterator[None]:
    """Let NumPy's BLAS use its threads only for large products.

    OpenBLAS also wakes threads for products of a few hundred microseconds. That costs
    more than it saves, and stalls on busy cores.

    Args:
        n_macs: multiply-adds of a typical product in the block.
    """
    if n_macs >= THREADED_MIN_MACS:
        yield
        return
    with _ONE_THREAD:
        yield


class _OneThread:
    """Holds NumPy's BLAS to one thread while any thread of the process is inside.

    The limit is the process's: if each thread restored the number that it found, the
    last one could restore another's limit for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._n_inside:
                self._limit = _blas().limit(limits=1, user_api="blas")
            self._n_inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                self._limit.restore_original_limits()


_ONE_THREAD = _OneThread()


@functools.cache
def start_blas() -> None:
    """Let NumPy's BLAS create its threads and buffers, so that they are measured."""
    side = 2 * round(THREADED_MIN_MACS ** (1 / 3))
    # BLAS ends the process if it cannot allocate a buffer.
    check_allocation(BLAS_BUFFER_BYTES * n_cores() + 8 * side**2, "memory")
    square = np.ones((side, side), np.float32)
    square @ square


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@functools.cache
def physical_memory_bytes() -> int:
    """Return the machine's memory, or a smaller limit of this process.

    Limits come from control groups, ``ulimit -v`` and ``ulimit -d``.
    """
    return memory_limit_bytes()


def ulimit_bytes(n_threads: int) -> int | None:
    """Return the bytes that limits of address space and data allow, or None.

    Args:
        n_threads: threads that will start; these limits count their stacks in full.
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
    """Return the memory left for arrays, or None if the GPU has its own memory."""
    return None if has_own_memory() else memory_left_bytes()


def memory_pressure() -> Pressure:
    """Return the system's pressure on the memory that holds experts."""
    return Pressure.NORMAL if has_own_memory() else system_pressure()


def has_own_memory() -> bool:
    """Tell whether MLX computes on a GPU with its own memory."""
    return bool(mx.cuda.is_available()) and not on_cpu()


def returns_pages() -> bool:
    """Tell whether the system takes back single pages of an array's memory.

    Metal may wire a buffer's pages, and CUDA manages its own memory; both take back
    whole buffers only. Where one is present, MLX uses it for all arrays, even for
    those of the CPU.
    """
    return not (mx.metal.is_available() or mx.cuda.is_available())


def check_allocation(n_bytes: int, part: str) -> None:
    """Raise BudgetError unless the system can allocate this much memory now.

    MLX does not check its allocations: a failed one ends the process.

    Args:
        part: the requesting part, for the message.
    """
    try:
        # Limits of data count private mappings only, like the allocator's own.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mmap.mmap(-1, n_bytes + ALLOCATION_SLACK_BYTES, flags).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BudgetError(
            f"[{part}] cannot allocate {n_bytes} bytes: {error}; this process can take "
            f"{memory_left_bytes()} more: give less memory, or raise the limit"
        ) from error


def return_memory(array: np.ndarray) -> bool:
    """Return the complete pages of an array to the system, and lose their values.

    It works only if ``returns_pages``, and returns whether the system took the pages.
    """
    page = mmap.PAGESIZE
    begin = -(-array.ctypes.data // page) * page
    end = (array.ctypes.data + array.nbytes) // page * page
    # macOS counts pages as free at once only with its own advice.
    advice = getattr(mmap, "MADV_FREE_REUSABLE", mmap.MADV_DONTNEED)
    return end <= begin or not _c().madvise(
        ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice
    )


def return_freed() -> None:
    """Let MLX return freed memory to the system at once on a CPU.

    By default MLX keeps freed memory for arrays of the same size, on a CPU without a
    bound. On GPUs this stays so, because allocation is more expensive there.
    """
    if on_cpu():
        mx.set_cache_limit(0)
        mx.clear_cache()


def trim_heap() -> None:
    """Let the C library return freed memory to the system, if it can."""
    trim = getattr(_c(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _c() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def activation_dtype(model_dtype: mx.Dtype) -> mx.Dtype:
    """Return the type of activations: float32 on a CPU, otherwise the model's.

    On a CPU MLX's products are 9 times slower in bfloat16 than in float32.
    """
    return mx.float32 if on_cpu() else model_dtype


# Threads in a simdgroup, and in a warp of CUDA.
SIMD = 32
# Metal's limits for one launch, on every Apple GPU.
MAX_THREADS_PER_GROUP = 1024
MAX_THREADGROUP_BYTES = 32 << 10
MAX_BUFFERS = 31
# M1 and M2 allow this product of a threadgroup's threads and a thread's registers.
# Above MAX_REGISTERS a thread spills. Later chips have more of both.
THREADGROUP_REGISTERS = 53_248
MAX_REGISTERS = 128
# CUDA's limit for threadgroups along y and z.
MAX_CUDA_GRID_YZ = 65535
