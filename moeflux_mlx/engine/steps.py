"""One token of each sequence through all layers, with as few waits as experts allow.

Where every expert is in memory that is one traced call. Where some are not, layers run
ahead as if all were: slots are looked up on the device, and which experts were asked
for is read back once for a window of layers. What the first layer that lacked one gave,
and all after it, is thrown away; the expert is read, and that layer begins again from
its input, which is still there. So nothing depends on which experts were in memory.

What later layers asked for in vain they will likely ask for again: it is read with what
the first one lacked, all at once, where that takes less time. Layers whose experts have
arrived are computed while those of the next ones are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from .. import device
from ..experts.streaming.streamer import ExpertStreamer
from ..experts.streaming.windows import WINDOW_GROWTH, window_of, window_sizes
from ..experts.weights import leaves
from .graph.experts import GraphExperts
from .trace import (
    Passed,
    StepTracer,
    can_trace,
    end_at,
    place_of,
    set_states,
    states_of,
)


class TokenSteps:
    """Runs single tokens from traces of a model's layers.

    Args:
        tracer: runs some of the layers.
        windows: how many of the last tokens a token sees in each layer; None: all.
    """

    def __init__(self, tracer: StepTracer, windows: Sequence[int | None]):
        self._tracer, self._windows = tracer, windows

    def __call__(
        self,
        tokens: mx.array,
        caches: Sequence[Any],
        sources: Sequence[GraphExperts | None],
        weights: Sequence[object],
        streamer: ExpertStreamer | None,
        *,
        traced: bool = True,
    ) -> mx.array | None:
        """Return the logits ``[B, 1, V]``, or None where only an ordinary call can.

        That is for caches that no trace knows. A step that fails leaves the caches as
        they were.

        Args:
            tokens: ``[B, 1]``.
            caches: one for each layer, as are ``sources``; None: without experts.
            weights: arrays of the traces besides ``sources``.
            streamer: of the experts that are not in memory for good; None: all are.
            traced: False makes the same calls without traces, to look into them.

        Raises:
            ExpertStoreError: an expert could not be read.
        """
        if not all(map(can_trace, caches, self._windows)):
            return None
        run = _Run(self._tracer, caches, sources, weights, traced)
        before = [states_of(c) if isinstance(c, ArraysCache) else None for c in caches]
        places = [(cache, place_of(cache)) for cache in caches]
        try:
            if streamer is None:
                logits = run(range(len(caches)), tokens, None).out
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
            self._tracer.give_back()
            run.put_back(before)
            for cache, place in places:
                end_at(cache, place)
            raise
        return logits


class _Run:
    """A step's calls of the tracer."""

    def __init__(
        self,
        tracer: StepTracer,
        caches: Sequence[Any],
        sources: Sequence[GraphExperts | None],
        weights: Sequence[object],
        traced: bool,
    ):
        self.caches, self.n_layers = caches, len(caches)
        self.asking = [
            i for i, s in enumerate(sources) if s is not None and s.resident is None
        ]
        self._tracer, self._held, self._traced = tracer, [*weights, *sources], traced

    def __call__(self, span: range, x: mx.array, slots: mx.array | None) -> Passed:
        """Run a span of layers, beginning with ``x``."""
        caches = self.caches[span.start : span.stop]
        return self._tracer(span, x, caches, self._held, slots, traced=self._traced)

    def put_back(self, states: Sequence[list[Any] | None], first: int = 0) -> None:
        """Give caches from layer ``first`` on the states they had; None: nothing.

        Rows need none: those after a ``KVCache``'s end do not count, and the one that
        a ``RotatingKVCache`` lost no later token sees.
        """
        for i in range(first, self.n_layers):
            if (held := states[i]) is not None:
                set_states(self.caches[i], held)


class _RunAhead:
    """A step whose experts may be missing."""

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
                # It has its experts now: only the next one can tell anything.
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
        """Run layers span by span, each beginning with the last one's output.

        Spans are small while experts are on their way: layers whose experts are there
        are computed.
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
        """Wait for the layers' choices; return the first that lacked an expert.

        Args:
            reached: layers before this one have run before.
        """
        asking = [layer for layer in self._run.asking if layer in layers]
        chosen = [part.chosen for part in passed if part.chosen is not None]
        if not asking:
            return None
        n_predicted = sum(layer < reached for layer in asking)
        n_right = self._streamer.confirm(
            asking,
            chosen,
            again=again and asking[:1] == [layers.start],
            n_predicted=n_predicted if self._reads_ahead else None,
        )
        return None if n_right == len(asking) else asking[n_right]


def first_span(layers: range, n_layers: int, most: int) -> range:
    """Return the largest span of up to ``most`` layers that layers begin with.

    Few traces serve wherever a run begins and ends: a span begins at a multiple of its
    size.
    """
    first = layers.start
    ends = (
        min(first + size, n_layers)
        for size in window_sizes(n_layers)
        if first % size == 0 and size <= most
    )
    return range(first, max(end for end in ends if end <= layers.stop))
