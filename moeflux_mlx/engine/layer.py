"""One decoder layer: its form, and the graphs that run it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import device
from ..calls.module_call import is_tied
from ..experts.compute.rank_experts import RankExperts
from ..experts.compute.resident import ResidentExperts
from ..experts.compute.switch import StreamedSwitch
from ..experts.files.configuration import Expected
from ..experts.weights import ExpertWeights, Weight
from . import block_ops
from .blocks import ROUTED, Call, DenseMlp, Moe, RoutedShape
from .context import Context
from .executors import KernelExecutor
from .graph import Op, planned_peak_bytes
from .graph import roles as b
from .graph.experts import GraphExperts
from .graph.lower import Kernel
from .lowering.moe import knows
from .mixers import Mixer
from .model import GraphBuilder, GraphRunner, LayerGraph, LayerSample
from .ops.functions import Array, to_device, to_host
from .parameters import LayerWeights
from .runtime import Runtime

MIXER_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"


@dataclass(frozen=True, eq=False)
class LayerForm:
    """The form of a decoder layer: a mixer, then experts or an MLP, a norm before each.

    Layers of one form share their graphs, so a family makes each form once.
    """

    mixer: Mixer
    mlp: Moe | DenseMlp
    dim: int
    eps: float

    @property
    def routed(self) -> Moe | None:
        """The routed experts, if any."""
        return self.mlp if isinstance(self.mlp, Moe) else None

    @property
    def routed_name(self) -> str:
        """mlx-lm's name of the block of routed experts."""
        return ROUTED if self.routed is None else self.routed.routed_name


def expected_tensors(args: Any, forms: Iterable[LayerForm]) -> Iterator[Expected]:
    """Yield the tensors of a text model with their unpacked shapes.

    Args:
        args: mlx-lm's arguments of the text model.
    """
    dim, vocab = args.hidden_size, args.vocab_size
    yield "embed_tokens.weight", (vocab, dim)
    yield "norm.weight", (dim,)
    if not is_tied(args):
        yield "lm_head.weight", (vocab, dim)
    for index, form in enumerate(forms):
        norms = {f"{norm}.weight": (dim,) for norm in (MIXER_NORM, MLP_NORM)}
        for shapes in (norms, form.mixer.shapes(dim), form.mlp.shapes(dim)):
            for name, shape in shapes.items():
                yield f"layers.{index}.{name}", shape


class GraphLayer:
    """One decoder layer: its weights, its experts and the graphs that run it."""

    def __init__(
        self,
        module: nn.Module,
        index: int,
        form: LayerForm,
        runtime: Runtime,
        unpack: bool,
    ):
        self.module, self.index, self.runtime = module, index, runtime
        if form.routed is not None:
            chosen = form.routed.chosen_by(module[form.mlp.path])
            form = form if chosen is form.mlp else replace(form, mlp=chosen)
        self.form = form
        same_input = form.mixer.same_input + form.mlp.same_input
        joined = same_input if runtime.executor.joins_matrices else ()
        skip = form.routed_name
        self.weights = LayerWeights(module, skip=skip, unpack=unpack, joined=joined)
        self._parameters: LayerWeights | None = None
        if self.is_routed:
            experts = module[form.mlp.path][skip]
            if not isinstance(experts, StreamedSwitch):
                self._parameters = LayerWeights(experts)
        self._runner = GraphRunner(runtime.executor)
        runtime.holders.add(self._runner)
        self._resident: tuple[Any, GraphExperts] | None = None
        self._of_ranks: RankExperts | None = None
        self._shape: tuple[int, LayerForm, RoutedShape | None] | None = None

    @property
    def is_routed(self) -> bool:
        """Whether it has routed experts."""
        return self.form.routed is not None

    def __call__(self, hidden: Array, cache: Any, context: Context) -> Array:
        """Run the layer on rows ``[N, D]`` and advance its cache."""
        mixer = self.form.mixer
        spare = self.runtime.executor.spare_rows
        begun = mixer.begin(self.module[mixer.path], cache, context, spare=spare)
        call = self._call(context, begun.masks)
        out, state = self._run(hidden, call, begun.inputs, context, begun.host)
        mixer.end(cache, state, context)
        return self._mended(out)

    def _mended(self, out: Array) -> Array:
        """Return the layer's output, rank 0's where ranks chose other experts."""
        exchange = self.runtime.together.exchange
        if exchange is None or not exchange.has_parted:
            return out
        led = exchange.mended(to_device(out))
        return to_host(led) if isinstance(out, np.ndarray) else led

    def expected(self, hidden: Array) -> Array:
        """Predict the experts ``[N, K]`` that the layer will choose.

        The router runs on the layer's input ``[N, D]``, which differs from the row that
        it will see only by the output of the mixer.
        """
        n = hidden.shape[0]
        on_host = isinstance(hidden, np.ndarray)
        dtype = mx.float32 if on_host else hidden.dtype
        weights = self.weights.bind(dtype, host=on_host)
        key = ("expected", self.weights.signature, self.form, n, dtype)
        graph = self.runtime.graphs.get(key, lambda: self._build_expected(n, dtype))
        done = self._runner.run(graph, weights, {"hidden": hidden}, recurs=True)
        return done.value(graph.outputs["experts"])

    def sample(self, n_tokens: int, dtype: mx.Dtype) -> LayerSample:
        """Return the graph for one sequence of ``n_tokens``, with inputs to run it."""
        weights = self.weights.bind(dtype)
        graph = self.graph(Call(1, n_tokens, dtype))
        return LayerSample.make(graph, weights, self.experts(dtype), n_tokens)

    def graph(self, call: Call) -> LayerGraph:
        """Return the graph for calls like ``call``; layers of one shape share it."""
        if self._shape is None or self._shape[0] != self.weights.signature:
            self._shape = (self.weights.signature, self.form, self._routed_shape())
        return self.runtime.graphs.get((self._shape, call), lambda: self._build(call))

    def planned_bytes(self, call: Call) -> int:
        """Return the planned peak bytes of a call's graph; reads no weight's value."""
        self.weights.refresh()
        return planned_peak_bytes(self.graph(call).graph) + self._copied_bytes(call)

    def _copied_bytes(self, call: Call) -> int:
        """Return the bytes of experts that MLX copies out of slots for a call.

        Our kernels read experts in their slots.
        """
        routed, store = self.form.routed, self.runtime.store
        if routed is None or store is None or self._parameters is not None:
            return 0
        n_ids, layout = call.n * routed.k, store.layout(self.index)
        known = isinstance(self.runtime.executor, KernelExecutor)
        if known and all(map(knows, layout.quantization)):
            return 0
        copies = device.copies_slots(n_ids, routed.n_experts)
        return copies * min(n_ids, routed.n_experts) * layout.stride

    def experts(self, dtype: mx.Dtype) -> GraphExperts | None:
        """Return the layer's routed experts, if any."""
        if not self.is_routed:
            return None
        if self._parameters is None:
            assert self.runtime.streamer is not None
            return self._shared(self.runtime.streamer.source(self.index))
        bound = self._parameters.bind(dtype)
        if self._resident is None or self._resident[0] is not bound:
            names = ("gate_proj", "up_proj", "down_proj")
            experts = ExpertWeights(*(_with_bias(bound, name) for name in names))
            self._resident = bound, ResidentExperts(experts)
        return self._resident[1]

    def _shared(self, source: GraphExperts) -> GraphExperts:
        """Return the experts of all ranks, if several share them."""
        exchange, routed = self.runtime.together.exchange, self.form.routed
        if exchange is None:
            return source
        if self._of_ranks is None or self._of_ranks.source is not source:
            assert routed is not None
            name = f"layers.{self.index}.{routed.path}.{routed.routed_name}"
            own = exchange.own(routed.n_experts)
            self._of_ranks = RankExperts(source, exchange, name, own)
        return cast(GraphExperts, self._of_ranks)

    def _call(self, context: Context, masks: Mapping[str, bool]) -> Call:
        one_token = context.n_seqs == context.t == 1
        streamer = self.runtime.streaming if self._parameters is None else None
        waits = streamer is not None and streamer.reads_in_workers
        alone = self.runtime.together.exchange is None
        early = self.is_routed and one_token and context.on_host and waits and alone
        return Call(
            context.n_seqs,
            context.t,
            context.dtype,
            # The host multiplies each expert's rows at once; a device multiplies all.
            gather_by_id=not context.on_host,
            requests_early=early,
            **masks,
        )

    def _run(
        self,
        hidden: Array,
        call: Call,
        inputs: Mapping[str, Any],
        context: Context,
        host: Mapping[type[Op], Kernel] | None,
    ) -> tuple[Array, dict[str, Array]]:
        weights = self.weights.bind(call.dtype, host=isinstance(hidden, np.ndarray))
        graph = self.graph(call)
        if context.experts is None:
            experts = self.experts(call.dtype)
        else:
            experts = context.experts.get(self.index)
        inputs = {**inputs, "hidden": hidden, "experts": experts}
        if call.requests_early:
            assert experts is not None and self.form.routed is not None
            route = block_ops.requesting(experts, self.form.routed)
            host = {**(host or {}), self.form.routed.choice: route}
        # Prompts come in any length: only calls of single tokens are sure to recur.
        recurs = call.t == 1 and not context.traced
        done = self._runner.run(graph, weights, inputs, host, recurs=recurs)
        outputs = {name: done.value(buf) for name, buf in graph.outputs.items()}
        return outputs.pop("hidden"), outputs

    def _routed_shape(self) -> RoutedShape | None:
        if (routed := self.form.routed) is None:
            return None
        if self._parameters is None:
            assert self.runtime.store is not None
            n_bytes = self.runtime.store.layout(self.index).record_bytes
        else:
            self._parameters.refresh()
            total = sum(ref.n_bytes for ref in self._parameters.refs.values())
            n_bytes = total // routed.n_experts
        shared = self.runtime.together.exchange is not None
        return RoutedShape(self.form.dim, routed.expert_dim, n_bytes, shared)

    def _build_expected(self, n: int, dtype: mx.Dtype) -> LayerGraph:
        assert self.form.routed is not None
        g = GraphBuilder("router of the layer ahead", dtype, self.weights.refs)
        hidden = g.input("hidden", b.HiddenBuf, (n, self.form.dim))
        x = g.norm(MLP_NORM, hidden, b.MoeInputBuf, self.form.eps)
        experts = block_ops.expected_experts(g, self.form.routed, x, n)
        return g.finish(self.runtime.executor, experts=experts)

    def _build(self, call: Call) -> LayerGraph:
        assert self._shape is not None
        form, (_, _, routed) = self.form, self._shape
        g = GraphBuilder(f"{form.mixer.name} layer", call.dtype, self.weights.refs)
        hidden = g.input("hidden", b.HiddenBuf, (call.n, form.dim))
        x = g.norm(MIXER_NORM, hidden, b.AttnInputBuf, form.eps)
        mixed, state = form.mixer.push(g, self.module[form.mixer.path], x, call)
        residual = g.residual_add(mixed, hidden)
        mlp_in = g.norm(MLP_NORM, residual, b.MoeInputBuf, form.eps)
        if form.routed is None or routed is None:
            out = block_ops.dense_mlp(g, residual, mlp_in, call)
        else:
            out = block_ops.moe(g, form.routed, residual, mlp_in, call, routed)
        return g.finish(self.runtime.executor, hidden=out, **state)


def _with_bias(weights: Mapping[str, Weight], name: str) -> Weight:
    bias = weights.get(f"{name}.bias")
    return weights[name] if bias is None else replace(weights[name], bias=bias.w)
