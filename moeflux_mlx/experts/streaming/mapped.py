"""All experts of a pack in place: its files mapped into memory, nothing copied."""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import xxhash

from ... import config, device
from ...errors import ConfigError, ExpertStoreError
from ...system.progress import Report
from ...system.uncopied import Uncopied
from ..compute.resident import PreloadedExperts
from ..files.layout import ExpertLayout
from ..files.packed import PackedExperts
from ..files.spans import read_fully
from ..pool.pool import slot_weights, weights_of
from ..pool.stats import StreamStats
from ..weights import MLX_DTYPES, ExpertWeights


class MappedExperts(Uncopied):
    """Does as an ``ExpertStreamer`` that holds every expert, without a pool.

    The pages are the page cache's: other processes share them, and the system may drop
    them and read them again. Every record is read and checked once before, so that a
    disk that fails is an error then and the first token finds its experts in memory.
    """

    resident = True

    def __init__(
        self, store: PackedExperts, *, on_host: bool, report: Report | None = None
    ):
        """Check and map every expert file; the store stays the caller's to close.

        Args:
            store: the open pack.
            on_host: make NumPy arrays, for references that run on the host; else MLX's
                over the same memory.
            report: hears how far reading has come.

        Raises:
            ConfigError: MLX cannot use mapped memory here.
            ExpertStoreError: a file is too short, cannot be read or is damaged.
        """
        self.experts = [(i, e) for i in store.layers for e in range(store.count(i))]
        self.n_slots = len(self.experts)
        self.stats = StreamStats(store.layers)
        rows = {layer: _map(store, layer) for layer in store.layers}
        as_weights = host_weights if on_host else device_weights
        self._weights = {
            layer: as_weights(rows[layer], store.layout(layer)) for layer in rows
        }
        self._check(store, report)
        self.memory_bytes = sum(mapped.nbytes for mapped in rows.values())

    @property
    def held(self) -> list[tuple[int, int]]:
        """The experts in memory, as ``(layer, expert)``: all there are."""
        return self.experts

    def preload(self, experts: Collection[tuple[int, int]]) -> None:
        """Do nothing: they are there."""

    def source(self, layer: int) -> PreloadedExperts:
        """Return one layer's experts as its MoE Op reads them.

        Raises:
            ConfigError: the layer has no routed experts.
        """
        if layer not in self._weights:
            raise ConfigError(
                f"[source] expected one of the layers {list(self._weights)} but got "
                f"{layer}"
            )
        return PreloadedExperts(self._weights[layer], self.stats[layer])

    def guard(self, *outputs: mx.array) -> None:
        """Do nothing: no expert is ever overwritten."""

    def guard_result(self, result: mx.array) -> None:
        """Do nothing, as ``guard``."""

    def hand_over(self) -> None:
        """Do nothing: no slot is ever overwritten."""

    def close(self) -> None:
        """Let go of the files; they stay mapped while arrays of theirs are in use."""
        self._weights.clear()

    def __enter__(self) -> MappedExperts:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self, store: PackedExperts, report: Report | None) -> None:
        """Read every record through the page cache and compare its checksum."""
        largest = max(store.layout(layer).record_bytes for layer in store.layers)
        own = threading.local()

        def check(place: tuple[int, int]) -> int:
            if not hasattr(own, "buffer"):
                own.buffer = memoryview(bytearray(largest))
            return _check_record(store, *place, own.buffer)

        n_done, n_all = (
            0,
            sum(
                store.count(layer) * store.layout(layer).record_bytes
                for layer in store.layers
            ),
        )
        threads = ThreadPoolExecutor(config.read_threads())
        try:
            checked = zip(self.experts, threads.map(check, self.experts), strict=True)
            for (layer, _), n_bytes in checked:
                self.stats[layer].preloaded += 1
                self.stats[layer].read_bytes += n_bytes
                n_done += n_bytes
                if report is not None:
                    report("reading experts", n_done, n_all)
        finally:
            # After an error or Ctrl-C nobody waits for reads that have not begun.
            threads.shutdown(cancel_futures=True)


def host_weights(rows: np.ndarray, layout: ExpertLayout) -> ExpertWeights:
    """Return records, uint8 ``[n, stride]``, as NumPy tensors ``[n, O, I]``."""
    tensors = {}
    for spec in layout.tensors:
        part = rows[:, spec.offset : spec.offset + spec.n_bytes]
        shape = (len(rows), *spec.shape)
        values = part.view(_host_type(spec.dtype)).reshape(shape)
        tensors[spec.projection, spec.part] = values
    return weights_of(layout, tensors)


def device_weights(rows: np.ndarray, layout: ExpertLayout) -> ExpertWeights:
    """Return records, uint8 ``[n, stride]``, as MLX tensors ``[n, O, I]``.

    Raises:
        ConfigError: MLX would have to copy: it takes other memory on Metal only. Or it
            would refuse a buffer of that length.
    """
    limits = device.gpu_limits()
    if limits is not None and rows.nbytes > limits.buffer_bytes:
        raise ConfigError(
            f"[expert_io] expected layers of at most {limits.buffer_bytes} bytes, the "
            f"longest buffer of this device, for 'mmap' but got {rows.nbytes}: use "
            "'pread'"
        )
    try:
        array = mx.from_dlpack(rows, copy=False)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"[expert_io] expected MLX to take mapped memory as it is but got: {error}"
        ) from error
    return slot_weights(array, layout)


def _map(store: PackedExperts, layer: int) -> np.ndarray:
    """Map the file of one layer's experts: uint8 ``[n_experts, stride]``, read-only."""
    shape = store.count(layer), store.layout(layer).stride
    n_bytes, path = math.prod(shape), store.path(layer)
    # Beyond a file's end lies a signal that ends the process.
    found = os.fstat(store.fd(layer)).st_size
    if found < n_bytes:
        raise ExpertStoreError(
            f"[mapped] {path} of layer {layer}: expected {n_bytes} bytes but got "
            f"{found}"
        )
    try:
        pages = mmap.mmap(store.fd(layer), n_bytes, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ExpertStoreError(
            f"[mapped] cannot map {path} of layer {layer}: {error}"
        ) from error
    return np.frombuffer(pages, np.uint8).reshape(shape)


def _check_record(
    store: PackedExperts, layer: int, expert: int, buffer: memoryview
) -> int:
    """Hold a record against its checksum; return its bytes."""
    record = buffer[: store.layout(layer).record_bytes]
    offset, expected = store.offset(layer, expert), store.checksum(layer, expert)
    try:
        read_fully(store.fd(layer), offset, record)
        found = xxhash.xxh3_64_intdigest(record)
        why = f"expected checksum {expected:016x} but got {found:016x}"
        if found == expected:
            return len(record)
    except (OSError, EOFError) as error:
        why = str(error)
    raise ExpertStoreError(
        f"[mapped] {store.path(layer)}: expert {expert} of layer {layer} at {offset}: "
        f"{why}"
    )


def _host_type(name: str) -> np.dtype:
    """Return NumPy's type of a tensor; bfloat16, which it lacks, is uint16."""
    dtype = MLX_DTYPES[name]
    return np.dtype("u2" if dtype == mx.bfloat16 else str(dtype).rpartition(".")[2])
