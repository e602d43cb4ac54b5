"""Write a plain checkpoint: tensors by name, experts record by record.

Every tensor's place follows from names and shapes alone. So each record is read once,
held against its checksum, and its parts are written where they belong.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ExpertStoreError
from .checkpoint import INDEX_NAME
from .folder import Folder, write_all
from .layout import ExpertLayout, TensorSpec
from .reader import Batch, HostPlace, Read
from .routed import RoutedLayer
from .safetensors import DTYPE_BYTES, TensorEntry, header_bytes
from .store import ExpertStore
from .writer import Advance, Tensor, disk_errors, write_at

# As mlx-lm's.
SHARD_BYTES = 5 << 30
# Stands for the number of an expert in the name of a tensor that each has for itself.
NUMBER = "{}"
# Returns the record of an expert of a layer.
ReadRecord = Callable[[int, int], memoryview]


@dataclass(frozen=True)
class PlainLayer:
    """A layer's experts, and the names that their tensors are to have.

    ``names`` has one for each tensor of the layout. Projections of the same name are
    rows of one tensor, in the layout's order.
    """

    layer: int
    n_experts: int
    layout: ExpertLayout
    names: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all the tensors."""
        return self.n_experts * sum(spec.n_bytes for spec in self.layout.tensors)

    def tensors(self) -> Iterator[TensorEntry]:
        """Yield the tensors in the order in which they are written.

        Raises:
            ExpertStoreError: rows of one tensor do not fit each other.
        """
        for name, specs in self._groups():
            first = specs[0]
            rest = {(spec.dtype, spec.shape[1:]) for spec in specs}
            if len(rest) > 1 or not first.shape:
                raise ExpertStoreError(
                    f"[unpack] {name!r}: expected rows of one length and type but got "
                    f"{[(spec.dtype, list(spec.shape)) for spec in specs]}"
                )
            shape = (sum(spec.shape[0] for spec in specs), *first.shape[1:])
            if NUMBER not in name:
                yield _entry(name, first.dtype, (self.n_experts, *shape))
                continue
            for expert in range(self.n_experts):
                own = name.replace(NUMBER, str(expert))
                yield _entry(own, first.dtype, shape)

    def pieces(self, expert: int) -> Iterator[tuple[TensorSpec, str, int]]:
        """Yield each part of an expert, its tensor's name and where in it it begins."""
        for name, specs in self._groups():
            own = name.replace(NUMBER, str(expert))
            n_rows_bytes = sum(spec.n_bytes for spec in specs)
            start = 0 if NUMBER in name else expert * n_rows_bytes
            for spec in specs:
                yield spec, own, start
                start += spec.n_bytes

    def _groups(self) -> list[tuple[str, list[TensorSpec]]]:
        found: dict[str, list[TensorSpec]] = {}
        for name, spec in zip(self.names, self.layout.tensors, strict=True):
            found.setdefault(name, []).append(spec)
        return [*found.items()]


def names_of(layer: RoutedLayer, layout: ExpertLayout) -> tuple[str, ...]:
    """Return the names that a checkpoint has for a layer's tensors.

    None at all where experts are not numbered as usual, so that no name would say it.
    """
    names = []
    for spec in layout.tensors:
        tensors = layer.tensors[spec.projection, spec.part]
        name = tensors.entries[0].name
        if not tensors.stride:
            name = name.replace(f"{layer.path}.0.", f"{layer.path}.{NUMBER}.", 1)
        own = [name.replace(NUMBER, str(e)) for e in range(len(tensors.entries))]
        if own != [entry.name for entry in tensors.entries]:
            return ()
        names.append(name)
    return tuple(names)


@dataclass(frozen=True)
class Plan:
    """Which tensors go into which file; ``files`` has each file's name and tensors."""

    resident: Sequence[Tensor]
    layers: Sequence[PlainLayer]
    files: dict[str, list[TensorEntry]]

    @classmethod
    def make(
        cls,
        resident: Sequence[Tensor],
        layers: Sequence[PlainLayer],
        shard_bytes: int | None = SHARD_BYTES,
    ) -> Plan:
        """Deal tensors out to files of ``shard_bytes`` at most, or of one tensor.

        None of them: all go into one file.

        Raises:
            ExpertStoreError: two tensors have one name.
        """
        shards: list[list[TensorEntry]] = [[]]
        names: set[str] = set()
        n_bytes = 0
        entries = [tensor.entry for tensor in resident]
        entries += [entry for layer in layers for entry in layer.tensors()]
        for entry in entries:
            if entry.name in names:
                raise ExpertStoreError(
                    f"[unpack] expected tensors of names of their own but got two of "
                    f"{entry.name!r}"
                )
            names.add(entry.name)
            most = n_bytes + entry.n_bytes if shard_bytes is None else shard_bytes
            if shards[-1] and n_bytes + entry.n_bytes > most:
                shards.append([])
                n_bytes = 0
            shards[-1].append(entry)
            n_bytes += entry.n_bytes
        return cls(
            resident, layers, dict(zip(_names(len(shards)), shards, strict=True))
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.n_bytes for entries in self.files.values() for e in entries)

    @property
    def index(self) -> str:
        """The text of the index beside the files."""
        files = {e.name: file for file, entries in self.files.items() for e in entries}
        fields = {
            "metadata": {"total_size": self.n_bytes},
            "weight_map": dict(sorted(files.items())),
        }
        return json.dumps(fields, indent=4)

    def write(self, read: ReadRecord, folder: Folder, advance: Advance) -> None:
        """Write the files and their index, holding one record in memory.

        Args:
            read: returns an expert's record, whose bytes count until the next call.
            advance: hears how many bytes were written.

        Raises:
            ExpertStoreError: a record cannot be read or is damaged; the disk is full.
        """
        with contextlib.ExitStack() as files:
            write = self._open(folder, files)
            for tensor in self.resident:
                start = 0
                for chunk in tensor.chunks():
                    write(tensor.entry.name, start, chunk)
                    start += len(chunk)
                    advance(len(chunk))
            for layer in self.layers:
                for expert in range(layer.n_experts):
                    record = read(layer.layer, expert)
                    for spec, name, start in layer.pieces(expert):
                        end = spec.offset + spec.n_bytes
                        write(name, start, record[spec.offset : end])
                    advance(layer.n_bytes // layer.n_experts)
        folder.write_text(INDEX_NAME, self.index)

    def _open(
        self, folder: Folder, files: contextlib.ExitStack
    ) -> Callable[[str, int, memoryview], None]:
        """Make the files; return the writer of bytes from a place in a tensor on."""
        places: dict[str, tuple[int, Path, int]] = {}
        for file, entries in self.files.items():
            path = folder.path / file
            files.enter_context(disk_errors(path, folder.part))
            opened = files.enter_context(folder.create(file))
            header = header_bytes(entries)
            write_all(opened, memoryview(header))
            begin = len(header)
            for entry in entries:
                places[entry.name] = opened.fileno(), path, begin
                begin += entry.n_bytes
            # Its length is right before its last tensor is.
            opened.truncate(begin)

        def write(name: str, start: int, data: memoryview) -> None:
            fd, path, begin = places[name]
            with disk_errors(path, folder.part):
                write_at(fd, data, begin + start)

        return write


class Records:
    """Reads the records of a store one after the other, each against its checksum."""

    def __init__(self, store: ExpertStore):
        self._store = store
        strides = [store.layout(layer).stride for layer in store.layers]
        # Direct reads go to whole pages only.
        self._buffer = memoryview(mmap.mmap(-1, max(strides)))

    def __call__(self, layer: int, expert: int) -> memoryview:
        """Return an expert's record; the next call overwrites it.

        Raises:
            ExpertStoreError: it cannot be read, or does not match its checksum.
        """
        store, layout = self._store, self._store.layout(layer)
        read = Read(
            store.spans(layer, expert),
            HostPlace(self._buffer[: layout.stride]),
            layer,
            expert,
            store.checksum(layer, expert),
            layout.stride - layout.record_bytes,
            store.name(layer),
        )
        Batch([read]).run_here()
        if read.error is not None:
            raise read.error
        return self._buffer[: layout.record_bytes]


def _entry(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    n_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    return TensorEntry(Path(), name, dtype, shape, 0, n_bytes)


def _names(n_files: int) -> list[str]:
    """Return the names of a checkpoint's files, as mlx-lm gives them."""
    if n_files == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{n_files:05d}.safetensors" for i in range(n_files)]
