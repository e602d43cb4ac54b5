"""Pack a checkpoint: one record for each expert; everything else unchanged."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import ExpertStoreError, ModelError
from ...system.progress import Report
from .checkpoint import Checkpoint
from .folder import Folder
from .layout import DEFAULT_ALIGNMENT, check_alignment
from .manifest import MANIFEST_NAME, LayerFile, Manifest
from .model_file import MODEL_FILE, SHIM
from .pack_files import list_files
from .pack_source import ModuleSource, NamedSource, PackSource
from .packed import damaged_records, is_packed
from .packed import verify as verify_pack
from .partial import check_names, made_whole, refuse_existing, remove_templates
from .sidecars import JOURNAL_NAME, OWN_NAMES, SourceFiles, source_files
from .stock import has_own_class
from .unchanged import Unchanged
from .writer import (
    RESIDENT_FILE,
    check_space,
    copy_small_files,
    layer_name,
    write_resident,
)


def pack(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    verify: bool = False,
    alignment: int = DEFAULT_ALIGNMENT,
    progress: Report | None = None,
) -> Manifest:
    """Write ``dst``, a model directory whose routed experts can be streamed.

    The files are written to ``dst.partial``, which is renamed to ``dst`` at the end.
    After a crash the same call continues with the first unfinished layer.

    Args:
        src: checkpoint directory, in any form that the model's class takes.
        dst: directory to make; it must not exist.
        verify: read all files back before the renaming.
        alignment: records are padded to a multiple of this many bytes.
        progress: receives a text, the bytes done and the total bytes.

    Raises:
        ModelError: ``src`` is not a checkpoint that can be packed, or contains a link
            that leaves it or something other than a plain file.
        ExpertStoreError: ``dst`` exists; the disk is full; or ``dst.partial`` belongs
            to another source or contains files that no earlier run wrote.
        ConfigError: ``alignment`` is not a power of two of at least 16.
    """
    source, target = Path(src), Path(dst).absolute()
    check_alignment(alignment)
    refuse_existing(target, "pack")
    files = Unchanged(source)
    # Check the files before opening any: opening a pipe would block.
    source_files(source)
    with Checkpoint.open(source) as checkpoint:
        job = _Job(checkpoint, alignment, progress or (lambda *_: None))
        with made_whole(target, "pack") as folder:
            manifest = job.run(folder)
            if verify:
                verify_pack(folder.path, progress).raise_damage()
            files.check()
    return manifest


class _Job:
    """One run of ``pack``."""

    def __init__(self, checkpoint: Checkpoint, alignment: int, progress: Report):
        if is_packed(checkpoint.directory) or "model_file" in checkpoint.config:
            raise ModelError(
                f"[pack] {checkpoint.directory}: expected a plain mlx-lm checkpoint "
                "but got one that is packed or brings its own model file"
            )
        self.checkpoint, self.alignment, self.progress = checkpoint, alignment, progress
        own = has_own_class(checkpoint.config)
        kind = NamedSource if own else ModuleSource
        self.source: PackSource = kind(checkpoint, alignment)
        self.resident = self.source.resident
        self.total_bytes = sum(tensor.entry.n_bytes for tensor in self.resident)
        for layer in self.source.layers:
            stride = self.source.layout(layer).stride
            self.total_bytes += self.source.count(layer) * stride
        self.done_bytes = 0

    @property
    def config_text(self) -> str:
        return json.dumps({**self.source.config, "model_file": MODEL_FILE}, indent=4)

    def run(self, folder: Folder) -> Manifest:
        fresh = Manifest(
            self.checkpoint.directory.absolute().name,
            self.checkpoint.identity,
            self.source.model,
            self.alignment,
            (),
        )
        files = source_files(self.checkpoint.directory)
        names = check_names(folder, self.known_names(files))
        kept = list(self.finished_layers(folder.path, fresh))
        stale = set(names) - {JOURNAL_NAME, *(entry.file for entry in kept)}
        needed = self.total_bytes - sum(e.n_bytes for e in kept)
        needed += files.n_bytes + len(SHIM) + len(self.config_text.encode())
        # Stale files of an earlier run are removed below, which frees their space.
        check_space(folder, needed - sum(map(folder.n_bytes, stale)))
        manifest = dataclasses.replace(fresh, layers=tuple(kept))
        folder.write_text(JOURNAL_NAME, manifest.to_json())
        # A stale manifest goes too, so that no unfinished directory passes for a pack.
        for name in stale:
            folder.remove(name)
        remove_templates(folder)
        for layer in self.source.layers:
            if layer in {entry.layer for entry in manifest.layers}:
                continue
            entry = self.write_layer(folder, layer)
            layers = sorted((*manifest.layers, entry), key=lambda e: e.layer)
            manifest = dataclasses.replace(manifest, layers=tuple(layers))
            folder.write_text(JOURNAL_NAME, manifest.to_json())
        return self.finish(folder, files, manifest)

    def known_names(self, files: SourceFiles) -> set[str]:
        """Return the names of all files that a run writes, temporary ones included."""
        known = OWN_NAMES | {RESIDENT_FILE} | {*files.copied}
        known |= {layer_name(number) for number in self.source.layers}
        return known | {f"{name}.tmp" for name in OWN_NAMES}

    def finished_layers(self, partial: Path, fresh: Manifest) -> Iterator[LayerFile]:
        """Yield the layers of an earlier run whose files still match."""
        names = [partial / JOURNAL_NAME, partial / MANIFEST_NAME]
        path = next((p for p in names if p.is_file()), None)
        if path is None:
            return
        earlier = Manifest.read(path)
        if dataclasses.replace(earlier, layers=(), resident=None, files=()) != fresh:
            raise ExpertStoreError(
                f"[pack] {partial}: expected files of this source and alignment but "
                f"got those of another source or alignment ({earlier.source_name}, "
                f"{earlier.alignment}): remove it first"
            )
        for entry in earlier.layers:
            file = partial / entry.file
            if (
                entry.layer in self.source.layers
                and entry.layout == self.source.layout(entry.layer)
                and entry.block == self.source.block(entry.layer)
                and entry.names == self.source.names(entry.layer)
                and len(entry.checksums) == self.source.count(entry.layer)
                and file.is_file()
                and file.stat().st_size == entry.n_bytes
                and not damaged_records(file, entry)
            ):
                self.advance(f"layer {entry.layer} kept", entry.n_bytes)
                yield entry

    def write_layer(self, folder: Folder, layer: int) -> LayerFile:
        written = self.source.write_layer(
            layer, folder, lambda n: self.advance(f"layer {layer}", n)
        )
        block, names = self.source.block(layer), self.source.names(layer)
        return dataclasses.replace(written, block=block, names=names)

    def finish(
        self, folder: Folder, files: SourceFiles, manifest: Manifest
    ) -> Manifest:
        """Write the other files, and the manifest last."""
        resident = write_resident(
            self.resident, folder, lambda n: self.advance(RESIDENT_FILE, n)
        )
        copy_small_files(files, folder)
        folder.write_text(MODEL_FILE, SHIM)
        folder.write_text("config.json", self.config_text)
        listed = list_files(folder.path, JOURNAL_NAME, RESIDENT_FILE)
        manifest = dataclasses.replace(manifest, resident=resident, files=listed)
        folder.write_text(JOURNAL_NAME, manifest.to_json())
        folder.rename(JOURNAL_NAME, MANIFEST_NAME)
        return manifest

    def advance(self, text: str, n_bytes: int) -> None:
        self.done_bytes += n_bytes
        self.progress(text, self.done_bytes, self.total_bytes)
