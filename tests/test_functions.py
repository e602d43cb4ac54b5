"""The functions that references use, on both kinds of arrays."""

from __future__ import annotations

import os
import signal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from op_cases import TOLERANCE, quantized, relative_rms, spec

from moeflux_mlx import device, ops
from moeflux_mlx.engine.ops import functions
from moeflux_mlx.engine.ops.functions import (
    QUERY_BLOCK,
    dequantize,
    embed,
    linear,
    to_device,
    to_host,
)
from moeflux_mlx.engine.ops.host import row_products
from moeflux_mlx.engine.rotation import rotation
from moeflux_mlx.experts.weights import Quantization, Weight

on_both = pytest.mark.parametrize("to", [mx.array, np.array], ids=["mlx", "numpy"])
FORMS = [
    *(Quantization(bits, 32) for bits in (2, 3, 4, 5, 6, 8)),
    Quantization(4, 64),
    Quantization(8, 128),
    Quantization(3, 64),
    Quantization(5, 128),
    Quantization(4, 32, "mxfp4"),
    Quantization(8, 32, "mxfp8"),
    Quantization(4, 16, "nvfp4"),
]


def form_id(form):
    return f"{form.mode}-{form.bits}bit-g{form.group_size}"


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Between MLX and NumPy.
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.int32, mx.uint8], ids=str)
def test_to_host_shares_the_memory_of_an_array(dtype):
    x = mx.arange(7).astype(dtype)
    on_host = to_host(x)
    assert np.shares_memory(on_host, np.array(x, copy=False))
    assert on_host.tolist() == list(range(7))


def test_to_host_widens_bfloat16_exactly():
    x = mx.array(random(3, 5)).astype(mx.bfloat16)
    on_host = to_host(x)
    assert on_host.dtype == np.float32
    assert np.array_equal(on_host, np.array(x.astype(mx.float32)))


def test_an_array_already_in_place_is_returned_unchanged():
    x = random(3)
    assert to_host(x) is x and to_host(None) is None
    y = mx.array(x)
    assert to_device(y) is y and to_device(None) is None
    assert np.array_equal(np.array(to_device(x)), x)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_weight_on_the_host_is_the_same_memory(dtype):
    weight = quantized(mx.array(random(5, 64)).astype(dtype), FORMS[2])
    on_host = weight.on_host
    for array, view in zip(
        (weight.w, weight.scales, weight.biases),
        (on_host.w, on_host.scales, on_host.biases),
        strict=True,
    ):
        raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        assert np.shares_memory(view, np.array(raw, copy=False))
    assert on_host.quantization == weight.quantization


# Packed weights.
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=form_id)
@pytest.mark.parametrize("shape", [(5, 128), (3, 7, 256)], ids=str)
def test_unpacking_on_the_host_equals_mlx_dequantize(shape, form, dtype):
    weight = quantized(mx.array(random(*shape)).astype(dtype), form)
    expected = mx.dequantize(
        weight.w,
        weight.scales.astype(mx.float32)
        if weight.biases is not None
        else weight.scales,
        None if weight.biases is None else weight.biases.astype(mx.float32),
        group_size=form.group_size,
        bits=form.bits,
        mode=form.mode,
    ).astype(mx.float32)
    got = dequantize(weight.on_host)
    assert got.dtype == np.float32 and got.shape == shape
    assert relative_rms(got, expected) < 1e-6
    assert relative_rms(to_host(dequantize(weight)), got) < 1e-2


@pytest.mark.parametrize("form", [f for f in FORMS if f.mode != "affine"], ids=form_id)
def test_every_byte_and_scale_has_the_same_value_on_the_host_and_in_mlx(form):
    n_bytes = form.group_size * form.bits // 8
    codes = np.tile(np.arange(256, dtype=np.uint8), 256).view(np.uint32)
    words = np.ascontiguousarray(codes).reshape(256, -1)
    scales = np.arange(256, dtype=np.uint8)[:, None].repeat(256 // n_bytes, axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        got = dequantize(Weight(words, scales, None, form))
    parts = (mx.array(words), mx.array(scales), None)
    named = dict(group_size=form.group_size, bits=form.bits, mode=form.mode)
    expected = mx.dequantize(*parts, **named, dtype=mx.float32)
    assert np.array_equal(got, np.array(expected), equal_nan=True)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form", [None, *FORMS], ids=lambda f: f and form_id(f))
@pytest.mark.parametrize("n", [1, 3, 17])
def test_products_on_the_host_equal_those_with_unpacked_weights(n, form, dtype):
    dense = mx.array(random(9, 128, seed=n)).astype(dtype)
    weight, x = quantized(dense, form), random(n, 128, seed=n + 1)
    unpacked = dense if form is None else dequantize(weight.on_host)
    expected = x @ to_host(to_device(unpacked)).astype(np.float32).T
    assert relative_rms(linear(x, weight), expected) < 1e-5
    assert relative_rms(linear(x, weight.on_host), expected) < 1e-5


@on_both
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form", [None, *FORMS], ids=lambda f: f and form_id(f))
def test_rows_of_an_embedding_are_those_of_the_unpacked_matrix(form, dtype, to):
    dense = mx.array(random(9, 128)).astype(dtype)
    weight = quantized(dense, form)
    unpacked = to_host(dense if form is None else dequantize(weight))
    rows = to_host(embed(to([3, 0, 3, 8]), weight))
    assert relative_rms(rows, unpacked[[3, 0, 3, 8]]) < 1e-2


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
def test_products_keep_the_leading_axes_of_the_rows(shape):
    weight = quantized(mx.array(random(7, 64)), FORMS[2])
    x = random(*shape, 64)
    assert linear(x, weight).shape == (*shape, 7)
    assert relative_rms(linear(x, weight), linear(mx.array(x), weight)) < TOLERANCE


def test_a_large_matrix_is_multiplied_to_its_last_row():
    weight = quantized(mx.array(random(517, 2048)), FORMS[2])
    x = random(1, 2048, seed=1)
    expected = x.astype(np.float64) @ dequantize(weight.on_host).T
    assert relative_rms(linear(x, weight), expected) < 1e-5


@pytest.mark.sampled
@pytest.mark.parametrize("n_rows", [1, 2, 18])
@pytest.mark.parametrize("step", [8, 9, 400, 517])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_matrix_too_large_to_unpack_is_unpacked_in_blocks(
    monkeypatch, form, step, n_rows
):
    weight = quantized(mx.array(random(517, 128)), form)
    x = random(n_rows, 128, seed=1)
    whole = linear(x, weight)
    monkeypatch.setattr(device, "HOST_BLOCK_VALUES", 128 * step)
    assert linear(x, weight).shape == (n_rows, 517)
    assert relative_rms(linear(x, weight), whole) < 1e-6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_multiplies_with_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(device, "HOST_THREADED_VALUES", 0)
    weight = quantized(mx.array(random(3, 16, 64)), FORMS[2]).on_host
    x = random(1, 64, seed=1)
    (expected,) = row_products(x, [weight], [2])
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        (got,) = row_products(x, [weight], [2])
        os._exit(0 if np.array_equal(got, expected) else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("step", [8, 40, 2_000])
def test_a_row_has_the_same_bits_whichever_others_come_with_it(
    monkeypatch, step, threaded
):
    monkeypatch.setattr(device, "HOST_BLOCK_VALUES", 128 * step)
    monkeypatch.setattr(device, "HOST_THREADED_VALUES", 0 if threaded else 1 << 60)
    stacks = [
        quantized(mx.array(random(7, 96, 128, seed=s)), FORMS[2]).on_host
        for s in (2, 3)
    ]
    x, slots = random(5, 128, seed=1), [6, 0, 3, 3, 1]
    whole = row_products(x, stacks, slots)
    for chosen in ([0], [4], [1, 3], [3, 2, 0, 4]):
        some = row_products(x[chosen], stacks, [slots[i] for i in chosen])
        for part, products in zip(some, whole, strict=True):
            assert np.array_equal(part, products[chosen])
    for stack, products in zip(stacks, whole, strict=True):
        expected = np.einsum("koi,ki->ko", dequantize(stack)[slots], x)
        assert relative_rms(products, expected) < 1e-5


def test_one_expert_of_a_stack_is_a_view_of_it():
    stack = quantized(mx.array(random(3, 5, 64)), FORMS[2]).on_host
    one = stack[1]
    assert np.shares_memory(one.w, stack.w) and one.quantization == stack.quantization
    assert np.array_equal(dequantize(one), dequantize(stack)[1])
    assert Weight(random(3, 5, 7))[2].w.shape == (5, 7)


# Gates and norms.
@on_both
def test_sigmoid_and_silu_neither_overflow_nor_warn(to):
    x = np.array([-1e4, -100, -1, 0, 1, 100, 1e4], np.float32)
    with np.errstate(all="raise", under="ignore"):
        gate, act = functions.sigmoid(to(x)), functions.silu(to(x))
    expected = np.array([0, 0, 0.26894142, 0.5, 0.7310586, 1, 1])
    assert np.allclose(np.array(gate), expected, atol=1e-7)
    assert np.allclose(np.array(act), x * expected, atol=1e-6)


@on_both
def test_a_row_of_zeros_has_a_norm_of_zeros(to):
    assert not np.array(
        functions.rms_norm(to(np.zeros((3, 7), "f4")), None, 1e-6)
    ).any()


# Positions.
@on_both
@pytest.mark.parametrize("offset", [0, 37, 4095])
@pytest.mark.parametrize("dims", [10, 6, 2])
def test_rotary_positions_are_those_of_nn_rope(dims, offset, to):
    stock = nn.RoPE(dims, traditional=False, base=1e6)
    x, start = random(2, 3, 5, 10), np.array([offset, offset], np.int32)
    got = functions.rope(to(x), dims, to(np.array(rotation(stock)[0])), to(start))
    assert relative_rms(got, stock(mx.array(x), offset=offset)) < 3e-4
    assert np.array_equal(np.array(got)[..., dims:], x[..., dims:])


@on_both
def test_each_sequence_has_a_position_of_its_own(to):
    x, inv_freq = random(3, 2, 5, 6), to(np.array([1, 0.1, 0.01], np.float32))
    starts = np.array([0, 11, 700], np.int32)
    together = functions.rope(to(x), 6, inv_freq, to(starts))
    for i in range(3):
        row = slice(i, i + 1)
        alone = functions.rope(to(x[row]), 6, inv_freq, to(starts[row]))
        assert relative_rms(together[row], alone) < 1e-6


# Attention.
def attention_case(t, s, **makers):
    heads = dict(num_heads=2, heads_per_kv=2, head_dim=3, softmax_scale=0.6)
    cache = dict.fromkeys(("k", "v"), lambda rng, _: rng.standard_normal((1, 1, s, 3)))
    return spec(ops.SdpaCausalTiled, n_tokens=t, **heads, **cache, **makers).build()


@pytest.mark.parametrize("cached", [0, 7])
@pytest.mark.parametrize("t", [QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 3])
def test_attention_in_blocks_of_queries_equals_attention_at_once(t, cached):
    case = attention_case(t, t + cached)
    (on_host,), (on_device,) = case.on_host_result(), case.on_device_result()
    assert relative_rms(on_host, case.expected()[0]) < 1e-5
    assert relative_rms(on_host, on_device) < TOLERANCE


def test_a_mask_holds_in_every_block_of_queries():
    t = QUERY_BLOCK + 3
    seen = np.random.default_rng(0).random((1, 1, t, t)) < 0.3
    case = attention_case(t, t, mask=lambda *_: seen | np.eye(t, dtype=bool))
    (on_host,), (expected,) = case.on_host_result(), case.expected()
    assert relative_rms(on_host, expected) < 1e-5
    assert relative_rms(on_host, case.on_device_result()[0]) < TOLERANCE


def test_a_mask_of_the_causal_order_changes_nothing():
    case = attention_case(5, 9, mask=lambda *_: np.tri(5, 9, 4, bool)[None, None])
    (bare,) = case.expected(mask=None)
    assert relative_rms(case.on_host_result()[0], bare) < 1e-5
    assert relative_rms(case.on_device_result()[0], bare) < TOLERANCE


@on_both
def test_a_query_that_may_see_nothing_stays_finite(to):
    """These are a batch's padding tokens: their NaN would spread as 0 * NaN."""
    case = attention_case(5, 5, mask=lambda *_: np.tri(5, dtype=bool)[None, None])
    q, k, v, mask = (case.inputs[name] for name in ("q", "k", "v", "mask"))
    mask[0, 0, :2] = False
    out = np.array(case.op.reference(to(q), to(k), to(v), to(mask), None, None))
    assert np.isfinite(out).all()
    expected = case.expected(mask=mask | np.eye(5, dtype=bool)[None, None])[0]
    assert relative_rms(out[2:], expected[2:]) < TOLERANCE
