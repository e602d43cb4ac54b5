"""The memory that a language model needs, from its modules and graphs alone."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from .. import device
from ..memory.cache_layouts import CacheLayout
from ..memory.caches import CacheForm
from .blocks import Call
from .layer import LayerForm
from .mixers import CacheShapes, Mixer
from .ops.functions import score_bytes
from .parameters import dense_bytes, held_bytes


class TextNeeds:
    """The memory that a model of graphs needs; see ``memory.Needs``.

    Args:
        text: mlx-lm's module.
        skip: the name in the paths of routed experts.
        forms: the form of each layer.
        planned_bytes: returns the planned peak of a call in the layer of an index.
        dtype: type of activations and of cached keys and values.
        of_modules: returns the peak of a call that runs modules instead of graphs, from
            the number of sequences, the tokens of each, and the rows in their caches.
    """

    def __init__(
        self,
        text: nn.Module,
        args: Any,
        skip: str,
        forms: Sequence[LayerForm],
        planned_bytes: Callable[[int, Call], int],
        dtype: Callable[[], mx.Dtype],
        of_modules: Callable[[int, int, int], float],
    ):
        self._text, self._args, self._skip, self._forms = text, args, skip, forms
        self._planned_bytes, self._dtype = planned_bytes, dtype
        self._of_modules = of_modules
        self._peaks: dict[int, int] = {}

    def resident_bytes(self, unpack: bool) -> int:
        """Return the bytes of parameters once they are ready for use."""
        return held_bytes(self._text, skip=self._skip, unpack=unpack)

    def scratch_bytes(self, n_tokens: int, n_cached: int, n_seqs: int = 1) -> int:
        """Return the peak bytes of one call besides weights, caches and experts.

        Args:
            n_tokens: tokens of all ``n_seqs`` sequences together.
            n_cached: rows of each sequence's cache.
        """
        # Graphs plan their own results only: inputs and outputs add four float32 rows.
        own = self._peak_bytes(n_tokens) + 16 * n_tokens * self._args.hidden_size
        # Logits of each last token are copied from the host; a batch has a mask.
        own += 2 * self.logits_bytes(n_seqs)
        own += 2 * n_tokens * n_cached if n_seqs > 1 else 0
        if device.on_cpu():
            own += self.block_bytes
            own += score_bytes(
                self._args.num_attention_heads, n_tokens // n_seqs, n_cached
            )
        called = self._of_modules(n_seqs, n_tokens // n_seqs, n_cached)
        own = max(own, math.ceil(called))
        # One layer's rows exist three times: as its cache grows, and as they are read.
        return own + 2 * n_seqs * self._most_rows_bytes(n_tokens // n_seqs, n_cached)

    def output_bytes(self, n_tokens: int) -> int:
        """Return the bytes of a call's hidden states and of their copy for MLX."""
        return 2 * 4 * n_tokens * self._args.hidden_size

    def logits_bytes(self, n_tokens: int) -> int:
        """Return the bytes of the logits of ``n_tokens`` tokens."""
        return 4 * n_tokens * self._args.vocab_size

    @property
    def most_tokens(self) -> int:
        """The longest sequence that the model allows, in tokens."""
        return getattr(self._args, "max_position_embeddings", None) or sys.maxsize

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._args.vocab_size

    @property
    def cache_dtype(self) -> mx.Dtype:
        """The type of keys and values."""
        return self._dtype()

    @functools.cached_property
    def cache_shapes(self) -> list[CacheShapes]:
        """The shapes of each layer's cache; ``[1, H, None, d]`` grows."""
        return [form.mixer.cache_shapes for form in self._forms]

    @property
    def cache_layouts(self) -> list[CacheLayout]:
        """The layout of each layer's cache."""
        return [self._layout(form.mixer) for form in self._forms]

    def _layout(self, mixer: Mixer) -> CacheLayout:
        arrays = tuple((shape, self.cache_dtype) for shape in mixer.cache_shapes)
        if not mixer.grows:
            return CacheLayout(ArraysCache, arrays)
        if mixer.window is None:
            return CacheLayout(KVCache, arrays)
        numbers = {"keep": 0, "max_size": mixer.window}
        return CacheLayout(RotatingKVCache, arrays, numbers)

    @property
    def cache_forms(self) -> list[CacheForm]:
        """Bytes of each layer's cache, per sequence."""
        return [
            CacheForm(self.cache_dtype.size * _n_values(shapes), 0)
            if _grows(shapes)
            else CacheForm(0, 4 * _n_values(shapes))
            for shapes in self.cache_shapes
        ]

    @property
    def _caches(self) -> list[tuple[CacheForm, int | None]]:
        """Each layer's cache and the number of rows it keeps; None: all."""
        mixers = (form.mixer for form in self._forms)
        return list(zip(self.cache_forms, (m.window for m in mixers), strict=True))

    @property
    def cache_row_bytes(self) -> int:
        """Bytes per token of a sequence in the caches that have no window."""
        return round(sum(f.row_bytes for f, window in self._caches if window is None))

    @property
    def cache_state_bytes(self) -> int:
        """Bytes per sequence of all other caches when full; states count as float32."""
        rows = sum(form.row_bytes * (window or 0) for form, window in self._caches)
        return round(rows) + sum(form.state_bytes for form, _ in self._caches)

    def _most_rows_bytes(self, n_tokens: int, n_cached: int) -> int:
        """Return the bytes of one layer's rows of a sequence, in the largest layer.

        Args:
            n_tokens: tokens of a call; a cache with a window holds them as well.
        """
        return max(
            round(form.row_bytes * min(n_cached, (window or n_cached) + n_tokens))
            for form, window in self._caches
        )

    def _peak_bytes(self, n_tokens: int) -> int:
        if n_tokens not in self._peaks:
            call = Call(1, n_tokens, self._dtype())
            kinds = {form: i for i, form in enumerate(self._forms)}
            peaks = [self._planned_bytes(i, call) for i in kinds.values()]
            self._peaks[n_tokens] = max(peaks)
        return self._peaks[n_tokens]

    @functools.cached_property
    def block_bytes(self) -> int:
        """Bytes of a matrix, or of a block of one, that a product unpacks."""
        if device.prefers_host_arrays():
            return 2 * device.n_cores() * 4 * device.HOST_BLOCK_VALUES
        return 2 * max(dense_bytes(module) for _, module in self._text.named_modules())


def _grows(shapes: CacheShapes) -> bool:
    return shapes[0][2] is None


def _n_values(shapes: CacheShapes) -> int:
    return sum(math.prod(d or 1 for d in shape) for shape in shapes)
