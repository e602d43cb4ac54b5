"""One layer's streamed experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from ...errors import ExpertStoreError
from ..weights import ExpertWeights


class Streamer(Protocol):
    """The part of ``ExpertStreamer`` that one layer's experts use."""

    @property
    def capacity(self) -> int:
        """Number of experts of one layer that always fit into memory together."""

    def weights(self, layer: int) -> ExpertWeights:
        """See ``StreamedExperts.weights``."""

    def request(self, layer: int, indices: mx.array) -> None:
        """See ``StreamedExperts.request``."""

    def slots(
        self,
        layer: int,
        indices: mx.array,
        expected: Mapping[int, mx.array] | None = None,
    ) -> mx.array:
        """See ``StreamedExperts.slots``."""

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


def ids_of(indices: mx.array) -> np.ndarray:
    """Wait for expert ids, and return them.

    Raises:
        ExpertStoreError: they are no integers.
    """
    if not mx.issubdtype(indices.dtype, mx.integer):
        raise ExpertStoreError(
            f"[slots] expected expert ids as integers but got {indices.dtype}"
        )
    return np.array(indices, copy=False)


class StreamedExperts:
    """One layer of a streamer that does not hold every expert.

    ``index`` is the layer's index in the slot table.
    """

    def __init__(self, streamer: Streamer, layer: int, index: int):
        self._streamer, self._layer, self._index = streamer, layer, index
        self._expected: dict[int, mx.array] | None = None

    @property
    def layer(self) -> int:
        """The layer's number in the streamer."""
        return self._layer

    @property
    def weights(self) -> ExpertWeights:
        """The tensors of all slots of the layer's segment, valid until ``resize``."""
        return self._streamer.weights(self._layer)

    @property
    def resident(self) -> None:
        """None: experts may be evicted."""
        return None

    def speculative(self, slots: mx.array | None) -> SpeculativeExperts:
        """Return the experts for a run that looks them up in ``slots`` on the device.

        Args:
            slots: uint32 ``[n_layers, n_experts]``, as ``slots_on_device`` returns it.
        """
        assert slots is not None
        return SpeculativeExperts(self.weights, slots[self._index])

    def expecting(self, layer: int, indices: mx.array) -> StreamedExperts:
        """Return the same experts; their reads also read another layer's ahead.

        Args:
            layer: the other layer.
            indices: the experts that it is predicted to request.
        """
        experts = StreamedExperts(self._streamer, self._layer, self._index)
        experts._expected = {layer: indices}
        return experts

    def count(self, n: int) -> None:
        """Do nothing: ``slots`` counts."""

    def request(self, indices: mx.array) -> None:
        """Begin to read the missing ones of ``[1, K]`` experts.

        A failed read raises later, in ``slots`` or ``parts``.

        Raises:
            ExpertStoreError: an id is out of range.
            BudgetError: there are more distinct experts than slots.
        """
        self._streamer.request(self._layer, indices)

    def slots(self, indices: mx.array) -> mx.array:
        """Map ``[N, K]`` expert ids to slots, and read the missing experts.

        Raises:
            ExpertStoreError: an id is out of range, or a record cannot be read. The
                other records are kept, and the call may be repeated.
            BudgetError: there are more distinct experts than slots.
        """
        return self._streamer.slots(self._layer, indices, self._expected)

    def portions(
        self, indices: mx.array
    ) -> Iterator[tuple[np.ndarray | None, mx.array]]:
        """Yield places in ``[..., K]`` ids and their slots, as ``ExpertSource`` says.

        Raises:
            ExpertStoreError: as ``slots``.
        """
        streamer, layer = self._streamer, self._layer
        if indices.size <= streamer.capacity:
            yield None, self.slots(indices)
            return
        ids = ids_of(indices).ravel()
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
        """Yield columns of ``indices`` and their slots: experts in memory come first.

        Raises:
            ExpertStoreError, BudgetError: as ``slots``.
        """
        return self._streamer.parts(self._layer, indices)

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of ``(expert, slot)``: experts in memory come first.

        The next wave is read while the caller computes with this one.

        Raises:
            ExpertStoreError: an id is out of range, or a record cannot be read.
        """
        return self._streamer.waves(self._layer, experts)

    def guard(self, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` before any slot given out so far is overwritten."""
        self._streamer.guard(*outputs)


class SpeculativeExperts:
    """Experts of a run that looks slots up on the device and reads nothing back.

    ``slot_of`` is uint32 ``[n_experts]``. ``chosen`` collects the ids passed to
    ``slots``. From these the host finds out later whether all experts were in memory.
    """

    resident = None

    def __init__(self, weights: ExpertWeights, slot_of: mx.array):
        self.weights, self._slot_of = weights, slot_of
        self.chosen: list[mx.array] = []

    def speculative(self, slots: mx.array | None) -> SpeculativeExperts:
        """Return these experts."""
        return self

    def count(self, n: int) -> None:
        """Do nothing: the host counts the chosen experts."""

    def request(self, indices: mx.array) -> None:
        """Do nothing: the host reads missing experts afterwards."""

    def slots(self, indices: mx.array) -> mx.array:
        """Look up the slots of ``[N, K]`` expert ids; read nothing."""
        self.chosen.append(indices)
        # After a missing expert activations may be NaN, and ids out of range.
        last = self._slot_of.size - 1
        return self._slot_of[mx.minimum(indices.view(mx.uint32), last)]

    def portions(self, indices: mx.array) -> Iterator[tuple[None, mx.array]]:
        """Yield the slots of all ids at once."""
        yield None, self.slots(indices)

    def parts(self, indices: mx.array) -> Iterator[tuple[list[int], list[int]]]:
        """Not available: the caller would have to read the ids back."""
        raise NotImplementedError

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Not available: the caller would have to read the ids back."""
        raise NotImplementedError

    def guard(self, *outputs: mx.array) -> None:
        """Do nothing: the caller guards the outputs of the whole run."""
