"""``moeflux tune``: time the ways of every Op and keep the winners."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from .. import config
from ..engine.executors import gpu_executor
from ..engine.lowering.tuned import Entry, Tuning, add, default_path
from ..errors import ConfigError, one_line
from ..loading import load
from ..measure import PROMPTS, tune
from ..measure.choices import Choice
from ..system.terminal import PlainConsole, wide_console
from .arguments import check_output, integer
from .generate import add_streaming_flags, streaming_options
from .preflight import announce


def add_parser(subparsers: Any) -> None:
    """Add ``tune`` with its flags."""
    text = "time the ways of every Op on this device, and keep the fastest"
    parser = subparsers.add_parser("tune", description=text, help=text)
    parser.add_argument("model", help="plain or packed model directory, or hub id")
    parser.add_argument(
        "--prompts",
        type=integer(1),
        nargs="*",
        default=PROMPTS,
        metavar="T",
        help=f"prompt lengths, in addition to one token (default: {_spaced(PROMPTS)})",
    )
    parser.add_argument(
        "--context",
        type=integer(0),
        default=512,
        metavar="N",
        help="tokens of context before the one token (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=integer(1),
        default=3,
        help="measurements of each way; the median counts (default: %(default)s)",
    )
    parser.add_argument(
        "--file",
        type=Path,
        help="file for the winners, to be named by MOEFLUX_TUNING (default: this "
        "device's own file, which needs no variable; none for the simulator)",
    )
    add_streaming_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune on the model's shapes, print the winners, and keep them."""
    check_output("--file", args.file)
    executor = args.executor or config.executor_name() or gpu_executor()
    if executor is None:
        raise ConfigError(
            "[tune] nothing to tune or to keep: expected a GPU, whose kernels have "
            "several ways, but found none; --executor sim tries the command on the "
            "simulator, whose times mean nothing"
        )
    path = args.file or (None if executor == "sim" else default_path(executor))
    announce(args.model, streaming_options(args))
    model, _ = load(
        args.model,
        **{**streaming_options(args), "executor": executor, "native": True},
    )
    console = PlainConsole(stderr=True)

    def progress(choices: Sequence[Choice], what: str) -> Iterable[Choice]:
        return track(choices, what, console=console, transient=True)

    def keep(winner: Tuning) -> None:
        """Save each winner at once, so that an interruption loses nothing."""
        if path is not None:
            add(winner, path)
        if not console.is_terminal:
            (entry,) = winner.entries
            us = f"{entry.us[entry.winner]:.1f} us"
            console.print(f"{entry.name}, {_tokens(entry)}: {entry.winner}, {us}")

    found = tune(
        model,
        prompts=args.prompts,
        context=args.context,
        repeats=args.repeats,
        progress=progress,
        keep=keep,
    )
    print_tuning(found, wide_console())
    if path is None and executor == "sim":
        print("Times of a simulator mean nothing: nothing is kept without --file.")
    elif path is None:
        print("Nothing is kept without --file.")
    else:
        print(f"Kept in {one_line(str(path))}")
    return 0


def print_tuning(found: Tuning, console: Console) -> None:
    """Print the table, then every refused way with the reason."""
    console.print(tuning_table(found))
    for entry in found.entries:
        for way, reason in entry.refused.items():
            console.print(
                f"refused {way}: {entry.name}, {_tokens(entry)}, {entry.shape}: "
                f"{reason}",
                highlight=False,
                style="red",
            )
    n_changed = sum(entry.winner != entry.default for entry in found.entries)
    console.print(f"{n_changed} of {len(found.entries)} differ from the default way")


def tuning_table(found: Tuning) -> Table:
    """Return a table of each Op and fusion at each shape: times, winner, gain."""
    launch_us = max((entry.launch_us for entry in found.entries), default=0.0)
    origin = f"{found.executor}, {found.device}, MLX {found.mlx}"
    table = Table(title=f"{origin}; the host takes {launch_us:.1f} us per launch")
    table.add_column("Op\nits shape", overflow="fold")
    for name in ("tokens", "us by way", "winner", "default", "gain"):
        table.add_column(
            name, justify="right" if name in ("tokens", "gain") else "left"
        )
    for entry in found.entries:
        fastest_first = sorted(entry.us.items(), key=lambda item: item[1])
        table.add_row(
            Text.assemble(f"{entry.name}\n", (entry.shape, "dim")),
            str(entry.n_tokens),
            "\n".join(
                f"{us:.1f} {way}{_launches(entry, way)}" for way, us in fastest_first
            ),
            entry.winner,
            entry.default,
            f"{entry.gain:.2f} x",
            style="bold" if entry.winner != entry.default else None,
        )
        table.add_section()
    return table


def _launches(entry: Entry, way: str) -> str:
    n = entry.launches.get(way, 1)
    return f", {n} launches" if n > 1 else ""


def _tokens(entry: Entry) -> str:
    return "1 token" if entry.n_tokens == 1 else f"{entry.n_tokens} tokens"


def _spaced(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
