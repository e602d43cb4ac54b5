"""Write a plain checkpoint: tensors by name, experts record by record.

Names and shapes determine the place of every tensor in advance. So each record is read
once, its checksum is compared, and its tensors are written to their places.
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

# The same as mlx-lm's.
SHARD_BYTES = 5 << 30
# Placeholder of the expert's number in a tensor's name, if each expert has a tensor.
NUMBER = "{}"
# Returns an expert's record, given layer and expert.
ReadRecord = Callable[[int, int], memoryview]


@dataclass(frozen=True)
class PlainLayer:
    """A layer's experts, and the names of their tensors in the checkpoint.

    ``names`` has one name for each tensor of the layout. Projections with the same name
    are concatenated by rows into one tensor, in the layout's order.
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
        """Yield the tensors in writing order.

        Raises:
            ExpertStoreError: the rows of one tensor differ in length or type.
        """
        for name, specs in self._groups():
            first, shape = specs[0], specs[0].shape
            rest = {(spec.dtype, spec.shape[1:]) for spec in specs}
            if len(specs) > 1 and (len(rest) > 1 or not shape):
                raise ExpertStoreError(
                    f"[unpack] {name!r}: expected rows of one length and type but got "
                    f"{[(spec.dtype, list(spec.shape)) for spec in specs]}"
                )
            if shape:
                shape = (sum(spec.shape[0] for spec in specs), *shape[1:])
            if NUMBER not in name:
                yield _entry(name, first.dtype, (self.n_experts, *shape))
                continue
            for expert in range(self.n_experts):
                own = name.replace(NUMBER, str(expert))
                yield _entry(own, first.dtype, shape)

    def pieces(self, expert: int) -> Iterator[tuple[TensorSpec, str, int]]:
        """Yield an expert's tensors, each with its name and start in the checkpoint."""
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
    """Return the names of a layer's tensors in the checkpoint.

    The result is empty if the experts are not numbered in the usual way.
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
    """The tensors of a checkpoint, and their distribution over ``files`` by name."""

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
        """Distribute tensors over files of at most ``shard_bytes``.

        A longer tensor gets a file of its own. None: one file for all tensors.

        Raises:
            ExpertStoreError: two tensors have the same name.
        """
        shards: list[list[TensorEntry]] = [[]]
        names: set[str] = set()
        n_bytes = 0
        entries = [tensor.entry for tensor in resident]
        entries += [entry for layer in layers for entry in layer.tensors()]
        for entry in entries:
            if entry.name in names:
                raise ExpertStoreError(
                    f"[unpack] expected a different name for each tensor but got two "
                    f"of {entry.name!r}"
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
        """The text of the index file."""
        files = {e.name: file for file, entries in self.files.items() for e in entries}
        fields = {
            "metadata": {"total_size": self.n_bytes},
            "weight_map": dict(sorted(files.items())),
        }
        return json.dumps(fields, indent=4)

    def write(self, read: ReadRecord, folder: Folder, advance: Advance) -> None:
        """Write the files and their index with one record in memory at a time.

        Args:
            read: returns an expert's record, valid until the next call.
            advance: receives the number of bytes written since the last call.

        Raises:
            ExpertStoreError: a record is unreadable or damaged, or the disk is full.
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
        """Make the files; return a function that writes bytes into a tensor."""
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
            # Set the final length now: tensors are written in any order.
            opened.truncate(begin)

        def write(name: str, start: int, data: memoryview) -> None:
            fd, path, begin = places[name]
            with disk_errors(path, folder.part):
                write_at(fd, data, begin + start)

        return write


class Records:
    """Read the records of a store one by one, and compare their checksums."""

    def __init__(self, store: ExpertStore):
        self._store = store
        strides = [store.layout(layer).stride for layer in store.layers]
        # Direct reads need page-aligned memory, which mmap gives.
        self._buffer = memoryview(mmap.mmap(-1, max(strides)))

    def __call__(self, layer: int, expert: int) -> memoryview:
        """Return an expert's record; the next call overwrites it.

        Raises:
            ExpertStoreError: the record cannot be read or is damaged.
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
    """Return the names of a checkpoint's files, in mlx-lm's form."""
    if n_files == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{n_files:05d}.safetensors" for i in range(n_files)]
