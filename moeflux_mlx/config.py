"""Every environment variable that moeflux-mlx reads.

It also checks for the variables by which ``mlx.launch`` and ``mpirun`` tell a process
its rank.

============================ =======================================================
``MOEFLUX_EXECUTOR``         executor if ``load(executor=)`` is not given: ``ops``,
                             ``metal``, ``cuda`` or ``sim`` (default: see
                             ``open_executor``)
``MOEFLUX_MEMORY``           memory of the process, and
``MOEFLUX_EXPERT_MEMORY``    of experts alone, if ``load`` is given neither
``MOEFLUX_POLICY``           eviction policy if ``load(policy=)`` is not given
``MOEFLUX_READ_THREADS``     parallel reads of expert records (default 8)
``MOEFLUX_OPTIMISTIC``       ``auto`` (default), ``on`` or ``off``: let tokens run ahead
                             of reading experts; ``auto`` does so on GPUs
``MOEFLUX_EXPERT_IO``        ``mmap``: map packed experts; ``pread``: read them through
                             the page cache; ``direct``: bypass the page cache (default
                             ``auto``: map on Metal if all of them fit, else ``pread``)
``MOEFLUX_PROFILE_PER_OP``   ``1``: evaluate Op by Op and print a table at exit
``MOEFLUX_LOWERING``         ways to use instead of the default ones, as
                             ``Op=way,Op=way`` (``moeflux kernels --lowering`` lists)
``MOEFLUX_FUSE``             ``0``: disable fusions, one launch per Op
``MOEFLUX_TUNING``           file written by ``moeflux tune`` instead of this machine's
                             own; empty or ``0``: none
``MOEFLUX_CAPTURE``          ``PATH.gputrace:FIRST-LAST``: record these layers once
``MOEFLUX_SIM_CHECKED``      ``1``: executor ``sim`` also finds races and bad accesses
``MOEFLUX_TRACEBACK``        ``1``: commands print a traceback for unforeseen errors
============================ =======================================================
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import ConfigError

EXPERT_IO = ("auto", "mmap", "pread", "direct")
SWITCH = ("auto", "on", "off")


def cache_folder() -> Path:
    """Return the folder for files that this machine can create again.

    It is ``moeflux-mlx`` in ``XDG_CACHE_HOME``, by default ``~/.cache``. Use it through
    ``private``, which checks its owner.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard ignores relative paths; the working directory may be untrusted.
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    # For a user without a home, return a folder in which nothing can be created.
    return Path(base if os.path.isabs(base) else os.devnull) / "moeflux-mlx"


def check() -> None:
    """Check every variable that has a fixed set of values.

    Raises:
        ConfigError: a variable has an unusable value.
    """
    read_threads()
    optimistic()
    expert_io()
    lowering()
    capture()
    profile_per_op()
    sim_checked()
    fuse()


def is_launched() -> bool:
    """Tell whether ``mlx.launch`` or ``mpirun`` started this process as a rank."""
    hosts = Path(os.environ.get("MLX_HOSTFILE") or os.devnull)
    if hosts.is_file() and not hosts.read_bytes().strip():
        # mlx.launch writes an empty file for a single process, and MLX cannot read it.
        return False
    names = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return any(name in os.environ for name in names)


def executor_name() -> str | None:
    """Return the executor named by the environment, if any."""
    return os.environ.get("MOEFLUX_EXECUTOR") or None


def memory() -> str | None:
    """Return the memory of the process set by the environment, if any."""
    return os.environ.get("MOEFLUX_MEMORY") or None


def policy() -> str | None:
    """Return the eviction policy set by the environment, if any."""
    return os.environ.get("MOEFLUX_POLICY") or None


def expert_memory() -> str | None:
    """Return the memory for experts set by the environment, if any."""
    return os.environ.get("MOEFLUX_EXPERT_MEMORY") or None


def read_threads() -> int:
    """Return the number of parallel reads of expert records."""
    text = os.environ.get("MOEFLUX_READ_THREADS", "8")
    if not text.isdigit() or not 1 <= int(text) <= 256:
        raise ConfigError(
            f"[MOEFLUX_READ_THREADS] expected a number from 1 to 256 but got {text!r}"
        )
    return int(text)


def optimistic(requested: str | None = None) -> str:
    """Return the requested mode of running ahead, else the environment's."""
    return _choice("optimistic", requested, SWITCH)


def expert_io(requested: str | None = None) -> str:
    """Return the requested way to read experts, else the environment's."""
    return _choice("expert_io", requested, EXPERT_IO)


def _choice(name: str, requested: str | None, choices: tuple[str, ...]) -> str:
    variable = f"MOEFLUX_{name.upper()}"
    value = os.environ.get(variable) or "auto" if requested is None else requested
    if value not in choices:
        name = variable if requested is None else name
        raise ConfigError(f"[{name}] expected one of {choices} but got {value!r}")
    return value


def profile_per_op() -> bool:
    """Tell whether to evaluate and time every Op separately."""
    return _is_set("MOEFLUX_PROFILE_PER_OP")


def sim_checked() -> bool:
    """Tell whether the simulator checks every access."""
    return _is_set("MOEFLUX_SIM_CHECKED")


def traceback() -> bool:
    """Tell whether commands print a traceback for unforeseen errors."""
    return os.environ.get("MOEFLUX_TRACEBACK") == "1"


def fuse() -> bool:
    """Tell whether one launch may perform several Ops."""
    return _is_set("MOEFLUX_FUSE", "1")


def lowering() -> dict[str, str]:
    """Return the requested ways by Op name."""
    text = os.environ.get("MOEFLUX_LOWERING", "")
    pairs = [part.partition("=") for part in text.split(",") if part]
    for op, _, way in pairs:
        if not op or not way:
            raise ConfigError(
                f"[MOEFLUX_LOWERING] expected Op=way,Op=way but got {text!r}"
            )
    return {op.strip(): way.strip() for op, _, way in pairs}


def tuning() -> Path | bool:
    """Return the file of tuned ways; True means this machine's file, False none."""
    text = os.environ.get("MOEFLUX_TUNING")
    if text is None:
        return True
    return False if text in ("", "0") else Path(text)


def capture() -> tuple[str, int, int] | None:
    """Return file, first and last layer of the GPU trace to record, if any."""
    text = os.environ.get("MOEFLUX_CAPTURE", "")
    if not text:
        return None
    found = re.fullmatch(r"(.+\.gputrace):(\d+)-(\d+)", text)
    if not found or int(found[2]) > int(found[3]):
        raise ConfigError(
            f"[MOEFLUX_CAPTURE] expected PATH.gputrace:FIRST-LAST but got {text!r}"
        )
    return found[1], int(found[2]), int(found[3])


def _is_set(name: str, default: str = "0") -> bool:
    text = os.environ.get(name) or default
    if text not in ("0", "1"):
        raise ConfigError(f"[{name}] expected 0 or 1 but got {text!r}")
    return text == "1"
