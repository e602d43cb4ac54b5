"""The base of executors: encode Ops lazily, then submit and wait."""

from __future__ import annotations

import atexit
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from ... import config
from ...experts.weights import Weight
from ..graph.buffers import BufferPool, BufId
from ..graph.graph import Graph
from ..graph.lower import Kernel, LoweredCall, lower, lower_op
from ..graph.op import Op
from ..graph.rows import RowPart, whole
from ..graph.stats import Stats


@dataclass
class Encoding:
    """The values of one run over a pool: the bound ones, then those that Ops wrote.

    ``host`` has functions of the caller that replace kernels, by type of Op, with the
    signature of the Op's reference. For example, a KV cache object appends its rows.
    """

    pool: BufferPool
    weights: Mapping[str, Weight]
    values: list[Any]
    host: Mapping[type[Op], Kernel]

    def bind(self, buf: BufId[Any], value: Any) -> None:
        """Set a buffer's value for this run."""
        self.values[self.pool.physical[buf.index]] = value

    def value(self, buf: BufId[Any]) -> Any:
        """Return a buffer's value; None if it was dropped after its last use."""
        return whole(self.values[self.pool.physical[buf.index]])


Observer = Callable[[Sequence[LoweredCall], Encoding], None]


class Executor(ABC):
    """Runs graphs; subclasses choose the function that performs an Op."""

    name: ClassVar[str]
    # Whether Ops take NumPy arrays on machines that prefer these.
    takes_host_arrays: ClassVar[bool] = False
    # Whether to compile recurring graphs: launches cost more in Python than on the
    # device.
    compiles: ClassVar[bool] = False
    # Whether attention takes whole caches with spare rows, so that no shape changes
    # from token to token.
    spare_rows: ClassVar[bool] = False
    # Whether joining matrices that multiply the same row makes launches cheaper.
    joins_matrices: ClassVar[bool] = False

    def __init__(self) -> None:
        self.stats = Stats()
        # Encodes calls in place of ``encode_graph``, to observe each.
        self.observer: Observer | None = None
        self.profile_per_op = config.profile_per_op()
        if self.profile_per_op:
            atexit.register(lambda: print(self.stats.table(), file=sys.stderr))

    @classmethod
    def open(cls) -> Executor:
        """Return a ready executor.

        Raises:
            BackendError: it cannot run on this machine.
        """
        return cls()

    @abstractmethod
    def kernel(self, op: Op) -> Kernel:
        """Return the function that performs ``op``, with its reference's signature."""

    def lower(self, graph: Graph) -> list[LoweredCall]:
        """Lower a graph; the result can be encoded any number of times."""
        return lower(graph, self.kernel)

    def begin_encoding(
        self,
        pool: BufferPool,
        weights: Mapping[str, Weight] | None = None,
        host: Mapping[type[Op], Kernel] | None = None,
    ) -> Encoding:
        """Start a run with the values of the pool."""
        return Encoding(pool, weights or {}, list(pool.values), host or {})

    def encode_op(self, op: Op, encoding: Encoding) -> None:
        """Encode one Op alone; its inputs stay alive."""
        call = lower_op(op, self.kernel(op), encoding.pool.physical)
        self.encode_graph([call], encoding)

    def encode_graph(
        self, graph: Graph | list[LoweredCall], encoding: Encoding
    ) -> None:
        """Encode all Ops of a graph, or the calls that ``lower`` returned for it."""
        calls = self.lower(graph) if isinstance(graph, Graph) else graph
        if self.observer is not None:
            self.observer(calls, encoding)
            return
        run_call = self._time_call if self.profile_per_op else LoweredCall.run
        for call in calls:
            run_call(call, encoding.values, encoding.weights, encoding.host)

    def _time_call(
        self,
        call: LoweredCall,
        values: list[Any],
        weights: Mapping[str, Weight],
        host: Mapping[type[Op], Kernel],
    ) -> None:
        start = time.perf_counter_ns()
        mx.eval(arrays(call.run(values, weights, host)))
        self.stats.add(call.label, time.perf_counter_ns() - start)

    def submit_and_wait(self, encoding: Encoding, label: str) -> None:
        """Evaluate all values still alive and count the wait under ``label``."""
        self.wait(label, *arrays(encoding.values))
        encoding.pool.values[: len(encoding.values)] = map(whole, encoding.values)

    def wait(self, label: str, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` and count the wait under ``label``."""
        start = time.perf_counter_ns()
        mx.eval(outputs)
        self.stats.add(label, time.perf_counter_ns() - start)

    def execute(
        self,
        graph: Graph,
        label: str,
        weights: Mapping[str, Weight] | None = None,
    ) -> None:
        """Encode a graph over its pool, evaluate it, and store results in the pool."""
        encoding = self.begin_encoding(graph.pool, weights)
        written: set[int] = set()
        for op in graph:
            for buf in op.reads:
                if buf.index not in written:
                    encoding.bind(buf, graph.pool.handle(buf))
            written.update(buf.index for buf in op.writes)
        self.encode_graph(graph, encoding)
        self.submit_and_wait(encoding, label)

    def begin_layer(  # noqa: B027
        self, chunk: int, layer: int, *inputs: mx.array
    ) -> None:
        """Note that layer ``layer`` of prompt chunk ``chunk`` begins with ``inputs``.

        Executors that capture GPU work start and stop here.
        """

    @property
    def watches_calls(self) -> bool:
        """Return whether every call is observed, so that none may be compiled."""
        return self.profile_per_op or self.observer is not None

    @property
    def watches_layers(self) -> bool:
        """Return whether ``begin_layer`` must be called while work is really done."""
        return self.profile_per_op

    def clock(self) -> Callable[[mx.array], mx.array] | None:
        """Return a function that reads the device's clock, or None.

        Given an array it returns uint64 values. The first is the device's time in
        nanoseconds once the array was computed.
        """
        return None

    def drain(self) -> None:
        """Wait until the device has finished all work."""
        mx.synchronize()


def arrays(values: Any) -> list[mx.array]:
    """Return the MLX arrays among ``values``, with the row of several parts once."""
    held = (value.row if isinstance(value, RowPart) else value for value in values)
    found = {id(value): value for value in held if isinstance(value, mx.array)}
    return [*found.values()]
