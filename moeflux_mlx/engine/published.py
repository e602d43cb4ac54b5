"""Convert weights from their publishers' layout to mlx-lm's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.core as mx

from ..experts.files.safetensors import TensorEntry

CONVOLUTION = "conv1d.weight"
# Norms that publishers store as their difference from 1.
CENTRED = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")


def has_taps_last(tensors: Mapping[str, TensorEntry | mx.array]) -> bool:
    """Return whether convolutions are ``[C, 1, width]``; mlx-lm's are not."""
    shapes = (x.shape for name, x in tensors.items() if name.endswith(CONVOLUTION))
    return not all(shape and shape[-1] == 1 for shape in shapes)


def converted(
    weights: dict[str, mx.array], unused: Iterable[str] = ()
) -> dict[str, mx.array]:
    """Return weights in mlx-lm's layout; converted weights stay as they are.

    mlx-lm tells by the experts whether weights are converted. Here experts may be
    stacked or streamed, so the convolutions tell. Norms get their 1 in the type that
    they are stored in, as in mlx-lm.

    Args:
        unused: names that the model has no place for.
    """
    if not has_taps_last(weights):
        return weights
    found = {k: v for k, v in weights.items() if "mtp." not in k and k not in unused}
    moved = {k: v.moveaxis(2, 1) for k, v in found.items() if k.endswith(CONVOLUTION)}
    norms = {k: v + 1.0 for k, v in found.items() if k.endswith(CENTRED)}
    return {**found, **moved, **norms}
