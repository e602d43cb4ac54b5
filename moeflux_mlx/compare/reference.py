"""Stock mlx-lm's side: its own classes, a pack's experts stacked again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import _get_classes, load_model

from ..errors import ModelError, MoefluxError
from ..experts.packed import PackedExperts, is_packed
from ..experts.pool import MLX_DTYPES
from ..files import spelled_plainly
from ..preflight import check_fits

ROUTED = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.\w+\.switch_mlp")


def load_stock(path: str | Path) -> nn.Module:
    """Load mlx-lm's own class, everything in memory, also from a packed directory.

    Raises:
        ModelError: mlx-lm cannot load it.
        ExpertStoreError: the pack is damaged.
    """
    path = Path(path)
    try:
        if not is_packed(path):
            with spelled_plainly(path) as plain:
                model = load_model(plain, lazy=True)[0]
            check_fits(path, model)
            mx.eval(model.parameters())
            return model
        with PackedExperts.open(path) as store, spelled_plainly(path) as plain:
            return load_model(
                plain,
                # The class named by model_file is ours.
                model_config={"model_file": None},
                get_model_classes=lambda config: _stock_classes(config, store),
            )[0]
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, MoefluxError):
            raise
        raise ModelError(f"[compare] mlx-lm cannot load {path}: {error}") from error


def stacked_experts(store: PackedExperts, layer: int) -> Iterator[tuple[str, mx.array]]:
    """Yield one layer's tensors as mlx-lm stores them, ``[E, ...]``, by name."""
    layout = store.layout(layer)
    shape = (store.n_experts, layout.stride)
    records = np.memmap(store.path(layer), np.uint8, "r", shape=shape)
    for spec in layout.tensors:
        own = np.ascontiguousarray(records[:, spec.offset : spec.offset + spec.n_bytes])
        stacked = mx.array(own).view(MLX_DTYPES[spec.dtype])
        name = f"{spec.projection}.{spec.part}"
        yield name, stacked.reshape(store.n_experts, *spec.shape)


def _stock_classes(config: dict[str, Any], store: PackedExperts) -> tuple[type, type]:
    model_class, args_class = _get_classes(config)

    def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = model_class.sanitize(self, weights)
        return {**weights, **dict(_routed_weights(self, store))}

    return type("Model", (model_class,), {"sanitize": sanitize}), args_class


def _routed_weights(
    model: nn.Module, store: PackedExperts
) -> Iterator[tuple[str, mx.array]]:
    for path, _ in model.named_modules():
        if found := ROUTED.fullmatch(path):
            for name, array in stacked_experts(store, int(found["layer"])):
                yield f"{path}.{name}", array
