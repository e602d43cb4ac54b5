"""Gated DeltaNet: causal convolution, decay, and the delta rule in two forms.

Letters: N = B sequences x T tokens, Hk key heads, Hv value heads, dk and dv their
widths, C chunk length. State S is ``[B, Hv, dv, dk]`` in float32.
Source: Yang et al., Gated Delta Networks (2024); chunked form after the same.
"""

from __future__ import annotations

import mlx.core as mx

from ..graph.buffers import (
    AlphaStackBuf,
    BetaGateBuf,
    BetaStackBuf,
    ConvOutBuf,
    ConvStateBuf,
    DeltaOutBuf,
    DeltaStateBuf,
    GDecayBuf,
    QkvStackBuf,
    SeqLengthsBuf,
    SeqMaskBuf,
    Shape,
)
from ..graph.op import Cost, In, InOut, Op, Out, WeightRef
from ..weights import Weight
from .products import matmul


class Conv1dStepNTokens(Op):
    """Convolve each channel causally over history and chunk, then SiLU.

    ``conv_state`` ``[B, W - 1, C]`` holds the last inputs before the chunk and becomes
    those of its end. Masked tokens count as zero inputs; with ``lengths`` a sequence
    ends after ``lengths[b]`` tokens of this chunk.
    """

    qkv_in: In[QkvStackBuf]
    conv_state: InOut[ConvStateBuf]
    weight: WeightRef
    mask: In[SeqMaskBuf] | None = None
    lengths: In[SeqLengthsBuf] | None = None
    conv_out: Out[ConvOutBuf]
    conv_dim: int
    kernel_size: int = 4
    n_tokens: int
    n_seqs: int = 1

    def shapes(self) -> dict[str, Shape]:
        rows = (self.n_tokens, self.conv_dim)
        return {
            "qkv_in": rows,
            "conv_state": (self.n_seqs, self.kernel_size - 1, self.conv_dim),
            "weight": (self.conv_dim, self.kernel_size, 1),
            "mask": (self.n_seqs, self.n_tokens // self.n_seqs),
            "lengths": (self.n_seqs,),
            "conv_out": rows,
        }

    def cost(self) -> Cost:
        n = self.n_tokens * self.conv_dim
        state = self.n_seqs * (self.kernel_size - 1) * self.conv_dim
        flops = (2 * self.kernel_size + 4) * n
        return Cost(flops=flops, bytes=8 * (n + state) + self.weight.n_bytes)

    def scratch_bytes(self, itemsize: int) -> int:
        return 3 * self.n_tokens * self.conv_dim * itemsize

    def reference(
        self,
        qkv_in: mx.array,
        conv_state: mx.array,
        mask: mx.array | None,
        lengths: mx.array | None,
        weight: Weight,
    ) -> tuple[mx.array, mx.array]:
        t, keep = self.n_tokens // self.n_seqs, self.kernel_size - 1
        chunk = qkv_in.reshape(self.n_seqs, t, self.conv_dim)
        if mask is not None:
            chunk = mx.where(mask[..., None], chunk, 0)
        inputs = mx.concatenate([conv_state.astype(chunk.dtype), chunk], axis=1)
        if lengths is None:
            state = mx.contiguous(inputs[:, -keep:])
        else:
            ends = mx.clip(lengths, 0, t)[:, None] + mx.arange(keep)
            state = mx.take_along_axis(inputs, ends[..., None], axis=1)
        taps = weight.w[..., 0].T
        out = inputs[:, :t] * taps[0]
        for i in range(1, self.kernel_size):
            out = out + inputs[:, i : i + t] * taps[i]
        out = out * mx.sigmoid(out)
        return state, out.reshape(qkv_in.shape)


class ComputeDecayBetaNTokens(Op):
    """Return decay ``exp(-exp(A_log) softplus(a + dt_bias))`` and ``sigmoid(b)``.

    A masked token gets decay 1 and beta 0: it leaves the state as it is.
    """

    alpha_in: In[AlphaStackBuf]
    beta_in: In[BetaStackBuf]
    mask: In[SeqMaskBuf] | None = None
    a_log: WeightRef
    dt_bias: WeightRef
    g_decay_out: Out[GDecayBuf]
    beta_gate_out: Out[BetaGateBuf]
    num_v_heads: int
    n_tokens: int
    n_seqs: int = 1

    def shapes(self) -> dict[str, Shape]:
        rows, heads = (self.n_tokens, self.num_v_heads), (self.num_v_heads,)
        buffers = ("alpha_in", "beta_in", "g_decay_out", "beta_gate_out")
        return {
            **dict.fromkeys(buffers, rows),
            "mask": (self.n_seqs, self.n_tokens // self.n_seqs),
            "a_log": heads,
            "dt_bias": heads,
        }

    def cost(self) -> Cost:
        n = self.n_tokens * self.num_v_heads
        weights = self.a_log.n_bytes + self.dt_bias.n_bytes
        return Cost(flops=12 * n, bytes=16 * n + weights)

    def reference(
        self,
        alpha_in: mx.array,
        beta_in: mx.array,
        mask: mx.array | None,
        a_log: Weight,
        dt_bias: Weight,
    ) -> tuple[mx.array, mx.array]:
        rate = mx.exp(a_log.w.astype(mx.float32))
        step = mx.logaddexp((alpha_in + dt_bias.w).astype(mx.float32), mx.array(0.0))
        g, beta = mx.exp(-rate * step), mx.sigmoid(beta_in.astype(mx.float32))
        if mask is not None:
            kept = mask.reshape(-1, 1)
            g, beta = mx.where(kept, g, 1.0), mx.where(kept, beta, 0.0)
        return g, beta


class _DeltaRule:
    """What both forms of the delta rule share: shapes, cost and the row's parts."""

    num_v_heads: int
    num_k_heads: int
    key_dim: int
    value_dim: int
    n_tokens: int
    n_seqs: int

    def shapes(self) -> dict[str, Shape]:
        heads, dk, dv = self.num_v_heads, self.key_dim, self.value_dim
        return {
            "state": (self.n_seqs, heads, dv, dk),
            "conv_out": (self.n_tokens, 2 * self.num_k_heads * dk + heads * dv),
            "g_decay": (self.n_tokens, heads),
            "beta_gate": (self.n_tokens, heads),
            "output": (self.n_tokens, heads * dv),
        }

    def row_bytes(self) -> int:
        """Bytes of state, inputs and outputs in float32."""
        state = 2 * self.n_seqs * self.num_v_heads * self.value_dim * self.key_dim
        row = 2 * self.num_k_heads * self.key_dim
        row += 2 * self.num_v_heads * (self.value_dim + 1)
        return 4 * (state + self.n_tokens * row)

    def parts(self, conv_out: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Split rows into q, k ``[B, T, Hk, dk]`` and v ``[B, T, Hv, dv]`` in float32."""
        t, width = self.n_tokens // self.n_seqs, self.num_k_heads * self.key_dim
        rows = conv_out.astype(mx.float32).reshape(self.n_seqs, t, -1)
        q, k, v = mx.split(rows, [width, 2 * width], axis=-1)
        keys = (self.n_seqs, t, self.num_k_heads, self.key_dim)
        values = (self.n_seqs, t, self.num_v_heads, self.value_dim)
        return q.reshape(keys), k.reshape(keys), v.reshape(values)


class GatedDeltaNetStepNTokens(_DeltaRule, Op):
    """Run the delta rule token by token; meant for T = 1.

    S = g S; S = S + beta (v - S k) k^T; y = S q, per value head, whose key head is
    ``head // (Hv / Hk)``.
    """

    state: InOut[DeltaStateBuf]
    conv_out: In[ConvOutBuf]
    g_decay: In[GDecayBuf]
    beta_gate: In[BetaGateBuf]
    output: Out[DeltaOutBuf]
    num_v_heads: int
    num_k_heads: int
    key_dim: int
    value_dim: int
    n_tokens: int
    n_seqs: int = 1

    def cost(self) -> Cost:
        per_token = self.num_v_heads * self.value_dim * self.key_dim
        return Cost(flops=7 * self.n_tokens * per_token, bytes=self.row_bytes())

    def scratch_bytes(self, itemsize: int) -> int:
        return 8 * self.n_seqs * self.num_v_heads * self.value_dim * self.key_dim

    def reference(
        self,
        state: mx.array,
        conv_out: mx.array,
        g_decay: mx.array,
        beta_gate: mx.array,
    ) -> tuple[mx.array, mx.array]:
        q, k, v = self.parts(conv_out)
        n_seqs, t = q.shape[:2]
        repeats = self.num_v_heads // self.num_k_heads
        if repeats > 1:
            q, k = mx.repeat(q, repeats, axis=2), mx.repeat(k, repeats, axis=2)
        g = g_decay.reshape(n_seqs, t, -1, 1)
        beta = beta_gate.reshape(n_seqs, t, -1, 1)
        outs = []
        for i in range(t):
            state = state * g[:, i, :, :, None]
            key, query = k[:, i, :, None], q[:, i, :, None]
            delta = beta[:, i] * (v[:, i] - (state * key).sum(-1))
            state = state + delta[..., None] * key
            outs.append((state * query).sum(-1))
        out = outs[0] if t == 1 else mx.stack(outs, axis=1)
        return state, out.reshape(self.n_tokens, -1).astype(conv_out.dtype)


class GatedDeltaNetChunkwise(_DeltaRule, Op):
    """Run the delta rule in chunks of C tokens with matrix products.

    With G the running product of decays within a chunk and K, Q, V its rows, the
    corrections D solve ``(I + tril(beta G_i/G_j K K^T, -1)) D = beta (V - G K S^T)``;
    then ``Y = G Q S^T + tril(G_i/G_j Q K^T) D`` and the state becomes
    ``G_C S + D^T (G_C/G K)``. Only the state's way from chunk to chunk is sequential.
    """

    state: InOut[DeltaStateBuf]
    conv_out: In[ConvOutBuf]
    g_decay: In[GDecayBuf]
    beta_gate: In[BetaGateBuf]
    output: Out[DeltaOutBuf]
    num_v_heads: int
    num_k_heads: int
    key_dim: int
    value_dim: int
    n_tokens: int
    n_seqs: int = 1
    chunk_size: int = 64

    def cost(self) -> Cost:
        c, dk, dv = self.chunk_size, self.key_dim, self.value_dim
        per_token = c * (3 * dk + 2 * dv) + 3 * dk * dv + c * c // 3
        flops = 2 * self.n_tokens * self.num_v_heads * per_token
        return Cost(flops=flops, bytes=self.row_bytes())

    def scratch_bytes(self, itemsize: int) -> int:
        c, dk, dv = self.chunk_size, self.key_dim, self.value_dim
        padded = -(-(self.n_tokens // self.n_seqs) // c) * c * self.n_seqs
        rows = 3 * dk + 4 * dv + 3 * c
        return 4 * padded * self.num_v_heads * rows

    def reference(
        self,
        state: mx.array,
        conv_out: mx.array,
        g_decay: mx.array,
        beta_gate: mx.array,
    ) -> tuple[mx.array, mx.array]:
        q, k, v, log_g, beta = self._chunks(conv_out, g_decay, beta_gate)
        total = mx.cumsum(log_g, axis=-1)
        lower = mx.tril(mx.ones((self.chunk_size, self.chunk_size), mx.bool_))
        gaps = mx.where(lower, total[..., :, None] - total[..., None, :], -mx.inf)
        decay = mx.exp(gaps)
        keys_t = k.swapaxes(-1, -2)
        coupling = matmul(k, keys_t) * decay * beta[..., None]
        solve = inverse_unit_lower(coupling)
        grown = mx.exp(total)[..., None]
        from_values = matmul(solve, v * beta[..., None])
        from_state = matmul(solve, k * (beta[..., None] * grown))
        mixing = matmul(q, keys_t) * decay
        queries = q * grown
        tail = k * mx.exp(total[..., -1:] - total)[..., None]
        end = mx.exp(total[..., -1])[..., None, None]
        heads = (self.num_k_heads, self.num_v_heads // self.num_k_heads)
        s = mx.unflatten(state, 1, heads)
        outs = []
        for i in range(q.shape[1]):
            s_t = s.swapaxes(-1, -2)
            fixes = from_values[:, i] - matmul(from_state[:, i], s_t)
            outs.append(matmul(queries[:, i], s_t) + matmul(mixing[:, i], fixes))
            s = end[:, i] * s + matmul(fixes.swapaxes(-1, -2), tail[:, i])
        return s.flatten(1, 2), self._rows(outs).astype(conv_out.dtype)

    def _chunks(
        self, conv_out: mx.array, g_decay: mx.array, beta_gate: mx.array
    ) -> tuple[mx.array, ...]:
        """Arrange rows as ``[B, chunks, Hk, Hv / Hk, C, ...]``, zero-padded.

        A padding token has decay 1 and beta 0 and changes nothing.
        """
        q, k, v = self.parts(conv_out)
        n_seqs, t = q.shape[:2]
        tiny = mx.finfo(mx.float32).smallest_normal
        log_g = mx.log(mx.maximum(g_decay, tiny)).reshape(n_seqs, t, -1, 1)
        beta = beta_gate.reshape(n_seqs, t, -1, 1)
        pad = -t % self.chunk_size

        def arrange(x: mx.array) -> mx.array:
            if pad:
                x = mx.pad(x, [(0, 0), (0, pad), (0, 0), (0, 0)])
            x = mx.unflatten(x, 1, (-1, self.chunk_size)).swapaxes(2, 3)
            return mx.unflatten(x, 2, (self.num_k_heads, -1))

        return (
            arrange(q),
            arrange(k),
            arrange(v),
            arrange(log_g)[..., 0],
            arrange(beta)[..., 0],
        )

    def _rows(self, outs: list[mx.array]) -> mx.array:
        """Turn chunks of ``[B, Hk, Hv / Hk, C, dv]`` into rows ``[N, Hv * dv]``."""
        t = self.n_tokens // self.n_seqs
        joined = mx.concatenate(outs, axis=-2).flatten(1, 2)[:, :, :t]
        return joined.swapaxes(1, 2).reshape(self.n_tokens, -1)


def inverse_unit_lower(a: mx.array) -> mx.array:
    """Invert ``I + tril(a, -1)`` for ``[..., C, C]``, C a power of two.

    Works by blocks of doubling size, ``[[X, 0], [-Y A X, Y]]`` from the inverses X, Y
    of two neighbours: back substitution, so as stable, but made of products.
    """
    size = a.shape[-1]
    inverse = mx.ones((*a.shape[:-2], size, 1, 1), a.dtype)
    half = 1
    while half < size:
        n_blocks = size // (2 * half)
        blocks = a.reshape(*a.shape[:-2], n_blocks, 2 * half, n_blocks, 2 * half)
        index = mx.arange(n_blocks)
        corner = mx.moveaxis(blocks, -2, -3)[..., index, index, half:, :half]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        below = -matmul(matmul(second, corner), first)
        top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        inverse = mx.concatenate(
            [top, mx.concatenate([below, second], axis=-1)], axis=-2
        )
        half *= 2
    return inverse[..., 0, :, :]
