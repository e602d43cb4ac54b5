"""Where a device bounds buffers and memory, no array exceeds them, nor bits change."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.cli import main as moeflux
from moeflux_mlx.errors import BudgetError, ConfigError
from moeflux_mlx.experts.files.checkpoint_store import CheckpointExperts
from moeflux_mlx.experts.pool.policy import group_of, layers_of
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT, aligned_rows, allocated_bytes
from moeflux_mlx.experts.pool.segments import Division, divide, full_bytes, shares
from moeflux_mlx.experts.streaming.mapped import device_weights
from moeflux_mlx.loading import plan_load
from moeflux_mlx.memory import plan as memory
from moeflux_mlx.memory.caches import CacheForm
from moeflux_mlx.memory.plan import plan_memory

GB, MIB = 10**9, 2**20
# Memory, longest buffer and working set. The buffers of 8 and 512 GB, and all working
# sets, are assumed; the other buffers were observed on such machines.
MACHINES = {
    "8 GB": (8 << 30, 4 * GB, 5.7 * GB),
    "16 GB": (16 << 30, 8 * GB, 11.8 * GB),
    "48 GB": (48 << 30, 27 * GB, 37.4 * GB),
    "64 GB": (64 << 30, 36 << 30, 51.5 * GB),
    "128 GB": (128 << 30, 86.6 * GB, 103 * GB),
    "512 GB": (512 << 30, 330 * GB, 464 * GB),
}
# Experts of each layer, top-k, and bytes of one: small, large, unequal layers.
MODELS = {
    "35B": ([256] * 40, 8, 1_785_856),
    "235B": ([128] * 94, 8, 10_649_600),
    "671B": ([256] * 58, 8, 24_772_608),
    "uneven": ([128] * 20 + [16] * 7, 4, 20_004_864),
}


def limited(monkeypatch, buffer_bytes: float, working_set_bytes: float = 2**60):
    limits = device.GpuLimits(int(buffer_bytes), int(working_set_bytes))
    monkeypatch.setattr(device, "gpu_limits", lambda: limits)


class FewNeeds:
    """A model that needs little memory beside its experts."""

    most_tokens, cache_row_bytes, cache_state_bytes = 4096, 20_000, 0
    cache_forms: tuple[CacheForm, ...] = ()

    def resident_bytes(self, unpack: bool) -> int:
        return 1_500_000_000

    def scratch_bytes(self, n_tokens: int, n_cached: int, n_seqs: int = 1) -> int:
        return 300_000 * n_tokens

    def output_bytes(self, n_tokens: int) -> int:
        return 4096 * n_tokens

    def logits_bytes(self, n_tokens: int) -> int:
        return 600_000 * n_tokens


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_plans_keep_to_the_limits_of_a_mac(machine, model, scope, monkeypatch):
    physical, buffer, working_set = MACHINES[machine]
    counts, top_k, stride = MODELS[model]
    limited(monkeypatch, buffer, working_set)
    monkeypatch.setattr(device, "returns_pages", lambda: False)
    monkeypatch.setattr(device, "physical_memory_bytes", lambda: physical)
    monkeypatch.setattr(memory, "own_bytes", lambda: 200 * MIB)
    store = SimpleNamespace(
        layers=range(len(counts)),
        top_k=top_k,
        count=lambda layer: counts[layer],
        layout=lambda layer: SimpleNamespace(stride=stride),
    )
    options = {"counts": counts, "stride": stride, "top_k": top_k, "scope": scope}
    if scope == "layer" and len(counts) * top_k * stride > working_set - 1.8 * GB:
        with pytest.raises(BudgetError, match="working set that this device"):
            plan_memory(physical, FewNeeds(), store, scope=scope)
        return
    plan = plan_memory(physical, FewNeeds(), store, scope=scope)
    taken = plan.process_bytes + plan.resident_bytes + plan.scratch_bytes
    taken += plan.cache_bytes + plan.expert_bytes + plan.replacing_bytes
    assert taken <= plan.budget_bytes == int(working_set)
    assert "but the working set that this device recommends" in str(plan)
    for n_bytes, spares in ((plan.expert_bytes, False), (None, True), (2**60, True)):
        found = divide(n_bytes, **options, spares=spares)
        assert found.longest_bytes(stride) <= buffer
        assert found.n_bytes(stride) <= min(n_bytes or 0.75 * physical, working_set)
        assert sum(found.segment_slots) == found.n_slots
        assert min(found.segment_slots) >= top_k
    found = divide(plan.expert_bytes, **options)
    assert found.n_slots == plan.n_slots
    # A segment's second buffer fits beside everything except scratch.
    second = found.replacing_bytes(stride)
    assert second <= plan.replacing_bytes + plan.scratch_bytes
    if scope == "global" and len(set(counts)) == 1:
        assert second < found.n_bytes(stride) / min(found.n_segments, 7)
    # Slots are lost only where a layer's own share is longer than a buffer.
    lost = plan.budget_bytes - taken
    assert lost < 2 * stride or plan.n_slots == sum(counts) or found.shortened
    assert plan.n_segments == found.n_segments >= found.n_wanted
    because = found.n_segments > found.n_wanted
    assert because == ("buffers, because" in str(plan))


def test_one_buffer_where_nothing_bounds_it_or_all_fits(monkeypatch):
    options = {"counts": [64] * 8, "stride": 1 << 20, "top_k": 4}
    unbounded = divide(300 << 20, **options)
    assert (unbounded.n_segments, unbounded.n_slots) == (1, 298)
    limited(monkeypatch, 300 << 20)
    assert divide(300 << 20, **options) == unbounded
    limited(monkeypatch, (300 << 20) - 1)
    assert divide(300 << 20, **options).n_segments == 2


def test_a_layer_longer_than_a_buffer_has_fewer_slots_or_an_error(monkeypatch):
    options = {"counts": [64, 64], "stride": 1 << 20, "top_k": 4}
    limited(monkeypatch, 12 << 20)
    found = divide(1 << 30, **options)
    assert found.shortened and found.segment_slots == [10, 10]
    limited(monkeypatch, 5 << 20)
    with pytest.raises(BudgetError, match=r"\[pool\] expected a buffer of at least"):
        divide(1 << 30, **options)
    with pytest.raises(BudgetError, match="longest buffer of this device, but got"):
        aligned_rows(4, 1 << 20)


@given(
    most=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    least=st.integers(1, 5),
    data=st.data(),
)
def test_shares_are_whole_fair_and_never_grow_with_fewer_slots(most, least, data):
    lowest = sum(min(least, n) for n in most)
    n_slots = data.draw(st.integers(lowest, sum(most)))
    first = shares(most, n_slots, least)
    assert sum(first) == n_slots
    assert all(min(least, m) <= n <= m for n, m in zip(first, most, strict=True))
    fewer = data.draw(st.integers(sum(min(least, n) for n in first), n_slots))
    later = shares(first, fewer, least)
    assert sum(later) == fewer
    assert all(n <= m for n, m in zip(later, first, strict=True))


@given(n_layers=st.integers(1, 50), data=st.data())
def test_groups_of_layers_are_even_and_the_same_both_ways(n_layers, data):
    n_groups = data.draw(st.integers(1, n_layers))
    groups = [layers_of(group, n_layers, n_groups) for group in range(n_groups)]
    assert [layer for group in groups for layer in group] == list(range(n_layers))
    for group, layers in enumerate(groups):
        assert {group_of(layer, n_layers, n_groups) for layer in layers} == {group}
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


# The tiny model has 4 layers of 8 experts, of which a token takes 2.
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
N_RECORDS, N_STEPS = 32, 8


def logits(model, resizes: list[int] | None = None) -> np.ndarray:
    """Decode greedily and return all logits; change the number of slots meanwhile."""
    cache, tokens, found = make_prompt_cache(model), PROMPT, []
    for step in range(N_STEPS):
        if resizes and step % 3 == 1:
            model.streamer.resize(resizes[step // 3 % len(resizes)])
        out = model(mx.array([tokens]), cache=cache)[:, -1]
        found.append(np.array(out.astype(mx.float32)))
        tokens = [int(out.argmax().item())]
    return np.stack(found)


@pytest.fixture(scope="module")
def stride(checkpoint):
    with CheckpointExperts.open(checkpoint) as store:
        return store.layout(0).stride


@pytest.fixture(scope="module")
def resident(packed):
    """Logits with all experts in one buffer, by the way to compute single tokens."""

    def found(optimistic: str) -> np.ndarray:
        model, _ = moeflux_mlx.load(packed, optimistic=optimistic)
        assert model.streamer.resident and len(model.streamer.pools) == 1
        return logits(model)

    return {optimistic: found(optimistic) for optimistic in ("on", "off")}


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("form", "optimistic", "read_ahead"),
    [
        ("packed", "on", "on"),
        ("plain", "on", "off"),
        ("plain", "off", "on"),
    ],
)
@pytest.mark.parametrize(
    ("n_slots", "n_buffer", "n_segments"),
    [(32, 9, 4), (27, 15, 2), (16, 5, 4), (9, 4, 3)],
)
def test_segments_change_no_bit(
    form,
    optimistic,
    read_ahead,
    n_slots,
    n_buffer,
    n_segments,
    resident,
    request,
    stride,
    monkeypatch,
):
    limit = allocated_bytes(n_buffer, stride)
    limited(monkeypatch, limit)
    model, _ = moeflux_mlx.load(
        request.getfixturevalue("checkpoint" if form == "plain" else "packed"),
        expert_memory=n_slots * stride + n_segments * POOL_ALIGNMENT,
        optimistic=optimistic,
        read_ahead=read_ahead,
    )
    streamer = model.streamer
    assert len(streamer.pools) == n_segments
    assert all(allocated_bytes(len(p.bytes), stride) <= limit for p in streamer.pools)
    assert streamer.resident == (n_slots == N_RECORDS)
    expected = resident[optimistic]
    assert np.array_equal(logits(model), expected)
    least, most = streamer.least_slots, streamer.most_slots
    sizes = [least, most, min(least + 1, most)]
    assert np.array_equal(logits(model, sizes), expected)
    streamer.resize(streamer.most_slots)
    streamer.preload(streamer.experts)
    assert len(streamer.held) == streamer.n_slots == streamer.most_slots
    assert np.array_equal(logits(model), expected)


@pytest.mark.sampled
@pytest.mark.parametrize("policy", ["lru", "markov"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_policies_and_scopes_keep_to_segments(
    policy, scope, packed, resident, stride, monkeypatch
):
    limited(monkeypatch, allocated_bytes(7, stride))
    n_bytes = 19 * stride + 3 * POOL_ALIGNMENT
    model, _ = moeflux_mlx.load(
        packed,
        expert_memory=n_bytes,
        policy=policy,
        scope=scope,
        optimistic="on",
    )
    assert len(model.streamer.pools) > 1 and model.streamer.memory_bytes <= n_bytes
    sizes = [model.streamer.least_slots, model.streamer.most_slots]
    assert np.array_equal(logits(model, sizes), resident["on"])


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("form", "optimistic", "read_ahead"),
    [("packed", "on", "on"), ("plain", "off", "on"), ("plain", "on", "off")],
)
@pytest.mark.parametrize(
    ("n_slots", "n_buffer", "n_segments"), [(32, 9, 4), (16, 9, 2), (9, 4, 3)]
)
def test_segments_change_no_bit_of_mlx_lms_own_classes(
    form,
    optimistic,
    read_ahead,
    n_slots,
    n_buffer,
    n_segments,
    checkpoint,
    request,
    stride,
    monkeypatch,
):
    expected = logits(load_model(checkpoint)[0])
    limited(monkeypatch, allocated_bytes(n_buffer, stride))
    path: Path = request.getfixturevalue("checkpoint" if form == "plain" else "packed")
    model = moeflux_mlx.stream(
        load_model(checkpoint, lazy=True)[0],
        path,
        expert_memory=n_slots * stride + n_segments * POOL_ALIGNMENT,
        optimistic=optimistic,
        read_ahead=read_ahead,
    )
    assert len(model.streamer.pools) == n_segments
    assert np.array_equal(logits(model), expected)
    sizes = [model.streamer.least_slots, model.streamer.most_slots]
    assert np.array_equal(logits(model, sizes), expected)


def test_inspect_names_each_cap_and_its_cause(packed, stride, monkeypatch, capsys):
    monkeypatch.setattr(memory, "own_bytes", lambda: 100 * MIB)
    limited(monkeypatch, allocated_bytes(9, stride), 600_000_000)
    plan = plan_load(packed, "1GB")
    assert (plan.budget_bytes, plan.n_segments) == (600_000_000, 4)
    assert plan.n_slots == N_RECORDS
    assert moeflux(["inspect", str(packed), "--memory", "1GB"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "not 1.0 GB but the working set that this device "
        "recommends, 600.0 MB; experts in 4 buffers, because of the longest buffer of "
        "this device" in printed
    )
    assert moeflux(["inspect", str(packed), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["full_bytes"] == full_bytes([8] * 4, stride)
    assert summary["full_bytes"] == N_RECORDS * stride + 4 * POOL_ALIGNMENT
    model, _ = moeflux_mlx.load(packed, expert_memory=summary["full_bytes"])
    assert model.streamer.resident


def test_experts_alone_keep_to_the_working_set(packed, stride, monkeypatch, capsys):
    most = 20 * stride + POOL_ALIGNMENT
    limited(monkeypatch, 2**60, most)
    model, _ = moeflux_mlx.load(packed, expert_memory="1GB", optimistic="off")
    assert model.streamer.memory_bytes == most and model.streamer.n_slots == 20
    assert "this device recommends no larger working set" in capsys.readouterr().err
    with pytest.raises(BudgetError, match="working set that this device recommends"):
        plan_load(packed, "1GB")


def test_no_file_longer_than_a_buffer_is_mapped(checkpoint, monkeypatch):
    with CheckpointExperts.open(checkpoint) as store:
        layout = store.layout(0)
    rows = np.zeros((8, layout.stride), np.uint8)
    limited(monkeypatch, rows.nbytes - 1)
    with pytest.raises(ConfigError, match=f"longest buffer.*but got {rows.nbytes}"):
        device_weights(rows, layout)


def test_a_division_gives_the_segment_of_each_layer():
    found = Division((8, 8, 2, 8), 26, 2, 2, 1)
    assert found.segment_slots == [16, 10]
    assert [found.segment(row) for row in range(4)] == [0, 0, 1, 1]
