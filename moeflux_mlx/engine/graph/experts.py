"""The interface through which MoE Ops use a layer's experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import mlx.core as mx

from ...experts.compute.source import ExpertSource


class GraphExperts(ExpertSource, Protocol):
    """The experts of one MoE layer, resident or streamed, as MoE Ops see them."""

    @property
    def resident(self) -> GraphExperts | None:
        """These experts if all stay in memory, each in the slot of its id; else None.

        It counts no requests: the caller reports them to ``count``.
        """

    def speculative(self, slots: mx.array | None) -> GraphExperts:
        """Return a view of these experts for a compiled function: it reads nothing.

        Args:
            slots: uint32 ``[n_layers, n_experts]``, the slot of each expert by the
                streamer's layers. Experts that are not ``resident`` are found there.
        """

    def count(self, n: int) -> None:
        """Count ``n`` experts that a run used without calling ``slots``."""

    def request(self, indices: mx.array) -> None:
        """Start to read the experts that the next ``slots`` or ``parts`` will request.

        Args:
            indices: ``[1, K]`` expert ids of one token.
        """

    def slots(self, indices: mx.array) -> mx.array:
        """Return the slots of experts; read those that are missing first.

        Args:
            indices: ``[N, K]`` int32 or uint32 expert ids. Their distinct experts must
                fit into the pool together, which those of ``N = 1`` always do.

        Returns:
            ``[N, K]`` uint32 slots.
        """

    def parts(self, indices: mx.array) -> Iterator[tuple[list[int], list[int]]]:
        """Yield columns of ``indices`` and the slots of their experts as they arrive.

        Experts in memory come first; the others are read meanwhile.

        Args:
            indices: ``[1, K]`` expert ids of one token.
        """

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of ``(expert, slot)`` that together visit each expert once.

        The caller passes every array that reads a wave's slots to ``guard`` before it
        takes the next wave.
        """
