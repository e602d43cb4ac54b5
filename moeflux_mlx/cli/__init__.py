"""The command ``moeflux``: one module per subcommand."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import MoefluxError

COMMANDS = ("generate", "pack", "verify", "inspect", "compare")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``moeflux`` with ``argv`` (the process's own by default).

    Returns:
        The exit code: 0, what the subcommand returns, or 2 for an error on purpose.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(argv).parse_args(argv)
    try:
        return args.run(args)
    except MoefluxError as error:
        print(f"moeflux: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moeflux: interrupted", file=sys.stderr)
        return 130


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moeflux",
        description="Run Mixture-of-Experts models larger than memory in MLX.",
    )
    parser.add_argument(
        "--version", action="version", version=f"moeflux-mlx {__version__}"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    subparsers.required = True
    # Some commands import much for their flags: only the one asked for pays.
    for name in argv[:1] if argv[:1] and argv[0] in COMMANDS else COMMANDS:
        importlib.import_module(f".{name}", __package__).add_parser(subparsers)
    return parser
