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
    text = "growth of memory that passes (default: 64)"
    add("--bytes-per-token", type=float, default=64, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    """Pack the model if need be, generate, and say how it went."""
    with tempfile.TemporaryDirectory(prefix="moeflux-soak-") as directory:
        packed = args.model
        if not is_packed(packed):
            packed = Path(directory) / "packed"
            pack(args.model, packed)
        return _run(args, packed, Console(highlight=False))


def _run(args: argparse.Namespace, packed: Path, console: Console) -> int:
    soak = Soak(packed, args.shares, args.every)
    prompts = prompts_for(packed)
    expected = continued(args.model, prompts, soak.round_tokens)
    n_rounds = max(1, -(-args.tokens // soak.round_tokens))
    for i, prompt in enumerate(islice(cycle(prompts), n_rounds)):
        wrong = soak.round(prompt, expected[prompt], first=i)
        if wrong is not None:
            print(f"soak: {wrong}", file=sys.stderr)
            return 1
        held = f"{soak.memory[-1] / 2**20:.1f} MiB"
        print(f"{soak.n_tokens} tokens, {held}", file=sys.stderr)
    growth = growth_per_token(soak.memory, soak.round_tokens)
    console.print(f"{soak.n_tokens} tokens as resident, {soak.n_changes} budgets")
    console.print(f"memory grows by {growth:.0f} bytes a token")
    if growth > args.bytes_per_token:
        print(f"soak: expected at most {args.bytes_per_token:.0f}", file=sys.stderr)
        return 1
    return 0


def prompts_for(model: Path) -> list[tuple[int, ...]]:
    """Return the first tokens of some files of the package."""
    tokenizer = load_tokenizer(model)
    files = sorted((ROOT / "moeflux_mlx").glob("*.py"))[-N_PROMPTS:]
    texts = (path.read_text()[: 8 * PROMPT_TOKENS] for path in files)
    return [tuple(tokenizer.encode(text)[:PROMPT_TOKENS]) for text in texts]


def continued(
    path: Path, prompts: list[tuple[int, ...]], n: int
) -> dict[tuple[int, ...], list[int]]:
    """Continue each prompt by ``n`` tokens with every expert in memory."""
    memory = memory_for(path, 100) if is_packed(path) else None
    model = moeflux_mlx.load(path, expert_memory=memory)[0]
    return {prompt: list(islice(continuation(model, prompt), n)) for prompt in prompts}


def continuation(model: Any, prompt: tuple[int, ...]) -> Iterator[int]:
    """Yield the tokens of greedy decoding, without end; memory may change between."""
    cache, tokens = make_prompt_cache(model), list(prompt)
    while True:
        tokens = [int(mx.argmax(model(mx.array([tokens]), cache=cache)[0, -1]))]
        yield tokens[0]


class Soak:
    """Rounds of generation by one model; ``memory`` has bytes held after each."""

    def __init__(self, packed: Path, shares: list[float], every: int):
        self._shares, self._every = shares, every
        largest = memory_for(packed, max(shares))
        # Mapped experts cannot be taken away.
        self._model = moeflux_mlx.load(
            packed, expert_memory=largest, expert_io="pread"
        )[0]
        self._n_slots = 100 * self._model.streamer.n_slots / max(shares)
        self.round_tokens = every * len(shares)
        self.memory: list[int] = []
        self.n_tokens = self.n_changes = 0

    def round(
        self, prompt: tuple[int, ...], expected: list[int], first: int
    ) -> str | None:
        """Continue a prompt under every budget in turn; say which token is wrong.

        Args:
            expected: the tokens to come.
            first: counts rounds, each beginning with another budget.
        """
        tokens = continuation(self._model, prompt)
        for i, wanted in enumerate(expected):
            share = self._shares[(first + i // self._every) % len(self._shares)]
            if i % self._every == 0:
                self._resize(share)
            if (token := next(tokens)) != wanted:
                return (
                    f"token {self.n_tokens} is {token} with {share:g} % of experts in "
                    f"memory, expected {wanted}"
                )
            self.n_tokens += 1
        tokens.close()
        self._resize(min(self._shares))
        gc.collect()
        mx.clear_cache()
        self.memory.append(process_bytes() + device_bytes())
        return None

    def _resize(self, share: float) -> None:
        self.n_changes += 1
        self._model.streamer.resize(round(share / 100 * self._n_slots))


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
