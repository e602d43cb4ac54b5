"""The angles of rotary positions, from mlx-lm's modules."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ModelError


def rotation(rope: nn.Module, *, pairs: bool = False) -> tuple[mx.array, float]:
    """Return the angles and the factor of one of mlx-lm's rotary modules.

    Args:
        pairs: neighbouring channels form pairs, not channels of two halves.

    Returns:
        The angle per position of each channel pair, ``[rotary_dim / 2]``, and the
        factor of rotated channels.

    Raises:
        ModelError: angles depend on the length of the sequence or are not finite, or
            the module pairs other channels.
    """
    scale = getattr(rope, "mscale", getattr(rope, "_scale", 1.0))
    traditional = getattr(rope, "traditional", False)
    if hasattr(rope, "_freqs") and traditional == pairs:
        angles = mx.reciprocal(rope._freqs.astype(mx.float32))
    elif isinstance(rope, nn.RoPE) and traditional == pairs:
        half = rope.dims // 2
        exponent = mx.arange(half, dtype=mx.float32) / half
        angles = mx.exp(-exponent * mx.log(mx.array(rope.base, mx.float32)))
        if rope.scale != 1.0:
            angles = angles * rope.scale
    else:
        raise ModelError(
            "[rope] expected rotary positions that do not depend on the length of the "
            f"sequence but got {type(rope).__name__}: choose another rope_type in "
            "config.json"
        )
    dims = getattr(rope, "dims", getattr(rope, "dim", None))
    found = np.array(angles)
    is_finite = math.isfinite(scale) and bool(np.isfinite(found).all())
    if found.size == 0 or 2 * found.size != dims or not is_finite:
        raise ModelError(
            f"[rope] expected an even number of rotated channels with finite angles "
            f"but got {dims} channels and angles {found[:4].tolist()}: mend "
            "rope_parameters in config.json"
        )
    return angles, float(scale)
