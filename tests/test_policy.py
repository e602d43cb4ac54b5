"""Eviction policies: whom each evicts, and that no layer is starved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflux_mlx.errors import ConfigError, TraceError
from moeflux_mlx.experts.policy import LFU, LRU, Pins, PoolShape, policy_factory
from moeflux_mlx.experts.residency import EMPTY, SlotTable
from moeflux_mlx.experts.routing_trace import RoutingTrace

N_ROWS, N_EXPERTS, TOP_K = 3, 5, 2
SHAPE = PoolShape(N_ROWS, N_EXPERTS, n_slots=7)
ROWS = range(N_ROWS)


def held(policy, *keys: int):
    for key in keys:
        policy.admit(key // N_EXPERTS, key)
    return policy


def trace_of(chosen: np.ndarray, n_experts: int = N_EXPERTS) -> RoutingTrace:
    """A trace of single tokens ``[N, L, K]``."""
    passes = np.ones(len(chosen), np.uint32)
    layers = tuple(range(chosen.shape[1]))
    sizes = (100,) * len(layers)
    return RoutingTrace("tiny", layers, n_experts, sizes, 1, passes, chosen)


def test_lru_evicts_the_key_unused_for_longest_over_all_rows():
    policy = held(LRU(SHAPE), 0, 5, 1)
    policy.use(0, [0])
    assert policy.victim(0, ROWS, keep=()) == 5
    assert policy.victim(0, ROWS, keep={5}) == 1
    assert policy.victim(0, [0], keep={1}) == 0
    policy.forget(1, 5)
    assert policy.victim(0, ROWS, keep=()) == 1
    assert policy.victim(0, ROWS, keep={0, 1}) is None


def test_lfu_evicts_the_key_used_least_often_even_if_used_last():
    policy = held(LFU(SHAPE), 0, 1, 2)
    policy.use(0, [0, 1, 0, 1, 0, 1, 2])
    assert policy.victim(0, ROWS, keep=()) == 2


def test_lfu_lets_old_uses_count_less():
    policy = held(LFU(SHAPE), 0, 1)
    policy.use(0, [0] * 10 + [1] * 5)
    assert policy.victim(0, ROWS, keep=()) == 1
    # Ten half-lives later, old uses are next to nothing.
    policy.use(1, [5] * int(10 * LFU.HALF_LIFE * N_ROWS * N_EXPERTS))
    policy.use(0, [1])
    assert policy.victim(0, ROWS, keep=()) == 0


def test_lfu_remembers_uses_of_evicted_keys():
    policy = held(LFU(SHAPE), 0, 1)
    policy.use(0, [0, 0, 1])
    policy.forget(0, 0)
    policy.admit(0, 0)
    assert policy.victim(0, ROWS, keep=()) == 1


def test_lfu_keeps_no_more_than_it_needs_of_what_comes_and_goes():
    policy = held(LFU(SHAPE), 0, 1)
    for _ in range(1000):
        policy.use(0, [0, 1, 1])
        assert policy.victim(0, ROWS, keep=()) == 0
        policy.forget(0, 0)
        policy.admit(0, 0)
    assert len(policy._queues[0]) < 10


keys = st.integers(0, N_ROWS * N_EXPERTS - 1)


@settings(max_examples=200, deadline=None)
@given(
    uses=st.lists(keys, min_size=1, max_size=60),
    admitted=st.sets(keys, min_size=1),
    keep=st.sets(keys, max_size=4),
    rows=st.sets(st.sampled_from(ROWS)),
    largest=st.sampled_from([1.05, 1e200]),
)
def test_lfu_evicts_what_its_definition_says(uses, admitted, keep, rows, largest):
    policy = LFU(SHAPE)
    policy._LARGEST = largest
    held(policy, *sorted(admitted))
    for key in uses:
        policy.use(key // N_EXPERTS, [key])
        # Looked up between uses, so that what is remembered may go out of date.
        policy.victim(0, rows, keep)
    half_life = LFU.HALF_LIFE * N_ROWS * N_EXPERTS
    decay = 0.5 ** (1 / half_life)

    def count(key: int) -> float:
        return sum(decay ** (len(uses) - i) for i, k in enumerate(uses) if k == key)

    free = {key: count(key) for key in admitted - keep if key // N_EXPERTS in rows}
    found = policy.victim(0, rows, keep)
    if not free:
        assert found is None
    else:
        assert free[found] == pytest.approx(min(free.values()), rel=1e-9)


def test_pins_stay_while_there_is_anything_else_to_evict():
    chosen = np.array([[[3, 1], [0, 1], [0, 4]]] * 4, np.uint8)
    policy = Pins(SHAPE, trace_of(chosen), rest=LRU)
    # Half of seven slots: the first three of those used equally often.
    held(policy, 1, 3, 5, 6, 14)
    evicted = []
    while (key := policy.victim(0, ROWS, keep={14})) is not None:
        evicted.append(key)
        policy.forget(key // N_EXPERTS, key)
    assert evicted == [6, 1, 3, 5]


def test_pins_of_another_model_are_refused():
    chosen = np.zeros((4, N_ROWS + 1, TOP_K), np.uint8)
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
    trace_of(np.zeros((4, N_ROWS, TOP_K), np.uint8)).save(path)
    for name, rest in (("pins", LFU), ("lru+pins", LRU), ("lfu+pins", LFU)):
        policy = policy_factory(f"{name}:{path}")(SHAPE)
        assert isinstance(policy, Pins) and isinstance(policy._rest, rest)
    with pytest.raises(TraceError, match="No such file"):
        policy_factory(f"pins:{tmp_path}/none")


visits = st.lists(
    st.tuples(
        st.integers(0, N_ROWS - 1),
        st.sets(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=TOP_K),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(
    visits=visits,
    n_slots=st.integers(TOP_K, 12),
    floor=st.integers(0, 4),
    shared=st.booleans(),
    policy=st.sampled_from([LRU, LFU]),
)
def test_no_layer_falls_below_its_floor_for_another(
    visits, n_slots, floor, shared, policy
):
    if not shared:
        n_slots = max(TOP_K, n_slots // N_ROWS) * N_ROWS
    table = SlotTable(
        N_ROWS,
        N_EXPERTS,
        n_slots,
        top_k=TOP_K,
        policy=policy,
        shared=shared,
        # More would leave a token of one layer no room.
        floor=min(floor, (n_slots - TOP_K) // (N_ROWS - 1)),
    )

    def held_by(row: int) -> int:
        return sum(slot != EMPTY for slot in table.rows[row])

    for row, experts in visits:
        before = [held_by(r) for r in ROWS]
        kept = {table.key(row, expert) for expert in experts}
        for expert in sorted(experts):
            if table.rows[row][expert] == EMPTY:
                slot = table.claim(row, kept)
                assert slot is not None
                table.place(row, expert, slot)
        table.touch(row, sorted(experts))
        assert all(table.rows[row][expert] != EMPTY for expert in experts)
        for other in set(ROWS) - {row}:
            assert held_by(other) >= min(before[other], table.floor)
        slots = [slot for slots in table.rows for slot in slots if slot != EMPTY]
        assert len(slots) == len(set(slots)) <= n_slots


def test_floors_are_what_a_token_needs_where_slots_allow():
    def floor(n_slots: int) -> int:
        return SlotTable(4, 16, n_slots, top_k=3, policy=LRU).floor

    assert [floor(n) for n in (3, 8, 16, 24, 60)] == [0, 1, 2, 3, 3]


def test_a_floor_is_no_reason_to_find_no_slot():
    table = SlotTable(2, 4, 2, top_k=1, policy=LRU, floor=2)
    for expert in (0, 1):
        table.place(0, expert, table.claim(0, ()))
    assert table.claim(1, ()) is not None
