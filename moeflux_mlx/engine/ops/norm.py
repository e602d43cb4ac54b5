"""RMS norms of rows, of heads, of q and k without a weight, and gated ones.

Letters: N tokens of all sequences together, D row width, H heads, d head width.
"""

from __future__ import annotations

from ...experts.weights import Weight
from ..graph.buffers import Shape
from ..graph.op import Cost, In, InOut, Op, Out, WeightRef
from ..graph.roles import (
    ConvOutBuf,
    DeltaOutBuf,
    RmsNormIn,
    RmsNormOut,
    ValueOutBuf,
    ZStackBuf,
)
from .functions import Array, float32, namespace, rms_norm, silu


class RmsNormBf16NTokens(Op):
    """Return ``x * rsqrt(mean(x^2) + eps) * weight`` of rows ``[N, D]`` of any type."""

    x: In[RmsNormIn]
    weight: WeightRef
    out: Out[RmsNormOut]
    dim: int
    n_tokens: int
    eps: float

    def shapes(self) -> dict[str, Shape]:
        rows = (self.n_tokens, self.dim)
        return {"x": rows, "weight": (self.dim,), "out": rows}

    def cost(self) -> Cost:
        n = self.n_tokens * self.dim
        return Cost(flops=4 * n, bytes=8 * n + self.weight.n_bytes)

    def scratch_bytes(self, itemsize: int) -> int:
        return self.n_tokens * self.dim * itemsize

    def reference(self, x: Array, weight: Weight) -> Array:
        return rms_norm(x, weight.w, self.eps)


class RmsNormPerHeadNTokens(Op):
    """Normalise every head's slice of ``[N, H * d]`` with one shared weight, in place.

    It is the ``q_norm`` and ``k_norm`` of full attention.
    """

    x: InOut[RmsNormIn]
    weight: WeightRef
    num_heads: int
    head_dim: int
    n_tokens: int
    eps: float

    def shapes(self) -> dict[str, Shape]:
        rows = (self.n_tokens, self.num_heads * self.head_dim)
        return {"x": rows, "weight": (self.head_dim,)}

    def cost(self) -> Cost:
        n = self.n_tokens * self.num_heads * self.head_dim
        return Cost(flops=4 * n, bytes=8 * n + self.weight.n_bytes)

    def scratch_bytes(self, itemsize: int) -> int:
        return self.n_tokens * self.num_heads * self.head_dim * itemsize

    def reference(self, x: Array, weight: Weight) -> Array:
        return rms_norm_heads(x, weight.w, self.eps)


def rms_norm_heads(x: Array, weight: Array, eps: float) -> Array:
    """Normalise each head of ``[N, H * d]`` with a weight ``[d]``."""
    heads = x.reshape(len(x), -1, weight.size)
    return rms_norm(heads, weight, eps).reshape(x.shape)


class RmsNormQkNTokens(Op):
    """Scale q and k of each ``q|k|v`` row to unit length, q by ``d^-1/2``, in place.

    Each head gets an RMS norm without a weight; then q is multiplied by ``d^-1`` and k
    by ``d^-1/2``. ``eps`` is added to the sum of squares, as in mlx-lm.
    """

    x: InOut[ConvOutBuf]
    num_k_heads: int
    key_dim: int
    key_offset_per_token: int
    per_token_total: int
    n_tokens: int
    eps: float = 1e-6

    def shapes(self) -> dict[str, Shape]:
        return {"x": (self.n_tokens, self.per_token_total)}

    def cost(self) -> Cost:
        n = 2 * self.n_tokens * self.num_k_heads * self.key_dim
        return Cost(flops=5 * n, bytes=8 * n)

    def scratch_bytes(self, itemsize: int) -> int:
        return self.n_tokens * self.per_token_total * itemsize

    def reference(self, x: Array) -> Array:
        sizes = self.num_k_heads, self.key_dim, self.key_offset_per_token
        return unit_qk(x, *sizes, self.eps)


def unit_qk(
    x: Array, num_k_heads: int, key_dim: int, key_offset: int, eps: float
) -> Array:
    """Scale q and k of rows as ``RmsNormQkNTokens`` does."""
    width, start, scale = num_k_heads * key_dim, key_offset, key_dim**-0.5

    def unit(part: Array) -> Array:
        heads = part.reshape(len(x), num_k_heads, key_dim)
        return rms_norm(heads, None, eps / key_dim).reshape(part.shape)

    parts = [
        unit(x[:, :width]) * scale**2,
        x[:, width:start],
        unit(x[:, start : start + width]) * scale,
        x[:, start + width :],
    ]
    return namespace(x).concatenate([p for p in parts if p.shape[1]], axis=1)


class GatedRmsNormNTokens(Op):
    """Return ``rms_norm(values) * weight * silu(z)`` for each value head."""

    values: In[DeltaOutBuf]
    z: In[ZStackBuf]
    weight: WeightRef
    output: Out[ValueOutBuf]
    num_v_heads: int
    value_dim: int
    n_tokens: int
    eps: float

    def shapes(self) -> dict[str, Shape]:
        rows = (self.n_tokens, self.num_v_heads * self.value_dim)
        return {"values": rows, "z": rows, "weight": (self.value_dim,), "output": rows}

    def cost(self) -> Cost:
        n = self.n_tokens * self.num_v_heads * self.value_dim
        return Cost(flops=9 * n, bytes=12 * n + self.weight.n_bytes)

    def scratch_bytes(self, itemsize: int) -> int:
        return 4 * self.n_tokens * self.num_v_heads * self.value_dim

    def reference(self, values: Array, z: Array, weight: Weight) -> Array:
        return gated_rms_norm(values, z, weight.w, self.eps)


def gated_rms_norm(values: Array, z: Array, weight: Array, eps: float) -> Array:
    """Return ``rms_norm(values) * weight * silu(z)`` per head of ``[N, H * d]``."""
    normed = rms_norm_heads(values, weight, eps)
    return (silu(float32(z)) * float32(normed)).astype(values.dtype)
