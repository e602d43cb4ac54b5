"""Room for gradients: a call keeps all that it computes until they are there.

How much that is depends on what is trained, and on layers that are computed again. So
a step of a new kind is preceded by small ones, which are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .. import device
from ..experts.pool.pool import pool_stride
from ..memory.caches import arrays_of, n_rows
from .alone import OneAtATime
from .small_calls import SmallCalls
from .transforms import is_traced

# What a step takes besides for each parameter that it trains: the new value, and two
# more with their own new ones, as of Adam.
N_TRAINED = 4

Logits = Callable[[mx.array], mx.array]


class Gradients:
    """Makes room for the gradients of one model.

    Args:
        calls: those of the model.
        logits: the model's own call, of which each is a part.
    """

    def __init__(self, calls: OneAtATime, logits: Logits):
        self._calls, self._logits = calls, logits
        self._small = SmallCalls(calls)

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
            module: has all parameters that may be followed.
            given: arrays that it was called with.

        Raises:
            BudgetError: even with the fewest experts it does not fit.
        """
        keeper, n_tokens = self._calls.keeper, n_seqs * t
        followed = _Followed.of(module, [*given, *arrays_of(cache)])
        try:
            taken = self._small.measure(
                followed.kind,
                n_tokens,
                lambda: keeper.clear(cache),
                lambda tokens: self._step(followed, tokens),
            )
        finally:
            followed.put_back()
        n_bytes = taken.n_bytes(n_seqs, t, t + n_rows(cache))
        n_bytes += N_TRAINED * followed.trained_bytes + self._copied_bytes(n_tokens)
        keeper.hold(math.ceil(n_bytes), cache, n_seqs, t)

    def _step(self, followed: _Followed, tokens: mx.array) -> Any:
        """Return the loss of a step of training, and its gradients."""

        def loss(*arrays: dict[str, mx.array]) -> mx.array:
            followed.put(*arrays)
            return nn.losses.cross_entropy(self._logits(tokens), tokens).mean()

        return mx.value_and_grad(loss)(followed.by, followed.beside)

    def _copied_bytes(self, n_tokens: int) -> int:
        """Return the bytes of a block's matrices, where those chosen are copied."""
        if device.gathers_strided():
            return 0
        store = self._calls.streamer.store
        stride = pool_stride([store.layout(layer) for layer in store.layers])
        return min(n_tokens * store.top_k, store.n_experts) * stride


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
        by = [(name, x.shape, x.dtype) for name, x in self.by.items()]
        return by, bool(self.beside), kind_of(self.module)

    def put(self, *arrays: dict[str, mx.array]) -> None:
        """Give the module others in the places of these."""
        self.module.update(tree_unflatten([x for some in arrays for x in some.items()]))

    def put_back(self) -> None:
        """Have the module as it was."""
        self.put(self.by, self.beside)


def kind_of(module: nn.Module) -> Any:
    """Return what calls of a module have in common which compute alike."""
    # Layers that are computed again have a call of their own class's.
    return {(type(m), type(m).__call__, m.training) for m in module.modules()}


def _is_vector(x: mx.array) -> bool:
    """Tell whether an array is a norm's weight or the like, of few bytes."""
    return x.ndim == 1 and mx.issubdtype(x.dtype, mx.floating)
