"""Counters of expert streaming, by layer: hits, misses, bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace


@dataclass
class Counters:
    """Counters of one layer, or the sum over all layers.

    ``hits`` and ``misses`` count the distinct experts of each call. ``preloaded``
    counts experts read before any call. ``read_ahead`` counts experts read on a
    prediction; the layer then used ``read_ahead_used`` of them, which are also hits.
    ``read_seconds`` adds up over the reading threads. ``wait_seconds`` is the time for
    which computation waited. ``second_tries`` counts reads that failed once and then
    succeeded.
    """

    hits: int = 0
    misses: int = 0
    preloaded: int = 0
    read_ahead: int = 0
    read_ahead_used: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    second_tries: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the requested experts that were in memory; 0 without requests."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def recall(self) -> float:
        """Share of the needed reads that were made ahead; 0 without any."""
        return self.read_ahead_used / max(1, self.read_ahead_used + self.misses)

    @property
    def precision(self) -> float:
        """Share of the experts read ahead that were used; 0 without any."""
        return self.read_ahead_used / max(1, self.read_ahead)

    @property
    def wasted_bytes(self) -> int:
        """Bytes read ahead and never used."""
        n_reads = self.misses + self.preloaded + self.read_ahead
        n_wasted = self.read_ahead - self.read_ahead_used
        return self.read_bytes * n_wasted // max(1, n_reads)

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        )


@dataclass(frozen=True)
class Snapshot:
    """A copy of all counters at one moment."""

    layers: dict[int, Counters]

    @property
    def total(self) -> Counters:
        """The sum over all layers."""
        return sum(self.layers.values(), Counters())


class StreamStats:
    """Counters by layer number."""

    def __init__(self, layers: Iterable[int]):
        self._layers = {layer: Counters() for layer in layers}

    def __getitem__(self, layer: int) -> Counters:
        return self._layers[layer]

    @property
    def total(self) -> Counters:
        """The sum over all layers."""
        return self.snapshot().total

    @property
    def wait_seconds(self) -> float:
        """As in ``total``, at less cost: every token asks for it."""
        return sum(counters.wait_seconds for counters in self._layers.values())

    def snapshot(self) -> Snapshot:
        """Return a copy that later reads do not change."""
        return Snapshot({layer: replace(c) for layer, c in self._layers.items()})

    def reset(self) -> None:
        """Set all counters to zero."""
        for counters in self._layers.values():
            counters.__init__()  # type: ignore[misc]
