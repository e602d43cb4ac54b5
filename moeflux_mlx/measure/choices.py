"""Collect the choices of lowering by running a model: Ops, fusions and their inputs.

A choice is one Op or one fusion at one shape. It occurs in many layers, whose inputs
and weights are its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from ..engine.executors.base import Encoding, arrays
from ..engine.executors.kernels import KernelExecutor
from ..engine.graph.lower import FusedCall, Kernel, LoweredCall, lower, lower_op
from ..engine.graph.op import Op
from ..engine.graph.rows import RowPart, whole
from ..engine.launch import KERNELS
from ..engine.launch.base import TOLERANCE
from ..engine.launch.check import relative_error
from ..engine.lowering import FUSIONS, Fusion, fusions_ahead, ways
from ..engine.lowering.fusions import one_by_one
from ..engine.lowering.tuned import ONE_BY_ONE, TOGETHER, n_tokens_of, shape_of
from ..engine.model import LayerGraph
from ..engine.runtime import Runtime
from ..experts.compute.resident import ResidentExperts
from ..experts.weights import ExpertWeights, Weight
from .recording import layer_of, shared, states
from .timing import Work

# Samples kept for each choice: for one token enough to fill a queue, for prompts few,
# because they are large.
MAX_SAMPLES, MAX_PROMPT_SAMPLES = 64, 4
# Values of an output to compare; a larger one is compared in its first and last rows.
MAX_COMPARED = 1 << 25
Key = tuple[str, str, int]
# Performs Ops on values by buffer and by name, as ``FusedCall.call``.
Perform = Callable[[Mapping[Any, Any]], Mapping[Any, Any]]


@dataclass
class Choice:
    """An Op or a fusion at one shape: its ways, and inputs to try them on.

    Every way takes the same inputs and returns the same outputs as ``reference``.
    ``carried`` is as for ``Work``.
    """

    name: str
    shape: str
    n_tokens: int
    default: str
    ways: Mapping[str, Kernel]
    reference: Kernel
    dtype: mx.Dtype
    carried: tuple[tuple[int, int], ...]
    reads_back: bool
    n_ops: int = 1
    samples: list[list[Any]] = field(default_factory=list)

    @property
    def key(self) -> Key:
        """The key that identifies the choice."""
        return self.name, self.shape, self.n_tokens

    @property
    def is_fusion(self) -> bool:
        """Whether it has several Ops."""
        return TOGETHER in self.ways

    def add(self, inputs: list[Any]) -> None:
        """Keep the inputs of one more layer, up to the maximum."""
        many = self.n_tokens > 1
        if len(self.samples) < (MAX_PROMPT_SAMPLES if many else MAX_SAMPLES):
            first = self.samples[0] if self.samples and many else inputs
            self.samples.append(shared(first, inputs))

    def works(self, way: str) -> list[Work]:
        """Return the work of a way for each sample."""
        call = self.ways[way]
        return [
            Work(call, list(inputs), self.carried, waits=self.reads_back)
            for inputs in self.samples
        ]

    def n_launches(self, way: str, launched: Sequence[str]) -> int:
        """Return the number of launches of a way that launched these kernels of ours.

        An Op that MLX's own operations perform counts as one.
        """
        return max(self.n_ops if way == ONE_BY_ONE else 1, len(launched))

    def expected(self) -> list[mx.array]:
        """Return the reference's outputs for the first sample, computed in float32.

        If activations are float32, this runs on the CPU: GPUs multiply with fewer bits.
        """
        inputs = [_wide(value) for value in self.samples[0]]
        exact = self.dtype == mx.float32
        with mx.stream(mx.cpu if exact else mx.default_device()):
            outputs = _as_list(self.reference(*inputs))
            mx.eval(arrays(outputs))
        return outputs

    def error(self, way: str, expected: Sequence[mx.array]) -> str:
        """Return the error of a way's outputs for the first sample; "" if right.

        The tolerance is that of ``moeflux doctor`` for the kernel.
        """
        outputs = list(map(whole, _as_list(self.ways[way](*self.samples[0]))))
        mx.eval(arrays(outputs))
        name = self.name if way == TOGETHER else way
        known = KERNELS[name].tolerance if name in KERNELS else TOLERANCE
        for i, (got, wanted) in enumerate(zip(outputs, expected, strict=True)):
            floating = mx.issubdtype(got.dtype, mx.floating)
            limit = known[self.dtype] if floating else 0.0
            error = relative_error(_ends(got), _ends(wanted).astype(got.dtype))
            if not error <= limit:
                return f"output {i}: error {error:.2e} (limit {limit:.0e})"
        return ""


def _ends(x: mx.array) -> mx.array:
    """Return an array, or its first and last rows if it is too large to compare."""
    n_rows = MAX_COMPARED * x.shape[0] // max(1, 2 * x.size) if x.ndim else 0
    if x.size <= MAX_COMPARED or not n_rows:
        return x
    return mx.concatenate([x[:n_rows], x[-n_rows:]])


def _as_list(result: Any) -> list[mx.array]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _wide(value: Any) -> Any:
    """Return a value with its floats as float32, also inside weights and experts."""
    if isinstance(value, RowPart):
        return _wide(value.array())
    if isinstance(value, mx.array):
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(mx.float32) if floating else value
    if isinstance(value, Weight):
        return value.mapped(_wide)
    if hasattr(value, "weights"):
        stacks = value.weights
        wide = (_wide(x) for x in (stacks.gate, stacks.up, stacks.down))
        return ResidentExperts(ExpertWeights(*wide))
    return value


class Collector:
    """Observer of an executor that performs Op by Op and collects every choice.

    Args:
        runtime: the runtime of the model to call.
        best: returns the fastest known way of an Op, for fusions performed Op by Op.
    """

    def __init__(self, runtime: Runtime, best: Callable[[Op], Kernel]):
        assert isinstance(runtime.executor, KernelExecutor)
        self.choices: dict[Key, Choice] = {}
        self._runtime, self._executor = runtime, runtime.executor
        self._best = best

    def __call__(self, steps: Sequence[LoweredCall], encoding: Encoding) -> None:
        layer = layer_of(self._runtime, steps)
        values, weights, host = encoding.values, encoding.weights, encoding.host
        for step, choice in self._steps(layer):
            side = values
            if choice is not None:
                # A fusion takes the inputs of its launches, but each Op takes arrays.
                self._meet(choice, step.inputs(values, weights))
                self._meet_smaller(step, layer, encoding)
                side = [whole(value) for value in values]
            for op in step.ops:
                alone = lower_op(
                    op, self._executor.kernel(op), layer.graph.pool.physical
                )
                if not alone.is_performed_by(host):
                    inputs = alone.inputs(side, weights)
                    self._meet(self._of_op(op, alone, layer), inputs)
                mx.eval(arrays(alone.run(side, weights, host)))
            if choice is not None:
                mx.eval(arrays(step.run(values, weights, host)))

    def _meet_smaller(
        self, step: LoweredCall, layer: LayerGraph, encoding: Encoding
    ) -> None:
        """Collect the smaller fusions of a step's Ops, for when it is not fused."""
        group, _ = next(fusions_ahead(step.ops))
        own = set(map(id, step.ops))
        for size in {len(g.types) for g in FUSIONS if len(g.types) < len(group.types)}:
            values = list(encoding.values)
            for smaller, choice in self._steps(layer, size):
                if own.issuperset(map(id, smaller.ops)):
                    if choice is not None:
                        self._meet(choice, smaller.inputs(values, encoding.weights))
                    mx.eval(arrays(smaller.run(values, encoding.weights)))

    def _meet(self, choice: Choice, inputs: list[Any]) -> None:
        mx.eval(arrays(inputs))
        self.choices.setdefault(choice.key, choice).add(inputs)

    def _of_op(self, op: Op, step: LoweredCall, layer: LayerGraph) -> Choice:
        run = self._executor.run
        return Choice(
            name=op.variant_name,
            shape=shape_of([op]),
            n_tokens=n_tokens_of([op]),
            default=self._executor.default_way(op).name,
            ways={way.name: partial(way.call, op, run) for way in ways(op)},
            reference=_reference(op),
            dtype=layer.graph.pool.activation_dtype,
            carried=states(step, layer),
            reads_back=op.reads_back,
        )

    def _steps(
        self, layer: LayerGraph, size: int | None = None
    ) -> Iterator[tuple[LoweredCall, Choice | None]]:
        """Yield the calls of a graph; with a choice if the call is a fusion.

        Args:
            layer: the graph.
            size: ignore fusions of more types of Ops.
        """
        run, best = self._executor.run, self._best
        performs: tuple[Callable[[Fusion, Sequence[Op]], Perform], ...] = (
            lambda group, ops: partial(group.call, ops, run),
            lambda _, ops: self._apart(ops, best),
            lambda _, ops: self._apart(ops, _reference),
        )
        lowered = (self._lowered(layer, perform, size) for perform in performs)
        for step, alone, exact in zip(*lowered, strict=True):
            choice = None
            if len(step.ops) > 1:
                group, _ = next(groups_of(step.ops, size))
                choice = Choice(
                    name=group.name,
                    shape=shape_of(step.ops),
                    n_tokens=n_tokens_of(step.ops),
                    default=TOGETHER,
                    ways={TOGETHER: step.kernel, ONE_BY_ONE: alone.kernel},
                    reference=exact.kernel,
                    dtype=layer.graph.pool.activation_dtype,
                    carried=states(step, layer),
                    reads_back=any(op.reads_back for op in step.ops),
                    n_ops=len(step.ops),
                )
            yield step, choice

    def _lowered(
        self,
        layer: LayerGraph,
        perform: Callable[[Fusion, Sequence[Op]], Perform],
        size: int | None,
    ) -> list[LoweredCall]:
        """Lower a graph; ``perform`` returns the function that performs a fusion."""

        def fuse(ops: Sequence[Op]) -> FusedCall | None:
            ahead = next(groups_of(ops, size), None)
            if ahead is None:
                return None
            group, n = ahead
            # Pass every matrix, and the joined matrix of which it is a part.
            names = [ref.name for op in ops[:n] for ref in op.weight_refs]
            weights = tuple(dict.fromkeys((*group.weights(ops[:n]), *names)))
            call = perform(group, ops[:n])
            return FusedCall(n, call, weights, group.takes_parts)

        return lower(layer.graph, self._executor.kernel, fuse)

    def _apart(self, ops: Sequence[Op], kernel: Callable[[Op], Kernel]) -> Perform:
        # Look the ways up at the call: by then the fastest ones are known.
        return lambda values: one_by_one(ops, [kernel(op) for op in ops], values)


def groups_of(ops: Sequence[Op], size: int | None) -> Iterator[tuple[Fusion, int]]:
    """Yield the fusions at the head of ``ops``, of at most ``size`` types of Ops."""
    for group, n in fusions_ahead(ops):
        if size is None or len(group.types) <= size:
            yield group, n


def _reference(op: Op) -> Kernel:
    return op.reference  # type: ignore[attr-defined,no-any-return]
