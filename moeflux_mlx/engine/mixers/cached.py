"""The parts of attention that concern its cache of rows and rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from .. import ops
from ..blocks import Call
from ..context import Context, cache_ops, has_spare_rows
from ..graph import BufId
from ..graph import roles as b
from ..model import GraphBuilder
from ..ops.functions import Array
from ..rotation import rotation
from .base import Begun


def begin_rows(
    cache: Any,
    context: Context,
    heads: int,
    kv_heads: int,
    scale: float,
    *,
    window: int | None = None,
    spare: bool,
) -> Begun:
    """Return positions, the mask, and the Ops that the cache object performs.

    Args:
        heads: number of query heads; ``kv_heads`` of keys and values.
        scale: factor of the scores.
        window: number of last tokens that a token sees, itself included; None: all.
        spare: kernels can read a cache with spare rows without slicing it.
    """
    mask, traced = context.masks[window], context.traced
    # Slices of a growing cache would be copied, and compiled again, at every token.
    kept = traced or has_spare_rows(cache, window)
    one = mask is None and context.t == 1 and kept
    spare_rows = traced or (one and spare)
    row, last = context.start[:1], None
    if spare_rows and window is not None:
        row = cache.row if traced else row
        last = context.last_row(cache.keys.shape[2] if traced else window)
    inputs = {
        "start": context.start,
        "row": row,
        "last": last,
        "keys": cache.keys if traced else None,
        "values": cache.values if traced else None,
        "attention_mask": mask,
    }
    masks = {"attention_mask": mask is not None, "spare_rows": spare_rows}
    masks["traced"] = traced
    if traced:
        return Begun(masks, inputs)
    host = cache_ops(heads, kv_heads, scale, cache, context, spare_rows)
    return Begun(masks, inputs, host)


def end_rows(cache: Any, state: Mapping[str, Array], context: Context) -> None:
    """Give a traced cache its new arrays; other caches appended the rows."""
    if context.traced:
        cache.keys, cache.values = state["keys"], state["values"]


def append_rows(
    g: GraphBuilder,
    k: BufId,
    v: BufId,
    call: Call,
    *,
    heads: int,
    width: int,
    value_width: int = 0,
) -> tuple[BufId, BufId]:
    """Push the append to the cache; unless traced, mlx-lm's object performs it.

    Args:
        value_width: width of values if it is another than that of keys.
    """
    seqs = call.n_seqs
    keys = g.input("keys", b.KvCacheKBuf, (seqs, heads, None, width))
    values = g.input("values", b.KvCacheVBuf, (seqs, heads, None, value_width or width))
    row = g.input("row", b.StartPosBuf, (1,))
    g.push(
        ops.KvCacheAppendNTokens(
            label="kv_append",
            k_src=k,
            v_src=v,
            k_cache=keys,
            v_cache=values,
            row=row,
            n_tokens=call.n,
            n_seqs=seqs,
            num_kv_heads=heads,
            head_dim=width,
            value_dim=value_width,
            of_arrays=call.traced,
        )
    )
    return keys, values


def mask_input(g: GraphBuilder, call: Call) -> BufId | None:
    """Return the graph's mask, or None if only causality hides tokens."""
    if not call.attention_mask:
        return None
    return g.input("attention_mask", b.AttnMaskBuf, (None, 1, call.t, None))


@dataclass(frozen=True)
class Rotary:
    """The rotary positions of one layer in a graph."""

    g: GraphBuilder
    call: Call
    start: BufId
    inv_freq: BufId
    rotary_dim: int
    scale: float
    pairs: bool

    @classmethod
    def of(
        cls,
        rope: nn.Module,
        g: GraphBuilder,
        call: Call,
        start: BufId,
        *,
        pairs: bool = False,
    ) -> Rotary:
        """Return the positions of mlx-lm's module; ``pairs`` as in ``rotation``."""
        frequencies, scale = rotation(rope, pairs=pairs)
        inv_freq = g.constant("inv_freq", b.RopeInvFreqBuf, frequencies)
        return cls(g, call, start, inv_freq, 2 * frequencies.size, scale, pairs)

    def push(self, name: str, x: BufId, heads: int, width: int) -> None:
        """Push the rotation of ``heads`` of a width."""
        self.g.push(
            ops.RopeNTokens(
                label=f"{name}_rope",
                x=x,
                inv_freq=self.inv_freq,
                start=self.start,
                n_tokens=self.call.n,
                n_seqs=self.call.n_seqs,
                num_heads=heads,
                head_dim=width,
                rotary_dim=self.rotary_dim,
                scale=self.scale,
                pairs=self.pairs,
            )
        )
