"""Lifetimes of buffers, and which buffers may share a place.

A buffer is planned only if its first use is a plain write; otherwise its value comes
from outside the graph. A value that no Op reads after its last write is a result and
lives to the end of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .graph import Graph


@dataclass(frozen=True)
class Lifetime:
    """The first and the last Op that need a value, by index, both inclusive."""

    first: int
    last: int


@dataclass(frozen=True)
class Coloring:
    """The colour of each buffer by index; buffers of one colour share a place."""

    colors: dict[int, int]
    n_colors: int


def analyze_lifetimes(graph: Graph) -> dict[int, Lifetime]:
    """Return the lifetime of every buffer that the graph itself produces, by index."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    from_outside: set[int] = set()
    for i, op in enumerate(graph.ops):
        reads = {buf.index for buf in op.reads}
        for index in reads:
            if index not in first:
                from_outside.add(index)
            last[index] = i
        for buf in op.writes:
            first.setdefault(buf.index, i)
            last[buf.index] = len(graph.ops) - 1
    infos = graph.pool.infos
    return {
        index: Lifetime(start, last[index])
        for index, start in sorted(first.items())
        if index not in from_outside
        and (infos[index].planned or not infos[index].persistent)
    }


def greedy_color(lifetimes: Mapping[int, Lifetime]) -> Coloring:
    """Give each buffer the lowest colour that is free when it is first written."""
    free_from: list[int] = []
    colors: dict[int, int] = {}
    order = sorted(lifetimes.items(), key=lambda item: (item[1].first, item[0]))
    for index, life in order:
        free = (color for color, end in enumerate(free_from) if end < life.first)
        color = next(free, len(free_from))
        if color == len(free_from):
            free_from.append(0)
        free_from[color] = life.last
        colors[index] = color
    return Coloring(colors, len(free_from))


def planned_peak_bytes(graph: Graph) -> int:
    """Return the most bytes live at one Op: planned values plus the Op's scratch."""
    lifetimes = analyze_lifetimes(graph)
    itemsize = graph.pool.activation_dtype.size
    return max(
        (
            op.scratch_bytes(itemsize)
            + sum(
                graph.pool.infos[index].n_bytes
                for index, life in lifetimes.items()
                if life.first <= i <= life.last
            )
            for i, op in enumerate(graph.ops)
        ),
        default=0,
    )
