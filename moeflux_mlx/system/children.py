"""Start child processes that ignore Python files in the working directory.

People start commands inside a model's folder, which is downloaded data. By default
Python would search it first for modules.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# ``-c`` puts "", the working directory, first on the path; this removes it before any
# import but the built-in ``sys``. Python 3.10 lacks the flag ``-P``.
_BOOT = """\
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
import runpy
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_module(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a separate Python process with the installed packages.

    Returns:
        The finished process with its exit code and output.
    """
    return run([sys.executable, "-c", _BOOT, module, *args])


def start_module(module: str, *args: str, stderr: IO[str]) -> subprocess.Popen[str]:
    """Start a module like ``run_module``, to read its output while it runs.

    Args:
        stderr: file for its errors.
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
    """Run a program to its end and capture its output.

    Args:
        command: the path of the program, and its arguments.
        directory: its working directory, by default this process's.
        environment: additional environment variables.
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
    """Return this process's environment with additional variables.

    Any Python that the program starts ignores the working directory too.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1", **more}
