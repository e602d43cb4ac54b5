"""Every Op as a function of MLX arrays, with gradients, for use in scripts.

Sizes follow from the arrays' shapes. The rows of several sequences are concatenated:
N = B sequences x T tokens. A weight is a dense array or a ``Weight`` (see
``quantize``). The forward pass uses our kernels if the machine has them. Gradients use
the Op's reference.

Every function raises GraphError, which names function and argument, for a wrong shape,
type or number, an inconsistent quantised weight, or an index out of range. Indices are
read back for this check. Inside ``mx.compile`` they have no values; an index out of
range then makes the outputs NaN.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .. import device
from ..engine.graph.experts import GraphExperts
from ..engine.ops.attention import KvCacheAppendNTokens, RopeNTokens, SdpaCausalTiled
from ..engine.ops.elementwise import (
    ResidualAddNTokens,
    SigmoidGateNTokens,
    SplitQGate,
    SwigluFusedBatched,
    ZeroBuffer,
)
from ..engine.ops.embed import EmbedGatherNTokens
from ..engine.ops.functions import to_host
from ..engine.ops.latent import HeadMatvecNTokens, MlaSplitQKv, SdpaLatentCausal
from ..engine.ops.linear_attention import (
    ComputeDecayBetaNTokens,
    Conv1dStepNTokens,
    GatedDeltaNetChunkwise,
    GatedDeltaNetStepNTokens,
    PartKeyHeadsNTokens,
)
from ..engine.ops.moe import (
    MoeBatchedPermuteFuse,
    MoeCombineResidualNTokens,
    MoeDecodeExperts,
    MoeGatherIdFuse,
    MoeNoauxTopK,
    MoeNormalizeWeights,
    MoeSoftmaxTopK,
)
from ..engine.ops.norm import (
    GatedRmsNormNTokens,
    RmsNormBf16NTokens,
    RmsNormPerHeadNTokens,
    RmsNormQkNTokens,
)
from ..engine.ops.quant import MatvecNTokens
from ..experts.compute.resident import ResidentExperts
from ..experts.weights import ExpertWeights, Quantization, Weight, has_values
from .apply import apply
from .checks import (
    Misfit,
    at_most,
    checked,
    like,
    packable,
    quantization,
    quotient,
    refuse_compiled,
    rows,
    unpacked,
)

AnyWeight = Weight | mx.array
Experts = ExpertWeights | GraphExperts
# The most tokens of a chunk of the delta rule, which builds [chunk, chunk] matrices.
MAX_CHUNK = 256


@checked()
def embedding(token_ids: mx.array, weight: AnyWeight) -> mx.array:
    """Look up rows of an embedding.

    Args:
        token_ids: ``[N]`` int32, each below V.
        weight: ``[V, D]``.

    Returns:
        ``[N, D]``.
    """
    (n,) = rows("token_ids", token_ids, 1)
    vocab, dim = _matrix(weight)
    fields = {"vocab_size": vocab, "hidden_dim": dim, "n_tokens": n}
    return apply(EmbedGatherNTokens, fields, token_ids=token_ids, weight=weight)


@checked(input="x")
def linear(x: mx.array, weight: AnyWeight, bias: mx.array | None = None) -> mx.array:
    """Multiply rows ``[N, I]`` by ``weight`` ``[O, I]`` transposed: ``[N, O]``."""
    n, in_dim = rows("x", x)
    out_dim, _ = _matrix(weight)
    fields = {"in_dim": in_dim, "out_dim": out_dim, "n_tokens": n}
    return apply(MatvecNTokens, fields, input=x, weight=weight, bias=bias)


@checked()
def rms_norm(x: mx.array, weight: mx.array, eps: float = 1e-6) -> mx.array:
    """Normalise rows: ``x * rsqrt(mean(x^2) + eps) * weight`` over ``[N, D]``."""
    n, dim = rows("x", x)
    fields = {"dim": dim, "n_tokens": n, "eps": eps}
    return apply(RmsNormBf16NTokens, fields, x=x, weight=weight)


@checked()
def rms_norm_per_head(x: mx.array, weight: mx.array, eps: float = 1e-6) -> mx.array:
    """Normalise each head's d channels of ``[N, H * d]`` with ``weight`` ``[d]``."""
    op = RmsNormPerHeadNTokens
    n, width = rows("x", x)
    (head_dim,) = rows("weight", weight, 1)
    heads = quotient("weight", width, head_dim)
    fields = {"num_heads": heads, "head_dim": head_dim, "n_tokens": n, "eps": eps}
    return apply(op, fields, x=x, weight=weight)


@checked()
def rms_norm_qk(
    x: mx.array, num_k_heads: int, key_dim: int, eps: float = 1e-6
) -> mx.array:
    """Normalise q and k of rows ``q|k|v`` to unit length; scale q by ``d^-1/2``.

    Args:
        x: ``[N, 2 * num_k_heads * key_dim + v]``.
        num_k_heads: number of heads of q, and of k.
        key_dim: width d of a head.
        eps: added to the sum of squares.
    """
    n, width = rows("x", x)
    at_most("key_dim", "channels a head", key_dim, width // 2 // num_k_heads)
    fields = {
        "num_k_heads": num_k_heads,
        "key_dim": key_dim,
        "key_offset_per_token": num_k_heads * key_dim,
        "per_token_total": width,
        "n_tokens": n,
        "eps": eps,
    }
    return apply(RmsNormQkNTokens, fields, x=x)


@checked()
def gated_rms_norm(
    values: mx.array, z: mx.array, weight: mx.array, eps: float = 1e-6
) -> mx.array:
    """Return ``rms_norm(values) * weight * silu(z)`` per head: ``[N, H * d]``."""
    op = GatedRmsNormNTokens
    n, width = rows("values", values)
    (value_dim,) = rows("weight", weight, 1)
    heads = quotient("weight", width, value_dim)
    fields = {"num_v_heads": heads, "value_dim": value_dim, "n_tokens": n, "eps": eps}
    return apply(op, fields, values=values, z=z, weight=weight)


@checked()
def rope(
    x: mx.array,
    inv_freq: mx.array,
    start: mx.array,
    num_heads: int,
    pairs: bool = False,
) -> mx.array:
    """Rotate the first channels of each head by position (RoPE).

    Args:
        x: ``[N, num_heads * d]``.
        inv_freq: float32 ``[rotary / 2]``, angle per position of each channel pair.
        start: int32 ``[B]``, position of each sequence's first token, up to 2^24.
        num_heads: number of heads.
        pairs: pair neighbouring channels (GPT-J); default: the two halves (NeoX).
    """
    n, width = rows("x", x)
    (half,) = rows("inv_freq", inv_freq, 1)
    (n_seqs,) = rows("start", start, 1)
    quotient("start", n, n_seqs)
    head_dim = quotient("num_heads", width, num_heads)
    at_most("inv_freq", "channel pairs", half, head_dim // 2)
    fields = {
        "n_tokens": n,
        "n_seqs": n_seqs,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "rotary_dim": 2 * half,
        "pairs": pairs,
    }
    return apply(RopeNTokens, fields, x=x, inv_freq=inv_freq, start=start)


@checked(k_src="keys", v_src="values")
def kv_cache_append(
    keys: mx.array,
    values: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    row: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return both caches with new keys and values written from ``row`` on.

    Args:
        keys: ``[N, Hkv * d]``.
        values: ``[N, Hkv * dv]``.
        k_cache: ``[B, Hkv, S, d]``.
        v_cache: ``[B, Hkv, S, dv]``.
        row: int32 ``[1]``.
    """
    op = KvCacheAppendNTokens
    n, _ = rows("keys", keys)
    n_seqs, kv_heads, n_rows, head_dim = rows("k_cache", k_cache, 4)
    like("v_cache", v_cache, (n_seqs, kv_heads, n_rows, None))
    value_dim = v_cache.shape[3]
    at_most("keys", "tokens a sequence", quotient("k_cache", n, n_seqs), n_rows)
    fields = {
        "n_tokens": n,
        "n_seqs": n_seqs,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_dim": 0 if value_dim == head_dim else value_dim,
    }
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    return apply(op, fields, k_src=keys, v_src=values, row=row, **caches)


@checked()
def causal_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    mask: mx.array | None = None,
    start: mx.array | None = None,
) -> mx.array:
    """Return causal attention of T queries; the last T rows of the caches are theirs.

    Args:
        q: ``[N, H * d]``.
        k: ``[B, Hkv, S, d]``; query head h uses key head ``h // (H / Hkv)``.
        v: ``[B, Hkv, S, d]``.
        scale: factor of the scores; default: ``d^-1/2``.
        mask: bool ``[B or 1, 1, T, S]``, replaces the causal mask; true: attend.
        start: int32 ``[B]``, the cache row of each sequence's first query, for caches
            with spare rows after the queries' own; excludes ``mask``.

    Returns:
        ``[N, H * d]``.
    """
    op = SdpaCausalTiled
    n, width = rows("q", q)
    n_seqs, kv_heads, n_rows, head_dim = rows("k", k, 4)
    heads = quotient("k", width, head_dim)
    quotient("k", n, n_seqs)
    fields = {
        "n_tokens": n,
        "n_seqs": n_seqs,
        "num_heads": heads,
        "heads_per_kv": quotient("k", heads, kv_heads),
        "head_dim": head_dim,
        "softmax_scale": head_dim**-0.5 if scale is None else scale,
    }
    if mask is not None and start is not None:
        raise Misfit("start", "None beside a mask", "both")
    like("v", v, k.shape)
    at_most("q", "tokens a sequence", n // n_seqs, n_rows)
    if mask is not None:
        like("mask", mask, (None, 1, n // n_seqs, n_rows))
        quotient("mask", n_seqs if mask.shape[0] > 1 else 1, mask.shape[0])
    return apply(op, fields, q=q, k=k, v=v, mask=mask, start=start)


@checked()
def split_latent(
    q: mx.array, kv: mx.array, num_heads: int, nope_dim: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Split rows of latent attention into channels without and with positions.

    Args:
        q: ``[N, H * (P + R)]``; each head has P channels without positions, then R.
        kv: ``[N, L + R]``; the latent comes first.
        num_heads: number of heads H.
        nope_dim: P.

    Returns:
        ``[N, H * P]``, ``[N, H * R]``, ``[N, L]`` and ``[N, R]``.
    """
    n, width = rows("q", q)
    _, kv_width = rows("kv", kv)
    head_dim = quotient("num_heads", width, num_heads)
    at_most("nope_dim", "channels of a head", nope_dim, head_dim - 1)
    rope_dim = head_dim - nope_dim
    at_most("num_heads", "channels of kv", rope_dim, kv_width - 1)
    fields = {
        "n_tokens": n,
        "num_heads": num_heads,
        "nope_dim": nope_dim,
        "rope_dim": rope_dim,
        "latent_dim": kv_width - rope_dim,
    }
    return apply(MlaSplitQKv, fields, q=q, kv=kv)


@checked(input="x")
def head_linear(x: mx.array, weight: AnyWeight) -> mx.array:
    """Multiply each head's channels by its own matrix ``[O, I]``, transposed.

    Args:
        x: ``[N, H * I]``.
        weight: ``[H, O, I]``.

    Returns:
        ``[N, H * O]``.
    """
    n, width = rows("x", x)
    found = weight if isinstance(weight, Weight) else Weight(weight)
    rows("weight", found.w, 3)
    heads, out_dim, in_dim = unpacked(found)
    if width != heads * in_dim:
        raise Misfit("x", f"{heads * in_dim} channels", width)
    fields = {"num_heads": heads, "in_dim": in_dim, "out_dim": out_dim, "n_tokens": n}
    return apply(HeadMatvecNTokens, fields, input=x, weight=weight)


@checked()
def latent_attention(
    q: mx.array,
    q_pe: mx.array,
    latent: mx.array,
    rope: mx.array,
    *,
    scale: float,
    mask: mx.array | None = None,
    start: mx.array | None = None,
) -> mx.array:
    """Return causal attention to a compressed cache; its last T rows are the queries'.

    Args:
        q: ``[N, H * L]``, queries in the latent space.
        q_pe: ``[N, H * R]``, the queries' rotated channels.
        latent: ``[B, 1, S, L]``, keys and values.
        rope: ``[B, 1, S, R]``, the keys' rotated channels.
        scale: factor of the scores.
        mask: as for ``causal_attention``.
        start: as for ``causal_attention``.

    Returns:
        ``[N, H * L]``.
    """
    n, width = rows("q", q)
    n_seqs, one, n_rows, latent_dim = rows("latent", latent, 4)
    at_most("latent", "head", one, 1)
    *_, rope_dim = rows("rope", rope, 4)
    like("rope", rope, (n_seqs, 1, n_rows, None))
    heads = quotient("latent", width, latent_dim)
    quotient("latent", n, n_seqs)
    like("q_pe", q_pe, (n, heads * rope_dim))
    fields = {
        "n_tokens": n,
        "n_seqs": n_seqs,
        "num_heads": heads,
        "latent_dim": latent_dim,
        "rope_dim": rope_dim,
        "softmax_scale": scale,
    }
    if mask is not None and start is not None:
        raise Misfit("start", "None beside a mask", "both")
    at_most("q", "tokens a sequence", n // n_seqs, n_rows)
    if mask is not None:
        like("mask", mask, (None, 1, n // n_seqs, n_rows))
        quotient("mask", n_seqs if mask.shape[0] > 1 else 1, mask.shape[0])
    given = {"q": q, "q_pe": q_pe, "latent": latent, "rope": rope}
    return apply(SdpaLatentCausal, fields, **given, mask=mask, start=start)


@checked()
def residual_add(a: mx.array, b: mx.array) -> mx.array:
    """Return ``a + b`` over ``[N, D]``."""
    n, dim = rows("a", a)
    return apply(ResidualAddNTokens, {"n_tokens": n, "dim": dim}, a=a, b=b)


@checked()
def zero_buffer(n_tokens: int, dim: int) -> mx.array:
    """Return float32 zeros ``[n_tokens, dim]``."""
    memory = device.physical_memory_bytes()
    at_most("n_tokens", "rows that memory holds", n_tokens, memory // (4 * dim))
    return apply(ZeroBuffer, {"n_tokens": n_tokens, "dim": dim})


@checked()
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return ``silu(gate) * up`` over ``[N, F]``."""
    n, dim = rows("gate", gate)
    return apply(SwigluFusedBatched, {"n_tokens": n, "dim": dim}, gate=gate, up=up)


@checked()
def sigmoid_gate(x: mx.array, gate: mx.array) -> mx.array:
    """Return ``x * sigmoid(gate)`` over ``[N, D]``."""
    n, dim = rows("x", x)
    return apply(SigmoidGateNTokens, {"n_tokens": n, "dim": dim}, x=x, gate=gate)


@checked()
def split_q_gate(q_proj: mx.array, num_heads: int) -> tuple[mx.array, mx.array]:
    """Split ``[N, H * 2d]``, per head q then gate, into q and gate ``[N, H * d]``."""
    n, width = rows("q_proj", q_proj)
    head_dim = quotient("num_heads", width, 2 * num_heads)
    fields = {"num_heads": num_heads, "head_dim": head_dim, "n_tokens": n}
    return apply(SplitQGate, fields, q_proj=q_proj)


@checked()
def part_key_heads(
    qkvz: mx.array, ba: mx.array, num_k_heads: int, key_dim: int
) -> tuple[mx.array, ...]:
    """Split projections that are grouped by key head into one array for each kind.

    Args:
        qkvz: ``[N, 2 * Hk * dk + 2 * Hv * dv]``; for each key head q and k, then v and
            z of its value heads.
        ba: ``[N, 2 * Hv]``; for each key head b and alpha of its value heads.
        num_k_heads: Hk.
        key_dim: dk.

    Returns:
        ``q|k|v``, z, b and alpha, each with all heads.
    """
    n, width = rows("qkvz", qkvz)
    heads = quotient("ba", rows("ba", ba)[1], 2)
    quotient("num_k_heads", heads, num_k_heads)
    keys = 2 * num_k_heads * key_dim
    at_most("key_dim", "channels of q and k", keys, width - 1)
    fields = {
        "num_k_heads": num_k_heads,
        "num_v_heads": heads,
        "key_dim": key_dim,
        "value_dim": quotient("qkvz", width - keys, 2 * heads),
        "n_tokens": n,
    }
    return apply(PartKeyHeadsNTokens, fields, qkvz=qkvz, ba=ba)


@checked(qkv_in="x", conv_state="state")
def conv1d_step(
    x: mx.array,
    state: mx.array,
    weight: mx.array,
    *,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Apply a causal depthwise convolution over history and chunk, then SiLU.

    Args:
        x: ``[N, C]``.
        state: ``[B, W - 1, C]``, the inputs before the chunk.
        weight: ``[C, W, 1]``.
        mask: bool ``[B, T]``; a token with false counts as zeros.
        lengths: int32 ``[B]``, number of tokens of each sequence in this chunk.

    Returns:
        The new state and ``[N, C]``.
    """
    op = Conv1dStepNTokens
    n, channels = rows("x", x)
    n_seqs, history, _ = rows("state", state, 3)
    quotient("state", n, n_seqs)
    fields = {
        "conv_dim": channels,
        "kernel_size": history + 1,
        "n_tokens": n,
        "n_seqs": n_seqs,
    }
    optional = {"mask": mask, "lengths": lengths}
    return apply(op, fields, qkv_in=x, conv_state=state, weight=weight, **optional)


@checked(alpha_in="alpha", beta_in="beta")
def decay_beta(
    alpha: mx.array,
    beta: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    *,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return ``exp(-exp(a_log) softplus(alpha + dt_bias))`` and ``sigmoid(beta)``.

    Args:
        alpha: ``[N, Hv]``.
        beta: ``[N, Hv]``.
        a_log: ``[Hv]``.
        dt_bias: ``[Hv]``.
        mask: bool ``[B, T]``; a token with false gets decay 1 and beta 0.

    Returns:
        Two float32 ``[N, Hv]``.
    """
    op = ComputeDecayBetaNTokens
    n, heads = rows("alpha", alpha)
    n_seqs = 1 if mask is None else rows("mask", mask)[0]
    quotient("mask", n, n_seqs)
    fields = {"num_v_heads": heads, "n_tokens": n, "n_seqs": n_seqs}
    weights = {"a_log": a_log, "dt_bias": dt_bias}
    return apply(op, fields, alpha_in=alpha, beta_in=beta, mask=mask, **weights)


@checked(conv_out="qkv", g_decay="decay", beta_gate="beta")
def gated_delta_step(
    state: mx.array,
    qkv: mx.array,
    decay: mx.array,
    beta: mx.array,
    num_k_heads: int,
) -> tuple[mx.array, mx.array]:
    """Run the gated delta rule token by token; see ``gated_delta_chunkwise``."""
    op = GatedDeltaNetStepNTokens
    return _delta_rule(op, state, qkv, decay, beta, num_k_heads)


@checked(conv_out="qkv", g_decay="decay", beta_gate="beta")
def gated_delta_chunkwise(
    state: mx.array,
    qkv: mx.array,
    decay: mx.array,
    beta: mx.array,
    num_k_heads: int,
    *,
    chunk_size: int = 64,
) -> tuple[mx.array, mx.array]:
    """Run the gated delta rule in chunks, with matrix products.

    Source: Yang et al., Gated Delta Networks (2024).

    Args:
        state: float32 ``[B, Hv, dv, dk]``.
        qkv: ``[N, 2 * Hk * dk + Hv * dv]``.
        decay: float32 ``[N, Hv]``.
        beta: float32 ``[N, Hv]``.
        num_k_heads: Hk, a divisor of Hv.
        chunk_size: tokens of a chunk, a power of two up to 256.

    Returns:
        The new state and ``[N, Hv * dv]``.
    """
    op = GatedDeltaNetChunkwise
    if chunk_size & (chunk_size - 1):
        raise Misfit("chunk_size", "a power of two", chunk_size)
    at_most("chunk_size", "tokens", chunk_size, MAX_CHUNK)
    more = {"chunk_size": chunk_size}
    return _delta_rule(op, state, qkv, decay, beta, num_k_heads, **more)


def _delta_rule(
    op: type[GatedDeltaNetStepNTokens] | type[GatedDeltaNetChunkwise],
    state: mx.array,
    qkv: mx.array,
    decay: mx.array,
    beta: mx.array,
    num_k_heads: int,
    **more: int,
) -> tuple[mx.array, mx.array]:
    n, _ = rows("qkv", qkv)
    n_seqs, heads, value_dim, key_dim = rows("state", state, 4)
    quotient("state", n, n_seqs)
    quotient("num_k_heads", heads, num_k_heads)
    fields = {
        "num_v_heads": heads,
        "num_k_heads": num_k_heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "n_tokens": n,
        "n_seqs": n_seqs,
        **more,
    }
    gates = {"g_decay": decay, "beta_gate": beta}
    return apply(op, fields, state=state, conv_out=qkv, **gates)


@checked()
def softmax_topk(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return the k experts with the largest softmax, and their weights.

    Args:
        logits: ``[N, E]``.
        k: experts per token.

    Returns:
        int32 ``[N, k]``, ties to the lower index, and float32 ``[N, k]``, descending.
    """
    n, n_experts = rows("logits", logits)
    at_most("k", "experts", k, n_experts)
    fields = {"n_tokens": n, "n_experts": n_experts, "k": k}
    return apply(MoeSoftmaxTopK, fields, logits=logits)


@checked()
def noaux_topk(
    logits: mx.array,
    bias: mx.array,
    k: int,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    normalised: bool = True,
) -> tuple[mx.array, mx.array]:
    """Return the k experts with the largest biased sigmoids in the best groups.

    Args:
        logits: ``[N, E]``.
        bias: ``[E]``, added to the sigmoids for the choice but not for the weights.
        k: experts per token.
        n_group: number of equal groups of consecutive experts.
        topk_group: number of groups to choose from: those with the largest sums of
            their two best experts.
        scale: factor of the weights.
        normalised: divide the weights by their sum before scaling.

    Returns:
        int32 ``[N, k]``, best first, ties to the lower index, and float32 ``[N, k]``.
    """
    n, n_experts = rows("logits", logits)
    quotient("n_group", n_experts, n_group)
    at_most("topk_group", "groups", topk_group, n_group)
    at_most("k", "experts of the groups kept", k, topk_group * n_experts // n_group)
    if n_group > 1:
        at_most("n_group", "pairs of experts", n_group, n_experts // 2)
    fields = {
        "n_tokens": n,
        "n_experts": n_experts,
        "k": k,
        "n_group": n_group,
        "topk_group": topk_group,
        "scale": scale,
        "normalised": normalised,
    }
    return apply(MoeNoauxTopK, fields, logits=logits, bias=bias)


@checked()
def normalize_weights(weights: mx.array) -> mx.array:
    """Divide each token's weights, float32 ``[N, K]``, by their sum."""
    n, k = rows("weights", weights)
    return apply(MoeNormalizeWeights, {"n_tokens": n, "k": k}, weights=weights)


@checked(mlp_in="x")
def decode_experts(
    x: mx.array, indices: mx.array, weights: mx.array, experts: Experts
) -> mx.array:
    """Run one token's experts, ``[1, D]``, as ``gather_experts``."""
    return _routed(MoeDecodeExperts, x, indices, weights, experts)


@checked(mlp_in="x")
def gather_experts(
    x: mx.array, indices: mx.array, weights: mx.array, experts: Experts
) -> mx.array:
    """Return the weighted sums of all tokens' experts, computed at once.

    Args:
        x: ``[N, D]``.
        indices: int32 ``[N, K]``, distinct in each row.
        weights: float32 ``[N, K]``.
        experts: gate, up and down of E experts, or a source of streamed experts.

    Returns:
        ``[N, D]``.
    """
    return _routed(MoeGatherIdFuse, x, indices, weights, experts)


@checked(mlp_in="x")
def batched_experts(
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    experts: Experts,
    out_sum: mx.array,
) -> mx.array:
    """Add the experts' outputs to ``out_sum``, float32 ``[N, D]``, one by one.

    This reads ``indices`` back, and visits each expert once, however few fit into
    memory. The other arguments are those of ``gather_experts``.
    """
    more = {"out_sum": out_sum}
    return _routed(MoeBatchedPermuteFuse, x, indices, weights, experts, **more)


def _routed(
    op: Any,
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    experts: Experts,
    **more: mx.array,
) -> mx.array:
    n, dim = rows("x", x)
    like("indices", indices, (n, None), (mx.int32,))
    k = indices.shape[1]
    if op is MoeDecodeExperts:
        at_most("x", "row", n, 1)
    n_experts, expert_dim, width = _sizes(experts, indices)
    at_most("indices", "experts a token", k, n_experts)
    like("x", x, (None, width))
    fields = {
        "n_tokens": n,
        "dim": dim,
        "expert_dim": expert_dim,
        "n_experts": n_experts,
        "k": k,
        "expert_bytes": 0,
    }
    inputs = {"mlp_in": x, "indices": indices, "weights": weights}
    return apply(op, fields, experts=experts, **inputs, **more)


def _sizes(experts: Experts, indices: mx.array) -> tuple[int, int, int]:
    """Return the number of experts, and their matrices' sizes F and D.

    The number of streamed experts is unknown here; the streamer checks ids itself when
    it reads. It cannot do so inside ``mx.compile``.
    """
    source = ResidentExperts(experts) if isinstance(experts, ExpertWeights) else experts
    n_experts, expert_dim, dim = unpacked(source.weights.gate)
    if source.resident is None:
        if not has_values(indices):
            refuse_compiled("indices")
        n_experts = max(int(to_host(indices).max()) + 1, indices.shape[1])
    return n_experts, expert_dim, dim


@checked(h_mid="residual", moe_sum="experts_sum", shared_out="shared")
def combine_residual(
    residual: mx.array,
    experts_sum: mx.array,
    shared: mx.array,
    shared_gate: mx.array,
) -> mx.array:
    """Return ``residual + experts_sum + sigmoid(shared_gate) * shared``.

    Args:
        residual: ``[N, D]``.
        experts_sum: ``[N, D]``, the weighted sum of the routed experts.
        shared: ``[N, D]``, the shared expert's output.
        shared_gate: ``[N, 1]``.
    """
    op = MoeCombineResidualNTokens
    n, dim = rows("residual", residual)
    others = {"moe_sum": experts_sum, "shared_out": shared, "shared_gate": shared_gate}
    return apply(op, {"n_tokens": n, "dim": dim}, h_mid=residual, **others)


def _matrix(weight: AnyWeight) -> tuple[int, int]:
    """Return the unpacked shape ``(O, I)`` of a matrix."""
    found = weight if isinstance(weight, Weight) else Weight(weight)
    rows("weight", found.w)
    n_out, n_in = unpacked(found)
    return n_out, n_in


@checked()
def quantize(w: mx.array, group_size: int = 64, bits: int = 4) -> Weight:
    """Quantise a dense matrix ``[..., O, I]`` in MLX's affine mode.

    Args:
        w: the matrix; I is a multiple of ``group_size``.
        group_size: 32, 64 or 128.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        A ``Weight`` for the functions of this package.
    """
    form = quantization("", Quantization(bits, group_size))
    packable("w", w, form)
    arrays = mx.quantize(w, group_size=group_size, bits=bits)
    return Weight(*arrays, form)
