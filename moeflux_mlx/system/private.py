"""Folders and files that only this user can write, for compiled code and records.

Cached files are loaded into the process, or decide which kernels run. So they are
trusted only if no other user can have written them: the user owns folder and file,
neither is a link, and only the owner may write. A user who can write to the parent
folder may replace the folder, but not by one of this user's. If the cache is not
private, a temporary folder of this process replaces it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import config
from .files import replacing
from .progress import notice
from .volume import in_turn

# How the name of a folder for unfinished files begins.
WORKPLACE = ".work-"
# Temporary folders of this process, by the cache that each replaces.
_instead: dict[Path, Path] = {}


def made(*names: str) -> Path:
    """Return a folder in the cache, created if necessary, or a temporary one.

    Args:
        names: the path components below the cache.
    """
    base = config.cache_folder()
    try:
        if base not in _instead:
            base.parent.mkdir(parents=True, exist_ok=True)
            return _made(base, names)
    except OSError as error:
        _replace(base, f"{error.filename or base}: {error.strerror}")
    return _made(_instead[base], names)


def found(*names: str) -> Path | None:
    """Return a folder in the cache if it exists and is private, else None."""
    base = config.cache_folder()
    path = _instead.get(base, base)
    for name in ("", *names):
        path = path / name
        if not os.path.lexists(path):
            return None
        if not _is_private_folder(path):
            _replace(base, f"{path} is not a folder that only you can write")
            return None
    return path


def is_private(path: Path) -> bool:
    """Tell whether a regular file exists that only this user can have written."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and _is_closed(status)


def open_places(top: str) -> Iterator[os.stat_result]:
    """Yield the status of every untrusted entry at or below ``top``.

    Others own it or can write to it, or it is a link.

    Raises:
        OSError: a folder cannot be read.
    """
    if not _is_closed(status := os.lstat(top)) or not stat.S_ISDIR(status.st_mode):
        yield status
        return
    for entry in os.scandir(top):
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from open_places(entry.path)
        elif not (stat.S_ISREG(status.st_mode) and _is_closed(status)):
            yield status


def write_text(path: Path, text: str) -> None:
    """Replace a file by ``text`` atomically; only this user can read or write it."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def workplace(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in ``parent``; remove it at the end.

    The next call removes folders that a killed process left.

    Raises:
        OSError: the folder cannot be created.
    """
    with in_turn(parent):
        for left in parent.glob(f"{WORKPLACE}*"):
            with contextlib.suppress(OSError):
                os.close(_locked(left))
                shutil.rmtree(left)
        folder = Path(tempfile.mkdtemp(prefix=WORKPLACE, dir=parent))
        try:
            fd = _locked(folder)
        except OSError:
            # Its volume has no locks, so no call takes it for a leftover.
            fd = None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if fd is not None:
            os.close(fd)


def _locked(folder: Path) -> int:
    """Open and lock a folder.

    Raises:
        OSError: a process holds it, or its volume has no locks.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _made(base: Path, names: tuple[str, ...]) -> Path:
    """Create nested folders.

    Raises:
        OSError: one cannot be created, or is not private.
    """
    path = base
    for name in ("", *names):
        path = path / name
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        if not _is_private_folder(path):
            why = "it is not a folder that only you can write"
            raise OSError(errno.EACCES, why, str(path))
    return path


def _is_private_folder(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and _is_closed(status)


def _is_closed(status: os.stat_result) -> bool:
    """Tell whether a file is this user's and nobody else may write it."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _replace(base: Path, reason: str) -> None:
    """Replace the cache by a temporary folder, and print a message."""
    folder = tempfile.mkdtemp(prefix="moeflux-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _instead[base] = Path(folder)
    notice(
        f"[cache] cannot use {reason}: compiled kernels and records are kept for this "
        "process only: remove it, or set XDG_CACHE_HOME to a folder of your own"
    )
