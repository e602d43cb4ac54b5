"""Training with streamed experts, which disables compilation.

``mx.compile`` runs a step once on arrays without values, which cannot choose the
experts to read. mlx-lm's trainer compiles its steps.
"""

from __future__ import annotations

import weakref
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .calls.transforms import COMPILATION, compiles
from .saving.guard import reads_experts
from .system.progress import notice

# Ids of the models in training, for which MLX must not compile.
_TRAINING: set[int] = set()


class TrainsUncompiled(nn.Module):
    """A base class for models whose experts may be streamed."""

    def train(self, mode: bool = True) -> Any:
        """Set training mode; with streamed experts, disable compilation meanwhile.

        MLX then compiles nothing in this process, so that the steps of mlx-lm's
        trainer have values, which choose the experts.
        """
        if reads_experts(self):
            _begin(self) if mode else _end(id(self))
        return super().train(mode)


def _begin(model: nn.Module) -> None:
    with COMPILATION:
        if id(model) in _TRAINING or not (_TRAINING or compiles()):
            return
        if "trains" not in vars(model):
            vars(model)["trains"] = True
            weakref.finalize(model, _end, id(model))
            notice("training with streamed experts: MLX compiles no function")
        mx.disable_compile()
        _TRAINING.add(id(model))


def _end(model_id: int) -> None:
    with COMPILATION:
        if model_id in _TRAINING:
            _TRAINING.remove(model_id)
            if not _TRAINING:
                mx.enable_compile()
