"""Several processes for one model: each streams a part of the experts.

``mlx.launch`` starts them, one a machine or one a GPU; each is a rank of a group.
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
    """Return the group of processes that were started with this one, if any."""
    if not config.is_launched():
        return None
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise GroupError(f"[group] cannot reach the other ranks: {told}") from error
    return group if group.size() > 1 else None


def exchange_of(group: Group | None, *, pipeline: bool = False) -> Exchange | None:
    """Return the way to the other ranks, if there are any.

    Raises:
        ConfigError: that is no group, or there are none to divide layers with.
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
    """Return those of a store's experts that this rank has."""
    if exchange is None:
        return store
    return SharedExperts(store, exchange.rank, exchange.size)


def ways_in_group(
    read_ahead: str, optimistic: str | None, expert_io: str | None, amounts: Amounts
) -> tuple[str, str, str]:
    """Return how a rank reads: every layer waits for the others, so not ahead.

    Raises:
        ConfigError: another way is asked for.
    """
    io = config.expert_io(expert_io)
    for name, asked in (
        ("read_ahead", read_ahead),
        ("optimistic", config.optimistic(optimistic)),
    ):
        if asked == "on":
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
        GroupError: one has another, is bounded in another way, or ended.
    """
    exchange.agree(
        {
            "model": model_identity(directory),
            "class": type(model).__qualname__,
            "kind of memory bound": "process" if amounts.process else "experts",
            "division": "layers" if pipeline else "experts",
        }
    )
    # A state is a seed's two halves.
    state: list[mx.array] = list(mx.random.state)  # type: ignore[call-overload]
    high, low = exchange.first(np.array(state[0]).tolist())
    mx.random.seed(high << 32 | low)
