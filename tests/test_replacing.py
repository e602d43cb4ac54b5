"""Where the system takes back only entire buffers, memory still falls with the pool."""

from __future__ import annotations

from contextlib import contextmanager, suppress

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_model
from native_models import simulated
from synthetic import slot_bytes, write_checkpoint
from test_compiled import Lazy, Traced
from test_resize import store_of

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.errors import BudgetError
from moeflux_mlx.experts.files.checkpoint_store import CheckpointExperts
from moeflux_mlx.experts.pool.holders import Holders
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT, SlotPool
from moeflux_mlx.experts.pool.residency import SlotTable
from moeflux_mlx.experts.pool.segments import N_SIZES, divide, sizes
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.memory import plan as memory
from moeflux_mlx.memory.caches import CacheForm
from moeflux_mlx.memory.keeper import MemoryKeeper
from moeflux_mlx.memory.plan import plan_memory

N_LAYERS, N_EXPERTS, TOP_K = 3, 11, 3
N_RECORDS = N_LAYERS * N_EXPERTS
KIB, OWN_BYTES = 1 << 10, 100 << 20


@contextmanager
def stated():
    """A device that takes back only entire buffers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "returns_pages", lambda: False)
        yield patch


@pytest.fixture
def whole_buffers(monkeypatch):
    monkeypatch.setattr(device, "returns_pages", lambda: False)
    for executor in (Lazy, Traced):
        monkeypatch.setitem(EXECUTORS, executor.name, executor)


plain, store, expected = store_of(N_LAYERS, N_EXPERTS, TOP_K)


def stream(store, n_slots, **options):
    one_a_layer = options.get("scope") == "layer"
    n_segments = N_LAYERS if one_a_layer else max(1, min(3, n_slots // N_EXPERTS))
    n_bytes = n_slots * store.layout(0).stride + n_segments * POOL_ALIGNMENT
    streamer = ExpertStreamer(store, n_bytes, **options)
    assert len(streamer.pools) == n_segments
    return streamer


def check(source, expected, layer, experts):
    slots = np.array(source.slots(mx.array([experts], mx.uint32)))[0]
    for expert, slot in zip(experts, slots.tolist(), strict=True):
        found = slot_bytes(source.weights.gate, slot)["weight"]
        assert found == expected[layer, expert]["gate_proj.weight"]


def check_held(streamer, expected):
    """Check the table against the bytes in the slots, and check every size."""
    held, table = streamer.held, streamer._table
    assert [table.n_slots_of(g) for g in range(table.n_groups)] == [
        pool.n_slots for pool in streamer.pools
    ]
    misses = streamer.stats.total.misses
    for layer in range(N_LAYERS):
        experts = [e for n, e in held if n == layer]
        for first in range(0, len(experts), TOP_K):
            step = experts[first : first + TOP_K]
            check(streamer.source(layer), expected, layer, step)
    assert streamer.stats.total.misses == misses
    slots = np.array(streamer.slots_on_device())
    for layer in range(N_LAYERS):
        pool = streamer._pool(layer)
        absent = set(range(N_EXPERTS)) - {e for n, e in held if n == layer}
        assert {int(slots[layer, e]) for e in absent} <= {pool.absent}
        if len(pool.bytes) > pool.n_slots:
            assert pool.absent == len(pool.bytes) - 1 and not pool.bytes[-1].any()


@settings(max_examples=10)
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
    runs_ahead=st.booleans(),
)
def test_experts_are_right_after_any_change_of_size(
    store, expected, steps, n_slots, scope, runs_ahead
):
    options = {"scope": scope, "runs_ahead": runs_ahead}
    with stated(), stream(store, n_slots, **options) as streamer:
        most, stride = streamer.most_slots, streamer.slot_bytes
        for layer, experts, size in steps:
            stale = streamer.source(layer)
            was_resident = streamer.resident
            streamer.resize(min(size, most))
            assert streamer.n_slots == min(size, most)
            taken = streamer.n_slots * stride + streamer.slack_bytes
            assert streamer.memory_bytes == taken
            assert taken == sum(p.bytes.nbytes for p in streamer.pools) + (
                len(streamer.pools) * POOL_ALIGNMENT
            )
            check(streamer.source(layer), expected, layer, experts)
            if not was_resident:
                check(stale, expected, layer, experts)
            check_held(streamer, expected)


CALLS = [
    (SlotPool, "allocate"),
    (SlotPool, "replace"),
    (SlotPool, "move"),
    (SlotTable, "resize_group"),
    (Holders, "let_go"),
]
REFUSED = BudgetError("[pool] cannot allocate")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("n_slots", "begin", "end", "error", "calls"),
    [
        (24, 18, 9, KeyboardInterrupt, CALLS),
        (24, 18, 22, KeyboardInterrupt, CALLS),
        (N_RECORDS, N_RECORDS, 20, KeyboardInterrupt, CALLS),
        (24, 18, 9, REFUSED, CALLS[:2]),
    ],
)
def test_an_interrupted_change_of_size_loses_nothing(
    store, expected, n_slots, begin, end, error, calls, monkeypatch
):
    """End it before and after each of the calls that it makes."""
    monkeypatch.setattr(device, "returns_pages", lambda: False)
    n_left = 0

    def ending(function):
        def call(*args):
            count_down()
            result = function(*args)
            count_down()
            return result

        return call

    def count_down():
        nonlocal n_left
        n_left -= 1
        if n_left == -1:
            raise error

    for at in range(99):
        with stream(store, n_slots, read_threads=1) as streamer:
            for layer in range(N_LAYERS):
                check(streamer.source(layer), expected, layer, [0, 4, 9])
            streamer.resize(begin)
            n_left = at
            with (
                monkeypatch.context() as patch,
                suppress(KeyboardInterrupt, BudgetError),
            ):
                for kind, name in calls:
                    patch.setattr(kind, name, ending(getattr(kind, name)))
                streamer.resize(end)
            n_held = len(streamer.held)
            check_held(streamer, expected)
            assert min(begin, end) <= streamer.n_slots <= max(begin, end)
            assert n_held >= min(begin, end, 9)
            check(streamer.source(1), expected, 1, [1, 5, 10])
            streamer.resize(streamer.most_slots)
            check_held(streamer, expected)
        if n_left >= 0:
            break
    assert streamer.most_slots == n_slots and at > 6


def test_a_segment_keeps_its_buffer_until_the_next_one_is_whole(
    store, expected, monkeypatch
):
    monkeypatch.setattr(device, "returns_pages", lambda: False)
    with stream(store, 30) as streamer:
        for layer in range(N_LAYERS):
            check(streamer.source(layer), expected, layer, [0, 4, 9])
        arrays = [pool.array for pool in streamer.pools]
        held, n_slots = streamer.held, streamer.n_slots

        def refuse(n_bytes, part):
            raise BudgetError(f"[{part}] cannot allocate {n_bytes} bytes")

        with monkeypatch.context() as patch:
            patch.setattr(device, "check_allocation", refuse)
            with pytest.raises(BudgetError, match=r"\[pool\] cannot allocate"):
                streamer.resize(12)
        assert [pool.array for pool in streamer.pools] == arrays
        assert (streamer.held, streamer.n_slots) == (held, n_slots)
        check_held(streamer, expected)


PROMPT, N_TOKENS = [3, 1, 4, 1, 5, 9, 2, 6], 2


class Run:
    """Return a model's greedy tokens, and their logits."""

    def __init__(self, model):
        self.model, self.cache = model, make_prompt_cache(model)
        self.next, self.logits = PROMPT, []

    def __call__(self, n_tokens: int = N_TOKENS):
        for _ in range(n_tokens):
            logits = self.model(mx.array([self.next]), cache=self.cache)[0, -1]
            self.next = [int(mx.argmax(logits))]
            self.logits.append(np.array(logits.astype(mx.float32)))
        return self


def opened(kind, executor, optimistic, read_ahead, n_slots, packed, checkpoint):
    with CheckpointExperts.open(checkpoint) as store:
        stride = store.layout(0).stride
    n_segments = max(1, min(4, n_slots // 8))
    options = {
        "expert_memory": n_slots * stride + n_segments * POOL_ALIGNMENT,
        "optimistic": optimistic,
        "read_ahead": read_ahead,
    }
    if kind == "door":
        lazy = load_model(checkpoint, lazy=True)[0]
        model = moeflux_mlx.stream(lazy, packed, **options)
    else:
        model = moeflux_mlx.load(packed, executor=executor, **options)[0]
    assert len(model.streamer.pools) == n_segments
    # Threads read records of any size.
    model.streamer._in_flight.reader.inline_bytes = 0
    return model


@pytest.fixture(scope="module")
def resident():
    """Logits of models that always hold all experts, by the way that they run."""
    return {}


def released(streamer, n_slots: int) -> tuple[int, int]:
    """Change the size; return the loss of active memory and the loss of the pool.

    During the change, one segment may have a second buffer.
    """
    before, taken = mx.get_active_memory(), streamer.memory_bytes
    largest = max(p.bytes.nbytes for p in streamer.pools)
    mx.reset_peak_memory()
    streamer.resize(n_slots)
    largest = max(largest, *(p.bytes.nbytes for p in streamer.pools))
    most = max(before, before + streamer.memory_bytes - taken) + largest
    assert mx.get_peak_memory() <= most + POOL_ALIGNMENT + 64 * KIB
    return before - mx.get_active_memory(), taken - streamer.memory_bytes


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("kind", "executor", "optimistic", "read_ahead"),
    [
        ("native", "ops", "off", "on"),
        ("native", "traced", "off", "on"),
        ("native", "traced", "on", "on"),
        ("door", None, "on", "on"),
        pytest.param("native", "lazy", "off", "off", marks=pytest.mark.slow),
        pytest.param("native", "lazy", "on", "off", marks=pytest.mark.slow),
        pytest.param("door", None, "off", "on", marks=pytest.mark.slow),
        pytest.param("native", "sim", "on", "off", marks=[simulated, pytest.mark.slow]),
    ],
)
@pytest.mark.parametrize("n_slots", [32, 16], ids=["all", "half"])
def test_memory_falls_with_the_pool_and_no_bit_changes(
    kind,
    executor,
    optimistic,
    read_ahead,
    n_slots,
    packed,
    checkpoint,
    whole_buffers,
    resident,
):
    """The next token does not allocate the old buffers again."""
    options = kind, executor, optimistic, read_ahead
    if options not in resident:
        whole = Run(opened(*options, 32, packed, checkpoint))
        resident[options] = whole(5 * N_TOKENS).logits
    model = opened(*options, n_slots, packed, checkpoint)
    streamer, run = model.streamer, Run(model)()
    least, most = streamer.least_slots, streamer.most_slots
    small = max(least, 2 * n_slots // 5)
    for size in (small, least, small + 1, most):
        lost, wanted = released(streamer, size)
        assert abs(lost - wanted) < 24 * KIB
        before = mx.get_active_memory()
        run(1)
        assert mx.get_active_memory() - before < 64 * KIB
        run(N_TOKENS - 1)
    assert np.array_equal(run.logits, resident[options])


def test_traces_of_single_layers_go_with_the_pool(packed, checkpoint, whole_buffers):
    """As with a cache that no compiled step supports."""
    runs = []
    for changes in (False, True):
        run = Run(opened("native", "traced", "on", "off", 32, packed, checkpoint))
        run.cache[3] = RotatingKVCache(64)
        run(3)
        runners = [layer._runner for layer in run.model.graph_layers]
        assert all(runner._compiled.values() for runner in runners)
        if changes:
            lost, wanted = released(run.model.streamer, 9)
            assert wanted > 256 * KIB and abs(lost - wanted) < 24 * KIB
        runs.append(run(3).logits)
    assert np.array_equal(*runs)


class FewNeeds:
    """A model with one cache of 8 KiB per token, and little else."""

    row_bytes = 8 * KIB
    most_tokens, cache_row_bytes, cache_state_bytes = 4096, row_bytes, 0
    cache_forms = (CacheForm(row_bytes, 0),)

    def resident_bytes(self, unpack: bool) -> int:
        return 0

    def scratch_bytes(self, n_tokens: int, n_cached: int, n_seqs: int = 1) -> int:
        return 4 * KIB * n_tokens

    def output_bytes(self, n_tokens: int) -> int:
        return 0

    def logits_bytes(self, n_tokens: int) -> int:
        return 0


def grow(cache: KVCache, n_rows: int) -> None:
    """Give a cache this many rows, all of them in use."""
    rows = mx.zeros((1, 1, n_rows, FewNeeds.row_bytes // 8))
    cache.keys, cache.values, cache.offset = rows, mx.zeros_like(rows), n_rows
    mx.eval(cache.keys, cache.values)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose experts take more memory than a call's scratch."""
    path = tmp_path_factory.mktemp("wide") / "plain"
    sizes = {"n_layers": N_LAYERS, "n_experts": N_EXPERTS, "top_k": TOP_K}
    with CheckpointExperts.open(write_checkpoint(path, inner=1024, **sizes)) as opened:
        yield opened


@pytest.mark.parametrize("room", [9, 14, 18])
def test_a_pool_keeps_to_its_plan_while_it_moves(
    room, wide, whole_buffers, monkeypatch
):
    """While a segment has two buffers, caches and pool stay within the budget."""
    room <<= 20
    baseline, peaks, taken = mx.get_active_memory(), [], []
    change = ExpertStreamer.resize

    def measured(streamer, n_slots):
        mx.reset_peak_memory()
        change(streamer, n_slots)
        peaks.append(mx.get_peak_memory() - baseline)

    monkeypatch.setattr(ExpertStreamer, "resize", measured)
    monkeypatch.setattr(memory, "own_bytes", lambda: OWN_BYTES)
    monkeypatch.setattr(device, "process_bytes", lambda: None)
    budget = OWN_BYTES + device.PROCESS_GROWTH_BYTES + room
    plan = plan_memory(budget, FewNeeds(), wide)
    assert "to move some of them; room for" in str(plan)
    with ExpertStreamer(wide, plan.expert_bytes) as streamer:
        most = streamer.n_slots
        assert (most, len(streamer.pools)) == (plan.n_slots, plan.n_segments)
        keeper, sizes = MemoryKeeper(plan, FewNeeds(), streamer), []
        for n_rows in [*range(256, plan.context_tokens + 1, 256), 256, 512]:
            cache = KVCache()
            grow(cache, n_rows - 256)
            keeper.make_room([cache], 1, 1)
            grow(cache, n_rows)
            taken.append(mx.get_active_memory() - baseline)
            sizes.append(streamer.n_slots)
            del cache
        # A prompt's caches and scratch evict experts too, which are read again later.
        n_tokens = plan.context_tokens - 256
        assert keeper.make_room([KVCache()], 1, n_tokens) <= n_tokens
        assert streamer.n_slots < most
        keeper.make_room([KVCache()], 1, 1)
        assert streamer.n_slots == most
    steps = {most * n // N_SIZES for n in range(1, N_SIZES + 1)}
    assert steps.union([streamer.least_slots]) >= set(sizes)
    assert sizes[0] == sizes[-2] == most and sizes[-3] < most / 2
    assert max(taken) <= room and max(peaks) <= room


@given(
    counts=st.lists(st.integers(4, 90), min_size=1, max_size=12),
    room=st.integers(1, 1500),
    scratch=st.integers(0, 60),
    spares=st.booleans(),
)
@example(counts=[4, 4, 39, 32, 55, 35, 53], room=247, scratch=60, spares=False)
@example([37, 35, 51, 21, 13, 71, 61, 20, 17, 61, 61], 414, 16, True)
def test_a_planned_pool_can_be_moved_and_is_the_one_that_is_made(
    counts, room, scratch, spares
):
    stride, top_k = 1 << 20, 4
    options = {"counts": counts, "stride": stride, "top_k": top_k}
    room, scratch = room * stride, scratch * stride
    with stated():
        try:
            planned = divide(room, **options, replacing=room + scratch)
        except BudgetError:
            assert room < top_k * stride + POOL_ALIGNMENT
            return
        n_bytes, moved = planned.n_bytes(stride), planned.replacing_bytes(stride)
        assert n_bytes <= room and n_bytes + moved <= room + scratch
        made = divide(n_bytes, **options)
        assert (made.n_slots, made.n_segments) == (planned.n_slots, planned.n_segments)
        spared = divide(n_bytes, **options, spares=spares)
        assert spared.n_segments == planned.n_segments
        assert spared.n_bytes(stride) <= n_bytes
        spare = spared.replacing_bytes(stride)
        assert spared.n_bytes(stride) + spare <= room + scratch
        one = divide(n_bytes, **options, gives_way=False)
        assert one.n_segments == 1 and one.n_slots >= made.n_slots


def test_sizes_go_in_steps_only_where_a_change_is_a_copy():
    assert list(sizes(20, 3)) == list(range(3, 21))
    with stated():
        assert list(sizes(80, 3)) == [3, 10, 20, 30, 40, 50, 60, 70, 80]
        assert list(sizes(80, 35)) == [35, 40, 50, 60, 70, 80]
        assert list(sizes(3, 3)) == [3]
