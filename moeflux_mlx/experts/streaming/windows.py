"""Choose how many layers a token runs before the host reads its expert choices back.

A read-back stalls the host until the device has finished, and then the device until the
next launch. But a longer run wastes more work if a layer lacked an expert: the results
of that layer and of all later ones are discarded.
"""

from __future__ import annotations

import math

# Windows have 1, 4, 16, ... layers, or all. Each length is compiled once, so use few.
WINDOW_GROWTH = 4


def window_of(
    miss_rate: float, n_layers: int, read_back: float, *, ahead: bool = False
) -> int:
    """Return the cheapest number of layers to run between two read-backs.

    Let a layer miss with probability ``p`` and a read-back take the time of ``r``
    layers. In a window of ``w`` layers the read-back costs ``r / w`` for each layer,
    and a miss discards half the window on average, ``p w / 2`` for each layer. The sum
    is least at ``w = sqrt(2 r / p)``.

    Args:
        miss_rate: share of layers with a miss that no earlier run predicted.
        read_back: time of one read-back, in layers.
        ahead: experts are read ahead, which needs a window of more than one layer.
    """
    best = math.sqrt(2 * read_back / max(miss_rate, 1e-9))
    least = min(WINDOW_GROWTH, n_layers) if ahead else 1
    return max(size for size in window_sizes(n_layers) if size <= max(least, best))


def window_sizes(n_layers: int) -> list[int]:
    """Return the window sizes for a model of ``n_layers`` layers, ascending."""
    sizes = [1]
    while sizes[-1] * WINDOW_GROWTH < n_layers:
        sizes.append(sizes[-1] * WINDOW_GROWTH)
    return [*sizes, n_layers] if n_layers > 1 else sizes
