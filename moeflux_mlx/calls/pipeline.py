"""Divide the layers of a model between processes with mlx-lm's ``pipeline``.

Each rank runs its own layers on rows from the previous rank. A rank that fails sends
zeros, so that no other rank waits forever; at the end of the call all ranks learn of
the failure.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError, GroupError, ModelError
from ..experts.compute.blank import BlankExperts
from ..experts.compute.exchange import Exchange
from ..experts.files.modules import find_blocks
from ..experts.weights import has_values
from ..memory.caches import CacheState, arrays_of
from .alone import Experts
from .group import Group
from .shared import Calls
from .transforms import in_transformation


def divide_alike(
    model: nn.Module, exchange: Exchange, group: Group, undo: contextlib.ExitStack
) -> nn.Module:
    """Divide a model's layers between all ranks, or raise an error on every rank.

    Args:
        model: mlx-lm's model.
        exchange: the messages of the group.
        group: the process group.
        undo: receives a callback that restores the other ranks' layers.

    Returns:
        The module that contains the layers.

    Raises:
        PeerError: another rank failed.
        ModelError, ConfigError, GroupError: this rank failed.
    """

    def divide() -> nn.Module:
        backbone = divide_layers(model, group, undo)
        if not find_blocks(model):
            raise ModelError(
                f"[pipeline] expected routed experts in the layers of rank "
                f"{exchange.rank} but found none: start fewer ranks"
            )
        return backbone

    return exchange.alike(divide)


def divide_layers(
    model: nn.Module, group: Group, undo: contextlib.ExitStack
) -> nn.Module:
    """Keep only this rank's layers of a model; return the module that contains them.

    Args:
        model: mlx-lm's model.
        group: the process group.
        undo: receives a callback that restores the other layers.

    Raises:
        ModelError: mlx-lm cannot divide the model, or it has too few layers.
        ConfigError: the group lacks processes; mlx-lm's messages go to all of them.
    """
    backbone = getattr(model, "model", None)
    if not isinstance(backbone, nn.Module) or not hasattr(backbone, "pipeline"):
        raise ModelError(
            "[pipeline] expected a model whose layers mlx-lm divides but "
            f"{type(model).__module__} does not: leave pipeline out, and ranks share "
            "the experts"
        )
    if group.size() != (n := mx.distributed.init().size()):
        raise ConfigError(
            f"[pipeline] expected the group of all {n} processes but got one of "
            f"{group.size()}: give mx.distributed.init()"
        )
    if (n_layers := len(backbone.layers)) < group.size():
        raise ModelError(
            f"[pipeline] expected at most {n_layers} ranks, one for each layer, but "
            f"got {group.size()}: start fewer"
        )
    _check_messages(group)
    undo.callback(_restore, backbone, dict(backbone), dict(backbone.__dict__))
    backbone.pipeline(group)
    return backbone


def _check_messages(group: Group) -> None:
    """Send a number from each rank to the next, as layers send rows.

    Raises:
        GroupError: the backend cannot send between two ranks; NCCL's cannot.
    """
    rank, size, number = group.rank(), group.size(), mx.ones(1)
    try:
        if rank < size - 1:
            mx.eval(mx.distributed.recv_like(number, rank + 1))
        if rank:
            mx.eval(mx.distributed.send(number, rank - 1))
    except (RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise GroupError(
            f"[pipeline] expected messages between two ranks but got {told!r}: start "
            "them with another --backend, for example ring"
        ) from error


def _restore(module: nn.Module, items: dict[str, Any], names: dict[str, Any]) -> None:
    for own, before in ((module, items), (module.__dict__, names)):
        dict.clear(own)
        dict.update(own, before)


@contextlib.contextmanager
def undivided(backbone: nn.Module) -> Iterator[None]:
    """Run calls in this context on this rank's layers only, without messages."""
    before = backbone.pipeline_rank, backbone.pipeline_size
    backbone.pipeline_rank, backbone.pipeline_size = 0, 1
    try:
        yield
    finally:
        backbone.pipeline_rank, backbone.pipeline_size = before


class PipelinedCalls(Calls):
    """The calls of a model whose other layers run on other ranks.

    Args:
        model: mlx-lm's model.
        backbone: the module that contains the layers.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, *args: Any):
        super().__init__(model, *args)
        # A layer has all of its experts here, so it exchanges no rows of experts.
        self.ways.exchange = None
        self._backbone = backbone
        self._is_under_way = False
        self._failure: Exception | None = None

    @contextlib.contextmanager
    def reaching(self, experts: Experts) -> Iterator[None]:
        """Run calls in this context with these experts, without other ranks."""
        with super().reaching(experts), undivided(self._backbone):
            yield

    def block(self, call: Callable[..., mx.array], *args: Any) -> mx.array:
        """Run a routed block; if it fails during a call, return zeros."""
        try:
            return self.alone(call, *args)
        except Exception as error:
            if not self._is_under_way:
                raise
            self._failure = self._failure or error
            x, indices = args[:2]
            return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)

    def _run(
        self,
        call: Callable[..., Any],
        bound: inspect.BoundArguments,
        t: int,
        states: list[CacheState] | None,
    ) -> Any:
        if isinstance(self.streamer, BlankExperts):
            return super()._run(call, bound, t, states)
        assert self.exchange is not None
        if in_transformation() or not has_values(*bound.args[:1]):
            raise ModelError(
                "[pipeline] expected a call outside of transformations: train or "
                "compile in one process, without pipeline"
            )
        whole = functools.partial(call, *bound.args, **bound.kwargs)
        self._failure, self._is_under_way = None, True
        try:
            out = self.ways.run(whole, self.streamer, t, states)
            # All rows must be sent and received before messages of another kind.
            mx.eval(out, arrays_of(bound.arguments.get("cache") or []))
        finally:
            self._is_under_way = False
        self.exchange.end(self._failure)
        return out
