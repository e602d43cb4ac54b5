"""Streaming gives the right bytes, reads each once, and overwrites nothing early."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import expert_bytes, slot_bytes, write_checkpoint

from moeflux_mlx.errors import BudgetError, ConfigError, ExpertStoreError
from moeflux_mlx.experts.compute.resident import ResidentExperts
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.pool.budget import Amounts
from moeflux_mlx.experts.pool.policy import POLICIES, Policy, PoolShape
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.pool.stats import Counters
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.experts.weights import Quantization

N_LAYERS, N_EXPERTS, TOP_K = 3, 11, 3
FORMS = [Quantization(4, 32), Quantization(8, 32), Quantization(4, 32)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("streamer") / "plain",
        n_layers=N_LAYERS,
        n_experts=N_EXPERTS,
        top_k=TOP_K,
        quantization=FORMS,
    )


@pytest.fixture(scope="module")
def packed(plain):
    path = plain.with_name("packed")
    pack(plain, path)
    return path


@pytest.fixture(scope="module")
def store(packed):
    with PackedExperts.open(packed) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(plain):
    """The bytes of each expert of the plain checkpoint, by layer and expert."""
    pairs = [(layer, e) for layer in range(N_LAYERS) for e in range(N_EXPERTS)]
    return {(layer, e): expert_bytes(plain, layer, e) for layer, e in pairs}


def budget(store: PackedExperts, n_slots: int) -> int:
    stride = max(store.layout(layer).stride for layer in store.layers)
    return n_slots * stride + POOL_ALIGNMENT


def stream(store: PackedExperts, n_slots: int, **options) -> ExpertStreamer:
    """Stream with ``n_slots`` slots and, by default, with reader threads."""
    return ExpertStreamer(
        store, budget(store, n_slots), **{"inline_bytes": 0, **options}
    )


def ids(*rows: list[int]) -> mx.array:
    return mx.array(rows, dtype=mx.uint32)


def seen(source, slot: int) -> dict[str, bytes]:
    """Return an Op's view of one slot, by tensor name."""
    weights = source.weights
    named = {
        "gate_proj": weights.gate,
        "up_proj": weights.up,
        "down_proj": weights.down,
    }
    return {
        f"{projection}.{part}": data
        for projection, weight in named.items()
        for part, data in slot_bytes(weight, slot).items()
    }


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("slots"),
            st.integers(0, N_LAYERS - 1),
            st.lists(
                st.lists(st.integers(0, N_EXPERTS - 1), min_size=TOP_K, max_size=TOP_K),
                min_size=1,
                max_size=3,
            ),
        ),
        st.tuples(
            st.just("waves"),
            st.integers(0, N_LAYERS - 1),
            st.lists(st.integers(0, N_EXPERTS - 1), max_size=20),
        ),
    ),
    max_size=12,
)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=steps,
    n_slots=st.integers(N_LAYERS * TOP_K, N_LAYERS * N_EXPERTS + 2),
    minimal=st.booleans(),
    scope=st.sampled_from(["global", "layer"]),
    policy=st.sampled_from([*POLICIES]),
    inline_bytes=st.sampled_from([0, 10**9]),
)
def test_every_slot_holds_the_requested_expert(
    store, expected, steps, n_slots, minimal, scope, policy, inline_bytes
):
    if minimal:
        n_slots = TOP_K if scope == "global" else N_LAYERS * TOP_K
    n_asked = n_read = 0
    options = {"scope": scope, "policy": policy, "inline_bytes": inline_bytes}
    with stream(store, n_slots, **options) as streamer:
        for kind, layer, experts in steps:
            source = streamer.source(layer)
            before = streamer.stats.snapshot().layers[layer]
            if kind == "slots":
                capacity = streamer.n_slots // (N_LAYERS if scope == "layer" else 1)
                if len({e for row in experts for e in row}) > capacity:
                    with pytest.raises(BudgetError, match="distinct experts"):
                        source.slots(ids(*experts))
                    continue
                slots = source.slots(ids(*experts))
                assert slots.dtype == mx.uint32
                assert slots.shape == (len(experts), TOP_K)
                pairs = zip(
                    np.array(experts).ravel(), np.array(slots).ravel(), strict=True
                )
                visits = [(int(e), int(slot)) for e, slot in pairs]
                for expert, slot in visits:
                    assert seen(source, slot) == expected[layer, expert]
                if streamer.resident:
                    continue
            else:
                visits = []
                for wave in source.waves(experts):
                    for expert, slot in wave:
                        assert seen(source, slot) == expected[layer, expert]
                    visits += wave
                visited = [expert for expert, _ in visits]
                assert sorted(visited) == sorted(set(experts))
            after = streamer.stats.snapshot().layers[layer]
            n_distinct = len({expert for expert, _ in visits})
            hits, misses = after.hits - before.hits, after.misses - before.misses
            assert hits + misses == n_distinct
            n_asked += n_distinct
            n_read += misses
        check_counters(streamer, store)
        if not streamer.resident:
            assert streamer.stats.total.misses == n_read
            assert streamer.stats.total.hits == n_asked - n_read


def check_counters(streamer: ExpertStreamer, store: PackedExperts) -> None:
    snapshot = streamer.stats.snapshot()
    assert sum(snapshot.layers.values(), Counters()) == snapshot.total
    for layer, counters in snapshot.layers.items():
        n_records = counters.misses + counters.preloaded
        assert counters.read_bytes == n_records * store.layout(layer).record_bytes
        assert (counters.read_seconds > 0) == (n_records > 0)


@settings(max_examples=40)
@given(st.data())
def test_lazy_graphs_read_their_slots_before_they_are_overwritten(
    store, expected, data
):
    n_slots = data.draw(st.integers(TOP_K, 2 * TOP_K))
    promised = []
    with stream(store, n_slots) as streamer:
        for _ in range(data.draw(st.integers(1, 8))):
            layer = data.draw(st.integers(0, N_LAYERS - 1))
            experts = data.draw(
                st.lists(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=9)
            )
            source = streamer.source(layer)
            if len(set(experts)) <= TOP_K:
                lazy = source.weights.gate.w[source.slots(ids(experts))[0]]
                source.guard(lazy)
                promised.append((layer, experts, lazy))
                continue
            for wave in source.waves(experts):
                visited = [expert for expert, _ in wave]
                lazy = source.weights.gate.w[mx.array([slot for _, slot in wave])]
                source.guard(lazy)
                promised.append((layer, visited, lazy))
    for layer, experts, lazy in promised:
        found = [np.array(row.flatten().view(mx.uint8)).tobytes() for row in lazy]
        assert found == [expected[layer, e]["gate_proj.weight"] for e in experts]


def test_waves_do_not_depend_on_the_budget_but_in_their_order(store):
    for n_slots in (TOP_K, TOP_K + 1, 7, 32, 33):
        with stream(store, n_slots) as streamer:
            waves = list(streamer.source(1).waves([7, 3, 3, 10, 0, 7]))
            assert sorted(e for wave in waves for e, _ in wave) == [0, 3, 7, 10]
            assert all(wave for wave in waves)


def test_waves_begin_with_experts_in_memory(store):
    with stream(store, 5) as streamer:
        source = streamer.source(0)
        source.slots(ids([8, 9, 10]))
        waves = list(source.waves(range(N_EXPERTS)))
        assert [expert for expert, _ in waves[0]] == [8, 9, 10]
        assert streamer.stats[0].misses == N_EXPERTS
        assert streamer.stats[0].hits == 3


def test_a_wave_left_early_does_not_harm_later_requests(store, expected):
    with stream(store, 5) as streamer:
        source = streamer.source(0)
        for _ in source.waves(range(N_EXPERTS)):
            break
        slots = source.slots(ids([10, 9, 4]))
        for expert, slot in zip([10, 9, 4], slots[0].tolist(), strict=True):
            assert seen(source, slot) == expected[0, expert]
        check_counters(streamer, store)


def test_parts_begin_with_experts_in_memory_and_count_as_slots_do(store, expected):
    rows = ([8, 9, 10], [9, 2, 8], [2, 2, 9], [5, 6, 7], [10, 5, 0])
    with stream(store, 5) as streamer, stream(store, 5) as other:
        source = streamer.source(0)
        parts = []
        for row in rows:
            found = {}
            parts.append([])
            for columns, slots in source.parts(ids(row)):
                parts[-1].append(columns)
                for column, slot in zip(columns, slots, strict=True):
                    assert seen(source, slot) == expected[0, row[column]]
                    found[column] = slot
            assert sorted(found) == [0, 1, 2]
            other.source(0).slots(ids(row))
        assert parts == [
            [[0, 1, 2]],
            [[0, 2], [1]],
            [[0, 1, 2]],
            [[0, 1, 2]],
            [[1], [0, 2]],
        ]
        counts = [(s.stats[0].hits, s.stats[0].misses) for s in (streamer, other)]
        assert counts[0] == counts[1]
        assert streamer._table.slots == other._table.slots


def test_parts_left_early_do_not_harm_later_requests(store, expected):
    with stream(store, 5) as streamer:
        source = streamer.source(0)
        source.slots(ids([0, 1, 2]))
        next(source.parts(ids([0, 7, 8])))
        for row in ([7, 8, 9], [0, 10, 7]):
            for expert, slot in zip(
                row, source.slots(ids(row))[0].tolist(), strict=True
            ):
                assert seen(source, slot) == expected[0, expert]
        check_counters(streamer, store)


def test_an_abandoned_request_leaves_nothing_behind(store, expected):
    """For example, Ctrl-C may end a call between its request and its computation."""
    with stream(store, 4, floor=0) as streamer:
        source = streamer.source(0)
        source.slots(ids([0, 1, 2]))
        source.request(ids([0, 1, 2]))
        for _ in streamer.source(1).waves(range(N_EXPERTS)):
            pass
        assert (0, 0) not in streamer.held
        source.request(ids([0, 1, 2]))
        for expert, slot in enumerate(source.slots(ids([0, 1, 2]))[0].tolist()):
            assert seen(source, slot) == expected[0, expert]


def test_the_longest_unused_expert_is_evicted(store):
    with stream(store, 3, policy="lru") as streamer:
        source = streamer.source(0)
        for row in ([0, 1, 2], [0, 0, 1], [3, 3, 3]):
            source.slots(ids(row))
        assert streamer.stats[0].misses == 4
        source.slots(ids([0, 1, 3]))
        assert streamer.stats[0].misses == 4
        source.slots(ids([2, 3, 3]))
        assert streamer.stats[0].misses == 5


def test_layers_compete_for_slots_or_have_their_own(store):
    misses = {}
    for scope in ("global", "layer"):
        with stream(store, 9, scope=scope, policy="lru") as streamer:
            for row in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2]):
                streamer.source(0).slots(ids(row))
            misses[scope] = streamer.stats.total.misses
    assert misses == {"global": 9, "layer": 12}


def test_a_users_own_policy_decides_on_evictions(store):
    class Newest(Policy):
        def __init__(self, shape):
            assert shape == PoolShape(N_LAYERS, N_EXPERTS, 3)
            self.keys = []

        def use(self, layer, keys):
            assert set(keys) <= set(self.keys)

        def admit(self, layer, key):
            self.keys.append(key)

        def forget(self, layer, key):
            self.keys.remove(key)

        def victim(self, layer, layers, keep):
            return next((k for k in reversed(self.keys) if k not in keep), None)

    with stream(store, 3, policy=Newest) as streamer:
        source = streamer.source(0)
        for row in ([0, 1, 2], [3, 3, 3], [0, 1, 3]):
            source.slots(ids(row))
        assert streamer.stats[0].misses == 4


def test_with_all_experts_in_memory_ids_are_slots(store, expected):
    with stream(store, N_LAYERS * N_EXPERTS) as streamer:
        assert streamer.resident
        assert streamer.n_slots == N_LAYERS * N_EXPERTS
        for layer in store.layers:
            source = streamer.source(layer)
            assert source.weights.up.w.shape[0] == N_EXPERTS
            assert source.slots(ids([5, 0, 10])).tolist() == [[5, 0, 10]]
            for expert in range(N_EXPERTS):
                assert seen(source, expert) == expected[layer, expert]
            assert list(source.waves([4, 9, 4])) == [[(4, 4), (9, 9)]]
            counters = streamer.stats[layer]
            assert (counters.hits, counters.misses) == (5, 0)
            assert counters.preloaded == N_EXPERTS
        check_counters(streamer, store)


def test_resident_arrays_are_a_source_too(store):
    with ExpertStreamer(store) as streamer:
        source = ResidentExperts(streamer.source(0).weights)
    slots = source.slots(mx.array([[2, 7, 2]], dtype=mx.int32))
    assert slots.dtype == mx.uint32 and slots.tolist() == [[2, 7, 2]]
    assert list(source.waves([7, 2, 7])) == [[(2, 2), (7, 7)]]
    assert list(source.waves([])) == []
    source.guard(slots)


def test_without_a_budget_a_small_model_is_held_whole(store):
    with ExpertStreamer(store) as streamer:
        assert streamer.resident


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_running_ahead_has_a_blank_slot_for_missing_experts(store, scope):
    groups = N_LAYERS if scope == "layer" else 1
    least, everything = groups * TOP_K, N_LAYERS * N_EXPERTS
    for n_slots in (least, least + 1, 20, everything - 1, everything):
        options = {"scope": scope, "runs_ahead": True}
        with stream(store, n_slots, **options) as streamer:
            assert streamer.memory_bytes <= budget(store, n_slots)
            has_blank = least < n_slots < everything
            fits = n_slots - has_blank
            assert streamer.n_slots == fits
            taken = streamer.n_slots * streamer.slot_bytes + streamer.slack_bytes
            assert taken == streamer.memory_bytes
            if not has_blank:
                continue
            streamer.resize(least)
            for layer in (0, 1, 2, 0):
                streamer.source(layer).slots(mx.array([[1, 5, 7]]))
            table = np.array(streamer.slots_on_device())
            present = {(layer, expert) for layer, expert in streamer.held}
            for layer, expert in streamer.experts:
                slot = table[layer, expert]
                assert (slot != streamer.pools[0].n_slots) == (
                    (layer, expert) in present
                )
            assert not streamer.pools[0].bytes[streamer.pools[0].n_slots].any()
            used = [table[expert] for expert in present]
            assert streamer.pools[0].bytes[used].any(axis=1).all()


@pytest.mark.parametrize("n_slots", [TOP_K, 7, N_LAYERS * N_EXPERTS])
def test_the_budget_bounds_all_memory_of_experts(store, n_slots):
    gc.collect()
    before = mx.get_active_memory()
    with stream(store, n_slots) as streamer:
        assert streamer.n_slots == n_slots
        assert streamer.memory_bytes <= budget(store, n_slots)
        for layer in store.layers:
            list(streamer.source(layer).waves(range(N_EXPERTS)))
        # MLX keeps a few bytes of its own beside each allocation.
        assert mx.get_active_memory() - before <= budget(store, n_slots) + 64


@pytest.mark.parametrize(
    ("scope", "n_minimum"), [("global", TOP_K), ("layer", N_LAYERS * TOP_K)]
)
def test_a_budget_too_small_for_a_token_states_the_minimum(store, scope, n_minimum):
    least = budget(store, n_minimum)
    for memory in (1, least - 1):
        with pytest.raises(BudgetError, match=rf"at least {least} bytes"):
            ExpertStreamer(store, memory, scope=scope)
    with ExpertStreamer(store, least, scope=scope) as streamer:
        assert streamer.n_slots == n_minimum


def test_invalid_arguments_are_refused(store):
    with pytest.raises(ConfigError, match=r"\[scope\]"):
        ExpertStreamer(store, scope="token")
    with pytest.raises(ConfigError, match=r"\[policy\].*lru.*'newest'"):
        ExpertStreamer(store, policy="newest")
    with pytest.raises(ConfigError, match=r"\[expert_memory\]"):
        Amounts.read(None, "much")
    with ExpertStreamer(store) as streamer, pytest.raises(ConfigError, match="layers"):
        streamer.source(N_LAYERS)


@pytest.mark.parametrize("bad", [-1, N_EXPERTS, 2**31 - 1])
def test_an_expert_out_of_range_is_refused(store, bad):
    with stream(store, 5) as streamer:
        source = streamer.source(1)
        for ask in (
            lambda: source.slots(mx.array([[0, bad]], dtype=mx.int32)),
            lambda: list(source.waves([0, bad])),
        ):
            with pytest.raises(ExpertStoreError, match=f"layer 1.*{bad}"):
                ask()
        with pytest.raises(ExpertStoreError, match="integers"):
            source.slots(mx.array([[0.5, 1.0]]))
        assert source.slots(ids([0, 1])).shape == (1, 2)


@pytest.fixture
def breakable(packed, tmp_path):
    """A pack to be damaged while it is open."""
    shutil.copytree(packed, tmp_path / "packed")
    with PackedExperts.open(tmp_path / "packed") as opened:
        yield opened


def overwrite(path: Path, offset: int, data: bytes) -> bytes:
    with open(path, "r+b") as file:
        file.seek(offset)
        before = file.read(len(data))
        file.seek(offset)
        file.write(data)
    return before


@pytest.mark.parametrize("ask", ["slots", "waves"])
def test_a_failed_read_harms_no_other_expert_and_may_be_repeated(
    breakable, expected, ask
):
    path, whole = breakable.path(1), breakable.path(1).read_bytes()
    os.truncate(path, breakable.offset(1, 4) + 63)
    with stream(breakable, 5) as streamer:
        source = streamer.source(1)

        def visit(experts):
            if ask == "waves":
                return [pair for wave in source.waves(experts) for pair in wave]
            return list(
                zip(experts, source.slots(ids(experts))[0].tolist(), strict=True)
            )

        for _ in range(7):
            with pytest.raises(ExpertStoreError) as caught:
                visit([3, 4, 2])
            for part in (str(path), "expert 4", "layer 1"):
                assert part in str(caught.value)
        for expert, slot in visit([2, 3, 0]):
            assert seen(source, slot) == expected[1, expert]
        path.write_bytes(whole)
        for expert, slot in visit([3, 4, 2]):
            assert seen(source, slot) == expected[1, expert]
        check_counters(streamer, breakable)


@pytest.mark.parametrize("n_slots", [5, N_LAYERS * N_EXPERTS])
def test_the_first_read_of_a_record_is_checked(breakable, expected, n_slots):
    offset = breakable.offset(2, 7) + breakable.layout(2).record_bytes - 1
    last = expected[2, 7]["down_proj.biases"][-1]
    overwrite(breakable.path(2), offset, bytes([last ^ 1]))
    with pytest.raises(ExpertStoreError) as caught:  # noqa: SIM117
        with stream(breakable, n_slots) as streamer:
            assert not streamer.resident
            streamer.source(2).slots(ids([1, 7, 3]))
    for part in (str(breakable.path(2)), "expert 7", "layer 2", "checksum"):
        assert part in str(caught.value)
    overwrite(breakable.path(2), offset, bytes([last]))
    with stream(breakable, n_slots) as streamer:
        source = streamer.source(2)
        slot = source.slots(ids([1, 7, 3]))[0, 1].item()
        assert seen(source, slot) == expected[2, 7]


def test_a_streamer_may_be_used_from_another_thread(store, expected):
    found = {}
    with stream(store, 4) as streamer:
        source = streamer.source(0)
        source.slots(ids([0, 1, 2]))

        def generate():
            for row in ([5, 6, 7], [8, 9, 10], [0, 5, 10]):
                slots = source.slots(ids(row))
                lazy = source.weights.down.w[slots[0]]
                source.guard(lazy)
                for expert, data in zip(row, lazy, strict=True):
                    found[expert] = np.array(data.flatten().view(mx.uint8)).tobytes()

        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
    assert set(found) == {0, 5, 6, 7, 8, 9, 10}
    for expert, data in found.items():
        assert data == expected[0, expert]["down_proj.weight"]


def test_an_interrupt_leaves_a_streamer_that_works(store, expected):
    fired = []

    def interrupt(*_):
        fired.append(True)
        raise KeyboardInterrupt

    def forever(source):
        while True:
            for first in range(N_EXPERTS):
                # Python drops exceptions raised inside a finalizer.
                if fired:
                    raise KeyboardInterrupt
                source.slots(ids([(first + k) % N_EXPERTS for k in range(TOP_K)]))

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with stream(store, 5) as streamer:
            source = streamer.source(1)
            for n in range(63):
                fired.clear()
                with pytest.raises(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 0.002 + n * 37e-6)
                    forever(source)
                for expert in (n % N_EXPERTS, (n + 5) % N_EXPERTS):
                    slot = source.slots(ids([expert]))[0, 0].item()
                    assert seen(source, slot) == expected[1, expert]
            for wave in source.waves(range(N_EXPERTS)):
                for expert, slot in wave:
                    assert seen(source, slot) == expected[1, expert]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_counters_can_be_kept_and_reset(store):
    with stream(store, 5) as streamer:
        streamer.source(0).slots(ids([0, 1, 2]))
        kept = streamer.stats.snapshot()
        streamer.source(0).slots(ids([0, 1, 5]))
        assert kept.total.misses == 3 and streamer.stats.total.misses == 4
        assert streamer.stats.total.hits == 2
        assert streamer.stats.total.hit_rate == 2 / 6
        streamer.stats.reset()
        assert streamer.stats.total == Counters()


def test_closing_twice_is_harmless_and_ends_the_threads(store):
    before = threading.active_count()
    streamer = stream(store, 5, read_threads=3)
    streamer.source(0).slots(ids([0, 1, 2]))
    assert threading.active_count() == before + 3
    streamer.close()
    streamer.close()
    assert threading.active_count() == before


def test_an_unclosed_streamer_frees_memory_and_threads(store):
    gc.collect()
    before, threads = mx.get_active_memory(), set(threading.enumerate())
    streamer = stream(store, 5, read_threads=3)
    streamer.source(0).slots(ids([0, 1, 2]))
    started = set(threading.enumerate()) - threads
    assert len(started) == 3
    del streamer
    gc.collect()
    for thread in started:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in started)
    assert mx.get_active_memory() - before < 1024
