"""The memory needs of any model, measured by calling it without its experts.

A lazy call yields shapes without computing: the sizes of caches, rows and logits are
known before any weight is read. Scratch memory is measured on calls of a few tokens.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..experts.compute.blank import BlankExperts
from ..experts.compute.slot_block import copied_bytes
from ..experts.files.modules import RoutedBlock
from ..experts.files.store import ExpertStore
from ..experts.weights import leaves
from ..memory.cache_layouts import CacheLayout
from ..memory.caches import CacheForm
from ..memory.steady import STEADY
from .call_shapes import CallShapes
from .measured_scratch import Scratch, ScratchMeasure
from .shared import Calls

# MLX's threads free memory at varying times, so measured peaks count with a margin.
MARGIN = 1 / 8
# Names in configurations for the maximum length of a sequence.
LENGTHS = ("max_position_embeddings", "max_sequence_length", "model_max_length")


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
        self._model, self._calls, self._blank = model, calls, blank
        self._store, self._config = store, config

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
        # Blank experts are a single slot, so no measured call copied more than that.
        own += copied_bytes(self._store, n_tokens * self._blank.most_chosen)
        return math.ceil((1 + MARGIN) * own)

    def output_bytes(self, n_tokens: int) -> int:
        """Return the bytes of a call's rows until their logits are computed.

        The rows exist twice while their parts are concatenated.
        """
        return 2 * self._shapes.row_bytes * n_tokens

    def logits_bytes(self, n_tokens: int) -> int:
        """Return the bytes of the logits of ``n_tokens`` tokens."""
        return self._shapes.logit_bytes * n_tokens

    @property
    def cache_forms(self) -> list[CacheForm]:
        """The byte counts of each cache, in the order of ``single_caches``."""
        return self._shapes.forms

    @property
    def cache_row_bytes(self) -> int:
        """The bytes per token of a sequence in caches that grow without bound."""
        shapes = self._shapes
        pairs = zip(shapes.forms, shapes.most_rows, strict=True)
        return round(sum(form.row_bytes for form, most in pairs if most is None))

    @property
    def cache_state_bytes(self) -> int:
        """The bytes per sequence of all other caches when they are full."""
        shapes = self._shapes
        pairs = zip(shapes.forms, shapes.most_rows, strict=True)
        rows = sum(form.row_bytes * (most or 0) for form, most in pairs)
        return round(rows) + sum(form.state_bytes for form in shapes.forms)

    @property
    def cache_layouts(self) -> list[CacheLayout]:
        """The layout of each of the model's caches."""
        return self._shapes.layouts

    @property
    def vocab_size(self) -> int:
        """The number of logits of a token."""
        return self._shapes.vocab_size

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
    def _shapes(self) -> CallShapes:
        """Call the model lazily for shapes, without computing."""
        return CallShapes.of(self._model, self._calls, self._blank)

    @functools.cached_property
    def _scratch(self) -> Scratch:
        """Measure calls with few and many tokens, and short and long caches."""
        measure = ScratchMeasure(self._model, self._blank, self._blocks, self._shapes)
        with self._calls.reaching(self._blank), STEADY:
            found = measure.of_model() if self._reads else measure.of_first_layers()
        mx.clear_cache()
        device.trim_heap()
        return found
