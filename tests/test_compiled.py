"""Compiled steps equal uncompiled ones, and notice replaced weights and caches."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx.engine.compiled_layers import CompiledLayers
from moeflux_mlx.engine.executors import EXECUTORS, OpsExecutor
from moeflux_mlx.engine.executors.compiled import CompiledCalls
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.ops import RmsNormBf16NTokens


class Lazy(OpsExecutor):
    """Run references on MLX arrays, as a GPU does."""

    name = "lazy"
    takes_host_arrays = False


class Traced(Lazy):
    """Run the same references in compiled functions."""

    name = "traced"
    compiles = True
    spare_rows = True


@pytest.fixture(autouse=True)
def executors(monkeypatch):
    for executor in (Lazy, Traced):
        monkeypatch.setitem(EXECUTORS, executor.name, executor)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("compiled") / "plain", seed=5)


@pytest.fixture(scope="module")
def packed(plain):
    target = plain.parent / "packed"
    pack(plain, target)
    return target


@pytest.fixture
def traces(monkeypatch) -> list[object]:
    """Collect the compiled functions that are made: of layers, and of whole steps."""
    made: list[object] = []

    def collect(cls, name):
        original = getattr(cls, name)

        def call(self, *args):
            made.append(self)
            return original(self, *args)

        monkeypatch.setattr(cls, name, call)

    collect(CompiledCalls, "__init__")
    collect(CompiledLayers, "_function")
    return made


def tokens(n: int, seed: int = 0, n_seqs: int = 1) -> mx.array:
    return mx.array(np.random.RandomState(seed).randint(1, 320, (n_seqs, n)))


def logits(model, n_prompt: int = 5, n_steps: int = 4, n_seqs: int = 1) -> mx.array:
    """Return the logits of a prompt and of single tokens after it."""
    cache = make_prompt_cache(model)
    parts = [model(tokens(n_prompt, n_seqs=n_seqs), cache=cache)]
    for i in range(n_steps):
        parts.append(model(tokens(1, i, n_seqs), cache=cache))
    out = mx.concatenate(parts, axis=1)
    mx.eval(out)
    return out


def models(path, **options):
    return [
        moeflux_mlx.load(path, executor=name, **options)[0]
        for name in ("lazy", "traced")
    ]


def relative_rms(got: mx.array, expected: mx.array) -> float:
    return (mx.linalg.norm(got - expected) / mx.linalg.norm(expected)).item()


@pytest.mark.parametrize("n_seqs", [1, 3])
def test_a_resident_model_gives_the_same_logits(plain, traces, n_seqs):
    lazy, traced = models(plain)
    expected = logits(lazy, n_seqs=n_seqs)
    assert not traces
    assert relative_rms(logits(traced, n_seqs=n_seqs), expected) < 1e-5
    assert [type(trace) for trace in traces] == [CompiledLayers]


def test_a_step_without_a_cache_is_compiled_layer_by_layer(plain, traces):
    lazy, traced = models(plain)
    assert relative_rms(traced(tokens(1)), lazy(tokens(1))) < 1e-5
    assert {type(trace) for trace in traces} == {CompiledCalls}


def test_a_step_with_layer_hooks_is_not_compiled_as_a_whole(plain, traces, monkeypatch):
    lazy, traced = models(plain)
    monkeypatch.setattr(Traced, "watches_layers", True)
    assert relative_rms(logits(traced), logits(lazy)) < 1e-5
    assert {type(trace) for trace in traces} == {CompiledCalls}


@pytest.mark.slow
def test_a_compiled_step_is_valid_until_a_cache_grows(plain, traces):
    lazy, traced = models(plain)
    logits(traced, n_prompt=250, n_steps=3)
    assert len(traces) == 1
    got = logits(traced, n_prompt=250, n_steps=12)
    assert relative_rms(got, logits(lazy, n_prompt=250, n_steps=12)) < 1e-5
    # The token that makes it grow runs layer by layer; then the step is compiled anew.
    steps = [trace for trace in traces if isinstance(trace, CompiledLayers)]
    assert len(steps) == 2


def test_caches_are_the_same_with_and_without_compiled_steps(plain):
    states = []
    for model in models(plain):
        cache = make_prompt_cache(model)
        model(tokens(5), cache=cache)
        for seed in range(3):
            model(tokens(1, seed), cache=cache)
        states.append(cache)
    for got, expected in zip(*reversed(states), strict=True):
        assert type(got) is type(expected)
        if isinstance(got, KVCache):
            assert got.offset == expected.offset == 8
            pairs = zip(got.keys_and_values(), expected.keys_and_values(), strict=True)
        else:
            pairs = zip(got.cache, expected.cache, strict=True)
        for a, b in pairs:
            assert a.shape == b.shape
            assert relative_rms(a, b) < 1e-5


def test_a_cache_left_behind_by_a_failed_step_can_be_used(plain, monkeypatch):
    lazy, traced = models(plain)
    cache, expected = make_prompt_cache(traced), make_prompt_cache(lazy)
    for model, each in ((traced, cache), (lazy, expected)):
        model(tokens(5), cache=each)
    with monkeypatch.context() as patch:
        patch.setattr(RmsNormBf16NTokens, "reference", None)
        with pytest.raises(TypeError):
            traced.language_model.forward.runtime.graphs._built.clear()
            traced(tokens(1), cache=cache)
    assert cache[-1].offset == 5
    traced.language_model.forward.runtime.graphs._built.clear()
    got = traced(tokens(1), cache=cache)
    assert relative_rms(got, lazy(tokens(1), cache=expected)) < 1e-5


def test_steps_are_compiled_once_for_any_number_of_tokens(plain, traces):
    _, traced = models(plain)
    logits(traced, n_steps=2)
    n_traces = len(traces)
    logits(traced, n_prompt=7, n_steps=9)
    assert len(traces) == n_traces > 0


@pytest.mark.parametrize("n_slots", [2, 5])
def test_streamed_experts_are_read_outside_compiled_functions(packed, traces, n_slots):
    with PackedExperts.open(packed) as store:
        memory = n_slots * store.layout(0).stride + POOL_ALIGNMENT
    lazy, traced = models(packed, expert_memory=memory)
    assert relative_rms(logits(traced), logits(lazy)) < 1e-5
    assert traces
    got, expected = traced.streamer.stats.total, lazy.streamer.stats.total
    assert (got.hits, got.misses) == (expected.hits, expected.misses)
    assert got.misses > 0


def test_hits_of_preloaded_experts_are_counted(packed, traces):
    lazy, traced = models(packed)
    assert relative_rms(logits(traced), logits(lazy)) < 1e-5
    assert traces
    hits = [model.streamer.stats.total.hits for model in (lazy, traced)]
    # The trace itself asks a source that counts nothing.
    assert hits[0] == hits[1] > 0


def test_logits_are_right_without_a_cache_and_with_a_quantised_one(plain):
    lazy, traced = models(plain)
    for model in (lazy, traced):
        model(tokens(1))
    assert relative_rms(traced(tokens(1)), lazy(tokens(1))) < 1e-5
    outs = []
    for model in (lazy, traced):
        cache = make_prompt_cache(model)
        model(tokens(5), cache=cache)
        cache = [c.to_quantized(32) if hasattr(c, "to_quantized") else c for c in cache]
        outs.append([model(tokens(1, i), cache=cache) for i in range(3)])
    for got, expected in zip(*reversed(outs), strict=True):
        assert relative_rms(got, expected) < 1e-5


def test_replaced_weights_are_noticed(plain):
    lazy, traced = models(plain)
    before = logits(traced)
    for model in (lazy, traced):
        layer = model.language_model.model.layers[1]
        norm, proj = layer.input_layernorm, layer.linear_attn.out_proj
        norm.weight = norm.weight * 2
        proj.scales = proj.scales * 1.5
    assert relative_rms(logits(traced), before) > 1e-3
    assert relative_rms(logits(traced), logits(lazy)) < 1e-5


def test_a_users_own_compile_accepts_a_compiled_model(plain):
    lazy, traced = models(plain)
    step = mx.compile(lambda x: traced(x))
    for seed in range(3):
        x = tokens(1, seed)
        assert relative_rms(step(x), lazy(x)) < 1e-5


def test_a_users_compiled_training_step_can_be_traced(plain):
    """Its parameters have no values then: nothing may ask for them."""
    model, _ = models(plain)
    model.train()
    loss = nn.value_and_grad(model, lambda m, x: (m(x) ** 2).mean())
    step = mx.compile(lambda x: loss(model, x)[0], inputs=[model.state])
    assert step(tokens(3)).shape == ()


@pytest.mark.parametrize("trains", [False, True])
def test_gradients_do_not_use_compiled_steps(plain, traces, trains):
    lazy, traced = models(plain)
    grads = []
    for model in (lazy, traced):
        model.train(trains)
        model.freeze()
        model.language_model.model.norm.unfreeze()
        loss = nn.value_and_grad(model, lambda m: (m(tokens(1)) ** 2).mean())
        value, grad = loss(model)
        grads.append((value, grad["language_model"]["model"]["norm"]["weight"]))
    assert not traces
    assert relative_rms(grads[1][1], grads[0][1]) < 1e-5
