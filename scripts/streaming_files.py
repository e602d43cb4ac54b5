"""Move files into and out of the page cache, and measure the disk below it.

Part of ``scripts/bench_streaming``.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Direct reads begin and end at a multiple of this.
BLOCK_BYTES = 4096
QUEUE_DEPTH = 8


class Extent(NamedTuple):
    """Bytes of a file."""

    path: Path
    offset: int
    n_bytes: int


def can_drop() -> bool:
    """Tell whether pages can be dropped from the page cache here."""
    return hasattr(os, "posix_fadvise")


def drop(paths: Iterable[Path]) -> None:
    """Drop clean pages of files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill(extents: Iterable[Extent]) -> None:
    """Read bytes into the page cache."""
    for path, offset, n_bytes in extents:
        with open(path, "rb", buffering=0) as file:
            os.pread(file.fileno(), n_bytes, offset)


def sync(paths: Iterable[Path]) -> None:
    """Write files to the disk, because only pages on the disk can be dropped."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def disk_bytes_per_s(paths: Sequence[Path], read_bytes: int, n_reads: int) -> float:
    """Return the speed of uncached reads at random places, eight at a time.

    Reads are direct where the file system allows it. Elsewhere the pages are dropped.
    """
    read_bytes -= read_bytes % BLOCK_BYTES
    rng, flags = random.Random(0), getattr(os, "O_DIRECT", 0)
    drop(paths)
    fds = _open(paths, flags)
    buffers = [mmap.mmap(-1, read_bytes) for _ in range(QUEUE_DEPTH)]

    def read(i: int) -> int:
        fd = fds[i % len(fds)]
        n_places = (os.fstat(fd).st_size - read_bytes) // BLOCK_BYTES
        offset = rng.randrange(n_places + 1) * BLOCK_BYTES
        buffer = buffers.pop()
        try:
            return os.preadv(fd, [buffer], offset)
        finally:
            buffers.append(buffer)

    try:
        with ThreadPoolExecutor(QUEUE_DEPTH) as pool:
            start = time.perf_counter()
            n_bytes = sum(pool.map(read, range(n_reads)))
            return n_bytes / (time.perf_counter() - start)
    finally:
        for fd in fds:
            os.close(fd)


def _open(paths: Sequence[Path], flags: int) -> list[int]:
    try:
        return [os.open(path, os.O_RDONLY | flags) for path in paths]
    except OSError:
        if not flags:
            raise
        return _open(paths, 0)
