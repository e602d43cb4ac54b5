"""Buffers: ids typed by role, and the pool that stores their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import mlx.core as mx
import numpy as np

from ...errors import GraphError, SizeMismatch
from .roles import Buf

if TYPE_CHECKING:
    from .graph import Graph


B = TypeVar("B", bound=Buf)
B_co = TypeVar("B_co", bound=Buf, covariant=True)

# A dimension is None if only a bound array knows it, as the length of a cache.
Shape = tuple["int | None", ...]


@dataclass(frozen=True)
class BufId(Generic[B_co]):
    """A stable index into a pool, typed by the role of its buffer."""

    index: int
    role: type[B_co]

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclass
class BufferInfo:
    """A buffer's role, shape, type and label; the pool keeps its value apart."""

    role: type[Buf]
    shape: Shape
    dtype: mx.Dtype
    label: str
    persistent: bool
    planned: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of the buffer; a dimension known only at run time counts as 0."""
        return math.prod(d or 0 for d in self.shape) * self.dtype.size


def fits(expected: Sequence[int | None], got: Sequence[int | None]) -> bool:
    """Return whether ``got`` matches ``expected``; None matches any length."""
    return len(expected) == len(got) and all(
        e is None or g is None or e == g for e, g in zip(expected, got, strict=True)
    )


class BufferPool:
    """Buffers by ``BufId``. Values are MLX arrays, so a write replaces the value.

    Several ids may share one physical place after ``commit_plan``. Persistent buffers
    survive ``reset_transient`` and are never shared.

    Args:
        activation_dtype: type of every buffer whose role does not fix one.
    """

    def __init__(self, activation_dtype: mx.Dtype = mx.float32):
        self.activation_dtype = activation_dtype
        self.infos: list[BufferInfo] = []
        self.physical: list[int] = []
        self.values: list[Any] = []

    def alloc(
        self, role: type[B], shape: Shape, label: str, *, persistent: bool = False
    ) -> BufId[B]:
        """Add a buffer; it reads as zeros until it is written."""
        return self._add(role, shape, None, label, persistent)

    def alloc_aligned(
        self,
        role: type[B],
        n_bytes: int,
        alignment: int,
        label: str,
        *,
        persistent: bool = False,
    ) -> BufId[B]:
        """Add ``n_bytes`` of uint8 whose address is a multiple of ``alignment``.

        Uploads write in place, so a disk read can target it.
        """
        from ...experts.pool.pool import aligned_bytes

        if alignment <= 0 or alignment & (alignment - 1):
            raise GraphError(
                f"[BufferPool] alignment of {label!r}: expected a power of two but got "
                f"{alignment}"
            )
        array = aligned_bytes(n_bytes, alignment)
        return self.register_borrowed(role, array, label, persistent=persistent)

    def register_borrowed(
        self, role: type[B], array: mx.array, label: str, *, persistent: bool = False
    ) -> BufId[B]:
        """Add a buffer whose storage the caller owns, without a copy."""
        return self._add(role, array.shape, array, label, persistent, array.dtype)

    def _add(
        self,
        role: type[B],
        shape: Shape,
        value: Any,
        label: str,
        persistent: bool,
        dtype: mx.Dtype | None = None,
    ) -> BufId[B]:
        dtype = dtype or role.dtype or self.activation_dtype
        self.infos.append(BufferInfo(role, tuple(shape), dtype, label, persistent))
        self.physical.append(len(self.values))
        self.values.append(value)
        return BufId(len(self.infos) - 1, role)

    def info(self, buf: BufId[Any]) -> BufferInfo:
        """Return shape, type and label; raise GraphError for another pool's id."""
        if not 0 <= buf.index < len(self.infos):
            raise GraphError(f"[BufferPool] buffer id {buf} out of range")
        return self.infos[buf.index]

    def label(self, buf: BufId[Any]) -> str:
        """Return the label given at allocation."""
        return self.info(buf).label

    def handle(self, buf: BufId[Any]) -> Any:
        """Return the buffer's value, or zeros if nothing was written yet."""
        info = self.info(buf)
        value = self.values[self.physical[buf.index]]
        # The place of a planned buffer may hold another buffer's value.
        if info.planned and isinstance(value, mx.array):
            is_own = fits(info.shape, value.shape) and value.dtype == info.dtype
            value = value if is_own else None
        shape = [d for d in info.shape if d is not None]
        if value is None and len(shape) == len(info.shape):
            value = mx.zeros(shape, info.dtype)
        return value

    def bind(self, buf: BufId[Any], value: Any) -> None:
        """Replace the buffer's value with an array of the same shape."""
        info = self.info(buf)
        if isinstance(value, mx.array) and not fits(info.shape, value.shape):
            raise GraphError(
                f"[BufferPool] {info.label!r} expected shape {info.shape} but got "
                f"{value.shape}"
            )
        self.values[self.physical[buf.index]] = value

    def upload(self, buf: BufId[Any], host: Any) -> None:
        """Copy host bytes to the start of the buffer; the rest stays as it is.

        Raises:
            SizeMismatch: ``host`` is longer than the buffer.
        """
        self.upload_at(buf, 0, host)

    def upload_at(self, buf: BufId[Any], offset: int, host: Any) -> None:
        """Copy host bytes into the buffer from byte ``offset`` on."""
        info = self.info(buf)
        data = np.frombuffer(memoryview(host).cast("B"), np.uint8)
        if offset < 0 or offset + data.size > info.n_bytes:
            raise SizeMismatch(info.label, info.n_bytes, offset + data.size)
        array = self.handle(buf)
        if info.dtype == mx.uint8:
            mx.eval(array)
            np.array(array, copy=False).reshape(-1)[offset : offset + data.size] = data
            self.values[self.physical[buf.index]] = array
            return
        raw = _host_bytes(array)
        raw[offset : offset + data.size] = data
        self.bind(buf, mx.array(raw).view(info.dtype).reshape(array.shape))

    def download(self, buf: BufId[Any], host: Any) -> None:
        """Fill ``host``, a writable buffer, from the start of this buffer.

        Raises:
            SizeMismatch: ``host`` is longer than the buffer.
        """
        target = np.frombuffer(memoryview(host).cast("B"), np.uint8)
        info = self.info(buf)
        if target.size > info.n_bytes:
            raise SizeMismatch(info.label, info.n_bytes, target.size)
        target[:] = _host_bytes(self.handle(buf))[: target.size]

    def reset_transient(self) -> None:
        """Drop the values of all transient buffers.

        Those allocated after the last persistent one go, and their ids are invalid.
        """
        keep = max((i + 1 for i, b in enumerate(self.infos) if b.persistent), default=0)
        del self.infos[keep:], self.physical[keep:]
        kept = {
            p for p, b in zip(self.physical, self.infos, strict=True) if b.persistent
        }
        n_physical = max(self.physical, default=-1) + 1
        self.values = [
            v if i in kept else None for i, v in enumerate(self.values[:n_physical])
        ]

    def commit_plan(self, graph: Graph) -> None:
        """Let buffers share a physical place if their lifetimes do not overlap.

        Persistent buffers, and those the graph only reads, keep their own place and
        value. Planned buffers become persistent, so their layout is fixed.
        """
        from .lifetime import analyze_lifetimes, greedy_color

        colors = {
            index: color
            for index, color in greedy_color(analyze_lifetimes(graph)).colors.items()
            if not self.infos[index].persistent
        }
        old_values, old_physical = self.values, self.physical
        places: dict[tuple[str, int], int] = {}
        self.values, self.physical = [], []
        for index in range(len(self.infos)):
            shared = index in colors
            key = ("color", colors[index]) if shared else ("own", old_physical[index])
            if key not in places:
                places[key] = len(self.values)
                self.values.append(None if shared else old_values[key[1]])
            self.physical.append(places[key])
        for index in colors:
            self.infos[index].persistent = self.infos[index].planned = True

    @property
    def physical_buffer_count(self) -> int:
        """Number of distinct physical places."""
        return len(self.values)


def _host_bytes(array: mx.array) -> np.ndarray:
    """Return a host copy of the array's bytes."""
    flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
    return np.array(flat)
