"""The calls of a graph as compiled functions: no Python between launches.

Some calls cannot be compiled and divide the graph: Ops that a caller's object performs,
and experts that may have to be read first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx

from ...calls.compiling import Compiled
from ...experts.weights import Weight
from ..graph.lower import LoweredCall
from ..graph.rows import whole
from .base import Encoding


@dataclass
class Section:
    """Consecutive calls: compiled as one function, or run one by one.

    ``takes`` are the places it reads, ``gives`` those it writes for later sections, and
    ``drops`` those that no later section reads. ``requests`` pairs the place of a
    source of experts with the number of experts requested there.
    """

    calls: list[LoweredCall]
    takes: list[int]
    gives: list[int]
    drops: list[int]
    requests: list[tuple[int, int]]
    compiled: Callable[..., list[mx.array]] | None = None


class CompiledCalls:
    """The calls of one graph, compiled with one set of weights and of experts.

    Args:
        encoding: the encoding of the first run, with inputs bound. Compiled functions
            capture its weights and sources of experts, so only activations are passed.
    """

    def __init__(self, calls: Sequence[LoweredCall], encoding: Encoding):
        host, weights, values = encoding.host, encoding.weights, encoding.values

        def can_compile(call: LoweredCall) -> bool:
            places = (place for place in call.reads if place is not None)
            resident = all(self._sources.get(place, True) for place in places)
            reads_back = any(op.reads_back for op in call.ops)
            return resident and not reads_back and not call.is_performed_by(host)

        # All values are arrays, except sources of experts.
        self._sources = {
            i: value.resident
            for i, value in enumerate(values)
            if value is not None and not isinstance(value, mx.array)
        }
        self._size = len(values)
        # Callers tell compiled graphs apart by the ids of these, which must stay alive.
        self._bound = weights, [values[i] for i in self._sources]
        self._sections = [
            self._section(list(some), compiled, weights)
            for compiled, some in groupby(calls, can_compile)
        ]

    def _section(
        self, calls: list[LoweredCall], compiled: bool, weights: Mapping[str, Weight]
    ) -> Section:
        takes: dict[int, None] = {}
        alive: dict[int, None] = {}
        drops: dict[int, None] = {}
        requests: list[tuple[int, int]] = []
        for call in calls:
            for place in call.reads:
                if place in self._sources:
                    n_experts = sum(op.n_experts_used for op in call.ops)
                    requests.append((place, n_experts))
                elif place is not None and place not in alive:
                    takes[place] = None
            for place in call.drops:
                alive.pop(place, None)
                drops[place] = None
            for place in call.writes:
                alive[place] = None
                drops.pop(place, None)
        section = Section(calls, list(takes), list(alive), list(drops), requests)
        if compiled:
            section.compiled = Compiled(self._function(section, weights))
        return section

    def _function(
        self, section: Section, weights: Mapping[str, Weight]
    ) -> Callable[..., list[mx.array]]:
        def function(*taken: mx.array) -> list[mx.array]:
            values: list[Any] = [None] * self._size
            for place, source in self._sources.items():
                values[place] = source
            for place, value in zip(section.takes, taken, strict=True):
                values[place] = value
            for call in section.calls:
                call.run(values, weights)
            return [whole(values[place]) for place in section.gives]

        return function

    def let_go(self) -> None:
        """Drop the compiled functions, which refer back to their sections."""
        for section in self._sections:
            section.compiled = None

    def run(self, encoding: Encoding) -> None:
        """Run the calls."""
        host, weights, values = encoding.host, encoding.weights, encoding.values
        for section in self._sections:
            if section.compiled is None:
                for call in section.calls:
                    call.run(values, weights, host)
                continue
            given = section.compiled(*[values[place] for place in section.takes])
            for place, n in section.requests:
                values[place].count(n)
            for place in section.drops:
                values[place] = None
            for place, value in zip(section.gives, given, strict=True):
                values[place] = value
