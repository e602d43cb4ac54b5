"""One rank's share of a store: consecutive experts of every layer."""

from __future__ import annotations

from collections.abc import Collection

from ...errors import ModelError
from .layout import ExpertLayout
from .spans import Span
from .store import ExpertStore


def share_of(count: int, rank: int, size: int) -> range:
    """Return a rank's share of ``count`` experts in a process group of ``size``."""
    return range(rank * count // size, (rank + 1) * count // size)


class SharedExperts:
    """An ``ExpertStore`` of one rank's experts, numbered from 0 in every layer.

    The caller closes the underlying store.

    Raises:
        ModelError: a layer has fewer experts than there are ranks.
    """

    def __init__(self, store: ExpertStore, rank: int, size: int):
        self._store = store
        self._own = {
            layer: share_of(store.count(layer), rank, size) for layer in store.layers
        }
        for layer in store.layers:
            if (n := store.count(layer)) < size:
                raise ModelError(
                    f"[group] {store.name(layer)}: expected at most {n} ranks, one for "
                    f"each of its experts, but got {size}: start fewer"
                )
        self.n_experts = max(map(len, self._own.values()))

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have routed experts, ascending."""
        return self._store.layers

    @property
    def top_k(self) -> int:
        """Number of a layer's experts that must fit into memory together."""
        return self._store.top_k

    def count(self, layer: int) -> int:
        """Return the number of this rank's experts of a layer."""
        return len(self._own[layer])

    def name(self, layer: int) -> str:
        """Return a layer's name for errors, with the number of this share's first."""
        return f"{self._store.name(layer)}, counted from its {self._own[layer].start}"

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of the weight files' tensors that hold experts."""
        return self._store.tensor_names

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of one layer's records."""
        return self._store.layout(layer)

    def spans(self, layer: int, expert: int) -> tuple[Span, ...]:
        """Return the reads that fill an expert's record."""
        return self._store.spans(layer, self._own[layer][expert])

    def checksum(self, layer: int, expert: int) -> int | None:
        """Return the xxh3-64 of an expert's record, without padding, if known."""
        return self._store.checksum(layer, self._own[layer][expert])

    def close(self) -> None:
        """Do nothing: the caller closes the underlying store."""
