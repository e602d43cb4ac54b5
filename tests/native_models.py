"""Random models of families with a class of our own, and the questions to them."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from native_family_table import FAMILIES

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.native import NativeModel
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.store import open_store
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.streaming import StreamedModel

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
# The same without a gate, where one launch places heads and appends to the cache.
UNGATED_LAYER = [LAYER[0], "attention_inputs_append", *LAYER[3:]]


def of(family: str, *configs: str) -> pytest.MarkDecorator:
    """Have a test try checkpoints of a family, of all configurations by default."""
    params = [(family, config) for config in configs or FAMILIES[family].configs]
    ids = [config for _, config in params]
    return pytest.mark.parametrize("plain", params, ids=ids, indirect=True)


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


def assert_kernels_give_mlx_lms(plain, n_seqs: int) -> None:
    """Check logits and a greedy token of simulated kernels.

    Three sequences have few experts in memory; one has few, and all.
    """
    expected, chosen = greedy(mlx_lm.load(str(plain))[0], n_seqs, 1)
    few = {"expert_memory": least(plain)}
    for memory in (few, {}) if n_seqs == 1 else (few,):
        got, found = greedy(load(plain, executor="sim", **memory), n_seqs, 1)
        assert relative_rms(got, expected) < 1e-5, memory
        assert found == chosen, memory


def assert_mlx_lms_class_serves(path, why: str, capsys) -> None:
    """Check that mlx-lm's class serves, and that a reason says why ours does not."""
    model, _ = moeflux_mlx.load(path, expert_memory="3MB")
    assert isinstance(model, StreamedModel)
    assert f"our own class does not support {why}" in capsys.readouterr().err
    expected = mlx_lm.load(str(path))[0](tokens(9))
    assert relative_rms(model(tokens(9)), expected) < 1e-5
    with pytest.raises(ModelError, match=f"our own class does not support {why}"):
        moeflux_mlx.load(path, native=True)


def assert_refused(path, message: str) -> None:
    """Check that a model is refused, bounded or not."""
    for bound in ({}, {"expert_memory": "3MB"}):
        with pytest.raises(ModelError, match=message):
            moeflux_mlx.load(path, **bound)


def adapt(model) -> None:
    """Give the projections of two layers, those of experts too, random adapters."""
    mx.random.seed(0)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    adapters = dict(tree_flatten(model.trainable_parameters()))
    assert adapters
    for name in sorted(adapters):
        adapters[name] = 0.1 * mx.random.normal(adapters[name].shape)
    model.load_weights(list(adapters.items()), strict=False)


def launches(model) -> list[str]:
    """Return the kernels that one token launches, caches being filled."""
    cache, launched = make_prompt_cache(model), []
    mx.eval(model(tokens(5), cache=cache), model(tokens(1), cache=cache))
    model.runtime.executor.on_launch = launched.append
    mx.eval(model(tokens(1), cache=cache))
    model.runtime.executor.on_launch = None
    return launched


def assert_large_caches_give_the_same_bits(
    path, monkeypatch, *kernels, numbers="plain"
) -> None:
    """Compare tokens whose caches kernels copy with tokens whose caches MLX updates.

    Args:
        kernels: the kernel that copies them, and the one that runs instead.
        numbers: how the simulator computes numbers.
    """
    found, launched = [], []
    for optimistic, limit in (("on", 1 << 20), ("on", 0), ("off", 0)):
        monkeypatch.setattr(device, "COPIED_CACHE_BYTES", limit)
        model = load(path, executor="sim", optimistic=optimistic)
        model.runtime.executor.numbers = numbers
        cache = make_prompt_cache(model)
        parts = [model(tokens(5), cache=cache), model(tokens(1), cache=cache)]
        mx.eval(parts)
        names: list[str] = []
        model.runtime.executor.on_launch = names.append
        parts += [model(tokens(1), cache=cache) for _ in range(2)]
        mx.eval(parts)
        found.append(mx.concatenate(parts, axis=1))
        launched.append({*names})
    for other in found[1:]:
        assert mx.array_equal(found[0], other)
    copying, instead = kernels
    assert [{*kernels} & each for each in launched] == [{copying}, {instead}, {instead}]
    assert not any("kv_cache_append" in name for name in set().union(*launched))


def edit_config(path, **changes) -> None:
    file = path / "config.json"
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
