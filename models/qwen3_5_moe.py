"""Qwen3.5-MoE and Qwen3.6-MoE: gated DeltaNet and full attention layers, all MoE.

A drop-in for ``mlx_lm.models.qwen3_5_moe``: constructor, weight names, caches and
sanitising are mlx-lm's own; the forward pass is a graph of Ops per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5
from mlx_lm.models import qwen3_5_moe as stock

from moeflux_mlx import blocks, device
from moeflux_mlx.blocks import ROUTED, Call, RoutedShape
from moeflux_mlx.context import (
    Context,
    cache_ops,
    has_spare_rows,
)
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.modules import RoutedBlock, quantize_as_stored
from moeflux_mlx.experts.resident import ResidentExperts
from moeflux_mlx.experts.switch import StreamedSwitch
from moeflux_mlx.forward import Forward
from moeflux_mlx.graph import Op, planned_peak_bytes
from moeflux_mlx.graph import roles as b
from moeflux_mlx.graph.experts import GraphExperts
from moeflux_mlx.graph.lower import Kernel
from moeflux_mlx.memory import Needs
from moeflux_mlx.model import (
    GraphBuilder,
    GraphRunner,
    LayerGraph,
    LayerSample,
)
from moeflux_mlx.ops import MoeSoftmaxTopK
from moeflux_mlx.ops.functions import Array, to_device
from moeflux_mlx.parameters import LayerWeights
from moeflux_mlx.runtime import RunOptions, Runtime
from moeflux_mlx.saving import (
    GuardsSaving,
    guard_saving,
    refuse_experts,
)
from moeflux_mlx.training import TrainsUncompiled
from moeflux_mlx.weights import ExpertWeights

from . import qwen3_5_tensors

ModelArgs = stock.ModelArgs
TextModelArgs = qwen3_5.TextModelArgs
check = qwen3_5_tensors.check

guard_saving()


class Model(GuardsSaving, TrainsUncompiled, stock.Model):
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

    def update(self, parameters: Any, strict: bool = True) -> Any:  # type: ignore[override]
        """Replace parameters.

        Raises:
            ModelError: some are of streamed experts; nothing is replaced.
        """
        if self.runtime.store is not None:
            refuse_experts(dict(tree_flatten(parameters)), ROUTED)
        return super().update(parameters, strict)

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
        for layer in self.model.layers:
            if not layer.is_linear:
                blocks.rotation(layer.self_attn.rope)
        if runtime.store is not None:
            runtime.check_layers(range(args.num_hidden_layers))
            for index, layer in enumerate(self.model.layers):
                layer.mlp[ROUTED] = self._streamed(layer.mlp[ROUTED], index, runtime)

        def make_layer(
            runtime: Runtime, module: nn.Module, index: int, unpack: bool
        ) -> GraphLayer:
            return GraphLayer(module, index, args, runtime, unpack)

        backbone = qwen3_5.Qwen3_5TextModel.__call__
        self.forward = Forward(self, args, runtime, make_layer, backbone)
        self.model.forward = self.forward

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        return self.forward(inputs, cache, input_embeddings)

    def _streamed(
        self, block: nn.Module, index: int, runtime: Runtime
    ) -> StreamedSwitch:
        """Return what runs a layer's routed block where graphs do not."""
        assert runtime.store is not None
        layout = runtime.store.layout(index)
        forms = zip(layout.projections, layout.quantization, strict=True)
        quantize_as_stored(block, dict(forms))

        def source() -> GraphExperts:
            runtime.open(self.forward.needs)
            assert runtime.streamer is not None
            return runtime.streamer.source(index)

        path = f"language_model.model.layers.{index}.mlp.{ROUTED}"
        return StreamedSwitch(RoutedBlock(path, block), source, runtime.alone)


class Backbone(qwen3_5.Qwen3_5TextModel):
    """Tokens ``[B, T]`` to normalised hidden states ``[B, T, D]``."""

    forward: Forward

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        return self.forward.rows(inputs, cache, input_embeddings)


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
        block = module.mlp[ROUTED]
        streamed = isinstance(block, StreamedSwitch)
        self.routed = None if streamed else LayerWeights(block)
        self._runner = GraphRunner(runtime.executor)
        self._resident: tuple[Any, GraphExperts] | None = None
        self._shape: tuple[int, bool, RoutedShape] | None = None

    def __call__(self, hidden: Array, cache: Any, context: Context) -> Array:
        """Run the layer on rows ``[N, D]``, moving its cache forward."""
        if self.module.is_linear:
            return self._run_linear(hidden, cache, context)
        return self._run_full(hidden, cache, context)

    def expected(self, hidden: Array) -> Array:
        """Return the experts ``[N, K]`` that the layer will likely choose.

        Its router says so on what the layer begins with ``[N, D]``: less its own mixer,
        that is the row it will see.
        """
        n = hidden.shape[0]
        on_host = isinstance(hidden, np.ndarray)
        dtype = mx.float32 if on_host else hidden.dtype
        weights = self.weights.bind(dtype, host=on_host)
        key = ("expected", self.weights.signature, n, dtype)
        graph = self.runtime.graphs.get(key, lambda: self._build_expected(n, dtype))
        done = self._runner.run(graph, weights, {"hidden": hidden}, recurs=True)
        return done.value(graph.outputs["experts"])

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
        steps = context.t == 1 and self.runtime.traces_steps
        parameters = self.routed is not None
        lazy = parameters and not device.on_cpu()
        gather = steps or lazy or self.runtime.is_reference
        one_token = context.n_seqs == context.t == 1
        streamer = None if parameters else self.runtime.streaming
        waits = streamer is not None and streamer.reads_aside
        return Call(
            context.n_seqs,
            context.t,
            context.dtype,
            gather_by_id=gather,
            asks_at_once=one_token and context.on_host and waits,
            **masks,
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
        if call.asks_at_once:
            route = blocks.asking(experts, self.module.mlp.top_k)
            host = {**(host or {}), MoeSoftmaxTopK: route}
        # Prompts come in any length: only single tokens are sure to come again.
        recurs = call.t == 1 and not context.traced
        done = self._runner.run(graph, weights, inputs, host, recurs=recurs)
        outputs = {name: done.value(buf) for name, buf in graph.outputs.items()}
        return outputs.pop("hidden"), outputs

    def experts(self, dtype: mx.Dtype) -> GraphExperts:
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

    def _build_expected(self, n: int, dtype: mx.Dtype) -> LayerGraph:
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
