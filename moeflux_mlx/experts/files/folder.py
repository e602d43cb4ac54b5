"""A folder held open by its descriptor, so that no link can redirect a write."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...errors import ExpertStoreError
from ...system.volume import sync

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Folder:
    """An open folder in which to make, replace and remove files; it follows no links.

    Args:
        fd: the folder's descriptor; the caller closes it.
        path: the folder's path, for messages and for readers.
        part: the writing command, with which errors begin.
    """

    def __init__(self, fd: int, path: Path, part: str = "pack"):
        self.fd, self.path, self.part = fd, path, part

    @contextlib.contextmanager
    def inner(self, name: str) -> Iterator[Folder]:
        """Open a folder inside this one; make it if it does not exist.

        Raises:
            OSError: the folder cannot be made, or the name is a link or a file.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=self.fd)
        fd = os.open(name, _FOLDER, dir_fd=self.fd)
        try:
            yield Folder(fd, self.path / name, self.part)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Yield a new file that replaces an old one, and sync it to disk at the end."""
        self.remove(name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o666, dir_fd=self.fd)
        with os.fdopen(fd, "wb", buffering=0) as file:
            yield file
            sync(fd)

    def write_text(self, name: str, text: str) -> None:
        """Replace a file with ``text`` atomically."""
        temporary = f"{name}.tmp"
        with self.create(temporary) as file:
            write_all(file, memoryview(text.encode()))
        self.rename(temporary, name)

    def rename(self, name: str, new_name: str) -> None:
        """Rename a file durably, replacing any file of the new name."""
        os.replace(name, new_name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        sync(self.fd)

    def remove(self, name: str) -> None:
        """Remove a file or a link, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def n_bytes(self, name: str) -> int:
        """Return the bytes that a file occupies on its volume."""
        return 512 * os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_blocks

    def plain_names(self, folders: frozenset[str] = frozenset()) -> list[str]:
        """Return the names of the files here, and check that all are plain files.

        Args:
            folders: names of allowed folders, which are not returned.

        Raises:
            ExpertStoreError: an entry is a link, has a second hard link, or is not a
                file; names it.
        """
        names = []
        for name in sorted(os.listdir(self.fd)):
            status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) and name in folders:
                continue
            # Writing to a file with a second hard link would change another's file.
            if not (stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
                raise ExpertStoreError(
                    f"[{self.part}] {self.path / name}: expected a plain file of an "
                    "earlier run but got a link or something else: remove "
                    f"{self.path}"
                )
            names.append(name)
        return names

    def is_at(self, parent: Folder, name: str) -> bool:
        """Return whether ``name`` in ``parent`` is still this folder."""
        here = os.fstat(self.fd)
        there = os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


@contextlib.contextmanager
def open_parent(path: Path, part: str = "pack") -> Iterator[Folder]:
    """Open a path's parent folder; make it if it does not exist.

    Links in the path are followed, because the user gave them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Folder(fd, path.parent, part)
    finally:
        os.close(fd)


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all bytes; continue after short writes."""
    while data:
        data = data[file.write(data) :]
