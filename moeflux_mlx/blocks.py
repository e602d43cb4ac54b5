"""Blocks that models share, as Ops pushed onto a graph: mixers and the MoE.

Each takes the block's parameter module as mlx-lm defines it, so one block serves every
family that uses the module.

Letters: B sequences, T tokens each, N = B T, H heads, d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import ops
from .errors import ModelError
from .graph import BufId
from .graph import roles as b
from .graph.experts import GraphExperts
from .graph.lower import Kernel
from .model import GraphBuilder
from .ops.functions import Array, to_device
from .ops.moe import softmax_topk


@dataclass(frozen=True)
class Call:
    """What of one call shapes its graphs: sequences, tokens each, masks, experts.

    ``asks_at_once``: experts are asked for when they are chosen, see ``asking``.
    """

    n_seqs: int
    t: int
    dtype: mx.Dtype
    attention_mask: bool = False
    sequence_mask: bool = False
    lengths: bool = False
    spare_rows: bool = False
    gather_by_id: bool = False
    asks_at_once: bool = False

    @property
    def n(self) -> int:
        """Tokens of all sequences."""
        return self.n_seqs * self.t


# Matrices that multiply the same row one after the other, by path.
# mlx-lm's name for the stacked experts of a layer's MoE block.
ROUTED = "switch_mlp"
SAME_INPUT = (
    tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
    tuple(f"self_attn.{part}_proj" for part in "qkv"),
    ("mlp.gate", "mlp.shared_expert_gate"),
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
)


def rotation(rope: nn.Module) -> tuple[mx.array, float]:
    """Return how one of mlx-lm's rotary modules turns and scales channels.

    Returns:
        The angle per position of each channel pair, ``[rotary_dim / 2]``, and what the
        rotated channels are multiplied by.

    Raises:
        ModelError: angles depend on the length of the sequence, or are no numbers.
    """
    scale = getattr(rope, "mscale", getattr(rope, "_scale", 1.0))
    traditional = getattr(rope, "traditional", False)
    if hasattr(rope, "_freqs") and not traditional:
        angles = mx.reciprocal(rope._freqs.astype(mx.float32))
    elif isinstance(rope, nn.RoPE) and not traditional:
        half = rope.dims // 2
        exponent = mx.arange(half, dtype=mx.float32) / half
        angles = mx.exp(-exponent * mx.log(mx.array(rope.base, mx.float32)))
        if rope.scale != 1.0:
            angles = angles * rope.scale
    else:
        raise ModelError(
            "[rope] expected rotary positions that do not depend on the length of the "
            f"sequence but got {type(rope).__name__}: choose another rope_type in "
            "config.json"
        )
    dims = getattr(rope, "dims", getattr(rope, "dim", None))
    found = np.array(angles)
    is_finite = math.isfinite(scale) and bool(np.isfinite(found).all())
    if found.size == 0 or 2 * found.size != dims or not is_finite:
        raise ModelError(
            f"[rope] expected an even number of rotated channels with finite angles "
            f"but got {dims} channels and angles {found[:4].tolist()}: mend "
            "rope_parameters in config.json"
        )
    return angles, float(scale)


@dataclass(frozen=True)
class RoutedShape:
    """Model width, expert width, and bytes of one routed expert as stored."""

    dim: int
    expert_dim: int
    expert_bytes: int


def gated_delta_net(
    g: GraphBuilder, net: nn.Module, x: BufId, call: Call
) -> tuple[BufId, dict[str, BufId]]:
    """Push a gated DeltaNet mixer; its states are inputs and outputs of the graph."""
    hk, hv, dk, dv = net.num_k_heads, net.num_v_heads, net.head_k_dim, net.head_v_dim
    n, seqs, conv_dim = call.n, call.n_seqs, net.conv_dim
    qkv = g.matvec("linear_attn.in_proj_qkv", x, b.QkvStackBuf)
    z = g.matvec("linear_attn.in_proj_z", x, b.ZStackBuf)
    beta = g.matvec("linear_attn.in_proj_b", x, b.BetaStackBuf)
    alpha = g.matvec("linear_attn.in_proj_a", x, b.AlphaStackBuf)
    width = net.conv_kernel_size
    conv_state = g.input("conv_state", b.ConvStateBuf, (seqs, width - 1, conv_dim))
    state = g.input("delta_state", b.DeltaStateBuf, (seqs, hv, dv, dk))
    mask = lengths = None
    if call.sequence_mask:
        mask = g.input("sequence_mask", b.SeqMaskBuf, (seqs, call.t))
    if call.lengths:
        lengths = g.input("lengths", b.SeqLengthsBuf, (seqs,))
    conv = g.new("conv", b.ConvOutBuf, (n, conv_dim))
    g.push(
        ops.Conv1dStepNTokens(
            label="conv1d",
            qkv_in=qkv,
            conv_state=conv_state,
            weight=g.ref("linear_attn.conv1d"),
            mask=mask,
            lengths=lengths,
            conv_out=conv,
            conv_dim=conv_dim,
            kernel_size=width,
            n_tokens=n,
            n_seqs=seqs,
        )
    )
    g.push(
        ops.RmsNormQkNTokens(
            label="qk_norm",
            x=conv,
            num_k_heads=hk,
            key_dim=dk,
            key_offset_per_token=hk * dk,
            per_token_total=conv_dim,
            n_tokens=n,
        )
    )
    decay = g.new("decay", b.GDecayBuf, (n, hv))
    beta_gate = g.new("beta_gate", b.BetaGateBuf, (n, hv))
    g.push(
        ops.ComputeDecayBetaNTokens(
            label="decay_beta",
            alpha_in=alpha,
            beta_in=beta,
            mask=mask,
            a_log=g.ref("linear_attn.A_log"),
            dt_bias=g.ref("linear_attn.dt_bias"),
            g_decay_out=decay,
            beta_gate_out=beta_gate,
            num_v_heads=hv,
            n_tokens=n,
            n_seqs=seqs,
        )
    )
    delta_out = g.new("delta_out", b.DeltaOutBuf, (n, hv * dv))
    one_token = call.t == 1
    rule = ops.GatedDeltaNetStepNTokens if one_token else ops.GatedDeltaNetChunkwise
    g.push(
        rule(
            label="delta_rule",
            state=state,
            conv_out=conv,
            g_decay=decay,
            beta_gate=beta_gate,
            output=delta_out,
            num_v_heads=hv,
            num_k_heads=hk,
            key_dim=dk,
            value_dim=dv,
            n_tokens=n,
            n_seqs=seqs,
        )
    )
    gated = g.new("gated_norm", b.ValueOutBuf, (n, hv * dv))
    g.push(
        ops.GatedRmsNormNTokens(
            label="gated_norm",
            values=delta_out,
            z=z,
            weight=g.ref("linear_attn.norm"),
            output=gated,
            num_v_heads=hv,
            value_dim=dv,
            n_tokens=n,
            eps=net.layer_norm_epsilon,
        )
    )
    out = g.matvec("linear_attn.out_proj", gated, b.OProjOutBuf)
    return out, {"conv_state": conv_state, "delta_state": state}


def full_attention(
    g: GraphBuilder, attn: nn.Module, x: BufId, call: Call
) -> tuple[BufId, dict[str, BufId]]:
    """Push gated full attention; its caches are inputs and outputs of the graph.

    Outside of traces the KV cache object appends its rows itself.
    """
    heads, kv_heads, d = (
        attn.num_attention_heads,
        attn.num_key_value_heads,
        attn.head_dim,
    )
    n, seqs = call.n, call.n_seqs
    start = g.input("start", b.StartPosBuf, (seqs,))
    frequencies, rope_scale = rotation(attn.rope)
    inv_freq = g.constant("inv_freq", b.RopeInvFreqBuf, frequencies)
    q_proj = g.matvec("self_attn.q_proj", x, b.QProjOutBuf)
    k = g.matvec("self_attn.k_proj", x, b.KProjOutBuf)
    v = g.matvec("self_attn.v_proj", x, b.VProjOutBuf)
    q = g.new("q", b.QBuf, (n, heads * d))
    gate = g.new("q_gate", b.QGateBuf, (n, heads * d))
    g.push(
        ops.SplitQGate(
            label="split_q_gate",
            q_proj=q_proj,
            q_out=q,
            gate_out=gate,
            num_heads=heads,
            head_dim=d,
            n_tokens=n,
        )
    )
    for name, buf, count in (("q", q, heads), ("k", k, kv_heads)):
        g.push(
            ops.RmsNormPerHeadNTokens(
                label=f"{name}_norm",
                x=buf,
                weight=g.ref(f"self_attn.{name}_norm"),
                num_heads=count,
                head_dim=d,
                n_tokens=n,
                eps=attn.q_norm.eps,
            )
        )
        g.push(
            ops.RopeNTokens(
                label=f"{name}_rope",
                x=buf,
                inv_freq=inv_freq,
                start=start,
                n_tokens=n,
                n_seqs=seqs,
                num_heads=count,
                head_dim=d,
                rotary_dim=2 * frequencies.size,
                scale=rope_scale,
            )
        )
    cache_shape = (seqs, kv_heads, None, d)
    keys = g.input("keys", b.KvCacheKBuf, cache_shape)
    values = g.input("values", b.KvCacheVBuf, cache_shape)
    row = g.input("row", b.StartPosBuf, (1,))
    g.push(
        ops.KvCacheAppendNTokens(
            label="kv_append",
            k_src=k,
            v_src=v,
            k_cache=keys,
            v_cache=values,
            row=row,
            n_tokens=n,
            n_seqs=seqs,
            num_kv_heads=kv_heads,
            head_dim=d,
        )
    )
    mask = None
    if call.attention_mask:
        mask = g.input("attention_mask", b.AttnMaskBuf, (None, 1, call.t, None))
    attended = g.new("attended", b.AttnOutBuf, (n, heads * d))
    g.push(
        ops.SdpaCausalTiled(
            label="sdpa",
            q=q,
            k=keys,
            v=values,
            mask=mask,
            start=start if call.spare_rows else None,
            attn_out=attended,
            n_tokens=n,
            n_seqs=seqs,
            num_heads=heads,
            heads_per_kv=heads // kv_heads,
            head_dim=d,
            softmax_scale=attn.scale,
        )
    )
    g.push(
        ops.SigmoidGateNTokens(
            label="attention_gate", x=attended, gate=gate, dim=heads * d, n_tokens=n
        )
    )
    out = g.matvec("self_attn.o_proj", attended, b.OProjOutBuf)
    return out, {"keys": keys, "values": values}


RoutedOp = (
    type[ops.MoeDecodeExperts]
    | type[ops.MoeGatherIdFuse]
    | type[ops.MoeBatchedPermuteFuse]
)


def experts_op(call: Call) -> RoutedOp:
    """Return the Op that runs the routed experts of such calls.

    The choice never depends on the memory budget, so that results do not either.
    """
    if call.n == 1:
        return ops.MoeDecodeExperts
    return ops.MoeGatherIdFuse if call.gather_by_id else ops.MoeBatchedPermuteFuse


def choose_experts(
    g: GraphBuilder, block: nn.Module, logits: BufId, n: int
) -> tuple[BufId, BufId]:
    """Push the choice of each token's K experts, and their weights."""
    k, n_experts = block.top_k, block.num_experts
    indices = g.new("expert_indices", b.RouterIdxBuf, (n, k))
    weights = g.new("expert_weights", b.RouterWeightsBuf, (n, k))
    g.push(
        ops.MoeSoftmaxTopK(
            label="route",
            logits=logits,
            indices_out=indices,
            weights_out=weights,
            n_tokens=n,
            n_experts=n_experts,
            k=k,
        )
    )
    if block.norm_topk_prob:
        g.push(
            ops.MoeNormalizeWeights(
                label="normalize_weights", weights=weights, n_tokens=n, k=k
            )
        )
    return indices, weights


def asking(experts: GraphExperts, k: int) -> Kernel:
    """Return a function that performs ``MoeSoftmaxTopK`` and has them read."""

    def choose(logits: Array) -> tuple[Array, Array]:
        indices, weights = softmax_topk(logits, k)
        experts.ask(to_device(indices))
        return indices, weights

    return choose


def expected_experts(g: GraphBuilder, block: nn.Module, x: BufId, n: int) -> BufId:
    """Push a router on rows that are not quite its own: what it may choose soon."""
    logits = g.matvec("mlp.gate", x, b.RouterLogitsBuf, label="router")
    return choose_experts(g, block, logits, n)[0]


SHARED = "mlp.shared_expert"


def _shared_inputs(g: GraphBuilder, x: BufId) -> tuple[BufId, BufId, BufId]:
    """Push the shared expert's gate over all of it, and its first two matrices."""
    return (
        g.matvec(f"{SHARED}_gate", x, b.SharedGateBuf),
        g.matvec(
            f"{SHARED}.gate_proj", x, b.SharedFfnGateBuf, label="shared_gate_proj"
        ),
        g.matvec(f"{SHARED}.up_proj", x, b.SharedFfnUpBuf, label="shared_up_proj"),
    )


def _shared_output(g: GraphBuilder, gate: BufId, up: BufId, n: int) -> BufId:
    """Push the rest of the shared expert."""
    width = g.ref(f"{SHARED}.gate_proj").shape[0]
    act = g.new("shared_act", b.SharedFfnActBuf, (n, width))
    g.push(
        ops.SwigluFusedBatched(
            label="shared_swiglu", gate=gate, up=up, out=act, n_tokens=n, dim=width
        )
    )
    label = "shared_down_proj"
    return g.matvec(f"{SHARED}.down_proj", act, b.SharedFfnDownBuf, label=label)


def _experts_sum(
    g: GraphBuilder,
    block: nn.Module,
    x: BufId,
    indices: BufId,
    weights: BufId,
    experts: BufId,
    call: Call,
    routed: RoutedShape,
) -> BufId:
    """Push the weighted sum of the routed experts."""
    n, dim = call.n, routed.dim
    out_sum = g.new("experts_sum", b.MoeOutSumBuf, (n, dim))
    kind = experts_op(call)
    if kind is ops.MoeBatchedPermuteFuse:
        g.push(ops.ZeroBuffer(label="zero_sum", buf=out_sum, n_tokens=n, dim=dim))
    g.push(
        kind(
            label="experts",
            mlp_in=x,
            indices=indices,
            weights=weights,
            experts=experts,
            out_sum=out_sum,
            n_tokens=n,
            dim=dim,
            expert_dim=routed.expert_dim,
            n_experts=block.num_experts,
            k=block.top_k,
            expert_bytes=routed.expert_bytes,
        )
    )
    return out_sum


def moe(
    g: GraphBuilder,
    block: nn.Module,
    residual: BufId,
    x: BufId,
    call: Call,
    routed: RoutedShape,
) -> BufId:
    """Push router, shared expert, routed experts and the sum with the residual."""
    n, dim = call.n, routed.dim
    logits = g.matvec("mlp.gate", x, b.RouterLogitsBuf, label="router")
    experts = g.input("experts", b.ExpertBaseBuf, (None,))
    if call.asks_at_once:
        # What does not need them is computed while they are being read.
        indices, weights = choose_experts(g, block, logits, n)
        shared_gate, gate, up = _shared_inputs(g, x)
        down = _shared_output(g, gate, up, n)
        out_sum = _experts_sum(g, block, x, indices, weights, experts, call, routed)
    else:
        # In an order in which launches can perform neighbours together.
        shared_gate, gate, up = _shared_inputs(g, x)
        indices, weights = choose_experts(g, block, logits, n)
        out_sum = _experts_sum(g, block, x, indices, weights, experts, call, routed)
        down = _shared_output(g, gate, up, n)
    hidden = g.new("hidden_out", b.HiddenBuf, (n, dim))
    g.push(
        ops.MoeCombineResidualNTokens(
            label="combine",
            h_mid=residual,
            moe_sum=out_sum,
            shared_out=down,
            shared_gate=shared_gate,
            hidden_out=hidden,
            n_tokens=n,
            dim=dim,
        )
    )
    return hidden
