"""A call of a native model through its modules, as in mlx-lm.

Graphs perform mlx-lm's own layers only. If the model contains other modules, such as
adapters, the modules are called instead, which is slower but right.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

# Modules that ``nn.quantize`` inserts; graphs perform them too.
QUANTIZED = {
    nn.QuantizedLinear,
    nn.QuantizedEmbedding,
    QuantizedMultiLinear,
    QuantizedSwitchLinear,
}
# Attributes in which mlx-lm's adapters keep the adapted layer.
BASES = ("linear", "embedding")

# Maps backbone, tokens, caches and embeddings to the output of the last norm.
Backbone = Callable[[Any, mx.array, Any, mx.array], mx.array]


class ModuleCall:
    """Calls the modules of a text model.

    Args:
        text: mlx-lm's new module; modules of other classes count as foreign later.
        backbone: calls ``text.model`` as mlx-lm does.
        bounded: returns ids within the embedding's range, and a mask of the ids that
            were, or None if all were.
    """

    def __init__(
        self,
        text: nn.Module,
        backbone: Backbone,
        bounded: Callable[[mx.array], tuple[mx.array, mx.array | None]],
    ):
        self._text, self.backbone, self._bounded = text, backbone, bounded
        self.known = {type(module) for module in text.modules()} | QUANTIZED

    def has_foreign_modules(self) -> bool:
        """Tell whether graphs cannot perform some module's class."""
        return not self.known.issuperset(map(type, self._text.modules()))

    def rows(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> mx.array:
        """Return the rows ``[B, T, D]`` from which logits are computed."""
        if embeddings is None:
            embeddings = self._embed(inputs)
        return self.backbone(self._text.model, inputs, cache, embeddings)

    def _embed(self, inputs: mx.array) -> mx.array:
        ids, inside = self._bounded(inputs)
        rows: mx.array = self._text.model.embed_tokens(ids)
        if inside is None:
            return rows
        return mx.where(inside[..., None], rows, mx.array(math.nan, rows.dtype))

    def logits(self, rows: mx.array) -> mx.array:
        """Return logits ``[B, T, V]`` of rows."""
        text = self._text
        tied = is_tied(text.args)
        head = text.model.embed_tokens.as_linear if tied else text.lm_head
        logits: mx.array = head(rows)
        return logits


def is_tied(args: Any) -> bool:
    """Tell whether a text model's embedding also computes its logits."""
    return bool(getattr(args, "tie_word_embeddings", False))


class _Given(nn.Module):
    """Replaces an embedding whose rows are known."""

    def __init__(self, rows: mx.array):
        super().__init__()
        self._rows = rows

    def __call__(self, _ids: mx.array) -> mx.array:
        return self._rows


def backbone_of(model: nn.Module) -> Backbone:
    """Return a function that calls a text model's backbone with embeddings."""
    call: Backbone = type(model).__call__
    if "input_embeddings" in inspect.signature(call).parameters:
        return call

    def rows(
        model: Any, inputs: mx.array, cache: Any, embeddings: mx.array
    ) -> mx.array:
        own = model["embed_tokens"]
        model["embed_tokens"] = _Given(embeddings)
        try:
            return call(model, inputs, cache=cache)  # type: ignore[call-arg]
        finally:
            model["embed_tokens"] = own

    return rows


def without_adapters(module: nn.Module) -> nn.Module:
    """Return a copy of a module in which the adapted layers replace their adapters.

    The copy shares its arrays with the original.
    """
    for name in BASES:
        if hasattr(module, "lora_a") and name in module:
            return without_adapters(module[name])
    plain = copy.copy(module)
    for name, child in module.children().items():
        if isinstance(child, nn.Module):
            plain[name] = without_adapters(child)
    return plain
