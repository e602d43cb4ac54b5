"""A compiled Metal source that can be run on NumPy arrays."""

from __future__ import annotations

import ctypes
import functools
import mmap
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...device import MAX_BUFFERS, MAX_THREADGROUP_BYTES, MAX_THREADS_PER_GROUP
from ...errors import SimulatorError
from . import compile as compiler
from .symbols import Layout, Lines, Shared

Size3 = tuple[int, int, int]
# The runtime has one set of fibers, and a call of it lets other Python threads run.
_RUNNING = threading.Lock()
_MAX_FINDINGS = 32
_KINDS = (
    "race",
    "uninitialised read",
    "out of bounds",
    "misaligned",
    "divergent barrier",
    "fault",
)
_SPACES = ("buffer", "threadgroup array", "stack", "")


class _Finding(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("kind", "space", "region", "thread")),
        *((n, ctypes.c_uint32) for n in ("other", "size", "is_write", "other_writes")),
        *((n, ctypes.c_uint64) for n in ("pc", "other_pc", "offset", "extra")),
    ]


class _Region(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("initialised", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


class _Request(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.c_uint64)),
        ("device", ctypes.POINTER(_Region)),
        ("n_device", ctypes.c_uint64),
        ("shared", ctypes.POINTER(_Region)),
        ("n_shared", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("checked", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("code_begin", ctypes.c_uint64),
        ("code_end", ctypes.c_uint64),
        ("findings", ctypes.POINTER(_Finding)),
    ]


@functools.cache
def _runtime() -> ctypes.CDLL:
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(compiler.runtime()), mode=ctypes.RTLD_GLOBAL)
    library.msl_run.restype = ctypes.c_uint32
    return library


class Program:
    """A compiled Metal source.

    Args:
        source: Metal text. A kernel that is a template runs as the instances that
            ``template [[host_name(...)]]`` lines name, as in source that MLX writes.
        checked: check every access: races, bounds, uninitialised reads.
        name: the source's name in messages where it has no ``#line``.
        numbers: how numbers are computed, one of ``compile.NUMBERS``.

    Raises:
        SimulatorError: it does not compile; has the compiler's message.
    """

    def __init__(
        self,
        source: str,
        *,
        checked: bool = False,
        name: str = "kernel.metal",
        numbers: str = "plain",
    ):
        self.checked, self.name = checked, name
        text, found = compiler.translate(source, name)
        self._functions = {f.name: (i, f) for i, f in enumerate(found)}
        self._path = compiler.library(text, checked, numbers)
        _runtime()
        self._library = ctypes.CDLL(str(self._path))
        layout = Layout.of(self._path)
        # A function tells where the library is. The list of mappings does not: another
        # process may have put the same library in place of this file.
        self._base = self._address(0) - layout.functions["__run_0"] if found else 0
        self._code = tuple(self._base + at for at in layout.constant)
        self._shared = layout.shared

    @classmethod
    def of_file(cls, path: Path, *, checked: bool = False) -> Program:
        """Compile a ``.metal`` file with the files that it includes from its folder.

        Raises:
            OSError: the file cannot be read.
            SimulatorError: it does not compile.
        """
        source = compiler.with_includes(path)
        return cls(source, checked=checked, name=path.name)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that can be run."""
        return tuple(self._functions)

    def parameters(self, kernel: str) -> tuple[compiler.Parameter, ...]:
        """Return a kernel's parameters in order."""
        return self._functions[kernel][1].parameters

    def _address(self, index: int) -> int:
        entry = getattr(self._library, f"__run_{index}")
        return ctypes.cast(entry, ctypes.c_void_p).value or 0

    @functools.cached_property
    def _lines(self) -> Lines:
        return Lines(self._path)

    def threadgroup_bytes(self, kernel: str) -> int:
        """Return the threadgroup memory that a kernel declares."""
        return sum(s.n_bytes for s in self._shared_of(kernel))

    def _shared_of(self, kernel: str) -> list[Shared]:
        spelling = self._functions[kernel][1].spelling.split("<")[0].strip()
        return [s for s in self._shared if s.kernel == spelling]

    def run(
        self,
        kernel: str,
        buffers: Sequence[np.ndarray],
        grid: Size3,
        threadgroup: Size3,
        *,
        seed: int = 0,
        uninitialised: Sequence[int] = (),
    ) -> None:
        """Run a kernel over a grid of threads, writing into ``buffers`` in place.

        During the run, other threads may write to constant buffers, except to the parts
        that the kernel reads.

        Args:
            kernel: one of ``kernels``.
            buffers: C-contiguous arrays in the order of their ``[[buffer(i)]]``.
            grid: threads in each direction; groups at the edges may be smaller.
            threadgroup: threads of a group in each direction.
            seed: order in which groups and threads run; 0 is the natural one.
            uninitialised: indices of buffers that must be written before they are read.

        Raises:
            SimulatorError: the launch exceeds Metal's limits, or the run found faults;
                lists them with file and line.
        """
        if kernel not in self._functions:
            known = ", ".join(self._functions)
            raise SimulatorError(f"[simulator] expected one of {known}: got {kernel!r}")
        index, function = self._functions[kernel]
        self._check(kernel, function.n_buffers, buffers, grid, threadgroup)
        guarded = [_Guarded(b) for b in buffers]
        n = len(buffers)
        pointers = (ctypes.c_uint64 * max(1, n))(*(g.address for g in guarded))
        regions = (_Region * max(1, n))(
            *(
                _Region(g.address, g.n_bytes, i not in uninitialised, 0)
                for i, g in enumerate(guarded)
            )
        )
        arrays = self._shared_of(kernel)
        shared = (_Region * max(1, len(arrays)))(
            *(_Region(self._base + s.address, s.n_bytes, 0, 0) for s in arrays)
        )
        findings = (_Finding * _MAX_FINDINGS)()
        request = _Request(
            self._address(index),
            pointers,
            regions,
            n,
            shared,
            len(arrays),
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*threadgroup),
            seed,
            int(self.checked),
            0,
            *self._code,
            findings,
        )
        with _RUNNING:
            n_found = _runtime().msl_run(ctypes.byref(request))
        # Constant buffers stay as they are: threads read experts into slots meanwhile.
        for parameter in function.parameters:
            if parameter.writable:
                guarded[parameter.index].back_to(buffers[parameter.index])
        if n_found:
            messages = [
                self._describe(findings[i], function, arrays) for i in range(n_found)
            ]
            raise SimulatorError(
                f"[simulator] {kernel}: " + "\n".join(dict.fromkeys(messages))
            )

    def _check(
        self,
        kernel: str,
        n_buffers: int,
        buffers: Sequence[np.ndarray],
        grid: Size3,
        threadgroup: Size3,
    ) -> None:
        def fail(message: str) -> None:
            raise SimulatorError(f"[simulator] {kernel}: {message}")

        if len(buffers) != n_buffers:
            fail(f"expected {n_buffers} buffers but got {len(buffers)}")
        if len(buffers) > MAX_BUFFERS:
            fail(f"expected at most {MAX_BUFFERS} buffers but got {len(buffers)}")
        if min(*grid, *threadgroup) < 1:
            fail(f"expected positive sizes but got {grid} in groups of {threadgroup}")
        n_threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
        if n_threads > MAX_THREADS_PER_GROUP:
            limit = MAX_THREADS_PER_GROUP
            fail(f"expected at most {limit} threads a threadgroup but got {n_threads}")
        n_bytes = self.threadgroup_bytes(kernel)
        if n_bytes > MAX_THREADGROUP_BYTES:
            limit = MAX_THREADGROUP_BYTES
            fail(f"expected at most {limit} bytes of threadgroup memory, not {n_bytes}")
        for i, buffer in enumerate(buffers):
            if not buffer.flags.c_contiguous:
                fail(f"buffer {i}: expected a C-contiguous array")

    def _describe(
        self, f: _Finding, function: compiler.Function, arrays: list[Shared]
    ) -> str:
        where = self._place(f.pc)
        if f.kind == 4:
            # The line of the call, not that of a function inlined there.
            where = f"{where.rpartition(':')[0]}:{f.offset // 1000}"
            return (
                f"divergent barrier: {where} reached by {f.extra} of {f.size} threads"
            )
        if f.kind == 5:
            name = signal.Signals(f.extra).name
            what = {
                "SIGILL": "array index out of bounds or division by zero",
                "SIGFPE": "division by zero",
            }.get(name, "access outside of memory")
            return f"{what}: {where} thread {f.thread} ({name})"
        verb = "writes" if f.is_write else "reads"
        target = self._target(f, function, arrays)
        if f.kind == 0:
            did = "wrote" if f.other_writes else "read"
            other = f"thread {f.other}"
            if f.extra:
                other += " of another threadgroup"
            return (
                f"race: {where} thread {f.thread} {verb} what {other} {did} at "
                f"{self._place(f.other_pc)} ({target})"
            )
        access = f"thread {f.thread} {verb} {f.size} bytes"
        return f"{_KINDS[f.kind]}: {where} {access} ({target})"

    def _target(
        self, f: _Finding, function: compiler.Function, arrays: list[Shared]
    ) -> str:
        offset = ctypes.c_int64(f.offset).value
        if f.space == 0:
            names = {p.index: p.name for p in function.parameters if p.index >= 0}
            return f"buffer {names.get(f.region, f.region)!r}, byte {offset}"
        if f.space == 1:
            return f"threadgroup array {arrays[f.region].name!r}, byte {offset}"
        return "no memory of this kernel"

    def _place(self, pc: int) -> str:
        # A return address points behind its call.
        found = self._lines.find(pc - 1 - self._base) if pc else None
        return f"{found[0]}:{found[1]}" if found else "an unknown line"


class _Guarded:
    """A copy of an array between protected pages, which end it exactly."""

    def __init__(self, array: np.ndarray):
        page = mmap.PAGESIZE
        self.n_bytes = array.nbytes
        whole = -(-max(1, self.n_bytes) // page) * page
        self._map = mmap.mmap(-1, whole + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (start, start + page + whole):
            libc.mprotect(ctypes.c_void_p(guard), page, 0)
        # Aligned as Metal's buffers are, so up to 15 bytes past the end go unnoticed.
        self.address = start + page + (whole - self.n_bytes) // 16 * 16
        memory = (ctypes.c_uint8 * max(1, self.n_bytes)).from_address(self.address)
        self._view = np.ctypeslib.as_array(memory)[: self.n_bytes]
        self._view[:] = array.reshape(-1).view(np.uint8)

    def back_to(self, array: np.ndarray) -> None:
        """Copy written values back."""
        array.reshape(-1).view(np.uint8)[:] = self._view
