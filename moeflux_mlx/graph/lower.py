"""From a graph to a list of calls: what each Op runs, reads, writes and lets go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..weights import Weight
from .graph import Graph
from .lifetime import analyze_lifetimes
from .op import Access, Op

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Step:
    """One lowered Op over physical places; a read of None is an absent buffer."""

    op: Op
    kernel: Kernel
    reads: tuple[int | None, ...]
    weights: tuple[str | None, ...]
    writes: tuple[int, ...]
    drops: tuple[int, ...]

    def run(
        self, values: list[Any], weights: Mapping[str, Weight], kernel: Kernel
    ) -> tuple[Any, ...]:
        """Call ``kernel``, store what it wrote, drop what nobody reads any more."""
        inputs = [None if i is None else values[i] for i in self.reads]
        for name in self.weights:
            inputs.append(None if name is None else weights[name])
        result = kernel(*inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        for place in self.drops:
            values[place] = None
        for place, value in zip(self.writes, outputs, strict=True):
            values[place] = value
        return outputs


def lower(graph: Graph, kernel_of: Callable[[Op], Kernel]) -> list[Step]:
    """Lower every Op with ``kernel_of``, dropping each value at its last use."""
    physical = graph.pool.physical
    last_use: dict[int, list[int]] = {}
    for index, life in analyze_lifetimes(graph).items():
        if life.last < len(graph.ops) - 1 or not _is_result(graph, index):
            last_use.setdefault(life.last, []).append(physical[index])
    return [
        lower_op(op, kernel_of(op), physical, tuple(last_use.get(i, ())))
        for i, op in enumerate(graph.ops)
    ]


def lower_op(
    op: Op, kernel: Kernel, physical: list[int], drops: tuple[int, ...] = ()
) -> Step:
    """Lower one Op to a call over physical places."""
    fields = [f for f in op.buffer_fields if f.access & Access.READ]
    buffers = [getattr(op, f.name) for f in fields]
    writes = tuple(physical[buf.index] for buf in op.writes)
    refs = [getattr(op, name) for name in op.weight_fields]
    return Step(
        op=op,
        kernel=kernel,
        reads=tuple(None if b is None else physical[b.index] for b in buffers),
        weights=tuple(None if ref is None else ref.name for ref in refs),
        writes=writes,
        drops=tuple(place for place in drops if place not in writes),
    )


def _is_result(graph: Graph, index: int) -> bool:
    """Tell whether no Op reads the buffer after its last write."""
    result = False
    for op in graph.ops:
        if any(buf.index == index for buf in op.reads):
            result = False
        if any(buf.index == index for buf in op.writes):
            result = True
    return result
