"""All experts of a pack, in files that are mapped into memory and never copied."""

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
    """Serve every expert as an ``ExpertStreamer`` does, but without a pool.

    The memory is the system's page cache: processes share its pages, and the system may
    drop them and read them again. The constructor reads and checks every record, so a
    failing disk is an error on opening, and the first token waits for no read.
    """

    resident = True

    def __init__(
        self, store: PackedExperts, *, on_host: bool, report: Report | None = None
    ):
        """Check and map every expert file; the caller closes the store.

        Args:
            store: the open pack.
            on_host: make NumPy arrays, which host references take, instead of MLX
                arrays over the same memory.
            report: receives the progress of reading.

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
        """The experts in memory as ``(layer, expert)``: all of them."""
        return self.experts

    def preload(self, experts: Collection[tuple[int, int]]) -> None:
        """Do nothing: every expert is in memory."""

    def source(self, layer: int) -> PreloadedExperts:
        """Return one layer's experts.

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
        """Drop the maps; a file stays mapped as long as an array uses its memory."""
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
            # After an error or Ctrl-C, do not wait for reads that have not begun.
            threads.shutdown(cancel_futures=True)


def host_weights(records: np.ndarray, layout: ExpertLayout) -> ExpertWeights:
    """Return records, uint8 ``[n, stride]``, as NumPy tensors ``[n, O, I]``."""
    tensors = {}
    for spec in layout.tensors:
        columns = records[:, spec.offset : spec.offset + spec.n_bytes]
        shape = (len(records), *spec.shape)
        values = columns.view(_host_type(spec.dtype)).reshape(shape)
        tensors[spec.projection, spec.part] = values
    return weights_of(layout, tensors)


def device_weights(records: np.ndarray, layout: ExpertLayout) -> ExpertWeights:
    """Return records, uint8 ``[n, stride]``, as MLX tensors ``[n, O, I]``.

    Raises:
        ConfigError: MLX would copy (only Metal computes on memory that MLX did not
            allocate), or the buffer is longer than the device allows.
    """
    limits = device.gpu_limits()
    if limits is not None and records.nbytes > limits.buffer_bytes:
        raise ConfigError(
            f"[expert_io] expected layers of at most {limits.buffer_bytes} bytes, the "
            f"longest buffer of this device, for 'mmap' but got {records.nbytes}: use "
            "'pread'"
        )
    try:
        array = mx.from_dlpack(records, copy=False)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"[expert_io] expected MLX to take mapped memory uncopied but got: {error}"
        ) from error
    return slot_weights(array, layout)


def _map(store: PackedExperts, layer: int) -> np.ndarray:
    """Map one layer's expert file, read-only: uint8 ``[n_experts, stride]``."""
    shape = store.count(layer), store.layout(layer).stride
    n_bytes, path = math.prod(shape), store.path(layer)
    # A mapped page beyond the file's end raises SIGBUS, which ends the process.
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
    """Compare a record with its checksum; return its length in bytes."""
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
    """Return NumPy's type of a tensor; uint16 for bfloat16, which NumPy lacks."""
    dtype = MLX_DTYPES[name]
    return np.dtype("u2" if dtype == mx.bfloat16 else str(dtype).rpartition(".")[2])
