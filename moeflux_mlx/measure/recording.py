"""Run a model once and keep the inputs of each call of its graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..engine.executors.base import Encoding, Executor, Observer, arrays
from ..engine.executors.kernels import KernelExecutor
from ..engine.graph.lower import LoweredCall, buffers_read
from ..engine.model import LayerGraph
from ..engine.runtime import Runtime
from ..errors import ConfigError, ModelError
from .timing import Work
from .traffic import moved_bytes

# Tokens to run before recording, so that caches have room and states exist.
WARM_UP = 2


def runtime_of(model: Any) -> Runtime:
    """Return the runtime of a model's graphs.

    Raises:
        ModelError: the model is not one of ours.
    """
    runtime = getattr(model, "runtime", None)
    if not isinstance(runtime, Runtime):
        got = type(model).__name__
        raise ModelError(f"[model] expected a model of moeflux_mlx but got {got}")
    return runtime


def resident_runtime_of(model: Any) -> Runtime:
    """Return the runtime of a model that has all experts in memory.

    Raises:
        ModelError: the model is not one of ours, or its experts are not all in memory.
    """
    runtime = runtime_of(model)
    if runtime.streams:
        raise ModelError(
            "[experts] expected all experts in memory, because reads would distort "
            "the times, but got fewer: give more memory (see moeflux inspect) or the "
            "plain checkpoint"
        )
    return runtime


@dataclass
class Record:
    """One call of a lowered graph: its graph, inputs and kernels.

    ``work`` repeats it. ``launched`` names our kernels in order; it is empty if MLX's
    own operations or a cache object perform the call.
    """

    step: LoweredCall
    graph: str
    work: Work
    launched: tuple[str, ...]
    n_bytes: int


class Recorder:
    """Observer of an executor that performs every call and keeps a ``Record`` of it.

    Args:
        runtime: the runtime of the model to call.
        caches: the caches to call it with.
        share: keep only the first layer's activations and use them for all layers that
            share its graph; a long prompt's are too large to keep them all.
    """

    def __init__(self, runtime: Runtime, caches: Sequence[Any], *, share: bool):
        self.records: list[Record] = []
        self._runtime, self._share = runtime, share
        self._before = restorer(caches)
        self._first: dict[int, list[Any]] = {}
        self._launched: list[str] = []

    def __call__(self, steps: Sequence[LoweredCall], encoding: Encoding) -> None:
        layer = layer_of(self._runtime, steps)
        for step in steps:
            self.records.append(self._record(step, layer, encoding))

    def _record(
        self, step: LoweredCall, layer: LayerGraph, encoding: Encoding
    ) -> Record:
        values, weights, host = encoding.values, encoding.weights, encoding.host
        inputs = step.inputs(values, weights)
        mx.eval(arrays(inputs))
        self._launched.clear()
        outputs = step.run(values, weights, host)
        mx.eval(arrays(outputs))
        n_bytes = moved_bytes(step, inputs, outputs)
        if self._share:
            inputs = shared(self._first.setdefault(id(step), inputs), inputs)
        on_host = step.is_performed_by(host)
        kernel = host[type(step.ops[0])] if on_host else step.kernel
        work = Work(
            kernel,
            inputs,
            carried=() if on_host else states(step, layer),
            before=self._before if on_host else None,
            waits=any(op.reads_back for op in step.ops),
        )
        return Record(step, layer.graph.name, work, tuple(self._launched), n_bytes)

    @contextlib.contextmanager
    def attached(self) -> Iterator[Recorder]:
        """Record all calls that the executor encodes inside the ``with`` block."""
        executor = self._runtime.executor
        with observing(executor, self), hearing(executor, self._launched.append):
            yield self


@contextlib.contextmanager
def observing(executor: Executor, observer: Observer) -> Iterator[None]:
    """Let ``observer`` encode all calls inside the ``with`` block."""
    executor.observer = observer
    try:
        yield
    finally:
        executor.observer = None


@contextlib.contextmanager
def hearing(executor: Executor, hear: Callable[[str], object]) -> Iterator[None]:
    """Pass the name of every launched kernel of ours to ``hear`` inside the block."""
    if not isinstance(executor, KernelExecutor):
        yield
        return
    executor.on_launch = hear
    try:
        yield
    finally:
        executor.on_launch = None


def layer_of(runtime: Runtime, steps: Sequence[LoweredCall]) -> LayerGraph:
    """Return the graph from which ``steps`` were lowered."""
    return next(g for g in runtime.graphs.values() if g.calls is steps)


def shared(first: Sequence[Any], own: Sequence[Any]) -> list[Any]:
    """Return ``own`` with the arrays of ``first``; keep its weights and experts."""
    return [
        mine if mine is None or not hasattr(mine, "dtype") else theirs
        for theirs, mine in zip(first, own, strict=True)
    ]


def states(step: LoweredCall, layer: LayerGraph) -> tuple[tuple[int, int], ...]:
    """Pair a call's outputs with the inputs that they update: the model's states."""
    places = layer.graph.pool.physical
    found = {
        buf
        for op in step.ops
        for buf in op.writes
        if buf in layer.inputs.values() and buf in buffers_read(step.ops)
    }
    return tuple(
        (step.writes.index(places[buf.index]), step.reads.index(places[buf.index]))
        for buf in sorted(found, key=lambda buf: buf.index)
        if places[buf.index] in step.writes
    )


def restorer(caches: Sequence[Any]) -> Callable[[], None]:
    """Return a function that resets KV caches to their present length."""
    kept = [(cache, cache.offset) for cache in caches if isinstance(cache, KVCache)]

    def restore() -> None:
        for cache, offset in kept:
            cache.offset = offset

    return restore


def filled_caches(model: Any, n_tokens: int) -> list[Any]:
    """Return caches of ``n_tokens`` tokens: one real, random rows, then two real ones.

    Raises:
        ConfigError: ``n_tokens`` is less than 1.
    """
    if n_tokens < 1:
        raise ConfigError(f"[--context] expected at least 1 token but got {n_tokens}")
    caches = make_prompt_cache(model)
    step(model, caches, mx.array([[1]]))
    missing = n_tokens - 1 - WARM_UP
    for cache in caches:
        if isinstance(cache, KVCache) and missing > 0:
            # In a compressed cache keys and values have different widths.
            rows = (_noise_like(kept, missing) for kept in (cache.keys, cache.values))
            cache.update_and_fetch(*rows)
    mx.eval([cache.state for cache in caches])
    for i in range(min(WARM_UP, n_tokens - 1)):
        mx.eval(step(model, caches, mx.array([[2 + i]])))
    return caches


def _noise_like(kept: mx.array, n_rows: int) -> mx.array:
    """Return ``n_rows`` random rows of the form of a cache's array."""
    shape = (*kept.shape[:2], n_rows, *kept.shape[3:])
    return mx.random.normal(shape, key=mx.random.key(0)).astype(kept.dtype)


def step(model: Any, caches: list[Any], token: mx.array) -> mx.array:
    """Return the greedy next token ``[1, 1]``, computed as mlx-lm does."""
    return next_token(model(token, cache=caches))[None]


def next_token(logits: mx.array) -> mx.array:
    """Return the most likely next token ``[B]`` of logits ``[B, T, V]``."""
    return mx.argmax(logits[:, -1], axis=-1)


def prompt(n_tokens: int, vocab_size: int) -> mx.array:
    """Return random tokens ``[1, n_tokens]``."""
    shape = (1, n_tokens)
    return mx.random.randint(0, vocab_size, shape, key=mx.random.key(n_tokens))
