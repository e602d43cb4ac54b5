"""Replay recorded routing through the streamer's slot table, without reading."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..experts.pool.policy import PolicyFactory
from ..experts.pool.residency import EMPTY, SlotTable
from ..experts.pool.routing_trace import RoutingTrace
from ..experts.pool.segments import shares
from ..experts.streaming.streamer import WAVE_EXPERTS
from .belady import fewest_misses


@dataclass(frozen=True)
class Replay:
    """The counts of one replay, by pass and layer: ``[S, L]``.

    Requests are distinct experts of a layer in a pass, as the streamer counts them.
    ``ahead`` are experts read before they were asked for, needed or not.
    """

    requests: np.ndarray
    misses: np.ndarray
    ahead: np.ndarray

    def hit_rate(self, first: int = 0) -> float:
        """Return the share of requests from pass ``first`` on that were no misses."""
        n_requests = int(self.requests[first:].sum())
        return (n_requests - int(self.misses[first:].sum())) / max(1, n_requests)


@dataclass(frozen=True)
class Outcome:
    """How a policy, or the optimum, fares with slots for a ``share`` of all experts.

    ``hit_rate`` is that of the whole run, from empty slots on: what was in memory, or
    on its way, when it was asked for. The steady one, and ``bytes_per_token``, are
    those of the second half of the generated tokens: by then slots are full, and what a
    policy counts has been counted.
    """

    policy: str
    share: float
    n_slots: int
    hit_rate: float
    steady_hit_rate: float
    bytes_per_token: float


OPTIMUM = "optimum"
# Follows the name of a policy.
READING_AHEAD = ", ahead"


def simulate(
    trace: RoutingTrace,
    policies: Mapping[str, PolicyFactory],
    shares: Iterable[float],
    *,
    scope: str = "global",
    floor: int | None = None,
    read_ahead: bool = False,
    n_segments: int = 1,
) -> list[Outcome]:
    """Return the results of the optimum and every policy at each share of slots.

    Args:
        shares: of all experts, more than 0 and less than 1.
        scope, floor: as for ``ExpertStreamer``.
        read_ahead: let each policy also read ahead; the optimum never does.
        n_segments: as for ``replay``; the optimum has one.

    Raises:
        ConfigError: a share is out of range, or too small for a token, or the trace
            does not say which experts could have been read ahead.
    """
    if read_ahead and trace.likely is None:
        raise ConfigError(
            "[cachesim] expected a trace that says what each layer was expected to "
            "choose, to read ahead: record it again"
        )
    found: list[Outcome] = []
    for share in shares:
        n_slots = _count_slots(trace, share, scope, n_segments)
        optimum = replay_optimum(trace, n_slots, scope=scope)
        found.append(_outcome(trace, OPTIMUM, share, n_slots, optimum))
        for name, policy in policies.items():
            for ahead in (False, True) if read_ahead else (False,):
                done = replay(
                    trace,
                    n_slots,
                    policy,
                    scope=scope,
                    floor=floor,
                    read_ahead=ahead,
                    n_segments=n_segments,
                )
                label = name + READING_AHEAD if ahead else name
                found.append(_outcome(trace, label, share, n_slots, done))
    return found


def _count_slots(trace: RoutingTrace, share: float, scope: str, n_segments: int) -> int:
    n_rows = len(trace.layers)
    if not 1 <= n_segments <= n_rows:
        raise ConfigError(
            f"[segments] expected 1 to {n_rows}, one a layer, but got {n_segments}"
        )
    n_groups = n_segments if scope == "global" else n_rows
    n_slots = round(share * n_rows * trace.n_experts) if 0 < share < 1 else 0
    if scope != "global":
        n_slots -= n_slots % n_groups
    if n_slots < n_groups * trace.top_k:
        raise ConfigError(
            f"[cachesim] expected a share below 1 with at least "
            f"{n_groups * trace.top_k} slots but got {share:.2%}: {n_slots} slots"
        )
    return n_slots


def _outcome(
    trace: RoutingTrace, policy: str, share: float, n_slots: int, done: Replay
) -> Outcome:
    n_generated = int((trace.passes == 1).sum())
    first = min(len(trace.passes) - n_generated // 2, len(trace.passes) - 1)
    n_read = done.misses[first:] + done.ahead[first:]
    n_bytes = (n_read @ np.array(trace.record_bytes)).sum()
    return Outcome(
        policy=policy,
        share=share,
        n_slots=n_slots,
        hit_rate=done.hit_rate(),
        steady_hit_rate=done.hit_rate(first),
        bytes_per_token=float(n_bytes / trace.passes[first:].sum()),
    )


def replay(
    trace: RoutingTrace,
    n_slots: int,
    policy: PolicyFactory,
    *,
    scope: str = "global",
    floor: int | None = None,
    read_ahead: bool = False,
    n_segments: int = 1,
) -> Replay:
    """Return the counts of an ``ExpertStreamer`` with as many slots on this routing.

    Args:
        n_slots: of all layers together, fewer than there are experts.
        policy, scope, floor: as for ``ExpertStreamer``.
        read_ahead: read what ``trace.likely`` says before each layer asks; all of it
            arrives in time, where the streamer might have to wait.
        n_segments: buffers, whose layers alone share slots.
    """
    table = SlotTable(
        len(trace.layers),
        trace.n_experts,
        n_slots,
        top_k=trace.top_k,
        policy=policy,
        n_groups=n_segments if scope == "global" else len(trace.layers),
        n_segments=n_segments,
        least=trace.top_k,
        floor=floor,
    )
    requests, misses, ahead = (
        np.zeros((len(trace.passes), len(trace.layers)), int) for _ in range(3)
    )
    passes = zip(trace.needed(), trace.predicted(), strict=True)
    for i, ((n_tokens, rows), likely) in enumerate(passes):
        use = use_at_once if n_tokens == 1 else use_in_waves
        for row, needed in enumerate(rows):
            if read_ahead and likely is not None:
                ahead[i, row] = read_before_use(table, row, likely[row])
            requests[i, row] = len(needed)
            misses[i, row] = use(table, row, needed)
    return Replay(requests, misses, ahead)


def replay_optimum(
    trace: RoutingTrace, n_slots: int, *, scope: str = "global"
) -> Replay:
    """Return the fewest misses possible, by Belady's rule; it knows of no floors."""
    n_rows = len(trace.layers)
    keys = [
        [[row * trace.n_experts + e for e in needed] for row, needed in enumerate(rows)]
        for _, rows in trace.needed()
    ]
    together = (trace.passes == 1).tolist()
    if scope == "global":
        steps = [step for rows in keys for step in rows]
        at_once = [one for one in together for _ in range(n_rows)]
        misses = np.array(fewest_misses(steps, n_slots, at_once)).reshape(-1, n_rows)
    else:
        divided = shares([trace.n_experts] * n_rows, n_slots, 1)
        columns = [
            fewest_misses([rows[row] for rows in keys], share, together)
            for row, share in enumerate(divided)
        ]
        misses = np.array(columns).T
    requests = [[len(needed) for needed in rows] for rows in keys]
    return Replay(np.array(requests), misses, np.zeros_like(misses))


def read_before_use(table: SlotTable, row: int, likely: Sequence[int]) -> int:
    """Read the experts that a layer is expected to ask for; return how many."""
    missing = [e for e in likely if table.slots[row][e] == EMPTY]
    return _read(table, row, missing, likely)


def use_at_once(table: SlotTable, row: int, needed: Sequence[int]) -> int:
    """Use experts that are needed together, as one token does; return the misses."""
    missing = [e for e in needed if table.slots[row][e] == EMPTY]
    _read(table, row, missing, needed)
    table.touch(row, needed)
    return len(missing)


def use_in_waves(table: SlotTable, row: int, needed: Sequence[int]) -> int:
    """Use each expert once, as a prompt does; return the misses.

    The streamer's ``waves`` without the reading: what is in memory first, and the next
    wave is read while one is used.
    """
    left, n_misses = list(needed), 0
    n_ahead = min(WAVE_EXPERTS, max(1, table.capacity // 2))
    while left:
        wave = _present(table, row, left)
        if not wave:
            n_misses += _read(table, row, left[:n_ahead], left)
            wave = _present(table, row, left)
        left = [e for e in left if e not in wave]
        table.touch(row, wave)
        n_misses += _read(table, row, left[:n_ahead], [*wave, *left])
    return n_misses


def _read(
    table: SlotTable, row: int, experts: Sequence[int], keep: Collection[int]
) -> int:
    """Claim slots until none can be had, then fill them; return how many."""
    kept = {table.key(row, expert) for expert in keep}
    slots = []
    for _ in experts:
        if (slot := table.claim(row, kept)) is None:
            break
        slots.append(slot)
    for expert, slot in zip(experts, slots, strict=False):
        table.place(row, expert, slot)
    return len(slots)


def _present(table: SlotTable, row: int, experts: Sequence[int]) -> list[int]:
    return [e for e in experts if table.slots[row][e] != EMPTY]
