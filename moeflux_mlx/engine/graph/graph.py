"""A list of typed Ops, checked as it is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import reduce
from typing import Any

from ...errors import GraphError
from .buffers import BufferPool, BufId, fits
from .op import Cost, Op, WeightRef


class Graph:
    """Ops in the order they run, over the buffers of one pool."""

    def __init__(self, pool: BufferPool, name: str = "graph"):
        self.pool = pool
        self.name = name
        self.ops: list[Op] = []

    def push(self, op: Op) -> None:
        """Append ``op``.

        Raises:
            GraphError: a buffer has the wrong role or shape, or a weight the wrong
                shape. The message names the Op, the field, and the expected and given
                values.
        """
        self._check_roles(op)
        self._check_weights(op)
        self._check_shapes(op)
        self.ops.append(op)

    def _check_roles(self, op: Op) -> None:
        for field in op.buffer_fields:
            buf = getattr(op, field.name)
            if buf is None and field.optional:
                continue
            got = buf.role if isinstance(buf, BufId) else type(buf)
            if not (isinstance(buf, BufId) and issubclass(got, field.role)):
                raise GraphError(
                    f"[{op.variant_name}] {op.label!r}: field {field.name!r} expected "
                    f"{field.role.__name__} but got {got.__name__}"
                )
            if not 0 <= buf.index < len(self.pool.infos):
                raise GraphError(
                    f"[{op.variant_name}] {op.label!r}: field {field.name!r} expected "
                    f"a buffer of this pool but got {buf} of {len(self.pool.infos)}"
                )
            info = self.pool.info(buf)
            if info.role is not buf.role:
                raise GraphError(
                    f"[{op.variant_name}] {op.label!r}: field {field.name!r} is {buf}, "
                    f"which this pool allocated as {info.role.__name__}, not "
                    f"{buf.role.__name__}"
                )

    def _check_weights(self, op: Op) -> None:
        for field in fields(op):
            ref = getattr(op, field.name)
            is_absent = ref is None and field.default is None
            if field.name not in op.weight_fields or is_absent:
                continue
            if not isinstance(ref, WeightRef):
                raise GraphError(
                    f"[{op.variant_name}] {op.label!r}: field {field.name!r} expected "
                    f"WeightRef but got {type(ref).__name__}"
                )

    def _check_shapes(self, op: Op) -> None:
        shapes = op.shapes()
        for name in (*(f.name for f in op.buffer_fields), *op.weight_fields):
            value = getattr(op, name)
            if value is None:
                continue
            is_buf = isinstance(value, BufId)
            got = self.pool.info(value).shape if is_buf else value.shape
            if not fits(shapes[name], got):
                raise GraphError(
                    f"[{op.variant_name}] {op.label!r}: field {name!r} expected shape "
                    f"{shapes[name]} but got {tuple(got)}"
                )

    def __len__(self) -> int:
        return len(self.ops)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def labels(self) -> list[str]:
        """Return the labels in Op order."""
        return [op.label for op in self.ops]

    def dump(self) -> str:
        """Return one line per Op: index, variant and label."""
        lines = (
            f"{i:3}  {op.variant_name:<28}  {op.label}\n"
            for i, op in enumerate(self.ops)
        )
        return "".join(lines)

    def cost(self) -> Cost:
        """Return the sum of the Ops' costs."""
        return reduce(Cost.__add__, (op.cost() for op in self.ops), Cost())

    def verify(self) -> None:
        """Check the order of reads and writes, and the labels.

        Raises:
            GraphError: a transient buffer is read before any Op wrote it, or two Ops
                have the same label.
        """
        written: set[int] = set()
        labels: set[str] = set()
        for op in self.ops:
            for buf in op.reads:
                if buf.index not in written and not self._comes_from_outside(buf):
                    raise GraphError(
                        f"[{op.variant_name}] {op.label!r} reads {buf} "
                        f"({self.pool.label(buf)!r}) before any Op writes it"
                    )
            written.update(buf.index for buf in op.writes)
            if op.label in labels:
                raise GraphError(f"[Graph] {self.name!r} has two Ops {op.label!r}")
            labels.add(op.label)

    def _comes_from_outside(self, buf: BufId[Any]) -> bool:
        info = self.pool.info(buf)
        return (
            info.persistent
            or self.pool.values[self.pool.physical[buf.index]] is not None
        )
