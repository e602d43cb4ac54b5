"""Stock mlx-lm's side: its own classes, with a pack's experts stacked again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model

from ...errors import ModelError, MoefluxError
from ...experts.files.manifest import LayerFile
from ...experts.files.packed import PackedExperts, is_packed
from ...experts.files.stock import load_lazily
from ...experts.weights import MLX_DTYPES
from ...memory.preflight import check_fits
from ...opening.pack_door import pack_classes_with
from ...system.files import spelled_plainly


def load_stock(path: str | Path) -> nn.Module:
    """Load mlx-lm's own class with all weights in memory, also from a pack.

    Raises:
        ModelError: mlx-lm cannot load the model.
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
        with PackedExperts.open(path) as store:

            def arrays(entry: LayerFile) -> Iterator[tuple[str, mx.array]]:
                return stacked_experts(store, entry.layer)

            model = load_lazily(path, classes=pack_classes_with(path, arrays)).model
            mx.eval(model.parameters())
            return model
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, MoefluxError):
            raise
        raise ModelError(f"[compare] mlx-lm cannot load {path}: {error}") from error


def stacked_experts(store: PackedExperts, layer: int) -> Iterator[tuple[str, mx.array]]:
    """Yield one layer's tensors by name in mlx-lm's form, ``[E, ...]``."""
    layout = store.layout(layer)
    shape = (store.count(layer), layout.stride)
    records = np.memmap(store.path(layer), np.uint8, "r", shape=shape)
    for spec in layout.tensors:
        own = np.ascontiguousarray(records[:, spec.offset : spec.offset + spec.n_bytes])
        stacked = mx.array(own).view(MLX_DTYPES[spec.dtype])
        name = f"{spec.projection}.{spec.part}"
        yield name, stacked.reshape(store.count(layer), *spec.shape)
