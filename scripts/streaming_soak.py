"""``scripts/bench_streaming soak``: many tokens while the memory for experts changes.

Prompts of this repository's text are continued greedily, again and again, each time
with another order of budgets that change in the middle of the text. Every token must
be the resident model's, and memory must not grow from one round to the next, looked at
with the smallest budget each time. Returns 1 otherwise.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer
from rich.console import Console
from streaming_model import DEMO, ROOT
from streaming_side import memory_for

import moeflux_mlx
from moeflux_mlx.experts.pack import pack
from moeflux_mlx.experts.packed import is_packed

N_PROMPTS, PROMPT_TOKENS = 5, 16
# Share of the first rounds during which caches fill, not looked at for growth.
SETTLING = 1 / 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this part."""
    add = parser.add_argument
    add("--model", type=Path, default=DEMO, help="plain or packed (default: the demo)")
    add("--tokens", type=int, default=20_000, metavar="N")
    shares = [100.0, 50.0, 25.0, 12.5]
    text = "percentages of experts in memory (default: 100 50 25 12.5)"
    add("--shares", type=float, nargs="+", default=shares, metavar="P", help=text)
    text = "tokens until the next budget (default: 125)"
    add("--every", type=int, default=125, metavar="N", help=text)
    text = "growth of memory that passes (default: 256)"
    add("--bytes-per-token", type=float, default=256, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    """Pack the model if need be, generate, and say how it went."""
    with tempfile.TemporaryDirectory(prefix="moeflux-soak-") as directory:
        packed = args.model
        if not is_packed(packed):
            packed = Path(directory) / "packed"
            pack(args.model, packed)
        return _run(args, packed, Console(highlight=False))


def _run(args: argparse.Namespace, packed: Path, console: Console) -> int:
    n_tokens = args.every * len(args.shares)
    soak = Soak(packed, args.shares, args.every)
    tokens = prompts(packed)
    expected = {p: resident(args.model, p, n_tokens) for p in tokens}
    n_rounds = max(1, -(-args.tokens // n_tokens))
    for i, prompt in enumerate(islice(cycle(tokens), n_rounds)):
        wrong = soak.round(prompt, expected[prompt], first=i)
        if wrong is not None:
            print(f"soak: {wrong}", file=sys.stderr)
            return 1
        memory = soak.memory[-1] / 2**20
        console.print(f"[dim]{(i + 1) * n_tokens} tokens, {memory:.1f} MiB[/dim]")
    counts = f"{soak.n_tokens} tokens as resident, {soak.n_changes} changes of budget"
    growth = growth_per_token(soak.memory, n_tokens)
    console.print(f"{counts}; memory grows by {growth:.0f} bytes a token")
    if growth > args.bytes_per_token:
        print(f"soak: expected at most {args.bytes_per_token:.0f}", file=sys.stderr)
        return 1
    return 0


def prompts(model: Path) -> list[tuple[int, ...]]:
    """Return the first tokens of some files of the package."""
    tokenizer = load_tokenizer(model)
    files = sorted((ROOT / "moeflux_mlx").glob("*.py"))[-N_PROMPTS:]
    texts = (path.read_text()[: 8 * PROMPT_TOKENS] for path in files)
    return [tuple(tokenizer.encode(text)[:PROMPT_TOKENS]) for text in texts]


def resident(path: Path, prompt: tuple[int, ...], n: int) -> list[int]:
    """Return ``n`` tokens of the model with every expert in memory."""
    memory = memory_for(path, 100) if is_packed(path) else None
    text = Text(moeflux_mlx.load(path, memory=memory)[0], prompt)
    return list(islice(text, n))


class Text:
    """A prompt being continued greedily by ``model``, which may be changed midway."""

    def __init__(self, model: Any, prompt: tuple[int, ...]):
        self.model, self._cache = model, make_prompt_cache(model)
        self._next = self._step(list(prompt))

    def __iter__(self) -> Iterator[int]:
        while True:
            yield self._next
            self._next = self._step([self._next])

    def _step(self, tokens: list[int]) -> int:
        logits = self.model(mx.array([tokens]), cache=self._cache)
        return int(mx.argmax(logits[0, -1]))


def resized(model: Any, packed: Path, memory: int) -> Any:
    """Return the model with another amount of memory for experts."""
    # The only way to another amount so far is to load anew.
    model = None  # noqa: F841
    return moeflux_mlx.load(packed, memory=memory)[0]


@dataclass
class Soak:
    """Rounds of generation; ``memory`` has bytes held after each."""

    packed: Path
    shares: list[float]
    every: int
    memory: list[int] = field(default_factory=list)
    n_tokens: int = 0
    n_changes: int = 0

    def round(
        self, prompt: tuple[int, ...], expected: list[int], first: int
    ) -> str | None:
        """Continue a prompt under every budget in turn; say which token is wrong."""
        first %= len(self.shares)
        order = self.shares[first:] + self.shares[:first]
        text = Text(self._with(None, order[0]), prompt)
        for i, token in enumerate(islice(text, len(expected))):
            if token != expected[i]:
                share = order[i // self.every]
                return (
                    f"token {self.n_tokens + i} at {share:g} % of experts is {token}, "
                    f"expected {expected[i]}"
                )
            if (i + 1) % self.every == 0 and i + 1 < len(expected):
                text.model = self._with(text.model, order[(i + 1) // self.every])
        text.model = self._with(text.model, min(self.shares))
        self.n_tokens += len(expected)
        gc.collect()
        mx.clear_cache()
        self.memory.append(process_bytes() + device_bytes())
        return None

    def _with(self, model: Any, share: float) -> Any:
        self.n_changes += 1
        return resized(model, self.packed, memory_for(self.packed, share))


def growth_per_token(memory: list[int], n_tokens: int) -> float:
    """Return the slope of the straight line nearest to ``memory``, bytes a token.

    Args:
        memory: bytes held after each round.
        n_tokens: tokens of a round.
    """
    settled = memory[int(SETTLING * len(memory)) :]
    if len(settled) < 2:
        return 0.0
    return float(np.polyfit(n_tokens * np.arange(len(settled)), settled, 1)[0])


def process_bytes() -> int:
    """Return how much memory this process has resident now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
        return int(subprocess.run(command, capture_output=True, text=True).stdout) << 10


def device_bytes() -> int:
    """Return what MLX holds in memory of its own, none on a CPU."""
    return 0 if mx.default_device() == mx.Device(mx.cpu) else mx.get_active_memory()
