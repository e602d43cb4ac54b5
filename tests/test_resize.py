"""Shrink and grow the slots: bytes stay right, and memory is really returned."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import expert_bytes, slot_bytes, write_checkpoint

from moeflux_mlx import device
from moeflux_mlx.errors import BudgetError
from moeflux_mlx.experts.files.checkpoint_store import CheckpointExperts
from moeflux_mlx.experts.pool.policy import LRU
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.pool.residency import EMPTY, SlotTable
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.experts.weights import Quantization

N_LAYERS, N_EXPERTS, TOP_K = 3, 11, 3
N_RECORDS = N_LAYERS * N_EXPERTS


def store_of(n_layers: int, n_experts: int, top_k: int) -> tuple[Any, Any, Any]:
    """Return fixtures: a checkpoint in 4 bits, its open store, each expert's bytes."""

    @pytest.fixture(scope="module")
    def plain(tmp_path_factory):
        return write_checkpoint(
            tmp_path_factory.mktemp("store") / "plain",
            n_layers=n_layers,
            n_experts=n_experts,
            top_k=top_k,
            quantization=[Quantization(4, 32)] * n_layers,
        )

    @pytest.fixture(scope="module")
    def store(plain):
        with CheckpointExperts.open(plain) as opened:
            yield opened

    @pytest.fixture(scope="module")
    def expected(plain):
        pairs = [(layer, e) for layer in range(n_layers) for e in range(n_experts)]
        return {(layer, e): expert_bytes(plain, layer, e) for layer, e in pairs}

    return plain, store, expected


plain, store, expected = store_of(N_LAYERS, N_EXPERTS, TOP_K)


def stream(store, n_slots, **options):
    memory = n_slots * store.layout(0).stride + POOL_ALIGNMENT
    return ExpertStreamer(store, memory, **options)


def gate_bytes(source, slot):
    return slot_bytes(source.weights.gate, slot)["weight"]


def use(streamer, expected, layer, experts):
    source = streamer.source(layer)
    slots = np.array(source.slots(mx.array([experts], mx.uint32)))[0]
    for expert, slot in zip(experts, slots.tolist(), strict=True):
        found = gate_bytes(source, slot)
        assert found == expected[layer, expert]["gate_proj.weight"]


@settings(max_examples=40)
@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, N_LAYERS - 1),
            st.lists(st.integers(0, N_EXPERTS - 1), min_size=3, max_size=3),
            st.integers(N_LAYERS * TOP_K, N_RECORDS),
        ),
        max_size=8,
    ),
    n_slots=st.sampled_from([20, N_RECORDS]),
    scope=st.sampled_from(["global", "layer"]),
)
def test_experts_are_right_after_any_change_of_size(
    store, expected, steps, n_slots, scope
):
    with stream(store, n_slots, scope=scope) as streamer:
        most = streamer.n_slots
        for layer, experts, size in steps:
            streamer.resize(min(size, most))
            assert streamer.n_slots == min(size, most)
            use(streamer, expected, layer, experts)


def test_the_experts_used_last_stay_in_memory(store, expected):
    with stream(store, 12) as streamer:
        for experts in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 0]):
            use(streamer, expected, 1, experts)
        streamer.resize(6)
        misses = streamer.stats.total.misses
        use(streamer, expected, 1, [9, 10, 0])
        use(streamer, expected, 1, [6, 7, 8])
        assert streamer.stats.total.misses == misses


def test_experts_all_in_memory_are_streamed_once_there_is_less(store, expected):
    with stream(store, N_RECORDS) as streamer:
        assert streamer.resident
        settled = streamer.source(2)
        streamer.resize(5)
        assert not streamer.resident
        assert streamer.source(2) is not settled
        use(streamer, expected, 2, [1, 5, 9])
        streamer.resize(N_RECORDS)
        use(streamer, expected, 0, [1, 5, 9])


def test_memory_follows_the_size(store):
    stride = store.layout(0).stride
    with stream(store, 20) as streamer:
        for n_slots in (9, 3, 14, 20):
            streamer.resize(n_slots)
            assert streamer.memory_bytes == n_slots * stride + POOL_ALIGNMENT


@pytest.mark.parametrize("n_slots", [TOP_K - 1, 21])
def test_a_size_out_of_range_is_refused(store, n_slots):
    with stream(store, 20) as streamer:
        with pytest.raises(BudgetError, match=rf"3 to 20 slots but got {n_slots}"):
            streamer.resize(n_slots)
        assert streamer.n_slots == 20


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_whole_pages_go_back_to_the_system():
    array = np.ones(64 << 20, np.uint8)
    before = device.process_bytes()
    assert device.return_memory(array[1:-1])
    assert before - device.process_bytes() > 60 << 20
    assert array[0] == array[-1] == 1 and not array[1 << 20 : -(1 << 20)].any()


def test_an_interrupted_move_loses_nothing():
    table = SlotTable(1, 4, 4, top_k=1, policy=LRU)
    for expert in range(4):
        slot = table.claim(0, ())
        table.place(0, expert, slot)

    def interrupted(segment, source, target):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.resize(2, interrupted)
    table.repair()
    assert table.slots[0] == [EMPTY, EMPTY, 2, 3]
