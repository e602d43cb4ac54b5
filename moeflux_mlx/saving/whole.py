"""Write all tensors of a streamed model, including its experts."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import ModelError
from ..experts.compute.switch import PLAIN_FIRST, StreamedSwitch
from ..experts.files.checkpoint import INDEX_NAME
from ..experts.files.folder import Folder, open_parent
from ..experts.files.layout import PARTS, ExpertLayout, TensorSpec
from ..experts.files.modules import by_number
from ..experts.files.plain import SHARD_BYTES, PlainLayer, Plan, ReadRecord, Records
from ..experts.files.store import ExpertStore
from ..experts.files.writer import (
    Tensor,
    check_space,
    chunks_of_array,
    disk_errors,
    entry_of,
)
from ..experts.weights import DTYPE_NAMES, MLX_DTYPES, Quantization
from ..system.files import short
from ..system.volume import lock

# Folder for files until they get their names.
UNFINISHED = "moeflux.unfinished"


def switches_of(model: Any) -> dict[str, StreamedSwitch]:
    """Return a model's streamed blocks by path, in the order of layers."""
    found = {p: m for p, m in model.named_modules() if isinstance(m, StreamedSwitch)}
    return {path: found[path] for path in sorted(found, key=by_number)}


def store_of(model: Any) -> ExpertStore | None:
    """Return the store of a model's streamed experts, if it has one."""
    runtime = vars(model).get("runtime")
    store: ExpertStore | None = getattr(runtime, "store", None)
    return vars(model).get("store") if store is None else store


def save_shards(model: nn.Module, directory: Path) -> None:
    """Write a model like ``mlx_lm.utils.save_model``, including its experts.

    Every record is read once and compared with its checksum. Files get their names when
    all of them are written.

    Raises:
        ModelError: the module is only a part of a model, a type cannot be stored, or
            the directory has files of weights that would be loaded too.
        ExpertStoreError: an expert is damaged or unreadable, or the disk is full.
    """
    plan, read = _plan(model, SHARD_BYTES)
    _write(plan, read, directory, {name: name for name in (*plan.files, INDEX_NAME)})


def save_file(model: nn.Module, file: Path) -> None:
    """Write a model, including its experts, to one safetensors file.

    Raises:
        ModelError, ExpertStoreError: see ``save_shards``.
    """
    if file.suffix != ".safetensors":
        raise ModelError(
            f"[save] {file}: expected a name that ends in .safetensors, the only "
            "format for streamed experts"
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
    records, types = Records(store), getattr(model, "cast_predicate", lambda _: True)
    for (path, switch), number in zip(switches.items(), store.layers, strict=False):
        if store.name(number) != path and f".layers.{number}." not in f".{path}":
            raise ModelError(
                f"[save] {path}: expected its experts in the files but got those of "
                f"{store.name(number)}, nothing is written: load the model again"
            )
        layout = store.layout(number)
        reformed = ReformedRecords(layout, partial(records, number), switch, types)
        if reformed.differs:
            layout, reads[number] = reformed.layout, reformed
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
    """Write files to a temporary folder, and rename them by ``names``."""
    is_new = not directory.exists()
    with (
        disk_errors(directory, "save"),
        open_parent(directory / UNFINISHED, "save") as folder,
        folder.inner(UNFINISHED) as unfinished,
    ):
        # Two programs that save here must not rename each other's halves.
        lock(unfinished.fd, directory, "save")
        try:
            for name in unfinished.plain_names():
                unfinished.remove(name)
            others = fnmatch.filter(os.listdir(folder.fd), "model*.safetensors")
            if len(names) > 1 and (rest := sorted({*others} - {*names.values()})):
                raise ModelError(
                    f"[save] {directory}: expected no weights of another model but got "
                    f"{short(rest[0])}, which mlx-lm would load with the new ones, "
                    "nothing is written: remove it, or save to another directory"
                )
            check_space(unfinished, plan.n_bytes)
            plan.write(read, unfinished, lambda _: None)
            _name_together(names, unfinished, folder)
        finally:
            _remove(folder, unfinished)
            if is_new:
                # mlx_lm.convert refuses an existing directory, even an empty one.
                with contextlib.suppress(OSError):
                    os.rmdir(directory)


def _name_together(names: dict[str, str], unfinished: Folder, folder: Folder) -> None:
    """Give new files their names: all of them, or after an error none.

    Files that they replace are moved away first. So a crash in between leaves a part of
    one model, which cannot be loaded, and never parts of two.
    """
    out, back = (
        partial(os.replace, src_dir_fd=one.fd, dst_dir_fd=other.fd)
        for one, other in ((unfinished, folder), (folder, unfinished))
    )
    if len(names) == 1:
        out(*next(iter(names.items())))
        return
    aside = {name: f"old-{number}" for number, name in enumerate(names.values())}
    try:
        for name, old in aside.items():
            with contextlib.suppress(FileNotFoundError):
                back(name, old)
        for made, name in names.items():
            out(made, name)
    except BaseException:
        _put_back(names, aside, unfinished, folder)
        raise


def _put_back(
    names: dict[str, str], aside: dict[str, str], unfinished: Folder, folder: Folder
) -> None:
    """Remove new files that have their names, and give old ones theirs again."""
    left = os.listdir(unfinished.fd)
    for made, name in names.items():
        if made not in left:
            folder.remove(name)
        if (old := aside[name]) in left:
            os.replace(old, name, src_dir_fd=unfinished.fd, dst_dir_fd=folder.fd)


def _remove(folder: Folder, unfinished: Folder) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(unfinished.fd):
            unfinished.remove(name)
        os.rmdir(UNFINISHED, dir_fd=folder.fd)


class ReformedRecords:
    """Records that are cast, quantised or dequantised per matrix, as in mlx-lm.

    Args:
        stored: the layout of the files.
        read: returns the record of an expert.
        switch: determines how to save a block's projections.
        is_cast: tells whether a parameter, given by name, is cast.
    """

    def __init__(
        self,
        stored: ExpertLayout,
        read: Callable[[int], memoryview],
        switch: StreamedSwitch,
        is_cast: Callable[[str], bool],
    ):
        self._stored, self._read, self._switch = stored, read, switch
        self._is_cast = is_cast
        blank = {
            (s.projection, s.part): mx.zeros(s.shape, MLX_DTYPES[s.dtype])
            for s in stored.tensors
        }
        made = self._made(blank)
        self.differs = made.keys() != blank.keys() or any(
            (x.dtype, x.shape) != (blank[key].dtype, blank[key].shape)
            for key, x in made.items()
        )
        parts = {key: (DTYPE_NAMES[x.dtype], x.shape) for key, x in made.items()}
        self.layout = ExpertLayout.build(parts, switch.saved_forms, stored.alignment)
        self._buffer = bytearray(self.layout.record_bytes)

    def __call__(self, expert: int) -> memoryview:
        """Return an expert's record; the next call overwrites it."""
        record = self._read(expert)
        made = self._made(
            {(s.projection, s.part): _array(record, s) for s in self._stored.tensors}
        )
        for spec in self.layout.tensors:
            array = made[spec.projection, spec.part]
            end = spec.offset + spec.n_bytes
            self._buffer[spec.offset : end] = b"".join(chunks_of_array(array))
        return memoryview(self._buffer)

    def _made(
        self, arrays: dict[tuple[str, str], mx.array]
    ) -> dict[tuple[str, str], mx.array]:
        forms = zip(self._stored.projections, self._stored.quantization, strict=True)
        made: dict[tuple[str, str], mx.array] = {}
        for projection, form in forms:
            own = {
                part: self._cast(f"{projection}.{part}", x)
                for (p, part), x in arrays.items()
                if p == projection
            }
            own = _reformed(own, form, self._switch.saved_forms[projection])
            made |= {(projection, part): x for part, x in own.items()}
        return made

    def _cast(self, name: str, array: mx.array) -> mx.array:
        dtype, is_float = self._switch.saved_dtype, mx.floating
        if dtype is None or not mx.issubdtype(array.dtype, is_float):
            return array
        own = self._is_cast(f"{self._switch.path}.{name}")
        return array.astype(dtype) if own else array


def _reformed(
    own: dict[str, mx.array], stored: Quantization | None, wanted: Quantization | None
) -> dict[str, mx.array]:
    """Return a projection's arrays in another form, computed as in mlx-lm."""
    if stored == wanted:
        return own
    if stored is not None and (wanted is not None or "global_scale" in own):
        raise ModelError(
            f"[save] expected a conversion that mlx-lm supports but got {stored} to "
            f"{wanted}, nothing is written: {PLAIN_FIRST}"
        )
    weight, rest = own["weight"], {part: own[part] for part in own if part == "bias"}
    if wanted is not None:
        q = wanted
        arrays = mx.quantize(weight, q.group_size, q.bits, mode=q.mode)
        return dict(zip(PARTS, arrays, strict=False)) | rest
    assert stored is not None
    scales, biases, q = own["scales"], own.get("biases"), stored
    dense = mx.dequantize(weight, scales, biases, q.group_size, q.bits, q.mode)
    return {"weight": dense} | rest


def _array(record: memoryview, spec: TensorSpec) -> mx.array:
    own = np.frombuffer(record, np.uint8, spec.n_bytes, spec.offset)
    # Copy, because the next record overwrites this one.
    return mx.array(own).view(MLX_DTYPES[spec.dtype]).reshape(spec.shape)
