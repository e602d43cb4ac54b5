"""Rotary positions by YaRN as its authors' code has them, where mlx-lm rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def leave_unrounded(rope: nn.Module, base: float, scaling: Mapping[str, Any]) -> None:
    """Give mlx-lm's module the angles of a ``truncate`` that is false.

    mlx-lm does not look at it: the channels between which angles change from one rule
    to the other are always rounded to whole ones. Transformers rounds if it is true.

    Args:
        rope: of the type ``yarn``; all else of it stays.
        base: ``rope_theta``.
        scaling: ``rope_scaling``.
    """
    dims, factor = rope.dims, scaling["factor"]
    longest = scaling.get("original_max_position_embeddings", 4096)

    def channel(turns: float) -> float:
        """Return which channel turns so often over the original length."""
        share = longest / (2 * math.pi * turns)
        return dims * math.log(share) / (2 * math.log(base))

    low = max(channel(scaling.get("beta_fast", 32)), 0)
    high = min(channel(scaling.get("beta_slow", 1)), dims - 1)
    width = high - low or 0.001
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / width, 0, 1)
    own = base ** -(mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    rope._freqs = 1 / (own / factor * ramp + own * (1 - ramp))
