"""A token of any model of mlx-lm that runs ahead of reading its experts.

To wait for each layer's choice of experts before what follows is launched costs a GPU
more than anything else. So a token runs as if no expert were missing: slots are looked
up on the device, and what blocks asked for is read back once for a window of them.
Where a block lacked an expert, that is read, the caches are put back and the model is
called again: decoder layers before the block, and blocks, give what they gave before.
Nothing depends on which experts were in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..experts.compute.source import ExpertSource
from ..experts.compute.streamed import StreamedExperts
from ..experts.streaming.streamer import ExpertStreamer
from ..experts.streaming.windows import WINDOW_GROWTH
from ..memory.caches import CacheState, are_known, single_caches

Build = Callable[[ExpertSource], mx.array]


class AgainError(Exception):
    """A block lacked an expert, which is there now: the token begins again."""


@dataclass(frozen=True)
class _Passed:
    """A layer's output, its changes of caches, and the blocks up to its end."""

    out: Any
    states: list[CacheState]
    n_blocks: int


class TokenAhead:
    """One token of each sequence on its way through a model, ahead of reading.

    Args:
        window: blocks that run before their choices are read back.
        states: of the call's caches before it.
        reads_ahead: read experts that later blocks lacked ahead of them.
    """

    def __init__(
        self,
        streamer: ExpertStreamer,
        window: int,
        states: Sequence[CacheState],
        *,
        reads_ahead: bool,
    ):
        self._streamer, self._window = streamer, window
        self._reads_ahead = reads_ahead
        self._states = {id(state.cache): state for state in states}
        # Outputs of blocks with the experts that they asked for, from the first on.
        self._right: list[mx.array] = []
        # Layer, ids and outputs of blocks that followed, and are to be looked at.
        self._assumed: list[tuple[int, mx.array, mx.array | None]] = []
        self._passed: list[_Passed | None] = []
        # Whether the block after those that are right has been given its experts.
        self._provided = False
        self._n_blocks = self._n_layers = 0
        self._reached = 0

    def __call__(self, call: Callable[[], Any]) -> Any:
        """Return the result of ``call`` once it has had all its experts."""
        while True:
            try:
                out = call()
                self._look()
                return out
            except AgainError:
                self._begin_again()

    def _begin_again(self) -> None:
        self._reached = max(self._reached, self._n_blocks)
        self._n_blocks = self._n_layers = 0
        for state in self._states.values():
            state.put_back()

    def block(
        self, source: StreamedExperts, indices: mx.array, build: Build
    ) -> mx.array:
        """Return a block's output for ids ``[..., K]``, known to be right or not.

        Args:
            build: makes the block's output of experts.
        """
        i = self._n_blocks
        self._n_blocks += 1
        if i < len(self._right):
            return self._right[i]
        if self._provided:
            # The only block that can be the next: it was looked at before.
            return self._know(self._assume(source, build))
        if not self._can_assume(indices):
            self._look()
            return self._know(build(source))
        if self._assumed and self._assumed[0][1].size != indices.size:
            self._look()
        self._assumed.append((source.layer, indices, None))
        if len(self._assumed) >= self._window:
            # Its own experts are had before it is built.
            self._look()
            return self._know(self._assume(source, build))
        out = self._assume(source, build)
        self._assumed[-1] = source.layer, indices, out
        if self._n_blocks % WINDOW_GROWTH == 0:
            # Not allowed inside a transformation, of which nobody knew.
            with contextlib.suppress(ValueError):
                mx.async_eval(out)
        return out

    def layer(
        self, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Make a decoder layer's call, or repeat its result."""
        i = self._n_layers
        self._n_layers += 1
        passed = self._passed[i] if i < len(self._passed) else None
        if passed is not None and passed.n_blocks <= len(self._right):
            for state in passed.states:
                state.put_back()
            self._n_blocks = passed.n_blocks
            return passed.out
        out = call(*args, **options)
        used: list[CacheState] = []
        known = self._is_function(args, options, used) and _is_value(out)
        states = [state.now() for state in used]
        self._passed[i:] = [_Passed(out, states, self._n_blocks) if known else None]
        return out

    def _can_assume(self, indices: mx.array) -> bool:
        fits = indices.size <= self._streamer.capacity
        return fits and indices.dtype in (mx.uint32, mx.int32)

    def _assume(self, source: StreamedExperts, build: Build) -> mx.array:
        slots = self._streamer.slots_on_device([source.layer])
        out = build(source.speculative(slots))
        self._streamer.guard(out)
        return out

    def _know(self, out: mx.array) -> mx.array:
        self._right.append(out)
        self._provided = False
        return out

    def _look(self) -> None:
        """Read back the blocks' choices; return if all were in memory.

        It has been read if only the last one, which is not built yet, lacked some.

        Raises:
            AgainError: a block that was built did.
        """
        if not self._assumed:
            return
        assumed, self._assumed = self._assumed, []
        first = len(self._right)
        n_right = self._streamer.confirm(
            [layer for layer, _, _ in assumed],
            [indices for _, indices, _ in assumed],
            n_predicted=max(0, self._reached - first) if self._reads_ahead else None,
        )
        self._right += [out for _, _, out in assumed[:n_right] if out is not None]
        if n_right < len(assumed) and assumed[n_right][2] is not None:
            self._provided = True
            raise AgainError

    def _is_function(
        self, args: tuple[Any, ...], options: dict[str, Any], used: list[CacheState]
    ) -> bool:
        """Tell whether a layer can change nothing of what it is given but known caches.

        Args:
            used: is added these caches' states.
        """
        for value in (*args, *options.values()):
            if _is_value(value):
                continue
            given = value if isinstance(value, list | tuple) else [value]
            if not are_known(given):
                return False
            for one in single_caches(given):
                if (state := self._states.get(id(one))) is None:
                    return False
                used.append(state)
        return True


def _is_value(value: Any) -> bool:
    """Tell whether nobody can change a value."""
    if isinstance(value, tuple):
        return all(map(_is_value, value))
    return value is None or isinstance(value, mx.array | bool | int | float | str)
