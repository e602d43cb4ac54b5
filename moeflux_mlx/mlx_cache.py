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
    path = os.path.join(tempfile.gettempdir(), "mlx")
    with contextlib.suppress(OSError):
        os.mkdir(path, 0o755)
    try:
        owners = {status.st_uid for status in private.open_places(path)}
    except OSError:
        # It cannot be looked into, or a process of ours is just writing there.
        owners = {-1}
    if not owners:
        return
    # MLX asks for it at each use. Python has settled on its own above.
    os.environ["TMPDIR"] = str(private.made("tmp"))
    if owners != {os.geteuid()}:
        notice(
            f"[mlx] {path} is not yours alone: MLX keeps what it compiles in "
            f"{os.environ['TMPDIR']} instead"
        )
