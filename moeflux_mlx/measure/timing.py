"""Time calls of a lowered graph as in a running model, without the host's launch time.

On a GPU a kernel for one token takes less time than the host needs to launch it. So the
calls are queued behind a blocker: matrix products that keep the GPU busy until the last
call is encoded. As in a model, the calls must run one after the other. So a tiny launch
links each call to the one before, by a value that it reads. The links alone are timed
too, in turns with the whole queue, and subtracted. If the executor can read the GPU's
own clock, it does so before and after the calls, and the blocker's time is excluded.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .. import device
from ..calls.compiling import Compiled
from ..engine.executors.base import Executor, arrays
from ..engine.graph.rows import RowPart

# Calls queued at a time: more would fill MLX's queue, and the host would wait for it.
MAX_QUEUED = 64
# Calls are repeated until a measurement takes about this long.
WANTED_S = 0.01
MIN_BLOCKER_S, MAX_BLOCKER_S = 1e-3, 0.1
# The host encodes any call in far less time, so a longer one was not the host's.
LONG_S = 1e-3
COPIED_BYTES = 512 << 20
COPIED_ON_CPU_BYTES = 64 << 20
# On CUDA smaller arrays are read over the bus.
LINKED_MIN_BYTES = 64
# Few calls have more outputs, so that few launches that link calls are compiled.
LINKED_ARRAYS = 4
# Launches in a row when the host's time for one launch is measured.
TIMED_LAUNCHES = 64


Clock = Callable[[mx.array], mx.array]


@dataclass
class Work:
    """A call that can be repeated: ``call(*inputs)`` returns its outputs.

    ``carried`` pairs outputs with the inputs that they replace in the next repetition,
    so that states are updated in place as in a model. ``before`` runs before each call,
    untimed on a GPU. ``waits``: the call reads values back on the host, so it cannot be
    queued.
    """

    call: Callable[..., Any]
    inputs: list[Any]
    carried: tuple[tuple[int, int], ...] = ()
    before: Callable[[], None] | None = None
    waits: bool = False
    _link: int | None = field(init=False)

    def __post_init__(self) -> None:
        self._link = _linkable(self.inputs, {i for _, i in self.carried})

    def perform(self, after: Sequence[mx.array] = ()) -> list[Any]:
        """Perform the call, linked to ``after``, and return its outputs."""
        if self.before is not None:
            self.before()
        inputs = list(self.inputs)
        for _, i in self.carried:
            # MLX updates an array in place only if nobody else holds it.
            self.inputs[i] = None
        if after and self._link is not None:
            old, new = _array(inputs[self._link]), self.link(after)
            inputs = [_replaced(x, new) if _array(x) is old else x for x in inputs]
        result = self.call(*inputs)
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        for o, i in self.carried:
            self.inputs[i] = outputs[o]
        return outputs

    def link(self, after: Sequence[mx.array]) -> mx.array:
        """Return the linked input as a value that depends on ``after``."""
        assert self._link is not None
        x = _array(self.inputs[self._link])
        assert x is not None
        return linked(x, after)

    @property
    def is_linked(self) -> bool:
        """Whether an input can be linked to another call."""
        return self._link is not None


def linked(x: mx.array, after: Sequence[mx.array]) -> mx.array:
    """Return ``x`` by one launch that also reads a value of each array in ``after``.

    MLX compiles such a launch for each number and type of its inputs, which takes CUDA
    seconds. So all inputs are seen as bytes, and their number is a multiple of
    ``LINKED_ARRAYS``.
    """
    firsts = [a[(slice(0, 1),) * a.ndim].reshape(-1) for a in after if a.size]
    if not firsts or not x.size:
        return x
    seen = [_bytes(first)[:1] for first in firsts]
    seen += [seen[0]] * (-len(seen) % LINKED_ARRAYS)
    return _after(_bytes(x.reshape(-1)), *seen).view(x.dtype).reshape(x.shape)


def _bytes(x: mx.array) -> mx.array:
    return x if x.dtype == mx.uint8 else x.view(mx.uint8)


@Compiled
def _after(x: mx.array, *firsts: mx.array) -> mx.array:
    """Return ``x`` by one launch that also reads all ``firsts``."""
    seen = firsts[0] != 0
    for first in firsts[1:]:
        seen = seen | (first != 0)
    return mx.where(seen, x, x)


def _linkable(inputs: Sequence[Any], carried: set[int]) -> int | None:
    """Return the index of the cheapest input to link: the smallest one, not tiny."""
    found = [
        (x.nbytes < LINKED_MIN_BYTES, x.nbytes, i)
        for i, x in enumerate(map(_array, inputs))
        if x is not None and x.size and i not in carried
    ]
    return min(found)[2] if found else None


def _array(value: Any) -> mx.array | None:
    """Return an array, or the whole row of a ``RowPart``; else None."""
    if isinstance(value, RowPart):
        return value.row
    return value if isinstance(value, mx.array) else None


def _replaced(value: Any, new: mx.array) -> Any:
    return replace(value, row=new) if isinstance(value, RowPart) else new


@dataclass(frozen=True)
class Timing:
    """Seconds of a call; ``is_hidden``: they do not include the host's time."""

    seconds: float
    is_hidden: bool = True


class StepTimer(ABC):
    """Timer of calls of one kind, such as the same call of all layers.

    Args:
        repeats: number of measurements; the median is used.
        now: returns the time in seconds.
    """

    def __init__(self, repeats: int = 5, now: Callable[[], float] = time.perf_counter):
        self.repeats, self.now = repeats, now

    @abstractmethod
    def time(self, works: Sequence[Work]) -> Timing:
        """Return the mean time of ``works``, performed one after the other."""

    def elapsed(self, run: Callable[[], Any]) -> float:
        """Return the seconds until the result of ``run`` is evaluated."""
        mx.synchronize()
        start = self.now()
        mx.eval(arrays(run()))
        mx.synchronize()
        return self.now() - start

    def launch_seconds(self) -> float:
        """Return the host's time for a launch, which hidden times do not include."""
        return 0.0

    def copy_bytes_per_s(self) -> float:
        """Return the bandwidth of a large copy; reads and writes both count."""
        if device.prefers_host_arrays():
            x = np.zeros(COPIED_ON_CPU_BYTES, np.uint8)
            y = np.ones_like(x)

            def copy() -> tuple[()]:
                np.copyto(y, x)
                return ()

            times = [self.elapsed(copy) for _ in range(5)]
            return 2 * x.nbytes / max(min(times), 1e-9)
        n_bytes = min(COPIED_BYTES, device.physical_memory_bytes() // 16)
        a = mx.zeros(n_bytes // 2, mx.bfloat16)
        mx.eval(a, a + 1)
        times = [self.elapsed(lambda: [a + 1]) for _ in range(5)]
        return 2 * a.nbytes / max(min(times), 1e-9)


class HostTimer(StepTimer):
    """Timer for CPUs: it waits for each call, because the host itself computes."""

    def time(self, works: Sequence[Work]) -> Timing:
        once = self._round(works)
        n = _rounds(once, len(works))
        times = [sum(self._round(works) for _ in range(n)) for _ in range(self.repeats)]
        return Timing(statistics.median(times) / (n * len(works)))

    def _round(self, works: Sequence[Work]) -> float:
        start = self.now()
        for work in works:
            mx.eval(arrays(work.perform()))
        return self.now() - start


class DeviceTimer(StepTimer):
    """Timer for GPUs: it queues calls behind a blocker.

    The queue has at most ``max_queued`` calls, or each call once if there are more.
    ``clock`` reads the device's clock, as ``Executor.clock`` says.
    """

    def __init__(
        self,
        repeats: int = 5,
        now: Callable[[], float] = time.perf_counter,
        max_queued: int = MAX_QUEUED,
        clock: Clock | None = None,
    ):
        super().__init__(repeats, now)
        self.max_queued, self.clock = max_queued, clock
        self._blocker = Blocker(self.elapsed)

    def time(self, works: Sequence[Work]) -> Timing:
        if any(work.waits for work in works):
            return self._waited(works)
        # Warm up: compile functions, and drop other references to the states.
        for _ in range(2):
            self.elapsed(lambda: self._steps(works, 1, []))
        once = self.elapsed(lambda: self._steps(works, 1, []))
        n = min(_rounds(once, len(works)), max(1, self.max_queued // len(works)))
        _, encode_s = self._queued(list, lambda x: self._steps(works, n, x))
        blocker_s = min(MAX_BLOCKER_S, max(MIN_BLOCKER_S, 1.5 * encode_s))
        while True:
            timing = self._behind(works, n, blocker_s)
            if timing.is_hidden or blocker_s >= MAX_BLOCKER_S:
                return timing
            blocker_s = min(MAX_BLOCKER_S, 4 * blocker_s)

    def launch_seconds(self) -> float:
        """Return the host's time for one launch inside a compiled function."""
        x = mx.ones(LINKED_MIN_BYTES)

        def chain(x: mx.array) -> mx.array:
            for _ in range(TIMED_LAUNCHES):
                x = mx.fast.rms_norm(x, None, 1e-5)
            return x

        traced = Compiled(chain)
        self.elapsed(lambda: [traced(x)])
        times = []
        for _ in range(self.repeats):
            mx.synchronize()
            start = self.now()
            mx.async_eval(traced(x))
            times.append(self.now() - start)
        return statistics.median(times) / TIMED_LAUNCHES

    def _behind(self, works: Sequence[Work], n: int, blocker_s: float) -> Timing:
        blocker = self._blocker.lasting(blocker_s)
        alone = min(self.elapsed(blocker) for _ in range(2))
        differences, encoded = [], []
        for _ in range(self.repeats):
            links_s, _ = self._queued(blocker, lambda x: self._links(works, n, x))
            steps_s, encode_s = self._queued(
                blocker, lambda x: self._steps(works, n, x)
            )
            differences.append(steps_s - links_s)
            encoded.append(encode_s)
        seconds = max(0.0, statistics.median(differences)) / (n * len(works))
        hidden = statistics.median(encoded) < alone or seconds > LONG_S
        return Timing(seconds, hidden)

    def _queued(
        self,
        blocker: Callable[[], list[mx.array]],
        encode: Callable[[list[mx.array]], list[mx.array]],
    ) -> tuple[float, float]:
        """Return the seconds of the queue, and the seconds until all was encoded.

        Without a device clock the former include the blocker.
        """
        mx.synchronize()
        start = self.now()
        stamps = [self._stamp(blocker())]
        mx.async_eval(stamps[0])
        last = encode(stamps[0])
        stamps.append(self._stamp(last))
        mx.async_eval(stamps[1], last)
        encoded = self.now()
        mx.eval(stamps[1], last)
        mx.synchronize()
        total = self.now() - start
        if self.clock is not None and all(stamps):
            began, ended = (int(np.array(stamp)[0]) for (stamp,) in stamps)
            total = (ended - began) / 1e9
        return total, encoded - start

    def _stamp(self, after: list[mx.array]) -> list[mx.array]:
        """Return the device's time after ``after``, or ``after`` without a clock."""
        if self.clock is None or not after:
            return after
        zero = mx.zeros(LINKED_MIN_BYTES, mx.uint8)
        return [self.clock(linked(zero, after))]

    def _steps(
        self, works: Sequence[Work], n: int, after: list[mx.array]
    ) -> list[mx.array]:
        unlinked: list[mx.array] = []
        for work in n * list(works):
            outputs = arrays(work.perform(after))
            if work.is_linked:
                after = outputs
            else:
                unlinked += outputs
        return after + unlinked

    def _links(
        self, works: Sequence[Work], n: int, after: list[mx.array]
    ) -> list[mx.array]:
        for work in n * [work for work in works if work.is_linked]:
            after = [work.link(after)]
        return after

    def _waited(self, works: Sequence[Work]) -> Timing:
        times = [
            sum(self.elapsed(work.perform) for work in works)
            for _ in range(self.repeats + 1)
        ]
        return Timing(statistics.median(times[1:]) / len(works), False)


class Blocker:
    """Products of square matrices that keep a GPU busy for a given time.

    They are few and large, because MLX bounds the number of waiting launches.
    """

    WIDTHS = (1024, 2048, 4096, 8192, 16384)
    FEW = 4

    def __init__(self, elapsed: Callable[[Callable[[], Any]], float]):
        self._elapsed = elapsed
        self._matrices: tuple[mx.array, mx.array] | None = None
        self._product_s = 0.0

    def lasting(self, seconds: float) -> Callable[[], list[mx.array]]:
        """Return a function whose result takes at least ``seconds`` to evaluate."""
        widths = [w for w in self.WIDTHS if w > self._width]
        while self._matrices is None or (
            self.FEW * self._product_s < seconds and widths
        ):
            self._widen(widths.pop(0))
        a, b = self._matrices
        n = int(seconds / max(self._product_s, 1e-6)) + 1

        def run() -> list[mx.array]:
            x = a
            for _ in range(n):
                x = x @ b
            return [x]

        return run

    @property
    def _width(self) -> int:
        return 0 if self._matrices is None else self._matrices[0].shape[0]

    def _widen(self, width: int) -> None:
        a = mx.full((width, width), 0.5, mx.bfloat16)
        b = mx.eye(width, dtype=mx.bfloat16)
        mx.eval(a, b)
        self._matrices = a, b
        times = [self._elapsed(lambda: [a @ b]) for _ in range(3)]
        self._product_s = min(times)


def _rounds(once: float, n_works: int) -> int:
    """Return the number of rounds over all works, if one round takes ``once`` s."""
    wanted = round(WANTED_S / max(once, 1e-6))
    return int(min(max(1, wanted), max(1, 4 * MAX_QUEUED // n_works)))


def timer_for(
    executor: Executor, repeats: int, max_queued: int = MAX_QUEUED
) -> StepTimer:
    """Return the timer for the device of an executor."""
    if device.on_cpu() or executor.name == "sim":
        return HostTimer(repeats)
    return DeviceTimer(repeats, max_queued=max_queued, clock=executor.clock())
