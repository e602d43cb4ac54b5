"""A call of an mlx-lm model that waits for its experts, and reads ahead.

The module around a routed block chooses its experts, or a module beside it returns
their ids. To predict its choice, the module is called early, with the input of the
previous one, and stopped where it calls its block or returns ids. A prediction only
starts reads: a wrong one costs time and changes no bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..experts.compute.source import ExpertSource
from ..experts.compute.streamed import StreamedExperts

Build = Callable[[ExpertSource], mx.array]


class _ChosenError(Exception):
    """Carries the ids with which a block is called."""

    def __init__(self, indices: mx.array):
        super().__init__()
        self.indices = indices


class Choosers:
    """The modules that choose experts, by the index of their block."""

    def __init__(self, modules: Mapping[int, nn.Module]):
        self._modules = dict(modules)
        # For modules that return ids: the index of the ids among their outputs.
        self._places: dict[int, int] = {}

    def add(self, number: int, module: nn.Module, place: int) -> None:
        """Add a module that returns a block's ids as array ``place`` of its outputs."""
        if number not in self._places:
            self._modules[number], self._places[number] = module, place

    def __contains__(self, number: int) -> bool:
        return number in self._modules

    def ask(self, number: int, x: mx.array) -> mx.array | None:
        """Return the ids that a module chooses for ``x``, or None if that fails.

        Its block must raise ``_ChosenError``, as ``WaitingCall.block`` does.
        """
        module = self._modules[number]
        try:
            out = module(x)
            if number in self._places:
                return [*_arrays(out)][self._places[number]]
        except _ChosenError as chosen:
            return chosen.indices
        except Exception:
            # The module needs other arguments. A prediction must not fail the call.
            pass
        del self._modules[number]
        return None


class _Given(NamedTuple):
    """A module's input and the arrays that it returned."""

    module: nn.Module
    x: mx.array
    arrays: list[mx.array]


class WaitingCall:
    """A call that waits for each block's experts before building it.

    Args:
        choosers: predict the next block's choice; None disables reading ahead.
    """

    def __init__(self, choosers: Choosers | None):
        self._choosers = choosers
        self._asks = False
        # The last chooser's input.
        self._x: mx.array | None = None
        # Modules that may have returned the next block's ids.
        self._given: list[_Given] = []

    def block(
        self, source: StreamedExperts, indices: mx.array, build: Build
    ) -> mx.array:
        """Return a block's output for ids ``[..., K]``.

        Args:
            build: computes the block's output from experts.
        """
        if self._asks:
            raise _ChosenError(indices)
        if self._x is None and self._choosers is not None:
            self._find_giver(source.layer, indices)
        self._given.clear()
        following = source.layer + 1
        if (expected := self._expected(following)) is not None:
            return build(source.expecting(following, expected))
        return build(source)

    def layer(
        self, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Call a decoder layer."""
        return call(*args, **options)

    def choose(self, x: mx.array) -> None:
        """Record a chooser's input."""
        if not self._asks:
            self._x = x

    def gives(self, module: nn.Module, x: mx.array, out: Any) -> None:
        """Record a module's output that may contain ids of experts."""
        if not self._asks and self._choosers is not None:
            self._given.append(_Given(module, x, [*_arrays(out)]))

    def _find_giver(self, number: int, indices: mx.array) -> None:
        """Remember the module that returned these ids, for later predictions."""
        assert self._choosers is not None
        for given in self._given:
            for place, array in enumerate(given.arrays):
                if array is indices:
                    self._x = given.x
                    self._choosers.add(number, given.module, place)

    def _expected(self, number: int) -> mx.array | None:
        x, self._x = self._x, None
        if x is None or self._choosers is None or number not in self._choosers:
            return None
        self._asks = True
        try:
            return self._choosers.ask(number, x)
        finally:
            self._asks = False


def _arrays(out: Any) -> Iterator[mx.array]:
    """Yield the arrays in a module's output."""
    for one in out if isinstance(out, tuple) else (out,):
        if isinstance(one, mx.array):
            yield one


def takes_input_alone(module: nn.Module) -> bool:
    """Tell whether a module can be called with one array."""
    parameters = inspect.signature(type(module).__call__).parameters.values()
    needed = [p for p in parameters if p.default is p.empty][1:]
    return (
        len(needed) == 1 and needed[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )
