"""What model classes share: weights seen by Ops, graph building, and running.

A model file describes its layers as graphs; this module knows neither the model nor
any kernel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import mlx.core as mx

from . import config, device
from .errors import ModelError
from .executors import Encoding, Executor, open_executor
from .executors.base import arrays
from .executors.compiled import CompiledSteps
from .experts.access import open_experts
from .experts.budget import AUTO, most_bytes, parse_bytes
from .experts.mapped import MappedExperts
from .experts.packed import Progress
from .experts.policy import DEFAULT_POLICY
from .experts.store import ExpertStore, model_identity
from .experts.streamer import ExpertStreamer
from .graph import Buf, BufferPool, BufId, Graph, Op, WeightRef
from .graph.buffers import Shape
from .graph.lower import Kernel, Step
from .graph.roles import (
    ExpertBaseBuf,
    ResidualBuf,
)
from .memory import MemoryKeeper, MemoryPlan, Needs, plan_memory
from .ops import MatvecNTokens, ResidualAddNTokens, RmsNormBf16NTokens
from .weights import ExpertSource, Weight

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

    def residual_add(self, mixed: BufId[Any], stream: BufId[Any]) -> BufId[ResidualBuf]:
        """Add a mixer's output to the residual stream."""
        n_tokens, dim = self._rows(stream)
        out = self.new("residual", ResidualBuf, (n_tokens, dim))
        op = ResidualAddNTokens(
            label="residual_add", a=mixed, b=stream, out=out, n_tokens=n_tokens, dim=dim
        )
        self.push(op)
        return out

    def _rows(self, x: BufId[Any]) -> tuple[int, int]:
        n_tokens, dim = self.pool.info(x).shape
        assert n_tokens is not None and dim is not None
        return n_tokens, dim

    def finish(self, executor: Executor, **outputs: BufId[Any]) -> LayerGraph:
        """Check, plan and lower what was built."""
        self.graph.verify()
        self.pool.commit_plan(self.graph)
        steps = executor.lower(self.graph)
        return LayerGraph(self.graph, self.inputs, outputs, steps)


class BuiltOnce(Generic[T]):
    """What was built by key, on first use; the oldest goes when it is full."""

    def __init__(self, max_size: int):
        self._built: dict[Hashable, T] = {}
        self._max_size = max_size

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return what stands under ``key``, building it if there is nothing."""
        if key not in self._built:
            if len(self._built) >= self._max_size:
                self._built.pop(next(iter(self._built)))
            self._built[key] = build()
        return self._built[key]

    def values(self) -> list[T]:
        """Return everything built and still here."""
        return list(self._built.values())


@dataclass(frozen=True)
class RunOptions:
    """How a model is to run: which experts from where, in how much memory, and on what.

    ``open_experts`` opens what experts are streamed from; None: they are among the
    model's parameters. ``memory`` bounds the process, ``expert_memory`` the experts.
    ``optimistic``: whether tokens run ahead of reading experts, as
    ``config.optimistic`` has it; None takes the environment's choice. ``read_ahead``:
    whether experts are read before they are asked for: ``on``, ``off``, or ``auto``
    where that was measured to pay. ``expert_io`` is one of ``config.EXPERT_IO``.
    ``directory`` is where the model is from.
    """

    open_experts: Callable[[], ExpertStore] | None = None
    memory: int | str | None = None
    expert_memory: int | str | None = None
    scope: str = "global"
    policy: str | None = None
    executor: str | None = None
    optimistic: str | None = None
    read_ahead: str = "auto"
    expert_io: str | None = None
    directory: Path | None = None

    @property
    def bounds(self) -> tuple[int | str | None, int | str | None]:
        """The process's memory and the experts', by the environment if not given."""
        if self.memory is None and self.expert_memory is None:
            return config.memory(), config.expert_memory()
        return self.memory, self.expert_memory


class Runtime:
    """What one loaded model needs besides its parameters."""

    def __init__(self, options: RunOptions):
        self.executor = open_executor(options.executor)
        self._optimistic = config.optimistic(options.optimistic)
        self.graphs: BuiltOnce[LayerGraph] = BuiltOnce(64)
        self.options = options
        self.store: ExpertStore | None = None
        self.streamer: ExpertStreamer | MappedExperts | None = None
        self.keeper: MemoryKeeper | None = None
        self.plan: MemoryPlan | None = None
        if options.open_experts is not None:
            self.store = options.open_experts()

    def open(self, needs: Needs, report: Progress | None = None) -> None:
        """Plan memory if it is bounded, and take the experts' share; once.

        Args:
            report: hears how far reading has come where all experts fit.

        Raises:
            ConfigError: a bound is not an amount of bytes.
            BudgetError: what one token needs does not fit.
            ExpertStoreError: an expert could not be read.
        """
        if self.store is None or self.streamer is not None:
            return
        self.plan = self.plan or self.make_plan(needs)
        options, plan = self.options, self.plan
        memory = plan.expert_bytes if plan else options.bounds[1]
        stream = partial(
            ExpertStreamer,
            self.store,
            memory,
            scope=options.scope,
            policy=options.policy or config.policy() or DEFAULT_POLICY,
            read_ahead=options.read_ahead,
            evaluate=partial(self.executor.wait, "routing"),
            report=report,
        )
        io = config.expert_io(options.expert_io)
        if io == "auto" and plan is not None:
            # What is mapped cannot give way to growing caches.
            io = "pread"
        on_host = self.executor.takes_host_arrays and device.prefers_host_arrays()
        self.streamer = open_experts(self.store, memory, stream, io=io, on_host=on_host)
        if plan is not None and isinstance(self.streamer, ExpertStreamer):
            self.keeper = MemoryKeeper(plan, needs, self.streamer)

    def make_plan(self, needs: Needs) -> MemoryPlan | None:
        """Return what a bounded process's memory goes to; takes none of it."""
        memory, most = self.options.bounds
        if self.store is None or memory is None:
            return None
        return plan_memory(
            most_bytes() if memory == AUTO else parse_bytes(memory),
            needs,
            self.store,
            scope=self.options.scope,
            most_expert_bytes=parse_bytes(most, "expert_memory") if most else None,
        )

    @functools.cached_property
    def identity(self) -> str:
        """A hash that tells the model from any other, packed or not.

        Raises:
            ModelError: the model is from no directory, or that is gone.
        """
        if self.options.directory is None:
            raise ModelError("[model] expected a model that load() read from files")
        return model_identity(self.options.directory)

    @property
    def streaming(self) -> ExpertStreamer | None:
        """The streamer, while some experts are not in memory."""
        streamer = self.streamer
        if isinstance(streamer, ExpertStreamer) and not streamer.resident:
            return streamer
        return None

    @property
    def streams(self) -> bool:
        """Tell whether some experts are not in memory."""
        return self.streaming is not None

    @property
    def steps(self) -> bool:
        """Tell whether single tokens go through all layers without a read-back.

        That is where launches are worth a trace: elsewhere reading back costs nothing.
        """
        return self.traces_steps and not (self._optimistic == "off" and self.streams)

    @property
    def traces_steps(self) -> bool:
        """Tell whether single tokens do so when all their experts are in memory."""
        return self.executor.compiles or self.runs_ahead

    @property
    def runs_ahead(self) -> bool:
        """Tell whether tokens do so however many experts are missing."""
        return self._optimistic == "on"

    @contextlib.contextmanager
    def reading_ahead(self, *, one_token: bool) -> Iterator[bool]:
        """Tell whether to read ahead in a call, which is timed to find that out."""
        if (streamer := self.streaming) is None or not one_token:
            yield False
            return
        yield streamer.read_ahead.begin()
        streamer.read_ahead.end()

    def without_streamed(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Leave out of a checkpoint's weights what the streamer reads itself."""
        streamed = self.store.tensor_names if self.store is not None else ()
        return {name: w for name, w in weights.items() if name not in streamed}

    def check_layers(self, routed: Collection[int]) -> None:
        """Raise ModelError unless the files have experts for every routed layer."""
        missing = set(routed) - set(self.store.layers if self.store else routed)
        if missing:
            raise ModelError(
                f"[experts] expected experts of layer {min(missing)} but the files "
                "have none: is a shard missing?"
            )


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
        self, layer: LayerGraph, encoding: Encoding, experts: ExpertSource | None
    ) -> CompiledSteps:
        # What ids stand for is kept by the trace, so no id is used again meanwhile.
        same = (id(encoding.weights), id(experts), frozenset(encoding.host))
        return self._traces.get(
            (layer, same), lambda: CompiledSteps(layer.steps, encoding)
        )


@dataclass
class LayerSample:
    """A layer's graph with made-up inputs, for looking at what running it takes."""

    layer: LayerGraph
    weights: Mapping[str, Weight]
    inputs: dict[str, Any]

    @classmethod
    def make(
        cls,
        layer: LayerGraph,
        weights: Mapping[str, Weight],
        experts: ExpertSource,
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


@mx.custom_function
def refuse_gradient(x: mx.array, *sources: mx.array) -> mx.array:
    """Return ``x``; a gradient through it, or for ``sources``, raises ``ModelError``.

    A backward pass would read expert slots that hold other experts by then, and
    nothing computed on the host has a backward pass.
    """
    return x


@refuse_gradient.vjp
def _refuse(_primals, _cotangents, _outputs):  # type: ignore[no-untyped-def]
    raise ModelError(
        "[gradient] expected a model in training mode with every expert in memory; "
        "call model.train(), and load a plain checkpoint rather than streamed experts"
    )
