"""Records that reach slots through pinned memory: all, complete, and in time."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import sys
import threading
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from synthetic import expert_bytes, slot_bytes, write_checkpoint

from moeflux_mlx import device
from moeflux_mlx.errors import BackendError, ExpertStoreError
from moeflux_mlx.experts.files.checkpoint_store import CheckpointExperts
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.pool import pool, staging
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.pool.staging import Copier, Staging, open_staging
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.experts.weights import Quantization

N_LAYERS, N_EXPERTS, TOP_K, N_THREADS = 2, 9, 2, 3


class Runtime:
    """CUDA's functions over host memory; a copy happens when its stream is awaited.

    ``failing`` names a function that reports an error.
    """

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)

    def __init__(self):
        self.pinned: dict[int, int] = {}
        self.streams: dict[int, list[tuple[int, int, int]]] = {}
        self.n_stages = self.n_streams = 0
        self.failing = ""
        self._lock = threading.Lock()

    def _done(self, name, *results):
        if self.failing == name:
            return (SimpleNamespace(name="cudaErrorUnknown"),)
        return 0, *results

    def cudaHostRegister(self, address, n_bytes, flags):
        if self.failing != "cudaHostRegister":
            with self._lock:
                self.n_stages += 1
                self.pinned[address] = n_bytes
        return self._done("cudaHostRegister")

    def cudaHostUnregister(self, address):
        del self.pinned[address]
        return self._done("cudaHostUnregister")

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        with self._lock:
            self.n_streams += 1
            number = self.n_streams
            self.streams[number] = []
        return self._done("cudaStreamCreateWithFlags", number)

    def cudaStreamDestroy(self, stream):
        assert not self.streams.pop(stream)
        return self._done("cudaStreamDestroy")

    def cudaMemcpyAsync(self, target, source, n_bytes, kind, stream):
        assert kind == 4
        if self.failing != "cudaMemcpyAsync":
            self.streams[stream].append((target, source, n_bytes))
        return self._done("cudaMemcpyAsync")

    def cudaStreamSynchronize(self, stream):
        copies, self.streams[stream] = self.streams[stream], []
        for copy in copies if self.failing != "cudaStreamSynchronize" else ():
            ctypes.memmove(*copy)
        return self._done("cudaStreamSynchronize")


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    monkeypatch.setattr(
        pool, "open_staging", lambda n_bytes: Staging(Copier(made), n_bytes)
    )
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("staging") / "plain",
        n_layers=N_LAYERS,
        n_experts=N_EXPERTS,
        top_k=TOP_K,
        quantization=[Quantization(4, 32)] * N_LAYERS,
    )


@pytest.fixture(params=["checkpoint", "pack"])
def store(request, plain, tmp_path):
    if request.param == "checkpoint":
        copy = shutil.copytree(plain, tmp_path / "plain")
        opened = CheckpointExperts.open(copy)
    else:
        pack(plain, tmp_path / "packed")
        opened = PackedExperts.open(tmp_path / "packed")
    with opened:
        yield opened


@pytest.fixture(params=[0, 10**9], ids=["threads", "inline"])
def inline_bytes(request):
    return request.param


def stream(store, n_slots, **options):
    memory = n_slots * store.layout(0).stride + POOL_ALIGNMENT
    return ExpertStreamer(store, memory, read_threads=N_THREADS, **options)


def check(streamer, plain, layer, experts) -> None:
    """Request experts, and compare their slots with the checkpoint."""
    source = streamer.source(layer)
    slots = source.slots(mx.array([experts])).tolist()[0]
    for expert, slot in zip(experts, slots, strict=True):
        expected = expert_bytes(plain, layer, expert)
        for projection in ("gate", "up", "down"):
            found = slot_bytes(getattr(source.weights, projection), slot)
            for part, content in found.items():
                assert content == expected[f"{projection}_proj.{part}"]


@pytest.mark.sampled
def test_slots_hold_the_requested_experts(runtime, store, plain, inline_bytes):
    rng = np.random.default_rng(1)
    with stream(store, 5, inline_bytes=inline_bytes) as streamer:
        for _ in range(60):
            experts = rng.permutation(N_EXPERTS)[:TOP_K].tolist()
            check(streamer, plain, int(rng.integers(N_LAYERS)), experts)
        assert streamer.stats.total.misses > 20
        assert 1 <= runtime.n_stages <= N_THREADS


def test_all_experts_pass_through_few_stages(runtime, store, plain):
    with stream(store, N_LAYERS * N_EXPERTS, inline_bytes=0) as streamer:
        assert streamer.resident
        for layer in range(N_LAYERS):
            check(streamer, plain, layer, [0, N_EXPERTS - 1])
    assert 1 <= runtime.n_stages <= N_THREADS


def test_memory_and_streams_are_given_back(runtime, store):
    with stream(store, 5, inline_bytes=0) as streamer:
        streamer.source(0).slots(mx.array([[1, 2]]))
    assert runtime.pinned and runtime.streams
    del streamer
    gc.collect()
    assert not runtime.pinned and not runtime.streams


def test_experts_that_move_are_copied_on_the_device(runtime, store, plain):
    with stream(store, 6, inline_bytes=0) as streamer:
        for layer, experts in ((0, [1, 2]), (1, [3, 4]), (0, [5, 6])):
            check(streamer, plain, layer, experts)
        streamer.resize(2)
        misses = streamer.stats.total.misses
        for layer, expert in streamer.held:
            check(streamer, plain, layer, [expert])
        assert streamer.stats.total.misses == misses


def test_experts_are_copied_into_a_shorter_buffer_on_the_device(
    runtime, store, plain, monkeypatch
):
    monkeypatch.setattr(device, "returns_pages", lambda: False)
    with stream(store, 9, inline_bytes=0) as streamer:
        for layer, experts in ((0, [1, 2]), (1, [3, 4]), (0, [5, 6])):
            check(streamer, plain, layer, experts)
        for n_slots in (4, 7, 2):
            n_held = len(streamer.held)
            streamer.resize(n_slots)
            assert len(streamer.held) == min(n_held, n_slots)
            misses = streamer.stats.total.misses
            for layer, expert in streamer.held:
                check(streamer, plain, layer, [expert])
            assert streamer.stats.total.misses == misses
        runtime.failing = "cudaMemcpyAsync"
        held = streamer.held
        with pytest.raises(BackendError, match="cudaMemcpyAsync"):
            streamer.resize(6)
        runtime.failing = ""
        assert (streamer.held, streamer.n_slots) == (held, 2)
        for layer, expert in held:
            check(streamer, plain, layer, [expert])


class Untouched:
    """Stands for the host's view of slots, of which only the length is asked."""

    def __init__(self, n: int):
        self._n = n

    def __len__(self) -> int:
        return self._n


def tensors(source) -> list[np.ndarray]:
    """Return copies of all tensors of a layer."""
    weights = source.weights.by_name.values()
    return [np.array(array) for weight in weights for array in weight.arrays]


@pytest.mark.parametrize("store", ["pack"], indirect=True)
def test_tensors_are_stacked_on_the_device(runtime, store, plain, monkeypatch):
    """The host touches no slot: pages of the GPU's memory would move to it."""
    monkeypatch.setattr(device, "returns_pages", lambda: False)
    n_slots = N_LAYERS * N_EXPERTS
    with stream(store, n_slots) as one, stream(store, n_slots, stacks=True) as streamer:
        for pool_ in streamer.pools:
            pool_._buffer.bytes = Untouched(len(pool_.bytes))
        for layer in range(N_LAYERS):
            expected, found = (tensors(s.source(layer)) for s in (one, streamer))
            assert found and all(map(np.array_equal, found, expected))
            weights = streamer.source(layer).weights.by_name.values()
            assert not any(weight.strided for weight in weights)
        # Slots hold records again.
        streamer.resize(n_slots - 1)
        misses = streamer.stats.total.misses
        for layer, expert in streamer.held:
            check(streamer, plain, layer, [expert])
        assert streamer.stats.total.misses == misses


@pytest.mark.sampled
@pytest.mark.parametrize(
    "failing",
    [
        "cudaHostRegister",
        "cudaStreamCreateWithFlags",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
    ],
)
def test_an_error_of_cuda_belongs_to_its_read(
    runtime, store, plain, inline_bytes, failing
):
    with stream(store, 5, inline_bytes=inline_bytes) as streamer:
        runtime.failing = failing
        with pytest.raises(ExpertStoreError, match=f"layer 1.*{failing}: cudaError"):
            streamer.source(1).slots(mx.array([[3, 4]]))
        runtime.failing = ""
        check(streamer, plain, 1, [3, 4])
    del streamer
    gc.collect()
    assert not runtime.pinned and not any(runtime.streams.values())


def test_a_file_that_ends_early_harms_no_slot(runtime, store, plain, inline_bytes):
    path = store.spans(1, 4)[0].path
    with stream(store, 2, inline_bytes=inline_bytes) as streamer:
        check(streamer, plain, 1, [3, 4])
        n_bytes = path.stat().st_size
        kept = path.read_bytes()
        os.truncate(path, n_bytes // 3)
        with pytest.raises(ExpertStoreError, match="of layer"):
            streamer.source(1).slots(mx.array([[N_EXPERTS - 1, N_EXPERTS - 2]]))
        path.write_bytes(kept)
        assert not any(runtime.streams.values())
        check(streamer, plain, 1, [N_EXPERTS - 1, N_EXPERTS - 2])


def test_without_a_gpu_the_host_writes_slots(monkeypatch):
    for on_cpu, has_cuda in ((True, True), (False, False)):
        monkeypatch.setattr(device, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        monkeypatch.setattr(mx.cuda, "is_available", lambda has=has_cuda: has)
        assert open_staging(64) is None


def test_without_cuda_bindings_the_host_writes_slots_and_warns(monkeypatch, capsys):
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    staging._runtime.cache_clear()
    try:
        assert open_staging(64) is None
        assert open_staging(64) is None
    finally:
        staging._runtime.cache_clear()
    assert capsys.readouterr().err.count("cuda-bindings") == 1


def test_an_error_of_cuda_names_call_and_code():
    runtime = Runtime()
    runtime.failing = "cudaHostUnregister"
    runtime.pinned[5] = 1
    with pytest.raises(BackendError, match="cudaHostUnregister: cudaErrorUnknown"):
        Copier(runtime).unpin(5)


def check_on_gpu(streamer, plain, layer, experts) -> None:
    """Compare the slots as the GPU reads them with the checkpoint."""
    source = streamer.source(layer)
    slots = source.slots(mx.array([experts]))
    found = np.array(source.weights.gate.w[slots[0]])
    for expert, rows in zip(experts, found, strict=True):
        expected = expert_bytes(plain, layer, expert)["gate_proj.weight"]
        assert rows.tobytes() == expected


@pytest.mark.cuda
def test_records_arrive_in_the_memory_of_a_gpu(store, plain, inline_bytes):
    rng = np.random.default_rng(2)
    assert open_staging(64) is not None
    with stream(store, 5, inline_bytes=inline_bytes) as streamer:
        for i in range(40):
            layer = int(rng.integers(N_LAYERS))
            experts = rng.permutation(N_EXPERTS)[:TOP_K].tolist()
            check_on_gpu(streamer, plain, layer, experts)
            if i == 20:
                streamer.resize(4)


@pytest.mark.cuda
def test_a_shorter_buffer_holds_the_moved_experts_on_the_gpu(
    store, plain, inline_bytes
):
    with stream(store, 2 * N_EXPERTS - 2, inline_bytes=inline_bytes) as streamer:
        for layer in range(N_LAYERS):
            for first in range(0, N_EXPERTS - 1, 2):
                check_on_gpu(streamer, plain, layer, [first, first + 1])
        for n_slots in (9, 4, streamer.most_slots, 5):
            n_held = len(streamer.held)
            before, taken = mx.get_active_memory(), streamer.memory_bytes
            streamer.resize(n_slots)
            lost = taken - streamer.memory_bytes
            assert lost and abs(before - mx.get_active_memory() - lost) < 1 << 16
            misses = streamer.stats.total.misses
            assert len(streamer.held) == min(n_held, n_slots)
            for layer, expert in streamer.held:
                check_on_gpu(streamer, plain, layer, [expert])
            assert streamer.stats.total.misses == misses
