"""Saved states restore all of a run, or nothing with an error that says why."""

from __future__ import annotations

import dataclasses
import json
import os
import struct

import mlx.core as mx
import numpy as np
import pytest
import xxhash
from commands import moeflux as command
from mlx_lm.models.cache import ConcatenateKVCache, make_prompt_cache
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx import CacheCheckpoint, load_state, save_state
from moeflux_mlx.cli import main as moeflux
from moeflux_mlx.errors import BudgetError, StateError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.safetensors import parse_header

PROMPT = [7, 31, 200, 5, 90, 90, 12, 250, 1, 66]
FOLLOW_UP = [44, 3, 101]


@pytest.fixture(scope="module")
def model(packed, budget):
    return moeflux_mlx.load(packed, expert_memory=budget)[0]


def continued(model, cache, tokens, n_tokens=12):
    """Return greedy tokens after ``tokens``; all of them go into the cache."""
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
    """The path of a saved state."""
    cache, tokens = run(model)
    save_state(tmp_path / "state", model, cache, tokens)
    return tmp_path / "state"


def test_a_run_continues_as_if_it_had_never_stopped(packed, budget, model, tmp_path):
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


def rewrite(path, change, checksum="right"):
    """Write a state with changes, by hand; its checksum is right but for ``old``."""
    with open(path, "rb") as file:
        entries, about = parse_header(path, file)
        data = path.read_bytes()
    tensors = {
        name: (e.dtype, list(e.shape), data[e.offset : e.offset + e.n_bytes])
        for name, e in entries.items()
    }
    change(tensors, about)
    if checksum == "right":
        rest = {k: v for k, v in about.items() if k != "checksum"}
        digest = xxhash.xxh3_64(json.dumps(rest, sort_keys=True).encode())
        for name in sorted(tensors):
            dtype, shape, raw = tensors[name]
            digest.update(f"{name} {dtype} {tuple(shape)}\n".encode() + raw)
        about["checksum"] = digest.hexdigest()
    fields, begin = {"__metadata__": about}, 0
    for name, (dtype, shape, raw) in tensors.items():
        end = begin + len(raw)
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(fields).encode()
    raws = b"".join(raw for _, _, raw in tensors.values())
    changed = path.with_name("changed")
    changed.write_bytes(struct.pack("<Q", len(header)) + header + raws)
    return changed


def layers(about, index, **fields):
    found = json.loads(about["layers"])
    found[index].update(fields)
    about["layers"] = json.dumps(found)


def experts(tensors, rows):
    raw = np.array(rows, np.int32).tobytes()
    tensors["experts"] = ("I32", [len(rows), 2], raw)


def test_a_state_rewritten_unchanged_is_the_same_state(model, saved):
    state = load_state(rewrite(saved, lambda *_: None), model)
    assert state.tokens == load_state(saved, model).tokens


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t, a: layers(a, 3, n_parts=10**12), "layer 3: fields"),
        (lambda t, a: layers(a, 3, offset=-1), "layer 3: fields"),
        (lambda t, a: layers(a, 3, kind="ArraysCache"), "layer 3: kind one of"),
        (lambda t, a: layers(a, 0, kind="KVCache"), "layer 0: kind one of"),
        (lambda t, a: layers(a, 3, kind=["KVCache"]), "layer 3: kind one of"),
        (lambda t, a: layers(a, 3, kind="QuantizedKVCache"), "layer 3: fields"),
        *[
            (
                lambda t, a, b=bits, g=group: layers(
                    a, 3, kind="QuantizedKVCache", bits=b, group_size=g
                ),
                error,
            )
            for bits, group, error in [
                (0, 32, "layer 3: bits one of .* but got 0"),
                (True, 32, "layer 3: bits one of"),
                (3, 32, "layer 3: bits one of"),
                (8, 0, r"layer 3: group_size one of .* but got 0"),
                (8, 64, "layer 3: group_size a divisor of 32 but got 64"),
                (8, 32, "expected tensors"),
            ]
        ],
        (lambda t, a: t.pop("experts"), "expected tensors"),
        (lambda t, a: t.pop("tokens"), "expected 1 to 4096 tokens"),
        (lambda t, a: t.update(more=t["tokens"]), "expected tensors"),
        (lambda t, a: t.update(tokens=("U32", [0], b"")), "1 to 4096 tokens"),
        (lambda t, a: t.update(tokens=("U32", [], bytes(4))), "1 to 4096 tokens"),
        (lambda t, a: t.update(tokens=("U32", [5000], bytes(20000))), "1 to 4096"),
        (
            lambda t, a: t.update(tokens=("U32", [21], bytes(84))),
            r"shape of layers.3.0",
        ),
        (
            lambda t, a: t.update(tokens=("U32", [22], b"\x40\1\0\0" * 22)),
            "tokens less than 320 but got 320",
        ),
        (lambda t, a: t.update(tokens=("I32", *t["tokens"][1:])), "type of tokens"),
        (lambda t, a: experts(t, [(1, 2)] * 2), "experts each once but got one twice"),
        (lambda t, a: experts(t, [(4, 0)]), "experts of this model"),
        (lambda t, a: experts(t, [(0, -1)]), "experts of this model"),
        (lambda t, a: experts(t, [(1, 2)] * 33), "shape of experts"),
        (lambda t, a: t.update(experts=("U32", *t["experts"][1:])), "type of experts"),
        *[
            (
                lambda t, a, n=name: t.update({n: ("F16", [1, 1], bytes(2))}),
                f"shape of {name}",
            )
            for name in ("layers.0.0", "layers.0.1", "layers.3.0", "layers.3.1")
        ],
        (
            lambda t, a: t.update({"layers.3.0": ("U32", *t["layers.3.0"][1:])}),
            "type of layers.3.0",
        ),
        (
            lambda t, a: t.update({"layers.0.0": ("I32", *t["layers.0.0"][1:])}),
            "type of layers.0.0",
        ),
    ],
)
def test_a_state_that_does_not_fit_the_model_changes_nothing(
    model, saved, change, error
):
    held = model.streamer.held
    with pytest.raises(StateError, match=error) as caught:
        load_state(rewrite(saved, change), model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert model.streamer.held == held
    assert continued(model, load_state(saved, model).cache, FOLLOW_UP, 2)


def test_the_size_that_a_state_claims_is_not_trusted(model, saved):
    # A sparse file of this size takes no disk space.
    n_bytes = 1 << 40
    path = rewrite(
        saved, lambda t, a: t.update({"layers.3.0": ("F32", [n_bytes // 4], b"")})
    )
    data = path.read_bytes()
    n_header = struct.unpack("<Q", data[:8])[0]
    fields = json.loads(data[8 : 8 + n_header])
    fields["layers.3.0"]["data_offsets"] = [1 << 30, (1 << 30) + n_bytes]
    header = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, n_bytes + (1 << 31))
    with pytest.raises(StateError, match=r"shape of layers.3.0"):
        load_state(path, model)


def test_a_state_larger_than_memory_is_not_read(packed, saved):
    small = moeflux_mlx.load(packed, memory="2GB")[0]
    keeper = small.runtime.keeper
    keeper.plan = dataclasses.replace(keeper.plan, budget_bytes=1 << 20)
    n_slots = small.streamer.n_slots
    with pytest.raises(BudgetError, match=r"\[memory\]"):
        load_state(saved, small)
    assert small.streamer.n_slots == n_slots


def test_another_thing_in_place_of_a_state_file_is_an_error(model, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo", tmp_path / "device", tmp_path):
        with pytest.raises(StateError, match=f"cannot read {path}: .*regular file"):
            load_state(path, model)


@pytest.mark.sampled
@pytest.mark.parametrize("wrong", [None, 0, 3, True, 1.5, b"state", ["state"]])
def test_arguments_of_other_types_are_refused(wrong, model, tmp_path):
    cache, tokens = run(model)
    with pytest.raises(StateError, match=r"expected the path of a file but got"):
        save_state(wrong, model, cache, tokens)
    with pytest.raises(StateError, match=r"expected the path of a file but got"):
        load_state(wrong, model)
    path = tmp_path / "state"
    with pytest.raises(StateError, match=r"list of caches|number of layers 4 but"):
        save_state(path, model, wrong, tokens)
    with pytest.raises(StateError, match=r"list of caches|layer 0: cannot go back"):
        CacheCheckpoint.take(wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_for_its_owner_alone(saved):
    assert saved.stat().st_mode & 0o777 == 0o600


def test_invalid_tokens_are_refused(model, tmp_path):
    cache, tokens = run(model)
    for wrong in ([-1], [320], [2**32], [10**30], ["1"], [1.5], [None], [[1]]):
        with pytest.raises(StateError, match="expected token ids from 0 to 319 but"):
            save_state(tmp_path / "state", model, cache, tokens[:-1] + wrong)
    for wrong in (None, 3, "abc", 1.5, mx.array([tokens]), {}, iter(tokens)):
        with pytest.raises(StateError, match="expected token ids"):
            save_state(tmp_path / "state", model, cache, wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("format", "other", "expected format moeflux-state but got other"),
        ("version", "1", "expected version 2 but got 1: save the state again"),
        ("version", "3", "expected version 2 but got 3"),
        ("checksum", "0", "damaged: its checksum is another"),
        ("more", "0", "damaged: its checksum is another"),
        ("layers", "[]", "expected number of layers 4 but got 0"),
        ("layers", "[{}, {}, {}, {}]", r"layer 0: kind one of .* but got None"),
        ("layers", "nonsense", "is damaged"),
        ("layers", "[" * 100_000, "is damaged: expected at most 64 levels"),
        ("layers", "[" + "9" * 5000 + "]", "is damaged: expected an integer"),
        ("layers", "{}", "expected layers a list"),
    ],
)
def test_a_state_with_changed_metadata_is_refused(model, saved, key, value, error):
    path = rewrite(saved, lambda tensors, about: about.update({key: value}), "old")
    with pytest.raises(StateError, match=error):
        load_state(path, model)


def test_a_changed_byte_is_noticed(model, saved):
    raw = bytearray(saved.read_bytes())
    raw[-5] ^= 1
    saved.write_bytes(raw)
    with pytest.raises(StateError, match="damaged: its checksum"):
        load_state(saved, model)


@pytest.mark.sampled
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
        save_state(tmp_path / "state", model, make_prompt_cache(model), tokens)
    kind = [ConcatenateKVCache() for _ in cache]
    with pytest.raises(StateError, match="but got ConcatenateKVCache: use caches"):
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


def test_tokens_can_be_undone_repeatedly(model):
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


def test_removed_tokens_cannot_be_restored(model):
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
    quiet = ("--ignore-chat-template", "--verbose", "False", "-m", 8)
    return command("generate", "--model", model, *quiet, *flags)


def test_generate_continues_from_a_file(packed, tmp_path):
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


def test_a_state_file_that_is_missing_ends_in_one_clear_line(packed, tmp_path, capsys):
    path = str(tmp_path / "nowhere")
    assert moeflux(["generate", "--model", str(packed), "--load-state", path]) == 2
    *decisions, error = capsys.readouterr().err.splitlines()
    assert path in error and "[state]" in error
    told = ("experts read into memory", "before loading ")
    assert all(any(words in line for words in told) for line in decisions)
