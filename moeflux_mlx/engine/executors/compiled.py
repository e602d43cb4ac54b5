"""Steps of a graph as functions that MLX traced once: no Python between launches.

Some Ops cannot be traced and part the graph: Ops that a caller's object
performs, and experts that may have to be read first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx

from ...calls.compiling import Compiled
from ...experts.weights import Weight
from ..graph.lower import Step
from ..graph.rows import whole
from .base import Encoding


@dataclass
class Part:
    """Consecutive steps: traced as one function, or run one by one.

    ``takes`` are the places it reads and ``gives`` those it leaves written, ``drops``
    those that nobody reads after it. ``asks`` says how many experts it asks the source
    in a place for.
    """

    steps: list[Step]
    takes: list[int]
    gives: list[int]
    drops: list[int]
    asks: list[tuple[int, int]]
    call: Callable[..., list[mx.array]] | None = None


class CompiledSteps:
    """The steps of one graph with one set of weights and one set of experts.

    Args:
        encoding: the first run's, with its inputs bound. The weights and the sources of
            experts in it are part of the traces: a call passes only activations.
    """

    def __init__(self, steps: Sequence[Step], encoding: Encoding):
        host, weights, values = encoding.host, encoding.weights, encoding.values

        def is_traceable(step: Step) -> bool:
            places = (place for place in step.reads if place is not None)
            settled = all(self._sources.get(place, True) for place in places)
            reads_back = any(op.reads_back for op in step.ops)
            return settled and not reads_back and not step.is_performed_by(host)

        # Sources of experts are the only values that are no arrays.
        self._sources = {
            i: value.resident
            for i, value in enumerate(values)
            if value is not None and not isinstance(value, mx.array)
        }
        self._size = len(values)
        # Callers tell traces apart by the ids of these: they must not be used again.
        self._bound = weights, [values[i] for i in self._sources]
        self._parts = [
            self._part(list(group), traceable, weights)
            for traceable, group in groupby(steps, is_traceable)
        ]

    def _part(
        self, steps: list[Step], traceable: bool, weights: Mapping[str, Weight]
    ) -> Part:
        takes: dict[int, None] = {}
        alive: dict[int, None] = {}
        drops: dict[int, None] = {}
        asks: list[tuple[int, int]] = []
        for step in steps:
            for place in step.reads:
                if place in self._sources:
                    n_experts = sum(op.n_experts_used for op in step.ops)
                    asks.append((place, n_experts))
                elif place is not None and place not in alive:
                    takes[place] = None
            for place in step.drops:
                alive.pop(place, None)
                drops[place] = None
            for place in step.writes:
                alive[place] = None
                drops.pop(place, None)
        part = Part(steps, list(takes), list(alive), list(drops), asks)
        if traceable:
            part.call = Compiled(self._function(part, weights))
        return part

    def _function(
        self, part: Part, weights: Mapping[str, Weight]
    ) -> Callable[..., list[mx.array]]:
        def call(*taken: mx.array) -> list[mx.array]:
            values: list[Any] = [None] * self._size
            for place, source in self._sources.items():
                values[place] = source
            for place, value in zip(part.takes, taken, strict=True):
                values[place] = value
            for step in part.steps:
                step.run(values, weights)
            return [whole(values[place]) for place in part.gives]

        return call

    def let_go(self) -> None:
        """Let all that is part of the traces go at once: functions refer to parts."""
        for part in self._parts:
            part.call = None

    def run(self, encoding: Encoding) -> None:
        """Run the steps."""
        host, weights, values = encoding.host, encoding.weights, encoding.values
        for part in self._parts:
            if part.call is None:
                for step in part.steps:
                    step.run(values, weights, host)
                continue
            given = part.call(*[values[place] for place in part.takes])
            for place, n in part.asks:
                values[place].count(n)
            for place in part.drops:
                values[place] = None
            for place, value in zip(part.gives, given, strict=True):
                values[place] = value
