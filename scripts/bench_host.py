"""The host's work for a token of a published geometry, measured without a GPU.

This is a part of ``scripts/bench_decode``. Both sides build a decoding step for CUDA
and nothing computes it: every launch of our kernels, and every operation of
``mlx.core.fast``, is one operation of MLX that is never evaluated. All weights are one
zero each, seen as a matrix. So the figures show Python and the making of MLX's graph,
but not MLX's encoding, which grows with the number of operations.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import bench_geometry
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from rich.console import Console
from rich.table import Table

from moeflux_mlx import device
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.engine.executors.kernels import KernelExecutor
from moeflux_mlx.engine.launch.prepared import Prepared
from moeflux_mlx.engine.layer import GraphLayer
from moeflux_mlx.engine.metal import Instance

NAME = "stand-in"
# Tokens in a round, and rows by which mlx-lm's caches grow.
TOKENS, CACHE_ROWS = 20, 256
# Operations that only look at memory in another way: no launch on a GPU.
VIEWS = (
    *("AsStrided", "Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split"),
    *("Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
)


class StandIn(KernelExecutor):
    """Makes the launches that ``cuda`` makes, as operations without a result."""

    # Ways are preferred by this name.
    name = "cuda"
    compiles = True

    def build(self, instance: Instance) -> Instance:
        return instance

    def call(self, built: Any, ready: Prepared) -> list[mx.array]:
        outputs = zip(ready.output_shapes, ready.output_dtypes, strict=True)
        name = ready.kernel.name
        made = [nothing(tuple(shape), dtype, name) for shape, dtype in outputs]
        return mx.depends(made, ready.inputs)


# Arrays that stand for results, by the name that a list of operations shows.
STAND_INS: dict[str, mx.array] = {}


@functools.cache
def nothing(shape: tuple[int, ...], dtype: mx.Dtype, name: str = "mx.fast") -> mx.array:
    """Return an array that no operation made, so that any thread may capture it.

    Args:
        name: what it stands for.
    """
    array = mx.array(np.zeros(shape, np.float32), dtype)
    STAND_INS[f"{name} {list(shape)} {len(STAND_INS)}"] = array
    return array


@functools.cache
def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return zeros that share one value's memory."""
    zeros = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(zeros)
    return zeros


def one_operation(like: mx.array, *inputs: Any, width: int = 0) -> mx.array:
    """Return one operation in place of several that a GPU has as one."""
    shape = (*like.shape[:-1], width or like.shape[-1])
    given = [like, *(x for x in inputs if isinstance(x, mx.array))]
    return mx.depends([nothing(shape, like.dtype)], given)[0]


def fast_rope(x: mx.array, *_: Any, offset: Any, freqs: Any = None, **_2: Any) -> Any:
    """Stand for ``mx.fast.rope``."""
    return one_operation(x, offset, freqs)


def fast_rms_norm(x: mx.array, weight: mx.array | None, _eps: float) -> mx.array:
    """Stand for ``mx.fast.rms_norm``."""
    return one_operation(x, weight)


def fast_attention(q: mx.array, k: mx.array, v: mx.array, **more: Any) -> mx.array:
    """Stand for ``mx.fast.scaled_dot_product_attention``."""
    return one_operation(q, k, v, *more.values(), width=v.shape[-1])


def dequantize(w: mx.array, scales: mx.array, *rest: Any, **form: Any) -> mx.array:
    """Stand for ``mx.dequantize``."""
    biases = form.get("biases", rest[0] if rest else None)
    n_in = w.shape[-1] * 32 // form["bits"]
    return one_operation(scales, w, biases, width=n_in)


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Choose as on CUDA, and replace operations that a CPU divides into several."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (device, "on_cpu", lambda: False),
            (mx.fast, "rope", fast_rope),
            (mx.fast, "rms_norm", fast_rms_norm),
            (mx.fast, "scaled_dot_product_attention", fast_attention),
            (mx, "dequantize", dequantize),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(EXECUTORS, {NAME: StandIn}))
        yield


def primed(model: nn.Module, context: int) -> list[Any]:
    """Return blank caches with the shapes that ``context`` tokens leave."""
    caches = make_prompt_cache(model)
    model(mx.array([[1]]), cache=caches)
    for cache in caches:
        if getattr(cache, "keys", None) is None:
            cache.cache = [blank(tuple(x.shape), x.dtype) for x in cache.cache]
            continue
        cache.offset = context
        n_rows = -(-(context + CACHE_ROWS) // CACHE_ROWS) * CACHE_ROWS
        if isinstance(cache, RotatingKVCache):
            cache._idx = n_rows = min(context, cache.max_size)
        for part in ("keys", "values"):
            x = getattr(cache, part)
            shape = (*x.shape[:2], n_rows, x.shape[3])
            setattr(cache, part, blank(shape, x.dtype))
    return caches


class Steps:
    """Steps of one model that all begin with the same caches."""

    def __init__(self, model: nn.Module, context: int):
        self._model, self._caches = model, primed(model, context)
        self._states = [dict(vars(cache)) for cache in self._caches]
        # As mx.argmax returns it.
        self._token = mx.array([[1]], mx.uint32)

    def build(self) -> tuple[mx.array, float]:
        """Return the next token, not evaluated, and the thread's seconds for it."""
        for cache, state in zip(self._caches, self._states, strict=True):
            # mlx-lm writes to its arrays in place.
            vars(cache).update(tree_map(_another, state))
        start = time.thread_time()
        logits = self._model(self._token, cache=self._caches)
        token = mx.argmax(logits[:, -1], axis=-1)[None]
        return token, time.thread_time() - start

    def seconds(self) -> float:
        """Return the mean of a round."""
        return statistics.fmean(self.build()[1] for _ in range(TOKENS))

    def operations(self) -> Counter[str]:
        """Return the number of MLX's operations in a step by their names."""
        return Counter(label for _, label in self._nodes(self._graph()))

    def listed(self) -> list[str]:
        """Return MLX's operations in a step in order, launches by their kernels."""
        text = self._graph(**STAND_INS)
        stands: dict[str, str] = {}
        for source, node in re.findall(r'^"(.*) \d+" -> (\d+)$', text, re.MULTILINE):
            stands.setdefault(node, source)
        return [stands.get(node, label) for node, label in self._nodes(text)]

    def _graph(self, **names: mx.array) -> str:
        """Return a step's graph in the language of dot."""
        text = io.StringIO()
        token, _ = self.build()
        mx.export_to_dot(text, token, *self._new_states(), **names)
        return text.getvalue()

    @staticmethod
    def _nodes(text: str) -> list[tuple[str, str]]:
        """Return the number and the name of each operation."""
        return re.findall(r'(\d+) \[label ="([^"]*)", shape=rectangle', text)

    def _new_states(self) -> list[mx.array]:
        values = [value for cache in self._caches for value in vars(cache).values()]
        found: list[mx.array] = []
        tree_map(lambda x: found.append(x) if isinstance(x, mx.array) else None, values)
        return found


def _another(value: Any) -> Any:
    """Return another object with the same array."""
    return copy.copy(value) if isinstance(value, mx.array) else value


def launches_of(model: Any, steps: Steps) -> tuple[list[str], list[int]]:
    """Return the kernels that a token launches, and the number in each layer.

    The steps must be new: MLX calls the compiled function only once.
    """
    executor, launched, in_layers = model.runtime.executor, [], []
    run = GraphLayer.__call__

    def counted(layer: GraphLayer, *given: Any) -> Any:
        before = len(launched)
        result = run(layer, *given)
        in_layers.append(len(launched) - before)
        return result

    with (
        mock.patch.object(executor, "on_launch", launched.append),
        mock.patch.object(GraphLayer, "__call__", counted),
    ):
        steps.build()
    return launched, in_layers


def measure(
    geometry: str,
    config: dict[str, Any],
    context: int,
    repeats: int,
    *,
    shows: bool = False,
) -> list[dict[str, Any]]:
    """Build both sides and return a row of figures for each.

    Args:
        shows: also print the operations of our side.
    """
    with as_on_cuda():
        models = bench_geometry.built(config, NAME, blanked)
        steps = {side: Steps(model, context) for side, model in models.items()}
        launched, in_layers = launches_of(models[NAME], steps[NAME])
        counts = {side: of.operations() for side, of in steps.items()}
        if shows:
            print(geometry, *steps[NAME].listed(), sep="\n  ")
        rounds: dict[str, list[float]] = {side: [] for side in steps}
        for _ in range(repeats):
            for side, of in steps.items():
                rounds[side].append(of.seconds())
    taken = {side: 1e6 * statistics.median(times) for side, times in rounds.items()}
    rows = []
    for side, count in counts.items():
        ours = side == NAME
        n = sum(count.values())
        views = sum(number for name, number in count.items() if is_view(name))
        rows.append(
            {
                "geometry": geometry,
                "layers": config["num_hidden_layers"],
                "side": "ours" if ours else side,
                "launches": len(launched) if ours else "",
                "by_layer": " ".join(map(str, in_layers)) if ours else "",
                "operations": n,
                "without_views": n - views,
                "host_us": round(taken[side], 1),
                "host_ratio": round(taken["stock"] / taken[side], 2),
            }
        )
    return rows


def is_view(operation: str) -> bool:
    """Return whether an operation launches nothing on a GPU."""
    return operation.split()[0] in VIEWS


def blanked(model: nn.Module) -> None:
    """Give a model parameters that take no memory."""
    model.update(tree_map(lambda x: blank(tuple(x.shape), x.dtype), model.parameters()))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(title="the host's work for a token, without MLX's encoding")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
