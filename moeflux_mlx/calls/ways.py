"""Choose how a call gets its experts: running ahead of reading them, or waiting.

The model's layers and blocks consult this module. Calls under a transformation bypass
it.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import config, device
from ..experts.compute.exchange import Exchange
from ..experts.files.modules import RoutedBlock
from ..experts.streaming.streamer import ExpertStreamer
from ..experts.streaming.windows import window_of
from ..memory.caches import CacheState, are_known
from ..system.uncopied import Uncopied
from .ahead import TokenAhead
from .foresight import Choosers, WaitingCall, takes_input_alone
from .transforms import in_transformation


def runs_ahead(choice: str) -> bool:
    """Tell whether tokens may run ahead of reading; ``auto`` allows it on GPUs.

    A CPU gains nothing, because looking slots up takes longer than reading ids back.
    """
    return choice == "on" or (choice == "auto" and not device.on_cpu())


class Ways:
    """Chooses how each call of a model gets its experts.

    Args:
        optimistic: ``"auto"``, ``"on"`` or ``"off"``: let tokens run ahead of reading;
            None uses the environment's value.

    Raises:
        ConfigError: ``optimistic`` has an unusable value.
    """

    def __init__(self, optimistic: str | None = None):
        self._choice = config.optimistic(optimistic)
        self.runs_ahead = runs_ahead(self._choice)
        # Other processes have a part of the experts.
        self.exchange: Exchange | None = None
        self._choosers = Choosers({})
        self._n_blocks = 0
        self._token: TokenAhead | WaitingCall | None = None
        self._thread = 0

    @property
    def token(self) -> TokenAhead | WaitingCall | None:
        """The call in progress, if it belongs to this thread."""
        if (token := self._token) is None or self._thread != threading.get_ident():
            return None
        return token

    def forget(self) -> None:
        """Drop the call in progress, which an interrupted call may have left behind."""
        self._token = None

    def watch(
        self, model: nn.Module, blocks: Sequence[RoutedBlock], undo: ExitStack
    ) -> None:
        """Make decoder layers, and modules that choose experts, consult this object.

        Args:
            undo: receives the functions that restore them.
        """
        self._n_blocks = len(blocks)
        modules = dict(model.named_modules())
        stems = {re.split(r"\.\d+\.", block.path)[0] for block in blocks}
        for path, layer in modules.items():
            stem, _, number = path.rpartition(".")
            if stem in stems and number.isdigit():
                self._add(StreamedLayer, layer, undo)
        choosers: dict[int, nn.Module] = {}
        for number, block in enumerate(blocks):
            # A path may lead to a list or dictionary, which is not a module.
            above = [modules[p] for p in _below_layer(block.path) if p in modules]
            chooser = next(filter(takes_input_alone, above), None)
            if chooser is None:
                for module in _beside(block.path, modules):
                    self._add(StreamedGiver, module, undo)
            elif not any(chooser is one for one in choosers.values()):
                # If a module has several blocks, predict for the first one.
                self._add(StreamedChooser, chooser, undo)
                choosers[number] = chooser
        self._choosers = Choosers(choosers)

    def _add(self, added: type, module: nn.Module, undo: ExitStack) -> None:
        kind: type = type(module)
        undo.callback(setattr, module, "__class__", kind)
        module.__class__ = added_class(added, kind)
        module.__dict__["ways"] = self

    def run(
        self,
        call: Callable[[], Any],
        streamer: object,
        n_tokens: int,
        states: Sequence[CacheState] | None,
    ) -> Any:
        """Make the call and return its result.

        Args:
            n_tokens: number of tokens per sequence.
            states: states of the call's caches; None if they cannot be restored.
        """
        streams = isinstance(streamer, ExpertStreamer) and not streamer.resident
        if not streams or self._token is not None or in_transformation():
            return call()
        assert isinstance(streamer, ExpertStreamer)
        self._thread = threading.get_ident()
        try:
            if n_tokens > 1:
                self._token = WaitingCall(None)
                return call()
            ahead = streamer.read_ahead.begin()
            out = self._run_token(call, streamer, states, ahead)
            streamer.read_ahead.end()
            return out
        finally:
            self._token = None

    def _run_token(
        self,
        call: Callable[[], Any],
        streamer: ExpertStreamer,
        states: Sequence[CacheState] | None,
        reads_ahead: bool,
    ) -> Any:
        if self.runs_ahead and states and are_known(s.cache for s in states):
            read_back = device.GPU_READ_BACK_LAYERS
            rate, n = streamer.miss_rate, self._n_blocks
            window = window_of(rate, n, read_back, ahead=reads_ahead)
            if window > 1 or self._choice == "on":
                token = TokenAhead(streamer, window, states, reads_ahead=reads_ahead)
                self._token = token
                return token(call)
        self._token = WaitingCall(self._choosers if reads_ahead else None)
        return call()


class StreamedLayer(nn.Module):
    """Added to a decoder layer's class: a restarted token may skip the layer."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        ways: Ways = self.__dict__["ways"]
        if (token := ways.token) is None:
            out = super().__call__(*args, **options)
        else:
            out = token.layer(super().__call__, args, options)
        return out if ways.exchange is None else ways.exchange.mended(out)


class StreamedChooser(nn.Module):
    """Added to the class of a module that chooses experts: records its input."""

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> Any:
        ways: Ways = self.__dict__["ways"]
        if isinstance(token := ways.token, WaitingCall):
            token.choose(x)
        return super().__call__(x, *args, **options)


class StreamedGiver(nn.Module):
    """Added to the class of a module that may return ids: records its output."""

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> Any:
        ways: Ways = self.__dict__["ways"]
        out = super().__call__(x, *args, **options)
        if isinstance(token := ways.token, WaitingCall):
            token.gives(self, x, out)
        return out


def _below_layer(path: str) -> list[str]:
    """Return the paths between a block and its decoder layer, the nearest first."""
    names = path.split(".")
    first = next((i + 1 for i, name in enumerate(names) if name.isdigit()), 0)
    return [".".join(names[:n]) for n in range(len(names) - 1, first, -1)]


def _beside(path: str, modules: dict[str, nn.Module]) -> list[nn.Module]:
    """Return a model's own modules beside those that contain a block."""
    below = _below_layer(path)
    parents = {name.rpartition(".")[0] for name in below}
    return [
        module
        for name, module in modules.items()
        if name.rpartition(".")[0] in parents
        and name not in below
        and not type(module).__module__.startswith(nn.__name__)
        and takes_input_alone(module)
    ]


@functools.cache
def added_class(added: type, kind: type) -> type:
    """Return a subclass of a module's class with the methods of ``added``."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (added, Uncopied, kind), names)
