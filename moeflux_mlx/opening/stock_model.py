"""Load a model with mlx-lm's own class, and stream its experts if requested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import config
from ..engine.runtime import RunOptions
from ..errors import ConfigError, ModelError
from ..experts.compute.slot_block import divide_large_stacks
from ..experts.files.checkpoint import read_config
from ..experts.files.manifest import MANIFEST_NAME, Manifest
from ..experts.files.packed import is_packed
from ..experts.files.stock import NONE_OF_OUR_OWN, StockModel, load_lazily, why_stock
from ..experts.pool.budget import Amounts
from ..experts.pool.pool import pool_bytes
from ..experts.weights import kept_arrays
from ..memory.preflight import check_fits
from ..streaming import StreamedModel, stream
from ..system.progress import byte_progress, notice
from .pack_door import load_pack_lazily, pack_classes_with


def takes_door(
    path: Path,
    native: bool | None,
    model_config: dict[str, Any] | None = None,
    *,
    told: bool = True,
    why: str | None = None,
) -> bool:
    """Tell whether to load mlx-lm's class, and print a message if so.

    Args:
        native: request our class (True) or mlx-lm's (False); None prefers ours.
        model_config: entries that replace those of ``config.json``.
        told: False prints nothing.
        why: why mlx-lm's class is needed, whatever ``native`` says; None: it is not.

    Raises:
        ModelError: our class is requested but does not support the configuration.
    """
    config = {**read_config(path), **(model_config or {})}
    model_type, needed = config.get("model_type"), why
    why = why_stock(config) or needed
    if native is False:
        why = "as asked"
    elif needed is not None:
        native = None
    elif native and why not in (None, NONE_OF_OUR_OWN):
        raise ModelError(
            f"[native] {path}: expected a {model_type} that our own class runs but "
            f"{why}: omit native"
        )
    if why is None or native:
        return False
    if told:
        notice(f"model class: mlx-lm's {model_type}, {why}")
    return True


def load_through_door(
    path: Path,
    options: RunOptions,
    *,
    lazy: bool,
    model_config: dict[str, Any] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load mlx-lm's model.

    The experts of a pack are always streamed. Those of a plain checkpoint are streamed
    if memory is bounded, and are parameters otherwise.

    Returns:
        The model and its configuration.

    Raises:
        ModelError: mlx-lm cannot load it, or its experts cannot be streamed.
        ConfigError, BudgetError, ExpertStoreError: see ``stream``.
    """
    amounts = options.amounts
    _refuse_options(options)
    stock = load_stock_lazily(path, model_config)
    model = stock.model
    streams = is_packed(path) or amounts != Amounts() or options.group is not None
    if not streams:
        divide_large_stacks(model)
        if not lazy:
            check_fits(path, model)
    with byte_progress() as report:
        if streams:
            stream(
                model,
                path,
                memory="auto" if amounts.fastest else amounts.process,
                expert_memory=amounts.experts,
                scope=options.scope,
                policy=options.policy,
                read_ahead=options.read_ahead,
                optimistic=options.optimistic,
                expert_io=options.expert_io,
                report=report,
                group=options.group,
                pipeline=options.pipeline,
            )
        if not lazy:
            mx.eval(model.parameters(), kept_arrays(model))
    return model, stock.config


def door_classes(
    directory: Path,
    config: dict[str, Any],
    *,
    reads: bool = True,
    group: mx.distributed.Group | None = None,
) -> tuple[type[nn.Module], type]:
    """Return mlx-lm's classes for a pack; the model streams once it is loaded.

    The bound on memory comes from the environment.

    Args:
        reads: the model will be called; otherwise it gets memory for one expert.
        group: see ``load``.
    """
    bound, arguments = pack_classes_with(directory)(config)

    class Model(bound):  # type: ignore[misc, valid-type]
        def load_weights(self, *args: Any, **kwargs: Any) -> nn.Module:
            super().load_weights(*args, **kwargs)
            if isinstance(self, StreamedModel):
                # This is a later call, with other weights.
                return self
            memory = None if reads else least_bytes(directory)
            stream(self, directory, expert_memory=memory, group=group)
            return self

    Model.__module__, Model.__qualname__ = bound.__module__, bound.__qualname__
    return Model, arguments


def least_bytes(directory: Path) -> int:
    """Return the minimum memory for a pack's model, which holds one expert."""
    manifest = Manifest.read(directory / MANIFEST_NAME)
    return pool_bytes([entry.layout for entry in manifest.layers], 1)


def load_stock_lazily(
    path: Path, model_config: dict[str, Any] | None = None
) -> StockModel:
    """Build mlx-lm's model of a plain or packed directory without reading weights.

    Raises:
        ModelError, ExpertStoreError: mlx-lm cannot load it.
    """
    load = load_pack_lazily if is_packed(path) else load_lazily
    return load(path, model_config)


def _refuse_options(options: RunOptions) -> None:
    config.optimistic(options.optimistic)
    if options.executor is not None:
        raise ConfigError(
            f"[executor] expected none for mlx-lm's class but got "
            f"{options.executor!r}: leave it out"
        )
