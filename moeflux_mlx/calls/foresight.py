"""A call of any model of mlx-lm that waits for its experts, and reads ahead.

The module that a routed block is in chooses its experts, or one beside it that gives
their ids. What it will likely choose it tells beforehand: it is asked with the input of
the one before, up to where it would call its block or gives ids. Only reading follows
from that; a wrong guess costs time, never a bit.
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
    """Has the ids that a block is called with."""

    def __init__(self, indices: mx.array):
        super().__init__()
        self.indices = indices


class Choosers:
    """The modules that choose experts, by the number of their block."""

    def __init__(self, modules: Mapping[int, nn.Module]):
        self._modules = dict(modules)
        # Where ids are in what a module gives that calls no block.
        self._places: dict[int, int] = {}

    def add(self, number: int, module: nn.Module, place: int) -> None:
        """Have a module asked that gives a block's ids, at ``place`` of its arrays."""
        if number not in self._places:
            self._modules[number], self._places[number] = module, place

    def __contains__(self, number: int) -> bool:
        return number in self._modules

    def ask(self, number: int, x: mx.array) -> mx.array | None:
        """Return the ids that one chooses for ``x``, None if it does not tell.

        Its block must raise the same as ``WaitingCall.block``.
        """
        module = self._modules[number]
        try:
            out = module(x)
            if number in self._places:
                return [*_arrays(out)][self._places[number]]
        except _ChosenError as chosen:
            return chosen.indices
        except Exception:
            # It takes more than an input, or another one: a guess is no reason to fail.
            pass
        del self._modules[number]
        return None


class _Given(NamedTuple):
    """What a module was given, and the arrays that it gave for it."""

    module: nn.Module
    x: mx.array
    arrays: list[mx.array]


class WaitingCall:
    """A call that has each block's experts before that is built.

    Args:
        choosers: foretell the next block's choice; None: nothing is read ahead.
    """

    def __init__(self, choosers: Choosers | None):
        self._choosers = choosers
        self._asks = False
        # The last chooser's input.
        self._x: mx.array | None = None
        # What may have given the next block's ids.
        self._given: list[_Given] = []

    def block(
        self, source: StreamedExperts, indices: mx.array, build: Build
    ) -> mx.array:
        """Return a block's output for ids ``[..., K]``.

        Args:
            build: makes the block's output of experts.
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
        """Make a decoder layer's call."""
        return call(*args, **options)

    def choose(self, x: mx.array) -> None:
        """Hear a chooser's input."""
        if not self._asks:
            self._x = x

    def gives(self, module: nn.Module, x: mx.array, out: Any) -> None:
        """Hear what a module gave that may be ids of experts."""
        if not self._asks and self._choosers is not None:
            self._given.append(_Given(module, x, [*_arrays(out)]))

    def _find_giver(self, number: int, indices: mx.array) -> None:
        """Have the module that gave these ids asked for them from now on."""
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
    """Yield the arrays among what a module gave."""
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
