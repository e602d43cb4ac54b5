"""A call of any model of mlx-lm that waits for its experts, and reads ahead.

The module that a routed block is in chooses its experts. What it will likely choose it
tells beforehand: it is asked with the input of the one before, up to where it would
call its block. Only reading follows from that; a wrong guess costs time, never a bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

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

    def __contains__(self, number: int) -> bool:
        return number in self._modules

    def ask(self, number: int, x: mx.array) -> mx.array | None:
        """Return the ids that one chooses for ``x``, None if it does not tell.

        Its block must raise what ``WaitingCall.block`` does.
        """
        module = self._modules[number]
        try:
            module(x)
        except _ChosenError as chosen:
            return chosen.indices
        except Exception:
            # It takes more than an input, or another one: a guess is no reason to fail.
            pass
        del self._modules[number]
        return None


class WaitingCall:
    """A call that has each block's experts before that is built.

    Args:
        choosers: tell what the next block will choose; None: nothing is read ahead.
    """

    def __init__(self, choosers: Choosers | None):
        self._choosers = choosers
        self._asks = False
        # What the last chooser was given.
        self._x: mx.array | None = None

    def block(
        self, source: StreamedExperts, indices: mx.array, build: Build
    ) -> mx.array:
        """Return what a block gives for ids ``[..., K]``.

        Args:
            build: makes the block's output of experts.
        """
        if self._asks:
            raise _ChosenError(indices)
        following = source.layer + 1
        if (expected := self._expected(following)) is not None:
            return build(source.expecting(following, expected))
        return build(source)

    def layer(
        self, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Do what a decoder layer's call does."""
        return call(*args, **options)

    def choose(self, x: mx.array) -> None:
        """Hear what a chooser is given."""
        if not self._asks:
            self._x = x

    def _expected(self, number: int) -> mx.array | None:
        x, self._x = self._x, None
        if x is None or self._choosers is None or number not in self._choosers:
            return None
        self._asks = True
        try:
            return self._choosers.ask(number, x)
        finally:
            self._asks = False


def takes_input_alone(module: nn.Module) -> bool:
    """Tell whether a module can be called with one array."""
    parameters = inspect.signature(type(module).__call__).parameters.values()
    needed = [p for p in parameters if p.default is p.empty][1:]
    return (
        len(needed) == 1 and needed[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )
