"""Attention over a compressed cache: a latent row and a rope key per token (MLA).

Letters: N = B sequences x T tokens, H heads, L latent width, P and R width of a head's
query without and with positions, V width of a head's value, S rows in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping

from ... import device
from ...experts.weights import Weight
from ..graph.buffers import Shape
from ..graph.op import Cost, In, Op, Out, WeightRef
from ..graph.roles import (
    AttnMaskBuf,
    HeadsIn,
    HeadsOut,
    KvCacheKBuf,
    KvCacheVBuf,
    LatentBuf,
    LatentContextBuf,
    LatentQueryBuf,
    MlaKvBuf,
    MlaQBuf,
    QNopeBuf,
    QRopeBuf,
    RopeKeyBuf,
    StartPosBuf,
)
from .attention import join_heads, seen_rows, split_heads
from .functions import QUERY_BLOCK, Array, attention, heads_linear


class MlaSplitQKv(Op):
    """Split heads' queries ``P|R`` and a token's row ``L|R``; R has positions."""

    q: In[MlaQBuf]
    kv: In[MlaKvBuf]
    q_nope: Out[QNopeBuf]
    q_pe: Out[QRopeBuf]
    latent: Out[LatentBuf]
    k_pe: Out[RopeKeyBuf]
    n_tokens: int
    num_heads: int
    nope_dim: int
    rope_dim: int
    latent_dim: int

    def shapes(self) -> dict[str, Shape]:
        n, heads = self.n_tokens, self.num_heads
        return {
            "q": (n, heads * (self.nope_dim + self.rope_dim)),
            "kv": (n, self.latent_dim + self.rope_dim),
            "q_nope": (n, heads * self.nope_dim),
            "q_pe": (n, heads * self.rope_dim),
            "latent": (n, self.latent_dim),
            "k_pe": (n, self.rope_dim),
        }

    def cost(self) -> Cost:
        width = self.num_heads * (self.nope_dim + self.rope_dim)
        return Cost(bytes=8 * self.n_tokens * (width + self.latent_dim + self.rope_dim))

    def reference(self, q: Array, kv: Array) -> tuple[Array, ...]:
        return split_q_kv(q, kv, self.num_heads, self.nope_dim)


def split_q_kv(q: Array, kv: Array, num_heads: int, nope_dim: int) -> tuple[Array, ...]:
    """Split queries and a token's row as ``MlaSplitQKv`` does."""
    n, p = len(q), nope_dim
    heads = q.reshape(n, num_heads, -1)
    latent_dim = kv.shape[1] - heads.shape[2] + p
    nope, rope = heads[..., :p].reshape(n, -1), heads[..., p:].reshape(n, -1)
    return nope, rope, kv[:, :latent_dim], kv[:, latent_dim:]


class HeadMatvecNTokens(Op):
    """Multiply each head's values of a row ``[N, H * I]`` by the head's own matrix.

    ``weight`` is ``[H, O, I]``; each matrix is transposed.
    """

    weight: WeightRef
    input: In[HeadsIn]
    output: Out[HeadsOut]
    num_heads: int
    in_dim: int
    out_dim: int
    n_tokens: int

    def shapes(self) -> dict[str, Shape]:
        n, heads = self.n_tokens, self.num_heads
        return {
            "weight": (heads, self.out_dim, self.in_dim),
            "input": (n, heads * self.in_dim),
            "output": (n, heads * self.out_dim),
        }

    def cost(self) -> Cost:
        rows = self.n_tokens * self.num_heads
        return Cost(
            flops=2 * rows * self.in_dim * self.out_dim,
            bytes=4 * rows * (self.in_dim + self.out_dim) + self.weight.n_bytes,
        )

    def scratch_bytes(self, itemsize: int) -> int:
        rows = self.n_tokens * self.num_heads
        return rows * (self.in_dim + 2 * self.out_dim) * itemsize

    def reference(self, input: Array, weight: Weight) -> Array:
        heads = input.reshape(self.n_tokens, self.num_heads, self.in_dim)
        return heads_linear(heads, weight).reshape(self.n_tokens, -1)


class SdpaLatentCausal(Op):
    """Attend causally in the latent space, over a cache whose last T rows are new.

    A score is the sum of two products: ``q`` ``[N, H * L]`` with a latent row, and
    ``q_pe`` ``[N, H * R]`` with a rope key. The output is a weighted sum of latent
    rows. ``mask`` and ``start`` are as in ``SdpaCausalTiled``.
    """

    q: In[LatentQueryBuf]
    q_pe: In[QRopeBuf]
    latent: In[KvCacheKBuf]
    rope: In[KvCacheVBuf]
    mask: In[AttnMaskBuf] | None = None
    start: In[StartPosBuf] | None = None
    context: Out[LatentContextBuf]
    n_tokens: int
    n_seqs: int = 1
    num_heads: int
    latent_dim: int
    rope_dim: int
    softmax_scale: float

    def shapes(self) -> dict[str, Shape]:
        n, heads, seqs = self.n_tokens, self.num_heads, self.n_seqs
        return {
            "q": (n, heads * self.latent_dim),
            "q_pe": (n, heads * self.rope_dim),
            "latent": (seqs, 1, None, self.latent_dim),
            "rope": (seqs, 1, None, self.rope_dim),
            "mask": (None, 1, n // seqs, None),
            "start": (seqs,),
            "context": (n, heads * self.latent_dim),
        }

    def index_ranges(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, range]:
        last = shapes["latent"][2] - self.n_tokens // self.n_seqs
        return {"start": range(last + 1)}

    def cost(self) -> Cost:
        """Count only the T new rows: the cache's length is data, not a field."""
        t = self.n_tokens // self.n_seqs
        pairs = self.n_seqs * self.num_heads * t * (t + 1) // 2
        width = self.num_heads * (2 * self.latent_dim + self.rope_dim)
        rows = self.n_tokens * (width + self.latent_dim + self.rope_dim)
        return Cost(
            flops=2 * pairs * (2 * self.latent_dim + self.rope_dim), bytes=4 * rows
        )

    def scratch_bytes(self, itemsize: int) -> int:
        """Count all scores twice where MLX computes them: it has no query blocks."""
        t = self.n_tokens // self.n_seqs
        together = min(t, QUERY_BLOCK) if device.prefers_host_arrays() else t
        scores = self.n_seqs * self.num_heads * together * t
        rows = self.n_tokens * self.num_heads * (3 * self.latent_dim + self.rope_dim)
        return (2 * scores + rows) * itemsize

    def reference(
        self,
        q: Array,
        q_pe: Array,
        latent: Array,
        rope: Array,
        mask: Array | None,
        start: Array | None,
    ) -> Array:
        if start is not None:
            mask = seen_rows(start, self.n_tokens // self.n_seqs, latent.shape[2])
        queries, placed = (
            split_heads(x, self.n_seqs, self.num_heads) for x in (q, q_pe)
        )
        scale, beside = self.softmax_scale, (placed, rope)
        attended = attention(queries, latent, latent, scale, mask, beside=beside)
        return join_heads(attended)
