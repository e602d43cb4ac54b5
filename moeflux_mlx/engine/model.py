"""The common ground of model classes: weights seen by Ops, graph building, and running.

A model file describes its layers as graphs; this module knows neither the model nor
any kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import mlx.core as mx

from ..errors import ModelError
from ..experts.weights import Weight, has_values
from .executors import Encoding, Executor
from .executors.base import arrays
from .executors.compiled import CompiledSteps
from .graph import Buf, BufferPool, BufId, Graph, Op, WeightRef
from .graph.buffers import Shape
from .graph.experts import GraphExperts
from .graph.lower import Kernel, Step
from .graph.roles import ExpertBaseBuf, ResidualBuf
from .ops import MatvecNTokens, ResidualAddNTokens, RmsNormBf16NTokens

B = TypeVar("B", bound=Buf)
T = TypeVar("T")


@dataclass(eq=False)
class LayerGraph:
    """A graph with its lowered steps and its named inputs and outputs."""

    graph: Graph
    inputs: dict[str, BufId[Any]]
    outputs: dict[str, BufId[Any]]
    steps: list[Step]


class GraphBuilder:
    """Builds one graph over a pool of its own; a thin layer over ``Graph.push``."""

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
        """Add a buffer with a value that never changes."""
        # Graphs are shared by threads, and a lazy array belongs to its own.
        has_values(array)
        return self.pool.register_borrowed(role, array, name, persistent=True)

    def new(self, name: str, role: type[B], shape: Shape) -> BufId[B]:
        """Add a buffer that an Op of this graph writes."""
        return self.pool.alloc(role, shape, name)

    def push(self, op: Op) -> None:
        """Append an Op to the graph."""
        self.graph.push(op)

    def ref(self, name: str) -> WeightRef:
        """Return a weight by its path; ModelError when the model has none."""
        if name not in self.refs:
            raise ModelError(f"[{self.graph.name}] expected a weight {name!r}")
        return self.refs[name]

    def matvec(
        self, name: str, x: BufId[Any], role: type[B], *, label: str | None = None
    ) -> BufId[B]:
        """Multiply ``x`` by the matrix at path ``name``, plus its bias if any."""
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
        """Normalise rows with the weight at path ``name``."""
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
        """Add the output of half a layer to the residual stream."""
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
        steps = executor.lower(self.graph)
        return LayerGraph(self.graph, self.inputs, outputs, steps)


class BuiltOnce(Generic[T]):
    """Values by key, built on first use; the oldest goes when it is full."""

    def __init__(self, max_size: int):
        self._built: dict[Hashable, T] = {}
        self._max_size = max_size

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the value of ``key``, building it if there is none."""
        if key not in self._built:
            if len(self._built) >= self._max_size:
                self._built.pop(next(iter(self._built)))
            self._built[key] = build()
        return self._built[key]

    def values(self) -> list[T]:
        """Return everything built and still here."""
        return list(self._built.values())


class GraphRunner:
    """Runs the graphs of one layer, and keeps traces of those that recur."""

    def __init__(self, executor: Executor):
        self._executor = executor
        self._traces: BuiltOnce[CompiledSteps] = BuiltOnce(8)

    def run(
        self,
        layer: LayerGraph,
        weights: Mapping[str, Weight],
        inputs: Mapping[str, Any],
        host: Mapping[type[Op], Kernel] | None = None,
        *,
        recurs: bool = False,
    ) -> Encoding:
        """Encode a graph with its inputs bound; absent optional inputs are not in it.

        Args:
            host: Ops that the caller performs.
            recurs: the same graph comes again with the same weights, as in decoding.
        """
        executor = self._executor
        encoding = executor.begin_encoding(layer.graph.pool, weights, host)
        for name, buf in layer.inputs.items():
            encoding.bind(buf, inputs[name])
        if recurs and executor.compiles and not executor.watches_steps:
            self._trace(layer, encoding, inputs.get("experts")).run(encoding)
        else:
            executor.encode_graph(layer.steps, encoding)
        return encoding

    def _trace(
        self, layer: LayerGraph, encoding: Encoding, experts: GraphExperts | None
    ) -> CompiledSteps:
        # The trace keeps the objects behind ids, so no id is used again meanwhile.
        same = (id(encoding.weights), id(experts), frozenset(encoding.host))
        return self._traces.get(
            (layer, same), lambda: CompiledSteps(layer.steps, encoding)
        )


@dataclass
class LayerSample:
    """A layer's graph with made-up inputs, for looking at the cost of running it."""

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
        """Fill every input with seeded noise, unknown lengths with ``n_tokens``."""
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
        """Run Op by Op and return the most MLX memory held besides the inputs."""
        encoding = executor.begin_encoding(self.layer.graph.pool, self.weights)
        held = [*self.inputs.values()]
        for weight in self.weights.values():
            held += [weight.w, weight.scales, weight.biases]
        mx.eval(arrays(held))
        for name, buf in self.layer.inputs.items():
            encoding.bind(buf, self.inputs[name])
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for step in self.layer.steps:
            executor.encode_graph([step], encoding)
            mx.eval(arrays(encoding.values))
        return mx.get_peak_memory() - before
