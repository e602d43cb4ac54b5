"""Random models of families with a class of our own, and what tests ask of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moeflux_mlx
from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.native import NativeModel
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.store import open_store
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT

simulated = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
# A full attention layer of one token, its gate and shared expert if it has such.
LAYER = [
    "norm_matvecs",
    "attention_inputs",
    "kv_cache_append_n_tokens",
    "sdpa_decode_parts",
    "sdpa_decode_join",
    "matvec_residual",
    "norm_matvecs",
    "experts_route_gate_up",
    "experts_down_combine",
]


def made_of(
    make: Callable[..., Path], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[Any, Any]:
    """Return fixtures: a checkpoint for each configuration, and a pack of it.

    Args:
        make: writes a checkpoint; one whose name ends in ``floats`` is not quantised.
    """

    @pytest.fixture(scope="module", params=configs)
    def plain(request, tmp_path_factory):
        path = tmp_path_factory.mktemp(make.__name__) / request.param
        bits = None if request.param.endswith("floats") else 4
        seed = list(configs).index(request.param)
        return make(path, seed=seed, bits=bits, **configs[request.param])

    @pytest.fixture(scope="module")
    def packed(plain):
        pack(plain, plain.parent / "packed")
        return plain.parent / "packed"

    return plain, packed


def load(path, **options) -> NativeModel:
    """Load a model, which must be of a class of our own."""
    model, _ = moeflux_mlx.load(path, **options)
    assert isinstance(model, NativeModel)
    return model


def least(path, n_more: int = 0) -> int:
    """Return the bytes of the fewest slots that experts can have, and some more."""
    with open_store(path) as store:
        stride = max(store.layout(layer).stride for layer in store.layers)
        return (store.top_k + n_more) * stride + POOL_ALIGNMENT


def tokens(n: int, seed: int = 0, n_seqs: int = 1) -> mx.array:
    return mx.array(np.random.RandomState(seed).randint(1, 320, (n_seqs, n)))


def greedy(model, n_seqs: int, n: int) -> tuple[mx.array, list[list[int]]]:
    """Return the logits of a prompt and of each of ``n`` likeliest tokens; those."""
    cache, x = make_prompt_cache(model), tokens(11, n_seqs=n_seqs)
    logits, chosen = [], []
    for _ in range(n + 1):
        logits.append(model(x, cache=cache))
        x = mx.argmax(logits[-1][:, -1:], axis=-1)
        chosen.append(x.flatten().tolist())
    return mx.concatenate(logits, axis=1), chosen


def relative_rms(got: mx.array, expected: mx.array) -> float:
    error = mx.sqrt(mx.mean((got - expected) ** 2))
    return (error / mx.sqrt(mx.mean(expected**2))).item()


def assert_tokens_are_mlx_lms(plain, packed, n_seqs: int, n_tokens: int) -> None:
    """Check logits and greedy tokens: all experts in memory, few, and few of a pack."""
    expected, chosen = greedy(mlx_lm.load(str(plain))[0], n_seqs, n_tokens)
    budget = {"expert_memory": least(plain)}
    models = {
        "resident": load(plain, executor="ops"),
        "least": load(plain, executor="ops", **budget),
        "least of a pack": load(packed, executor="ops", read_ahead="on", **budget),
    }
    found = {}
    for name, model in models.items():
        found[name], ids = greedy(model, n_seqs, n_tokens)
        assert relative_rms(found[name], expected) < 1e-5, name
        assert ids == chosen, name
        assert mx.array_equal(found[name], found["resident"]), name
        if name != "resident":
            assert model.streamer.stats.total.misses, name


def assert_kernels_give_mlx_lms(plain, n_seqs: int, n_tokens: int) -> None:
    """Check logits and greedy tokens of simulated kernels, with few experts."""
    expected, chosen = greedy(mlx_lm.load(str(plain))[0], n_seqs, n_tokens)
    options = {"executor": "sim", "expert_memory": least(plain)}
    got, found = greedy(load(plain, **options), n_seqs, n_tokens)
    assert relative_rms(got, expected) < 1e-5
    assert found == chosen


def assert_ahead_is_as_waiting(packed, n_seqs: int, lazy: str) -> None:
    """Check logits of tokens that ran ahead against those that waited.

    Args:
        lazy: name of an executor that computes nothing before it must.
    """
    found = []
    for optimistic in ("off", "on"):
        options = {"expert_memory": least(packed, 9), "optimistic": optimistic}
        model = load(packed, executor=lazy, **options)
        found.append(greedy(model, n_seqs, 6)[0])
        assert model.runtime.steps == (optimistic == "on")
    assert relative_rms(found[1], found[0]) < 1e-6


def launches(model) -> list[str]:
    """Return the kernels that one token launches, caches being filled."""
    cache, launched = make_prompt_cache(model), []
    mx.eval(model(tokens(5), cache=cache), model(tokens(1), cache=cache))
    model.runtime.executor.on_launch = launched.append
    mx.eval(model(tokens(1), cache=cache))
    model.runtime.executor.on_launch = None
    return launched


def edit_config(path, **changes) -> None:
    file = path / "config.json"
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
