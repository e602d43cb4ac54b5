"""A call of a model: who performs it, graphs or modules, and in which chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .. import device
from ..calls.arguments import ArgumentChecks
from ..calls.gradients import Gradients, kind_of
from ..calls.module_call import Backbone, ModuleCall, without_adapters
from ..calls.small_calls import SmallCalls
from ..calls.transforms import in_transformation, is_traced
from ..errors import ModelError
from ..experts.streaming.streamer import ExpertStreamer
from ..experts.weights import has_values
from ..memory.caches import PutBackOnFailure
from .blocks import ROUTED, Call
from .compiled_layers import arrays_of
from .graph_call import GraphCall
from .layer import GraphLayer, LayerForm
from .needs import TextNeeds
from .ops.functions import Array, namespace
from .parameters import Watch
from .runtime import Runtime

R = TypeVar("R")


class Forward:
    """The calls of a text model: tokens to rows or logits.

    Args:
        text: mlx-lm's module, with its ``model`` of ``layers`` between embedding and
            norm.
        args: the arguments of that module.
        forms: the form of each layer.
        backbone: mlx-lm's call of ``text.model``, for calls that graphs cannot do.
    """

    def __init__(
        self,
        text: nn.Module,
        args: Any,
        runtime: Runtime,
        forms: Sequence[LayerForm],
        backbone: Backbone,
    ):
        self.text, self.args, self.runtime = text, args, runtime
        self._forms = forms
        mixers = [form.mixer for form in forms]
        self._checked = ArgumentChecks(mixers, args.hidden_size)
        self.needs = TextNeeds(
            text,
            args,
            self.routed_name,
            forms,
            self._planned_bytes,
            lambda: self.dtype,
            self._module_bytes,
        )
        self._graphs = self._graphs_of(runtime)
        self._modules = ModuleCall(text, backbone, self._graphs.ends.bounded)
        self._gradients = Gradients(runtime, self._logits_of_modules)
        self._module_calls = SmallCalls(runtime)
        # False if a module, such as an adapter, is called as in mlx-lm.
        self._is_known = True
        # The parameters of the last call outside of transformations.
        self._parameters: Watch | None = None

    @property
    def routed_name(self) -> str:
        """mlx-lm's name of blocks of routed experts."""
        routed = (f.routed_name for f in self._forms if f.routed is not None)
        return next(routed, ROUTED)

    @property
    def dtype(self) -> mx.Dtype:
        """The type of activations."""
        return self._graphs.ends.dtype

    def graph_layers(self) -> list[GraphLayer]:
        """Return the decoder layers; prepare them on the first call."""
        return self._graphs.layers()

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        text, runtime = copy.deepcopy((self.text, self.runtime), memo)
        backbone = self._modules.backbone
        like = Forward(text, self.args, runtime, self._forms, backbone)
        like._modules.known = self._modules.known
        return like

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> mx.array:
        """Return logits ``[B, T, V]``; other threads' calls wait meanwhile."""
        logits: mx.array = self._alone(inputs, cache, embeddings, logits=True)
        return logits

    def rows(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> Array:
        """Return normalised rows ``[B, T, D]``; other threads' calls wait meanwhile."""
        return self._alone(inputs, cache, embeddings, logits=False)

    def _alone(self, *arguments: Any, logits: bool) -> Array:
        """Make a call while no other thread does; its result may still be lazy."""
        return self.runtime.alone(self._called, *arguments, logits=logits)

    def _called(
        self,
        inputs: mx.array,
        cache: list[Any] | None,
        embeddings: mx.array | None,
        *,
        logits: bool,
    ) -> Array:
        given = inputs, cache, embeddings = self._checked(inputs, cache, embeddings)
        followed = self._followed(inputs, cache, embeddings)
        if self.runtime.together.exchange is not None:
            self._check_shared(followed)
            out = self._logits_of_graphs if logits else self._rows_of_graphs
            return self.runtime.together.led(out(*given))
        if not self._is_known or (followed and self._streams_to(followed)):
            rows = self._rows_of_modules(inputs, cache, embeddings, followed)
            return self._modules.logits(rows) if logits else rows
        if followed:
            graphs = self._reference(followed)
            return graphs.logits_of(*given) if logits else graphs.rows(*given)
        return (
            self._logits_of_graphs(*given) if logits else self._rows_of_graphs(*given)
        )

    def _followed(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> list[mx.array]:
        """Return the arrays of a call if a transformation traces any; else none."""
        if in_transformation():
            given = [inputs] if embeddings is None else [inputs, embeddings]
            if cache is not None:
                given += arrays_of(cache)
            if is_traced(given):
                self._is_known = not self._modules.has_foreign_modules()
                return given
        if self._parameters is not None and self._parameters.holds():
            return []
        self._is_known = not self._modules.has_foreign_modules()
        known = self._parameters.seen if self._parameters is not None else []
        parameters = Watch(self.text.modules())
        if is_traced(changed := parameters.arrays_beside(known)):
            return changed
        self._parameters = parameters
        self._graphs.let_go()
        return []

    def _check_shared(self, followed: list[mx.array]) -> None:
        """Refuse calls that ranks which share experts cannot make.

        Raises:
            ModelError: a transformation follows the call, or a module is not the
                model's own.
        """
        if followed:
            raise ModelError(
                "[group] expected a call outside of transformations but got one that "
                "needs a gradient or is compiled: train or compile in one process, "
                "without group="
            )
        if not self._is_known:
            raise ModelError(
                "[group] expected the model's own modules but got adapters or others: "
                "load it with native=False"
            )

    def _streams_to(self, followed: list[mx.array]) -> bool:
        """Return whether a transformed call with values reads streamed experts."""
        self.runtime.open(self.needs)
        return self.runtime.comes_and_goes and has_values(*followed)

    def _graphs_of(self, runtime: Runtime) -> GraphCall:
        return GraphCall(self.text, self.args, runtime, self._forms, self.needs)

    def _reference(self, followed: list[mx.array]) -> GraphCall:
        """Return lazy graphs for a call inside a transformation.

        They serve one call: the next transformation may pass other weights.

        Raises:
            ModelError: experts are streamed, or cannot be part of a function.
        """
        self.runtime.open(self.needs)
        return self._graphs_of(self.runtime.reference(has_values=has_values(*followed)))

    def _logits_of_graphs(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> mx.array:
        room = self._room(inputs, cache, embeddings)
        if not room.is_whole:
            with self.threads(inputs):
                rows = self._in_chunks(self._graphs.rows, inputs, room, embeddings)
                return self._graphs.logits(rows)

        def call() -> mx.array:
            step = self._graphs.step(inputs, cache, embeddings)
            if step is not None:
                return step
            with self.threads(inputs):
                return self._graphs.logits_of(inputs, room.cache, embeddings)

        return self._together(call, room)

    def _rows_of_graphs(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> Array:
        return self._divided(self._graphs.rows, inputs, cache, embeddings)

    def _together(self, call: Callable[[], R], room: _Room) -> R:
        """Make a whole call, with the other ranks that share the experts if any."""
        if self.runtime.together.exchange is None:
            return call()
        with PutBackOnFailure(room.cache or [], room.t) as states:
            return self.runtime.together.run(call, states)

    def _rows_of_modules(
        self,
        inputs: mx.array,
        cache: list[Any] | None,
        embeddings: mx.array | None,
        followed: list[mx.array],
    ) -> mx.array:
        if not has_values(*followed):
            # Raises an error if experts are not among the parameters.
            self._reference(followed)
        self.runtime.open(self.needs)
        call, whole = self._put_back_on_failure, bool(followed)
        rows: mx.array = self._divided(call, inputs, cache, embeddings, whole=whole)
        streamer = self.runtime.streamer
        if followed and isinstance(streamer, ExpertStreamer) and streamer.resident:
            # The backward pass reads the experts again.
            streamer.stay()
        else:
            self._graphs.guard(rows, cache)
        return rows

    def _put_back_on_failure(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> mx.array:
        with PutBackOnFailure(cache or []):
            return self._modules.rows(inputs, cache, embeddings)

    def _logits_of_modules(self, tokens: mx.array) -> mx.array:
        return self._modules.logits(self._modules.rows(tokens, None, None))

    def _measure_modules(self, n_seqs: int, t: int, cache: list[Any]) -> None:
        """Measure the memory of calls of modules, which no graph plans."""
        # Any earlier call has measured the memory of a single token.
        is_known = t == 1 and self._module_calls.taken.of_token > 0
        if (keeper := self.runtime.keeper) is None or is_known:
            return
        self._module_calls.measure(
            kind_of(self.text),
            n_seqs * t,
            lambda: keeper.clear(cache),
            lambda tokens: self._modules.rows(tokens, None, None),
        )

    def _module_bytes(self, n_seqs: int, t: int, n_rows: int) -> float:
        """Return the peak of a call if it is one of modules."""
        if self._is_known:
            return 0
        return self._module_calls.taken.n_bytes(n_seqs, t, n_rows)

    def _planned_bytes(self, index: int, call: Call) -> int:
        # An adapter is tiny compared to its layer, so the plan ignores it.
        module = without_adapters(self.text.model.layers[index])
        layer = GraphLayer(module, index, self._forms[index], self.runtime, False)
        return layer.planned_bytes(call)

    def threads(self, inputs: mx.array) -> AbstractContextManager[None]:
        """Return a context that gives a call on the host threads to fit its size."""
        return self._threads(inputs.size)

    def _threads(self, n_tokens: int) -> AbstractContextManager[None]:
        return device.host_threads(n_tokens * self.args.hidden_size**2)

    def _divided(
        self,
        call: Callable[[mx.array, Any, mx.array | None], Array],
        inputs: mx.array,
        cache: list[Any] | None,
        embeddings: mx.array | None,
        *,
        whole: bool = False,
    ) -> Array:
        """Return a call's result; divide a long call into chunks if memory is planned.

        Args:
            whole: do not divide: a transformation keeps all intermediate arrays.
        """
        given = inputs if embeddings is None else embeddings
        n_seqs, t = given.shape[:2]
        if whole and self.runtime.keeper is not None:
            self._gradients.make_room(self.text, [given], cache or [], n_seqs, t)
            return call(inputs, cache, embeddings)
        room = self._room(inputs, cache, embeddings)
        if not room.is_whole:
            return self._in_chunks(call, inputs, room, embeddings)
        return self._together(partial(call, inputs, room.cache, embeddings), room)

    def _room(
        self, inputs: mx.array, cache: list[Any] | None, embeddings: mx.array | None
    ) -> _Room:
        """Make room for a call, the same as on the other ranks if there are any."""
        given = inputs if embeddings is None else embeddings
        n_seqs, t = given.shape[:2]
        if not self._is_known:
            self._measure_modules(n_seqs, t, cache or [])
        together, runtime = self.runtime.together, self.runtime
        room = cache

        def step() -> int:
            nonlocal room
            self._graphs.make_room(given, cache)
            if runtime.keeper is None or (cache and t == 1):
                return t
            # A call without a cache returns all logits, and needs a cache between
            # chunks.
            room = cache or make_prompt_cache(self.text)
            return runtime.make_room(room, n_seqs, t, logits=not cache) // n_seqs

        least = together.agreed(
            n_seqs,
            t,
            given,
            step,
            resident=lambda: runtime.streamer is not None and not runtime.streams,
            give_way=runtime.options.give_way,
        )
        return _Room(room, n_seqs, t, least)

    def _in_chunks(
        self,
        call: Callable[[mx.array, Any, mx.array | None], Array],
        inputs: mx.array,
        room: _Room,
        embeddings: mx.array | None,
    ) -> Array:
        cache, n_seqs, t, step = room.cache, room.n_seqs, room.t, room.step
        parts: list[Array] = []
        # The size of a chunk, not of the whole call, decides on threads.
        with PutBackOnFailure(cache or []), self._threads(n_seqs * step):
            for start in range(0, t, step):
                chunk = slice(start, start + step)
                rows = None if embeddings is None else embeddings[:, chunk]
                each = partial(call, inputs[:, chunk], cache, rows)
                part = self.runtime.together.run(each, None)
                if isinstance(part, mx.array):
                    mx.eval(part)
                    # The next chunk needs longer arrays, which do not fit freed ones.
                    device.trim_heap()
                parts.append(part)
        return namespace(parts[0]).concatenate(parts, axis=1)


@dataclass(frozen=True)
class _Room:
    """The caches of a call, its sequences, and the tokens to compute together."""

    cache: list[Any] | None
    n_seqs: int
    t: int
    step: int

    @property
    def is_whole(self) -> bool:
        """Whether the call is not divided into chunks."""
        return self.t <= self.step
