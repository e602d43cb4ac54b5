"""Eviction policies: the expert that each evicts, and a floor for every layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflux_mlx.errors import ConfigError, TraceError
from moeflux_mlx.experts.pool.policy import (
    LFU,
    LRU,
    POLICIES,
    Markov,
    Pins,
    PoolShape,
    policy_factory,
)
from moeflux_mlx.experts.pool.residency import EMPTY, SlotTable
from moeflux_mlx.experts.pool.routing_trace import RoutingTrace

N_LAYERS, N_EXPERTS, TOP_K = 3, 5, 2
SHAPE = PoolShape(N_LAYERS, N_EXPERTS, n_slots=7)
LAYERS = range(N_LAYERS)


def held(policy, *keys: int):
    for key in keys:
        policy.admit(key // N_EXPERTS, key)
    return policy


def trace_of(chosen: np.ndarray, n_experts: int = N_EXPERTS) -> RoutingTrace:
    """Return a trace of single tokens ``[N, L, K]``."""
    passes = np.ones(len(chosen), np.uint32)
    layers = tuple(range(chosen.shape[1]))
    sizes = (100,) * len(layers)
    return RoutingTrace("tiny", layers, n_experts, sizes, 1, passes, chosen)


def test_lru_evicts_the_key_unused_for_longest_over_all_layers():
    policy = held(LRU(SHAPE), 0, 5, 1)
    policy.use(0, [0])
    assert policy.victim(0, LAYERS, keep=()) == 5
    assert policy.victim(0, LAYERS, keep={5}) == 1
    assert policy.victim(0, [0], keep={1}) == 0
    policy.forget(1, 5)
    assert policy.victim(0, LAYERS, keep=()) == 1
    assert policy.victim(0, LAYERS, keep={0, 1}) is None


def test_lfu_evicts_the_key_used_least_often_even_if_used_last():
    policy = held(LFU(SHAPE), 0, 1, 2)
    policy.use(0, [0, 1, 0, 1, 0, 1, 2])
    assert policy.victim(0, LAYERS, keep=()) == 2


def test_lfu_lets_old_uses_count_less():
    policy = held(LFU(SHAPE), 0, 1)
    policy.use(0, [0] * 10 + [1] * 5)
    assert policy.victim(0, LAYERS, keep=()) == 1
    # After ten half-lives, old uses count almost nothing.
    policy.use(1, [5] * int(10 * LFU.HALF_LIFE * N_LAYERS * N_EXPERTS))
    policy.use(0, [1])
    assert policy.victim(0, LAYERS, keep=()) == 0


def test_lfu_remembers_uses_of_evicted_keys():
    policy = held(LFU(SHAPE), 0, 1)
    policy.use(0, [0, 0, 1])
    policy.forget(0, 0)
    policy.admit(0, 0)
    assert policy.victim(0, LAYERS, keep=()) == 1


def test_lfu_keeps_a_bounded_record_of_evicted_experts():
    policy = held(LFU(SHAPE), 0, 1)
    for _ in range(1000):
        policy.use(0, [0, 1, 1])
        assert policy.victim(0, LAYERS, keep=()) == 0
        policy.forget(0, 0)
        policy.admit(0, 0)
    assert len(policy._queues[0]) < 10


keys = st.integers(0, N_LAYERS * N_EXPERTS - 1)


@settings(max_examples=200)
@given(
    uses=st.lists(keys, min_size=1, max_size=60),
    admitted=st.sets(keys, min_size=1),
    keep=st.sets(keys, max_size=4),
    layers=st.sets(st.sampled_from(LAYERS)),
    largest=st.sampled_from([1.05, 1e200]),
)
def test_lfu_evicts_the_expert_of_its_definition(uses, admitted, keep, layers, largest):
    policy = LFU(SHAPE)
    policy._LARGEST = largest
    held(policy, *sorted(admitted))
    for key in uses:
        policy.use(key // N_EXPERTS, [key])
        # Choose victims between uses, so that remembered values can become stale.
        policy.victim(0, layers, keep)
    half_life = LFU.HALF_LIFE * N_LAYERS * N_EXPERTS
    decay = 0.5 ** (1 / half_life)

    def count(key: int) -> float:
        return sum(decay ** (len(uses) - i) for i, k in enumerate(uses) if k == key)

    free = {key: count(key) for key in admitted - keep if key // N_EXPERTS in layers}
    found = policy.victim(0, layers, keep)
    if not free:
        assert found is None
    else:
        assert free[found] == pytest.approx(min(free.values()), rel=1e-9)


def test_markov_keeps_experts_that_followed_those_in_use():
    policy = held(Markov(SHAPE), 0, 1, 2, 3)
    # 0 then 1, 2 then 3, each as often as the other.
    for _ in range(20):
        for expert in (0, 1, 2, 3):
            policy.use(0, [expert])
    policy.use(0, [0])
    # After 0 come 1, then 2, then 3, then 0 again.
    order = []
    while (key := policy.victim(0, LAYERS, keep={0})) is not None:
        order.append(key)
        policy.forget(0, key)
    assert order == [3, 2, 1]


@settings(max_examples=200)
@given(
    uses=st.lists(
        st.tuples(
            st.sampled_from(LAYERS),
            st.sets(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=4),
        ),
        max_size=30,
    ),
    admitted=st.sets(keys, min_size=1),
    keep=st.sets(keys, max_size=4),
    layers=st.sets(st.sampled_from(LAYERS)),
    shared=st.booleans(),
)
def test_markov_evicts_the_expert_of_its_definition(
    uses, admitted, keep, layers, shared
):
    n_groups = 1 if shared else N_LAYERS
    policy = Markov(PoolShape(N_LAYERS, N_EXPERTS, n_slots=9, n_groups=n_groups))
    for i, (layer, experts) in enumerate(uses):
        policy.use(layer, [layer * N_EXPERTS + e for e in sorted(experts)])
        if i == len(uses) // 2:
            held(policy, *sorted(admitted))
    if not uses:
        held(policy, *sorted(admitted))

    def value(key: int) -> float:
        layer, expert = divmod(key, N_EXPERTS)
        steps = [experts for r, experts in uses if r == layer]
        fading = 0.5 ** (1 / Markov.LATELY)
        ages = [len(steps) - 1 - i for i, s in enumerate(steps) if expert in s]
        lately = (1 - fading) * sum(fading**age for age in ages)
        base = (1 - Markov.FOLLOWING) * lately / (1 - Markov.DISCOUNT)
        if not steps or 2 * len(steps[-1]) > N_EXPERTS:
            return base
        means = []
        for before in steps[-1]:
            worth, n_uses = 0.0, 0
            for i, step in enumerate(steps):
                if before not in step or 2 * len(step) > N_EXPERTS:
                    continue
                n_uses += 1
                for ahead, later in enumerate(steps[i + 1 :]):
                    if 2 * len(later) > N_EXPERTS:
                        break
                    worth += (expert in later) * Markov.DISCOUNT**ahead
            means.append(worth / n_uses)
        return Markov.FOLLOWING * sum(means) / len(means) + base

    asked = 1
    group = LAYERS if shared else [asked]
    free = {
        key: value(key)
        for key in admitted - keep
        if key // N_EXPERTS in layers and key // N_EXPERTS in group
    }
    for _ in range(2):
        found = policy.victim(asked, layers, keep)
        if not free:
            assert found is None
        else:
            assert free[found] == pytest.approx(min(free.values()), rel=1e-4, abs=1e-6)


def test_markov_forgets_old_successors(monkeypatch):
    monkeypatch.setattr(Markov, "FOLLOWED", 16.0)
    policy = held(Markov(SHAPE), 1, 2)
    for _ in range(64):
        policy.use(0, [0])
        policy.use(0, [1])
    for _ in range(64):
        policy.use(0, [0])
        policy.use(0, [2])
    policy.use(0, [0])
    assert policy.victim(0, LAYERS, keep=()) == 1


def test_pins_stay_while_there_is_anything_else_to_evict():
    chosen = np.array([[[3, 1], [0, 1], [0, 4]]] * 4, np.uint8)
    policy = Pins(SHAPE, trace_of(chosen), rest=LRU)
    # Half of seven slots: the first three of those used equally often.
    held(policy, 1, 3, 5, 6, 14)
    evicted = []
    while (key := policy.victim(0, LAYERS, keep={14})) is not None:
        evicted.append(key)
        policy.forget(key // N_EXPERTS, key)
    assert evicted == [6, 1, 3, 5]


def test_pins_of_another_model_are_refused():
    chosen = np.zeros((4, N_LAYERS + 1, TOP_K), np.uint8)
    with pytest.raises(TraceError, match="3 layers with 5 experts but got 4 with 5"):
        Pins(SHAPE, trace_of(chosen), rest=LRU)


@pytest.mark.parametrize(
    "name", ["", "newest", "LRU", "pins:", "pins", "fifo+pins:x", "lru+"]
)
def test_a_name_of_no_policy_is_refused(name):
    with pytest.raises(ConfigError, match=r"\[policy\] expected lru, lfu"):
        policy_factory(name)


def test_policies_have_names(tmp_path):
    assert policy_factory("lru") is LRU
    assert policy_factory("lfu") is LFU
    path = tmp_path / "a+pins:b.npz"
    trace_of(np.zeros((4, N_LAYERS, TOP_K), np.uint8)).save(path)
    assert policy_factory("markov") is Markov
    for name, rest in (
        ("pins", LFU),
        ("lru+pins", LRU),
        ("lfu+pins", LFU),
        ("markov+pins", Markov),
    ):
        policy = policy_factory(f"{name}:{path}")(SHAPE)
        assert isinstance(policy, Pins) and isinstance(policy._rest, rest)
    with pytest.raises(TraceError, match="No such file"):
        policy_factory(f"pins:{tmp_path}/none")


visits = st.lists(
    st.tuples(
        st.integers(0, N_LAYERS - 1),
        st.sets(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=TOP_K),
    ),
    max_size=40,
)


@settings(max_examples=100)
@given(
    visits=visits,
    n_slots=st.integers(TOP_K, 12),
    floor=st.integers(0, 4),
    shared=st.booleans(),
    policy=st.sampled_from([*POLICIES.values()]),
)
def test_no_layer_falls_below_its_floor_for_another(
    visits, n_slots, floor, shared, policy
):
    if not shared:
        n_slots = max(TOP_K, n_slots // N_LAYERS) * N_LAYERS
    table = SlotTable(
        N_LAYERS,
        N_EXPERTS,
        n_slots,
        top_k=TOP_K,
        policy=policy,
        n_groups=1 if shared else N_LAYERS,
        # With more, a token of one layer would not fit.
        floor=min(floor, (n_slots - TOP_K) // (N_LAYERS - 1)),
    )

    def held_by(layer: int) -> int:
        return sum(slot != EMPTY for slot in table.slots[layer])

    for layer, experts in visits:
        before = [held_by(r) for r in LAYERS]
        kept = {table.key(layer, expert) for expert in experts}
        for expert in sorted(experts):
            if table.slots[layer][expert] == EMPTY:
                slot = table.claim(layer, kept)
                assert slot is not None
                table.place(layer, expert, slot)
        table.touch(layer, sorted(experts))
        assert all(table.slots[layer][expert] != EMPTY for expert in experts)
        for other in set(LAYERS) - {layer}:
            assert held_by(other) >= min(before[other], table.floor)
        slots = [slot for slots in table.slots for slot in slots if slot != EMPTY]
        assert len(slots) == len(set(slots)) <= n_slots


def test_floors_are_the_need_of_a_token_where_slots_allow():
    def floor(n_slots: int) -> int:
        return SlotTable(4, 16, n_slots, top_k=3, policy=LRU).floor

    assert [floor(n) for n in (3, 8, 16, 24, 60)] == [0, 1, 2, 3, 3]


def test_a_floor_never_leaves_a_request_without_a_slot():
    table = SlotTable(2, 4, 2, top_k=1, policy=LRU, floor=2)
    for expert in (0, 1):
        table.place(0, expert, table.claim(0, ()))
    assert table.claim(1, ()) is not None
