"""The interface of a routed block's experts, wherever they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..weights import ExpertWeights


class ExpertSource(Protocol):
    """The experts of one block, in slots.

    Slots handed out stay as they are until the arrays given to ``guard`` have been
    evaluated, so a lazy graph never reads an overwritten slot.
    """

    @property
    def weights(self) -> ExpertWeights:
        """All slots as arrays with a leading slot axis."""

    @property
    def settled(self) -> ExpertSource | None:
        """These experts, if none is ever read again and each is its own slot."""

    def portions(
        self, indices: mx.array
    ) -> Iterator[tuple[np.ndarray | None, mx.array]]:
        """Yield places in ``indices``, counted flat, and the slots of their experts.

        Places are None where one portion is all there is: slots then have the shape of
        ``indices``. The caller builds whatever reads them and passes it to ``guard``
        before it asks for the next: each portion's experts fit into memory together,
        and no expert is in two.

        Args:
            indices: ``[..., K]`` expert ids of one step, any number.
        """

    def guard(self, *outputs: mx.array) -> None:
        """Evaluate ``outputs`` before any slot handed out so far is overwritten."""
