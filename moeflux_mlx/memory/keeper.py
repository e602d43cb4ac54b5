"""Keep a process within its memory plan while caches grow and prompts arrive."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from rich.filesize import decimal

from .. import device
from ..errors import BudgetError
from ..experts.streaming.streamer import ExpertStreamer
from . import caches
from .caches import CACHE_STEP
from .plan import CHUNKS, KEPT_SHARE, SMALLER_CHUNKS, MemoryPlan, Needs
from .relief import Relief, resize

# Single tokens for which room is made at a time.
LOOKAHEAD = 16
# Unplanned memory is rounded up to multiples of this, so that the pool rarely changes.
SURPLUS_STEP_BYTES = 16 << 20
# Share that a refusal adds to a gradient's bytes: with the memory that it asks for they
# are measured again, and peaks vary.
STATED_SHARE = 1 / 16


class MemoryKeeper:
    """Resize the expert pool between tokens, so that the process keeps to its plan.

    The cache of every call counts as long as it is alive.
    """

    def __init__(self, plan: MemoryPlan, needs: Needs, streamer: ExpertStreamer):
        # The plan has no room for MLX's cache of freed arrays.
        device.return_freed()
        self.plan, self._needs, self._streamer = plan, needs, streamer
        self._most_slots = streamer.n_slots
        self._relief = Relief(streamer)
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        # Single tokens that have room already: their first cache, their sequences, and
        # their number.
        self._reserved: tuple[Callable[[], Any], int, int] = (lambda: None, 0, 0)
        # Whether a first prompt, which makes the process grow, has run.
        self._has_grown = False
        # The last call's scratch: its memory beyond weights, caches and experts.
        self.scratch_bytes = plan.scratch_bytes

    def limit(self, n_slots: int) -> None:
        """Hold at most ``n_slots`` experts from now on.

        Raises:
            BudgetError: the pool cannot have this size; nothing changes.
        """
        self._streamer.resize(n_slots)
        self._most_slots = n_slots

    def count(self, cache: Iterable[Any]) -> None:
        """Count caches that exist although no call has used them."""
        self._caches.update(c for c in cache if c is not None)

    def make_room(
        self,
        cache: list[Any],
        n_seqs: int,
        t: int,
        *,
        logits: bool = False,
        spares: bool = False,
    ) -> int:
        """Make room for a call with ``t`` more tokens of each sequence.

        This decides for the whole call, so that none of its chunks is refused later.
        It makes room for the call's logits too if experts can give way to them; a
        prompt's logits are mostly discarded without being computed.

        Args:
            cache: the caches of the call.
            n_seqs: number of sequences.
            t: tokens of each sequence.
            logits: the caller uses all logits, so they need room.
            spares: raise rather than take slots from the experts' floor, because the
                caller has something else that can give way.

        Returns:
            The number of tokens, over all sequences, to compute together.

        Raises:
            BudgetError: the call does not fit even with the fewest experts; nothing
                changes.
        """
        last, n_before, n_tokens = self._reserved
        if self._relief.look(self._most_slots):
            n_tokens = 0
        if t == 1 and n_tokens > 0 and n_before == n_seqs and last() is cache[0]:
            self._reserved = (last, n_seqs, n_tokens - 1)
            return n_seqs
        self.count(cache)
        call = _Planned(cache, n_seqs, t, logits)
        floor = self._floor if spares else self._streamer.least_slots
        parts = self._parts(measured=t > 1)
        choice = self._choose(parts, call, floor)
        if choice is None and not spares:
            # Caches in reference cycles stay alive until the collector runs.
            gc.collect()
            mx.clear_cache()
            device.trim_heap()
            parts = self._parts(measured=True)
            choice = self._choose(parts, call, floor)
        if choice is None:
            raise self._too_little(parts, call)
        chunk, self.scratch_bytes, n_slots = choice
        resize(self._streamer, n_slots, cache)
        self._has_grown |= t > 1
        # After a prompt nothing is reserved, so the next call gives experts room again.
        n_tokens = LOOKAHEAD - 1 if t == 1 else 0
        self._reserved = (weakref.ref(cache[0]), n_seqs, n_tokens)
        return chunk

    def clear(self, cache: list[Any]) -> int:
        """Hold the fewest experts; return the bytes that are free then."""
        streamer = self._streamer
        streamer.come_and_go()
        resize(streamer, streamer.least_slots, cache)
        taken = sum(self._parts(measured=True).values()) + self._least_bytes
        return self.plan.budget_bytes - taken

    def hold(self, n_bytes: int, cache: list[Any], n_seqs: int, t: int) -> None:
        """Make room for the arrays that a call keeps until its gradient exists.

        The backward pass requests the experts once more.

        Args:
            n_bytes: bytes that a call with ``t`` more tokens of each sequence keeps.

        Raises:
            BudgetError: even with the fewest experts it does not fit.
        """
        self.count(cache)
        self._relief.look(self._most_slots)
        device.trim_heap()
        call = _Planned(cache, n_seqs, t, logits=True)
        growth = call.growth(call.n_tokens, self._needs) if cache else 0
        parts = self._parts(measured=True)
        room = self.plan.budget_bytes - sum(parts.values()) - growth
        n_slots = self._n_slots(room - n_bytes, room)
        if n_slots < self._streamer.least_slots:
            stated = math.ceil((1 + STATED_SHARE) * n_bytes)
            parts |= {"caches": parts["caches"] + growth, "gradients": stated}
            raise self._no_gradient(parts, n_seqs, t)
        self._streamer.come_and_go()
        resize(self._streamer, n_slots, cache)
        self._reserved = (lambda: None, 0, 0)

    @property
    def _least_bytes(self) -> int:
        streamer = self._streamer
        return streamer.least_slots * streamer.slot_bytes + streamer.slack_bytes

    def _no_gradient(self, parts: dict[str, int], n_seqs: int, t: int) -> BudgetError:
        parts |= {f"{self._streamer.least_slots} experts": self._least_bytes}
        needed, budget = sum(parts.values()), self.plan.budget_bytes
        taken = ", ".join(f"{decimal(n)} {what}" for what, n in parts.items() if n)
        return BudgetError(
            f"[memory] expected at least {needed} bytes ({taken}) but got {budget} for "
            f"the gradients of {n_seqs} x {t} tokens: train on fewer or shorter "
            "sequences at a time, compute layers again (grad_checkpoint), or raise "
            "memory"
        )

    def _parts(self, *, measured: bool) -> dict[str, int]:
        """Return the bytes in use before a call, without experts, by purpose.

        Args:
            measured: measure the process, which may take less than planned.
        """
        held = sum(c.nbytes for c in self._caches)
        process = self.plan.process_bytes
        fixed = process + self.plan.resident_bytes
        return {
            "process": self._measured_process(process) if measured else process,
            "weights": self.plan.resident_bytes,
            "unplanned memory": self._surplus(fixed + held),
            "caches": held,
        }

    @property
    def _floor(self) -> int:
        """The fewest slots while anything other than experts can give way."""
        floor, wanted = int(KEPT_SHARE * self.plan.n_slots), self._most_slots
        return max(self._streamer.least_slots, min(floor, self._relief.n_slots(wanted)))

    def _choose(
        self, parts: dict[str, int], call: _Planned, floor: int
    ) -> tuple[int, int, int] | None:
        """Return the chunk, its scratch and the slots with the fewest expert reads.

        Each chunk reads its experts that are not in memory. Experts that give way are
        read once more afterwards. None: no chunk fits.
        """
        room = self.plan.budget_bytes - sum(parts.values())
        left, held = device.left_by_ulimit(), self._streamer.n_slots
        choices: list[tuple[int, int, int, int]] = []
        for chunk in call.chunks():
            growth = call.growth(chunk, self._needs)
            least, most = self._scratch(chunk, call)
            for scratch in (most, least):
                # No call runs while experts move to a second buffer, so that buffer may
                # use the scratch.
                n_slots = self._n_slots(room - growth - scratch, room - growth)
                if n_slots < floor:
                    continue
                # A smaller pool frees memory, but a ulimit still counts its addresses.
                if left is not None and growth + scratch > left:
                    continue
                missing = max(0, self._streamer.most_requested(chunk) - n_slots)
                n_read = -(-call.n_tokens // chunk) * missing + max(0, held - n_slots)
                choices.append((n_read, chunk, scratch, n_slots))
                break
        if not choices:
            return None
        # ``min`` returns the first of equal choices, which has the longest chunk.
        return min(choices, key=lambda choice: choice[0])[1:]

    def _scratch(self, chunk: int, call: _Planned) -> tuple[int, int]:
        """Return the scratch that a call needs, and the scratch with all its logits."""
        scratch = self._needs.scratch_bytes(chunk, call.n_rows, call.n_seqs)
        scratch += self._needs.output_bytes(call.n_tokens)
        most = max(scratch, self._needs.logits_bytes(call.n_tokens))
        return (most if call.logits else scratch), most

    def _n_slots(self, room: int, replacing: int) -> int:
        """Return how many slots fit into ``room``, within the limits set here.

        Args:
            room: bytes for the pool.
            replacing: bytes for the pool while it shrinks, the second buffer included.
        """
        n_slots = self._streamer.most_fitting(room, replacing)
        return min(n_slots, self._relief.n_slots(self._most_slots))

    def _surplus(self, expected: int) -> int:
        """Return the process's bytes beyond ``expected`` and the experts, on a CPU."""
        expected += self._streamer.memory_bytes
        if not device.on_cpu() or (device.process_bytes() or 0) <= expected:
            return 0
        device.trim_heap()
        surplus = max(0, (device.process_bytes() or 0) - expected)
        return -(-surplus // SURPLUS_STEP_BYTES) * SURPLUS_STEP_BYTES

    def _measured_process(self, planned: int) -> int:
        """Return the process's measured bytes plus a margin, at most ``planned``.

        Only slots with an expert are subtracted as pool memory: the system may never
        have backed the others.
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

    def _too_little(self, parts: dict[str, int], call: _Planned) -> BudgetError:
        streamer = self._streamer
        *_, chunk = call.chunks()
        growth, scratch = call.growth(chunk, self._needs), self._scratch(chunk, call)[0]
        n_least, least_bytes = streamer.least_slots, self._least_bytes
        others = parts["caches"] - sum(c.nbytes for c in call.caches)
        parts = parts | {"caches": parts["caches"] + growth, "scratch": scratch}
        parts |= {f"{n_least} experts": least_bytes}
        needed, budget = sum(parts.values()), self.plan.budget_bytes
        taken = ", ".join(f"{decimal(n)} {name}" for name, n in parts.items() if n)
        if needed <= budget:
            needed, budget = growth + scratch, device.left_by_ulimit() or 0
            taken = f"{taken}: {decimal(needed)} of them still to be allocated"
            given = f"{budget} that ulimit leaves"
        else:
            given = f"{budget}"
        return BudgetError(
            f"[memory] expected at least {needed} bytes ({taken}) but got "
            f"{given}: {call.n_seqs} x {call.t} tokens would make caches of "
            f"{call.n_rows} rows, beside {decimal(others)} in other caches; one "
            f"sequence alone has room for {self.plan.context_tokens} tokens: drop old "
            "caches, shorten the prompt, or raise memory"
        )


class _Planned:
    """A planned call; ``n_rows`` is the length of each sequence's cache after it."""

    def __init__(self, cache: list[Any], n_seqs: int, t: int, logits: bool):
        self.caches = [c for c in cache if c is not None]
        self.n_seqs, self.t, self.logits = n_seqs, t, logits
        self.n_tokens = n_seqs * t
        # A call of one token is followed by more such calls: plan for several.
        self._n_more = t if t > 1 else LOOKAHEAD
        used = caches.n_rows(self.caches)
        self.n_rows = -(-(used + self._n_more) // CACHE_STEP) * CACHE_STEP

    def chunks(self) -> list[int]:
        """Return the possible numbers of tokens to compute together, descending."""
        return _chunks(self.n_seqs, self.t)

    def growth(self, chunk: int, needs: Needs) -> int:
        """Return the bytes by which the caches grow in chunks of ``chunk`` tokens."""
        step = chunk // self.n_seqs
        forms = needs.cache_forms
        return caches.growth_bytes(self.caches, forms, self.n_seqs, self._n_more, step)


def _chunks(n_seqs: int, t: int) -> list[int]:
    """Return the possible numbers of tokens to compute together, descending.

    Each has equally many tokens of each sequence, at least one.
    """
    sizes = {min(n_seqs * t, size) for size in (*CHUNKS, *SMALLER_CHUNKS)}
    return sorted({max(1, size // n_seqs) * n_seqs for size in sizes}, reverse=True)


def make_room(
    keeper: Any,
    give_way: Callable[[], bool] | None,
    cache: list[Any],
    n_seqs: int,
    t: int,
    **options: Any,
) -> int:
    """Make room as ``MemoryKeeper.make_room``; first free memory that is not experts'.

    Args:
        keeper: the keeper.
        give_way: frees some memory and returns True, or returns False without any. It
            is called before experts fall below their floor.
        cache, n_seqs, t, options: as for ``MemoryKeeper.make_room``.

    Raises:
        BudgetError: the call does not fit, whatever gives way.
    """
    spares = give_way is not None
    while True:
        try:
            spared = {"spares": True} if spares else {}
            found: int = keeper.make_room(cache, n_seqs, t, **options, **spared)
            return found
        except BudgetError:
            if give_way is not None and give_way():
                continue
            if not spares:
                raise
            # Nothing else can give way, so let experts fall below their floor.
            spares = False
