"""Unpack: write a pack back as a plain checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...errors import ExpertStoreError, ModelError
from ...system.files import open_file
from ...system.progress import Report
from .checkpoint import INDEX_NAME, read_config
from .folder import Folder
from .manifest import LayerFile, Manifest, ResidentFile
from .packed import (
    CHUNK_BYTES,
    PackedExperts,
    describe_damage,
    is_packed,
    resident_matches,
)
from .partial import check_names, made_whole, refuse_existing, remove_templates
from .plain import SHARD_BYTES, PlainLayer, Plan, Records
from .safetensors import TensorEntry, read_header
from .sidecars import SourceFiles, source_files
from .unchanged import Unchanged
from .writer import Tensor, check_space, copy_small_files


def unpack(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    progress: Report | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``dst``, a plain checkpoint with the tensors from which ``src`` was packed.

    The tensors have the same names, types and bytes as in the packed checkpoint. If
    packing used mlx-lm's ``sanitize``, they have those that mlx-lm's converter writes.

    The files are written to ``dst.partial``, which is renamed to ``dst`` at the end and
    removed after an error. After a crash the same call removes the remains.

    Args:
        src: a directory that ``moeflux pack`` made.
        dst: directory to make; it must not exist.
        progress: receives a text, the bytes done and the total bytes.
        shard_bytes: most bytes of a file; a longer tensor gets a file of its own.

    Raises:
        ModelError: ``src`` is not a packed directory.
        ExpertStoreError: a file of the pack is missing, damaged or changed; the pack
            has no names of its tensors; ``dst`` exists; the disk is full; or
            ``dst.partial`` contains files that no earlier run wrote.
    """
    source, target = Path(src), Path(dst).absolute()
    refuse_existing(target, "unpack")
    if not is_packed(source):
        raise ModelError(
            f"[unpack] expected a directory that moeflux pack made but got {source}"
        )
    before, files = Unchanged(source), source_files(source)
    with PackedExperts.open(source) as store:
        plan = Plan.make(
            [*_resident(store)],
            [_plain(store.manifest, entry) for entry in store.manifest.layers],
            shard_bytes,
        )
        _check_resident(source, store.manifest.resident)
        job = _Job(store, plan, files, progress or (lambda *_: None))
        with made_whole(target, "unpack") as folder:
            job.run(folder)
            before.check()


class _Job:
    """One run of ``unpack``."""

    def __init__(
        self, store: PackedExperts, plan: Plan, files: SourceFiles, progress: Report
    ):
        self._store, self._plan, self._files = store, plan, files
        self._progress, self._done_bytes = progress, 0

    def run(self, folder: Folder) -> None:
        known = {*self._plan.files, "config.json", INDEX_NAME, *self._files.copied}
        names = check_names(folder, known | {f"{name}.tmp" for name in known})
        _empty(folder, names)
        check_space(folder, self._plan.n_bytes + self._files.n_bytes)
        try:
            copy_small_files(self._files, folder)
            self._plan.write(Records(self._store), folder, self._advance)
            config = read_config(self._store.directory)
            del config["model_file"]
            folder.write_text("config.json", json.dumps(config, indent=4))
        except BaseException:
            _empty(folder, [*known])
            os.rmdir(folder.path)
            raise

    def _advance(self, n_bytes: int) -> None:
        self._done_bytes += n_bytes
        self._progress("unpacking", self._done_bytes, self._plan.n_bytes)


def _empty(folder: Folder, names: list[str]) -> None:
    for name in names:
        if "/" not in name:
            folder.remove(name)
            folder.remove(f"{name}.tmp")
    remove_templates(folder)


def _plain(manifest: Manifest, entry: LayerFile) -> PlainLayer:
    """Return a layer with its tensors' names, which the pack states or implies."""
    specs, names = entry.layout.tensors, entry.names
    if entry.block:
        names = tuple(f"{entry.block}.{s.projection}.{s.part}" for s in specs)
    if not names:
        raise ExpertStoreError(
            f"[unpack] layer {entry.layer} of {manifest.source_name}: expected the "
            "names of its tensors but the pack has none: use mlx_lm.convert "
            "--trust-remote-code, which writes mlx-lm's names"
        )
    return PlainLayer(entry.layer, len(entry.checksums), entry.layout, names)


def _resident(store: PackedExperts) -> Iterator[Tensor]:
    assert store.manifest.resident is not None
    path = store.directory / store.manifest.resident.file
    for entry in read_header(path).values():
        yield Tensor(entry, partial(_chunks, entry))


def _chunks(entry: TensorEntry) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.n_bytes)))
    with open_file(entry.file) as file:
        file.seek(entry.offset)
        for start in range(0, entry.n_bytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, entry.n_bytes - start)]
            if file.readinto(chunk) != len(chunk):  # type: ignore[attr-defined]
                raise ExpertStoreError(
                    f"[unpack] {entry.file}: expected {entry.n_bytes} bytes of "
                    f"{entry.name!r} but the file ends early"
                )
            yield chunk


def _check_resident(directory: Path, resident: ResidentFile | None) -> None:
    assert resident is not None
    path = directory / resident.file
    if not resident_matches(path, resident):
        raise ExpertStoreError(f"[unpack] {describe_damage(path, None, None)}")
