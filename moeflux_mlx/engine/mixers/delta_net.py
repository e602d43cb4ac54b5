"""Gated DeltaNet: a convolution and the delta rule.

Letters: B sequences, N tokens of all of them, C channels of the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..blocks import Call, SameInput, Shapes
from ..context import Context
from ..graph import BufId
from ..graph import roles as b
from ..model import GraphBuilder
from ..ops.functions import Array, to_device
from .base import Begun, CacheShapes, Pushed


@dataclass(frozen=True, eq=False)
class GatedDeltaNet:
    """A gated DeltaNet: a convolution and the delta rule, with a state of fixed size.

    Args:
        taps_last: files have the convolution as ``[C, 1, width]``, before mlx-lm's
            conversion; else as ``[C, width, 1]``.
        by_key: one matrix projects to q, k, v and z, and one to b and a, key head after
            key head; else one projects to q, k and v, and one to each of the others.
    """

    k_heads: int
    v_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    taps_last: bool = False
    by_key: bool = False
    path: str = "linear_attn"
    name: ClassVar[str] = "linear attention"
    grows: ClassVar[bool] = False
    window: ClassVar[None] = None

    @property
    def conv_dim(self) -> int:
        """Number of channels of the convolution."""
        return 2 * self.k_heads * self.key_dim + self.v_heads * self.value_dim

    @property
    def same_input(self) -> SameInput:
        """Paths of the input projections."""
        return (tuple(f"{self.path}.in_proj_{part}" for part in self._inputs),)

    @property
    def _inputs(self) -> Mapping[str, int]:
        """Rows of the input projections, by the last part of their names."""
        values = self.v_heads * self.value_dim
        if self.by_key:
            return {"qkvz": self.conv_dim + values, "ba": 2 * self.v_heads}
        heads = self.v_heads
        return {"qkv": self.conv_dim, "z": values, "b": heads, "a": heads}

    @property
    def cache_shapes(self) -> CacheShapes:
        """The convolution's last rows and the state."""
        state = (1, self.v_heads, self.value_dim, self.key_dim)
        return (1, self.conv_width - 1, self.conv_dim), state

    def shapes(self, dim: int) -> Shapes:
        """Return the unpacked shapes of its tensors by path below the layer."""
        values, conv, width = (
            self.v_heads * self.value_dim,
            self.conv_dim,
            self.conv_width,
        )
        shapes = {
            **{f"in_proj_{part}.weight": (n, dim) for part, n in self._inputs.items()},
            "conv1d.weight": (conv, 1, width) if self.taps_last else (conv, width, 1),
            "dt_bias": (self.v_heads,),
            "A_log": (self.v_heads,),
            "norm.weight": (self.value_dim,),
            "out_proj.weight": (dim, values),
        }
        return {f"{self.path}.{name}": shape for name, shape in shapes.items()}

    def check(self, module: nn.Module) -> None:
        """Accept any module: the form describes all of it."""

    def begin(
        self, module: nn.Module, cache: Any, context: Context, *, spare: bool
    ) -> Begun:
        """Return states and masks; an empty cache starts with zeros."""
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
        """Push the Ops; the states are inputs and outputs of the graph."""
        hk, hv, dk, dv = self.k_heads, self.v_heads, self.key_dim, self.value_dim
        n, seqs, conv_dim = call.n, call.n_seqs, self.conv_dim
        qkv, z, beta, alpha = self._projections(g, x, n)
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

    def _projections(
        self, g: GraphBuilder, x: BufId, n: int
    ) -> tuple[BufId, BufId, BufId, BufId]:
        """Push the projections: q, k and v as one, z, b and a."""
        path, heads = f"{self.path}.in_proj", self.v_heads
        if not self.by_key:
            return (
                g.matvec(f"{path}_qkv", x, b.QkvStackBuf),
                g.matvec(f"{path}_z", x, b.ZStackBuf),
                g.matvec(f"{path}_b", x, b.BetaStackBuf),
                g.matvec(f"{path}_a", x, b.AlphaStackBuf),
            )
        qkvz = g.matvec(f"{path}_qkvz", x, b.QkvzStackBuf)
        ba = g.matvec(f"{path}_ba", x, b.BetaAlphaStackBuf)
        qkv = g.new("qkv", b.QkvStackBuf, (n, self.conv_dim))
        z = g.new("z", b.ZStackBuf, (n, heads * self.value_dim))
        beta = g.new("beta", b.BetaStackBuf, (n, heads))
        alpha = g.new("alpha", b.AlphaStackBuf, (n, heads))
        g.push(
            ops.PartKeyHeadsNTokens(
                label="part_key_heads",
                qkvz=qkvz,
                ba=ba,
                qkv_out=qkv,
                z_out=z,
                beta_out=beta,
                alpha_out=alpha,
                num_k_heads=self.k_heads,
                num_v_heads=heads,
                key_dim=self.key_dim,
                value_dim=self.value_dim,
                n_tokens=n,
            )
        )
        return qkv, z, beta, alpha
