"""Which expert gives up its slot when another one needs it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ..errors import ConfigError, TraceError
from .routing_trace import RoutingTrace

# Measured with `moeflux cachesim` on the demo model: see docs/architecture.md.
DEFAULT_POLICY = "lfu"


@dataclass(frozen=True)
class PoolShape:
    """What a policy decides about: slots, and the rows of experts that share them.

    A row is one MoE layer, counted from 0; rows are visited in rising order, over and
    over. Of ``n_experts`` in a row a token uses ``top_k``.
    """

    n_rows: int
    n_experts: int
    top_k: int
    n_slots: int


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
    def victim(self, row: int, rows: Iterable[int], keep: Container[int]) -> int | None:
        """Return the key to evict for an expert of ``row``; None if there is none.

        Args:
            row: the layer at work.
            rows: layers that may give up a slot.
            keep: keys that may not.
        """


PolicyFactory = Callable[[PoolShape], Policy]


class LRU(Policy):
    """Evict the expert whose last use is the longest ago."""

    def __init__(self, shape: PoolShape):
        # A dict keeps insertion order: the oldest use comes first.
        self._uses: list[dict[int, int]] = [{} for _ in range(shape.n_rows)]
        self._now = 0

    def use(self, row: int, keys: Iterable[int]) -> None:
        """Move the keys that are in memory to the end of the line."""
        uses = self._uses[row]
        for key in keys:
            if uses.pop(key, None) is not None:
                self.admit(row, key)

    def admit(self, row: int, key: int) -> None:
        """Put a key at the end of the line."""
        self._now += 1
        self._uses[row][key] = self._now

    def forget(self, row: int, key: int) -> None:
        """Take a key out of the line."""
        del self._uses[row][key]

    def victim(self, row: int, rows: Iterable[int], keep: Container[int]) -> int | None:
        """Return the oldest key that is not kept."""
        oldest, found = math.inf, None
        for candidate in rows:
            for key, time in self._uses[candidate].items():
                if time >= oldest:
                    break
                if key not in keep:
                    oldest, found = time, key
                    break
        return found


class LFU(Policy):
    """Evict the expert that is expected to be needed last.

    How often an expert of a layer is used is counted with ageing: a use counts half
    once every expert has, on average, been used ``HALF_LIFE`` times since. With a share
    p of tokens that use it, an expert's next use is 1/p tokens away, counted from the
    last visit of its layer; and as layers come in turns, of two layers' experts with
    the same share the one is needed later whose layer comes later.
    Counts outlive eviction.
    """

    HALF_LIFE: ClassVar[float] = 4.0
    _LARGEST: ClassVar[float] = 1e200

    def __init__(self, shape: PoolShape):
        n_rows, n_keys = shape.n_rows, shape.n_rows * shape.n_experts
        self._n_rows = n_rows
        self._held: list[set[int]] = [set() for _ in range(n_rows)]
        # The key of least count in each row; None where that is to be looked up.
        self._least: list[int | None] = [None] * n_rows
        # Instead of older uses counting less, newer ones count more.
        self._counts = [0.0] * n_keys
        self._weight = 1.0
        self._growth = 2 ** (1 / (self.HALF_LIFE * n_keys))
        # Layers between two uses, times count, over the weight of a use.
        self._n_layers_per_count = 1 / (shape.top_k * (1 - 1 / self._growth))

    def use(self, row: int, keys: Iterable[int]) -> None:
        """Count a use of each key, in memory or not."""
        counts, least = self._counts, self._least[row]
        for key in keys:
            counts[key] += self._weight
            self._weight *= self._growth
            if key == least:
                self._least[row] = None
        if self._weight > self._LARGEST:
            self._counts = [count / self._weight for count in counts]
            self._weight = 1.0

    def admit(self, row: int, key: int) -> None:
        """Let a key be evicted, by the uses counted so far."""
        self._held[row].add(key)
        least = self._least[row]
        if least is not None and self._counts[key] < self._counts[least]:
            self._least[row] = key

    def forget(self, row: int, key: int) -> None:
        """Let a key be no victim; its count stays."""
        self._held[row].remove(key)
        if self._least[row] == key:
            self._least[row] = None

    def victim(self, row: int, rows: Iterable[int], keep: Container[int]) -> int | None:
        """Return the key whose next use is the farthest away."""
        farthest, found = -math.inf, None
        scale = self._weight * self._n_layers_per_count
        for candidate in rows:
            key = self._least[candidate]
            if key is None or key in keep:
                key = self._find_least(candidate, keep)
            if key is None:
                continue
            count = self._counts[key]
            to_layer = (candidate - row - 1) % self._n_rows
            n_layers = to_layer + scale / count if count else math.inf
            if n_layers > farthest:
                farthest, found = n_layers, key
        return found

    def _find_least(self, row: int, keep: Container[int]) -> int | None:
        counts, held = self._counts, self._held[row]
        if not held:
            return None
        # Ids break ties, so that the order within a set does not show.
        least = min(held, key=lambda key: (counts[key], key))
        self._least[row] = least
        if least not in keep:
            return least
        free = (key for key in held if key not in keep)
        return min(free, key=lambda key: (counts[key], key), default=None)


class Pins(Policy):
    """Keep the experts that a recorded run used most; the rest is another policy's.

    A pinned expert is read when first needed and evicted only when there is nothing
    else to evict.
    """

    # Of all slots.
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
        self._held: list[dict[int, None]] = [{} for _ in range(shape.n_rows)]
        self._rest = rest(shape)

    def use(self, row: int, keys: Iterable[int]) -> None:
        """Tell the other policy: it knows which are its own."""
        self._rest.use(row, keys)

    def admit(self, row: int, key: int) -> None:
        """Pin a key, or leave it to the other policy."""
        if key in self._pins:
            self._held[row][key] = None
        else:
            self._rest.admit(row, key)

    def forget(self, row: int, key: int) -> None:
        """Note that a key, pinned or not, is in memory no more."""
        if key in self._pins:
            del self._held[row][key]
        else:
            self._rest.forget(row, key)

    def victim(self, row: int, rows: Iterable[int], keep: Container[int]) -> int | None:
        """Return the other policy's victim; a pinned key where it has none."""
        rows = list(rows)
        if (found := self._rest.victim(row, rows, keep)) is not None:
            return found
        held = (key for r in rows for key in self._held[r])
        return next((key for key in held if key not in keep), None)


POLICIES: dict[str, PolicyFactory] = {"lru": LRU, "lfu": LFU}
POLICY_FORMS = "lru, lfu, pins:TRACE, lru+pins:TRACE or lfu+pins:TRACE"


def policy_factory(name: str) -> PolicyFactory:
    """Return what makes the policy of a name.

    Args:
        name: ``lru``, ``lfu``, or ``pins:TRACE`` with a file of ``moeflux trace``,
            after ``lru+`` or ``lfu+`` if the rest is not to go by the default.

    Raises:
        ConfigError: there is no policy of that name.
        TraceError: the file is missing, damaged or no trace.
    """
    if name in POLICIES:
        return POLICIES[name]
    rest, pins, path = name.partition("pins:")
    rest = rest.removesuffix("+") or DEFAULT_POLICY
    if not pins or not path or rest not in POLICIES:
        raise ConfigError(f"[policy] expected {POLICY_FORMS} but got {name!r}")
    trace = RoutingTrace.load(path)
    return partial(Pins, trace=trace, rest=POLICIES[rest])
