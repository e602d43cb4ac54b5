"""Gated DeltaNet: causal convolution, decay, and the delta rule in two forms.

Letters: N = B sequences x T tokens, Hk key heads, Hv value heads, dk and dv their
widths, C chunk length. State S is ``[B, Hv, dv, dk]`` in float32. Source: Yang et al.,
Gated Delta Networks (2024), for both forms.
"""

from __future__ import annotations

import numpy as np

from ...experts.weights import Weight
from ..graph.buffers import Shape
from ..graph.op import Cost, In, InOut, Op, OpFields, Out, WeightRef
from ..graph.roles import (
    AlphaStackBuf,
    BetaAlphaStackBuf,
    BetaGateBuf,
    BetaStackBuf,
    ConvOutBuf,
    ConvStateBuf,
    DeltaOutBuf,
    DeltaStateBuf,
    GDecayBuf,
    QkvStackBuf,
    QkvzStackBuf,
    SeqLengthsBuf,
    SeqMaskBuf,
    ZStackBuf,
)
from .functions import Array, detached, float32, namespace, sigmoid, silu


class PartKeyHeadsNTokens(Op):
    """Reorder projections that are grouped by key head.

    For each key head ``qkvz`` has its q, its k, the v of its value heads and their z;
    ``ba`` has the b of its value heads and their alpha. The outputs hold all heads of
    one kind together.
    """

    qkvz: In[QkvzStackBuf]
    ba: In[BetaAlphaStackBuf]
    qkv_out: Out[QkvStackBuf]
    z_out: Out[ZStackBuf]
    beta_out: Out[BetaStackBuf]
    alpha_out: Out[AlphaStackBuf]
    num_k_heads: int
    num_v_heads: int
    key_dim: int
    value_dim: int
    n_tokens: int

    def shapes(self) -> dict[str, Shape]:
        n, heads = self.n_tokens, self.num_v_heads
        keys, values = self.num_k_heads * self.key_dim, heads * self.value_dim
        return {
            "qkvz": (n, 2 * keys + 2 * values),
            "ba": (n, 2 * heads),
            "qkv_out": (n, 2 * keys + values),
            "z_out": (n, values),
            "beta_out": (n, heads),
            "alpha_out": (n, heads),
        }

    def cost(self) -> Cost:
        width = self.num_k_heads * self.key_dim + self.num_v_heads * self.value_dim
        return Cost(bytes=16 * self.n_tokens * (width + self.num_v_heads))

    def reference(self, qkvz: Array, ba: Array) -> tuple[Array, ...]:
        return part_key_heads(qkvz, ba, self.num_k_heads, self.key_dim)


def part_key_heads(
    qkvz: Array, ba: Array, num_k_heads: int, key_dim: int
) -> tuple[Array, ...]:
    """Reorder rows that are grouped by key head as ``PartKeyHeadsNTokens`` does."""
    n, hk, dk = len(qkvz), num_k_heads, key_dim
    each, gates = qkvz.reshape(n, hk, -1), ba.reshape(n, hk, -1)
    per_key = gates.shape[2] // 2
    z_at = dk + each.shape[2] // 2
    columns = (slice(dk), slice(dk, 2 * dk), slice(2 * dk, z_at))
    qkv = [each[..., part].reshape(n, -1) for part in columns]
    return (
        namespace(qkvz).concatenate(qkv, axis=1),
        each[..., z_at:].reshape(n, -1),
        gates[..., :per_key].reshape(n, -1),
        gates[..., per_key:].reshape(n, -1),
    )


class Conv1dStepNTokens(Op):
    """Convolve each channel causally over history and chunk, then apply SiLU.

    ``conv_state`` ``[B, W - 1, C]`` holds the last inputs before the chunk, and then
    the chunk's last inputs. Masked tokens count as zeros. With ``lengths`` a sequence
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
        return 5 * self.n_tokens * self.conv_dim * itemsize

    def reference(
        self,
        qkv_in: Array,
        conv_state: Array,
        mask: Array | None,
        lengths: Array | None,
        weight: Weight,
    ) -> tuple[Array, Array]:
        inputs = conv_inputs(qkv_in, conv_state, mask)
        state = last_inputs(inputs, self.kernel_size - 1, lengths)
        return state, convolved(inputs, weight.w[..., 0]).reshape(qkv_in.shape)


def conv_inputs(x: Array, state: Array, mask: Array | None) -> Array:
    """Return the history and chunk of each sequence, ``[B, W - 1 + T, C]``."""
    xp, chunk = namespace(x), x.reshape(len(state), -1, x.shape[1])
    if mask is not None:
        chunk = xp.where(mask[..., None], chunk, 0)
    return xp.concatenate([state.astype(chunk.dtype), chunk], axis=1)


def last_inputs(inputs: Array, keep: int, lengths: Array | None) -> Array:
    """Return the history after the chunk, or after its first ``lengths`` tokens."""
    if lengths is None:
        return detached(inputs[:, -keep:])
    xp = namespace(inputs)
    ends = xp.clip(lengths, 0, inputs.shape[1] - keep)[:, None] + xp.arange(keep)
    return xp.take_along_axis(inputs, ends[..., None], axis=1)


def convolved(inputs: Array, weight: Array) -> Array:
    """Convolve by ``[C, W]`` and apply SiLU; return the chunk's ``[B, T, C]``."""
    taps, width = weight.T, weight.shape[1]
    t = inputs.shape[1] - width + 1
    out = inputs[:, :t] * taps[0]
    for i in range(1, width):
        out += inputs[:, i : i + t] * taps[i]
    return silu(out)


class ComputeDecayBetaNTokens(Op):
    """Return decay ``exp(-exp(A_log) softplus(a + dt_bias))`` and ``sigmoid(b)``.

    A masked token gets decay 1 and beta 0, which leave the state as it is.
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
        alpha_in: Array,
        beta_in: Array,
        mask: Array | None,
        a_log: Weight,
        dt_bias: Weight,
    ) -> tuple[Array, Array]:
        return decay_beta(alpha_in, beta_in, a_log.w, dt_bias.w, mask)


def decay_beta(
    alpha: Array, b: Array, a_log: Array, dt_bias: Array, mask: Array | None
) -> tuple[Array, Array]:
    """Return decay and beta as ``ComputeDecayBetaNTokens`` does."""
    xp = namespace(alpha)
    step = xp.logaddexp(float32(alpha + dt_bias), xp.zeros(1, xp.float32))
    g, beta = xp.exp(-xp.exp(float32(a_log)) * step), sigmoid(float32(b))
    if mask is not None:
        kept = float32(mask.reshape(-1, 1))
        g, beta = g * kept + (1 - kept), beta * kept
    return g, beta


class _DeltaRule(OpFields):
    """The fields and shapes of both forms of the delta rule."""

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
        """Return the bytes of state, inputs and outputs in float32."""
        state = 2 * self.n_seqs * self.num_v_heads * self.value_dim * self.key_dim
        row = 2 * self.num_k_heads * self.key_dim
        row += 2 * self.num_v_heads * (self.value_dim + 1)
        return 4 * (state + self.n_tokens * row)


def delta_parts(
    qkv: Array, state: Array, num_k_heads: int
) -> tuple[Array, Array, Array]:
    """Split rows into float32 q, k ``[B, T, Hk, dk]`` and v ``[B, T, Hv, dv]``."""
    n_seqs, heads, dv, dk = state.shape
    rows, width = float32(qkv).reshape(n_seqs, -1, qkv.shape[1]), num_k_heads * dk
    keys = (n_seqs, rows.shape[1], num_k_heads, dk)
    q, k = rows[..., :width].reshape(keys), rows[..., width : 2 * width].reshape(keys)
    return q, k, rows[..., 2 * width :].reshape(*keys[:2], heads, dv)


class GatedDeltaNetStepNTokens(_DeltaRule, Op):
    """Run the delta rule token by token; meant for T = 1.

    For each value head: S = g S; S = S + beta (v - S k) k^T; y = S q. Value head h
    reads key head ``h // (Hv / Hk)``.
    """

    def cost(self) -> Cost:
        per_token = self.num_v_heads * self.value_dim * self.key_dim
        return Cost(flops=7 * self.n_tokens * per_token, bytes=self.row_bytes())

    def scratch_bytes(self, itemsize: int) -> int:
        return 8 * self.n_seqs * self.num_v_heads * self.value_dim * self.key_dim

    def reference(
        self,
        state: Array,
        conv_out: Array,
        g_decay: Array,
        beta_gate: Array,
    ) -> tuple[Array, Array]:
        return delta_rule(conv_out, state, g_decay, beta_gate, self.num_k_heads)


def delta_rule(
    qkv: Array, state: Array, g: Array, beta: Array, num_k_heads: int
) -> tuple[Array, Array]:
    """Return state and rows ``[N, Hv * dv]`` as ``GatedDeltaNetStepNTokens`` does."""
    xp = namespace(qkv)
    q, k, v = delta_parts(qkv, state, num_k_heads)
    n_seqs, t = q.shape[:2]
    repeats = state.shape[1] // num_k_heads
    if repeats > 1:
        q, k = xp.repeat(q, repeats, axis=2), xp.repeat(k, repeats, axis=2)
    g, beta = (x.reshape(n_seqs, t, -1, 1) for x in (g, beta))
    outs = []
    for i in range(t):
        # The new state's product with q is computed from the old state's: S is read
        # once.
        key, query = k[:, i], q[:, i]
        decay, overlap = g[:, i], (key * query).sum(-1)[..., None]
        recalled = (state @ key[..., None])[..., 0] * decay
        delta = beta[:, i] * (v[:, i] - recalled)
        read = (state @ query[..., None])[..., 0] * decay
        outs.append(read + delta * overlap)
        state = state * decay[..., None]
        state += delta[..., None] * key[:, :, None]
    out = outs[0] if t == 1 else xp.stack(outs, axis=1)
    return state, out.reshape(n_seqs * t, -1).astype(qkv.dtype)


class GatedDeltaNetChunkwise(_DeltaRule, Op):
    """Run the delta rule in chunks of C tokens with matrix products.

    With G the running product of decays within a chunk and K, Q, V its rows, the
    corrections D solve ``(I + tril(beta G_i/G_j K K^T, -1)) D = beta (V - G K S^T)``;
    then ``Y = G Q S^T + tril(G_i/G_j Q K^T) D`` and the state becomes
    ``G_C S + D^T (G_C/G K)``. Only the update of the state is sequential.
    """

    chunk_size: int = 64

    def cost(self) -> Cost:
        c, dk, dv = self.chunk_size, self.key_dim, self.value_dim
        per_token = c * (3 * dk + 2 * dv) + 3 * dk * dv + c * c // 3
        flops = 2 * self.n_tokens * self.num_v_heads * per_token
        return Cost(flops=flops, bytes=self.row_bytes())

    def scratch_bytes(self, itemsize: int) -> int:
        c, dk, dv = self.chunk_size, self.key_dim, self.value_dim
        padded = -(-(self.n_tokens // self.n_seqs) // c) * c * self.n_seqs
        rows = 3 * dk + 4 * dv + 7 * c
        return 4 * padded * self.num_v_heads * rows

    def reference(
        self,
        state: Array,
        conv_out: Array,
        g_decay: Array,
        beta_gate: Array,
    ) -> tuple[Array, Array]:
        xp = namespace(conv_out)
        q, k, v, log_g, beta = self._chunks(conv_out, state, g_decay, beta_gate)
        total = xp.cumsum(log_g, axis=-1)
        lower = xp.tril(xp.ones((self.chunk_size, self.chunk_size), xp.float32))
        # Differences of totals would lose precision: strong decay makes totals large.
        gaps = xp.cumsum(log_g[..., None] * xp.tril(lower, -1), axis=-2)
        decay = xp.exp(gaps) * lower
        keys_t = k.swapaxes(-1, -2)
        coupling = (k @ keys_t) * decay * beta[..., None]
        solve = inverse_unit_lower(coupling)
        grown = xp.exp(total)[..., None]
        from_values = solve @ (v * beta[..., None])
        from_state = solve @ (k * (beta[..., None] * grown))
        mixing = (q @ keys_t) * decay
        queries = q * grown
        tail = k * decay[..., -1, :, None]
        end = xp.exp(total[..., -1])[..., None, None]
        heads = (self.num_k_heads, self.num_v_heads // self.num_k_heads)
        s = state.reshape(self.n_seqs, *heads, self.value_dim, self.key_dim)
        outs = []
        for i in range(q.shape[1]):
            s_t = s.swapaxes(-1, -2)
            fixes = from_values[:, i] - from_state[:, i] @ s_t
            outs.append(queries[:, i] @ s_t + mixing[:, i] @ fixes)
            s = end[:, i] * s + fixes.swapaxes(-1, -2) @ tail[:, i]
        rows = self._rows(xp.concatenate(outs, axis=-2))
        return s.reshape(state.shape), rows.astype(conv_out.dtype)

    def _chunks(
        self, conv_out: Array, state: Array, g_decay: Array, beta_gate: Array
    ) -> tuple[Array, ...]:
        """Arrange rows as ``[B, chunks, Hk, Hv / Hk, C, ...]``, zero-padded.

        A padding token has decay 1 and beta 0, which change nothing.
        """
        xp = namespace(conv_out)
        q, k, v = delta_parts(conv_out, state, self.num_k_heads)
        n_seqs, t = q.shape[:2]
        # A decay of 0 has no logarithm.
        tiny = float(np.finfo(np.float32).tiny)
        log_g = xp.log(xp.maximum(g_decay, tiny)).reshape(n_seqs, t, -1, 1)
        beta = beta_gate.reshape(n_seqs, t, -1, 1)
        pad = -t % self.chunk_size
        n_chunks = (t + pad) // self.chunk_size

        def arrange(x: Array) -> Array:
            if pad:
                x = xp.pad(x, [(0, 0), (0, pad), (0, 0), (0, 0)])
            heads, width = x.shape[2:]
            x = x.reshape(n_seqs, n_chunks, self.chunk_size, heads, width)
            x = x.swapaxes(2, 3)
            return x.reshape(
                n_seqs, n_chunks, self.num_k_heads, -1, self.chunk_size, width
            )

        log_g, beta = arrange(log_g)[..., 0], arrange(beta)[..., 0]
        return arrange(q), arrange(k), arrange(v), log_g, beta

    def _rows(self, out: Array) -> Array:
        """Reshape ``[B, Hk, Hv / Hk, chunks * C, dv]`` to rows ``[N, Hv * dv]``."""
        t = self.n_tokens // self.n_seqs
        heads = out.reshape(self.n_seqs, self.num_v_heads, -1, self.value_dim)
        return heads[:, :, :t].swapaxes(1, 2).reshape(self.n_tokens, -1)


def inverse_unit_lower(a: Array) -> Array:
    """Invert ``I + tril(a, -1)`` for ``[..., C, C]``, C a power of two.

    It joins blocks of doubling size: two neighbours with inverses X and Y give
    ``[[X, 0], [-Y A X, Y]]``. This is back substitution, as stable, in matrix products.
    """
    xp, batch, size = namespace(a), a.shape[:-2], a.shape[-1]
    inverse = xp.ones((*batch, size, 1, 1), a.dtype)
    half = 1
    while half < size:
        n_blocks = size // (2 * half)
        blocks = a.reshape(*batch, n_blocks, 2 * half, n_blocks, 2 * half)
        corner = xp.stack(
            [blocks[..., i, half:, i, :half] for i in range(n_blocks)], axis=-3
        )
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        below = -(second @ corner @ first)
        top = xp.concatenate([first, xp.zeros_like(first)], axis=-1)
        bottom = xp.concatenate([below, second], axis=-1)
        inverse = xp.concatenate([top, bottom], axis=-2)
        half *= 2
    return inverse[..., 0, :, :]
