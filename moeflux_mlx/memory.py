"""Plan what a process's memory goes to, before loading."""

from __future__ import annotations

import bisect
import resource
import sys
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
from rich.filesize import decimal

from . import config, device
from .caches import CACHE_STEP, CacheForm
from .errors import BudgetError
from .experts.pool import POOL_ALIGNMENT, pool_stride
from .experts.store import ExpertStore

# Tokens that a plan keeps scratch for: the first of these whose scratch leaves experts
# enough of the memory, or else the last. A prompt may take more of them together, for
# which experts give way, or fewer beside long caches.
CHUNKS = (2048, 1024, 512, 256, 128, 64)
SCRATCH_SHARE = 1 / 4
SMALLER_CHUNKS = (32, 16)


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
    def most_tokens(self) -> int:
        """How long a sequence may become."""

    @property
    def cache_forms(self) -> list[CacheForm]:
        """What each of the caches takes, in the order of ``single_caches``."""

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

    A limit of address space or of data that leaves less is the budget instead.

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
    device.start_blas()
    # Those that read experts, MLX's four that read weights, and its own two.
    n_threads = config.read_threads() + 6
    allowed = device.ulimit_bytes(n_threads)
    why = ""
    if allowed is not None and allowed < budget_bytes:
        budget_bytes = allowed
        why = f", all that ulimit leaves beside the stacks of {n_threads} threads"
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
            f"({decimal(sum(parts.values()))}: {taken}) but got {budget_bytes}{why}"
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
    """Return what the process has taken but for MLX's arrays."""
    taken = device.process_bytes()
    if taken is None:
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        taken *= 1 if sys.platform == "darwin" else 1024
    return max(0, taken - mx.get_active_memory())
