"""Causal attention with rotary positions.

Letters: B sequences, T tokens each, N = B T, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.nn as nn

from ...errors import ModelError
from .. import ops
from ..blocks import Call, SameInput, Shapes
from ..context import Context
from ..graph import BufId
from ..graph import roles as b
from ..model import GraphBuilder
from ..ops.functions import Array
from ..rotation import rotation
from .base import Begun, CacheShapes, Pushed
from .cached import Rotary, append_rows, begin_rows, end_rows, mask_input


@dataclass(frozen=True, eq=False)
class Attention:
    """Causal attention with rotary positions over keys and values of all tokens.

    Args:
        gated: ``q_proj`` projects to each head's query and a gate on its output.
        norms: the projections that are normalised.
        row_norms: a norm covers the row of all heads, not each head alone.
        biases: the projections that add a bias.
        sinks: the softmax of each head has one more score, without a value.
        window: number of last tokens that a token sees, itself included; None: all.
        scale_name: mlx-lm's name of the factor of scores.
    """

    heads: int
    kv_heads: int
    head_dim: int
    gated: bool = False
    norms: tuple[str, ...] = ("q", "k")
    row_norms: bool = False
    biases: tuple[str, ...] = ()
    sinks: bool = False
    window: int | None = None
    scale_name: str = "scale"
    path: str = "self_attn"
    name: ClassVar[str] = "full attention"
    grows: ClassVar[bool] = True

    @property
    def same_input(self) -> SameInput:
        """Paths of the input projections."""
        return (tuple(f"{self.path}.{part}_proj" for part in "qkv"),)

    @property
    def cache_shapes(self) -> CacheShapes:
        """Keys and values."""
        return ((1, self.kv_heads, None, self.head_dim),) * 2

    def shapes(self, dim: int) -> Shapes:
        """Return the unpacked shapes of its tensors by path below the layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "q_proj.weight": ((1 + self.gated) * queries, dim),
            "k_proj.weight": (keys, dim),
            "v_proj.weight": (keys, dim),
            "o_proj.weight": (dim, queries),
        }
        for part in self.norms:
            row = shapes[f"{part}_proj.weight"][:1]
            shapes[f"{part}_norm.weight"] = row if self.row_norms else (self.head_dim,)
        if self.sinks:
            shapes["sinks"] = (self.heads,)
        for part in self.biases:
            shapes[f"{part}_proj.bias"] = shapes[f"{part}_proj.weight"][:1]
        return {f"{self.path}.{name}": shape for name, shape in shapes.items()}

    def check(self, module: nn.Module) -> None:
        """Raise ModelError for rotary positions that kernels cannot compute."""
        rotation(module.rope)

    def begin(
        self, module: nn.Module, cache: Any, context: Context, *, spare: bool
    ) -> Begun:
        """Return positions, the mask, and the Ops that the cache object performs."""
        if self.sinks and hasattr(cache, "bits"):
            raise ModelError(
                "[cache] expected an unquantised cache, since attention has sinks, but "
                f"got {type(cache).__name__}: leave kv_bits out"
            )
        sizes = self.heads, self.kv_heads, getattr(module, self.scale_name)
        return begin_rows(cache, context, *sizes, window=self.window, spare=spare)

    def end(self, cache: Any, state: Mapping[str, Array], context: Context) -> None:
        """Give a traced cache its new arrays; other caches appended the rows."""
        end_rows(cache, state, context)

    def push(self, g: GraphBuilder, attn: nn.Module, x: BufId, call: Call) -> Pushed:
        """Push the Ops; keys and values are inputs and outputs of the graph.

        Unless MLX traces the call, mlx-lm's cache object appends the rows.
        """
        heads, kv_heads, d = self.heads, self.kv_heads, self.head_dim
        n, seqs = call.n, call.n_seqs
        start = g.input("start", b.StartPosBuf, (seqs,))
        q, k, v, gate = self._projections(g, x, n)
        rotary = Rotary.of(attn.rope, g, call, start)
        q = self._place_heads(g, attn, "q", q, rotary)
        k = self._place_heads(g, attn, "k", k, rotary)
        keys, values = append_rows(g, k, v, call, heads=kv_heads, width=d)
        mask = mask_input(g, call)
        last = None
        if call.spare_rows:
            ring = self.window is not None
            last = g.input("last", b.StartPosBuf, (seqs,)) if ring else start
        attended = g.new("attended", b.AttnOutBuf, (n, heads * d))
        g.push(
            ops.SdpaCausalTiled(
                label="sdpa",
                q=q,
                k=keys,
                v=values,
                mask=mask,
                start=last,
                attn_out=attended,
                n_tokens=n,
                n_seqs=seqs,
                num_heads=heads,
                heads_per_kv=heads // kv_heads,
                head_dim=d,
                softmax_scale=getattr(attn, self.scale_name),
                sinks=g.ref(f"{self.path}.sinks") if self.sinks else None,
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
        """Push queries, keys, values and the gate, which may be None."""
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
        self, g: GraphBuilder, attn: nn.Module, name: str, x: BufId, rotary: Rotary
    ) -> BufId:
        """Push the norm and the rotary positions of queries or keys."""
        count, d = self.kv_heads if name == "k" else self.heads, self.head_dim
        if name in self.norms and self.row_norms:
            role = b.KProjOutBuf if name == "k" else b.QBuf
            x = g.norm(f"{self.path}.{name}_norm", x, role, attn[f"{name}_norm"].eps)
        elif name in self.norms:
            g.push(
                ops.RmsNormPerHeadNTokens(
                    label=f"{name}_norm",
                    x=x,
                    weight=g.ref(f"{self.path}.{name}_norm"),
                    num_heads=count,
                    head_dim=d,
                    n_tokens=rotary.call.n,
                    eps=attn[f"{name}_norm"].eps,
                )
            )
        rotary.push(name, x, count, d)
        return x
