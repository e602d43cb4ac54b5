"""Positions, masks and caches of one call of a model, from mlx-lm's cache objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, RotatingKVCache

from .. import device
from . import ops
from .graph import Op
from .graph.experts import GraphExperts
from .graph.lower import Kernel
from .ops.attention import join_heads, split_heads
from .ops.functions import namespace, to_device, to_host


class Grows(Protocol):
    """The part of a mixer that a ``Context`` reads."""

    @property
    def grows(self) -> bool:
        """Whether the cache has a row for each token; else it has a fixed size."""

    @property
    def window(self) -> int | None:
        """Number of last tokens that a token sees; None: all."""


class Context:
    """Positions and masks of one call, made once for all layers.

    ``masks`` holds the mask of attention by window, bool ``[B or 1, 1, T, S]``;
    ``sequence_mask`` is bool ``[B, T]``. A mask is None if only causality hides tokens.
    ``start`` int32 ``[B]`` is the position of each sequence's first token. ``move``
    converts arrays for the call: to NumPy if ``on_host``. ``traced``: MLX compiles the
    whole call as one function, so graphs are not compiled alone, every cache is a
    ``TracedKV`` or has fixed arrays, and ``experts`` by layer replace the layers' own.
    """

    def __init__(
        self,
        mixers: Sequence[Grows],
        cache: list[Any],
        n_seqs: int,
        t: int,
        dtype: mx.Dtype,
        *,
        host: bool,
        experts: Mapping[int, GraphExperts] | None = None,
    ):
        self.n_seqs, self.t, self.dtype = n_seqs, t, dtype
        self.experts, self.traced = experts, experts is not None
        self.on_host, self.move = host, to_host if host else to_device
        stub = mx.zeros((n_seqs, t, 0))
        linear = _cache_of(mixers, cache, grows=False)
        full = _cache_of(mixers, cache, grows=True)
        pairs = zip(reversed(mixers), reversed(cache), strict=True)
        # Reversed, so that the first layer of each window wins.
        by_window = {m.window: c for m, c in pairs if m.grows}
        self.masks = {w: self._mask(stub, c, w) for w, c in by_window.items()}
        self.sequence_mask = self.move(base.create_ssm_mask(stub, linear))
        self.start = self.move(_starts(0 if full is None else full.offset, n_seqs))
        self._last: dict[int, Any] = {}

    def last_row(self, n_rows: int) -> Any:
        """Return the last row of a cache that is in use, int32 ``[B]``.

        Args:
            n_rows: rows of the cache; once it is full, a token replaces the oldest.
        """
        if n_rows not in self._last:
            at = namespace(self.start)
            self._last[n_rows] = at.minimum(self.start, n_rows - 1)
        return self._last[n_rows]

    def _mask(self, stub: mx.array, cache: Any, window: int | None) -> Any:
        mask = base.create_attention_mask(stub, cache, window_size=window)
        if not isinstance(mask, mx.array):
            return None
        return self.move(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))


def _starts(offset: int | mx.array, n_seqs: int) -> mx.array:
    """Return the position int32 ``[B]`` that each sequence has reached."""
    if not isinstance(offset, mx.array) or offset.dtype != mx.int32:
        offset = mx.array(offset, mx.int32)
    if device.on_cpu():
        return mx.broadcast_to(offset.reshape(-1), (n_seqs,))
    # MLX keeps arrays of up to 8 bytes where a GPU reads them over the bus.
    if offset.size == 1:
        return mx.full((n_seqs + 4,), offset.reshape(()))[:n_seqs]
    return mx.concatenate([offset.reshape(-1), mx.zeros(4, mx.int32)])[:n_seqs]


def _cache_of(mixers: Sequence[Grows], cache: list[Any], *, grows: bool) -> Any:
    """Return the first cache that grows, or does not; None if there is none."""
    pairs = zip(mixers, cache, strict=True)
    return next((c for mixer, c in pairs if mixer.grows == grows), None)


def has_spare_rows(cache: Any, window: int | None = None) -> bool:
    """Return whether a cache's arrays have room for later rows.

    Args:
        window: number of last tokens that a token sees. A ring of that size has room: a
            new token replaces one that is no longer seen.
    """
    if window is None:
        return type(cache) is KVCache
    return turns_round(cache, window)


def turns_round(cache: Any, window: int | None) -> bool:
    """Return whether a cache is a ring of the last ``window`` tokens."""
    own = type(cache) is RotatingKVCache and cache.keep == 0
    return own and cache.max_size == window


def cache_ops(
    heads: int,
    kv_heads: int,
    scale: float,
    cache: Any,
    context: Context,
    spare_rows: bool,
) -> dict[type[Op], Kernel]:
    """Return functions for the Ops that mlx-lm's cache object performs, by Op.

    Args:
        heads: number of query heads; ``kv_heads`` of keys and values.
        scale: factor of the scores.
        spare_rows: attention takes the cache's whole arrays.
    """
    n_seqs = context.n_seqs

    def append(k_src, v_src, *_):  # type: ignore[no-untyped-def]
        keys = split_heads(k_src, n_seqs, kv_heads)
        values = split_heads(v_src, n_seqs, kv_heads)
        if cache is None:
            return keys, values
        rows = cache.update_and_fetch(to_device(keys), to_device(values))
        if spare_rows:
            return cache.keys, cache.values
        on_host = isinstance(k_src, np.ndarray) and not hasattr(cache, "bits")
        return (to_host(rows[0]), to_host(rows[1])) if on_host else tuple(rows)

    def quantized_attention(q, k, v, mask, *_):  # type: ignore[no-untyped-def]
        queries = to_device(split_heads(q, n_seqs, heads))
        causal = "causal" if mask is None and context.t > 1 else to_device(mask)
        out = base.scaled_dot_product_attention(
            queries, k, v, cache=cache, scale=scale, mask=causal
        )
        return join_heads(to_host(out) if isinstance(q, np.ndarray) else out)

    host: dict[type[Op], Kernel] = {ops.KvCacheAppendNTokens: append}
    if hasattr(cache, "bits"):
        host[ops.SdpaCausalTiled] = quantized_attention
    return host
