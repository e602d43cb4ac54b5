"""Every environment variable moeflux-mlx reads, in one place.

Besides these it looks whether those are set by which ``mlx.launch`` and ``mpirun`` tell
a process its rank.

============================ =======================================================
``MOEFLUX_EXECUTOR``         executor to use when none is asked for: ``ops``,
                             ``metal``, ``cuda`` or ``sim`` (default: see
                             ``open_executor``)
``MOEFLUX_MEMORY``           memory of the process, and
``MOEFLUX_EXPERT_MEMORY``    of experts alone, when ``load`` is given neither
``MOEFLUX_POLICY``           eviction policy when ``load(policy=)`` is not given
``MOEFLUX_READ_THREADS``     parallel reads of expert records (default 8)
``MOEFLUX_OPTIMISTIC``       ``auto`` (default), ``on`` or ``off``: whether a token runs
                             ahead of reading experts; ``auto``: on GPUs
``MOEFLUX_EXPERT_IO``        ``mmap``: map packed experts; ``pread``: read them into
                             memory through the page cache, ``direct``: past it
                             (default ``auto``: map on Metal where all of them fit,
                             else ``pread``)
``MOEFLUX_PROFILE_PER_OP``   ``1``: evaluate Op by Op and print a table at exit
``MOEFLUX_LOWERING``         kernels to use instead of the table's choice, as
                             ``Op=way,Op=way`` (``moeflux kernels --lowering`` lists)
``MOEFLUX_FUSE``             ``0``: perform every Op by itself
``MOEFLUX_TUNING``           file that ``moeflux tune`` wrote, instead of this machine's
                             own; empty or ``0``: none
``MOEFLUX_CAPTURE``          ``PATH.gputrace:FIRST-LAST``: record these layers once
``MOEFLUX_SIM_CHECKED``      ``1``: executor ``sim`` also looks for races and the like
``MOEFLUX_TRACEBACK``        ``1``: commands also print where an error arose that nobody
                             foresaw
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
    """Return the folder for files that this machine can make again.

    That is ``moeflux-mlx`` below ``XDG_CACHE_HOME``, by default ``~/.cache``. Use it
    through ``private``, which looks whose it is.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The working directory may be anybody's; its standard too says to pass that over.
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    # A user without a home has a folder that nothing can be made in.
    return Path(base if os.path.isabs(base) else os.devnull) / "moeflux-mlx"


def check() -> None:
    """Read every variable whose values stand here.

    Raises:
        ConfigError: one has a value that cannot be used.
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
    """Tell whether ``mlx.launch`` or ``mpirun`` started this process among others."""
    hosts = Path(os.environ.get("MLX_HOSTFILE") or os.devnull)
    if hosts.is_file() and not hosts.read_bytes().strip():
        # What it writes for a lone process, and MLX cannot read.
        return False
    names = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return any(name in os.environ for name in names)


def executor_name() -> str | None:
    """Return the executor named by the environment, if any."""
    return os.environ.get("MOEFLUX_EXECUTOR") or None


def memory() -> str | None:
    """Return the process's memory asked for by the environment, if any."""
    return os.environ.get("MOEFLUX_MEMORY") or None


def policy() -> str | None:
    """Return the eviction policy asked for by the environment, if any."""
    return os.environ.get("MOEFLUX_POLICY") or None


def expert_memory() -> str | None:
    """Return the experts' memory asked for by the environment, if any."""
    return os.environ.get("MOEFLUX_EXPERT_MEMORY") or None


def read_threads() -> int:
    """Return how many expert records are read at the same time."""
    text = os.environ.get("MOEFLUX_READ_THREADS", "8")
    if not text.isdigit() or not 1 <= int(text) <= 256:
        raise ConfigError(
            f"[MOEFLUX_READ_THREADS] expected a number from 1 to 256 but got {text!r}"
        )
    return int(text)


def optimistic(asked: str | None = None) -> str:
    """Return whether tokens run ahead: as asked for, else as the environment says."""
    return _choice("optimistic", asked, SWITCH)


def expert_io(asked: str | None = None) -> str:
    """Return how experts are to be read: as asked for, else as the environment says."""
    return _choice("expert_io", asked, EXPERT_IO)


def _choice(name: str, asked: str | None, choices: tuple[str, ...]) -> str:
    variable = f"MOEFLUX_{name.upper()}"
    value = os.environ.get(variable) or "auto" if asked is None else asked
    if value not in choices:
        name = variable if asked is None else name
        raise ConfigError(f"[{name}] expected one of {choices} but got {value!r}")
    return value


def profile_per_op() -> bool:
    """Tell whether every Op is to be evaluated and timed on its own."""
    return _is_set("MOEFLUX_PROFILE_PER_OP")


def sim_checked() -> bool:
    """Tell whether the simulator is to check every access."""
    return _is_set("MOEFLUX_SIM_CHECKED")


def traceback() -> bool:
    """Tell whether commands say where an error arose that nobody foresaw."""
    return os.environ.get("MOEFLUX_TRACEBACK") == "1"


def fuse() -> bool:
    """Tell whether launches may perform several Ops together."""
    return _is_set("MOEFLUX_FUSE", "1")


def lowering() -> dict[str, str]:
    """Return the ways asked for by Op name."""
    text = os.environ.get("MOEFLUX_LOWERING", "")
    pairs = [part.partition("=") for part in text.split(",") if part]
    for op, _, way in pairs:
        if not op or not way:
            raise ConfigError(
                f"[MOEFLUX_LOWERING] expected Op=way,Op=way but got {text!r}"
            )
    return {op.strip(): way.strip() for op, _, way in pairs}


def tuning() -> Path | bool:
    """Return the file of tuned ways to use, True for this machine's, False for none."""
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
