"""Operations that some volumes lack: locks, syncing of folders, free space."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import ExpertStoreError

# Errors by which network shares and user-space file systems refuse an operation.
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
    """Ignore an OSError by which a volume says that it lacks the operation."""
    try:
        yield
    except OSError as error:
        if error.errno not in LACKING:
            raise


def sync(fd: int) -> None:
    """Make a file or a folder's entries durable, if the volume can.

    Raises:
        OSError: the bytes could not be written.
    """
    with if_supported():
        os.fsync(fd)


def lock(fd: int, directory: Path, part: str = "pack") -> None:
    """Lock an open folder against other processes until it is closed.

    If the volume has no locks, warn and continue.

    Raises:
        ExpertStoreError: another process holds it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ExpertStoreError(
            f"[{part}] {directory}: another process writes there: wait for it, or "
            "give another directory"
        ) from error
    except OSError as error:
        if error.errno not in LACKING:
            raise
        warnings.warn(
            f"[{part}] {directory}: its volume has no locks ({error.strerror}): make "
            "sure that no other process writes there",
            stacklevel=2,
        )


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Let one process and thread at a time update the files of a folder.

    On a volume without locks nobody waits.

    Raises:
        OSError: the folder cannot be opened or locked.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with if_supported():
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def free_bytes(fd: int) -> int | None:
    """Return a volume's free bytes, or None if it does not tell."""
    with if_supported():
        found = os.fstatvfs(fd)
        return found.f_bavail * found.f_frsize if found.f_blocks else None
    return None
