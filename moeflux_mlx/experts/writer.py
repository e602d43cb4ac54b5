"""Write the parts of a packed directory so that a crash never leaves half a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from ..errors import ExpertStoreError
from .checkpoint import Checkpoint
from .checkpoint_store import CheckpointExperts
from .manifest import LayerFile, ResidentFile
from .packed import CHUNK_BYTES
from .safetensors import TensorEntry, fingerprint, header_bytes

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".h5"}
Advance = Callable[[int], None]


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn OSError into ExpertStoreError that names what was being written."""
    try:
        yield
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "; make room and run the same command again to continue"
        raise ExpertStoreError(
            f"[pack] cannot write {path}: {error.strerror}{hint}"
        ) from error


def check_space(directory: Path, needed_bytes: int) -> None:
    """Raise ExpertStoreError unless the disk has ``needed_bytes`` to give."""
    with disk_errors(directory):
        available = shutil.disk_usage(directory).free
    if available < needed_bytes:
        raise ExpertStoreError(
            f"[pack] expected {needed_bytes} bytes free for {directory} but only "
            f"{available} bytes are available"
        )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory against any other process that packs into it."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ExpertStoreError(
            f"[pack] another process is packing into {directory}"
        ) from error
    finally:
        os.close(fd)


def write_layer(
    experts: CheckpointExperts, layer: int, path: Path, advance: Advance
) -> LayerFile:
    """Write one layer's experts, holding a single record in memory."""
    layout = experts.layout(layer)
    record = memoryview(bytearray(layout.stride))
    checksums = []
    with disk_errors(path), open(path, "wb", buffering=0) as file:
        for expert in range(experts.n_experts):
            experts.read_record(layer, expert, record)
            checksums.append(xxhash.xxh3_64_intdigest(record[: layout.record_bytes]))
            _write_all(file.fileno(), record)
            advance(layout.stride)
        os.fsync(file.fileno())
    n_bytes = experts.n_experts * layout.stride
    return LayerFile(layer, path.name, n_bytes, layout, tuple(checksums))


def write_resident(
    checkpoint: Checkpoint, entries: list[TensorEntry], path: Path, advance: Advance
) -> ResidentFile:
    """Copy tensors byte by byte into one safetensors file."""
    header = header_bytes(entries)
    digest = xxhash.xxh3_64(header)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with disk_errors(path), open(path, "wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(header))
        for entry in entries:
            for start in range(0, entry.n_bytes, CHUNK_BYTES):
                chunk = buffer[: min(CHUNK_BYTES, entry.n_bytes - start)]
                checkpoint.read_into(entry, start, chunk)
                digest.update(chunk)
                _write_all(file.fileno(), chunk)
                advance(len(chunk))
        os.fsync(file.fileno())
    return ResidentFile(
        path.name, path.stat().st_size, fingerprint(path), digest.intdigest()
    )


def copy_small_files(source: Path, target: Path) -> None:
    """Copy tokenizer, templates, cards: every plain file that is not weights."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights and not path.name.startswith("."):
            with disk_errors(target / path.name):
                shutil.copyfile(path, target / path.name)
                sync(target / path.name)


def write_text(path: Path, text: str) -> None:
    """Replace a file by ``text`` at once, so that it is never seen half written."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Make a file or a directory's entries durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]
