"""Qwen3.5-MoE and Qwen3.6-MoE: gated DeltaNet and full attention layers, all MoE.

A drop-in for ``mlx_lm.models.qwen3_5_moe``: constructor, weight names, caches and
sanitising are mlx-lm's own; the forward pass is a graph of Ops per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_5
from mlx_lm.models import qwen3_5_moe as stock

from moeflux_mlx import blocks, device, ops
from moeflux_mlx.blocks import Call, RoutedShape
from moeflux_mlx.context import (
    Context,
    cache_ops,
    has_spare_rows,
    put_back_on_failure,
)
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.resident import ResidentExperts
from moeflux_mlx.experts.streamed import AssumedExperts
from moeflux_mlx.graph import Op, planned_peak_bytes
from moeflux_mlx.graph import roles as b
from moeflux_mlx.graph.lower import Kernel
from moeflux_mlx.memory import Needs, affords_unpacked
from moeflux_mlx.model import (
    GraphBuilder,
    GraphRunner,
    LayerGraph,
    LayerSample,
    RunOptions,
    Runtime,
    refuse_gradient,
)
from moeflux_mlx.needs import TextNeeds
from moeflux_mlx.ops.functions import Array, namespace, to_device, to_host
from moeflux_mlx.parameters import LayerWeights, Watch
from moeflux_mlx.progress import prompt_progress
from moeflux_mlx.steps import TokenSteps
from moeflux_mlx.trace import Passed, StepTracer
from moeflux_mlx.weights import ExpertSource, ExpertWeights, Weight, has_values

ModelArgs = stock.ModelArgs
TextModelArgs = qwen3_5.TextModelArgs
ROUTED = "switch_mlp"


class Model(stock.Model):
    """Language model over ``language_model``; see ``TextModel`` for the call.

    ``options`` is set by subclasses that ``moeflux_mlx.load`` and packed directories
    make; without it all experts are ordinary parameters.
    """

    options: ClassVar[RunOptions] = RunOptions()

    def __init__(self, args: ModelArgs):
        super().__init__(args)  # type: ignore[arg-type]
        self.runtime = Runtime(self.options)
        text_args = TextModelArgs.from_dict(args.text_config)
        self.language_model = TextModel(text_args, self.runtime)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rename weights as mlx-lm does; streamed experts are none of them."""
        return super().sanitize(self.runtime.without_streamed(weights))

    @property
    def streamer(self) -> Any:
        """The expert streamer, or None when experts are parameters."""
        self.runtime.open(self.needs)
        return self.runtime.streamer

    @property
    def needs(self) -> Needs:
        """What the model says of its memory."""
        return self.language_model.forward.needs

    @property
    def graph_layers(self) -> list[GraphLayer]:
        """The decoder layers as graphs."""
        return self.language_model.forward.graph_layers()

    def shard(self, group: Any = None) -> None:
        """Refuse: experts divided over machines are not supported yet."""
        raise ModelError("[shard] expected one machine: sharding is not supported yet")


class TextModel(qwen3_5.TextModel):
    """Tokens ``[B, T]`` to logits ``[B, T, V]``."""

    def __init__(self, args: TextModelArgs, runtime: Runtime):
        if args.num_experts < 1 or args.num_experts_per_tok > args.num_experts:
            raise ModelError(
                f"[config] num_experts_per_tok expected 1 to num_experts but got "
                f"{args.num_experts_per_tok} of {args.num_experts}"
            )
        super().__init__(args)
        self.model = Backbone(args)
        if runtime.store is not None:
            runtime.check_layers(range(args.num_hidden_layers))
            for layer in self.model.layers:
                layer.mlp.pop(ROUTED)
        self.forward = self.model.forward = Forward(self, args, runtime)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        self.forward.make_room(inputs, cache)
        step = self.forward.step(inputs, cache, input_embeddings)
        if step is not None:
            return step
        with self.forward.threads(inputs):
            return self.forward.logits(self.model(inputs, cache, input_embeddings))


class Backbone(qwen3_5.Qwen3_5TextModel):
    """Tokens ``[B, T]`` to normalised hidden states ``[B, T, D]``."""

    forward: Forward

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        return self.forward.hidden_states(inputs, cache, input_embeddings)


class Forward:
    """Runs a ``TextModel``: weights, states and masks to graphs, layer by layer."""

    def __init__(self, text: nn.Module, args: TextModelArgs, runtime: Runtime):
        self.text, self.args, self.runtime = text, args, runtime
        self.layers: list[GraphLayer] = []
        self._ends = LayerWeights(text, skip="layers")
        self._runner = GraphRunner(runtime.executor)
        self._sources: list[mx.array] = []
        self._chunk = 0
        self._steps = TokenSteps(StepTracer(self._traced), always=runtime.runs_ahead)
        self._bound: tuple[Watch, bool, list[Any], list[ExpertSource]] | None = None
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
            GraphLayer(module, i, self.args, self.runtime, unpack)
            for i, module in enumerate(self.text.model.layers)
        ]

    def graph_layers(self) -> list[GraphLayer]:
        """Return the decoder layers, preparing them if no call did so before."""
        if not self.layers:
            self.prepare()
        return self.layers

    def _planned_bytes(self, index: int, call: Call) -> int:
        module = self.text.model.layers[index]
        layer = GraphLayer(module, index, self.args, self.runtime, False)
        return layer.planned_bytes(call)

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

    def _bind(self) -> tuple[list[Mapping[str, Weight]], list[ExpertSource]]:
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
        with put_back_on_failure(cache), reading_ahead as ahead, progress as report:
            for layer, layer_cache in zip(layers, cache, strict=True):
                if ahead and layer.index:
                    layer.foresee(hidden)
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


class GraphLayer:
    """One decoder layer: its weights, its experts and the graphs that run it."""

    def __init__(
        self,
        module: nn.Module,
        index: int,
        args: TextModelArgs,
        runtime: Runtime,
        unpack: bool,
    ):
        self.module, self.index, self.args, self.runtime = module, index, args, runtime
        joined = blocks.SAME_INPUT if runtime.executor.joins_matrices else ()
        self.weights = LayerWeights(module, skip=ROUTED, unpack=unpack, joined=joined)
        self.routed = LayerWeights(module.mlp[ROUTED]) if ROUTED in module.mlp else None
        self.held = [w for w in (self.weights, self.routed) if w is not None]
        self._runner = GraphRunner(runtime.executor)
        self._resident: tuple[Any, ExpertSource] | None = None
        self._shape: tuple[int, bool, RoutedShape] | None = None

    def __call__(self, hidden: Array, cache: Any, context: Context) -> Array:
        """Run the layer on rows ``[N, D]``, moving its cache forward."""
        if self.module.is_linear:
            return self._run_linear(hidden, cache, context)
        return self._run_full(hidden, cache, context)

    def foresee(self, hidden: Array) -> None:
        """Begin to read the experts that the layer will likely choose.

        Its router says so on what the layer begins with ``[N, D]``: less its own mixer,
        that is the row it will see.
        """
        streamer, n = self.runtime.streaming, hidden.shape[0]
        assert streamer is not None
        on_host = isinstance(hidden, np.ndarray)
        dtype = mx.float32 if on_host else hidden.dtype
        weights = self.weights.bind(dtype, host=on_host)
        key = ("foresee", self.weights.signature, n, dtype)
        graph = self.runtime.graphs.get(key, lambda: self._build_foresee(n, dtype))
        done = self._runner.run(graph, weights, {"hidden": hidden}, recurs=True)
        streamer.foresee(self.index, to_device(done.value(graph.outputs["experts"])))

    def sample(self, n_tokens: int, dtype: mx.Dtype) -> LayerSample:
        """Return the graph for one sequence of ``n_tokens`` with inputs to run it."""
        weights = self.weights.bind(dtype)
        graph = self.graph(Call(1, n_tokens, dtype))
        return LayerSample.make(graph, weights, self.experts(dtype), n_tokens)

    def graph(self, call: Call) -> LayerGraph:
        """Return the graph for calls like ``call``, shared by layers of one shape."""
        if self._shape is None or self._shape[0] != self.weights.signature:
            routed = self._routed_shape()
            self._shape = (self.weights.signature, self.module.is_linear, routed)
        return self.runtime.graphs.get((self._shape, call), lambda: self._build(call))

    def planned_bytes(self, call: Call) -> int:
        """Return the planned peak of a call's graph; needs no weight's value."""
        self.weights.refresh()
        return planned_peak_bytes(self.graph(call).graph)

    def _call(self, context: Context, **masks: bool) -> Call:
        # Gathered on the device, experts of several tokens are not read back.
        steps = context.t == 1 and self.runtime.traces_steps and not context.training
        parameters = self.routed is not None
        gather = steps or (parameters and (context.training or not device.on_cpu()))
        return Call(
            context.n_seqs, context.t, context.dtype, gather_by_id=gather, **masks
        )

    def _run_linear(self, hidden: Array, cache: Any, context: Context) -> Array:
        net, seqs = self.module.linear_attn, context.n_seqs
        conv, delta, lengths = None, None, None
        if cache is not None:
            conv, delta, lengths = cache[0], cache[1], cache.lengths
        if conv is None:
            conv = mx.zeros((seqs, net.conv_kernel_size - 1, net.conv_dim))
        if delta is None:
            delta = mx.zeros((seqs, net.num_v_heads, net.head_v_dim, net.head_k_dim))
        mask = context.sequence_mask
        call = self._call(
            context, sequence_mask=mask is not None, lengths=lengths is not None
        )
        inputs = {
            "conv_state": context.move(conv.astype(context.dtype)),
            "delta_state": context.move(delta.astype(mx.float32)),
            "sequence_mask": mask,
            "lengths": context.move(lengths),
        }
        out, state = self._run(hidden, call, inputs, context)
        if cache is not None:
            cache[0] = to_device(state["conv_state"])
            cache[1] = to_device(state["delta_state"])
            cache.advance(context.t)
        return out

    def _run_full(self, hidden: Array, cache: Any, context: Context) -> Array:
        mask = context.attention_mask
        # Slices of a growing cache would be copied, and traced anew, at every token.
        spare = mask is None and context.t == 1 and has_spare_rows(cache)
        call = self._call(
            context,
            attention_mask=mask is not None,
            spare_rows=context.traced or (spare and self.runtime.executor.spare_rows),
        )
        inputs = {
            "start": context.start,
            "row": context.start[:1],
            "keys": cache.keys if context.traced else None,
            "values": cache.values if context.traced else None,
            "attention_mask": mask,
        }
        attn = self.module.self_attn
        host = None if context.traced else cache_ops(attn, cache, call)
        out, state = self._run(hidden, call, inputs, context, host)
        if context.traced:
            cache.keys, cache.values = state["keys"], state["values"]
        return out

    def _run(
        self,
        hidden: Array,
        call: Call,
        inputs: Mapping[str, Any],
        context: Context,
        host: Mapping[type[Op], Kernel] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        weights = self.weights.bind(call.dtype, host=isinstance(hidden, np.ndarray))
        graph = self.graph(call)
        if context.experts is None:
            experts = self.experts(call.dtype)
        else:
            experts = context.experts[self.index]
        inputs = {**inputs, "hidden": hidden, "experts": experts}
        # Prompts come in any length: only single tokens are sure to come again.
        recurs = call.t == 1 and not context.training and not context.traced
        done = self._runner.run(graph, weights, inputs, host, recurs=recurs)
        outputs = {name: done.value(buf) for name, buf in graph.outputs.items()}
        return outputs.pop("hidden"), outputs

    def experts(self, dtype: mx.Dtype) -> ExpertSource:
        """Return the layer's routed experts."""
        if self.routed is None:
            assert self.runtime.streamer is not None
            return self.runtime.streamer.source(self.index)
        bound = self.routed.bind(dtype)
        if self._resident is None or self._resident[0] is not bound:
            names = ("gate_proj", "up_proj", "down_proj")
            experts = ExpertWeights(*(bound[name] for name in names))
            self._resident = bound, ResidentExperts(experts)
        return self._resident[1]

    def _routed_shape(self) -> RoutedShape:
        dim, width = self.args.hidden_size, self.args.moe_intermediate_size
        if self.routed is None:
            assert self.runtime.store is not None
            n_bytes = self.runtime.store.layout(self.index).record_bytes
            return RoutedShape(dim, width, n_bytes)
        self.routed.refresh()
        total = sum(ref.n_bytes for ref in self.routed.refs.values())
        return RoutedShape(dim, width, total // self.args.num_experts)

    def _build_foresee(self, n: int, dtype: mx.Dtype) -> LayerGraph:
        eps = self.args.rms_norm_eps
        g = GraphBuilder("router of the layer ahead", dtype, self.weights.refs)
        hidden = g.input("hidden", b.HiddenBuf, (n, self.args.hidden_size))
        x = g.norm("post_attention_layernorm", hidden, b.MoeInputBuf, eps)
        experts = blocks.expected_experts(g, self.module.mlp, x, n)
        return g.finish(self.runtime.executor, experts=experts)

    def _build(self, call: Call) -> LayerGraph:
        assert self._shape is not None
        _, linear, routed = self._shape
        eps = self.args.rms_norm_eps
        name = f"{'linear' if linear else 'full'} attention layer"
        g = GraphBuilder(name, call.dtype, self.weights.refs)
        hidden = g.input("hidden", b.HiddenBuf, (call.n, routed.dim))
        x = g.norm("input_layernorm", hidden, b.AttnInputBuf, eps)
        if linear:
            mixed, state = blocks.gated_delta_net(g, self.module.linear_attn, x, call)
        else:
            mixed, state = blocks.full_attention(g, self.module.self_attn, x, call)
        residual = g.residual_add(mixed, hidden)
        moe_in = g.norm("post_attention_layernorm", residual, b.MoeInputBuf, eps)
        out = blocks.moe(g, self.module.mlp, residual, moe_in, call, routed)
        return g.finish(self.runtime.executor, hidden=out, **state)
