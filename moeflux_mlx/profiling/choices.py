"""What lowering has to choose from, met by running a model: Ops, groups, their inputs.

A choice is one Op, or one group of Ops, at one shape; it is met in many layers, whose
inputs and weights are its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from ..executors.base import Encoding, arrays
from ..executors.kernels import KernelExecutor
from ..experts.resident import ResidentExperts
from ..graph.lower import Kernel, Step, Together, lower, lower_op
from ..graph.op import Op
from ..launch import KERNELS
from ..launch.base import TOLERANCE
from ..launch.check import relative_error
from ..lowering import Group, default_way, groups_ahead, ways
from ..lowering.groups import one_by_one
from ..lowering.tuned import ONE_BY_ONE, TOGETHER, n_tokens_of, shape_of
from ..model import LayerGraph, Runtime
from ..weights import ExpertWeights, Weight
from .recording import layer_of, shared, states
from .timing import Work

# Layers whose inputs are kept: of one token enough to fill a queue, of prompts few.
MAX_SAMPLES, MAX_PROMPT_SAMPLES = 64, 4
# Values of an output that are compared: of more, those of the first and last rows.
MAX_COMPARED = 1 << 25
Key = tuple[str, str, int]


@dataclass
class Choice:
    """An Op or a group at one shape: the ways it can go, and what to try them on.

    Every way takes ``inputs`` and returns outputs as ``reference`` does. ``carried``
    pairs outputs with the inputs they become, as of ``Work``.
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
    samples: list[list[Any]] = field(default_factory=list)

    @property
    def key(self) -> Key:
        """What tells it from other choices."""
        return self.name, self.shape, self.n_tokens

    @property
    def is_group(self) -> bool:
        """Tell whether it is of several Ops."""
        return TOGETHER in self.ways

    def add(self, inputs: list[Any]) -> None:
        """Keep the inputs of one more layer, if there is room."""
        many = self.n_tokens > 1
        if len(self.samples) < (MAX_PROMPT_SAMPLES if many else MAX_SAMPLES):
            first = self.samples[0] if self.samples and many else inputs
            self.samples.append(shared(first, inputs))

    def works(self, way: str) -> list[Work]:
        """Return the work of going a way, once for each sample."""
        call = self.ways[way]
        return [
            Work(call, list(inputs), self.carried, waits=self.reads_back)
            for inputs in self.samples
        ]

    def expected(self) -> list[mx.array]:
        """Return the reference's outputs for the first sample, computed in float32.

        Where activations are float32 that is on the CPU: GPUs multiply with fewer bits.
        """
        inputs = [_wide(value) for value in self.samples[0]]
        exact = self.dtype == mx.float32
        with mx.stream(mx.cpu if exact else mx.default_device()):
            outputs = _as_list(self.reference(*inputs))
            mx.eval(arrays(outputs))
        return outputs

    def error(self, way: str, expected: Sequence[mx.array]) -> str:
        """Return what is wrong with a way's outputs for the first sample; "": nothing.

        They must be as near to the reference as ``moeflux doctor`` asks of the kernel.
        """
        outputs = _as_list(self.ways[way](*self.samples[0]))
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
    """Return the first and the last rows of an array too large to compare whole."""
    n_rows = MAX_COMPARED * x.shape[0] // max(1, 2 * x.size) if x.ndim else 0
    if x.size <= MAX_COMPARED or not n_rows:
        return x
    return mx.concatenate([x[:n_rows], x[-n_rows:]])


def _as_list(result: Any) -> list[mx.array]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _wide(value: Any) -> Any:
    """Return floats as float32, in weights and experts too."""
    if isinstance(value, mx.array):
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(mx.float32) if floating else value
    if isinstance(value, Weight):
        w, scales, biases = map(_wide, (value.w, value.scales, value.biases))
        return Weight(w, scales, biases, value.quantization)
    if hasattr(value, "weights"):
        stacks = value.weights
        wide = (_wide(x) for x in (stacks.gate, stacks.up, stacks.down))
        return ResidentExperts(ExpertWeights(*wide))
    return value


class Collector:
    """Observes an executor: performs Op by Op and keeps every choice it meets.

    Args:
        runtime: of the model that will be called.
        best: tells which way an Op goes when its group is taken apart.
    """

    def __init__(self, runtime: Runtime, best: Callable[[Op], Kernel]):
        assert isinstance(runtime.executor, KernelExecutor)
        self.choices: dict[Key, Choice] = {}
        self._runtime, self._executor = runtime, runtime.executor
        self._best = best

    def __call__(self, steps: Sequence[Step], encoding: Encoding) -> None:
        layer = layer_of(self._runtime, steps)
        groups = self._groups(layer)
        values, weights, host = encoding.values, encoding.weights, encoding.host
        for op in layer.graph.ops:
            step = lower_op(op, self._executor.kernel(op), layer.graph.pool.physical)
            met = [groups[id(op)]] if id(op) in groups else []
            if not step.is_performed_by(host):
                met.append((self._of_op(op, step, layer), step))
            for choice, whole in met:
                inputs = whole.inputs(values, weights)
                mx.eval(arrays(inputs))
                self.choices.setdefault(choice.key, choice).add(inputs)
            mx.eval(arrays(step.run(values, weights, host)))

    def _of_op(self, op: Op, step: Step, layer: LayerGraph) -> Choice:
        run = self._executor.run
        return Choice(
            name=op.variant_name,
            shape=shape_of([op]),
            n_tokens=n_tokens_of([op]),
            default=default_way(op, self._executor.name).name,
            ways={way.name: partial(way.call, op, run) for way in ways(op)},
            reference=_reference(op),
            dtype=layer.graph.pool.activation_dtype,
            carried=states(step, layer),
            reads_back=op.reads_back,
        )

    def _groups(self, layer: LayerGraph) -> dict[int, tuple[Choice, Step]]:
        """Return the groups of a graph by the id of the first Op, each as one step."""
        run = self._executor.run
        together = self._lowered(layer, lambda g, ops: partial(g.call, ops, run))
        apart = self._lowered(layer, lambda _, ops: self._apart(ops, self._best))
        references = self._lowered(layer, lambda _, ops: self._apart(ops, _reference))
        found = {}
        for step, alone, exact in zip(together, apart, references, strict=True):
            if len(step.ops) > 1:
                group, _ = next(groups_ahead(step.ops))
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
                )
                found[id(step.ops[0])] = choice, step
        return found

    def _lowered(
        self, layer: LayerGraph, perform: Callable[[Group, Sequence[Op]], Together]
    ) -> list[Step]:
        """Lower a graph with its groups performed by what ``perform`` returns."""

        def fuse(ops: Sequence[Op]) -> tuple[int, Together] | None:
            ahead = next(groups_ahead(ops), None)
            if ahead is None:
                return None
            group, n = ahead
            return n, perform(group, ops[:n])

        return lower(layer.graph, self._executor.kernel, fuse)

    def _apart(self, ops: Sequence[Op], kernel: Callable[[Op], Kernel]) -> Together:
        # Looked up when called: by then the fastest ways are known.
        return lambda values: one_by_one(ops, [kernel(op) for op in ops], values)


def _reference(op: Op) -> Kernel:
    return op.reference  # type: ignore[attr-defined,no-any-return]
