"""Memory for experts: an aligned MLX array, written in place and viewed as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ... import device
from ...errors import BudgetError, ExpertStoreError
from ..files.layout import ALL_PARTS, TENSOR_ALIGNMENT, ExpertLayout, TensorSpec
from ..files.reader import HostPlace, Place
from ..weights import MLX_DTYPES, ExpertWeights, Records, Weight
from .staging import StagedPlace, Staging, open_staging

POOL_ALIGNMENT = 2 * 1024 * 1024
# MLX counts the elements of an axis in 32 bits, so memory is allocated in rows.
ROW_BYTES = 16 * 1024


def aligned_rows(
    n_rows: int, row_bytes: int, alignment: int = POOL_ALIGNMENT
) -> mx.array:
    """Allocate a uint8 array ``[n_rows, row_bytes]`` at an aligned address.

    The buffer is ``alignment`` bytes longer than the array. ``n_rows`` and
    ``row_bytes`` must each fit into 31 bits; their product may be larger.

    Raises:
        BudgetError: the memory cannot be allocated.
    """
    n_bytes = allocated_bytes(n_rows, row_bytes, alignment)
    limits = device.gpu_limits()
    if limits is not None and n_bytes > limits.buffer_bytes:
        raise BudgetError(
            f"[pool] expected at most {limits.buffer_bytes} bytes, the longest buffer "
            f"of this device, but got {n_bytes}: give less memory"
        )
    device.check_allocation(n_bytes, "pool")
    try:
        raw = mx.zeros((n_bytes // ROW_BYTES, ROW_BYTES), dtype=mx.uint8)
        mx.eval(raw)
    except (RuntimeError, MemoryError) as error:
        raise BudgetError(f"[pool] cannot allocate {n_bytes} bytes: {error}") from error
    offset = -_address(raw) % alignment
    # as_strided flattens its input, and the whole array is too long for that. It uses
    # only the input's buffer, so one row will do. The slice makes MLX compute the
    # array's extent again.
    grown = mx.as_strided(raw[:1], (n_rows + 1, row_bytes), (row_bytes, 1), offset)
    rows = grown[:n_rows]
    mx.eval(rows)
    return rows


def allocated_bytes(
    n_rows: int, row_bytes: int, alignment: int = POOL_ALIGNMENT
) -> int:
    """Return the length of the buffer that ``aligned_rows`` takes."""
    return -(-(n_rows * row_bytes + alignment) // ROW_BYTES) * ROW_BYTES


def aligned_bytes(n_bytes: int, alignment: int = POOL_ALIGNMENT) -> mx.array:
    """Allocate a uint8 array ``[n_bytes]`` at an aligned address.

    Raises:
        BudgetError: the memory cannot be allocated.
    """
    rows = aligned_rows(1, n_bytes, alignment)
    flat = rows.reshape(n_bytes)
    mx.eval(flat)
    return flat


def _address(array: mx.array) -> int:
    return np.array(array, copy=False).ctypes.data


class Buffer:
    """Slots of ``stride`` bytes in one aligned MLX array, initially zero.

    ``array`` is uint8 ``[n_rows, stride]``; ``bytes`` is a NumPy view of its memory.
    """

    def __init__(self, n_rows: int, stride: int):
        self.array = aligned_rows(n_rows, stride)
        self.bytes = np.array(self.array, copy=False)
        self.begin = self.bytes.ctypes.data
        if self.begin % POOL_ALIGNMENT or not self.bytes.flags.writeable:
            raise ExpertStoreError(
                "[pool] expected writable memory at a multiple of "
                f"{POOL_ALIGNMENT} bytes but got {self.begin:#x}"
            )
        # Views of the array, cached here so that they are freed with it.
        self.weights: dict[tuple[ExpertLayout, int, int], ExpertWeights] = {}


class SlotPool:
    """The slots of one segment, each as long as the largest layout's stride.

    With ``blank`` one more slot follows. It stays zero: an expert that adds nothing.
    The ``SlotTable`` knows which expert is in which slot, this class does not.

    Args:
        staging: copies records into slots; None: the host writes slots directly.
    """

    def __init__(
        self,
        layouts: Sequence[ExpertLayout],
        n_slots: int,
        *,
        blank: bool = False,
        staging: Staging | None = None,
    ):
        self.n_given_back = 0
        self.stride = pool_stride(layouts)
        self.slack_bytes = POOL_ALIGNMENT + blank * self.stride
        self._n_blank, self._staging = int(blank), staging
        self._buffer = Buffer(n_slots + self._n_blank, self.stride)

    @property
    def array(self) -> mx.array:
        """All slots, uint8 ``[n, stride]``."""
        return self._buffer.array

    @property
    def bytes(self) -> np.ndarray:
        """A NumPy view of the same memory."""
        return self._buffer.bytes

    @property
    def n_slots(self) -> int:
        """Number of slots without the blank one, which comes last."""
        return len(self._buffer.bytes) - self._n_blank

    @property
    def absent(self) -> int:
        """The slot that stands for an absent expert: the blank one, or slot 0."""
        return self.n_slots if self._n_blank else 0

    @property
    def n_bytes(self) -> int:
        """Bytes in use, with the blank slot and the alignment."""
        return (self.n_slots - self.n_given_back) * self.stride + self.slack_bytes

    def give_back(self, slots: Sequence[range]) -> None:
        """Give the memory of these slots back to the system, and of no others.

        Their contents are lost. A later write takes new memory for them.
        """
        returned = [
            len(run)
            for run in filter(len, slots)
            if device.return_memory(self.bytes[run.start : run.stop])
        ]
        self.n_given_back = sum(returned)

    def allocate(self, n_slots: int) -> Buffer:
        """Return a buffer of ``n_slots`` slots to pass to ``replace``.

        Raises:
            BudgetError: the memory cannot be allocated.
        """
        return Buffer(n_slots + self._n_blank, self.stride)

    def replace(self, buffer: Buffer) -> None:
        """Move the slots to another buffer; drop those that do not fit.

        The old buffer is freed with the last array that views it. After an error the
        pool still uses the old buffer, unchanged.
        """
        old = self._buffer
        n_kept = min(len(old.bytes), len(buffer.bytes)) - self._n_blank
        if self._staging is None:
            buffer.bytes[:n_kept] = old.bytes[:n_kept]
        else:
            self._staging.move(buffer.begin, old.begin, n_kept * self.stride)
        self._buffer = buffer

    def move(self, source: int, target: int) -> None:
        """Copy one slot's bytes to another."""
        if self._staging is None:
            self.bytes[target] = self.bytes[source]
        else:
            addresses = self._address(target), self._address(source)
            self._staging.move(*addresses, self.stride)

    def buffer(self, slot: int, n_bytes: int) -> memoryview:
        """Return the first bytes of a slot, writable by the host."""
        return self.bytes[slot, :n_bytes].data

    def place(self, slot: int, n_bytes: int) -> Place:
        """Return the first bytes of a slot as the target of a read."""
        if self._staging is None:
            return HostPlace(self.buffer(slot, n_bytes))
        return StagedPlace(self._staging, self._address(slot), n_bytes)

    def _address(self, slot: int) -> int:
        return self._buffer.begin + slot * self.stride

    def weights(
        self, layout: ExpertLayout, first: int = 0, count: int | None = None
    ) -> ExpertWeights:
        """Return slots ``first`` to ``first + count`` as tensors ``[count, O, I]``.

        The tensors are views of the pool, so they show later writes to the slots.
        Without ``count`` they end with the blank slot. They are cached by layout and
        range until the buffer changes.
        """
        made = self._buffer.weights
        key = layout, first, len(self.bytes) - first if count is None else count
        if key not in made:
            made[key] = self._views(*key)
        return made[key]

    def _views(self, layout: ExpertLayout, first: int, count: int) -> ExpertWeights:
        return slot_weights(self.array[first : first + count], layout)

    def stack(self, layout: ExpertLayout, first: int, count: int) -> ExpertWeights:
        """Rearrange some slots so that each tensor is contiguous; return the tensors.

        Until ``unstack`` these slots hold no records.
        """
        slots = range(first, first + count)
        records = np.stack([self._get(slot, 0, layout.record_bytes) for slot in slots])
        tensors: dict[tuple[str, str], mx.array] = {}
        for spec, begin in _stacked(layout, count):
            columns = slice(spec.offset, spec.offset + spec.n_bytes)
            self._put(first, begin, records[:, columns].ravel())
            dtype = MLX_DTYPES[spec.dtype]
            # The region is too long for one axis, and as_strided uses only its buffer.
            row = self.array[first : first + 1].view(dtype)
            shape = (count, *spec.shape)
            strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            at = begin // dtype.size
            tensors[spec.projection, spec.part] = mx.as_strided(row, shape, strides, at)
        mx.eval(list(tensors.values()))
        return weights_of(layout, tensors)

    def unstack(self, layout: ExpertLayout, first: int, count: int) -> None:
        """Put a record into each slot again; the stacked tensors become invalid."""
        records = np.zeros((count, layout.record_bytes), np.uint8)
        for spec, begin in _stacked(layout, count):
            part = self._get(first, begin, count * spec.n_bytes)
            columns = slice(spec.offset, spec.offset + spec.n_bytes)
            records[:, columns] = part.reshape(count, -1)
        for slot, record in enumerate(records, first):
            self._put(slot, 0, record)

    def _get(self, slot: int, begin: int, n_bytes: int) -> np.ndarray:
        """Return a copy of bytes from ``begin`` in a slot on, over any slots."""
        if self._staging is not None:
            return self._staging.fetch(self._address(slot) + begin, n_bytes)
        start = slot * self.stride + begin
        return self.bytes.reshape(-1)[start : start + n_bytes].copy()

    def _put(self, slot: int, begin: int, values: np.ndarray) -> None:
        """Write bytes from ``begin`` in a slot on, over any slots."""
        if self._staging is not None:
            self._staging.send(self._address(slot) + begin, values)
            return
        start = slot * self.stride + begin
        self.bytes.reshape(-1)[start : start + len(values)] = values


def open_pools(
    layouts: Sequence[ExpertLayout], n_slots: Sequence[int], *, blank: bool
) -> list[SlotPool]:
    """Return one pool for each number in ``n_slots``; all share one staging."""
    staging = open_staging(pool_stride(layouts))
    return [SlotPool(layouts, n, blank=blank, staging=staging) for n in n_slots]


def _stacked(layout: ExpertLayout, count: int) -> Iterator[tuple[TensorSpec, int]]:
    """Yield each tensor and its first byte when ``count`` records are stacked.

    The stack is no longer than the records, which align their tensors equally.
    """
    begin = 0
    for spec in layout.tensors:
        yield spec, begin
        begin += count * spec.n_bytes
        begin += -begin % TENSOR_ALIGNMENT


def slot_weights(slots: mx.array, layout: ExpertLayout) -> ExpertWeights:
    """Return views of records, uint8 ``[n, stride]``, as tensors ``[n, O, I]``."""
    tensors: dict[tuple[str, str], mx.array] = {}
    records: dict[tuple[str, str], Records] = {}
    # Tensors of one type share an array, by which a copy finds that they lie together.
    dtypes = {MLX_DTYPES[spec.dtype] for spec in layout.tensors}
    views = {dtype: slots.view(dtype) for dtype in dtypes}
    for spec in layout.tensors:
        dtype = MLX_DTYPES[spec.dtype]
        begin = spec.offset // dtype.size
        rows = views[dtype]
        columns = rows[:, begin : begin + math.prod(spec.shape)]
        name = spec.projection, spec.part
        # A scalar for each expert has no axis of its own.
        tensor = mx.unflatten(columns, 1, spec.shape or (1,))
        tensors[name] = tensor if spec.shape else tensor.squeeze(1)
        records[name] = Records(rows, begin)
    mx.eval([*tensors.values(), *(r.array for r in records.values())])
    return weights_of(layout, tensors, records)


def weights_of(
    layout: ExpertLayout,
    tensors: Mapping[tuple[str, str], Any],
    records: Mapping[tuple[str, str], Records] | None = None,
) -> ExpertWeights:
    """Combine tensors, keyed by projection and part, into ``ExpertWeights``."""

    def in_pool(projection: str) -> tuple[Records | None, ...] | None:
        if records is None:
            return None
        return tuple(records.get((projection, part)) for part in ALL_PARTS)

    return ExpertWeights.named(
        {
            projection: Weight(
                tensors[projection, "weight"],
                tensors.get((projection, "scales")),
                tensors.get((projection, "biases")),
                quantization,
                in_pool(projection),
                tensors.get((projection, "bias")),
                tensors.get((projection, "global_scale")),
            )
            for projection, quantization in zip(
                layout.projections, layout.quantization, strict=True
            )
        }
    )


def pool_stride(layouts: Sequence[ExpertLayout]) -> int:
    """Return the bytes of a slot that can hold a record of any of the layouts."""
    return max(layout.stride for layout in layouts)


def pool_bytes(layouts: Sequence[ExpertLayout], n_slots: int) -> int:
    """Return the bytes of ``n_slots`` slots and their alignment."""
    return n_slots * pool_stride(layouts) + POOL_ALIGNMENT
