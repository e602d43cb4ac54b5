"""A process plans its memory before loading and keeps to it while caches grow."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import python
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache
from sparse import make_sparse_checkpoint
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.cli import main as moeflux
from moeflux_mlx.engine.parameters import LayerWeights, held_bytes
from moeflux_mlx.errors import BudgetError, ConfigError
from moeflux_mlx.experts.weights import leaves
from moeflux_mlx.loading import plan_load
from moeflux_mlx.memory import caches
from moeflux_mlx.memory import keeper as memory_keeper
from moeflux_mlx.memory import plan as memory
from moeflux_mlx.memory.caches import PutBackOnFailure
from moeflux_mlx.memory.search import Trial, choose

ROOT = Path(__file__).resolve().parent.parent
OWN_BYTES = 100 << 20


@pytest.fixture
def own_bytes(monkeypatch):
    """Pretend that the interpreter's memory is constant: that of the tests grows."""
    monkeypatch.setattr(memory, "own_bytes", lambda: OWN_BYTES)
    monkeypatch.setattr(device, "process_bytes", lambda: None)


@pytest.fixture
def least(packed, own_bytes) -> int:
    """The least memory in which the packed model runs."""
    with pytest.raises(BudgetError) as caught:
        plan_load(packed, 1)
    return int(re.search(r"at least (\d+) bytes", str(caught.value))[1])


def load(path, budget, **options):
    return moeflux_mlx.load(path, memory=budget, **options)[0]


def parts(plan: memory.MemoryPlan) -> int:
    fixed = plan.process_bytes + plan.resident_bytes
    return fixed + plan.scratch_bytes + plan.cache_bytes + plan.expert_bytes


def test_a_plan_gives_experts_the_remaining_memory(packed, least):
    slot = load(packed, "1GB").streamer.slot_bytes
    for n_more in (0, 1, 5):
        plan = plan_load(packed, least + n_more * slot)
        assert plan.n_slots == 2 + n_more
        assert 0 <= plan.budget_bytes - parts(plan) < slot
        assert plan.process_bytes == OWN_BYTES + device.PROCESS_GROWTH_BYTES


def test_with_enough_memory_all_experts_are_held(packed, own_bytes):
    plan = plan_load(packed, "1GB")
    assert plan.n_slots == plan.n_experts == 32
    assert plan.chunk_tokens == 2048 and plan.unpack
    assert parts(plan) < plan.budget_bytes


def test_too_little_memory_states_the_minimum_and_its_parts(packed, least):
    with pytest.raises(BudgetError) as caught:
        load(packed, least - 1)
    message = str(caught.value)
    assert f"[memory] expected at least {least} bytes" in message
    for part in ("process", "weights", "caches", "scratch for 64 tokens", "2 experts"):
        assert part in message
    load(packed, least)


def test_experts_can_be_bounded_alone_or_besides(packed, own_bytes):
    alone = moeflux_mlx.load(packed, expert_memory="2200KB")[0]
    both = load(packed, "1GB", expert_memory="2200KB")
    assert alone.runtime.plan is None and both.runtime.plan is not None
    assert alone.streamer.n_slots == both.streamer.n_slots < 32


def test_the_plan_is_printed_once(packed, own_bytes, capsys):
    load(packed, "1GB")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("moeflux: memory 1.0 GB = process ")
    assert printed.err.count("\n") == 1


def decode(model, prompt, n_tokens):
    """Return greedy tokens, and the number of experts in memory at each."""
    cache = make_prompt_cache(model)
    logits, tokens, sizes = model(mx.array([prompt]), cache=cache), [], []
    for _ in range(n_tokens):
        tokens.append(int(mx.argmax(logits[0, -1])))
        logits = model(mx.array([tokens[-1:]]), cache=cache)
        sizes.append(model.streamer.n_slots)
    return tokens, sizes


def long_cache(model, n_rows):
    """Return caches of this many tokens, as if they had been computed."""
    cache = make_prompt_cache(model)
    model(mx.array([[1, 2]]), cache=cache)
    for c in cache:
        if hasattr(c, "offset"):
            shape = (*c.keys.shape[:2], n_rows, c.keys.shape[3])
            c.keys, c.values = mx.zeros(shape), mx.zeros(shape)
            c.offset = n_rows - memory_keeper.LOOKAHEAD
            mx.eval(c.keys, c.values)
    return cache


def slots_left(model, n_tokens, n_rows, *, chunk):
    """Return the number of experts that the plan fits beside a call of one sequence."""
    plan, needs, streamer = model.runtime.plan, model.needs, model.streamer
    room = plan.budget_bytes - plan.process_bytes - plan.resident_bytes
    room -= needs.cache_state_bytes + n_rows * needs.cache_row_bytes
    room -= needs.scratch_bytes(chunk, n_rows) + needs.output_bytes(n_tokens)
    return (room - streamer.slack_bytes) // streamer.slot_bytes


def test_experts_are_evicted_for_a_growing_cache_and_return(packed, least):
    model = load(packed, least + (1 << 18))
    plan, streamer = model.runtime.plan, model.streamer
    sizes = range(memory.CACHE_STEP, 4096, memory.CACHE_STEP)
    left = {n: slots_left(model, 1, n, chunk=1) for n in sizes}
    n_rows = next(n for n, n_slots in left.items() if n_slots < plan.n_slots)
    cache = long_cache(model, n_rows)
    model(mx.array([[3]]), cache=cache)
    assert streamer.n_slots == left[n_rows] >= 2
    del cache
    prompt = list(range(1, 250))
    tokens, sizes = decode(model, prompt, 4)
    assert sizes[0] == plan.n_slots
    expected, _ = decode(load(packed, "1GB"), prompt, 4)
    assert tokens == expected


@pytest.mark.parametrize(
    ("most", "chunk", "n_slots"),
    # 256 + 44 tokens read 2 x 22 of 32 experts and then the 2 evicted ones: fewer than
    # 3 chunks of up to 128, which read 20 each, or none if all can be held.
    [(12, 256, 10), (32, 128, 32)],
)
def test_experts_are_evicted_for_a_prompt_if_that_saves_reads(
    packed, least, most, chunk, n_slots
):
    model = load(packed, "1GB")
    budget = model.runtime.plan.budget_bytes
    spare = slots_left(model, 300, 512, chunk=256) - 10
    del model
    budget -= spare * load(packed, "1GB").streamer.slot_bytes
    model = load(packed, budget)
    keeper, cache = model.runtime.keeper, make_prompt_cache(model)
    keeper.limit(most)
    assert keeper.make_room(cache, 1, 300) == chunk
    assert model.streamer.n_slots == n_slots
    model(mx.array([[3]]), cache=cache)
    assert model.streamer.n_slots == most


@pytest.mark.skipif(not device.prefers_host_arrays(), reason="copies are a CPU's")
def test_nothing_that_was_freed_is_kept_under_a_budget(packed, least):
    model = load(packed, least + (1 << 22))
    mx.set_cache_limit(1 << 30)
    model = load(packed, least + (1 << 22))
    mx.eval(model(mx.array([list(range(1, 250))]), cache=make_prompt_cache(model)))
    assert mx.get_cache_memory() == 0


def test_parts_of_a_call_have_the_threads_of_their_own_size(packed, least, monkeypatch):
    model, asked = load(packed, least + (1 << 21)), []
    host_threads = device.host_threads

    def watched(n_macs):
        asked.append(n_macs)
        return host_threads(n_macs)

    monkeypatch.setattr(device, "host_threads", watched)
    prompt = mx.array([list(range(1, 301))])
    model(prompt, cache=make_prompt_cache(model))
    whole, part = asked
    assert whole == 300 * 64**2
    sizes = (*memory.CHUNKS, *memory.SMALLER_CHUNKS)
    assert part in {n * 64**2 for n in sizes} and part < whole


def test_a_batch_is_divided_into_fewer_tokens_of_each_sequence(packed, least):
    model = load(packed, least + (4 << 20))
    chunks = memory_keeper._chunks
    assert chunks(8, 300) == [2048, 1024, 512, 256, 128, 64, 32, 16]
    assert chunks(24, 2) == [48, 24]
    assert chunks(3, 100) == [300, 255, 126, 63, 30, 15]
    prompts = np.random.default_rng(2).integers(1, 300, (6, 50))
    caches = make_prompt_cache(model)
    logits = model(mx.array(prompts.tolist()), cache=caches)
    for prompt, row in zip(prompts.tolist(), logits, strict=True):
        cache = make_prompt_cache(model)
        expected = model(mx.array([prompt]), cache=cache)[0]
        np.testing.assert_allclose(np.array(row), np.array(expected), atol=2e-4)


def test_a_call_without_caches_keeps_to_the_plan_too(packed, least):
    model = load(packed, least + (1 << 20))
    tokens = mx.array([np.random.default_rng(3).integers(1, 300, 300).tolist()])
    chunks = []
    graphs = model.language_model.forward._graphs
    compute = graphs.rows
    graphs.rows = lambda inputs, *rest: (
        chunks.append(inputs.shape[1]) or compute(inputs, *rest)
    )
    logits = model(tokens)
    assert len(chunks) > 1 and sum(chunks) == 300
    expected = load(packed, "1GB")(tokens)
    np.testing.assert_allclose(np.array(logits), np.array(expected), atol=2e-4)
    with pytest.raises(BudgetError, match=r"1 x 20000 tokens .* shorten the prompt"):
        model(mx.zeros((1, 20000), mx.int32))
    model(tokens[:, :8])


def test_unusable_options_beside_memory_are_refused(packed, own_bytes):
    with pytest.raises(ConfigError, match=r"\[expert_io\] expected 'pread'"):
        load(packed, "1GB", expert_io="mmap")
    with pytest.raises(ConfigError, match=r"\[expert_memory\] expected bytes"):
        load(packed, "1GB", expert_memory=0)


def test_a_limit_that_is_refused_changes_nothing(packed, own_bytes):
    model = load(packed, "1GB")
    with pytest.raises(BudgetError, match=r"\[resize\]"):
        model.runtime.keeper.limit(1)
    decode(model, [1, 2, 3], 2)
    assert model.streamer.n_slots == 32


def test_a_single_token_after_a_gradient_gives_experts_their_room(packed, own_bytes):
    model = load(packed, "1GB")
    keeper, streamer = model.runtime.keeper, model.streamer
    cache = make_prompt_cache(model)
    keeper.make_room(cache, 1, 1)
    most = streamer.n_slots
    taken = sum(keeper._parts(measured=True).values())
    few = streamer.slack_bytes + 20 * streamer.slot_bytes
    keeper.hold(keeper.plan.budget_bytes - taken - few, cache, 1, 1)
    assert streamer.n_slots < most
    keeper.make_room(cache, 1, 1)
    assert streamer.n_slots == most


def test_resident_experts_are_evicted_too(packed, least):
    prompt = list(range(1, 250))
    everything, expected = load(packed, "1GB"), load(packed, "1GB")
    assert everything.streamer.resident
    keeper = everything.runtime.keeper
    tokens, _ = decode(everything, prompt, 3)
    keeper.limit(4)
    assert not everything.streamer.resident
    assert decode(everything, prompt, 3)[0] == tokens == decode(expected, prompt, 3)[0]


def test_caches_that_do_not_fit_are_a_clear_error(packed, least):
    model = load(packed, least)
    cache = make_prompt_cache(model)
    with pytest.raises(BudgetError, match=r"\[memory\] expected at least") as caught:
        for _ in range(40):
            n_before = [c.nbytes for c in cache], cache[-1].offset
            model(mx.array([list(range(1, 300))]), cache=cache)
    assert ([c.nbytes for c in cache], cache[-1].offset) == n_before
    context = model.runtime.plan.context_tokens
    assert f"room for {context} tokens: drop old caches" in str(caught.value)
    with pytest.raises(BudgetError, match=r"\[memory\] expected"):
        model(mx.array([[1] * 300]), cache=cache)
    # A new cache takes the old one's space.
    del cache
    decode(model, [1, 2, 3], 3)


@pytest.mark.parametrize("n_more", [0, 1 << 20])
def test_the_plan_states_the_longest_context(packed, least, n_more):
    model = load(packed, least + n_more)
    plan, keeper = model.runtime.plan, model.runtime.keeper
    assert f"room for {plan.context_tokens} tokens" in str(plan)
    cache = make_prompt_cache(model)
    keeper.make_room(cache, 1, plan.context_tokens - memory.CACHE_STEP)
    with pytest.raises(BudgetError, match=r"alone has room for"):
        keeper.make_room(cache, 1, plan.context_tokens + memory.CACHE_STEP)


def test_a_long_prompt_is_computed_in_chunks_that_fit(packed, least):
    model, whole = load(packed, least + (1 << 21)), load(packed, "1GB")
    assert model.runtime.plan.chunk_tokens < 300 < whole.runtime.plan.chunk_tokens
    prompt = mx.array([np.random.default_rng(1).integers(1, 300, 300).tolist()])
    caches = make_prompt_cache(model), make_prompt_cache(whole)
    got, expected = model(prompt, cache=caches[0]), whole(prompt, cache=caches[1])
    assert got.shape == expected.shape
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=0, atol=2e-4)
    assert [c.nbytes for c in caches[0]] == [c.nbytes for c in caches[1]]


@pytest.mark.parametrize("used", [0, 100, 256, 300])
@pytest.mark.parametrize("t, step", [(1, 1), (300, 16), (300, 100), (300, 300)])
@pytest.mark.parametrize("kind", [KVCache, lambda: BatchKVCache([0, 3])])
def test_predicted_allocations_equal_those_of_caches(kind, used, t, step):
    cache = kind()

    def append(n):
        rows = mx.zeros((2, 1, n, 4))
        cache.update_and_fetch(rows, rows)

    if used:
        append(used)
    allocated = cache.keys.shape[2] if used else 0
    for start in range(0, t, step):
        append(min(step, t - start))
    found = caches._allocated(allocated, used, t, step)
    assert found == cache.keys.shape[2]


def test_memory_for_a_call_is_decided_once_at_its_start(packed, least):
    model = load(packed, least + (1 << 20))
    keeper, asked = model.runtime.keeper, []
    make_room = keeper.make_room

    def watched(cache, n_seqs, t, **options):
        chunk = make_room(cache, n_seqs, t, **options)
        asked.append((t, chunk))
        return chunk

    keeper.make_room = watched
    # The last chunk has few tokens, so that lookahead would request another step.
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[7] * 509]), cache=cache))
    assert len(asked) == 1 and asked[0][1] < 509
    assert cache[-1].offset == 509


@pytest.mark.parametrize("fails", [False, True])
def test_a_failed_batch_leaves_its_caches_unchanged(fails):
    cache, other = (BatchKVCache([0, 2]) for _ in range(2))
    first, wrong, right = (mx.random.normal((2, 1, n, 4)) for n in (5, 3, 3))
    for c in (cache, other):
        c.update_and_fetch(first, first)
    if fails:
        with pytest.raises(ZeroDivisionError), PutBackOnFailure([cache]):
            cache.update_and_fetch(wrong, wrong)
            raise ZeroDivisionError
    assert cache.offset.tolist() == [5, 3] and cache._idx == 5
    got, expected = (c.update_and_fetch(right, right)[0] for c in (cache, other))
    assert mx.array_equal(got, expected)


@pytest.mark.slow
def test_a_prompts_reads_grow_with_its_chunks_alone(packed, least):
    model = load(packed, least + (24 << 20))
    keeper, streamer = model.runtime.keeper, model.streamer
    keeper.limit(4)
    n_chunks, make_room = [], keeper.make_room

    def watched(cache, n_seqs, t, **options):
        chunk = make_room(cache, n_seqs, t, **options)
        n_chunks.append(-(-t // chunk))
        return chunk

    keeper.make_room = watched
    found = {}
    for n_tokens in (1000, 2000, 4000):
        cache, before = make_prompt_cache(model), streamer.stats.total.read_bytes
        n_chunks.clear()
        for start in range(0, n_tokens, 2048):
            t = min(2048, n_tokens - start)
            tokens = np.random.default_rng(start).integers(1, 300, (1, t))
            model(mx.array(tokens.tolist()), cache=cache)
            mx.eval([c.state for c in cache])
        found[n_tokens] = streamer.stats.total.read_bytes - before
        most = sum(n_chunks) * len(streamer.experts) * streamer.slot_bytes
        assert 0 < found[n_tokens] <= most
        assert sum(n_chunks) <= n_tokens // 100


LOADS = """
import gc, sys
import mlx.core as mx
import moeflux_mlx
from moeflux_mlx import device

def taken():
    gc.collect()
    mx.clear_cache()
    device.trim_heap()
    return device.process_bytes()

def load(n):
    for _ in range(n):
        moeflux_mlx.load(sys.argv[1], memory="400MB")

load(4)
before = taken()
load(12)
print((taken() - before) // 12)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is as Linux counts it")
def test_a_deleted_model_leaves_little_memory_in_use():
    """Lazy random numbers from its creation alone would leave 1 MB per load."""
    done = python("-c", LOADS, ROOT / "models" / "demo")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400 << 10


def test_unplanned_memory_evicts_experts(packed, monkeypatch):
    plan = plan_load(packed, "1GB")
    model = load(packed, parts(plan) + (24 << 20))
    if device.process_bytes() is None:
        pytest.skip("nobody counts a process's memory here")
    keeper = model.runtime.keeper
    # Garbage of other tests must not be freed during the measurement.
    gc.collect()
    device.trim_heap()
    used = device.process_bytes()
    expected = keeper.plan.process_bytes + keeper.plan.resident_bytes
    assert keeper._surplus(expected + 10**9) == 0
    step = memory_keeper.SURPLUS_STEP_BYTES
    surplus = keeper._surplus(used - model.streamer.memory_bytes - step // 2)
    assert surplus % step == 0 and 0 < surplus <= 2 * step


@pytest.mark.slow
def test_auto_tries_several_sizes_and_keeps_one(packed, own_bytes, capsys):
    model = load(packed, "auto")
    plan, said = capsys.readouterr().err.splitlines()
    assert plan.startswith("moeflux: memory ") and "experts" in plan
    sizes = {32, 24, 16, 8}
    assert said.startswith("moeflux: memory auto: ")
    assert said.count("tokens/s") == len(sizes)
    assert (n_slots := model.streamer.n_slots) in sizes
    decode(model, [1, 2, 3], 3)
    assert model.streamer.n_slots == n_slots


@pytest.mark.parametrize(
    ("speeds", "best"), [((10, 10.1, 10.2), 0), ((10, 12, 11), 1), ((5, 6, 7), 2)]
)
def test_a_smaller_pool_must_be_clearly_faster(speeds, best):
    trials = [Trial(9 - i, 9 - i, speed, 1.0) for i, speed in enumerate(speeds)]
    assert choose(trials) is trials[best]


@pytest.mark.skipif(not device.prefers_host_arrays(), reason="copies are a CPU's")
@pytest.mark.parametrize("unpack", [False, True], ids=["packed", "unpacked"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_weights_take_the_planned_memory(tmp_path, dtype, unpack):
    path = make_checkpoint(tmp_path / "model", dtype=dtype)
    model = moeflux_mlx.load(path)[0]
    text = model.language_model
    parameters = [np.asarray(x.view(mx.uint8)) for x in leaves(text.parameters())]
    weights = LayerWeights(text, unpack=unpack).bind(mx.float32, host=True)
    bound = [x for w in weights.values() for x in (w.w, w.scales, w.biases)]
    copies = [
        x for x in bound if x is not None and not any(_same(x, p) for p in parameters)
    ]
    taken = sum(x.nbytes for x in [*parameters, *copies])
    assert held_bytes(text, unpack=unpack) == taken


def _same(x, parameter: np.ndarray) -> bool:
    return np.shares_memory(np.asarray(x), parameter)


def test_inspect_shows_the_plan_without_loading(packed, own_bytes, capsys):
    assert moeflux(["inspect", str(packed), "--memory", "1GB", "--json"]) == 0
    plan = memory.MemoryPlan(**json.loads(capsys.readouterr().out)["plan"])
    assert plan == plan_load(packed, "1GB") and plan.n_slots == 32
    assert moeflux(["inspect", str(packed), "--memory", "1GB"]) == 0
    assert str(plan) in capsys.readouterr().out
    assert moeflux(["inspect", str(packed), "--memory", "1KB"]) == 2
    assert "[memory] expected at least" in capsys.readouterr().err


BUDGET = 200 << 20
# Limit the memory that the process may still map, except for stacks, whose pages are
# never touched; or start it in a control group.
UNDER_LIMIT = """
import json, os, resource, sys

path, budget, limited, group = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
if group:
    with open(os.path.join(group, "cgroup.procs"), "w") as procs:
        procs.write(str(os.getpid()))

import mlx.core as mx
import moeflux_mlx
from mlx_lm import stream_generate
from moeflux_mlx import device

def data_bytes():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {k: int(lines[k].split()[0]) * 1024 for k in ("VmData", "VmHWM")}

room = budget - device.process_bytes() + (96 << 20)
if limited and not group:
    most = data_bytes()["VmData"] + room
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
model, tokenizer = moeflux_mlx.load(path, memory=None if limited == 1 else budget)
prompt = [5, 77, 200, 31]
tokens = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=4)]
print(json.dumps({"tokens": tokens, "peak": data_bytes()["VmHWM"]}))
"""


def run_under_limit(
    path: Path, limited: int, group: Path | None = None
) -> subprocess.CompletedProcess[str]:
    arguments = (path, BUDGET, limited, group or "")
    command = [sys.executable, "-c", UNDER_LIMIT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of three times the budget, and its tokens without a limit."""
    path = tmp_path_factory.mktemp("memory") / "large"
    sizes = dict(hidden_size=256, moe_intermediate_size=256, num_experts=384)
    n_bytes = make_sparse_checkpoint(path, **sizes, num_hidden_layers=16)
    assert n_bytes > 3 * BUDGET
    unlimited, tokenizer = moeflux_mlx.load(path)
    options = {"prompt": [5, 77, 200, 31], "max_tokens": 4}
    responses = moeflux_mlx.stream_generate(unlimited, tokenizer, **options)
    return path, [response.token for response in responses]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_process_stays_under_its_budget_and_is_refused_without_one(large):
    path, tokens = large
    without = run_under_limit(path, limited=1)
    assert without.returncode == 1 and "BudgetError: [load]" in without.stderr
    within = run_under_limit(path, limited=2)
    assert within.returncode == 0, within.stderr
    found = json.loads(within.stdout)
    assert found["peak"] < BUDGET
    assert found["tokens"] == tokens


@pytest.fixture
def control_group():
    """A control group that kills processes above the budget."""
    version_1 = Path("/sys/fs/cgroup/memory")
    parent = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    limit = "memory.limit_in_bytes" if version_1.is_dir() else "memory.max"
    group = parent / f"moeflux-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as e:
        pytest.skip(f"no control group can be made here: {e}")
    try:
        if not (group / limit).exists():
            pytest.skip("control groups do not limit memory here")
        (group / limit).write_text(str(BUDGET))
        yield group
    finally:
        group.rmdir()


@pytest.mark.slow
def test_a_control_group_spares_a_process_with_a_budget_and_it_is_refused_without(
    large, control_group
):
    path, tokens = large
    without = run_under_limit(path, limited=1, group=control_group)
    assert without.returncode == 1 and "BudgetError: [load]" in without.stderr
    within = run_under_limit(path, limited=2, group=control_group)
    assert within.returncode == 0, within.stderr
    assert json.loads(within.stdout)["tokens"] == tokens


@pytest.fixture
def measure(monkeypatch):
    """Measure one row, as ``scripts/measure_budget`` does."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = ROOT / "scripts" / "measure_budget"
    loader = SourceFileLoader("measure_budget", str(path))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(loader.name, loader)
    )
    loader.exec_module(module)
    return module.measure


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is as Linux counts it")
@pytest.mark.parametrize(
    ("case", "budget", "outcome"),
    [
        # MLX's cache of freed arrays could exceed the budget by 4 MB here.
        ("prompt:1500", 175, "4 tokens"),
        ("prompt:3900", 150, "BudgetError: [memory] expected at least"),
        ("batch:3x200", 200, "3 texts"),
        ("state:600", 200, "4 tokens"),
        ("logits:1000", 200, "logits (1, 1000, 4096)"),
        ("learn:1x4", 300, "loss"),
        ("learn:1x64", 300, "BudgetError: [memory] expected at least"),
    ],
)
def test_no_process_ever_takes_more_than_its_budget(measure, case, budget, outcome):
    row = measure(ROOT / "models" / "demo", budget * 10**6, case)
    assert row["outcome"].startswith(outcome)
    assert row["peak"] <= budget * 10**6, row
