"""Open, check and verify a packed model directory."""

from __future__ import annotations

import dataclasses
import os
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ...errors import ExpertStoreError, ModelError
from ...system.files import open_file, short
from ...system.progress import Report
from ...system.uncopied import Uncopied
from .checkpoint import ModelFacts, model_facts, read_config
from .checkpoint_store import check_sizes
from .direct import are_aligned, bypass_cache
from .layout import BIAS, PARTS, ExpertLayout
from .manifest import MANIFEST_NAME, LayerFile, Manifest, ResidentFile
from .model_file import check_model_file
from .pack_files import changes
from .routed import ROUTED, ExpertTensors, RoutedLayer, check_rows
from .safetensors import TensorEntry, fingerprint
from .spans import Span, close_files
from .stock import has_own_class

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

CHUNK_BYTES = 8 * 1024 * 1024


def is_packed(directory: str | os.PathLike) -> bool:
    """Return whether ``moeflux pack`` made a directory."""
    return (Path(directory) / MANIFEST_NAME).is_file()


class PackedExperts(Uncopied):
    """The open expert files of a packed directory; a context manager.

    The record of expert ``e`` is ``layout(layer).record_bytes`` bytes long and begins
    at ``offset(layer, e)`` of the file ``fd(layer)``.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self._files = {entry.layer: entry for entry in manifest.layers}
        self._paths = {entry.layer: directory / entry.file for entry in manifest.layers}
        self._fds: dict[int, int] = {}
        # Models are usually dropped without a call of ``close``.
        weakref.finalize(self, close_files, self._fds)
        self._direct = False

    @classmethod
    def open(cls, directory: str | os.PathLike, *, direct: bool = False) -> Self:
        """Open a pack after all checks that do not read the experts.

        Args:
            directory: a directory that ``moeflux pack`` made.
            direct: bypass the page cache; where the system cannot, warn.

        Raises:
            ExpertStoreError: the version is wrong; a file is missing, unreadable,
                changed or unknown; a layout fits no experts; or the weights and the
                configuration are of different models.
            ModelError: not a model directory.
        """
        store = cls._open(Path(directory), direct)
        try:
            for change in changes(store.directory, store.manifest):
                raise ExpertStoreError(f"[pack] {change}")
            check_model_file(store.directory)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def _open(cls, directory: Path, direct: bool = False) -> Self:
        """Open a pack without checking the small files for changes."""
        config = read_config(directory)
        manifest = Manifest.read(directory / MANIFEST_NAME)
        _check_model(directory, config, manifest)
        if not manifest.is_of_blocks or has_own_class(config):
            _check_layouts(directory, config, manifest)
        store = cls(directory, manifest)
        try:
            for entry in manifest.layers:
                store._fds[entry.layer] = _open_file(directory, entry)
            if direct:
                aligned = are_aligned([entry.layout for entry in manifest.layers])
                fds = store._fds.values()
                store._direct = bypass_cache(fds, directory, aligned=aligned)
        except BaseException:
            store.close()
            raise
        return store

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have routed experts, ascending."""
        return tuple(sorted(self._files))

    @property
    def n_experts(self) -> int:
        """Number of routed experts of the layer with the most."""
        return self.manifest.model.n_experts

    @property
    def top_k(self) -> int:
        """Number of experts that one token uses in one layer; 0 if unknown."""
        return self.manifest.model.top_k

    def count(self, layer: int) -> int:
        """Return the number of experts of a layer."""
        return len(self._files[layer].checksums)

    def name(self, layer: int) -> str:
        """Return a layer's name for errors."""
        return self._files[layer].block or f"layer {layer}"

    @property
    def tensor_names(self) -> frozenset[str]:
        """Empty: a pack's weight file has no experts."""
        return frozenset()

    @property
    def expert_bytes(self) -> int:
        """Bytes of all expert files."""
        return sum(entry.n_bytes for entry in self.manifest.layers)

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of one layer's records."""
        return self._files[layer].layout

    def path(self, layer: int) -> Path:
        """Return the file that holds one layer's experts."""
        return self._paths[layer]

    def fd(self, layer: int) -> int:
        """Return the open descriptor of one layer's expert file."""
        return self._fds[layer]

    def offset(self, layer: int, expert: int) -> int:
        """Return the first byte of an expert's record in its file."""
        return expert * self._files[layer].layout.stride

    def spans(self, layer: int, expert: int) -> tuple[Span, ...]:
        """Return the read that fills an expert's record.

        A direct read takes the padding too, so that it ends at a disk block.
        """
        layout = self.layout(layer)
        pieces = ((0, layout.stride if self._direct else layout.record_bytes),)
        offset = self.offset(layer, expert)
        return (Span(self._fds[layer], self._paths[layer], offset, pieces),)

    def checksum(self, layer: int, expert: int) -> int:
        """Return the xxh3-64 of an expert's record, without padding."""
        return self._files[layer].checksums[expert]

    def close(self) -> None:
        """Close the files."""
        close_files(self._fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check_model(directory: Path, config: dict, manifest: Manifest) -> None:
    if manifest.resident is None:
        raise ExpertStoreError(
            f"[pack] {directory}: expected a complete pack but packing did not finish: "
            "pack the model again"
        )
    try:
        facts = _facts(config, manifest)
        found = fingerprint(directory / manifest.resident.file)
    except ModelError as error:
        raise ExpertStoreError(f"[pack] {directory}: {error}") from error
    if facts != manifest.model:
        raise ExpertStoreError(
            f"[pack] {directory / 'config.json'}: expected the configuration of "
            f"{short(manifest.model)} but got {short(facts)}: the experts belong to "
            "another model; pack it again"
        )
    if found != manifest.resident.fingerprint:
        raise ExpertStoreError(
            f"[pack] {directory / manifest.resident.file}: expected the weights "
            f"{manifest.resident.fingerprint} but got {found}: they are damaged or "
            "belong to another model; pack it again"
        )


def _facts(config: dict, manifest: Manifest) -> ModelFacts:
    """Return a configuration's facts, to compare with the manifest's."""
    if not manifest.is_of_blocks:
        return model_facts(config)
    model_type = str(config.get("model_type"))
    if has_own_class(config) and not all(map(_is_numbered, manifest.layers)):
        raise ModelError(
            f"expected layers by number, as moeflux-mlx's class of {model_type} reads "
            "them, but got routed blocks by path: pack the model again"
        )
    # The configuration is not read here: mlx-lm builds the blocks, and ``PackedBlocks``
    # compares them.
    return dataclasses.replace(manifest.model, model_type=model_type)


def _is_numbered(entry: LayerFile) -> bool:
    """Return whether a block's number is its layer's number."""
    return f".layers.{entry.layer}." in entry.block


def _check_layouts(directory: Path, config: dict, manifest: Manifest) -> None:
    """Raise ExpertStoreError unless a plain checkpoint would give the same layouts."""
    for entry in manifest.layers:
        layer = _as_routed(directory, entry, config)
        try:
            for spec in entry.layout.tensors:
                rank = 1 if spec.part == BIAS else 2
                if len(spec.shape) != rank or spec.part not in (*PARTS, BIAS):
                    raise ModelError(
                        f"[layout] expected rows and columns of one of {PARTS}, or "
                        f"rows of {BIAS!r}, but got {short(spec)}"
                    )
            check_rows(layer)
            expected = layer.layout(config, entry.layout.alignment)
            check_sizes(config, layer, expected)
        except ModelError as error:
            raise ExpertStoreError(
                f"[pack] {directory / MANIFEST_NAME}, layer {entry.layer}: {error}"
            ) from error
        if expected != entry.layout:
            raise ExpertStoreError(
                f"[pack] {directory / MANIFEST_NAME}, layer {entry.layer}: expected "
                f"{expected.quantization} as the shapes show but got "
                f"{short(entry.layout.quantization)}: pack the model again"
            )


def _as_routed(directory: Path, entry: LayerFile, config: dict) -> RoutedLayer:
    """Return a layer's experts in the form of a checkpoint's tensors."""
    layout, n_experts = entry.layout, len(entry.checksums)
    table = config.get("quantization") or config.get("quantization_config")
    names = table if isinstance(table, dict) else {}
    matches = (ROUTED.fullmatch(name) for name in names)
    paths = (m["path"] for m in matches if m and m["layer"] == str(entry.layer))
    path = next(paths, f"model.layers.{entry.layer}.mlp.switch_mlp")
    tensors = {}
    for spec in layout.tensors:
        name = f"{path}.{spec.projection}.{spec.part}"
        file, offset, shape = directory / entry.file, spec.offset, spec.shape
        tensor = TensorEntry(file, name, spec.dtype, shape, offset, spec.n_bytes)
        tensors[spec.projection, spec.part] = ExpertTensors(
            (tensor,), n_experts, shape, offset, layout.stride
        )
    return RoutedLayer(entry.layer, path, tensors)


def _open_file(directory: Path, entry: LayerFile) -> int:
    path = directory / entry.file
    try:
        with open_file(path) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes == entry.n_bytes:
                return os.dup(file.fileno())
    except OSError as error:
        raise ExpertStoreError(
            f"[pack] cannot open {path} of layer {entry.layer}: {error.strerror}"
        ) from error
    raise ExpertStoreError(
        f"[pack] {path} of layer {entry.layer}: expected {entry.n_bytes} bytes but got "
        f"{n_bytes}"
    )


@dataclass
class VerifyReport:
    """The result of ``verify``; ``damaged`` lists ``(file, layer, expert)``.

    ``changes`` describes each small file that changed after packing.
    """

    layers: list[LayerFile] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    damaged: list[tuple[Path, int | None, int | None]] = field(default_factory=list)

    def raise_damage(self) -> None:
        """Raise ExpertStoreError for the first problem, if any."""
        for problem in self.problems:
            raise ExpertStoreError(f"[verify] {problem}")

    @property
    def problems(self) -> list[str]:
        """All problems, one line each."""
        return [*(describe_damage(*place) for place in self.damaged), *self.changes]


def describe_damage(path: Path, layer: int | None, expert: int | None) -> str:
    """Return the line for a file, or an expert, that does not match its checksum."""
    if layer is None:
        return f"{path} does not match its checksum"
    return f"{path}: expert {expert} of layer {layer} does not match its checksum"


def verify(
    directory: str | os.PathLike, progress: Report | None = None
) -> VerifyReport:
    """Read every file of a pack and compare all checksums.

    Raises:
        ExpertStoreError: the pack cannot be opened or read.
        ModelError: not a model directory.
    """
    report = VerifyReport()
    with PackedExperts._open(Path(directory)) as store:
        report.changes += changes(store.directory, store.manifest)
        if not report.changes:
            # An attacker who replaced the file may have updated the manifest too.
            check_model_file(store.directory)
        resident = store.manifest.resident
        assert resident is not None
        total = store.expert_bytes + resident.n_bytes
        done = 0
        for entry in store.manifest.layers:
            for expert in damaged_records(store.path(entry.layer), entry):
                report.damaged.append((store.path(entry.layer), entry.layer, expert))
            report.layers.append(entry)
            done += entry.n_bytes
            if progress:
                progress(f"layer {entry.layer}", done, total)
        if not resident_matches(store.directory / resident.file, resident):
            report.damaged.append((store.directory / resident.file, None, None))
        if progress:
            progress(resident.file, total, total)
    return report


def damaged_records(path: Path, entry: LayerFile) -> list[int]:
    """Return the experts of a file that do not match their checksums."""
    record_bytes, stride = entry.layout.record_bytes, entry.layout.stride
    damaged = []
    try:
        with open_file(path) as file:
            for expert, checksum in enumerate(entry.checksums):
                record = file.read(stride)
                found = xxhash.xxh3_64_intdigest(record[:record_bytes])
                if len(record) != stride or found != checksum:
                    damaged.append(expert)
    except OSError as error:
        raise ExpertStoreError(
            f"[verify] cannot read {path} of layer {entry.layer}: {error}"
        ) from error
    return damaged


def resident_matches(path: Path, resident: ResidentFile) -> bool:
    """Return whether the weight file matches its checksum."""
    digest = xxhash.xxh3_64()
    try:
        with open_file(path) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ExpertStoreError(f"[verify] cannot read {path}: {error}") from error
    return digest.intdigest() == resident.checksum
