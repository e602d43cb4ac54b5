"""Direct I/O: reads that bypass the page cache, where the system allows it."""

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
    """Return whether records begin and end at disk blocks, in files and in slots."""
    return all(layout.stride % DISK_BLOCK_BYTES == 0 for layout in layouts)


def bypass_cache(fds: Collection[int], directory: Path, *, aligned: bool) -> bool:
    """Make reads of open files direct; if one file refuses, warn and change none.

    Args:
        fds: the files' descriptors.
        directory: the files' directory, for the warning.
        aligned: whether reads begin and end at disk blocks, in files and in memory.

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
            f"[direct] {directory}: no direct I/O, so reads use the page cache: "
            f"{error.strerror}",
            stacklevel=2,
        )
        return False
    return True


def direct_excess(fd: int, position: int) -> int:
    """Return the distance from the last position where a read may begin.

    On Linux a direct read must begin at a disk block. But the read before may have
    ended anywhere, because of a signal, a quota or the network.
    """
    excess = position % DISK_BLOCK_BYTES
    return excess if excess and _is_direct(fd) else 0


if sys.platform == "darwin":

    def _is_direct(fd: int) -> bool:
        return False

    def _set_direct(fd: int, aligned: bool) -> None:
        # macOS accepts unaligned reads here and serves them through the cache.
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
                f"the experts are not at multiples of {DISK_BLOCK_BYTES} bytes: pack "
                "the model with `moeflux pack`",
            )
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        # Some file systems accept the flag but refuse direct reads, so try one.
        with mmap.mmap(-1, DISK_BLOCK_BYTES) as block:
            os.preadv(fd, [block], 0)

    def _set_cached(fd: int) -> None:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
