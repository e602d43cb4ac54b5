"""The calls of one model that all ranks of a process group make alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import mlx.core as mx

from ..errors import BudgetError
from ..experts.compute.exchange import LED_BYTES, Exchange, OtherChoiceError
from ..memory.caches import CacheState
from .transforms import in_transformation

R = TypeVar("R")


class Together:
    """Makes calls with the other ranks of a process group, or alone.

    Args:
        exchange: connects to the other ranks; None: there are none.
    """

    def __init__(self, exchange: Exchange | None):
        self.exchange = exchange

    def agreed(
        self,
        n_seqs: int,
        t: int,
        ids: mx.array,
        step: Callable[[], int],
        *,
        resident: Callable[[], bool],
        give_way: Callable[[], bool] | None,
    ) -> int:
        """Return the tokens of each sequence to compute together, the same everywhere.

        Args:
            n_seqs: number of sequences.
            t: tokens of each sequence.
            ids: the call's token ids.
            step: returns the number of tokens for which this rank has room.
            resident: returns whether this rank keeps all of its experts in memory.
            give_way: frees memory that the model's caller keeps for later; returns
                whether it did.

        Raises:
            BudgetError, GroupError: see ``Exchange.call``.
        """
        if self.exchange is None:
            return step()
        while True:
            try:
                return self.exchange.call(n_seqs, t, ids, step, resident=resident)
            except BudgetError:
                # All ranks raise this error here, so all of them drop the same prompt.
                if give_way is None or not give_way():
                    raise

    def run(self, call: Callable[[], R], states: Sequence[CacheState] | None) -> R:
        """Make a call; at its end all ranks have agreed.

        Args:
            states: states of the call's caches; None if they cannot be restored.

        Raises:
            GroupError: see ``Exchange.rows``.
        """
        exchange = self.exchange
        if exchange is None or in_transformation():
            return call()
        if exchange.may_defer and states is not None:
            # Blocks do not wait for other ranks. If ranks choose different experts, the
            # whole call is repeated with a wait in each block.
            with contextlib.suppress(OtherChoiceError), exchange.together(defers=True):
                return call()
            for state in states:
                state.put_back()
        with exchange.together(defers=False):
            return call()

    def led(self, out: R) -> R:
        """Return a whole call's result; rank 0's, if it may be sampled from."""
        exchange = self.exchange
        is_small = isinstance(out, mx.array) and out.nbytes <= LED_BYTES
        if exchange is None or not is_small or in_transformation():
            return out
        return exchange.led(out)  # type: ignore[arg-type, return-value]

    def least(self, number: int) -> int:
        """Return the smallest of all processes' numbers; all of them must call this."""
        return number if self.exchange is None else self.exchange.least(number)
