"""Measure the speed of reading a file, bypassing the page cache."""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

PIECE_BYTES = 4 << 20
MOST_SECONDS = 0.2


def disk_bytes_per_second(file: Path, n_threads: int) -> float | None:
    """Return the speed of reading a file, or None if it is too short.

    Several threads read pieces from all over the file, as experts are read. If the
    system reads only through its cache, the figure includes the speed of the cache.
    """
    try:
        n_pieces = file.stat().st_size // PIECE_BYTES
        if n_pieces < 1:
            return None
        fd = _opened(file)
    except OSError:
        return None
    # Avoid neighbouring pieces, which a cache may have read already.
    step = next(s for s in (7919, 104729, 1) if n_pieces % s or s == 1)
    numbers = count()
    start = time.perf_counter()
    try:
        with ThreadPoolExecutor(n_threads) as threads:

            def pieces() -> Iterator[int]:
                while (number := next(numbers)) < n_pieces:
                    if time.perf_counter() - start > MOST_SECONDS:
                        return
                    yield number * step % n_pieces

            def read() -> int:
                with mmap.mmap(-1, PIECE_BYTES) as buffer:
                    return sum(
                        os.preadv(fd, [buffer], piece * PIECE_BYTES)
                        for piece in pieces()
                    )

            done = [threads.submit(read) for _ in range(n_threads)]
            n_bytes = sum(each.result() for each in done)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
    return n_bytes / (time.perf_counter() - start)


def _opened(file: Path) -> int:
    """Open a file so that reads bypass the page cache, if possible."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | direct)
        # Some volumes refuse direct reads only at the first read.
        with mmap.mmap(-1, mmap.PAGESIZE) as buffer:
            os.preadv(fd, [buffer], 0)
    except OSError:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
    return fd
