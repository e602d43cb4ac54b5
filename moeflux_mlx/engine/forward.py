"""The forward pass of a model: tokens to rows, layer after layer, rows to logits.

The forms of a family describe its layers; this module knows no mixer and no router.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from .. import device
from ..calls.arguments import ArgumentChecks, bounded, check_ids
from ..calls.gradients import Gradients, kind_of
from ..calls.module_call import Backbone, ModuleCall, is_tied, without_adapters
from ..calls.small_calls import SmallCalls
from ..calls.transforms import in_transformation, is_traced
from ..experts.compute.streamed import SpeculativeExperts
from ..experts.streaming.streamer import ExpertStreamer
from ..experts.weights import Weight, has_values
from ..memory.caches import PutBackOnFailure
from ..memory.plan import affords_unpacked
from ..system.progress import prompt_progress
from . import ops
from .blocks import ROUTED, Call
from .compiled_layers import CompiledLayers, Passed, arrays_of
from .context import Context
from .graph import roles as b
from .graph.experts import GraphExperts
from .layer import GraphLayer, LayerForm
from .model import GraphBuilder, GraphRunner, LayerGraph
from .needs import TextNeeds
from .ops.functions import Array, namespace, to_device, to_host
from .parameters import LayerWeights, Watch
from .runtime import Runtime
from .steps import TokenSteps


class Forward:
    """Runs a text model: passes weights, states and masks to graphs, layer by layer.

    Args:
        text: mlx-lm's module, with its ``model`` of ``layers`` between embedding and
            norm.
        args: the arguments of that module.
        forms: the form of each layer.
        backbone: mlx-lm's call of ``text.model``, for calls that graphs cannot do.
    """

    def __init__(
        self,
        text: nn.Module,
        args: Any,
        runtime: Runtime,
        forms: Sequence[LayerForm],
        backbone: Backbone,
    ):
        self.text, self.args, self.runtime = text, args, runtime
        self._forms = forms
        self._modules = ModuleCall(text, backbone, self._bounded)
        self._gradients = Gradients(runtime, self._logits_of_modules)
        self._module_calls = SmallCalls(runtime)
        # Whether graphs perform every module; adapters and the like they do not.
        self._is_known = True
        self._mixers = [form.mixer for form in forms]
        self._checked = ArgumentChecks(self._mixers, args.hidden_size)
        self.layers: list[GraphLayer] = []
        self._ends = LayerWeights(text, skip="layers")
        self._runner = GraphRunner(runtime.executor)
        self._chunk = 0
        compiled = CompiledLayers(self._lazy_layers)
        windows = [mixer.window for mixer in self._mixers]
        self._steps = TokenSteps(compiled, windows)
        # ``self._runner`` need not be added: its graphs have no experts.
        runtime.holders.add(compiled)
        runtime.holders.add(self)
        # The parameters of the last call outside of transformations.
        self._parameters: Watch | None = None
        self._bound: tuple[bool, list[Any], list[GraphExperts | None]] | None = None
        self.needs = TextNeeds(
            text,
            args,
            self.routed_name,
            forms,
            self._planned_bytes,
            lambda: self.dtype,
            self._module_bytes,
        )
        self._in_trace = False

    @property
    def routed_name(self) -> str:
        """mlx-lm's name of blocks of routed experts."""
        routed = (f.routed_name for f in self._forms if f.routed is not None)
        return next(routed, ROUTED)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        text, runtime = copy.deepcopy((self.text, self.runtime), memo)
        return self._like(text, runtime)

    def let_go(self) -> None:
        """Drop the layers' experts."""
        self._bound = None

    def _like(self, text: nn.Module, runtime: Runtime) -> Forward:
        backbone = self._modules.backbone
        like = Forward(text, self.args, runtime, self._forms, backbone)
        like._modules.known = self._modules.known
        return like

    @property
    def dtype(self) -> mx.Dtype:
        """The type of activations."""
        return device.activation_dtype(self.text.model.norm.weight.dtype)

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> mx.array:
        """Return logits ``[B, T, V]``; other threads' calls wait meanwhile."""
        logits: mx.array = self._alone(inputs, cache, embeddings, logits=True)
        return logits

    def rows(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> Array:
        """Return normalised rows ``[B, T, D]``; other threads' calls wait meanwhile."""
        return self._alone(inputs, cache, embeddings, logits=False)

    def _alone(self, *arguments: Any, logits: bool) -> Array:
        """Make a call while no other thread does; its result may still be lazy."""
        return self.runtime.alone(self._called, *arguments, logits=logits)

    def _called(
        self,
        inputs: mx.array,
        cache: list[Any] | None,
        embeddings: mx.array | None,
        *,
        logits: bool,
    ) -> Array:
        inputs, cache, embeddings = self._checked(inputs, cache, embeddings)
        followed = self._followed(inputs, cache, embeddings)
        if not self._is_known or (followed and self._streams_to(followed)):
            rows = self._rows_of_modules(inputs, cache, embeddings, followed)
            return self._modules.logits(rows) if logits else rows
        forward = self._reference(followed) if followed else self
        call = forward._logits_of if logits else forward.hidden_states
        return call(inputs, cache, embeddings)

    def _streams_to(self, followed: list[mx.array]) -> bool:
        """Return whether a transformed call with values reads streamed experts."""
        self.runtime.open(self.needs)
        return self.runtime.comes_and_goes and has_values(*followed)

    def _rows_of_modules(
        self,
        inputs: mx.array,
        cache: list[Any] | None,
        embeddings: mx.array | None,
        followed: list[mx.array],
    ) -> mx.array:
        if not has_values(*followed):
            # Raises an error if experts are not among the parameters.
            self._reference(followed)
        self.runtime.open(self.needs)
        call, whole = self._put_back_on_failure, bool(followed)
        rows: mx.array = self._divided(call, inputs, cache, embeddings, whole=whole)
        streamer = self.runtime.streamer
        if followed and isinstance(streamer, ExpertStreamer) and streamer.resident:
            # The backward pass reads the experts again.
            streamer.stay()
        else:
            self._guard(rows, cache)
        return rows

    def _logits_of_modules(self, tokens: mx.array) -> mx.array:
        return self._modules.logits(self._modules.rows(tokens, None, None))

    def _measure_modules(self, n_seqs: int, t: int, cache: list[Any]) -> None:
        """Find what calls of modules take, which no graph tells."""
        # The room of a single token is known from any call before it.
        is_known = t == 1 and self._module_calls.taken.of_token > 0
        if (keeper := self.runtime.keeper) is None or is_known:
            return
        self._module_calls.measure(
            kind_of(self.text),
            n_seqs * t,
            lambda: keeper.clear(cache),
            lambda tokens: self._modules.rows(tokens, None, None),
        )

    def _module_bytes(self, n_seqs: int, t: int, n_rows: int) -> float:
        """Return the peak of a call if it is one of modules."""
        if self._is_known:
            return 0
        return self._module_calls.taken.n_bytes(n_seqs, t, n_rows)

    def _put_back_on_failure(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> mx.array:
        with PutBackOnFailure(cache or []):
            return self._modules.rows(inputs, cache, embeddings)

    def _logits_of(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> mx.array:
        step = self.step(inputs, cache, embeddings)
        if step is not None:
            return step
        with self.threads(inputs):
            return self.logits(self.hidden_states(inputs, cache, embeddings))

    def _followed(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> list[mx.array]:
        """Return the arrays of a call if a transformation traces any; else none."""
        if in_transformation():
            given = [inputs] if embeddings is None else [inputs, embeddings]
            if cache is not None:
                given += arrays_of(cache)
            if is_traced(given):
                self._is_known = not self._modules.has_foreign_modules()
                return given
        if self._parameters is not None and self._parameters.holds():
            return []
        self._is_known = not self._modules.has_foreign_modules()
        known = self._parameters.seen if self._parameters is not None else []
        parameters = Watch(self.text.modules())
        if is_traced(changed := parameters.arrays_beside(known)):
            return changed
        self._parameters, self._bound = parameters, None
        return []

    def _reference(self, followed: list[mx.array]) -> Forward:
        """Return a lazy runner for a call inside a transformation.

        It serves one call: the next transformation may pass other weights.

        Raises:
            ModelError: experts are streamed, or cannot be part of a function.
        """
        self.runtime.open(self.needs)
        runtime = self.runtime.reference(has_values=has_values(*followed))
        return self._like(self.text, runtime)

    def threads(self, inputs: mx.array) -> AbstractContextManager[None]:
        """Return a context that gives a call on the host threads to fit its size."""
        return self._threads(inputs.size)

    def _threads(self, n_tokens: int) -> AbstractContextManager[None]:
        return device.host_threads(n_tokens * self.args.hidden_size**2)

    def prepare(self) -> None:
        """Decide how to hold weights; mlx-lm quantises them after construction."""
        self.runtime.open(self.needs)
        plan = self.runtime.plan
        unpack = plan.unpack if plan else affords_unpacked(self.needs)
        self._ends = LayerWeights(self.text, skip="layers", unpack=unpack)
        self.layers = [
            GraphLayer(module, i, form, self.runtime, unpack)
            for i, (module, form) in enumerate(self._modules_and_forms())
        ]

    def _modules_and_forms(self) -> Iterator[tuple[nn.Module, LayerForm]]:
        return zip(self.text.model.layers, self._forms, strict=True)

    def graph_layers(self) -> list[GraphLayer]:
        """Return the decoder layers; prepare them on the first call."""
        if not self.layers:
            self.prepare()
        return self.layers

    def _planned_bytes(self, index: int, call: Call) -> int:
        # An adapter is tiny compared to its layer, so the plan ignores it.
        module = without_adapters(self.text.model.layers[index])
        layer = GraphLayer(module, index, self._forms[index], self.runtime, False)
        return layer.planned_bytes(call)

    def make_room(self, inputs: mx.array, cache: list[Any] | None) -> None:
        """Shrink experts for the system's needs and the caches of single tokens."""
        self.graph_layers()
        self.runtime.give_way(cache or [])
        n_seqs, t = inputs.shape[:2]
        if cache and t == 1:
            self.runtime.make_room(cache, n_seqs, t)

    def step(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> mx.array | None:
        """Return the logits of a decoding step; None if it needs an ordinary call."""
        if cache is None or embeddings is not None or inputs.shape[-1] != 1:
            return None
        executor = self.runtime.executor
        self.graph_layers()
        # An observer must see each layer once, and running ahead may repeat layers.
        watched = executor.watches_layers or (
            executor.watches_calls and self.runtime.streams
        )
        if watched or not self.runtime.steps:
            return None
        self.make_room(inputs, cache)
        weights, sources = self._bind()
        n_experts = inputs.size * self.args.num_experts_per_tok
        streamer = self.runtime.streaming
        if streamer is not None and not streamer.fits(n_experts):
            return None
        self._check_tokens(inputs)
        compiled = executor.compiles and not executor.watches_calls
        given = inputs, cache, sources, weights, streamer
        logits = self._steps(*given, compiled=compiled)
        if logits is None:
            return None
        for source in sources:
            if source is not None:
                source.count(n_experts)
        self._guard(logits, cache)
        return logits

    def _guard(self, result: Array, cache: list[Any] | None) -> None:
        """Keep the experts that a lazy result reads until it is computed."""
        streamer = self.runtime.streamer
        # In a transformation all experts stay, and on the host nothing is lazy.
        lazy = isinstance(result, mx.array) and not self.runtime.is_reference
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
        streams, bound = self.runtime.streams, self._bound
        if bound is None or bound[0] != streams:
            dtype = self.dtype
            sources = [layer.experts(dtype) for layer in self.layers]
            weights = [layer.weights.bind(dtype) for layer in self.layers]
            weights.append(self._ends.bind(dtype))
            bound = self._bound = streams, weights, sources
        return bound[1:]

    def _lazy_layers(
        self, span: range, x: mx.array, cache: list[Any], slots: mx.array | None
    ) -> Passed:
        """Run some layers for ``CompiledLayers``, with embedding and logits.

        Args:
            x: tokens ``[B, 1]`` for the first layer, else rows ``[B, D]``.
        """
        n_seqs = x.shape[0]
        _, sources = self._bind()
        routed = {i: s for i in span if (s := sources[i]) is not None}
        experts = {i: source.speculative(slots) for i, source in routed.items()}
        self._in_trace = True
        try:
            hidden = x if span.start else self._embed(x, None, False)[0]
            context = self._context(span, cache, n_seqs, 1, host=False, experts=experts)
            inputs = [x]
            for i, layer_cache in zip(span, cache, strict=True):
                hidden = self.layers[i](hidden, layer_cache, context)
                inputs.append(hidden)
            if span.stop == len(self.layers):
                hidden = self._head(self._end("norm", hidden, _build_norm))
                hidden = hidden.reshape(n_seqs, 1, -1)
        finally:
            self._in_trace = False
        speculative = (e for e in experts.values() if isinstance(e, SpeculativeExperts))
        chosen = [indices for source in speculative for indices in source.chosen]
        if slots is None:
            return Passed(hidden, [], None)
        return Passed(hidden, inputs[:-1], mx.stack(chosen) if chosen else None)

    def hidden_states(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> Array:
        """Return the final norm's output ``[B, T, D]``."""
        return self._divided(self._hidden_states, inputs, cache, embeddings)

    def _divided(
        self,
        call: Callable[[mx.array, Any, mx.array | None], Array],
        inputs: mx.array,
        cache: list[Any] | None,
        embeddings: mx.array | None,
        *,
        whole: bool = False,
    ) -> Array:
        """Return a call's result; divide a long call into chunks if memory is planned.

        Args:
            whole: do not divide: a transformation keeps all intermediate arrays.
        """
        given = inputs if embeddings is None else embeddings
        n_seqs, t = given.shape[:2]
        if whole and self.runtime.keeper is not None:
            self._gradients.make_room(self.text, [given], cache or [], n_seqs, t)
            return call(inputs, cache, embeddings)
        if not self._is_known:
            self._measure_modules(n_seqs, t, cache or [])
        self.make_room(given, cache)
        if self.runtime.keeper is None or (cache and t == 1):
            return call(inputs, cache, embeddings)
        # A call without a cache returns all logits, and needs a cache between chunks.
        logits = not cache
        room = cache or make_prompt_cache(self.text)
        step = self.runtime.make_room(room, n_seqs, t, logits=logits) // n_seqs
        if t <= step:
            return call(inputs, room, embeddings)
        parts: list[Array] = []
        # The size of a chunk, not of the whole call, decides on threads.
        with PutBackOnFailure(room), self._threads(n_seqs * step):
            for start in range(0, t, step):
                chunk = slice(start, start + step)
                rows = None if embeddings is None else embeddings[:, chunk]
                part = call(inputs[:, chunk], room, rows)
                if isinstance(part, mx.array):
                    mx.eval(part)
                    # Longer arrays than before find no place among freed ones.
                    device.trim_heap()
                parts.append(part)
        return namespace(parts[0]).concatenate(parts, axis=1)

    def _hidden_states(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> Array:
        layers = self.graph_layers()
        cache = cache if cache is not None else [None] * len(layers)
        host = self._runs_on_host(inputs if embeddings is None else embeddings)
        hidden, n_seqs, t = self._embed(inputs, embeddings, host)
        context = self._context(range(len(layers)), cache, n_seqs, t, host=host)
        self._chunk = self._chunk + 1 if t > 1 else 0
        reading_ahead = self.runtime.reading_ahead(one_token=n_seqs == t == 1)
        shown = t if self.runtime.streams else 0
        progress = prompt_progress(shown, len(layers))
        with PutBackOnFailure(cache), reading_ahead as streamer, progress as report:
            for layer, layer_cache in zip(layers, cache, strict=True):
                if streamer is not None and layer.index and layer.is_routed:
                    expected = to_device(layer.expected(hidden))
                    streamer.begin_read_ahead(layer.index, expected)
                self.runtime.executor.begin_layer(self._chunk, layer.index, hidden)
                hidden = layer(hidden, layer_cache, context)
                report(layer.index)
            self._guard(hidden, cache)
        shape = (n_seqs, t, self.args.hidden_size)
        return self._end("norm", hidden, _build_norm).reshape(shape)

    def _context(
        self, span: range, cache: list[Any], n_seqs: int, t: int, **options: Any
    ) -> Context:
        mixers = self._mixers[span.start : span.stop]
        return Context(mixers, cache, n_seqs, t, self.dtype, **options)

    def logits(self, hidden: Array) -> mx.array:
        """Return logits ``[B, T, V]`` of normalised hidden states."""
        rows = hidden.reshape(-1, self.args.hidden_size)
        most = device.EAGER_LOGITS_BYTES
        if (keeper := self.runtime.keeper) is not None:
            # On the host, logits are copied and matrices unpacked beside them.
            most = min(most, (keeper.scratch_bytes - self.needs.block_bytes) // 2)
        if self.needs.logits_bytes(len(rows)) > most:
            rows = to_device(rows)
        logits = self._head(rows)
        return logits.reshape(*hidden.shape[:-1], -1)

    def _head(self, rows: Array) -> mx.array:
        return to_device(self._end("logits", rows, _build_logits))

    def _runs_on_host(self, inputs: mx.array) -> bool:
        """Return whether NumPy runs this call."""
        takes = self.runtime.executor.takes_host_arrays
        return takes and device.prefers_host_arrays() and has_values(inputs)

    def _embed(
        self, inputs: mx.array, embeddings: mx.array | None, host: bool
    ) -> tuple[Array, int, int]:
        move = to_host if host else to_device
        if embeddings is not None:
            n_seqs, t, dim = embeddings.shape
            rows = embeddings.astype(self.dtype).reshape(-1, dim)
            return move(rows), n_seqs, t
        n_seqs, t = inputs.shape
        inputs, inside = self._bounded(inputs)
        ids = move(inputs.reshape(-1).astype(mx.int32))
        rows = self._end("embed", ids, _build_embed)
        if host:
            return rows, n_seqs, t
        rows = rows.astype(self.dtype)
        if inside is not None:
            nan = mx.array(math.nan, rows.dtype)
            rows = mx.where(inside.reshape(-1, 1), rows, nan)
        return rows, n_seqs, t

    def _bounded(self, inputs: mx.array) -> tuple[mx.array, mx.array | None]:
        """Return ids bounded to the vocabulary, and which were in it; None: all."""
        # The caller of a compiled function has checked the ids.
        look = self._looks_at if self._in_trace else self._check_tokens
        if look(inputs):
            return inputs, None
        return bounded(inputs, self.args.vocab_size)

    def _looks_at(self, inputs: mx.array) -> bool:
        """Return whether to check ids that have values."""
        return device.on_cpu() or self.runtime.streams or inputs.size > 1

    def _check_tokens(self, inputs: mx.array) -> bool:
        """Refuse ids outside the vocabulary if a check costs no extra wait.

        Returns:
            Whether it checked.
        """
        if not self._looks_at(inputs) or not has_values(inputs):
            return False
        check_ids(inputs, self.args.vocab_size)
        return True

    def _end(self, name: str, x: Array, build: Any) -> Array:
        """Run the embedding, the norm or the head on ``x``."""
        weights = self._ends.bind(self.dtype, host=isinstance(x, np.ndarray))
        graph = self.runtime.graphs.get(
            (name, x.shape, self._ends.signature),
            lambda: build(self, GraphBuilder(name, self.dtype, self._ends.refs), x),
        )
        recurs = len(x) == 1 and not self._in_trace
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
    normed = g.input("x", b.FinalNormBuf, x.shape)
    name = "model.embed_tokens" if is_tied(forward.args) else "lm_head"
    out = g.matvec(name, normed, b.LogitsBuf, label="logits")
    return g.finish(forward.runtime.executor, out=out)
