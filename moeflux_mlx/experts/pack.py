"""Repack a checkpoint: one record per expert, everything else as it was."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import ExpertStoreError, ModelError
from .checkpoint import Checkpoint, ModelFacts, model_facts
from .layout import DEFAULT_ALIGNMENT, ExpertLayout, check_alignment
from .manifest import MANIFEST_NAME, LayerFile, Manifest
from .packed import Progress, damaged_records, is_packed
from .packed import verify as verify_pack
from .routed import RoutedLayer, routed_layers
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
    progress: Progress | None = None,
) -> Manifest:
    """Write ``dst``, a model directory whose routed experts can be streamed.

    Work happens in ``dst.partial`` beside it, which takes the name at the end; after a
    crash the same call goes on with the first unfinished layer.

    Args:
        src: mlx-lm checkpoint directory with stacked experts.
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

    def __init__(self, checkpoint: Checkpoint, alignment: int, progress: Progress):
        if is_packed(checkpoint.directory) or "model_file" in checkpoint.config:
            raise ModelError(
                f"[pack] {checkpoint.directory}: expected a plain mlx-lm checkpoint "
                "but got one that is packed or brings its own model file"
            )
        self.checkpoint, self.alignment, self.progress = checkpoint, alignment, progress
        self.routed = routed_layers(checkpoint.tensors)
        self.facts = _checked_facts(checkpoint, self.routed)
        self.layouts = {
            number: layer.layout(checkpoint.config, alignment)
            for number, layer in self.routed.items()
        }
        self.done_bytes = 0

    @property
    def resident_entries(self) -> list[TensorEntry]:
        routed = {t.name for r in self.routed.values() for t in r.tensors.values()}
        return [t for t in self.checkpoint.tensors.values() if t.name not in routed]

    @property
    def total_bytes(self) -> int:
        experts = sum(s.stride for s in self.layouts.values()) * self.facts.n_experts
        return experts + sum(entry.n_bytes for entry in self.resident_entries)

    def run(self, partial: Path) -> Manifest:
        fresh = Manifest(
            self.checkpoint.directory.absolute().name,
            self.checkpoint.identity,
            self.facts,
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
        for number, layer in self.routed.items():
            if number in {entry.layer for entry in manifest.layers}:
                continue
            entry = self.write_layer(partial, layer, self.layouts[number])
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
                entry.layout == self.layouts.get(entry.layer)
                and file.is_file()
                and file.stat().st_size == entry.n_bytes
                and not damaged_records(file, entry)
            ):
                self.advance(f"layer {entry.layer} kept", entry.n_bytes)
                yield entry

    def write_layer(
        self, partial: Path, layer: RoutedLayer, layout: ExpertLayout
    ) -> LayerFile:
        path = partial / f"experts-{layer.layer:03d}.bin"
        what = f"layer {layer.layer}"
        return write_layer(
            self.checkpoint, layer, layout, path, lambda n: self.advance(what, n)
        )

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


def _checked_facts(
    checkpoint: Checkpoint, routed: dict[int, RoutedLayer]
) -> ModelFacts:
    facts = model_facts(checkpoint.config)
    for layer in routed.values():
        if layer.n_experts != facts.n_experts:
            raise ModelError(
                f"[pack] {layer.path}: expected {facts.n_experts} experts as in "
                f"config.json but got {layer.n_experts}"
            )
        if layer.layer >= facts.n_layers:
            raise ModelError(
                f"[pack] {layer.path}: expected fewer than {facts.n_layers} layers"
            )
    if facts.top_k > facts.n_experts:
        raise ModelError(
            f"[pack] expected at most {facts.n_experts} experts per token but got "
            f"{facts.top_k}"
        )
    return facts
