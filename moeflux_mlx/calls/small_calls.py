"""Estimate the memory of large calls by measuring small ones with blank experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .. import device
from ..experts.compute.blank import BlankExperts
from ..memory.steady import STEADY, active_bytes
from .alone import OneAtATime

# Each size n is measured as one sequence of n tokens, WIDE sequences of n, and one of
# WIDE * n: the latter two separate bytes per token from bytes per pair of tokens.
# Larger sizes are more exact; smaller ones show whether the larger ones have room.
# Where a size has no room, half of its tokens are tried.
# MLX runs ahead on a CPU, more or less far, so peaks vary. At small sizes they vary by
# as much as all pairs take.
SIZES, WIDE = (1, 4, 16, 64), 4
# Share added to measured peaks. The larger ones are for estimates from small sizes and
# from one token alone, which shows nothing about pairs. With the memory that such an
# estimate asks for, the larger sizes are measured, and must ask for no more.
MARGIN, ROUGH_MARGIN, ALONE_MARGIN = 1 / 8, 3 / 8, 1


@dataclass(frozen=True)
class Taken:
    """The bytes of a call. A pair is a token and a cached row that it attends to."""

    fixed: float = 0
    of_token: float = 0
    of_pair: float = 0
    margin: float = MARGIN

    @classmethod
    def of(cls, n: int, few: int, wide: int, long: int, times: int = WIDE) -> Taken:
        """Fit the smallest estimate that no measured call exceeds.

        Args:
            n: tokens of the smallest call.
            few: peak of one sequence of ``n`` tokens, in bytes.
            wide: peak of ``times`` sequences of ``n`` tokens.
            long: peak of one sequence of ``times * n`` tokens.
            times: how many times as many tokens the larger calls have.
        """
        of_pair = max(0.0, (long - wide) / (n * n * times * (times - 1)))
        more = wide - few - of_pair * n * n * (times - 1)
        line = cls(0, max(0.0, more / (n * (times - 1))), of_pair)
        shapes = zip(_shapes(n, times), (few, wide, long), strict=True)
        beyond = (peak - line._n_bytes(n_seqs, t, t) for (n_seqs, t), peak in shapes)
        return replace(line, fixed=max(0.0, *beyond))

    def n_bytes(self, n_seqs: int, t: int, n_rows: int) -> float:
        """Return the bytes of a call, with the margin.

        Args:
            n_seqs: number of sequences.
            t: tokens of each sequence.
            n_rows: cached rows of each sequence, these tokens included.
        """
        return (1 + self.margin) * self._n_bytes(n_seqs, t, n_rows)

    def _n_bytes(self, n_seqs: int, t: int, n_rows: int) -> float:
        n_tokens = n_seqs * t
        of_pairs = self.of_pair * n_tokens * n_rows
        return self.fixed + self.of_token * n_tokens + of_pairs


class SmallCalls:
    """Measures small calls of one model, no larger than the coming call.

    Args:
        calls: the calls of the model.
    """

    def __init__(self, calls: OneAtATime):
        self._calls = calls
        self._kind: Any = None
        # Tokens of the largest measured call, and the sizes not tried yet.
        self._n_measured, self._sizes = 0, [*SIZES]
        self.taken = Taken()

    def measure(
        self,
        kind: Any,
        n_tokens: int,
        clear: Callable[[], int],
        call: Callable[[mx.array], Any],
    ) -> Taken:
        """Return the estimate for calls of a kind.

        Args:
            kind: equal for calls that take the same bytes per token.
            n_tokens: tokens of the coming call; no size beyond the next larger one is
                measured.
            clear: makes room and returns its bytes; sizes that would exceed them are
                not measured.
            call: runs the model on token ids and returns arrays.
        """
        if self._kind != kind:
            self._kind, self._n_measured, self._sizes = kind, 0, [*SIZES]
        if self._is_due(n_tokens):
            room = clear()
            blank = BlankExperts(self._calls.streamer.store)
            blank.watch, blank.reads_again = lambda _, arrays: mx.eval(arrays), True
            with self._calls.reaching(blank), STEADY:
                while self._is_due(n_tokens):
                    self._measure_size(self._sizes[0], room, call)
            mx.clear_cache()
            device.trim_heap()
        return self.taken

    def _is_due(self, n_tokens: int) -> bool:
        """Tell whether to measure the next size before a call of ``n_tokens``."""
        if self._sizes == [SIZES[-1]]:
            # This takes time, so no shorter call waits for it.
            return n_tokens >= WIDE * SIZES[-1]
        return bool(self._sizes) and n_tokens > self._n_measured

    def _measure_size(self, n: int, room: int, call: Callable[[mx.array], Any]) -> None:
        """Measure the calls of one size, or of half of it and give up larger sizes."""
        if not self._n_measured:
            alone = _peak(call, (1, n)) / n
            self.taken = Taken(0, alone, margin=ALONE_MARGIN)
            self._n_measured = n
        if self._measures(n, WIDE, room, call):
            self._sizes.pop(0)
            return
        self._sizes.clear()
        if n == SIZES[-1]:
            # The size before this one is exact enough.
            return
        half = (n // 2, WIDE) if n > 1 else (n, WIDE // 2)
        self._measures(*half, room, call)
        if self.taken.margin != ALONE_MARGIN:
            self.taken = replace(self.taken, margin=ROUGH_MARGIN)

    def _measures(
        self, n: int, times: int, room: int, call: Callable[[mx.array], Any]
    ) -> bool:
        """Measure the calls of one size if they have room; return whether they have."""
        shapes = _shapes(n, times)
        if not all(self._fits(shape, room) for shape in shapes):
            return False
        few, wide, long = (_peak(call, shape) for shape in shapes)
        self.taken = Taken.of(n, few, wide, long, times)
        self._n_measured = times * n
        return True

    def _fits(self, shape: tuple[int, int], room: int) -> bool:
        """Tell whether a call has room, by what smaller calls took."""
        return (1 + MARGIN) * self.taken._n_bytes(*shape, shape[1]) <= room


def _peak(call: Callable[[mx.array], Any], shape: tuple[int, int]) -> int:
    tokens = mx.zeros(shape, mx.int32)
    mx.eval(tokens)
    base = active_bytes()
    mx.reset_peak_memory()
    mx.eval(call(tokens))
    return mx.get_peak_memory() - base


def _shapes(n: int, times: int) -> list[tuple[int, int]]:
    """Return the sequences and tokens per sequence of one size's measured calls."""
    return [(1, n), (times, n), (1, times * n)]
