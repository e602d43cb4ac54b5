"""YaRN's rotary positions without truncation, as its authors' code has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..experts.files.configuration import Configuration


def departs_by_truncate(config: Mapping[str, Any]) -> str | None:
    """Return a note if ``truncate`` is false, which mlx-lm ignores; else None."""
    truncates = _truncates(config.get("rope_scaling"))
    return None if truncates else "rope_scaling that does not truncate"


def check_truncate(config: Configuration) -> None:
    """Raise ModelError unless ``truncate`` is absent, true or false."""
    found = (config.fields.get("rope_scaling") or {}).get("truncate", True)
    if not isinstance(found, bool):
        raise config.wrong("truncate", "true or false", found)


def follow_truncate(ropes: Iterable[nn.Module], args: Any) -> None:
    """Replace the angles of mlx-lm's modules if ``truncate`` is false.

    YaRN blends two rules for angles between two channels. mlx-lm always rounds those to
    whole channels; transformers rounds them only if ``truncate`` is true.

    Args:
        ropes: modules of YaRN; only their angles change.
        args: mlx-lm's arguments of the text model.
    """
    if not _truncates(args.rope_scaling):
        for rope in ropes:
            _leave_unrounded(rope, args.rope_theta, args.rope_scaling)


def _truncates(scaling: Mapping[str, Any] | None) -> bool:
    return bool((scaling or {}).get("truncate", True))


def _leave_unrounded(rope: nn.Module, base: float, scaling: Mapping[str, Any]) -> None:
    dims, factor = rope.dims, scaling["factor"]
    longest = scaling.get("original_max_position_embeddings", 4096)

    def channel(turns: float) -> float:
        """Return the channel that makes ``turns`` turns over the original length."""
        share = longest / (2 * math.pi * turns)
        return dims * math.log(share) / (2 * math.log(base))

    low = max(channel(scaling.get("beta_fast", 32)), 0)
    high = min(channel(scaling.get("beta_slow", 1)), dims - 1)
    # The authors' code avoids a division by zero in the same way.
    width = high - low or 0.001
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / width, 0, 1)
    own = base ** -(mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    rope._freqs = 1 / (own / factor * ramp + own * (1 - ramp))
