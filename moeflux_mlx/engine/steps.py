"""A decoding step through all layers, with as few waits as the experts allow.

If every expert is in memory, a step is one compiled call. Otherwise layers run ahead as
if all were: slots are looked up on the device, and the requested experts are read back
once for a window of layers. The outputs of the first layer that lacked an expert, and
of all layers after it, are discarded. The expert is read, and that layer runs again
from its input, which was kept. So results do not depend on which experts were in
memory.

Later layers will likely request the same missing experts again, so these are read
together with the first layer's where that takes less time. Layers whose experts have
arrived are computed while experts of the next layers are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from .. import device
from ..experts.streaming.streamer import ExpertStreamer
from ..experts.streaming.windows import WINDOW_GROWTH, window_of, window_sizes
from ..experts.weights import leaves
from .compiled_layers import (
    CompiledLayers,
    Passed,
    can_compile,
    end_at,
    place_of,
    set_states,
    states_of,
)
from .graph.experts import GraphExperts


class TokenSteps:
    """Runs decoding steps as compiled calls of a model's layers.

    Args:
        run_layers: runs some of the layers.
        windows: number of last tokens that a token sees in each layer; None: all.
    """

    def __init__(self, run_layers: CompiledLayers, windows: Sequence[int | None]):
        self._run_layers, self._windows = run_layers, windows

    def __call__(
        self,
        tokens: mx.array,
        caches: Sequence[Any],
        sources: Sequence[GraphExperts | None],
        weights: Sequence[object],
        streamer: ExpertStreamer | None,
        *,
        compiled: bool = True,
        told: Callable[[mx.array], None] | None = None,
    ) -> mx.array | None:
        """Return the logits ``[B, 1, V]``; None if it needs an ordinary call.

        That is so for caches that cannot be compiled. A failed step leaves the caches
        as they were.

        Args:
            tokens: ``[B, 1]``.
            caches: the cache of each layer.
            sources: the experts of each layer; None for a layer without experts.
            weights: arrays that compiled functions capture besides ``sources``.
            streamer: the streamer; None if all experts stay in memory.
            compiled: False makes the same calls without compiling, to observe them.
            told: receives ``Passed.chosen`` if ranks share the experts, all of which
                stay in memory.

        Raises:
            ExpertStoreError: an expert could not be read.
        """
        if not all(map(can_compile, caches, self._windows)):
            return None
        run = _Run(self._run_layers, caches, sources, weights, compiled)
        before = [states_of(c) if isinstance(c, ArraysCache) else None for c in caches]
        places = [(cache, place_of(cache)) for cache in caches]
        try:
            if streamer is None:
                passed = run(range(len(caches)), tokens, None)
                logits = passed.out
                if told is not None and passed.chosen is not None:
                    told(passed.chosen)
            else:
                ahead = streamer.read_ahead.begin()
                window = window_of(
                    streamer.miss_rate,
                    len(caches),
                    device.GPU_READ_BACK_LAYERS,
                    ahead=ahead,
                )
                logits = _RunAhead(run, streamer, before, ahead)(tokens, window)
                streamer.read_ahead.end()
            for cache, place in places:
                end_at(cache, place, 1)
        except BaseException:
            self._run_layers.give_back()
            run.put_back(before)
            for cache, place in places:
                end_at(cache, place)
            raise
        return logits


class _Run:
    """The calls of one step."""

    def __init__(
        self,
        run_layers: CompiledLayers,
        caches: Sequence[Any],
        sources: Sequence[GraphExperts | None],
        weights: Sequence[object],
        compiled: bool,
    ):
        self.caches, self.n_layers = caches, len(caches)
        self.streamed = [
            i for i, s in enumerate(sources) if s is not None and s.resident is None
        ]
        self._run_layers, self._compiled = run_layers, compiled
        self._held = [*weights, *sources]

    def __call__(self, span: range, x: mx.array, slots: mx.array | None) -> Passed:
        """Run a span of layers, beginning with ``x``."""
        caches = self.caches[span.start : span.stop]
        how = self._held, slots
        return self._run_layers(span, x, caches, *how, compiled=self._compiled)

    def put_back(self, states: Sequence[list[Any] | None], first: int = 0) -> None:
        """Restore the states of caches from layer ``first`` on; None restores nothing.

        Caches of rows need no restoring: rows after the end of a ``KVCache`` do not
        count, and no later token sees the row that a ``RotatingKVCache`` lost.
        """
        for i in range(first, self.n_layers):
            if (held := states[i]) is not None:
                set_states(self.caches[i], held)


class _RunAhead:
    """A step in which experts may be missing."""

    def __init__(
        self,
        run: _Run,
        streamer: ExpertStreamer,
        before: Sequence[list[Any] | None],
        ahead: bool,
    ):
        self._run, self._streamer, self._before = run, streamer, before
        self._reads_ahead = ahead

    def __call__(self, tokens: mx.array, window: int) -> mx.array:
        x, first, reached = tokens, 0, 0
        n_layers = self._run.n_layers
        while first < n_layers:
            stop = first - first % window + window
            if again := first < reached:
                # This layer has its experts now, so only the next one can miss some.
                stop = max(stop, first + 2)
            layers = range(first, min(n_layers, stop))
            passed = self._pass(layers, x)
            if again and len(layers) == 1:
                missed = None
            else:
                missed = self._missed(layers, passed, reached, again=again)
            reached = max(reached, layers.stop)
            if missed is None:
                x, first = passed[-1].out, layers.stop
                continue
            inputs = [value for part in passed for value in part.inputs]
            x, first = inputs[missed - first], missed
            self._run.put_back(self._before, first)
        self._streamer.guard(x)
        return x

    def _pass(self, layers: range, x: mx.array) -> list[Passed]:
        """Run layers span by span, each on the output of the span before.

        Spans are small while experts are being read, so that layers whose experts have
        arrived are computed meanwhile.
        """
        passed: list[Passed] = []
        n_layers = self._run.n_layers
        while layers:
            most = WINDOW_GROWTH if self._streamer.is_reading else n_layers
            span = first_span(layers, n_layers, most)
            slots = self._streamer.slots_on_device(span)
            passed.append(self._run(span, x, slots))
            mx.async_eval(leaves([passed[-1].chosen, passed[-1].out]))
            x, layers = passed[-1].out, layers[len(span) :]
        return passed

    def _missed(
        self, layers: range, passed: Sequence[Passed], reached: int, *, again: bool
    ) -> int | None:
        """Wait for the layers' choices; return the first layer that lacked an expert.

        Args:
            reached: layers before this one have run in this step before.
        """
        requesting = [layer for layer in self._run.streamed if layer in layers]
        chosen = [part.chosen for part in passed if part.chosen is not None]
        if not requesting:
            return None
        n_predicted = sum(layer < reached for layer in requesting)
        n_right = self._streamer.confirm(
            requesting,
            chosen,
            again=again and requesting[:1] == [layers.start],
            n_predicted=n_predicted if self._reads_ahead else None,
        )
        return None if n_right == len(requesting) else requesting[n_right]


def first_span(layers: range, n_layers: int, most: int) -> range:
    """Return the largest span of up to ``most`` layers at the start of ``layers``.

    A span begins at a multiple of its size, so that few compiled functions serve runs
    with any first and last layer.
    """
    first = layers.start
    ends = (
        min(first + size, n_layers)
        for size in window_sizes(n_layers)
        if first % size == 0 and size <= most
    )
    return range(first, max(end for end in ends if end <= layers.stop))
