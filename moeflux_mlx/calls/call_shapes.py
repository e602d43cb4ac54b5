"""The sizes of a model's caches, rows and logits, from a lazy call.

A lazy call yields shapes without computing, before any weight is read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from ..experts.compute.blank import BlankExperts
from ..memory.cache_layouts import KINDS, CacheLayout
from ..memory.caches import CACHE_STEP, CacheForm, most_rows, rows, single_caches
from ..memory.own_caches import OwnForm
from .shared import Calls

# Number of tokens of the lazy call.
N_TOKENS = 16
# Number of heads, widths of keys and values, and their type.
RowForm = tuple[int, tuple[int, int], mx.Dtype]


@dataclass(frozen=True)
class CallShapes:
    """Results of a lazy call: its caches, and the bytes of a token's row and logits."""

    forms: list[CacheForm]
    most_rows: list[int | None]
    rows: list[RowForm | None]
    layouts: list[CacheLayout]
    logit_bytes: int
    vocab_size: int
    row_bytes: int

    @classmethod
    def of(cls, model: nn.Module, calls: Calls, blank: BlankExperts) -> CallShapes:
        """Call a model lazily for shapes, without computing."""
        own_forms = _OwnForms(model, calls, blank)
        with calls.reaching(blank):
            caches, logits = call_with_zeros(model, N_TOKENS, make_prompt_cache(model))
            row_bytes = calls.row_bytes or 0
            singles = [*single_caches(caches)]
            forms = [*map(_form, singles)]
            if None in forms:
                forms = _compared_forms(model)
        return cls(
            [form for form in forms if form is not None],
            [most_rows(one) for one in singles],
            [_form_of_rows(one) for one in singles],
            [
                CacheLayout.of(one, functools.partial(own_forms, i))
                for i, one in enumerate(caches)
            ],
            logits.nbytes // N_TOKENS,
            logits.shape[-1],
            row_bytes,
        )


class _OwnForms:
    """The forms of a model's own caches after a number of tokens."""

    def __init__(self, model: nn.Module, calls: Calls, blank: BlankExperts):
        self._model, self._calls, self._blank = model, calls, blank
        # The forms of all caches, for the last requested number of tokens.
        self._found: dict[int, list[OwnForm]] = {}

    def __call__(self, i: int, n_tokens: int) -> OwnForm:
        """Return the form of cache ``i`` after ``n_tokens`` tokens."""
        if n_tokens not in self._found:
            with self._calls.reaching(self._blank):
                cache = make_prompt_cache(self._model)
                call_with_zeros(self._model, n_tokens, cache)
            self._found = {n_tokens: [*map(OwnForm.of, cache)]}
        return self._found[n_tokens][i]


def call_with_zeros(
    model: nn.Module, n_tokens: int, cache: list[Any]
) -> tuple[list[Any], mx.array]:
    """Return the caches and the lazy logits of a call with tokens of zero."""
    return cache, model(mx.zeros((1, n_tokens), mx.int32), cache=cache)


def _compared_forms(model: nn.Module) -> list[CacheForm | None]:
    """Return the byte counts of caches of any kind, from their growth."""
    (short, _), (long, _) = (
        call_with_zeros(model, n, make_prompt_cache(model))
        for n in (CACHE_STEP, 2 * CACHE_STEP)
    )
    forms: list[CacheForm | None] = []
    for one, other in zip(single_caches(short), single_caches(long), strict=True):
        row = max(0.0, (other.nbytes - one.nbytes) / CACHE_STEP)
        state = max(0, round(one.nbytes - CACHE_STEP * row))
        forms.append(CacheForm(row, state))
    return forms


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
