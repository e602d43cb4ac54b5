"""Direct I/O reads the same bytes past the page cache, or warns and reads via it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import warnings

import mlx.core as mx
import pytest
from synthetic import write_checkpoint

import moeflux_mlx
from moeflux_mlx.errors import ConfigError, ExpertStoreError
from moeflux_mlx.experts.files.direct import bypass_cache
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.files.store import open_store
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.measure.compare.measurement import greedy

N_EXPERTS = 5
linux = pytest.mark.skipif(sys.platform != "linux", reason="is about O_DIRECT")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Experts of 2304 bytes, which is not a multiple of any disk's block."""
    path = tmp_path_factory.mktemp("direct") / "plain"
    return write_checkpoint(path, hidden=32, inner=32)


@pytest.fixture(scope="module")
def small(plain):
    """The same experts, packed."""
    pack(plain, plain.with_name("packed"))
    return plain.with_name("packed")


def is_direct(store) -> bool:
    fds = {span.fd for layer in store.layers for span in store.spans(layer, 0)}
    flags = {fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT for fd in fds}
    assert len(flags) == 1
    return flags != {0}


def open_directly(path):
    """Open directly, or skip where the tests' file system refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return open_store(path, direct=True)
        except UserWarning as refusal:
            pytest.skip(str(refusal))


def streamed(store, inline_bytes: int = 0) -> dict[tuple[int, int], bytes]:
    """Stream every expert through two slots."""
    found = {}
    memory = 2 * store.layout(0).stride + POOL_ALIGNMENT
    with ExpertStreamer(store, memory, inline_bytes=inline_bytes) as streamer:
        for layer in store.layers:
            n_bytes = store.layout(layer).record_bytes
            for wave in streamer.source(layer).waves(range(N_EXPERTS)):
                for expert, slot in wave:
                    buffer = streamer.pools[0].buffer(slot, n_bytes)
                    found[layer, expert] = bytes(buffer)
        n_read = len(store.layers) * N_EXPERTS
        assert streamer.stats.total.read_bytes == n_read * store.layout(0).record_bytes
    return found


@pytest.fixture(scope="module")
def expected(small):
    with open_store(small) as store:
        return streamed(store)


@linux
@pytest.mark.parametrize("inline_bytes", [0, 10**9], ids=["threads", "inline"])
def test_direct_reads_give_the_same_records(small, expected, inline_bytes):
    with open_directly(small) as store:
        assert is_direct(store)
        assert store.layout(0).record_bytes % 512
        assert streamed(store, inline_bytes) == expected
    with open_store(small) as store:
        assert not is_direct(store)


@linux
def test_direct_reads_with_all_experts_in_memory(small, expected):
    with open_directly(small) as store, ExpertStreamer(store) as streamer:
        assert streamer.resident
        n_bytes = store.layout(0).record_bytes
        for (layer, expert), record in expected.items():
            slot = layer * N_EXPERTS + expert
            assert bytes(streamer.pools[0].buffer(slot, n_bytes)) == record


@linux
def test_a_direct_read_past_the_end_names_file_layer_and_expert(plain, tmp_path):
    pack(plain, tmp_path / "packed")
    with open_directly(tmp_path / "packed") as store:
        os.truncate(store.path(1), store.offset(1, 4) + 63)
        memory = 2 * store.layout(0).stride + POOL_ALIGNMENT
        with ExpertStreamer(store, memory) as streamer:
            ask = mx.array([[3, 4]], dtype=mx.uint32)
            with pytest.raises(ExpertStoreError) as caught:
                streamer.source(1).slots(ask)
    for word in (str(store.path(1)), "expert 4 of layer 1", "ends after 63"):
        assert word in str(caught.value)


@linux
@pytest.mark.parametrize("lost", [1, 700, 4096, 5000])
def test_a_short_direct_read_continues_at_a_block_boundary(
    lost, small, expected, monkeypatch
):
    """Every second read is cut short; a read that begins within a block is refused."""
    preadv, n_reads, n_short = os.preadv, 0, 0

    def short(fd, buffers, offset):
        nonlocal n_reads, n_short
        if offset % 512:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        n_bytes, n_reads = preadv(fd, buffers, offset), n_reads + 1
        if n_reads % 2 == 0 or n_bytes <= lost:
            return n_bytes
        n_short += 1
        assert len(buffers) == 1
        buffers[0][n_bytes - lost : n_bytes] = b"\xa5" * lost
        return n_bytes - lost

    with open_directly(small) as store:
        monkeypatch.setattr(os, "preadv", short)
        assert streamed(store) == expected
    assert n_short >= N_EXPERTS


@linux
def test_direct_reads_that_make_no_progress_end_in_an_error(small, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: min(preadv(*args), 100))
    with open_directly(small) as store:
        record = memoryview(mmap.mmap(-1, store.layout(0).stride))
        with pytest.raises(OSError, match="stops at 100 bytes"):
            store.spans(0, 1)[0].read(record)


@linux
@pytest.mark.parametrize("form", ["plain checkpoint", "pack of small alignment"])
def test_experts_at_any_offset_are_read_through_the_cache_with_one_warning(
    form, plain, expected, tmp_path
):
    path = plain
    if form != "plain checkpoint":
        path = tmp_path / "packed"
        pack(plain, path, alignment=256)
    with pytest.warns(UserWarning, match="moeflux pack") as caught:
        store = open_store(path, direct=True)
    assert len(caught) == 1
    with store:
        assert not is_direct(store)
        assert streamed(store) == expected


@linux
def test_if_one_file_refuses_none_is_read_directly(small):
    with PackedExperts.open(small) as store, open("/proc/version", "rb") as refusing:
        fds = [*(store.fd(layer) for layer in store.layers), refusing.fileno()]
        with pytest.warns(UserWarning, match=r"\[direct\] .*packed") as caught:
            assert not bypass_cache(fds, small, aligned=True)
        assert len(caught) == 1
        assert not is_direct(store)


@linux
def test_a_model_is_read_directly_on_request(packed, budget, monkeypatch):
    open_directly(packed).close()
    loaded, _ = moeflux_mlx.load(packed, expert_memory=budget)
    assert not is_direct(loaded.runtime.store)
    tokens = greedy(loaded, [5, 99, 300], 7)[0]
    loaded, _ = moeflux_mlx.load(packed, expert_memory=budget, expert_io="direct")
    assert is_direct(loaded.runtime.store)
    assert greedy(loaded, [5, 99, 300], 7)[0] == tokens
    monkeypatch.setenv("MOEFLUX_EXPERT_IO", "direct")
    loaded, _ = moeflux_mlx.load(packed, expert_memory=budget)
    assert is_direct(loaded.runtime.store)
    loaded, _ = moeflux_mlx.load(packed, expert_memory=budget, expert_io="pread")
    assert not is_direct(loaded.runtime.store)


def test_other_ways_of_reading_are_refused(packed, monkeypatch):
    with pytest.raises(ConfigError, match=r"\[expert_io\].*'fast'"):
        moeflux_mlx.load(packed, expert_io="fast")
    monkeypatch.setenv("MOEFLUX_EXPERT_IO", "fast")
    with pytest.raises(ConfigError, match=r"\[MOEFLUX_EXPERT_IO\].*'fast'"):
        moeflux_mlx.load(packed)
