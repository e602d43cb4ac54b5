"""Plan what a process's memory goes to before loading, and keep to it afterwards."""

from __future__ import annotations

import math
import resource
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
from rich.filesize import decimal

from . import device
from .errors import BudgetError
from .executors.base import leaves
from .experts.pool import POOL_ALIGNMENT, pool_stride
from .experts.store import ExpertStore
from .experts.streamer import ExpertStreamer

# mlx-lm's KV caches grow by this many rows.
CACHE_STEP = 256
# Tokens of a prompt that are computed together: the first of these whose scratch
# leaves experts enough of the memory, or else the last.
CHUNKS = (2048, 1024, 512, 256, 128, 64)
SCRATCH_SHARE = 1 / 4
# Beside caches that have grown long it may be fewer, but no fewer than these.
MIN_CHUNK = 16
# Room is made for this many tokens at once, one after the other.
LOOKAHEAD = 16
# What a process takes that no plan knew of is made room for in steps.
SURPLUS_STEP_BYTES = 16 << 20


class Needs(Protocol):
    """What a model says of its memory, from shapes alone; bytes throughout."""

    def resident_bytes(self, unpack: bool) -> int:
        """Return what parameters take once they are ready for use.

        Args:
            unpack: quantised matrices are also kept dense in float32.
        """

    def scratch_bytes(self, n_tokens: int, n_cached: int) -> int:
        """Return the peak of one call beside weights, caches and experts."""

    @property
    def cache_shapes(self) -> list[tuple[tuple[int | None, ...], ...]]:
        """The arrays of each layer's cache, ``[1, H, None, d]`` if they grow."""

    @property
    def cache_dtype(self) -> mx.Dtype:
        """The type of keys and values."""

    @property
    def most_tokens(self) -> int:
        """How long a sequence may become."""

    @property
    def cache_row_bytes(self) -> int:
        """What each token of a sequence takes in KV caches."""

    @property
    def cache_state_bytes(self) -> int:
        """What each sequence takes in caches that do not grow."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a process's memory goes to.

    ``process_bytes`` are the interpreter and libraries, ``cache_bytes`` the caches of
    one sequence's first ``CACHE_STEP`` tokens: as they grow, the ``n_slots`` experts in
    ``expert_bytes`` give way. A call of more than ``chunk_tokens`` tokens is divided.
    ``unpack``: quantised matrices are also kept dense in float32.
    """

    budget_bytes: int
    process_bytes: int
    resident_bytes: int
    scratch_bytes: int
    cache_bytes: int
    expert_bytes: int
    n_slots: int
    n_experts: int
    chunk_tokens: int
    unpack: bool

    def __str__(self) -> str:
        dense = ", matrices unpacked" if self.unpack else ""
        return (
            f"memory {decimal(self.budget_bytes)} = "
            f"process {decimal(self.process_bytes)} + "
            f"weights {decimal(self.resident_bytes)}{dense} + "
            f"caches {decimal(self.cache_bytes)} and growing + "
            f"scratch {decimal(self.scratch_bytes)} for {self.chunk_tokens} tokens + "
            f"experts {decimal(self.expert_bytes)} for {self.n_slots} of "
            f"{self.n_experts}"
        )


def plan_memory(
    budget_bytes: int,
    needs: Needs,
    store: ExpertStore,
    *,
    scope: str = "global",
    most_expert_bytes: int | None = None,
) -> MemoryPlan:
    """Divide ``budget_bytes`` of a process's memory; experts take what is left.

    Args:
        scope: as for ``ExpertStreamer``.
        most_expert_bytes: experts take no more than this.

    Raises:
        BudgetError: what one token needs does not fit; states the least that does, and
            what each part takes.
    """
    stride = pool_stride([store.layout(layer) for layer in store.layers])
    n_records = sum(store.count(layer) for layer in store.layers)
    groups = 1 if scope == "global" else len(store.layers)
    least_bytes = groups * store.top_k * stride + POOL_ALIGNMENT
    unpack = False
    parts = {
        "process": own_bytes() + device.PROCESS_GROWTH_BYTES,
        "weights": needs.resident_bytes(unpack),
        "caches": needs.cache_state_bytes + CACHE_STEP * needs.cache_row_bytes,
    }
    dense_bytes = needs.resident_bytes(True) - parts["weights"]
    room = budget_bytes - sum(parts.values())
    if affords_unpacked(needs, room - least_bytes):
        unpack, room = True, room - dense_bytes
        parts["weights"] += dense_bytes
    chunk, scratch = _chunk(needs, room - least_bytes)
    room -= scratch
    if room < least_bytes:
        parts |= {f"scratch for {chunk} tokens": scratch}
        parts |= {f"{groups * store.top_k} experts": least_bytes}
        taken = ", ".join(f"{decimal(n)} {what}" for what, n in parts.items())
        raise BudgetError(
            f"[memory] expected at least {sum(parts.values())} bytes "
            f"({decimal(sum(parts.values()))}: {taken}) but got {budget_bytes}"
        )
    expert_bytes = min(room, most_expert_bytes or room)
    n_slots = min((expert_bytes - POOL_ALIGNMENT) // stride, n_records)
    return MemoryPlan(
        budget_bytes=budget_bytes,
        process_bytes=parts["process"],
        resident_bytes=parts["weights"],
        scratch_bytes=scratch,
        cache_bytes=parts["caches"],
        expert_bytes=n_slots * stride + POOL_ALIGNMENT,
        n_slots=n_slots,
        n_experts=n_records,
        chunk_tokens=chunk,
        unpack=unpack,
    )


def affords_unpacked(needs: Needs, room: int | None = None) -> bool:
    """Tell whether quantised matrices are to be kept dense on a CPU besides.

    Args:
        room: bytes there are for that; by default all that the machine has.
    """
    if not device.on_cpu():
        return False
    dense = needs.resident_bytes(True) - needs.resident_bytes(False)
    machine_bytes = device.physical_memory_bytes()
    most = machine_bytes if room is None else min(room, machine_bytes)
    return dense <= device.UNPACKED_SHARE * most


def _chunk(needs: Needs, room: int) -> tuple[int, int]:
    """Return how many tokens are computed together, and the scratch that takes."""
    for chunk in CHUNKS:
        scratch = needs.scratch_bytes(chunk, CACHE_STEP)
        if scratch <= SCRATCH_SHARE * room:
            break
    return chunk, scratch


def own_bytes() -> int:
    """Return what the process has taken but for MLX's arrays."""
    taken = device.process_bytes()
    if taken is None:
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        taken *= 1 if sys.platform == "darwin" else 1024
    return max(0, taken - mx.get_active_memory())


class MemoryKeeper:
    """Resizes the expert pool between tokens so that a process keeps to its plan.

    Every cache that a call was made with counts for as long as it lives.
    """

    def __init__(self, plan: MemoryPlan, needs: Needs, streamer: ExpertStreamer):
        self.plan, self._needs, self._streamer = plan, needs, streamer
        self._most_slots = streamer.n_slots
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        # The first cache of a call and how many more of its tokens have room.
        self._foreseen: tuple[Callable[[], Any], int] = (lambda: None, 0)

    def limit(self, n_slots: int) -> None:
        """Hold no more experts than ``n_slots`` from now on."""
        self._most_slots = n_slots
        self._streamer.resize(n_slots)

    def make_room(self, cache: list[Any], n_seqs: int, t: int) -> int:
        """Give the caches of a call with ``t`` more tokens the room they will take.

        Returns:
            How many tokens are to be computed together.

        Raises:
            BudgetError: even with the fewest experts they do not fit.
        """
        last, n_tokens = self._foreseen
        if t == 1 and n_tokens > 0 and last() is cache[0]:
            self._foreseen = (last, n_tokens - 1)
            return self.plan.chunk_tokens
        self._caches.update(c for c in cache if c is not None)
        held = sum(c.nbytes for c in self._caches)
        fixed = self.plan.process_bytes + self.plan.resident_bytes
        room = self.plan.budget_bytes - fixed - held - self._surplus(fixed + held)
        room -= self._growth(cache, n_seqs, max(t, LOOKAHEAD))
        n_rows = max((_rows(c)[1] for c in cache), default=0) + max(t, LOOKAHEAD)
        chunk, scratch = self._chunk(n_seqs * t, n_seqs * n_rows, room)
        self._resize(room - scratch, cache)
        self._foreseen = (weakref.ref(cache[0]), LOOKAHEAD - 1)
        return chunk

    def _chunk(self, n_tokens: int, n_cached: int, room: int) -> tuple[int, int]:
        """Return how many tokens fit together beside long caches, and their scratch."""
        n_cached = -(-n_cached // CACHE_STEP) * CACHE_STEP
        chunk = min(n_tokens, self.plan.chunk_tokens)
        most = max(self.plan.scratch_bytes, SCRATCH_SHARE * room)
        while True:
            scratch = self._needs.scratch_bytes(chunk, n_cached)
            if scratch <= most or chunk <= MIN_CHUNK:
                return chunk, max(self.plan.scratch_bytes, scratch)
            chunk = max(MIN_CHUNK, chunk // 2)

    def _growth(self, cache: list[Any], n_seqs: int, t: int) -> int:
        """Return the bytes by which the caches of a call will grow."""
        rows = [_rows(c) for c in cache if hasattr(c, "offset")]
        states = [c for c in cache if c is not None and not hasattr(c, "offset")]
        total = 0
        for allocated, used, n_bytes in rows:
            if used + t > allocated:
                row = n_seqs * self._needs.cache_row_bytes / len(rows)
                row = n_bytes / allocated if allocated else row
                total += math.ceil(row) * -(-t // CACHE_STEP) * CACHE_STEP
        if any(c.empty() for c in states):
            total += n_seqs * self._needs.cache_state_bytes
        return total

    def _surplus(self, expected: int) -> int:
        """Return what the process holds beyond ``expected`` and its experts."""
        expected += self._streamer.memory_bytes
        if not device.on_cpu() or (device.process_bytes() or 0) <= expected:
            return 0
        device.trim_heap()
        surplus = max(0, (device.process_bytes() or 0) - expected)
        return -(-surplus // SURPLUS_STEP_BYTES) * SURPLUS_STEP_BYTES

    def _resize(self, room: int, cache: list[Any]) -> None:
        streamer = self._streamer
        n_slots = (room - streamer.slack_bytes) // streamer.slot_bytes
        n_slots = min(n_slots, self._most_slots)
        n_slots -= n_slots % streamer.n_groups
        if n_slots == streamer.n_slots:
            return
        if n_slots < streamer.least_slots:
            short = (streamer.least_slots - n_slots) * streamer.slot_bytes
            raise BudgetError(
                f"[memory] expected {short} bytes more than {self.plan.budget_bytes}: "
                f"caches have grown to {decimal(sum(c.nbytes for c in self._caches))}"
            )
        # A lazy state may still have to read the slots it was computed from.
        mx.eval([x for c in cache if c is not None for x in _arrays(c)])
        mx.synchronize()
        streamer.resize(n_slots)


def _arrays(cache: Any) -> list[mx.array]:
    if cache.empty():
        return []
    return leaves(cache.state)


def _rows(cache: Any) -> tuple[int, int, int]:
    """Return a KV cache's rows, those in use, and the bytes of all; else zeros."""
    keys = getattr(cache, "keys", None)
    if keys is None:
        return 0, 0, 0
    first = keys[0] if isinstance(keys, list | tuple) else keys
    used = getattr(cache, "_idx", cache.offset)
    return first.shape[-2], int(used), cache.nbytes
