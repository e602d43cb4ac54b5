"""The drop-in model equals mlx-lm's, and streaming never changes a bit."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5_moe as stock
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.errors import BackendError, ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.files.reader import Read
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT

# Odd expert counts, top-k 1 to 10, one to three full attention layers, tied or not.
CONFIGS = {
    "e8-k2-every4": {},
    "e5-k1-every3-tied": dict(
        num_experts=5,
        num_experts_per_tok=1,
        full_attention_interval=3,
        tie_word_embeddings=True,
    ),
    "e13-k10-every2": dict(
        num_experts=13, num_experts_per_tok=10, full_attention_interval=2
    ),
    "e7-k3-every2-dense": dict(
        num_experts=7,
        num_experts_per_tok=3,
        full_attention_interval=2,
        num_hidden_layers=6,
    ),
    "e33-k4-heads-unnormalised": dict(
        num_experts=33,
        num_experts_per_tok=4,
        full_attention_interval=2,
        linear_num_value_heads=6,
        linear_num_key_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=32,
        norm_topk_prob=False,
        num_hidden_layers=3,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / request.param
    bits = None if request.param.endswith("dense") else 4
    seed = list(CONFIGS).index(request.param)
    return make_checkpoint(path, seed=seed, bits=bits, **CONFIGS[request.param])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    plain = make_checkpoint(tmp_path_factory.mktemp("tiny") / "plain", seed=7)
    target = plain.parent / "packed"
    pack(plain, target)
    return plain, target


def tokens(n: int, seed: int = 0, n_seqs: int = 1) -> mx.array:
    return mx.array(np.random.RandomState(seed).randint(1, 320, (n_seqs, n)))


def relative_rms(got: mx.array, expected: mx.array) -> float:
    error = mx.sqrt(mx.mean((got - expected) ** 2))
    return (error / mx.sqrt(mx.mean(expected**2))).item()


def greedy(model, tokenizer, n: int) -> list[int]:
    steps = mlx_lm.stream_generate(model, tokenizer, [5, 6, 7], max_tokens=n)
    return [step.token for step in steps]


@pytest.mark.slow
def test_200_greedy_tokens_are_those_of_mlx_lm(checkpoint):
    expected, tokenizer = mlx_lm.load(str(checkpoint))
    ours, _ = moeflux_mlx.load(checkpoint)
    tokenizer.eos_token_ids = set()
    assert greedy(ours, tokenizer, 200) == greedy(expected, tokenizer, 200)


@pytest.mark.sampled
def test_matrices_too_large_to_keep_unpacked_give_the_same(checkpoint, monkeypatch):
    unpacked, _ = moeflux_mlx.load(checkpoint)
    expected = unpacked(tokens(37))
    monkeypatch.setattr(device, "UNPACKED_SHARE", 0)
    ours, _ = moeflux_mlx.load(checkpoint)
    assert relative_rms(ours(tokens(37)), expected) < 1e-5


@pytest.mark.sampled
@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65, 130])
def test_logits_are_within_1e_4_of_mlx_lm(checkpoint, n_tokens):
    expected, _ = mlx_lm.load(str(checkpoint))
    ours, _ = moeflux_mlx.load(checkpoint)
    a, b = make_prompt_cache(expected), make_prompt_cache(ours)
    prompt = tokens(n_tokens)
    assert relative_rms(ours(prompt, cache=b), expected(prompt, cache=a)) < 1e-4
    step = tokens(1, seed=3)
    assert relative_rms(ours(step, cache=b), expected(step, cache=a)) < 1e-4


def test_a_call_without_a_cache_gives_the_logits_of_one_with_a_cache(packed):
    ours, _ = moeflux_mlx.load(packed[1])
    prompt = tokens(37)
    with_cache = ours(prompt, cache=make_prompt_cache(ours))
    assert mx.array_equal(ours(prompt), with_cache)


def test_a_prompt_in_pieces_leaves_the_state_of_one_in_whole(packed):
    ours, _ = moeflux_mlx.load(packed[1])
    prompt = tokens(131)
    whole, pieces = make_prompt_cache(ours), make_prompt_cache(ours)
    expected = ours(prompt, cache=whole)[:, -1]
    for start, stop in ((0, 64), (64, 65), (65, 131)):
        got = ours(prompt[:, start:stop], cache=pieces)[:, -1]
    assert relative_rms(got, expected) < 1e-5


def logits_at(path, memory, n_tokens, scope="global", warm_seed=None):
    model, _ = moeflux_mlx.load(path, expert_memory=memory, scope=scope)
    if warm_seed is not None:
        model(tokens(9, seed=warm_seed))
    cache = make_prompt_cache(model)
    parts = [model(tokens(n_tokens), cache=cache)]
    parts += [model(tokens(1, seed=s), cache=cache) for s in range(3)]
    logits = mx.concatenate(parts, axis=1)
    mx.eval(logits)
    return logits, model.streamer


def memory_for(path, n_slots: int) -> int:
    with PackedExperts.open(path) as store:
        return n_slots * store.layout(0).stride + POOL_ALIGNMENT


def minimum_memory(path) -> int:
    with PackedExperts.open(path) as store:
        return memory_for(path, store.top_k)


@pytest.mark.sampled
@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65, 500])
def test_any_budget_gives_the_same_bits(packed, n_tokens):
    path = packed[1]
    expected, streamer = logits_at(path, None, n_tokens)
    assert streamer.resident
    for n_slots in (2, 3, 7, 19):
        got, streamer = logits_at(path, memory_for(path, n_slots), n_tokens)
        assert streamer.n_slots == n_slots
        assert streamer.stats.total.misses > 0
        assert mx.array_equal(got, expected), f"{n_slots} slots"


@pytest.mark.sampled
@pytest.mark.parametrize("warm_seed", [1, 2, 3])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_any_history_of_evictions_gives_the_same_bits(packed, scope, warm_seed):
    path = packed[1]
    expected, _ = logits_at(path, None, 20)
    got, streamer = logits_at(path, memory_for(path, 12), 20, scope, warm_seed)
    assert not streamer.resident
    assert mx.array_equal(got, expected)


@pytest.mark.sampled
@pytest.mark.parametrize("n_slots", [2, 3, 19, 31])
def test_a_chunk_of_a_prompt_reads_no_expert_twice(packed, n_slots, monkeypatch):
    model, _ = moeflux_mlx.load(packed[1], expert_memory=memory_for(packed[1], n_slots))
    cache, read, finish = make_prompt_cache(model), [], Read.finish

    def note(self):
        read.append((self.layer, self.expert))
        finish(self)

    monkeypatch.setattr(Read, "finish", note)
    for seed in range(3):
        read.clear()
        mx.eval(model(tokens(130, seed=seed), cache=cache))
        assert read
        assert len(set(read)) == len(read)


def test_every_read_back_of_routing_is_counted_under_its_label(packed):
    model, _ = moeflux_mlx.load(packed[1], expert_memory=minimum_memory(packed[1]))
    stats, n_layers = model.runtime.executor.stats, len(model.layers)
    stats.reset()
    mx.eval(model(tokens(1)))
    assert stats.snapshot()["routing"].count == n_layers
    assert stats.snapshot()["routing"].wait_ns > 0


def test_streamed_logits_equal_those_of_the_plain_checkpoint(packed):
    plain, _ = moeflux_mlx.load(packed[0])
    assert plain.streamer is None
    streamed, _ = logits_at(packed[1], minimum_memory(packed[1]), 40)
    cache = make_prompt_cache(plain)
    parts = [plain(tokens(40), cache=cache)]
    parts += [plain(tokens(1, seed=s), cache=cache) for s in range(3)]
    assert mx.array_equal(mx.concatenate(parts, axis=1), streamed)


def test_lazy_logits_of_two_sequences_survive_each_others_evictions(packed):
    model, _ = moeflux_mlx.load(packed[1], expert_memory=minimum_memory(packed[1]))
    first, second = tokens(3, seed=1), tokens(3, seed=2)
    expected = [mx.array(model(t)) for t in (first, second)]
    mx.eval(expected)
    got = [model(first), model(second)]
    assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_names_of_weights_and_types_of_caches_are_mlx_lms(checkpoint):
    expected, _ = mlx_lm.load(str(checkpoint))
    ours, _ = moeflux_mlx.load(checkpoint)
    names = {name: p.shape for name, p in tree_flatten(expected.parameters())}
    assert {name: p.shape for name, p in tree_flatten(ours.parameters())} == names
    kinds = [type(c) for c in make_prompt_cache(expected)]
    assert [type(c) for c in make_prompt_cache(ours)] == kinds
    assert len(ours.layers) == len(expected.layers)
    assert isinstance(ours, stock.Model)
    path = "language_model.model.layers.0.mlp.gate"
    assert ours.quant_predicate(path, None) == expected.quant_predicate(path, None)


def test_a_prompt_cache_saved_and_loaded_goes_on_where_it_was(packed, tmp_path):
    model, _ = moeflux_mlx.load(packed[1], expert_memory=minimum_memory(packed[1]))
    cache = make_prompt_cache(model)
    mx.eval(model(tokens(21), cache=cache))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    expected = model(tokens(1, seed=9), cache=cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert mx.array_equal(model(tokens(1, seed=9), cache=loaded), expected)


def test_a_prompt_cache_of_mlx_lm_is_taken_over(packed, tmp_path):
    theirs, _ = mlx_lm.load(str(packed[0]))
    ours, _ = moeflux_mlx.load(packed[1])
    cache = make_prompt_cache(theirs)
    mx.eval(theirs(tokens(21), cache=cache))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    expected = theirs(tokens(1, seed=9), cache=cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert relative_rms(ours(tokens(1, seed=9), cache=loaded), expected) < 1e-4


def test_trimming_a_cache_of_full_attention_forgets_the_last_tokens(tmp_path):
    plain = make_checkpoint(tmp_path / "full", bits=None, full_attention_interval=1)
    ours, _ = moeflux_mlx.load(plain)
    cache = make_prompt_cache(ours)
    mx.eval(ours(tokens(12), cache=cache))
    mx.eval(ours(tokens(3, seed=5), cache=cache))
    assert trim_prompt_cache(cache, 3) == 3
    fresh = make_prompt_cache(ours)
    mx.eval(ours(tokens(12), cache=fresh))
    step = tokens(1, seed=9)
    assert mx.array_equal(ours(step, cache=cache), ours(step, cache=fresh))


def test_a_quantised_kv_cache_gives_mlx_lms_logits(packed):
    theirs, _ = mlx_lm.load(str(packed[0]))
    ours, _ = moeflux_mlx.load(packed[1])
    logits = []
    for model in (theirs, ours):
        cache = make_prompt_cache(model)
        mx.eval(model(tokens(40), cache=cache))
        cache = [
            c.to_quantized(group_size=32, bits=8) if hasattr(c, "to_quantized") else c
            for c in cache
        ]
        logits.append(model(tokens(5, seed=4), cache=cache))
    assert relative_rms(logits[1], logits[0]) < 1e-3


def test_input_embeddings_take_the_place_of_tokens(packed):
    ours, _ = moeflux_mlx.load(packed[1])
    prompt = tokens(11)
    rows = ours.model.embed_tokens(prompt)
    assert relative_rms(ours(prompt, input_embeddings=rows), ours(prompt)) < 1e-5


def test_replaced_weights_are_used_at_the_next_call(packed):
    ours, _ = moeflux_mlx.load(packed[1])
    before = ours(tokens(4))
    norm = ours.model.layers[0].input_layernorm
    norm.weight = norm.weight * 2
    assert relative_rms(ours(tokens(4)), before) > 1e-3


@pytest.mark.parametrize("bad", [-1, 320, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_refused(packed, bad):
    ours, _ = moeflux_mlx.load(packed[1])
    with pytest.raises(ModelError, match=rf"from 0 to 319 but got {bad}"):
        ours(mx.array([[1, bad]]))
    assert ours(tokens(3)).shape == (1, 3, 320)


def test_tokens_that_are_no_integers_are_refused(packed):
    ours, _ = moeflux_mlx.load(packed[1])
    with pytest.raises(ModelError, match="integer"):
        ours(mx.zeros((1, 3)))


def test_an_unknown_executor_is_refused_by_name(packed):
    with pytest.raises(BackendError, match="'warp'"):
        moeflux_mlx.load(packed[1], executor="warp")


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        moeflux_mlx.load(tmp_path)


def test_a_model_that_is_not_of_its_type_is_refused_by_name(tmp_path):
    plain = make_checkpoint(tmp_path / "plain", num_hidden_layers=1)
    config = plain / "config.json"
    config.write_text(config.read_text().replace('"qwen3_5_moe"', '"llama"'))
    with pytest.raises(ModelError, match="'llama'"):
        moeflux_mlx.load(plain)
