"""``moeflux pack``: write a model directory whose experts can be streamed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from ..experts.files.checkpoint import read_config
from ..experts.files.layout import DEFAULT_ALIGNMENT
from ..experts.files.pack import pack
from ..experts.files.packed import is_packed
from ..experts.files.sidecars import source_files
from ..experts.files.stock import has_own_class
from ..loading import check_loadable
from ..system.progress import byte_progress, notice
from ..system.terminal import PlainConsole


def add_parser(subparsers: Any) -> None:
    """Add ``pack`` with its flags."""
    text = "write a model directory whose experts can be streamed from disk"
    parser = subparsers.add_parser("pack", description=text, help=text)
    parser.add_argument("src", type=Path, help="mlx-lm checkpoint directory")
    parser.add_argument("dst", type=Path, help="directory to create")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything back and compare checksums",
    )
    parser.add_argument(
        "--alignment",
        type=int,
        default=DEFAULT_ALIGNMENT,
        metavar="BYTES",
        help="pad each expert to a multiple of this (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Pack ``args.src`` into ``args.dst`` and print the result."""
    files = source_files(args.src)
    own = has_own_class(read_config(args.src))
    if own and not is_packed(args.src):
        # Check this before writing gigabytes that nothing can load.
        check_loadable(args.src)
    with byte_progress() as progress:
        manifest = pack(
            args.src,
            args.dst,
            verify=args.verify,
            alignment=args.alignment,
            progress=progress,
        )
    if files.left_out:
        notice(f"[pack] not copied: {', '.join(files.left_out)}")
    if files.code:
        notice(
            f"[pack] {', '.join(files.code)}: code of the model was copied: "
            "mlx-lm runs it with --trust-remote-code"
        )
    n_bytes = sum(entry.n_bytes for entry in manifest.layers)
    counts = sorted({len(entry.checksums) for entry in manifest.layers})
    what = "routed blocks" if manifest.is_of_blocks else "layers"
    PlainConsole().print(
        f"{args.dst}: {' or '.join(map(str, counts))} experts in each of "
        f"{len(manifest.layers)} {what}, {decimal(n_bytes)}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
