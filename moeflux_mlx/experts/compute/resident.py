"""Experts that stay in memory, with the interface of streamed ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from ..pool.stats import Counters
from ..weights import ExpertWeights


class ResidentExperts:
    """An ``ExpertSource`` over arrays with a leading expert axis: slot == expert."""

    def __init__(self, weights: ExpertWeights):
        self._weights = weights

    @property
    def weights(self) -> ExpertWeights:
        """All experts of the layer."""
        return self._weights

    @property
    def resident(self) -> ResidentExperts:
        """These experts without counters; each is in the slot of its id."""
        return self

    def speculative(self, slots: mx.array | None) -> ResidentExperts:
        """Return these experts without counters; each is in the slot of its id."""
        return self.resident

    def count(self, n: int) -> None:
        """Count ``n`` experts that a run used without calling ``slots``."""

    def request(self, indices: mx.array) -> None:
        """Do nothing: every expert is in memory."""

    def slots(self, indices: mx.array) -> mx.array:
        """Return ``indices`` as uint32, without reading or copying them."""
        return indices.view(mx.uint32)

    def portions(self, indices: mx.array) -> Iterator[tuple[None, mx.array]]:
        """Yield all ids at once, as their own slots."""
        self.count(indices.size)
        yield None, indices

    def parts(self, indices: mx.array) -> Iterator[tuple[list[int], list[int]]]:
        """Yield all columns and slots at once."""
        slots = np.array(self.slots(indices)).ravel().tolist()
        yield [*range(len(slots))], slots

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield one wave with every distinct expert, ascending."""
        wave = [(int(expert), int(expert)) for expert in sorted(set(experts))]
        if wave:
            yield wave

    def guard(self, *outputs: mx.array) -> None:
        """Do nothing: no slot is ever overwritten."""


class PreloadedExperts(ResidentExperts):
    """One layer of an ``ExpertStreamer`` that holds every expert.

    The ids are not read back, so every id counts as a hit, repeated ones included.
    """

    def __init__(self, weights: ExpertWeights, counters: Counters):
        super().__init__(weights)
        self._counters = counters
        self._resident = ResidentExperts(weights)

    @property
    def resident(self) -> ResidentExperts:
        """The same experts, without counters."""
        return self._resident

    def count(self, n: int) -> None:
        """Count ``n`` hits."""
        self._counters.hits += n

    def slots(self, indices: mx.array) -> mx.array:
        """Return ``indices`` as uint32, without reading them."""
        self.count(indices.size)
        return super().slots(indices)

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield one wave with every distinct expert, ascending."""
        for wave in super().waves(experts):
            self._counters.hits += len(wave)
            yield wave
