"""Calls of any model of mlx-lm whose experts are streamed: they may run ahead.

To wait for each layer's choice of experts before what follows is launched costs more
than anything else. So a token runs as if no expert were missing: slots are looked up
on the device, and what blocks asked for is read back once for a window of them. Where
a block lacked an expert, that is read, the caches are put back and the model is called
again: decoder layers before the block, and blocks, give what they gave before. Nothing
depends on what was in memory.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import config, device
from .caches import CacheState, every_cache
from .experts.mapped import MappedExperts
from .experts.modules import RoutedBlock
from .experts.source import ExpertSource
from .experts.streamed import StreamedExperts
from .experts.streamer import ExpertStreamer
from .experts.windows import SPAN_GROWTH, window_of
from .transforms import is_traced

Build = Callable[[ExpertSource], mx.array]


def runs_ahead(choice: str) -> bool:
    """Tell whether tokens may run ahead of reading: ``auto``, on GPUs."""
    return choice == "on" or (choice == "auto" and not device.on_cpu())


class _AgainError(Exception):
    """A block lacked an expert, which is there now: the token begins again."""


class ModelCalls:
    """How the calls of one model run; its blocks and layers ask here.

    Args:
        n_blocks: routed blocks of the model.
        optimistic: ``"auto"``, ``"on"`` or ``"off"``: whether tokens run ahead of
            reading; None takes the environment's choice.

    Raises:
        ConfigError: ``optimistic`` has no usable value.
    """

    def __init__(
        self,
        streamer: ExpertStreamer | MappedExperts,
        n_blocks: int,
        optimistic: str | None = None,
    ):
        self.streamer, self._n_blocks = streamer, n_blocks
        self._choice = config.optimistic(optimistic)
        # Held during a call, and by a block that is called by itself.
        self.lock = threading.RLock()
        # The token that runs ahead now.
        self.token: Token | None = None
        # Whether no transformation follows the call under way, as far as is known.
        self.is_plain = False
        # A CPU has nothing to wait for: looking slots up takes it longer than reading
        # ids back.
        self.runs_ahead = runs_ahead(self._choice)

    def __call__(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        options: dict[str, Any],
        *,
        training: bool = False,
    ) -> Any:
        """Do what ``call(*args, **options)`` does, with the model's own result.

        A call that fails leaves mlx-lm's caches as they were.
        """
        with self.lock:
            if self.is_plain or self.token is not None:
                # A model that calls itself.
                return call(*args, **options)
            if self.streamer.resident:
                return call(*args, **options)
            run = functools.partial(call, *args, **options)
            given = list(_arrays_in((args, options)))
            caches = every_cache(_caches_in(args, options))
            states = [CacheState(c, _n_tokens(given)) for c in caches or ()]
            try:
                out = None
                if not training and not is_traced(given):
                    out = self._plain(run, given, caches, states)
                if out is None:
                    out = run()
            except BaseException:
                _put_back(states)
                raise
            self.streamer.hand_over()
            return out

    def _plain(
        self,
        run: Callable[[], Any],
        given: Sequence[mx.array],
        caches: list[Any] | None,
        states: list[CacheState],
    ) -> Any:
        """Run a call in which values may be looked at; None if they may not."""
        try:
            out = self._run_ahead(run, given, caches, states)
            if out is None:
                self.is_plain = True
                out = run()
        finally:
            self.is_plain, self.token = False, None
        # Of weights, say: nobody could have known before.
        if not is_traced([*_arrays_in(out)]):
            return out
        _put_back(states)
        return None

    def _run_ahead(
        self,
        run: Callable[[], Any],
        given: Sequence[mx.array],
        caches: list[Any] | None,
        states: list[CacheState],
    ) -> Any:
        """Run one token of each sequence ahead of reading; None: it is to wait."""
        streamer = self.streamer
        assert isinstance(streamer, ExpertStreamer)
        if not caches or _n_tokens(given) != 1 or not self.runs_ahead:
            return None
        ahead = streamer.read_ahead.begin()
        read_back, n_blocks = device.GPU_READ_BACK_LAYERS, self._n_blocks
        window = window_of(streamer.miss_rate, n_blocks, read_back, ahead=ahead)
        out = None
        if window > 1 or self._choice == "on":
            self.token = Token(streamer, window, states, ahead=ahead)
            while out is None:
                try:
                    out = run()
                    self.token.finish()
                except _AgainError:
                    out = None
                    self.token.begin_again()
                    _put_back(states)
        streamer.read_ahead.end()
        return out


@dataclass(frozen=True)
class _Passed:
    """What a layer gave, what it did to caches, and the blocks up to its end."""

    out: Any
    states: list[CacheState]
    n_blocks: int


class Token:
    """One token of each sequence on its way through a model, ahead of reading.

    Args:
        window: blocks that run before what they asked for is read back.
        states: of the call's caches before it.
        ahead: read what later blocks asked for in vain ahead of them.
    """

    def __init__(
        self,
        streamer: ExpertStreamer,
        window: int,
        states: Sequence[CacheState],
        *,
        ahead: bool,
    ):
        self._streamer, self._window, self._reads_ahead = streamer, window, ahead
        self._states = {id(state.cache): state for state in states}
        # What blocks gave with the experts that they asked for, from the first on.
        self._right: list[mx.array] = []
        # Layer, ids and outputs of blocks that followed, and are to be looked at.
        self._assumed: list[tuple[int, mx.array, mx.array | None]] = []
        self._passed: list[_Passed | None] = []
        # Whether the block after those that are right has been given its experts.
        self._provided = False
        self._n_blocks = self._n_layers = 0
        self._reached = 0

    def begin_again(self) -> None:
        """Hear that the model is called again from its beginning."""
        self._reached = max(self._reached, self._n_blocks)
        self._n_blocks = self._n_layers = 0

    def block(
        self, source: StreamedExperts, indices: mx.array, build: Build
    ) -> mx.array:
        """Return what a block gives for ids ``[..., K]``, known to be right or not.

        Args:
            build: makes the block's output of experts.
        """
        i = self._n_blocks
        self._n_blocks += 1
        if i < len(self._right):
            return self._right[i]
        if self._provided:
            # The only block that can be the next: it was looked at before.
            return self._know(self._assume(source, build))
        if not self._can_assume(indices):
            self._look()
            return self._know(build(source))
        if self._assumed and self._assumed[0][1].size != indices.size:
            self._look()
        self._assumed.append((source.layer, indices, None))
        if len(self._assumed) >= self._window:
            # Its own experts are had before it is built.
            self._look()
            return self._know(self._assume(source, build))
        out = self._assume(source, build)
        self._assumed[-1] = source.layer, indices, out
        if self._n_blocks % SPAN_GROWTH == 0:
            # Not allowed inside a transformation, which the end of the call finds out.
            with contextlib.suppress(ValueError):
                mx.async_eval(out)
        return out

    def layer(
        self, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Do what a decoder layer's call does, or what it did before."""
        i = self._n_layers
        self._n_layers += 1
        passed = self._passed[i] if i < len(self._passed) else None
        if passed is not None and passed.n_blocks <= len(self._right):
            _put_back(passed.states)
            self._n_blocks = passed.n_blocks
            return passed.out
        out = call(*args, **options)
        used: list[CacheState] = []
        known = self._is_function(args, options, used) and _is_value(out)
        states = [state.now() for state in used]
        self._passed[i:] = [_Passed(out, states, self._n_blocks) if known else None]
        return out

    def finish(self) -> None:
        """Look at what is left at the end of the model's call.

        Raises:
            _AgainError: some block lacked an expert.
        """
        self._look()

    def _can_assume(self, indices: mx.array) -> bool:
        fits = indices.size <= self._streamer.capacity
        return fits and indices.dtype in (mx.uint32, mx.int32)

    def _assume(self, source: StreamedExperts, build: Build) -> mx.array:
        slots = self._streamer.slots_on_device([source.layer])
        out = build(source.assumed(slots))
        self._streamer.guard(out)
        return out

    def _know(self, out: mx.array) -> mx.array:
        self._right.append(out)
        self._provided = False
        return out

    def _look(self) -> None:
        """Read back what blocks asked for; return if all of it was in memory.

        It has been read if only the last one, which is not built yet, lacked some.

        Raises:
            _AgainError: a block that was built did.
        """
        if not self._assumed:
            return
        assumed, self._assumed = self._assumed, []
        first = len(self._right)
        n_right = self._streamer.confirm(
            [layer for layer, _, _ in assumed],
            [indices for _, indices, _ in assumed],
            n_foreseen=max(0, self._reached - first) if self._reads_ahead else None,
        )
        self._right += [out for _, _, out in assumed[:n_right] if out is not None]
        if n_right < len(assumed) and assumed[n_right][2] is not None:
            self._provided = True
            raise _AgainError

    def _is_function(
        self, args: tuple[Any, ...], options: dict[str, Any], used: list[CacheState]
    ) -> bool:
        """Tell whether a layer can change nothing of what it is given but known caches.

        Args:
            used: is added these caches' states.
        """
        for value in (*args, *options.values()):
            if _is_value(value):
                continue
            known = every_cache([value])
            if known is None or any(id(c) not in self._states for c in known):
                return False
            used += [self._states[id(c)] for c in known]
        return True


class StreamedLayer(nn.Module):
    """What is added to a decoder layer's class: a token may pass it once only."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        call, calls = super().__call__, self.__dict__["calls"]
        token: Token | None = calls.token
        if token is None:
            return call(*args, **options)
        return token.layer(call, args, options)


def watch_layers(
    model: nn.Module, blocks: Sequence[RoutedBlock], calls: ModelCalls
) -> None:
    """Have the layers with blocks, and those beside them, ask ``calls`` how they run.

    Where blocks are in no list of modules, a token always begins at the model's begin.
    """
    paths = {re.split(r"\.\d+\.", block.path)[0] for block in blocks}
    modules = dict(model.named_modules())
    for path, layer in modules.items():
        stem, _, number = path.rpartition(".")
        if stem in paths and number.isdigit():
            kind: type = type(layer)
            layer.__class__ = added_class(StreamedLayer, kind)
            layer.__dict__["calls"] = calls


@functools.cache
def added_class(adding: type, kind: type) -> type:
    """Return a class of modules with what another one adds to it."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (adding, kind), names)


def _put_back(states: Sequence[CacheState]) -> None:
    for state in states:
        state.put_back()


def _caches_in(args: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    """Return what a model is given in lists: mlx-lm gives it nothing else so."""
    values = (*args, *options.values())
    lists = [value for value in values if isinstance(value, list | tuple)]
    return [cache for value in lists for cache in value]


def _n_tokens(arrays: Sequence[mx.array]) -> int | None:
    """Return the tokens that arrays ``[B, T, ...]`` have of each sequence, at most."""
    return max((x.shape[1] for x in arrays if x.ndim > 1), default=None)


def _arrays_in(value: Any) -> Iterator[mx.array]:
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _arrays_in(part)
    elif isinstance(value, dict):
        yield from _arrays_in([*value.values()])


def _is_value(value: Any) -> bool:
    """Tell whether nobody can change a value."""
    if isinstance(value, tuple):
        return all(map(_is_value, value))
    return value is None or isinstance(value, mx.array | bool | int | float | str)
