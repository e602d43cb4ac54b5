"""Products with quantised matrices are right where MLX's own would be wrong."""

from __future__ import annotations

import ast
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from mlx_lm.models.mla import MultiLinear
from mlx_lm.utils import load_model
from stated_gpu import OF_MLX, multiplying
from tiny import make_qwen3_moe

import moeflux_mlx
from moeflux_mlx import device, products
from moeflux_mlx.engine.ops.functions import linear
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.weights import Quantization, Weight

ROOT = Path(__file__).resolve().parents[1]


def of_hopper(x, w, /, scales, *args, **options):
    """Stand for MLX's product on Hopper: an error where its result would be wrong."""
    form = dict(zip(("biases", "transpose", "group_size", "bits"), args, strict=False))
    form |= options
    is_affine = (args[4:] or [form.get("mode", "affine")])[0] == "affine"
    if scales.shape[-1] == 1 and (form.get("bits") or 4) in (4, 8) and is_affine:
        raise AssertionError("MLX would multiply wrongly")
    return OF_MLX(x, w, scales, *args, **options)


@pytest.fixture
def hopper(monkeypatch):
    """State a Hopper GPU to all that asks which products are wrong."""
    wrong = device.multiplies_wrongly
    multiply = multiplying(of_hopper)
    monkeypatch.setattr(mx, "quantized_matmul", multiply)
    monkeypatch.setattr(products, "_of_mlx", multiply)
    monkeypatch.setattr(device, "repeats_first_matrix", lambda: True)

    def stated(*matrix):
        with monkeypatch.context() as patch:
            patch.setattr(device, "on_cpu", lambda: False)
            patch.setattr(device, "_compute_capability", lambda: device.HOPPER)
            return wrong(*matrix)

    monkeypatch.setattr(device, "multiplies_wrongly", stated)


@pytest.mark.parametrize(
    ("capability", "matrix", "wrong"),
    [
        (9, (1, 4, "affine"), True),
        (9, (1, 8, "affine"), True),
        (9, (2, 4, "affine"), False),
        (9, (1, 6, "affine"), False),
        (9, (1, 4, "mxfp4"), False),
        (8, (1, 4, "affine"), False),
        (12, (1, 4, "affine"), False),
    ],
)
def test_products_are_wrong_on_hopper_for_rows_of_one_group(
    monkeypatch, capability, matrix, wrong
):
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    info = {"compute_capability_major": capability}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    # A CPU beside the GPU has its own product.
    assert not device.multiplies_wrongly(*matrix)
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    assert device.multiplies_wrongly(*matrix) == wrong


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("group_size", "bits"), [(64, 4), (128, 8), (None, None)])
def test_the_product_is_mlxs(hopper, group_size, bits, batch, transpose):
    n = group_size or 64
    form = {"group_size": group_size, "bits": bits}
    w = mx.random.normal((*batch, 24, n), key=mx.random.key(1))
    x = mx.random.normal((*batch, 5, n if transpose else 24), key=mx.random.key(2))
    packed = mx.quantize(w, **form)

    def total(product, x):
        return product(x, *packed, transpose=transpose, **form).sin().sum()

    with pytest.raises(AssertionError):
        total(mx.quantized_matmul, x)
    for found, expected in zip(
        mx.value_and_grad(lambda x: total(products.quantized_matmul, x))(x),
        mx.value_and_grad(lambda x: total(OF_MLX, x))(x),
        strict=True,
    ):
        assert mx.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("of_x", "of_w"),
    [((3, 4), (4,)), ((2, 2, 3), (2, 2, 1)), ((4,), (4,)), ((3,), (1,)), ((1,), (3,))],
)
def test_matrices_are_repeated_rightly(hopper, of_x, of_w):
    w = mx.random.normal((*of_w, 24, 128), key=mx.random.key(1))
    x = mx.random.normal((*of_x, 5, 128), key=mx.random.key(2))
    packed = mx.quantize(w)
    found = products.quantized_matmul(x, *packed)
    assert mx.allclose(found, OF_MLX(x, *packed), rtol=1e-4, atol=1e-4)


def in_modules():
    """Return results of all of mlx-lm that multiplies by quantised matrices."""
    mx.random.seed(0)
    x = mx.random.normal((2, 6, 64))
    one, heads = nn.Linear(64, 24).to_quantized(), MultiLinear(64, 24, 6).to_quantized
    embedding = nn.Embedding(40, 64).to_quantized()
    cache = QuantizedKVCache(group_size=64, bits=8)
    q, k, v = (mx.random.normal((1, n, 6, 64)) for n in (4, 2, 2))
    keys, values = cache.update_and_fetch(k, v)
    attended = scaled_dot_product_attention(q, keys, values, cache, 0.125, "causal")
    # Heads of two sequences, of one token each.
    multiplied = heads(32, 4)(x[:, :, None])
    return [one(x), multiplied, embedding.as_linear(x), attended]


def test_mlx_lms_modules_multiply_rightly(request):
    expected = in_modules()
    mx.eval(expected)
    request.getfixturevalue("hopper")
    with pytest.raises(AssertionError):
        in_modules()
    products.mend()
    for found, wanted in zip(in_modules(), expected, strict=True):
        assert mx.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_nothing_is_replaced_where_mlx_is_right(monkeypatch):
    monkeypatch.setattr(mx, "quantized_matmul", OF_MLX)
    products.mend()
    assert mx.quantized_matmul is OF_MLX


def test_an_ops_product_is_right(hopper):
    w = mx.random.normal((24, 64), key=mx.random.key(1))
    x = mx.random.normal((5, 64), key=mx.random.key(2))
    packed = mx.quantize(w, 64, 4)
    weight = Weight(*packed, quantization=Quantization(4, 64))
    assert mx.allclose(linear(x, weight), OF_MLX(x, *packed, bits=4), atol=1e-4)


@pytest.mark.parametrize("way", ["load", "stream", "pack"])
def test_whoever_builds_a_model_mends_it(tmp_path, request, way):
    path = make_qwen3_moe(tmp_path / "model", hidden_size=64, group_size=64)
    ids, (model, _) = mx.array([[1, 2, 3]]), moeflux_mlx.load(path, native=False)
    expected = model(ids)
    mx.eval(expected)
    request.getfixturevalue("hopper")
    if way == "load":
        model, _ = moeflux_mlx.load(path, native=False)
    elif way == "stream":
        model = load_model(path, lazy=True)[0]
        moeflux_mlx.stream(model, path, expert_memory="1GB")
    else:
        pack(path, tmp_path / "packed")
        model = load_model(tmp_path / "packed", trust_remote_code=True)[0]
    assert mx.quantized_matmul is products.quantized_matmul
    assert mx.allclose(model(ids, cache=make_prompt_cache(model)), expected, atol=1e-4)


def test_only_one_file_calls_mlxs_product():
    users = [
        path.name
        for folder in ("moeflux_mlx", "models")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "quantized_matmul"
        and isinstance(node.value, ast.Name)
        and node.value.id == "mx"
    ]
    assert set(users) == {"products.py"}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("of_x", "of_w", "group_size", "bits"),
    [
        ((8,), (8,), 64, 4),
        ((8,), (8,), 64, 8),
        ((8,), (8,), 128, 4),
        ((3, 8), (8,), 32, 4),
        ((2, 4, 3), (2, 4, 1), 32, 8),
    ],
)
def test_a_product_is_right_on_a_gpu(of_x, of_w, group_size, bits):
    """On an H200 MLX 0.32.4 gave random numbers for the first three."""
    width = max(64, group_size)
    w = mx.random.normal((*of_w, 512, width), key=mx.random.key(1))
    x = mx.random.normal((*of_x, 40, width), key=mx.random.key(2))
    w, x = w.astype(mx.bfloat16), x.astype(mx.bfloat16)
    form = {"group_size": group_size, "bits": bits}
    packed = mx.quantize(w, **form)
    dense = mx.dequantize(*packed, **form).astype(mx.float32)
    # The parts of a cache have gaps.
    packed = [part[..., :300, :] for part in packed] if len(of_w) > 2 else packed
    found = products.quantized_matmul(x, *packed, **form).astype(mx.float32)
    expected = x.astype(mx.float32) @ dense.swapaxes(-1, -2)
    expected = expected[..., : found.shape[-1]]
    off = mx.abs(found - expected).max() / mx.abs(expected).max()
    assert off < 1e-2
