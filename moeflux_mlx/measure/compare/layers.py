"""The outputs of each decoder layer of a model of any class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

# The outputs for this many tokens stay below 120 MB, with 61 layers of width 7168.
LAYER_TOKENS = 64


def layer_rows(model: Any, tokens: Sequence[int]) -> list[np.ndarray]:
    """Return each layer's output, float32 ``[N, D]``, for a prompt's first tokens.

    The list is empty if the layers are not all called equally often.
    """
    # In our classes the layers are graphs, apart from the modules with the weights.
    engine = getattr(model, "engine", None)
    layers = getattr(model, "layers", []) if engine is None else engine.graph_layers()
    cache = make_prompt_cache(model)
    with _recorded(layers) as found:
        mx.eval(model(mx.array([[*tokens[:LAYER_TOKENS]]]), cache=cache))
    if not found or len({len(rows) for rows in found}) != 1 or not found[0]:
        return []
    return [np.concatenate(rows) for rows in found]


@contextlib.contextmanager
def _recorded(layers: Sequence[Any]) -> Iterator[list[list[np.ndarray]]]:
    """Record each layer's outputs inside the ``with`` block."""
    kinds = [type(layer) for layer in layers]
    found: list[list[np.ndarray]] = [[] for _ in layers]
    try:
        for layer, kind, rows in zip(layers, kinds, found, strict=True):
            layer.__class__ = _recording(kind, rows)
        yield found
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


def _recording(kind: type, rows: list[np.ndarray]) -> type:
    def call(layer: Any, *args: Any, **options: Any) -> Any:
        out = kind.__call__(layer, *args, **options)  # type: ignore[operator]
        # Some of mlx-lm's layers return a tuple, with the hidden states first.
        given = out[0] if isinstance(out, tuple | list) else out
        if isinstance(given, mx.array):
            given = given.astype(mx.float32)
        # Copy now: a lazy array would read slots that may be overwritten.
        rows.append(np.array(given, np.float32).reshape(-1, given.shape[-1]))
        return out

    return type(kind.__name__, (kind,), {"__call__": call})


def layer_errors(stock: Path, ours: Path) -> list[float] | None:
    """Return the relative RMS error of each layer's output, from two files.

    The result is None if the sides have different layers, or none.
    """
    with np.load(stock) as theirs, np.load(ours) as own:
        if not theirs.files or theirs.files != own.files:
            return None
        pairs = ((theirs[name], own[name]) for name in theirs.files)
        errors = [_relative_rms(a, b) for a, b in pairs]
    return None if None in errors else [e for e in errors if e is not None]


def _relative_rms(stock: np.ndarray, ours: np.ndarray) -> float | None:
    if stock.shape != ours.shape:
        return None
    error = np.square(ours.astype(np.float64) - stock).sum()
    size = np.square(stock.astype(np.float64)).sum()
    return 0.0 if error == 0 else float(np.sqrt(error / size)) if size else np.inf
