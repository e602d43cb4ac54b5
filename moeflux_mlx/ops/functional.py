"""Every Op as a function of MLX arrays, with gradients: for scripts of your own.

Sizes come from the arrays. Rows of several sequences lie behind each other: N = B
sequences x T tokens, told apart by ``n_seqs`` = B where it matters. A weight is a dense
array or a ``Weight`` (see ``quantize``). Where the machine has kernels the forward pass
runs on them; gradients go through the Op's reference.

Every function raises GraphError, naming Op and argument, for a shape or type that does
not fit.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import GraphError
from ..weights import ExpertSource, ExpertWeights, Weight
from .apply import apply
from .attention import KvCacheAppendNTokens, RopeNTokens, SdpaCausalTiled
from .elementwise import (
    ResidualAddNTokens,
    SigmoidGateNTokens,
    SplitQGate,
    SwigluFusedBatched,
    ZeroBuffer,
)
from .embed import EmbedGatherNTokens
from .linear_attention import (
    ComputeDecayBetaNTokens,
    Conv1dStepNTokens,
    GatedDeltaNetChunkwise,
    GatedDeltaNetStepNTokens,
)
from .moe import (
    MoeBatchedPermuteFuse,
    MoeCombineResidualNTokens,
    MoeDecodeExperts,
    MoeGatherIdFuse,
    MoeNormalizeWeights,
    MoeSoftmaxTopK,
)
from .norm import (
    GatedRmsNormNTokens,
    RmsNormBf16NTokens,
    RmsNormPerHeadNTokens,
    RmsNormQkNTokens,
)
from .quant import MatvecNTokens

AnyWeight = Weight | mx.array
Experts = ExpertWeights | ExpertSource


def _rows(op: type, name: str, x: mx.array, rank: int = 2) -> tuple[int, ...]:
    """Return the shape of an array that must have ``rank`` dimensions."""
    if not isinstance(x, mx.array) or x.ndim != rank or x.size == 0:
        got = tuple(x.shape) if isinstance(x, mx.array) else type(x).__name__
        wanted = f"{rank} non-empty dimensions"
        raise GraphError(f"[{op.__name__}] {name}: expected {wanted} but got {got}")
    return tuple(x.shape)


def _whole(op: type, name: str, total: int, part: int) -> int:
    """Return how often ``part`` goes into ``total``, which it must."""
    if not isinstance(part, int) or part < 1 or total % part:
        raise GraphError(
            f"[{op.__name__}] {name}: expected a divisor of {total} but got {part}"
        )
    return total // part


def embedding(token_ids: mx.array, weight: AnyWeight) -> mx.array:
    """Look up rows of an embedding.

    Args:
        token_ids: ``[N]`` int32, each below V.
        weight: ``[V, D]``.

    Returns:
        ``[N, D]``.
    """
    (n,) = _rows(EmbedGatherNTokens, "token_ids", token_ids, 1)
    vocab, dim = _matrix(EmbedGatherNTokens, weight)
    fields = {"vocab_size": vocab, "hidden_dim": dim, "n_tokens": n}
    return apply(EmbedGatherNTokens, fields, token_ids=token_ids, weight=weight)


def linear(x: mx.array, weight: AnyWeight, bias: mx.array | None = None) -> mx.array:
    """Multiply rows ``[N, I]`` by ``weight`` ``[O, I]`` transposed: ``[N, O]``."""
    n, in_dim = _rows(MatvecNTokens, "input", x)
    out_dim, _ = _matrix(MatvecNTokens, weight)
    fields = {"in_dim": in_dim, "out_dim": out_dim, "n_tokens": n}
    return apply(MatvecNTokens, fields, input=x, weight=weight, bias=bias)


def rms_norm(x: mx.array, weight: mx.array, eps: float = 1e-6) -> mx.array:
    """Normalise rows: ``x * rsqrt(mean(x^2) + eps) * weight`` over ``[N, D]``."""
    n, dim = _rows(RmsNormBf16NTokens, "x", x)
    fields = {"dim": dim, "n_tokens": n, "eps": eps}
    return apply(RmsNormBf16NTokens, fields, x=x, weight=weight)


def rms_norm_per_head(x: mx.array, weight: mx.array, eps: float = 1e-6) -> mx.array:
    """Normalise each head's d channels of ``[N, H * d]`` with ``weight`` ``[d]``."""
    op = RmsNormPerHeadNTokens
    n, width = _rows(op, "x", x)
    (head_dim,) = _rows(op, "weight", weight, 1)
    heads = _whole(op, "weight", width, head_dim)
    fields = {"num_heads": heads, "head_dim": head_dim, "n_tokens": n, "eps": eps}
    return apply(op, fields, x=x, weight=weight)


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
    n, width = _rows(RmsNormQkNTokens, "x", x)
    fields = {
        "num_k_heads": num_k_heads,
        "key_dim": key_dim,
        "key_offset_per_token": num_k_heads * key_dim,
        "per_token_total": width,
        "n_tokens": n,
        "eps": eps,
    }
    return apply(RmsNormQkNTokens, fields, x=x)


def gated_rms_norm(
    values: mx.array, z: mx.array, weight: mx.array, eps: float = 1e-6
) -> mx.array:
    """Return ``rms_norm(values) * weight * silu(z)`` per head: ``[N, H * d]``."""
    op = GatedRmsNormNTokens
    n, width = _rows(op, "values", values)
    (value_dim,) = _rows(op, "weight", weight, 1)
    heads = _whole(op, "weight", width, value_dim)
    fields = {"num_v_heads": heads, "value_dim": value_dim, "n_tokens": n, "eps": eps}
    return apply(op, fields, values=values, z=z, weight=weight)


def rope(x: mx.array, inv_freq: mx.array, start: mx.array, num_heads: int) -> mx.array:
    """Rotate the first channels of each head, halves paired (NeoX).

    Args:
        x: ``[N, num_heads * d]``.
        inv_freq: float32 ``[rotary / 2]``, angle per position of each channel pair.
        start: int32 ``[B]``, position of each sequence's first token.
        num_heads: heads in a row.
    """
    n, width = _rows(RopeNTokens, "x", x)
    (half,) = _rows(RopeNTokens, "inv_freq", inv_freq, 1)
    (n_seqs,) = _rows(RopeNTokens, "start", start, 1)
    _whole(RopeNTokens, "start", n, n_seqs)
    fields = {
        "n_tokens": n,
        "n_seqs": n_seqs,
        "num_heads": num_heads,
        "head_dim": _whole(RopeNTokens, "num_heads", width, num_heads),
        "rotary_dim": 2 * half,
    }
    return apply(RopeNTokens, fields, x=x, inv_freq=inv_freq, start=start)


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
        values: as ``keys``.
        k_cache: ``[B, Hkv, S, d]``.
        v_cache: as ``k_cache``.
        row: int32 ``[1]``.
    """
    op = KvCacheAppendNTokens
    n, _ = _rows(op, "k_src", keys)
    n_seqs, kv_heads, _, head_dim = _rows(op, "k_cache", k_cache, 4)
    fields = {
        "n_tokens": n,
        "n_seqs": n_seqs,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
    }
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    return apply(op, fields, k_src=keys, v_src=values, row=row, **caches)


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
    n, width = _rows(op, "q", q)
    n_seqs, kv_heads, _, head_dim = _rows(op, "k", k, 4)
    heads = _whole(op, "k", width, head_dim)
    _whole(op, "k", n, n_seqs)
    fields = {
        "n_tokens": n,
        "n_seqs": n_seqs,
        "num_heads": heads,
        "heads_per_kv": _whole(op, "k", heads, kv_heads),
        "head_dim": head_dim,
        "softmax_scale": head_dim**-0.5 if scale is None else scale,
    }
    if mask is not None and start is not None:
        raise GraphError(f"[{op.__name__}] expected a mask or a start but got both")
    return apply(op, fields, q=q, k=k, v=v, mask=mask, start=start)


def residual_add(a: mx.array, b: mx.array) -> mx.array:
    """Return ``a + b`` over ``[N, D]``."""
    n, dim = _rows(ResidualAddNTokens, "a", a)
    return apply(ResidualAddNTokens, {"n_tokens": n, "dim": dim}, a=a, b=b)


def zero_buffer(n_tokens: int, dim: int) -> mx.array:
    """Return float32 zeros ``[n_tokens, dim]``."""
    return apply(ZeroBuffer, {"n_tokens": n_tokens, "dim": dim})


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return ``silu(gate) * up`` over ``[N, F]``."""
    n, dim = _rows(SwigluFusedBatched, "gate", gate)
    return apply(SwigluFusedBatched, {"n_tokens": n, "dim": dim}, gate=gate, up=up)


def sigmoid_gate(x: mx.array, gate: mx.array) -> mx.array:
    """Return ``x * sigmoid(gate)`` over ``[N, D]``."""
    n, dim = _rows(SigmoidGateNTokens, "x", x)
    return apply(SigmoidGateNTokens, {"n_tokens": n, "dim": dim}, x=x, gate=gate)


def split_q_gate(q_proj: mx.array, num_heads: int) -> tuple[mx.array, mx.array]:
    """Part ``[N, H * 2d]``, per head q then gate, into q and gate ``[N, H * d]``."""
    n, width = _rows(SplitQGate, "q_proj", q_proj)
    head_dim = _whole(SplitQGate, "num_heads", width, 2 * num_heads)
    fields = {"num_heads": num_heads, "head_dim": head_dim, "n_tokens": n}
    return apply(SplitQGate, fields, q_proj=q_proj)


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
    n, channels = _rows(op, "qkv_in", x)
    n_seqs, history, _ = _rows(op, "conv_state", state, 3)
    _whole(op, "conv_state", n, n_seqs)
    fields = {
        "conv_dim": channels,
        "kernel_size": history + 1,
        "n_tokens": n,
        "n_seqs": n_seqs,
    }
    optional = {"mask": mask, "lengths": lengths}
    return apply(op, fields, qkv_in=x, conv_state=state, weight=weight, **optional)


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
    n, heads = _rows(op, "alpha_in", alpha)
    n_seqs = 1 if mask is None else _rows(op, "mask", mask)[0]
    _whole(op, "mask", n, n_seqs)
    fields = {"num_v_heads": heads, "n_tokens": n, "n_seqs": n_seqs}
    weights = {"a_log": a_log, "dt_bias": dt_bias}
    return apply(op, fields, alpha_in=alpha, beta_in=beta, mask=mask, **weights)


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
        chunk_size: tokens taken together, a power of two.

    Returns:
        The new state and ``[N, Hv * dv]``.
    """
    op = GatedDeltaNetChunkwise
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise GraphError(
            f"[{op.__name__}] chunk_size: expected a power of two but got {chunk_size}"
        )
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
    n, _ = _rows(op, "conv_out", qkv)
    n_seqs, heads, value_dim, key_dim = _rows(op, "state", state, 4)
    _whole(op, "state", n, n_seqs)
    _whole(op, "num_k_heads", heads, num_k_heads)
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


def softmax_topk(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return the k experts of largest softmax and their weights.

    Args:
        logits: ``[N, E]``.
        k: experts per token.

    Returns:
        int32 ``[N, k]``, ties to the lower index, and float32 ``[N, k]``, falling.
    """
    n, n_experts = _rows(MoeSoftmaxTopK, "logits", logits)
    if not 1 <= k <= n_experts:
        raise GraphError(f"[MoeSoftmaxTopK] k: expected 1 to {n_experts} but got {k}")
    fields = {"n_tokens": n, "n_experts": n_experts, "k": k}
    return apply(MoeSoftmaxTopK, fields, logits=logits)


def normalize_weights(weights: mx.array) -> mx.array:
    """Divide each token's weights, float32 ``[N, K]``, by their sum."""
    n, k = _rows(MoeNormalizeWeights, "weights", weights)
    return apply(MoeNormalizeWeights, {"n_tokens": n, "k": k}, weights=weights)


def decode_experts(
    x: mx.array, indices: mx.array, weights: mx.array, experts: Experts
) -> mx.array:
    """Run one token's experts: ``[1, D]``; see ``gather_experts``."""
    return _routed(MoeDecodeExperts, x, indices, weights, experts)


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
    n, dim = _rows(op, "mlp_in", x)
    _, k = _rows(op, "indices", indices)
    if op is MoeDecodeExperts:
        _whole(op, "mlp_in", 1, n)
    stacks = experts if isinstance(experts, ExpertWeights) else experts.weights
    n_experts, expert_dim = stacks.gate.w.shape[:2]
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
    n, dim = _rows(op, "h_mid", residual)
    parts = {"moe_sum": experts_sum, "shared_out": shared, "shared_gate": shared_gate}
    return apply(op, {"n_tokens": n, "dim": dim}, h_mid=residual, **parts)


def _matrix(op: type, weight: AnyWeight) -> tuple[int, int]:
    """Return the unpacked shape ``(O, I)`` of a matrix."""
    array = weight.w if isinstance(weight, Weight) else weight
    rows, columns = _rows(op, "weight", array)
    q = weight.quantization if isinstance(weight, Weight) else None
    return rows, columns if q is None else columns * 32 // q.bits
