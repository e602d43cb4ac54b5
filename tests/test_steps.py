"""A token that runs ahead of its experts equals one that waits for them."""

from __future__ import annotations

import copy
import os
import shutil
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache, trim_prompt_cache
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx import config
from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.compiled_layers import CompiledLayers
from moeflux_mlx.engine.executors import EXECUTORS, OpsExecutor
from moeflux_mlx.engine.steps import first_span
from moeflux_mlx.errors import ConfigError, ExpertStoreError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.files.reader import Read
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.streaming.demand import Demand
from moeflux_mlx.experts.streaming.read_ahead import TURN_TOKENS, ReadAhead
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.experts.streaming.windows import window_of

N_LAYERS, N_EXPERTS = 6, 8


class Lazy(OpsExecutor):
    """Run references on MLX arrays, as a GPU does, without compiled functions."""

    name = "lazy"
    takes_host_arrays = False
    spare_rows = True


class Traced(Lazy):
    """Run the same references in compiled functions."""

    name = "traced"
    compiles = True


@pytest.fixture(autouse=True)
def executors(monkeypatch):
    for executor in (Lazy, Traced):
        monkeypatch.setitem(EXECUTORS, executor.name, executor)


def make_packed(path, **options):
    make_checkpoint(path / "plain", seed=11, num_hidden_layers=N_LAYERS, **options)
    pack(path / "plain", path / "packed")
    return path / "packed"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_packed(tmp_path_factory.mktemp("steps"))


def load(path, n_slots: int, optimistic: str, executor: str = "lazy"):
    """Load a model with ``n_slots`` slots, one fewer if that is all but one.

    Running ahead keeps an additional blank slot.
    """
    with PackedExperts.open(path) as store:
        n_records = len(store.layers) * store.n_experts
        n_slots += optimistic != "off" and n_slots + 1 < n_records
        memory = n_slots * store.layout(0).stride + POOL_ALIGNMENT
    return moeflux_mlx.load(
        path, expert_memory=memory, executor=executor, optimistic=optimistic
    )[0]


def tokens(n: int, seed: int = 0, n_seqs: int = 1) -> mx.array:
    return mx.array(np.random.RandomState(seed).randint(1, 320, (n_seqs, n)))


def generate(model, cache, seeds) -> mx.array:
    """Return the logits of single tokens, one after the other."""
    out = mx.concatenate([model(tokens(1, seed), cache=cache) for seed in seeds])
    mx.eval(out)
    return out


def begin(model, n_prompt: int = 5):
    cache = make_prompt_cache(model)
    mx.eval(model(tokens(n_prompt, 77), cache=cache))
    return cache


def state_of(cache) -> list[np.ndarray]:
    """Return the meaningful contents of a cache."""
    if isinstance(cache, KVCache):
        return [np.array(x) for x in cache.keys_and_values()]
    return [np.array(x) for x in cache.cache]


def check_same(model, cache, other, other_cache) -> None:
    """Compare caches, counters, and which experts are in memory in which order."""
    for ours, theirs in zip(cache, other_cache, strict=True):
        assert getattr(ours, "offset", None) == getattr(theirs, "offset", None)
        for a, b in zip(state_of(ours), state_of(theirs), strict=True):
            assert np.array_equal(a, b)
    for a, b in zip(*(counters(m).values() for m in (model, other)), strict=True):
        assert a == b
    tables = [m.streamer._table for m in (model, other)]
    assert tables[0].slots == tables[1].slots
    assert evictions(tables[0]) == evictions(tables[1])


def evictions(table) -> list[int]:
    """Return the experts in memory in the order of their eviction."""
    policy, found = copy.deepcopy(table._policy), []
    while (key := policy.victim(0, range(len(table.slots)), ())) is not None:
        policy.forget(key // table.n_experts, key)
        found.append(key)
    return found


def counters(model) -> dict[int, tuple[int, int, int]]:
    layers = model.streamer.stats.snapshot().layers
    return {i: (c.hits, c.misses, c.read_bytes) for i, c in layers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("n_slots", [2, 7, 40])
def test_logits_caches_and_counts_equal_those_of_waiting(packed, n_slots):
    ahead, waiting = load(packed, n_slots, "on"), load(packed, n_slots, "off")
    caches = [begin(model) for model in (ahead, waiting)]
    got, expected = (
        generate(*pair, range(8)) for pair in zip((ahead, waiting), caches, strict=True)
    )
    assert mx.array_equal(got, expected)
    assert waiting.streamer.stats.total.misses > 0
    check_same(ahead, caches[0], waiting, caches[1])


def test_with_all_experts_in_memory_the_step_is_the_same(packed):
    ahead, waiting = load(packed, 999, "on"), load(packed, 30, "off")
    got, expected = (generate(m, begin(m), range(5)) for m in (ahead, waiting))
    assert ahead.streamer.resident
    assert mx.array_equal(got, expected)


class Script:
    """A model with nearly all experts in memory, and one token to run again."""

    def __init__(self, path, executor: str = "lazy", optimistic: str = "on"):
        self.model = load(path, N_LAYERS * N_EXPERTS - 1, optimistic, executor)
        self.streamer = self.model.streamer
        for layer in range(N_LAYERS):
            for _ in self.streamer.source(layer).waves(range(N_EXPERTS)):
                pass
        self.cache = begin(self.model)
        self.chosen: dict[int, list[int]] = {}
        self.expected = self.run()

    def run(self) -> mx.array:
        """Run the token with a copy of the cache."""
        self.after = copy.deepcopy(self.cache)
        note_use = Demand._note_use

        def note(streamer, layer, experts, n_read=0):
            self.chosen[layer] = experts
            note_use(streamer, layer, experts, n_read)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Demand, "_note_use", note)
            return generate(self.model, self.after, [3])

    def forget(self, layer: int) -> None:
        """Evict one of the experts that the token needs in a layer."""
        table = self.streamer._table
        key = table.key(layer, self.chosen[layer][0])
        while table._free[0]:
            table._free[0].pop()
        slot = table.claim(layer, AllBut(key))
        table.release(layer, slot)


class AllBut:
    """A set of all keys except one."""

    def __init__(self, key: int):
        self.key = key

    def __contains__(self, key: int) -> bool:
        return key != self.key


@pytest.fixture
def calls(monkeypatch) -> list[range]:
    """Collect the layers of each call of a tracer."""
    made: list[range] = []
    call = CompiledLayers.__call__

    def collect(self, layers, *args, **options):
        made.append(layers)
        return call(self, layers, *args, **options)

    monkeypatch.setattr(CompiledLayers, "__call__", collect)
    return made


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("missing", "again"),
    [
        ([], []),
        ([0], [range(6)]),
        ([3], [range(3, 4), range(4, 6)]),
        ([5], [range(5, 6)]),
        ([1, 4], [range(1, 2), range(2, 3), range(3, 4), range(4, 6), range(4, 6)]),
        ([0, 5], [range(6), range(5, 6)]),
        ([2, 3], None),
    ],
)
def test_a_step_restarts_at_a_missing_expert(packed, calls, missing, again):
    script = Script(packed)
    script.run()
    script.streamer._demand.miss_rate = 0
    states = [state_of(cache) for cache in script.after]
    for layer in missing:
        script.forget(layer)
    before = script.streamer.stats.snapshot()
    calls.clear()
    assert mx.array_equal(script.run(), script.expected)
    assert calls[0] == range(N_LAYERS)
    assert again is None or calls[1:] == again
    for cache, expected in zip(script.after, states, strict=True):
        for a, b in zip(state_of(cache), expected, strict=True):
            assert np.array_equal(a, b)
    for layer, counted in script.streamer.stats.snapshot().layers.items():
        assert counted.misses - before.layers[layer].misses == (layer in missing)
        n_chosen = len(script.chosen[layer])
        n_hits = counted.hits - before.layers[layer].hits
        assert n_hits == n_chosen - (layer in missing)


def test_a_token_without_misses_is_one_compiled_call_and_one_read_back(packed, calls):
    script = Script(packed, "traced")
    script.streamer._demand.miss_rate = 0
    calls.clear()
    stats = script.model.runtime.executor.stats
    stats.reset()
    misses = script.streamer.stats.total.misses
    assert mx.array_equal(script.run(), script.expected)
    assert script.streamer.stats.total.misses == misses
    assert calls == [range(N_LAYERS)]
    assert stats.snapshot()["routing"].count == 1


def test_compiled_steps_equal_waiting(packed):
    ahead, waiting = (load(packed, 30, mode, "traced") for mode in ("on", "off"))
    got, expected = (generate(m, begin(m), range(5)) for m in (ahead, waiting))
    assert mx.array_equal(got, expected)


@pytest.mark.sampled
@pytest.mark.parametrize("n_slots", [2, 5, 9, 30])
def test_several_sequences_equal_waiting(packed, n_slots, calls):
    """This holds even if the pool is too small for a step's experts."""
    pairs = []
    for mode in ("on", "off"):
        model = load(packed, n_slots, mode, "traced")
        cache = make_prompt_cache(model)
        parts = [model(tokens(5, 77, n_seqs=3), cache=cache)]
        parts += [model(tokens(1, seed, n_seqs=3), cache=cache) for seed in range(4)]
        out = mx.concatenate(parts, axis=1)
        mx.eval(out)
        pairs.append((model, cache, out))
        assert bool(calls) == (n_slots > 5)
    (ahead, cache, got), (waiting, other_cache, expected) = pairs
    assert mx.array_equal(got, expected)
    check_same(ahead, cache, waiting, other_cache)


def test_if_every_layer_misses_each_is_read_back_once(packed, calls):
    """Each restart reaches one layer further, whose routing is then read back."""
    ahead, waiting = load(packed, 3, "on"), load(packed, 3, "off")
    caches = [begin(model) for model in (ahead, waiting)]
    stats = ahead.runtime.executor.stats
    stats.reset()
    missed = ahead.streamer.stats.snapshot().layers
    got, expected = (
        generate(*pair, [4]) for pair in zip((ahead, waiting), caches, strict=True)
    )
    assert mx.array_equal(got, expected)
    for layer, counted in ahead.streamer.stats.snapshot().layers.items():
        assert counted.misses > missed[layer].misses
    assert stats.snapshot()["routing"].count == N_LAYERS
    assert max(map(len, calls)) <= 2


class Ahead(ReadAhead):
    """Read ahead or not, as set, regardless of its cost."""

    def __init__(self, choice: str):
        super().__init__(choice, lambda: 0.0)


def forget_experts(streamer) -> None:
    """Evict nearly all experts, and let a token run through all layers at once."""
    n_slots = streamer.n_slots
    streamer.resize(streamer.least_slots)
    streamer.resize(n_slots)
    streamer._demand.miss_rate = 0


@pytest.mark.parametrize("executor", ["lazy", "traced"])
def test_the_predictions_of_a_first_run_are_read_at_once(packed, executor):
    """Otherwise a token with no experts in memory would read back each layer."""
    logits, n_read_back, n_asked = [], [], []
    for choice in ("off", "on"):
        model = load(packed, N_LAYERS * N_EXPERTS - 1, "on", executor)
        cache, streamer = begin(model), model.streamer
        streamer.read_ahead = Ahead(choice)
        forget_experts(streamer)
        stats = model.runtime.executor.stats
        stats.reset()
        streamer.stats.reset()
        logits.append(generate(model, cache, [3]))
        n_read_back.append(stats.snapshot()["routing"].count)
        total = streamer.stats.total
        n_asked.append(total.hits + total.misses)
        assert bool(total.read_ahead) == (choice == "on")
        assert total.read_ahead_used <= total.read_ahead
    assert mx.array_equal(*logits)
    assert n_read_back[1] < n_read_back[0]
    assert n_asked[0] == n_asked[1]
    assert total.recall > 0.3 and total.precision > 0.3


def test_layers_run_again_while_the_experts_of_later_ones_are_read(
    packed, calls, monkeypatch
):
    late, read = [], Read.read

    def wait_for_layers_before(self, span):
        # First the run that predicts experts, then the layers that have theirs.
        deadline = time.monotonic() + 20
        while self.layer > 3 and len(calls) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        if self.layer > 3:
            late.append(len(calls) >= 2)
        return read(self, span)

    outs = []
    for choice in ("off", "on"):
        model = load(packed, N_LAYERS * N_EXPERTS - 1, "on")
        cache, streamer = begin(model), model.streamer
        streamer.read_ahead, streamer._in_flight.reader.inline_bytes = Ahead(choice), 0
        forget_experts(streamer)
        if choice == "on":
            calls.clear()
            monkeypatch.setattr(Read, "read", wait_for_layers_before)
        outs.append(generate(model, cache, [3]))
    assert late and all(late)
    assert calls[:3] == [range(N_LAYERS), range(4), range(4, 6)]
    assert mx.array_equal(*outs)


@pytest.mark.sampled
@pytest.mark.parametrize("n_slots", [2, 5, 9, 30])
def test_reading_ahead_changes_no_logits(packed, n_slots):
    outs = []
    for mode, choice in (("on", "on"), ("off", "off")):
        model = load(packed, n_slots, mode, "traced")
        cache = begin(model)
        model.streamer.read_ahead = Ahead(choice)
        outs.append(generate(model, cache, range(12)))
    assert mx.array_equal(*outs)


def test_a_failed_read_ahead_is_an_error_once_the_expert_is_needed(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "packed")
    models = [load(path, 9, "on") for path in (packed, tmp_path / "packed")]
    caches = [begin(model) for model in models]
    for model in models:
        model.streamer.read_ahead = Ahead("on")
        model.streamer._demand.miss_rate = 0
    expected = generate(models[0], caches[0], [3, 4])
    with PackedExperts.open(tmp_path / "packed") as store:
        path = store.path(4)
    whole = path.read_bytes()
    os.truncate(path, 63)
    for _ in range(2):
        with pytest.raises(ExpertStoreError, match=r"expert \d+ of layer 4"):
            generate(models[1], caches[1], [3, 4])
    path.write_bytes(whole)
    assert mx.array_equal(generate(models[1], caches[1], [3, 4]), expected)


def test_only_wrong_predictions_shrink_windows(packed):
    model = load(packed, 9, "on")
    cache, streamer = begin(model), model.streamer
    rates = {}
    for choice in ("off", "on"):
        streamer.read_ahead = Ahead(choice)
        for seed in range(6):
            generate(model, cache, [seed])
        rates[choice] = streamer.miss_rate
    assert rates["off"] > 0.9 and rates["on"] < 0.6


def test_with_and_without_reading_ahead_are_timed_in_turns(packed):
    model = load(packed, 12, "auto", "traced")
    cache, streamer = begin(model), model.streamer
    # Each reading of the clock is a second later, half of which was waiting.
    seconds = iter(range(10**9))
    streamer.read_ahead = ReadAhead(
        "auto", lambda: next(seconds) / 2, lambda: next(seconds)
    )
    read_ahead = []
    for seed in range(3 * TURN_TOKENS):
        streamer.stats.reset()
        generate(model, cache, [seed])
        read_ahead.append(streamer.stats.total.read_ahead > 0)
    turn = TURN_TOKENS
    assert read_ahead == [False] * turn + [True] * turn + [False] * turn


def test_caches_may_be_trimmed_in_between(tmp_path):
    path = make_packed(tmp_path, full_attention_interval=1)
    pairs = [(m, begin(m)) for m in (load(path, 20, x) for x in ("on", "off"))]
    outs = []
    for model, cache in pairs:
        parts = [generate(model, cache, range(4))]
        assert trim_prompt_cache(cache, 3) == 3
        parts.append(generate(model, cache, range(10, 14)))
        outs.append(mx.concatenate(parts))
    assert mx.array_equal(*outs)
    check_same(*pairs[0], *pairs[1])


@pytest.mark.parametrize("optimistic", ["on", "off"])
def test_a_read_error_leaves_model_and_caches_usable(packed, tmp_path, optimistic):
    shutil.copytree(packed, tmp_path / "packed")
    script = Script(tmp_path / "packed", optimistic=optimistic)
    with PackedExperts.open(tmp_path / "packed") as store:
        path, offset = store.path(4), store.offset(4, script.chosen[4][0])
    whole = path.read_bytes()
    os.truncate(path, offset + 63)
    script.forget(4)
    for _ in range(2):
        with pytest.raises(ExpertStoreError, match=r"expert \d+ of layer 4"):
            script.run()
        for cache, expected in zip(script.after, script.cache, strict=True):
            assert getattr(cache, "offset", None) == getattr(expected, "offset", None)
    path.write_bytes(whole)
    # These are the same caches that the failed step received.
    assert mx.array_equal(generate(script.model, script.after, [3]), script.expected)


@pytest.mark.parametrize("n_calls", [1, 2, 3])
def test_an_interrupt_leaves_model_and_caches_usable(packed, n_calls):
    script = Script(packed)
    script.run()
    script.streamer._demand.miss_rate = 0
    for layer in (1, 3):
        script.forget(layer)
    confirm, left = ExpertStreamer.confirm, [n_calls]

    def interrupted(streamer, *args, **options):
        n = confirm(streamer, *args, **options)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return n

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertStreamer, "confirm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.run()
    assert mx.array_equal(generate(script.model, script.after, [3]), script.expected)


@pytest.mark.slow
@pytest.mark.skipif(not simulator.available(), reason="needs the simulator")
def test_kernels_look_slots_up_too(tmp_path):
    make_checkpoint(tmp_path / "plain", num_hidden_layers=2, full_attention_interval=2)
    pack(tmp_path / "plain", tmp_path / "packed")
    models = [load(tmp_path / "packed", 9, mode, "sim") for mode in ("on", "off")]
    got, expected = (generate(m, begin(m, 2), range(3)) for m in models)
    assert mx.array_equal(got, expected)
    assert counters(models[0]) == counters(models[1])
    assert models[1].streamer.stats.total.misses > 0


def spans(layers: range, n_layers: int, most: int) -> list[range]:
    """Split layers into spans as a run does."""
    found = []
    while layers:
        found.append(first_span(layers, n_layers, most))
        layers = layers[len(found[-1]) :]
    return found


@pytest.mark.parametrize("n_layers", [1, 2, 4, 5, 16, 17, 40, 61])
def test_spans_cover_layers_in_few_pieces_of_few_kinds(n_layers):
    kinds = set()
    for first in range(n_layers):
        layers = range(first, n_layers)
        for most in (1, 4, n_layers):
            found = spans(layers, n_layers, most)
            assert [i for span in found for i in span] == [*layers]
            assert max(map(len, found)) <= most
            kinds.update((span.start, span.stop) for span in found)
        assert len(found) <= 10
    assert spans(range(n_layers), n_layers, n_layers) == [range(n_layers)]
    assert len(kinds) <= 2 * n_layers


def test_windows_widen_as_misses_become_rarer():
    rates = (1, 0.6, 0.4, 0.1, 0.02, 0.007, 0.001, 0)
    assert [window_of(rate, 40, 4) for rate in rates] == [1, 1, 4, 4, 16, 16, 40, 40]
    assert window_of(0, 1, 4) == 1
    windows = [window_of(rate, 40, 4, ahead=True) for rate in rates]
    assert windows == [4, 4, 4, 4, 16, 16, 40, 40]
    assert window_of(1, 2, 4, ahead=True) == 2


def test_an_invalid_choice_is_refused(packed, monkeypatch):
    assert config.optimistic() == "auto"
    monkeypatch.setenv("MOEFLUX_OPTIMISTIC", "off")
    assert config.optimistic() == "off"
    assert config.optimistic("on") == "on"
    with pytest.raises(ConfigError, match="'perhaps'"):
        load(packed, 9, "perhaps")
