"""The command line in processes that have its modules already.

To import mlx-lm takes longer than most commands. Processes are forked from one that has
imported it and computed nothing, so each is as fresh as one that was started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["mlx_lm.generate", "mlx_lm.utils", "moeflux_mlx.cli"])


def moeflux(*args: object) -> subprocess.CompletedProcess[str]:
    """Run ``moeflux`` with these arguments, nothing on its standard input."""
    words = ["moeflux", *map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        place = words, dict(os.environ), os.getcwd(), [str(p) for p in paths]
        process = _SERVER.Process(target=_work, args=place)
        process.start()
        process.join()
        out, err = (path.read_text() for path in paths)
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _work(words: list[str], environment: dict, folder: str, paths: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in zip((0, 1, 2), (os.devnull, *paths), strict=True):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(path, flags, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
    sys.argv = words
    code = 1
    try:
        code = _called(words[1:])
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _called(args: list[str]) -> int:
    from moeflux_mlx.cli import main

    try:
        return int(main(args) or 0)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
