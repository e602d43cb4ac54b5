"""The command ``moeflux``: one module per subcommand.

Imports: errors, config, device, drafts, calls, engine.executors, engine.graph,
engine.launch, engine.lowering, engine.metal, experts.files, experts.pool,
experts.streaming, loading, measure, measure.compare, memory, opening, proof, server,
state, system.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from .. import __version__, config
from ..calls.group import launched_group
from ..errors import ConfigError, MoefluxError, PeerError, one_line
from ..system.progress import untold
from . import (
    cachesim,
    chat,
    compare,
    doctor,
    generate,
    inspect,
    kernels,
    pack,
    profile,
    serve,
    trace,
    tune,
    unpack,
    verify,
)
from .arguments import Parser

COMMANDS = (
    generate,
    chat,
    serve,
    pack,
    unpack,
    verify,
    inspect,
    compare,
    doctor,
    kernels,
    profile,
    tune,
    trace,
    cachesim,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``moeflux`` with ``argv`` (default: the process's arguments).

    Returns:
        The subcommand's exit code, 2 for an error in its input, or 1 for an unforeseen
        error.
    """
    _degrade_output()
    try:
        args = _parser().parse_args(argv)
        code = _run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader closed the pipe, so Python must not flush into it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except PeerError:
        # The failed process prints its own error.
        return 2
    except (MoefluxError, OSError) as error:
        print(f"moeflux: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moeflux: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if config.traceback():
            traceback.print_exc()
        name = type(error).__name__
        print(
            f"moeflux: {name}: {one_line(str(error))} (MOEFLUX_TRACEBACK=1 says where)",
            file=sys.stderr,
        )
        return 1


def _run(args: argparse.Namespace) -> int:
    """Run a command. In a process group only rank 0 prints.

    Raises:
        ConfigError: the command runs in a single process only.
    """
    if (group := launched_group()) is None:
        return args.run(args)
    if "group" not in args:
        raise ConfigError(
            f"[group] expected one process for this command but {group.size()} were "
            "started: run it without mlx.launch"
        )
    args.group = group
    with untold() if group.rank() else contextlib.nullcontext():
        return args.run(args)


def _degrade_output() -> None:
    """Replace characters that the output cannot encode, and tolerate a closed one."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _parser() -> Parser:
    parser = Parser(
        prog="moeflux",
        description="Run Mixture-of-Experts models larger than memory in MLX.",
    )
    parser.add_argument(
        "--version", action="version", version=f"moeflux-mlx {__version__}"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    subparsers.required = True
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser
