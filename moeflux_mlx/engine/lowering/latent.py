"""Ways of attention over a compressed cache."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ... import device
from ...experts.weights import Weight
from ..launch import mla as kernels
from ..ops import attention as attention_ops
from ..ops import latent as ops
from .rows import kernel_form, parts
from .table import Run, way

# Rows of the cache that one threadgroup takes: more of them run at once.
TILE = 512


@way(ops.MlaSplitQKv, "mla_split_q_kv")
def split(op: Any, run: Run, q: mx.array, kv: mx.array) -> tuple[mx.array, ...]:
    return run(kernels.mla_split_q_kv(q, kv, op.num_heads, op.nope_dim))


def _pairs_of_one(op: attention_ops.RopeNTokens) -> bool:
    return op.pairs and op.n_seqs == 1 and op.rotary_dim == op.head_dim


@way(attention_ops.RopeNTokens, "yarn_rope_apply", _pairs_of_one)
def rope(
    op: Any, run: Run, x: mx.array, inv_freq: mx.array, start: mx.array
) -> mx.array:
    return run(kernels.yarn_rope_apply(x, inv_freq, start, op.scale))[0]


def _by_rows(op: ops.HeadMatvecNTokens) -> bool:
    q = op.weight.quantization
    narrow = op.in_dim % 32 == 0 and op.in_dim <= kernels.MAX_MATRIX_IN
    four = kernel_form(op.weight) and q is not None and q.bits == 4
    return four and narrow and op.n_tokens == 1


@way(
    ops.HeadMatvecNTokens,
    "mla_q_prime_4bit",
    lambda op: _by_rows(op) and op.out_dim > op.in_dim,
)
def into_latent(_op: Any, run: Run, x: mx.array, weight: Weight) -> mx.array:
    return run(kernels.mla_q_prime_4bit(x, *parts(weight)))[0]


@way(ops.HeadMatvecNTokens, "mla_out_per_head_4bit", _by_rows)
def out_of_latent(_op: Any, run: Run, x: mx.array, weight: Weight) -> mx.array:
    return run(kernels.mla_out_per_head_4bit(x, *parts(weight)))[0]


def _one_token(op: ops.SdpaLatentCausal) -> bool:
    known = op.latent_dim % kernels.SIMD == 0 and op.latent_dim <= kernels.MAX_LATENT
    one = op.n_tokens == 1 and op.mask is None
    return known and one and op.rope_dim <= kernels.MAX_ROPE


@way(
    ops.SdpaLatentCausal,
    "mla_sdpa_folded",
    _one_token,
    ("mla_sdpa_folded", "mla_sdpa_tile_accumulate", "mla_sdpa_tile_finalize"),
)
def attend(
    op: Any,
    run: Run,
    q: mx.array,
    q_pe: mx.array,
    latent: mx.array,
    rope: mx.array,
    _: None,
    start: mx.array | None,
) -> mx.array:
    """Attend in one launch over a short cache, in tiles over a long one."""
    seen = None if start is None else (start + 1).astype(mx.uint32)
    given = q, q_pe, latent[0, 0], rope[0, 0], op.softmax_scale
    if latent.shape[2] <= TILE:
        return run(kernels.mla_sdpa_folded(*given, seen))[0]
    tiles = run(kernels.mla_sdpa_tile_accumulate(*given, TILE, seen))
    return run(kernels.mla_sdpa_tile_finalize(*tiles, op.num_heads, q.dtype))[0]


def _compressed(op: attention_ops.KvCacheAppendNTokens) -> bool:
    return bool(op.value_dim) and op.n_seqs == op.num_kv_heads == 1


@way(attention_ops.KvCacheAppendNTokens, "mla_kv_cache_append", _compressed)
def append(
    op: Any,
    run: Run,
    latent: mx.array,
    k_pe: mx.array,
    latents: mx.array,
    ropes: mx.array,
    row: mx.array,
) -> tuple[mx.array, ...]:
    if latents.nbytes > device.COPIED_CACHE_BYTES:
        return op.reference(latent, k_pe, latents, ropes, row)
    new = kernels.mla_kv_cache_append(latents[0, 0], ropes[0, 0], latent, k_pe, row)
    return tuple(x[None, None] for x in run(new))
