"""``scripts/bench_streaming draft``: decode with and without a draft model.

The model is a pack with a share of its experts in memory. One draft has the model's own
weights, all in memory. It guesses every token; no draft guesses better, but a smaller
one costs less. The other draft has the same weights at fewer bits and makes mistakes.
All ways of generating take turns, round by round. A speed is printed only if all give
the same tokens. Rates are medians. Misses are the experts read per generated token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model
from rich.console import Console
from rich.table import Table

import moeflux_mlx
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
PROMPT = "def mean(values):\n"


@dataclass
class Way:
    """One way to generate, and its measurements."""

    name: str
    draft: Any = None
    n_drafted: int = 0
    rates: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    guessed: float = 0.0
    hit_rate: float = 0.0
    misses: float = 0.0

    def run(self, model: Any, prompt: mx.array, n_tokens: int) -> None:
        """Generate once with the experts that are in memory now."""
        before = model.streamer.stats.total
        start = time.perf_counter()
        found = [*self._steps(model, prompt, n_tokens)]
        self.rates.append(n_tokens / (time.perf_counter() - start))
        after = model.streamer.stats.total
        hits, misses = after.hits - before.hits, after.misses - before.misses
        self.hit_rate, self.misses = hits / max(1, hits + misses), misses / n_tokens
        self.guessed = sum(by_draft for _, by_draft in found) / n_tokens
        self.tokens = [token for token, _ in found]

    def _steps(
        self, model: Any, prompt: mx.array, n_tokens: int
    ) -> Iterator[tuple[int, bool]]:
        if self.draft is None:
            for token, _ in generate_step(prompt, model, max_tokens=n_tokens):
                yield int(token), False
            return
        options = {"num_draft_tokens": self.n_drafted, "max_tokens": n_tokens}
        steps = speculative_generate_step(prompt, model, self.draft, **options)
        yield from ((int(token), by_draft) for token, _, by_draft in steps)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this part."""
    add = parser.add_argument
    add("--model", type=Path, default=DEMO, help="a checkpoint (default: the demo's)")
    shares = [100.0, 50.0, 25.0]
    text = "percentages of experts in memory (default: 100 50 25)"
    add("--shares", type=float, nargs="+", default=shares, metavar="P", help=text)
    text = "tokens that a draft guesses (default: 1 3)"
    add("--drafted", type=int, nargs="+", default=[1, 3], metavar="N", help=text)
    add("--bits", type=int, default=2, help="of the second draft (default: 2)")
    add("--tokens", type=int, default=128, metavar="N")
    add("--rounds", type=int, default=5, metavar="N")


def run(args: argparse.Namespace) -> int:
    """Measure all ways in turns at each share, check the tokens and print."""
    table = Table(
        title=f"{args.model.name}, {args.tokens} tokens, {args.rounds} rounds"
    )
    for name in ("in memory", "draft", "drafted", "guessed", "hits", "misses a token"):
        table.add_column(name, justify="right")
    table.add_column("tokens/s", justify="right")
    table.add_column("of none", justify="right")
    with tempfile.TemporaryDirectory(prefix="moeflux-bench-") as folder:
        packed, other = Path(folder) / "packed", Path(folder) / "coarser"
        pack(args.model, packed)
        write_coarser(args.model, other, args.bits)
        drafts = {
            "itself": moeflux_mlx.load(args.model)[0],
            f"itself at {args.bits} bits": moeflux_mlx.load(other)[0],
        }
        for share in args.shares:
            ways = measured(args, packed, share, drafts)
            if any(way.tokens != ways[0].tokens for way in ways):
                Console(stderr=True).print(f"{share:g} %: ways give other tokens")
                return 1
            for way in ways:
                table.add_row(f"{share:g} %", *cells(way, ways[0]))
    Console(highlight=False, width=120).print(table)
    return 0


def write_coarser(source: Path, path: Path, bits: int) -> None:
    """Write a checkpoint's model with its matrices quantised to fewer bits."""
    model, _, config = mlx_lm.load(str(source), return_config=True)
    plain = dequantize_model(model)
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    model, config = quantize_model(plain, config, 32, bits)
    save_model(path, model)
    save_config(config, path / "config.json")
    for file in source.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())


def measured(
    args: argparse.Namespace, packed: Path, share: float, drafts: dict[str, Any]
) -> list[Way]:
    """Return all ways, measured with a share of the experts in memory."""
    with PackedExperts.open(packed) as store:
        strides = [store.layout(i).stride * store.count(i) for i in store.layers]
    budget = round(sum(strides) * share / 100) + POOL_ALIGNMENT
    model, tokenizer = moeflux_mlx.load(packed, expert_memory=budget)
    prompt = mx.array(tokenizer.encode(PROMPT))
    ways = [Way("none")]
    ways += [Way(name, d, n) for name, d in drafts.items() for n in args.drafted]
    for way in ways:
        way.run(model, prompt, args.tokens)
        way.rates.clear()
    for _ in range(args.rounds):
        for way in ways:
            way.run(model, prompt, args.tokens)
    return ways


def cells(way: Way, none: Way) -> list[str]:
    """Return a row of the table."""
    rate = median(way.rates)
    pairs = zip(way.rates, none.rates, strict=True)
    return [
        way.name,
        str(way.n_drafted or "-"),
        f"{way.guessed:.0%}",
        f"{way.hit_rate:.1%}",
        f"{way.misses:.1f}",
        f"{rate:.1f}",
        f"{median(a / b for a, b in pairs):.2f}",
    ]
