"""Read safetensors files by position: header, bounds, spans of bytes."""

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

# The limit of the format's own implementation.
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
    """Return a file's tensors by name, none of them read before it is used."""
    with spelled_plainly(file.parent) as plain:
        return cast(dict[str, mx.array], mx.load(str(plain / file.name)))


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and bounds-check the header of a safetensors file.

    Returns:
        Every tensor by name, in the order of their bytes, none of which two share.

    Raises:
        ModelError: the file is unreadable or not a whole safetensors file; names the
            file and the tensor.
    """
    try:
        with open_file(path) as file:
            return parse_header(path, file)[0]
    except OSError as error:
        raise ModelError(f"[safetensors] cannot read {path}: {error}") from error


def parse_header(
    path: Path, file: BinaryIO, most_bytes: int = MAX_HEADER_BYTES
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Do as ``read_header`` with an open file; return its metadata as well.

    Raises:
        ModelError: it is not a whole safetensors file, or its header is too large.
        OSError: it cannot be read.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    header = file.read(_header_bytes(path, file.read(8), file_bytes, most_bytes))
    try:
        fields = parse_json(header)
    except ValueError as error:
        raise _malformed(path, f"a JSON header but got {error}") from error
    if not isinstance(fields, dict):
        raise _malformed(path, f"a JSON object but got {type(fields).__name__}")
    about = fields.pop("__metadata__", None) or {}
    if not isinstance(about, dict) or any(type(v) is not str for v in about.values()):
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
    return {entry.name: entry for entry in entries}, about


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
    # Products of more sizes take time that grows faster than the header.
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


def _malformed(path: Path, what: str) -> ModelError:
    return ModelError(f"[safetensors] {path}: expected {what}")


def header_bytes(
    entries: list[TensorEntry], about: Mapping[str, str] | None = None
) -> bytes:
    """Return the header of a file that holds ``entries`` one after the other.

    ``about`` is its metadata, by default mlx-lm's.
    """
    fields: dict[str, object] = {"__metadata__": about or {"format": "mlx"}}
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

    Cheap enough for every start; it tells models apart, not single flipped bits.

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
