"""The engine's view of a layer's experts, beyond that of a routed block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import mlx.core as mx

from ...experts.compute.source import ExpertSource


class GraphExperts(ExpertSource, Protocol):
    """One MoE layer's experts, wherever they are: MoE Ops read them through this."""

    @property
    def resident(self) -> GraphExperts | None:
        """These experts, if none is ever read again and each is its own slot.

        It counts nothing: who keeps it tells ``count`` how many experts a run used.
        """

    def speculative(self, slots: mx.array | None) -> GraphExperts:
        """Return these experts for a trace: nothing read, nothing counted.

        Args:
            slots: uint32 ``[n_layers, n_experts]``: where to look up those that are
                not ``resident``, by the layers of their streamer.
        """

    def count(self, n: int) -> None:
        """Hear that a run asked for ``n`` experts without calling ``slots``."""

    def request(self, indices: mx.array) -> None:
        """Begin to read the experts that ``slots`` or ``parts`` will ask for next.

        Args:
            indices: ``[1, K]`` expert ids of one token.
        """

    def slots(self, indices: mx.array) -> mx.array:
        """Map expert ids to slots that hold them, reading those that are missing.

        Args:
            indices: ``[N, K]`` int32 or uint32 expert ids of one step whose distinct
                experts fit into the pool together (``N = 1`` always does).

        Returns:
            ``[N, K]`` uint32 slots.
        """

    def batches(self, indices: mx.array) -> Iterator[tuple[slice, mx.array]]:
        """Yield which rows of ``indices``, in order, and the slots of their experts.

        The caller builds whatever reads them and passes it to ``guard`` before it asks
        for the next: each batch's experts fit into the pool together.

        Args:
            indices: ``[N, K]`` expert ids.
        """

    def parts(self, indices: mx.array) -> Iterator[tuple[list[int], list[int]]]:
        """Yield columns of ``indices`` and the slots of their experts, as they come.

        While the caller computes with those in memory the others are being read.

        Args:
            indices: ``[1, K]`` expert ids of one token.
        """

    def waves(self, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield ``(expert, slot)`` lists that together visit each expert once.

        The caller builds whatever reads a wave's slots and passes it to ``guard``
        before it asks for the next wave.
        """
