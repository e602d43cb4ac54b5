"""The memory needs of any model, measured by calling it without its experts.

A lazy call yields shapes without computing: the sizes of caches, rows and logits are
known before any weight is read. Scratch memory is measured with a few tokens on the
real model or, if no weights may be read, on the first layers of each kind without
their matrices.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from .. import device
from ..experts.compute.blank import BlankExperts
from ..experts.files.modules import RoutedBlock
from ..experts.files.store import ExpertStore
from ..experts.pool.pool import pool_stride
from ..experts.weights import leaves
from ..memory.cache_layouts import KINDS, CacheLayout
from ..memory.caches import (
    CACHE_STEP,
    CacheForm,
    arrays_of,
    most_rows,
    rows,
    single_caches,
)
from ..memory.own_caches import OwnForm
from .blank_matrices import SWITCHES, blank_matrices
from .shared import Calls

# Numbers of tokens in measured calls; their difference yields the cost of a token.
FEW, MANY = 16, 64
# Rows of the caches in measured calls, bounded by number and bytes.
MOST_ROWS, MOST_ROW_BYTES = 4096, 256 << 20
# Smaller numbers for a CPU, on which attention in a very large model is slow.
FEW_SLOW, MANY_SLOW, ROWS_SLOW = 4, 8, 2048
# MLX's threads free memory at varying times, so peaks differ between calls. The largest
# of several measurements counts, plus a margin.
N_REPEATS, MARGIN = 2, 1 / 8
# Names in configurations for the maximum length of a sequence.
LENGTHS = ("max_position_embeddings", "max_sequence_length", "model_max_length")


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


class MeasuredNeeds:
    """The memory needs of a model of mlx-lm; see ``memory.Needs``.

    Calls use ``blank`` experts instead of the model's own.

    Args:
        blocks: the model's routed blocks.
        reads: read all parameters and measure the model itself. Otherwise read no
            matrix, and omit the scratch memory of the products with matrices.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Calls,
        blank: BlankExperts,
        store: ExpertStore,
        config: Mapping[str, Any],
        blocks: Sequence[RoutedBlock],
        *,
        reads: bool,
    ):
        self._blocks, self._reads = blocks, reads
        # The block at which a measured call may stop; None: it runs to its end.
        self._last: int | None = None
        self._model, self._calls, self._blank = model, calls, blank
        self._n_experts = store.n_experts
        self._stride = pool_stride([store.layout(layer) for layer in store.layers])
        self._config = config
        # The most recent result of _own_form, by number of tokens.
        self._own_forms: dict[int, list[OwnForm]] = {}

    def resident_bytes(self, unpack: bool) -> int:
        """Return the bytes of the parameters, which are never unpacked."""
        return sum(array.nbytes for array in leaves(self._model.parameters()))

    def scratch_bytes(self, n_tokens: int, n_cached: int, n_seqs: int = 1) -> int:
        """Return the peak of a call, without weights, caches and experts.

        Args:
            n_tokens: tokens of all ``n_seqs`` sequences.
            n_cached: rows of each sequence's cache.
        """
        own = self._scratch.peak(n_tokens, n_cached, n_seqs)
        own += 2 * self.logits_bytes(n_seqs)
        # A batch needs a mask.
        own += 2 * n_tokens * n_cached if n_seqs > 1 else 0
        if not device.gathers_strided():
            # MLX copies the chosen matrices.
            n_copied = min(n_tokens * self._blank.most_chosen, self._n_experts)
            own += n_copied * self._stride
        return math.ceil((1 + MARGIN) * own)

    def output_bytes(self, n_tokens: int) -> int:
        """Return the bytes of a call's rows until their logits are computed.

        The rows exist twice while their parts are concatenated.
        """
        return 2 * self._look.row_bytes * n_tokens

    def logits_bytes(self, n_tokens: int) -> int:
        """Return the bytes of the logits of ``n_tokens`` tokens."""
        return self._look.logit_bytes * n_tokens

    @property
    def cache_forms(self) -> list[CacheForm]:
        """The byte counts of each cache, in the order of ``single_caches``."""
        return self._look.forms

    @property
    def cache_row_bytes(self) -> int:
        """The bytes per token of a sequence in caches that grow without bound."""
        look = self._look
        pairs = zip(look.forms, look.most_rows, strict=True)
        return round(sum(form.row_bytes for form, most in pairs if most is None))

    @property
    def cache_state_bytes(self) -> int:
        """The bytes per sequence of all other caches when they are full."""
        look = self._look
        pairs = zip(look.forms, look.most_rows, strict=True)
        rows = sum(form.row_bytes * (most or 0) for form, most in pairs)
        return round(rows) + sum(form.state_bytes for form in look.forms)

    @property
    def cache_layouts(self) -> list[CacheLayout]:
        """The layout of each of the model's caches."""
        return self._look.layouts

    @property
    def vocab_size(self) -> int:
        """The number of logits of a token."""
        return self._look.vocab_size

    @functools.cached_property
    def most_tokens(self) -> int:
        """The maximum length of a sequence."""
        text = self._config.get("text_config")
        for config in (self._config, text if isinstance(text, dict) else {}):
            for name in LENGTHS:
                if isinstance(found := config.get(name), int) and found > 0:
                    return found
        return sys.maxsize

    @functools.cached_property
    def _look(self) -> _Look:
        """Call the model lazily for shapes, without computing."""
        with self._calls.reaching(self._blank):
            caches, logits = self._call(FEW, make_prompt_cache(self._model))
            row_bytes = self._calls.row_bytes or 0
            singles = [*single_caches(caches)]
            forms = [*map(_form, singles)]
            if None in forms:
                forms = self._compared_forms()
        return _Look(
            [form for form in forms if form is not None],
            [most_rows(one) for one in singles],
            [_form_of_rows(one) for one in singles],
            [
                CacheLayout.of(one, functools.partial(self._own_form, i))
                for i, one in enumerate(caches)
            ],
            logits.nbytes // FEW,
            logits.shape[-1],
            row_bytes,
        )

    def _own_form(self, i: int, n_tokens: int) -> OwnForm:
        """Return the form of cache ``i`` after ``n_tokens`` tokens."""
        if n_tokens not in self._own_forms:
            with self._calls.reaching(self._blank):
                caches, _ = self._call(n_tokens, make_prompt_cache(self._model))
            self._own_forms = {n_tokens: [*map(OwnForm.of, caches)]}
        return self._own_forms[n_tokens][i]

    def _compared_forms(self) -> list[CacheForm | None]:
        """Return the byte counts of caches of any kind, from their growth."""
        (short, _), (long, _) = (
            self._call(n, make_prompt_cache(self._model))
            for n in (CACHE_STEP, 2 * CACHE_STEP)
        )
        forms: list[CacheForm | None] = []
        for one, other in zip(single_caches(short), single_caches(long), strict=True):
            row = max(0.0, (other.nbytes - one.nbytes) / CACHE_STEP)
            state = max(0, round(one.nbytes - CACHE_STEP * row))
            forms.append(CacheForm(row, state))
        return forms

    def _call(self, n_tokens: int, cache: list[Any]) -> tuple[list[Any], mx.array]:
        return cache, self._model(mx.zeros((1, n_tokens), mx.int32), cache=cache)

    @functools.cached_property
    def _scratch(self) -> Scratch:
        """Measure calls with few and many tokens, and short and long caches."""
        with self._calls.reaching(self._blank):
            found = self._read() if self._reads else self._unread()
        mx.clear_cache()
        device.trim_heap()
        return found

    def _read(self) -> Scratch:
        """Measure calls of the whole model."""
        n_rows = self._n_rows()
        mx.eval(self._model.parameters())
        return Scratch.of(self._all_peaks((FEW, MANY), n_rows))

    def _unread(self) -> Scratch:
        """Measure calls of the first layers of each kind without their matrices."""
        cache = make_prompt_cache(self._model)
        pieces = CallPieces(cache)
        inside = [m for block in self._blocks for m in block.projections.values()]
        with blank_matrices([*self._model.modules(), *inside], pieces.heard):
            self._blank.watch = pieces.watch
            try:
                self._call(FEW, cache)
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
            repeats = [self._peaks(n, n_before) for _ in range(N_REPEATS)]
            between, inside = map(max, zip(*repeats, strict=True))
            peaks[n, n_before] = between, inside
        return peaks

    def _n_rows(self) -> int:
        """Return the number of cache rows in measured calls."""
        row_bytes = sum(form.row_bytes for form in self._look.forms)
        n_rows = min(MOST_ROWS, int(MOST_ROW_BYTES // max(1, row_bytes)))
        return max(CACHE_STEP, n_rows - n_rows % CACHE_STEP)

    def _peaks(self, n_tokens: int, n_rows: int) -> tuple[int, int]:
        """Return the peaks of a call between blocks and inside blocks."""
        cache = make_prompt_cache(self._model)
        if n_rows:
            self._fill(cache, n_rows)
        mx.eval(arrays_of(cache))
        base = mx.get_active_memory() - _bytes(cache)
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
            _, logits = self._call(n_tokens, cache)
            watch(True, arrays_of(cache))
            del logits
        except _Enough:
            pass
        finally:
            self._blank.watch = None
        return peaks[0], peaks[1]

    def _fill(self, cache: list[Any], n_rows: int) -> None:
        """Fill caches with ``n_rows`` rows of zeros, or else with one call."""
        look, singles = self._look, [*single_caches(cache)]
        grow = [form.row_bytes > 0 for form in look.forms]
        if not all(shape for shape, g in zip(look.rows, grow, strict=True) if g):
            self._call(CACHE_STEP, cache)
            return
        for one, most, shape in zip(singles, look.most_rows, look.rows, strict=True):
            if shape is not None:
                n = min(n_rows, most or n_rows)
                heads, (n_keys, n_values), dtype = shape
                one.update_and_fetch(
                    mx.zeros((1, heads, n, n_keys), dtype),
                    mx.zeros((1, heads, n, n_values), dtype),
                )


# Peak memory between and inside blocks, by number of tokens and rows before them.
Peaks = dict[tuple[int, int], tuple[int, int]]
# Number of heads, widths of keys and values, and their type.
RowForm = tuple[int, tuple[int, int], mx.Dtype]


@dataclass(frozen=True)
class _Look:
    """Results of a lazy call: its caches, and the bytes of a token's row and logits."""

    forms: list[CacheForm]
    most_rows: list[int | None]
    rows: list[RowForm | None]
    layouts: list[CacheLayout]
    logit_bytes: int
    vocab_size: int
    row_bytes: int


def _form(cache: Any) -> CacheForm | None:
    """Return the byte counts of a cache, or None for an unknown kind."""
    if isinstance(cache, ArraysCache):
        return CacheForm(0, cache.nbytes)
    if type(cache) not in KINDS:
        return None
    # Divide by all allocated rows, not only by the used ones.
    n_rows, _, n_bytes = rows(cache)
    return CacheForm(n_bytes / n_rows if n_rows else 0, 0)


def _form_of_rows(cache: Any) -> RowForm | None:
    keys, values = (getattr(cache, name, None) for name in ("keys", "values"))
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        return None
    if not hasattr(cache, "update_and_fetch"):
        return None
    return keys.shape[1], (keys.shape[-1], values.shape[-1]), keys.dtype


def _bytes(cache: list[Any]) -> int:
    return sum(one.nbytes for one in single_caches(cache))


def _line(n: Sequence[int], y: Sequence[float]) -> tuple[float, float]:
    """Return slope and intercept, neither negative, of a line through both points."""
    slope = max(0.0, (y[1] - y[0]) / (n[1] - n[0]))
    return slope, max(0.0, y[0] - n[0] * slope)


class _Enough(Exception):
    """Stops a call when every kind of layer has been measured."""


class CallPieces:
    """The pieces of a call between its routed blocks.

    Pieces differ if they call other matrices or change other kinds of caches.
    """

    def __init__(self, cache: list[Any]):
        self._caches = [*single_caches(cache)]
        self._marks = [*map(_mark, self._caches)]
        self._called: list[tuple[type, tuple[int, ...]]] = []
        self._ended: list[tuple[Any, ...]] = []

    def heard(self, kind: type, shape: tuple[int, ...]) -> None:
        """Record the call of a matrix."""
        self._called.append((kind, shape))

    def watch(self, before: bool, arrays: list[mx.array]) -> None:
        """End a piece at a block, without computing."""
        if before:
            self._ended.append(self._piece())

    def last_new(self) -> int | None:
        """Return the first block by which all kinds of pieces have occurred.

        None means that the call must run to its end.
        """
        called, changed = self._piece()
        inside = {one for piece in self._ended for one in piece[0]}
        experts = {one for one in called if issubclass(one[0], SWITCHES)}
        if changed or not experts <= inside:
            return None
        return max(self._ended.index(piece) for piece in self._ended)

    def _piece(self) -> tuple[Any, ...]:
        marks = [*map(_mark, self._caches)]
        changed = [
            (type(cache), most_rows(cache))
            for cache, old, new in zip(self._caches, self._marks, marks, strict=True)
            if old != new
        ]
        piece = tuple(self._called), tuple(changed)
        self._marks, self._called = marks, []
        return piece


def _mark(cache: Any) -> Any:
    """Return a value that changes when the cache changes."""
    return getattr(cache, "offset", None), [*map(id, getattr(cache, "cache", ()))]
