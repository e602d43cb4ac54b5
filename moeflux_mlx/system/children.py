"""Start every process of ours so that the working directory has no say in it.

A model's folder is downloaded data, and people start commands there. Python would look
for modules in it first, for one named like a module of ours too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# ``-c`` puts "" first, which is the working directory; ``sys`` is built in. The flag
# ``-P`` would do, but Python 3.10 has none.
_BOOT = """\
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
import runpy
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_module(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a Python of its own, which finds installed packages.

    Returns:
        The finished process with its exit code and all that it printed.
    """
    return run([sys.executable, "-c", _BOOT, module, *args])


def start_module(module: str, *args: str, stderr: IO[str]) -> subprocess.Popen[str]:
    """Start a module likewise; its output is read while it runs.

    Args:
        stderr: file that takes its errors.
    """
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT, module, *args],
        env=_environment({}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
    )


def run(
    command: Sequence[str],
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its output is kept.

    Args:
        command: the program, by its path, and its arguments.
        directory: where it runs, by default here.
        environment: variables to set beside this process's own.
    """
    return subprocess.run(
        command,
        cwd=directory,
        env=_environment(environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return this process's variables and more.

    Whatever Python the program starts leaves the working directory out too.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1", **more}
