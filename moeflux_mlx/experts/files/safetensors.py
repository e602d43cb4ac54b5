"""Read safetensors headers: each tensor's type, shape and checked position."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, cast

import mlx.core as mx
import xxhash

from ...errors import ModelError
from ...system.files import open_file, parse_json, short, spelled_plainly

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}

# The limit of the safetensors library.
MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 16
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 64, 4096


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file; ``offset`` counts from the file's start."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def load_arrays(file: Path) -> dict[str, mx.array]:
    """Return a file's tensors by name; MLX reads each on its first use."""
    with spelled_plainly(file.parent) as plain:
        return cast(dict[str, mx.array], mx.load(str(plain / file.name)))


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse the header of a safetensors file, and check all bounds.

    Returns:
        Every tensor by name, in file order; no two tensors overlap.

    Raises:
        ModelError: the file is unreadable, truncated or not a safetensors file; names
            the file and the tensor.
    """
    try:
        with open_file(path) as file:
            return parse_header(path, file)[0]
    except OSError as error:
        raise ModelError(f"[safetensors] cannot read {path}: {error}") from error


def parse_header(
    path: Path, file: BinaryIO, most_bytes: int = MAX_HEADER_BYTES
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Parse the header of an open file as ``read_header``; also return its metadata.

    Raises:
        ModelError: the file is truncated or not a safetensors file, or its header is
            longer than ``most_bytes``.
        OSError: the file cannot be read.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    header = file.read(_header_bytes(path, file.read(8), file_bytes, most_bytes))
    try:
        fields = parse_json(header)
    except ValueError as error:
        raise _malformed(path, f"a JSON header but got {error}") from error
    if not isinstance(fields, dict):
        raise _malformed(path, f"a JSON object but got {type(fields).__name__}")
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or any(
        type(value) is not str for value in metadata.values()
    ):
        raise _malformed(path, "metadata of strings")
    data_start = 8 + len(header)
    entries = [
        _entry(path, name, field, data_start, file_bytes)
        for name, field in fields.items()
    ]
    entries.sort(key=lambda entry: (entry.offset, entry.n_bytes))
    for before, entry in pairwise(entries):
        if entry.offset < before.offset + before.n_bytes:
            names = f"{short(before.name)} and {short(entry.name)}"
            raise _malformed(path, f"{names} in bytes of their own")
    return {entry.name: entry for entry in entries}, metadata


def _header_bytes(
    path: Path, prefix: bytes, file_bytes: int, most_bytes: int = MAX_HEADER_BYTES
) -> int:
    if len(prefix) < 8:
        raise _malformed(path, f"at least 8 bytes but got {file_bytes}")
    (n_bytes,) = struct.unpack("<Q", prefix)
    if n_bytes > min(most_bytes, file_bytes - 8):
        raise _malformed(
            path,
            f"a header inside its {file_bytes} bytes, of at most {most_bytes}, but got "
            f"{n_bytes} bytes",
        )
    return int(n_bytes)


def _entry(
    path: Path, name: str, field: object, data_start: int, file_bytes: int
) -> TensorEntry:
    match field:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "data_offsets": [int(begin), int(end)],
        } if all(type(n) is int and n >= 0 for n in [*shape, begin, end]):
            pass
        case _:
            raise _malformed(path, f"dtype, shape and offsets of {short(name)}")
    if dtype not in DTYPE_BYTES:
        raise _malformed(path, f"a known type of {short(name)} but got {short(dtype)}")
    # A hostile shape of many large sizes would make their product very slow.
    if len(shape) > MAX_RANK:
        raise _malformed(
            path, f"at most {MAX_RANK} axes of {short(name)} but got {len(shape)}"
        )
    n_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != n_bytes:
        raise _malformed(
            path,
            f"{n_bytes} bytes of {short(name)} ({dtype} {shape}) but got {end - begin}",
        )
    if data_start + end > file_bytes:
        raise _malformed(
            path,
            f"{short(name)} to end inside its {file_bytes} bytes but got "
            f"{data_start + end}: the file is truncated",
        )
    return TensorEntry(path, name, dtype, tuple(shape), data_start + begin, n_bytes)


def _malformed(path: Path, expected: str) -> ModelError:
    return ModelError(f"[safetensors] {path}: expected {expected}")


def header_bytes(
    entries: list[TensorEntry], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the header of a file that holds ``entries`` one after the other.

    ``metadata`` is by default the same as mlx-lm's.
    """
    fields: dict[str, object] = {"__metadata__": metadata or {"format": "mlx"}}
    begin = 0
    for entry in entries:
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, begin + entry.n_bytes],
        }
        begin += entry.n_bytes
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def fingerprint(path: Path) -> str:
    """Hash the size, the header and 64 evenly spaced 4 KiB blocks of a file.

    The hash is fast enough for every start. It tells models apart, but it does not
    detect every flipped bit.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        with open_file(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            digest = xxhash.xxh3_64(struct.pack("<Q", file_bytes) + prefix)
            digest.update(file.read(_header_bytes(path, prefix, file_bytes)))
            last = max(0, file_bytes - FINGERPRINT_BLOCK_BYTES)
            for block in range(FINGERPRINT_BLOCKS):
                file.seek(last * block // (FINGERPRINT_BLOCKS - 1))
                digest.update(file.read(FINGERPRINT_BLOCK_BYTES))
    except OSError as error:
        raise ModelError(f"[safetensors] cannot read {path}: {error}") from error
    return digest.hexdigest()
