"""A process group for one model, in which each process streams a share of the experts.

``mlx.launch`` starts the processes, one per machine or GPU; each is a rank.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import config
from ..errors import ConfigError, GroupError
from ..experts.compute.exchange import Exchange
from ..experts.files.share import SharedExperts
from ..experts.files.store import ExpertStore, model_identity
from ..experts.pool.budget import Amounts

Group = mx.distributed.Group


def launched_group() -> Group | None:
    """Return the process group that this process was started in, if any."""
    if not config.is_launched():
        return None
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise GroupError(f"[group] cannot reach the other ranks: {told}") from error
    return group if group.size() > 1 else None


def exchange_of(group: Group | None, *, pipeline: bool = False) -> Exchange | None:
    """Return the connection to the other ranks, or None without any.

    Raises:
        ConfigError: ``group`` is not a process group, or there is none to divide layers
            between.
    """
    if group is not None and not isinstance(group, Group):
        raise ConfigError(
            f"[group] expected a group of mx.distributed.init() but got {group!r}"
        )
    if group is not None and group.size() > 1:
        return Exchange(group)
    if pipeline:
        raise ConfigError(
            "[pipeline] expected several ranks but got one: start them with "
            "mlx.launch, or leave pipeline out"
        )
    return None


def reached(store: ExpertStore, exchange: Exchange | None) -> ExpertStore:
    """Return a store with this rank's share of the experts."""
    if exchange is None:
        return store
    return SharedExperts(store, exchange.rank, exchange.size)


def ways_in_group(
    read_ahead: str, optimistic: str | None, expert_io: str | None, amounts: Amounts
) -> tuple[str, str, str]:
    """Return a rank's options for reading, which exclude reading and running ahead.

    Every layer waits for the other ranks, so there is nothing to run ahead of.

    Raises:
        ConfigError: an option requests something else.
    """
    io = config.expert_io(expert_io)
    for name, requested in (
        ("read_ahead", read_ahead),
        ("optimistic", config.optimistic(optimistic)),
    ):
        if requested == "on":
            raise ConfigError(
                f"[{name}] expected 'auto' or 'off' with several ranks but got 'on': a "
                "layer waits for all of them"
            )
    if io == "mmap":
        raise ConfigError(
            "[expert_io] expected 'pread' or 'direct' with several ranks but got "
            "'mmap': a rank reads its own experts only"
        )
    if amounts.fastest:
        raise ConfigError(
            "[memory] expected an amount with several ranks but got 'auto': give each "
            "the bytes that it may take"
        )
    return "off", "off", "pread" if io == "auto" else io


def begin_together(
    exchange: Exchange,
    model: nn.Module,
    directory: Path,
    amounts: Amounts,
    *,
    pipeline: bool,
) -> None:
    """Wait until every rank has loaded the same model; share rank 0's random state.

    Raises:
        GroupError: a rank has another model or kind of bound, or ended.
    """
    exchange.agree(
        {
            "model": model_identity(directory),
            "class": type(model).__qualname__,
            "kind of memory bound": "process" if amounts.process else "experts",
            "division": "layers" if pipeline else "experts",
        }
    )
    # MLX's random state is the two halves of a seed.
    state: list[mx.array] = list(mx.random.state)  # type: ignore[call-overload]
    high, low = exchange.first(np.array(state[0]).tolist())
    mx.random.seed(high << 32 | low)
