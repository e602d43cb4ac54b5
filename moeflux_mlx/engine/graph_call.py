"""A call of a model through graphs: its layers one by one, or a token's compiled.

The forms of a family describe its layers; this module knows no mixer and no router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..experts.compute.rank_experts import RankExperts, told_of
from ..experts.compute.streamed import SpeculativeExperts
from ..experts.streaming.streamer import ExpertStreamer
from ..experts.weights import Weight, has_values
from ..memory.caches import PutBackOnFailure
from ..memory.plan import affords_unpacked
from ..system.progress import prompt_progress
from .compiled_layers import CompiledLayers, Passed, arrays_of
from .context import Context
from .ends import Ends
from .graph.experts import GraphExperts
from .layer import GraphLayer, LayerForm
from .needs import TextNeeds
from .ops.functions import Array, to_device
from .runtime import Runtime
from .steps import TokenSteps


class GraphCall:
    """Passes weights, states and masks to the graphs of a text model.

    Args:
        text: mlx-lm's module, with its ``model`` of ``layers`` between embedding and
            norm.
        args: the arguments of that module.
        forms: the form of each layer.
        needs: the memory that the model needs.
    """

    def __init__(
        self,
        text: nn.Module,
        args: Any,
        runtime: Runtime,
        forms: Sequence[LayerForm],
        needs: TextNeeds,
    ):
        self._text, self._args, self._runtime = text, args, runtime
        self._forms, self._needs = forms, needs
        self._mixers = [form.mixer for form in forms]
        self.ends = Ends(text, args, runtime)
        self._layers: list[GraphLayer] = []
        self._chunk = 0
        compiled = CompiledLayers(self._lazy_layers)
        windows = [mixer.window for mixer in self._mixers]
        self._steps = TokenSteps(compiled, windows)
        runtime.holders.add(compiled)
        runtime.holders.add(self)
        self._bound: tuple[bool, list[Any], list[GraphExperts | None]] | None = None

    def let_go(self) -> None:
        """Drop the layers' weights and experts; the next call collects them again."""
        self._bound = None

    def layers(self) -> list[GraphLayer]:
        """Return the decoder layers; prepare them on the first call."""
        if not self._layers:
            self._prepare()
        return self._layers

    def _prepare(self) -> None:
        """Decide how to hold weights; mlx-lm quantises them after construction."""
        self._runtime.open(self._needs)
        plan = self._runtime.plan
        unpack = plan.unpack if plan else affords_unpacked(self._needs)
        self.ends.prepare(unpack)
        modules_and_forms = zip(self._text.model.layers, self._forms, strict=True)
        self._layers = [
            GraphLayer(module, i, form, self._runtime, unpack)
            for i, (module, form) in enumerate(modules_and_forms)
        ]

    def make_room(self, inputs: mx.array, cache: list[Any] | None) -> None:
        """Shrink experts for the system's needs and the caches of single tokens."""
        self.layers()
        self._runtime.give_way(cache or [])
        n_seqs, t = inputs.shape[:2]
        if cache and t == 1:
            self._runtime.make_room(cache, n_seqs, t)

    def step(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> mx.array | None:
        """Return the logits of a decoding step; None if it needs an ordinary call.

        The caller has made room, and if ranks share the experts, they have agreed.
        """
        if cache is None or embeddings is not None or inputs.shape[-1] != 1:
            return None
        executor = self._runtime.executor
        self.layers()
        # An observer must see each layer once, and running ahead may repeat layers.
        watched = executor.watches_layers or (
            executor.watches_calls and self._runtime.streams
        )
        exchange = self._runtime.together.exchange
        waits = exchange is not None and not exchange.defers
        if watched or waits or not self._runtime.steps:
            return None
        weights, sources = self._bind()
        n_experts = inputs.size * self._args.num_experts_per_tok
        streamer = self._runtime.streaming
        if streamer is not None and not streamer.fits(n_experts):
            return None
        self.ends.check_tokens(inputs)
        compiled = executor.compiles and not executor.watches_calls
        given = inputs, cache, sources, weights, streamer

        def told(chosen: mx.array) -> None:
            assert exchange is not None
            shared: list[Any] = [s for s in sources if isinstance(s, RankExperts)]
            exchange.owe(told_of(shared, chosen))

        logits = self._steps(*given, compiled=compiled, told=told)
        if logits is None:
            return None
        for source in sources:
            if source is not None:
                source.count(n_experts)
        self.guard(logits, cache)
        return logits

    def guard(self, result: Array, cache: list[Any] | None) -> None:
        """Keep the experts that a lazy result reads until it is computed."""
        streamer = self._runtime.streamer
        # In a transformation all experts stay, and on the host nothing is lazy.
        lazy = isinstance(result, mx.array) and not self._runtime.is_reference
        if streamer is not None and lazy:
            streamer.guard_result(result)
        if isinstance(streamer, ExpertStreamer) and lazy and cache:
            # Results of a compiled function hold experts' slots until they are
            # computed.
            streamer.begin(arrays_of(cache))

    def _bind(self) -> tuple[list[Mapping[str, Weight]], list[GraphExperts | None]]:
        """Return all weights and experts, collected again if a call found a change.

        The experts of a dense layer are None.
        """
        streams, bound = self._runtime.streams, self._bound
        if bound is None or bound[0] != streams:
            dtype = self.ends.dtype
            sources = [layer.experts(dtype) for layer in self._layers]
            weights = [layer.weights.bind(dtype) for layer in self._layers]
            weights.append(self.ends.weights())
            bound = self._bound = streams, weights, sources
        return bound[1:]

    def _lazy_layers(
        self, span: range, x: mx.array, cache: list[Any], slots: mx.array | None
    ) -> Passed:
        """Run some layers for ``CompiledLayers``, with embedding and logits.

        Args:
            x: tokens ``[B, 1]`` for the first layer, else rows ``[B, D]``.
        """
        n_seqs, ends = x.shape[0], self.ends
        _, sources = self._bind()
        routed = {i: s for i in span if (s := sources[i]) is not None}
        experts = {i: source.speculative(slots) for i, source in routed.items()}
        hidden = x if span.start else ends.embed(x, None, host=False, traced=True)[0]
        context = self._context(span, cache, n_seqs, 1, host=False, experts=experts)
        inputs = [x]
        for i, layer_cache in zip(span, cache, strict=True):
            hidden = self._layers[i](hidden, layer_cache, context)
            inputs.append(hidden)
        if span.stop == len(self._layers):
            hidden = ends.last_logits(hidden, traced=True)
            hidden = hidden.reshape(n_seqs, 1, -1)
        kinds = SpeculativeExperts, RankExperts
        looked_up = (e for e in experts.values() if isinstance(e, kinds))
        found = [array for source in looked_up for array in source.chosen]
        chosen = mx.stack(found) if found else None
        return Passed(hidden, [] if slots is None else inputs[:-1], chosen)

    def rows(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> Array:
        """Return the final norm's output ``[B, T, D]``, layer after layer."""
        layers = self.layers()
        cache = cache if cache is not None else [None] * len(layers)
        host = self._runs_on_host(inputs if embeddings is None else embeddings)
        hidden, n_seqs, t = self.ends.embed(inputs, embeddings, host=host)
        context = self._context(range(len(layers)), cache, n_seqs, t, host=host)
        self._chunk = self._chunk + 1 if t > 1 else 0
        reading_ahead = self._runtime.reading_ahead(one_token=n_seqs == t == 1)
        shown = t if self._runtime.streams else 0
        progress = prompt_progress(shown, len(layers))
        with PutBackOnFailure(cache), reading_ahead as streamer, progress as report:
            for layer, layer_cache in zip(layers, cache, strict=True):
                if streamer is not None and layer.index and layer.is_routed:
                    expected = to_device(layer.expected(hidden))
                    streamer.begin_read_ahead(layer.index, expected)
                self._runtime.executor.begin_layer(self._chunk, layer.index, hidden)
                hidden = layer(hidden, layer_cache, context)
                report(layer.index)
            self.guard(hidden, cache)
        return self.ends.norm(hidden).reshape(n_seqs, t, self._args.hidden_size)

    def _runs_on_host(self, inputs: mx.array) -> bool:
        """Return whether NumPy runs this call."""
        takes = self._runtime.executor.takes_host_arrays
        return takes and device.prefers_host_arrays() and has_values(inputs)

    def _context(
        self, span: range, cache: list[Any], n_seqs: int, t: int, **options: Any
    ) -> Context:
        mixers = self._mixers[span.start : span.stop]
        return Context(mixers, cache, n_seqs, t, self.ends.dtype, **options)

    def logits(self, hidden: Array) -> mx.array:
        """Return logits ``[B, T, V]`` of normalised rows ``[B, T, D]``."""
        rows = hidden.reshape(-1, self._args.hidden_size)
        most = device.EAGER_LOGITS_BYTES
        if (keeper := self._runtime.keeper) is not None:
            # On the host, logits are copied and matrices unpacked beside them.
            most = min(most, (keeper.scratch_bytes - self._needs.block_bytes) // 2)
        if self._needs.logits_bytes(len(rows)) > most:
            rows = to_device(rows)
        return self.ends.logits(rows).reshape(*hidden.shape[:-1], -1)
