"""The small files of a pack that loading reads: list them, and detect changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from ...system.files import open_file
from .manifest import MANIFEST_NAME, Manifest, SmallFile

# Suffixes of the files that mlx-lm and tokenizers read; other files, such as notes, may
# change.
READ_SUFFIXES = frozenset(
    (".json", ".jsonl", ".jinja", ".model", ".py", ".safetensors", ".tiktoken", ".txt")
)
CHUNK_BYTES = 1 << 20


def list_files(directory: Path, *but: str) -> tuple[SmallFile, ...]:
    """List every file that loading may read, except those named ``but``.

    Raises:
        OSError: a file cannot be read.
    """
    names = sorted(set(_names(directory)) - {*but})
    return tuple(SmallFile(name, *_examine(directory / name)) for name in names)


def changes(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Yield a line for each file that loading may read and that changed."""
    known = {file.file for file in manifest.files} | {MANIFEST_NAME}
    if manifest.resident is not None:
        known.add(manifest.resident.file)
    for name in sorted(set(_names(directory)) - known):
        yield f"{directory / name} does not belong to this pack: move it away"
    for file in manifest.files:
        path = directory / file.file
        try:
            n_bytes, checksum = _examine(path)
        except OSError as error:
            yield f"cannot read {path}: {error.strerror}"
            continue
        if n_bytes != file.n_bytes:
            yield f"{path}: expected {file.n_bytes} bytes as packed but got {n_bytes}"
        elif checksum != file.checksum:
            yield f"{path} was changed after packing: restore it or pack again"


def _names(directory: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(directory):
        folders[:] = [n for n in folders if n[0] != "." and n != "__pycache__"]
        for name in files:
            if name[0] != "." and Path(name).suffix.lower() in READ_SUFFIXES:
                yield (Path(folder) / name).relative_to(directory).as_posix()


def _examine(path: Path) -> tuple[int, int]:
    """Return the size and the xxh3-64 of a file."""
    digest, n_bytes = xxhash.xxh3_64(), 0
    with open_file(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            n_bytes += len(chunk)
    return n_bytes, digest.intdigest()
