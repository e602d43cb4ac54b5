"""Graphs of layers: built from Ops, cached, and run.

A family's file describes its layers as graphs. This module knows no family and no
kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import mlx.core as mx

from ..calls.compiling import forget_gone
from ..errors import ModelError
from ..experts.weights import Weight, has_values
from ..memory.steady import STEADY, active_bytes
from .executors import Encoding, Executor
from .executors.base import arrays
from .executors.compiled import CompiledCalls
from .graph import Buf, BufferPool, BufId, Graph, Op, WeightRef
from .graph.buffers import Shape
from .graph.experts import GraphExperts
from .graph.lower import Kernel, LoweredCall
from .graph.roles import ExpertBaseBuf, ResidualBuf
from .ops import MatvecNTokens, ResidualAddNTokens, RmsNormBf16NTokens

B = TypeVar("B", bound=Buf)
T = TypeVar("T")


@dataclass(eq=False)
class LayerGraph:
    """A graph with its lowered calls and its named inputs and outputs."""

    graph: Graph
    inputs: dict[str, BufId[Any]]
    outputs: dict[str, BufId[Any]]
    calls: list[LoweredCall]


class GraphBuilder:
    """Builds one graph over its own pool; a thin layer over ``Graph.push``."""

    def __init__(self, name: str, dtype: mx.Dtype, refs: Mapping[str, WeightRef]):
        self.pool = BufferPool(dtype)
        self.graph = Graph(self.pool, name)
        self.refs = refs
        self.inputs: dict[str, BufId[Any]] = {}

    def input(self, name: str, role: type[B], shape: Shape) -> BufId[B]:
        """Add a buffer that the caller binds at every run."""
        buf = self.pool.alloc(role, shape, name, persistent=True)
        self.inputs[name] = buf
        return buf

    def constant(self, name: str, role: type[B], array: mx.array) -> BufId[B]:
        """Add a buffer with a constant value."""
        # Threads share graphs, and only its own thread can evaluate a lazy array.
        has_values(array)
        return self.pool.register_borrowed(role, array, name, persistent=True)

    def new(self, name: str, role: type[B], shape: Shape) -> BufId[B]:
        """Add a buffer that an Op of this graph writes."""
        return self.pool.alloc(role, shape, name)

    def push(self, op: Op) -> None:
        """Append an Op to the graph."""
        self.graph.push(op)

    def ref(self, name: str) -> WeightRef:
        """Return the weight at a path; raise ModelError if there is none."""
        if name not in self.refs:
            raise ModelError(f"[{self.graph.name}] expected a weight {name!r}")
        return self.refs[name]

    def matvec(
        self, name: str, x: BufId[Any], role: type[B], *, label: str | None = None
    ) -> BufId[B]:
        """Push the product of ``x`` and the matrix at path ``name``, with its bias."""
        weight = self.ref(name)
        n_tokens, in_dim = self._rows(x)
        label = label or name.rsplit(".", 1)[-1]
        out = self.new(label, role, (n_tokens, weight.shape[0]))
        op = MatvecNTokens(
            label=label,
            weight=weight,
            input=x,
            output=out,  # type: ignore[arg-type]
            in_dim=in_dim,
            out_dim=weight.shape[0],
            n_tokens=n_tokens,
            bias=self.refs.get(f"{name}.bias"),
        )
        self.push(op)
        return out

    def norm(self, name: str, x: BufId[Any], role: type[B], eps: float) -> BufId[B]:
        """Push an RMS norm of ``x`` with the weight at path ``name``."""
        n_tokens, dim = self._rows(x)
        out = self.new(name, role, (n_tokens, dim))
        op = RmsNormBf16NTokens(
            label=name,
            x=x,
            weight=self.ref(name),
            out=out,  # type: ignore[arg-type]
            dim=dim,
            n_tokens=n_tokens,
            eps=eps,
        )
        self.push(op)
        return out

    def residual_add(
        self, given: BufId[Any], stream: BufId[Any], *, label: str = "residual_add"
    ) -> BufId[ResidualBuf]:
        """Push the sum of half a layer's output and the residual stream."""
        n_tokens, dim = self._rows(stream)
        out = self.new("residual", ResidualBuf, (n_tokens, dim))
        op = ResidualAddNTokens(
            label=label, a=given, b=stream, out=out, n_tokens=n_tokens, dim=dim
        )
        self.push(op)
        return out

    def _rows(self, x: BufId[Any]) -> tuple[int, int]:
        n_tokens, dim = self.pool.info(x).shape
        assert n_tokens is not None and dim is not None
        return n_tokens, dim

    def finish(self, executor: Executor, **outputs: BufId[Any]) -> LayerGraph:
        """Check, plan and lower the graph."""
        self.graph.verify()
        self.pool.commit_plan(self.graph)
        calls = executor.lower(self.graph)
        return LayerGraph(self.graph, self.inputs, outputs, calls)


class BuiltOnce(Generic[T]):
    """Values by key, built on first use; a full one drops its oldest value."""

    def __init__(self, max_size: int):
        self._built: dict[Hashable, T] = {}
        self._max_size = max_size

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the value of ``key``; build it if there is none."""
        if key not in self._built:
            if len(self._built) >= self._max_size:
                self._built.pop(next(iter(self._built)))
            self._built[key] = build()
        return self._built[key]

    def clear(self) -> None:
        """Drop all values."""
        self._built.clear()

    def values(self) -> list[T]:
        """Return all values that were not dropped."""
        return list(self._built.values())


class GraphRunner:
    """Runs the graphs of one layer; compiles those that recur."""

    def __init__(self, executor: Executor):
        self._executor = executor
        # One for each number of sequences, form of cache and set of weights.
        self._compiled: BuiltOnce[CompiledCalls] = BuiltOnce(8)

    def let_go(self) -> None:
        """Drop compiled functions: they hold experts' arrays."""
        for calls in self._compiled.values():
            calls.let_go()
        self._compiled.clear()
        forget_gone()

    def run(
        self,
        layer: LayerGraph,
        weights: Mapping[str, Weight],
        inputs: Mapping[str, Any],
        host: Mapping[type[Op], Kernel] | None = None,
        *,
        recurs: bool = False,
    ) -> Encoding:
        """Encode a graph with its inputs bound; it has no absent optional inputs.

        Args:
            host: functions of the caller that replace kernels, by type of Op.
            recurs: the graph will run again with the same weights, as in decoding.
        """
        executor = self._executor
        encoding = executor.begin_encoding(layer.graph.pool, weights, host)
        for name, buf in layer.inputs.items():
            encoding.bind(buf, inputs[name])
        if recurs and executor.compiles and not executor.watches_calls:
            self._compiled_for(layer, encoding, inputs.get("experts")).run(encoding)
        else:
            executor.encode_graph(layer.calls, encoding)
        return encoding

    def _compiled_for(
        self, layer: LayerGraph, encoding: Encoding, experts: GraphExperts | None
    ) -> CompiledCalls:
        # A compiled function holds these objects, so no new object gets their ids.
        same = (id(encoding.weights), id(experts), frozenset(encoding.host))
        return self._compiled.get(
            (layer, same), lambda: CompiledCalls(layer.calls, encoding)
        )


@dataclass
class LayerSample:
    """A layer's graph with made-up inputs, to measure its cost."""

    layer: LayerGraph
    weights: Mapping[str, Weight]
    inputs: dict[str, Any]

    @classmethod
    def make(
        cls,
        layer: LayerGraph,
        weights: Mapping[str, Weight],
        experts: GraphExperts | None,
        n_tokens: int,
    ) -> LayerSample:
        """Fill every input with seeded noise; unknown lengths become ``n_tokens``."""
        inputs: dict[str, Any] = {}
        for i, (name, buf) in enumerate(layer.inputs.items()):
            info = layer.graph.pool.info(buf)
            shape = [n_tokens if d is None else d for d in info.shape]
            if info.role is ExpertBaseBuf:
                inputs[name] = experts
            elif mx.issubdtype(info.dtype, mx.floating):
                noise = mx.random.normal(shape, key=mx.random.key(i))
                inputs[name] = noise.astype(info.dtype)
            else:
                inputs[name] = mx.zeros(shape, info.dtype)
        return cls(layer, weights, inputs)

    def peak_bytes(self, executor: Executor) -> int:
        """Run Op by Op and return the peak of MLX's memory besides the inputs."""
        encoding = executor.begin_encoding(self.layer.graph.pool, self.weights)
        held = [*self.inputs.values()]
        for weight in self.weights.values():
            held += [weight.w, weight.scales, weight.biases]
        mx.eval(arrays(held))
        for name, buf in self.layer.inputs.items():
            encoding.bind(buf, self.inputs[name])
        mx.clear_cache()
        with STEADY:
            before = active_bytes()
            mx.reset_peak_memory()
            for call in self.layer.calls:
                executor.encode_graph([call], encoding)
                mx.eval(arrays(encoding.values))
            return mx.get_peak_memory() - before
