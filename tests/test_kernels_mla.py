"""The kernels of latent attention together equal mlx-lm's DeepSeek-V3 attention."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.models.deepseek_v3 import DeepseekV3Attention, ModelArgs
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.rope_utils import YarnRoPE

from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.executors.sim import SimExecutor
from moeflux_mlx.engine.launch import mla
from moeflux_mlx.engine.launch.check import relative_error
from moeflux_mlx.errors import KernelError

pytestmark = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
# Nine heads: one more than a matrix has rows. 24: not a multiple of a tile.
D, H, L, N, R, V = 48, 9, 64, 32, 16, 24
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
N_ROWS = 37
TILES = [None, 16, 32, 4096]


def run(launch):
    outputs = SimExecutor(checked=False).run(launch)
    return outputs if len(outputs) > 1 else outputs[0]


def normal(*shape, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return mx.array(scale * rng.standard_normal(shape, np.float32))


def attention_layer(seed: int) -> DeepseekV3Attention:
    """Return mlx-lm's layer with random weights, the heads' matrices in 4 bits."""
    mx.random.seed(seed)
    args = ModelArgs(
        hidden_size=D,
        num_attention_heads=H,
        q_lora_rank=None,
        kv_lora_rank=L,
        qk_rope_head_dim=R,
        qk_nope_head_dim=N,
        v_head_dim=V,
        rope_scaling=YARN,
        max_position_embeddings=2048,
    )
    layer = DeepseekV3Attention(args)
    layer.kv_a_layernorm.weight = 1 + 0.1 * normal(L)
    layer.q_proj.weight = 3 * layer.q_proj.weight
    nn.quantize(layer, 32, 4, class_predicate=lambda _, m: isinstance(m, MultiLinear))
    return layer


def attend(queries, cache, scale, tile):
    """Attend to one sequence with the folded kernel, or with tiles of ``tile`` rows."""
    cache = [x[None] for x in cache]
    if tile is None:
        return run(mla.mla_sdpa_folded(*queries, *cache, scale))
    parts = run(mla.mla_sdpa_tile_accumulate(*queries, *cache, scale, tile))
    return run(mla.mla_sdpa_tile_finalize(*parts, H, queries[0].dtype))


def by_kernels(layer, x, caches, start, tile):
    """Return the layer's output for tokens ``[T, D]`` and the new caches."""
    inv_freq = mx.reciprocal(layer.rope._freqs)
    q, kv = layer.q_proj(x), layer.kv_a_proj_with_mqa(x)
    q_nope, q_pe, latent, k_pe = run(mla.mla_split_q_kv(q, kv, H, N))
    latent = layer.kv_a_layernorm(latent)
    mscale = layer.rope.mscale
    at = mx.array([start], mx.int32)
    q_pe = run(mla.yarn_rope_apply(q_pe, inv_freq, at, mscale))
    k_pe = run(mla.yarn_rope_apply(k_pe, inv_freq, at, mscale))
    caches = run(mla.mla_kv_cache_append(*caches, latent, k_pe, start))
    w_uk, w_uv = layer.embed_q, layer.unembed_out
    launch = mla.mla_q_prime_4bit(q_nope, w_uk.weight, w_uk.scales, w_uk.biases)
    q_prime = run(launch)
    seen = tuple(cache[: start + x.shape[0]] for cache in caches)
    context = attend((q_prime, q_pe), seen, layer.scale, tile)
    launch = mla.mla_out_per_head_4bit(context, w_uv.weight, w_uv.scales, w_uv.biases)
    return layer.o_proj(run(launch)), caches


@pytest.mark.sampled
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"tile {t}" if t else "folded")
def test_a_prompt_and_its_next_tokens_equal_mlx_lms(tile):
    """mlx-lm takes a prompt with keys and values unfolded, a token in latent form."""
    layer, cache = attention_layer(3), KVCache()
    caches = mx.zeros((N_ROWS, L)), mx.zeros((N_ROWS, R))
    start = 0
    for n_tokens in (30, 1, 5, 1):
        x = normal(n_tokens, D, seed=start)
        mask = create_attention_mask(x[None], cache, return_array=True)
        wanted = layer(x[None], mask, cache)[0]
        got, caches = by_kernels(layer, x, caches, start, tile)
        assert relative_error(got, wanted) < 3e-6
        start += n_tokens
    assert start == N_ROWS
    assert relative_error(caches[0], cache.keys[0, 0, :N_ROWS]) < 1e-6
    assert relative_error(caches[1], cache.values[0, 0, :N_ROWS]) < 1e-6


def test_yarn_rotates_as_mlx_lm_does_far_from_the_start():
    rope = YarnRoPE(
        64,
        traditional=True,
        base=10000,
        scaling_factor=40,
        mscale=1.3,
        mscale_all_dim=0.5,
    )
    assert rope.mscale != 1.0
    x = normal(3, 5 * 64)
    at = mx.array([9000], mx.int32)
    launch = mla.yarn_rope_apply(x, mx.reciprocal(rope._freqs), at, rope.mscale)
    wanted = rope(x.reshape(3, 5, 64).swapaxes(0, 1)[None], 9000)[0]
    wanted = wanted.swapaxes(0, 1).reshape(3, -1)
    assert relative_error(run(launch), wanted) < 1e-5


def random_attention(t, h, s, l=64, r=32, seed=0):
    queries = normal(t, h * l, seed=seed), normal(t, h * r, seed=seed + 1)
    return queries, (normal(s, l, seed=seed + 2), normal(s, r, seed=seed + 3))


def test_scores_too_large_for_exp_keep_their_softmax():
    queries, (latent, rope) = random_attention(1, H, 61)
    grown = latent * (1 + mx.arange(61))[:, None]
    for tile in TILES:
        of_one = grown[None], rope[None]
        wanted = mla.mla_sdpa_folded.expected(*queries, *of_one, 3.0)[0]
        got = attend(queries, (grown, rope), 3.0, tile)
        assert relative_error(got, wanted) < 1e-5


def test_rows_after_the_given_ones_do_not_matter():
    """A model's cache is longer than its contents: the other rows may be anything."""
    queries, (latent, rope) = random_attention(2, H, 40)
    spoiled = [mx.concatenate([x[:19], x[19:] * mx.nan]) for x in (latent, rope)]
    for tile in TILES:
        clean = attend(queries, (latent[:19], rope[:19]), 0.1, tile)
        got = attend(queries, tuple(x[:19] for x in spoiled), 0.1, tile)
        assert mx.array_equal(clean, got)


def test_a_token_gets_the_same_bits_whatever_other_tokens_come_with_it():
    queries, cache = random_attention(5, H, 29)
    w, scales, biases = mx.quantize(normal(H * 40, 64).reshape(H, 40, 64), 32, 4)
    for build in (mla.mla_q_prime_4bit, mla.mla_out_per_head_4bit):
        together = run(build(queries[0], w, scales, biases))
        alone = run(build(queries[0][3:4], w, scales, biases))
        assert mx.array_equal(together[3:4], alone)
    together = attend(queries, cache, 0.1, None)
    alone = [x[3:4] for x in queries], [x[:28] for x in cache]
    assert mx.array_equal(together[3:4], attend(*alone, 0.1, None))


@pytest.mark.parametrize("tile", [None, 16])
def test_a_sequence_gets_the_same_bits_whatever_others_come_along(tile):
    queries, cache = random_attention(3, H, 3 * 29)
    ends, caches = [23, 5, 29], [x.reshape(3, 29, -1) for x in cache]
    given = *queries, *caches, 0.1
    seen = mx.array(ends, mx.uint32)
    if tile is None:
        together = run(mla.mla_sdpa_folded(*given, seen))
    else:
        parts = run(mla.mla_sdpa_tile_accumulate(*given, tile, seen))
        together = run(mla.mla_sdpa_tile_finalize(*parts, H, mx.float32))
    for i, end in enumerate(ends):
        own = [x[i : i + 1] for x in queries], [x[i, :end] for x in caches]
        assert mx.array_equal(together[i : i + 1], attend(*own, 0.1, tile))


def test_rows_that_an_array_puts_outside_the_cache_are_dropped():
    caches, new = (normal(6, 8), normal(6, 4)), (normal(2, 8), normal(2, 4))
    for start, kept in ((5, slice(0, 5)), (-1, slice(1, 6)), (9, slice(0, 6))):
        at = mx.array([start], mx.int32)
        out = run(mla.mla_kv_cache_append(*caches, *new, at))
        for cache, after in zip(caches, out, strict=True):
            assert mx.array_equal(after[kept], cache[kept])


W = mx.zeros((2, 4, 8), mx.uint32)
SCALES = mx.zeros((2, 4, 2))
Q, QR = mx.zeros((3, 2 * 64)), mx.zeros((3, 2 * 8))
LATENT, ROPE = mx.zeros((5, 64)), mx.zeros((5, 8))


def placed(**changes):
    """Return a launch of ``mla_inputs``, or fail at a changed argument."""
    given = dict(q=Q, kv=mx.zeros((3, 48)), weight=mx.zeros((16,)), num_heads=2)
    given |= dict(inv_freq=mx.zeros((16,)), start=mx.zeros((3,), mx.int32))
    given |= dict(nope_dim=32, eps=1e-6, mscale=1.0)
    return mla.mla_inputs(**{**given, **changes})


def appended(**changes):
    """Return a launch of ``mla_inputs_append``, or fail at a changed argument."""
    one, caches = mx.zeros((1,), mx.int32), (mx.zeros((1, 1, 6, n)) for n in (16, 32))
    given = dict(q=Q[:1], kv=mx.zeros((1, 48)), weight=mx.zeros((16,)), num_heads=2)
    given |= dict(inv_freq=mx.zeros((16,)), start=one, place=one)
    given |= dict(zip(("latent_cache", "rope_cache"), caches, strict=True))
    given |= dict(nope_dim=32, eps=1e-6, mscale=1.0)
    return mla.mla_inputs_append(**{**given, **changes})


# The fault, and the argument that the message must name.
REFUSED = {
    "q: expected a multiple": lambda: mla.mla_split_q_kv(Q, Q, 3, 8),
    "nope_dim": lambda: mla.mla_split_q_kv(Q, Q, 2, 64),
    "kv: expected 3 rows": lambda: mla.mla_split_q_kv(Q, ROPE, 2, 32),
    "kv: expected more": lambda: mla.mla_split_q_kv(Q, mx.zeros((3, 32)), 2, 32),
    "weight": lambda: placed(weight=mx.zeros((48,))),
    "inv_freq": lambda: placed(inv_freq=mx.zeros((3,))),
    "q: expected whole pairs": lambda: placed(nope_dim=25, kv=mx.zeros((3, 64))),
    "start: expected shape": lambda: placed(start=mx.zeros((2,), mx.int32)),
    "kv: expected 48 values": lambda: placed(
        q=Q[:1], kv=mx.zeros((1, 80)), start=mx.zeros((1,), mx.int32), kv_at=33
    ),
    "q: expected one row": lambda: placed(kv_at=0),
    r"start: expected shape \(1,\)": lambda: appended(start=mx.zeros((2,), mx.int32)),
    "place: expected shape": lambda: appended(place=mx.zeros((2,), mx.int32)),
    "latent_cache: expected one": lambda: appended(
        latent_cache=mx.zeros((1, 2, 6, 16))
    ),
    "latent_cache: expected shape": lambda: appended(
        latent_cache=mx.zeros((1, 1, 6, 8))
    ),
    "rope_cache": lambda: appended(rope_cache=mx.zeros((1, 1, 5, 32))),
    "x": lambda: mla.yarn_rope_apply(Q, mx.zeros((5,)), mx.array([0]), 1.0),
    "start": lambda: mla.yarn_rope_apply(Q, mx.zeros((4,)), mx.array([0, 1]), 1.0),
    "start: expected 0 to 2": lambda: mla.mla_kv_cache_append(
        LATENT, ROPE, LATENT[:3], ROPE[:3], 3
    ),
    "k_pe": lambda: mla.mla_kv_cache_append(LATENT, ROPE, LATENT[:3], ROPE[:2], 0),
    "latent: expected at most": lambda: mla.mla_kv_cache_append(
        LATENT[:2], ROPE[:2], LATENT, ROPE, 0
    ),
    "q_nope": lambda: mla.mla_q_prime_4bit(Q[:, :64], W, SCALES, SCALES),
    "w: expected an input": lambda: mla.mla_q_prime_4bit(Q, W[..., :6], SCALES, SCALES),
    "w: expected I <=": lambda: mla.mla_q_prime_4bit(
        Q, mx.zeros((2, 4, 132), mx.uint32), SCALES, SCALES
    ),
    "scales: expected 64": lambda: mla.mla_out_per_head_4bit(
        Q, W, mx.zeros((2, 4, 4)), mx.zeros((2, 4, 4))
    ),
    "biases": lambda: mla.mla_out_per_head_4bit(Q, W, SCALES, SCALES[:1]),
    "latent: expected L": lambda: mla.mla_sdpa_folded(Q, QR, *2 * [ROPE[None]], 1.0),
    "latent: expected a divisor": lambda: mla.mla_sdpa_folded(
        Q, QR, *(mx.stack([x, x]) for x in (LATENT, ROPE)), 1.0
    ),
    "rope: expected 1 seq": lambda: mla.mla_sdpa_folded(
        Q, QR, LATENT[None], mx.stack([ROPE, ROPE]), 1.0
    ),
    "seen": lambda: mla.mla_sdpa_folded(
        Q, QR, LATENT[None], ROPE[None], 1.0, mx.zeros(2, mx.uint32)
    ),
    "q_prime: expected at most": lambda: mla.mla_sdpa_folded(
        Q, QR, LATENT[None, :2], ROPE[None, :2], 1.0
    ),
    "q_pe": lambda: mla.mla_sdpa_folded(Q, Q, LATENT[None], ROPE[None], 1.0),
    "rope: expected 5 rows": lambda: mla.mla_sdpa_folded(
        Q, QR, LATENT[None], ROPE[None, :4], 1.0
    ),
    "rope: expected R <=": lambda: mla.mla_sdpa_folded(
        Q, QR, LATENT[None], mx.zeros((1, 5, 264)), 1.0
    ),
    "tile": lambda: mla.mla_sdpa_tile_accumulate(
        Q, QR, LATENT[None], ROPE[None], 1.0, 24
    ),
    "num_heads": lambda: mla.mla_sdpa_tile_finalize(
        *[mx.zeros((2, 6))] * 2, mx.zeros((2, 6, 64)), 4, mx.float32
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_launch_names_the_argument_that_does_not_fit(message):
    with pytest.raises(KernelError, match=rf"^\[\w+\] {message}"):
        REFUSED[message]()
