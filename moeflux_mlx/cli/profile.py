"""``moeflux profile``: where each microsecond of a step goes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..loading import load
from ..measure import SECONDS, Profile, Row, check_plot, profile, save_plot, write_csv
from ..system.progress import count_progress
from ..system.terminal import wide_console
from .arguments import check_output, integer
from .generate import add_streaming_flags, streaming_options
from .preflight import announce


def add_parser(subparsers: Any) -> None:
    """Add ``profile`` with its flags."""
    text = "show where each microsecond of a decoding step or a prompt goes"
    parser = subparsers.add_parser("profile", description=text, help=text)
    parser.add_argument("model", help="plain or packed model directory, or hub id")
    parser.add_argument(
        "--context",
        type=integer(0),
        default=512,
        metavar="N",
        help="tokens of context before the profiled one (default: %(default)s)",
    )
    parser.add_argument(
        "--prefill",
        type=integer(0),
        default=0,
        metavar="T",
        help="profile a prompt of T tokens instead of one token",
    )
    parser.add_argument(
        "--repeats",
        type=integer(1),
        default=5,
        help="measurements of each figure; the median is shown (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=integer(1),
        default=int(SECONDS),
        metavar="S",
        help="time no further call after S seconds (default: %(default)s)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write every row")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="also plot the profile, as .png or .svg",
    )
    add_streaming_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Profile the model and print the table."""
    check_output("--csv", args.csv)
    check_output("--plot", args.plot)
    if args.plot:
        check_plot(args.plot)
    announce(args.model, streaming_options(args))
    model, _ = load(args.model, **{**streaming_options(args), "native": True})
    with count_progress() as report:
        found = profile(
            model,
            context=args.context,
            prefill=args.prefill,
            repeats=args.repeats,
            seconds=args.seconds,
            report=report,
        )
    print_profile(found, wide_console())
    if args.csv:
        write_csv(found, args.csv)
    if args.plot:
        save_plot(found, args.plot)
    return 0


def print_profile(found: Profile, console: Console) -> None:
    """Print the table and its notes."""
    console.print(profile_table(found))
    console.print(
        "GB/s count the bytes that a call must move; a copy moves "
        f"{found.copy_gbps:.1f} GB/s here.",
        highlight=False,
    )
    if found.n_untimed:
        console.print(
            f"{found.n_untimed} calls were not timed, because --seconds had passed; "
            "their time is in the last row",
            highlight=False,
        )
    if not all(row.is_hidden for row in found.rows):
        console.print("*: may include the host's launch time", highlight=False)


def profile_table(found: Profile) -> Table:
    """Return a table of the calls, the most expensive first, and their sum."""
    table = Table(title=found.title)
    table.add_column("call\nits Ops\nits kernels", overflow="fold")
    numbers = ("times", "launches", "bytes", "us each", "us", "%", "GB/s", "%\ncopy")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.largest_first():
        table.add_row(*_cells(found, row))
        table.add_section()
    gbps = found.n_bytes / found.whole_us / 1e3
    launches = str(found.n_launches or "")
    _add_sum(table, "sum of calls", found.kernels_us)
    table.add_row(
        *("whole step, end to end", "", launches, decimal(found.n_bytes)),
        *("", f"{found.whole_us:.1f}", "", f"{gbps:.1f}"),
        f"{100 * gbps / found.copy_gbps:.0f}",
    )
    if found.host_us is not None:
        _add_sum(table, "host share: Python, encoding", found.host_us)
    _add_sum(table, "whole step minus the sum", found.remainder_us)
    return table


def _cells(found: Profile, row: Row) -> list[str]:
    what = [f"{row.graph}: {row.label}"]
    for names in (row.ops, row.kernels):
        if names:
            what.append(f"[dim]{' + '.join(_counted(names))}[/dim]")
    share = row.us_per_step / max(found.kernels_us, 1e-9)
    return [
        "\n".join(what),
        str(row.count),
        str(len(row.kernels) or ""),
        decimal(row.n_bytes),
        f"{row.us:.1f}{'' if row.is_hidden else '*'}",
        f"{row.us_per_step:.1f}",
        f"{100 * share:.1f}",
        f"{row.gbps:.1f}",
        f"{100 * row.gbps / found.copy_gbps:.0f}",
    ]


def _counted(names: tuple[str, ...]) -> list[str]:
    """Merge repeated names into one with a count."""
    counts = dict.fromkeys(names, 0)
    for name in names:
        counts[name] += 1
    return [f"{n} {name}" if n > 1 else name for name, n in counts.items()]


def _add_sum(table: Table, name: str, us: float) -> None:
    table.add_row(name, *[""] * 4, f"{us:.1f}")
