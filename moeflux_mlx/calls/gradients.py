"""Room for gradients: a call keeps all that it computes until they are there.

How much that is depends on what is trained, and on layers that are computed again. So
the first step of a kind is preceded by small ones, which are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .. import device
from ..experts.compute.blank import BlankExperts
from ..experts.pool.pool import pool_stride
from ..memory.caches import arrays_of, n_rows
from .alone import OneAtATime
from .transforms import is_traced

# Tokens of measured steps: of one sequence, of WIDE of them, and WIDE times as many of
# one, which tells apart bytes of tokens and of pairs of them. Larger ones are more
# exact, and smaller ones show whether they have room.
SIZES, WIDE = (1, 4, 16), 4
# Measured peaks count with a share more.
MARGIN = 1 / 8
# What a step takes besides for each parameter that it trains: the new value, and two
# more with their own new ones, as of Adam.
N_TRAINED = 4

Logits = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Kept:
    """Bytes that a gradient keeps; pairs are of a token and a row that it sees."""

    fixed: float
    of_token: float
    of_pair: float

    @classmethod
    def of(cls, n: int, few: int, wide: int, long: int) -> Kept:
        """Return the least that no measured step exceeds.

        Args:
            n: tokens of the smallest step, ``few``.
        """
        of_pair = max(0.0, (long - wide) / (n * n * WIDE * (WIDE - 1)))
        more = wide - few - of_pair * n * n * (WIDE - 1)
        line = cls(0, max(0.0, more / (n * (WIDE - 1))), of_pair)
        beyond = (
            peak - line.n_bytes(*step)
            for step, peak in zip(_steps(n), (few, wide, long), strict=True)
        )
        return replace(line, fixed=max(0.0, *beyond))

    def n_bytes(self, n_seqs: int, t: int, n_before: int = 0) -> float:
        """Return the bytes of a step with ``t`` tokens of each sequence."""
        n_tokens = n_seqs * t
        pairs = n_tokens * (t + n_before)
        return self.fixed + self.of_token * n_tokens + self.of_pair * pairs


class Gradients:
    """Makes room for the gradients of one model.

    Args:
        calls: those of the model.
        logits: the model's own call, of which each is a part.
    """

    def __init__(self, calls: OneAtATime, logits: Logits):
        self._calls, self._logits = calls, logits
        # What the last step trained, and what was measured for it.
        self._kind: Any = None
        self._kept = Kept(0, 0, 0)
        self._n_measured, self._sizes = 0, [*SIZES]

    def make_room(
        self,
        module: nn.Module,
        given: Iterable[mx.array],
        cache: list[Any],
        n_seqs: int,
        t: int,
    ) -> None:
        """Have experts give way to all that a call under a transformation keeps.

        Args:
            module: has all parameters that the call may be followed by.
            given: arrays that it was called with.

        Raises:
            BudgetError: even with the fewest experts it does not fit.
        """
        keeper = self._calls.keeper
        followed = _Followed.of(module, [*given, *arrays_of(cache)])
        if self._kind != (kind := followed.kind):
            self._kind, self._n_measured, self._sizes = kind, 0, [*SIZES]
        if self._sizes and self._n_measured < n_seqs * t:
            self._measure(followed, n_seqs * t, keeper.clear(cache))
        n_bytes = self._kept.n_bytes(n_seqs, t, n_rows(cache)) * (1 + MARGIN)
        n_bytes += N_TRAINED * followed.trained_bytes + self._copied_bytes(n_seqs * t)
        keeper.hold(math.ceil(n_bytes), cache, n_seqs, t)

    def _copied_bytes(self, n_tokens: int) -> int:
        """Return the bytes of a block's matrices, where those chosen are copied."""
        if device.gathers_strided():
            return 0
        store = self._calls.streamer.store
        stride = pool_stride([store.layout(layer) for layer in store.layers])
        return min(n_tokens * store.top_k, store.n_experts) * stride

    def _measure(self, followed: _Followed, n_tokens: int, room: int) -> None:
        """Measure larger and larger steps, without the model's experts.

        Args:
            n_tokens: of the step that is to come, beyond which nothing is measured.
            room: bytes; what would take more is not measured either.
        """
        blank = BlankExperts(self._calls.streamer.store)
        blank.watch, blank.reads_again = lambda _, arrays: mx.eval(arrays), True
        try:
            with self._calls.reaching(blank):
                while self._sizes and self._n_measured < n_tokens:
                    if self._measure_size(followed, self._sizes[0], room):
                        self._sizes.pop(0)
                    else:
                        self._sizes.clear()
        finally:
            followed.put_back()
            mx.clear_cache()
            device.trim_heap()

    def _measure_size(self, followed: _Followed, n: int, room: int) -> bool:
        """Measure steps of one size if there is room."""
        if not self._n_measured:
            first = self._peak(followed, (1, n))
            self._kept, self._n_measured = Kept(0, first / n, 0), n
        steps = _steps(n)
        if max(self._kept.n_bytes(*step) for step in steps) * (1 + MARGIN) > room:
            return False
        self._kept = Kept.of(n, *(self._peak(followed, step) for step in steps))
        self._n_measured = WIDE * n
        return True

    def _peak(self, followed: _Followed, step: tuple[int, int]) -> int:
        """Return the most memory that the gradient of a loss takes."""
        tokens = mx.zeros(step, mx.int32)

        def loss(*arrays: dict[str, mx.array]) -> mx.array:
            followed.put(*arrays)
            return nn.losses.cross_entropy(self._logits(tokens), tokens).mean()

        base = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(loss)(followed.by, followed.beside))
        return mx.get_peak_memory() - base


def _steps(n: int) -> list[tuple[int, int]]:
    """Return the measured steps of one size: sequences, and tokens of each."""
    return [(1, n), (WIDE, n), (1, WIDE * n)]


@dataclass(frozen=True)
class _Followed:
    """The parameters that a transformation follows.

    ``by`` has gradients. ``beside`` are followed too, as where a function of the model
    is differentiated: what is computed of them is kept.
    """

    module: nn.Module
    by: dict[str, mx.array]
    beside: dict[str, mx.array]
    trained_bytes: int

    @classmethod
    def of(cls, module: nn.Module, given: list[mx.array]) -> _Followed:
        """Look what is followed in a call with some arrays."""
        arrays = dict(tree_flatten(module.parameters()))
        trainable = dict(tree_flatten(module.trainable_parameters()))
        by = trainable if is_traced([*trainable.values()]) else {}
        n_bytes = sum(x.nbytes for x in by.values())
        if not by or is_traced(given):
            # The first layer is followed, so any of its parameters stands for that.
            by = {**{name: x for name, x in arrays.items() if _is_vector(x)}, **by}
        others = {name: x for name, x in arrays.items() if name not in by}
        return cls(module, by, others if is_traced([*others.values()]) else {}, n_bytes)

    @property
    def kind(self) -> Any:
        """A value that steps have in common which keep as much."""
        # Layers that are computed again have a call of their own class's.
        modules = self.module.modules()
        calls = {(type(m), type(m).__call__, m.training) for m in modules}
        by = [(name, x.shape, x.dtype) for name, x in self.by.items()]
        return by, calls, bool(self.beside)

    def put(self, *arrays: dict[str, mx.array]) -> None:
        """Give the module others in the places of these."""
        self.module.update(tree_unflatten([x for some in arrays for x in some.items()]))

    def put_back(self) -> None:
        """Have the module as it was."""
        self.put(self.by, self.beside)


def _is_vector(x: mx.array) -> bool:
    """Tell whether an array is a norm's weight or the like, of few bytes."""
    return x.ndim == 1 and mx.issubdtype(x.dtype, mx.floating)
