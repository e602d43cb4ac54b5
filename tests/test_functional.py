"""Ops as functions of arrays: values, gradients and errors, on each executor here."""

from __future__ import annotations

import inspect
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from moeflux_mlx import ops
from moeflux_mlx.engine.graph import REGISTRY
from moeflux_mlx.errors import GraphError
from moeflux_mlx.experts.weights import ExpertWeights, Weight
from moeflux_mlx.ops import apply as apply_module
from moeflux_mlx.ops import functional

B, T, D, H, E, K = 2, 3, 64, 2, 6, 3
N = B * T


def noise(seed: int, *shape: int) -> mx.array:
    return 0.5 * mx.random.normal(shape, key=mx.random.key(seed))


def experts(bits: int | None = 4) -> ExpertWeights:
    stacks = (noise(21, E, 32, D), noise(22, E, 32, D), noise(23, E, D, 32))
    if bits is None:
        return ExpertWeights(*map(Weight, stacks))
    return ExpertWeights(*(ops.quantize(w, 32, bits) for w in stacks))


CHOSEN = mx.array([[0, 2, 4], [1, 2, 3], [5, 0, 1], [3, 4, 5], [2, 1, 0], [0, 5, 3]])
CHOSEN = CHOSEN.astype(mx.int32)
SHARES = mx.softmax(noise(4, N, K), axis=-1)
START = mx.array([3, 0], mx.int32)
X, Y = noise(1, N, D), noise(2, N, D)
QKV, WIDE, NARROW = noise(1, N, 5 * 32), noise(1, N, 2 * D), noise(1, N, 32)
HEADS, LOGITS, ONE = noise(1, N, 4), noise(1, N, E), noise(1, 1, D)
DELTA = dict(state=noise(5, B, 4, 32, 32), qkv=noise(6, N, 2 * 2 * 32 + 4 * 32))
DELTA_IN = DELTA["qkv"]
GATES = dict(decay=mx.sigmoid(noise(7, N, 4)), beta=mx.sigmoid(noise(8, N, 4)))
IDS = mx.array([3, 0, 9, 9, 1, 2], mx.int32)
CACHE = noise(9, B, 1, 7, 32)
ROPE_KEYS = noise(8, B, 1, 7, 16)

# Each function with arguments; the first floating one is differentiated.
CALLS = {
    "embedding": lambda f: f(IDS, ops.quantize(noise(1, 11, D), 32)),
    "linear": lambda f, x=X: f(x, ops.quantize(noise(2, 40, D), 32)),
    "rms_norm": lambda f, x=X: f(x, noise(2, D)),
    "rms_norm_per_head": lambda f, x=X: f(x, noise(2, 32)),
    "rms_norm_qk": lambda f, x=QKV: f(x, 2, 32),
    "gated_rms_norm": lambda f, x=X: f(x, Y, noise(3, 32)),
    "rope": lambda f, x=X: f(x, mx.exp(noise(2, 8)), START, H),
    "kv_cache_append": lambda f, x=NARROW: f(x, x, CACHE, CACHE, START[:1]),
    "causal_attention": lambda f, x=X: f(x, CACHE, CACHE),
    "split_latent": lambda f, x=X: f(x, NARROW, H, 16),
    "head_linear": lambda f, x=X: f(x, noise(3, H, 24, 32)),
    "latent_attention": lambda f, x=X: f(x, NARROW, CACHE, ROPE_KEYS, scale=0.2),
    "residual_add": lambda f, x=X: f(x, Y),
    "zero_buffer": lambda f: f(N, D),
    "swiglu": lambda f, x=X: f(x, Y),
    "sigmoid_gate": lambda f, x=X: f(x, Y),
    "split_q_gate": lambda f, x=WIDE: f(x, H),
    "part_key_heads": lambda f, x=WIDE: f(x, HEADS[:, :4], 1, 24),
    "conv1d_step": lambda f, x=X: f(x, noise(2, B, 3, D), noise(3, D, 4, 1)),
    "decay_beta": lambda f, x=HEADS: f(x, x + 1, noise(2, 4), noise(3, 4)),
    "gated_delta_step": lambda f, x=DELTA_IN: f(
        DELTA["state"], x, **GATES, num_k_heads=2
    ),
    "gated_delta_chunkwise": lambda f, x=DELTA_IN: f(
        DELTA["state"], x, **GATES, num_k_heads=2, chunk_size=16
    ),
    "softmax_topk": lambda f, x=LOGITS: f(x, K),
    "noaux_topk": lambda f, x=LOGITS: f(x, 9 * noise(3, E), K, 1, 1, 2.5),
    "normalize_weights": lambda f, x=SHARES: f(x),
    "decode_experts": lambda f, x=ONE: f(x, CHOSEN[:1], SHARES[:1], experts()),
    "gather_experts": lambda f, x=X: f(x, CHOSEN, SHARES, experts()),
    "batched_experts": lambda f, x=X: f(x, CHOSEN, SHARES, experts(), mx.zeros((N, D))),
    "combine_residual": lambda f, x=X: f(x, Y, noise(3, N, D), noise(4, N, 1)),
}
DIFFERENTIABLE = [
    name
    for name, call in CALLS.items()
    if "x" in inspect.signature(call).parameters and name != "batched_experts"
]


@pytest.fixture(params=["ops", "sim"])
def executor(request, monkeypatch):
    from moeflux_mlx.engine import simulator

    if request.param == "sim" and not simulator.available():
        pytest.skip("the simulator needs ziglang and pyelftools")
    monkeypatch.setenv("MOEFLUX_EXECUTOR", request.param)
    apply_module._executor.cache_clear()
    yield request.param
    apply_module._executor.cache_clear()


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def on_reference(name):
    """Return the result of the Op's reference, without any kernel."""
    call = CALLS[name]

    def run(*x):
        return as_tuple(call(getattr(functional, name), *x))

    return run


def close(got, wanted):
    np.testing.assert_allclose(
        np.array(got), np.array(wanted), rtol=2e-4, atol=2e-5, equal_nan=False
    )


def test_every_op_is_a_public_function():
    source = inspect.getsource(functional)
    for op in REGISTRY:
        assert source.count(op) >= 2, op
    assert set(CALLS) | {"quantize"} == {n for n in ops.__all__ if n.islower()}


@pytest.mark.sampled
@pytest.mark.parametrize("name", CALLS)
def test_a_function_gives_the_same_on_every_executor(name, executor, monkeypatch):
    got = as_tuple(CALLS[name](getattr(ops, name)))
    mx.eval(got)
    monkeypatch.setenv("MOEFLUX_EXECUTOR", "ops")
    apply_module._executor.cache_clear()
    wanted = as_tuple(CALLS[name](getattr(ops, name)))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        close(a, b)


@pytest.mark.sampled
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_is_that_of_finite_differences(name, executor):
    call, f = CALLS[name], getattr(ops, name)
    x = inspect.signature(call).parameters["x"].default
    direction = noise(31, *x.shape)

    def loss(x):
        parts = [p for p in as_tuple(call(f, x)) if mx.issubdtype(p.dtype, mx.floating)]
        return sum(
            (p * mx.cos(mx.arange(p.size).reshape(p.shape))).sum() for p in parts
        )

    slope = (mx.grad(loss)(x) * direction).sum().item()
    step = 1e-2
    rise = (loss(x + step * direction) - loss(x - step * direction)).item() / (2 * step)
    assert slope == pytest.approx(rise, rel=3e-2, abs=2e-2)


def test_a_training_loop_learns_through_the_functions(executor):
    """Fit a normed, gated layer whose matrix is a parameter of an ordinary module."""
    target = noise(50, N, 32)
    x = noise(51, N, D)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scale = noise(52, 64, D) * 0.2, mx.ones(D)

        def __call__(self, x):
            rows = ops.linear(ops.rms_norm(x, self.scale), self.weight)
            return ops.swiglu(rows[:, :32], rows[:, 32:])

    model = Layer()
    step = nn.value_and_grad(model, lambda x: ((model(x) - target) ** 2).mean())
    losses = []
    for _ in range(12):
        loss, gradients = step(x)
        model.update(tree_map(lambda p, g: p - 0.5 * g, model.parameters(), gradients))
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_scales_of_a_quantised_matrix_have_gradients(executor):
    w = ops.quantize(noise(2, 40, D), 32)
    x = X

    def loss(scales):
        return ops.linear(x, Weight(w.w, scales, w.biases, w.quantization)).sum()

    def plain(scales):
        y = mx.quantized_matmul(x, w.w, scales, w.biases, group_size=32, bits=4)
        return y.sum()

    close(mx.grad(loss)(w.scales), mx.grad(plain)(w.scales))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", ["decode_experts", "gather_experts"])
def test_experts_add_their_biases(name, bits, executor):
    n = 1 if name == "decode_experts" else N
    plain = experts(bits)
    biases = {"gate_proj": noise(41, E, 32), "up_proj": noise(42, E, 32)}
    biases["down_proj"] = noise(43, E, D)

    def run(biases):
        added = {p: replace(w, bias=biases[p]) for p, w in plain.by_name.items()}
        weights = ExpertWeights.named(added)
        return getattr(ops, name)(X[:n], CHOSEN[:n], SHARES[:n], weights)

    def by_hand(biases):
        def product(p, x, e):
            w = plain.by_name[p]
            dense = w.w if bits is None else mx.dequantize(w.w, w.scales, w.biases, 32)
            return x @ dense[e].T + biases[p][e]

        rows = []
        for x, chosen, shares in zip(X[:n], CHOSEN[:n].tolist(), SHARES, strict=False):
            inner = [
                nn.silu(product("gate_proj", x, e)) * product("up_proj", x, e)
                for e in chosen
            ]
            outs = [
                product("down_proj", y, e) for y, e in zip(inner, chosen, strict=True)
            ]
            rows.append(shares @ mx.stack(outs))
        return mx.stack(rows)

    close(run(biases), by_hand(biases))
    if bits is None:
        got, wanted = (
            mx.grad(lambda b, f=f: (f(b) * X[:n]).sum())(biases) for f in (run, by_hand)
        )
        for p in biases:
            close(got[p], wanted[p])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: ops.rms_norm(noise(1, D), noise(2, D)),
            r"^\[ops.rms_norm\] x: expected 2 dimensions but got shape \[64\]$",
        ),
        (
            lambda: ops.rms_norm(X, noise(2, D + 1)),
            r"^\[ops.rms_norm\] weight: expected shape \[64\] but got \[65\]$",
        ),
        (lambda: ops.rms_norm([1.0], noise(2, D)), "x: expected an mx.array but got l"),
        (lambda: ops.linear(X, noise(2, 8, D - 1)), "weight: expected"),
        (lambda: ops.linear(X, "w"), "weight: expected"),
        (lambda: ops.linear(X, noise(2, 8, D), noise(3, 9)), "bias: expected"),
        (lambda: ops.rope(X, noise(2, 8), START, 5), "num_heads: expected"),
        (lambda: ops.rope(X, noise(2, 8), START * 1.0, 2), "start: expected"),
        (
            lambda: ops.softmax_topk(noise(1, N, E), E + 1),
            "k: expected at most 6 experts but got 7",
        ),
        (lambda: ops.causal_attention(X, CACHE, CACHE[:, :, 1:, :31]), "v: ex"),
        (lambda: ops.causal_attention(noise(1, N, D + 1), CACHE, CACHE), "k: expected"),
        (lambda: ops.split_q_gate(X, -1), "num_heads: expected"),
        (lambda: ops.part_key_heads(X, HEADS, 3, 4), "num_k_heads: expected a divisor"),
        (lambda: ops.part_key_heads(X, HEADS, 2, 16), "key_dim: expected at most 63"),
        (lambda: ops.part_key_heads(X, HEADS, 1, 5), "qkvz: expected a divisor of 54"),
        (
            lambda: ops.decode_experts(
                noise(1, 2, D), CHOSEN[:2], SHARES[:2], experts()
            ),
            "x: expected at most 1 row but got 2",
        ),
        (
            lambda: ops.gated_delta_chunkwise(
                DELTA["state"], DELTA["qkv"], **GATES, num_k_heads=2, chunk_size=12
            ),
            "chunk_size",
        ),
        (
            lambda: ops.gated_delta_step(
                DELTA["state"][0], DELTA["qkv"], **GATES, num_k_heads=2
            ),
            "state: expected 4",
        ),
        (lambda: ops.embedding(IDS.astype(mx.float32), noise(1, 11, D)), "token_ids"),
        (
            lambda: ops.residual_add(mx.zeros((0, D)), mx.zeros((0, D))),
            "a: expected a non",
        ),
    ],
)
def test_a_misfit_is_an_error_that_names_op_and_argument(wrong, message):
    with pytest.raises(GraphError, match=message):
        wrong()
