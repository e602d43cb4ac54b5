"""What any model's memory comes to, found out by calling it without its experts.

A lazy call tells shapes, so it takes no time: caches, rows and logits are known before
a weight is read. Scratch is measured on a few tokens of the real model.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from . import device
from .cache_layouts import CacheLayout
from .caches import (
    CACHE_STEP,
    CacheForm,
    arrays_of,
    most_rows,
    single_caches,
)
from .calls import Calls
from .experts.blank import BlankExperts
from .experts.pool import pool_stride
from .experts.store import ExpertStore
from .weights import leaves

# Tokens of the calls that are measured: what each costs is the difference.
FEW, MANY = 16, 64
# Rows that caches have meanwhile: as many as take no more than these bytes.
MOST_ROWS, MOST_ROW_BYTES = 4096, 256 << 20
# Threads of MLX free memory a little sooner or later, so peaks differ between calls:
# each is measured so many times, and the largest counts with a share more.
N_REPEATS, MARGIN = 2, 1 / 8
# What configurations call the length of the longest sequence.
LENGTHS = ("max_position_embeddings", "max_sequence_length", "model_max_length")


@dataclass(frozen=True)
class Scratch:
    """Peaks between blocks and inside of them, beside weights, caches and experts."""

    fixed: float
    of_token: float
    of_row: float
    of_token_and_row: float
    block_fixed: float
    block_of_token: float

    def peak(self, n_tokens: int, n_rows: int, n_seqs: int) -> float:
        """Return the larger peak of a call; rows are those of one sequence's cache."""
        between = self.fixed + self.of_token * n_tokens
        between += self.of_row * n_rows * n_seqs
        between += self.of_token_and_row * n_rows * n_tokens
        return max(between, self.block_fixed + self.block_of_token * n_tokens)


class MeasuredNeeds:
    """The memory of a model of mlx-lm; see ``memory.Needs``.

    ``blank`` experts stand in for the model's own while it is called.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Calls,
        blank: BlankExperts,
        store: ExpertStore,
        config: Mapping[str, Any],
    ):
        self._model, self._calls, self._blank = model, calls, blank
        self._n_experts = store.n_experts
        self._stride = pool_stride([store.layout(layer) for layer in store.layers])
        self._config = config

    def resident_bytes(self, unpack: bool) -> int:
        """Return what parameters take; none is ever unpacked."""
        return sum(array.nbytes for array in leaves(self._model.parameters()))

    def scratch_bytes(self, n_tokens: int, n_cached: int, n_seqs: int = 1) -> int:
        """Return the peak of one call beside weights, caches and experts.

        Args:
            n_tokens: of all ``n_seqs`` sequences together.
            n_cached: rows of each sequence's cache.
        """
        own = self._scratch.peak(n_tokens, n_cached, n_seqs)
        own += 2 * self.logits_bytes(n_seqs)
        # The mask of a batch.
        own += 2 * n_tokens * n_cached if n_seqs > 1 else 0
        if not device.gathers_strided():
            # Chosen matrices are copied.
            n_copied = min(n_tokens * self._blank.most_chosen, self._n_experts)
            own += n_copied * self._stride
        return math.ceil((1 + MARGIN) * own)

    def output_bytes(self, n_tokens: int) -> int:
        """Return what a call's rows take until their logits are known.

        They are put together of parts.
        """
        return 2 * self._look.row_bytes * n_tokens

    def logits_bytes(self, n_tokens: int) -> int:
        """Return what the logits of so many tokens take."""
        return self._look.logit_bytes * n_tokens

    @property
    def cache_forms(self) -> list[CacheForm]:
        """What each of the caches takes, in the order of ``single_caches``."""
        return self._look.forms

    @property
    def cache_row_bytes(self) -> int:
        """What each token of a sequence takes in caches that grow without end."""
        look = self._look
        pairs = zip(look.forms, look.most_rows, strict=True)
        return round(sum(form.row_bytes for form, most in pairs if most is None))

    @property
    def cache_state_bytes(self) -> int:
        """What each sequence takes in all other caches once they are full."""
        look = self._look
        pairs = zip(look.forms, look.most_rows, strict=True)
        rows = sum(form.row_bytes * (most or 0) for form, most in pairs)
        return round(rows) + sum(form.state_bytes for form in look.forms)

    @property
    def cache_layouts(self) -> list[CacheLayout]:
        """What each cache that the model makes consists of."""
        return self._look.layouts

    @property
    def vocab_size(self) -> int:
        """How many tokens the model has logits of."""
        return self._look.vocab_size

    @functools.cached_property
    def most_tokens(self) -> int:
        """How long a sequence may become."""
        text = self._config.get("text_config")
        for config in (self._config, text if isinstance(text, dict) else {}):
            for name in LENGTHS:
                if isinstance(found := config.get(name), int) and found > 0:
                    return found
        return sys.maxsize

    @functools.cached_property
    def _look(self) -> _Look:
        """Call the model for shapes; nothing is computed."""
        with self._calls.reaching(self._blank):
            (short, _), (long, logits) = (
                self._call(n, make_prompt_cache(self._model))
                for n in (CACHE_STEP, 2 * CACHE_STEP)
            )
        forms = []
        for one, other in zip(single_caches(short), single_caches(long), strict=True):
            row = max(0.0, (other.nbytes - one.nbytes) / CACHE_STEP)
            state = max(0, round(one.nbytes - CACHE_STEP * row))
            forms.append(CacheForm(row, state))
        return _Look(
            forms,
            [most_rows(one) for one in single_caches(long)],
            [_form_of_rows(one) for one in single_caches(long)],
            [CacheLayout.of(one) for one in long],
            logits.nbytes // (2 * CACHE_STEP),
            logits.shape[-1],
            self._calls.row_bytes or 0,
        )

    def _call(self, n_tokens: int, cache: list[Any]) -> tuple[list[Any], mx.array]:
        return cache, self._model(mx.zeros((1, n_tokens), mx.int32), cache=cache)

    @functools.cached_property
    def _scratch(self) -> Scratch:
        """Measure calls of few and many tokens, with short and long caches."""
        n_rows = self._n_rows()
        mx.eval(self._model.parameters())
        peaks = {}
        with self._calls.reaching(self._blank):
            for n, rows in itertools.product((FEW, MANY), (0, n_rows)):
                repeats = [self._peaks(n, rows) for _ in range(N_REPEATS)]
                peaks[n, rows] = [*map(max, zip(*repeats, strict=True))]
        mx.clear_cache()
        device.trim_heap()
        between = {key: found[0] for key, found in peaks.items()}
        inside = {n: peaks[n, 0][1] for n in (FEW, MANY)}
        of_token, fixed = _line(between[FEW, 0], between[MANY, 0])
        few, many = (max(0, between[n, n_rows] - between[n, 0]) for n in (FEW, MANY))
        of_both, of_row = _line(few / n_rows, many / n_rows)
        of_block, fixed_block = _line(inside[FEW], inside[MANY])
        return Scratch(fixed, of_token, of_row, of_both, fixed_block, of_block)

    def _n_rows(self) -> int:
        """Return how many rows caches have in measured calls."""
        row_bytes = sum(form.row_bytes for form in self._look.forms)
        n_rows = min(MOST_ROWS, int(MOST_ROW_BYTES // max(1, row_bytes)))
        return max(CACHE_STEP, n_rows - n_rows % CACHE_STEP)

    def _peaks(self, n_tokens: int, n_rows: int) -> tuple[int, int]:
        """Return the peaks of a call between blocks and inside of them."""
        cache = make_prompt_cache(self._model)
        if n_rows:
            self._fill(cache, n_rows)
        mx.eval(arrays_of(cache))
        base = mx.get_active_memory() - _bytes(cache)
        peaks = [0, 0]

        def watch(before: bool, arrays: list[mx.array]) -> None:
            mx.eval(arrays)
            peak = mx.get_peak_memory() - base - _bytes(cache)
            place = 0 if before else 1
            peaks[place] = max(peaks[place], peak)
            mx.reset_peak_memory()

        self._blank.watch = watch
        mx.reset_peak_memory()
        try:
            _, logits = self._call(n_tokens, cache)
            watch(True, arrays_of(cache))
            del logits
        finally:
            self._blank.watch = None
        return peaks[0], peaks[1]

    def _fill(self, cache: list[Any], n_rows: int) -> None:
        """Give caches so many rows, of zeros where they take any."""
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


# Heads, widths of keys and of values, and their type.
RowForm = tuple[int, tuple[int, int], mx.Dtype]


@dataclass(frozen=True)
class _Look:
    """What a lazy call tells: caches one by one, bytes of a token's row and logits."""

    forms: list[CacheForm]
    most_rows: list[int | None]
    rows: list[RowForm | None]
    layouts: list[CacheLayout]
    logit_bytes: int
    vocab_size: int
    row_bytes: int


def _form_of_rows(cache: Any) -> RowForm | None:
    keys, values = (getattr(cache, name, None) for name in ("keys", "values"))
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        return None
    if not hasattr(cache, "update_and_fetch"):
        return None
    return keys.shape[1], (keys.shape[-1], values.shape[-1]), keys.dtype


def _bytes(cache: list[Any]) -> int:
    return sum(one.nbytes for one in single_caches(cache))


def _line(few: float, many: float) -> tuple[float, float]:
    """Return slope and intercept, neither below zero, so that both points are met."""
    slope = max(0.0, (many - few) / (MANY - FEW))
    return slope, max(0.0, few - FEW * slope)
