"""The cache simulator: Belady's optimum is optimal, and hits equal the streamer's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.cli import main
from moeflux_mlx.errors import ConfigError
from moeflux_mlx.experts.pool.policy import LFU, LRU, POLICIES
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.pool.routing_trace import RoutingTrace
from moeflux_mlx.measure import record_routing
from moeflux_mlx.measure.belady import fewest_misses
from moeflux_mlx.measure.cachesim import (
    OPTIMUM,
    Replay,
    replay,
    replay_optimum,
    simulate,
)

PROMPT = [5, 17, 60, 3, 44, 44, 9, 130, 71, 2, 8]


def least_by_search(steps, n_slots: int, at_once) -> int:
    """Return the fewest misses over every possible choice of evictions."""

    @cache
    def least(memory: frozenset[int], i: int) -> int:
        if i == len(steps):
            return 0
        used = frozenset(steps[i])
        must_stay = used if at_once[i] else frozenset()
        others = sorted((memory | used) - must_stay)
        room = min(n_slots - len(must_stay), len(others))
        return len(used - memory) + min(
            least(must_stay | set(stay), i + 1)
            for stay in itertools.combinations(others, room)
        )

    return least(frozenset(), 0)


@settings(max_examples=100)
@given(
    steps=st.lists(
        st.tuples(st.sets(st.integers(0, 5), min_size=1, max_size=3), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    n_slots=st.integers(1, 4),
)
def test_no_way_of_evicting_misses_less_than_the_optimum(steps, n_slots):
    keys = [sorted(step) for step, _ in steps]
    at_once = [one and len(step) <= n_slots for step, one in steps]
    misses = fewest_misses(keys, n_slots, at_once)
    assert sum(misses) == least_by_search(keys, n_slots, at_once)


@st.composite
def traces(draw) -> RoutingTrace:
    n_layers, n_experts = draw(st.integers(1, 3)), draw(st.integers(2, 7))
    top_k = draw(st.integers(1, min(3, n_experts - 1)))
    passes = draw(st.lists(st.sampled_from([1, 1, 1, 4]), min_size=1, max_size=12))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = random.random((sum(passes), n_layers, n_experts))
    # Some experts are requested more often than others.
    scores *= random.random((n_layers, n_experts))
    return RoutingTrace(
        model_type="random",
        layers=tuple(range(n_layers)),
        n_experts=n_experts,
        record_bytes=(100,) * n_layers,
        n_prompt_tokens=1,
        passes=np.array(passes, np.uint32),
        chosen=np.argsort(-scores)[..., :top_k].astype(np.uint8),
    )


@settings(max_examples=100)
@given(
    trace=traces(),
    share=st.floats(0, 1),
    policy=st.sampled_from([*POLICIES.values()]),
    scope=st.sampled_from(["global", "layer"]),
    floor=st.sampled_from([None, 0]),
)
def test_no_policy_beats_the_optimum(trace, share, policy, scope, floor):
    n_rows = len(trace.layers)
    least = trace.top_k * (n_rows if scope == "layer" else 1)
    n_slots = least + int(share * (n_rows * trace.n_experts - 1 - least))
    done = replay(trace, n_slots, policy, scope=scope, floor=floor)
    best = replay_optimum(trace, n_slots, scope=scope)
    assert best.requests.tolist() == done.requests.tolist()
    assert best.misses.sum() <= done.misses.sum()
    assert (done.misses <= done.requests).all()
    assert (best.misses <= best.requests).all()


@pytest.fixture(scope="module")
def trace(checkpoint):
    """Three chunks of a prompt, its last token, and thirty generated ones."""
    model, _ = moeflux_mlx.load(checkpoint)
    return record_routing(model, PROMPT, max_tokens=30, prefill_step_size=4)


@pytest.mark.sampled
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("n_slots", [8, 12, 20])
def test_hits_equal_the_streamers_count(packed, trace, n_slots, name, scope):
    memory = n_slots * stride(packed) + POOL_ALIGNMENT
    model, _ = moeflux_mlx.load(packed, expert_memory=memory, scope=scope, policy=name)
    with model.streamer as streamer:
        assert streamer.n_slots == n_slots
        prompt = mx.array(PROMPT)
        for _ in generate_step(prompt, model, max_tokens=30, prefill_step_size=4):
            pass
        simulated = replay(trace, n_slots, POLICIES[name], scope=scope)
        for row, layer in enumerate(trace.layers):
            counted = streamer.stats[layer]
            n_misses = simulated.misses[:, row].sum()
            assert counted.misses == n_misses > 0
            assert counted.hits == simulated.requests[:, row].sum() - n_misses


def test_hits_with_segments_equal_the_streamers_count(packed, trace, monkeypatch):
    n_bytes = 24 * stride(packed) + 3 * POOL_ALIGNMENT
    monkeypatch.setattr(device, "returns_pages", lambda: False)
    model, _ = moeflux_mlx.load(packed, expert_memory=n_bytes, policy="lfu")
    with model.streamer as streamer:
        assert (streamer.n_slots, len(streamer.pools)) == (24, 3)
        prompt = mx.array(PROMPT)
        for _ in generate_step(prompt, model, max_tokens=30, prefill_step_size=4):
            pass
        counted = [streamer.stats[layer].misses for layer in trace.layers]
    three, one = (replay(trace, 24, LFU, n_segments=n) for n in (3, 1))
    assert counted == three.misses.sum(axis=0).tolist()
    assert counted != one.misses.sum(axis=0).tolist()
    with pytest.raises(ConfigError, match=r"\[segments\] expected 1 to 4"):
        simulate(trace, {"lfu": LFU}, [0.5], n_segments=5)


@pytest.mark.sampled
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("n_slots", [12, 20])
def test_reads_ahead_equal_the_streamers_count(packed, trace, n_slots, name):
    memory = n_slots * stride(packed) + POOL_ALIGNMENT
    model, _ = moeflux_mlx.load(
        packed, expert_memory=memory, policy=name, read_ahead="on"
    )
    with model.streamer as streamer:
        prompt = mx.array(PROMPT)
        for _ in generate_step(prompt, model, max_tokens=30, prefill_step_size=4):
            pass
        counted = [streamer.stats[layer] for layer in trace.layers]
        simulated = replay(trace, n_slots, POLICIES[name], read_ahead=True)
    assert [c.misses for c in counted] == simulated.misses.sum(axis=0).tolist()
    assert [c.read_ahead for c in counted] == simulated.ahead.sum(axis=0).tolist()
    assert simulated.ahead[:, 0].sum() == 0 < simulated.ahead[:, 1:].sum()
    without = replay(trace, n_slots, POLICIES[name])
    assert without.ahead.sum() == 0 and simulated.hit_rate() > without.hit_rate()


def stride(packed) -> int:
    model, _ = moeflux_mlx.load(packed, expert_io="pread")
    with model.streamer as streamer:
        return (streamer.memory_bytes - POOL_ALIGNMENT) // streamer.n_slots


def test_the_optimum_does_not_depend_on_the_policies(trace):
    outcomes = simulate(trace, {"a": LRU, "b": LFU}, [0.75, 0.5])
    assert [o.policy for o in outcomes] == [OPTIMUM, "a", "b"] * 2
    assert [o.n_slots for o in outcomes] == [24] * 3 + [16] * 3
    for best, *others in (outcomes[:3], outcomes[3:]):
        for other in others:
            assert 0 < other.hit_rate <= best.hit_rate < 1
            assert other.bytes_per_token > 0


def test_steady_figures_cover_the_second_half_of_the_generated_tokens():
    # A prompt of two tokens; then one expert repeatedly, then both in turn.
    chosen = np.array([0, 1, *[0] * 4, *[0, 1] * 2], np.uint8)[:, None, None]
    passes = np.array([2] + [1] * 8, np.uint32)
    trace = RoutingTrace("one", (0,), 2, (10,), 2, passes, chosen)
    best, lru = simulate(trace, {"lru": LRU}, [0.5])
    # The last pass of the four: 0 1 0 1, after a 0.
    assert (lru.steady_hit_rate, lru.bytes_per_token) == (1 / 4, 7.5)
    assert lru.hit_rate == pytest.approx(4 / 10)
    assert best.steady_hit_rate == 1 / 4


def test_rates_without_requests_are_no_error():
    assert Replay(*[np.zeros((0, 1))] * 3).hit_rate() == 0


@pytest.mark.parametrize(
    ("share", "scope"), [(0, "global"), (1, "global"), (0.2, "layer")]
)
def test_a_share_too_small_for_a_token_is_refused(trace, share, scope):
    with pytest.raises(ConfigError, match=r"\[cachesim\] expected a share"):
        simulate(trace, {}, [share], scope=scope)


@pytest.mark.slow
def test_the_command_prints_every_policy_and_draws_the_curves(trace, tmp_path, capsys):
    path, plot = tmp_path / "trace.npz", tmp_path / "plot.svg"
    trace.save(path)
    flags = ["--budgets", "50", "25", "--policy", "lru", "--policy", "lfu"]
    assert main(["cachesim", str(path), *flags, "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    for text in ("16", "8", "lru", "lfu", OPTIMUM, "100.0%"):
        assert text in table
    assert plot.stat().st_size > 1000


def test_the_command_shows_each_policy_without_and_with_reading_ahead(
    trace, tmp_path, capsys
):
    path = tmp_path / "trace.npz"
    trace.save(path)
    command = ["cachesim", str(path), "--budgets", "50", "--policy", "lru"]
    assert main(command) == 0
    assert "ahead" not in capsys.readouterr().out.partition("hits:")[0]
    assert main([*command, "--read-ahead"]) == 0
    assert "lru, ahead" in capsys.readouterr().out


def test_reading_ahead_costs_the_bytes_that_it_reads(trace):
    best, without, ahead = simulate(trace, {"lru": LRU}, [0.5], read_ahead=True)
    assert (without.policy, ahead.policy) == ("lru", "lru, ahead")
    assert ahead.steady_hit_rate > without.steady_hit_rate
    n_slots = best.n_slots
    done = replay(trace, n_slots, LRU, read_ahead=True)
    first = len(trace.passes) - 31 // 2
    n_read = (done.misses + done.ahead)[first:].sum()
    assert ahead.bytes_per_token == n_read * trace.record_bytes[0] / (31 // 2)


def test_a_trace_without_predictions_is_refused(trace, tmp_path, capsys):
    path = tmp_path / "trace.npz"
    replace(trace, likely=None).save(path)
    assert main(["cachesim", str(path), "--read-ahead"]) == 2
    assert "record it again" in capsys.readouterr().err


def test_a_file_that_is_not_a_trace_ends_in_one_clear_line(tmp_path, capsys):
    path = tmp_path / "other.npz"
    path.write_bytes(b"PK\x03\x04 not a trace")
    assert main(["cachesim", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
