"""Run a model and record the experts that its routers choose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from ..engine.executors.base import Encoding
from ..engine.graph.lower import LoweredCall, lower
from ..engine.layer import GraphLayer
from ..engine.ops.moe import RoutedExperts
from ..engine.runtime import Runtime
from ..errors import ConfigError
from ..experts.pool.routing_trace import RoutingTrace
from .block_routing import record_blocks
from .recording import layer_of, observing, runtime_of


def record_routing(
    model: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampler: Callable[[mx.array], mx.array] | None = None,
    eos_tokens: Collection[int] = (),
    **options: Any,
) -> RoutingTrace:
    """Generate as mlx-lm does, and return the experts that every router chose.

    For single tokens the trace also has the experts that reading ahead would predict.

    Args:
        model: the model, of our class or mlx-lm's.
        prompt: token ids.
        max_tokens: number of tokens to generate.
        sampler: takes log-probabilities ``[1, V]``; None: the most likely token.
        eos_tokens: ids that end the text early.
        options: passed on to mlx-lm's ``generate_step``.

    Raises:
        ConfigError: the prompt is empty, or ``max_tokens`` is less than 1.
        ModelError: the model has no routed blocks, or a trace cannot represent its
            routing.
    """
    if not prompt or max_tokens < 1:
        raise ConfigError(
            "[trace] expected a prompt of at least 1 token and at least 1 token to "
            f"generate but got {len(prompt)} and {max_tokens}"
        )
    if not hasattr(model, "runtime"):
        return record_blocks(
            model,
            prompt,
            sampler=sampler,
            eos_tokens=eos_tokens,
            max_tokens=max_tokens,
            **options,
        )
    runtime = runtime_of(model)
    layers = [layer for layer in model.graph_layers if layer.is_routed]
    recorder = RoutingRecorder(runtime, layers)
    recorded: Any = RecordedModel(model, recorder)
    with observing(runtime.executor, recorder):
        options = {**options, "max_tokens": max_tokens, "sampler": sampler}
        for token, _ in generate_step(mx.array([*prompt]), recorded, **options):
            if token in eos_tokens:
                break
    return RoutingTrace(
        model_type=model.model_type,
        layers=tuple(layer.index for layer in layers),
        n_experts=recorded.routed[0].n_experts,
        record_bytes=tuple(op.expert_bytes for op in recorded.routed),
        n_prompt_tokens=len(prompt),
        passes=np.array([len(chosen) for chosen in recorded.passes], np.uint32),
        chosen=np.concatenate(recorded.passes),
        likely=np.stack(recorded.likely) if recorded.likely else None,
    )


class RoutingRecorder:
    """Observer of an executor that records the experts of every routed Op.

    ``layers`` are those with routed experts. Ops are performed one by one, because a
    fusion may never write the router's choice to a buffer.
    """

    def __init__(self, runtime: Runtime, layers: Sequence[GraphLayer]):
        self._runtime, self._layers = runtime, layers
        self._steps: dict[int, list[LoweredCall]] = {}
        # One entry for each layer, in running order.
        self._routed: list[RoutedExperts] = []
        self._chosen: list[Any] = []
        self._likely: list[Any] = []

    def __call__(self, steps: Sequence[LoweredCall], encoding: Encoding) -> None:
        layer = layer_of(self._runtime, steps)
        if id(layer) not in self._steps:
            lowered = lower(layer.graph, self._runtime.executor.kernel)
            self._steps[id(layer)] = lowered
        lowered, before = self._steps[id(layer)], len(self._chosen)
        if before and any(isinstance(step.ops[0], RoutedExperts) for step in lowered):
            hidden = encoding.value(layer.inputs["hidden"])
            if len(hidden) == 1:
                self._likely.append(self._layers[before].expected(hidden))
        for step in lowered:
            if isinstance(op := step.ops[0], RoutedExperts):
                self._routed.append(op)
                self._chosen.append(encoding.value(op.indices))
            step.run(encoding.values, encoding.weights, encoding.host)

    def take(self) -> tuple[list[RoutedExperts], np.ndarray, np.ndarray | None]:
        """Return one pass: the layers' Ops, their chosen and their predicted experts.

        Chosen experts are ``[N, L, K]``. Predicted ones are ``[L - 1, K]`` for a pass
        of one token, else None.
        """
        routed, chosen, likely = self._routed, self._chosen, self._likely
        self._routed, self._chosen, self._likely = [], [], []
        expected = np.concatenate([np.array(x) for x in likely]) if likely else None
        return routed, np.stack([np.array(x) for x in chosen], axis=1), expected


class RecordedModel:
    """A wrapper of a model that keeps the routing of every call."""

    def __init__(self, model: Any, recorder: RoutingRecorder):
        self.passes: list[np.ndarray] = []
        self.likely: list[np.ndarray] = []
        self.routed: list[RoutedExperts] = []
        self._model, self._recorder = model, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        logits = self._model(*args, **options)
        self.routed, chosen, likely = self._recorder.take()
        self.passes.append(chosen)
        if likely is not None:
            self.likely.append(likely)
        return logits
