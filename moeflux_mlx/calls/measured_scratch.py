"""The scratch memory of any model's calls, from small ones with blank experts.

The calls run the real model or, if no weights may be read, the first layers of each
kind without their matrices.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .. import device
from ..experts.compute.blank import BlankExperts
from ..experts.files.modules import RoutedBlock
from ..memory.caches import CACHE_STEP, arrays_of, single_caches
from ..memory.steady import active_bytes
from .blank_matrices import blank_matrices
from .call_pieces import CallPieces
from .call_shapes import CallShapes, call_with_zeros

# Numbers of tokens in measured calls; their difference yields the cost of a token.
FEW, MANY = 16, 64
# Rows of the caches in measured calls, bounded by number and bytes.
MOST_ROWS, MOST_ROW_BYTES = 4096, 256 << 20
# Smaller numbers for a CPU, on which attention in a very large model is slow.
FEW_SLOW, MANY_SLOW, ROWS_SLOW = 4, 8, 2048
# MLX's threads free memory at varying times, so peaks differ between calls, and more so
# between fast calls. The largest of several measurements counts: of more than the
# fewest while they take little time.
FEWEST_REPEATS, MOST_REPEATS, REPEAT_SECONDS = 2, 8, 0.1
# Peak memory between and inside blocks, by number of tokens and rows before them.
Peaks = dict[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Scratch:
    """Models of peak memory between and inside blocks, without weights and caches."""

    fixed: float
    of_token: float
    of_row: float
    of_token_and_row: float
    block_fixed: float
    block_of_token: float

    @classmethod
    def of(cls, peaks: Peaks) -> Scratch:
        """Fit the models to peaks of few and many tokens, with and without rows."""
        ends = FEW, MANY
        between, inside = ([peaks[n, 0][i] for n in ends] for i in (0, 1))
        beside = sorted(n for n, rows in peaks if rows)
        n_rows = max(rows for _, rows in peaks)
        more = (max(0, peaks[n, n_rows][0] - peaks[n, 0][0]) / n_rows for n in beside)
        of_token, fixed = _line(ends, between)
        of_both, of_row = _line(beside, [*more])
        of_block, fixed_block = _line(ends, inside)
        return cls(fixed, of_token, of_row, of_both, fixed_block, of_block)

    def peak(self, n_tokens: int, n_rows: int, n_seqs: int) -> float:
        """Return the larger peak of a call; ``n_rows`` are cache rows per sequence."""
        between = self.fixed + self.of_token * n_tokens
        between += self.of_row * n_rows * n_seqs
        between += self.of_token_and_row * n_rows * n_tokens
        return max(between, self.block_fixed + self.block_of_token * n_tokens)


class ScratchMeasure:
    """Measures the peaks of small calls of a model whose experts are ``blank``.

    Args:
        blocks: the model's routed blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        blank: BlankExperts,
        blocks: Sequence[RoutedBlock],
        shapes: CallShapes,
    ):
        self._model, self._blank = model, blank
        self._blocks, self._shapes = blocks, shapes
        # The block at which a measured call may stop; None: it runs to its end.
        self._last: int | None = None

    def of_model(self) -> Scratch:
        """Measure calls of the whole model."""
        n_rows = self._n_rows()
        mx.eval(self._model.parameters())
        return Scratch.of(self._all_peaks((FEW, MANY), n_rows))

    def of_first_layers(self) -> Scratch:
        """Measure calls of the first layers of each kind without their matrices."""
        cache = make_prompt_cache(self._model)
        pieces = CallPieces(cache)
        inside = [m for block in self._blocks for m in block.projections.values()]
        with blank_matrices([*self._model.modules(), *inside], pieces.heard):
            self._blank.watch = pieces.watch
            try:
                call_with_zeros(self._model, FEW, cache)
            finally:
                self._blank.watch = None
            self._last = pieces.last_new()
            # This first call reads all parameters except matrices.
            self._peaks(FEW, 0)
            if device.on_cpu():
                beside, n_rows = (FEW_SLOW, MANY_SLOW), min(ROWS_SLOW, self._n_rows())
            else:
                beside, n_rows = (FEW, MANY), self._n_rows()
            return Scratch.of(self._all_peaks(beside, n_rows))

    def _all_peaks(self, beside: tuple[int, int], n_rows: int) -> Peaks:
        """Return the largest peaks by number of tokens and of cache rows before them.

        Args:
            beside: numbers of tokens that are also measured with cache rows.
        """
        peaks = {}
        calls = {(n, 0) for n in (FEW, MANY, *beside)} | {(n, n_rows) for n in beside}
        for n, n_before in sorted(calls):
            peaks[n, n_before] = self._largest_peaks(n, n_before)
        return peaks

    def _largest_peaks(self, n_tokens: int, n_rows: int) -> tuple[int, int]:
        """Return the largest peaks of several equal calls."""
        repeats: list[tuple[int, int]] = []
        end = time.monotonic() + REPEAT_SECONDS
        while len(repeats) < FEWEST_REPEATS or (
            len(repeats) < MOST_REPEATS and time.monotonic() < end
        ):
            repeats.append(self._peaks(n_tokens, n_rows))
        between, inside = map(max, zip(*repeats, strict=True))
        return between, inside

    def _n_rows(self) -> int:
        """Return the number of cache rows in measured calls."""
        row_bytes = sum(form.row_bytes for form in self._shapes.forms)
        n_rows = min(MOST_ROWS, int(MOST_ROW_BYTES // max(1, row_bytes)))
        return max(CACHE_STEP, n_rows - n_rows % CACHE_STEP)

    def _peaks(self, n_tokens: int, n_rows: int) -> tuple[int, int]:
        """Return the peaks of a call between blocks and inside blocks."""
        cache = make_prompt_cache(self._model)
        if n_rows:
            self._fill(cache, n_rows)
        mx.eval(arrays_of(cache))
        base = active_bytes() - _bytes(cache)
        peaks, n_blocks = [0, 0], itertools.count()

        def watch(before: bool, arrays: list[mx.array]) -> None:
            mx.eval(arrays)
            peak = mx.get_peak_memory() - base - _bytes(cache)
            place = 0 if before else 1
            peaks[place] = max(peaks[place], peak)
            mx.reset_peak_memory()
            if before and next(n_blocks) == self._last:
                raise _Enough

        self._blank.watch = watch
        mx.reset_peak_memory()
        try:
            _, logits = call_with_zeros(self._model, n_tokens, cache)
            watch(True, arrays_of(cache))
            del logits
        except _Enough:
            pass
        finally:
            self._blank.watch = None
        return peaks[0], peaks[1]

    def _fill(self, cache: list[Any], n_rows: int) -> None:
        """Fill caches with ``n_rows`` rows of zeros, or else with one call."""
        shapes, singles = self._shapes, [*single_caches(cache)]
        grow = [form.row_bytes > 0 for form in shapes.forms]
        if not all(shape for shape, g in zip(shapes.rows, grow, strict=True) if g):
            call_with_zeros(self._model, CACHE_STEP, cache)
            return
        for one, most, shape in zip(
            singles, shapes.most_rows, shapes.rows, strict=True
        ):
            if shape is not None:
                n = min(n_rows, most or n_rows)
                heads, (n_keys, n_values), dtype = shape
                one.update_and_fetch(
                    mx.zeros((1, heads, n, n_keys), dtype),
                    mx.zeros((1, heads, n, n_values), dtype),
                )


def _bytes(cache: list[Any]) -> int:
    return sum(one.nbytes for one in single_caches(cache))


def _line(n: Sequence[int], y: Sequence[float]) -> tuple[float, float]:
    """Return slope and intercept, neither negative, of a line through both points."""
    slope = max(0.0, (y[1] - y[0]) / (n[1] - n[0]))
    return slope, max(0.0, y[0] - n[0] * slope)


class _Enough(Exception):
    """Stops a call when every kind of layer has been measured."""
