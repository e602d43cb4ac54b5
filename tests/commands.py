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
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["mlx_lm.generate", "mlx_lm.utils", "moeflux_mlx.cli"])


def moeflux(*args: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``moeflux`` with these arguments and this text on its standard input."""
    words = ["moeflux", *map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        paths[0].write_text(text)
        process = _start(words, paths, called)
        process.join()
        out, err = (path.read_text() for path in paths[1:])
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


@contextlib.contextmanager
def running(
    log: Path, *args: object, call: Callable[[list[str]], int] | None = None
) -> Iterator[BaseProcess]:
    """Run ``moeflux`` while inside, what it prints in a file; then terminate it.

    Args:
        call: what is called with the arguments in place of the command.
    """
    words = ["moeflux", *map(str, args)]
    process = _start(words, [Path(os.devnull), log, log], call or called)
    try:
        yield process
    finally:
        process.terminate()
        process.join()


def _start(
    words: list[str], paths: list[Path], call: Callable[[list[str]], int]
) -> BaseProcess:
    place = words, dict(os.environ), os.getcwd(), [str(p) for p in paths], call
    process = _SERVER.Process(target=_work, args=place)
    process.start()
    return process


def _work(
    words: list[str],
    environment: dict,
    folder: str,
    paths: list[str],
    call: Callable[[list[str]], int],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(paths):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(path, flags, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww", (-1, -1, 1))
    sys.argv = words
    code = 1
    try:
        code = call(words[1:])
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def called(args: list[str]) -> int:
    """Run ``moeflux`` in this process."""
    from moeflux_mlx.cli import main

    try:
        return int(main(args) or 0)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
