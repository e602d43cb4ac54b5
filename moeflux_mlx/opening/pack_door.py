"""Build mlx-lm's model for a pack, whose weight files contain no experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes

from ..experts.files.manifest import MANIFEST_NAME, LayerFile, Manifest
from ..experts.files.modules import find_blocks
from ..experts.files.packed_blocks import entries_of
from ..experts.files.stock import Classes, StockModel, load_lazily, sanitized
from ..experts.weights import MLX_DTYPES

# Returns one block's arrays of all experts, ``[E, ...]``, by projection and part.
Arrays = Callable[[LayerFile], Iterator[tuple[str, mx.array]]]


def load_pack_lazily(
    path: Path, model_config: dict[str, Any] | None = None
) -> StockModel:
    """Build mlx-lm's model for a pack; its experts are zeros until it is streamed.

    Raises:
        ModelError: mlx-lm cannot load it.
        ExpertStoreError: the pack does not match the model's routed blocks.
    """
    return load_lazily(path, model_config, pack_classes_with(path))


def pack_classes_with(path: Path, arrays: Arrays | None = None) -> Classes:
    """Return a function that finds mlx-lm's classes and adds a pack's experts.

    Args:
        arrays: the experts' arrays; by default zeros, which must not be evaluated.
    """
    manifest = Manifest.read(path / MANIFEST_NAME)
    return classes_with(manifest, arrays or placeholders)


def placeholders(entry: LayerFile) -> Iterator[tuple[str, mx.array]]:
    """Yield lazy zeros of the experts' shapes and types, which are never evaluated."""
    for spec in entry.layout.tensors:
        shape = (len(entry.checksums), *spec.shape)
        yield f"{spec.projection}.{spec.part}", mx.zeros(shape, MLX_DTYPES[spec.dtype])


def classes_with(manifest: Manifest, arrays: Arrays) -> Classes:
    """Do the same as ``pack_classes_with`` for an open manifest."""

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, arguments = _get_classes(config)

        class Model(model_class):  # type: ignore[misc, valid-type]
            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                experts = _experts(self, manifest, arrays)
                if manifest.is_of_blocks:
                    # Blocks have the layout of a checkpoint from mlx-lm's converter.
                    return sanitized(model_class, self, {**weights, **experts})
                return {**sanitized(model_class, self, weights), **experts}

        Model.__qualname__ = model_class.__qualname__
        Model.__module__ = model_class.__module__
        return Model, arguments

    return classes


def _experts(
    model: nn.Module, manifest: Manifest, arrays: Arrays
) -> dict[str, mx.array]:
    paths = [block.path for block in find_blocks(model)]
    entries = entries_of(manifest, paths)
    return {
        f"{path}.{name}": array
        for path, entry in zip(paths, entries, strict=True)
        for name, array in arrays(entry)
    }
