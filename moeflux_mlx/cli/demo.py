"""The work of ``scripts/demo``: pack the demo model, then generate with few experts.

Usage: python -m moeflux_mlx.cli.demo [--prompt TEXT] [--max-tokens N]
                                      [--expert-memory BYTES]
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import main as moeflux

MODEL = Path("models/demo")
BUILD = Path("build")
# A quarter of the experts: all of them need 10.4 MB. 2.1 MB of each amount go to the
# alignment of the pool.
MEMORY = "4MB"
# Long enough for a meaningful prompt speed.
PROMPT = '''"""Count the words of files."""

import collections
import pathlib
import sys


def count_words(path: pathlib.Path) -> collections.Counter[str]:
    """Return how often each word stands in a file."""
    text = path.read_text(encoding="utf-8")
    return collections.Counter(text.lower().split())


def main(argv: list[str]) -> int:
    """Print the ten most frequent words of each file."""
    for name in argv[1:]:
        counted = count_words(pathlib.Path(name))
        for word, n in counted.most_common(10):
            print(f"{n:8} {word}")
    return 0


def read'''


def main(argv: Sequence[str] | None = None) -> int:
    """Generate text with ``models/demo`` in memory for a quarter of its experts.

    The model is packed once into ``build``, under a name made from its contents.
    """
    args = _parser().parse_args(argv)
    packed = BUILD / f"demo-{_digest(MODEL)}"
    if not packed.exists():
        code = moeflux(["pack", str(MODEL), str(packed)])
        if code:
            return code
    command = ["generate", "--model", str(packed), "--ignore-chat-template"]
    command += ["--prompt", args.prompt, "--max-tokens", str(args.max_tokens)]
    # A model this small repeats itself under greedy decoding.
    command += ["--temp", "0.7", "--seed", "0"]
    command += ["--expert-memory", args.expert_memory]
    print(args.prompt, end="", flush=True)
    return moeflux(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=200,
        help="tokens to generate (default: %(default)s)",
    )
    parser.add_argument(
        "--expert-memory",
        default=MEMORY,
        help="bytes for experts (default: %(default)s)",
    )
    return parser


def _digest(model: Path) -> str:
    files = sorted(path for path in model.iterdir() if path.is_file())
    parts = b"".join(path.name.encode() + path.read_bytes() for path in files)
    return hashlib.sha256(parts).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
