"""The command ``moeflux``: one module per subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import MoefluxError
from . import (
    cachesim,
    compare,
    doctor,
    generate,
    inspect,
    kernels,
    pack,
    profile,
    trace,
    tune,
    verify,
)

COMMANDS = (
    generate,
    pack,
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
    """Run ``moeflux`` with ``argv`` (the process's own by default).

    Returns:
        The exit code: what the subcommand returns, 2 for an error that is no bug.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (MoefluxError, OSError) as error:
        print(f"moeflux: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moeflux: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
