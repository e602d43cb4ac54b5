"""How far a token runs ahead of reading experts before its choices are read back.

A read-back makes the host wait for the device, and the device for what comes next. But
where a layer lacked an expert, all that ran after it is thrown away.
"""

from __future__ import annotations

import math

# Spans of layers: 1, 4, 16, ..., and all.
SPAN_GROWTH = 4


def window_of(
    miss_rate: float, n_layers: int, read_back: float, *, ahead: bool = False
) -> int:
    """Return how many layers run before experts are read back: the cheapest span.

    Each layer of a window of ``w`` lacks an expert at the rate ``p``. Reading back once
    costs ``r / w`` a layer, and a miss throws away half the window, ``p w / 2``. They
    are least at ``w = sqrt(2 r / p)``.

    Args:
        miss_rate: without the experts that a first run foresees.
        read_back: how long one takes, in layers.
        ahead: experts are read ahead, which takes more than one layer.
    """
    best = math.sqrt(2 * read_back / max(miss_rate, 1e-9))
    least = min(SPAN_GROWTH, n_layers) if ahead else 1
    return max(size for size in spans_of(n_layers) if size <= max(least, best))


def spans_of(n_layers: int) -> list[int]:
    """Return the sizes of spans that some of ``n_layers`` layers run in."""
    sizes = [1]
    while sizes[-1] * SPAN_GROWTH < n_layers:
        sizes.append(sizes[-1] * SPAN_GROWTH)
    return [*sizes, n_layers] if n_layers > 1 else sizes
