"""Run commands and scripts in processes that already have their modules.

Importing mlx-lm takes longer than most commands. Processes are forked from one that has
imported it and computed nothing, so each is as fresh as a new process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mlx_lm.generate", "mlx_lm.utils", "moeflux_mlx.cli"])


def moeflux(*args: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``moeflux`` with these arguments and this text on its standard input."""
    return _finished(["moeflux", *map(str, args)], called, text)


def python(
    *args: object, text: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments: a file, ``-m`` a module, or ``-c`` a program.

    Args:
        text: the standard input.
        variables: environment variables to add. Modules that read a variable when
            they are imported have read it already and do not see the new value.
    """
    return _finished(["python", *map(str, args)], interpreted, text, variables)


def _finished(
    words: list[str],
    call: Callable[[list[str]], int],
    text: str,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        paths[0].write_text(text)
        process = _start(words, paths, call, variables)
        process.join()
        out, err = (path.read_text() for path in paths[1:])
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


@contextlib.contextmanager
def running(
    log: Path,
    *args: object,
    call: Callable[[list[str]], int] | None = None,
    **variables: str,
) -> Iterator[BaseProcess]:
    """Run ``moeflux`` with its output in a file, and terminate it on exit.

    Args:
        call: the function to call with the arguments in place of the command.
        variables: environment variables to add.
    """
    words, paths = ["moeflux", *map(str, args)], [Path(os.devnull), log, log]
    process = _start(words, paths, call or called, variables)
    try:
        yield process
    finally:
        process.terminate()
        process.join()


def _start(
    words: list[str],
    paths: list[Path],
    call: Callable[[list[str]], int],
    variables: Mapping[str, str] = MappingProxyType({}),
) -> BaseProcess:
    environment = {**os.environ, **variables}
    place = words, environment, os.getcwd(), [str(p) for p in paths], call
    process = SERVER.Process(target=_work, args=place)
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

    return _exit_code(lambda: main(args))


def interpreted(args: list[str]) -> int:
    """Run Python's command line with these arguments in this process."""
    return _exit_code(lambda: _interpret(*args))


def _interpret(first: str, *rest: str) -> None:
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = [*rest]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def _exit_code(call: Callable[[], object]) -> int:
    """Return the exit code of a process that makes this call."""
    try:
        return int(call() or 0)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
