"""``moeflux verify``: compare a packed directory with its checksums."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from ..errors import ExpertStoreError, one_line
from ..experts.files.packed import VerifyReport, verify
from ..system.progress import byte_progress
from ..system.terminal import PlainConsole


def add_parser(subparsers: Any) -> None:
    """Add ``verify`` with its argument."""
    text = "compare a packed directory with its checksums"
    parser = subparsers.add_parser("verify", description=text, help=text)
    parser.add_argument("dir", type=Path, help="directory made by moeflux pack")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table of the layers of ``args.dir``; return 1 if anything is damaged."""
    try:
        with byte_progress() as progress:
            report = verify(args.dir, progress)
    except ExpertStoreError as error:
        print(f"moeflux: {one_line(str(error))}", file=sys.stderr)
        return 1
    PlainConsole().print(_layer_table(args.dir, report))
    for problem in report.problems:
        print(f"moeflux: [verify] {one_line(problem)}", file=sys.stderr)
    return 1 if report.problems else 0


def _layer_table(directory: Path, report: VerifyReport) -> Table:
    table = Table(title=str(directory))
    for name in ("layer", "file", "experts", "bytes", "damaged"):
        table.add_column(name, overflow="fold")
    for entry in report.layers:
        n_damaged = sum(layer == entry.layer for _, layer, _ in report.damaged)
        table.add_row(
            entry.block or str(entry.layer),
            entry.file,
            str(len(entry.checksums)),
            decimal(entry.n_bytes),
            str(n_damaged),
        )
    return table
