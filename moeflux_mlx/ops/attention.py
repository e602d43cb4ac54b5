"""Full attention: rotary positions, the KV cache and causal attention.

Letters: N = B sequences x T tokens, H query heads, Hkv key heads, d head width,
S rows in the cache.
"""

from __future__ import annotations

import mlx.core as mx

from ..executors import device
from ..graph.buffers import (
    AttnMaskBuf,
    AttnOutBuf,
    KProjOutBuf,
    KvCacheKBuf,
    KvCacheVBuf,
    QBuf,
    RmsNormIn,
    RopeInvFreqBuf,
    Shape,
    StartPosBuf,
    VProjOutBuf,
)
from ..graph.op import Cost, In, InOut, Op, Out
from .products import matmul


def split_heads(x: mx.array, n_seqs: int, num_heads: int) -> mx.array:
    """Turn ``[N, H * d]`` into ``[B, H, T, d]``."""
    return x.reshape(n_seqs, x.shape[0] // n_seqs, num_heads, -1).swapaxes(1, 2)


def join_heads(x: mx.array) -> mx.array:
    """Turn ``[B, H, T, d]`` into ``[N, H * d]``."""
    n_seqs, num_heads, t, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(n_seqs * t, num_heads * head_dim)


class RopeNTokens(Op):
    """Rotate the first ``rotary_dim`` channels of each head, halves paired (NeoX).

    Token t of sequence b stands at ``start[b] + t``; ``inv_freq[i]`` is the angle of
    channel pair i per position, so the Op is the same for every scaling rule.
    """

    x: InOut[RmsNormIn]
    inv_freq: In[RopeInvFreqBuf]
    start: In[StartPosBuf]
    n_tokens: int
    n_seqs: int = 1
    num_heads: int
    head_dim: int
    rotary_dim: int

    def shapes(self) -> dict[str, Shape]:
        return {
            "x": (self.n_tokens, self.num_heads * self.head_dim),
            "inv_freq": (self.rotary_dim // 2,),
            "start": (self.n_seqs,),
        }

    def cost(self) -> Cost:
        n = self.n_tokens * self.num_heads
        return Cost(flops=3 * n * self.rotary_dim, bytes=8 * n * self.head_dim)

    def scratch_bytes(self, itemsize: int) -> int:
        return self.n_tokens * self.num_heads * self.head_dim * itemsize

    def reference(self, x: mx.array, inv_freq: mx.array, start: mx.array) -> mx.array:
        rotated = mx.fast.rope(
            split_heads(x, self.n_seqs, self.num_heads),
            self.rotary_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=start,
            freqs=mx.reciprocal(inv_freq),
        )
        return join_heads(rotated)


class KvCacheAppendNTokens(Op):
    """Write rows ``[row, row + T)`` of the caches ``[B, Hkv, S, d]``.

    In a model mlx-lm's own cache object does this, so that prompt caches, trimming and
    batches keep working; it may return a cache of another length.
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

    def shapes(self) -> dict[str, Shape]:
        rows = (self.n_tokens, self.num_kv_heads * self.head_dim)
        cache = (self.n_seqs, self.num_kv_heads, None, self.head_dim)
        return {
            "k_src": rows,
            "v_src": rows,
            "k_cache": cache,
            "v_cache": cache,
            "row": (1,),
        }

    def cost(self) -> Cost:
        return Cost(bytes=16 * self.n_tokens * self.num_kv_heads * self.head_dim)

    def reference(
        self,
        k_src: mx.array,
        v_src: mx.array,
        k_cache: mx.array,
        v_cache: mx.array,
        row: mx.array,
    ) -> tuple[mx.array, mx.array]:
        keys = split_heads(k_src, self.n_seqs, self.num_kv_heads)
        values = split_heads(v_src, self.n_seqs, self.num_kv_heads)
        return (
            mx.slice_update(k_cache, keys, row, (2,)),
            mx.slice_update(v_cache, values, row, (2,)),
        )


class SdpaCausalTiled(Op):
    """Attend causally: T queries over a cache whose last T rows are their own.

    Query t of each sequence sees rows ``[0, S - T + t]``, or what ``mask`` (true: seen)
    allows when there is one. Query head h reads key head ``h // heads_per_kv``.
    """

    q: In[QBuf]
    k: In[KvCacheKBuf]
    v: In[KvCacheVBuf]
    mask: In[AttnMaskBuf] | None = None
    attn_out: Out[AttnOutBuf]
    n_tokens: int
    n_seqs: int = 1
    num_heads: int
    heads_per_kv: int
    head_dim: int
    softmax_scale: float

    def shapes(self) -> dict[str, Shape]:
        rows = (self.n_tokens, self.num_heads * self.head_dim)
        num_kv_heads = self.num_heads // self.heads_per_kv
        cache = (self.n_seqs, num_kv_heads, None, self.head_dim)
        mask = (None, 1, self.n_tokens // self.n_seqs, None)
        return {"q": rows, "k": cache, "v": cache, "mask": mask, "attn_out": rows}

    def cost(self) -> Cost:
        """Count the T new rows only: the cache's length is data, not a field."""
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
        block = min(t, QUERY_BLOCK)
        return 2 * self.n_seqs * self.num_heads * block * t * itemsize

    def reference(
        self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None
    ) -> mx.array:
        queries = split_heads(q, self.n_seqs, self.num_heads)
        t = queries.shape[2]
        if device.on_cpu() and device.has_slow_cpu_blas():
            return join_heads(_blocked_attention(queries, k, v, mask, self))
        out = mx.fast.scaled_dot_product_attention(
            queries,
            k,
            v,
            scale=self.softmax_scale,
            mask=mask if mask is not None else ("causal" if t > 1 else None),
        )
        return join_heads(out)


# Queries taken together on a CPU: bounds the score matrix, skips what causality hides.
QUERY_BLOCK = 256


def _blocked_attention(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None, op: SdpaCausalTiled
) -> mx.array:
    """Attend block by block of queries, through ``matmul``'s fast CPU product."""
    n_seqs, _, t, d = q.shape
    n_kv, s = k.shape[1], k.shape[2]
    grouped = (q * op.softmax_scale).reshape(n_seqs, n_kv, op.heads_per_kv, t, d)
    outs = []
    for start in range(0, t, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, t)
        seen = s if mask is not None else s - t + stop
        keys = k[:, :, None, :seen].swapaxes(-1, -2)
        scores = matmul(grouped[:, :, :, start:stop], keys)
        if mask is not None:
            allowed = mask[:, :, None, start:stop, :seen]
            scores = mx.where(allowed, scores, mx.finfo(scores.dtype).min)
        elif stop - start > 1:
            rows = mx.arange(seen - (stop - start), seen)[:, None]
            hidden = rows < mx.arange(seen)
            scores = mx.where(hidden, mx.finfo(scores.dtype).min, scores)
        weights = mx.softmax(scores, axis=-1, precise=True)
        outs.append(matmul(weights, v[:, :, None, :seen]))
    out = outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=-2)
    return out.reshape(q.shape)
