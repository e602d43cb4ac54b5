"""Open, parse and replace untrusted files safely."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import math
import os
import re
import reprlib
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .volume import sync

# Size limits by kind of file; the largest known files reach a tenth of them.
CONFIG_BYTES = 16 << 20
INDEX_BYTES = 128 << 20
MANIFEST_BYTES = 64 << 20
RECORD_BYTES = 16 << 20
MOST_DEPTH, MOST_DIGITS = 64, 4000

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading, without waiting for FIFOs or devices.

    Raises:
        OSError: the file is missing, unreadable, or not a regular file.
        ValueError: the path is invalid.
    """
    # Opening a FIFO without a writer would wait otherwise.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind == stat.S_IFREG:
        return os.fdopen(fd, "rb")
    os.close(fd)
    found = KINDS.get(kind, "something else")
    raise OSError(errno.EINVAL, f"expected a regular file but got {found}")


def read_file(path: str | os.PathLike, most_bytes: int) -> bytes:
    """Return the bytes of a regular file of at most ``most_bytes``.

    Raises:
        OSError: see ``open_file``.
        ValueError: the file is larger, or the path is invalid.
    """
    with open_file(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes <= most_bytes:
            data = file.read(n_bytes)
            if len(data) == n_bytes:
                return data
            raise OSError(errno.EIO, f"expected {n_bytes} bytes but got {len(data)}")
    raise ValueError(f"expected at most {most_bytes} bytes but got {n_bytes}")


def read_json(path: str | os.PathLike, most_bytes: int, *, exact: bool = True) -> Any:
    """Parse a file of JSON; see ``parse_json``.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is too large, or not JSON.
    """
    return parse_json(read_file(path, most_bytes), exact=exact)


def parse_json(data: bytes | str, *, exact: bool = True) -> Any:
    """Parse JSON that may be hostile.

    Args:
        data: the text, in UTF-8 without a byte order mark.
        exact: refuse repeated names, NaN, infinities and integers beyond 64 bits;
            otherwise the last of repeated names counts, as in Python.

    Raises:
        ValueError: it is not JSON, nests too deeply, or has too long a number.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    hooks: dict[str, Any] = {"parse_int": _any_integer}
    if exact:
        hooks = {
            "parse_int": _integer,
            "parse_float": _finite,
            "parse_constant": _finite,
            "object_pairs_hook": _unique,
        }
    try:
        found = json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError(f"expected at most {MOST_DEPTH} levels of nesting") from error
    _check_depth(found)
    return found


def short(value: object) -> str:
    """Return a value as short text in one line, for errors."""
    return _SHORT.repr(value)


def brief(error: BaseException) -> str:
    """Return an error's text, shortened to one line."""
    text = str(error)
    return text if len(text) < 300 and text.isprintable() else short(text)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 300


def _any_integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"expected at most {MOST_DIGITS} digits but got {len(digits)}")
    return int(digits)


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**63:
        raise ValueError(f"expected an integer of 64 bits but got {short(digits)}")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"expected a finite number but got {short(text)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(
                f"expected each name once but {short(name)} is there twice"
            )
        found[name] = value
    return found


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        parts = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for part in parts for v in part if isinstance(v, dict | list)]
        if not level:
            return
    raise ValueError(f"expected at most {MOST_DEPTH} levels of nesting")


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Yield a new file that replaces ``path`` when it is completely written.

    Until then it is a hidden file in the same folder. An error removes it. The next
    call removes files that a killed process left.

    Raises:
        OSError: the file cannot be written.
    """
    _remove_parts(path)
    part, fd = _new_part(path, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            sync(fd)
            os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


@contextlib.contextmanager
def spelled_plainly(directory: Path) -> Iterator[Path]:
    """Yield a path to ``directory`` that MLX and mlx-lm can open.

    mlx-lm treats a path as a glob pattern with ``[`` and ``*``, and MLX accepts UTF-8
    only. For other paths a temporary link is used.
    """
    text = str(directory)
    if glob.escape(text) == text and text.isprintable():
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="moeflux-") as folder:
        link = Path(folder) / "model"
        link.symlink_to(directory.absolute(), target_is_directory=True)
        yield link


def _prefix(path: Path) -> str:
    return f".{path.name[:48]}."


def _new_part(path: Path, mode: int) -> tuple[Path, int]:
    """Make a locked file for ``path``; return it with its descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    while True:
        part = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.part")
        fd = os.open(part, flags, mode)
        # The lock marks the file as in use; not every volume has locks.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.path.lexists(part):
            return part, fd
        # Another process locked it first, took it for a leftover and removed it.
        os.close(fd)


def _remove_parts(path: Path) -> None:
    """Remove leftover files for ``path`` that no process is writing."""
    name = re.compile(re.escape(_prefix(path)) + r"[0-9a-f]{16}\.part")
    with os.scandir(path.parent) as entries:
        parts = [e.path for e in entries if name.fullmatch(e.name)]
    for part in parts:
        with contextlib.suppress(OSError), open_file(part) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(part)
