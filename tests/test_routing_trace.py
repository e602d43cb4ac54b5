"""Routing traces: the real choices of routers, and files that are checked."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step

import moeflux_mlx
from moeflux_mlx.cli import main
from moeflux_mlx.errors import ConfigError, ModelError, TraceError
from moeflux_mlx.experts.pool.policy import LRU
from moeflux_mlx.experts.pool.routing_trace import RoutingTrace
from moeflux_mlx.measure import record_routing

PROMPT = [5, 17, 60, 3, 44, 44, 9]
N_TOKENS = 12


@pytest.fixture(scope="module")
def trace(checkpoint):
    model, _ = moeflux_mlx.load(checkpoint)
    return record_routing(model, PROMPT, max_tokens=N_TOKENS)


class Listening:
    """Stands in for a stock model's experts and records their requests."""

    def __init__(self, experts, heard):
        self.experts, self.heard = experts, heard

    def __call__(self, x, indices):
        self.heard.append(np.array(indices[0]))
        return self.experts(x, indices)


def test_a_trace_holds_the_choices_of_stocks_routers(checkpoint, trace):
    model, _ = mlx_lm.load(str(checkpoint))
    heard = [[] for _ in trace.layers]
    for layer, kept in zip(model.layers, heard, strict=True):
        layer.mlp.switch_mlp = Listening(layer.mlp.switch_mlp, kept)
    for _ in generate_step(mx.array(PROMPT), model, max_tokens=N_TOKENS):
        pass
    chosen = np.stack([np.concatenate(kept) for kept in heard], axis=1)
    # Stock mlx-lm does not order the experts of a token.
    assert np.sort(trace.chosen).tolist() == np.sort(chosen).tolist()
    assert trace.passes.tolist() == [len(PROMPT) - 1, 1] + [1] * N_TOKENS
    assert trace.n_prompt_tokens == len(PROMPT)
    assert trace.layers == (0, 1, 2, 3)
    assert (trace.n_experts, trace.top_k) == (8, 2)


def test_streamed_models_are_traced_alike(packed, budget, trace):
    model, _ = moeflux_mlx.load(packed, expert_memory=budget)
    with model.streamer as streamer:
        assert not streamer.resident
        streamed = record_routing(model, PROMPT, max_tokens=N_TOKENS)
        layouts = [model.runtime.store.layout(layer) for layer in trace.layers]
    assert streamed.chosen.tolist() == trace.chosen.tolist()
    assert streamed.passes.tolist() == trace.passes.tolist()
    assert streamed.record_bytes == tuple(layout.record_bytes for layout in layouts)
    assert model.runtime.executor.observer is None


def test_likely_experts_are_those_announced_to_the_streamer(packed, budget, trace):
    model, _ = moeflux_mlx.load(packed, expert_memory=budget, read_ahead="on")
    told = []
    with model.streamer as streamer:
        foresee = streamer.begin_read_ahead

        def listening(layer, indices):
            told.append((layer, np.array(indices).ravel().tolist()))
            foresee(layer, indices)

        streamer.begin_read_ahead = listening
        for _ in generate_step(mx.array(PROMPT), model, max_tokens=N_TOKENS):
            pass
    assert trace.likely.shape == (1 + N_TOKENS, 3, 2)
    flat = trace.likely.reshape(-1, 2).tolist()
    assert told == list(zip([1, 2, 3] * (1 + N_TOKENS), flat, strict=True))
    rows = list(trace.predicted())
    assert rows[0] is None
    assert rows[1:] == [[[], *map(sorted, token)] for token in trace.likely.tolist()]


def test_generation_ends_at_an_end_of_text_token(checkpoint, trace):
    model, _ = moeflux_mlx.load(checkpoint)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=N_TOKENS)
    tokens = [token for token, _ in steps]
    found = record_routing(model, PROMPT, max_tokens=N_TOKENS, eos_tokens={tokens[3]})
    # The pass of the token after it had begun.
    n = len(PROMPT) + tokens.index(tokens[3]) + 1
    assert found.chosen.tolist() == trace.chosen[:n].tolist()


def test_needed_and_counts_agree(trace):
    counts = np.zeros((4, 8), int)
    first = 0
    for n_tokens, layers in trace.needed():
        for row, needed in enumerate(layers):
            chosen = trace.chosen[first : first + n_tokens, row].ravel().tolist()
            assert needed == sorted(set(chosen))
            for expert in chosen:
                counts[row, expert] += 1
        first += n_tokens
    assert first == trace.n_tokens
    assert counts.tolist() == trace.counts().tolist()


@pytest.mark.parametrize("n_experts", [8, 300])
def test_a_file_restores_the_saved_trace(trace, tmp_path, n_experts):
    path = tmp_path / "any name"
    replace(trace, n_experts=n_experts).save(path)
    found = RoutingTrace.load(path)
    assert found.n_experts == n_experts
    assert found.chosen.dtype == (np.uint8 if n_experts == 8 else np.uint16)
    assert found.chosen.tolist() == trace.chosen.tolist()
    assert found.passes.tolist() == trace.passes.tolist()
    assert found.likely.dtype == found.chosen.dtype
    assert found.likely.tolist() == trace.likely.tolist()
    for name in ("model_type", "layers", "record_bytes", "n_prompt_tokens"):
        assert getattr(found, name) == getattr(trace, name)


@pytest.fixture(scope="module")
def saved(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "trace.npz"
    trace.save(path)
    return path


@settings(max_examples=150)
@given(data=st.data())
def test_damage_is_an_error_or_changes_nothing(saved, trace, data):
    raw = bytearray(saved.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw = raw[:at]
    else:
        raw[at] ^= data.draw(st.integers(1, 255))
    path = saved.with_name("damaged.npz")
    path.write_bytes(raw)
    try:
        found = RoutingTrace.load(path)
    except TraceError as error:
        assert str(path) in str(error)
    else:
        # Zip files have fields that no reader uses.
        assert found.chosen.tolist() == trace.chosen.tolist()
        assert found.passes.tolist() == trace.passes.tolist()
        assert found.likely is None or found.likely.tolist() == trace.likely.tolist()
        assert found.layers == trace.layers


def arrays(path):
    with np.load(path) as archive:
        return dict(archive)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("header"),
        lambda a: a.pop("chosen"),
        lambda a: a.update(header=np.array("[]")),
        lambda a: a.update(header=np.array("{")),
        lambda a: edit(a, version=2),
        lambda a: edit(a, format="other"),
        lambda a: edit(a, layers=[]),
        lambda a: edit(a, layers=None),
        lambda a: edit(a, n_experts=3),
        lambda a: edit(a, n_prompt_tokens=1000),
        lambda a: edit(a, record_bytes=[1]),
        lambda a: edit(a, record_bytes=["1"] * 4),
        lambda a: edit(a, record_bytes=[0] * 4),
        lambda a: edit(a, layers=[0, 1, 2, 2]),
        lambda a: edit(a, layers=[0, 1, 2, -3]),
        lambda a: edit(a, layers=[0, 1, 2, 10**9]),
        lambda a: edit(a, n_experts=10**12),
        lambda a: edit(a, n_experts=1e400),
        lambda a: edit(a, n_prompt_tokens=float("nan")),
        lambda a: a.update(header=np.array("[" * 100_000)),
        lambda a: a.update(header=np.array('{"n_experts": ' + "9" * 5000 + "}")),
        lambda a: a.update(chosen=np.array("x")),
        lambda a: a.update(chosen=np.asfortranarray(a["chosen"])),
        lambda a: a.update(passes=a["passes"][1:]),
        lambda a: a.update(passes=a["passes"].astype(np.float32)),
        lambda a: a.update(chosen=a["chosen"][:, 0]),
        lambda a: a.update(chosen=a["chosen"][:0], passes=a["passes"][:0]),
        lambda a: a.update(chosen=a["chosen"].astype(np.float32)),
        lambda a: a.update(likely=a["likely"][1:]),
        lambda a: a.update(likely=a["likely"][:, 1:]),
        lambda a: a.update(likely=a["likely"][0]),
        lambda a: a.update(likely=a["likely"].astype(np.uint16)),
        lambda a: a.update(likely=a["likely"] + np.uint8(8)),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(saved, tmp_path, change):
    parts = arrays(saved)
    change(parts)
    path = tmp_path / "changed.npz"
    np.savez(path, **parts)
    with pytest.raises(TraceError, match=r"changed\.npz: expected"):
        RoutingTrace.load(path)


def patched(path, name, offset, value):
    """Write a number into a member's entry in a zip file's directory."""
    raw = bytearray(path.read_bytes())
    at = raw.rindex(f"{name}.npy".encode()) - 46
    assert raw[at : at + 4] == b"PK\1\2"
    struct.pack_into("<I", raw, at + offset, value)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "n_bytes", "error"),
    [
        ("chosen", 2**31, "at most 268435456 bytes, 1048576 of them the header's"),
        ("passes", 2**32 - 2, "at most 268435456 bytes"),
        ("header", 2**20 + 1, "at most 268435456 bytes, 1048576 of them"),
        ("chosen", 100, "expected a file of moeflux trace"),
    ],
)
def test_the_unpacked_size_of_a_trace_is_checked_beforehand(
    saved, tmp_path, name, n_bytes, error
):
    path = shutil.copyfile(saved, tmp_path / "changed.npz")
    patched(path, name, 24, n_bytes)
    with pytest.raises(TraceError, match=error):
        RoutingTrace.load(path)


def test_an_array_that_claims_to_be_larger_is_refused(saved, tmp_path):
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = members["chosen.npy"]
    members["chosen.npy"] = re.sub(rb"\((\d+), ", rb"(90000000000000, ", data)
    path = tmp_path / "large.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    with pytest.raises(TraceError, match="an array of uint8"):
        RoutingTrace.load(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unbounded_compression_methods_are_refused(saved, tmp_path, method):
    path = tmp_path / "other.npz"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(TraceError, match="expected header deflated"):
        RoutingTrace.load(path)


def test_members_beyond_those_of_a_trace_are_refused(saved, tmp_path):
    parts = arrays(saved)
    np.savez(tmp_path / "one.npz", **parts, more=np.zeros(1, np.uint8))
    for name in ("more.npy", "chosen.npy", "chosen"):
        path = tmp_path / "more.npz"
        shutil.copyfile(saved, path)
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as z:
            warnings.simplefilter("ignore")
            z.writestr(name, b"")
        with pytest.raises(TraceError, match=r"more\.npz: expected"):
            RoutingTrace.load(path)
    with pytest.raises(TraceError, match="at most 4 members but got 5"):
        RoutingTrace.load(tmp_path / "one.npz")


def test_nothing_is_unpickled(saved, tmp_path):
    parts = arrays(saved)
    mark = tmp_path / "mark"

    class Leave:
        def __reduce__(self):
            return (Path.touch, (mark,))

    for name in ("header", "chosen"):
        path = tmp_path / "pickle.npz"
        bad = np.array([Leave()], object)
        np.savez(path, allow_pickle=True, **{**parts, name: bad})
        with pytest.raises(TraceError, match=r"pickle\.npz"):
            RoutingTrace.load(path)
    assert not mark.exists()


def test_another_thing_in_place_of_a_trace_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(TraceError, match="expected a regular file"):
            RoutingTrace.load(path)


def test_a_trace_that_could_not_be_read_again_is_not_written(trace, tmp_path):
    many = np.broadcast_to(np.uint8(0), (1 << 26, *trace.chosen.shape[1:]))
    large = replace(trace, chosen=many)
    with pytest.raises(TraceError, match="record fewer tokens"):
        large.save(tmp_path / "large.npz")
    with pytest.raises(TraceError, match="cannot write"):
        trace.save(tmp_path / "none" / "trace.npz")
    assert list(tmp_path.iterdir()) == []


def edit(parts, **fields):
    header = json.loads(str(parts["header"]))
    parts["header"] = np.array(json.dumps({**header, **fields}))


def test_foreign_and_missing_files_are_refused(tmp_path, checkpoint):
    (tmp_path / "text").write_text("hello")
    np.save(tmp_path / "one.npy", np.arange(3))
    names = [tmp_path / "text", tmp_path / "one.npy", tmp_path / "none", tmp_path]
    for path in [*names, checkpoint / "model.safetensors"]:
        with pytest.raises(TraceError, match=r"\[trace\]"):
            RoutingTrace.load(path)


def test_an_impossible_recording_is_refused(checkpoint):
    model, _ = moeflux_mlx.load(checkpoint)
    for prompt, n in (([], 3), ([1], 0)):
        with pytest.raises(ConfigError, match="at least 1 token"):
            record_routing(model, prompt, max_tokens=n)
    with pytest.raises(ModelError, match=r"expected routed experts in mlx\.nn"):
        record_routing(nn.Linear(2, 2), [1], max_tokens=1)


def test_mlx_lms_own_class_is_recorded_by_its_blocks(checkpoint):
    model, _ = moeflux_mlx.load(checkpoint)
    stock, _ = mlx_lm.load(str(checkpoint))
    kinds = [type(module) for _, module in stock.named_modules()]
    ours, other = (
        record_routing(m, [5, 6, 7, 8], max_tokens=4) for m in (model, stock)
    )
    assert [type(module) for _, module in stock.named_modules()] == kinds
    assert np.array_equal(ours.passes, other.passes)
    # Each router has an order of its own.
    assert np.array_equal(np.sort(ours.chosen), np.sort(other.chosen))
    assert other.record_bytes == ours.record_bytes and other.likely is None


def test_the_command_writes_a_trace_that_pins_come_from(
    packed, budget, tmp_path, capsys
):
    path, prompt = tmp_path / "trace.npz", tmp_path / "prompt.txt"
    prompt.write_text("def add(a, b):")
    flags = ["--prompt-file", str(prompt), "-m", "9", "--expert-memory", budget]
    assert main(["trace", str(packed), *flags, "-o", str(path)]) == 0
    assert "23 tokens, 14 of them of the prompt" in capsys.readouterr().out
    trace = RoutingTrace.load(path)
    assert trace.n_prompt_tokens == 14
    model, tokenizer = moeflux_mlx.load(
        packed, expert_memory=budget, policy=f"lru+pins:{path}"
    )
    with model.streamer as streamer:
        again = record_routing(model, tokenizer.encode("def add(a, b):"), max_tokens=9)
        assert streamer.stats.total.hits > 0
    assert again.chosen.tolist() == trace.chosen.tolist()


def test_the_environment_names_a_policy(packed, budget, monkeypatch):
    monkeypatch.setenv("MOEFLUX_POLICY", "newest")
    with pytest.raises(ConfigError, match="newest"):
        moeflux_mlx.load(packed, expert_memory=budget)
    monkeypatch.setenv("MOEFLUX_POLICY", "lru")
    model, _ = moeflux_mlx.load(packed, expert_memory=budget)
    model.streamer.close()
    assert isinstance(model.streamer._table._policy, LRU)


def test_an_unreadable_prompt_file_ends_in_one_clear_line(packed, tmp_path, capsys):
    flags = ["--prompt-file", str(tmp_path / "none"), "-o", str(tmp_path / "t.npz")]
    assert main(["trace", str(packed), *flags]) == 2
    assert "--prompt-file" in capsys.readouterr().err


def test_a_header_that_python_warns_of_is_refused_without_a_warning(
    saved, tmp_path, recwarn
):
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename == "chosen.npy":
                data = data.replace(b"'shape': (", b"'shape': (0if 1", 1)
            target.writestr(info.filename, data)
    with pytest.raises(TraceError):
        RoutingTrace.load(path)
    assert [str(w.message) for w in recwarn] == []
