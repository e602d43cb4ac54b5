"""Keep streamed models from being saved, or divided, as if they were whole.

Experts that are read from files are not among a model's parameters, and mlx-lm saves
what ``parameters()`` returns: ``mlx_lm.convert``, ``mlx_lm.fuse`` and scripts would
write a model without experts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

import mlx.nn as nn
from mlx_lm import utils

from .errors import ModelError

_SAVE_MODEL = utils.save_model


def reads_experts(model: Any) -> bool:
    """Tell whether a model's experts are read from files, and no parameters."""
    store = getattr(vars(model).get("runtime"), "store", None)
    return store is not None or vars(model).get("streamer") is not None


def refuse_saving(model: Any) -> None:
    """Raise ModelError if a model's experts are not among its parameters."""
    if reads_experts(model):
        raise ModelError(
            "[save] expected a model with its experts among its parameters but got one "
            "that reads them from files, nothing is written: convert or fuse the plain "
            "checkpoint, and pack what comes of it"
        )


def refuse_experts(weights: Iterable[str], block: str) -> None:
    """Raise ModelError if any of weights by name is of experts read from files.

    None of a streamed model's parameters takes it.

    Args:
        block: the attribute that has a layer's experts.
    """
    for name in weights:
        if f".{block}." in name:
            raise ModelError(
                f"[weights] {name}: expected no experts' weights for a model that "
                "reads experts from files: change the checkpoint and pack it again"
            )


class GuardsSaving(nn.Module):
    """What a model's class begins with if its experts may be read from files."""

    def parameters(self) -> Any:
        """Return all arrays; streamed experts are none, so these are not to be saved.

        Raises:
            ModelError: mlx-lm is about to save a model without its experts.
        """
        refuse_saving_now(self)
        return super().parameters()

    def save_weights(self, file: str) -> None:
        """Save all parameters to one file.

        Raises:
            ModelError: streamed experts are none of them; nothing is written.
        """
        refuse_saving(self)
        super().save_weights(file)


def keep_whole(model: nn.Module) -> None:
    """Have every part of a streamed model refuse to be divided over processes."""
    for _, module in model.named_modules():
        for name in ("shard", "pipeline"):
            if hasattr(type(module), name):
                module.__dict__[name] = _refuse_division


def _refuse_division(*_arguments: Any, **_options: Any) -> None:
    raise ModelError(
        "[stream] expected a model with its experts among its parameters but got one "
        "that reads them from files, which one process runs: load it without a bound "
        "on memory to divide it"
    )


def refuse_saving_now(model: Any) -> None:
    """Do the same if mlx-lm's ``save_model`` asks: a script may have kept its own."""
    frame = sys._getframe(2)
    if frame.f_code is _SAVE_MODEL.__code__:
        refuse_saving(model)


@functools.wraps(_SAVE_MODEL)
def _save_model(save_path: Any, model: Any, **options: Any) -> None:
    # mlx-lm makes the directory before it looks at the model.
    refuse_saving(model)
    _SAVE_MODEL(save_path, model, **options)


def guard_saving() -> None:
    """Have mlx-lm's ``save_model`` refuse models without their experts."""
    utils.save_model = _save_model
