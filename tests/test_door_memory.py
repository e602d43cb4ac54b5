"""Any model of mlx-lm in bounded memory keeps to its plan and gives the same tokens."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from commands import interpreted, running
from conftest import OWN_BYTES, hold_own_bytes
from mlx_lm import batch_generate
from mlx_lm.models.cache import (
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.utils import load_model
from test_server import free_port, post, refused, wait_until_healthy
from test_serving import N_TOKENS, serve
from tiny import write_tokenizer

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.calls import measured_scratch
from moeflux_mlx.calls import shared as calls
from moeflux_mlx.calls.measured_scratch import ScratchMeasure
from moeflux_mlx.errors import BudgetError, ExpertStoreError, ModelError
from moeflux_mlx.experts.files.reader import Read
from moeflux_mlx.measure.compare.measurement import greedy
from moeflux_mlx.memory import caches
from moeflux_mlx.memory import plan as memory
from moeflux_mlx.memory.caches import CACHE_STEP, CacheForm
from moeflux_mlx.memory.keeper import LOOKAHEAD
from moeflux_mlx.streaming import stream

ROOT = Path(__file__).resolve().parents[1]
# Measured peaks differ a little from call to call.
SLACK = 256 << 10
VOCAB = 128
SEED = np.random.RandomState(3)
PROMPTS = [SEED.randint(1, VOCAB, n).tolist() for n in (3, 70, 1, 12)]


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Make the scripts' modules importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture
def own_bytes(monkeypatch):
    hold_own_bytes(monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """Tiny models with a tokenizer, by family."""
    import family_trials

    @cache
    def write(family: str) -> Path:
        path = tmp_path_factory.mktemp("door-memory") / family
        path.mkdir()
        family_trials.write_model(path, family, 4)
        write_tokenizer(path, VOCAB)
        return path

    return write


def streamed(path: Path, budget: int | str, **options) -> nn.Module:
    return stream(load_model(path, lazy=True)[0], path, memory=budget, **options)


def least_of(path: Path) -> int:
    with pytest.raises(BudgetError, match=r"\[memory\] expected at least") as caught:
        streamed(path, OWN_BYTES + device.PROCESS_GROWTH_BYTES + (11 << 18))
    return int(re.search(r"at least (\d+) bytes", str(caught.value))[1])


def parts(plan: memory.MemoryPlan) -> int:
    fixed = plan.process_bytes + plan.resident_bytes
    return fixed + plan.scratch_bytes + plan.cache_bytes + plan.expert_bytes


@pytest.mark.slow
def test_the_minimum_of_memory_is_stated_and_enough(written, own_bytes, capsys):
    path = written("qwen3_moe")
    least = least_of(path)
    with pytest.raises(
        BudgetError, match=r"weights, .* scratch for 64 tokens, .* 1 ex"
    ):
        streamed(path, least - SLACK)
    model = streamed(path, least + SLACK)
    assert model.plan.budget_bytes == least + SLACK
    assert parts(model.plan) <= least + SLACK
    model.keeper.limit(1)
    said = capsys.readouterr().err
    assert said.count("moeflux: memory ") == 1 and "tokens of context" in said
    stock = load_model(path)[0]
    tokens = mx.array([PROMPTS[0]])
    assert mx.array_equal(model(tokens), stock(tokens))


def test_weights_that_do_not_fit_are_not_read(written, own_bytes):
    path = written("qwen3_moe")
    model = load_model(path, lazy=True)[0]
    mx.synchronize()
    before = mx.get_active_memory()
    with pytest.raises(BudgetError, match=r"weights.*scratch memory but got 1"):
        stream(model, path, memory=1)
    assert mx.get_active_memory() <= before
    # The model is unchanged: mlx-lm's own, and its weights can be read.
    stock = load_model(path)[0]
    assert type(model) is type(stock)
    tokens = mx.array([PROMPTS[0]])
    assert mx.array_equal(model(tokens), stock(tokens))
    streamed_later = stream(model, path, memory="4GB")
    assert mx.array_equal(streamed_later(tokens), stock(tokens))


FORMS = {
    # Keys and values of two layers, two heads of sixteen float32 each.
    "qwen3_moe": (2 * 2 * 2 * 16 * 4, 0),
    # One layer keeps a window of 32 rows.
    "gpt_oss": (2 * 2 * 16 * 4, 32 * 2 * 2 * 16 * 4),
    # A latent row of 32 and its positions' 16.
    "deepseek_v3": (2 * (32 + 16) * 4, 0),
}


@pytest.mark.sampled
@pytest.mark.parametrize("family", FORMS)
def test_caches_are_known_before_a_weight_is_read(written, family, own_bytes):
    needs = streamed(written(family), "4GB").keeper._needs
    assert (needs.cache_row_bytes, needs.cache_state_bytes) == FORMS[family]
    assert needs.most_tokens == 512
    assert needs.logits_bytes(3) == 3 * VOCAB * 4
    assert needs.output_bytes(3) == 2 * 3 * 64 * 4


@pytest.mark.sampled
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next"])
def test_measured_scratch_predicts_that_of_longer_calls(written, family, own_bytes):
    """Calls have sizes that were never measured, beside caches of other lengths."""
    model = streamed(written(family), "4GB")
    needs = model.keeper._needs
    for n_tokens, n_before in ((150, 0), (40, 300), (300, 100)):
        cache = make_prompt_cache(model)
        if n_before:
            model(mx.zeros((1, n_before), mx.int32), cache=cache)
        mx.eval(caches.arrays_of(cache))
        held = sum(c.nbytes for c in caches.single_caches(cache))
        base = mx.get_active_memory() - held
        mx.reset_peak_memory()
        model(mx.zeros((1, n_tokens), mx.int32), cache=cache)
        mx.eval(caches.arrays_of(cache))
        held = sum(c.nbytes for c in caches.single_caches(cache))
        taken = mx.get_peak_memory() - base - held
        planned = needs.scratch_bytes(n_tokens, n_before + n_tokens)
        assert taken <= 1.1 * planned + needs.output_bytes(n_tokens)
        assert planned <= 4 * taken + (1 << 20)


@pytest.mark.parametrize(("seconds", "n_calls"), [(0.001, 8), (0.04, 3), (60, 2)])
def test_the_largest_peaks_of_fast_calls_are_found(monkeypatch, seconds, n_calls):
    """Two in a row were too small for a plan, on a busy machine."""
    now, called = [0.0], []

    def peaks(_self, n_tokens, n_rows):
        now[0] += seconds
        called.append((n_tokens, n_rows))
        n = len(called)
        return (1000 * n, 5) if n == n_calls else (700, 100 * n)

    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(measured_scratch, "time", clock)
    monkeypatch.setattr(ScratchMeasure, "_peaks", peaks)
    measure = ScratchMeasure.__new__(ScratchMeasure)
    found = measure._largest_peaks(8, 2048)
    assert called == n_calls * [(8, 2048)]
    assert found == (1000 * n_calls, 100 * (n_calls - 1))


@pytest.fixture
def parts_called(monkeypatch) -> list[int]:
    """The number of tokens in each part of a divided call."""
    found: list[int] = []
    part = calls._Rows.part

    def noted(rows, tokens, cache):
        found.append(tokens.stop - tokens.start)
        return part(rows, tokens, cache)

    monkeypatch.setattr(calls._Rows, "part", noted)
    return found


class Few:
    """Needs that leave a call room for few tokens."""

    def __init__(self, needs, most: int):
        self._needs, self._most = needs, most

    def __getattr__(self, name):
        return getattr(self._needs, name)

    def scratch_bytes(self, n_tokens, n_cached, n_seqs=1):
        return 0 if n_tokens <= self._most else 1 << 40


@pytest.mark.sampled
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next"])
def test_a_long_prompt_is_divided_as_mlx_lm_divides_one(
    written, family, cached, own_bytes, parts_called
):
    path = written(family)
    model, stock = streamed(path, "4GB"), load_model(path)[0]
    model.keeper._needs = Few(model.keeper._needs, 40)
    tokens = mx.array([SEED.randint(1, VOCAB, 150).tolist()])
    ours, theirs = make_prompt_cache(model), make_prompt_cache(stock)
    got = model(tokens, cache=ours) if cached else model(tokens)
    wanted = [stock(tokens[:, i : i + 32], cache=theirs) for i in range(0, 150, 32)]
    assert parts_called == [32, 32, 32, 32, 22]
    assert mx.array_equal(got, mx.concatenate(wanted, axis=1))
    if cached:
        one = tokens[:, :1]
        assert mx.array_equal(model(one, cache=ours), stock(one, cache=theirs))


def test_a_gradient_is_not_divided(written, own_bytes, parts_called):
    path = written("qwen3_moe")
    model = streamed(path, "4GB")
    model.keeper._needs = Few(model.keeper._needs, 40)
    tokens = mx.array([SEED.randint(1, VOCAB, 100).tolist()])
    loss = nn.value_and_grad(model, lambda m: m(tokens).square().mean())
    stock = load_model(path)[0]
    assert np.isclose(loss(model)[0].item(), stock(tokens).square().mean().item())
    assert parts_called == []


def test_an_indivisible_call_is_refused(written, own_bytes):
    model = streamed(written("qwen3_moe"), "4GB")
    model.keeper._needs = Few(model.keeper._needs, 40)
    rows = mx.zeros((1, 100, 64))
    assert model(None, input_embeddings=rows).shape == (1, 100, VOCAB)
    # A mask covers all tokens, so the call cannot be divided.
    model = streamed(written("phixtral"), "4GB")
    model.keeper._needs = Few(model.keeper._needs, 40)
    with pytest.raises(BudgetError, match=r"at most 32 of 100 tokens"):
        model(mx.zeros((1, 100), mx.int32), mask=mx.zeros((100, 100)))


def bound(model: nn.Module, n_slots: int, cache_bytes: int, scratch: int) -> None:
    """Leave a model enough memory for ``n_slots`` beside the rest."""
    plan, streamer = model.plan, model.streamer
    budget = plan.process_bytes + plan.resident_bytes + cache_bytes + scratch
    budget += streamer.slack_bytes + n_slots * streamer.slot_bytes
    model.keeper.plan = dataclasses.replace(plan, budget_bytes=budget)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_are_evicted_for_growing_caches_and_return(written, family, own_bytes):
    path = written(family)
    model, stock = streamed(path, "4GB"), load_model(path)[0]
    n_all = model.plan.n_experts
    assert model.streamer.n_slots == n_all
    needs, n_rows = model.keeper._needs, 1280
    tokens = mx.array([SEED.randint(1, VOCAB, n_rows - LOOKAHEAD).tolist()])
    ours, theirs = make_prompt_cache(model), make_prompt_cache(stock)
    mx.eval(model(tokens, cache=ours), stock(tokens, cache=theirs))
    scratch = needs.scratch_bytes(1, n_rows) + needs.output_bytes(1)
    bound(model, 5, n_rows * needs.cache_row_bytes, scratch)
    one = tokens[:, :1]
    for _ in range(3):
        assert mx.array_equal(model(one, cache=ours), stock(one, cache=theirs))
        assert model.streamer.n_slots == 5
    del ours
    model(one, cache=make_prompt_cache(model))
    assert model.streamer.n_slots == n_all


def test_caches_that_do_not_fit_stay_unchanged(written, own_bytes):
    path = written("gpt_oss")
    model = streamed(path, least_of(path) + SLACK)
    cache = make_prompt_cache(model)
    assert f"room for {model.plan.context_tokens} tokens" in str(model.plan)
    tokens = mx.array([SEED.randint(1, VOCAB, 60).tolist()])
    with pytest.raises(BudgetError, match=r"drop old caches"):
        for _ in range(200):
            before = [(c.offset, c.nbytes) for c in cache]
            model(tokens, cache=cache)
    assert [(c.offset, c.nbytes) for c in cache] == before
    model(tokens[:, :3], cache=make_prompt_cache(model))


@pytest.mark.sampled
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next"])
def test_a_failed_call_leaves_its_caches_unchanged(written, family, monkeypatch):
    path = written(family)
    model, stock = streamed(path, "4GB"), load_model(path)[0]
    model.keeper.limit(1)
    tokens = mx.array([PROMPTS[1]])
    ours, theirs = make_prompt_cache(model), make_prompt_cache(stock)
    assert mx.array_equal(model(tokens, cache=ours), stock(tokens, cache=theirs))
    finish, n_left = Read.finish, 0

    def fail(read: Read) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise ExpertStoreError("[test] this read fails")
        finish(read)

    for part in (tokens[:, :9], tokens[:, :1]):
        for n_left in (0, 3):  # noqa: B007
            with monkeypatch.context() as patch:
                patch.setattr(Read, "finish", fail)
                with pytest.raises(ExpertStoreError, match="this read fails"):
                    model(part, cache=ours)
        assert mx.array_equal(model(part, cache=ours), stock(part, cache=theirs))


@pytest.mark.slow
def test_auto_tries_several_sizes_and_keeps_one(written, own_bytes, capsys):
    model, _ = moeflux_mlx.load(written("qwen3_moe"), memory="auto")
    said = capsys.readouterr().err
    assert said.count("moeflux: memory auto: ") == 1 and said.count("tokens/s") == 4
    assert model.streamer.n_slots in (16, 12, 8, 4)


BATCHED = ["qwen3_moe", "glm4_moe", "gpt_oss"]


@pytest.mark.sampled
@pytest.mark.parametrize("family", BATCHED)
def test_batches_get_stocks_tokens_through_one_slot(written, family, own_bytes):
    path = written(family)
    model, tokenizer = moeflux_mlx.load(path, memory=least_of(path) + (1 << 20))
    model.keeper.limit(1)
    stock, _ = mlx_lm.load(str(path))
    texts = [
        batch_generate(each, tokenizer, PROMPTS, max_tokens=6).texts
        for each in (stock, model)
    ]
    assert texts[0] == texts[1] and model.streamer.n_slots == 1


@pytest.mark.sampled
@pytest.mark.parametrize("family", BATCHED)
def test_served_batches_equal_prompts_served_alone(written, family, own_bytes):
    path = written(family)
    model = streamed(path, least_of(path) + (1 << 20))
    model.keeper.limit(2)
    wanted = [greedy(load_model(path)[0], p, N_TOKENS)[0] for p in PROMPTS]
    assert serve(model, PROMPTS) == [(tokens, None) for tokens in wanted]


def test_a_batch_too_large_ends_the_longest_and_no_other(written, own_bytes):
    """Each sequence's cache takes 131 kB; three fit."""
    path = written("qwen3_moe")
    model = streamed(path, "4GB")
    needs = model.keeper._needs
    own = needs.scratch_bytes(4, 256, 4) + needs.output_bytes(4)
    bound(model, 1, 7 * CACHE_STEP * needs.cache_row_bytes // 2, own)
    wanted = [greedy(load_model(path)[0], p, N_TOKENS)[0] for p in PROMPTS]
    found = serve(model, PROMPTS)
    failed = [error for _, error in found if error is not None]
    assert failed and all(isinstance(error, BudgetError) for error in failed)
    assert len(failed) < len(PROMPTS)
    for (tokens, _), right in zip(found, wanted, strict=True):
        assert tokens == right[: len(tokens)]


SERVER = """
import sys
import mlx.core as mx
import mlx_lm.server as server
import moeflux_mlx
from moeflux_mlx.memory.plan import own_bytes
mx.set_default_device(mx.cpu)

def load(path, **_):
    return *moeflux_mlx.load(path, memory=own_bytes() + (138 << 20)), {}

server.load = load
sys.argv = ["server", *sys.argv[1:]]
server.main()
"""


@pytest.mark.slow
def test_mlx_lms_server_serves_and_long_prompts_fail_alone(tmp_path, monkeypatch):
    import families
    import family_trials

    wide = {"num_key_value_heads": 4, "head_dim": 512, "max_position_embeddings": 9999}
    wide = {**families.FAMILIES["qwen3_moe"], **wide}
    monkeypatch.setitem(families.FAMILIES, "qwen3_moe", wide)
    path = tmp_path / "model"
    path.mkdir()
    family_trials.write_model(path, "qwen3_moe", 4)
    write_tokenizer(path, VOCAB)
    stock, tokenizer = mlx_lm.load(str(path))
    prompts = ["def", "x", "import it"]
    answers = {
        p: mlx_lm.generate(stock, tokenizer, p, max_tokens=N_TOKENS) for p in prompts
    }
    port, log = free_port(), tmp_path / "log"
    words = ["-c", SERVER, "--model", path, "--port", port]
    address = f"http://127.0.0.1:{port}"

    def ask(prompt: str) -> str:
        body = dict(prompt=prompt, max_tokens=N_TOKENS)
        return json.loads(post(address, "/v1/completions", **body))["choices"][0][
            "text"
        ]

    with running(log, *words, call=interpreted) as process:
        wait_until_healthy(address, process, log)
        for i in range(4):
            post(address, "/v1/completions", prompt=f"{i}" + "ab" * 130, max_tokens=2)
        status, message = refused(address, prompt="ab" * 3000, max_tokens=2)
        assert status == 503 and "[memory]" in message
        with ThreadPoolExecutor(3) as pool:
            assert dict(zip(prompts, pool.map(ask, prompts), strict=True)) == answers
    kept = re.findall(r"Prompt Cache: (\d+) sequences", log.read_text())
    assert int(kept[-1]) < 7


def test_all_entry_points_take_turns(written, own_bytes):
    path = written("qwen3_moe")
    model, stock = streamed(path, "4GB"), load_model(path)[0]
    mx.eval(model.parameters())
    model.keeper.limit(2)
    tokens = [mx.array([p]) for p in PROMPTS]
    ways = [lambda m, x: m(x), lambda m, x: m.model(x)]
    wanted = [[np.array(way(stock, x)) for x in tokens] for way in ways]
    same: list[bool] = []

    def work(i: int) -> None:
        for x, right in zip(tokens, wanted[i % 2], strict=True):
            same.append(np.array_equal(np.array(ways[i % 2](model, x)), right))
            model.streamer.resize(1 + i % 3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 16


def test_a_streamed_model_is_not_copied(written, own_bytes):
    model = streamed(written("qwen3_moe"), "4GB")
    for part in (model, model.model):
        with pytest.raises(ModelError, match=r"\[copy\]"):
            copy.deepcopy(part)


def test_floors_follow_the_routing_of_a_call(written):
    path = written("qwen3_moe")
    model = stream(load_model(path, lazy=True)[0], path, expert_memory="1GB")
    assert model.streamer._chosen == 2 and model.streamer.least_slots == 1
    assert model.streamer._table.floor == 2


@pytest.mark.parametrize("t", [1, 30, 300])
def test_predicted_growth_equals_that_of_caches(t):
    """Caches grow by whole steps of rows, and a window not beyond its length."""
    form = CacheForm(2 * 16 * 4, 0)
    for one, before in ((KVCache(), 0), (KVCache(), 250), (RotatingKVCache(64), 60)):
        if before:
            one.update_and_fetch(*[mx.zeros((1, 1, before, 16))] * 2)
        held = one.nbytes
        grown = caches.growth_bytes([None, one], [form], 1, t, t)
        one.update_and_fetch(*[mx.zeros((1, 1, t, 16))] * 2)
        assert one.nbytes - held <= grown <= one.nbytes - held + 256 * 128


@pytest.mark.parametrize("kind", [RotatingKVCache, ChunkedKVCache])
def test_growth_in_parts_is_a_window_and_the_rows_of_a_part(kind):
    """A long prompt is computed in parts; a window's cache keeps only the last ones."""
    one, form, t, step, held = kind(64), CacheForm(2 * 16 * 4, 0), 700, 100, []
    grown = caches.growth_bytes([one], [form], 1, t, step)
    for _ in range(0, t, step):
        if isinstance(one, ChunkedKVCache):
            one.maybe_trim_front()
        one.update_and_fetch(*[mx.zeros((1, 1, step, 16))] * 2)
        held.append(one.nbytes)
    assert grown == max(held)
