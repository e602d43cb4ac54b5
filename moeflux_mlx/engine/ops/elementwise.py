"""Elementwise Ops: residual, gates, SwiGLU, zeroing and de-interleaving."""

from __future__ import annotations

import mlx.core as mx

from ..graph.buffers import Shape
from ..graph.op import Cost, In, InOut, Op, Out
from ..graph.roles import (
    AttnOutBuf,
    MoeOutSumBuf,
    QBuf,
    QGateBuf,
    QProjOutBuf,
    ResidualBuf,
    ResidualIn,
    RmsNormIn,
    SharedFfnActBuf,
    SharedFfnGateBuf,
    SharedFfnUpBuf,
)
from .functions import Array, sigmoid, swiglu


class ResidualAddNTokens(Op):
    """Add half a layer's output ``a`` to the residual stream ``b``: ``[N, D]``."""

    a: In[ResidualIn]
    b: In[RmsNormIn]
    out: Out[ResidualBuf]
    n_tokens: int
    dim: int

    def shapes(self) -> dict[str, Shape]:
        return dict.fromkeys(("a", "b", "out"), (self.n_tokens, self.dim))

    def cost(self) -> Cost:
        n = self.n_tokens * self.dim
        return Cost(flops=n, bytes=12 * n)

    def reference(self, a: Array, b: Array) -> Array:
        return add(a, b)


def add(a: Array, b: Array) -> Array:
    """Return ``a + b``."""
    return a + b


class ZeroBuffer(Op):
    """Write zeros to an accumulator ``[N, D]``."""

    buf: Out[MoeOutSumBuf]
    n_tokens: int
    dim: int

    def shapes(self) -> dict[str, Shape]:
        return {"buf": (self.n_tokens, self.dim)}

    def cost(self) -> Cost:
        return Cost(bytes=4 * self.n_tokens * self.dim)

    def reference(self) -> Array:
        return mx.zeros((self.n_tokens, self.dim), mx.float32)


class SwigluFusedBatched(Op):
    """Return ``silu(gate) * up`` over ``[N, F]``, for the shared expert."""

    gate: In[SharedFfnGateBuf]
    up: In[SharedFfnUpBuf]
    out: Out[SharedFfnActBuf]
    n_tokens: int
    dim: int

    def shapes(self) -> dict[str, Shape]:
        return dict.fromkeys(("gate", "up", "out"), (self.n_tokens, self.dim))

    def cost(self) -> Cost:
        n = self.n_tokens * self.dim
        return Cost(flops=5 * n, bytes=12 * n)

    def scratch_bytes(self, itemsize: int) -> int:
        return self.n_tokens * self.dim * itemsize

    def reference(self, gate: Array, up: Array) -> Array:
        return swiglu(gate, up)


class SigmoidGateNTokens(Op):
    """Multiply attention output ``[N, D]`` by ``sigmoid(gate)``, in place."""

    x: InOut[AttnOutBuf]
    gate: In[QGateBuf]
    dim: int
    n_tokens: int

    def shapes(self) -> dict[str, Shape]:
        return dict.fromkeys(("x", "gate"), (self.n_tokens, self.dim))

    def cost(self) -> Cost:
        n = self.n_tokens * self.dim
        return Cost(flops=4 * n, bytes=12 * n)

    def scratch_bytes(self, itemsize: int) -> int:
        return 2 * self.n_tokens * self.dim * itemsize

    def reference(self, x: Array, gate: Array) -> Array:
        return sigmoid_gate(x, gate)


def sigmoid_gate(x: Array, gate: Array) -> Array:
    """Return ``x * sigmoid(gate)``."""
    return x * sigmoid(gate)


class SplitQGate(Op):
    """Split ``[N, H, 2d]``, per head q then gate, into two ``[N, H * d]``."""

    q_proj: In[QProjOutBuf]
    q_out: Out[QBuf]
    gate_out: Out[QGateBuf]
    num_heads: int
    head_dim: int
    n_tokens: int

    def shapes(self) -> dict[str, Shape]:
        width = self.num_heads * self.head_dim
        half = (self.n_tokens, width)
        return {
            "q_proj": (self.n_tokens, 2 * width),
            "q_out": half,
            "gate_out": half,
        }

    def cost(self) -> Cost:
        return Cost(bytes=16 * self.n_tokens * self.num_heads * self.head_dim)

    def reference(self, q_proj: Array) -> tuple[Array, Array]:
        return split_q_gate(q_proj, self.num_heads)


def split_q_gate(q_proj: Array, num_heads: int) -> tuple[Array, Array]:
    """Split ``[N, H * 2d]``, per head q then gate, into q and gate ``[N, H * d]``."""
    pairs = q_proj.reshape(len(q_proj), num_heads, 2, -1)
    shape = (len(q_proj), q_proj.shape[1] // 2)
    return pairs[:, :, 0].reshape(shape), pairs[:, :, 1].reshape(shape)
