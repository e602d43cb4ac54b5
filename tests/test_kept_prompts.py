"""Prompts that a server keeps count as memory, and are evicted before experts."""

from __future__ import annotations

import gc
import re

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

import moeflux_mlx
from moeflux_mlx import device, serving
from moeflux_mlx.errors import BudgetError
from moeflux_mlx.loading import plan_load
from moeflux_mlx.memory import plan as memory

N_SLOTS = 18


@pytest.fixture
def model(packed, monkeypatch):
    """A model with room for ``N_SLOTS`` experts beside one short prompt."""
    monkeypatch.setattr(memory, "own_bytes", lambda: 100 << 20)
    monkeypatch.setattr(device, "process_bytes", lambda: None)
    with pytest.raises(BudgetError) as caught:
        plan_load(packed, 1)
    least = int(re.search(r"at least (\d+) bytes", str(caught.value))[1])
    slot_bytes = moeflux_mlx.load(packed, memory="1GB")[0].streamer.slot_bytes
    budget = least + (N_SLOTS - 2) * slot_bytes
    model, _ = moeflux_mlx.load(packed, memory=budget)
    assert model.streamer.n_slots == N_SLOTS
    return model


@pytest.fixture
def kept(model, monkeypatch):
    """Prompts kept for that model, which are evicted for its calls."""
    kept = serving.KeptPrompts(1000, None, lambda: model.runtime.keeper)
    monkeypatch.setattr(serving.prompts, "_kept", {kept})
    give_way = serving.release_oldest_prompt
    model.runtime.options = moeflux_mlx.engine.runtime.RunOptions(give_way=give_way)
    return kept


def rows_of(model, n_rows: int) -> list:
    """Return a prompt's caches as a batch leaves them, without making a call."""
    caches = make_prompt_cache(model)
    for cache in caches:
        if isinstance(cache, KVCache):
            cache.keys = cache.values = mx.zeros((1, 2, n_rows, 32))
            cache.offset = n_rows
        else:
            cache[0], cache[1] = mx.zeros((1, 3, 256)), mx.zeros((1, 4, 32, 32))
    return caches


def decode(model) -> None:
    model(mx.array([[3]]), cache=make_prompt_cache(model))


@pytest.mark.slow
def test_experts_make_room_for_kept_prompts_down_to_their_floor(model, kept):
    sizes = []
    for n in range(90):
        kept.insert_cache("model", [n, 1], rows_of(model, 64))
        decode(model)
        sizes.append(model.streamer.n_slots)
    floor = N_SLOTS // 2
    assert sizes[0] == N_SLOTS and floor <= min(sizes) < N_SLOTS
    # Then each new prompt evicts the oldest one.
    assert 10 < len(kept) < 90
    assert kept.fetch_nearest_cache("model", [89, 1, 5])[1] == [5]
    assert kept.fetch_nearest_cache("model", [0, 1, 5])[1] == [0, 1, 5]


def test_without_kept_prompts_experts_fall_below_that_floor(model, kept):
    """A single request may take memory until the fewest possible experts remain."""
    others = []
    while model.streamer.n_slots >= N_SLOTS // 2:
        others += rows_of(model, 64)
        model.runtime.keeper.count(others)
        decode(model)
    assert 2 <= model.streamer.n_slots < N_SLOTS // 2
    others.clear()
    gc.collect()
    decode(model)
    assert model.streamer.n_slots == N_SLOTS


def test_prompts_are_bounded_by_the_plan(model, kept):
    most = model.runtime.plan.prompt_bytes
    bounded = serving.KeptPrompts(10, most, lambda: model.runtime.keeper)
    for n in range(8):
        bounded.insert_cache("model", [n, 1], rows_of(model, 8))
        assert bounded.nbytes <= most
    plan, floor = model.runtime.plan, round(model.runtime.plan.expert_bytes / 2)
    fixed = plan.process_bytes + plan.resident_bytes + plan.scratch_bytes
    assert fixed + plan.cache_bytes + floor + most == plan.budget_bytes
    assert 0 < len(bounded) * 58e3 < most


def test_fetched_prompts_count_beside_kept_ones(model, kept):
    while model.streamer.n_slots == N_SLOTS:
        kept.insert_cache("model", [len(kept), 1], rows_of(model, 64))
        decode(model)
    before = model.streamer.n_slots
    cache, rest = kept.fetch_nearest_cache("model", [1, 1, 3])
    assert rest == [3]
    decode(model)
    during, n_kept = model.streamer.n_slots, len(kept)
    assert during < before or n_kept < before
    del cache
    gc.collect()
    decode(model)
    assert model.streamer.n_slots >= before
