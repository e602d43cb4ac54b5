"""Look whose the folder is that MLX compiles code into and loads it from."""

from __future__ import annotations

import contextlib
import os
import tempfile

from . import private
from .progress import notice


def guard() -> None:
    """Give MLX another folder where other users could write into its own.

    ``mx.compile`` on a CPU, and on CUDA every kernel, loads compiled code from ``mlx``
    in the folder for temporary files by its name alone. This takes that name before
    anybody else does; where somebody has, MLX gets a folder below our cache.
    """
    # Python settles on its own folder now, so that it is not moved below.
    tempfile.gettempdir()
    path = os.path.join(_temporary_folder(), "mlx")
    with contextlib.suppress(OSError):
        os.mkdir(path, 0o755)
    try:
        owners = {status.st_uid for status in private.open_places(path)}
    except OSError:
        # It cannot be made or looked into, so MLX could not use it either.
        owners = {os.geteuid()}
    if not owners:
        return
    # MLX looks it up at each use.
    os.environ["TMPDIR"] = str(private.made("tmp"))
    if owners != {os.geteuid()}:
        notice(
            f"[mlx] {path} is not yours alone: MLX keeps what it compiles in "
            f"{os.environ['TMPDIR']} instead"
        )


def _temporary_folder() -> str:
    """Return the folder for temporary files as C++ finds it."""
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    return next(filter(None, map(os.environ.get, names)), "/tmp")
