"""Reading experts before they are requested changes only time and bytes read."""

from __future__ import annotations

import os
import shutil
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from synthetic import expert_bytes, slot_bytes, write_checkpoint

import moeflux_mlx
from moeflux_mlx.errors import ConfigError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.pool.stats import StreamStats
from moeflux_mlx.experts.streaming.read_ahead import HOLD_TOKENS, TURN_TOKENS, ReadAhead
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.ops import SwigluFusedBatched

N_EXPERTS, TOP_K = 11, 3


def memory_of(path, n_slots: int) -> int:
    with PackedExperts.open(path) as store:
        return n_slots * store.layout(0).stride + POOL_ALIGNMENT


def decode(path, n_slots: int, read_ahead: str):
    """Return the logits of a prompt and ten tokens, and the counters of the tokens."""
    memory = memory_of(path, n_slots)
    model, _ = moeflux_mlx.load(path, expert_memory=memory, read_ahead=read_ahead)
    rng, cache = np.random.default_rng(3), make_prompt_cache(model)
    parts = [model(mx.array(rng.integers(1, 320, (1, 5))), cache=cache)]
    model.streamer.stats.reset()
    for _ in range(10):
        parts.append(model(mx.array(rng.integers(1, 320, (1, 1))), cache=cache))
    out = mx.concatenate(parts, axis=1)
    mx.eval(out)
    return out, model.streamer.stats.total


@pytest.mark.sampled
@pytest.mark.parametrize("n_slots", [2, 3, 9, 20])
def test_logits_are_the_same_bits_with_and_without(packed, n_slots):
    ahead, counts = decode(packed, n_slots, "on")
    without, plain = decode(packed, n_slots, "off")
    assert mx.array_equal(ahead, without)
    assert counts.hits + counts.misses == plain.hits + plain.misses
    assert plain.read_ahead == plain.recall == plain.precision == 0
    assert 0 < counts.read_ahead_used <= counts.read_ahead
    assert 0 < counts.recall <= 1 and 0 < counts.precision <= 1
    record = counts.read_bytes // (counts.misses + counts.read_ahead)
    n_wasted = counts.read_ahead - counts.read_ahead_used
    assert counts.wasted_bytes == n_wasted * record


def test_the_shared_expert_is_computed_while_others_are_read(packed, monkeypatch):
    monkeypatch.setenv("MOEFLUX_EXECUTOR", "ops")
    model, _ = moeflux_mlx.load(packed, expert_memory=memory_of(packed, 2))
    streamer, reference = model.streamer, SwigluFusedBatched.reference
    streamer._in_flight.reader.inline_bytes = 0
    progress, in_time = threading.Condition(), []
    layers_asked, layers_shared = [], []

    def ask(layer, indices):
        layers_asked.append(layer)
        ExpertStreamer.request(streamer, layer, indices)

    def shared(*values):
        with progress:
            layers_shared.append(layers_asked[-1])
            progress.notify_all()
        return reference(*values)

    def held(preadv, *args):
        with progress:
            done = progress.wait_for(lambda: layers_shared == layers_asked, timeout=10)
        in_time.append(done)
        return preadv(*args)

    preadv = os.preadv
    monkeypatch.setattr(streamer, "request", ask)
    monkeypatch.setattr(SwigluFusedBatched, "reference", shared)
    monkeypatch.setattr(os, "preadv", lambda *args: held(preadv, *args))
    model(mx.array([[7]]), cache=make_prompt_cache(model))
    assert layers_asked == [0, 1, 2, 3] and len(in_time) > 0 and all(in_time)
    assert streamer.stats.total.misses == 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead")
    write_checkpoint(path / "plain", n_layers=2, n_experts=N_EXPERTS, top_k=TOP_K)
    pack(path / "plain", path / "packed")
    with PackedExperts.open(path / "packed") as opened:
        yield opened


@pytest.fixture
def streamer(store):
    stride = store.layout(0).stride
    memory = 7 * stride + POOL_ALIGNMENT
    with ExpertStreamer(store, memory, inline_bytes=0, read_ahead="on") as opened:
        yield opened


def ids(*experts: int) -> mx.array:
    return mx.array([experts])


def holds(streamer, store, layer: int, expert: int, slot: int) -> bool:
    weights = streamer.source(layer).weights
    plain = store.path(0).parents[1] / "plain"
    expected = expert_bytes(plain, layer, expert)
    found = slot_bytes(weights.gate, slot)
    return all(found[part] == expected[f"gate_proj.{part}"] for part in found)


@pytest.mark.parametrize("ask", ["slots", "parts"])
def test_predicted_experts_are_hits_and_others_misses(streamer, store, ask):
    streamer.begin_read_ahead(1, ids(4, 5, 6))
    source = streamer.source(1)
    if ask == "slots":
        slots = dict(
            zip((4, 6, 9), source.slots(ids(4, 6, 9))[0].tolist(), strict=True)
        )
    else:
        slots = {}
        for columns, found in source.parts(ids(4, 6, 9)):
            slots |= {(4, 6, 9)[c]: s for c, s in zip(columns, found, strict=True)}
    for expert, slot in slots.items():
        assert holds(streamer, store, 1, expert, slot)
    streamer.close()
    counts = streamer.stats[1]
    assert (counts.hits, counts.misses) == (2, 1)
    assert (counts.read_ahead, counts.read_ahead_used) == (3, 2)
    assert counts.recall == counts.precision == 2 / 3
    assert counts.wasted_bytes == store.layout(1).record_bytes


def test_experts_in_memory_or_being_read_are_not_read_again(streamer):
    streamer.source(1).slots(ids(4, 5, 6))
    for _ in range(2):
        streamer.begin_read_ahead(1, ids(5, 6, 7))
    streamer.source(1).slots(ids(5, 6, 7))
    assert (streamer.stats[1].misses, streamer.stats[1].read_ahead) == (3, 1)


def test_slots_held_by_reads_ahead_are_freed_when_needed(streamer, store):
    streamer.begin_read_ahead(0, ids(0, 1, 2, 3))
    streamer.begin_read_ahead(1, ids(0, 1, 2, 3))
    slots = streamer.source(1).slots(ids(8, 9, 10))[0].tolist()
    for expert, slot in zip((8, 9, 10), slots, strict=True):
        assert holds(streamer, store, 1, expert, slot)


def test_a_failed_read_ahead_raises_no_error(store, tmp_path):
    folder = store.path(0).parents[1]
    shutil.copytree(folder, tmp_path / "all")
    path = tmp_path / "all" / store.path(1).relative_to(folder)
    packed = tmp_path / "all" / "packed"
    with PackedExperts.open(packed) as broken:
        memory = 7 * broken.layout(0).stride + POOL_ALIGNMENT
        with ExpertStreamer(broken, memory, inline_bytes=0, read_ahead="on") as opened:
            whole = path.read_bytes()
            os.truncate(path, broken.offset(1, 4) + 63)
            opened.begin_read_ahead(1, ids(3, 4, 5))
            # A request that waits for a read ahead shares its failure.
            while not opened._in_flight.is_over(1, (3, 4, 5)):
                time.sleep(0.001)
            opened.source(0).slots(ids(0, 1, 2))
            assert not opened._in_flight
            path.write_bytes(whole)
            slot = opened.source(1).slots(ids(4))[0, 0].item()
            assert holds(opened, broken, 1, 4, slot)


class Machine:
    """A clock on which a token takes a given time."""

    def __init__(self, without: float, ahead: float, waits: float):
        self.seconds = {False: without, True: ahead}
        self.waits = waits
        self.now = self.waited = 0.0
        self.chooser = ReadAhead("auto", lambda: self.waited, lambda: self.now)

    def token(self, compiling: float = 0.0) -> bool:
        active = self.chooser.begin()
        self.now += self.seconds[active] + compiling
        self.waited += 0 if active else self.waits
        self.chooser.end()
        return active


def test_both_ways_are_tried_in_turns_and_the_faster_one_is_kept():
    for without, ahead in ((1.0, 0.9), (1.0, 0.99), (1.0, 1.1)):
        machine = Machine(without, ahead, waits=0.2)
        tried = [machine.token() for _ in range(8 * TURN_TOKENS)]
        turns = [tried[i : i + TURN_TOKENS] for i in range(0, len(tried), TURN_TOKENS)]
        assert turns == [[i % 2 == 1] * TURN_TOKENS for i in range(8)]
        kept = [machine.token() for _ in range(HOLD_TOKENS)]
        assert set(kept) == {ahead == 0.9}
        assert not machine.token()


@pytest.mark.parametrize("ahead", [0.7, 1.4])
def test_one_turn_of_each_is_enough_where_one_is_much_faster(ahead):
    machine = Machine(1.0, ahead, waits=0.2)
    tried = [machine.token() for _ in range(2 * TURN_TOKENS)]
    assert tried == [False] * TURN_TOKENS + [True] * TURN_TOKENS
    kept = [machine.token() for _ in range(HOLD_TOKENS)]
    assert set(kept) == {ahead < 1}


@pytest.mark.parametrize("ahead", [0.7, 1.4])
def test_a_first_token_that_takes_long_decides_nothing(ahead):
    machine = Machine(1.0, ahead, waits=0.2)
    tried = [machine.token(compiling=1000.0)]
    tried += [machine.token() for _ in range(2 * TURN_TOKENS - 1)]
    assert tried == [False] * TURN_TOKENS + [True] * TURN_TOKENS
    assert machine.token() == (ahead < 1)


def test_tokens_that_wait_for_the_disk_count_where_most_do_not():
    """Most tokens find their experts in the page cache; a third take longer."""
    machine = Machine(1.0, 1.0, waits=0.0)
    tried = []
    for i in range(8 * TURN_TOKENS):
        is_cold = i % 3 == 0
        machine.seconds = (
            {False: 3.0, True: 2.4} if is_cold else {False: 1.0, True: 1.0}
        )
        machine.waits = 2.0 if is_cold else 0.0
        tried.append(machine.token())
    assert tried == [i // TURN_TOKENS % 2 == 1 for i in range(8 * TURN_TOKENS)]
    assert machine.token()


def test_nothing_is_tried_where_no_read_delays_a_token():
    machine = Machine(1.0, 0.5, waits=0.001)
    assert not any(machine.token() for _ in range(TURN_TOKENS + HOLD_TOKENS))


@pytest.mark.parametrize("waits", [0.01, 0.3])
def test_the_trial_is_repeated_soon_where_tokens_begin_to_wait(waits):
    """As when the page cache no longer holds the experts."""
    machine = Machine(1.0, 1.4, waits)
    while not machine.chooser._left:
        machine.token()
    assert not any(machine.token() for _ in range(TURN_TOKENS * 10))
    machine.seconds, machine.waits = {False: 3.0, True: 2.0}, 2.0 + waits
    tried = [machine.token() for _ in range(3 * TURN_TOKENS)]
    assert tried == [False] * 2 * TURN_TOKENS + [True] * TURN_TOKENS
    assert all(machine.token() for _ in range(HOLD_TOKENS))


def test_prompts_and_pauses_between_tokens_do_not_start_reading_ahead():
    machine = Machine(1.0, 0.5, waits=0.01)
    for i in range(HOLD_TOKENS):
        if i % 20 == 0:
            machine.now, machine.waited = machine.now + 9.0, machine.waited + 8.0
        assert not machine.token()


@pytest.mark.parametrize("choice", ["on", "off", "auto"])
def test_only_a_trial_asks_how_long_tokens_waited(choice):
    asked = []
    chooser = ReadAhead(choice, lambda: asked.append(0) or 0.0)
    for _ in range(TURN_TOKENS):
        chooser.begin()
        chooser.end()
    assert bool(asked) == (choice == "auto")
    asked.clear()
    # Nothing waited, so the choice is kept.
    chooser.begin()
    chooser.end()
    assert not asked


def test_seconds_of_waiting_are_those_of_all_layers():
    stats = StreamStats(range(3))
    for layer in range(3):
        stats[layer].wait_seconds += 1 + layer
    assert stats.wait_seconds == stats.total.wait_seconds == 6


def test_an_invalid_choice_is_refused():
    with pytest.raises(ConfigError, match="'maybe'"):
        ReadAhead("maybe", float)
