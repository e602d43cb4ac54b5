"""The interface between a routed block and its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..weights import ExpertWeights


class ExpertSource(Protocol):
    """The experts of one block, in slots.

    A slot keeps its expert until the arrays given to ``guard`` have been evaluated, so
    a lazy graph never reads an overwritten slot.
    """

    @property
    def weights(self) -> ExpertWeights:
        """The tensors of all slots, with a leading slot axis."""

    @property
    def resident(self) -> ExpertSource | None:
        """The block's experts if all are in memory for good, slot == id; else None."""

    def portions(
        self, indices: mx.array
    ) -> Iterator[tuple[np.ndarray | None, mx.array]]:
        """Yield places in ``indices``, counted flat, and the slots of their experts.

        A portion's experts fit into memory together, and no expert is in two portions.
        If one portion is enough, its places are None and its slots have the shape of
        ``indices``. Before it takes the next portion, the caller builds the arrays that
        read the slots and passes them to ``guard``.

        Args:
            indices: ``[..., K]`` expert ids of one step, any number.
        """

    def guard(self, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` before any slot given out so far is overwritten."""


def filled(n: int, least: int) -> mx.array:
    """Return the numbers of ``n`` rows, the last one repeated up to ``least``.

    MLX chooses a kernel by the number of rows, and kernels differ in their rounding. So
    a part of a call is filled up until MLX chooses the kernel of the whole call.
    """
    return mx.minimum(mx.arange(max(n, least)), n - 1)


def in_portions(
    source: ExpertSource,
    indices: mx.array,
    whole: Callable[[mx.array], mx.array],
    part: Callable[[np.ndarray, mx.array], mx.array],
) -> mx.array:
    """Return rows ``[..., K, D]`` of experts ``[..., K]``, each expert requested once.

    Args:
        whole: returns all rows for the slots ``[..., K]``, if one portion is enough.
        part: returns the rows ``[P, D]`` of places and their slots.
    """
    outputs, places = [], []
    for where, slots in source.portions(indices):
        out = whole(slots) if where is None else part(where, slots)
        source.guard(out)
        if where is None:
            return out
        outputs.append(out)
        places.append(where)
    order = mx.array(np.argsort(np.concatenate(places)))
    return mx.concatenate(outputs)[order].reshape(*indices.shape, -1)
