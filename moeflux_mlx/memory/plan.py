"""Plan a process's memory before loading a model."""

from __future__ import annotations

import bisect
import resource
import sys
from dataclasses import dataclass, replace
from typing import Protocol

from rich.filesize import decimal

from .. import config, device
from ..errors import BudgetError
from ..experts.files.store import ExpertStore
from ..experts.pool.budget import within_working_set
from ..experts.pool.pool import POOL_ALIGNMENT, pool_stride
from ..experts.pool.segments import Division, divide
from .caches import CACHE_STEP, CacheForm
from .steady import active_bytes

# Chunk sizes in tokens. A plan has scratch for the first size that takes at most
# SCRATCH_SHARE of the room, or for the last size. A prompt may later use larger chunks,
# for which experts give way, or smaller ones beside long caches.
CHUNKS = (2048, 1024, 512, 256, 128, 64)
SCRATCH_SHARE = 1 / 4
SMALLER_CHUNKS = (32, 16)
# Share of the planned experts that do not give way to a server's cached prompts.
KEPT_SHARE = 1 / 2


class Needs(Protocol):
    """A model's memory needs in bytes, computed from shapes alone."""

    def resident_bytes(self, unpack: bool) -> int:
        """Return the bytes of the parameters in the form in which they are used.

        Args:
            unpack: quantised matrices are also kept dense in float32.
        """

    def scratch_bytes(self, n_tokens: int, n_cached: int, n_seqs: int = 1) -> int:
        """Return the peak of one call, without weights, caches and experts.

        Args:
            n_tokens: tokens over all ``n_seqs`` sequences.
            n_cached: rows of each sequence's cache.
            n_seqs: number of sequences.
        """

    def output_bytes(self, n_tokens: int) -> int:
        """Return the bytes of a call's hidden states, kept until its logits exist."""

    def logits_bytes(self, n_tokens: int) -> int:
        """Return the bytes of the logits of ``n_tokens`` tokens."""

    @property
    def most_tokens(self) -> int:
        """The maximum length of a sequence."""

    @property
    def cache_forms(self) -> list[CacheForm]:
        """The form of each cache, in the order of ``single_caches``."""

    @property
    def cache_row_bytes(self) -> int:
        """Bytes per token of a sequence in caches that grow without bound."""

    @property
    def cache_state_bytes(self) -> int:
        """Bytes per sequence in all other caches when they are full."""


@dataclass(frozen=True)
class MemoryPlan:
    """The division of a process's memory.

    ``process_bytes`` are for the interpreter and libraries, ``cache_bytes`` for the
    first ``CACHE_STEP`` tokens of one sequence. As caches grow, the ``n_slots`` experts
    in ``expert_bytes`` give way. With the fewest experts, one sequence may have
    ``context_tokens`` tokens. ``scratch_bytes`` are for ``chunk_tokens`` tokens;
    experts give way to more. ``unpack``: quantised matrices are also kept dense in
    float32. Experts are in ``n_segments`` buffers. ``replacing_bytes``, in addition to
    scratch, are for a second buffer while experts give way. ``capped`` names the
    device's limits that shaped the plan.
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
    n_segments: int = 1
    replacing_bytes: int = 0
    capped: str = ""

    @property
    def prompt_bytes(self) -> int:
        """Bytes for a server's cached prompts, with experts at their floor.

        They do not include the caches of the request that is running.
        """
        taken = self.process_bytes + self.resident_bytes + self.scratch_bytes
        experts_bytes = self.expert_bytes + self.replacing_bytes
        taken += self.cache_bytes + round(KEPT_SHARE * experts_bytes)
        return max(0, self.budget_bytes - taken)

    def __str__(self) -> str:
        capped = f"; {self.capped}" if self.capped else ""
        dense = ", matrices unpacked" if self.unpack else ""
        replacing = (
            f" and {decimal(self.replacing_bytes)} to move some of them"
            if self.replacing_bytes
            else ""
        )
        return (
            f"memory {decimal(self.budget_bytes)} = "
            f"process {decimal(self.process_bytes)} + "
            f"weights {decimal(self.resident_bytes)}{dense} + "
            f"caches {decimal(self.cache_bytes)} and growing + "
            f"scratch {decimal(self.scratch_bytes)} for {self.chunk_tokens} tokens + "
            f"experts {decimal(self.expert_bytes)} for {self.n_slots} of "
            f"{self.n_experts}{replacing}; "
            f"room for {self.context_tokens} tokens of context{capped}"
        )


def plan_memory(
    budget_bytes: int,
    needs: Needs,
    store: ExpertStore,
    *,
    scope: str = "global",
    most_expert_bytes: int | None = None,
) -> MemoryPlan:
    """Divide ``budget_bytes`` of a process's memory; experts get the rest.

    A smaller ulimit on address space or data replaces the budget. So does a smaller
    working set that the device recommends.

    Args:
        budget_bytes: bytes of the whole process.
        needs: the model's needs.
        store: the experts' files.
        scope: as for ``ExpertStreamer``.
        most_expert_bytes: upper bound on experts' bytes.

    Raises:
        BudgetError: one token does not fit; states the least budget and its division.
    """
    device.start_blas()
    requested, budget_bytes = budget_bytes, within_working_set(budget_bytes)
    why = ""
    if budget_bytes < requested:
        why = f", the working set that this device recommends, and not {requested}"
    # The workers that read experts, MLX's four that read weights, and MLX's own two.
    n_threads = config.read_threads() + 6
    allowed = device.ulimit_bytes(n_threads)
    if allowed is not None and allowed < budget_bytes:
        budget_bytes = allowed
        why = f", all that ulimit leaves beside the stacks of {n_threads} threads"
    parts = {
        "process": own_bytes() + device.PROCESS_GROWTH_BYTES,
        "weights": needs.resident_bytes(False),
        "caches": needs.cache_state_bytes + CACHE_STEP * needs.cache_row_bytes,
    }
    n_segments, division = 0, None
    while division is None or division.n_segments > n_segments:
        # More segments need more slots at least, so plan again with their number.
        n_segments = 1 if division is None else division.n_segments
        plan, division = _planned(
            budget_bytes,
            needs,
            store,
            parts,
            n_segments,
            scope=scope,
            most_expert_bytes=most_expert_bytes,
            why=why,
        )
    return replace(plan, capped=_capped(requested, plan, division))


def _planned(
    budget_bytes: int,
    needs: Needs,
    store: ExpertStore,
    parts: dict[str, int],
    n_segments: int,
    *,
    scope: str,
    most_expert_bytes: int | None,
    why: str,
) -> tuple[MemoryPlan, Division]:
    """Return a plan for experts in at least ``n_segments``, and their division.

    Args:
        parts: bytes by purpose, without scratch and experts.
        why: the reason for the budget, which ends the error's sentence.
    """
    parts, unpack = dict(parts), False
    counts = [store.count(layer) for layer in store.layers]
    stride = pool_stride([store.layout(layer) for layer in store.layers])
    groups = n_segments if scope == "global" else len(counts)
    least_bytes = groups * store.top_k * stride + n_segments * POOL_ALIGNMENT
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
        taken = ", ".join(f"{decimal(n)} {name}" for name, n in parts.items())
        raise BudgetError(
            f"[memory] expected at least {sum(parts.values())} bytes "
            f"({decimal(sum(parts.values()))}: {taken}) but got {budget_bytes}{why}"
        )
    division = divide(
        min(room, most_expert_bytes or room),
        counts=counts,
        stride=stride,
        top_k=store.top_k,
        scope=scope,
        # Experts move between calls, when no call uses the scratch.
        replacing=room + scratch,
    )
    plan = MemoryPlan(
        budget_bytes=budget_bytes,
        process_bytes=parts["process"],
        resident_bytes=parts["weights"],
        scratch_bytes=scratch,
        cache_bytes=parts["caches"],
        expert_bytes=division.n_bytes(stride),
        n_slots=division.n_slots,
        n_experts=sum(counts),
        chunk_tokens=chunk,
        context_tokens=_context_tokens(
            needs, budget_bytes - parts["process"] - parts["weights"] - least_bytes
        ),
        unpack=unpack,
        n_segments=division.n_segments,
        replacing_bytes=max(0, division.replacing_bytes(stride) - scratch),
    )
    return plan, division


def _capped(requested: int, plan: MemoryPlan, division: Division) -> str:
    """Return the device's limits that shaped a plan, as text; empty without any."""
    limits, found = device.gpu_limits(), []
    if limits is None:
        return ""
    if min(requested, plan.budget_bytes) == limits.working_set_bytes < requested:
        found.append(
            f"not {decimal(requested)} but the working set that this device "
            f"recommends, {decimal(limits.working_set_bytes)}"
        )
    buffer = f"the longest buffer of this device, {decimal(limits.buffer_bytes)}"
    if division.shortened:
        found.append(f"no more experts, because of {buffer}")
    if division.n_segments > division.n_wanted:
        found.append(f"experts in {division.n_segments} buffers, because of {buffer}")
    return "; ".join(found)


def affords_unpacked(needs: Needs, room: int | None = None) -> bool:
    """Return whether to also keep quantised matrices dense, which speeds up a CPU.

    Args:
        needs: the model's needs.
        room: bytes available for it; default: the machine's memory.
    """
    if not device.on_cpu():
        return False
    dense = needs.resident_bytes(True) - needs.resident_bytes(False)
    machine_bytes = device.physical_memory_bytes()
    most = machine_bytes if room is None else min(room, machine_bytes)
    return 0 < dense <= device.UNPACKED_SHARE * most


def _chunk(needs: Needs, room: int) -> tuple[int, int]:
    """Return the chunk size in tokens, and its scratch in bytes."""
    for chunk in CHUNKS:
        scratch = needs.scratch_bytes(chunk, CACHE_STEP)
        if scratch <= SCRATCH_SHARE * room:
            break
    return chunk, scratch


def _context_tokens(needs: Needs, room: int) -> int:
    """Return the longest sequence in tokens that fits beside the fewest experts."""
    room -= needs.cache_state_bytes

    def fits(n_steps: int) -> bool:
        n_rows = n_steps * CACHE_STEP
        scratch = needs.scratch_bytes(SMALLER_CHUNKS[-1], n_rows)
        return n_rows * needs.cache_row_bytes + scratch <= room

    most = -(-needs.most_tokens // CACHE_STEP)
    n_steps = bisect.bisect_left(range(1, most + 1), True, key=lambda n: not fits(n))
    return min(n_steps * CACHE_STEP, needs.most_tokens)


def own_bytes() -> int:
    """Return the process's bytes without MLX's arrays."""
    taken = device.process_bytes()
    if taken is None:
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        taken *= 1 if sys.platform == "darwin" else 1024
    return max(0, taken - active_bytes())
