"""One layer's streamed experts, as its MoE Op sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..weights import ExpertWeights


class Streamer(Protocol):
    """The streamer of all layers, as the experts of one layer see it."""

    @property
    def capacity(self) -> int:
        """Experts of one layer that fit into memory together."""

    def ask(self, layer: int, indices: mx.array) -> None:
        """See ``StreamedExperts.ask``."""

    def slots(
        self,
        layer: int,
        indices: mx.array,
        expected: Mapping[int, mx.array] | None = None,
    ) -> mx.array:
        """See ``StreamedExperts.slots``."""

    def batches(
        self, layer: int, indices: mx.array
    ) -> Iterator[tuple[slice, mx.array]]:
        """See ``StreamedExperts.batches``."""

    def parts(
        self, layer: int, indices: mx.array
    ) -> Iterator[tuple[list[int], list[int]]]:
        """See ``StreamedExperts.parts``."""

    def waves(
        self, layer: int, experts: Sequence[int]
    ) -> Iterator[list[tuple[int, int]]]:
        """See ``StreamedExperts.waves``."""

    def guard(self, *outputs: mx.array) -> None:
        """See ``StreamedExperts.guard``."""


class StreamedExperts:
    """One layer of a streamer that does not hold every expert.

    ``row`` is the layer's in the streamer's table of slots.
    """

    def __init__(
        self, streamer: Streamer, layer: int, row: int, weights: ExpertWeights
    ):
        self._streamer, self._layer, self._row = streamer, layer, row
        self._weights = weights
        self._expected: dict[int, mx.array] | None = None

    @property
    def layer(self) -> int:
        """The streamer's number of the layer."""
        return self._layer

    @property
    def weights(self) -> ExpertWeights:
        """All slots of the pool in this layer's layout."""
        return self._weights

    @property
    def settled(self) -> None:
        """Experts come and go."""
        return None

    def assumed(self, slots: mx.array | None) -> AssumedExperts:
        """Return these experts as if each lay where the table ``slots`` says."""
        assert slots is not None
        return AssumedExperts(self._weights, slots[self._row])

    def expecting(self, layer: int, indices: mx.array) -> StreamedExperts:
        """Return these experts, which another layer's are read ahead with.

        Args:
            indices: ids that it will likely ask for.
        """
        experts = StreamedExperts(self._streamer, self._layer, self._row, self._weights)
        experts._expected = {layer: indices}
        return experts

    def asked(self, n: int) -> None:
        """Hear of nothing: whoever asks calls ``slots``, which counts."""

    def ask(self, indices: mx.array) -> None:
        """Begin to read those of ``[1, K]`` experts that are missing.

        Raises:
            ExpertStoreError: an id is out of range. That one cannot be read, who asks
                for slots will hear.
            BudgetError: more distinct experts than slots.
        """
        self._streamer.ask(self._layer, indices)

    def slots(self, indices: mx.array) -> mx.array:
        """Map ``[N, K]`` expert ids to slots, reading those that are missing.

        Raises:
            ExpertStoreError: an id is out of range, or a record cannot be read; what
                could be read is kept, and the call may be repeated.
            BudgetError: more distinct experts than slots.
        """
        return self._streamer.slots(self._layer, indices, self._expected)

    def batches(self, indices: mx.array) -> Iterator[tuple[slice, mx.array]]:
        """Yield tokens whose experts fit into memory together, and their slots.

        Raises:
            ExpertStoreError: as ``slots``.
        """
        return self._streamer.batches(self._layer, indices)

    def portions(
        self, indices: mx.array
    ) -> Iterator[tuple[np.ndarray | None, mx.array]]:
        """Yield places in ``[..., K]`` ids and their slots: see ``ExpertSource``.

        Raises:
            ExpertStoreError: as ``slots``.
        """
        streamer, layer = self._streamer, self._layer
        if indices.size <= streamer.capacity:
            yield None, self.slots(indices)
            return
        ids = np.array(indices).ravel()
        distinct = np.unique(ids)
        if len(distinct) <= streamer.capacity:
            yield None, self.slots(indices)
            return
        for wave in streamer.waves(layer, distinct.tolist()):
            experts, slots = map(np.array, zip(*wave, strict=True))
            order = np.argsort(experts)
            places = np.flatnonzero(np.isin(ids, experts))
            found = order[np.searchsorted(experts[order], ids[places])]
            yield places, mx.array(slots[found].astype(np.uint32))

    def parts(self, indices: mx.array) -> Iterator[tuple[list[int], list[int]]]:
        """Yield columns of ``indices`` and their slots: in memory first, then read.

        Raises:
            ExpertStoreError, BudgetError: as ``slots``.
        """
        return self._streamer.parts(self._layer, indices)

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield ``(expert, slot)`` lists: first experts in memory, then those read.

        While the caller computes with one wave the next one is being read.

        Raises:
            ExpertStoreError: an id is out of range, or a record cannot be read.
        """
        return self._streamer.waves(self._layer, experts)

    def guard(self, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` before any slot handed out so far is overwritten."""
        self._streamer.guard(*outputs)


class AssumedExperts:
    """Experts of a run that reads nothing back: slots are looked up on the device.

    ``slot_of`` is uint32 ``[n_experts]``. Whether the experts really were there the
    host finds out from ``chosen``: what each ``slots`` was asked for.
    """

    settled = None

    def __init__(self, weights: ExpertWeights, slot_of: mx.array):
        self.weights, self._slot_of = weights, slot_of
        self.chosen: list[mx.array] = []

    def assumed(self, slots: mx.array | None) -> AssumedExperts:
        """Return itself."""
        return self

    def asked(self, n: int) -> None:
        """Hear of nothing: the host counts the choices."""

    def ask(self, indices: mx.array) -> None:
        """Do nothing: the host finds out afterwards which are missing."""

    def slots(self, indices: mx.array) -> mx.array:
        """Look up ``[N, K]`` expert ids, any number, without reading anything."""
        self.chosen.append(indices)
        # What follows from a missing expert may be no number, nor any id from it.
        last = self._slot_of.size - 1
        return self._slot_of[mx.minimum(indices.view(mx.uint32), last)]

    def batches(self, indices: mx.array) -> Iterator[tuple[slice, mx.array]]:
        """Yield all tokens and their slots at once."""
        yield slice(indices.shape[0]), self.slots(indices)

    def portions(self, indices: mx.array) -> Iterator[tuple[None, mx.array]]:
        """Yield the slots of all ids at once."""
        yield None, self.slots(indices)

    def parts(self, indices: mx.array) -> Iterator[tuple[list[int], list[int]]]:
        """Refuse: who takes experts as they come has read their ids back."""
        raise NotImplementedError

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Refuse: who visits experts one by one has read their ids back."""
        raise NotImplementedError

    def guard(self, *outputs: mx.array) -> None:
        """Do nothing: whoever runs all of it guards the outputs."""
