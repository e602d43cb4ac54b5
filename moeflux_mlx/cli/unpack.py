"""``moeflux unpack``: write a packed directory back as a plain checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..experts.files.unpack import unpack
from ..system.progress import byte_progress
from ..system.terminal import PlainConsole


def add_parser(subparsers: Any) -> None:
    """Add ``unpack`` with its arguments."""
    text = "write a packed directory back as a plain checkpoint, bit for bit"
    parser = subparsers.add_parser(
        "unpack",
        description=f"{text}. Tensors have the names, types and bytes of the "
        "original checkpoint. If mlx-lm converts a checkpoint as it loads it (one "
        "tensor per expert, fused, fp8), it comes back in the format of mlx-lm's own "
        "converter, unless moeflux-mlx has a native class for the model.",
        help=text,
    )
    parser.add_argument("src", type=Path, help="directory made by moeflux pack")
    parser.add_argument("dst", type=Path, help="directory to create")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Unpack ``args.src`` into ``args.dst`` and print the result."""
    with byte_progress() as progress:
        unpack(args.src, args.dst, progress=progress)
    n_files = len([*args.dst.glob("model*.safetensors")])
    PlainConsole().print(
        f"{args.dst}: a plain checkpoint with its weights in {n_files} "
        f"{'file' if n_files == 1 else 'files'}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
