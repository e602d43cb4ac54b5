"""One rank's share of a block's experts, for blocks that compute on slots themselves.

The rows of all ranks' experts are exchanged before a token's sum, so that the sum adds
the same numbers in the same order as in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..weights import ExpertWeights
from .exchange import Exchange, OtherChoiceError, Told, n_within, parted
from .source import ExpertSource

# Rows ``[P, D]`` of the tokens ``[P]`` of ``x`` through the experts ``[P]`` of a rank,
# counted from its first, in the slots ``[P]``.
BySlot = Callable[[Any, Any, mx.array, mx.array], Any]
# The same for experts that the function requests itself.
ByExpert = Callable[[Any, np.ndarray, np.ndarray], Any]


class OwnSource(ExpertSource, Protocol):
    """The experts of this rank, by their number in its share."""

    def count(self, n: int) -> None:
        """Count ``n`` experts that a run used without calling ``slots``."""

    def parts(self, indices: mx.array) -> Iterator[tuple[list[int], list[int]]]:
        """Yield columns of ``[1, K]`` ids and the slots of their experts."""

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of ``(expert, slot)`` that together visit each expert once."""


class RankExperts:
    """The experts of one block that several ranks share, by the ids of all of them.

    Args:
        source: this rank's experts.
        exchange: exchanges rows with the other ranks.
        name: the block's name for errors.
        own: the ids of this rank's experts.
    """

    # Calls wait for other ranks, so graphs around them are compiled without them.
    resident = None

    def __init__(self, source: OwnSource, exchange: Exchange, name: str, own: range):
        self.source, self.name, self.own = source, name, own
        self._exchange = exchange
        # Sums of marks that a compiled function returns, to check later.
        self._told: list[mx.array] | None = None

    @property
    def weights(self) -> ExpertWeights:
        """The tensors of this rank's slots."""
        return self.source.weights

    def guard(self, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` before any slot given out so far is overwritten."""
        self.source.guard(*outputs)

    def count(self, n: int) -> None:
        """Do nothing: the experts of this rank are counted once ids are known."""

    def speculative(self, slots: mx.array | None) -> RankExperts:
        """Return the same experts for a compiled function, which returns ``chosen``."""
        assert slots is None and self.source.resident is not None
        same = RankExperts(self.source, self._exchange, self.name, self.own)
        same._told = []
        return same

    @property
    def chosen(self) -> list[mx.array]:
        """The sums of marks, uint32 ``[n, N_MARKS]``, of a compiled call."""
        return self._told or []

    def owed(self) -> tuple[str, Callable[[np.ndarray], None]]:
        """Return the name and the counter with which to check ``chosen``."""
        return self.name, self._counted

    def _counted(self, ids: np.ndarray) -> None:
        self.source.count(n_within(ids, self.own))

    def by_slot(self, x: Any, indices: Any, make: BySlot) -> Any:
        """Return the rows ``[N, K, D]`` of ``x`` ``[N, D]`` through all ranks' experts.

        Args:
            x: MLX's or NumPy's array.
            indices: ``[N, K]`` expert ids.
            make: computes rows of this rank's experts.

        Raises:
            PeerError, GroupError: see ``Exchange.rows``.
        """
        lazy = isinstance(x, mx.array) and self.source.resident is not None
        if lazy and (self._told is not None or self._exchange.defers):
            return self._masked(x, indices, make)
        return self._waited(x, indices, partial(self._by_slot, make))

    def by_expert(self, x: Any, indices: Any, make: ByExpert) -> Any:
        """Do as ``by_slot`` for many tokens, with another function.

        Raises:
            PeerError, GroupError: see ``Exchange.rows``.
        """
        return self._waited(x, indices, make)

    def _masked(self, x: mx.array, indices: mx.array, make: BySlot) -> mx.array:
        """Run all rows here, and use those of this rank's experts.

        A row of another rank's expert runs through any own expert and is discarded.
        The device does more work, but the host reads nothing back.
        """
        exchange, own, k = self._exchange, self.own, indices.shape[-1]
        ids = indices.reshape(-1).astype(mx.int32)
        tokens = mx.arange(ids.size, dtype=mx.uint32) // k
        inside = mx.clip(ids - own.start, 0, len(own) - 1).astype(mx.uint32)
        rows = make(x, tokens, inside, inside).astype(x.dtype)
        if self._told is None:
            total = exchange.masked(self.name, ids, own, rows, self.source.count)
        else:
            both = exchange.masked_sum(ids, own, rows)
            total, marks = parted(both, ids.size, rows.dtype)
            self._told.append(marks)
        return total.reshape(*indices.shape, -1)

    def _waited(self, x: Any, indices: Any, make: ByExpert) -> Any:
        try:
            return self._exchanged(x, indices, make)
        except OtherChoiceError:
            if self._exchange.defers:
                raise
            on_host = isinstance(x, np.ndarray)
            arrays = (mx.array(a) if on_host else a for a in (x, indices))
            led = self._exchange.follow(*arrays)
            x, indices = map(np.array, led) if on_host else led
            return self._exchanged(x, indices, make)

    def _exchanged(self, x: Any, indices: Any, make: ByExpert) -> Any:
        ids, k, own = np.array(indices), indices.shape[-1], self.own
        on_host = isinstance(x, np.ndarray)
        dtype = mx.float32 if on_host else x.dtype

        def rows(places: np.ndarray) -> mx.array:
            made = make(x, places // k, ids.reshape(-1)[places] - own.start)
            return mx.array(made) if on_host else made.astype(dtype)

        like = x.shape[-1], dtype
        found = self._exchange.rows(self.name, ids.reshape(-1), own, like, rows)
        found = found.reshape(*ids.shape, -1)
        return np.array(found) if on_host else found

    def _by_slot(
        self, make: BySlot, x: Any, tokens: np.ndarray, ids: np.ndarray
    ) -> Any:
        """Compute rows portion by portion, experts in memory first."""
        xp, places, made = np if isinstance(x, np.ndarray) else mx, [], []
        for where, slots in self._portions(x, ids):
            chosen = mx.array(ids[where].astype(np.uint32))
            out = make(x, tokens[where], chosen, slots)
            if isinstance(out, mx.array):
                self.source.guard(out)
            places.append(where)
            made.append(out)
        if len(made) == 1:
            return made[0]
        order = np.argsort(np.concatenate(places))
        return xp.concatenate(made)[order if xp is np else mx.array(order)]

    def _portions(
        self, x: Any, ids: np.ndarray
    ) -> Iterator[tuple[np.ndarray, mx.array]]:
        wanted = mx.array(ids.astype(np.uint32))
        if len(x) == 1 and isinstance(x, np.ndarray):
            for columns, chosen in self.source.parts(wanted[None]):
                yield np.array(columns), mx.array(np.array(chosen, np.uint32))
            return
        for where, slots in self.source.portions(wanted):
            yield np.arange(len(ids)) if where is None else where, slots


def told_of(sources: Sequence[RankExperts], chosen: mx.array) -> Told:
    """Return what to check of a compiled function's ``chosen``.

    Args:
        sources: the blocks' experts.
        chosen: uint32 ``[B, n, N_MARKS]``, from all blocks.
    """
    names, counts = zip(*(source.owed() for source in sources), strict=True)
    return Told(names, None, chosen, counts)
