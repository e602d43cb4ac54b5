"""Plan a process's memory before loading."""

from __future__ import annotations

import bisect
import resource
import sys
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
from rich.filesize import decimal

from .. import config, device
from ..errors import BudgetError
from ..experts.files.store import ExpertStore
from ..experts.pool.budget import within_working_set
from ..experts.pool.pool import POOL_ALIGNMENT, pool_stride
from ..experts.pool.segments import Division, divide
from .caches import CACHE_STEP, CacheForm

# Tokens that a plan keeps scratch for: the first of these whose scratch leaves experts
# enough of the memory, or else the last. A prompt may take more of them together, for
# which experts give way, or fewer beside long caches.
CHUNKS = (2048, 1024, 512, 256, 128, 64)
SCRATCH_SHARE = 1 / 4
SMALLER_CHUNKS = (32, 16)
# Share of the planned experts that stay beside prompts which a server keeps for later.
KEPT_SHARE = 1 / 2


class Needs(Protocol):
    """A model's needs of memory, from shapes alone; bytes throughout."""

    def resident_bytes(self, unpack: bool) -> int:
        """Return the bytes of parameters once they are ready for use.

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
        """Return the bytes of a call's hidden states until their logits are known."""

    def logits_bytes(self, n_tokens: int) -> int:
        """Return the bytes of the logits of so many tokens."""

    @property
    def most_tokens(self) -> int:
        """How long a sequence may become."""

    @property
    def cache_forms(self) -> list[CacheForm]:
        """The form of each of the caches, in the order of ``single_caches``."""

    @property
    def cache_row_bytes(self) -> int:
        """Bytes of each token of a sequence in caches that grow without end."""

    @property
    def cache_state_bytes(self) -> int:
        """Bytes of each sequence in all other caches once they are full."""


@dataclass(frozen=True)
class MemoryPlan:
    """The parts of a process's memory.

    ``process_bytes`` are the interpreter and libraries, ``cache_bytes`` the caches of
    one sequence's first ``CACHE_STEP`` tokens: as they grow, the ``n_slots`` experts in
    ``expert_bytes`` give way, until one sequence has ``context_tokens`` and experts are
    at their least. Scratch is kept for ``chunk_tokens``, for more experts give way.
    ``unpack``: quantised matrices are also kept dense in float32. Experts lie in
    ``n_segments`` buffers, and ``replacing_bytes`` beside scratch are free for a second
    one while experts give way; ``capped`` says which limits of the device shaped the
    plan.
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
        """Bytes for prompts that a server keeps for later, experts at their floor.

        One request's own caches are not part of it.
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
    """Divide ``budget_bytes`` of a process's memory; experts take the rest.

    A limit of address space or of data that leaves less is the budget instead, and so
    is the working set that a device recommends.

    Args:
        scope: as for ``ExpertStreamer``.
        most_expert_bytes: experts take no more than this.

    Raises:
        BudgetError: the needs of one token do not fit; states the least that does, and
            the bytes of each part.
    """
    device.start_blas()
    asked, budget_bytes = budget_bytes, within_working_set(budget_bytes)
    why = ""
    if budget_bytes < asked:
        why = f", the working set that this device recommends, and not {asked}"
    # Those that read experts, MLX's four that read weights, and its own two.
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
        # More segments need more experts at least, which the first round cannot know.
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
    return replace(plan, capped=_capped(asked, plan, division))


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
    """Plan for experts in so many segments, or in more; say how they are divided.

    Args:
        parts: the bytes of all but scratch and experts.
        why: ends an error's sentence on the budget.
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
        taken = ", ".join(f"{decimal(n)} {what}" for what, n in parts.items())
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
        # Between calls, when experts move, nothing takes scratch.
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


def _capped(asked: int, plan: MemoryPlan, division: Division) -> str:
    """Say which limits of the device shaped a plan, if any did."""
    limits, found = device.gpu_limits(), []
    if limits is None:
        return ""
    if min(asked, plan.budget_bytes) == limits.working_set_bytes < asked:
        found.append(
            f"of {decimal(asked)} asked for, no more than the working set that this "
            f"device recommends, {decimal(limits.working_set_bytes)}"
        )
    buffer = f"the longest buffer of this device, {decimal(limits.buffer_bytes)}"
    if division.shortened:
        found.append(f"no more experts, because of {buffer}")
    if division.n_segments > division.n_wanted:
        found.append(f"experts in {division.n_segments} buffers, because of {buffer}")
    return "; ".join(found)


def affords_unpacked(needs: Needs, room: int | None = None) -> bool:
    """Return whether quantised matrices are to be kept dense on a CPU besides.

    Args:
        room: bytes there are for that; by default all that the machine has.
    """
    if not device.on_cpu():
        return False
    dense = needs.resident_bytes(True) - needs.resident_bytes(False)
    machine_bytes = device.physical_memory_bytes()
    most = machine_bytes if room is None else min(room, machine_bytes)
    return 0 < dense <= device.UNPACKED_SHARE * most


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
    """Return the process's bytes but for MLX's arrays."""
    taken = device.process_bytes()
    if taken is None:
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        taken *= 1 if sys.platform == "darwin" else 1024
    return max(0, taken - mx.get_active_memory())
