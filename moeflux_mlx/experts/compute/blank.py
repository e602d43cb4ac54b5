"""Blank experts, never read, for a call that measures how much memory it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from ..files.store import ExpertStore
from ..pool.pool import SlotPool
from ..weights import ExpertWeights


class BlankExperts:
    """One slot of zeros that stands for every expert of every block.

    ``watch`` receives the arrays known before a block uses its experts, with True, and
    those known after it, with False. Without ``watch`` nothing is computed here.
    ``most_chosen`` is the most experts that a block chose for one token. With
    ``reads_again`` gradients request experts a second time, as from a streamer.
    """

    def __init__(self, store: ExpertStore):
        self._store = store
        layouts = [store.layout(layer) for layer in store.layers]
        self._pool = SlotPool(layouts, 1)
        self.watch: Callable[[bool, list[mx.array]], None] | None = None
        self.most_chosen = 1
        self.reads_again = False

    def source(self, layer: int) -> BlankSource:
        """Return the experts of one block."""
        return BlankSource(self, self._pool.weights(self._store.layout(layer)))

    def hand_over(self) -> None:
        """Do nothing: the slot is never overwritten."""


class BlankSource:
    """The blank experts of one block; see ``ExpertSource``."""

    def __init__(self, blank: BlankExperts, weights: ExpertWeights):
        self._blank, self.weights = blank, weights

    @property
    def resident(self) -> BlankSource | None:
        """These experts, because none is ever read; None if ``reads_again``."""
        return None if self._blank.reads_again else self

    def portions(
        self, indices: mx.array
    ) -> Iterator[tuple[np.ndarray | None, mx.array]]:
        """Yield all places but the last, then the last.

        The first portion is as large as any call's largest one can be.
        """
        blank = self._blank
        blank.most_chosen = max(blank.most_chosen, indices.shape[-1])
        if blank.watch is None or indices.size == 1:
            yield None, mx.zeros(indices.shape, mx.uint32)
            return
        blank.watch(True, [indices])
        for places in (np.arange(indices.size - 1), np.array([indices.size - 1])):
            yield places, mx.zeros(len(places), mx.uint32)

    def guard(self, *outputs: mx.array) -> None:
        """Pass ``outputs`` to ``watch``, which computes them now."""
        if self._blank.watch is not None:
            self._blank.watch(False, list(outputs))
