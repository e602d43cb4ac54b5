"""Ways of attention over a compressed cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ... import device
from ...experts.weights import Weight
from ..launch import mla as kernels
from ..ops import attention as attention_ops
from ..ops import latent as ops
from ..ops.attention import join_heads, split_heads
from ..ops.functions import attention, dequantize
from .registry import Run, Values, fusion, way
from .rows import kernel_form, parts

# Tiles of the cache run at once, each in a threadgroup for eight heads. Fewer rows per
# tile do not repay another launch; the sums of more tiles exceed the cache's bytes.
MIN_TILE, MAX_TILES = 64, 32
# The most tokens for kernels that read a cache or a matrix once per token. For more,
# MLX's matrix products are faster.
FEW = 8


@way(ops.MlaSplitQKv, "mla_split_q_kv")
def split(op: Any, run: Run, q: mx.array, kv: mx.array) -> tuple[mx.array, ...]:
    return run(kernels.mla_split_q_kv(q, kv, op.num_heads, op.nope_dim))


def _whole_pairs(op: attention_ops.RopeNTokens) -> bool:
    return op.pairs and op.rotary_dim == op.head_dim


@way(attention_ops.RopeNTokens, "yarn_rope_apply", _whole_pairs)
def rope(
    op: Any, run: Run, x: mx.array, inv_freq: mx.array, start: mx.array
) -> mx.array:
    return run(kernels.yarn_rope_apply(x, inv_freq, start, op.scale))[0]


def _by_rows(op: ops.HeadMatvecNTokens) -> bool:
    q = op.weight.quantization
    narrow = op.in_dim % 32 == 0 and op.in_dim <= kernels.MAX_MATRIX_IN
    four = kernel_form(op.weight.quantization) and q is not None and q.bits == 4
    return four and narrow and op.n_tokens <= FEW


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


def _few_tokens(op: ops.SdpaLatentCausal) -> bool:
    known = op.latent_dim % kernels.SIMD == 0 and op.latent_dim <= kernels.MAX_LATENT
    few = op.n_tokens <= FEW and op.mask is None
    return known and few and op.rope_dim <= kernels.MAX_ROPE


@way(
    ops.SdpaLatentCausal,
    "mla_sdpa_folded",
    _few_tokens,
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
    """Attend in one launch over a short cache, and in tiles over a long one."""
    n_new = op.n_tokens // op.n_seqs
    seen = None if start is None else (start + n_new).astype(mx.uint32)
    given = q, q_pe, latent, rope, op.softmax_scale
    n_rows = latent.shape[2]
    if n_rows <= MIN_TILE:
        return run(kernels.mla_sdpa_folded(*given, seen))[0]
    tiles = run(kernels.mla_sdpa_tile_accumulate(*given, tile_of(n_rows), seen))
    return run(kernels.mla_sdpa_tile_finalize(*tiles, op.num_heads, q.dtype))[0]


def tile_of(n_rows: int) -> int:
    """Return the rows of a tile: a power of two, since each size is another kernel."""
    least = -(-n_rows // MAX_TILES)
    return max(MIN_TILE, 1 << (least - 1).bit_length())


def _expanded(ops_ahead: Sequence[Any]) -> int:
    """Return 3 if expanding keys and values costs less than attending to latents.

    Keys and values of all heads are expanded from all rows once; then each query reads
    narrower rows.
    """
    embed, attend, out = ops_ahead[:3]
    linked = attend.q == embed.output and out.input == attend.context
    made = attend.latent_dim * (embed.in_dim + out.out_dim)
    spared = 2 * attend.latent_dim - embed.in_dim - out.out_dim
    t = attend.n_tokens // attend.n_seqs
    long = attend.n_tokens > FEW and t * spared >= made
    return 3 * (linked and long and attend.start is None)


@fusion(
    "mlx_expanded",
    (ops.HeadMatvecNTokens, ops.SdpaLatentCausal, ops.HeadMatvecNTokens),
    _expanded,
    kernels=(),
)
def attend_expanded(ops_ahead: Sequence[Any], _run: Run, values: Values) -> Values:
    """Expand each head's keys and values from the latents, then attend to these."""
    embed, attend, out = ops_ahead
    latents, ropes = values[attend.latent], values[attend.rope]
    matrices = (_unpacked(values[op.weight.name], latents) for op in (embed, out))
    to_keys, to_values = matrices
    keys, made = latents @ to_keys, latents @ to_values.swapaxes(-1, -2)
    queries, placed = (
        split_heads(values[buf], attend.n_seqs, attend.num_heads)
        for buf in (embed.input, attend.q_pe)
    )
    mask = None if attend.mask is None else values[attend.mask]
    how, beside = (attend.softmax_scale, mask), (placed, ropes)
    attended = attention(queries, keys, made, *how, beside=beside)
    return {out.output: join_heads(attended)}


def _unpacked(weight: Weight, like: mx.array) -> mx.array:
    """Return the matrices of all heads ``[H, O, I]``."""
    dense = weight.w if weight.quantization is None else dequantize(weight)
    return dense.astype(like.dtype)


def compressed(op: attention_ops.KvCacheAppendNTokens) -> bool:
    return bool(op.value_dim) and op.n_seqs == op.num_kv_heads == 1


@way(attention_ops.KvCacheAppendNTokens, "mla_kv_cache_append", compressed)
def append_latents(
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
    return run(kernels.mla_kv_cache_append(latents, ropes, latent, k_pe, row))
