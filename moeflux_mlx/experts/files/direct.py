"""Direct I/O: reads that go past the page cache, where the system allows it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import warnings
from collections.abc import Collection
from pathlib import Path

from ...device import DISK_BLOCK_BYTES
from .layout import ExpertLayout


def are_aligned(layouts: Collection[ExpertLayout]) -> bool:
    """Tell whether records lie at whole disk blocks, in files and in slots."""
    return all(layout.stride % DISK_BLOCK_BYTES == 0 for layout in layouts)


def bypass_cache(fds: Collection[int], directory: Path, *, aligned: bool) -> bool:
    """Make reads of open files direct; where one refuses, warn and leave all as is.

    Args:
        fds: the files' descriptors.
        directory: names them in the warning.
        aligned: whether reads begin and end at whole blocks, in files and in memory.

    Returns:
        Whether reads are direct now.
    """
    try:
        for fd in fds:
            _set_direct(fd, aligned)
    except OSError as error:
        for fd in fds:
            _set_cached(fd)
        warnings.warn(
            f"[direct] {directory}: no direct I/O, reads go through the page cache: "
            f"{error.strerror}",
            stacklevel=2,
        )
        return False
    return True


def direct_excess(fd: int, position: int) -> int:
    """Return how far a position of a file is past where a read may begin.

    Direct reads on Linux begin with a block; a read may end early anywhere, for a
    signal, a quota or a network's sake.
    """
    excess = position % DISK_BLOCK_BYTES
    return excess if excess and _is_direct(fd) else 0


if sys.platform == "darwin":

    def _is_direct(fd: int) -> bool:
        return False

    def _set_direct(fd: int, aligned: bool) -> None:
        # macOS reads unaligned spans through the cache by itself.
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)

    def _set_cached(fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 0)

else:

    def _is_direct(fd: int) -> bool:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)

    def _set_direct(fd: int, aligned: bool) -> None:
        if not aligned:
            raise OSError(
                errno.EINVAL,
                f"the experts do not lie at multiples of {DISK_BLOCK_BYTES} bytes; "
                "those that `moeflux pack` writes do",
            )
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        # Some file systems take the flag and refuse the reads.
        with mmap.mmap(-1, DISK_BLOCK_BYTES) as block:
            os.preadv(fd, [block], 0)

    def _set_cached(fd: int) -> None:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
