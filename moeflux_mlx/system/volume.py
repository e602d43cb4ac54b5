"""Lacks of some volumes: locks, syncing of folders, figures of free space."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import ExpertStoreError

# How network shares and user-space file systems say that they have no such thing.
LACKING = frozenset(
    {
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.EINVAL,
        errno.ENOLCK,
        errno.ENOSYS,
        errno.ENOTTY,
    }
)


@contextlib.contextmanager
def if_supported() -> Iterator[None]:
    """Pass over an OSError that says that the volume has no such operation."""
    try:
        yield
    except OSError as error:
        if error.errno not in LACKING:
            raise


def sync(fd: int) -> None:
    """Make a file or a folder's entries durable, where the volume can.

    Raises:
        OSError: the bytes did not get there.
    """
    with if_supported():
        os.fsync(fd)


def lock(fd: int, directory: Path, part: str = "pack") -> None:
    """Hold an open folder against other processes until it is closed.

    Where the volume has no locks, warn and go on.

    Raises:
        ExpertStoreError: another process holds it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ExpertStoreError(
            f"[{part}] another process is {part}ing into {directory}"
        ) from error
    except OSError as error:
        if error.errno not in LACKING:
            raise
        warnings.warn(
            f"[{part}] {directory}: its volume has no locks ({error.strerror}): see "
            f"to it that no other process {part}s there",
            stacklevel=2,
        )


def free_bytes(fd: int) -> int | None:
    """Return the bytes that a volume has to give, None if it does not say."""
    with if_supported():
        found = os.fstatvfs(fd)
        return found.f_bavail * found.f_frsize if found.f_blocks else None
    return None
