"""Which expert gives up its slot when another one needs it."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from ...errors import ConfigError, TraceError
from .routing_trace import RoutingTrace

# Measured with `moeflux cachesim` on the demo model: see docs/architecture.md.
DEFAULT_POLICY = "lfu"


@dataclass(frozen=True)
class PoolShape:
    """What a policy decides about: slots, and the rows of experts that share them.

    A row is one MoE layer, counted from 0, of ``n_experts``. Rows next to each other
    form a group, which has its own part of the slots.
    """

    n_rows: int
    n_experts: int
    n_slots: int
    n_groups: int = 1

    def group(self, row: int) -> int:
        """Return which group of slots a row takes part in."""
        return part_of(row, self.n_rows, self.n_groups)

    def rows(self, group: int) -> range:
        """Return the rows of a group."""
        return rows_of(group, self.n_rows, self.n_groups)


def part_of(row: int, n_rows: int, n_parts: int) -> int:
    """Return which of the parts a row is in, where all are as long as can be."""
    return row * n_parts // n_rows


def rows_of(part: int, n_rows: int, n_parts: int) -> range:
    """Return the rows of a part: those for which ``part_of`` gives it."""
    return range(-(-part * n_rows // n_parts), -(-(part + 1) * n_rows // n_parts))


class Policy(ABC):
    """Orders the experts in memory; a key is ``row * n_experts + expert``.

    The same calls in the same order give the same victims.
    """

    @abstractmethod
    def use(self, row: int, keys: Iterable[int]) -> None:
        """Note that a step uses these experts of a row, in this order."""

    @abstractmethod
    def admit(self, row: int, key: int) -> None:
        """Note that an expert is in memory from now on, used or not."""

    @abstractmethod
    def forget(self, row: int, key: int) -> None:
        """Note that an expert is in memory no more."""

    @abstractmethod
    def victim(
        self, row: int, rows: Container[int], keep: Container[int]
    ) -> int | None:
        """Return the key to evict for an expert of ``row``; None if there is none.

        Args:
            rows: those of its group that may give up a slot.
            keep: keys that may not.
        """


PolicyFactory = Callable[[PoolShape], Policy]


class LRU(Policy):
    """Evict the expert whose last use is the longest ago."""

    def __init__(self, shape: PoolShape):
        self._shape = shape
        # A dict keeps insertion order: the oldest use comes first.
        self._uses: list[dict[int, None]] = [{} for _ in range(shape.n_groups)]

    def use(self, row: int, keys: Iterable[int]) -> None:
        """Move the keys that are in memory to the end of the line."""
        uses = self._uses[self._shape.group(row)]
        for key in keys:
            if key in uses:
                del uses[key]
                uses[key] = None

    def admit(self, row: int, key: int) -> None:
        """Put a key at the end of the line."""
        self._uses[self._shape.group(row)][key] = None

    def forget(self, row: int, key: int) -> None:
        """Take a key out of the line."""
        del self._uses[self._shape.group(row)][key]

    def victim(
        self, row: int, rows: Container[int], keep: Container[int]
    ) -> int | None:
        """Return the oldest key that may go."""
        n_experts = self._shape.n_experts
        for key in self._uses[self._shape.group(row)]:
            if key not in keep and key // n_experts in rows:
                return key
        return None


class LFU(Policy):
    """Evict the expert used least often, with ageing.

    A use counts half once every expert has, on average, been used ``HALF_LIFE`` times
    since. Counts outlive eviction.
    """

    HALF_LIFE: ClassVar[float] = 4.0
    _LARGEST: ClassVar[float] = 1e200

    def __init__(self, shape: PoolShape):
        n_keys = shape.n_rows * shape.n_experts
        self._shape = shape
        # Instead of older uses counting less, newer ones count more.
        self._counts = [0.0] * n_keys
        self._weight = 1.0
        self._growth = 2 ** (1 / (self.HALF_LIFE * n_keys))
        self._held: list[dict[int, None]] = [{} for _ in range(shape.n_groups)]
        # Heaps of keys with their counts as they were, for counts only grow; one entry
        # for each key, which may stay when the key is forgotten.
        self._queues: list[list[tuple[float, int]]] = [[] for _ in self._held]
        self._queued: list[set[int]] = [set() for _ in self._held]

    def use(self, row: int, keys: Iterable[int]) -> None:
        """Count a use of each key, in memory or not."""
        counts = self._counts
        for key in keys:
            counts[key] += self._weight
            self._weight *= self._growth
        if self._weight > self._LARGEST:
            self._rescale()

    def admit(self, row: int, key: int) -> None:
        """Let a key be evicted, by the uses counted so far."""
        group = self._shape.group(row)
        self._held[group][key] = None
        if key not in self._queued[group]:
            self._queued[group].add(key)
            heapq.heappush(self._queues[group], (self._counts[key], key))

    def forget(self, row: int, key: int) -> None:
        """Let a key be no victim; its count stays."""
        del self._held[self._shape.group(row)][key]

    def victim(
        self, row: int, rows: Container[int], keep: Container[int]
    ) -> int | None:
        """Return the key of least count that may go."""
        group, n_experts = self._shape.group(row), self._shape.n_experts
        counts, held, queue = self._counts, self._held[group], self._queues[group]
        found, passed = None, []
        while queue and found is None:
            count, key = queue[0]
            if key not in held:
                heapq.heappop(queue)
                self._queued[group].remove(key)
            elif count != counts[key]:
                heapq.heapreplace(queue, (counts[key], key))
            elif key in keep or key // n_experts not in rows:
                passed.append(heapq.heappop(queue))
            else:
                found = key
        for entry in passed:
            heapq.heappush(queue, entry)
        return found

    def _rescale(self) -> None:
        self._counts = [count / self._weight for count in self._counts]
        self._weight = 1.0
        for queue in self._queues:
            queue[:] = [(self._counts[key], key) for _, key in queue]
            heapq.heapify(queue)


class Markov(Policy):
    """Evict the expert that is least expected soon, by which experts follow which.

    A use that comes t tokens later is worth ``DISCOUNT ** t``. How much an expert is
    expected to be worth, counts tell for each expert that its layer has just used: what
    came after that one before. ``FOLLOWING`` of an expert's value is the mean of these,
    the rest how often it was used lately. Counts are float32
    ``[n_rows, n_experts, n_experts]`` and outlive eviction.
    """

    DISCOUNT: ClassVar[float] = 0.6
    FOLLOWING: ClassVar[float] = 0.7
    # Steps of a layer after which a use counts half: lately, and as one that followed.
    LATELY: ClassVar[float] = 30.0
    FOLLOWED: ClassVar[float] = 1400.0
    _AGEING_STEPS: ClassVar[int] = 64

    def __init__(self, shape: PoolShape):
        n, e = shape.n_rows, shape.n_experts
        self._shape = shape
        # For each row: how often one expert followed another; how often each was used;
        # how recently, discounted; how often lately; and the value that follows.
        self._followed = np.zeros((n, e, e), np.float32)
        self._uses = np.full((n, e), 1e-9, np.float32)
        self._recent = np.zeros((n, e), np.float32)
        self._lately = np.zeros((n, e), np.float32)
        self._values = np.zeros((n, e), np.float32)
        # The values of what is in memory, infinite for all else.
        self._standing = np.full((n, e), np.inf, np.float32)
        self._steps = [0] * n

    def use(self, row: int, keys: Iterable[int]) -> None:
        """Count what followed what, and expect what followed these."""
        used = [key - row * self._shape.n_experts for key in keys]
        if not used:
            return
        fading = 0.5 ** (1 / self.LATELY)
        lately, values = self._lately[row], self._values[row]
        lately *= fading
        lately[used] += 1 - fading
        # By the discount's sum, so that both parts of a value are worth alike.
        np.multiply(lately, (1 - self.FOLLOWING) / (1 - self.DISCOUNT), out=values)
        if 2 * len(used) > self._shape.n_experts:
            # Most experts, as a prompt uses: that says nothing of what follows what.
            self._recent[row] = 0
        else:
            values += self._follow(row, used)
        standing = self._standing[row]
        np.copyto(standing, values, where=standing < np.inf)

    def _follow(self, row: int, used: list[int]) -> np.ndarray:
        """Count experts after those before them; return what to expect after them."""
        followed, uses, recent = self._followed[row], self._uses[row], self._recent[row]
        followed[used] += recent
        recent *= self.DISCOUNT
        recent[used] += 1
        uses[used] += 1
        self._steps[row] += 1
        if self._steps[row] % self._AGEING_STEPS == 0:
            ageing = 0.5 ** (self._AGEING_STEPS / self.FOLLOWED)
            followed *= ageing
            uses *= ageing
        shares = np.zeros_like(uses)
        shares[used] = self.FOLLOWING / len(used) / uses[used]
        return followed @ shares

    def admit(self, row: int, key: int) -> None:
        """Let a key be evicted."""
        self._standing.flat[key] = self._values.flat[key]

    def forget(self, row: int, key: int) -> None:
        """Let a key be no victim; what is known of it stays."""
        self._standing.flat[key] = np.inf

    def victim(
        self, row: int, rows: Container[int], keep: Container[int]
    ) -> int | None:
        """Return the key of least value that may go, the first of several."""
        n_experts = self._shape.n_experts
        group = self._shape.rows(self._shape.group(row))
        first = group.start
        standing = self._standing[first : group.stop].reshape(-1)
        passed: list[tuple[int, float]] = []
        found = None
        while found is None and standing[place := int(standing.argmin())] < np.inf:
            key = first * n_experts + place
            if key not in keep and key // n_experts in rows:
                found = key
            else:
                passed.append((place, standing[place]))
                standing[place] = np.inf
        for place, value in passed:
            standing[place] = value
        return found


class Pins(Policy):
    """Keep the experts that a recorded run used most; the rest is another policy's.

    A pinned expert is read when first needed and evicted only when there is nothing
    else to evict.
    """

    # The pinned share of all slots.
    SHARE: ClassVar[float] = 0.5

    def __init__(self, shape: PoolShape, trace: RoutingTrace, rest: PolicyFactory):
        counts = trace.counts()
        if counts.shape != (shape.n_rows, shape.n_experts):
            raise TraceError(
                f"[policy] expected a trace of {shape.n_rows} layers with "
                f"{shape.n_experts} experts but got {counts.shape[0]} with "
                f"{counts.shape[1]}"
            )
        order = (-counts.ravel()).argsort(kind="stable").tolist()
        self._pins = frozenset(order[: int(self.SHARE * shape.n_slots)])
        self._shape = shape
        self._held: list[dict[int, None]] = [{} for _ in range(shape.n_groups)]
        self._rest = rest(shape)

    def use(self, row: int, keys: Iterable[int]) -> None:
        """Tell the other policy: it knows which are its own."""
        self._rest.use(row, keys)

    def admit(self, row: int, key: int) -> None:
        """Pin a key, or leave it to the other policy."""
        if key in self._pins:
            self._held[self._shape.group(row)][key] = None
        else:
            self._rest.admit(row, key)

    def forget(self, row: int, key: int) -> None:
        """Note that a key, pinned or not, is in memory no more."""
        if key in self._pins:
            del self._held[self._shape.group(row)][key]
        else:
            self._rest.forget(row, key)

    def victim(
        self, row: int, rows: Container[int], keep: Container[int]
    ) -> int | None:
        """Return the other policy's victim; a pinned key where it has none."""
        if (found := self._rest.victim(row, rows, keep)) is not None:
            return found
        n_experts = self._shape.n_experts
        held = self._held[self._shape.group(row)]
        free = (key for key in held if key not in keep and key // n_experts in rows)
        return next(free, None)


POLICIES: dict[str, PolicyFactory] = {"lru": LRU, "lfu": LFU, "markov": Markov}
POLICY_FORMS = (
    f"{', '.join(POLICIES)}, pins:TRACE, or one of the first with +pins:TRACE"
)


def policy_factory(name: str, argument: str = "policy") -> PolicyFactory:
    """Return what makes the policy of a name.

    Args:
        name: ``lru``, ``lfu``, ``markov``, or ``pins:TRACE`` with a file of ``moeflux
            trace``, after one of these and ``+`` if the rest is not to go by the
            default.
        argument: what an error calls it.

    Raises:
        ConfigError: there is no policy of that name.
        TraceError: the file is missing, damaged or no trace.
    """
    if name in POLICIES:
        return POLICIES[name]
    rest, pins, path = name.partition("pins:")
    rest = rest.removesuffix("+") or DEFAULT_POLICY
    if not pins or not path or rest not in POLICIES:
        raise ConfigError(f"[{argument}] expected {POLICY_FORMS} but got {name!r}")
    trace = RoutingTrace.load(path)
    return partial(Pins, trace=trace, rest=POLICIES[rest])
