"""A call of mlx-lm's class that runs ahead of its experts equals one that waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import cache as caches
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import load_model

from moeflux_mlx import device
from moeflux_mlx.calls import ways
from moeflux_mlx.calls.ahead import TokenAhead
from moeflux_mlx.errors import ConfigError, ExpertStoreError, ModelError
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.memory.caches import CacheState, PutBackOnFailure, are_known
from moeflux_mlx.streaming import stream

ROOT = Path(__file__).resolve().parents[1]
N_LAYERS, N_EXPERTS, TOP_K = 5, 8, 2
ALL = 100
SLOT = 16 << 10


@pytest.fixture(autouse=True, scope="module")
def scripts():
    """Make the scripts' modules importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture
def window(monkeypatch) -> Callable[[int], None]:
    """Let tokens run this many blocks ahead, whatever they miss."""

    def decide(size: int) -> None:
        monkeypatch.setattr(ways, "window_of", lambda *_, **__: size)

    return decide


@pytest.fixture
def begun_again(monkeypatch) -> list[int]:
    """Return a list that collects the number of confirmed blocks at each restart."""
    found: list[int] = []
    original = TokenAhead._restart

    def note(self: TokenAhead) -> None:
        found.append(len(self._confirmed))
        original(self)

    monkeypatch.setattr(TokenAhead, "_restart", note)
    return found


def write(path: Path, family: str, **changes: Any) -> Path:
    import families
    import family_trials

    own = families.configuration
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "configuration", lambda name: {**own(name), **changes})
        path.mkdir()
        family_trials.write_model(path, family, 4)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny qwen3_moe of five layers."""
    path = tmp_path_factory.mktemp("ahead") / "qwen3_moe"
    return write(path, "qwen3_moe", num_hidden_layers=N_LAYERS, head_dim=32)


def streamed(path: Path, n_slots: int, optimistic: str = "on", **options: Any) -> Any:
    """Stream a model with ``n_slots`` slots and the blank one."""
    model, _ = load_model(path, lazy=True)
    n_slots += optimistic == "on"
    memory = POOL_ALIGNMENT + n_slots * SLOT
    return stream(model, path, expert_memory=memory, optimistic=optimistic, **options)


def run(model: nn.Module, cache: list[Any], n: int = 8, n_seqs: int = 1) -> mx.array:
    """Return the logits of a prompt's last token and of ``n`` tokens after it."""
    logits = [model(ids(9, n_seqs), cache=cache)[:, -1:]]
    for i in range(n):
        logits.append(model(ids(1, n_seqs, seed=i), cache=cache))
        mx.eval(logits[-1])
    return mx.concatenate(logits, axis=1)


def ids(n: int, n_seqs: int = 1, seed: int = 99) -> mx.array:
    return mx.random.randint(1, 128, (n_seqs, n), key=mx.random.key(seed))


KINDS: dict[str, Callable[[], Any]] = {
    "plain": caches.KVCache,
    "rotating": lambda: caches.RotatingKVCache(max_size=12, keep=2),
    "short": lambda: caches.RotatingKVCache(max_size=6),
    "quantized": lambda: caches.QuantizedKVCache(group_size=32, bits=8),
    "concatenated": caches.ConcatenateKVCache,
    "batch": lambda: caches.BatchKVCache([2, 0]),
    "rotating batch": lambda: caches.BatchRotatingKVCache(12, [2, 0]),
}


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cache_is_restored(checkpoint, window, begun_again, kind):
    window(ALL)
    n_seqs = 2 if "batch" in kind else 1
    stock, _ = load_model(checkpoint)
    make = KINDS[kind]
    wanted = run(stock, [make() for _ in range(N_LAYERS)], n_seqs=n_seqs)
    ours = streamed(checkpoint, 2 * n_seqs * TOP_K)
    got = run(ours, [make() for _ in range(N_LAYERS)], n_seqs=n_seqs)
    assert len(begun_again) > 8 and mx.array_equal(wanted, got)


# Latent attention with an indexer, windows, chunks, states and both in one model.
FAMILIES = ("deepseek_v32", "gpt_oss", "llama4", "qwen3_next", "nemotron_h", "gemma4")
# A cache of the model's own class, and layers that change a dictionary.
FAMILIES = (*FAMILIES, "deepseek_v41")
# These blocks follow each other.
FORESEEN = ("gpt_oss", "llama4", "qwen3_next", "gemma4", "deepseek_v41")


@pytest.mark.sampled
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_other_caches_restore_theirs_too(
    tmp_path, window, begun_again, family
):
    window(ALL)
    path = write(tmp_path / family, family)
    stock, _ = load_model(path)
    wanted = run(stock, make_prompt_cache(stock))
    ours = streamed(path, TOP_K + 1)
    assert mx.array_equal(wanted, run(ours, make_prompt_cache(ours)))
    assert begun_again
    waiting = streamed(path, 3 * TOP_K, "off", read_ahead="on")
    assert mx.array_equal(wanted, run(waiting, make_prompt_cache(waiting)))
    assert bool(waiting.streamer.stats.total.read_ahead) == (family in FORESEEN)


@pytest.mark.sampled
@pytest.mark.parametrize("n_slots", [TOP_K, 7, 20, N_LAYERS * N_EXPERTS - 2])
@pytest.mark.parametrize("size", [1, 2, ALL])
@pytest.mark.parametrize("read_ahead", ["on", "off"])
def test_no_number_of_slots_changes_a_bit(
    checkpoint, window, n_slots, size, read_ahead
):
    window(size)
    waiting = streamed(checkpoint, n_slots, "off", read_ahead="off")
    wanted = run(waiting, make_prompt_cache(waiting), 4)
    ours = streamed(checkpoint, n_slots, read_ahead=read_ahead)
    assert ours.streamer.n_slots == n_slots
    assert mx.array_equal(wanted, run(ours, make_prompt_cache(ours), 4))
    if read_ahead == "off":
        # Discarded work counts neither as a hit nor as a miss.
        found, expected = (m.streamer.stats.total for m in (ours, waiting))
        assert (found.hits, found.misses) == (expected.hits, expected.misses)


# Layers of the second family leave arrays for later ones in a dictionary.
RESTARTED = {
    "qwen3_moe": dict(head_dim=32),
    "deepseek_v41": dict(compress_ratios=[4] * N_LAYERS),
}


@pytest.mark.parametrize("family", RESTARTED)
def test_a_token_restarts_after_its_confirmed_layers(
    tmp_path, window, begun_again, monkeypatch, family
):
    window(ALL)
    sizes = dict(num_hidden_layers=N_LAYERS, **RESTARTED[family])
    path = write(tmp_path / family, family, **sizes)
    ours = streamed(path, 6)
    cache = make_prompt_cache(ours)
    ours(ids(9), cache=cache)
    ran: list[int] = []
    attention = type(ours.model.layers[0].self_attn)
    call = attention.__call__

    def note(self: nn.Module, *args: Any, **options: Any) -> mx.array:
        ran.extend(i for i, x in enumerate(ours.model.layers) if x.self_attn is self)
        return call(self, *args, **options)

    monkeypatch.setattr(attention, "__call__", note)
    ours(ids(1), cache=cache)
    expected = [*range(N_LAYERS)]
    for n_right in begun_again:
        expected += range(n_right, N_LAYERS)
    assert begun_again == sorted(set(begun_again)) and ran == expected
    stock, _ = load_model(path)
    got, wanted = (run(m, make_prompt_cache(m), 2) for m in (ours, stock))
    assert mx.array_equal(got, wanted)


@pytest.fixture
def n_read_back(monkeypatch) -> list[int]:
    """Return a list that grows by one whenever expert ids are read back."""
    found: list[int] = []
    original = ExpertStreamer._read_back

    def note(self: ExpertStreamer, chosen: Any) -> Any:
        found.append(len(chosen))
        return original(self, chosen)

    monkeypatch.setattr(ExpertStreamer, "_read_back", note)
    return found


def test_a_token_without_misses_is_read_back_once(checkpoint, n_read_back):
    ours = streamed(checkpoint, N_LAYERS * N_EXPERTS - 2)
    cache = make_prompt_cache(ours)
    for _ in range(30):
        ours(ids(1), cache=cache)
    n_read_back.clear()
    ours(ids(1), cache=cache)
    assert ours.streamer.miss_rate < 0.01
    assert n_read_back == [N_LAYERS]


@pytest.mark.parametrize("n_slots", [TOP_K, N_LAYERS * N_EXPERTS - 2])
def test_a_cpu_waits_unless_told_otherwise(checkpoint, n_read_back, n_slots):
    ours = streamed(checkpoint, n_slots, "auto")
    cache = make_prompt_cache(ours)
    for i in range(6):
        n_read_back.clear()
        ours(ids(1, seed=i), cache=cache)
        assert n_read_back == [1] * N_LAYERS


@pytest.mark.parametrize("optimistic", ["auto", "on"])
def test_a_gpu_waits_where_experts_are_missing(
    checkpoint, n_read_back, begun_again, monkeypatch, optimistic
):
    with monkeypatch.context() as patch:
        patch.setattr(device, "on_cpu", lambda: False)
        # This includes the blank slot.
        n_slots = TOP_K + (optimistic == "auto")
        ours = streamed(checkpoint, n_slots, optimistic, read_ahead="off")
    cache = make_prompt_cache(ours)
    for i in range(3):
        ours(ids(1, seed=i), cache=cache)
    assert n_read_back == [1] * N_LAYERS * 3 and not begun_again


def test_with_all_experts_in_memory_nothing_is_read_back(checkpoint, n_read_back):
    ours = streamed(checkpoint, N_LAYERS * N_EXPERTS)
    assert ours.streamer.resident
    ours(ids(1), cache=make_prompt_cache(ours))
    assert n_read_back == []


def test_a_call_with_an_unknown_cache_waits(checkpoint, window, n_read_back):
    class OwnCache(KVCache):
        pass

    window(ALL)
    ours, stock = streamed(checkpoint, 4), load_model(checkpoint)[0]
    wanted = run(stock, [OwnCache() for _ in range(N_LAYERS)], 2)
    n_read_back.clear()
    got = run(ours, [OwnCache() for _ in range(N_LAYERS)], 2)
    assert mx.array_equal(wanted, got) and set(n_read_back) == {1}


def held(cache: list[Any]) -> list[mx.array]:
    return [x[..., : c.offset, :] for c in cache for x in (c.keys, c.values)]


@pytest.mark.sampled
@pytest.mark.parametrize("optimistic", ["on", "off"])
@pytest.mark.parametrize("error", [ExpertStoreError, KeyboardInterrupt])
def test_a_failed_call_leaves_its_caches_unchanged(
    checkpoint, window, monkeypatch, optimistic, error
):
    window(ALL)
    ours = streamed(checkpoint, 4, optimistic, read_ahead="on")
    cache = make_prompt_cache(ours)
    run(ours, cache, 2)
    offsets, before = [c.offset for c in cache], held(cache)
    mx.eval(before)
    original, calls = ExpertStreamer._read_back, []

    def fail(self: ExpertStreamer, chosen: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error("[test]")
        return original(self, chosen)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertStreamer, "_read_back", fail)
        with pytest.raises(error):
            ours(ids(1, seed=5), cache=cache)
    assert [c.offset for c in cache] == offsets
    assert all(map(mx.array_equal, before, held(cache)))
    stock, _ = load_model(checkpoint)
    others = make_prompt_cache(stock)
    run(stock, others, 2)
    for seed in (5, 6):
        tokens = ids(1, seed=seed)
        wanted, got = stock(tokens, cache=others), ours(tokens, cache=cache)
        assert mx.array_equal(wanted, got)


def test_a_failed_read_leaves_caches_unchanged_too(tmp_path, window):
    window(ALL)
    path = write(tmp_path / "model", "qwen3_moe", num_hidden_layers=N_LAYERS)
    ours, (file,) = streamed(path, 4), path.glob("*.safetensors")
    cache = make_prompt_cache(ours)
    run(ours, cache, 2)
    data = file.read_bytes()
    os.truncate(file, 4096)
    with pytest.raises(ExpertStoreError, match=r"expert \d of .*switch_mlp at"):
        ours(ids(1, seed=5), cache=cache)
    assert {c.offset for c in cache} == {11}
    with open(file, "r+b") as mended:
        mended.write(data)
    stock, _ = load_model(path)
    others = make_prompt_cache(stock)
    run(stock, others, 2)
    tokens = ids(1, seed=5)
    assert mx.array_equal(stock(tokens, cache=others), ours(tokens, cache=cache))


def test_gradients_of_weights_equal_stocks(checkpoint, window):
    window(ALL)

    def gradient(model: nn.Module) -> mx.array:
        cache = make_prompt_cache(model)
        model(ids(9), cache=cache)
        norm = model.model.layers[1].input_layernorm

        def loss(weight: mx.array) -> mx.array:
            norm.weight = weight
            return model(ids(1), cache=cache).square().mean()

        found: mx.array = mx.grad(loss)(norm.weight)
        assert {c.offset for c in cache} == {10}
        return found

    want, got = gradient(load_model(checkpoint)[0]), gradient(streamed(checkpoint, 4))
    assert mx.abs(want).max() > 0 and mx.allclose(want, got, rtol=1e-4, atol=1e-5)


def test_tracing_a_call_without_values_of_ids_is_refused(checkpoint):
    ours = streamed(checkpoint, 4)
    with pytest.raises(ModelError, match=r"outside mx\.compile"):
        mx.compile(lambda x: ours(x, cache=make_prompt_cache(ours)))(ids(1))
    assert ours(ids(1), cache=make_prompt_cache(ours)).shape == (1, 1, 128)


def test_an_invalid_choice_is_refused(checkpoint):
    with pytest.raises(ConfigError, match=r"\[optimistic\] expected one of"):
        streamed(checkpoint, 4, "perhaps")


KINDS_ALONE = {
    **KINDS,
    "full": lambda: caches.RotatingKVCache(max_size=4),
    "chunked": lambda: caches.ChunkedKVCache(chunk_size=7),
}


def rows(n: int, seed: int, n_seqs: int) -> tuple[mx.array, mx.array]:
    one, two = mx.random.split(mx.random.key(seed))
    shape = (n_seqs, 2, n, 32)
    return mx.random.normal(shape, key=one), mx.random.normal(shape, key=two)


def add(cache: Any, n: int, seed: int, n_seqs: int) -> list[mx.array]:
    """Add tokens as a model does; return all that attention sees."""
    if hasattr(cache, "maybe_trim_front"):
        cache.maybe_trim_front()
    mask = (
        cache.make_mask(n, return_array=True, window_size=None)
        if hasattr(cache, "make_mask")
        else None
    )
    found = cache.update_and_fetch(*rows(n, seed, n_seqs))
    parts = [x for part in found for x in (part if type(part) is tuple else [part])]
    return [*parts, *([mask] if isinstance(mask, mx.array) else [])]


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS_ALONE)
@pytest.mark.parametrize("first", [1, 3, 9])
def test_a_restored_cache_has_no_trace_of_the_call(kind, first):
    n_seqs = 2 if "batch" in kind else 1
    cache, other = KINDS_ALONE[kind](), KINDS_ALONE[kind]()
    for i, n in enumerate([first, *[1] * 12, 2, 1, 5, 1]):
        # The next call rarely has the length of the call that was undone.
        for n_tokens in (n, n, None, 1):
            state = CacheState(cache, n_tokens)
            add(cache, n_tokens or n, 1000 + i, n_seqs)
            after = state.now()
            state.put_back()
            # A call can be repeated after it was undone.
            after.put_back()
            state.put_back()
        wanted, got = (add(c, n, i, n_seqs) for c in (other, cache))
        assert len(wanted) == len(got) and all(map(mx.array_equal, wanted, got))


def test_rows_are_written_in_place_while_a_token_can_be_undone():
    cache = KVCache()
    add(cache, 4, 0, 1)
    mx.eval(cache.keys, cache.values)
    held = CacheState(cache, 1)
    assert not {"keys", "values"} & set(held._names)


def test_states_of_a_list_inside_are_found():
    nested = caches.CacheList(KVCache(), caches.ArraysCache(2))
    assert are_known([nested, None]) and not are_known([KVCache(), object()])
    before = mx.ones(3)
    nested[1][0] = before
    with pytest.raises(KeyboardInterrupt), PutBackOnFailure([nested]):
        nested[1][0] = mx.zeros(3)
        raise KeyboardInterrupt
    assert mx.array_equal(nested[1][0], before)
