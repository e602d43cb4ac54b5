"""Spans: runs of bytes in files, and their places in an expert's record."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .direct import direct_excess


class Piece(NamedTuple):
    """``n_bytes`` at ``offset`` of an open file, for ``start`` of a record."""

    fd: int
    offset: int
    start: int
    n_bytes: int


class Span(NamedTuple):
    """Contiguous bytes of an open file, from ``offset`` on, that one call reads.

    ``pieces`` are their places ``(start, n_bytes)`` in the record, in file order.
    """

    fd: int
    path: Path
    offset: int
    pieces: tuple[tuple[int, int], ...]

    def read(self, record: memoryview) -> None:
        """Read the bytes into their places in ``record``.

        Raises:
            OSError: the read failed.
            EOFError: the file ends early.
        """
        places = [record[start : start + n_bytes] for start, n_bytes in self.pieces]
        end = self.offset + read_fully(self.fd, self.offset, *places)
        # A file truncated during the read may return zeros at its end. Its size changes
        # before that, so check the size after the read.
        file_bytes = os.lseek(self.fd, 0, os.SEEK_END)
        if file_bytes < end:
            raise EOFError(f"the file was cut to {file_bytes} bytes during the read")


def close_files(files: dict[Any, int]) -> None:
    """Close the descriptors in ``files`` and remove them."""
    while files:
        os.close(files.popitem()[1])


def merge(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Group pieces that are adjacent in a file, sorted by file and offset.

    Pieces that are adjacent in the record too become one piece.
    """
    runs: list[list[Piece]] = []
    next_fd = next_offset = next_start = -1
    for piece in sorted(pieces):
        fd, offset, start, n_bytes = piece
        if (fd, offset) != (next_fd, next_offset):
            runs.append([piece])
        elif start == next_start:
            last = runs[-1][-1]
            runs[-1][-1] = last._replace(n_bytes=last.n_bytes + n_bytes)
        else:
            runs[-1].append(piece)
        next_fd, next_offset, next_start = fd, offset + n_bytes, start + n_bytes
    return runs


def read_fully(fd: int, offset: int, *buffers: memoryview) -> int:
    """Fill ``buffers`` one after the other from ``offset`` on, by scatter reads.

    A short read is continued; a direct one is continued from its last whole block.
    Python itself repeats an interrupted call.

    Returns:
        The number of bytes read, which is the length of all buffers.

    Raises:
        OSError: the read failed.
        EOFError: the file ends early.
    """
    expected = sum(map(len, buffers))
    done = 0
    while True:
        # A direct read must begin at a block, but the last one may have ended anywhere.
        start = done - direct_excess(fd, offset + done) if done else 0
        n_bytes = os.preadv(fd, _rest(buffers, start), offset + start)
        if start + n_bytes == expected:
            return expected
        if start + n_bytes <= done:
            if start == done or os.fstat(fd).st_size <= offset + done:
                raise EOFError(
                    f"expected {expected} bytes but the file ends after {done}"
                )
            raise OSError(errno.EIO, f"a direct read stops at {done} bytes each time")
        done = start + n_bytes


def _rest(buffers: Sequence[memoryview], n_bytes: int) -> Sequence[memoryview]:
    """Return ``buffers`` without their first ``n_bytes``."""
    if not n_bytes:
        return buffers
    for i, buffer in enumerate(buffers):
        if n_bytes < len(buffer):
            return [buffer[n_bytes:], *buffers[i + 1 :]]
        n_bytes -= len(buffer)
    return []
