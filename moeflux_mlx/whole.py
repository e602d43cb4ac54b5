"""All tensors of a model whose experts are read from files, and how to write them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .errors import ModelError
from .experts.checkpoint import INDEX_NAME
from .experts.folder import Folder, open_parent
from .experts.layout import ExpertLayout, TensorSpec
from .experts.modules import by_number
from .experts.plain import SHARD_BYTES, PlainLayer, Plan, ReadRecord, Records
from .experts.pool import DTYPE_NAMES, MLX_DTYPES
from .experts.store import ExpertStore
from .experts.switch import StreamedSwitch
from .experts.writer import (
    Tensor,
    check_space,
    chunks_of_array,
    disk_errors,
    entry_of,
)
from .weights import Quantization

# Where files are written before they take their names.
UNFINISHED = "moeflux.unfinished"


def switches_of(model: Any) -> dict[str, StreamedSwitch]:
    """Return a model's streamed blocks by path, layer by layer."""
    found = {p: m for p, m in model.named_modules() if isinstance(m, StreamedSwitch)}
    return {path: found[path] for path in sorted(found, key=by_number)}


def store_of(model: Any) -> ExpertStore | None:
    """Return the open files that a whole model's experts are read from, if they are."""
    runtime = vars(model).get("runtime")
    store: ExpertStore | None = getattr(runtime, "store", None)
    return vars(model).get("store") if store is None else store


def save_shards(model: nn.Module, directory: Path) -> None:
    """Write a model's tensors as ``mlx_lm.utils.save_model`` does, experts included.

    Every record is read once and held against its checksum. No file has its name before
    all are written.

    Raises:
        ModelError: part of a model, or of a type that no file has.
        ExpertStoreError: an expert is damaged or cannot be read; the disk is full.
    """
    plan, read = _plan(model, SHARD_BYTES)
    _write(plan, read, directory, {name: name for name in (*plan.files, INDEX_NAME)})


def save_file(model: nn.Module, file: Path) -> None:
    """Write a model's tensors to one safetensors file, experts included.

    Raises:
        ModelError, ExpertStoreError: as ``save_shards``.
    """
    if file.suffix != ".safetensors":
        raise ModelError(
            f"[save] {file}: expected a name that ends in .safetensors, which alone "
            "takes experts that are read from files"
        )
    plan, read = _plan(model)
    (made,) = plan.files
    _write(plan, read, file.parent, {made: file.name})


def _plan(model: nn.Module, shard_bytes: int | None = None) -> tuple[Plan, ReadRecord]:
    switches, store = switches_of(model), store_of(model)
    if store is None:
        raise ModelError(
            "[save] expected a whole model but got a part of one that reads its "
            "experts from files: save the model itself"
        )
    layers = []
    reads: dict[int, Callable[[int], memoryview]] = {}
    records = Records(store)
    for (path, switch), number in zip(switches.items(), store.layers, strict=False):
        if store.name(number) != path and f".layers.{number}." not in f".{path}":
            raise ModelError(
                f"[save] {path}: expected its experts in the files but got those of "
                f"{store.name(number)}, nothing is written: load the model again"
            )
        layout = store.layout(number)
        if switch.saved_dense:
            dense = DenseRecords(layout, partial(records, number))
            layout, reads[number] = dense.layout, dense
        else:
            reads[number] = partial(records, number)
        names = tuple(f"{path}.{s.projection}.{s.part}" for s in layout.tensors)
        layers.append(PlainLayer(number, store.count(number), layout, names))
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    resident = [
        Tensor(entry_of(name, array, "[save] "), partial(chunks_of_array, array))
        for name, array in parameters.items()
    ]
    plan = Plan.make(resident, layers, shard_bytes)
    return plan, lambda layer, expert: reads[layer](expert)


def _write(
    plan: Plan, read: ReadRecord, directory: Path, names: dict[str, str]
) -> None:
    """Write files beside their places, and move them there by ``names``."""
    is_new = not directory.exists()
    with (
        disk_errors(directory, "save"),
        open_parent(directory / UNFINISHED, "save") as folder,
    ):
        try:
            with folder.inner(UNFINISHED) as unfinished:
                for name in unfinished.plain_names():
                    unfinished.remove(name)
                check_space(unfinished, plan.n_bytes)
                plan.write(read, unfinished, lambda _: None)
                for made, name in names.items():
                    os.replace(
                        made, name, src_dir_fd=unfinished.fd, dst_dir_fd=folder.fd
                    )
        finally:
            _remove(folder)
            if is_new:
                # mlx_lm.convert takes no directory that is there, empty or not.
                with contextlib.suppress(OSError):
                    os.rmdir(directory)


def _remove(folder: Folder) -> None:
    with contextlib.suppress(OSError):
        with folder.inner(UNFINISHED) as unfinished:
            for name in os.listdir(unfinished.fd):
                unfinished.remove(name)
        os.rmdir(UNFINISHED, dir_fd=folder.fd)


class DenseRecords:
    """Records whose quantised matrices are made dense, as mlx-lm dequantises them.

    Args:
        stored: the layout that files have.
        read: returns the record of an expert.
    """

    def __init__(self, stored: ExpertLayout, read: Callable[[int], memoryview]):
        self._stored, self._read = stored, read
        blank = {
            (s.projection, s.part): mx.zeros(s.shape, MLX_DTYPES[s.dtype])
            for s in stored.tensors
        }
        made = self._dense(blank)
        parts = {key: (DTYPE_NAMES[x.dtype], x.shape) for key, x in made.items()}
        forms = dict.fromkeys(stored.projections)
        self.layout = ExpertLayout.build(parts, forms, stored.alignment)
        self._buffer = bytearray(self.layout.record_bytes)

    def __call__(self, expert: int) -> memoryview:
        """Return an expert's record; the next call overwrites it."""
        record = self._read(expert)
        stored = {
            (s.projection, s.part): _array(record, s) for s in self._stored.tensors
        }
        made = self._dense(stored)
        for spec in self.layout.tensors:
            array = made[spec.projection, spec.part]
            chunks = b"".join(chunks_of_array(array))
            self._buffer[spec.offset : spec.offset + spec.n_bytes] = chunks
        return memoryview(self._buffer)

    def _dense(
        self, arrays: dict[tuple[str, str], mx.array]
    ) -> dict[tuple[str, str], mx.array]:
        forms = zip(self._stored.projections, self._stored.quantization, strict=True)
        made: dict[tuple[str, str], mx.array] = {}
        for projection, form in forms:
            own = {part: x for (p, part), x in arrays.items() if p == projection}
            if form is not None:
                own = _dequantized(own, form)
            made |= {(projection, part): x for part, x in own.items()}
        return made


def _dequantized(own: dict[str, mx.array], form: Quantization) -> dict[str, mx.array]:
    if "global_scale" in own:
        raise ModelError(
            "[save] expected experts without a scale for all of a matrix, which mlx-lm "
            "does not dequantise"
        )
    weight = mx.dequantize(
        own["weight"],
        own["scales"],
        own.get("biases"),
        form.group_size,
        form.bits,
        form.mode,
    )
    return {"weight": weight} | ({"bias": own["bias"]} if "bias" in own else {})


def _array(record: memoryview, spec: TensorSpec) -> mx.array:
    own = np.frombuffer(record, np.uint8, spec.n_bytes, spec.offset)
    # Copied: the next record comes into the same place.
    return mx.array(own).view(MLX_DTYPES[spec.dtype]).reshape(spec.shape)
