"""Write the files of a packed directory, each of them crash-safe."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import xxhash

from ...errors import ExpertStoreError, ModelError
from ...system.volume import free_bytes, sync
from ..weights import DTYPE_NAMES
from .checkpoint import Checkpoint
from .checkpoint_store import TensorExperts
from .folder import Folder, write_all
from .layout import ExpertLayout
from .manifest import LayerFile, ResidentFile
from .packed import CHUNK_BYTES
from .safetensors import TensorEntry, fingerprint, header_bytes
from .sidecars import SourceFiles, open_inside

RESIDENT_FILE = "model.safetensors"
Advance = Callable[[int], None]
# Yields the bytes of one tensor (projection, part), expert by expert.
ExpertBytes = Callable[[str, str], Iterator[memoryview]]

# Types that only parameters other than experts may have.
OTHER_NAMES = {
    mx.bool_: "BOOL",
    mx.int16: "I16",
    mx.int64: "I64",
    mx.uint64: "U64",
    mx.complex64: "C64",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write; ``entry`` has its name, type, shape and number of bytes."""

    entry: TensorEntry
    chunks: Callable[[], Iterator[memoryview]]


@contextlib.contextmanager
def disk_errors(path: Path, part: str = "pack") -> Iterator[None]:
    """Turn an OSError into an ExpertStoreError that names the path."""
    try:
        yield
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = ": make room and run the same command again to continue"
        raise ExpertStoreError(
            f"[{part}] cannot write {path}: {error.strerror or error}{hint}"
        ) from error


def check_space(folder: Folder, needed_bytes: int) -> None:
    """Raise ExpertStoreError unless the disk has ``needed_bytes`` free."""
    available = free_bytes(folder.fd)
    if available is not None and available < needed_bytes:
        raise ExpertStoreError(
            f"[{folder.part}] {folder.path}: expected {needed_bytes} bytes free but "
            f"got {available} bytes: make room and run the same command again"
        )


def write_layer(
    experts: TensorExperts, layer: int, folder: Folder, advance: Advance
) -> LayerFile:
    """Write one layer's experts with one record in memory at a time."""
    layout, n_experts = experts.layout(layer), experts.count(layer)
    record = memoryview(bytearray(layout.stride))
    name, checksums = layer_name(layer), []
    with disk_errors(folder.path / name), folder.create(name) as file:
        for expert in range(n_experts):
            experts.read_record(layer, expert, record)
            checksums.append(xxhash.xxh3_64_intdigest(record[: layout.record_bytes]))
            write_all(file, record)
            advance(layout.stride)
    n_bytes = n_experts * layout.stride
    return LayerFile(layer, name, n_bytes, layout, tuple(checksums))


def write_parts(
    expert_bytes: ExpertBytes,
    layer: int,
    n_experts: int,
    layout: ExpertLayout,
    folder: Folder,
    advance: Advance,
) -> LayerFile:
    """Write one layer's experts with one tensor of all experts in memory at a time."""
    name, n_bytes = layer_name(layer), n_experts * layout.stride
    with disk_errors(folder.path / name), folder.create(name) as file:
        os.ftruncate(file.fileno(), n_bytes)
        for spec in layout.tensors:
            tensors = expert_bytes(spec.projection, spec.part)
            for expert, data in enumerate(tensors):
                write_at(file.fileno(), data, expert * layout.stride + spec.offset)
            advance(n_experts * spec.n_bytes)
        used = sum(spec.n_bytes for spec in layout.tensors)
        checksums = [
            xxhash.xxh3_64_intdigest(
                os.pread(file.fileno(), layout.record_bytes, expert * layout.stride)
            )
            for expert in range(n_experts)
        ]
        advance(n_experts * (layout.stride - used))
    return LayerFile(layer, name, n_bytes, layout, tuple(checksums))


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all bytes at an offset; continue after short writes."""
    while data:
        n_written = os.pwrite(fd, data, offset)
        data, offset = data[n_written:], offset + n_written


def write_resident(
    tensors: Sequence[Tensor], folder: Folder, advance: Advance
) -> ResidentFile:
    """Write tensors one after the other into one safetensors file."""
    header = header_bytes([tensor.entry for tensor in tensors])
    digest = xxhash.xxh3_64(header)
    path = folder.path / RESIDENT_FILE
    with disk_errors(path), folder.create(RESIDENT_FILE) as file:
        write_all(file, memoryview(header))
        for tensor in tensors:
            for chunk in tensor.chunks():
                digest.update(chunk)
                write_all(file, chunk)
                advance(len(chunk))
    return ResidentFile(
        path.name, path.stat().st_size, fingerprint(path), digest.intdigest()
    )


def chunks_of_file(checkpoint: Checkpoint, entry: TensorEntry) -> Iterator[memoryview]:
    """Yield the bytes of a tensor from its file."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.n_bytes)))
    for start in range(0, entry.n_bytes, CHUNK_BYTES):
        chunk = buffer[: min(CHUNK_BYTES, entry.n_bytes - start)]
        checkpoint.read_into(entry, start, chunk)
        yield chunk


def chunks_of_array(array: mx.array) -> Iterator[memoryview]:
    """Yield the bytes of an array, some rows at a time.

    The uint8 view of a whole array could be longer than MLX can count, 2**31.
    """
    n_rows = len(array) if array.ndim else 1
    step = max(1, n_rows * CHUNK_BYTES // max(1, array.nbytes))
    for start in range(0, n_rows, step):
        rows = array[start : start + step] if array.ndim else array
        flat = mx.contiguous(rows).reshape(-1).view(mx.uint8)
        mx.eval(flat)
        yield memoryview(flat)  # type: ignore[arg-type]


def entry_of(name: str, array: mx.array, where: str) -> TensorEntry:
    """Return an array's entry for a file; errors begin with ``where``.

    Raises:
        ModelError: safetensors has no such type.
    """
    dtype = DTYPE_NAMES.get(array.dtype) or OTHER_NAMES.get(array.dtype)
    if dtype is None:
        raise ModelError(
            f"{where}{name}: expected a type of safetensors but got {array.dtype}"
        )
    return TensorEntry(Path(), name, dtype, tuple(array.shape), 0, array.nbytes)


def copy_small_files(files: SourceFiles, folder: Folder) -> None:
    """Copy the files that are neither weights nor written by packing."""
    for name, path in files.copied.items():
        inner, _, last = name.rpartition("/")
        with contextlib.ExitStack() as stack:
            stack.enter_context(disk_errors(folder.path / name, folder.part))
            place = stack.enter_context(folder.inner(inner)) if inner else folder
            source = stack.enter_context(open_inside(path))
            file = stack.enter_context(place.create(last))
            while chunk := source.read(CHUNK_BYTES):
                write_all(file, memoryview(chunk))
        if inner:
            sync(folder.fd)


def layer_name(layer: int) -> str:
    """Return the name of a layer's expert file."""
    return f"experts-{layer:03d}.bin"
