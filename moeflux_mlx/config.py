"""Every environment variable moeflux-mlx reads, in one place.

============================ =======================================================
``MOEFLUX_EXECUTOR``         executor to use when none is asked for (default ``ops``)
``MOEFLUX_MEMORY``           expert memory when ``load(memory=)`` is not given
``MOEFLUX_READ_THREADS``     parallel reads of expert records (default 8)
``MOEFLUX_PROFILE_PER_OP``   ``1``: evaluate Op by Op and print a table at exit
============================ =======================================================
"""

from __future__ import annotations

import os

from .errors import ConfigError


def executor_name() -> str:
    """Return the executor named by the environment, ``ops`` by default."""
    return os.environ.get("MOEFLUX_EXECUTOR", "ops")


def memory() -> str | None:
    """Return the expert memory asked for by the environment, if any."""
    return os.environ.get("MOEFLUX_MEMORY") or None


def read_threads() -> int:
    """Return how many expert records are read at the same time."""
    text = os.environ.get("MOEFLUX_READ_THREADS", "8")
    if not text.isdigit() or not 1 <= int(text) <= 256:
        raise ConfigError(
            f"[MOEFLUX_READ_THREADS] expected a number from 1 to 256 but got {text!r}"
        )
    return int(text)


def profile_per_op() -> bool:
    """Tell whether every Op is to be evaluated and timed on its own."""
    return os.environ.get("MOEFLUX_PROFILE_PER_OP", "0") not in ("", "0")
