"""Training with experts that are read from files: no step of it may be compiled.

``mx.compile`` has a step run once on arrays without values, which tell nobody what
experts to read. mlx-lm's trainer compiles its steps.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .calls.transforms import compiles
from .saving.guard import reads_experts
from .system.progress import notice

_LOCK = threading.Lock()
# The models that are why MLX does not compile: their ids.
_TRAINING: set[int] = set()


class TrainsUncompiled(nn.Module):
    """The base of a model's class if its experts may be read from files."""

    def train(self, mode: bool = True) -> Any:
        """Set whether the model is trained; where experts are read, uncompiled.

        Meanwhile MLX compiles nothing in this process, so that a step of mlx-lm's
        trainer has values to choose experts by.
        """
        if reads_experts(self):
            _begin(self) if mode else _end(id(self))
        return super().train(mode)


def _begin(model: nn.Module) -> None:
    with _LOCK:
        if id(model) in _TRAINING or not (_TRAINING or compiles()):
            return
        if "trains" not in vars(model):
            vars(model)["trains"] = True
            weakref.finalize(model, _end, id(model))
            notice("training with experts read from files: MLX compiles no function")
        mx.disable_compile()
        _TRAINING.add(id(model))


def _end(model_id: int) -> None:
    with _LOCK:
        if model_id in _TRAINING:
            _TRAINING.remove(model_id)
            if not _TRAINING:
                mx.enable_compile()
