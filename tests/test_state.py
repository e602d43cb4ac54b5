"""Saved states: all of a run comes back, or nothing and an error that says why."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ConcatenateKVCache, make_prompt_cache
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx import CacheCheckpoint, load_state, save_state
from moeflux_mlx.cli import main as moeflux
from moeflux_mlx.errors import StateError
from moeflux_mlx.experts.pack import pack

PROMPT = [7, 31, 200, 5, 90, 90, 12, 250, 1, 66]
FOLLOW_UP = [44, 3, 101]


@pytest.fixture(scope="module")
def model(packed, budget):
    return moeflux_mlx.load(packed, expert_memory=budget)[0]


def continued(model, cache, tokens, n_tokens=12):
    """Greedy tokens after ``tokens``; every one of them goes into the cache."""
    found = []
    for _ in range(n_tokens):
        logits = model(mx.array([tokens]), cache=cache)
        tokens = [int(mx.argmax(logits[0, -1]))]
        found += tokens
    model(mx.array([tokens]), cache=cache)
    return found


def run(model):
    """A run so far: its caches and every token in them."""
    cache = make_prompt_cache(model)
    return cache, PROMPT + continued(model, cache, PROMPT)


@pytest.fixture
def saved(model, tmp_path):
    """The file of a state."""
    cache, tokens = run(model)
    save_state(tmp_path / "state", model, cache, tokens)
    return tmp_path / "state"


def test_a_run_goes_on_as_if_it_had_never_stopped(packed, budget, model, tmp_path):
    cache, tokens = run(model)
    save_state(tmp_path / "state", model, cache, tokens)
    held = model.streamer.held
    expected = continued(model, cache, FOLLOW_UP)
    fresh = moeflux_mlx.load(packed, expert_memory=budget)[0]
    state = load_state(tmp_path / "state", fresh)
    assert state.tokens == tokens
    assert [type(c) for c in state.cache] == [type(c) for c in cache]
    assert fresh.streamer.held == held
    assert fresh.streamer.stats.total.preloaded == len(held)
    assert fresh.streamer.stats.total.misses == 0
    assert continued(fresh, state.cache, FOLLOW_UP) == expected


def test_logits_after_loading_are_the_same_bits(packed, model, saved):
    state, again = load_state(saved, model), load_state(saved, model)
    whole = moeflux_mlx.load(packed)[0]
    expected = model(mx.array([FOLLOW_UP]), cache=state.cache)
    assert whole.streamer.resident
    found = whole(mx.array([FOLLOW_UP]), cache=again.cache)
    assert mx.array_equal(found, expected)
    assert mx.array_equal(
        found, whole(mx.array([FOLLOW_UP]), cache=load_state(saved, whole).cache)
    )


def test_a_state_of_the_plain_checkpoint_serves_its_pack(checkpoint, model, tmp_path):
    plain = moeflux_mlx.load(checkpoint)[0]
    cache, tokens = run(plain)
    save_state(tmp_path / "state", plain, cache, tokens)
    state = load_state(tmp_path / "state", model)
    expected = continued(plain, cache, FOLLOW_UP)
    assert continued(model, state.cache, FOLLOW_UP) == expected


def test_fewer_slots_take_as_many_experts_of_each_layer(packed, saved, model):
    slot = model.streamer.slot_bytes
    memory = model.streamer.memory_bytes - (model.streamer.n_slots - 6) * slot
    small = moeflux_mlx.load(packed, expert_memory=memory)[0]
    load_state(saved, small)
    layers = [layer for layer, _ in small.streamer.held]
    assert len(layers) == 6 and max(map(layers.count, layers)) == 2


def test_quantised_caches_are_kept_too(model, tmp_path):
    cache, tokens = run(model)
    cache = [c.to_quantized(32, 8) if hasattr(c, "to_quantized") else c for c in cache]
    save_state(tmp_path / "state", model, cache, tokens)
    state = load_state(tmp_path / "state", model)
    got = model(mx.array([FOLLOW_UP]), cache=state.cache)
    assert mx.array_equal(got, model(mx.array([FOLLOW_UP]), cache=cache))


def test_a_state_of_another_model_is_refused(saved, tmp_path):
    path = make_checkpoint(tmp_path / "other", seed=1)
    pack(path, tmp_path / "other-packed")
    other = moeflux_mlx.load(tmp_path / "other-packed")[0]
    with pytest.raises(StateError, match=r"expected model .* but got"):
        load_state(saved, other)


def rewrite(path, change):
    tensors, about = mx.load(str(path), format="safetensors", return_metadata=True)
    change(tensors, about)
    mx.eval(tensors)
    mx.save_safetensors(str(path) + ".safetensors", tensors, about)
    return path.with_name(path.name + ".safetensors")


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("format", "other", "expected format moeflux-state but got other"),
        ("version", "2", "expected version 1 but got 2"),
        ("checksum", "0", "damaged: its checksum is another"),
        ("layers", "[]", "expected number of layers 4 but got 0"),
        ("layers", "[{}]", "is damaged"),
        ("layers", "nonsense", "is damaged"),
    ],
)
def test_what_is_not_as_written_is_refused(model, saved, key, value, error):
    path = rewrite(saved, lambda tensors, about: about.update({key: value}))
    with pytest.raises(StateError, match=error):
        load_state(path, model)


def test_a_changed_byte_is_noticed(model, saved):
    raw = bytearray(saved.read_bytes())
    raw[-5] ^= 1
    saved.write_bytes(raw)
    with pytest.raises(StateError, match="damaged: its checksum"):
        load_state(saved, model)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_changes_nothing(packed, budget, saved, kept):
    fresh = moeflux_mlx.load(packed, expert_memory=budget)[0]
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(StateError, match=str(saved)):
        load_state(saved, fresh)
    assert fresh.streamer.held == []


def test_a_missing_file_is_named(model, tmp_path):
    with pytest.raises(StateError, match=str(tmp_path / "nowhere")):
        load_state(tmp_path / "nowhere", model)


def test_tokens_that_are_not_the_caches_are_refused(model, tmp_path):
    cache, tokens = run(model)
    with pytest.raises(StateError, match=f"tokens {len(tokens) - 1} but got"):
        save_state(tmp_path / "state", model, cache, tokens[1:])
    with pytest.raises(StateError, match="expected number of layers 4 but got 3"):
        save_state(tmp_path / "state", model, cache[1:], tokens)
    with pytest.raises(StateError, match="layer 0: expected a cache with tokens"):
        save_state(tmp_path / "state", model, make_prompt_cache(model), [])
    kind = [ConcatenateKVCache() for _ in cache]
    with pytest.raises(StateError, match="cannot keep a cache of ConcatenateKVCache"):
        save_state(tmp_path / "state", model, kind, tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_state(model, saved, tmp_path):
    cache, tokens = run(model)
    before = saved.read_bytes()
    with pytest.raises(StateError, match="cannot write"):
        save_state(tmp_path / "none" / "state", model, cache, tokens)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StateError, match="cannot write"):
        save_state(tmp_path / "folder", model, cache, tokens)
    assert saved.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"state", "folder"}


def test_tokens_can_be_taken_back_as_often_as_wanted(model):
    cache, _ = run(model)
    point = CacheCheckpoint.take(cache)
    first = continued(model, cache, FOLLOW_UP)
    for _ in range(2):
        point.restore()
        assert continued(model, cache, FOLLOW_UP) == first


def test_the_state_after_going_back_is_the_state_before(model):
    cache, _ = run(model)
    before = [np.array(x) for c in cache[:3] for x in c.cache]
    offset = cache[3].offset
    point = CacheCheckpoint.take(cache)
    continued(model, cache, FOLLOW_UP)
    point.restore()
    assert cache[3].offset == offset
    after = [np.array(x) for c in cache[:3] for x in c.cache]
    assert all(map(np.array_equal, before, after))


def test_one_cannot_go_back_to_what_is_gone(model):
    cache, _ = run(model)
    point = CacheCheckpoint.take(cache)
    cache[3].trim(2)
    states = [c.cache for c in cache[:3]]
    with pytest.raises(StateError, match=r"layer 3: expected .* tokens or more"):
        point.restore()
    assert [c.cache for c in cache[:3]] == states
    cache[3] = make_prompt_cache(model)[3]
    with pytest.raises(StateError, match="layer 3: expected the cache of that time"):
        point.restore()


def generate(model, *flags):
    command = [sys.executable, "-m", "moeflux_mlx.cli", "generate", "--model", model]
    command += ["--ignore-chat-template", "--verbose", "False", "-m", "8", *flags]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False
    )


def test_generate_goes_on_from_a_file(packed, tmp_path):
    file = tmp_path / "state"
    first = generate(packed, "--prompt", "def f", "--save-state", file)
    assert first.returncode == 0, first.stderr
    second = generate(packed, "--prompt", "(x):", "--load-state", file)
    assert second.returncode == 0, second.stderr
    model, tokenizer = moeflux_mlx.load(packed)
    state = load_state(file, model)
    assert state.tokens[:5] == tokenizer.encode("def f") and len(state.tokens) == 13
    options = {"max_tokens": 8, "prompt_cache": state.cache}
    expected = moeflux_mlx.generate(model, tokenizer, "(x):", **options)
    assert second.stdout == expected + "\n"


@pytest.mark.parametrize("flag", ["--prompt-cache-file", "--draft-model"])
def test_a_state_goes_with_no_other_cache(packed, tmp_path, capsys, flag):
    flags = ["--save-state", str(tmp_path / "state"), flag, "other"]
    assert moeflux(["generate", "--model", str(packed), *flags]) == 2
    assert f"expected {flag} or a state but got both" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_a_state_file_that_is_missing_is_one_clear_line(packed, tmp_path, capsys):
    path = str(tmp_path / "nowhere")
    assert moeflux(["generate", "--model", str(packed), "--load-state", path]) == 2
    *decisions, error = capsys.readouterr().err.splitlines()
    assert path in error and "[state]" in error
    assert all("experts read into memory" in line for line in decisions)
