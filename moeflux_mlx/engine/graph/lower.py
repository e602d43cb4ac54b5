"""Lower a graph to calls: the kernel, reads, writes and drops of each.

A call performs one Op, or a fusion of consecutive Ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...experts.weights import Weight
from .buffers import BufId
from .graph import Graph
from .lifetime import analyze_lifetimes
from .op import Access, Op
from .rows import whole

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class FusedCall:
    """A fusion of ``n`` Ops.

    ``call`` maps the values of their buffers, by ``BufId``, and weights, by name, to
    the values of the buffers it wrote; None maps to None. ``weights`` names the layer's
    weights that it reads. ``takes_parts``: it takes ``RowPart`` values as they are.
    """

    n: int
    call: Callable[[Mapping[Any, Any]], Mapping[Any, Any]]
    weights: tuple[str, ...]
    takes_parts: bool = False


# Returns the fusion that a list of Ops begins with; None: the first runs alone.
Fuse = Callable[[Sequence[Op]], FusedCall | None]


@dataclass(frozen=True)
class LoweredCall:
    """A call of one kernel over physical places; a read of None is an absent buffer."""

    ops: tuple[Op, ...]
    kernel: Kernel
    reads: tuple[int | None, ...]
    weights: tuple[str | None, ...]
    writes: tuple[int, ...]
    drops: tuple[int, ...]
    takes_parts: bool = False

    @property
    def label(self) -> str:
        """The Ops' names, then their labels."""
        names = "+".join(op.variant_name for op in self.ops)
        return f"{names} {'+'.join(op.label for op in self.ops)}"

    def is_performed_by(self, host: Mapping[type[Op], Kernel]) -> bool:
        """Return whether a function in ``host`` performs it."""
        return type(self.ops[0]) in host

    def inputs(self, values: Sequence[Any], weights: Mapping[str, Weight]) -> list[Any]:
        """Return the kernel's arguments: the buffers it reads, then its weights."""
        read = [None if i is None else values[i] for i in self.reads]
        if not self.takes_parts:
            read = [whole(value) for value in read]
        return [*read, *(None if n is None else weights[n] for n in self.weights)]

    def run(
        self,
        values: list[Any],
        weights: Mapping[str, Weight],
        host: Mapping[type[Op], Kernel] | None = None,
    ) -> tuple[Any, ...]:
        """Run the kernel, store its results, and drop values after their last read.

        Args:
            host: functions of the caller that replace kernels, by type of Op.
        """
        kernel = (host or {}).get(type(self.ops[0]), self.kernel)
        result = kernel(*self.inputs(values, weights))
        outputs = result if isinstance(result, tuple) else (result,)
        for place in self.drops:
            values[place] = None
        for place, value in zip(self.writes, outputs, strict=True):
            values[place] = value
        return outputs


def lower(
    graph: Graph, kernel_of: Callable[[Op], Kernel], fuse: Fuse = lambda ops: None
) -> list[LoweredCall]:
    """Lower every Op with ``kernel_of``, dropping each value at its last use.

    Args:
        fuse: is tried first; the Ops of a fusion become one call.
    """
    physical = graph.pool.physical
    # Buffers missing here live on after the graph.
    last_use = {
        index: life.last
        for index, life in analyze_lifetimes(graph).items()
        if life.last < len(graph.ops) - 1 or not _is_result(graph, index)
    }
    calls: list[LoweredCall] = []
    first = 0
    while first < len(graph.ops):
        fusion = fuse(graph.ops[first:])
        n = fusion.n if fusion else 1
        drops = tuple(
            physical[index]
            for index, last in last_use.items()
            if first <= last < first + n
        )
        ops = tuple(graph.ops[first : first + n])
        if fusion is None:
            calls.append(lower_op(ops[0], kernel_of(ops[0]), physical, drops))
        else:
            alive = {
                buf
                for op in ops
                for buf in op.writes
                if last_use.get(buf.index, len(graph.ops)) >= first + n
            }
            calls.append(_lower_fusion(ops, fusion, physical, drops, alive))
        first += n
    return calls


def _lower_fusion(
    ops: tuple[Op, ...],
    fusion: FusedCall,
    physical: list[int],
    drops: tuple[int, ...],
    alive: set[Any],
) -> LoweredCall:
    """Lower a fusion; it writes only the buffers in ``alive``."""
    reads = buffers_read(ops)
    writes = sorted(alive, key=lambda buf: buf.index)

    def kernel(*inputs: Any) -> tuple[Any, ...]:
        values = dict(zip((*reads, *fusion.weights), inputs, strict=True))
        outputs = fusion.call({None: None, **values})
        return tuple(outputs[buf] for buf in writes)

    places = tuple(physical[buf.index] for buf in writes)
    return LoweredCall(
        ops=ops,
        kernel=kernel,
        reads=tuple(None if buf is None else physical[buf.index] for buf in reads),
        weights=fusion.weights,
        writes=places,
        # A result may take the place of a value that is dropped here.
        drops=tuple(place for place in drops if place not in places),
        takes_parts=fusion.takes_parts,
    )


def buffers_read(ops: Sequence[Op]) -> list[BufId[Any] | None]:
    """Return the buffers that a call of Ops reads, in the order of its ``reads``.

    A single Op reads every field, None where an optional one is absent. A fusion reads
    each buffer once, without those that its earlier Ops wrote.
    """
    if len(ops) == 1:
        fields = (f for f in ops[0].buffer_fields if f.access & Access.READ)
        return [getattr(ops[0], field.name) for field in fields]
    reads: dict[BufId[Any], None] = {}
    written: set[BufId[Any]] = set()
    for op in ops:
        reads |= {buf: None for buf in op.reads if buf not in written}
        written.update(op.writes)
    return [*reads]


def lower_op(
    op: Op, kernel: Kernel, physical: list[int], drops: tuple[int, ...] = ()
) -> LoweredCall:
    """Lower one Op to a call over physical places."""
    buffers = buffers_read((op,))
    writes = tuple(physical[buf.index] for buf in op.writes)
    refs = [getattr(op, name) for name in op.weight_fields]
    return LoweredCall(
        ops=(op,),
        kernel=kernel,
        reads=tuple(None if b is None else physical[b.index] for b in buffers),
        weights=tuple(None if ref is None else ref.name for ref in refs),
        writes=writes,
        # A result may take the place of a value that is dropped here.
        drops=tuple(place for place in drops if place not in writes),
    )


def _is_result(graph: Graph, index: int) -> bool:
    """Return whether no Op reads the buffer after its last write."""
    result = False
    for op in graph.ops:
        if any(buf.index == index for buf in op.reads):
            result = False
        if any(buf.index == index for buf in op.writes):
            result = True
    return result
