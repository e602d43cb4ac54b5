"""Build mlx-lm's own model of a directory, with weights that are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model

from ...errors import ModelError, one_line_errors
from ...system.files import short, spelled_plainly
from .checkpoint import read_config
from .configuration import GROUPS

NONE_OF_OUR_OWN = "there is none of our own"
Classes = Callable[[dict[str, Any]], tuple[type, type]]


@dataclass(frozen=True)
class StockModel:
    """A model of mlx-lm's class with unevaluated parameters.

    ``sources`` maps a parameter's path to the name of its tensor in the files if
    ``sanitize`` did not change it. Stacked, split and converted ones have no entry.
    """

    model: nn.Module
    config: dict[str, Any]
    sources: dict[str, str]


def has_own_class(config: Mapping[str, Any]) -> bool:
    """Return whether moeflux-mlx has its own class for a configuration."""
    return why_stock(config) is None


def why_stock(config: Mapping[str, Any]) -> str | None:
    """Return why a model runs in mlx-lm's class, or None if it runs in our own.

    A family's ``lacks`` names a feature of the configuration that our class lacks.
    """
    model_type = config.get("model_type")
    if not (isinstance(model_type, str) and model_type.isidentifier()):
        return NONE_OF_OUR_OWN
    name = f"moeflux_mlx.models.{model_type}"
    if find_spec(name) is None or not hasattr(import_module(name), "Model"):
        return NONE_OF_OUR_OWN
    lacks = getattr(import_module(name), "lacks", None)
    found = None if lacks is None else lacks(config)
    found = found or _unknown_form(config)
    return None if found is None else f"our own class does not support {found}"


def _unknown_form(config: Mapping[str, Any]) -> str | None:
    """Return the part of a quantisation that no class of ours supports, if any."""
    table = config.get("quantization")
    forms = table.values() if isinstance(table, dict) else ()
    scaled = any(isinstance(f, dict) and f.get("global_scale") for f in forms)
    return "a global_scale" if scaled else None


def departs(config: Mapping[str, Any]) -> str | None:
    """Return where our class follows transformers and mlx-lm's does not, or None.

    A family's ``departs`` names the difference; otherwise the two classes agree.
    """
    if not has_own_class(config):
        return None
    module = import_module(f"moeflux_mlx.models.{config['model_type']}")
    found = getattr(module, "departs", None)
    return None if found is None else found(config)


def load_lazily(
    path: Path,
    model_config: dict[str, Any] | None = None,
    classes: Classes = _get_classes,
) -> StockModel:
    """Build mlx-lm's model and find the tensors of its parameters; read no weights.

    Args:
        path: the model directory.
        model_config: entries that override ``config.json``.
        classes: returns the class of the model and the class of its arguments.

    Raises:
        ModelError: mlx-lm cannot load the model.
    """
    # Keep all arrays until the end, so that their ids stay unique.
    read: dict[str, mx.array] = {}

    def noting(config: dict[str, Any]) -> tuple[type, type]:
        model_class, arguments = classes(config)

        def sanitize(model: nn.Module, weights: dict[str, mx.array]) -> Any:
            read.update(weights)
            found = sanitized(model_class, model, weights)
            _check_groups(path, config, model, found)
            return found

        names = {
            "__module__": model_class.__module__,
            "__qualname__": model_class.__qualname__,
        }
        noted = type(model_class.__name__, (model_class,), names)
        noted.sanitize = sanitize  # type: ignore[attr-defined]
        return noted, arguments

    model_type = short(read_config(path).get("model_type"))
    where = f"[load] {path}: mlx-lm's model type {model_type}"
    with one_line_errors(where), spelled_plainly(path) as plain:
        model, config = load_model(
            plain,
            lazy=True,
            model_config={**(model_config or {}), "model_file": None},
            get_model_classes=noting,
        )
    # Restore mlx-lm's class, because models and callers may compare it.
    model.__class__ = type(model).__mro__[1]
    names = {id(array): name for name, array in read.items()}
    parameters = dict(tree_flatten(model.parameters()))
    sources = {p: names[id(x)] for p, x in parameters.items() if id(x) in names}
    return StockModel(model, config, sources)


def _check_groups(
    path: Path, config: dict[str, Any], model: nn.Module, weights: dict[str, mx.array]
) -> None:
    """Raise ModelError for a group size with which MLX would divide by zero.

    mlx-lm takes a module's group size from the configuration, or computes it from the
    shapes of its weight and scales.
    """
    table = config.get("quantization")
    for name, module in model.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        form = table.get(name) if isinstance(table, dict) else None
        scales = weights.get(f"{name}.scales")
        size: Any = None
        if isinstance(form, dict):
            size = form.get("group_size")
        elif scales is not None and scales.size:
            size = module.weight.shape[-1] // scales.shape[-1]
        if size is not None and size not in GROUPS:
            raise ModelError(
                f"[load] {path / 'config.json'}: expected {name} to have a group_size "
                f"of {', '.join(map(str, GROUPS))} but got {short(size)}"
            )


def sanitized(
    model_class: type, model: nn.Module, weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """Return the result of the model's ``sanitize``: weights by parameter path."""
    inherited = getattr(model_class, "sanitize", None)
    found: dict[str, mx.array]
    found = weights if inherited is None else inherited(model, weights)
    return found
