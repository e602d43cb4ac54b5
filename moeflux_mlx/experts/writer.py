"""Write the parts of a packed directory so that a crash never leaves half a file."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from ..errors import ExpertStoreError
from ..volume import free_bytes, sync
from .checkpoint import Checkpoint
from .checkpoint_store import CheckpointExperts
from .folder import Folder, write_all
from .manifest import LayerFile, ResidentFile
from .packed import CHUNK_BYTES
from .safetensors import TensorEntry, fingerprint, header_bytes
from .sidecars import SourceFiles, open_inside

RESIDENT_FILE = "model.safetensors"
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
            f"[pack] cannot write {path}: {error.strerror or error}{hint}"
        ) from error


def check_space(folder: Folder, needed_bytes: int) -> None:
    """Raise ExpertStoreError unless the disk has ``needed_bytes`` to give."""
    available = free_bytes(folder.fd)
    if available is not None and available < needed_bytes:
        raise ExpertStoreError(
            f"[pack] expected {needed_bytes} bytes free for {folder.path} but only "
            f"{available} bytes are available: make room and run the same command again"
        )


def write_layer(
    experts: CheckpointExperts, layer: int, folder: Folder, advance: Advance
) -> LayerFile:
    """Write one layer's experts, holding a single record in memory."""
    layout = experts.layout(layer)
    record = memoryview(bytearray(layout.stride))
    name, checksums = layer_name(layer), []
    with disk_errors(folder.path / name), folder.create(name) as file:
        for expert in range(experts.n_experts):
            experts.read_record(layer, expert, record)
            checksums.append(xxhash.xxh3_64_intdigest(record[: layout.record_bytes]))
            write_all(file, record)
            advance(layout.stride)
    n_bytes = experts.n_experts * layout.stride
    return LayerFile(layer, name, n_bytes, layout, tuple(checksums))


def write_resident(
    checkpoint: Checkpoint,
    entries: list[TensorEntry],
    folder: Folder,
    advance: Advance,
) -> ResidentFile:
    """Copy tensors byte by byte into one safetensors file."""
    header = header_bytes(entries)
    digest = xxhash.xxh3_64(header)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    path = folder.path / RESIDENT_FILE
    with disk_errors(path), folder.create(RESIDENT_FILE) as file:
        write_all(file, memoryview(header))
        for entry in entries:
            for start in range(0, entry.n_bytes, CHUNK_BYTES):
                chunk = buffer[: min(CHUNK_BYTES, entry.n_bytes - start)]
                checkpoint.read_into(entry, start, chunk)
                digest.update(chunk)
                write_all(file, chunk)
                advance(len(chunk))
    return ResidentFile(
        path.name, path.stat().st_size, fingerprint(path), digest.intdigest()
    )


def copy_small_files(files: SourceFiles, folder: Folder) -> None:
    """Copy tokenizer, templates, cards: all that is neither weights nor ours."""
    for name, path in files.copied.items():
        inner, _, last = name.rpartition("/")
        with contextlib.ExitStack() as stack:
            stack.enter_context(disk_errors(folder.path / name))
            place = stack.enter_context(folder.inner(inner)) if inner else folder
            source = stack.enter_context(open_inside(path))
            file = stack.enter_context(place.create(last))
            while chunk := source.read(CHUNK_BYTES):
                write_all(file, memoryview(chunk))
        if inner:
            sync(folder.fd)


def layer_name(layer: int) -> str:
    """Return the name of the file with one layer's experts."""
    return f"experts-{layer:03d}.bin"
