"""A call of a model: tokens to rows, layer after layer, rows to logits.

Model classes bring their decoder layers; nothing here knows how those mix or route.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import device, ops
from .blocks import ROUTED, Call
from .context import Context, put_back_on_failure
from .errors import ModelError
from .experts.streamed import AssumedExperts
from .graph import roles as b
from .graph.experts import GraphExperts
from .memory import affords_unpacked
from .model import GraphBuilder, GraphRunner, LayerGraph, refuse_gradient
from .needs import TextNeeds
from .ops.functions import Array, namespace, to_device, to_host
from .parameters import LayerWeights, Watch
from .progress import prompt_progress
from .runtime import Runtime
from .steps import TokenSteps
from .trace import Passed, StepTracer
from .weights import Weight, has_values


class DecoderLayer(Protocol):
    """What a model's layer is for a call; ``held`` are its parameters."""

    index: int
    weights: LayerWeights
    held: list[LayerWeights]

    def __call__(self, hidden: Array, cache: Any, context: Context) -> Array:
        """Return rows ``[N, D]`` after the layer, its cache moved on."""

    def experts(self, dtype: mx.Dtype) -> GraphExperts:
        """Return the experts that its routed Op asks."""

    def expected(self, hidden: Array) -> Array:
        """Return the experts ``[N, K]`` that it will likely choose, before it runs."""

    def planned_bytes(self, call: Call) -> int:
        """Return the planned peak of a call's graph; needs no weight's value."""


# From a decoder layer's module, its number, and whether matrices are kept unpacked.
MakeLayer = Callable[[nn.Module, int, bool], DecoderLayer]


class Forward:
    """Runs a text model: weights, states and masks to graphs, layer by layer.

    Args:
        text: mlx-lm's module, with its ``model`` of ``layers`` between embedding and
            norm.
        args: that module's.
        make_layer: makes what runs each of the layers.
    """

    def __init__(
        self, text: nn.Module, args: Any, runtime: Runtime, make_layer: MakeLayer
    ):
        self.text, self.args, self.runtime = text, args, runtime
        self._make_layer = make_layer
        self.layers: list[DecoderLayer] = []
        self._ends = LayerWeights(text, skip="layers")
        self._runner = GraphRunner(runtime.executor)
        self._sources: list[mx.array] = []
        self._chunk = 0
        self._steps = TokenSteps(StepTracer(self._traced))
        self._bound: tuple[Watch, bool, list[Any], list[GraphExperts]] | None = None
        self._most_tokens: int | None = None
        self.needs = TextNeeds(
            text, args, ROUTED, self._planned_bytes, lambda: self.dtype
        )
        self._in_trace = False

    @property
    def dtype(self) -> mx.Dtype:
        """Type of activations."""
        return device.activation_dtype(self.text.model.norm.weight.dtype)

    def threads(self, inputs: mx.array) -> AbstractContextManager[None]:
        """Give a call on the host the threads that its size deserves."""
        return device.host_threads(inputs.size * self.args.hidden_size**2)

    def prepare(self) -> None:
        """Decide how weights are held; they are quantised only after construction."""
        self.runtime.open(self.needs)
        plan = self.runtime.plan
        unpack = plan.unpack if plan else affords_unpacked(self.needs)
        self._ends = LayerWeights(self.text, skip="layers", unpack=unpack)
        self.layers = [
            self._make_layer(module, i, unpack)
            for i, module in enumerate(self.text.model.layers)
        ]

    def graph_layers(self) -> list[DecoderLayer]:
        """Return the decoder layers, preparing them if no call did so before."""
        if not self.layers:
            self.prepare()
        return self.layers

    def _planned_bytes(self, index: int, call: Call) -> int:
        module = self.text.model.layers[index]
        return self._make_layer(module, index, False).planned_bytes(call)

    def make_room(self, inputs: mx.array, cache: list[Any] | None) -> None:
        """Let experts give way to what the caches of a call will take."""
        self.graph_layers()
        keeper = self.runtime.keeper
        if keeper is not None and cache is not None and not self._in_trace:
            self._most_tokens = keeper.make_room(cache, *inputs.shape[:2])

    def step(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> mx.array | None:
        """Return the logits of one token each from traces, or None without them."""
        executor = self.runtime.executor
        # Whoever looks at steps is to see each layer's once.
        watched = executor.watches_layers or (
            executor.watches_steps and self.runtime.streams
        )
        wanted = self.runtime.steps and not watched
        if cache is None or embeddings is not None or inputs.shape[-1] != 1:
            return None
        if not wanted or self.text.training:
            return None
        self.graph_layers()
        weights, sources = self._bind()
        n_experts = inputs.size * self.args.num_experts_per_tok
        streamer = self.runtime.streaming
        if streamer is not None and not streamer.fits(n_experts):
            return None
        self._check_tokens(inputs)
        traced = executor.compiles and not executor.watches_steps
        logits = self._steps(inputs, cache, sources, weights, streamer, traced=traced)
        if logits is None:
            return None
        for source in sources:
            source.asked(n_experts)
        return cast(mx.array, refuse_gradient(logits, *self._replaced()))

    def _bind(self) -> tuple[list[Mapping[str, Weight]], list[GraphExperts]]:
        """Return all weights and experts, looking anew where a parameter changed."""
        streams = self.runtime.streams
        bound = self._bound
        if bound is None or bound[1] != streams or not bound[0].holds():
            dtype = self.dtype
            sources = [layer.experts(dtype) for layer in self.layers]
            weights = [layer.weights.bind(dtype) for layer in self.layers]
            weights.append(self._ends.bind(dtype))
            bound = self._bound = Watch(self.text.modules()), streams, weights, sources
        return bound[2:]

    def _traced(
        self, span: range, x: mx.array, cache: list[Any], slots: mx.array | None
    ) -> Passed:
        """Run some layers as a ``StepTracer`` has them, and what is before and after.

        Args:
            x: tokens ``[B, 1]`` before the first layer, else rows ``[B, D]``.
        """
        n_seqs = x.shape[0]
        _, sources = self._bind()
        experts = {i: sources[i].assumed(slots) for i in span}
        self._in_trace = True
        try:
            hidden = x if span.start else self._embed(x, None, False)[0]
            steps = self._context(span, cache, n_seqs, 1, host=False, experts=experts)
            inputs = [x]
            for i, layer_cache in zip(span, cache, strict=True):
                hidden = self.layers[i](hidden, layer_cache, steps)
                inputs.append(hidden)
            if span.stop == len(self.layers):
                hidden = self._head(self._end("norm", hidden, _build_norm))
                hidden = hidden.reshape(n_seqs, 1, -1)
        finally:
            self._in_trace = False
        assumed = (e for e in experts.values() if isinstance(e, AssumedExperts))
        chosen = [indices for source in assumed for indices in source.chosen]
        if not chosen:
            return Passed(hidden, [], None)
        return Passed(hidden, inputs[:-1], mx.stack(chosen))

    def hidden_states(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> Array:
        """Return the final norm's output ``[B, T, D]``.

        With caches and planned memory a long call is divided into chunks.
        """
        self.graph_layers()
        self._sources = [] if embeddings is None else [embeddings]
        n_seqs, t = (inputs if embeddings is None else embeddings).shape[:2]
        most = self._most_tokens
        step = max(1, most // n_seqs) if most is not None and cache else t
        if t <= step or self.text.training:
            return self._hidden_states(inputs, cache, embeddings)
        parts = []
        for start in range(0, t, step):
            chunk = slice(start, start + step)
            rows = None if embeddings is None else embeddings[:, chunk]
            parts.append(self._hidden_states(inputs[:, chunk], cache, rows))
        return namespace(parts[0]).concatenate(parts, axis=1)

    def _hidden_states(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> Array:
        layers = self.graph_layers()
        cache = cache if cache is not None else [None] * len(layers)
        host = self._runs_on_host(inputs if embeddings is None else embeddings)
        hidden, n_seqs, t = self._embed(inputs, embeddings, host)
        steps = self._context(range(len(layers)), cache, n_seqs, t, host=host)
        self._chunk = self._chunk + 1 if t > 1 else 0
        reading_ahead = self.runtime.reading_ahead(one_token=n_seqs == t == 1)
        shown = t if self.runtime.streams and not self.text.training else 0
        progress = prompt_progress(shown, len(layers))
        with put_back_on_failure(cache), reading_ahead as streamer, progress as report:
            for layer, layer_cache in zip(layers, cache, strict=True):
                if streamer is not None and layer.index:
                    expected = to_device(layer.expected(hidden))
                    streamer.foresee(layer.index, expected)
                self.runtime.executor.begin_layer(self._chunk, layer.index, hidden)
                hidden = layer(hidden, layer_cache, steps)
                report(layer.index)
        shape = (n_seqs, t, self.args.hidden_size)
        return self._end("norm", hidden, _build_norm).reshape(shape)

    def _context(
        self, span: range, cache: list[Any], n_seqs: int, t: int, **options: Any
    ) -> Context:
        modules = self.text.model.layers[span.start : span.stop]
        training = self.text.training
        return Context(
            modules, cache, n_seqs, t, self.dtype, training=training, **options
        )

    def logits(self, hidden: Array) -> mx.array:
        """Return logits ``[B, T, V]`` of normalised hidden states."""
        on_host = isinstance(hidden, np.ndarray)
        rows = hidden.reshape(-1, self.args.hidden_size)
        if 4 * len(rows) * self.args.vocab_size > device.EAGER_LOGITS_BYTES:
            rows = to_device(rows)
        logits = self._head(rows)
        # Kernels and traces have no gradient, and traces would keep it from weights.
        compiles = self.runtime.executor.compiles and not self.text.training
        if on_host or self.runtime.streams or compiles:
            sources = (*self._sources, *self._replaced())
            logits = cast(mx.array, refuse_gradient(logits, *sources))
        return logits.reshape(*hidden.shape[:-1], -1)

    def _head(self, rows: Array) -> mx.array:
        return to_device(self._end("logits", rows, _build_logits))

    def _replaced(self) -> list[mx.array]:
        held = [self._ends]
        for layer in self.layers:
            held += layer.held
        return [array for weights in held for array in weights.replaced]

    def _runs_on_host(self, inputs: mx.array) -> bool:
        """Tell whether NumPy can do this call: not when training, not when traced."""
        takes = self.runtime.executor.takes_host_arrays
        wanted = takes and device.prefers_host_arrays() and not self.text.training
        return wanted and has_values(inputs)

    def _embed(
        self, inputs: mx.array, embeddings: mx.array | None, host: bool
    ) -> tuple[Array, int, int]:
        move = to_host if host else to_device
        if embeddings is not None:
            n_seqs, t, dim = embeddings.shape
            rows = embeddings.astype(self.dtype).reshape(-1, dim)
            return move(rows), n_seqs, t
        n_seqs, t = inputs.shape
        self._check_tokens(inputs)
        ids = move(inputs.reshape(-1).astype(mx.int32))
        rows = self._end("embed", ids, _build_embed)
        return (rows if host else rows.astype(self.dtype)), n_seqs, t

    def _check_tokens(self, inputs: mx.array) -> None:
        """Refuse ids outside the vocabulary, where looking costs no extra wait."""
        if not mx.issubdtype(inputs.dtype, mx.integer) or inputs.size == 0:
            raise ModelError(
                f"[tokens] expected at least one integer id but got {inputs.dtype} "
                f"{inputs.shape}"
            )
        waits_anyway = device.on_cpu() or self.runtime.streams or inputs.size > 1
        if self.text.training or not waits_anyway or not has_values(inputs):
            return
        ids = np.array(inputs)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.args.vocab_size:
            raise ModelError(
                f"[tokens] expected ids from 0 to {self.args.vocab_size - 1} but got "
                f"{low if low < 0 else high}"
            )

    def _end(self, name: str, x: Array, build: Any) -> Array:
        """Run one of the graphs before and after the layers on rows ``x``."""
        weights = self._ends.bind(self.dtype, host=isinstance(x, np.ndarray))
        graph = self.runtime.graphs.get(
            (name, x.shape, self._ends.signature),
            lambda: build(self, GraphBuilder(name, self.dtype, self._ends.refs), x),
        )
        recurs = len(x) == 1 and not self.text.training and not self._in_trace
        done = self._runner.run(graph, weights, {"x": x}, recurs=recurs)
        return done.value(graph.outputs["out"])


def _build_embed(forward: Forward, g: GraphBuilder, x: Array) -> LayerGraph:
    weight = g.ref("model.embed_tokens")
    ids = g.input("x", b.TokenIdsBuf, x.shape)
    out = g.new("embedding", b.EmbedOutBuf, (x.size, weight.shape[1]))
    g.push(
        ops.EmbedGatherNTokens(
            label="embed",
            token_ids=ids,
            weight=weight,
            hidden_out=out,
            vocab_size=weight.shape[0],
            hidden_dim=weight.shape[1],
            n_tokens=x.size,
        )
    )
    return g.finish(forward.runtime.executor, out=out)


def _build_norm(forward: Forward, g: GraphBuilder, x: Array) -> LayerGraph:
    hidden = g.input("x", b.HiddenBuf, x.shape)
    eps = forward.args.rms_norm_eps
    out = g.norm("model.norm", hidden, b.FinalNormBuf, eps)
    return g.finish(forward.runtime.executor, out=out)


def _build_logits(forward: Forward, g: GraphBuilder, x: Array) -> LayerGraph:
    tied = forward.args.tie_word_embeddings
    normed = g.input("x", b.FinalNormBuf, x.shape)
    name = "model.embed_tokens" if tied else "lm_head"
    out = g.matvec(name, normed, b.LogitsBuf, label="logits")
    return g.finish(forward.runtime.executor, out=out)
