"""A folder held by its descriptor, in which no name leads anywhere else."""

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
    """An open folder: files in it are made, replaced and removed, links never followed.

    Args:
        fd: its descriptor, which stays the caller's.
        path: its name in messages, and for who only reads.
        part: the part of the program that writes there, which errors begin with.
    """

    def __init__(self, fd: int, path: Path, part: str = "pack"):
        self.fd, self.path, self.part = fd, path, part

    @contextlib.contextmanager
    def inner(self, name: str) -> Iterator[Folder]:
        """Open a folder in this one, made if it is not there.

        Raises:
            OSError: it cannot be made, or the name is a link or a file.
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
        """Give a new, empty file, durable once all is written; an older one goes."""
        self.remove(name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o666, dir_fd=self.fd)
        with os.fdopen(fd, "wb", buffering=0) as file:
            yield file
            sync(fd)

    def write_text(self, name: str, text: str) -> None:
        """Replace a file by ``text`` at once, so that it is never seen half written."""
        part = f"{name}.tmp"
        with self.create(part) as file:
            write_all(file, memoryview(text.encode()))
        self.rename(part, name)

    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name, for good; a file of that name goes."""
        os.replace(name, new_name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        sync(self.fd)

    def remove(self, name: str) -> None:
        """Remove a file or a link, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def n_bytes(self, name: str) -> int:
        """Return what a file takes of its volume."""
        return 512 * os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_blocks

    def plain_names(self, folders: frozenset[str] = frozenset()) -> list[str]:
        """Return the names of the files here, all of them plain and of one name.

        Args:
            folders: names that may be folders; they are left out.

        Raises:
            ExpertStoreError: there is a link or anything else; names it.
        """
        names = []
        for name in sorted(os.listdir(self.fd)):
            status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) and name in folders:
                continue
            # A file of two names would be changed where it is not ours.
            if not (stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
                raise ExpertStoreError(
                    f"[{self.part}] {self.path / name}: expected a plain file of an "
                    "earlier run but got a link or something else: remove "
                    f"{self.path}"
                )
            names.append(name)
        return names

    def is_at(self, parent: Folder, name: str) -> bool:
        """Tell whether a name in another folder still is this one."""
        here = os.fstat(self.fd)
        there = os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


@contextlib.contextmanager
def open_parent(path: Path, part: str = "pack") -> Iterator[Folder]:
    """Open the folder that a path lies in, made if it is not there.

    It may be reached through links: whoever gave the path meant them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Folder(fd, path.parent, part)
    finally:
        os.close(fd)


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all bytes; a short write goes on."""
    while data:
        data = data[file.write(data) :]
