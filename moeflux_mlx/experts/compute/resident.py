"""Experts that are in memory for good, behind the streamer's interface."""

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
    def settled(self) -> ResidentExperts:
        """These experts without whatever counts their use."""
        return self

    def assumed(self, slots: mx.array | None) -> ResidentExperts:
        """Return the same experts, uncounted: each is its own slot."""
        return self.settled

    def asked(self, n: int) -> None:
        """Hear that a run asked for ``n`` experts without calling ``slots``."""

    def ask(self, indices: mx.array) -> None:
        """Do nothing: they are here."""

    def slots(self, indices: mx.array) -> mx.array:
        """Return ``indices`` as uint32, without reading or copying them."""
        return indices.view(mx.uint32)

    def batches(self, indices: mx.array) -> Iterator[tuple[slice, mx.array]]:
        """Yield all tokens and their slots at once."""
        yield slice(indices.shape[0]), self.slots(indices)

    def portions(self, indices: mx.array) -> Iterator[tuple[None, mx.array]]:
        """Yield all ids at once, in any number: each is its own slot."""
        self.asked(indices.size)
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

    Ids are not read back, so each one asked for counts as a hit, repeated or not.
    """

    def __init__(self, weights: ExpertWeights, counters: Counters):
        super().__init__(weights)
        self._counters = counters
        self._settled = ResidentExperts(weights)

    @property
    def settled(self) -> ResidentExperts:
        """The same experts, uncounted."""
        return self._settled

    def asked(self, n: int) -> None:
        """Count ``n`` hits."""
        self._counters.hits += n

    def slots(self, indices: mx.array) -> mx.array:
        """Return ``indices`` as uint32, without reading them."""
        self.asked(indices.size)
        return super().slots(indices)

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield one wave with every distinct expert, ascending."""
        for wave in super().waves(experts):
            self._counters.hits += len(wave)
            yield wave
