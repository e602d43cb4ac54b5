"""A token of an mlx-lm model that runs ahead of reading its experts.

On a GPU, waiting for each layer's choice of experts costs more than anything else. So a
token runs as if no expert were missing: slots are looked up on the device, and the
blocks' choices are read back once for a window of blocks. If a block lacked an expert,
the expert is read, the caches are restored and the model is called again. Confirmed
layers and blocks then return their earlier results. The output does not depend on which
experts were in memory.
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


class RestartError(Exception):
    """A block lacked an expert, which has been read: the token must restart."""


@dataclass(frozen=True)
class _Passed:
    """A layer's output, its caches afterwards, and the blocks up to its end.

    ``shared`` has the contents of its dictionaries afterwards, in which layers of some
    models leave arrays for later ones.
    """

    out: Any
    states: list[CacheState]
    n_blocks: int
    shared: list[dict[Any, Any]]


class TokenAhead:
    """One token of each sequence that runs through a model ahead of reading.

    Args:
        window: number of blocks that run before their choices are read back.
        states: the states of the call's caches before the call.
        reads_ahead: also read the missing experts of later blocks.
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
        # Outputs of the first blocks, which had all their experts.
        self._confirmed: list[mx.array] = []
        # Layer, ids and output of each later block, which must be confirmed.
        self._pending: list[tuple[int, mx.array, mx.array | None]] = []
        self._passed: list[_Passed | None] = []
        # Whether the experts of the block after the confirmed ones have been read.
        self._has_experts = False
        self._n_blocks = self._n_layers = 0
        self._reached = 0

    def __call__(self, call: Callable[[], Any]) -> Any:
        """Repeat ``call`` until it has had all its experts, and return its result."""
        while True:
            try:
                out = call()
                self._confirm()
                return out
            except RestartError:
                self._restart()

    def _restart(self) -> None:
        self._reached = max(self._reached, self._n_blocks)
        self._n_blocks = self._n_layers = 0
        for state in self._states.values():
            state.put_back()

    def block(
        self, source: StreamedExperts, indices: mx.array, build: Build
    ) -> mx.array:
        """Return a block's output for ids ``[..., K]``, which may be unconfirmed.

        Args:
            build: computes the block's output from experts.
        """
        i = self._n_blocks
        self._n_blocks += 1
        if i < len(self._confirmed):
            return self._confirmed[i]
        if self._has_experts:
            # This block was read back in the last run, and its experts are present.
            return self._accept(self._run_ahead(source, build))
        if not self._can_run_ahead(indices):
            self._confirm()
            return self._accept(build(source))
        if self._pending and self._pending[0][1].size != indices.size:
            self._confirm()
        self._pending.append((source.layer, indices, None))
        if len(self._pending) >= self._window:
            # The window ends: read this block's experts before building it.
            self._confirm()
            return self._accept(self._run_ahead(source, build))
        out = self._run_ahead(source, build)
        self._pending[-1] = source.layer, indices, out
        if self._n_blocks % WINDOW_GROWTH == 0:
            # MLX refuses this inside a transformation that was not detected.
            with contextlib.suppress(ValueError):
                mx.async_eval(out)
        return out

    def layer(
        self, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Call a decoder layer, or return its confirmed result."""
        i = self._n_layers
        self._n_layers += 1
        passed = self._passed[i] if i < len(self._passed) else None
        if passed is not None and passed.n_blocks <= len(self._confirmed):
            for state in passed.states:
                state.put_back()
            for given, held in zip(_shared(args, options), passed.shared, strict=True):
                given.clear()
                given.update(held)
            self._n_blocks = passed.n_blocks
            return passed.out
        out = call(*args, **options)
        used: list[CacheState] = []
        known = self._is_function(args, options, used) and _is_value(out)
        states = [state.now() for state in used]
        shared = [dict(one) for one in _shared(args, options)]
        passed = _Passed(out, states, self._n_blocks, shared)
        self._passed[i:] = [passed if known else None]
        return out

    def _can_run_ahead(self, indices: mx.array) -> bool:
        fits = indices.size <= self._streamer.capacity
        return fits and indices.dtype in (mx.uint32, mx.int32)

    def _run_ahead(self, source: StreamedExperts, build: Build) -> mx.array:
        slots = self._streamer.slots_on_device([source.layer])
        out = build(source.speculative(slots))
        self._streamer.guard(out)
        return out

    def _accept(self, out: mx.array) -> mx.array:
        self._confirmed.append(out)
        self._has_experts = False
        return out

    def _confirm(self) -> None:
        """Read back the choices of the pending blocks, and confirm their outputs.

        If only the last block lacked experts and is not built yet, they are read now.

        Raises:
            RestartError: a block that was built lacked an expert.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        first = len(self._confirmed)
        n_right = self._streamer.confirm(
            [layer for layer, _, _ in pending],
            [indices for _, indices, _ in pending],
            n_predicted=max(0, self._reached - first) if self._reads_ahead else None,
        )
        self._confirmed += [out for _, _, out in pending[:n_right] if out is not None]
        if n_right < len(pending) and pending[n_right][2] is not None:
            self._has_experts = True
            raise RestartError

    def _is_function(
        self, args: tuple[Any, ...], options: dict[str, Any], used: list[CacheState]
    ) -> bool:
        """Tell whether a layer changes only known caches and dictionaries of values.

        Args:
            used: receives the states of these caches.
        """
        for value in (*args, *options.values()):
            held = tuple(value.values()) if isinstance(value, dict) else value
            if _is_value(held):
                continue
            given = value if isinstance(value, list | tuple) else [value]
            if not are_known(given):
                return False
            for one in single_caches(given):
                if (state := self._states.get(id(one))) is None:
                    return False
                used.append(state)
        return True


def _shared(args: tuple[Any, ...], options: dict[str, Any]) -> list[dict[Any, Any]]:
    """Return the dictionaries among a layer's arguments."""
    return [value for value in (*args, *options.values()) if isinstance(value, dict)]


def _is_value(value: Any) -> bool:
    """Tell whether a value is immutable."""
    if isinstance(value, tuple):
        return all(map(_is_value, value))
    return value is None or isinstance(value, mx.array | bool | int | float | str)
