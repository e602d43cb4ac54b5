"""Values that are part of a longer row: one launch wrote several of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class RowPart:
    """``size`` values of ``row`` ``[1, width]`` from ``start`` on.

    Some launches take the whole row and an offset. Cutting the part out is an operation
    of its own in MLX, as slow as a small launch.
    """

    row: mx.array
    start: int
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return self.size * self.row.itemsize

    def array(self) -> mx.array:
        """Return the part as ``[1, size]``."""
        return self.row[:, self.start : self.start + self.size]


def whole(value: Any) -> Any:
    """Return a value; cut it out of its row if it is a ``RowPart``."""
    return value.array() if isinstance(value, RowPart) else value


def one_row(*parts: Any) -> tuple[mx.array, tuple[int, ...]]:
    """Return an array ``[B, width]`` that holds all parts, and where each begins."""
    rows = {id(part.row) for part in parts if isinstance(part, RowPart)}
    if len(rows) == 1 and all(isinstance(part, RowPart) for part in parts):
        return parts[0].row, tuple(part.start for part in parts)
    arrays = [whole(part) for part in parts]
    starts = itertools.accumulate((x.shape[-1] for x in arrays[:-1]), initial=0)
    return mx.concatenate(arrays, axis=-1), tuple(starts)
