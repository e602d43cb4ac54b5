"""Full attention: rotary positions, the KV cache and causal attention.

Letters: N = B sequences x T tokens, H query heads, Hkv key heads, d head width,
S rows in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ...experts.weights import Weight
from ..graph.buffers import Shape
from ..graph.op import Cost, In, InOut, Op, Out, WeightRef
from ..graph.roles import (
    AttnMaskBuf,
    AttnOutBuf,
    KProjOutBuf,
    KvCacheKBuf,
    KvCacheVBuf,
    QBuf,
    RmsNormIn,
    RopeInvFreqBuf,
    StartPosBuf,
    VProjOutBuf,
)
from .functions import QUERY_BLOCK, Array, attention, namespace, rope

# Above this, float32 cannot hold every whole number.
MAX_POSITION = 1 << 24


def split_heads(x: Array, n_seqs: int, num_heads: int) -> Array:
    """Reshape ``[N, H * d]`` to ``[B, H, T, d]``."""
    return x.reshape(n_seqs, x.shape[0] // n_seqs, num_heads, -1).swapaxes(1, 2)


def join_heads(x: Array) -> Array:
    """Reshape ``[B, H, T, d]`` to ``[N, H * d]``."""
    n_seqs, num_heads, t, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(n_seqs * t, num_heads * head_dim)


def seen_rows(start: Array, t: int, n_rows: int) -> Array:
    """Return the rows that T new tokens see of a cache with spare rows.

    Args:
        start: ``[B]``, the position of each sequence's first new token.

    Returns:
        bool ``[B, 1, T, S]``.
    """
    at = namespace(start)
    token, row = at.arange(t)[:, None], at.arange(n_rows)
    return row <= start[:, None, None, None] + token


class RopeNTokens(Op):
    """Rotate the first ``rotary_dim`` channels of each head by its position.

    Channels of the two halves form pairs (NeoX), or with ``pairs`` neighbouring
    channels (GPT-J). The position of token t of sequence b is ``start[b] + t``.
    ``inv_freq[i]`` is the angle of channel pair i per position, and ``scale``
    multiplies the rotated channels, so the Op serves every scaling rule.
    """

    x: InOut[RmsNormIn]
    inv_freq: In[RopeInvFreqBuf]
    start: In[StartPosBuf]
    n_tokens: int
    n_seqs: int = 1
    num_heads: int
    head_dim: int
    rotary_dim: int
    scale: float = 1.0
    pairs: bool = False

    def shapes(self) -> dict[str, Shape]:
        return {
            "x": (self.n_tokens, self.num_heads * self.head_dim),
            "inv_freq": (self.rotary_dim // 2,),
            "start": (self.n_seqs,),
        }

    def index_ranges(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, range]:
        """Return the positions that float32 can hold; padding may start below 0."""
        last = MAX_POSITION - self.n_tokens // self.n_seqs
        return {"start": range(-MAX_POSITION, last + 1)}

    def cost(self) -> Cost:
        n = self.n_tokens * self.num_heads
        return Cost(flops=3 * n * self.rotary_dim, bytes=8 * n * self.head_dim)

    def scratch_bytes(self, itemsize: int) -> int:
        return 2 * self.n_tokens * self.num_heads * self.head_dim * itemsize

    def reference(self, x: Array, inv_freq: Array, start: Array) -> Array:
        heads = split_heads(x, self.n_seqs, self.num_heads)
        how = self.rotary_dim, inv_freq, start, self.scale
        rotated = rope(heads, *how, pairs=self.pairs)
        return join_heads(rotated)


class KvCacheAppendNTokens(Op):
    """Write rows ``[row, row + T)`` of the caches ``[B, Hkv, S, d]``.

    In a model, mlx-lm's cache object performs this Op, so that prompt caches, trimming
    and batches keep working; it may return a cache of another length. All rows must lie
    within the caches: kernels drop other rows, and MLX ends the process. Values may
    have another width, ``value_dim``. ``of_arrays``: no cache object performs the Op,
    so that it may be fused with others.
    """

    k_src: In[KProjOutBuf]
    v_src: In[VProjOutBuf]
    k_cache: InOut[KvCacheKBuf]
    v_cache: InOut[KvCacheVBuf]
    row: In[StartPosBuf]
    n_tokens: int
    n_seqs: int = 1
    num_kv_heads: int
    head_dim: int
    value_dim: int = 0
    of_arrays: bool = False

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of a key and of a value."""
        return self.head_dim, self.value_dim or self.head_dim

    def shapes(self) -> dict[str, Shape]:
        heads = self.num_kv_heads
        keys, values = ((self.n_tokens, heads * width) for width in self.widths)
        k_rows, v_rows = ((self.n_seqs, heads, None, width) for width in self.widths)
        return {
            "k_src": keys,
            "v_src": values,
            "k_cache": k_rows,
            "v_cache": v_rows,
            "row": (1,),
        }

    def index_ranges(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, range]:
        last = shapes["k_cache"][2] - self.n_tokens // self.n_seqs
        return {"row": range(last + 1)}

    def cost(self) -> Cost:
        return Cost(bytes=8 * self.n_tokens * self.num_kv_heads * sum(self.widths))

    def reference(
        self,
        k_src: Array,
        v_src: Array,
        k_cache: Array,
        v_cache: Array,
        row: Array,
    ) -> tuple[Array, Array]:
        keys = split_heads(k_src, self.n_seqs, self.num_kv_heads)
        values = split_heads(v_src, self.n_seqs, self.num_kv_heads)
        return with_rows(k_cache, keys, row), with_rows(v_cache, values, row)


def with_rows(cache: Array, new: Array, row: Array) -> Array:
    """Return the cache with ``new`` written to its rows from ``row`` on."""
    if isinstance(cache, mx.array):
        return mx.slice_update(cache, new, row, (2,))
    cache = cache.copy()
    cache[:, :, int(row[0]) : int(row[0]) + new.shape[2]] = new
    return cache


class SdpaCausalTiled(Op):
    """Attend causally: T queries over a cache whose last T rows are their own.

    Query t of each sequence sees rows ``[0, S - T + t]``, or the rows that ``mask``
    (true: seen) allows. With ``start``, the position of each sequence's first new
    token, the cache has spare rows after the new ones, and there is no mask. Query head
    h reads key head ``h // heads_per_kv``. ``sinks`` ``[H]`` adds one score per head to
    the softmax, without a value. A query that sees no row, such as one of padding, gets
    a finite output without meaning: zeros from a kernel, the mean of the values from
    MLX.
    """

    q: In[QBuf]
    k: In[KvCacheKBuf]
    v: In[KvCacheVBuf]
    mask: In[AttnMaskBuf] | None = None
    start: In[StartPosBuf] | None = None
    attn_out: Out[AttnOutBuf]
    n_tokens: int
    n_seqs: int = 1
    num_heads: int
    heads_per_kv: int
    head_dim: int
    softmax_scale: float
    sinks: WeightRef | None = None

    def shapes(self) -> dict[str, Shape]:
        rows = (self.n_tokens, self.num_heads * self.head_dim)
        num_kv_heads = self.num_heads // self.heads_per_kv
        cache = (self.n_seqs, num_kv_heads, None, self.head_dim)
        mask = (None, 1, self.n_tokens // self.n_seqs, None)
        return {
            "q": rows,
            "k": cache,
            "v": cache,
            "mask": mask,
            "start": (self.n_seqs,),
            "attn_out": rows,
            "sinks": (self.num_heads,),
        }

    def index_ranges(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, range]:
        last = shapes["k"][2] - self.n_tokens // self.n_seqs
        return {"start": range(last + 1)}

    def cost(self) -> Cost:
        """Count only the T new rows: the cache's length is data, not a field."""
        t = self.n_tokens // self.n_seqs
        pairs = self.n_seqs * self.num_heads * t * (t + 1) // 2
        rows = self.n_tokens * self.head_dim
        kv_rows = 2 * rows * self.num_heads // self.heads_per_kv
        return Cost(
            flops=4 * pairs * self.head_dim,
            bytes=4 * (2 * rows * self.num_heads + kv_rows),
        )

    def scratch_bytes(self, itemsize: int) -> int:
        t = self.n_tokens // self.n_seqs
        scores = self.n_seqs * self.num_heads * min(t, QUERY_BLOCK) * t
        return (scores + 3 * self.n_tokens * self.num_heads * self.head_dim) * itemsize

    def reference(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        start: Array | None,
        sinks: Weight | None,
    ) -> Array:
        if start is not None:
            mask = seen_rows(start, self.n_tokens // self.n_seqs, k.shape[2])
        queries = split_heads(q, self.n_seqs, self.num_heads)
        found = None if sinks is None else sinks.w
        attended = attention(queries, k, v, self.softmax_scale, mask, sinks=found)
        return join_heads(attended)
