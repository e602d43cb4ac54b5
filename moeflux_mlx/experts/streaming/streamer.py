"""Experts on demand: read into slots when requested, kept while there is room."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from ...errors import ConfigError
from ..compute.resident import PreloadedExperts
from ..compute.streamed import StreamedExperts, ids_of
from ..pool.residency import EMPTY
from ..weights import ExpertWeights
from .expert_pool import ExpertPool, Source

# Experts in a wave: enough to keep every worker busy, few enough that the first results
# do not wait for half the pool.
WAVE_EXPERTS = 32


class ExpertStreamer(ExpertPool):
    """An expert pool that reads the experts which layers request."""

    # The last ``request``: its layer, its ids and the missing ones among them.
    _requested: tuple[int, list[int], list[int]] | None = None

    def source(self, layer: int) -> Source:
        """Return one layer's experts, valid until ``resize``.

        Raises:
            ConfigError: the layer has no routed experts.
        """
        if layer not in self._index:
            raise ConfigError(
                f"[source] expected one of the layers {list(self._index)} but got "
                f"{layer}"
            )
        key = layer, self.resident
        if key not in self._sources:
            self._sources[key] = self._new_source(layer)
        return self._sources[key]

    def _new_source(self, layer: int) -> Source:
        layout = self._store.layout(layer)
        if not self.resident:
            return StreamedExperts(self, layer, self._index[layer])
        slots = self._table.all_slots(self._index[layer])
        place = layout, slots.start, len(slots)
        if self._stacks:
            weights = self._pool(layer).stack(*place)
            self._stacked[layer] = place
        else:
            weights = self._pool(layer).weights(*place)
        return PreloadedExperts(weights, self.stats[layer])

    def weights(self, layer: int) -> ExpertWeights:
        """Return all slots of a layer's segment in the layer's layout.

        The arrays are valid until the next ``resize``. A resident layer has no use for
        them: ``source`` gives its own experts.
        """
        if layer not in self._weights:
            layout = self._store.layout(layer)
            self._weights[layer] = self._pool(layer).weights(layout)
        return self._weights[layer]

    @property
    def miss_rate(self) -> float:
        """Recent share of requests that missed an expert without a prediction of it."""
        return self._demand.miss_rate

    def request(self, layer: int, indices: mx.array) -> None:
        """Begin the reads of ``StreamedExperts.request``."""
        with self.lock, self._repairs:
            ids = self._read_back([indices])[0].ravel().tolist()
            self._requested = layer, ids, self._request(layer, ids)

    def _request(self, layer: int, ids: list[int]) -> list[int]:
        """Begin to read missing experts, unless ``request`` began it; return these."""
        requested, self._requested = self._requested, None
        if requested is not None and requested[:2] == (layer, ids):
            missing, in_flight = requested[2], self._in_flight.experts_of(layer)
            # Use the earlier request only if all its reads are still in flight. Another
            # call may have finished them and ignored a failure. Or the request is left
            # over from a call that ended, and other calls have evicted experts since.
            absent = self._demand.missing(layer, self._demand.distinct(layer, ids))
            if in_flight.issuperset(missing) and in_flight.issuperset(absent):
                return missing
        self._in_flight.finish(wanted=())
        return self._demand.request(layer, ids)

    def slots(
        self,
        layer: int,
        indices: mx.array,
        expected: Mapping[int, mx.array] | None = None,
    ) -> mx.array:
        """Return the slots of ``StreamedExperts.slots``.

        Args:
            expected: predicted expert ids by layer; their reads begin now.
        """
        later = expected or {}
        with self.lock, self._repairs:
            found = self._read_back([indices, *later.values()])
            ids, *likely = (array.ravel().tolist() for array in found)
            if likely:
                self._in_flight.finish(wanted=())
                likely_by_layer = dict(zip(later, likely, strict=True))
                self._demand.provide(layer, ids, likely_by_layer)
            else:
                self._demand.receive(layer, ids, self._request(layer, ids))
            places = self._table.slots[self._index[layer]]
            slots = np.array([places[e] for e in ids], dtype=np.uint32)
            return mx.array(slots.reshape(indices.shape))

    def parts(
        self, layer: int, indices: mx.array
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the columns and slots of ``StreamedExperts.parts``."""
        places = self._table.slots[self._index[layer]]
        with self.lock, self._repairs:
            ids = self._read_back([indices])[0].ravel().tolist()
            missing = self._request(layer, ids)
            if self._in_flight.is_over(layer, missing):
                # All reads have ended: yield all columns at once.
                self._demand.receive(layer, ids, missing)
                missing = []
            here = [i for i, e in enumerate(ids) if e not in missing]
            slots = [places[ids[i]] for i in here]
        if here:
            yield here, slots
        if not missing:
            return
        with self.lock, self._repairs:
            self._demand.receive(layer, ids, missing)
            later = [i for i, e in enumerate(ids) if e in missing]
            slots = [places[ids[i]] for i in later]
        yield later, slots

    @property
    def is_reading(self) -> bool:
        """Whether a read ahead is in flight."""
        with self.lock, self._repairs:
            self._in_flight.finish(wanted=())
            return bool(self._in_flight)

    def slots_on_device(self, layers: Collection[int] = ()) -> mx.array:
        """Return the slot table, uint32 ``[n_layers, n_experts]``, in layer order.

        An expert that is not in memory has the blank slot, or slot 0 without one.

        Args:
            layers: layers whose reads ahead to wait for.
        """
        with self.lock, self._repairs:
            self._in_flight.finish(wanted=())
            for layer in self._index.keys() & layers:
                self._demand.await_read_ahead(layer)
            return self._copy.on_device()

    def confirm(
        self,
        layers: Sequence[int],
        chosen: Sequence[mx.array],
        *,
        again: bool = False,
        n_predicted: int | None = None,
    ) -> int:
        """Count the expert choices of a run that looked slots up on the device.

        The first layer that lacked an expert gets its experts on return. The choices of
        later layers are predictions only; their reads may still be in flight.

        Args:
            layers: the layers that ran, in order.
            chosen: arrays of expert ids in layer order, equally many for each layer.
            again: the first layer's choices were counted before, when it lacked some.
            n_predicted: how many leading layers had run before for this token, so that
                their experts were read ahead; an expert that they lack was unpredicted.
                None: do not read ahead for the layers after the first that lacked one.

        Returns:
            How many leading layers had all their experts in memory.

        Raises:
            ExpertStoreError, BudgetError: as ``StreamedExperts.slots``.
        """
        with self.lock, self._repairs:
            found = [ids.ravel() for ids in self._read_back(chosen)]
            ids = np.concatenate(found).reshape(len(layers), -1)
            self._in_flight.finish(wanted=())
            indices = [self._index[layer] for layer in layers]
            n_confirmed = self._copy.n_complete(indices, ids)
            for n in range(int(again and n_confirmed > 0), n_confirmed):
                self._demand.confirm(layers[n], ids[n].tolist())
            if n_confirmed < len(layers):
                ahead = n_predicted is not None
                later = range(n_confirmed + 1, len(layers)) if ahead else ()
                self._demand.provide(
                    layers[n_confirmed],
                    ids[n_confirmed].tolist(),
                    {layers[n]: ids[n].tolist() for n in later},
                    unpredicted=n_predicted is None or n_confirmed < n_predicted,
                )
            return n_confirmed

    def begin_read_ahead(self, layer: int, indices: mx.array) -> None:
        """Begin to read the experts that a layer is predicted to request.

        A failed read is ignored: the request will read the expert again.

        Args:
            indices: expert ids, any shape.
        """
        with self.lock, self._repairs:
            ids = self._read_back([indices])[0].ravel().tolist()
            self._in_flight.finish(wanted=())
            self._demand.begin_read_ahead(layer, ids)

    def _read_back(self, chosen: Sequence[mx.array]) -> list[np.ndarray]:
        """Wait for expert ids and for all guarded arrays; return the ids."""
        self._guards.wait(*chosen)
        return [ids_of(indices) for indices in chosen]

    def waves(
        self, layer: int, experts: Sequence[int]
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield the waves of ``StreamedExperts.waves``."""
        counters, index = self.stats[layer], self._index[layer]
        wanted = self._demand.distinct(layer, [int(e) for e in experts])
        left = dict.fromkeys(wanted)
        n_ahead = min(WAVE_EXPERTS, max(1, self._table.capacity // 2))
        read: set[int] = set()
        while left:
            with self.lock, self._repairs:
                wave = self._next_wave(layer, left, read)
                if not wave:
                    read.update(self._begin_some(layer, list(left)[:n_ahead], left))
                    wave = self._next_wave(layer, left, read)
                for expert, _ in wave:
                    del left[expert]
                visited = [expert for expert, _ in wave]
                self._table.touch(index, visited)
                counters.hits += sum(expert not in read for expert in visited)
                if left:
                    keep = [*visited, *left]
                    read.update(self._begin_some(layer, list(left)[:n_ahead], keep))
            yield wave

    def _next_wave(
        self, layer: int, left: Collection[int], read: Collection[int]
    ) -> list[tuple[int, int]]:
        """Return the experts of ``left`` in memory; raise if one of ``read`` failed."""
        if self._in_flight:
            # Compute the last wave's outputs while the next wave is read.
            self._guards.wait()
        failed = self._in_flight.finish(self.stats[layer])
        wanted = [e for e in left if e in read and (layer, e) in failed]
        if wanted:
            raise failed[layer, wanted[0]]
        places = self._table.slots[self._index[layer]]
        return [(e, places[e]) for e in left if places[e] != EMPTY]

    def _begin_some(
        self, layer: int, experts: list[int], keep: Collection[int]
    ) -> list[int]:
        """Begin to read as many of ``experts`` as get a slot; return these."""
        self._guards.wait()
        keys = self._demand.keys(layer, keep)
        return experts[: self._in_flight.begin(layer, experts, keys)]
