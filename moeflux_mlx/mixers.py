"""Mixers: how a layer lets a token see those before it, and what it keeps of them.

A form says how a family's mixer is built, in numbers. Its parameters, rotary positions
and epsilons are those of mlx-lm's module, so one form serves every family that has one
like it.

Letters: B sequences, T tokens each, N = B T, D model width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .blocks import Call, SameInput, Shapes, rotation
from .context import Context, cache_ops, has_spare_rows
from .graph import BufId, Op
from .graph import roles as b
from .graph.lower import Kernel
from .model import GraphBuilder
from .ops.functions import Array, to_device

# The arrays of a layer's cache for one sequence, ``[1, H, None, d]`` if they grow.
CacheShapes = tuple[tuple[int | None, ...], ...]
Pushed = tuple[BufId, dict[str, BufId]]


@dataclass(frozen=True)
class Begun:
    """What a call of a mixer begins with.

    ``masks`` are fields of a ``Call``; ``inputs`` its graph's by name; ``host`` the Ops
    that a cache object performs itself.
    """

    masks: Mapping[str, bool]
    inputs: Mapping[str, Any]
    host: Mapping[type[Op], Kernel] | None = None


class Mixer(Protocol):
    """What a layer asks of its mixer."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def path(self) -> str:
        """Where mlx-lm's layer keeps its module."""

    @property
    def grows(self) -> bool:
        """Whether its cache has a row for each token."""

    @property
    def same_input(self) -> SameInput:
        """Its matrices that read the same row, by path."""

    @property
    def cache_shapes(self) -> CacheShapes:
        """The arrays of its cache for one sequence."""

    def shapes(self, dim: int) -> Shapes:
        """Return its tensors by path below the layer, as they are once unpacked."""

    def check(self, module: nn.Module) -> None:
        """Raise ModelError for a module that graphs cannot perform."""

    def begin(
        self, module: nn.Module, cache: Any, context: Context, *, spare: bool
    ) -> Begun:
        """Return what its graph is given for a call.

        Args:
            spare: kernels can read a cache with room for later rows as it is.
        """

    def push(self, g: GraphBuilder, module: nn.Module, x: BufId, call: Call) -> Pushed:
        """Push its Ops; return what it gives and what becomes of its cache by name."""

    def end(self, cache: Any, state: Mapping[str, Array], context: Context) -> None:
        """Move its cache on."""


@dataclass(frozen=True, eq=False)
class GatedDeltaNet:
    """A gated DeltaNet: a convolution and the delta rule, with a state of one size.

    Args:
        taps_last: how files have the convolution: ``[C, 1, width]`` before mlx-lm's
            conversion, ``[C, width, 1]`` after it.
    """

    k_heads: int
    v_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    taps_last: bool = False
    path: str = "linear_attn"
    name: ClassVar[str] = "linear attention"
    grows: ClassVar[bool] = False

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution."""
        return 2 * self.k_heads * self.key_dim + self.v_heads * self.value_dim

    @property
    def same_input(self) -> SameInput:
        """The projections in."""
        parts = ("qkv", "z", "b", "a")
        return (tuple(f"{self.path}.in_proj_{part}" for part in parts),)

    @property
    def cache_shapes(self) -> CacheShapes:
        """The convolution's last rows, and the state."""
        state = (1, self.v_heads, self.value_dim, self.key_dim)
        return (1, self.conv_width - 1, self.conv_dim), state

    def shapes(self, dim: int) -> Shapes:
        """Return the tensors by path below the layer, as they are once unpacked."""
        values, conv, width = (
            self.v_heads * self.value_dim,
            self.conv_dim,
            self.conv_width,
        )
        shapes = {
            "in_proj_qkv.weight": (conv, dim),
            "in_proj_z.weight": (values, dim),
            "in_proj_b.weight": (self.v_heads, dim),
            "in_proj_a.weight": (self.v_heads, dim),
            "conv1d.weight": (conv, 1, width) if self.taps_last else (conv, width, 1),
            "dt_bias": (self.v_heads,),
            "A_log": (self.v_heads,),
            "norm.weight": (self.value_dim,),
            "out_proj.weight": (dim, values),
        }
        return {f"{self.path}.{name}": shape for name, shape in shapes.items()}

    def check(self, module: nn.Module) -> None:
        """Accept any: all that it is made of is in the form."""

    def begin(
        self, module: nn.Module, cache: Any, context: Context, *, spare: bool
    ) -> Begun:
        """Return states and masks; an empty cache begins with zeros."""
        conv, delta, lengths = None, None, None
        if cache is not None:
            conv, delta, lengths = cache[0], cache[1], cache.lengths
        seqs = context.n_seqs
        if conv is None:
            conv = mx.zeros((seqs, self.conv_width - 1, self.conv_dim))
        if delta is None:
            delta = mx.zeros((seqs, self.v_heads, self.value_dim, self.key_dim))
        mask = context.sequence_mask
        inputs = {
            "conv_state": context.move(conv.astype(context.dtype)),
            "delta_state": context.move(delta.astype(mx.float32)),
            "sequence_mask": mask,
            "lengths": context.move(lengths),
        }
        masks = {"sequence_mask": mask is not None, "lengths": lengths is not None}
        return Begun(masks, inputs)

    def end(self, cache: Any, state: Mapping[str, Array], context: Context) -> None:
        """Give the cache the new states."""
        if cache is not None:
            cache[0] = to_device(state["conv_state"])
            cache[1] = to_device(state["delta_state"])
            cache.advance(context.t)

    def push(self, g: GraphBuilder, net: nn.Module, x: BufId, call: Call) -> Pushed:
        """Push all of it; its states are inputs and outputs of the graph."""
        hk, hv, dk, dv = self.k_heads, self.v_heads, self.key_dim, self.value_dim
        n, seqs, conv_dim = call.n, call.n_seqs, self.conv_dim
        qkv = g.matvec(f"{self.path}.in_proj_qkv", x, b.QkvStackBuf)
        z = g.matvec(f"{self.path}.in_proj_z", x, b.ZStackBuf)
        beta = g.matvec(f"{self.path}.in_proj_b", x, b.BetaStackBuf)
        alpha = g.matvec(f"{self.path}.in_proj_a", x, b.AlphaStackBuf)
        width = self.conv_width
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
                weight=g.ref(f"{self.path}.conv1d"),
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
                a_log=g.ref(f"{self.path}.A_log"),
                dt_bias=g.ref(f"{self.path}.dt_bias"),
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
                weight=g.ref(f"{self.path}.norm"),
                output=gated,
                num_v_heads=hv,
                value_dim=dv,
                n_tokens=n,
                eps=net.layer_norm_epsilon,
            )
        )
        out = g.matvec(f"{self.path}.out_proj", gated, b.OProjOutBuf)
        return out, {"conv_state": conv_state, "delta_state": state}


@dataclass(frozen=True, eq=False)
class Attention:
    """Causal attention with rotary positions over keys and values of all tokens.

    Args:
        gated: ``q_proj`` gives each head's query and a gate on what it attends to.
        norms: the projections whose heads are normalised.
    """

    heads: int
    kv_heads: int
    head_dim: int
    gated: bool = False
    norms: tuple[str, ...] = ("q", "k")
    path: str = "self_attn"
    name: ClassVar[str] = "full attention"
    grows: ClassVar[bool] = True

    @property
    def same_input(self) -> SameInput:
        """The projections in."""
        return (tuple(f"{self.path}.{part}_proj" for part in "qkv"),)

    @property
    def cache_shapes(self) -> CacheShapes:
        """Keys and values."""
        return ((1, self.kv_heads, None, self.head_dim),) * 2

    def shapes(self, dim: int) -> Shapes:
        """Return the tensors by path below the layer, as they are once unpacked."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "q_proj.weight": ((1 + self.gated) * queries, dim),
            "k_proj.weight": (keys, dim),
            "v_proj.weight": (keys, dim),
            "o_proj.weight": (dim, queries),
            **{f"{part}_norm.weight": (self.head_dim,) for part in self.norms},
        }
        return {f"{self.path}.{name}": shape for name, shape in shapes.items()}

    def check(self, module: nn.Module) -> None:
        """Raise ModelError for rotary positions that no kernel has."""
        rotation(module.rope)

    def begin(
        self, module: nn.Module, cache: Any, context: Context, *, spare: bool
    ) -> Begun:
        """Return positions, the mask, and how the cache object takes new rows."""
        mask, traced = context.attention_mask, context.traced
        # Slices of a growing cache would be copied, and traced anew, at every token.
        one = mask is None and context.t == 1 and has_spare_rows(cache)
        spare_rows = traced or (one and spare)
        inputs = {
            "start": context.start,
            "row": context.start[:1],
            "keys": cache.keys if traced else None,
            "values": cache.values if traced else None,
            "attention_mask": mask,
        }
        masks = {"attention_mask": mask is not None, "spare_rows": spare_rows}
        if traced:
            return Begun(masks, inputs)
        sizes = self.heads, self.kv_heads, module.scale
        return Begun(masks, inputs, cache_ops(*sizes, cache, context, spare_rows))

    def end(self, cache: Any, state: Mapping[str, Array], context: Context) -> None:
        """Give a traced cache its new arrays; others took the rows themselves."""
        if context.traced:
            cache.keys, cache.values = state["keys"], state["values"]

    def push(self, g: GraphBuilder, attn: nn.Module, x: BufId, call: Call) -> Pushed:
        """Push all of it; its caches are inputs and outputs of the graph.

        Outside of traces the KV cache object appends its rows itself.
        """
        heads, kv_heads, d = self.heads, self.kv_heads, self.head_dim
        n, seqs = call.n, call.n_seqs
        start = g.input("start", b.StartPosBuf, (seqs,))
        q, k, v, gate = self._projections(g, x, n)
        self._place_heads(g, attn, {"q": (q, heads), "k": (k, kv_heads)}, start, call)
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
        if gate is not None:
            dim = heads * d
            g.push(
                ops.SigmoidGateNTokens(
                    label="attention_gate", x=attended, gate=gate, dim=dim, n_tokens=n
                )
            )
        out = g.matvec(f"{self.path}.o_proj", attended, b.OProjOutBuf)
        return out, {"keys": keys, "values": values}

    def _projections(
        self, g: GraphBuilder, x: BufId, n: int
    ) -> tuple[BufId, BufId, BufId, BufId | None]:
        """Push queries, keys, values and the gate, None where there is none."""
        heads, d = self.heads, self.head_dim
        role = b.QProjOutBuf if self.gated else b.QBuf
        q: BufId = g.matvec(f"{self.path}.q_proj", x, role)
        k = g.matvec(f"{self.path}.k_proj", x, b.KProjOutBuf)
        v = g.matvec(f"{self.path}.v_proj", x, b.VProjOutBuf)
        if not self.gated:
            return q, k, v, None
        query = g.new("q", b.QBuf, (n, heads * d))
        gate = g.new("q_gate", b.QGateBuf, (n, heads * d))
        g.push(
            ops.SplitQGate(
                label="split_q_gate",
                q_proj=q,
                q_out=query,
                gate_out=gate,
                num_heads=heads,
                head_dim=d,
                n_tokens=n,
            )
        )
        return query, k, v, gate

    def _place_heads(
        self,
        g: GraphBuilder,
        attn: nn.Module,
        parts: Mapping[str, tuple[BufId, int]],
        start: BufId,
        call: Call,
    ) -> None:
        """Push norms and rotary positions of projections, each with its heads."""
        frequencies, scale = rotation(attn.rope)
        inv_freq = g.constant("inv_freq", b.RopeInvFreqBuf, frequencies)
        for name, (buf, count) in parts.items():
            if name in self.norms:
                g.push(
                    ops.RmsNormPerHeadNTokens(
                        label=f"{name}_norm",
                        x=buf,
                        weight=g.ref(f"{self.path}.{name}_norm"),
                        num_heads=count,
                        head_dim=self.head_dim,
                        n_tokens=call.n,
                        eps=attn[f"{name}_norm"].eps,
                    )
                )
            g.push(
                ops.RopeNTokens(
                    label=f"{name}_rope",
                    x=buf,
                    inv_freq=inv_freq,
                    start=start,
                    n_tokens=call.n,
                    n_seqs=call.n_seqs,
                    num_heads=count,
                    head_dim=self.head_dim,
                    rotary_dim=2 * frequencies.size,
                    scale=scale,
                )
            )
