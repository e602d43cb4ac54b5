"""Repack a checkpoint: one record per expert, everything else as it was."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import ExpertStoreError, ModelError
from ..progress import Report
from .checkpoint import Checkpoint
from .checkpoint_store import CheckpointExperts
from .layout import DEFAULT_ALIGNMENT, check_alignment
from .manifest import MANIFEST_NAME, LayerFile, Manifest
from .packed import damaged_records, is_packed
from .packed import verify as verify_pack
from .safetensors import TensorEntry
from .writer import (
    check_space,
    copy_small_files,
    disk_errors,
    locked,
    sync,
    write_layer,
    write_resident,
    write_text,
)

JOURNAL_NAME = "moeflux.partial.json"
MODEL_FILE = "moeflux_model.py"
RESIDENT_FILE = "model.safetensors"
SHIM = '''\
"""Load this packed model through moeflux-mlx; written by ``moeflux pack``."""

from moeflux_mlx.loading import pack_classes

Model, ModelArgs = pack_classes(__file__)
'''


def pack(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    verify: bool = False,
    alignment: int = DEFAULT_ALIGNMENT,
    progress: Report | None = None,
) -> Manifest:
    """Write ``dst``, a model directory whose routed experts can be streamed.

    Work happens in ``dst.partial`` beside it, which takes the name at the end; after a
    crash the same call goes on with the first unfinished layer.

    Args:
        src: checkpoint directory, its experts stacked or one by one.
        dst: directory to make; it must not exist.
        verify: read everything back before the directory takes its name.
        alignment: records are padded to a multiple of this many bytes.
        progress: called with a text, the bytes done and the bytes in all.

    Raises:
        ModelError: ``src`` is not a checkpoint of the right form.
        ExpertStoreError: ``dst`` exists, the disk is full, or ``dst.partial`` is of
            another source.
        ConfigError: ``alignment`` is not a power of two of at least 16.
    """
    source, target = Path(src), Path(dst).absolute()
    check_alignment(alignment)
    if os.path.lexists(target):
        raise ExpertStoreError(f"[pack] expected no {target} but it exists already")
    with Checkpoint.open(source) as checkpoint:
        job = _Job(checkpoint, alignment, progress or (lambda *_: None))
        partial = target.with_name(target.name + ".partial")
        with disk_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
        with disk_errors(partial), locked(partial):
            manifest = job.run(partial)
            if verify:
                verify_pack(partial, progress).raise_damage()
            if os.path.lexists(target):
                raise ExpertStoreError(f"[pack] {target} appeared during packing")
            os.rename(partial, target)
            sync(target.parent)
    return manifest


class _Job:
    """One checkpoint on its way into one directory."""

    def __init__(self, checkpoint: Checkpoint, alignment: int, progress: Report):
        if is_packed(checkpoint.directory) or "model_file" in checkpoint.config:
            raise ModelError(
                f"[pack] {checkpoint.directory}: expected a plain mlx-lm checkpoint "
                "but got one that is packed or brings its own model file"
            )
        self.checkpoint, self.alignment, self.progress = checkpoint, alignment, progress
        self.experts = CheckpointExperts(checkpoint, alignment)
        self.done_bytes = 0

    @property
    def resident_entries(self) -> list[TensorEntry]:
        tensors, routed = self.checkpoint.tensors, self.experts.tensor_names
        return [entry for name, entry in tensors.items() if name not in routed]

    @property
    def total_bytes(self) -> int:
        experts = self.experts
        strides = sum(experts.layout(layer).stride for layer in experts.layers)
        return experts.n_experts * strides + sum(
            entry.n_bytes for entry in self.resident_entries
        )

    def run(self, partial: Path) -> Manifest:
        fresh = Manifest(
            self.checkpoint.directory.absolute().name,
            self.checkpoint.identity,
            self.experts.model,
            self.alignment,
            (),
        )
        journal = partial / JOURNAL_NAME
        kept = list(self.finished_layers(partial, fresh))
        check_space(
            partial, self.total_bytes - sum(e.n_bytes for e in kept) + len(SHIM)
        )
        manifest = dataclasses.replace(fresh, layers=tuple(kept))
        # Without the old name no half-made directory can pass for a whole one.
        (partial / MANIFEST_NAME).unlink(missing_ok=True)
        write_text(journal, manifest.to_json())
        for layer in self.experts.layers:
            if layer in {entry.layer for entry in manifest.layers}:
                continue
            entry = self.write_layer(partial, layer)
            layers = sorted((*manifest.layers, entry), key=lambda e: e.layer)
            manifest = dataclasses.replace(manifest, layers=tuple(layers))
            write_text(journal, manifest.to_json())
        return self.finish(partial, manifest)

    def finished_layers(self, partial: Path, fresh: Manifest) -> Iterator[LayerFile]:
        """Yield the layers of an earlier run whose bytes still match."""
        names = [partial / JOURNAL_NAME, partial / MANIFEST_NAME]
        path = next((p for p in names if p.is_file()), None)
        if path is None:
            return
        earlier = Manifest.read(path)
        if dataclasses.replace(earlier, layers=(), resident=None) != fresh:
            raise ExpertStoreError(
                f"[pack] {partial} was begun from another source or alignment "
                f"({earlier.source_name}, {earlier.alignment}): remove it first"
            )
        for entry in earlier.layers:
            file = partial / entry.file
            if (
                entry.layer in self.experts.layers
                and entry.layout == self.experts.layout(entry.layer)
                and file.is_file()
                and file.stat().st_size == entry.n_bytes
                and not damaged_records(file, entry)
            ):
                self.advance(f"layer {entry.layer} kept", entry.n_bytes)
                yield entry

    def write_layer(self, partial: Path, layer: int) -> LayerFile:
        path, what = partial / f"experts-{layer:03d}.bin", f"layer {layer}"
        return write_layer(self.experts, layer, path, lambda n: self.advance(what, n))

    def finish(self, partial: Path, manifest: Manifest) -> Manifest:
        """Write all that is not experts, the manifest last."""
        resident = write_resident(
            self.checkpoint,
            self.resident_entries,
            partial / RESIDENT_FILE,
            lambda n: self.advance(RESIDENT_FILE, n),
        )
        copy_small_files(self.checkpoint.directory, partial)
        write_text(partial / MODEL_FILE, SHIM)
        config = {**self.checkpoint.config, "model_file": MODEL_FILE}
        write_text(partial / "config.json", json.dumps(config, indent=4))
        manifest = dataclasses.replace(manifest, resident=resident)
        write_text(partial / JOURNAL_NAME, manifest.to_json())
        os.replace(partial / JOURNAL_NAME, partial / MANIFEST_NAME)
        sync(partial)
        return manifest

    def advance(self, what: str, n_bytes: int) -> None:
        self.done_bytes += n_bytes
        self.progress(what, self.done_bytes, self.total_bytes)
