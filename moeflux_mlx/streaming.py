"""The door: any Mixture-of-Experts model of mlx-lm, its experts streamed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

import mlx.nn as nn

from . import config, device
from .ahead import ModelCalls, added_class, runs_ahead, watch_layers
from .errors import ConfigError, ModelError
from .experts.access import open_experts
from .experts.budget import Amounts
from .experts.checkpoint import Checkpoint
from .experts.mapped import MappedExperts
from .experts.module_store import ModuleExperts, unchanged
from .experts.modules import RoutedBlock, find_blocks
from .experts.packed import is_packed
from .experts.policy import DEFAULT_POLICY, policy_factory
from .experts.streamer import ExpertStreamer, check_scope
from .experts.switch import StreamedSwitch
from .progress import Report

M = TypeVar("M", bound=nn.Module)


class StreamedModel(nn.Module):
    """What ``stream`` adds to a model's class: how calls run, and no saving."""

    streamer: ExpertStreamer | MappedExperts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls: ModelCalls = self.__dict__["calls"]
        return calls(super().__call__, args, kwargs, training=self.training)

    def save_weights(self, file: str) -> None:
        """Refuse: the routed experts' weights are not among the parameters.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"[save] {file}: expected every weight in memory but the experts are "
            "streamed: copy the files that the model was loaded from"
        )


def stream(
    model: M,
    directory: str | Path,
    *,
    memory: int | str | None = None,
    expert_memory: int | str | None = None,
    scope: str = "global",
    policy: str | None = None,
    read_ahead: str = "auto",
    optimistic: str | None = None,
    expert_io: str | None = None,
    report: Report | None = None,
) -> M:
    """Stream the experts of a model that mlx-lm loaded with ``lazy=True``.

    Every routed block is replaced before its weights are read, so that they never take
    memory; what the model computes stays the same to the last bit.

    Args:
        model: changed in place, its class too.
        directory: where the model was loaded from.
        memory: must be None: what a model needs besides experts is not known yet.
        expert_memory, scope, policy, read_ahead, optimistic, expert_io: as for
            ``load``.
        report: hears how far reading has come where all experts fit.

    Returns:
        The model. Its ``streamer`` has the counts.

    Raises:
        ModelError: no routed block, one that cannot be streamed, or weights that are
            not the checkpoint's own tensors.
        ConfigError: an argument has no usable value.
        BudgetError: not even one expert fits.
        ExpertStoreError: an expert could not be read.
    """
    directory = Path(directory)
    if isinstance(model, StreamedModel):
        raise ModelError("[stream] expected a model whose experts are not streamed yet")
    check_scope(scope)
    blocks = find_blocks(model)
    if not blocks:
        kind = type(model)
        raise ModelError(
            f"[stream] expected routed experts in {kind.__module__}.{kind.__name__} "
            "but found none: load it with mlx_lm.load"
        )
    direct = config.expert_io(expert_io) == "direct"
    ahead = config.optimistic(optimistic)
    amounts = Amounts.read(memory, expert_memory)
    if amounts.process is not None:
        raise ConfigError(
            "[memory] expected expert_memory for mlx-lm's class but got memory of "
            f"{amounts.process} bytes: what the rest of it needs is not known"
        )
    store = _open(model, blocks, directory, direct=direct)
    try:
        streamer = open_experts(
            store,
            amounts.experts,
            functools.partial(
                ExpertStreamer,
                store,
                amounts.experts,
                scope=scope,
                policy=policy_factory(policy or config.policy() or DEFAULT_POLICY),
                read_ahead=read_ahead,
                runs_ahead=runs_ahead(ahead),
                stacks=not device.gathers_strided(),
                report=report,
            ),
            io=expert_io,
            report=report,
        )
    except BaseException:
        store.close()
        raise
    return _install(model, blocks, streamer, ahead)


def _open(
    model: nn.Module, blocks: list[RoutedBlock], directory: Path, *, direct: bool
) -> ModuleExperts:
    if is_packed(directory):
        raise ConfigError(
            f"[stream] expected a plain checkpoint but got {directory}, a packed one: "
            "load it with moeflux_mlx.load"
        )
    checkpoint = Checkpoint.open(directory)
    try:
        sources = unchanged(checkpoint, getattr(model, "sanitize", None))
        store = ModuleExperts(blocks, checkpoint, sources)
        if direct:
            store.bypass_cache()
        return store
    except BaseException:
        checkpoint.close()
        raise


def _install(
    model: M,
    blocks: list[RoutedBlock],
    streamer: ExpertStreamer | MappedExperts,
    optimistic: str,
) -> M:
    calls = ModelCalls(streamer, len(blocks), optimistic)
    for number, block in enumerate(blocks):
        source = functools.partial(streamer.source, number)
        _replace(model, block.path, StreamedSwitch(block, source, calls))
    watch_layers(model, blocks, calls)
    model.__class__ = added_class(StreamedModel, type(model))
    model.__dict__["calls"] = calls
    model.__dict__["streamer"] = streamer
    return model


def _replace(model: nn.Module, path: str, block: nn.Module) -> None:
    """Put a block at a path such as ``model.layers.3.mlp.switch_mlp``."""
    *parents, name = path.split(".")
    place: Any = model
    for step in parents:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if isinstance(place, list):
        place[int(name)] = block
    else:
        place[name] = block


__all__ = ["StreamedModel", "stream"]
