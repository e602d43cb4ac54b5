"""Load a model with mlx-lm's own class, and stream its experts if told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from . import config
from .errors import ConfigError, ModelError, one_line_errors
from .experts.budget import Amounts
from .experts.checkpoint import read_config
from .experts.packed import is_packed
from .files import short, spelled_plainly
from .opening import model_module
from .progress import byte_progress, notice
from .runtime import RunOptions
from .streaming import stream


def has_own_class(model_type: object) -> bool:
    """Tell whether moeflux-mlx has a class of its own for a type of model."""
    try:
        model_module(model_type)
    except ModelError:
        return False
    return True


def takes_door(path: Path, native: bool | None) -> bool:
    """Tell whether mlx-lm's class is to be loaded, and print a line if it is.

    Args:
        native: whether our own class is asked for; None: where there is one.
    """
    model_type = read_config(path).get("model_type")
    if native or (native is None and has_own_class(model_type)):
        return False
    why = "as asked" if native is False else "there is none of our own"
    notice(f"model class: mlx-lm's {model_type}, {why}")
    return True


def load_through_door(
    path: Path,
    options: RunOptions,
    *,
    lazy: bool,
    model_config: dict[str, Any] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load mlx-lm's model; without a bound on memory its experts are parameters.

    Returns:
        The model and its configuration.

    Raises:
        ModelError: mlx-lm cannot load it, or its experts cannot be streamed.
        ConfigError, BudgetError, ExpertStoreError: as ``stream``.
    """
    amounts = Amounts.read(options.memory, options.expert_memory)
    _refuse_options(path, options)
    model, loaded = _load_lazily(path, model_config)
    with byte_progress() as report:
        if amounts != Amounts():
            stream(
                model,
                path,
                memory=amounts.process,
                expert_memory=amounts.experts,
                scope=options.scope,
                policy=options.policy,
                read_ahead=options.read_ahead,
                optimistic=options.optimistic,
                expert_io=options.expert_io,
                report=report,
            )
        if not lazy:
            mx.eval(model.parameters())
    return model, loaded


def _refuse_options(path: Path, options: RunOptions) -> None:
    if is_packed(path):
        raise ConfigError(
            f"[load] expected a plain checkpoint for mlx-lm's class but got {path}, a "
            "packed one: give the directory that it was packed from"
        )
    config.optimistic(options.optimistic)
    if (value := options.executor) is not None:
        raise ConfigError(
            f"[executor] expected none for mlx-lm's class but got {value!r}: leave "
            "it out"
        )


def _load_lazily(
    path: Path, model_config: dict[str, Any] | None
) -> tuple[nn.Module, dict[str, Any]]:
    model_type = read_config(path).get("model_type")
    changes = {**(model_config or {}), "model_file": None}
    where = f"[load] {path}: mlx-lm's model type {short(model_type)}"
    with one_line_errors(where), spelled_plainly(path) as plain:
        found: tuple[nn.Module, dict[str, Any]] = load_model(
            plain, lazy=True, model_config=changes
        )
    return found
