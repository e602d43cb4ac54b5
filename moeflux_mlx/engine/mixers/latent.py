"""Attention over a compressed cache (MLA): all heads read one latent row per token.

Letters as in ``ops/latent.py``.
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
class LatentAttention:
    """Causal attention whose cache has a latent row and a rope key for each token.

    Args:
        q_rank: width of the row that queries are projected from; None: the model's.
        biases: the input and output projections add biases.
        joint_kv: files have the heads' matrices as ``kv_b_proj``, before mlx-lm's
            conversion; else as ``embed_q`` and ``unembed_out``.
    """

    heads: int
    latent_dim: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int | None
    biases: bool = False
    joint_kv: bool = False
    path: str = "self_attn"
    name: ClassVar[str] = "latent attention"
    grows: ClassVar[bool] = True
    window: ClassVar[None] = None

    @property
    def same_input(self) -> SameInput:
        """Paths of the input projections."""
        first = "q_proj" if self.q_rank is None else "q_a_proj"
        return ((f"{self.path}.{first}", f"{self.path}.kv_a_proj_with_mqa"),)

    @property
    def cache_shapes(self) -> CacheShapes:
        """Latent rows in place of keys, rope keys in place of values."""
        return (1, 1, None, self.latent_dim), (1, 1, None, self.rope_dim)

    def shapes(self, dim: int) -> Shapes:
        """Return the unpacked shapes of its tensors by path below the layer."""
        heads, latent = self.heads, self.latent_dim
        queries, values = (
            heads * (self.nope_dim + self.rope_dim),
            heads * self.value_dim,
        )
        shapes: dict[str, tuple[int, ...]] = {
            "kv_a_proj_with_mqa.weight": (latent + self.rope_dim, dim),
            "kv_a_layernorm.weight": (latent,),
            "o_proj.weight": (dim, values),
        }
        if self.q_rank is None:
            shapes["q_proj.weight"] = (queries, dim)
        else:
            shapes["q_a_proj.weight"] = (self.q_rank, dim)
            shapes["q_a_layernorm.weight"] = (self.q_rank,)
            shapes["q_b_proj.weight"] = (queries, self.q_rank)
        if self.joint_kv:
            shapes["kv_b_proj.weight"] = (heads * self.nope_dim + values, latent)
        else:
            shapes["embed_q.weight"] = (heads, latent, self.nope_dim)
            shapes["unembed_out.weight"] = (heads, self.value_dim, latent)
        if self.biases:
            for part in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
                if (weight := shapes.get(f"{part}.weight")) is not None:
                    shapes[f"{part}.bias"] = weight[:1]
        return {f"{self.path}.{name}": shape for name, shape in shapes.items()}

    def check(self, module: nn.Module) -> None:
        """Raise ModelError for rotary positions that kernels cannot compute."""
        rotation(module.rope, pairs=True)

    def begin(
        self, module: nn.Module, cache: Any, context: Context, *, spare: bool
    ) -> Begun:
        """Return positions, the mask, and the Ops that the cache object performs.

        Raises:
            ModelError: the cache is quantised; mlx-lm's layer cannot read it either.
        """
        if hasattr(cache, "bits"):
            raise ModelError(
                "[cache] expected an unquantised cache of latent rows but got one of "
                f"{cache.bits} bits: leave kv_bits out"
            )
        return begin_rows(cache, context, self.heads, 1, module.scale, spare=spare)

    def end(self, cache: Any, state: Mapping[str, Array], context: Context) -> None:
        """Give a traced cache its new arrays; other caches appended the rows."""
        end_rows(cache, state, context)

    def push(self, g: GraphBuilder, attn: nn.Module, x: BufId, call: Call) -> Pushed:
        """Push the Ops; the caches are inputs and outputs of the graph."""
        n, seqs, heads, latent_dim = call.n, call.n_seqs, self.heads, self.latent_dim
        start = g.input("start", b.StartPosBuf, (seqs,))
        q_nope, q_pe, latent, k_pe = self._projections(g, attn, x, n)
        rotary = Rotary.of(attn.rope, g, call, start, pairs=True)
        rotary.push("q_pe", q_pe, heads, self.rope_dim)
        rotary.push("k_pe", k_pe, 1, self.rope_dim)
        widths = {"width": latent_dim, "value_width": self.rope_dim}
        keys, values = append_rows(g, latent, k_pe, call, heads=1, **widths)
        mask = mask_input(g, call)
        query = self._by_head(g, "embed_q", q_nope, b.LatentQueryBuf, n)
        context = g.new("context", b.LatentContextBuf, (n, heads * latent_dim))
        g.push(
            ops.SdpaLatentCausal(
                label="sdpa",
                q=query,
                q_pe=q_pe,
                latent=keys,
                rope=values,
                mask=mask,
                start=start if call.spare_rows else None,
                context=context,
                n_tokens=n,
                n_seqs=seqs,
                num_heads=heads,
                latent_dim=latent_dim,
                rope_dim=self.rope_dim,
                softmax_scale=attn.scale,
            )
        )
        attended = self._by_head(g, "unembed_out", context, b.AttnOutBuf, n)
        out = g.matvec(f"{self.path}.o_proj", attended, b.OProjOutBuf)
        return out, {"keys": keys, "values": values}

    def _projections(
        self, g: GraphBuilder, attn: nn.Module, x: BufId, n: int
    ) -> tuple[BufId, BufId, BufId, BufId]:
        """Push queries without and with positions, the latent row and the rope key."""
        path, heads = self.path, self.heads
        kv_name = f"{path}.kv_a_proj_with_mqa"
        q: BufId
        if self.q_rank is None:
            q = g.matvec(f"{path}.q_proj", x, b.MlaQBuf)
            kv = g.matvec(kv_name, x, b.MlaKvBuf)
        else:
            rank = g.matvec(f"{path}.q_a_proj", x, b.QRankBuf)
            kv = g.matvec(kv_name, x, b.MlaKvBuf)
            eps = attn.q_a_layernorm.eps
            normed = g.norm(f"{path}.q_a_layernorm", rank, b.QRankNormBuf, eps)
            q = g.matvec(f"{path}.q_b_proj", normed, b.MlaQBuf)
        q_nope = g.new("q_nope", b.QNopeBuf, (n, heads * self.nope_dim))
        q_pe = g.new("q_pe", b.QRopeBuf, (n, heads * self.rope_dim))
        latent = g.new("latent", b.LatentBuf, (n, self.latent_dim))
        k_pe = g.new("k_pe", b.RopeKeyBuf, (n, self.rope_dim))
        g.push(
            ops.MlaSplitQKv(
                label="split_q_kv",
                q=q,
                kv=kv,
                q_nope=q_nope,
                q_pe=q_pe,
                latent=latent,
                k_pe=k_pe,
                n_tokens=n,
                num_heads=heads,
                nope_dim=self.nope_dim,
                rope_dim=self.rope_dim,
                latent_dim=self.latent_dim,
            )
        )
        eps = attn.kv_a_layernorm.eps
        normed_latent = g.norm(f"{path}.kv_a_layernorm", latent, b.LatentKeyBuf, eps)
        return q_nope, q_pe, normed_latent, k_pe

    def _by_head(
        self, g: GraphBuilder, name: str, x: BufId, role: type[b.HeadsOut], n: int
    ) -> BufId:
        """Push the product of each head's values and its own matrix."""
        weight = g.ref(f"{self.path}.{name}")
        heads, out_dim, in_dim = weight.shape
        out = g.new(name, role, (n, heads * out_dim))
        g.push(
            ops.HeadMatvecNTokens(
                label=name,
                weight=weight,
                input=x,
                output=out,
                num_heads=heads,
                in_dim=in_dim,
                out_dim=out_dim,
                n_tokens=n,
            )
        )
        return out
