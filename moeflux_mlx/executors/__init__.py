"""Executors by name."""

from __future__ import annotations

from .. import config
from ..errors import BackendError
from .base import Encoding, Executor
from .ops import OpsExecutor

EXECUTORS: dict[str, type[Executor]] = {OpsExecutor.name: OpsExecutor}


def open_executor(name: str | None = None) -> Executor:
    """Open the executor called ``name``, by default the environment's choice.

    Raises:
        BackendError: when there is none of that name or it cannot run here.
    """
    name = name or config.executor_name()
    if name not in EXECUTORS:
        raise BackendError(
            f"[executor] expected one of {', '.join(EXECUTORS)} but got {name!r}"
        )
    return EXECUTORS[name].open()


__all__ = ["EXECUTORS", "Encoding", "Executor", "OpsExecutor", "open_executor"]
