"""Eviction policies: which expert gives up its slot to another one."""

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
    """The slots that a policy manages, and the MoE layers that share them.

    Layers count from 0; each has ``n_experts`` experts. Consecutive layers form a group
    with slots of its own.
    """

    n_layers: int
    n_experts: int
    n_slots: int
    n_groups: int = 1

    def group(self, layer: int) -> int:
        """Return the group of a layer."""
        return group_of(layer, self.n_layers, self.n_groups)

    def layers(self, group: int) -> range:
        """Return the layers of a group."""
        return layers_of(group, self.n_layers, self.n_groups)


def group_of(layer: int, n_layers: int, n_groups: int) -> int:
    """Return a layer's group, where groups are as equal in length as possible."""
    return layer * n_groups // n_layers


def layers_of(group: int, n_layers: int, n_groups: int) -> range:
    """Return the layers whose ``group_of`` is ``group``."""
    first, stop = (-(-g * n_layers // n_groups) for g in (group, group + 1))
    return range(first, stop)


class Policy(ABC):
    """Choose which expert in memory to evict; a key is ``layer * n_experts + expert``.

    A policy is deterministic: the same calls in the same order give the same victims.
    """

    @abstractmethod
    def use(self, layer: int, keys: Iterable[int]) -> None:
        """Note that a step uses these experts of a layer, in this order."""

    @abstractmethod
    def admit(self, layer: int, key: int) -> None:
        """Note that an expert has entered memory."""

    @abstractmethod
    def forget(self, layer: int, key: int) -> None:
        """Note that an expert has left memory."""

    @abstractmethod
    def victim(
        self, layer: int, layers: Container[int], keep: Container[int]
    ) -> int | None:
        """Return the key to evict for an expert of ``layer``, or None without any.

        Args:
            layers: layers of the same group that may give up a slot.
            keep: keys that must stay in memory.
        """


PolicyFactory = Callable[[PoolShape], Policy]


class LRU(Policy):
    """Evict the least recently used expert."""

    def __init__(self, shape: PoolShape):
        self._shape = shape
        # A dict keeps insertion order, so the oldest use comes first.
        self._uses: list[dict[int, None]] = [{} for _ in range(shape.n_groups)]

    def use(self, layer: int, keys: Iterable[int]) -> None:
        """Move the keys that are in memory to the end of the queue."""
        uses = self._uses[self._shape.group(layer)]
        for key in keys:
            if key in uses:
                del uses[key]
                uses[key] = None

    def admit(self, layer: int, key: int) -> None:
        """Put a key at the end of the queue."""
        self._uses[self._shape.group(layer)][key] = None

    def forget(self, layer: int, key: int) -> None:
        """Remove a key from the queue."""
        del self._uses[self._shape.group(layer)][key]

    def victim(
        self, layer: int, layers: Container[int], keep: Container[int]
    ) -> int | None:
        """Return the oldest key that may be evicted."""
        n_experts = self._shape.n_experts
        for key in self._uses[self._shape.group(layer)]:
            if key not in keep and key // n_experts in layers:
                return key
        return None


class LFU(Policy):
    """Evict the least frequently used expert, with ageing.

    A use counts half after ``HALF_LIFE`` further uses per expert on average. Counts
    outlive eviction.
    """

    HALF_LIFE: ClassVar[float] = 4.0
    _LARGEST: ClassVar[float] = 1e200

    def __init__(self, shape: PoolShape):
        n_keys = shape.n_layers * shape.n_experts
        self._shape = shape
        # Newer uses get a larger weight, which spares ageing every older count.
        self._counts = [0.0] * n_keys
        self._weight = 1.0
        self._growth = 2 ** (1 / (self.HALF_LIFE * n_keys))
        self._held: list[dict[int, None]] = [{} for _ in range(shape.n_groups)]
        # Heaps of (count, key) with at most one entry for each key. A count may be out
        # of date, and a forgotten key's entry stays: ``victim`` corrects both. Counts
        # only grow, so an old count never hides a smaller one.
        self._queues: list[list[tuple[float, int]]] = [[] for _ in self._held]
        self._queued: list[set[int]] = [set() for _ in self._held]

    def use(self, layer: int, keys: Iterable[int]) -> None:
        """Count a use of each key, in memory or not."""
        counts = self._counts
        for key in keys:
            counts[key] += self._weight
            self._weight *= self._growth
        if self._weight > self._LARGEST:
            self._rescale()

    def admit(self, layer: int, key: int) -> None:
        """Queue a key for eviction by the uses counted so far."""
        group = self._shape.group(layer)
        self._held[group][key] = None
        if key not in self._queued[group]:
            self._queued[group].add(key)
            heapq.heappush(self._queues[group], (self._counts[key], key))

    def forget(self, layer: int, key: int) -> None:
        """Stop evicting a key, but keep its count."""
        del self._held[self._shape.group(layer)][key]

    def victim(
        self, layer: int, layers: Container[int], keep: Container[int]
    ) -> int | None:
        """Return the key with the least count that may be evicted."""
        group, n_experts = self._shape.group(layer), self._shape.n_experts
        counts, held, queue = self._counts, self._held[group], self._queues[group]
        found, passed = None, []
        while queue and found is None:
            count, key = queue[0]
            if key not in held:
                heapq.heappop(queue)
                self._queued[group].remove(key)
            elif count != counts[key]:
                heapq.heapreplace(queue, (counts[key], key))
            elif key in keep or key // n_experts not in layers:
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
    """Evict the expert with the least value, by which experts follow which.

    A layer counts how often each expert followed each other one; a use t tokens later
    counts ``DISCOUNT ** t``. The layer's last step used some experts. ``FOLLOWING`` of
    an expert's value is its mean count after these; the rest is its share of recent
    uses. Counts are float32 ``[n_layers, n_experts, n_experts]`` and outlive eviction.
    """

    DISCOUNT: ClassVar[float] = 0.6
    FOLLOWING: ClassVar[float] = 0.7
    # Half-lives in steps of a layer: of a recent use, and of a count of followers.
    LATELY: ClassVar[float] = 30.0
    FOLLOWED: ClassVar[float] = 1400.0
    _AGEING_STEPS: ClassVar[int] = 64

    def __init__(self, shape: PoolShape):
        n, e = shape.n_layers, shape.n_experts
        self._shape = shape
        # For each layer: how often an expert (first index) followed another; each
        # expert's uses, discounted recent uses, share of recent uses, and value.
        self._followed = np.zeros((n, e, e), np.float32)
        self._uses = np.full((n, e), 1e-9, np.float32)
        self._recent = np.zeros((n, e), np.float32)
        self._lately = np.zeros((n, e), np.float32)
        self._values = np.zeros((n, e), np.float32)
        # The values of the experts in memory, infinite for all others.
        self._standing = np.full((n, e), np.inf, np.float32)
        self._steps = [0] * n

    def use(self, layer: int, keys: Iterable[int]) -> None:
        """Count the used experts after earlier ones, and update the layer's values."""
        used = [key - layer * self._shape.n_experts for key in keys]
        if not used:
            return
        fading = 0.5 ** (1 / self.LATELY)
        lately, values = self._lately[layer], self._values[layer]
        lately *= fading
        lately[used] += 1 - fading
        # Scale by the discounts' sum, 1 / (1 - DISCOUNT), so that both terms are alike.
        np.multiply(lately, (1 - self.FOLLOWING) / (1 - self.DISCOUNT), out=values)
        if 2 * len(used) > self._shape.n_experts:
            # A prompt uses most experts, which tells nothing about followers.
            self._recent[layer] = 0
        else:
            values += self._follow(layer, used)
        standing = self._standing[layer]
        np.copyto(standing, values, where=standing < np.inf)

    def _follow(self, layer: int, used: list[int]) -> np.ndarray:
        """Count followers; return ``FOLLOWING`` times the mean count after ``used``."""
        followed, uses, recent = (
            self._followed[layer],
            self._uses[layer],
            self._recent[layer],
        )
        followed[used] += recent
        recent *= self.DISCOUNT
        recent[used] += 1
        uses[used] += 1
        self._steps[layer] += 1
        if self._steps[layer] % self._AGEING_STEPS == 0:
            ageing = 0.5 ** (self._AGEING_STEPS / self.FOLLOWED)
            followed *= ageing
            uses *= ageing
        shares = np.zeros_like(uses)
        shares[used] = self.FOLLOWING / len(used) / uses[used]
        return followed @ shares

    def admit(self, layer: int, key: int) -> None:
        """Make a key a possible victim."""
        self._standing.flat[key] = self._values.flat[key]

    def forget(self, layer: int, key: int) -> None:
        """Stop evicting a key, but keep its counts."""
        self._standing.flat[key] = np.inf

    def victim(
        self, layer: int, layers: Container[int], keep: Container[int]
    ) -> int | None:
        """Return the first key with the least value that may be evicted."""
        n_experts = self._shape.n_experts
        group = self._shape.layers(self._shape.group(layer))
        first = group.start
        standing = self._standing[first : group.stop].reshape(-1)
        passed: list[tuple[int, float]] = []
        found = None
        while found is None and standing[place := int(standing.argmin())] < np.inf:
            key = first * n_experts + place
            if key not in keep and key // n_experts in layers:
                found = key
            else:
                passed.append((place, standing[place]))
                standing[place] = np.inf
        for place, value in passed:
            standing[place] = value
        return found


class Pins(Policy):
    """Pin the experts that a recorded run used most; another policy evicts the rest.

    A pinned expert is read on its first use, and evicted only without another victim.
    """

    # Share of all slots for pinned experts.
    SHARE: ClassVar[float] = 0.5

    def __init__(self, shape: PoolShape, trace: RoutingTrace, rest: PolicyFactory):
        counts = trace.counts()
        if counts.shape != (shape.n_layers, shape.n_experts):
            raise TraceError(
                f"[policy] expected a trace of {shape.n_layers} layers with "
                f"{shape.n_experts} experts but got {counts.shape[0]} with "
                f"{counts.shape[1]}"
            )
        order = (-counts.ravel()).argsort(kind="stable").tolist()
        self._pins = frozenset(order[: int(self.SHARE * shape.n_slots)])
        self._shape = shape
        self._held: list[dict[int, None]] = [{} for _ in range(shape.n_groups)]
        self._rest = rest(shape)

    def use(self, layer: int, keys: Iterable[int]) -> None:
        """Pass the uses to the other policy, which ignores keys it did not admit."""
        self._rest.use(layer, keys)

    def admit(self, layer: int, key: int) -> None:
        """Pin a key, or leave it to the other policy."""
        if key in self._pins:
            self._held[self._shape.group(layer)][key] = None
        else:
            self._rest.admit(layer, key)

    def forget(self, layer: int, key: int) -> None:
        """Note that a key has left memory."""
        if key in self._pins:
            del self._held[self._shape.group(layer)][key]
        else:
            self._rest.forget(layer, key)

    def victim(
        self, layer: int, layers: Container[int], keep: Container[int]
    ) -> int | None:
        """Return the other policy's victim, or a pinned key if it has none."""
        if (found := self._rest.victim(layer, layers, keep)) is not None:
            return found
        n_experts = self._shape.n_experts
        held = self._held[self._shape.group(layer)]
        free = (key for key in held if key not in keep and key // n_experts in layers)
        return next(free, None)


POLICIES: dict[str, PolicyFactory] = {"lru": LRU, "lfu": LFU, "markov": Markov}
POLICY_FORMS = (
    f"{', '.join(POLICIES)}, pins:TRACE, or one of the first with +pins:TRACE"
)


def policy_factory(name: str, argument: str = "policy") -> PolicyFactory:
    """Return the factory of a policy.

    Args:
        name: ``lru``, ``lfu``, ``markov``, ``pins:TRACE`` or ``NAME+pins:TRACE``.
            ``TRACE`` is a file of ``moeflux trace``; ``NAME`` is the policy for experts
            that are not pinned, by default ``DEFAULT_POLICY``.
        argument: the argument's name for errors.

    Raises:
        ConfigError: there is no policy of that name.
        TraceError: the file is missing, damaged or not a trace.
    """
    if name in POLICIES:
        return POLICIES[name]
    rest, pins, path = name.partition("pins:")
    rest = rest.removesuffix("+") or DEFAULT_POLICY
    if not pins or not path or rest not in POLICIES:
        raise ConfigError(f"[{argument}] expected {POLICY_FORMS} but got {name!r}")
    trace = RoutingTrace.load(path)
    return partial(Pins, trace=trace, rest=POLICIES[rest])
