"""Room for gradients: a call under a transformation keeps its intermediate arrays.

Their bytes depend on the trained parameters and on checkpointed layers. Before the
first step of a new kind, small steps are therefore run and measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..experts.compute.slot_block import copied_bytes
from ..memory.caches import arrays_of, n_rows
from .alone import OneAtATime
from .small_calls import SmallCalls
from .transforms import is_traced

# Copies of each trained parameter that an update with Adam may hold: moments, their new
# values, the new parameter. The gradient itself is part of the measured step.
N_TRAINED = 4

Logits = Callable[[mx.array], mx.array]


class Gradients:
    """Makes room for the gradients of one model.

    Args:
        calls: the calls of the model.
        logits: computes the model's logits from token ids.
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
        """Shrink the pool to make room for a call under a transformation.

        Args:
            module: the module with all parameters that may have gradients.
            given: the call's array arguments.
            cache: the call's prompt caches.
            n_seqs: number of sequences.
            t: tokens of each sequence.

        Raises:
            BudgetError: the call does not fit even with the fewest experts.
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
        store = self._calls.streamer.store
        n_bytes += N_TRAINED * followed.trained_bytes
        n_bytes += copied_bytes(store, n_tokens * store.top_k)
        keeper.hold(math.ceil(n_bytes), cache, n_seqs, t)

    def _step(self, followed: _Followed, tokens: mx.array) -> Any:
        """Return the loss of a training step and its gradients."""

        def loss(*arguments: Any) -> mx.array:
            followed.put(*arguments[:2])
            ids = arguments[2] if followed.has_tokens else tokens
            return nn.losses.cross_entropy(self._logits(ids), tokens).mean()

        given = [tokens] if followed.has_tokens else []
        return mx.value_and_grad(loss)(followed.by, followed.beside, *given)


@dataclass(frozen=True)
class _Followed:
    """The parameters that a transformation follows.

    ``by`` get gradients. ``beside`` are followed without gradients, for example if a
    function of the whole model is differentiated, and with ``has_tokens`` so are the
    token ids; arrays computed from them are kept.
    """

    module: nn.Module
    by: dict[str, mx.array]
    beside: dict[str, mx.array]
    has_tokens: bool
    trained_bytes: int

    @classmethod
    def of(cls, module: nn.Module, given: list[mx.array]) -> _Followed:
        """Find the followed parameters of a call with these array arguments."""
        arrays = dict(tree_flatten(module.parameters()))
        every: dict[str, mx.array] = dict(tree_flatten(module.trainable_parameters()))
        # Packed matrices have no gradients, though a model may call them trainable.
        trainable = {name: x for name, x in every.items() if _is_floating(x)}
        by = trainable if is_traced([*trainable.values()]) else {}
        n_bytes = sum(x.nbytes for x in by.values())
        if not by or is_traced([x for x in given if _is_floating(x)]):
            # The input may have a gradient, which passes through every layer: small
            # parameters of each layer make the measured step do the same.
            by = {**{name: x for name, x in arrays.items() if _is_vector(x)}, **by}
        others = {name: x for name, x in arrays.items() if name not in by}
        beside = others if is_traced([*others.values()]) else {}
        has_tokens = is_traced([x for x in given if not _is_floating(x)])
        return cls(module, by, beside, has_tokens, n_bytes)

    @property
    def kind(self) -> Any:
        """Steps of equal ``kind`` keep the same number of bytes per token."""
        by = [(name, x.shape, x.dtype) for name, x in self.by.items()]
        return by, bool(self.beside), self.has_tokens, kind_of(self.module)

    def put(self, *arrays: dict[str, mx.array]) -> None:
        """Put arrays into the module in the places of these."""
        self.module.update(tree_unflatten([x for some in arrays for x in some.items()]))

    def put_back(self) -> None:
        """Restore the module's own arrays."""
        self.put(self.by, self.beside)


def kind_of(module: nn.Module) -> Any:
    """Return a value that is equal for modules that compute in the same way."""
    # ``grad_checkpoint`` replaces ``__call__`` of a layer's class.
    return {(type(m), type(m).__call__, m.training) for m in module.modules()}


def _is_vector(x: mx.array) -> bool:
    """Return whether an array is small, like the weight of a norm."""
    return x.ndim == 1 and _is_floating(x)


def _is_floating(x: mx.array) -> bool:
    """Return whether an array may have a gradient."""
    return mx.issubdtype(x.dtype, mx.floating)
