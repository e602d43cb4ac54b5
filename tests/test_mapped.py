"""Experts mapped from a pack's files: conditions, equal bits, no copy, no signal."""

from __future__ import annotations

import errno
import os
import shutil
import time
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from op_cases import relative_rms
from rich.filesize import decimal
from test_checkpoint_model import logits, memory_for, tokens

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.errors import BudgetError, ConfigError, ExpertStoreError
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.files.store import open_store
from moeflux_mlx.experts.pool.budget import MEMORY_SHARE
from moeflux_mlx.experts.streaming import mapped as module
from moeflux_mlx.experts.streaming.access import all_bytes, open_experts
from moeflux_mlx.experts.streaming.mapped import (
    MappedExperts,
    device_weights,
    host_weights,
)
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer

N_RECORDS = 32
on_host = pytest.mark.skipif(
    not device.prefers_host_arrays(), reason="experts are NumPy arrays on a Linux CPU"
)


@pytest.fixture
def store(packed):
    with PackedExperts.open(packed) as store:
        yield store


@pytest.fixture
def on_metal(monkeypatch):
    """Use views of host memory for those of Metal, which computes on pages."""
    monkeypatch.setattr(module, "device_weights", host_weights)
    return partial(opened, on_host=False)


def opened(store, memory=None, io=None, *, on_host=True):
    stream = partial(ExpertStreamer, store, memory)
    return open_experts(store, memory, stream, io=io, on_host=on_host)


# Equal results, and memory that is not allocated.
@on_host
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_logits_are_those_of_experts_read_into_memory(packed, n_tokens):
    expected, _ = moeflux_mlx.load(packed, expert_io="pread")
    model, _ = moeflux_mlx.load(packed, expert_io="mmap")
    assert isinstance(expected.streamer, ExpertStreamer)
    assert isinstance(model.streamer, MappedExperts)
    assert mx.array_equal(logits(model, n_tokens), logits(expected, n_tokens))
    counts, others = model.streamer.stats.total, expected.streamer.stats.total
    assert (counts.hits, counts.misses) == (others.hits, others.misses)
    assert counts.preloaded == others.preloaded == N_RECORDS
    assert counts.read_bytes == others.read_bytes


@on_host
def test_a_call_on_mlx_arrays_takes_mapped_experts_too(packed):
    model, _ = moeflux_mlx.load(packed, expert_io="mmap")
    expected = model(tokens(5))
    one = model(tokens(1))
    model.train()
    assert relative_rms(model(tokens(5)), expected) < 1e-5
    assert relative_rms(model(tokens(1)), one) < 1e-5


def test_tensors_on_the_host_are_the_bytes_of_the_file_uncopied(store):
    before = mx.get_active_memory()
    experts = opened(store, io="mmap")
    assert mx.get_active_memory() - before < 1024
    assert experts.memory_bytes == all_bytes(store) == store.expert_bytes
    for layer in store.layers:
        layout, data = store.layout(layer), store.path(layer).read_bytes()
        rows = np.frombuffer(data, np.uint8).reshape(store.n_experts, layout.stride)
        copied = host_weights(rows, layout)
        weights = experts.source(layer).weights
        for name in ("gate", "up", "down"):
            got, wanted = getattr(weights, name), getattr(copied, name)
            assert np.shares_memory(wanted.w, rows)
            assert not got.w.flags.writeable and got.on_host is got
            assert got.quantization == wanted.quantization
            for part in ("w", "scales", "biases"):
                assert np.array_equal(getattr(got, part), getattr(wanted, part))


def test_a_pack_deleted_while_mapped_still_works(checkpoint, packed, tmp_path):
    path = tmp_path / "packed"
    shutil.copytree(packed, path)
    model, _ = moeflux_mlx.load(path, expert_io="mmap")
    expected = logits(model, 5)
    model.runtime.store.close()
    shutil.rmtree(path)
    assert mx.array_equal(logits(model, 5), expected)


# The gate.
def full_bytes(store):
    """Return the bytes of slots for all experts."""
    return memory_for(store.directory.with_name("plain"), N_RECORDS)


def test_packed_experts_that_all_fit_are_mapped_on_metal(store, on_metal, capfd):
    for memory in (None, full_bytes(store), 10**9):
        assert isinstance(on_metal(store, memory), MappedExperts), memory
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3 and len(set(said)) == 1
    n_bytes = decimal(all_bytes(store))
    assert "experts mapped" in said[0] and n_bytes in said[0] and "75%" in said[0]


def test_on_a_cpu_experts_that_all_fit_are_read_once(store, capfd):
    with opened(store) as read:
        assert isinstance(read, ExpertStreamer) and read.resident
    assert "into memory, all of them" in capfd.readouterr().err


def test_experts_beyond_the_budget_or_the_gate_are_read(
    store, on_metal, monkeypatch, capfd
):
    with on_metal(store, full_bytes(store) - 1) as most:
        assert isinstance(most, ExpertStreamer) and most.n_slots == N_RECORDS - 1
    assert f"{N_RECORDS - 1} at a time" in capfd.readouterr().err
    limit = int(full_bytes(store) / MEMORY_SHARE)
    monkeypatch.setattr(device, "physical_memory_bytes", lambda: limit)
    with on_metal(store, 2**30) as all_of_them:
        assert isinstance(all_of_them, ExpertStreamer) and all_of_them.resident
    assert "all of them" in capfd.readouterr().err
    assert isinstance(on_metal(store, io="mmap"), MappedExperts)
    monkeypatch.setattr(device, "physical_memory_bytes", lambda: limit + 2)
    assert isinstance(on_metal(store, 2**30), MappedExperts)


def test_the_environment_chooses_unless_an_argument_does(store, on_metal, monkeypatch):
    assert isinstance(on_metal(store), MappedExperts)
    monkeypatch.setenv("MOEFLUX_EXPERT_IO", "pread")
    with on_metal(store) as read:
        assert isinstance(read, ExpertStreamer)
    assert isinstance(opened(store, io="mmap"), MappedExperts)
    monkeypatch.setenv("MOEFLUX_EXPERT_IO", "floppy")
    with pytest.raises(ConfigError, match=r"\[MOEFLUX_EXPERT_IO\].*'floppy'"):
        opened(store)
    with pytest.raises(ConfigError, match=r"\[expert_io\].*'tape'"):
        opened(store, io="tape")


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal takes mapped memory")
def test_where_mlx_takes_no_mapped_memory_experts_are_read(store):
    with opened(store, on_host=False) as read:
        assert isinstance(read, ExpertStreamer) and read.resident
    with pytest.raises(ConfigError, match=r"\[expert_io\] expected MLX to take"):
        opened(store, io="mmap", on_host=False)


def test_an_impossible_mapping_is_an_error(store, checkpoint):
    with pytest.raises(BudgetError, match=rf"at least {all_bytes(store)} bytes"):
        opened(store, all_bytes(store) - 1, io="mmap")
    with (
        open_store(checkpoint) as plain,
        pytest.raises(ConfigError, match="plain checkpoint"),
    ):
        opened(plain, io="mmap")


@pytest.mark.metal
def test_metal_computes_on_the_pages_of_the_file(store):
    for layer in store.layers:
        rows = module._map(store, layer)
        weights = device_weights(rows, store.layout(layer))
        first = np.array(weights.gate.w, copy=False)
        assert first.ctypes.data == rows.ctypes.data


# Files that changed.
@pytest.mark.parametrize("n_left", [0, 1000])
def test_a_file_cut_after_opening_is_never_mapped(n_left, packed, tmp_path):
    path = tmp_path / "packed"
    shutil.copytree(packed, path)
    with PackedExperts.open(path) as store:
        os.truncate(store.path(2), n_left)
        with pytest.raises(ExpertStoreError, match="bytes but got") as caught:
            opened(store, io="mmap")
    assert f"{store.path(2)} of layer 2" in str(caught.value)
    assert str(n_left) in str(caught.value)


def test_a_damaged_record_is_named_before_it_is_used(packed, tmp_path):
    path = tmp_path / "packed"
    shutil.copytree(packed, path)
    with PackedExperts.open(path) as store:
        with open(store.path(1), "r+b") as file:
            file.seek(store.offset(1, 3) + 100)
            file.write(b"\xff\x00\xff")
        with pytest.raises(ExpertStoreError, match="expected checksum") as caught:
            opened(store, io="mmap")
    assert f"{store.path(1)}: expert 3 of layer 1" in str(caught.value)


def test_a_disk_that_fails_is_an_error_and_nothing_more_is_read(store, monkeypatch):
    begun = []

    def fail_at_once(*args):
        begun.append(args)
        if len(begun) > 1:
            time.sleep(0.05)
            return
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setenv("MOEFLUX_READ_THREADS", "1")
    monkeypatch.setattr(module, "read_fully", fail_at_once)
    with pytest.raises(ExpertStoreError, match="Input/output error") as caught:
        opened(store, io="mmap")
    assert f"{store.path(0)}: expert 0 of layer 0" in str(caught.value)
    assert len(begun) < N_RECORDS


def test_a_layer_without_experts_is_refused(store):
    with pytest.raises(ConfigError, match=r"\[source\].*got 9"):
        opened(store, io="mmap").source(9)
