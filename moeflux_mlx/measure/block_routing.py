"""Record the experts that mlx-lm's routed blocks use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from ..errors import ModelError
from ..experts.compute.slot_block import FIELDS
from ..experts.compute.switch import StreamedSwitch
from ..experts.files.modules import by_number, find_blocks
from ..experts.pool.routing_trace import RoutingTrace


@dataclass(frozen=True)
class _Block:
    """A routed block, resident or streamed, and the size of its experts."""

    path: str
    module: nn.Module
    n_experts: int
    expert_bytes: int


def record_blocks(
    model: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampler: Callable[[mx.array], mx.array] | None,
    eos_tokens: Collection[int],
    **options: Any,
) -> RoutingTrace:
    """Do as ``record_routing`` for a model of mlx-lm's class; each block is a layer."""
    blocks = _blocks(model)
    if not blocks:
        kind = type(model)
        raise ModelError(
            f"[trace] expected routed experts in {kind.__module__}.{kind.__name__} but "
            "found none: trace a Mixture-of-Experts model"
        )
    recorded: Any = _RecordedModel(model, blocks)
    options = {**options, "max_tokens": max_tokens, "sampler": sampler}
    with recorded.recording():
        for token, _ in generate_step(mx.array([*prompt]), recorded, **options):
            if token in eos_tokens:
                break
    passes = recorded.passes
    return RoutingTrace(
        model_type=str(getattr(model, "model_type", type(model).__module__)),
        layers=tuple(range(len(blocks))),
        n_experts=max(block.n_experts for block in blocks),
        record_bytes=tuple(block.expert_bytes for block in blocks),
        n_prompt_tokens=len(prompt),
        passes=np.array([len(chosen) for chosen in passes], np.uint32),
        chosen=np.concatenate(passes),
    )


def _blocks(model: Any) -> list[_Block]:
    """Return a model's blocks in the streamer's order."""
    streamer = getattr(model, "streamer", None)
    if streamer is None:
        return [
            _Block(b.path, b.module, *_sizes([*b.parts.values()]))
            for b in find_blocks(model)
        ]
    modules = {
        module.path: module
        for _, module in model.named_modules()
        if isinstance(module, StreamedSwitch)
    }
    counts: dict[int, int] = {}
    for layer, _ in streamer.experts:
        counts[layer] = counts.get(layer, 0) + 1
    found = []
    for number, path in enumerate(sorted(modules, key=by_number)):
        weights = streamer.source(number).weights.by_name.values()
        arrays = [getattr(w, field) for w in weights for field in FIELDS.values()]
        n_bytes = _sizes([x for x in arrays if x is not None])[1]
        found.append(_Block(path, modules[path], counts[number], n_bytes))
    return found


def _sizes(arrays: list[mx.array]) -> tuple[int, int]:
    """Return the number of experts in ``arrays``, and the bytes of one."""
    return len(arrays[0]), sum(array.nbytes // len(array) for array in arrays)


class _RecordedModel:
    """A wrapper of a model that keeps the routing of every call."""

    def __init__(self, model: Any, blocks: list[_Block]):
        self.passes: list[np.ndarray] = []
        self._model, self._blocks = model, blocks
        self._chosen: dict[str, list[np.ndarray]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._chosen = {block.path: [] for block in self._blocks}
        logits = self._model(*args, **options)
        self.passes.append(self._take())
        return logits

    def _take(self) -> np.ndarray:
        """Return the chosen experts of one pass: ``[N, L, K]``."""
        for path, chosen in self._chosen.items():
            shapes = [ids.shape for calls in self._chosen.values() for ids in calls]
            if len(chosen) != 1 or len(set(shapes)) != 1:
                raise ModelError(
                    f"[trace] {path}: expected one call of every routed block, all "
                    "with ids of one shape, but got calls with "
                    f"{[ids.shape for ids in chosen]} here and {sorted(set(shapes))} "
                    "in all: a trace cannot represent this model's routing"
                )
        return np.stack([chosen[0] for chosen in self._chosen.values()], axis=1)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the expert ids of all blocks inside the ``with`` block."""
        kinds = {block.path: type(block.module) for block in self._blocks}
        try:
            for block in self._blocks:
                block.module.__class__ = self._recording_class(block)
            yield
        finally:
            for block in self._blocks:
                block.module.__class__ = kinds[block.path]

    def _recording_class(self, block: _Block) -> type:
        kind = type(block.module)

        def call(module: Any, x: mx.array, indices: mx.array) -> Any:
            ids = np.array(indices).reshape(-1, indices.shape[-1])
            self._chosen[block.path].append(ids)
            return kind.__call__(module, x, indices)

        return type(kind.__name__, (kind,), {"__call__": call})
