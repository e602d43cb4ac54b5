"""Tensors inside the records of slots, and copies of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import mlx.core as mx
import numpy as np

# MLX counts the elements of an axis in 31 bits.
MAX_AXIS = (1 << 31) - 1
# The most bytes that one index copies. Larger rows would hardly mean fewer indices.
MAX_ROW_BYTES = 16 << 10
# The types of elements that are copied, by their bytes.
ELEMENTS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}

Key = TypeVar("Key")


@dataclass(frozen=True)
class Records:
    """One tensor of every slot: row ``slot`` of ``array``, from element ``base`` on.

    ``array`` is ``[n_slots, row]`` of the tensor's type. It is contiguous, so kernels
    take it without a copy.
    """

    array: mx.array
    base: int

    @property
    def begin(self) -> int:
        """The tensor's first byte in a slot."""
        return self.base * self.array.itemsize

    @property
    def stride(self) -> int:
        """Bytes from one slot to the next."""
        return self.array.shape[1] * self.array.itemsize


class Copier(Generic[Key]):
    """Copies tensors out of slots, however far apart the slots are.

    MLX's GPU kernels gather with 32-bit offsets if their source has fewer than 2^31
    elements. A view of slots has few elements, but its offsets grow with the whole
    array of slots. Offsets of more than 32 bits then wrap, and other bytes are copied
    without an error. So the source here is always the whole array.

    Tensors of one size, whose records are one array, are copied by one operation, as
    rows of the widest elements that divide them.

    Args:
        tensors: the place of each tensor, and its view of all slots ``[n_slots, ...]``.
    """

    def __init__(self, tensors: Mapping[Key, tuple[Records, mx.array]]):
        alike: dict[tuple[int, int], dict[Key, tuple[Records, mx.array]]] = {}
        for key, (records, tensor) in tensors.items():
            size = math.prod(tensor.shape[1:]) * tensor.itemsize
            of_one = alike.setdefault((id(records.array), size), {})
            of_one[key] = records, tensor
        self._groups = [_Group(group, size) for (_, size), group in alike.items()]

    def __call__(self, slots: mx.array) -> dict[Key, mx.array]:
        """Return each tensor of ``slots`` ``[n]``, contiguous: ``[n, ...]``."""
        at = mx.expand_dims(slots.astype(mx.uint32), -1)
        # The first row of each slot, by rows in a slot, which groups share.
        firsts: dict[int, mx.array] = {}
        copies: dict[Key, mx.array] = {}
        for group in self._groups:
            copies.update(group.copies(at, firsts))
        return copies


class _Group(Generic[Key]):
    """Tensors of one type and of ``size`` bytes in the same records."""

    def __init__(self, tensors: Mapping[Key, tuple[Records, mx.array]], size: int):
        self._shapes = {key: x.shape[1:] for key, (_, x) in tensors.items()}
        records = [r for r, _ in tensors.values()]
        stride, begins = records[0].stride, [r.begin for r in records]
        row = math.gcd(MAX_ROW_BYTES, stride, size, *begins)
        element = math.gcd(row, max(ELEMENTS))
        wide = records[0].array.view(ELEMENTS[element])
        self._dtype, self._n_rows = records[0].array.dtype, stride // row
        # One index for each row is faster than two, because GPUs divide slowly.
        n_slots = len(wide)
        self._is_flat = n_slots * self._n_rows <= MAX_AXIS
        outer = [n_slots * self._n_rows] if self._is_flat else [n_slots, self._n_rows]
        self._source = wide.reshape(*outer, row // element)
        each = np.arange(size // row) + np.array(begins)[:, None, None] // row
        self._rows = mx.array(each.astype(np.uint32))

    def copies(
        self, at: mx.array, firsts: dict[int, mx.array]
    ) -> Iterator[tuple[Key, mx.array]]:
        if self._is_flat:
            if self._n_rows not in firsts:
                firsts[self._n_rows] = at * self._n_rows
            found = self._source[(firsts[self._n_rows] + self._rows).flatten()]
        else:
            found = self._source[at, self._rows]
        each = mx.split(found.view(self._dtype), len(self._shapes))
        for (key, shape), x in zip(self._shapes.items(), each, strict=True):
            yield key, x.reshape(len(at), *shape)
