"""Calls of a model with streamed experts: one at a time, within its memory."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .. import device
from ..errors import BudgetError
from ..experts.compute.blank import BlankExperts
from ..experts.compute.exchange import Exchange
from ..experts.compute.source import ExpertSource
from ..experts.streaming.mapped import MappedExperts
from ..experts.streaming.streamer import ExpertStreamer
from ..experts.weights import has_values, leaves
from ..memory.caches import CacheState, PutBackOnFailure, arrays_of
from ..memory.keeper import MemoryKeeper, make_room
from ..memory.relief import FreePool
from .alone import OneAtATime
from .gradients import Gradients
from .stock_arguments import StockChecks
from .together import Together
from .transforms import in_transformation, is_traced
from .ways import Ways


class Calls(OneAtATime):
    """The calls of one model: one at a time, and within the available memory.

    Args:
        model: the model, whose caches mlx-lm can make.
        give_way: frees memory that the model's caller keeps for later, and returns
            whether it did.
        ways: chooses how each call gets its experts.
        exchange: connects to the processes that hold the other experts.
    """

    def __init__(
        self,
        model: nn.Module,
        give_way: Callable[[], bool] | None = None,
        ways: Ways | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self.ways = ways or Ways()
        self._give_way = give_way
        self.exchange = self.ways.exchange = exchange
        self.together = Together(exchange)
        self.streamer: ExpertStreamer | MappedExperts | BlankExperts | None = None
        self.keeper: MemoryKeeper | None = None
        self.free_pool: FreePool | None = None
        # Bytes of a token's row in the last call; None if it returned no rows.
        self.row_bytes: int | None = None
        self._gradients = Gradients(self, lambda tokens: self._whole(tokens))
        self._checked = StockChecks(lambda: make_prompt_cache(self._whole))

    def source(self, block: int) -> ExpertSource:
        """Return the present source of one block's experts."""
        assert self.streamer is not None
        return self.streamer.source(block)

    def _begin(self) -> None:
        self.ways.forget()

    def call(
        self, call: Callable[..., Any], args: Any, kwargs: Any, *, gives_rows: bool
    ) -> Any:
        """Check the arguments of a call, and make it."""
        args, kwargs = self.checked(call, args, kwargs)
        out = self.run(call, args, kwargs) if gives_rows else call(*args, **kwargs)
        return self.together.led(out) if self._depth == 1 else out

    def checked(
        self, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Return the checked arguments of a user's call, with tokens as an array.

        Raises:
            ModelError: the model does not accept an argument.
        """
        signature = _signature(call)
        if self._depth > 1 or "cache" not in signature.parameters:
            return args, kwargs
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            # The call itself raises the error for a missing argument.
            return args, kwargs
        self._checked(bound.arguments, next(iter(signature.parameters)))
        return bound.args, bound.kwargs

    def looks_at(self, ids: mx.array) -> bool:
        """Tell whether to check the values of ids.

        The check waits for them. It is skipped for single tokens on a GPU that would
        otherwise not wait.
        """
        streamer = self.streamer
        waits = isinstance(streamer, ExpertStreamer) and not streamer.resident
        return device.on_cpu() or ids.size > 1 or waits

    def run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute rows, in chunks of tokens if all do not fit into memory.

        A failed call restores its caches.

        Raises:
            BudgetError: not even a chunk fits, or the call cannot be divided.
        """
        rows = _Rows.read(call, args, kwargs)
        if rows is None:
            out = call(*args, **kwargs)
            self._guard(out)
            return out
        may_fail = not isinstance(self.streamer, BlankExperts | MappedExperts)
        cache = (rows.cache or []) if may_fail else []
        with PutBackOnFailure(cache, rows.t) as states:
            if not has_values(*rows.arrays.values()):
                out = self._run(call, rows.bound, rows.t, states)
            elif self.keeper is None:
                self._agreed(rows, lambda: self._given_way(cache, rows.t))
                out = self._run(call, rows.bound, rows.t, states)
            else:
                out = self._in_room(call, rows, states)
            self._guard(out)
        self.row_bytes = rows.bytes_of(out)
        return out

    def _run(
        self,
        call: Callable[..., Any],
        bound: inspect.BoundArguments,
        t: int,
        states: list[CacheState] | None,
    ) -> Any:
        whole = functools.partial(call, *bound.args, **bound.kwargs)
        run = functools.partial(self.ways.run, whole, self.streamer, t, states)
        return self.together.run(run, states)

    def _guard(self, out: Any) -> None:
        """Ensure that lazy rows are computed before their experts are released."""
        streamer, results = self.streamer, leaves(out)
        if isinstance(streamer, ExpertStreamer) and streamer.resident:
            if is_traced(results):
                # The backward pass reads the experts again.
                streamer.stay()
                return
            for result in results:
                streamer.guard_result(result)

    def _in_room(
        self, call: Callable[..., Any], rows: _Rows, states: list[CacheState]
    ) -> Any:
        n_seqs, t, given = rows.n_seqs, rows.t, rows.cache
        # A call without caches returns all logits; dividing it needs temporary caches.
        if self._is_followed(rows):
            self._agreed(rows, lambda: self._make_gradient_room(rows))
            return self._run(call, rows.bound, t, states)
        logits = not given
        cache = given or make_prompt_cache(self._whole)
        step = self._agreed(
            rows, lambda: self._make_room(cache, n_seqs, t, logits=logits) // n_seqs
        )
        if step >= t:
            return self._run(call, rows.bound, t, states)
        if not rows.divides or self.row_bytes is None:
            raise BudgetError(
                f"[memory] expected a call of at most {step} of {t} tokens, since its "
                "other arguments cannot be divided: give fewer tokens, or raise memory"
            )
        parts = []
        for start in range(0, t, step):
            stop = min(start + step, t)
            part = rows.part(slice(start, stop), cache)
            parts.append(self._run(call, part, stop - start, None))
            mx.eval(parts[-1], arrays_of(cache))
            # The next chunk needs longer arrays, which do not fit into freed ones.
            device.trim_heap()
        return mx.concatenate(parts, axis=1)

    def _given_way(self, cache: list[Any], t: int) -> int:
        """Release experts for other memory if needed, and return ``t``."""
        if self.free_pool is not None:
            self.free_pool.give_way(cache)
        return t

    def _agreed(self, rows: _Rows, step: Callable[[], int]) -> int:
        """Return the chunk of tokens to compute, the same in every process."""
        streamer = self.streamer
        if isinstance(streamer, BlankExperts):
            return step()
        first = next(iter(rows.arrays.values()))
        give_way = self._give_way

        def resident() -> bool:
            return isinstance(streamer, ExpertStreamer) and streamer.resident

        return self.together.agreed(
            rows.n_seqs, rows.t, first, step, resident=resident, give_way=give_way
        )

    def _make_room(self, cache: list[Any], n_seqs: int, t: int, **options: Any) -> int:
        assert self.keeper is not None
        give_way = self._give_way if self.exchange is None else None
        return make_room(self.keeper, give_way, cache, n_seqs, t, **options)

    def _make_gradient_room(self, rows: _Rows) -> int:
        given, cache = rows.arrays.values(), rows.cache or []
        self._gradients.make_room(self._whole, given, cache, rows.n_seqs, rows.t)
        return rows.t

    def _is_followed(self, rows: _Rows) -> bool:
        """Tell whether a transformation traces a call, and so keeps its results."""
        if not in_transformation():
            return False
        parameters = leaves(self._whole.parameters())
        given = [*rows.arrays.values(), *arrays_of(rows.cache or [])]
        return is_traced([*given, *parameters])

    @property
    def _whole(self) -> nn.Module:
        model = self._model()
        assert model is not None
        return model


def _signature(call: Callable[..., Any]) -> inspect.Signature:
    """Return the cached signature of a function or bound method."""
    return _signature_of(getattr(call, "__func__", call), inspect.ismethod(call))


@functools.cache
def _signature_of(function: Callable[..., Any], bound: bool) -> inspect.Signature:
    whole = inspect.signature(function)
    return whole.replace(parameters=[*whole.parameters.values()][bound:])


@dataclass(frozen=True)
class _Rows:
    """A call's arguments; ``arrays`` have ``t`` tokens of ``n_seqs`` sequences."""

    bound: inspect.BoundArguments
    arrays: dict[str, mx.array]
    n_seqs: int
    t: int
    divides: bool

    @classmethod
    def read(cls, call: Callable[..., Any], args: Any, kwargs: Any) -> _Rows | None:
        """Return a call's arguments; None unless it takes tokens and caches."""
        signature = _signature(call)
        if "cache" not in signature.parameters:
            return None
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return None
        given = {n: v for n, v in bound.arguments.items() if v is not None}
        given.pop("cache", None)
        arrays = {n: v for n, v in given.items() if isinstance(v, mx.array)}
        first = next(iter(arrays.values()), None)
        if first is None or first.ndim < 2 or 0 in first.shape:
            return None
        n_seqs, t = first.shape[:2]
        same = [n for n, x in arrays.items() if tuple(x.shape[:2]) == (n_seqs, t)]
        divides = len(same) == len(given)
        return cls(bound, {n: arrays[n] for n in same}, n_seqs, t, divides)

    @property
    def cache(self) -> list[Any] | None:
        """The given caches; None also for a list of None, which some models pass."""
        found: list[Any] | None = self.bound.arguments.get("cache")
        return found if found and any(c is not None for c in found) else None

    def part(self, tokens: slice, cache: list[Any]) -> inspect.BoundArguments:
        """Return the arguments of a call with a slice of the tokens."""
        parts = {name: x[:, tokens] for name, x in self.arrays.items()}
        arguments = {**self.bound.arguments, **parts, "cache": cache}
        return inspect.BoundArguments(self.bound.signature, arguments)  # type: ignore[arg-type]

    def bytes_of(self, out: Any) -> int | None:
        """Return the bytes per token of a call's result."""
        if isinstance(out, mx.array) and tuple(out.shape[:2]) == (self.n_seqs, self.t):
            return out.nbytes // (self.n_seqs * self.t)
        return None
