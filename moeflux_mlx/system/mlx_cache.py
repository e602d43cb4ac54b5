"""Check the owner of the folder from which MLX loads its compiled code."""

from __future__ import annotations

import contextlib
import os
import tempfile

from . import private
from .progress import notice


def guard() -> None:
    """Give MLX another folder if other users could write to its own.

    ``mx.compile`` on a CPU, and every kernel on CUDA, loads compiled code by name from
    the folder ``mlx`` in the folder for temporary files. Create that folder first; if
    another user owns it, give MLX a folder in our cache.
    """
    # Let Python choose its own folder now, before TMPDIR changes below.
    tempfile.gettempdir()
    path = os.path.join(_temporary_folder(), "mlx")
    with contextlib.suppress(OSError):
        os.mkdir(path, 0o755)
    try:
        owners = {status.st_uid for status in private.open_places(path)}
    except OSError:
        # The folder cannot be created or read, so MLX could not use it either.
        owners = {os.geteuid()}
    if not owners:
        return
    # MLX reads this variable at each use.
    os.environ["TMPDIR"] = str(private.made("tmp"))
    if owners != {os.geteuid()}:
        notice(
            f"[mlx] {path} is not yours alone: MLX keeps what it compiles in "
            f"{os.environ['TMPDIR']} instead"
        )


def _temporary_folder() -> str:
    """Return the folder for temporary files that C++ uses."""
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    return next(filter(None, map(os.environ.get, names)), "/tmp")
