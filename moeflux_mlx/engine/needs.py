"""A language model's needs of memory, from its modules and graphs alone."""

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
    """The memory of a model whose layers are graphs; see ``memory.Needs``.

    Args:
        text: mlx-lm's module.
        skip: the name in the paths of routed experts.
        forms: what each layer is.
        planned_bytes: returns the planned peak of the layer at a place for a call.
        dtype: type of activations, and of what caches keep of them.
        of_modules: returns the peak of a call of so many sequences, tokens of each
            and rows that these then have, where modules are called and not graphs.
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
        """Return what parameters take once they are ready for use."""
        return held_bytes(self._text, skip=self._skip, unpack=unpack)

    def scratch_bytes(self, n_tokens: int, n_cached: int, n_seqs: int = 1) -> int:
        """Return the peak of one call beside weights, caches and experts.

        Args:
            n_tokens: of all ``n_seqs`` sequences together.
            n_cached: rows of each sequence's cache.
        """
        own = self._peak_bytes(n_tokens) + 16 * n_tokens * self._args.hidden_size
        # Logits of one token each are copied from the host; the mask of a batch.
        own += 2 * self.logits_bytes(n_seqs)
        own += 2 * n_tokens * n_cached if n_seqs > 1 else 0
        if device.on_cpu():
            own += self.block_bytes
            own += score_bytes(
                self._args.num_attention_heads, n_tokens // n_seqs, n_cached
            )
        called = self._of_modules(n_seqs, n_tokens // n_seqs, n_cached)
        own = max(own, math.ceil(called))
        # One layer's rows while its cache grows, and as they are handed on.
        return own + 2 * n_seqs * self._most_rows_bytes(n_tokens // n_seqs, n_cached)

    def output_bytes(self, n_tokens: int) -> int:
        """Return what a call's hidden states take until their logits are known.

        They are copied once for MLX.
        """
        return 2 * 4 * n_tokens * self._args.hidden_size

    def logits_bytes(self, n_tokens: int) -> int:
        """Return what the logits of so many tokens take."""
        return 4 * n_tokens * self._args.vocab_size

    @property
    def most_tokens(self) -> int:
        """How long a sequence may become."""
        return getattr(self._args, "max_position_embeddings", None) or sys.maxsize

    @property
    def vocab_size(self) -> int:
        """How many tokens the model knows."""
        return self._args.vocab_size

    @property
    def cache_dtype(self) -> mx.Dtype:
        """The type of keys and values."""
        return self._dtype()

    @functools.cached_property
    def cache_shapes(self) -> list[CacheShapes]:
        """The arrays of each layer's cache, ``[1, H, None, d]`` if they grow."""
        return [form.mixer.cache_shapes for form in self._forms]

    @property
    def cache_layouts(self) -> list[CacheLayout]:
        """The form of each layer's cache."""
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
        """Bytes of each layer's cache for a sequence."""
        return [
            CacheForm(self.cache_dtype.size * _n_values(shapes), 0)
            if _grows(shapes)
            else CacheForm(0, 4 * _n_values(shapes))
            for shapes in self.cache_shapes
        ]

    @property
    def _caches(self) -> list[tuple[CacheForm, int | None]]:
        """Each layer's cache, and how many rows it keeps; None: all."""
        mixers = (form.mixer for form in self._forms)
        return list(zip(self.cache_forms, (m.window for m in mixers), strict=True))

    @property
    def cache_row_bytes(self) -> int:
        """Bytes of each token of a sequence in caches that grow without end."""
        return round(sum(f.row_bytes for f, window in self._caches if window is None))

    @property
    def cache_state_bytes(self) -> int:
        """Bytes of each sequence in all other caches once they are full.

        States are float32 at most.
        """
        rows = sum(form.row_bytes * (window or 0) for form, window in self._caches)
        return round(rows) + sum(form.state_bytes for form, _ in self._caches)

    def _most_rows_bytes(self, n_tokens: int, n_cached: int) -> int:
        """Return the most that one layer's rows of a sequence take.

        Args:
            n_tokens: of a call, whose rows a cache of a window has besides.
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
        """Bytes of a matrix, or of a block of one, unpacked for one product."""
        if device.prefers_host_arrays():
            return 2 * device.n_cores() * 4 * device.HOST_BLOCK_VALUES
        return 2 * max(dense_bytes(module) for _, module in self._text.named_modules())


def _grows(shapes: CacheShapes) -> bool:
    return shapes[0][2] is None


def _n_values(shapes: CacheShapes) -> int:
    return sum(math.prod(d or 1 for d in shape) for shape in shapes)
