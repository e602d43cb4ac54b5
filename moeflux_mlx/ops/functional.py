"""Every Op as a function of MLX arrays, with gradients: for scripts of your own.

Sizes come from the arrays. Rows of several sequences lie behind each other: N = B
sequences x T tokens, told apart by ``n_seqs`` = B where it matters. A weight is a dense
array or a ``Weight`` (see ``quantize``). Where the machine has kernels the forward pass
runs on them; gradients go through the Op's reference.

Every function raises GraphError, naming function and argument, for whatever does not
fit: shapes, types, numbers, parts of a quantised weight, indices out of range. Indices
are read for that. In a trace, as of ``mx.compile``, they have no values: there all that
an index out of range leads to is NaN.
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
    parts,
    quantization,
    refuse_trace,
    rows,
    unpacked,
)

AnyWeight = Weight | mx.array
Experts = ExpertWeights | GraphExperts
# Tokens of a chunk of the delta rule, which makes matrices of their square.
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
    heads = parts("weight", width, head_dim)
    fields = {"num_heads": heads, "head_dim": head_dim, "n_tokens": n, "eps": eps}
    return apply(op, fields, x=x, weight=weight)


@checked()
def rms_norm_qk(
    x: mx.array, num_k_heads: int, key_dim: int, eps: float = 1e-6
) -> mx.array:
    """Bring q and k of rows ``q|k|v`` to unit length and scale q by ``d^-1/2``.

    Args:
        x: ``[N, 2 * num_k_heads * key_dim + v]``.
        num_k_heads: heads in each of q and k.
        key_dim: their width d.
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
    heads = parts("weight", width, value_dim)
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
    """Rotate the first channels of each head, halves paired (NeoX).

    Args:
        x: ``[N, num_heads * d]``.
        inv_freq: float32 ``[rotary / 2]``, angle per position of each channel pair.
        start: int32 ``[B]``, position of each sequence's first token, up to 2^24.
        num_heads: heads in a row.
        pairs: neighbouring channels are paired instead (GPT-J).
    """
    n, width = rows("x", x)
    (half,) = rows("inv_freq", inv_freq, 1)
    (n_seqs,) = rows("start", start, 1)
    parts("start", n, n_seqs)
    head_dim = parts("num_heads", width, num_heads)
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
    """Return both caches ``[B, Hkv, S, d]`` with new rows from ``row`` on.

    Args:
        keys: ``[N, Hkv * d]``.
        values: as ``keys``, of the values' width.
        k_cache: ``[B, Hkv, S, d]``.
        v_cache: as ``k_cache``; a value may have another width.
        row: int32 ``[1]``.
    """
    op = KvCacheAppendNTokens
    n, _ = rows("keys", keys)
    n_seqs, kv_heads, n_rows, head_dim = rows("k_cache", k_cache, 4)
    like("v_cache", v_cache, (n_seqs, kv_heads, n_rows, None))
    value_dim = v_cache.shape[3]
    at_most("keys", "tokens a sequence", parts("k_cache", n, n_seqs), n_rows)
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
    """Attend with T queries to caches whose last T rows are their own.

    Args:
        q: ``[N, H * d]``.
        k: ``[B, Hkv, S, d]``; head h reads ``h // (H / Hkv)``.
        v: as ``k``.
        scale: of the scores, ``d^-1/2`` by default.
        mask: bool ``[B or 1, 1, T, S]``, true where seen, instead of causality.
        start: int32 ``[B]``, the row of each first query where the caches have spare
            rows after the queries' own; not together with ``mask``.

    Returns:
        ``[N, H * d]``.
    """
    op = SdpaCausalTiled
    n, width = rows("q", q)
    n_seqs, kv_heads, n_rows, head_dim = rows("k", k, 4)
    heads = parts("k", width, head_dim)
    parts("k", n, n_seqs)
    fields = {
        "n_tokens": n,
        "n_seqs": n_seqs,
        "num_heads": heads,
        "heads_per_kv": parts("k", heads, kv_heads),
        "head_dim": head_dim,
        "softmax_scale": head_dim**-0.5 if scale is None else scale,
    }
    if mask is not None and start is not None:
        raise Misfit("start", "None beside a mask", "both")
    like("v", v, k.shape)
    at_most("q", "tokens a sequence", n // n_seqs, n_rows)
    if mask is not None:
        like("mask", mask, (None, 1, n // n_seqs, n_rows))
        parts("mask", n_seqs if mask.shape[0] > 1 else 1, mask.shape[0])
    return apply(op, fields, q=q, k=k, v=v, mask=mask, start=start)


@checked()
def split_latent(
    q: mx.array, kv: mx.array, num_heads: int, nope_dim: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Part rows of latent attention into channels with positions and without.

    Args:
        q: ``[N, H * (P + R)]``, of each head P channels without positions first.
        kv: ``[N, L + R]``, the latent row first.
        num_heads: heads in a row.
        nope_dim: P.

    Returns:
        ``[N, H * P]``, ``[N, H * R]``, ``[N, L]`` and ``[N, R]``.
    """
    n, width = rows("q", q)
    _, kv_width = rows("kv", kv)
    head_dim = parts("num_heads", width, num_heads)
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
    """Multiply each head's part of ``[N, H * I]`` by its ``[O, I]`` transposed.

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
    """Attend with T queries to a compressed cache whose last T rows are their own.

    Args:
        q: ``[N, H * L]``, queries in the latent space.
        q_pe: ``[N, H * R]``, their rotated parts.
        latent: ``[B, 1, S, L]``, latent rows: keys and values.
        rope: ``[B, 1, S, R]``, rotated keys.
        scale: of the scores.
        mask: as ``causal_attention`` has it.
        start: as ``causal_attention`` has it.

    Returns:
        ``[N, H * L]``.
    """
    n, width = rows("q", q)
    n_seqs, one, n_rows, latent_dim = rows("latent", latent, 4)
    at_most("latent", "head", one, 1)
    *_, rope_dim = rows("rope", rope, 4)
    like("rope", rope, (n_seqs, 1, n_rows, None))
    heads = parts("latent", width, latent_dim)
    parts("latent", n, n_seqs)
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
        parts("mask", n_seqs if mask.shape[0] > 1 else 1, mask.shape[0])
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
    """Part ``[N, H * 2d]``, per head q then gate, into q and gate ``[N, H * d]``."""
    n, width = rows("q_proj", q_proj)
    head_dim = parts("num_heads", width, 2 * num_heads)
    fields = {"num_heads": num_heads, "head_dim": head_dim, "n_tokens": n}
    return apply(SplitQGate, fields, q_proj=q_proj)


@checked()
def part_key_heads(
    qkvz: mx.array, ba: mx.array, num_k_heads: int, key_dim: int
) -> tuple[mx.array, ...]:
    """Part projections that go by key head into those of all heads.

    Args:
        qkvz: ``[N, 2 * Hk * dk + 2 * Hv * dv]``, of every key head q, k, and v and z of
            its value heads.
        ba: ``[N, 2 * Hv]``, of every key head b and alpha of its value heads.

    Returns:
        q, k and v together, z, b and alpha, each of all heads.
    """
    n, width = rows("qkvz", qkvz)
    heads = parts("ba", rows("ba", ba)[1], 2)
    parts("num_k_heads", heads, num_k_heads)
    keys = 2 * num_k_heads * key_dim
    at_most("key_dim", "channels of q and k", keys, width - 1)
    fields = {
        "num_k_heads": num_k_heads,
        "num_v_heads": heads,
        "key_dim": key_dim,
        "value_dim": parts("qkvz", width - keys, 2 * heads),
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
    """Convolve channels causally over history and chunk, then SiLU.

    Args:
        x: ``[N, C]``.
        state: ``[B, W - 1, C]``, the inputs before the chunk.
        weight: ``[C, W, 1]``.
        mask: bool ``[B, T]``; a masked token counts as zeros.
        lengths: int32 ``[B]``; a sequence ends after so many tokens of this chunk.

    Returns:
        The new state and ``[N, C]``.
    """
    op = Conv1dStepNTokens
    n, channels = rows("x", x)
    n_seqs, history, _ = rows("state", state, 3)
    parts("state", n, n_seqs)
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
        mask: bool ``[B, T]``; a masked token gets decay 1 and beta 0.

    Returns:
        Two float32 ``[N, Hv]``.
    """
    op = ComputeDecayBetaNTokens
    n, heads = rows("alpha", alpha)
    n_seqs = 1 if mask is None else rows("mask", mask)[0]
    parts("mask", n, n_seqs)
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
        chunk_size: tokens taken together, a power of two up to 256.

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
    parts("state", n, n_seqs)
    parts("num_k_heads", heads, num_k_heads)
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
    """Return the k experts of largest softmax and their weights.

    Args:
        logits: ``[N, E]``.
        k: experts per token.

    Returns:
        int32 ``[N, k]``, ties to the lower index, and float32 ``[N, k]``, falling.
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
    """Return the k experts of best corrected sigmoid in the best groups, and weights.

    Args:
        logits: ``[N, E]``.
        bias: ``[E]``, added to the sigmoids for choosing alone.
        k: experts per token.
        n_group: groups of neighbouring experts, all of one size.
        topk_group: the groups with the best pairs, from which experts are chosen.
        scale: factor of the weights.
        normalised: weights are divided by their sum before that.

    Returns:
        int32 ``[N, k]``, best first, ties to the lower index, and float32 ``[N, k]``.
    """
    n, n_experts = rows("logits", logits)
    parts("n_group", n_experts, n_group)
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
    """Run one token's experts: ``[1, D]``; see ``gather_experts``."""
    return _routed(MoeDecodeExperts, x, indices, weights, experts)


@checked(mlp_in="x")
def gather_experts(
    x: mx.array, indices: mx.array, weights: mx.array, experts: Experts
) -> mx.array:
    """Run all tokens' experts at once and sum them weighted.

    Args:
        x: ``[N, D]``.
        indices: int32 ``[N, K]``, distinct in each row.
        weights: float32 ``[N, K]``.
        experts: gate, up and down of E experts, or a source of streamed ones.

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
    """Add expert after expert to ``out_sum`` float32 ``[N, D]``; reads ``indices``.

    The other arguments are those of ``gather_experts``; however few experts have a
    slot, each is visited once.
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
    """Return how many experts there are, and their matrices' sizes F and D.

    A streamer alone knows how many: it checks ids when it reads, which no trace can.
    """
    source = ResidentExperts(experts) if isinstance(experts, ExpertWeights) else experts
    n_experts, expert_dim, dim = unpacked(source.weights.gate)
    if source.resident is None:
        if not has_values(indices):
            refuse_trace("indices")
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
        experts_sum: ``[N, D]``, the routed experts' weighted sum.
        shared: ``[N, D]``, the shared expert's output.
        shared_gate: ``[N, 1]``.
    """
    op = MoeCombineResidualNTokens
    n, dim = rows("residual", residual)
    parts = {"moe_sum": experts_sum, "shared_out": shared, "shared_gate": shared_gate}
    return apply(op, {"n_tokens": n, "dim": dim}, h_mid=residual, **parts)


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
        w: I is a multiple of ``group_size``.
        group_size: 32, 64 or 128.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        A ``Weight`` for the functions of this package.
    """
    form = quantization("", Quantization(bits, group_size))
    packable("w", w, form)
    parts = mx.quantize(w, group_size=group_size, bits=bits)
    return Weight(*parts, form)
