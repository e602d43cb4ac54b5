"""Plan what a process's memory goes to before loading, and keep to it afterwards."""

from __future__ import annotations

import bisect
import gc
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
# Tokens that a plan keeps scratch for: the first of these whose scratch leaves experts
# enough of the memory, or else the last. A prompt may take more of them together, for
# which experts give way, or fewer beside long caches.
CHUNKS = (2048, 1024, 512, 256, 128, 64)
SCRATCH_SHARE = 1 / 4
SMALLER_CHUNKS = (32, 16)
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

    def scratch_bytes(self, n_tokens: int, n_cached: int, n_seqs: int = 1) -> int:
        """Return the peak of one call beside weights, caches and experts.

        Args:
            n_tokens: of all ``n_seqs`` sequences together.
            n_cached: rows of each sequence's cache.
        """

    def output_bytes(self, n_tokens: int) -> int:
        """Return what a call's hidden states take until their logits are known."""

    def logits_bytes(self, n_tokens: int) -> int:
        """Return what the logits of so many tokens take."""

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
    ``expert_bytes`` give way, until one sequence has ``context_tokens`` and experts are
    at their least. Scratch is kept for ``chunk_tokens``, for more experts give way.
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
    context_tokens: int
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
            f"{self.n_experts}; room for {self.context_tokens} tokens of context"
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
        context_tokens=_context_tokens(
            needs, budget_bytes - parts["process"] - parts["weights"] - least_bytes
        ),
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


def _context_tokens(needs: Needs, room: int) -> int:
    """Return how many tokens one sequence may have beside the fewest experts."""
    room -= needs.cache_state_bytes

    def fits(n_steps: int) -> bool:
        n_rows = n_steps * CACHE_STEP
        scratch = needs.scratch_bytes(SMALLER_CHUNKS[-1], n_rows)
        return n_rows * needs.cache_row_bytes + scratch <= room

    most = -(-needs.most_tokens // CACHE_STEP)
    n_steps = bisect.bisect_left(range(1, most + 1), True, key=lambda n: not fits(n))
    return min(n_steps * CACHE_STEP, needs.most_tokens)


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
        # The first cache of a call, its sequences, and how many more tokens have room.
        self._foreseen: tuple[Callable[[], Any], int, int] = (lambda: None, 0, 0)
        # Whether the process has grown by what a first prompt makes it grow.
        self._has_grown = False
        # What the last call was given beside caches and experts.
        self.scratch_bytes = plan.scratch_bytes

    def limit(self, n_slots: int) -> None:
        """Hold no more experts than ``n_slots`` from now on.

        Raises:
            BudgetError: that is not a number of slots there can be; nothing changes.
        """
        self._streamer.resize(n_slots)
        self._most_slots = n_slots

    def make_room(
        self,
        cache: list[Any],
        n_seqs: int,
        t: int,
        *,
        whole: int | None = None,
        most: int | None = None,
        logits: bool = False,
    ) -> int:
        """Give the caches of a call with ``t`` more tokens the room they will take.

        The logits of a call have room too where experts can give way to them; those of
        a prompt are mostly thrown away unseen.

        Args:
            whole: tokens of each sequence in the whole call, if ``t`` are left of it.
            most: tokens to compute together at most.
            logits: they are asked for, so there is room for all of them or an error.

        Returns:
            How many tokens, of all sequences, are to be computed together.

        Raises:
            BudgetError: even with the fewest experts they do not fit; nothing changes.
        """
        last, n_before, n_tokens = self._foreseen
        if t == 1 and n_tokens > 0 and n_before == n_seqs and last() is cache[0]:
            self._foreseen = (last, n_seqs, n_tokens - 1)
            return n_seqs
        self._caches.update(c for c in cache if c is not None)
        n_out = n_seqs * (whole or t)
        parts = self._parts(cache, n_seqs, t, measured=t > 1)
        choice = self._choose(parts, cache, n_seqs, t, n_out, most, logits)
        if choice is None:
            # Caches in reference cycles live on until they are collected.
            gc.collect()
            parts = self._parts(cache, n_seqs, t, measured=True)
            choice = self._choose(parts, cache, n_seqs, t, n_out, most, logits)
        if choice is None:
            raise self._too_little(parts, cache, n_seqs, t, n_out, logits)
        chunk, self.scratch_bytes, n_slots = choice
        self._resize(n_slots, cache)
        self._has_grown |= t > 1
        # After a prompt experts come back at once.
        n_tokens = LOOKAHEAD - 1 if t == 1 else 0
        self._foreseen = (weakref.ref(cache[0]), n_seqs, n_tokens)
        return chunk

    def _parts(
        self, cache: list[Any], n_seqs: int, t: int, *, measured: bool
    ) -> dict[str, int]:
        """Return what takes memory beside scratch and experts once a call is done.

        Args:
            measured: look whether the process takes less than was planned.
        """
        held = sum(c.nbytes for c in self._caches)
        process = self.plan.process_bytes
        fixed = process + self.plan.resident_bytes
        return {
            "process": self._measured_process(process) if measured else process,
            "weights": self.plan.resident_bytes,
            "what no plan knew of": self._surplus(fixed + held),
            "caches": held + self._growth(cache, n_seqs, max(t, LOOKAHEAD)),
        }

    def _choose(
        self,
        parts: dict[str, int],
        cache: list[Any],
        n_seqs: int,
        t: int,
        n_out: int,
        most: int | None,
        logits: bool,
    ) -> tuple[int, int, int] | None:
        """Return the chunk, its scratch and the slots that read the fewest experts.

        Each chunk reads the experts that it asks for and that are not held; those that
        give way are read once more afterwards. None: nothing fits.
        """
        room = self.plan.budget_bytes - sum(parts.values())
        n_tokens, held = n_seqs * t, self._streamer.n_slots
        n_rows = _n_rows(cache, t)
        choices: list[tuple[int, int, int, int]] = []
        for chunk in _chunks(n_seqs, t, most):
            least = self._scratch(chunk, n_rows, n_seqs, n_out)
            with_logits = max(least, self._needs.logits_bytes(n_out))
            for scratch in {with_logits: 0, **({} if logits else {least: 0})}:
                n_slots = self._n_slots(room - scratch)
                if n_slots < self._streamer.least_slots:
                    continue
                missing = max(0, self._streamer.most_asked(chunk) - n_slots)
                n_read = -(-n_tokens // chunk) * missing + max(0, held - n_slots)
                choices.append((n_read, chunk, scratch, n_slots))
                break
        if not choices:
            return None
        # The first of equals is the longest.
        return min(choices, key=lambda choice: choice[0])[1:]

    def _scratch(self, chunk: int, n_rows: int, n_seqs: int, n_out: int) -> int:
        scratch = self._needs.scratch_bytes(chunk, n_rows, n_seqs)
        return scratch + self._needs.output_bytes(n_out)

    def _n_slots(self, room: int) -> int:
        """Return how many slots ``room`` is enough for, no more than are wanted."""
        streamer = self._streamer
        n_slots = (room - streamer.slack_bytes) // streamer.slot_bytes
        n_slots = min(n_slots, self._most_slots)
        return n_slots - n_slots % streamer.n_groups

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

    def _measured_process(self, planned: int) -> int:
        """Return what the process really takes, and a step more, if that is less.

        Slots without an expert may never have been written, so they do not count.
        """
        taken = device.process_bytes() if device.on_cpu() else None
        if taken is None or not self._has_grown:
            return planned
        device.trim_heap()
        streamer = self._streamer
        known = len(streamer.held) * streamer.slot_bytes + self.plan.resident_bytes
        known += sum(c.nbytes for c in self._caches)
        taken = max(0, (device.process_bytes() or 0) - known)
        return min(planned, taken + SURPLUS_STEP_BYTES)

    def _too_little(
        self,
        parts: dict[str, int],
        cache: list[Any],
        n_seqs: int,
        t: int,
        n_out: int,
        logits: bool,
    ) -> BudgetError:
        streamer, n_rows = self._streamer, _n_rows(cache, t)
        *_, chunk = _chunks(n_seqs, t, None)
        scratch = self._scratch(chunk, n_rows, n_seqs, n_out)
        if logits:
            scratch = max(scratch, self._needs.logits_bytes(n_out))
        n_least = streamer.least_slots
        least_bytes = n_least * streamer.slot_bytes + streamer.slack_bytes
        others = sum(c.nbytes for c in self._caches) - sum(
            c.nbytes for c in cache if c is not None
        )
        parts = parts | {"scratch": scratch, f"{n_least} experts": least_bytes}
        taken = ", ".join(f"{decimal(n)} {what}" for what, n in parts.items() if n)
        return BudgetError(
            f"[memory] expected at least {sum(parts.values())} bytes ({taken}) but got "
            f"{self.plan.budget_bytes}: {n_seqs} x {t} tokens would make caches of "
            f"{n_rows} rows, beside {decimal(others)} in other caches; one sequence "
            f"alone has room for {self.plan.context_tokens} tokens: drop old caches, "
            "shorten the prompt, or raise memory"
        )

    def _resize(self, n_slots: int, cache: list[Any]) -> None:
        if n_slots == self._streamer.n_slots:
            return
        # A lazy state may still have to read the slots it was computed from.
        mx.eval([x for c in cache if c is not None for x in _arrays(c)])
        mx.synchronize()
        self._streamer.resize(n_slots)


def _chunks(n_seqs: int, t: int, most: int | None) -> list[int]:
    """Return how many tokens of a call may be computed together, the most first.

    It is as many of each sequence, and at least one.
    """
    n_tokens = n_seqs * t if most is None else min(n_seqs * t, most)
    sizes = {min(n_tokens, size) for size in (*CHUNKS, *SMALLER_CHUNKS)}
    return sorted({max(1, size // n_seqs) * n_seqs for size in sizes}, reverse=True)


def _n_rows(cache: list[Any], t: int) -> int:
    """Return the rows of a sequence's cache after ``t`` more tokens."""
    n_rows = max((_rows(c)[1] for c in cache), default=0) + max(t, LOOKAHEAD)
    return -(-n_rows // CACHE_STEP) * CACHE_STEP


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
