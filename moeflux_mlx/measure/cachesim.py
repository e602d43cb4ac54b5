"""Replay a routing trace through the streamer's slot table, without reading experts."""

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

    ``requests`` counts the distinct experts of a layer in a pass, as the streamer does.
    ``ahead`` counts the experts read ahead, used or not.
    """

    requests: np.ndarray
    misses: np.ndarray
    ahead: np.ndarray

    def hit_rate(self, first: int = 0) -> float:
        """Return the share of hits among the requests from pass ``first`` on."""
        n_requests = int(self.requests[first:].sum())
        return (n_requests - int(self.misses[first:].sum())) / max(1, n_requests)


@dataclass(frozen=True)
class Outcome:
    """The result of a policy, or the optimum, with slots for a ``share`` of experts.

    ``hit_rate`` covers the whole run, which begins with empty slots; experts in flight
    count as hits. ``steady_hit_rate`` and ``bytes_per_token`` cover the second half of
    the generated tokens. By then the slots are full and the policy's counts have
    settled.
    """

    policy: str
    share: float
    n_slots: int
    hit_rate: float
    steady_hit_rate: float
    bytes_per_token: float


OPTIMUM = "optimum"
# Suffix of a policy's name.
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
        trace: the recorded routing.
        policies: factories by name.
        shares: slots as shares of all experts, between 0 and 1.
        scope, floor: as for ``ExpertStreamer``.
        read_ahead: also run each policy with reading ahead; the optimum has none.
        n_segments: as for ``replay``; the optimum has one segment.

    Raises:
        ConfigError: a share is out of range or too small for one token, or
            ``read_ahead`` needs predictions and the trace has none.
    """
    if read_ahead and trace.likely is None:
        raise ConfigError(
            "[cachesim] expected a trace with predicted experts, to read ahead, but "
            "got one without: record it again"
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
    n_layers = len(trace.layers)
    if not 1 <= n_segments <= n_layers:
        raise ConfigError(
            f"[segments] expected 1 to {n_layers}, one a layer, but got {n_segments}"
        )
    n_groups = n_segments if scope == "global" else n_layers
    n_slots = round(share * n_layers * trace.n_experts) if 0 < share < 1 else 0
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
    """Return the counts of an ``ExpertStreamer`` for a trace.

    Args:
        trace: the recorded routing.
        n_slots: slots over all layers, fewer than there are experts.
        policy, scope, floor: as for ``ExpertStreamer``.
        read_ahead: read the experts of ``trace.likely`` before each layer's request.
            Here all of them arrive in time; a streamer might have to wait.
        n_segments: number of buffers; only the layers of one buffer share slots.
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
    for i, ((n_tokens, by_layer), likely) in enumerate(passes):
        use = use_at_once if n_tokens == 1 else use_in_waves
        for layer, needed in enumerate(by_layer):
            if read_ahead and likely is not None:
                ahead[i, layer] = read_before_use(table, layer, likely[layer])
            requests[i, layer] = len(needed)
            misses[i, layer] = use(table, layer, needed)
    return Replay(requests, misses, ahead)


def replay_optimum(
    trace: RoutingTrace, n_slots: int, *, scope: str = "global"
) -> Replay:
    """Return the fewest misses possible, by Belady's rule and without floors."""
    n_layers = len(trace.layers)
    keys = [
        [
            [layer * trace.n_experts + e for e in needed]
            for layer, needed in enumerate(by_layer)
        ]
        for _, by_layer in trace.needed()
    ]
    together = (trace.passes == 1).tolist()
    if scope == "global":
        steps = [step for by_layer in keys for step in by_layer]
        at_once = [one for one in together for _ in range(n_layers)]
        misses = np.array(fewest_misses(steps, n_slots, at_once)).reshape(-1, n_layers)
    else:
        divided = shares([trace.n_experts] * n_layers, n_slots, 1)
        columns = [
            fewest_misses([by_layer[layer] for by_layer in keys], share, together)
            for layer, share in enumerate(divided)
        ]
        misses = np.array(columns).T
    requests = [[len(needed) for needed in by_layer] for by_layer in keys]
    return Replay(np.array(requests), misses, np.zeros_like(misses))


def read_before_use(table: SlotTable, layer: int, likely: Sequence[int]) -> int:
    """Read the experts that a layer is predicted to use; return the number of reads."""
    missing = [e for e in likely if table.slots[layer][e] == EMPTY]
    return _read(table, layer, missing, likely)


def use_at_once(table: SlotTable, layer: int, needed: Sequence[int]) -> int:
    """Use experts that are needed together, as for one token; return the misses."""
    missing = [e for e in needed if table.slots[layer][e] == EMPTY]
    _read(table, layer, missing, needed)
    table.touch(layer, needed)
    return len(missing)


def use_in_waves(table: SlotTable, layer: int, needed: Sequence[int]) -> int:
    """Use each expert once, as for a prompt; return the misses.

    This follows ``ExpertStreamer.waves``: experts in memory come first, and the next
    wave is read while one is used.
    """
    left, n_misses = list(needed), 0
    n_ahead = min(WAVE_EXPERTS, max(1, table.capacity // 2))
    while left:
        wave = _present(table, layer, left)
        if not wave:
            n_misses += _read(table, layer, left[:n_ahead], left)
            wave = _present(table, layer, left)
        left = [e for e in left if e not in wave]
        table.touch(layer, wave)
        n_misses += _read(table, layer, left[:n_ahead], [*wave, *left])
    return n_misses


def _read(
    table: SlotTable, layer: int, experts: Sequence[int], keep: Collection[int]
) -> int:
    """Claim slots for experts while slots last, and fill them; return how many."""
    kept = {table.key(layer, expert) for expert in keep}
    slots = []
    for _ in experts:
        if (slot := table.claim(layer, kept)) is None:
            break
        slots.append(slot)
    for expert, slot in zip(experts, slots, strict=False):
        table.place(layer, expert, slot)
    return len(slots)


def _present(table: SlotTable, layer: int, experts: Sequence[int]) -> list[int]:
    return [e for e in experts if table.slots[layer][e] != EMPTY]
